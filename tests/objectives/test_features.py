"""Feature tuning: each text is read once, whoever asks; heads learn from the vectors as from the base itself."""

from __future__ import annotations

import asyncio
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from run_drill import run_all, write_encoder
from run_drill import write_base as write_causal
from safetensors.torch import load_file, save_file

from ftray.config.schema import Feature, Model, Run
from ftray.data.prepare import prepare
from ftray.errors import AdapterError, ModelError, RegistryError, TrainError
from ftray.models.adapt import reader_servability
from ftray.models.features import Text, load_reader, pooled, pooling_for
from ftray.models.heads import read_head
from ftray.models.load import load_tokenizer
from ftray.models.merge import load_version, merge
from ftray.objectives.features import texts_of
from ftray.serve.encoder import EncoderEngine
from ftray.store.admission import admit
from ftray.store.paths import Storage
from ftray.store.vectors import VectorStore
from ftray.train import features

ROWS = 40


def texts(count: int) -> list[str]:
    return [" ".join(f"w{4 + (n * 7 + k * 5) % 30}" for k in range(2 + n % 5)) for n in range(count)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Bases, and tasks over the same texts: which word stands first, which words occur, how long it is."""
    root = tmp_path_factory.mktemp("features")
    write_encoder(root / "encoder")
    write_causal(root / "causal")
    rows = {"first": [], "occur": [], "long": []}
    for text in texts(ROWS):
        words = text.split()
        number = int(words[0][1:])
        rows["first"].append({"text": text, "label": "low" if number < 14 else "mid" if number < 24 else "high"})
        rows["occur"].append({"text": text, "label": [w for w in ("w9", "w14") if w in words]})
        rows["long"].append({"text": text, "label": len(words) / 6})
    for name, task in rows.items():
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, task)) + "\n")
    return root


def run_of(folder, name, task="first", *, base="encoder", method=None, optim=None, **more):
    objective = {"long": {"kind": "regression"}, "occur": {"kind": "classification", "multi_label": True}}.get(
        task, {"kind": "classification"}
    )
    return {
        "name": name,
        "storage": str(folder / "store"),
        "seed": 3,
        "model": {"base": str(folder / base)},
        "data": {
            "sources": str(folder / f"{task}.jsonl"),
            "eval_fraction": 0.25,
            "max_length": 16,
            "packing": "off",
            "clean": {"duplicates": "keep"},
        },
        "method": {"kind": "feature", **(method or {})},
        "objective": objective,
        "optim": {"steps": 30, "batch_size": 8, "lr": 2e-2, "schedule": "constant", **(optim or {})},
        "scale": {"checkpoint_every": 1000, **more.pop("scale", {})},
        "evaluate": {"every": 0},
        "track": {"to": []},
        **more,
    }


@cache
def prepared(folder, task="first", base="encoder"):
    run = Run.model_validate(run_of(folder, "prepared", task, base=base))
    tokenizer = load_tokenizer(run.model)
    return prepare(
        run.data,
        objective=run.objective,
        tokenizer=tokenizer,
        fingerprint=base,
        seed=0,
        storage=Storage(run.storage),
    )


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@cache
def reader_of(folder):
    return load_reader(Model(base=str(folder / "encoder")), pooling="mean", dtype=torch.float32, device="cpu")


class Counting:
    """The base, and how many texts it has read. It is interrupted before it has read more than `last`."""

    def __init__(self, folder, *, last=10**9):
        self.reader, self.count, self.last = reader_of(folder), 0, last

    def __call__(self, given):
        if self.count + len(given) > self.last:
            raise KeyboardInterrupt
        self.count += len(given)
        return self.reader(given)


def store_at(tmp_path, **about):
    return VectorStore(Storage(str(tmp_path / "vectors")), {"width": 32, "base": "b", **about})


def gathered(store, data, counting):
    return features.gather(store, [data.train, data.eval], load=lambda: counting, device="cpu")


# ------------------------------------------------------------------------------------------------------- the cache


def test_each_text_is_read_once_and_a_second_task_on_the_same_texts_reads_none(folder, tmp_path, alone):
    store, counting = store_at(tmp_path), Counting(folder)
    first = gathered(store, prepared(folder), counting)
    different = len({tuple(text.split()) for text in texts(ROWS)})
    assert counting.count == different == len(first.table)
    data = prepared(folder, "occur")
    again = gathered(store, data, counting)
    assert counting.count == different, "the second task's labels are others, its texts are not"
    torch.testing.assert_close(again.of(data.eval), first.of(prepared(folder).eval), atol=0, rtol=0)


def test_a_row_has_the_vector_of_its_own_text(folder, tmp_path, alone):
    data, counting = prepared(folder), Counting(folder)
    found = gathered(store_at(tmp_path), data, counting).of(data.train)
    for row in range(len(data.train)):
        text = Text(data.train.ids(row).tolist())
        torch.testing.assert_close(found[row], counting.reader([text])[0], atol=1e-5, rtol=1e-5)


def test_what_was_kept_before_a_run_died_is_not_read_again(folder, tmp_path, alone, monkeypatch):
    monkeypatch.setattr(features, "ROUND", 8)
    store, data = store_at(tmp_path), prepared(folder)
    dying = Counting(folder, last=20)
    with pytest.raises(KeyboardInterrupt):
        gathered(store, data, dying)
    assert dying.count == 16
    counting = Counting(folder)
    whole = gathered(store, data, counting)
    assert counting.count == len(whole.table) - 16
    fresh = gathered(store_at(tmp_path / "other"), data, Counting(folder))
    torch.testing.assert_close(whole.table, fresh.table, atol=1e-5, rtol=1e-5)


def test_a_damaged_shard_is_named_and_its_texts_are_read_again(folder, tmp_path, alone):
    store, data = store_at(tmp_path), prepared(folder)
    gathered(store, data, Counting(folder))
    (shard,) = Path(store.storage.root, store.key).glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-100])
    said, counting = [], Counting(folder)
    store = store_at(tmp_path)
    features.gather(store, [data.train, data.eval], load=lambda: counting, device="cpu", log=said.append)
    assert counting.count > 0
    assert said[0]["kind"] == "warning"
    assert shard.name in said[0]["text"]
    assert said[1]["text"].startswith("0 of ")


def test_another_base_or_pooling_shares_nothing(folder, tmp_path, alone):
    data, counting = prepared(folder), Counting(folder)
    gathered(store_at(tmp_path), data, counting)
    before = counting.count
    gathered(store_at(tmp_path, pooling="cls"), data, counting)
    assert counting.count == 2 * before


def test_the_cache_lives_on_an_object_store_too(folder, tmp_path, alone):
    store, data = VectorStore(Storage(f"memory://features-{tmp_path.name}"), {"width": 32}), prepared(folder)
    counting = Counting(folder)
    first = gathered(store, data, counting)
    again = gathered(store, data, counting)
    assert counting.count == len(first.table)
    torch.testing.assert_close(first.table, again.table, atol=0, rtol=0)
    _, keys, _ = texts_of([data.train])
    assert store.known(keys).all()


def test_a_vector_that_is_not_finite_is_not_kept(folder, tmp_path, alone):
    store, data = store_at(tmp_path), prepared(folder)

    def read(given):
        return torch.full((len(given), 32), torch.nan)

    with pytest.raises(TrainError, match=r"not finite for .*first.jsonl:\d+"):
        features.gather(store, [data.train], load=lambda: read, device="cpu")
    assert not store.storage.list(store.key)


# ------------------------------------------------------------------------------------------------------- vectors


def test_pooling_is_that_worked_by_hand():
    hidden = torch.tensor([[[3.0, 0.0], [1.0, 4.0], [9.0, 9.0]], [[0.0, 2.0], [7.0, 7.0], [torch.inf, 7.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    root2 = 2**-0.5
    torch.testing.assert_close(pooled(hidden, mask, "mean"), torch.tensor([[root2, root2], [0.0, 1.0]]))
    torch.testing.assert_close(pooled(hidden, mask, "cls"), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    torch.testing.assert_close(pooled(hidden, mask, "last"), torch.tensor([[1 / 17**0.5, 4 / 17**0.5], [0.0, 1.0]]))


@pytest.mark.parametrize("base", ["encoder", "causal"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_text_has_the_same_vector_alone_and_beside_longer_ones(folder, base, pooling):
    read = load_reader(Model(base=str(folder / base)), pooling=pooling, dtype=torch.float32, device="cpu")
    given = [Text([4, 5, 6]), Text([7, 8, 9, 10, 11, 12, 13]), Text([5])]
    together = read(given)
    for row, text in enumerate(given):
        torch.testing.assert_close(read([text])[0], together[row], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))


def test_pooling_is_as_the_bases_files_say(folder, tmp_path):
    import shutil

    assert pooling_for(Model(base=str(folder / "encoder")), Feature()) == "mean"
    assert pooling_for(Model(base=str(folder / "causal")), Feature()) == "mean"
    assert pooling_for(Model(base=str(folder / "causal")), Feature(pooling="last")) == "last"
    shutil.copytree(folder / "encoder", tmp_path / "base")
    (tmp_path / "base" / "1_Pooling").mkdir()
    (tmp_path / "base" / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert pooling_for(Model(base=str(tmp_path / "base")), Feature()) == "cls"
    assert pooling_for(Model(base=str(tmp_path / "base")), Feature(pooling="mean")) == "mean"


# ------------------------------------------------------------------------------------------------------- whole runs

CUT = {"steps": 8}


@pytest.fixture(scope="module")
def one(folder):
    runs = [
        run_of(folder, "linear"),
        run_of(folder, "hidden", method={"hidden": 16, "dropout": 0.1}),
        run_of(folder, "several", "occur"),
        run_of(folder, "number", "long", method={"hidden": 16}),
        run_of(folder, "causal", base="causal", method={"pooling": "last"}),
        run_of(folder, "cut", optim=CUT),
        run_of(folder, "micro", optim={**CUT, "micro_batch_size": 2}),
        run_of(folder, "zero", optim=CUT, scale={"zero": 2}),
        run_of(folder, "again", optim=CUT, method={"hidden": 8, "dropout": 0.2}) | {"until": 5},
        run_of(folder, "again", optim=CUT, method={"hidden": 8, "dropout": 0.2}),
        run_of(folder, "through", optim=CUT, method={"hidden": 8, "dropout": 0.2}),
    ]
    return run_all(folder, runs)


@pytest.fixture(scope="module")
def two(folder, one):
    runs = [run_of(folder, "cut-2", optim=CUT), run_of(folder, "zero-2", optim=CUT, scale={"zero": 2})]
    return run_all(folder, [{**run, "storage": str(folder / "store-2")} for run in runs], workers=2)


def curve(rows):
    return np.array([[row["loss"], row["grad_norm"]] for row in rows if row["kind"] == "train"])


def scores(rows, when):
    return next(row["scores"] for row in rows if row["kind"] == when)


@pytest.mark.parametrize("name", ["linear", "hidden", "several", "number", "causal"])
def test_a_head_learns(one, name):
    losses = curve(one[name])[:, 0]
    assert losses[-3:].mean() < 0.5 * losses[0]


def test_runs_over_one_base_read_its_texts_once(one):
    said = {name: next(row["text"] for row in rows if row["kind"] == "phase") for name, rows in one.items()}
    count = len({tuple(text.split()) for text in texts(ROWS)})
    assert said["linear"] == f"0 of {count} texts are in the cache; the base reads the other {count}, once"
    assert said["several"] == said["number"] == f"{count} of {count} texts are in the cache"
    assert said["causal"].startswith("0 of ")


@pytest.mark.parametrize("name", ["micro", "zero"])
def test_the_curve_does_not_depend_on_how_a_window_is_cut(one, name):
    np.testing.assert_allclose(curve(one[name]), curve(one["cut"]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["cut-2", "zero-2"])
def test_two_workers_share_the_reading_and_give_the_curve_of_one(one, two, folder, name):
    np.testing.assert_allclose(curve(two[name]), curve(one["cut"]), rtol=1e-4, atol=1e-6)
    shards = [load_file(path)["keys"] for path in sorted((folder / "store-2").glob("features/*/*.safetensors"))]
    count = len({tuple(text.split()) for text in texts(ROWS)})
    assert sorted(map(len, shards)) == [count // 2, count - count // 2]


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(one):
    np.testing.assert_allclose(curve(one["again"]), curve(one["through"]), rtol=1e-5)
    assert scores(one["again"], "after") == pytest.approx(scores(one["through"], "after"), rel=1e-5)


# ------------------------------------------------------------------------------------------------------- versions


def version_of(folder, name):
    return folder / "store" / "runs" / name / "output"


@pytest.mark.parametrize("name", ["linear", "hidden", "several", "number"])
def test_the_encoder_engine_answers_as_the_trained_head_does(one, folder, name):
    output, base = version_of(folder, name), Model(base=str(folder / "encoder"))
    admit(output, {"base": base.base})
    ids = [tuple(load_tokenizer(base)(text)["input_ids"]) for text in texts(6)]

    async def go():
        engine = EncoderEngine(model=base, slots=2, own=1, device="cpu", threads=1)
        try:
            assert await engine.load("it", output) == "bank"
            return [[*one.scores.values()] for one in await engine.classify(ids, "it")], await engine.embed(ids, None)
        finally:
            await engine.close()

    answers, vectors = asyncio.run(go())
    tensors = load_file(output / "head.safetensors")
    x = (torch.tensor(vectors) - tensors["mean"]) * tensors["scale"]
    if "inner.weight" in tensors:
        x = torch.nn.functional.gelu(x @ tensors["inner.weight"].T + tensors["inner.bias"])
    logits = x @ tensors["outer.weight"].T + tensors["outer.bias"]
    scoring = read_head(output).scoring
    told = logits.softmax(-1) if scoring == "one" else logits.sigmoid() if scoring == "each" else logits
    torch.testing.assert_close(torch.tensor(answers), told, atol=1e-5, rtol=1e-5)
    if name == "linear":
        right = [json.loads(line)["label"] for line in (folder / "first.jsonl").read_text().splitlines()[:6]]
        names = read_head(output).labels
        assert sum(names[row.argmax()] == label for row, label in zip(told, right, strict=True)) >= 5


def test_a_version_is_loaded_with_its_base_and_leaves_nothing_to_merge(one, folder, tmp_path):
    output, base = version_of(folder, "causal"), Model(base=str(folder / "causal"))
    model, _ = load_version(base, output, {"method": {"kind": "feature"}}, torch.float32)
    ids = torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        assert model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.shape == (1, 3)
    with pytest.raises(ModelError, match="a head over a frozen base, which leaves no weight to merge"):
        merge(base, output, tmp_path / "merged", torch.float32)
    assert reader_servability(Feature(), encoder=True) == "adapter"
    assert reader_servability(Feature(), encoder=False) == "none"


def test_a_broken_head_is_neither_published_nor_served(one, folder, tmp_path):
    import shutil

    base = Model(base=str(folder / "encoder"))

    def refused(folder):
        engine = EncoderEngine(model=base, slots=2, own=1, device="cpu", threads=1)

        async def go():
            try:
                await engine.load("it", folder)
            finally:
                await engine.close()

        with pytest.raises(AdapterError) as caught:
            asyncio.run(go())
        return str(caught.value)

    shutil.copytree(version_of(folder, "linear"), tmp_path / "cut")
    tensors = load_file(tmp_path / "cut" / "head.safetensors")
    del tensors["outer.bias"]
    save_file(tensors, tmp_path / "cut" / "head.safetensors")
    with pytest.raises(RegistryError, match=r"not those that head\.json says"):
        admit(tmp_path / "cut", {"base": base.base})
    assert "does not fit" in refused(tmp_path / "cut")
    shutil.copytree(version_of(folder, "linear"), tmp_path / "wide")
    about = json.loads((tmp_path / "wide" / "head.json").read_text())
    (tmp_path / "wide" / "head.json").write_text(json.dumps(about | {"width": 64}))
    assert "vectors of 64 numbers, and the base gives 32" in refused(tmp_path / "wide")


# ------------------------------------------------------------------------------------------------------- the run file


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"objective": {"kind": "sft"}}, "method.kind: feature learns from one vector a text, and sft needs more"),
        ({"scale": {"zero": 3}}, "scale.zero: feature trains under ZeRO 0 to 2, not 3"),
        ({"scale": {"offload": "cpu"}}, "scale.offload: feature trains a head alone"),
    ],
)
def test_what_makes_no_sense_is_refused_when_the_run_is_read(folder, sections, said):
    with pytest.raises(ValidationError, match=said):
        Run.model_validate({**run_of(folder, "wrong"), **sections})


def test_the_plan_says_what_the_cache_has_and_counts_the_head(one, folder):
    from ftray.train.known import Known
    from ftray.train.launch import work_out
    from ftray.train.layout import Node

    run = Run.model_validate(run_of(folder, "planned", "occur", method={"hidden": 16}, optim={"lr": "auto"}))
    known = Known.of(run, Storage(run.storage))
    checked = work_out(run, known, [Node("here", cpus=1, ram_bytes=2**33)])
    count = len({tuple(text.split()) for text in texts(ROWS)})
    assert checked.settings["features"] == f"{count} of {count} texts are in the cache"
    assert checked.plan.trained == (32 + 1) * 16 + (16 + 1) * 2
    assert checked.layout.micro_batch_size == run.optim.batch_size
    assert checked.settings["lr"] == 1e-3


def test_a_base_that_neither_reads_nor_writes_is_refused(tmp_path):
    from transformers import T5Config

    from ftray.train.known import check_method

    run = Run.model_validate(
        {"name": "a", "data": {"sources": "a"}, "method": {"kind": "feature"}, "objective": {"kind": "classification"}}
    )
    with pytest.raises(ModelError, match="does not write text"):
        check_method(run, T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2))


def test_labels_of_a_run_are_in_its_version(one, folder):
    document = json.loads((version_of(folder, "linear") / "labels.json").read_text())
    assert document["id2label"] == {"0": "high", "1": "low", "2": "mid"}
