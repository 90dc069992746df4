"""The packaged tokenizer: any text comes back, turns end with a token of their own, answers are marked."""

import pytest

from ftray.data.sample import builtin_rows
from ftray.models.builtin import FOLDERS

TEXTS = [
    "Plain words, a number 12,345.67 and 'quotes'.",
    "naïve café — 日本語 🎉👩‍👩‍👧 \u200bזה Ωμέγα",
    "  two  spaces\ttab\r\n\n new line \n",
    '{"items": [{"item": "scone", "quantity": 2}], "pickup": "8:30"}',
    "<|nothing|> <bos> [INST]",
    "\x00\x07\ufeff",
]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello there."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Goodbye."},
]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDERS["builtin:tiny"])


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_comes_back_from_its_tokens(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_end_of_turn_ends_and_padding_is_another_token(tokenizer):
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|end|>", "<|pad|>", "<|bos|>")
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id}) == 3
    assert len(tokenizer) == 4096


def test_plain_text_begins_with_one_bos(tokenizer):
    ids = tokenizer("Hello")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_the_template_marks_the_assistants_tokens_and_their_end(tokenizer):
    made = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, is_answer in zip(made["input_ids"], made["assistant_masks"], strict=True) if is_answer]
    assert tokenizer.decode(marked) == "Hello there.<|end|>Goodbye.<|end|>"


def test_a_generation_prompt_ends_where_the_answer_begins(tokenizer):
    prompt = tokenizer.apply_chat_template(TALK[:2], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(TALK[:3], return_dict=False)
    assert whole[: len(prompt)] == prompt
    assert tokenizer.decode(prompt) == "<|bos|><|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>"


def test_a_role_the_template_does_not_know_is_refused_by_name(tokenizer):
    with pytest.raises(Exception, match="role 'tool' is not one of system, user, assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


def test_sample_answers_are_short(tokenizer):
    lengths = [
        len(tokenizer(row["messages"][1]["content"])["input_ids"]) for row in builtin_rows("builtin:orders-eval")
    ]
    assert sum(length <= 60 for length in lengths) >= 0.9 * len(lengths)
    assert max(lengths) <= 80
