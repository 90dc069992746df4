"""Greedy answers are the tokens of `model.generate` on each row alone, whatever the batch, the wrapper or the rank."""

import datetime
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
)

from ftray.models.attention import NAME, register
from ftray.models.generate import Sampler, answer, stop_ids
from tests.models.asking import answer_questions

WORDS = 200
PAD, EOS, TURN = 0, 1, 2
NEW = 24
SHAPE = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
    # Wide enough that random weights do not answer the same word for ever.
    "initializer_range": 0.5,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
}
ARCHITECTURES = {
    "llama": LlamaConfig(**SHAPE),
    "mistral with a sliding window": MistralConfig(**SHAPE, sliding_window=16),
    "gemma2 with soft caps": Gemma2Config(
        **SHAPE, sliding_window=16, query_pre_attn_scalar=8, tie_word_embeddings=False
    ),
    "gpt2": GPT2Config(
        vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=96, initializer_range=0.5, eos_token_id=EOS
    ),
}


@dataclass(frozen=True)
class Asked:
    prompt_ids: list[int]


def build(config, attention="sdpa"):
    torch.manual_seed(0)
    config._attn_implementation = "eager" if config.model_type == "gemma2" else attention
    return AutoModelForCausalLM.from_config(config).eval()


def asked(count, seed=0, longest=40):
    draw = random.Random(seed)
    return [Asked([draw.randrange(3, WORDS) for _ in range(draw.randint(3, longest))]) for _ in range(count)]


def alone(model, tokenizer, question, stops, new=NEW):
    prompt = torch.tensor([question.prompt_ids])
    ids = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=new,
        eos_token_id=stops,
        pad_token_id=PAD,
    )
    answer = ids[0, prompt.shape[1] :].tolist()
    return tokenizer.decode([id for id in answer if id not in stops], skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<pad>": PAD, "<eos>": EOS, "<turn>": TURN} | {f"w{id}": id for id in range(3, WORDS)}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")), pad_token="<pad>", eos_token="<eos>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    fast.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<turn>\n{% endfor %}"
    return fast


@pytest.fixture
def llama():
    return build(ARCHITECTURES["llama"])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_batched_answers_are_those_of_generate_row_by_row(name, tokenizer):
    model, questions = build(ARCHITECTURES[name]), asked(13)
    stops = [EOS, TURN, *range(10, 22)]
    model.generation_config.eos_token_id = stops
    expected = [alone(model, tokenizer, question, stops) for question in questions]
    lengths = {len(text.split()) for text in expected}
    assert len(lengths) > 3, "the rows must end at different steps, or dropping them is not tested"
    for batch_size in (1, 5, "auto"):
        answers = answer_questions(model, tokenizer, questions, max_new_tokens=NEW, batch_size=batch_size)
        assert answers == expected, batch_size


def test_prompts_of_one_length_need_no_padding(llama, tokenizer):
    questions = [Asked(question.prompt_ids[:3]) for question in asked(6)]
    stops = stop_ids(llama, tokenizer)
    answers = answer_questions(llama, tokenizer, questions, max_new_tokens=NEW)
    assert answers == [alone(llama, tokenizer, question, stops) for question in questions]


def test_an_answer_ends_at_the_templates_end_of_turn(llama, tokenizer):
    assert stop_ids(llama, tokenizer) == [EOS, TURN]
    llama.generation_config.eos_token_id = [EOS, 7]
    assert stop_ids(llama, tokenizer) == [EOS, TURN, 7]


def test_adapters_and_wrappers_answer_as_they_are(llama, tokenizer):
    questions = asked(4)
    peft = get_peft_model(llama, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    stops = stop_ids(llama, tokenizer)
    expected = [alone(peft, tokenizer, question, stops) for question in questions]

    class Engine(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    assert answer_questions(Engine(peft), tokenizer, questions, max_new_tokens=NEW) == expected
    with peft.disable_adapter():
        base = answer_questions(peft, tokenizer, questions, max_new_tokens=NEW)
    assert base != expected
    assert base == [alone(peft.unload(), tokenizer, question, stops) for question in questions]


def test_an_answer_ends_where_the_model_has_no_more_positions(llama, tokenizer):
    questions = [Asked([5] * 90), Asked([5] * 96), Asked([5] * 120), Asked([5] * 4)]
    llama.generation_config.eos_token_id = EOS
    answers = answer_questions(llama, tokenizer, questions, max_new_tokens=NEW)
    assert [len(text.split()) <= limit for text, limit in zip(answers, (6, 0, 0, NEW), strict=True)] == [True] * 4
    assert answers[3] == alone(llama, tokenizer, questions[3], stop_ids(llama, tokenizer))


def test_a_model_in_training_is_left_in_training(tokenizer):
    model = build(LlamaConfig(**SHAPE, attention_dropout=0.5)).train()
    first, second = (answer_questions(model, tokenizer, asked(3), max_new_tokens=NEW) for _ in range(2))
    assert first == second
    assert model.training
    assert torch.is_grad_enabled()


def test_progress_counts_every_row_once(llama, tokenizer):
    seen = []
    answer_questions(
        llama,
        tokenizer,
        asked(7),
        max_new_tokens=4,
        batch_size=3,
        on_progress=lambda done, all: seen.append((done, all)),
    )
    assert seen == [(done, 7) for done in range(1, 8)]


def test_no_questions_give_no_answers(llama, tokenizer):
    assert answer_questions(llama, tokenizer, [], max_new_tokens=4) == []


def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_answered_twice(llama, tokenizer):
    questions, sizes, seen = asked(9), [], []
    expected = answer_questions(llama, tokenizer, questions, max_new_tokens=NEW)

    def refuse_more_than_two(_module, _args, inputs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("out of memory")

    with llama.register_forward_pre_hook(refuse_more_than_two, with_kwargs=True):
        answers = answer_questions(
            llama, tokenizer, questions, max_new_tokens=NEW, on_progress=lambda done, _: seen.append(done)
        )
    assert answers == expected
    assert seen == list(range(1, 10))
    assert sizes[:3] == [9, 4, 2]


def _rank(rank, address, tokenizer, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=3, timeout=datetime.timedelta(seconds=30)
    )
    model, forwards = build(ARCHITECTURES["llama"]), []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    mine = asked(8)[:0] if rank == 2 else asked(8)[: 2 + 6 * rank]
    answers = answer_questions(model, tokenizer, mine, max_new_tokens=4 + 9 * rank, batch_size=3, synced=True)
    results.put((rank, len(forwards), answers))
    dist.destroy_process_group()


def test_synced_ranks_make_equally_many_forwards(llama, tokenizer, tmp_path):
    # fork: a spawned process would import everything again
    context = mp.get_context("fork")
    results = context.SimpleQueue()
    address = f"file://{tmp_path / 'meet'}"
    ranks = [context.Process(target=_rank, args=(rank, address, tokenizer, results)) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0, 0]
    (_, a, few), (_, b, many), (_, c, none) = sorted(results.get() for _ in ranks)
    assert a == b == c > 0
    assert few == answer_questions(llama, tokenizer, asked(8)[:2], max_new_tokens=4)
    assert many == answer_questions(llama, tokenizer, asked(8), max_new_tokens=13)
    assert none == []


def test_a_model_that_trains_packed_still_answers_padded_rows(llama, tokenizer):
    questions = asked(6)
    expected = answer_questions(llama, tokenizer, questions, max_new_tokens=NEW)
    llama.set_attn_implementation(register())
    assert answer_questions(llama, tokenizer, questions, max_new_tokens=NEW) == expected
    peft = get_peft_model(llama, LoraConfig(r=4, target_modules="all-linear"))  # begins as the base
    assert answer_questions(peft, tokenizer, questions, max_new_tokens=NEW) == expected
    assert llama.config._attn_implementation == NAME


def uniform(rows, seed=0):
    return np.random.default_rng(seed).random((rows, NEW))


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_sampled_answers_do_not_depend_on_their_batch(llama, tokenizer, top_p):
    prompts = [question.prompt_ids for question in asked(11)]
    pick = Sampler(uniform(11), temperature=1.3, top_p=top_p)
    alone, together = (
        answer(llama, tokenizer, prompts, max_new_tokens=NEW, pick=pick, batch_size=size) for size in (1, 11)
    )
    assert alone == together
    assert len({tuple(given.ids) for given in alone}) == 11
    assert alone != answer(llama, tokenizer, prompts, max_new_tokens=NEW, pick=Sampler(uniform(11, 1)))


def test_the_same_prompt_is_answered_otherwise_by_other_numbers(llama, tokenizer):
    prompts = [asked(1)[0].prompt_ids] * 6
    given = answer(llama, tokenizer, prompts, max_new_tokens=NEW, pick=Sampler(uniform(6)))
    assert len({tuple(one.ids) for one in given}) == 6


def test_a_cold_sampler_is_greedy(llama, tokenizer):
    prompts = [question.prompt_ids for question in asked(5)]
    cold = answer(llama, tokenizer, prompts, max_new_tokens=NEW, pick=Sampler(uniform(5), temperature=1e-3))
    assert cold == answer(llama, tokenizer, prompts, max_new_tokens=NEW)


def test_a_number_finds_its_token_in_the_running_sum():
    logits = torch.tensor([[0.1, 0.2, 0.0, 0.3, 0.4]]).log().expand(7, 5)
    numbers = np.array([[0.0], [0.09], [0.11], [0.29], [0.31], [0.59], [0.999]])
    picked = Sampler(numbers)(logits, range(7), 0)
    assert picked.tolist() == [0, 0, 1, 1, 3, 3, 4]
    nucleus = Sampler(numbers, top_p=0.6)(logits, range(7), 0)  # tokens 4 and 3 hold 0.7: 3 up to 3/7, then 4
    assert nucleus.tolist() == [3, 3, 3, 3, 3, 4, 4]


def test_an_answer_says_what_ended_it(llama, tokenizer):
    llama.generation_config.eos_token_id = [EOS, TURN, *range(10, 60)]
    given = answer(llama, tokenizer, [question.prompt_ids for question in asked(12)], max_new_tokens=NEW)
    assert all(one.stop is None or one.stop in llama.generation_config.eos_token_id for one in given)
    assert {len(one.ids) == NEW for one in given if one.stop is None} <= {True}
    assert any(one.stop is not None for one in given)
