"""The vLLM engine passes the engines' contract on vLLM's CPU build, and refuses what vLLM cannot serve.

Needs an environment with vLLM: docs/serving-vllm.md says how to make one.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
from dataclasses import replace
from pathlib import Path

import engine_contract
import psutil
import pytest
import yaml
from engine_asking import GREEDY, ask, loaded, request
from engine_world import EVERYDAY, make_adapter, make_world

from ftray.config.serving import Serving
from ftray.errors import AdapterError, ReplicaGone, ServeError
from ftray.serve.vllm import build_vllm_engine

HERE = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(
    not HERE, reason="vLLM is not installed here; docs/serving-vllm.md says how to make an environment with it"
)
SMALL = {"kv_cache_memory_bytes": 2**27}


def build(world, options=SMALL):
    serving = world.serving({"kind": "vllm", "options": options})
    return build_vllm_engine(serving, serving.engine)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def runner():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def engine(world, runner):
    for name, value in {"VLLM_LOGGING_LEVEL": "WARNING", "OMP_NUM_THREADS": "1"}.items():
        os.environ.setdefault(name, value)

    async def start():
        return build(world)

    engine = runner.run(start())
    yield engine
    runner.run(engine.close())


@needs_vllm
@pytest.mark.parametrize("case", engine_contract.CASES, ids=lambda case: case.__name__)
def test_the_contract_holds(case, runner, engine, world):
    engine_contract.run(runner, case, engine, world)


@needs_vllm
def test_without_shifts_the_cpu_build_answers_base_rows_with_an_adapter(runner, engine, world, monkeypatch):
    """Why there are shifts on CPUs. When this fails, vLLM is mended: take them away."""
    if engine.facts.device != "cpu":
        pytest.skip("on GPUs vLLM skips rows without an adapter")
    assert engine._shifts is not None

    async def check():
        prompt = world.prompt(1)
        async with loaded(engine, world, *EVERYDAY) as keys:
            rows = (None, *EVERYDAY, None)
            answers = await asyncio.gather(*(ask(engine, keys[name], prompt, GREEDY) for name in rows))
        return [answer.ids == world.greedy(name, prompt, 10) for name, answer in zip(rows, answers, strict=True)]

    monkeypatch.setattr(engine, "_shifts", None)
    base, *adapters, other_base = runner.run(check())
    assert all(adapters)
    assert not (base and other_base)


@needs_vllm
def test_an_unloaded_version_leaves_vllm(runner, engine, world):
    async def check():
        async with loaded(engine, world, "ant", "bee"):
            assert len(await engine._llm.list_loras()) == 2
        for folder in world.bad.values():
            with pytest.raises(AdapterError):
                await engine.load("bad@v1+0", folder)
        assert not await engine._llm.list_loras()

    runner.run(check())


@needs_vllm
def test_who_stops_waiting_for_the_other_shift_leaves_nothing_behind(runner, engine, world):
    endless = replace(GREEDY, max_new_tokens=300)

    async def check():
        async with loaded(engine, world, "ant") as keys:
            base = asyncio.create_task(ask(engine, None, world.prompt(2), endless))
            await asyncio.sleep(0.02)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(ask(engine, keys["ant"], world.prompt(1)), 0.1)
            assert engine.stats().running == 1
            assert engine.stats().waiting == 0
            assert (await ask(engine, None, world.prompt(1))).ids == world.greedy(None, world.prompt(1), 10)
            assert (await ask(engine, keys["ant"], world.prompt(1))).ids == world.greedy("ant", world.prompt(1), 10)
            assert base.done()

    runner.run(check())


@needs_vllm
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_adapted_embeddings_are_served(runner, engine, world, tmp_path, target):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = make_adapter(world.base, tmp_path / "lookup", seed=5, r=4, target_modules=[target, "q_proj"])

    async def check():
        await engine.load("lookup@v1+0", folder)
        try:
            return await ask(engine, "lookup@v1+0", world.prompt(1))
        finally:
            await engine.unload("lookup@v1+0")

    answer = runner.run(check())
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32), folder)
    prompt = torch.tensor([world.prompt(1)])
    expected = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False, eos_token_id=None
    )
    assert answer.ids == tuple(expected[0, prompt.shape[1] :].tolist())


@needs_vllm
@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_version_that_vllm_does_not_know_is_refused_with_the_way_out(engine, world, tmp_path, config, word):
    folder = make_adapter(world.base, tmp_path / "version", seed=1, r=4, target_modules=["q_proj"], **config)
    with pytest.raises(AdapterError, match=rf"{word}.*engine: {{kind: bank}}.*ftray adapters merge"):
        engine.room_for(folder)


@needs_vllm
def test_what_is_no_lora_is_refused_with_the_way_out(engine, world, tmp_path):
    from peft import IA3Config, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world.base)
    ia3 = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    get_peft_model(model, ia3).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"IA3.*engine: {kind: bank}"):
        engine.room_for(tmp_path)
    with pytest.raises(AdapterError, match=r"whole model.*engine: {kind: bank}"):
        engine.room_for(world.base)


@needs_vllm
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_batched_token": 64}, "no such engine argument; did you mean 'max_num_batched_tokens'"),
        ({"max_loras": 3}, "adapters.slots decides it"),
        ({"block_size": "big"}, "vLLM cannot start"),
    ],
)
def test_wrong_options_are_refused_before_anything_starts(world, options, message):
    with pytest.raises(ServeError, match=message):
        build(world, options)


@needs_vllm
def test_a_rank_over_vllms_largest_is_refused(world):
    serving = world.serving({"kind": "vllm"})
    adapters = serving.adapters.model_copy(update={"max_rank": 1000})
    with pytest.raises(ServeError, match=r"adapters\.max_rank: 1000"):
        build_vllm_engine(serving.model_copy(update={"adapters": adapters}), serving.engine)


@needs_vllm
def test_when_vllms_process_dies_requests_are_told_to_go_elsewhere(runner, engine, world):
    """The last test of this module: the engine does not come back."""
    processes = psutil.Process().children(recursive=True)
    core = next(process for process in processes if "EngineCore" in process.name())

    async def check():
        assert engine.stats().alive
        pieces = engine.generate(request(None, world.prompt(1), replace(GREEDY, max_new_tokens=300)))
        await anext(pieces)
        core.kill()
        with pytest.raises(ReplicaGone):
            async for _ in pieces:
                pass
        with pytest.raises(ReplicaGone):
            await ask(engine, None, world.prompt(1))
        with pytest.raises(ReplicaGone):
            await engine.load(world.key("ant"), world.folders["ant"])
        assert not engine.stats().alive
        assert engine.stats().running == 0

    runner.run(asyncio.wait_for(check(), 60))


def test_the_serve_file_of_the_document_parses():
    text = (Path(__file__).parents[2] / "docs" / "serving-vllm.md").read_text(encoding="utf-8")
    [block] = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert Serving.model_validate(yaml.safe_load(block)).engine.tensor_parallel == 2


@pytest.mark.skipif(HERE, reason="vLLM is installed here")
def test_without_vllm_the_error_says_what_to_install(world):
    with pytest.raises(ServeError, match=r"pip install 'ftray\[vllm\]'"):
        build(world)
