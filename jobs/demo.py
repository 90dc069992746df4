"""`make demo`: a first version after a few steps and a trained one, behind one server, and a promotion under load."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import openai
from rich.console import Console
from rich.rule import Rule
from rich.table import Table

from ftray.cli import main as ftray
from ftray.config.load import load_run, load_serving
from ftray.data.sample import Order, orders
from ftray.ray_cluster import connect
from ftray.serve.deploy import running
from ftray.store.paths import Storage
from ftray.store.registry import Registry

RUN = "jobs/runs/orders.yaml"
FIRST = ["optim.steps=20", "evaluate.every=0", "evaluate.generate_rows=0", "evaluate.forgetting=false"]
QUESTIONS = 3
CLIENTS, ANSWERS_EACH = 8, 6

console = Console()


@dataclass(frozen=True)
class Served:
    """An answer of the stream of a client, and the version that gave it."""

    version: str
    whole: bool
    right: bool


def main() -> int:
    run = load_run(RUN)
    registry = Registry(Storage(run.storage))
    connect(None)  # one Ray for both runs and the server
    if len(registry.versions(run.name)) < 2:
        _say("1. A first version, after 20 steps")
        if code := ftray(["train", RUN, "--fresh", *FIRST, "evaluate.gate=[loss < base]"]):
            return code
        _say("2. A trained version")
        if code := ftray(["train", RUN, "--fresh"]):
            return code
    old, new = (version.id for version in registry.versions(run.name)[-2:])
    registry.promote(old, force=True)
    _say(f"3. One server for the base, {old} and {new}")
    began = time.monotonic()
    serving = load_serving(None, [f"storage={run.storage}", "http.port=0", "adapters.preload=[orders]"])
    with running(serving) as url:
        console.print(f"up at {url} after {time.monotonic() - began:.0f} s; OpenAI's client asks held-out questions\n")
        asyncio.run(_ask(url, old, new))
    console.print(f"\n`ftray serve` starts the server again, `ftray chat {run.name} --compare` talks to the version.")
    return 0


async def _ask(url: str, old: str, new: str) -> None:
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)  # a failure is to be seen
    rows = list(orders(seed=11, held_out=True, rows=QUESTIONS + CLIENTS))
    table = Table("", *(order.text for order in rows[:QUESTIONS]), show_lines=True)
    for model in ("base", old, new):
        table.add_row(model, *await asyncio.gather(*(_answer(client, model, one.text) for one in rows[:QUESTIONS])))
    console.print(table)

    _say(f"4. {CLIENTS} clients stream from 'orders' while {new} is promoted")
    done: list[Served] = []
    promotion = asyncio.create_task(_promote_after(client, new, done, CLIENTS * ANSWERS_EACH // 3))
    streams = (_stream(client, order, done) for order in rows[QUESTIONS:])
    failed = [error for error in await asyncio.gather(*streams, return_exceptions=True) if error]
    if not promotion.done():  # too few answers came for it to begin
        promotion.cancel()
        raise SystemExit(f"requests failed: {failed[:3]}")
    pause = promotion.result()
    by = Counter(one.version for one in done)
    right = Counter(one.version for one in done if one.right)
    for version in (old, new):
        console.print(f"  {version}: {by[version]} answers, {right[version]} exactly right")
    cut = sum(not one.whole for one in done)
    console.print(
        f"  promoted in {pause * 1000:.0f} ms; {len(failed) + cut} of {len(done) + len(failed)} requests failed"
    )
    if failed or cut:
        raise SystemExit(f"requests failed: {failed[:3]}")


async def _answer(client: openai.AsyncOpenAI, model: str, text: str) -> str:
    messages = [{"role": "user", "content": text}]
    answer = await client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=80)  # type: ignore[arg-type]
    return answer.choices[0].message.content or ""


async def _stream(client: openai.AsyncOpenAI, order: Order, done: list[Served]) -> None:
    for _ in range(ANSWERS_EACH):
        raw = await client.chat.completions.with_raw_response.create(
            model="orders",
            messages=[{"role": "user", "content": order.text}],
            temperature=0,
            max_tokens=80,
            stream=True,
        )
        text, finish = "", None
        async for chunk in raw.parse():
            text += chunk.choices[0].delta.content or ""
            finish = chunk.choices[0].finish_reason or finish
        done.append(Served(raw.headers["x-ftray-version"], finish is not None, _says(text, order.answer)))


async def _promote_after(client: openai.AsyncOpenAI, version: str, done: list[Served], count: int) -> float:
    while len(done) < count:
        await asyncio.sleep(0.01)
    began = time.monotonic()
    await client.post("/adapters/promote", body={"model": version}, cast_to=object)
    return time.monotonic() - began


def _says(text: str, wanted: dict[str, Any]) -> bool:
    try:
        return bool(json.loads(text) == wanted)
    except ValueError:
        return False


def _say(what: str) -> None:
    console.print()
    console.print(Rule(what, align="left"))


if __name__ == "__main__":
    sys.exit(main())
