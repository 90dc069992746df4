"""How a row is laid out, and how it becomes an example: a list of messages, or a text.

    messages           {"messages": [{"role", "content", "weight"?, "tool_calls"?}, ...], "tools"?: [...]}
    prompt_completion  {"prompt": str or messages, "completion": str or messages}; also question/answer and the like
    instruction        {"instruction", "input"?, "output"}
    sharegpt           {"conversations": [{"from", "value"}, ...]}
    text               {"text": str}
    pairs              {"prompt", "chosen", "rejected": str or messages, "system"?: str}; without a prompt, chosen and
                       rejected are conversations, and what both begin with is the prompt. For reward, a "margin"
    judged             {"prompt", "completion": str or messages, "label": true/false, 1/0, good/bad, "system"?: str}
    prompt             {"prompt": str or messages}, without an answer: for objectives that sample answers
    labelled           {"text": str, "pair"?: str, "label": str, number or list}; also sentence/category
    tagged             {"tokens": [str, ...], "tags": [str or number, ...]}; also words/ner_tags; what CoNLL files hold

`recognise` looks at a source's first rows; `Layout.example` turns one row into an example or raises `Unusable`.
"""

from __future__ import annotations

import difflib
import json
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ftray.config.schema import Source
from ftray.errors import DataError

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user", "customer": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "bing": "assistant", "bard": "assistant", "function_call": "assistant", "agent": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool", "tool_response": "tool",
}  # fmt: skip
# column pairs read as prompt and completion when nothing is said; the first pair that a row has wins
PAIRS = (
    ("prompt", "completion"), ("question", "answer"), ("prompt", "response"), ("instruction", "response"),
    ("query", "response"), ("query", "answer"), ("question", "response"), ("input", "output"), ("input", "target"),
    ("source", "target"), ("prompt", "answer"), ("prompt", "output"),
)  # fmt: skip
ASKED = ("prompt", "question", "instruction", "input", "query")  # columns read as the prompt of a pair
GOOD = {"true", "1", "1.0", "good", "yes", "up", "desirable", "positive", "like", "thumbs_up", "👍"}
BAD = {
    "false",
    "0",
    "0.0",
    "-1",
    "-1.0",
    "bad",
    "no",
    "down",
    "undesirable",
    "negative",
    "dislike",
    "thumbs_down",
    "👎",
}
# beside those, for objectives that sample answers: what these are compared with
REFERENCES = (
    ("prompt", "reference"), ("question", "reference"), ("prompt", "ground_truth"), ("prompt", "solution"),
    ("problem", "answer"), ("problem", "solution"),
)  # fmt: skip
ASKS = ("prompt", "question", "problem", "query")  # columns that hold a prompt
TURNS = ("messages", "conversations", "conversation")  # columns that hold a conversation
# columns that may stand beside `text` without making its meaning doubtful
BESIDE_TEXT = {
    "id",
    "_id",
    "idx",
    "index",
    "url",
    "source",
    "title",
    "meta",
    "metadata",
    "timestamp",
    "date",
    "language",
    "lang",
}


# columns of labelled rows when nothing is said, the first that a row has wins: the text, a second text, the label
TEXTS = (
    "text", "sentence", "sentence1", "premise", "question1", "utterance", "query", "question", "prompt", "input",
    "content", "review", "comment", "tweet", "message", "body", "document", "title", "instruction", "source",
)  # fmt: skip
SECOND_TEXTS = ("pair", "text_pair", "sentence2", "hypothesis", "question2", "passage", "context")
LABELS = (
    "label", "labels", "category", "categories", "intent", "intents", "class", "classes", "target", "tags", "tag",
    "topic", "topics", "sentiment", "emotion", "emotions", "score", "rating", "similarity", "stars", "value",
    "completion", "output", "answer",
)  # fmt: skip
# columns of tagged rows
TOKENS = ("tokens", "words")
TAGS = ("tags", "ner_tags", "labels", "ner", "label", "pos_tags", "upos")


class Unusable(Exception):
    """A row that is not used. `kind` is what the report counts; `detail` says more; `bad`: an error under `strict`."""

    def __init__(self, kind: str, detail: str = "", *, bad: bool = True):
        super().__init__(kind, detail)
        self.kind, self.detail, self.bad = kind, detail, bad

    @property
    def reason(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else self.kind

    def __str__(self) -> str:
        return self.reason


class Refused(Unusable):
    """A row that ends the preparation, whatever `strict` says: the run, or another row, says the opposite."""


@dataclass(slots=True)
class Example:
    """Either messages (role, content, and optionally weight 0 or 1, tool_calls, ...) or a text.

    Of a pair, `messages` is the conversation with the chosen answer and `rejected` the one with the other; of a judged
    row `good` is its label. A labelled text has its label as the row says it, and perhaps a second text; a tagged one
    its `words`, of which `label` lists the tags.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    text: str = ""
    tools: list[dict[str, Any]] | None = None
    rejected: list[dict[str, Any]] = field(default_factory=list)
    good: bool | None = None
    margin: float = 0.0
    pair: str | None = None
    label: Any = None
    words: list[str] = field(default_factory=list)

    @property
    def last_answer(self) -> int:
        """Number of the last message of the assistant; -1 if there is none."""
        roles = [message["role"] for message in self.messages]
        return len(roles) - 1 - roles[::-1].index("assistant") if "assistant" in roles else -1

    @property
    def shared(self) -> int:
        """Messages with which both conversations of a pair begin: its prompt."""
        both = list(zip(self.messages, self.rejected, strict=False))
        return next((n for n, (one, other) in enumerate(both) if one != other), len(both))


@dataclass(frozen=True)
class Layout:
    """How the rows of one source are read. `columns`: our name -> the file's. `answered`: a row must have an answer."""

    kind: str
    columns: dict[str, str]
    template: str | None = None
    system: str | None = None
    unused: tuple[str, ...] = ()
    answered: bool = True

    def example(self, row: Mapping[str, Any]) -> Example:
        """The canonical example of a row. Raises Unusable."""
        if self.kind in ("text", "labelled"):
            text = _string(row, self.columns["text"])
            if self.template:
                text = self._fill(row)
            if self.kind == "text":
                return Example(text=text)
            pair = _string(row, self.columns["pair"]) if "pair" in self.columns else None
            return Example(text=text, pair=pair, label=_label(row, self.columns["label"]))
        if self.kind == "tagged":
            return self._tagged(row)
        if self.kind == "pairs":
            return self._pair(row)
        messages = READERS[self.kind](self, row)
        tools = _tools(row.get(self.columns.get("tools", "tools")))
        messages = self._with_system(messages, row)
        if self.answered and not any(message["role"] == "assistant" for message in messages):
            raise Unusable("no message of the assistant")
        return Example(messages=messages, tools=tools, good=self._label(row) if self.kind == "judged" else None)

    def _tagged(self, row: Mapping[str, Any]) -> Example:
        words, tags = (_list(row, self.columns[name]) for name in ("tokens", "tags"))
        if len(words) != len(tags):
            raise Unusable("numbers of tokens and tags differ", f"{len(words)} tokens, {len(tags)} tags")
        if not all(isinstance(word, str) for word in words):
            raise Unusable("a token is not text", repr(next(word for word in words if not isinstance(word, str))))
        return Example(text=" ".join(words), words=words, label=tags)

    def _pair(self, row: Mapping[str, Any]) -> Example:
        chosen, rejected = (self._with_system(read_side(self, row, side), row) for side in ("chosen", "rejected"))
        if chosen == rejected:
            raise Unusable("chosen and rejected are the same")
        tools = _tools(row.get(self.columns.get("tools", "tools")))
        example = Example(chosen, tools=tools, rejected=rejected, margin=self._margin(row))
        if not example.shared or all(message["role"] == "system" for message in chosen[: example.shared]):
            raise Unusable("chosen and rejected do not answer the same prompt", "their first messages differ")
        for side, messages in (("chosen", chosen), ("rejected", rejected)):
            if not any(message["role"] == "assistant" for message in messages[example.shared :]):
                raise Unusable(f"{side} has no answer", "no message of the assistant after what both begin with")
        return example

    def _margin(self, row: Mapping[str, Any]) -> float:
        if "margin" not in self.columns:
            return 0.0
        value = self.value(row, "margin")
        try:
            margin = float(value)
        except (TypeError, ValueError):
            margin = math.nan
        if not math.isfinite(margin):
            raise Unusable("a margin is no number", f"{value!r}")
        return margin

    def _label(self, row: Mapping[str, Any]) -> bool:
        label = self.value(row, "label")
        word = str(label).strip().lower()
        if word not in GOOD | BAD:
            raise Unusable("a label is neither good nor bad", f"{label!r}; write true or false, 1 or 0, good or bad")
        return word in GOOD

    def _with_system(self, messages: list[dict[str, Any]], row: Mapping[str, Any]) -> list[dict[str, Any]]:
        said = row.get(self.columns["system"]) if "system" in self.columns else None
        system = said if isinstance(said, str) and said.strip() else self.system
        if system and messages[0]["role"] != "system":
            return [{"role": "system", "content": system}, *messages]
        return messages

    def value(self, row: Mapping[str, Any], ours: str) -> Any:
        value = row.get(self.columns[ours])
        if value is None:
            raise Unusable(f"no value in column '{self.columns[ours]}'")
        return value

    def _fill(self, row: Mapping[str, Any]) -> str:
        assert self.template is not None
        values = {}
        for name in _fields(self.template):
            value = row.get(self.columns.get(name, name))
            # a missing `input` is how instruction data says that there is none
            if value is None and name != "input":
                raise Unusable(f"no value in column '{self.columns.get(name, name)}'", "the template needs it")
            values[name] = (
                "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            )
        return self.template.format(**values)

    def prompt(self, row: Mapping[str, Any], default: str) -> str:
        return self._fill(row) if self.template else default


def recognise(rows: Sequence[Mapping[str, Any]], source: Source, *, objective: str, template: str | None = None,
              system: str | None = None) -> Layout:  # fmt: skip
    """The layout of a source, from what the run says and its first rows.

    Raises DataError, naming the columns there are, when a named column does not exist or nothing fits.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    where = f"{source.path}: "
    columns = dict(source.columns)
    for ours, theirs in columns.items():
        if theirs not in names:
            raise DataError(
                f"{where}no column '{theirs}' (data.sources columns: {ours}){_near(theirs, names)}; {_have(names)}"
            )
    known = {name: name for name in names} | columns
    kind = source.format if source.format != "auto" else _kind(rows, known, columns, objective)
    kind = "tagged" if kind == "conll" else kind
    if (wanted := LEARNS_FROM.get(objective)) and kind not in wanted:
        needs = " or ".join(f"{one} rows, which need {NEEDS[one]}" for one in wanted)
        raise DataError(
            f"{where}objective {objective} learns from {needs}; {_have(names)}. "
            "Map them with columns, or change the objective"
        )
    if wanted is None and any(kind in kinds for kinds in LEARNS_FROM.values()):
        raise DataError(
            f"{where}format {kind} is not for {objective}, which learns from whole answers; leave format out"
        )
    if kind is None:
        raise DataError(
            f"{where}cannot tell how its rows are laid out; {_have(names)}. Name them, e.g. "
            "columns: {prompt: <column>, completion: <column>}, or set format"
        )
    used = _used(kind, known, columns)
    if used is None:
        raise DataError(f"{where}format {kind} needs {NEEDS[kind]}; {_have(names)}. Map them with columns")
    if objective != "reward":
        used.pop("margin", None)
    if template:
        used |= _template_columns(template, known, names, where)
        if kind in ("messages", "sharegpt", "tagged"):
            raise DataError(f"{where}data.template fills a prompt, but its rows are {kind}; leave the template out")
    unused = tuple(name for name in names if name not in used.values())
    return Layout(kind, used, template=template, system=system, unused=unused, answered=objective != SAMPLED)


NEEDS = {
    "messages": "a column 'messages'",
    "prompt_completion": "columns 'prompt' and 'completion'",
    "instruction": "columns 'instruction' and 'output'",
    "sharegpt": "a column 'conversations'",
    "text": "a column 'text'",
    "pairs": "columns 'chosen' and 'rejected', with 'prompt' unless they are whole conversations",
    "judged": "columns 'prompt', 'completion' and 'label'",
    "prompt": "a column 'prompt'",
    "labelled": "columns 'text' and 'label'",
    "tagged": "columns 'tokens' and 'tags', or a CoNLL file",
}
LEARNS_FROM = {
    "dpo": ("pairs",),
    "orpo": ("pairs",),
    "kto": ("judged",),
    "reward": ("pairs", "judged"),
    "classification": ("labelled",),
    "regression": ("labelled",),
    "token_classification": ("tagged",),
}
"""What rows an objective needs, one of these; another reads any of the other formats."""
SAMPLED = "sampled"
"""For `recognise`: an objective that samples answers, so that rows need none."""


def _kind(
    rows: Sequence[Mapping[str, Any]], known: Mapping[str, str], mapped: Mapping[str, str], objective: str
) -> str | None:
    if wanted := LEARNS_FROM.get(objective):
        return next((kind for kind in wanted if _used(kind, known, mapped)), None)
    if "prompt" in mapped and "completion" in mapped:
        return "prompt_completion"
    for name in TURNS:
        turns = _json(next((row[known[name]] for row in rows if name in known and row.get(known[name])), None))
        if isinstance(turns, list) and turns and isinstance(turns[0], Mapping):
            return "sharegpt" if "from" in turns[0] else "messages"
    if "instruction" in known and "output" in known:
        return "instruction"
    sampled = objective == SAMPLED
    if any(prompt in known and answer in known for prompt, answer in (*PAIRS, *(REFERENCES if sampled else ()))):
        return "prompt_completion"
    if sampled and any(name in known for name in ASKS):
        return "prompt"
    # beside other columns a text is often the prompt of a label, so only pre-training takes it for what is learnt
    if "text" in known and ("text" in mapped or objective == "pretrain" or {*known} - {"text"} <= BESIDE_TEXT):
        return "text"
    return None


def _used(kind: str, known: Mapping[str, str], mapped: Mapping[str, str]) -> dict[str, str] | None:
    """Our name -> the file's, for the columns that a format reads; None when it lacks one."""

    def first(groups: Sequence[tuple[str, ...]], names: Sequence[str]) -> dict[str, str] | None:
        ranked = sorted(groups, key=lambda group: -len({*group} & {*mapped}))
        group = next((group for group in ranked if {*group} <= {*known}), None)
        if group is None:
            return None
        return {name: known[column] for name, column in zip(names[len(names) - len(group) :], group, strict=True)}

    used = {
        "messages": lambda: first([(name,) for name in TURNS], ["messages"]),
        "sharegpt": lambda: first([(name,) for name in TURNS], ["messages"]),
        "prompt_completion": lambda: first((*PAIRS, *REFERENCES), ["prompt", "completion"]),
        "instruction": lambda: first([("instruction", "output")], ["instruction", "output"]),
        "text": lambda: first([("text",)], ["text"]),
        "pairs": lambda: first(
            [*((asked, "chosen", "rejected") for asked in ASKED), ("chosen", "rejected")],
            ["prompt", "chosen", "rejected"],
        ),
        "judged": lambda: first([(*pair, "label") for pair in PAIRS], ["prompt", "completion", "label"]),
        "prompt": lambda: first([(name,) for name in ASKS], ["prompt"]),
        "labelled": lambda: _by_name(known, label=LABELS, text=TEXTS, pair=SECOND_TEXTS),
        "tagged": lambda: _by_name(known, tokens=TOKENS, tags=TAGS),
    }[kind]()
    optional = {
        "instruction": ("input", "tools"),
        "text": (),
        "labelled": (),
        "tagged": (),
        "pairs": ("tools", "system", "margin"),
        "judged": ("tools", "system"),
    }.get(kind, ("tools",))
    return used and used | {name: known[name] for name in optional if name in known}


def _by_name(known: Mapping[str, str], **wanted: Sequence[str]) -> dict[str, str] | None:
    """Columns that the run names win; no column is two things; all but a `pair` must be there."""
    found: dict[str, str] = {}
    for ours, names in wanted.items():
        candidates = [ours, *names]
        column = next((known[name] for name in candidates if name in known and known[name] not in found.values()), None)
        if column is not None:
            found[ours] = column
    return found if {*wanted} - {"pair"} <= {*found} else None


def _label(row: Mapping[str, Any], column: str) -> Any:
    """The label as it stands there; text stripped, a list in JSON read. Raises Unusable where there is none."""
    value = row.get(column)
    value = _json(value.strip()) if isinstance(value, str) else value
    if value is None or value == "" or value != value:  # a missing number in Parquet is NaN, which is not itself
        raise Unusable("no label", f"column '{column}' is empty")
    return value


def _list(row: Mapping[str, Any], column: str) -> list[Any]:
    value = _json(row.get(column))
    if not isinstance(value, list):
        raise Unusable(f"column '{column}' is not a list", type(value).__name__)
    if not value:
        raise Unusable(f"column '{column}' is empty")
    return value


def _read_messages(layout: Layout, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return read_turns(layout.value(row, "messages"))


def _read_pair(layout: Layout, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return read_side(layout, row, "completion")


def read_side(layout: Layout, row: Mapping[str, Any], answer: str) -> list[dict[str, Any]]:
    """The conversation of a row's prompt and the answer in the column `answer`; without a prompt, the answer's own."""
    completion = _turns_in(layout.value(row, answer))
    if "prompt" not in layout.columns:
        return read_turns(completion)
    prompt = _turns_in(layout.value(row, "prompt"))
    if _is_turns(prompt) and not layout.template:
        before = [
            {**message, "weight": 0} if message["role"] == "assistant" else message for message in read_turns(prompt)
        ]
    else:
        before = [{"role": "user", "content": layout.prompt(row, _text(prompt, "prompt"))}]
    if _is_turns(completion):
        return _continued(before, read_turns(completion))
    return [*before, {"role": "assistant", "content": _text(completion, answer)}]


def _continued(before: list[dict[str, Any]], turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Some files repeat the prompt in the answer's messages."""
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in before]
    return [*before, *turns[len(before) :]] if turns[: len(before)] == plain else before + turns


def _read_prompt(layout: Layout, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    prompt = _turns_in(layout.value(row, "prompt"))
    if _is_turns(prompt) and not layout.template:
        return read_turns(prompt)
    return [{"role": "user", "content": layout.prompt(row, _text(prompt, "prompt"))}]


def _read_instruction(layout: Layout, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    instruction, more = _string(row, layout.columns["instruction"]), row.get(layout.columns.get("input", "input"))
    asked = f"{instruction}\n\n{more}" if more else instruction
    return [
        {"role": "user", "content": layout.prompt(row, asked)},
        {"role": "assistant", "content": _string(row, layout.columns["output"])},
    ]


READERS = {
    "messages": _read_messages,
    "prompt_completion": _read_pair,
    "instruction": _read_instruction,
    "sharegpt": _read_messages,
    "judged": _read_pair,
    "prompt": _read_prompt,
}


def read_turns(turns: Any) -> list[dict[str, Any]]:
    """Checked messages from OpenAI or ShareGPT turns. Raises Unusable, naming the message (1, 2, ...)."""
    turns = _json(turns)
    if not isinstance(turns, list):
        raise Unusable("messages are not a list", type(turns).__name__)
    if not turns:
        raise Unusable("no messages")
    return [_turn(turn, number) for number, turn in enumerate(turns, 1)]


def _turn(turn: Any, number: int) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise Unusable("a message is not an object", f"message {number}")
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise Unusable("unknown role", f"message {number} has role {role!r}; known: {', '.join(ROLES)}")
    message: dict[str, Any] = {"role": ROLES[role], "content": _content(turn.get("content", turn.get("value")), number)}
    if calls := _json(turn.get("tool_calls")):
        if not isinstance(calls, list):
            raise Unusable("tool calls are not a list", f"message {number}")
        message["tool_calls"] = [_call(call, number) for call in calls]
    elif message["content"] is None:
        raise Unusable("a message has no content", f"message {number}")
    for key in ("name", "tool_call_id", "reasoning_content", "thinking"):
        if turn.get(key) is not None:
            message[key] = turn[key]
    weight = turn.get("weight")
    if weight is not None:
        if weight not in (0, 1):
            raise Unusable("a message's weight is not 0 or 1", f"message {number} has {weight!r}")
        message["weight"] = int(weight)
    return message


def _content(content: Any, number: int) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content
        ]
        if all(isinstance(text, str) for text in texts):
            return "".join(texts)  # type: ignore[arg-type]
        raise Unusable("a message's content is not only text", f"message {number}")
    raise Unusable("a message's content is not text", f"message {number} has {type(content).__name__}")


def _call(call: Any, number: int) -> dict[str, Any]:
    """A tool call, with arguments as an object: templates write it as JSON, so a string would be quoted twice."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise Unusable("a tool call names no function", f"message {number}")
    arguments = _json(function.get("arguments", {}))
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}


def _tools(value: Any) -> list[dict[str, Any]] | None:
    value = _json(value)
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise Unusable("tools are not a list of objects")
    return [dict(tool) for tool in value]


def _json(value: Any) -> Any:
    """CSV and Parquet files carry lists and objects as JSON strings."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _turns_in(value: Any) -> Any:
    """The list of messages that a value is or holds as JSON; any other text, JSON answers included, as it is."""
    parsed = _json(value)
    return parsed if _is_turns(parsed) else value


def _is_turns(value: Any) -> bool:
    turns = isinstance(value, list) and all(isinstance(item, Mapping) and {"role", "from"} & {*item} for item in value)
    return turns and bool(value)


def _text(value: Any, column: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, Mapping, Sequence)):
        raise Unusable(f"column '{column}' is not text", type(value).__name__)
    return json.dumps(value, ensure_ascii=False)


def _string(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        raise Unusable(f"no value in column '{column}'")
    return _text(value, column)


def _fields(template: str) -> list[str]:
    return list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(template) if name is not None))


def _template_columns(template: str, ours: Mapping[str, str], names: Sequence[str], where: str) -> dict[str, str]:
    """Columns that a template reads. Raises DataError on one that does not exist or on more than plain names."""
    try:
        fields = _fields(template)
    except ValueError as error:
        raise DataError(f"data.template: {error}; write literal braces twice, {{{{ and }}}}") from None
    for name in fields:
        if not name.isidentifier():
            raise DataError(
                f"data.template: {{{name}}} is not a column name; write literal braces twice, {{{{ and }}}}"
            )
        if name not in ours and name != "input":
            raise DataError(f"{where}data.template names {{{name}}}{_near(name, [*ours])}; {_have(names)}")
    return {name: ours[name] for name in fields if name in ours}


def _near(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def _have(names: Sequence[str]) -> str:
    return f"its columns are {', '.join(names)}" if names else "it has no columns"
