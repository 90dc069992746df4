"""From an example to token ids and to which of them count in the loss, whatever the chat template does.

A conversation is rendered to text and cut into pieces, trained and not; each piece is tokenised by itself, so that a
prompt gets the same ids here as when the model is asked. Which pieces are the assistant's:

1. the template's `{% generation %}` markers, where it has them and the model is asked as is rendered;
2. else the difference between renderings: up to the message with a generation prompt, and with the message;
3. else, where a later turn changes how an earlier one is rendered (templates that strip reasoning from the history),
   one example per trained answer, each exactly as the model will see it.

Every trained answer ends with the template's end of turn, or the tokenizer's EOS where the template has none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ftray.data.format import Example, Unusable
from ftray.errors import DataError
from ftray.plain_template import plain_template

# "Role: text" paragraphs, each answer ended by EOS
MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
# private-use characters that mark where an answer begins and ends in a trial rendering
OPEN, CLOSE = "\ue000", "\ue001"

Messages = list[dict[str, Any]]


class Piece(NamedTuple):
    """A stretch of rendered text; `eos`: the EOS token follows it."""

    text: str
    trained: bool
    eos: bool = False


class Turn(NamedTuple):
    """How one answer is asked for and given; `closed`: a token of the template ends it."""

    prompt: str
    answer: str
    closed: bool


class Frame(NamedTuple):
    """What a template puts around the text of an answer that belongs to the answer, e.g. "" and "<|im_end|>"."""

    lead: str
    close: str


@dataclass
class Renderer:
    """Cuts examples into pieces. `train_on`: assistant, last or all."""

    tokenizer: Any
    train_on: str = "assistant"

    def __post_init__(self) -> None:
        template = self.tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default") or next(iter(template.values()), None)
        if not template and not self.tokenizer.eos_token:
            raise DataError("the tokenizer has neither a chat template nor an EOS token; give the model one of them")
        self.template: str = template or plain_template(self.tokenizer)
        self.marked = bool(MARKERS.search(self.template))
        added = self.tokenizer.added_tokens_decoder.values()
        special = {*map(str, self.tokenizer.all_special_tokens), *(token.content for token in added if token.special)}
        special -= {self.tokenizer.bos_token} - {self.tokenizer.eos_token}
        self._special_end = re.compile(_one_of(special).pattern + r"\Z")
        self._closing = _one_of(special | {token.content for token in added} - {self.tokenizer.bos_token})
        self._frames: dict[tuple, dict[int, Frame]] = {}
        self._asked: dict[tuple, dict[int, str] | None] = {}
        self._arguments_as_text = False

    def pieces(self, example: Example) -> list[list[Piece]]:
        """The training examples of a conversation, each a list of pieces. Raises Unusable."""
        messages, tools = _plain(example.messages), example.tools
        if self.train_on == "all":
            return [self._everything(messages, example)]
        answers = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        answers = answers[-1:] if self.train_on == "last" else answers
        weighted = [k for k in answers if example.messages[k].get("weight", 1)]
        trained = [k for k in weighted if k]
        if not trained:
            why = "the only answer has nothing before it" if weighted else "every answer has weight 0"
            raise Unusable("no message to train on", why, bad=False)
        messages = messages[: trained[-1] + 1]
        shape = (*map(_looks, messages), bool(tools), *trained)
        if self.marked and (pieces := self._by_markers(messages, tools, trained, shape)):
            return [pieces]
        if (frames := self._frames.get(shape)) and (pieces := self._by_frames(messages, tools, frames)):
            return [pieces]
        whole = self._whole(messages, tools)
        turns = {k: self._turn(messages, k, tools, whole) for k in trained}
        joined = self._joined(whole, turns)
        if not joined:
            return [[Piece(t.prompt, False), Piece(t.answer, True, eos=not t.closed)] for t in turns.values()]
        if frames := self._found_frames(messages, turns):
            self._frames[shape] = frames
        return [joined]

    def prompt(self, example: Example) -> str:
        """What the model is asked for the last answer, generation prompt included. Raises Unusable."""
        return self.asked(Example(example.messages[: example.last_answer], tools=example.tools))

    def asked(self, example: Example) -> str:
        """What the model is asked with, for an answer to all of the messages. Raises Unusable."""
        return self._render(_plain(example.messages), example.tools, asked=True)

    def whole(self, example: Example) -> Piece:
        """The whole conversation, trained. Raises Unusable."""
        return self._closed(self._whole(_plain(example.messages), example.tools))

    def _everything(self, messages: Messages, example: Example) -> list[Piece]:
        whole = self._whole(messages, example.tools)
        untrained = [k for k, m in enumerate(example.messages) if m.get("weight") == 0 and m["role"] == "assistant"]
        if not untrained:
            return [self._closed(whole)]
        turns = {k: self._turn(messages, k, example.tools, whole) for k in untrained if k}
        joined = self._joined(whole, turns)
        if not joined or 0 in untrained:
            raise Unusable("no example with its answer left out", "the template rewrites earlier turns", bad=False)
        rest = whole[sum(len(piece.text) for piece in joined) :]
        pieces = [Piece(piece.text, not piece.trained) for piece in joined]
        return [*pieces, self._closed(rest)] if rest.strip() else pieces

    def _by_markers(self, messages: Messages, tools: Any, trained: Sequence[int], shape: tuple) -> list[Piece] | None:
        """None where the markers do not stand around every answer, or the model is asked otherwise than is rendered.

        What the model is asked with is never trained, though markers may enclose it: the header of the answer, or the
        opening of a reasoning block.
        """
        texts, spans = self._jinja(messages, tools, return_assistant_tokens_mask=True)
        whole, answers = texts[0], [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        if len(spans[0]) != len(answers):
            return None
        places = {k: span for k, span in zip(answers, spans[0], strict=True) if k in trained}
        if shape not in self._asked:
            self._asked[shape] = self._asked_inside(messages, tools, whole, places)
        asked = self._asked[shape]
        if asked is None:
            return None
        end_of_turn = self._closing.match(whole, _bare_end(whole, places[trained[-1]][1]))
        cuts = []
        for k, (start, end) in places.items():
            _require_answer(messages[k], whole[start:end], k)
            end = _bare_end(whole, end)
            if not self._ended(whole, end):
                if end_of_turn and whole.startswith(end_of_turn[0], end):
                    end += len(end_of_turn[0])
                elif k != trained[-1]:
                    return None
            if not whole.startswith(asked[k], start):
                return None
            cuts.append((start + len(asked[k]), end))
        return self._cut(whole, cuts)

    def _asked_inside(
        self, messages: Messages, tools: Any, whole: str, places: dict[int, Any]
    ) -> dict[int, str] | None:
        """What of each marked answer belongs to the generation prompt."""
        asked = {}
        for k, (start, _) in places.items():
            prompt = self._render(messages[:k], tools, asked=True)
            if not whole.startswith(prompt):
                return None
            asked[k] = whole[start : len(prompt)]
        return asked

    def _by_frames(self, messages: Messages, tools: Any, frames: dict[int, Frame]) -> list[Piece] | None:
        """The answers' places from one rendering with marked answers, framed as in an earlier row of this shape.

        None where the template does not treat the marked text as it treats the text itself.
        """
        marked = [_mark(message) if k in frames else message for k, message in enumerate(messages)]
        whole = self._whole(messages, tools)
        parts = re.split(f"[{OPEN}{CLOSE}]", self._render(marked, tools))
        if len(parts) != 2 * len(frames) + 1 or "".join(parts) != whole:
            return None
        cuts, at = [], 0
        for n, frame in enumerate(frames.values()):
            start = at + len(parts[2 * n])
            at = start + len(parts[2 * n + 1])
            if not whole[:start].endswith(frame.lead) or not whole.startswith(frame.close, at):
                return None
            cuts.append((start - len(frame.lead), at + len(frame.close)))
        return self._cut(whole, cuts)

    def _joined(self, whole: str, turns: dict[int, Turn]) -> list[Piece] | None:
        """One example for all turns, where the whole conversation begins with each of them as it is asked and given."""
        if not all(whole.startswith(turn.prompt + turn.answer) for turn in turns.values()):
            return None
        if not all(turn.closed for turn in list(turns.values())[:-1]):
            return None
        return self._cut(whole, [(len(t.prompt), len(t.prompt) + len(t.answer)) for t in turns.values()])

    def _cut(self, whole: str, cuts: Sequence[tuple[int, int]]) -> list[Piece]:
        pieces, at = [], 0
        for start, end in cuts:
            pieces += [Piece(whole[at:start], False), Piece(whole[start:end], True)]
            at = end
        last = pieces[-1]
        pieces[-1] = Piece(last.text, True, eos=not self._ended(last.text))
        return [piece for piece in pieces if piece.text or piece.eos]

    def _turn(self, messages: Messages, k: int, tools: Any, whole: str) -> Turn:
        prompt = self._render(messages[:k], tools, asked=True)
        given = whole if k == len(messages) - 1 else self._render(messages[: k + 1], tools)
        content = (messages[k].get("content") or "").strip()
        if given.startswith(prompt):
            answer = given[len(prompt) :]
        elif (written := _without_overlap(prompt, content)) != content:
            # the generation prompt opens the reasoning that was written, and the template strips it from the message:
            # what was written follows the prompt, and ends as any answer does
            other = self._render([*messages[:k], {**messages[k], "content": OPEN}], tools)
            answer = content = written
            answer += other[other.rindex(OPEN) + 1 :] if OPEN in other else ""
        else:
            # the generation prompt opens a block that this answer does not have
            common = self._common(prompt, given)
            if common < len(self._render(messages[:k], tools)):
                raise Unusable("the chat template renders an answer otherwise than it asks for it", f"message {k + 1}")
            answer = given[common:]
        _require_answer(messages[k], answer, k)
        end = self._end_of(answer, content if "tool_calls" not in messages[k] else "")
        return Turn(prompt, answer[:end] if end else answer.rstrip(), bool(end))

    def _common(self, prompt: str, given: str) -> int:
        """Length of the common beginning, which does not end inside a token of the template."""
        short = min(len(prompt), len(given))
        common = next((n for n in range(short) if prompt[n] != given[n]), short)
        cut = (m for m in self._closing.finditer(given) if m.start() < common < m.end())
        return next((m.start() for m in cut), common)

    def _end_of(self, answer: str, content: str) -> int:
        """Where the token that ends the turn ends; 0 without one. Tool calls hold special tokens of their own."""
        if content and content in answer:
            match = self._closing.search(answer, self._after(answer, content))
            return match.end() if match else 0
        return max((match.end() for match in self._closing.finditer(answer)), default=0)

    def _after(self, text: str, content: str) -> int:
        """Where the content ends in a text: at its last place with a closing token behind it, or else its first."""
        at = text.rfind(content)
        while at >= 0 and not self._closing.match(text, at + len(content)):
            at = text.rfind(content, 0, at + len(content) - 1)
        return (at if at >= 0 else text.find(content)) + len(content)

    def _found_frames(self, messages: Messages, turns: dict[int, Turn]) -> dict[int, Frame] | None:
        frames = {}
        for k, (_, answer, _) in turns.items():
            content = (messages[k].get("content") or "").strip()
            if not content or content not in answer:
                return None
            end = self._after(answer, content)
            frames[k] = Frame(answer[: end - len(content)], answer[end:])
        return frames

    def _closed(self, text: str) -> Piece:
        """All of a text as one trained piece that ends with the end of turn or EOS and nothing after it."""
        bare = text.rstrip()
        return Piece(bare, True) if self._ended(bare) else Piece(text, True, eos=True)

    def _ended(self, text: str, end: int | None = None) -> bool:
        """Whether a special token stands right before `end`."""
        end = len(text) if end is None else end
        return self._special_end.search(text, max(0, end - 64), end) is not None

    def _whole(self, messages: Messages, tools: Any) -> str:
        whole = self._render(messages, tools)
        for message in messages:
            names = [call["function"]["name"] for call in message.get("tool_calls", ())]
            if not all(name in whole for name in names):
                raise Unusable("the chat template leaves tool calls out", ", ".join(names))
        return whole

    def _render(self, messages: Messages, tools: Any, *, asked: bool = False) -> str:
        return self._jinja(messages, tools, add_generation_prompt=asked)[0][0]

    def _jinja(self, messages: Messages, tools: Any, **options: Any) -> Any:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        given = _with_text_arguments(messages) if self._arguments_as_text else messages
        try:
            return render_jinja_template(
                [given], tools=tools, chat_template=self.template, **self.tokenizer.special_tokens_map, **options
            )
        except (TemplateError, TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
            if (
                isinstance(error, TypeError)
                and not self._arguments_as_text
                and _with_text_arguments(messages) != messages
            ):
                # most templates write the arguments of a call as JSON, a few join them to text as they are
                self._arguments_as_text = True
                return self._jinja(messages, tools, **options)
            # templates are code that comes with a model: whatever a row makes them raise is about that row
            roles = ", ".join(message["role"] for message in messages)
            raise Unusable("the chat template refuses the row", f"{error} (roles: {roles})") from None


def _plain(messages: Messages) -> Messages:
    """What a template sees: no weights, and no key without a value, which many templates would print as None."""
    return [{key: value for key, value in m.items() if key != "weight" and value is not None} for m in messages]


def _one_of(tokens: set[str]) -> re.Pattern[str]:
    """White space, then one of the tokens, or several without anything between."""
    names = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True) if token)
    return re.compile(rf"\s*(?:{names})+" if names else r"(?!)")


def _bare_end(text: str, end: int) -> int:
    """`end` without the white space before it."""
    while end and text[end - 1].isspace():
        end -= 1
    return end


def _require_answer(message: dict[str, Any], answer: str, k: int) -> None:
    """Raises Unusable where a template does not write the text of a message, or writes it in another form."""
    content = (message.get("content") or "").strip()
    if content.rpartition("\n")[2][-40:] not in answer:
        raise Unusable("the chat template does not write the answer", f"message {k + 1}: {content[-40:]!r}")


def _with_text_arguments(messages: Messages) -> Messages:
    def call_of(call: dict[str, Any]) -> dict[str, Any]:
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": text}}

    return [
        {**message, "tool_calls": [call_of(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _looks(message: dict[str, Any]) -> tuple:
    """What of a message may decide how a template renders a conversation, its words aside."""
    content = message.get("content") or ""
    looks = (message["role"], "think>" in content, content[:1].isspace(), content[-1:].isspace(), not content)
    return looks if len(message) == 2 else (*looks, *sorted(message))


def _mark(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    bare = content.strip()
    start = content.index(bare)
    return {**message, "content": f"{content[:start]}{OPEN}{bare}{CLOSE}{content[start + len(bare) :]}"}


def _without_overlap(prompt: str, content: str) -> str:
    longest = next((n for n in range(min(len(prompt), len(content)), 0, -1) if prompt.endswith(content[:n])), 0)
    return content[longest:]
