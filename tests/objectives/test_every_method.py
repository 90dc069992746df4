"""Each method under each objective that allows it: a whole run learns, and a process that has seen none of it loads the
version, merges it where it merges, and gets the same outputs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_drill import run_all, run_of, write_base, write_rows

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
}
RATES = {"full": 3e-3, "freeze": 3e-3, "adalora": 2e-2, "ia3": 5e-2, "vera": 5e-2, "norms": 3e-2, "prompt": 5e-2}
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
}
SAMPLED = ("grpo", "rloo", "ppo")
STEPS = {"grpo": 3, "rloo": 3, "ppo": 3, "kto": 20}
READING = ("classification", "regression", "reward")
MERGED = {"lora", "adalora", "loha", "lokr", "ia3", "oft", "vera", "norms", "tokens"}
CASES = [(method, objective) for objective in OBJECTIVES for method in METHODS]
REFUSED = {("tokens", objective) for objective in READING}


def name_of(method: str, objective: str) -> str:
    return f"{objective}-{method}".replace("_", "-")


def rows_for(folder: Path) -> dict[str, Path]:
    """Sixteen rows of each kind, in files by kind."""
    words = [" ".join(f"w{3 + (n * 7 + k * 5) % 30}" for k in range(2 + n % 4)) for n in range(16)]
    kinds = {
        "text": [{"text": f"{text} w{3 + n}"} for n, text in enumerate(words)],
        "pairs": [{"prompt": t, "chosen": f"w{5 + n % 4}", "rejected": f"w{20 + n % 4}"} for n, t in enumerate(words)],
        "judged": [{"prompt": t, "completion": f"w{5 + n % 2}", "label": n % 2 == 0} for n, t in enumerate(words)],
        "labelled": [{"text": text, "label": f"w{3 + n % 2}"} for n, text in enumerate(words)],
        "numbers": [{"text": text, "label": float(n % 3)} for n, text in enumerate(words)],
    }
    for kind, rows in kinds.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_rows(folder / "rows.jsonl", 16)
    return {kind: folder / f"{kind}.jsonl" for kind in [*kinds, "rows"]}


FILES = {
    "pretrain": "text",
    "dpo": "pairs",
    "orpo": "pairs",
    "kto": "judged",
    "reward": "pairs",
    "classification": "labelled",
    "regression": "numbers",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What every allowed run logged, and what a fresh process says of the versions: two dicts by name."""
    folder = tmp_path_factory.mktemp("every")
    write_base(folder / "base")
    files = rows_for(folder)
    runs = []
    for method, objective in CASES:
        if (method, objective) in REFUSED:
            continue
        section = {"kind": objective, **OBJECTIVES[objective]}
        if objective == "distill":
            section["teacher"] = str(folder / "base")
        run = run_of(
            folder,
            name_of(method, objective),
            section,
            method={"kind": method, **METHODS[method]},
            data={"sources": str(files[FILES.get(objective, "rows")]), "eval_fraction": 0.1, "eval_rows": 2},
            optim={"steps": STEPS.get(objective, 10), "batch_size": 8, "lr": RATES.get(method, 1e-2)},
            evaluate={"every": 0, "forgetting": False, "generate_rows": 2, "max_new_tokens": 4},
        )
        if objective not in SAMPLED:
            del run["objective"]["max_new_tokens"]
        runs.append(run)
    logs = run_all(folder, runs)
    asked = folder / "asked.json"
    asked.write_text(json.dumps(runs))
    reader = [sys.executable, __file__, str(asked)]
    done = subprocess.run(reader, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return logs, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("method", "objective"), CASES)
def test_a_run_learns_and_its_version_is_the_same_in_a_fresh_process(world, method, objective):
    logs, read = world
    if (method, objective) in REFUSED:
        pytest.skip("refused when the run is read: there would be nothing of the head to learn")
    name = name_of(method, objective)
    losses = [row["loss"] for row in logs[name] if row["kind"] == "train"]
    assert np.isfinite(losses).all()
    if objective not in SAMPLED:
        assert np.mean(losses[-4:]) < np.mean(losses[:4])  # two steps see every row once
    live = np.array(next(row["values"] for row in logs[name] if row["kind"] == "logits"))
    assert np.abs(live - np.array(read[name]["base"])).max() > 1e-4, "nothing was learnt"
    assert np.abs(live - np.array(read[name]["loaded"])).max() < 1e-4
    if method in MERGED:
        assert np.abs(live - np.array(read[name]["merged"])).max() < 1e-4


def main(asked: str) -> None:
    """In a fresh process: what each version says, loaded and merged, and what its base says."""
    import torch
    from run_drill import ASKED

    from ftray.config.schema import Run
    from ftray.models.load import load_base
    from ftray.models.merge import load_version, merge
    from ftray.store.admission import admit

    def outputs(model: Any) -> list:
        with torch.no_grad():
            return model.eval()(input_ids=torch.tensor(ASKED)).logits[:, -5:].float().tolist()

    found = {}
    for values in json.loads(Path(asked).read_text()):
        run = Run.model_validate(values)
        folder = Path(values["storage"], "runs", run.name, "output")
        admit(folder, {"base": run.model.base})
        card = {"method": run.method.model_dump(mode="json")}
        loaded, _ = load_version(run.model, folder, card, torch.float32)
        head = getattr(loaded, "ftray_head", None) or getattr(loaded.base_model, "ftray_head", None)
        base = load_base(run.model, method=run.method, dtype=torch.float32, head=head)
        said = {"loaded": outputs(loaded), "base": outputs(base)}
        if run.method.kind in MERGED:
            out = merge(run.model, folder, Path(values["storage"], "merged", run.name), torch.float32)
            whole = run.model.model_copy(update={"base": str(out)})
            said["merged"] = outputs(load_base(whole, method=run.method, dtype=torch.float32, head=head))
        found[run.name] = said
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
