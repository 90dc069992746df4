"""Tokens to text as they come: whole characters only, and nothing that may turn out to be part of a stop string."""

from __future__ import annotations

from typing import Any


class TextStream:
    """The text of one answer. `push` gives what may be shown now; after `stopped` is set nothing more comes."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]):
        from tokenizers.decoders import DecodeStream

        self._tokens = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(word for word in stop if word)
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        new = self._stream.step(self._tokens, token)
        if not new:
            return ""
        if not self._stop:
            return new
        return self._past_stops(self._held + new)

    def rest(self) -> str:
        """What was held back, once the answer is over."""
        held, self._held = self._held, ""
        return "" if self.stopped else held

    def _past_stops(self, text: str) -> str:
        found = [place for place in (text.find(word) for word in self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = next(
            (
                size
                for size in range(min(self._longest - 1, len(text)), 0, -1)
                if any(word.startswith(text[-size:]) for word in self._stop)
            ),
            0,
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
