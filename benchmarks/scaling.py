"""The tables of docs/scaling.md, from the formulas that `ftray check` uses:  python benchmarks/scaling.py"""

from __future__ import annotations

from transformers import LlamaConfig

from ftray.config.schema import Full
from ftray.models.load import Shape
from ftray.train.failures import best_interval_s, lost_gpu_hours, mtbf_s, simulate, young_daly_s
from ftray.train.layout import Layout
from ftray.train.memory import GIB
from ftray.train.plan import human_seconds
from ftray.train.scaling import Machines, checkpoint_bytes, cost

SIDES = {"8 B": (4096, 32, 14336, 32), "70 B": (8192, 80, 28672, 64)}
GPUS = (1, 8, 16, 64, 256, 1024)
MAX_LENGTH, WINDOWS = 8192, 4


def shape(name: str) -> Shape:
    hidden, layers, mlp, heads = SIDES[name]
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
    )
    return Shape.from_config(config)


def layout(workers: int, zero: int) -> Layout:
    return Layout(
        workers=workers,
        device="cuda",
        gpus_per_worker=1,
        cpus_per_worker=8,
        zero=zero,
        offload="none",
        nvme_path=None,
        dtype="bf16",
        attention="flash_attention_2",
        packing=True,
        micro_batch_size=1,
        gradient_checkpointing=True,
    )


def growth() -> list[str]:
    rows = [
        "| base | GPUs | ZeRO | memory a GPU | step | waits for network | efficiency | tokens/s/GPU | $ a billion |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in SIDES:
        model = shape(name)
        for gpus in GPUS:
            for zero in (2, 3):
                one = cost(model, method=Full(), layout=layout(gpus, zero), max_length=MAX_LENGTH, windows=WINDOWS)
                fits = "" if one.memory_bytes <= 0.9 * 80 * GIB else ", too much"
                rows.append(
                    f"| {name} | {gpus:,} | {zero} | {one.memory_bytes / GIB:.0f} GiB{fits} | {one.step_s:.1f} s "
                    f"| {one.exposed_s / one.step_s:.0%} | {one.efficiency:.0%} | {one.tokens_per_s / gpus:,.0f} "
                    f"| {one.dollars_per_billion:,.0f} |"
                )
    return rows


def failures() -> list[str]:
    rows = [
        "| base | GPUs | a failure every | checkpoint | best interval | Young/Daly | lost in a week, simulated |",
        "|---|---|---|---|---|---|---|",
    ]
    machines = Machines()
    for name in SIDES:
        state = checkpoint_bytes(shape(name), method=Full())
        for gpus in GPUS[2:]:
            save, restart = state / machines.bandwidth(gpus), machines.restart_s + state / machines.storage
            between = mtbf_s(gpus)
            interval = best_interval_s(save_s=save, restart_s=restart, mtbf_s=between)
            week = 7 * 24 * 3600
            lost = [
                lost_gpu_hours(
                    simulate(week, interval_s=interval, save_s=save, restart_s=restart, mtbf_s=between, seed=seed),
                    gpus=gpus,
                )
                for seed in range(200)
            ]
            rows.append(
                f"| {name} | {gpus:,} | {human_seconds(between)} | {save:.1f} s | {human_seconds(interval)} "
                f"| {human_seconds(young_daly_s(save_s=save, mtbf_s=between))} "
                f"| {sum(lost) / len(lost):,.1f} of {168 * gpus:,} GPU-hours |"
            )
    return rows


if __name__ == "__main__":
    print("\n".join([*growth(), "", *failures()]))
