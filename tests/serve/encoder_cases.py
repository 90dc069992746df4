"""A small random BERT on disk, and versions of it, with what plain transformers and PEFT say of the same texts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import BertConfig, BertModel

VOCAB, POSITIONS = 64, 64
CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "FEATURE_EXTRACTION": "AutoModel",
}


def write_base(folder: Path, *, seed: int = 0, hidden: int = 32, pooler: bool = True) -> Path:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        initializer_range=0.2,
    )
    BertModel(config, add_pooling_layer=pooler).save_pretrained(folder)
    return folder


def write_adapter(
    base: Path, folder: Path, *, task: str, labels: int = 3, seed: int = 0, config: Any = None, **lora: Any
) -> Path:
    """A PEFT adapter with random weights; a LoRA one, unless `config` is of another method."""
    torch.manual_seed(seed)
    options = {"r": 4, "target_modules": ["query", "value", "dense"]} | lora
    adapted = peft.get_peft_model(plain(base, task, labels), config or peft.LoraConfig(task_type=task, **options))
    _shake(adapted)
    adapted.save_pretrained(folder)
    return folder


def write_full(base: Path, folder: Path, *, task: str, labels: int = 3, seed: int = 0, only: str = "", **config: Any):
    """A whole fine-tune; `only`: the parameters whose names have this in them are changed."""
    torch.manual_seed(seed)
    model = plain(base, task, labels)
    _shake(model, only)
    for key, value in config.items():
        setattr(model.config, key, value)
    model.save_pretrained(folder)
    return folder


def plain(folder: Path, task: str, labels: int | None = None) -> Any:
    sizes = {} if task == "FEATURE_EXTRACTION" or labels is None else {"num_labels": labels}
    return getattr(transformers, CLASSES[task]).from_pretrained(folder, **sizes).eval()


def with_adapter(base: Path, folder: Path, *, task: str, labels: int = 3) -> Any:
    return peft.PeftModel.from_pretrained(plain(base, task, labels), folder).eval()


def texts(count: int, *, seed: int = 0, longest: int = 40) -> list[tuple[int, ...]]:
    source = random.Random(seed)
    return [tuple(source.randrange(5, VOCAB) for _ in range(source.randint(1, longest))) for _ in range(count)]


def logits(model: Any, text: tuple[int, ...]) -> torch.Tensor:
    """Of one text alone: [labels], or [tokens, labels]."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([text]), attention_mask=torch.ones(1, len(text), dtype=torch.long)).logits[
            0
        ]


def mean_vector(model: Any, text: tuple[int, ...]) -> torch.Tensor:
    """Of one text alone, as sentence-transformers computes it: mean over the tokens, then length 1."""
    with torch.no_grad():
        states = model(input_ids=torch.tensor([text]), attention_mask=torch.ones(1, len(text), dtype=torch.long))[0]
    mean = states[0].mean(0)
    return mean / mean.norm()


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _shake(model: Any, only: str = "") -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and only in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
