"""The runs that parity compares. Two workers write checkpoints, which one and three resume under other stages."""

from __future__ import annotations

from parity_drill import BATCH, Variant

from ftray.config.schema import Full, Lora, Method

LORA = Lora(rank=4)
NORMS_TOO = Lora(rank=4, modules_to_save=["norm"])
DROPS = Lora(rank=4, dropout=0.2)
QLORA = Lora(rank=4, bits=4)
STAGES = (0, 1, 2, 3)


def cuts(method: Method, kind: str, *, stages=STAGES, decay: float = 0.0, version: bool = False) -> list[Variant]:
    """One run of a method under several ZeRO stages."""
    return [
        Variant(
            f"{kind}-z{z}",
            zero=z,
            method=method,
            weight_decay=decay,
            saves=f"{kind}-z{z}",
            spread=z % 2 == 1,
            version=version,
        )
        for z in stages
    ]


TWO = [
    *cuts(Full(), "full"),
    Variant("full-z2-offloaded", zero=2, offload="cpu", saves="full-z2-offloaded"),
    Variant("full-z3-offloaded", zero=3, offload="cpu", saves="full-z3-offloaded"),
    Variant("full-micro-1", micro=1),
    Variant("full-micro-whole", zero=2, micro=BATCH),
    Variant("full-packed", packing=True),
    Variant("full-packed-z3", packing=True, zero=3),
    Variant("full-recomputed", checkpointing=True),
    Variant("lora-recomputed-z3", zero=3, checkpointing=True, packing=True, method=LORA),
    *cuts(Full(), "decayed", stages=(0, 2, 3), decay=0.1),
    *cuts(LORA, "lora", version=True),
    Variant("lora-packed-z2", zero=2, packing=True, method=LORA),
    Variant("lora-packed-z3", zero=3, packing=True, method=LORA),
    *cuts(NORMS_TOO, "norms", stages=(0, 2, 3), decay=0.1),
    *(Variant(f"drops-z{z}", zero=z, method=DROPS, saves=f"drops-z{z}") for z in (0, 3)),
    *(Variant(f"drops-z{z}-resumed", zero=z, method=DROPS, resumes=f"drops-z{z}") for z in (0, 3)),
    *(Variant(f"bf16-z{z}", zero=z, dtype="bf16", saves=f"bf16-z{z}") for z in STAGES),
    *(Variant(f"bf16-z{z}-resumed", zero=z, dtype="bf16", resumes=f"bf16-z{z}") for z in STAGES),
    Variant("qlora-z2", zero=2, method=QLORA, base="square", saves="qlora-z2", version=True),
]
OPTIMIZERS = ("adamw_8bit", "paged_adamw", "paged_adamw_8bit")
CROSSED = [  # (saved as, resumed under)
    *((f"full-z{z}", 3 - z) for z in STAGES),
    ("full-z2-offloaded", 0),
    ("full-z3-offloaded", 2),
    *((f"decayed-z{z}", 3 - z) for z in (0, 2, 3)),
    *((f"lora-z{z}", 3 - z) for z in STAGES),
    *((f"norms-z{z}", 3 - z) for z in (0, 2, 3)),
]


def resumed(saved: str, stage: int) -> Variant:
    kind = saved.split("-")[0]
    method = {"full": Full(), "decayed": Full(), "lora": LORA, "norms": NORMS_TOO}[kind]
    return Variant(
        f"{saved}-resumed",
        zero=stage,
        method=method,
        weight_decay=0.1 if kind in ("decayed", "norms") else 0.0,
        resumes=saved,
    )


ONE = [
    Variant("full"),
    Variant("full-packed-z3", packing=True, zero=3),
    Variant("decayed", weight_decay=0.1),
    Variant("lora", method=LORA, micro=BATCH),
    Variant("norms", method=NORMS_TOO, weight_decay=0.1),
    *(resumed(saved, stage) for saved, stage in CROSSED),
    Variant("qlora", method=QLORA, base="square", packing=True),
    Variant("qlora-z2-resumed", method=QLORA, base="square", resumes="qlora-z2"),
    *(Variant(o, optimizer=o, saves=o) for o in OPTIMIZERS),
    *(Variant(f"{o}-resumed", optimizer=o, resumes=o) for o in OPTIMIZERS),
]
THREE = [
    Variant("full", micro=1),
    Variant("full-packed-z3", packing=True, zero=3),
    Variant("lora-packed-z2", packing=True, zero=2, method=LORA),
    *(Variant(f"bf16-z{z}-resumed", zero=5 - z, dtype="bf16", resumes=f"bf16-z{z}") for z in (2, 3)),
    *(resumed(saved, stage) for saved, stage in CROSSED if saved[-1] in "23" or saved.endswith("offloaded")),
]
