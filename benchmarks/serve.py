"""ftray's serving against its peers: speed and waiting times for the base, one adapter and eight, in one run.

    python benchmarks/serve.py            # under 15 minutes on two cores
    python benchmarks/serve.py --quick    # a tiny model, a few tokens of everything: does it still work?
    python benchmarks/serve.py --parts grid --concurrency 32 --prompts 32 --model 135m

Every peer serves the same model and adapters (ranks 8 and 16), gets the same token ids, and answers as many tokens:

    ftray            the bank engine, in process
    transformers     `generate`, batches of as many requests as there are clients; the base only
    peft-mixed       the same with PEFT's `adapter_names`
    peft-sequential  the same with PEFT, one adapter after the other
    vllm-lora        vLLM's CPU build with LoRA enabled, in process; needs --vllm-python
    vllm-plain       the same without LoRA, compiled; the base only

Each is a process of its own with one compute thread. A round asks every peer for every cell (kind, prompt,
concurrency), so that a ratio's two sides lie close together; a round begins with another peer than the last. Speed is
in tokens of answers by the clock, and by the processor time of the peer's process and all below it, which a busy
machine disturbs less. Then the whole server over HTTP against the engine in process, and many adapters through a few
slots.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import serve_report as report
from serve_cell import KINDS, Cell, Spec
from serve_child import Child, ChildFailed

HERE = Path(__file__).parent
SCRIPTS = {"vllm-lora": "serve_vllm.py", "vllm-plain": "serve_vllm.py", "server": "serve_http.py"} | {
    "client": "serve_http.py",
    "loads": "serve_loads.py",
}
PEERS = {
    "ftray": KINDS,
    "transformers": ("base",),
    "peft-mixed": ("one", "mixed"),
    "peft-sequential": ("one", "mixed"),
    "vllm-lora": KINDS,
    "vllm-plain": ("base",),
}
VLLM = ("vllm-lora", "vllm-plain")
PARTS = ("grid", "http", "loads")
RANKS = (16, 8)
START_S = 400.0
CELL_S = 400.0
LOADS_S = 1500.0
Found = dict[report.Asked, dict[str, dict[int, Any]]]
"""Figures by cell, peer and round."""


def main() -> None:
    args = arguments()
    began, load = time.monotonic(), os.getloadavg()[0]
    found: dict[str, Any] = {"failed": {}}
    with tempfile.TemporaryDirectory(prefix="ftray-") as folder:
        bench = Bench(args, Path(folder))
        found["settings"] = {**vars(args), **bench.made}
        for part in args.parts:
            try:
                found[part] = {"grid": bench.grid, "http": bench.http, "loads": bench.loads}[part]()
            except ChildFailed as error:  # what the other parts found is not lost with it
                found["failed"][part] = str(error)
                say(f"{part} failed: {error}")
        found |= {"peers": bench.settings, "skipped": bench.skipped, "seconds": time.monotonic() - began}
        found["load_average"] = [load, os.getloadavg()[0]]
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        before, after = found["load_average"]
        print(f"\n{found['seconds']:.0f} s in all; load average {before:.1f} before, {after:.1f} at the end")
    sys.exit(1 if found["failed"] else 0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round, no server")
    parser.add_argument("--json", action="store_true", help="print every figure as JSON")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=None, help="None: all, with --quick not http")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--model", choices=("28m", "135m", "tiny"), default="28m", help="made on the spot")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--prompts", nargs="+", type=int, default=[32, 256], help="lengths in tokens")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32], help="requests at a time")
    parser.add_argument("--new", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="at most")
    parser.add_argument("--minutes", type=float, default=10, help="no round of the grid begins that would end later")
    parser.add_argument("--patience-s", type=float, default=12, help="a cell that took a peer longer is not repeated")
    parser.add_argument("--loads", type=int, default=1000, help="registered adapters")
    parser.add_argument("--load-slots", type=int, default=16, help="slots of the bank that they go through")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--vllm-python",
        default=os.environ.get("FTRAY_VLLM_PYTHON"),
        help="interpreter of an environment with vLLM's CPU build; also FTRAY_VLLM_PYTHON",
    )
    args = parser.parse_args()
    if args.quick:
        args.model, args.rounds, args.new, args.loads = "tiny", 1, 8, 40
        args.prompts, args.concurrency = [16], [1, 4]
    args.parts = args.parts or [part for part in PARTS if not (args.quick and part == "http")]
    return args


class Bench:
    """The made world, the peers that run, and what each measurement asks of them."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder = args, folder
        self.settings: dict[str, Any] = {}
        self.skipped: dict[str, str] = {}
        self.spec = Spec(
            peer="world",
            base=str(folder / "base"),
            adapters=[str(folder / f"adapter-{number}") for number in range(args.adapters)],
            ranks=[RANKS[number % len(RANKS)] for number in range(args.adapters)],
            dtype=args.dtype,
            threads=args.threads,
            max_length=1024,
            max_batch=max(*args.concurrency, 32),
            storage=str(folder / "store"),
        )
        say(f"making a model of shape {args.model} and {args.adapters} adapters")
        with self._child("world", HERE / "serve_world.py", args.model) as child:
            self.made = child.ready(START_S)
            child.ready(START_S)  # the adapters too

    def grid(self) -> dict[str, Any]:
        """Every peer, every kind, prompt and concurrency."""
        ends = time.monotonic() + 60 * self.args.minutes
        with ExitStack() as peers:
            running = self._start_peers(peers)
            found: Found = {}
            took = 0.0
            for number in range(self.args.rounds):
                began = time.monotonic()
                if number and began + took > ends:
                    say(f"no time for round {number + 1}")
                    break
                self._round(number, running, found)
                took = time.monotonic() - began
                say(f"round {number + 1} took {took:.0f} s")
        found = {asked: {peer: found[asked][peer] for peer in PEERS if found[asked].get(peer)} for asked in found}
        told = {"cells": report.cells(found), "ratios": report.ratios(found)}
        if not self.args.json:
            self._print_peers()
            for entry in told["cells"]:
                print("\n" + report.cell_table(entry))
            print("\n" + report.ratio_table(told["ratios"]), flush=True)
        return told

    def _round(self, number: int, running: dict[str, Child], found: Found) -> None:
        """Asks every peer for every cell, but for those that took too long to be asked again."""
        for peer, asked in self._order(list(running), number):
            before = found.setdefault(asked, {}).setdefault(peer, {})
            too_slow = any(told["wall_s"] > self.args.patience_s for told in before.values())
            if peer not in running or too_slow:
                continue
            say(f"round {number + 1}: prompt {asked.prompt}, {asked.concurrency} at once, {peer}, {asked.kind}")
            try:
                before[number] = running[peer].ask(asdict(self._cell(asked)), CELL_S)
            except ChildFailed as error:
                self._give_up(peer, error)
                del running[peer]

    def http(self) -> dict[str, Any]:
        """The server with proxy, ingress and replica at the highest concurrency, streamed and whole."""
        most = max(self.args.concurrency)
        rounds: dict[tuple[str, str], dict[int, Any]] = {}
        with ExitStack() as children:
            say("starting the server on Ray Serve")
            server, engine, client = (
                children.enter_context(self._child(peer)) for peer in ("server", "ftray", "client")
            )
            url = server.ready(START_S)["url"]
            engine.ready(START_S), client.ready(START_S)
            for number, kind in product(range(-1, self.args.rounds), ("base", "mixed")):
                cell = asdict(replace(self._cell(report.Asked(min(self.args.prompts), most, kind)), requests=2 * most))
                for way in ("engine", "streamed", "whole"):
                    say(f"over HTTP: {'warm-up' if number < 0 else f'round {number + 1}'}, {way}, {kind}")
                    if way == "engine":
                        told = engine.ask(cell, CELL_S)
                    else:
                        before = server.ask({}, CELL_S)
                        told = client.ask({"url": url, "cell": cell, "stream": way == "streamed"}, CELL_S)
                        told["processor_s"] = server.ask({}, CELL_S) - before
                    if number >= 0:
                        rounds.setdefault((way, kind), {})[number] = told
        told = report.http(rounds)
        if not self.args.json:
            print("\n" + report.http_table(told), flush=True)
        return told

    def loads(self) -> dict[str, Any]:
        """More registered adapters than slots, each asked for when it is not there."""
        say(f"{self.args.loads} adapters through {self.args.load_slots} slots")
        with self._child("loads", storage="loads") as child:
            child.ready(START_S)
            told = report.loads(child.ask({"versions": self.args.loads, "slots": self.args.load_slots}, LOADS_S))
        if not self.args.json:
            print("\n" + report.loads_table(told), flush=True)
        return told

    # the peers

    def _start_peers(self, stack: ExitStack) -> dict[str, Child]:
        """Those that can run here, started beside each other, each warm."""
        python = self.args.vllm_python
        wanted = [peer for peer in self.args.peers if set(PEERS[peer]) & set(self.args.kinds)]
        for peer in [peer for peer in wanted if peer in VLLM and not (python and Path(python).is_file())]:
            wanted.remove(peer)
            self._skip(peer, "no interpreter with vLLM; name one by --vllm-python or FTRAY_VLLM_PYTHON")
        say(f"starting {', '.join(wanted)}")
        began = time.monotonic()
        started = {peer: stack.enter_context(self._child(peer)) for peer in wanted}
        for peer, child in list(started.items()):
            try:
                self.settings[peer] = child.ready(START_S)
                say(f"{peer} is there after {time.monotonic() - began:.0f} s")
                for kind in self._kinds(peer):
                    most = report.Asked(min(self.args.prompts), max(self.args.concurrency), kind)
                    child.ask(asdict(replace(self._cell(most), new=4)), CELL_S)
            except ChildFailed as error:
                self._give_up(peer, error)
                del started[peer]
        return started

    def _give_up(self, peer: str, error: ChildFailed) -> None:
        """vLLM's CPU build may fail in ways that are not ours; then the others go on."""
        if peer not in VLLM:
            raise error
        self._skip(peer, str(error))

    def _skip(self, peer: str, why: str) -> None:
        self.skipped[peer] = why
        say(f"{peer} is skipped: {why}")

    def _child(self, peer: str, script: Path | None = None, *before: str, storage: str = "store") -> Child:
        spec = replace(self.spec, peer=peer, storage=str(self.folder / storage))
        python = self.args.vllm_python if peer in VLLM else sys.executable
        script = script or HERE / SCRIPTS.get(peer, "serve_peers.py")
        command = [python, str(script), *before, json.dumps(asdict(spec))]
        variables = environment(self.args.threads)
        if peer == "server":
            variables["RAY_TMPDIR"] = str(self.folder)  # where Ray finds no other cluster of this machine to join
        return Child(peer, command, environment=variables, log=self.folder / f"{peer}.log")

    # what is asked

    def _kinds(self, peer: str) -> list[str]:
        return [kind for kind in KINDS if kind in PEERS[peer] and kind in self.args.kinds]

    def _cell(self, asked: report.Asked) -> Cell:
        return Cell(
            kind=asked.kind,
            prompt=asked.prompt,
            concurrency=asked.concurrency,
            requests=max(4, asked.concurrency),
            new=self.args.new,
            adapters=self.args.adapters,
            vocabulary=self.made["vocabulary"],
        )

    def _order(self, peers: list[str], number: int) -> Iterator[tuple[str, report.Asked]]:
        first = number % len(peers)
        for prompt, concurrency in product(self.args.prompts, self.args.concurrency):
            for peer in peers[first:] + peers[:first]:
                for kind in self._kinds(peer):
                    yield peer, report.Asked(prompt, concurrency, kind)

    def _print_peers(self) -> None:
        made = f"{self.made['parameters'] / 1e6:.1f} M parameters, {self.args.adapters} adapters, {self.args.dtype}"
        print(f"\n{made}; answers of {self.args.new} tokens; first and between tokens: p50 / p99")
        for peer, settings in self.settings.items():
            print(f"  {peer:16} {' '.join(f'{key}={value}' for key, value in settings.items())}")
        for peer, why in self.skipped.items():
            print(f"  {peer:16} skipped: {why.splitlines()[0]}")


def environment(threads: int) -> dict[str, str]:
    """A peer's: so many compute threads, nothing from the network, no cluster that has other work."""
    variables = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # bound to one processor, it would wait for what else runs there
    }
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | variables


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
