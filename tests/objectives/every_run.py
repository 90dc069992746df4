"""Each method under each objective and on each kind of base: the runs that test_every_method.py makes and publishes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from run_drill import run_of, write_base, write_encoder, write_rows

METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "freeze": {"last_layers": 1},
    "lora": {"rank": 4},
    "adalora": {"rank": 2},
    "loha": {"rank": 4},
    "lokr": {"rank": 4},
    "ia3": {},
    "oft": {"block": 8},
    "vera": {"rank": 16},
    "norms": {},
    "tokens": {"tokens": list(range(3, 40))},
    "bottleneck": {"size": 8},
    "prefix": {"tokens": 3},
    "prompt": {"tokens": 3},
    "p_tuning": {"tokens": 3, "width": 16},
    "multitask_prompt": {"tokens": 3},
    "feature": {},
}
RATES = {
    **{"full": 3e-3, "freeze": 3e-3, "adalora": 2e-2, "ia3": 5e-2, "vera": 5e-2},
    **{"norms": 3e-2, "prompt": 5e-2, "multitask_prompt": 5e-2, "feature": 2e-2},
}
WORD = [{"kind": "regex", "pattern": r"\bw9\b"}]
SAMPLING = {"samples": 2, "max_new_tokens": 4, "rewards": WORD}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {},
    "pretrain": {},
    "distill": {"weight": 0.5},
    "dpo": {},
    "orpo": {},
    "kto": {},
    "reward": {},
    "grpo": SAMPLING,
    "rloo": SAMPLING,
    "ppo": SAMPLING,
    "classification": {},
    "regression": {},
    "token_classification": {},
}
SAMPLED = ("grpo", "rloo", "ppo")
STEPS = {"grpo": 3, "rloo": 3, "ppo": 3, "kto": 20}
LABELS = {
    "classification": ["w3", "w4"],
    "regression": ["value"],
    "token_classification": ["O", "B-low", "I-low"],
    "reward": ["reward"],
}
BASES = {"causal": tuple(OBJECTIVES), "encoder": ("classification", "regression", "token_classification")}


@dataclass(frozen=True)
class Case:
    method: str
    objective: str
    base: str

    @property
    def name(self) -> str:
        return f"{self.objective}-{self.method}-{self.base}".replace("_", "-")

    @property
    def reads(self) -> bool:
        return self.objective in LABELS

    @property
    def refused(self) -> str | None:
        """Why there is no such run."""
        if self.method == "tokens" and self.reads:
            return "refused when the run is read: there would be nothing of the head to learn"
        if self.method == "feature" and self.objective not in ("classification", "regression"):
            return "refused when the run is read: one vector a text says too little"
        if self.method == "multitask_prompt" and self.objective not in ("sft", "pretrain", "distill"):
            return "refused when the run is read: it learns from texts, each of a task"
        return None


CASES = [Case(method, objective, base) for base in BASES for objective in BASES[base] for method in METHODS]

TASKS = ("first", "second")
FILES = {
    "pretrain": "text",
    "dpo": "pairs",
    "orpo": "pairs",
    "kto": "judged",
    "reward": "pairs",
    "classification": "labelled",
    "regression": "numbers",
    "token_classification": "tagged",
}


def write_world(folder: Path) -> None:
    """The bases, and sixteen rows of each kind in files by kind."""
    write_base(folder / "causal")
    write_encoder(folder / "encoder")
    numbers = [[3 + (n * 7 + k * 5) % 30 for k in range(2 + n % 4)] for n in range(16)]
    words = [" ".join(f"w{number}" for number in one) for one in numbers]
    sides = [" ".join(f"w{3 + number % 15 + 15 * (n % 2)}" for number in one) for n, one in enumerate(numbers)]
    kinds = {
        "text": [{"text": f"{text} w{3 + n}"} for n, text in enumerate(words)],
        "pairs": [{"prompt": t, "chosen": f"w{5 + n % 4}", "rejected": f"w{20 + n % 4}"} for n, t in enumerate(words)],
        "judged": [{"prompt": t, "completion": f"w{5 + n % 2}", "label": n % 2 == 0} for n, t in enumerate(words)],
        "labelled": [{"text": text, "label": f"w{3 + n % 2}"} for n, text in enumerate(sides)],
        "numbers": [{"text": text, "label": float(2 * (n % 2))} for n, text in enumerate(sides)],
        "tagged": [{"tokens": text.split(), "tags": _tags(one)} for text, one in zip(words, numbers, strict=True)],
    }
    for kind, rows in kinds.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_rows(folder / "rows.jsonl", 16)
    for kind in ("text", "rows"):  # of two tasks
        lines = (folder / f"{kind}.jsonl").read_text().splitlines(keepends=True)
        for task, part in zip(TASKS, (lines[:8], lines[8:]), strict=True):
            (folder / f"{kind}-{task}.jsonl").write_text("".join(part))


def _tags(numbers: list[int]) -> list[str]:
    """Words below w18 are entities, and those that stand together are one."""
    before = [99, *numbers]
    return [
        "O" if number >= 18 else "B-low" if previous >= 18 else "I-low"
        for previous, number in zip(before, numbers, strict=False)
    ]


def run_for(folder: Path, case: Case) -> dict[str, Any]:
    section, lr = {"kind": case.objective, **OBJECTIVES[case.objective]}, RATES.get(case.method, 1e-2)
    if case.objective == "distill":
        section["teacher"] = str(folder / case.base)
    file = FILES.get(case.objective, "rows")
    sources: Any = str(folder / f"{file}.jsonl")
    if case.method == "multitask_prompt":
        sources = [{"path": str(folder / f"{file}-{task}.jsonl"), "task": task} for task in TASKS]
    run = run_of(
        folder,
        case.name,
        section,
        model={"base": str(folder / case.base)},
        method={"kind": case.method, **METHODS[case.method]},
        data={"sources": sources, "max_length": 32, "eval_fraction": 0.1, "eval_rows": 2},
        optim={"steps": STEPS.get(case.objective, 10), "batch_size": 8, "lr": lr if case.base == "causal" else lr / 2},
        evaluate={"generate_rows": 2, "max_new_tokens": 4},
    )
    if case.objective not in SAMPLED:
        del run["objective"]["max_new_tokens"]
    return run


def publish(values: dict[str, Any]) -> None:
    """As the driver of the run does once its workers are done."""
    from ftray.config.schema import Run
    from ftray.store.paths import Storage
    from ftray.store.runs import RunFolder
    from ftray.train.known import Known
    from ftray.train.launch import work_out
    from ftray.train.layout import Node
    from ftray.train.publish import conclude

    run = Run.model_validate(values)
    storage = Storage(run.storage)
    folder, known = RunFolder(storage, run.name), Known.of(run, storage)
    checked = work_out(run, known, [Node("here", cpus=1)])
    folder.begin({"run": values, "settings": checked.settings, "base": known.base}, fresh=False)
    conclude(run, storage, folder, known=known, checked=checked)
