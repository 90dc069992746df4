"""Many registered adapters through a few slots, as benchmarks/serve.py asks for it: `serve_loads.py SPEC`.

Versions of a real registry in a folder are asked for in turn, far more than there are slots, so that each request finds
its version gone: first alone, then while the base answers others.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from serve_cell import Lines, Spec
from serve_peers import serving
from serve_world import make_adapter

PROMPT = tuple(range(16, 48))
PUBLISHERS = 4
STREAMS = 8
WARM = 50  # requests for a version that is there, to compare with


def main() -> None:
    lines, spec = Lines(), Spec(**json.loads(sys.argv[1]))
    lines.say({})
    lines.serve(lambda asked: asyncio.run(cycle(spec, versions=asked["versions"], slots=asked["slots"])))


async def cycle(spec: Spec, *, versions: int, slots: int) -> dict[str, Any]:
    from ftray.serve.build import build_engine
    from ftray.serve.replica import Replica
    from ftray.store.paths import Storage
    from ftray.store.registry import Registry

    served = serving(spec, slots=slots)
    registry = Registry(Storage(spec.storage))
    began = time.perf_counter()
    refs = published(registry, spec, versions)
    published_s = time.perf_counter() - began
    engine = build_engine(served)
    replica = Replica(engine, registry, id="benchmark", limits=served.limits, adapters=served.adapters)
    await replica.start()
    alone = await asked_for(replica, refs)
    warm = [await ask(replica, refs[-1]) for _ in range(WARM)]
    stop = asyncio.Event()
    quiet, gaps = [], []
    quiet_streams = [asyncio.create_task(stream(replica, stop, quiet)) for _ in range(STREAMS)]
    await asyncio.sleep(alone["seconds"] / len(refs) * len(busy_part(refs)))
    stop.set()
    await asyncio.gather(*quiet_streams)
    stop.clear()
    streams = [asyncio.create_task(stream(replica, stop, gaps)) for _ in range(STREAMS)]
    busy = await asked_for(replica, busy_part(refs))
    stop.set()
    await asyncio.gather(*streams)
    await replica.close()
    return {
        "versions": versions,
        "slots": slots,
        "published_s": published_s,
        "alone": alone,
        "warm_first_s": warm,
        "busy": busy,
        "streams": {"count": STREAMS, "gaps_s": quiet, "gaps_with_loads_s": gaps},
    }


def busy_part(refs: Sequence[Any]) -> Sequence[Any]:
    """The first ones are long gone by now."""
    return refs[: max(len(refs) // 5, 1)]


def published(registry: Any, spec: Spec, count: int) -> list[Any]:
    """`count` adapters of one version each; ranks in turn."""
    from ftray.serve.engine import VersionRef

    def publish(number: int) -> Any:
        folder = Path(spec.storage, f"incoming-{number}")
        make_adapter(folder, spec=spec, rank=spec.ranks[number % len(spec.ranks)], seed=1000 + number)
        version = registry.publish(f"adapter-{number}", folder, {"base": spec.base}, key="benchmark")
        shutil.rmtree(folder)
        return VersionRef.of(version)

    with ThreadPoolExecutor(PUBLISHERS) as threads:  # a publication waits for the disk most of the time
        return list(threads.map(publish, range(count)))


async def asked_for(replica: Any, refs: Sequence[Any]) -> dict[str, Any]:
    """A request for each. `load_s` as the replica says it; `first_s`: what whoever asked waited for the first token."""
    first, loads = [], []
    began = time.perf_counter()
    for ref in refs:
        first.append(await ask(replica, ref))
        [state] = await replica.states()
        [mine] = [one for one in state.residents if one.version == ref]
        loads.append(mine.load_s)
    return {"load_s": loads, "first_s": first, "seconds": time.perf_counter() - began}


async def ask(replica: Any, ref: Any) -> float:
    from ftray.serve.engine import Generation, Sampling

    began = time.perf_counter()
    request = Generation("one", PROMPT, Sampling(max_new_tokens=1, temperature=0, ignore_eos=True))
    pieces = [piece async for piece in replica.generate(request, ref)]
    assert len(pieces) == 1
    return time.perf_counter() - began


async def stream(replica: Any, stop: asyncio.Event, gaps: list[float]) -> None:
    """Answers of the base, one after the other."""
    from ftray.serve.engine import Generation, Sampling

    request = Generation("stream", PROMPT, Sampling(max_new_tokens=64, temperature=0, ignore_eos=True))
    while not stop.is_set():
        last = None
        async for _ in replica.generate(request, None):
            now = time.perf_counter()
            if last is not None:
                gaps.append(now - last)
            last = now


if __name__ == "__main__":
    main()
