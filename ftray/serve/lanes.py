"""What a step runs through: the base with its bank, or a version that lies beside it, as a model of its own.

Beside the bank lie whole fine-tuned models, and adapters that are more than A and B in linear layers. The latter go
through PEFT over a second copy of the base, which they share; each has only its own tensors. Prompt and prefix tuning
become keys and values that every sequence of the version begins with.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ftray.config.schema import Full, Model
from ftray.errors import AdapterError, FtrayError
from ftray.models.load import cache_shape, load_base
from ftray.serve import attention
from ftray.serve.attention import Chunk, Step
from ftray.serve.bank import Bank, Mix
from ftray.serve.cache import Cache, Row

VIRTUAL = -1
"""Stands for a virtual token among a row's tokens."""
MASKED_INITS = ("init_lora_weights", "init_weights")


class Lane:
    """One model and what its sequences begin with."""

    def __init__(self, model: Any, *, bank: Bank | None = None):
        attention.register()
        model.set_attn_implementation(attention.NAME)
        self.model = model.eval()
        self.bank = bank
        self.prefix: list[tuple[Any, Any]] = []
        """Keys and values [K, n, D] a layer, of n virtual tokens."""
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.inference_mode()
    def try_out(self, cache: Cache, *, tokens: int = 3) -> None:
        """Runs some tokens through; whatever the model raises where it does not fit the cache or the attention."""
        step = Step(cache, [], [], [Chunk(cache.rows[0], 0, tokens, 0)])
        ids, positions = (torch.arange(tokens, device=cache.device) for _ in range(2))
        if self.bank is not None:
            self.bank.trial = tokens
        self.logits(ids, positions, step, keep_N=positions[-1:], mix=None)
        step = Step(cache, [cache.rows[0]], [tokens], [])
        if self.bank is not None:
            self.bank.trial = None
        self.logits(ids[:1], positions[:1] + tokens, step, keep_N=positions[:1], mix=None)

    @property
    def virtual(self) -> int:
        return self.prefix[0][0].shape[1] if self.prefix else 0

    def logits(self, ids_T: Any, positions_T: Any, step: Step, *, keep_N: Any, mix: Mix | None) -> torch.Tensor:
        """[N, V]: the logits at the tokens `keep_N` of the step."""
        if self.bank is not None:
            self.bank.mix = mix
        inputs = {"input_ids": ids_T[None], "position_ids": positions_T[None], "use_cache": False, "step": step}
        if self._keeps:
            return self.model(**inputs, logits_to_keep=keep_N).logits[0]
        return self.model(**inputs).logits[0].index_select(0, keep_N)


class OwnLanes:
    """Makes lanes for versions that the bank cannot hold. Loading runs beside the generating thread."""

    def __init__(self, model: Model, *, dtype: Any, device: Any):
        self._model, self._dtype, self._device = model, dtype, device
        self._base: Any = None
        self._lock = threading.Lock()

    def load(self, folder: Path, config: Mapping[str, Any]) -> Lane:
        """AdapterError with the reason when the folder is not a version of this base."""
        try:
            return self._whole(folder) if not config else self._adapter(folder)
        except AdapterError:
            raise
        except FtrayError as error:
            raise AdapterError(str(error)) from error
        except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:  # PEFT has no error of its own
            raise AdapterError(f"PEFT cannot load it: {' '.join(str(error).split())[:300]}") from error

    def _whole(self, folder: Path) -> Lane:
        model = load_base(Model(base=str(folder)), method=Full(), dtype=self._dtype, attention="sdpa")
        return Lane(model.to(self._device))

    def _adapter(self, folder: Path) -> Lane:
        from peft import PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict

        import ftray.models.bottleneck  # noqa: F401  (PEFT learns of the method)

        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        for init in MASKED_INITS:
            if hasattr(config, init):
                setattr(config, init, True)  # PiSSA and its like would change the base, which is shared
        weights = load_peft_weights(str(folder), device="cpu")
        with torch.no_grad():
            adapted = get_peft_model(self._skeleton(), config)
            _check_names(adapted, weights)
            set_peft_model_state_dict(adapted, weights)
        lane = Lane(adapted.get_base_model().to(self._device))
        if adapted.active_peft_config.is_prompt_learning:
            lane.prefix = self._prefix(adapted.to(self._device), lane)
        return lane

    def _skeleton(self) -> Any:
        """The base's modules anew around the same weights."""
        with self._lock:
            if self._base is None:
                self._base = load_base(self._model, method=Full(), dtype=self._dtype, attention="sdpa")
                self._base.to(self._device).requires_grad_(False)
            tensors = [*self._base.parameters(), *self._base.buffers()]
            return copy.deepcopy(self._base, {id(tensor): tensor for tensor in tensors})

    @torch.no_grad()
    def _prefix(self, adapted: Any, lane: Lane) -> list[tuple[Any, Any]]:
        """Keys and values of the virtual tokens: prefix tuning (arXiv 2101.00190) has them; those of prompt tuning
        (arXiv 2104.08691) and its like come from running the model over the learnt embeddings."""
        from peft import PeftType

        learnt = adapted.get_prompt(batch_size=1)
        if adapted.active_peft_config.peft_type == PeftType.PREFIX_TUNING:
            pairs = [(layer.keys, layer.values) for layer in learnt.layers]
            return [(key[0].to(self._device), value[0].to(self._device)) for key, value in pairs]
        config = lane.model.config.get_text_config()
        count = learnt.shape[1]
        layers, heads, width = cache_shape(config)
        cache = Cache(
            layers=layers,
            rows=1,
            length=count,
            heads=heads,
            width=width,
            dtype=torch.float32 if self._device.type == "cpu" else self._dtype,
            device=self._device,
        )
        step = Step(cache, [], [], [Chunk(Row(0), 0, count, 0)])
        positions = torch.arange(count, device=self._device)[None]
        embeds = learnt.to(self._dtype)
        lane.model(inputs_embeds=embeds, position_ids=positions, use_cache=False, step=step)
        return [(key[0].clone(), value[0].clone()) for key, value in zip(cache.keys, cache.values, strict=True)]


def _check_names(adapted: Any, weights: Mapping[str, Any]) -> None:
    """PEFT leaves a tensor that is not in the files as it was drawn, without a word."""
    from peft.utils import get_peft_model_state_dict

    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    given = {name for name in weights if "base_layer" not in name}
    if stray := sorted(wanted ^ given):
        raise AdapterError(f"its tensors are not those of its configuration on this base, e.g. {stray[0]}")
