"""The model and the adapters that benchmarks/serve.py serves, made on the spot: `serve_world.py SHAPE SPEC`.

Weights are random, as speed does not depend on them; adapters change answers enough to tell one from another.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from serve_cell import Lines, Spec

SHAPES: dict[str, dict[str, Any]] = {
    "28m": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 1408,
        "tie_word_embeddings": False,
    },
    "135m": {  # SmolLM-135M's
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 96,
        "tie_word_embeddings": False,
    },
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NORMS = ("input_layernorm", "post_attention_layernorm")
TYPES = {"fp32": "float32", "bf16": "bfloat16"}


def main() -> None:
    lines = Lines()
    shape, spec = sys.argv[1], Spec(**json.loads(sys.argv[2]))
    lines.say(make_base(shape, spec))
    for number, (folder, rank) in enumerate(zip(spec.adapters, spec.ranks, strict=True)):
        make_adapter(Path(folder), spec=spec, rank=rank, seed=number)
    lines.say({})


def make_base(shape: str, spec: Spec) -> dict[str, int]:
    """A Llama with the built-in tokenizer, as transformers saves it; made without transformers, which takes long to
    import. Returns its number of parameters, and how many ids there is text for."""
    import torch
    from safetensors.torch import save_file

    import ftray

    folder = Path(spec.base)
    folder.mkdir()
    tiny = Path(ftray.__file__).parent / "models" / "tiny"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(tiny / name, folder / name)
    theirs = json.loads((tiny / "config.json").read_text())
    ids = {name: theirs[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 2048}
    config |= {**ids, **SHAPES[shape], "dtype": TYPES[spec.dtype]}
    config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    (folder / "config.json").write_text(json.dumps(config))
    random = torch.Generator().manual_seed(0)
    hidden, vocabulary = config["hidden_size"], ids["vocab_size"]
    tensors = {
        f"{name}.weight": 0.02 * torch.randn(o, i, generator=random) for name, (i, o) in _linears(config).items()
    }
    norms = [f"model.layers.{n}.{name}" for n in range(config["num_hidden_layers"]) for name in NORMS] + ["model.norm"]
    tensors |= {f"{name}.weight": torch.ones(hidden) for name in norms}
    for name in ["model.embed_tokens", *([] if config["tie_word_embeddings"] else ["lm_head"])]:
        rows = 0.02 * torch.randn(config["vocab_size"], hidden, generator=random)
        rows[vocabulary:] = 0.0  # ids without text: their logit is 0, and another one's is more
        tensors[f"{name}.weight"] = rows
    dtype = getattr(torch, TYPES[spec.dtype])
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return {"parameters": sum(tensor.numel() for tensor in tensors.values()), "vocabulary": vocabulary}


def make_adapter(folder: Path, *, spec: Spec, rank: int, seed: int) -> None:
    """A LoRA on every linear layer, as PEFT saves it; made without PEFT, as a thousand are wanted."""
    import torch
    from safetensors.torch import save_file

    config = json.loads(Path(spec.base, "config.json").read_text())
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (inputs, outputs) in _linears(config).items():
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, inputs, generator=random) * inputs**-0.5
        tensors[f"{key}.lora_B.weight"] = torch.randn(outputs, rank, generator=random) * 0.05
    folder.mkdir(parents=True)
    dtype = getattr(torch, TYPES[spec.dtype])
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": TARGETS}
    (folder / "adapter_config.json").write_text(json.dumps({**values, "base_model_name_or_path": spec.base}))


def _linears(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Name -> (inputs, outputs) of a Llama's."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries, values = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    layer = {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, values),
        "self_attn.v_proj": (hidden, values),
        "self_attn.o_proj": (queries, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    return {
        f"model.layers.{number}.{name}": sizes
        for number in range(config["num_hidden_layers"])
        for name, sizes in layer.items()
    }


if __name__ == "__main__":
    main()
