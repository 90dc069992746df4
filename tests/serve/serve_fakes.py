"""An engine without a model: it answers with the version's key and the prompt's ids, one token at a time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

from ftray.errors import AdapterError
from ftray.serve.engine import EngineFacts, EngineStats, Generation, Piece, Room, Scored


class FakeEngine:
    """`load` copies what the folder's adapter_config.json says under "says", and generation repeats it.

    `pause_s` is the time of a token; `loads` and `unloads` list the keys in order; `load_s` the time of a load.
    """

    def __init__(
        self, *, slots: int = 2, own: int = 1, pause_s: float = 0.0, load_s: float = 0.0, max_length: int = 512
    ):
        self.facts = EngineFacts("fake", "base", "fp32", "cpu", max_length, 1000, {"bank": slots, "own": own})
        self.pause_s, self.load_s = pause_s, load_s
        self.loaded: dict[str, tuple[Room, str]] = {}
        self.loads: list[str] = []
        self.unloads: list[str] = []
        self.running = 0
        self.cancelled = 0
        self.generated = 0

    def room_for(self, folder: Path) -> Room:
        config = self._config(folder)
        if config.get("peft_type", "LORA") != "LORA":
            return "own"
        return "bank"

    async def load(self, key: str, folder: Path) -> Room:
        room = self.room_for(folder)
        config = self._config(folder)
        await asyncio.sleep(self.load_s)
        held = sum(kind == room for kind, _ in self.loaded.values())
        assert held < self.facts.room[room], f"no room was made in {room}"
        assert key not in self.loaded
        self.loads.append(key)
        self.loaded[key] = (room, config.get("says", key))
        return room

    async def unload(self, key: str) -> None:
        self.unloads.append(key)
        self.loaded.pop(key, None)

    async def generate(self, request: Generation) -> AsyncIterator[Piece]:
        said = "base" if request.version is None else self.loaded[request.version][1]
        words = [f"{said} ", *(f"{id} " for id in request.prompt_ids)]
        self.running += 1
        try:
            for number in range(request.sampling.max_new_tokens):
                await asyncio.sleep(self.pause_s)
                if request.version is not None:
                    assert request.version in self.loaded, "unloaded while in use"
                word = words[number % len(words)]
                last = number == request.sampling.max_new_tokens - 1
                scores = () if request.sampling.logprobs is None else (Scored(number, -0.5, ((number, -0.5),)),)
                self.generated += 1
                yield Piece(word, (number,), scores, "length" if last else None)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    def stats(self) -> EngineStats:
        return EngineStats(running=self.running, generated_tokens=self.generated)

    async def close(self) -> None:
        self.loaded.clear()

    @staticmethod
    def _config(folder: Path) -> dict:
        try:
            return json.loads((folder / "adapter_config.json").read_text())
        except (OSError, ValueError) as error:
            raise AdapterError(f"{folder.name}: adapter_config.json cannot be read: {error}") from error
