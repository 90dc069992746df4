"""The real app, under a real uvicorn in a thread, over a real registry and replica; only the engine is a fake."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from safetensors.numpy import save_file
from serve_fakes import FakeEngine

from ftray.config.serving import Serving
from ftray.serve.app import create_app
from ftray.serve.catalog import Catalog
from ftray.serve.engine import EngineFacts, EngineStats, Generation, Labelled, Piece, Room
from ftray.serve.replica import Replica
from ftray.store.paths import Storage
from ftray.store.registry import Registry

PATIENCE_S = 30.0


class Engine(FakeEngine):
    """Remembers what it was asked for. `fail` is raised after `fail_after` pieces of each answer."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.facts = replace(self.facts, vocab_size=4096)
        self.asked: list[Generation] = []
        self.fail: Exception | None = None
        self.fail_after = 0

    async def generate(self, request: Generation) -> AsyncIterator[Piece]:
        self.asked.append(request)
        done = 0
        pieces = super().generate(request)
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                if self.fail is not None and done == self.fail_after:
                    raise self.fail
                done += 1
                yield piece


class ReaderEngine:
    """Vectors and labels that can be worked out by hand: a text's vector is (ids, 1, 0), its label long or short."""

    def __init__(self, *, by_token: bool = False):
        self.facts = EngineFacts("fake", "base", "fp32", "cpu", 64, 4096, {"bank": 2, "own": 1}, ("embed", "classify"))
        self.by_token = by_token

    def room_for(self, folder: Path) -> Room:
        return "bank"

    async def load(self, key: str, folder: Path) -> Room:
        return "bank"

    async def unload(self, key: str) -> None: ...

    async def embed(self, ids: list[tuple[int, ...]], version: str | None) -> list[list[float]]:
        return [[float(len(text)), 1.0, 0.0] for text in ids]

    async def classify(self, ids: list[tuple[int, ...]], version: str) -> list[Labelled]:
        if self.by_token:
            kinds = ["B-THING", "I-THING", "O"]
            return [
                Labelled(tokens=tuple((id, {kinds[(place - 1) % 3]: 0.5}) for place, id in enumerate(text)))
                for text in ids
            ]
        return [Labelled({"long": 0.75, "short": 0.25} if len(text) > 3 else {"long": 0, "short": 1}) for text in ids]

    def stats(self) -> EngineStats:
        return EngineStats()

    async def close(self) -> None: ...


@dataclass
class Running:
    """A server that answers at `url`."""

    url: str
    engine: Any
    registry: Registry
    catalog: Catalog
    fleet: Replica
    loop: asyncio.AbstractEventLoop

    def call(self, coroutine: Any) -> Any:
        """Runs something on the server's own loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(PATIENCE_S)


@contextlib.contextmanager
def running(serving: Serving, *, engine: Any, tokenizer: Any) -> Iterator[Running]:
    registry = Registry(Storage(serving.storage))
    found: dict[str, Any] = {}
    up = threading.Event()

    def work() -> None:
        try:
            asyncio.run(_serve(serving, registry, engine, tokenizer, found, up))
        finally:
            up.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert up.wait(PATIENCE_S), "the server did not start"
        server = found["server"]
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        yield Running(url, engine, registry, found["catalog"], found["fleet"], found["loop"])
    finally:
        if "server" in found:
            found["server"].should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "the server does not stop"


async def _serve(
    serving: Serving, registry: Registry, engine: Any, tokenizer: Any, found: dict[str, Any], up: threading.Event
) -> None:
    catalog = Catalog(
        registry,
        base_names=["base"],
        fingerprint=None,
        allowed=serving.adapters.serve,
        watch_s=serving.adapters.watch_s,
    )
    fleet = Replica(engine, registry, id="r0", limits=serving.limits, adapters=serving.adapters)
    await catalog.start()
    await fleet.start()
    app = create_app(serving=serving, fleet=fleet, catalog=catalog, tokenizer=tokenizer)
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_level="warning", access_log=False, timeout_graceful_shutdown=2
    )
    server = uvicorn.Server(config)
    found |= {"server": server, "catalog": catalog, "fleet": fleet, "loop": asyncio.get_running_loop()}
    serves = asyncio.create_task(server.serve())
    while not server.started and not serves.done():
        await asyncio.sleep(0.01)
    up.set()
    await serves
    await fleet.close()
    await catalog.stop()


def publish(root: Path, name: str, *says: str, card: dict[str, Any] | None = None) -> list[str]:
    """One version for each thing that it says."""
    registry = Registry(Storage(str(root)))
    made = []
    for number, what in enumerate(says):
        folder = root.parent / "made" / name / str(number)
        folder.mkdir(parents=True)
        module = "base_model.model.model.layers.0.self_attn.q_proj"
        tensors = {
            f"{module}.lora_A.weight": np.ones((2, 4), np.float32),
            f"{module}.lora_B.weight": np.zeros((4, 2), np.float32),
        }
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "says": what}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        version = registry.publish(name, folder, {"base": "base", **(card or {})}, key=f"{name}-{number}")
        made.append(version.id)
    return made


def events(lines: Sequence[str]) -> list[Any]:
    """The documents of server-sent events; [DONE] as it is."""
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [one if one == "[DONE]" else json.loads(one) for one in data]
