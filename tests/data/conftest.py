"""A small byte-level BPE tokenizer with a chat template, trained here; files to prepare and a store to keep them in."""

from __future__ import annotations

import json

import pytest

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = [
    "I would like a large latte with oat milk, please. Your order will be ready in a few minutes.",
    "Natalia sold 48/2 = 24 clips in May. How many clips did she sell altogether?",
    "Grüße aus Köln, naïve café — 日本語のテキスト と emoji 🙂🚀.",
    '{"item": "latte", "size": "large", "extras": ["oat milk"]}',
]


@pytest.fixture(scope="session")
def _backend():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|bos|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT * 20, trainer)
    return backend.to_str()


@pytest.fixture
def make_tokenizer(_backend):
    """A tokenizer with the chat template and the special tokens that a test names."""

    def make(chat_template=CHATML, **special):
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        tokens = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"} | special
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_backend), **tokens)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = chat_template
        return tokenizer

    return make


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture
def storage(tmp_path):
    from ftray.store.paths import Storage

    return Storage(str(tmp_path / "store"))


@pytest.fixture
def write(tmp_path):
    """Writes rows as JSONL, or text as it is, and gives the path."""

    def write(name, rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(rows, bytes):
            path.write_bytes(rows)
        elif isinstance(rows, str):
            path.write_text(rows, encoding="utf-8")
        else:
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def prepared(storage, tokenizer):
    """prepare() with the defaults of these tests."""

    def run(sources, *, objective=None, tokenizer=tokenizer, seed=0, map_chunks=None, storage=storage, **data):
        from ftray.config.schema import Data, Sft
        from ftray.data.prepare import prepare

        return prepare(
            Data(sources=sources, **{"eval_fraction": 0.0} | data),
            objective=objective or Sft(),
            tokenizer=tokenizer,
            fingerprint=str(hash((tokenizer.chat_template, tokenizer.eos_token))),
            seed=seed,
            storage=storage,
            map_chunks=map_chunks,
        )

    return run
