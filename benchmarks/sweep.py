"""Sweeps of ftray against plain Ray Tune over a TRL script: makespan and peak memory of the same LoRA trials.

    python benchmarks/sweep.py               # eight trials of each peer, about 7 minutes on two cores
    python benchmarks/sweep.py --trials 16
    python benchmarks/sweep.py --blocks 1    # adapters in the last of six blocks alone
    python benchmarks/sweep.py --quick       # a few steps of each: does it still work?

All start from nothing, in a process of their own, and search the same grid of learning rates and ranks over the same
rows, as many steps of as many examples, and score each trial on the same held-out rows:

    tune     Ray Tune over a plain script with TRL's SFTTrainer: one process a trial, which imports, loads and
             tokenises; two at a time with one core each
    ftray    `ftray sweep` with `fuse: off`, two trials at a time with one core each; the best version is registered and
             judged, which plain Tune does not do
    fused    the same with `fuse: auto`: all trials in one process over one base, with both cores
    one      `ftray sweep` of the first trial alone, whose memory the fused sweep is compared with

Memory is the sum over all processes of a peer, Ray's own included, of what each holds and its share of what it shares
(PSS), sampled every second. Processor seconds are those of the same processes, up to the last sample of each: on a
machine with other work they say more than the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from memory import computed, held

ROOT = Path(__file__).resolve().parents[1]
RATES, RANKS = (1e-3, 4e-3, 5e-4, 2e-3), (4, 8, 16, 32)
BLOCKS = 6  # of the built-in model
PEERS = ("tune", "ftray", "fused", "one")
TARGETS = {("tune", "ftray"): 2.0, ("tune", "fused"): 3.0, ("ftray", "fused"): 1.5}
MEMORY = 1.3  # of the fused sweep, over one trial's
SAMPLE_S = 1.0
TIMEOUT_S = 1800


def main() -> None:
    args = arguments()
    if args.peer:
        peer(json.loads(args.peer))
        return
    results: dict[str, list[dict]] = {name: [] for name in args.peers}
    with tempfile.TemporaryDirectory(prefix="ftray-benchmark-") as folder:
        prepare(Path(folder))
        for number in range(args.rounds):
            for name in args.peers[:: 1 if number % 2 == 0 else -1]:
                print(f"round {number + 1} of {args.rounds}: {name}", file=sys.stderr, flush=True)
                spec = {"steps": args.steps, "batch_size": args.batch_size, "blocks": args.blocks}
                results[name].append(run_peer(name, Path(folder), trials=args.trials, spec=spec))
    report(results, as_json=args.json)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two steps a trial")
    parser.add_argument("--json", action="store_true", help="print every figure as JSON")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20, help="updates of each trial")
    parser.add_argument("--batch-size", type=int, default=16, help="examples per update")
    parser.add_argument("--trials", type=int, choices=(8, 16), default=8)
    parser.add_argument(
        "--blocks", type=int, choices=range(1, BLOCKS + 1), default=BLOCKS, help="adapted, from the last"
    )
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.steps = 2
    return args


def prepare(folder: Path) -> None:
    """The rows and the base, as files that both read."""
    from ftray.data.sample import write_sample

    write_sample(folder / "rows", train_rows=2000, eval_rows=100)
    shutil.copytree(ROOT / "ftray" / "models" / "tiny", folder / "base")


def run_peer(name: str, folder: Path, *, trials: int, spec: dict) -> dict:
    """One peer in a process of its own, its memory watched from here."""
    work = folder / f"{name}-{time.time_ns()}"
    rates = RATES[: trials // len(RANKS)] if name != "one" else RATES[:1]
    spec = {**spec, "name": name, "folder": str(folder), "work": str(work)}
    spec |= {"rates": rates, "ranks": RANKS if name != "one" else RANKS[-1:]}
    # RAY_ADDRESS would lead to a cluster that has other work.
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_worker_niceness": "0"}
    work.mkdir()
    began = time.monotonic()
    with open(work / "log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, "--peer", json.dumps(spec)], env=environment, stdout=log, stderr=log
        )
        peak = 0
        processor: dict[int, float] = {}
        while process.poll() is None:
            peak = max(peak, held(process.pid))
            processor |= computed(process.pid)
            time.sleep(SAMPLE_S)
            if time.monotonic() - began > TIMEOUT_S:
                process.kill()
    seconds = time.monotonic() - began
    out = work / "out.json"
    if process.returncode or not out.is_file():
        raise SystemExit(f"{name} ended with code {process.returncode}:\n{(work / 'log').read_text()[-4000:]}")
    told = {"seconds": seconds, "processor_s": sum(processor.values()), "peak_mb": peak / 1e6}
    return {**told, "trials": json.loads(out.read_text())}


def report(results: dict[str, list[dict]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(results, indent=1))
        return
    best = {name: min(runs, key=lambda run: run["seconds"]) for name, runs in results.items()}
    for name, run in best.items():
        losses = [trial["loss"] for trial in run["trials"]]
        print(
            f"{name:6} {run['seconds']:6.0f} s  {run['processor_s']:6.0f} processor-s  peak {run['peak_mb']:6.0f} MB  "
            f"{len(losses)} trials, "
            f"losses {' '.join(f'{loss:.3f}' for loss in losses)}"
        )
    for (slow, fast), target in TARGETS.items():
        if slow in best and fast in best:
            ratio, less = (best[slow][key] / best[fast][key] for key in ("seconds", "processor_s"))
            verdict = "met" if ratio >= target else "MISS"
            print(f"{fast} over {slow}: {ratio:.2f} as fast (>= {target:g}: {verdict}), by processor time {less:.2f}")
    if "fused" in best and "one" in best:
        share = best["fused"]["peak_mb"] / best["one"]["peak_mb"]
        print(f"fused holds {share:.2f} of one trial's peak (<= {MEMORY:g}: {'met' if share <= MEMORY else 'MISS'})")


def peer(spec: dict) -> None:
    trials = plain_tune(spec) if spec["name"] == "tune" else ftray_sweep(spec)
    trials.sort(key=lambda one: (spec["rates"].index(one["lr"]), spec["ranks"].index(one["rank"])))
    Path(spec["work"], "out.json").write_text(json.dumps(trials))


def targets(blocks: int) -> list[str]:
    """Every linear layer of the last so many blocks."""
    layers = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    return [f"layers.{block}.{layer}" for block in range(BLOCKS - blocks, BLOCKS) for layer in layers]


# ---------------------------------------------------------------------------------------------------------- plain tune


def plain_tune(spec: dict) -> list[dict]:
    """As in Ray Tune's guides: a function that trains, a grid of configurations, two at a time."""
    import ray
    from ray import tune

    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=2)
    tuner = tune.Tuner(
        tune.with_resources(trl_script, {"CPU": 1}),
        param_space={"lr": tune.grid_search(spec["rates"]), "rank": tune.grid_search(spec["ranks"]), "spec": spec},
        run_config=tune.RunConfig(storage_path=spec["work"], name="tune", verbose=0),
    )
    found = [{**one.config, **one.metrics} for one in tuner.fit()]
    return [{key: one[key] for key in ("lr", "rank", "loss")} for one in found]


def trl_script(config: dict) -> None:
    """A plain SFTTrainer script at its defaults, but for what must be equal: precision, rate, batch, steps."""
    import json

    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from ray import tune
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(1)
    spec = config["spec"]

    def rows(name: str) -> Dataset:
        lines = Path(spec["folder"], "rows", name).read_text().splitlines()
        pairs = [json.loads(line)["messages"] for line in lines]
        return Dataset.from_list([{"prompt": pair[:-1], "completion": pair[-1:]} for pair in pairs])

    tokenizer = AutoTokenizer.from_pretrained(f"{spec['folder']}/base")
    model = AutoModelForCausalLM.from_pretrained(f"{spec['folder']}/base", dtype=torch.float32)
    per_device = 8
    arguments = SFTConfig(
        output_dir=f"{spec['work']}/out",
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=spec["batch_size"] // per_device,
        max_steps=spec["steps"],
        max_length=192,
        learning_rate=config["lr"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
    )
    rank = config["rank"]
    lora = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=targets(spec["blocks"]))
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=rows("train.jsonl"),
        eval_dataset=rows("eval.jsonl"),
        processing_class=tokenizer,
        peft_config=lora,
    )
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    tune.report({"loss": loss})


# --------------------------------------------------------------------------------------------------------------- ftray


def ftray_sweep(spec: dict) -> list[dict]:
    from ftray.config.sweeping import Sweep
    from ftray.sweep.engine import sweep

    folder = Path(spec["folder"])
    asked = Sweep.model_validate(
        {
            "name": "benchmark",
            "run": {
                "name": "benchmark-run",
                "storage": f"{spec['work']}/store",
                "model": {"base": str(folder / "base"), "dtype": "fp32"},
                "data": {
                    "sources": str(folder / "rows" / "train.jsonl"),
                    "eval_sources": str(folder / "rows" / "eval.jsonl"),
                    "max_length": 192,
                },
                "optim": {
                    "steps": spec["steps"],
                    "batch_size": spec["batch_size"],
                    "schedule": "linear",
                    "warmup": 0,
                },
                "method": {"kind": "lora", "targets": targets(spec["blocks"])},
                "scale": {"address": "local"},
                "evaluate": {"generate_rows": 0, "forgetting": False, "gate": []},
            },
            "space": {"optim.lr": spec["rates"], "method.rank": spec["ranks"]},
            "search": {"kind": "grid"},
            "parallel": 2 if spec["name"] == "ftray" else None,
            "fuse": "auto" if spec["name"] == "fused" else "off",
            "every": 1000,
        }
    )
    trials = sweep(asked, fresh=True, as_json=True).trials
    return [{"lr": one["optim.lr"], "rank": one["method.rank"], "loss": one["loss"]} for one in trials]


if __name__ == "__main__":
    main()
