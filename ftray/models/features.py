"""Feature tuning: a frozen base gives each text one vector, and a small head says the labels from it.

A version is the head alone (models/feature_files.py), beside whatever base it was trained on.

Axes: B texts, T tokens of the longest, D width of a vector, L labels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ftray.config.methods import Feature, Full
from ftray.config.schema import Model
from ftray.errors import ModelError
from ftray.models.encoder import is_encoder, load_encoder, pooling_in
from ftray.models.feature_files import HEAD, HEAD_CONFIG, HeadFile, Pooling
from ftray.models.heads import Head
from ftray.models.load import load_base, load_config


@dataclass(frozen=True)
class Text:
    """What the base reads of a text: its tokens, and with which of them a second text begins (0: there is none)."""

    ids: Sequence[int]
    second: int = 0


@dataclass(frozen=True)
class Reader:
    """A frozen base, and how its tokens' vectors become one."""

    module: Any
    pooling: Pooling

    @torch.no_grad()
    def __call__(self, texts: Sequence[Text]) -> torch.Tensor:
        """[B, D] in fp32, each of length 1."""
        device = next(self.module.parameters()).device
        padding = self.module.config.get_text_config().pad_token_id or 0
        ids_BT = torch.full((len(texts), max(len(text.ids) for text in texts)), padding, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for row, text in enumerate(texts):
            ids_BT[row, : len(text.ids)] = torch.as_tensor(text.ids, dtype=torch.long)
            mask_BT[row, : len(text.ids)] = 1
        more = {}
        second_B = torch.tensor([text.second for text in texts])
        if bool(second_B.any()) and getattr(self.module.config, "type_vocab_size", 0) > 1:
            in_second = (second_B[:, None] > 0) & (torch.arange(ids_BT.shape[1]) >= second_B[:, None])
            more["token_type_ids"] = (in_second & mask_BT.bool()).long().to(device)
        mask_BT = mask_BT.to(device)
        output = self.module(input_ids=ids_BT.to(device), attention_mask=mask_BT, **more)
        return pooled(output.last_hidden_state.float(), mask_BT, self.pooling)


def pooled(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """[B, D], each of length 1: the mean over a text's own tokens, or the vector of its first or last one.

    Texts are padded on the right.
    """
    if pooling == "cls":
        return F.normalize(hidden_BTD[:, 0], dim=-1)
    if pooling == "last":
        ends_B = mask_BT.sum(1) - 1
        return F.normalize(hidden_BTD[torch.arange(len(ends_B), device=ends_B.device), ends_B], dim=-1)
    # padding is put to 0, not multiplied by it: what stands there is nobody's business, and may be infinite
    kept_BTD = hidden_BTD.masked_fill(mask_BT[..., None] == 0, 0.0)
    return F.normalize(kept_BTD.sum(1) / mask_BT.sum(1, keepdim=True), dim=-1)


def pooling_for(model: Model, method: Feature) -> Pooling:
    """What the method says; for auto what the base's files say, else the mean."""
    if method.pooling != "auto":
        return method.pooling
    return (pooling_in(model) if is_encoder(load_config(model)) else None) or "mean"


def load_reader(model: Model, *, pooling: Pooling, dtype: Any, device: Any) -> Reader:
    """The base with its weights in `dtype`, frozen; of a causal one, without the layer that writes."""
    if is_encoder(load_config(model)):
        return Reader(load_encoder(model, dtype=dtype, device=device).module, pooling)
    whole = load_base(model, method=Full(), dtype=dtype)
    whole.config.use_cache = False
    return Reader(whole.base_model.eval().requires_grad_(False).to(device), pooling)


class FeatureHead(torch.nn.Module):
    """[B, D] vectors of length 1 to [B, L] logits: dropout, a hidden layer if there is one, and the labels' layer.

    Vectors are first moved by `mean` and multiplied by `scale`, which are not learnt: by those of the training rows,
    so that a number of them is about 1 away from 0. A base's vectors all point in much the same direction, and what
    tells texts apart is small beside it.
    """

    mean: torch.Tensor  # [D]
    scale: torch.Tensor
    config: Any  # the base's
    ftray_head: Head
    ftray_base: Model

    def __init__(self, width: int, labels: int, *, hidden: int | None = None, dropout: float = 0.0):
        super().__init__()
        self.width, self.hidden = width, hidden
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))
        self.dropout = torch.nn.Dropout(dropout)
        self.inner = torch.nn.Linear(width, hidden) if hidden else None
        self.outer = torch.nn.Linear(hidden or width, labels)

    def forward(self, vectors_BD: torch.Tensor) -> torch.Tensor:
        x = self.dropout((vectors_BD.to(self.mean) - self.mean) * self.scale)
        if self.inner is not None:
            x = self.dropout(F.gelu(self.inner(x)))
        return self.outer(x)

    @torch.no_grad()
    def begin(self, *, seed: int) -> None:
        """The same on every worker and in every run with this seed: matrices of outputs of about 1, the labels' layer
        small, biases 0."""
        generator = torch.Generator().manual_seed(seed)
        for layer, spread in ((self.inner, 1 / math.sqrt(self.width)), (self.outer, 0.02)):
            if layer is not None:
                layer.weight.copy_(spread * torch.randn(layer.weight.shape, generator=generator))
                layer.bias.zero_()

    @torch.no_grad()
    def centre(self, vectors_ND: torch.Tensor) -> None:
        """Takes `mean` and `scale` from these vectors: their mean, and 1 over their deviation over all dimensions."""
        mean_D = vectors_ND.double().mean(0)
        deviation = (vectors_ND.double() - mean_D).square().mean().sqrt()
        self.mean.copy_(mean_D)
        self.scale.fill_(float(1 / deviation.clamp(min=1e-6)))


def head_for(model: Model, method: Feature, head: Head) -> FeatureHead:
    """An untrained head over this base; nothing but the base's configuration is read."""
    config = load_config(model)
    made = FeatureHead(
        config.get_text_config().hidden_size, len(head.labels), hidden=method.hidden, dropout=method.dropout
    )
    made.config, made.ftray_head, made.ftray_base = config, head, model
    return made


def head_params(width: int, labels: int, method: Feature) -> int:
    """Weights of the head that learn."""
    inner = (width + 1) * method.hidden if method.hidden else 0
    return inner + ((method.hidden or width) + 1) * labels


def save_head(head: FeatureHead, folder: Path, *, pooling: Pooling, state: Mapping[str, Any]) -> None:
    """Writes the version's own files; `state`: what was learnt, by name."""
    from safetensors.torch import save_file

    tensors = {**dict(head.named_buffers()), **state}
    save_file(
        {name: tensor.detach().float().cpu().clone().contiguous() for name, tensor in tensors.items()},
        folder / HEAD,
        metadata={"format": "pt"},
    )
    about = {
        "base_model_name_or_path": head.ftray_base.base,
        "revision": head.ftray_base.revision,
        "task_type": head.ftray_head.task,
        "pooling": pooling,
        "width": head.width,
        "hidden": head.hidden,
        "labels": head.outer.out_features,
    }
    (folder / HEAD_CONFIG).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_head_into(head: FeatureHead, folder: Path) -> None:
    """A saved head's values into a live one. ModelError where they do not fit."""
    from safetensors.torch import load_file

    try:
        head.load_state_dict(load_file(folder / HEAD))
    except (RuntimeError, OSError) as error:
        text = " ".join(str(error).split())
        raise ModelError(f"{folder}: {HEAD} does not fit; it comes from another method or another base: {text}") from (
            error
        )


class ReadingHead(torch.nn.Module):
    """A base and a head as one model that gives logits; the base is shared, not copied."""

    def __init__(self, base: Any, pooling: Pooling, head: FeatureHead):
        super().__init__()
        self.base, self.pooling, self.head = base, pooling, head

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **more: Any) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput

        states = self.base(input_ids=input_ids, attention_mask=attention_mask, **more).last_hidden_state
        return SequenceClassifierOutput(logits=self.head(pooled(states.float(), attention_mask, self.pooling)))


def load_head(folder: Path, *, width: int) -> tuple[FeatureHead, Pooling]:
    """A version's head, in memory of its own, and how it pools. ModelError where it does not fit vectors of `width`."""
    said = HeadFile.of(json.loads((folder / HEAD_CONFIG).read_text(encoding="utf-8")))
    if said.width != width:
        raise ModelError(f"{HEAD_CONFIG}: it reads vectors of {said.width} numbers, and the base gives {width}")
    head = FeatureHead(said.width, said.labels, hidden=said.hidden)
    read_head_into(head, folder)
    return head.eval().requires_grad_(False), said.pooling


def load_reading_head(model: Model, folder: Path, *, dtype: Any) -> ReadingHead:
    """A version with its base."""
    head, pooling = load_head(folder, width=load_config(model).get_text_config().hidden_size)
    reader = load_reader(model, pooling=pooling, dtype=dtype, device="cpu")
    return ReadingHead(reader.module, pooling, head).eval()
