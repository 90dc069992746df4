"""A chat without a server: an engine in this process, over the registry, answering as a server would."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from ftray.config.document import inline
from ftray.config.load import load_serving
from ftray.config.schema import NAME_PATTERN
from ftray.config.serving import REF_PATTERN, Serving
from ftray.errors import RequestError
from ftray.models import chain
from ftray.models.load import fingerprint, load_tokenizer
from ftray.serve.bodies import parse
from ftray.serve.catalog import Catalog
from ftray.serve.engine import EngineFacts
from ftray.serve.openai import ChatBody
from ftray.serve.prompts import Prompts
from ftray.serve.replica import Replica
from ftray.serve.sequences import Prompt, generations
from ftray.serve.speaker import BASE, Question, Said
from ftray.serve.wanted import Deadline
from ftray.store.paths import Storage
from ftray.store.registry import Registry

SLOTS = 4
"""A chat asks two versions at once and changes between a few; every slot takes memory beside the base."""


def serving_for(name: str, *, storage: str, overrides: Sequence[str] = ()) -> Serving:
    """What a chat with `name` serves: the base that the version's card names, unless `model.base` is overridden.

    A name that no version can have, `Qwen/Qwen3-0.6B` or `./folder`, is a base itself.
    """
    found = [f"storage={inline(storage)}", f"adapters.slots={SLOTS}"]
    if not REF_PATTERN.fullmatch(name):
        found.append(f"model.base={inline(name)}")
    elif name != BASE:
        registry = Registry(Storage(storage))
        card = registry.resolve(name).card
        if card.get("base") and not any(override.startswith("model.base=") for override in overrides):
            found.append(f"model.base={inline(card['base'])}")
            found.append(f"model.revision={inline(card.get('base_revision'))}")
        ranks = (_rank(version.card) for version in registry.versions(name.partition("@")[0]))
        found.append(f"adapters.max_rank={max(16, *ranks)}")
    return load_serving(None, [*found, *overrides])


async def start(serving: Serving, *, build: Callable[[Serving], Any] | None = None) -> InProcess:
    """Loads the base, which takes a while. `build` makes the engine; None: the one that the serve file would get."""
    serving = await asyncio.to_thread(chain.here, serving, Storage(serving.storage))
    engine = await asyncio.to_thread(build or _build, serving)
    speaker = InProcess(serving, engine)
    await speaker.start()
    return speaker


class InProcess:
    """One engine, one replica, and the registry, looked at anew for every question."""

    def __init__(self, serving: Serving, engine: Any):
        registry = Registry(Storage(serving.storage))
        self._serving = serving
        self._prompts = Prompts(load_tokenizer(serving.model))
        self._replica = Replica(engine, registry, id="chat", limits=serving.limits, adapters=serving.adapters)
        self._catalog = Catalog(
            registry,
            base_names=[BASE, serving.model.base],
            fingerprint=fingerprint(serving.model),
            allowed=serving.adapters.serve,
            watch_s=serving.adapters.watch_s,
        )
        self._facts: EngineFacts | None = None

    async def start(self) -> None:
        self._facts = await self._replica.facts()
        if "generate" not in self._facts.tasks:
            raise RequestError(
                f"{self._serving.model.base} does not write text, it does {', '.join(self._facts.tasks)}; "
                "`ftray serve` answers for it at /v1/embeddings and /v1/classify"
            )
        await self._replica.start()

    @property
    def where(self) -> str:
        return f"{self._serving.model.base} in this process"

    async def version_of(self, model: str) -> str:
        version = (await self._route(model)).version
        return version.id if version else BASE

    async def models(self) -> list[str]:
        await self._catalog.refresh()
        return [listed.id for listed in self._catalog.models()]

    async def answer(self, question: Question) -> AsyncGenerator[Said, None]:
        assert self._facts is not None, "not started"
        limits = self._serving.limits
        body = parse(json.dumps(question.body()).encode(), ChatBody)
        version = (await self._route(body.model)).version
        ids = await self._prompts.of_messages([message.for_template() for message in body.messages])
        deadline = Deadline(asyncio.get_running_loop().time() + limits.timeout_s, limits.timeout_s)
        id = f"chat-{secrets.token_hex(8)}"
        [generation] = generations(body, [Prompt(ids)], id=id, facts=self._facts, limits=limits, deadline=deadline)
        tokens = 0
        pieces = self._replica.generate(generation, version)
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                tokens += len(piece.ids)
                yield Said(piece.text, tokens, version.id if version else BASE, piece.finish)

    async def close(self) -> None:
        await self._replica.close()
        await self._catalog.stop()

    async def _route(self, model: str) -> Any:
        name = model.partition("@")[0]
        if NAME_PATTERN.fullmatch(name) and name != BASE:
            await self._catalog.refresh(name)
        return await self._catalog.resolve(model)


def _build(serving: Serving) -> Any:
    from transformers.utils import logging

    from ftray.serve.build import build_engine

    logging.disable_progress_bar()
    return build_engine(serving)


def _rank(card: dict[str, Any]) -> int:
    method = card.get("method")
    rank = method.get("rank") if isinstance(method, dict) else None
    return rank if isinstance(rank, int) else 0
