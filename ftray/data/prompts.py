"""Rows of an objective that samples its answers: a prompt as the model is asked, and the reference, if there is one.

In the token store an example is the prompt's ids, then the reference's, which are marked where others mark what is
trained; `prompt_of` and `reference_of` take it apart. No model ever reads the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ftray.data.encode import Asked, Chunk, Encoded, Encoder, Item
from ftray.data.format import SAMPLED, Example, Unusable
from ftray.data.tokens import TokenStore


@dataclass
class PromptEncoder(Encoder):
    """A prompt is what comes before a row's last message, if that is the assistant's, and else the whole row."""

    objective: str = SAMPLED
    room: int = 1
    """Tokens that an answer may take of max_length."""

    def __call__(self, chunk: Chunk) -> Encoded:
        encoded = Encoded(chunk.held_out)
        items: list[Item] = []
        prompts: list[str] = []
        references: list[str] = []
        for item in chunk.items:
            try:
                asked, reference = _parted(self._with_shots(item, chunk, self.few_shot))
                prompts.append(self.renderer.asked(asked))
            except Unusable as unusable:
                encoded.dropped.append((item.place, unusable))
                continue
            items.append(item)
            references.append(reference)
        rows: list[tuple[list[int], list[int]]] = []
        pairs = zip(items, references, self.tokenise.texts(prompts), self.tokenise.texts(references), strict=True)
        for item, reference, ids, wanted in pairs:
            if len(ids) + self.room > self.max_length:
                why = f"a prompt of {len(ids)} tokens and {self.room} new ones, max_length {self.max_length}"
                encoded.dropped.append((item.place, Unusable("longer than max_length", why, bad=False)))
                continue
            rows.append((ids, wanted if reference else []))
            encoded.places.append(item.place)
            if chunk.held_out:
                encoded.asked.append(Asked(item.place, ids, reference))
        if rows:
            encoded.ids = np.array([id for row in rows for part in row for id in part], np.uint32)
            encoded.trained = np.repeat(np.tile([False, True], len(rows)), [len(part) for row in rows for part in row])
            encoded.lengths = np.array([len(ids) + len(wanted) for ids, wanted in rows], np.int64)
        return encoded


def prompt_of(store: TokenStore, row: int) -> list[int]:
    return store.ids(row)[~store.trained(row)].tolist()


def reference_of(store: TokenStore, row: int, tokenizer: Any) -> str:
    """As the model could write it: without special tokens; "" where the row has none."""
    ids = store.ids(row)[store.trained(row)].tolist()
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip() if ids else ""


def _parted(example: Example) -> tuple[Example, str]:
    """(what is asked, the reference or "")."""
    messages = example.messages
    if not messages:
        return Example([{"role": "user", "content": example.text}]), ""
    reference = ""
    if messages[-1]["role"] == "assistant":
        messages, reference = messages[:-1], messages[-1].get("content") or ""
    if not messages:
        raise Unusable("no prompt", "the only message is the assistant's")
    return Example(messages, tools=example.tools), reference
