"""What `ftray init` can begin a run file with. Apart from init.py: options are read before pydantic is loaded."""

from __future__ import annotations

from typing import Any

LORA = {"kind": "lora", "rank": 16}
STARTERS: dict[str, dict[str, Any]] = {
    "lora": {"method": LORA},
    "qlora": {"method": {"kind": "lora", "rank": 16, "bits": 4}, "optim": {"optimizer": "paged_adamw_8bit"}},
    "freeze": {"method": {"kind": "freeze", "last_layers": 2}},
    "adalora": {"method": {"kind": "adalora", "rank": 8}},
    "loha": {"method": {"kind": "loha", "rank": 8}},
    "lokr": {"method": {"kind": "lokr", "rank": 8}},
    "ia3": {"method": {"kind": "ia3"}},
    "oft": {"method": {"kind": "oft", "block": 32}},
    "vera": {"method": {"kind": "vera", "rank": 256}},
    "norms": {"method": {"kind": "norms"}},
    "tokens": {"method": {"kind": "tokens", "tokens": ["<|user|>", "<|assistant|>"]}},
    "bottleneck": {"method": {"kind": "bottleneck", "size": 64}},
    "prefix": {"method": {"kind": "prefix", "tokens": 20}},
    "prompt": {"method": {"kind": "prompt", "tokens": 20}},
    "p_tuning": {"method": {"kind": "p_tuning", "tokens": 20}},
    "full": {"method": {"kind": "full"}},
    "feature": {"method": {"kind": "feature"}, "objective": {"kind": "classification"}},
    "dpo": {"method": LORA, "objective": {"kind": "dpo"}},
    "orpo": {"method": LORA, "objective": {"kind": "orpo"}},
    "kto": {"method": LORA, "objective": {"kind": "kto"}},
    "distill": {"method": LORA, "objective": {"kind": "distill", "teacher": "builtin:tiny"}},
    "reward": {"method": LORA, "objective": {"kind": "reward"}},
    "pretrain": {"method": {"kind": "full"}, "objective": {"kind": "pretrain"}, "evaluate": {"generate_rows": 0}},
    "classification": {"method": LORA, "objective": {"kind": "classification"}},
    "regression": {"method": LORA, "objective": {"kind": "regression"}},
    "token_classification": {"method": LORA, "objective": {"kind": "token_classification"}},
}
