"""What benchmarks/serve.py makes of its peers' figures: medians, percentiles, ratios beside their targets, tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

LONG_PROMPT = 96
PEFT = ("peft-mixed", "peft-sequential")
OURS = "ftray"
CLOCK, BEST, PROCESSOR = "by the clock", "best rounds", "by processor time"

Rounds = Mapping[int, dict[str, Any]]
"""A peer's figures of one cell, by round."""


@dataclass(frozen=True)
class Asked:
    """What the rounds of one cell are filed under."""

    prompt: int
    concurrency: int
    kind: str


@dataclass(frozen=True)
class Ratio:
    """Our speed in cells of a kind over the best of `peers` in cells of `over`, and what it should be (None: no more
    than to be seen). `prompts`: at which lengths."""

    name: str
    kind: str
    peers: tuple[str, ...]
    over: str
    target: float | None
    prompts: Callable[[int], bool] = lambda length: True


RATIOS = (
    Ratio("mixed over our own base", "mixed", (OURS,), "base", 0.85),
    Ratio("one adapter over our own base", "one", (OURS,), "base", None),
    Ratio("mixed over vLLM", "mixed", ("vllm-lora",), "mixed", 3.0, lambda length: length < LONG_PROMPT),
    Ratio("mixed over vLLM, long prompts", "mixed", ("vllm-lora",), "mixed", 5.0, lambda length: length >= LONG_PROMPT),
    Ratio("mixed over the better PEFT", "mixed", PEFT, "mixed", 2.0),
    Ratio("one adapter over vLLM", "one", ("vllm-lora",), "one", None),
    Ratio("one adapter over the better PEFT", "one", PEFT, "one", None),
    Ratio("base over vLLM with LoRA enabled", "base", ("vllm-lora",), "base", 1.0),
    Ratio("base over vLLM compiled, without LoRA", "base", ("vllm-plain",), "base", None),
    Ratio("base over transformers", "base", ("transformers",), "base", None),
)
HTTP_TARGET = 0.85


def cells(found: Mapping[Asked, Mapping[str, Rounds]]) -> list[dict[str, Any]]:
    """One entry for each cell, with what each peer did in all rounds of it."""
    entries = []
    for asked, peers in found.items():
        ours = peers.get(OURS)
        told = {peer: of_peer(rounds, ours) for peer, rounds in peers.items()}
        entries.append({**asdict(asked), "peers": told})
    return entries


def of_peer(rounds: Rounds, ours: Rounds | None = None) -> dict[str, Any]:
    """Speeds: the median and the best of the rounds. Times, in ms, over all requests of all rounds."""
    runs = list(rounds.values())
    first = [1000 * value for run in runs for value in run["first_s"]]
    gaps = [1000 * value for run in runs for value in run["gaps_s"]]
    told = {
        "rounds": len(runs),
        "tokens_per_s": spread([speed(run, "wall_s") for run in runs]),
        "tokens_per_processor_s": spread([speed(run, "processor_s") for run in runs]),
        "first_token_ms": percentiles(first),
        "between_tokens_ms": percentiles(gaps),
    }
    if ours is not None:
        told["same_answers"] = alike(runs[0]["answers"], next(iter(ours.values()))["answers"])
    return told


def speed(run: Mapping[str, Any], clock: str) -> float:
    return run["tokens"] / max(run[clock], 1e-9)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "best": max(values)}


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """p50 and p99, each a value that was measured."""
    if not values:
        return None
    ordered = sorted(values)
    return {f"p{percent}": ordered[min(len(ordered) * percent // 100, len(ordered) - 1)] for percent in (50, 99)}


def alike(answers: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> float:
    """The share of answers that begin alike: with random weights in bf16, near ties fall one way or the other."""
    return statistics.mean(one == other for one, other in zip(answers, others, strict=True))


def ratios(found: Mapping[Asked, Mapping[str, Rounds]]) -> list[dict[str, Any]]:
    """Medians of the rounds' ratios, both sides of each measured within a minute or two; and our best round's speed by
    the clock over theirs, which other work on the machine disturbs less. Of rounds that all of them took part in."""
    return [told for ratio in RATIOS for asked in found for told in ratio_at(ratio, asked, found)]


def ratio_at(ratio: Ratio, asked: Asked, found: Mapping[Asked, Mapping[str, Rounds]]) -> Iterator[dict[str, Any]]:
    if asked.kind != ratio.kind or not ratio.prompts(asked.prompt):
        return
    ours = found[asked].get(OURS, {})
    others = found.get(Asked(asked.prompt, asked.concurrency, ratio.over), {})
    peers = [others[peer] for peer in ratio.peers if peer in others]
    shared = [number for number in ours if peers and all(number in rounds for rounds in peers)]
    if not shared:
        return
    by_clock, by_processor = (
        [(speed(ours[n], clock), max(speed(rounds[n], clock) for rounds in peers)) for n in shared]
        for clock in ("wall_s", "processor_s")
    )
    values = {
        CLOCK: statistics.median(mine / theirs for mine, theirs in by_clock),
        BEST: max(mine for mine, _ in by_clock) / max(theirs for _, theirs in by_clock),
        PROCESSOR: statistics.median(mine / theirs for mine, theirs in by_processor),
    }
    told = {"name": ratio.name, "prompt": asked.prompt, "concurrency": asked.concurrency}
    yield told | judged(values, ratio.target)


def judged(values: Mapping[str, float], target: float | None) -> dict[str, Any]:
    met = None if target is None else {name: value >= target for name, value in values.items()}
    return {"ratio": dict(values), "target": target, "met": met}


def http(rounds: Mapping[tuple[str, str], Rounds]) -> dict[str, Any]:
    """`rounds` by (way, kind); the way `engine` is the one in process. By the clock only: over HTTP, two processors
    work where in process one does."""
    entries = []
    for (way, kind), mine in rounds.items():
        entry = {"way": way, "kind": kind, **of_peer(mine)}
        if way != "engine":
            engine = rounds["engine", kind]
            ratio = statistics.median(speed(mine[n], "wall_s") / speed(engine[n], "wall_s") for n in mine)
            entry |= judged({CLOCK: ratio}, HTTP_TARGET)
        entries.append(entry)
    return {"entries": entries}


def loads(told: Mapping[str, Any]) -> dict[str, Any]:
    """Times in ms."""

    def ms(values: Sequence[float]) -> dict[str, float] | None:
        return percentiles([1000 * value for value in values])

    return {
        "versions": told["versions"],
        "slots": told["slots"],
        "publishing_s": told["published_s"],
        **{
            name: {
                "loads": len(told[name]["load_s"]),
                "load_ms": ms(told[name]["load_s"]),
                "first_token_ms": ms(told[name]["first_s"]),
            }
            for name in ("alone", "busy")
        },
        "first_token_when_loaded_ms": ms(told["warm_first_s"]),
        "streams": told["streams"]["count"],
        "between_tokens_ms": ms(told["streams"]["gaps_s"]),
        "between_tokens_with_loads_ms": ms(told["streams"]["gaps_with_loads_s"]),
    }


# ------------------------------------------------------------------------------------------------------------- in print


def cell_table(entry: Mapping[str, Any]) -> str:
    title = f"prompt {entry['prompt']}, {entry['concurrency']} at once, {entry['kind']}"
    lines = [
        f"{title:38}{'tokens/s':>9} {'best':>6} {'tokens/cpu-s':>13} {'best':>6}"
        f"{'first token ms':>18}{'between tokens ms':>20}  alike rounds",
    ]
    for peer, told in entry["peers"].items():
        wall, used = told["tokens_per_s"], told["tokens_per_processor_s"]
        same = f"{told['same_answers']:6.0%}" if "same_answers" in told else f"{'':6}"
        lines.append(
            f"  {peer:36}{wall['median']:9.0f} {wall['best']:6.0f} {used['median']:13.0f} {used['best']:6.0f}"
            f"{both(told['first_token_ms']):>18}{both(told['between_tokens_ms']):>20} {same} {told['rounds']:6d}"
        )
    return "\n".join(lines)


def both(values: Mapping[str, float] | None) -> str:
    return "-" if values is None else " / ".join(f"{value:.{1 if value < 100 else 0}f}" for value in values.values())


def ratio_table(entries: Sequence[Mapping[str, Any]]) -> str:
    columns = (CLOCK, BEST, PROCESSOR)
    heads = "".join(f"{name:>19}" for name in columns)
    lines = [f"{'our tokens/s as a ratio':40}{'prompt':>7}{'at once':>8}{'target':>8}{heads}"]
    for entry in entries:
        target = "" if entry["target"] is None else f">= {entry['target']:g}"
        lines.append(
            f"  {entry['name']:38}{entry['prompt']:7d}{entry['concurrency']:8d}{target:>8}"
            + "".join(f"{verdict(entry, name):>19}" for name in columns)
        )
    return "\n".join(lines)


def verdict(entry: Mapping[str, Any], name: str) -> str:
    said = "" if entry["met"] is None else " met " if entry["met"][name] else " MISS"
    return f"{entry['ratio'][name]:.2f}{said}"


def http_table(told: Mapping[str, Any]) -> str:
    lines = [
        f"{'over HTTP and Ray Serve':38}{'tokens/s':>9} {'best':>6} {'tokens/cpu-s':>13}"
        f"{'first token ms':>17}{'between pieces ms':>20}  of the engine's tokens/s (>= {HTTP_TARGET})"
    ]
    for entry in told["entries"]:
        wall, used = entry["tokens_per_s"], entry["tokens_per_processor_s"]
        name = f"{entry['kind']}, {entry['way']}"
        lines.append(
            f"  {name:36}{wall['median']:9.0f} {wall['best']:6.0f} {used['median']:13.0f}"
            f"{both(entry['first_token_ms']):>17}{both(entry['between_tokens_ms']):>20}  "
            + (verdict(entry, CLOCK) if "ratio" in entry else "")
        )
    return "\n".join(lines)


def loads_table(told: Mapping[str, Any]) -> str:
    def line(name: str, part: Mapping[str, Any]) -> str:
        waited = f"a first token after {both(part['first_token_ms'])} ms"
        return f"  {name:36}{part['loads']} loads of {both(part['load_ms'])} ms (p50 / p99), {waited}"

    return "\n".join(
        [
            f"{told['versions']} registered adapters through {told['slots']} slots "
            f"(published in {told['publishing_s']:.0f} s)",
            line("alone", told["alone"]),
            line(f"while {told['streams']} streams of the base run", told["busy"]),
            f"  {'a version that is there':36}a first token after {both(told['first_token_when_loaded_ms'])} ms",
            f"  {'between tokens of those streams':36}{both(told['between_tokens_ms'])} ms without loads, "
            f"{both(told['between_tokens_with_loads_ms'])} ms with",
        ]
    )
