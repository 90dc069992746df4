"""Run and sweep files of the cluster tests."""

import json


def run_writer(small_base, orders, tmp_path):
    def write(name="faults", **keys):
        lines = {
            "storage": str(tmp_path / "store"),
            "model.base": str(small_base),
            "data.sources": [str(orders / "train.jsonl")],
            "data.eval_sources": [str(orders / "eval.jsonl")],
            "data.max_length": 192,
            "optim.steps": 30,
            "optim.batch_size": 6,  # for 1, 2 and 3 workers
            "optim.lr": 5e-3,
            "scale.workers": 2,
            "scale.cpus_per_worker": 1,
            "scale.checkpoint_every": 5,
            "evaluate.every": 0,
            "evaluate.generate_rows": 2,
            "evaluate.max_new_tokens": 4,
            "evaluate.forgetting": False,
            "evaluate.gate": [],
            "track.to": [],
        } | {key.replace("__", "."): value for key, value in keys.items()}
        tree = {"name": name}
        for dotted, value in lines.items():
            *sections, key = dotted.split(".")
            place = tree
            for section in sections:
                place = place.setdefault(section, {})
            place[key] = value
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(tree))
        return path

    return write


def sweep_writer(write_run, folder):
    def write(name, *, run=None, **keys):
        small = {"scale__workers": 1, "optim__steps": 6, "evaluate__generate_rows": 0}
        path = write_run(name=f"{name}-run", **{**small, **(run or {})})
        shared = {"name": name, "run": str(path), "space": {"method.rank": [2, 4]}, "every": 0.03, "fuse": "off"}
        out = folder / f"{name}-sweep.yaml"
        out.write_text(json.dumps({**shared, **keys}))
        return out

    return write
