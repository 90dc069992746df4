"""ftray against a plain TRL script: training speed, peak memory, and time to the first step, in one run.

    python benchmarks/train.py            # about 25 minutes on one core
    python benchmarks/train.py --quick    # a few steps of everything: does it still work?

Four peers train the same base on the same token ids with the same loss mask, in the same order, with as many threads:

    trl       benchmarks/train_peers.py, a plain SFTTrainer script, in a process of its own as all are
    trainer   the same with transformers' Trainer, for reference: on CPUs, TRL's fused head computes the logits of every
              position, and twice
    padded    ftray with packing off
    default   ftray as it comes

Rounds are interleaved. Speed is real tokens, padding not counted, over the median of the steps after the warm-up; the
same per second of processor time of the training process, which a busy machine disturbs less, and by which the targets
are judged. Equal losses in the first steps mean equal work.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
SETS = {"taskmaster4": DATA / "taskmaster4" / "dialogs.train.jsonl", "gsm8k": DATA / "gsm8k" / "train.jsonl"}
METHODS = {"lora": {"kind": "lora"}, "full": {"kind": "full"}}
PEERS = ("trl", "trainer", "padded", "default")
TARGETS = {"padded": 0.98, "default": 1.5}  # of TRL's real tokens per second
SHOWN_LOSSES = 4
TIMEOUT_S = 900


@dataclass(frozen=True)
class Spec:
    """One peer's task, as plain data. `rows`: an .npz with the examples of every step, in order."""

    peer: str
    base: str
    source: str
    method: dict
    rows: str
    storage: str
    lr: float
    batch_size: int
    max_length: int
    steps: int
    seed: int
    threads: int


@dataclass(frozen=True)
class Timed:
    """What one process did. Times in seconds; `wall_s` and `processor_s` are of each step, `start` parts add up."""

    losses: list[float]
    tokens: list[int]
    wall_s: list[float]
    processor_s: list[float]
    peak_bytes: int
    start: dict[str, float]
    settings: dict


def main() -> None:
    args = arguments()
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    results = []
    with tempfile.TemporaryDirectory(prefix="ftray-benchmark-") as folder:
        base = Path(folder, "base")
        shutil.copytree(ROOT / "ftray" / "models" / "tiny", base)
        for name, method in product(args.data, args.methods):
            if not SETS[name].is_file():
                say(f"{name}: skipped, {SETS[name]} is not here")
                continue
            work = Path(folder, f"{name}-{method}")
            work.mkdir()
            spec = prepared(args, base=base, source=SETS[name], method=METHODS[method], work=work)
            rounds = {peer: [] for peer in PEERS}
            for number, peer in order(args.rounds):
                say(f"{name} {method}: round {number + 1} of {args.rounds}, {peer}")
                rounds[peer].append(run_peer(replace(spec, peer=peer), work))
            results.append(summary(name, method, rounds, warm_up=args.warm_up))
            if not args.json:
                print_table(results[-1])
    if args.json:
        print(json.dumps(results, indent=1))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round of 6 steps each")
    parser.add_argument("--json", action="store_true", help="print every figure as JSON")
    parser.add_argument("--data", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--warm-up", type=int, default=4, help="first steps that are not counted")
    parser.add_argument("--batch-size", type=int, default=16, help="examples per update")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.steps, args.warm_up = 1, 6, 2
    return args


def order(rounds: int) -> Iterator[tuple[int, str]]:
    """Every peer once a round, each round beginning with another one."""
    for number in range(rounds):
        first = number % len(PEERS)
        for peer in PEERS[first:] + PEERS[:first]:
            yield number, peer


def prepared(args: argparse.Namespace, *, base: Path, source: Path, method: dict, work: Path) -> Spec:
    """Tokenise once for all peers, in a process of its own, so that this one stays small."""
    spec = Spec(
        peer="rows",
        base=str(base),
        source=str(source),
        method=method,
        rows=str(work / "rows.npz"),
        storage=str(work / "store"),
        lr=1e-3,
        batch_size=args.batch_size,
        max_length=1024,
        steps=args.steps,
        seed=42,
        threads=args.threads,
    )
    run_child(spec, work)
    return spec


def run_peer(spec: Spec, work: Path) -> Timed:
    return Timed(**run_child(spec, work))


def run_child(spec: Spec, work: Path) -> dict:
    """One fresh process for one peer; it leaves its figures in a file."""
    out = work / "out.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).with_name("train_peers.py")), json.dumps(asdict(spec)), str(out)]
    # RAY_ADDRESS would lead ftray's driver to a cluster that has other work.
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["BENCHMARK_STARTED"] = str(time.time())
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode or not out.is_file():
        raise SystemExit(
            f"{spec.peer} ended with code {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return json.loads(out.read_text())


def summary(data: str, method: str, rounds: dict[str, list[Timed]], *, warm_up: int) -> dict:
    """Medians over the steps after the warm-up of all rounds, with ratios to TRL; medians of rounds for the rest."""
    peers = {}
    for peer, runs in rounds.items():
        steps = [
            (tokens, wall, processor)
            for run in runs
            for tokens, wall, processor in list(zip(run.tokens, run.wall_s, run.processor_s, strict=True))[warm_up:]
        ]
        starts = {part: statistics.median(run.start[part] for run in runs) for part in runs[0].start}
        peers[peer] = {
            "tokens_per_s": statistics.median(tokens / wall for tokens, wall, _ in steps),
            "tokens_per_processor_s": statistics.median(tokens / processor for tokens, _, processor in steps),
            "rounds_tokens_per_processor_s": [
                sum(run.tokens[warm_up:]) / sum(run.processor_s[warm_up:]) for run in runs
            ],
            "peak_mb": statistics.median(run.peak_bytes for run in runs) / 1e6,
            "start": starts,
            "first_step_s": sum(starts.values()),
            "losses": runs[0].losses,
            "settings": runs[0].settings,
        }
    for figures in peers.values():
        for speed in ("tokens_per_s", "tokens_per_processor_s"):
            figures[f"{speed}_ratio"] = figures[speed] / peers["trl"][speed]
    lengths = rounds["trl"][0].tokens
    return {"data": data, "method": method, "tokens_per_update": statistics.mean(lengths), "peers": peers}


def print_table(result: dict) -> None:
    peers = result["peers"]
    print(
        f"\n{result['data']}, {result['method']}: {result['tokens_per_update']:.0f} real tokens per update on average"
    )
    for peer in PEERS:
        print(f"  {peer:8} {' '.join(f'{key}={value}' for key, value in peers[peer]['settings'].items())}")
    heads = (
        f"{'tokens/s':>9} {'ratio':>6} {'tokens/cpu-s':>13} {'ratio':>6} {'target':>7} {'':4} {'peak MB':>8}  losses"
    )
    print(f"  {'':8} {heads}")
    for peer in PEERS:
        figures = peers[peer]
        ratio, target = figures["tokens_per_processor_s_ratio"], TARGETS.get(peer)
        verdict = "" if target is None else "met" if ratio >= target else "MISS"
        print(
            f"  {peer:8} {figures['tokens_per_s']:9.0f} {figures['tokens_per_s_ratio']:6.2f} "
            f"{figures['tokens_per_processor_s']:13.0f} {ratio:6.2f} {'' if target is None else f'>= {target:g}':>7} "
            f"{verdict:4} {figures['peak_mb']:8.0f}  {' '.join(f'{x:.5f}' for x in figures['losses'][:SHOWN_LOSSES])}"
        )
    for peer in PEERS:
        parts = "  ".join(f"{part} {seconds:.1f}" for part, seconds in peers[peer]["start"].items())
        print(f"  {peer:8} first step after {peers[peer]['first_step_s']:5.1f} s: {parts}")
    sys.stdout.flush()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
