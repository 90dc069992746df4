"""The whole server and a client of it, for benchmarks/serve.py: `serve_http.py SPEC`, Spec.peer is server or client.

The client is a process of its own, so that its work is not the server's: one connection for each of those who ask,
plain sockets, as little work for each event as can be.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from serve_cell import Cell, Lines, Row, Spec, Trace, figures, processor_s
from serve_peers import serving

_USED = re.compile(rb'"completion_tokens": ?(\d+)')
_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)
_END_OF_CHUNKS = b"0\r\n\r\n"


def main() -> None:
    lines, spec = Lines(), Spec(**json.loads(sys.argv[1]))
    {"server": server, "client": client}[spec.peer](spec, lines)


def server(spec: Spec, lines: Lines) -> None:
    """Ray, Ray Serve with proxy and ingress, one replica with every adapter. Asked, it says what they all have used."""
    from ftray.serve.deploy import running
    from ftray.store.paths import Storage
    from ftray.store.registry import Registry

    registry = Registry(Storage(spec.storage))
    names = [f"adapter-{number}" for number in range(len(spec.adapters))]
    for name, folder in zip(names, spec.adapters, strict=True):
        registry.publish(name, Path(folder), {"base": spec.base}, key="benchmark")
    with running(serving(spec, slots=len(names), adapters={"preload": names}, http={"port": 0})) as url:
        lines.say({"url": url})
        lines.serve(lambda _: processor_s())


def client(spec: Spec, lines: Lines) -> None:
    lines.say({})
    lines.serve(lambda asked: asyncio.run(run(asked["url"], Cell(**asked["cell"]), stream=asked["stream"])))


async def run(url: str, cell: Cell, *, stream: bool) -> dict[str, Any]:
    at = urlsplit(url)
    rows = iter(cell.rows())
    traces: list[Trace] = []

    async def ask_in_turn() -> None:
        reader, writer = await asyncio.open_connection(at.hostname, at.port)
        for row in rows:
            writer.write(request(row, cell, stream=stream))
            trace = Trace(row.number, time.perf_counter())
            await (read_events if stream else read_whole)(reader, trace)
            traces.append(trace)
        writer.close()

    began, processor = time.perf_counter(), processor_s()
    await asyncio.gather(*(ask_in_turn() for _ in range(cell.concurrency)))
    wall = time.perf_counter() - began
    return figures(cell, traces, wall_s=wall, processor_s=processor_s() - processor)


def request(row: Row, cell: Cell, *, stream: bool) -> bytes:
    body: dict[str, Any] = {
        "model": "base" if row.adapter is None else f"adapter-{row.adapter}",
        "prompt": row.ids,
        "max_tokens": cell.new,
        "temperature": 0,
        "ignore_eos": True,
    }
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: "
    return f"{head}{len(content)}\r\n\r\n".encode() + content


async def read_events(reader: asyncio.StreamReader, trace: Trace) -> None:
    """Events as they arrive; those that arrive together are one arrival. The last one tells how many tokens came."""
    answer = b""
    while not answer.endswith(_END_OF_CHUNKS):
        part = await reader.read(65536)
        if b'"text"' in part:
            trace.arrived([])
        answer += part
        check(answer, ended=not part)
    trace.tokens = used(answer)


async def read_whole(reader: asyncio.StreamReader, trace: Trace) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    found = _LENGTH.search(head)
    answer = head + await reader.readexactly(int(found[1]) if found else 0)
    check(answer, ended=not found)
    trace.arrived([])
    trace.tokens = used(answer)


def check(answer: bytes, *, ended: bool) -> None:
    if ended or not answer.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"the server answered {answer[-1000:]!r}")


def used(answer: bytes) -> int:
    found = _USED.search(answer, max(0, len(answer) - 1000))
    if found is None:
        raise RuntimeError(f"no usage in {answer[-1000:]!r}")
    return int(found[1])


if __name__ == "__main__":
    main()
