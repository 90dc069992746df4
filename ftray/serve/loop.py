"""The bank engine: one thread that steps a transformers model over every sequence in work, on plain torch.

Requests come in and pieces go out through the event loop of whoever asked; versions load on threads of their own.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftray.errors import AdapterError, ReplicaGone, RequestError
from ftray.serve.bank import Bank
from ftray.serve.cache import Cache
from ftray.serve.engine import EngineFacts, EngineStats, Generation, Piece, Room
from ftray.serve.lanes import VIRTUAL, Lane, OwnLanes
from ftray.serve.lora_files import read_config, read_lora, stackable_layers, tensor_shapes
from ftray.serve.sampling import Chooser
from ftray.serve.stepper import InWork, Settings, Stepper, Stream
from ftray.serve.text import TextStream

SWITCH_S = 0.0002  # Python's 5 ms would let the event loop hold up a step, which takes Python's lock between its parts


class BankEngine:
    """Implements `engine.Engine`. Build it with `build.bank_engine`."""

    def __init__(
        self,
        *,
        facts: EngineFacts,
        settings: Settings,
        lane: Lane,
        bank: Bank,
        own: OwnLanes,
        cache: Cache,
        tokenizer: Any,
        eos_ids: frozenset[int],
    ):
        self.facts, self._settings = facts, settings
        self._base, self._bank, self._own = lane, bank, own
        self._tokenizer, self._eos_ids = tokenizer, eos_ids
        self._lanes: dict[str, Lane] = {}
        self._stepper = Stepper(cache=cache, bank=bank, settings=settings)
        self._loader = ThreadPoolExecutor(max_workers=2, thread_name_prefix="load")
        sys.setswitchinterval(SWITCH_S)
        self._thread = threading.Thread(target=self._stepper.run, name="generate", daemon=True)
        self._thread.start()

    def room_for(self, folder: Path) -> Room:
        return self._look(folder)[0]

    def _look(self, folder: Path) -> tuple[Room, dict[str, Any]]:
        config = read_config(folder)
        layers = stackable_layers(config, tensor_shapes(folder))
        if layers is None or self._bank.head in layers:
            return "own", config
        self._bank.check(layers)
        return "bank", config

    async def load(self, key: str, folder: Path) -> Room:
        return await asyncio.get_running_loop().run_in_executor(self._loader, self._load, key, folder)

    def _load(self, key: str, folder: Path) -> Room:
        room, config = self._look(folder)
        if room == "bank":
            self._bank.load(key, read_lora(folder, config))
        else:
            lane = self._own.load(folder, config)
            self._stepper.check(lane)
            self._lanes[key] = lane
        return room

    async def unload(self, key: str) -> None:
        await self._stepper.let_go(key)
        self._bank.unload(key)
        self._lanes.pop(key, None)

    async def generate(self, request: Generation) -> AsyncIterator[Piece]:
        sequence = self._sequence(request)
        if self._stepper.over:
            raise ReplicaGone("the engine stopped; send the request again")
        self._stepper.ask(sequence)
        try:
            while True:
                for piece in await sequence.stream.next():
                    yield piece
                    if piece.finish is not None:
                        return
        finally:
            sequence.cancelled = True

    def _sequence(self, request: Generation) -> InWork:
        lane, slot = self._base, None
        if request.version is not None and request.version in self._lanes:
            lane = self._lanes[request.version]
        elif request.version is not None:
            if request.version not in self._bank:
                raise AdapterError(f"{request.version} is not loaded")
            slot = self._bank.slot(request.version)
        room = self.facts.max_length - lane.virtual - len(request.prompt_ids)
        if not request.prompt_ids or room < 1:
            raise RequestError(
                f"the prompt has {len(request.prompt_ids)} tokens; this server takes 1 to "
                f"{self.facts.max_length - lane.virtual - 1}",
                param="messages",
                code="context_length_exceeded",
            )
        sampling = request.sampling
        self._check_ids(request.prompt_ids, "messages")
        self._check_ids(tuple(sampling.logit_bias), "logit_bias")
        eos_ids = frozenset() if sampling.ignore_eos else self._eos_ids
        return InWork(
            request=request,
            lane=lane,
            slot=slot,
            chooser=Chooser(sampling, request.prompt_ids, eos_ids),
            text=TextStream(self._tokenizer, sampling.stop),
            stream=Stream(asyncio.get_running_loop()),
            tokens=[VIRTUAL] * lane.virtual + list(request.prompt_ids),
            ends=eos_ids | set(sampling.stop_ids),
            longest=min(sampling.max_new_tokens, room),
        )

    def _check_ids(self, ids: Sequence[int], param: str) -> None:
        if ids and not 0 <= min(ids) <= max(ids) < self.facts.vocab_size:
            raise RequestError(f"token ids are 0 to {self.facts.vocab_size - 1}", param=param)

    def stats(self) -> EngineStats:
        return replace(self._stepper.stats(), alive=self._thread.is_alive())

    async def close(self) -> None:
        self._stepper.stop()
        await asyncio.to_thread(self._thread.join, 10)
        self._loader.shutdown(wait=False)
