"""The bank engine keeps the engines' contract, compiled loops or not, and serves what the bank cannot hold."""

from __future__ import annotations

import asyncio
import shutil
import threading

import engine_contract
import pytest
import torch
from engine_contract import GREEDY, Answer, ask, loaded, request
from engine_world import make_adapter, make_world

from ftray.errors import AdapterError, ModelError, ServeError
from ftray.models.heads import REWARD, write_head
from ftray.serve import native
from ftray.serve.build import build_engine
from ftray.serve.text import TextStream

WITH = ["compiled", "torch"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def runner():
    with asyncio.Runner() as runner:
        yield runner


def build(world, **section):
    torch.set_num_threads(1)
    return build_engine(world.serving({"kind": "bank", **section}))


@pytest.fixture(scope="module", params=WITH)
def engine(request, world, runner):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(native, "load", lambda: None)
        elif native.load() is None:
            pytest.skip("no C compiler here")
        engine = build(world, prefill_chunk=16)
    yield engine
    runner.run(engine.close())


@pytest.mark.parametrize("case", engine_contract.CASES, ids=lambda case: case.__name__)
def test_the_engine_keeps_the_contract(case, engine, world, runner):
    engine_contract.run(runner, case, engine, world)


# prompts: in pieces, and read before


def answers(runner, engine, *requests):
    async def together():
        return await asyncio.gather(*(ask(engine, *one) for one in requests))

    return runner.run(together())


def test_a_prompt_read_in_pieces_is_answered_as_one_read_at_once(engine, world, runner):
    prompt = world.prompt(7, 100)  # seven pieces of 16
    [answer] = answers(runner, engine, (None, prompt))
    assert answer.ids == world.greedy(None, prompt, 10)


def test_what_another_prompt_began_with_is_not_read_again_and_changes_nothing(engine, world, runner):
    async def go():
        async with loaded(engine, world, "bee", "fox") as keys:
            for name in ("bee", "fox", None):
                begin = world.prompt(11, 40)
                first = await ask(engine, keys[name], begin + world.prompt(12, 5))
                second = await ask(engine, keys[name], begin + world.prompt(13, 9))
                assert first.pieces[0].cached_tokens == 0
                assert second.pieces[0].cached_tokens == 40
                assert second.ids == world.greedy(name, begin + world.prompt(13, 9), 10)

    runner.run(go())


def test_a_prompt_that_is_being_answered_lends_its_beginning(engine, world, runner):
    begin = world.prompt(21, 30)
    long = world.prompt(22, 3)

    async def go():
        running = engine.generate(request(None, begin + long, GREEDY))
        await anext(running)
        other = await ask(engine, None, begin + world.prompt(23, 4))
        rest = [piece async for piece in running]
        return other, rest

    other, rest = runner.run(go())
    assert other.pieces[0].cached_tokens == 30
    assert other.ids == world.greedy(None, begin + world.prompt(23, 4), 10)
    assert Answer(tuple(rest)).ids == world.greedy(None, begin + long, 10)[1:]


def test_the_same_prompt_again_is_answered_from_what_is_kept_but_its_last_token(engine, world, runner):
    prompt = world.prompt(31, 20)
    for cached in (0, 19):
        [answer] = answers(runner, engine, (None, prompt))
        assert answer.pieces[0].cached_tokens == cached
        assert answer.ids == world.greedy(None, prompt, 10)


def test_without_a_prefix_cache_everything_is_read(world, runner):
    engine = build(world, prefix_cache=False)
    prompt = world.prompt(41, 20)
    for _ in range(2):
        [answer] = answers(runner, engine, (None, prompt))
        assert answer.pieces[0].cached_tokens == 0
    runner.run(engine.close())


def test_more_requests_than_the_batch_holds_wait_and_are_all_answered_right(engine, world, runner):
    async def go():
        async with loaded(engine, world, "ant", "eel") as keys:
            names = [None, "ant", "eel"] * 7
            prompts = [world.prompt(50 + number, 3 + 5 * (number % 4)) for number in range(len(names))]
            got = await asyncio.gather(
                *(ask(engine, keys[name], prompt) for name, prompt in zip(names, prompts, strict=True))
            )
            for name, prompt, answer in zip(names, prompts, got, strict=True):
                assert answer.ids == world.greedy(name, prompt, 10)

    runner.run(go())


# versions beside the bank


def peft_folder(world, name, config, *, seed=5):
    """An adapter of any PEFT kind, its tensors drawn so that it changes the answer."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32)
        adapted = get_peft_model(model, config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += (
                    3 * torch.randn_like(parameter) if name == "vera" else 0.3 * torch.randn_like(parameter)
                )
        adapted.save_pretrained(world.root / name)
    return world.root / name


def kinds():
    from peft import (
        IA3Config,
        LNTuningConfig,
        LoHaConfig,
        LoKrConfig,
        LoraConfig,
        OFTConfig,
        PrefixTuningConfig,
        PromptEncoderConfig,
        PromptTuningConfig,
        TrainableTokensConfig,
        VeraConfig,
    )

    from ftray.models.bottleneck import BottleneckConfig

    task, targets = {"task_type": "CAUSAL_LM"}, {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    return {
        "dora": LoraConfig(**task, **targets, r=4, use_dora=True),
        "whole-head": LoraConfig(**task, **targets, r=4, modules_to_save=["lm_head"]),
        "embedding": LoraConfig(**task, r=4, target_modules=["embed_tokens", "q_proj"]),
        "loha": LoHaConfig(**task, **targets, r=4),
        "lokr": LoKrConfig(**task, **targets, r=4),
        "ia3": IA3Config(**task, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "vera": VeraConfig(**task, target_modules=["q_proj"], r=8),
        "oft": OFTConfig(**task, target_modules=["q_proj"], oft_block_size=8, r=0),
        "norms": LNTuningConfig(**task, target_modules=["input_layernorm", "norm"]),
        "tokens": TrainableTokensConfig(**task, token_indices=list(range(7, 100))),
        "houlsby": BottleneckConfig(**task, target_modules=["o_proj", "down_proj"], size=8, width=64),
        "parallel": BottleneckConfig(**task, target_modules=["mlp"], size=8, width=64, parallel=True),
        "prefix": PrefixTuningConfig(**task, num_virtual_tokens=6),
        "prompt": PromptTuningConfig(**task, num_virtual_tokens=5),
        "p-tuning": PromptEncoderConfig(**task, num_virtual_tokens=5, encoder_hidden_size=32),
    }


def alone(folder, base, prompt, count):
    """The greedy answer of PEFT by itself, one token after the other over the whole sequence."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder).eval()
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            mask = torch.ones(1, len(ids), dtype=torch.long)
            ids.append(int(model(input_ids=torch.tensor([ids]), attention_mask=mask).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("kind", list(kinds()))
def test_a_version_that_the_bank_cannot_hold_answers_as_peft_does_beside_base_and_bank(kind, engine, world, runner):
    folder = peft_folder(world, kind, kinds()[kind])
    prompt = world.prompt(61, 20)
    wanted = alone(folder, world.base, prompt, 8)
    assert wanted != world.greedy(None, prompt, 8), "the adapter changes nothing"

    async def go():
        assert await engine.load(kind, folder) == "own"
        async with loaded(engine, world, "fox") as keys:
            got = await asyncio.gather(
                *(ask(engine, version, prompt) for version in (kind, None, keys["fox"], kind)),
            )
        await engine.unload(kind)
        return got

    own, base, fox, again = runner.run(go())
    assert own.ids[:8] == again.ids[:8] == wanted
    assert base.ids == world.greedy(None, prompt, 10)
    assert fox.ids == world.greedy("fox", prompt, 10)


def test_a_whole_model_is_served_beside_its_base(engine, world, runner):
    from transformers import AutoModelForCausalLM

    folder = world.root / "whole"
    model = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[7:] = model.lm_head.weight[7:].flip(0)
    model.save_pretrained(folder)
    world.tokenizer.save_pretrained(folder)
    prompt = world.prompt(71)
    with torch.inference_mode():
        ids = list(prompt)
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))

    async def go():
        assert await engine.load("whole", folder) == "own"
        got = await asyncio.gather(ask(engine, "whole", prompt), ask(engine, None, prompt))
        await engine.unload("whole")
        return got

    whole, base = runner.run(go())
    assert whole.ids[:8] == tuple(ids[len(prompt) :])
    assert base.ids == world.greedy(None, prompt, 10)


def test_a_model_of_another_shape_is_refused(engine, world, runner):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = world.root / "other-shape"
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16
        )
    ).save_pretrained(folder)
    world.tokenizer.save_pretrained(folder)
    with pytest.raises(AdapterError, match="another shape"):
        runner.run(engine.load("other-shape", folder))


def test_a_version_with_a_head_is_refused_although_its_weights_could_write(engine, world, runner, tmp_path):
    folder = shutil.copytree(world.base, tmp_path / "reward")
    write_head(folder, REWARD)
    with pytest.raises(AdapterError, match="reads under a head and writes no text"):
        runner.run(engine.load("reward", folder))


def test_an_adapter_that_would_change_the_base_at_its_start_leaves_it_alone(engine, world, runner):
    folder = make_adapter(world.base, world.root / "pissa", seed=9, r=4, lora_alpha=8, target_modules=["q_proj"])
    config = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(
        config.replace('"init_lora_weights": false', '"init_lora_weights": "pissa"').replace(
            '"use_dora": false', '"use_dora": true'
        )
    )
    prompt = world.prompt(81)

    async def go():
        with pytest.raises(AdapterError, match="magnitude"):
            await engine.load("pissa", folder)  # DoRA by its configuration, without DoRA's tensors
        return await ask(engine, None, prompt)

    assert runner.run(go()).ids == world.greedy(None, prompt, 10)


# versions that go while somebody was using them


def test_a_slot_is_given_on_only_when_no_step_uses_it(engine, world, runner):
    """A client hangs up in the middle of a step, and the version is unloaded for another at that moment."""
    prompt = world.prompt(101, 40)
    lane = engine._base
    compute = lane.logits
    entered, go_on = threading.Event(), threading.Event()

    def slow(*args, **options):
        entered.set()
        go_on.wait(10)
        return compute(*args, **options)

    async def hang_up_and_swap():
        await engine.load(world.key("bee"), world.folders["bee"])
        lane.logits = slow
        answer = engine.generate(request(world.key("bee"), prompt, GREEDY))
        first = asyncio.ensure_future(anext(answer))
        await asyncio.to_thread(entered.wait)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        unloading = asyncio.ensure_future(engine.unload(world.key("bee")))
        await asyncio.sleep(0.05)
        assert not unloading.done()
        go_on.set()
        await unloading
        await engine.load(world.key("fox"), world.folders["fox"])
        await engine.load(world.key("bee"), world.folders["bee"])
        answers = await asyncio.gather(*(ask(engine, world.key(name), prompt) for name in ("bee", "fox")))
        for name in ("bee", "fox"):
            await engine.unload(world.key(name))
        return answers

    try:
        bee, fox = runner.run(hang_up_and_swap())
    finally:
        lane.logits = compute
    assert bee.ids == world.greedy("bee", prompt, 10)
    assert fox.ids == world.greedy("fox", prompt, 10)


def test_an_answer_that_cannot_be_spelled_ends_alone(engine, world, runner, monkeypatch):
    push = TextStream.push
    spoilt = []

    def stumble(stream, token):
        if not spoilt or spoilt[0] is stream:
            spoilt[:] = [stream]
            raise ValueError("invalid prefix")
        return push(stream, token)

    monkeypatch.setattr(TextStream, "push", stumble)
    prompts = [world.prompt(111 + number) for number in range(3)]

    async def together():
        return await asyncio.gather(*(ask(engine, None, one) for one in prompts), return_exceptions=True)

    answers = runner.run(together())
    failed = [answer for answer in answers if isinstance(answer, ServeError)]
    assert len(failed) == 1
    for prompt, answer in zip(prompts, answers, strict=True):
        if answer not in failed:
            assert answer.ids == world.greedy(None, prompt, 10)
    assert engine.stats().alive
    assert engine.stats().running == 0


def test_a_lora_of_the_output_layer_is_held_beside_the_bank(engine, world, runner):
    folder = make_adapter(world.base, world.root / "head", seed=4, r=4, lora_alpha=8, target_modules=["lm_head"])
    prompt = world.prompt(121)
    wanted = alone(folder, world.base, prompt, 8)

    async def go():
        assert await engine.load("head", folder) == "own"
        answer = await ask(engine, "head", prompt)
        await engine.unload("head")
        return answer

    assert runner.run(go()).ids[:8] == wanted


def test_a_base_with_attention_sinks_is_refused_before_anybody_asks(tmp_path, world):
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=len(world.tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    GptOssForCausalLM(config).save_pretrained(tmp_path)
    world.tokenizer.save_pretrained(tmp_path)
    serving = world.serving({"kind": "bank"})
    model = serving.model.model_copy(update={"base": str(tmp_path)})
    with pytest.raises(ModelError, match="GptOss"):
        build_engine(serving.model_copy(update={"model": model}))


# arithmetic that is not a number


def test_a_version_that_computes_nan_fails_alone(engine, world, runner):
    from safetensors.torch import load_file, save_file

    folder = make_adapter(
        world.base, world.root / "hot", seed=3, r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"]
    )
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: tensor * 1e30 for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    prompt = world.prompt(91)

    async def go():
        await engine.load("hot", folder)
        hot, base = await asyncio.gather(ask(engine, "hot", prompt), ask(engine, None, prompt), return_exceptions=True)
        await engine.unload("hot")
        again = await asyncio.gather(*(ask(engine, None, world.prompt(92 + n)) for n in range(6)))
        return hot, base, again

    hot, base, again = runner.run(go())
    assert "NaN" in str(hot)
    assert base.ids == world.greedy(None, prompt, 10)
    for n, answer in enumerate(again):
        assert answer.ids == world.greedy(None, world.prompt(92 + n), 10)
