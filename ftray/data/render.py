"""From an example to token ids and to which of them count in the loss, whatever the chat template does.

A conversation is rendered to text and cut into pieces, trained and not; each piece is tokenised by itself, so that a
prompt gets the same ids here as when the model is asked. Which pieces are the assistant's:

1. the template's `{% generation %}` markers, where it has them;
2. else the difference between renderings: up to the message with a generation prompt, and with the message;
3. else, where a later turn changes how an earlier one is rendered (templates that strip reasoning from the history),
   one example per trained answer, each exactly as the model will see it.

Every trained answer ends with the template's end of turn, or the tokenizer's EOS where the template has none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ftray.data.format import Example, Unusable
from ftray.errors import DataError

# What a tokenizer without a chat template gets: "Role: text" paragraphs, each answer ended by EOS.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ 'Assistant:' }}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{{ '\n\n' }}"
    "{% else %}{{ message['role'].capitalize() + ': ' + message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Piece(NamedTuple):
    """A stretch of rendered text; `eos`: the EOS token follows it."""

    text: str
    trained: bool
    eos: bool = False


class Turn(NamedTuple):
    """How one answer is asked for and given: prompt + answer is what the template renders up to the end of the turn."""

    prompt: str
    answer: str
    closed: bool


@dataclass
class Renderer:
    """Cuts examples into pieces. `train_on`: assistant, last or all."""

    tokenizer: Any
    train_on: str = "assistant"

    def __post_init__(self) -> None:
        template = self.tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        self.template: str = template or PLAIN_TEMPLATE
        if not template and not self.tokenizer.eos_token:
            raise DataError("the tokenizer has neither a chat template nor an EOS token; give the model one of them")
        self.marked = bool(MARKERS.search(self.template))
        self._ends = _end_pattern(self.tokenizer)

    def pieces(self, example: Example) -> list[list[Piece]]:
        """The training examples of a conversation, each a list of pieces. Raises Unusable."""
        messages, trained = self._trained(example)
        if self.train_on == "all":
            return [self._everything(messages, example)]
        if not trained:
            raise Unusable("no message to train on", "every answer has weight 0", bad=False)
        messages = messages[: trained[-1] + 1]
        if self.marked and (pieces := self._by_markers(messages, example, trained)):
            return [pieces]
        turns = {k: self._turn(messages, k, example) for k, m in enumerate(messages) if m["role"] == "assistant" and k}
        trained = [k for k in trained if k in turns]
        if not trained:
            raise Unusable("no message to train on", "the only answer has nothing before it", bad=False)
        whole = self._render(messages, example.tools)
        return self._joined(whole, turns, trained) or [self._alone(turns[k]) for k in trained]

    def prompt(self, example: Example) -> str:
        """What the model is asked for the last answer, generation prompt included. Raises Unusable."""
        return self._render(_plain(example.messages[: example.last_answer]), example.tools, asked=True)

    def whole(self, example: Example) -> str:
        """The whole conversation as text. Raises Unusable."""
        return self._render(_plain(example.messages), example.tools)

    def _trained(self, example: Example) -> tuple[list[dict[str, Any]], list[int]]:
        """The messages without weights, and the numbers of those to train on."""
        answers = [k for k, message in enumerate(example.messages) if message["role"] == "assistant"]
        answers = answers[-1:] if self.train_on == "last" else answers
        return _plain(example.messages), [k for k in answers if example.messages[k].get("weight", 1)]

    def _everything(self, messages: list[dict[str, Any]], example: Example) -> list[Piece]:
        whole = self._render(messages, example.tools)
        untrained = [k for k, m in enumerate(example.messages) if m.get("weight") == 0 and m["role"] == "assistant"]
        if not untrained:
            return [self.closed(whole)]
        turns = {k: self._turn(messages, k, example) for k in untrained if k}
        joined = self._joined(whole, turns, list(turns))
        if not joined:
            raise Unusable("train_on: all cannot leave a message out", "the template rewrites earlier turns", bad=False)
        return [Piece(piece.text, not piece.trained, piece.eos) for piece in joined[0]]

    def _by_markers(
        self, messages: list[dict[str, Any]], example: Example, trained: Sequence[int]
    ) -> list[Piece] | None:
        whole, spans = self._render_marked(messages, example.tools)
        answers = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        if len(spans) != len(answers):
            return None
        cuts = []
        for k, (start, end) in zip(answers, spans, strict=True):
            if k not in trained:
                continue
            if not self.ended(whole[:end]):
                match = self._ends.match(whole, end)
                if not match and k != trained[-1]:
                    return None
                end = match.end() if match else end
            cuts.append((start, end))
        return self._cut(whole, cuts)

    def _joined(self, whole: str, turns: dict[int, Turn], trained: Sequence[int]) -> list[list[Piece]] | None:
        """One example for all turns, where the whole conversation begins with each of them as it is asked and given."""
        if not all(whole.startswith(turn.prompt + turn.answer) for turn in turns.values()):
            return None
        if not all(turns[k].closed for k in trained[:-1]):
            return None
        cuts = [(len(turns[k].prompt), len(turns[k].prompt) + len(turns[k].answer)) for k in trained]
        return [self._cut(whole, cuts)]

    def _cut(self, whole: str, cuts: Sequence[tuple[int, int]]) -> list[Piece]:
        pieces, at = [], 0
        for start, end in cuts:
            pieces += [Piece(whole[at:start], False), Piece(whole[start:end], True)]
            at = end
        last = pieces[-1]
        pieces[-1] = Piece(last.text, True, eos=not self.ended(last.text))
        return [piece for piece in pieces if piece.text]

    def _alone(self, turn: Turn) -> list[Piece]:
        return [Piece(turn.prompt, False), Piece(turn.answer, True, eos=not turn.closed)]

    def _turn(self, messages: list[dict[str, Any]], k: int, example: Example) -> Turn:
        prompt = self._render(messages[:k], example.tools, asked=True)
        given = self._render(messages[: k + 1], example.tools)
        content = (messages[k].get("content") or "").strip()
        if given.startswith(prompt):
            answer = given[len(prompt) :]
        elif content and content in given:
            # the generation prompt says more than the rendered message begins with, e.g. it opens a thinking block
            answer = _without_overlap(prompt, content) + given[given.rfind(content) + len(content) :]
        else:
            raise Unusable("the chat template renders an answer otherwise than it asks for it", f"message {k + 1}")
        end = self._end_of(answer, content if "tool_calls" not in messages[k] else "")
        return Turn(prompt, answer[:end] if end else answer.rstrip(), bool(end))

    def _end_of(self, answer: str, content: str) -> int:
        """Where the token that ends the turn ends; 0 without one. Tool calls hold special tokens of their own."""
        at = answer.rfind(content) if content else -1
        if at >= 0:
            match = self._ends.search(answer, at + len(content))
            return match.end() if match else 0
        return max((match.end() for match in self._ends.finditer(answer)), default=0)

    def closed(self, text: str) -> Piece:
        """All of a text as one trained piece that ends with the end of turn or EOS and nothing after it."""
        bare = text.rstrip()
        return Piece(bare, True) if self.ended(bare) else Piece(text, True, eos=True)

    def ended(self, text: str) -> bool:
        last = None
        for last in self._ends.finditer(text, max(0, len(text) - 64)):
            pass
        return last is not None and last.end() == len(text)

    def _render(self, messages: list[dict[str, Any]], tools: Any, *, asked: bool = False) -> str:
        return self._jinja(messages, tools, add_generation_prompt=asked)[0][0]

    def _render_marked(self, messages: list[dict[str, Any]], tools: Any) -> tuple[str, list[tuple[int, int]]]:
        texts, spans = self._jinja(messages, tools, return_assistant_tokens_mask=True)
        return texts[0], spans[0]

    def _jinja(self, messages: list[dict[str, Any]], tools: Any, **options: Any) -> Any:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            return render_jinja_template(
                [messages], tools=tools, chat_template=self.template, **self.tokenizer.special_tokens_map, **options
            )
        except (TemplateError, TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
            # templates are code that comes with a model: whatever a row makes them raise is about that row
            roles = ", ".join(message["role"] for message in messages)
            raise Unusable("the chat template refuses the row", f"{error} (roles: {roles})") from None


def _plain(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a template sees: no weights, and no key without a value, which many templates would print as None."""
    return [
        {key: value for key, value in message.items() if key != "weight" and value is not None} for message in messages
    ]


def _end_pattern(tokenizer: Any) -> re.Pattern[str]:
    """White space, then a special token: what closes an answer."""
    special = {str(token) for token in tokenizer.all_special_tokens}
    special |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special -= {tokenizer.bos_token} - {tokenizer.eos_token}
    names = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True) if token)
    return re.compile(rf"\s*(?:{names})" if names else r"(?!)")


def _without_overlap(prompt: str, content: str) -> str:
    longest = next((n for n in range(min(len(prompt), len(content)), 0, -1) if prompt.endswith(content[:n])), 0)
    return content[longest:]
