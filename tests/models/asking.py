"""What the tests of this folder ask of models and engines, in more than one module."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftray.models.generate import answer, text_of
from ftray.serve.encoder import EncoderEngine


def answer_questions(model: Any, tokenizer: Any, questions: Sequence[Any], **options: Any) -> list[str]:
    """The texts of greedy answers to questions, in their order."""
    given = answer(model, tokenizer, [question.prompt_ids for question in questions], **options)
    return [text_of(tokenizer, one) for one in given]


def classified(base: Any, folders: dict[str, Path], texts: Sequence[Any]) -> dict[str, list[Any]]:
    """What the encoder engine says of texts by each version."""

    async def go():
        engine = EncoderEngine(model=base, slots=20, own=20, device="cpu", threads=1)
        for key, folder in folders.items():
            await engine.load(key, folder)
        answers = {key: await engine.classify(texts, key) for key in folders}
        await engine.close()
        return answers

    return asyncio.run(go())
