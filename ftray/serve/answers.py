"""Answers in OpenAI's shapes, whole and in chunks.

A chunk is put together by hand around text that is encoded alone: there is one for each token of each stream, and
building and encoding the whole document costs several times as much.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii as quoted
from typing import Any, Protocol

from ftray.serve.call import Call
from ftray.serve.engine import Finish, Piece, Scored
from ftray.serve.prompts import Token

Spell = Callable[[int], Token]
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Usage:
    """Tokens of one request: prompts count once, however many answers they have."""

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int

    @classmethod
    def of(cls, call: Call) -> Usage:
        return cls(call.prompt_tokens, call.cached_tokens, call.new_tokens)

    def document(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.new_tokens,
            "total_tokens": self.prompt_tokens + self.new_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass
class Choice:
    """One answer as it grows."""

    texts: list[str] = field(default_factory=list)
    scores: list[Scored] = field(default_factory=list)
    finish: Finish | None = None

    def add(self, piece: Piece) -> None:
        self.texts.append(piece.text)
        self.scores += piece.scores
        self.finish = piece.finish or self.finish

    @property
    def text(self) -> str:
        return "".join(self.texts)


@dataclass(frozen=True)
class Head:
    """What each chunk of an answer repeats. `scored`: log-probabilities were asked for."""

    id: str
    created: int
    model: str
    fingerprint: str
    scored: bool
    includes_usage: bool


class Shape(Protocol):
    """How one endpoint writes its answers."""

    def opening(self, index: int, echo: str) -> str:
        """What comes before the first piece of an answer."""
        ...

    def chunk(self, index: int, piece: Piece) -> str:
        """A piece, and the end of its answer if it is the last one; nothing if there is nothing to say."""
        ...

    def usage_chunk(self, usage: Usage) -> str: ...

    def whole(self, choices: Sequence[Choice], echoes: Sequence[str], usage: Usage) -> dict[str, Any]: ...


class ChatShape:
    """chat.completion and chat.completion.chunk"""

    def __init__(self, head: Head, spell: Spell):
        self._head, self._spell = head, spell
        self._begin = _beginning(head, "chat.completion.chunk")
        self._end = _ending(head)

    def opening(self, index: int, echo: str) -> str:
        return self._event(index, '{"role":"assistant","content":""}', "null", "null")

    def chunk(self, index: int, piece: Piece) -> str:
        event = ""
        if piece.text or piece.scores:
            logprobs = json.dumps(self._logprobs(piece.scores)) if self._head.scored else "null"
            event = (
                f'{self._begin}{index},"delta":{{"content":{quoted(piece.text)}}},"logprobs":{logprobs},'
                f'"finish_reason":null{self._end}'
            )
        if piece.finish is not None:
            event += self._event(index, "{}", "null", f'"{piece.finish}"')
        return event

    def usage_chunk(self, usage: Usage) -> str:
        return _usage_event(self._head, "chat.completion.chunk", usage)

    def whole(self, choices: Sequence[Choice], echoes: Sequence[str], usage: Usage) -> dict[str, Any]:
        return {
            **_common(self._head, "chat.completion"),
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": self._logprobs(choice.scores) if self._head.scored else None,
                    "finish_reason": choice.finish,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": usage.document(),
        }

    def _event(self, index: int, delta: str, logprobs: str, finish: str) -> str:
        return f'{self._begin}{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{finish}{self._end}'

    def _logprobs(self, scores: Sequence[Scored]) -> dict[str, Any]:
        content = []
        for score in scores:
            if not self._spell(score.id).special:  # a stop token is no part of the text
                top = [self._entry(id, logprob) for id, logprob in score.top]
                content.append({**self._entry(score.id, score.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, id: int, logprob: float) -> dict[str, Any]:
        token = self._spell(id)
        return {"token": token.text, "logprob": _finite(logprob), "bytes": list(token.bytes)}


class TextShape:
    """text_completion, whole and in chunks"""

    def __init__(self, head: Head, spell: Spell):
        self._head, self._spell = head, spell
        self._begin = _beginning(head, "text_completion")
        self._end = _ending(head)
        self._lengths: dict[int, int] = {}

    def opening(self, index: int, echo: str) -> str:
        return self._event(index, echo, "null", "null") if echo else ""

    def chunk(self, index: int, piece: Piece) -> str:
        if not (piece.text or piece.scores or piece.finish):
            return ""
        logprobs = "null"
        if self._head.scored:
            begin = self._lengths.get(index, 0)
            self._lengths[index] = begin + len(piece.text)
            logprobs = json.dumps(self._logprobs(piece.scores, begin))
        return self._event(index, piece.text, logprobs, "null" if piece.finish is None else f'"{piece.finish}"')

    def usage_chunk(self, usage: Usage) -> str:
        return _usage_event(self._head, "text_completion", usage)

    def whole(self, choices: Sequence[Choice], echoes: Sequence[str], usage: Usage) -> dict[str, Any]:
        return {
            **_common(self._head, "text_completion"),
            "choices": [
                {
                    "index": index,
                    "text": echo + choice.text,
                    "logprobs": self._logprobs(choice.scores, 0) if self._head.scored else None,
                    "finish_reason": choice.finish,
                }
                for index, (choice, echo) in enumerate(zip(choices, echoes, strict=True))
            ],
            "usage": usage.document(),
        }

    def _event(self, index: int, text: str, logprobs: str, finish: str) -> str:
        return f'{self._begin}{index},"text":{quoted(text)},"logprobs":{logprobs},"finish_reason":{finish}{self._end}'

    def _logprobs(self, scores: Sequence[Scored], begin: int) -> dict[str, Any]:
        kept = [(self._spell(score.id), score) for score in scores]
        kept = [(token, score) for token, score in kept if not token.special]
        offsets = []
        for token, _ in kept:
            offsets.append(begin)
            begin += len(token.text)
        return {
            "tokens": [token.text for token, _ in kept],
            "token_logprobs": [_finite(score.logprob) for _, score in kept],
            "top_logprobs": [
                {self._spell(id).text: _finite(logprob) for id, logprob in reversed(score.top)} for _, score in kept
            ],
            "text_offset": offsets,
        }


def _common(head: Head, kind: str) -> dict[str, Any]:
    return {
        "id": head.id,
        "object": kind,
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.fingerprint,
    }


def _beginning(head: Head, kind: str) -> str:
    """Up to the index of the only choice."""
    return f'data: {json.dumps(_common(head, kind))[:-1]}, "choices":[{{"index":'


def _ending(head: Head) -> str:
    return '}],"usage":null}\n\n' if head.includes_usage else "}]}\n\n"


def _usage_event(head: Head, kind: str, usage: Usage) -> str:
    return f"data: {json.dumps({**_common(head, kind), 'choices': [], 'usage': usage.document()})}\n\n"


def _finite(logprob: float) -> float:
    """JSON knows neither infinity nor NaN; -9999 is what OpenAI writes for a token that cannot come."""
    return logprob if logprob > -9999.0 else -9999.0
