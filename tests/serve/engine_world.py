"""A tiny base, LoRA versions of many shapes, and what transformers and PEFT alone answer with them (fp32, greedy)."""

from __future__ import annotations

import itertools
import shutil
import string
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ftray.config.serving import Serving
from ftray.serve.engine import VersionRef

SLOTS = 8
MAX_RANK = 16
MAX_LENGTH = 320
MAX_BATCH = 6

WEIGHTS = "adapter_model.safetensors"
END = 1
OVER = 3
"""What the chat template puts after an answer; not the tokenizer's end."""
EURO = (4, 5, 6)
"""Three tokens that make one character; the base never writes them unless a bias says so."""
_WORDS = [a + b for a, b in itertools.product("aeiou", string.ascii_lowercase)]
VOCABULARY = [
    "<|pad|>",
    "<|end|>",
    "<|bos|>",
    "<|over|>",
    "â",  # the bytes of the euro sign in the byte-level alphabet: e2, 82, ac
    "Ĥ",
    "¬",
    "Ġ",
    *(chr(code) for code in range(33, 127)),
    *_WORDS,
]

_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_MLP = ["gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "ant": {"r": 1, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
    "bee": {"r": 2, "lora_alpha": 4, "target_modules": _ATTENTION + _MLP},
    "cat": {"r": 3, "lora_alpha": 6, "target_modules": _MLP},
    "dog": {"r": 4, "lora_alpha": 16, "target_modules": _ATTENTION},
    "eel": {"r": 8, "lora_alpha": 4, "target_modules": _ATTENTION + _MLP, "use_rslora": True},
    "fox": {"r": 16, "lora_alpha": 16, "target_modules": _ATTENTION + _MLP},
    "gnu": {"r": 5, "lora_alpha": 10, "target_modules": ["o_proj", "down_proj"]},
    "hen": {"r": 7, "lora_alpha": 7, "target_modules": _ATTENTION + _MLP},
    "pug": {  # some engines refuse it: it is not among EVERYDAY
        "r": 4,
        "lora_alpha": 8,
        "target_modules": _ATTENTION + _MLP,
        "rank_pattern": {"down_proj": 7},
        "alpha_pattern": {"v_proj": 3},
    },
}
EVERYDAY = tuple(name for name in ADAPTERS if name != "pug")


@dataclass(frozen=True)
class World:
    """`base` and `folders` (by adapter name) lie on disk; `model` holds them all, for the answers to compare with.

    `bad`: folders that no engine may take, by what is wrong with them.
    """

    root: Path
    base: Path
    folders: dict[str, Path]
    bad: dict[str, Path]
    tokenizer: Any
    model: Any

    def key(self, name: str) -> str:
        return VersionRef(name, 1, f"{list(ADAPTERS).index(name):064x}").key

    def serving(self, engine: dict[str, Any]) -> Serving:
        """What to make an engine under test with; `engine` is its section."""
        return Serving.model_validate(
            {
                "model": {"base": str(self.base), "dtype": "fp32"},
                "adapters": {"slots": SLOTS, "max_rank": MAX_RANK},
                "engine": {"max_length": MAX_LENGTH, "max_batch": MAX_BATCH, **engine},
            }
        )

    def prompt(self, seed: int, length: int = 12) -> tuple[int, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randint(EURO[-1] + 1, len(VOCABULARY), (length,), generator=generator).tolist())

    def logits(self, name: str | None, ids: Sequence[int]) -> torch.Tensor:
        """[tokens, vocabulary] of one forward pass over all of it; name None is the base."""
        with torch.inference_mode():
            if name is None:
                with self.model.disable_adapter():
                    return self.model(torch.tensor([ids])).logits[0]
            self.model.set_adapter(name)
            return self.model(torch.tensor([ids])).logits[0]

    def greedy(
        self,
        name: str | None,
        prompt: Sequence[int],
        count: int,
        adjust: Callable[[torch.Tensor, list[int]], torch.Tensor] | None = None,
    ) -> tuple[int, ...]:
        """`count` most likely tokens, whatever they are; `adjust(logits, answer so far)` changes what is likely."""
        if adjust is None:
            return self._generated(name, prompt, count)
        answer: list[int] = []
        for _ in range(count):
            answer.append(int(adjust(self.logits(name, [*prompt, *answer])[-1].clone(), answer).argmax()))
        return tuple(answer)

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _generated(self, name: str | None, prompt: Sequence[int], count: int) -> tuple[int, ...]:
        ids = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with torch.inference_mode():
            if name is None:
                with self.model.disable_adapter():
                    out = self.model.generate(input_ids=ids, max_new_tokens=count, **options)
            else:
                self.model.set_adapter(name)
                out = self.model.generate(input_ids=ids, max_new_tokens=count, **options)
        return tuple(out[0, len(prompt) :].tolist())


def make_world(root: Path, **shape: int) -> World:
    """`shape` changes the base's configuration."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = root / "base"
    _make_base(base, **shape)
    folders = {name: make_adapter(base, root / name, seed=seed, **ADAPTERS[name]) for seed, name in enumerate(ADAPTERS)}
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    first, *others = ADAPTERS
    model = PeftModel.from_pretrained(plain, folders[first], adapter_name=first)
    for name in others:
        model.load_adapter(folders[name], adapter_name=name)
    world = World(
        root, base, folders, _bad(root / "bad", base, folders["dog"]), AutoTokenizer.from_pretrained(base), model.eval()
    )
    answers = {world.greedy(name, world.prompt(0), 8) for name in (None, *ADAPTERS)}
    assert len(answers) == len(ADAPTERS) + 1, "two versions answer alike: nothing would show a mix-up"
    return world


def make_adapter(base: Path, folder: Path, *, seed: int, **config: Any) -> Path:
    """A LoRA folder as PEFT writes it, A and B drawn from `seed`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = {"task_type": "CAUSAL_LM", "init_lora_weights": False, **config}
        get_peft_model(model, LoraConfig(**config)).save_pretrained(folder)
    return folder


def _bad(root: Path, base: Path, good: Path) -> dict[str, Path]:
    weights = (good / WEIGHTS).read_bytes()
    corrupt = _copy(good, root / "corrupt")
    (corrupt / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 40) + weights[8:])
    cut_short = _copy(good, root / "cut-short")
    (cut_short / WEIGHTS).write_bytes(weights[:-100])
    no_weights, no_config = _copy(good, root / "no-weights"), _copy(good, root / "no-config")
    (no_weights / WEIGHTS).unlink()
    (no_config / "adapter_config.json").unlink()
    smaller, deeper = root / "smaller-base", root / "deeper-base"
    _make_base(smaller, hidden_size=32)
    _make_base(deeper, num_hidden_layers=3)
    config = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
    return {
        "corrupt": corrupt,
        "cut-short": cut_short,
        "no-weights": no_weights,
        "no-config": no_config,
        "rank-over-the-limit": make_adapter(base, root / "rank", seed=1, **(config | {"r": MAX_RANK + 1})),
        "of-a-smaller-base": make_adapter(smaller, root / "smaller", seed=2, **config),
        "of-a-deeper-base": make_adapter(deeper, root / "deeper", seed=3, **config),
    }


def _copy(source: Path, folder: Path) -> Path:
    return shutil.copytree(source, folder)


def _make_base(folder: Path, **changes: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 512, **changes}
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        intermediate_size=96,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=END,
        tie_word_embeddings=False,
        initializer_range=0.15,
        **shape,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[: EURO[-1] + 1] = 0.0  # specials and parts of characters: their logit is 0
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def _tokenizer() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE({token: id for id, token in enumerate(VOCABULARY)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True) for token in VOCABULARY[:4]])
    names = {"pad_token": "<|pad|>", "eos_token": "<|end|>", "bos_token": "<|bos|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=512, **names)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}<|over|>{% endfor %}"
    return tokenizer
