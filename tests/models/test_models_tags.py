"""A base under a head that reads every token: every method learns, is saved and read back; padding changes nothing."""

from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from test_models_heads import EVERY, KINDS, MERGED, SERVED, WHOLE, apart, padded, saved, write_encoder
from transformers import AutoModelForTokenClassification

from ftray.config.methods import Full, Lora, Prefix, Prompt, PTuning
from ftray.config.objectives import TokenClassification
from ftray.models.adapt import adapt, default_lr, trainable
from ftray.models.heads import Head, head_modules, read_head
from ftray.models.load import Shape, load_base, load_config
from ftray.models.merge import load_version, merge
from ftray.models.save import load_state_into
from ftray.objectives.tags import Batch, Tags, logits
from ftray.store.admission import admit
from ftray.train.memory import learning
from tests.models.asking import classified

HEAD = Head("TOKEN_CLS", ("O", "B-x", "I-x", "B-y"))
OBJECTIVE = Tags(TokenClassification(), packed=False, data=SimpleNamespace(labels=HEAD.labels))


@pytest.fixture(scope="module")
def section(request, base, tmp_path_factory):
    return base if request.param == "causal" else write_encoder(tmp_path_factory.mktemp("tagger"))


def batch(lengths=(9, 4, 6)):
    """Texts whose second, third, fifth, … tokens begin words; a token says its tag."""
    ids, mask = padded(lengths)
    at = torch.arange(ids.shape[1])
    trained = mask.bool() & (at > 0) & (at % 3 != 0)
    return Batch(ids.masked_fill(mask == 0, 0), mask, trained, ids[trained] % 4, 1.0, tuple(range(len(lengths))))


def adapted(section, method, *, seed=3):
    return adapt(load_base(section, method=method, dtype=torch.float32, head=HEAD), method, seed=seed, steps=20)


def moved(section, method):
    """Adapted, and moved away from where it began."""
    model = adapted(section, method)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in trainable(model).values():
            size = {"adalora": 0.2, "vera": 0.5}.get(method.kind, 0.05)
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def said(model, of):
    with torch.no_grad():
        return logits(model.eval(), of)


@pytest.mark.parametrize("method", EVERY, ids=str)
@pytest.mark.parametrize("section", KINDS, indirect=True)
def test_a_version_says_the_same_live_in_plain_peft_read_back_and_merged(section, tmp_path, method):
    model, texts = moved(section, method), batch()
    wanted = said(model, texts)
    assert wanted.shape == (int(texts.trained.sum()), 4)
    folder = saved(model, section, method, tmp_path / "v1")
    admit(folder, {"base": section.base})
    assert read_head(folder) == HEAD

    reloaded, _ = load_version(
        section, folder, {} if method in WHOLE else {"method": method.model_dump()}, torch.float32
    )
    assert apart(said(reloaded, texts), wanted) < 1e-5
    fresh = adapted(section, method, seed=3 if method.kind == "vera" else 8)
    assert apart(said(fresh, texts), wanted) > 1e-3
    load_state_into(fresh, folder, method)
    assert apart(said(fresh, texts), wanted) < 1e-5

    if method in WHOLE:
        plain = AutoModelForTokenClassification.from_pretrained(folder)
        assert plain.config.id2label == dict(enumerate(HEAD.labels))
    else:
        plain = AutoModelForTokenClassification.from_pretrained(section.base, num_labels=4)
        plain = PeftModel.from_pretrained(plain, folder)
    assert apart(said(plain, texts), wanted) < 1e-5
    if method in MERGED:
        merged = merge(section, folder, tmp_path / "merged", torch.float32)
        again = AutoModelForTokenClassification.from_pretrained(merged)
        assert again.config.id2label == dict(enumerate(HEAD.labels))
        assert apart(said(again, texts), wanted) < 2e-5


@pytest.mark.parametrize("method", EVERY, ids=str)
@pytest.mark.parametrize("section", KINDS, indirect=True)
def test_a_few_steps_lower_the_loss_and_the_head_learns(section, method):
    model, texts = adapted(section, method), batch((9, 4, 6, 7))
    learnt = trainable(model)
    optimizer = torch.optim.AdamW(learnt.values(), lr=default_lr(method, 100_000, head=True))
    before = {name: parameter.detach().clone() for name, parameter in learnt.items()}
    found = []
    for _ in range(8):
        torch.manual_seed(0)
        loss = OBJECTIVE.loss_sum(model.train(), texts) / len(texts.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < found[0]
    heads = [name for name in learnt if "classifier" in name or "score" in name]
    assert heads
    assert all(not torch.equal(before[name], learnt[name]) for name in heads)
    assert all(parameter.grad is not None for parameter in learnt.values())


@pytest.mark.parametrize(
    "method", [Lora(rank=4), Prefix(tokens=4), Prompt(tokens=4), PTuning(tokens=4, width=8), Full()]
)
@pytest.mark.parametrize("section", KINDS, indirect=True)
def test_a_text_is_told_the_same_alone_and_padded(section, method):
    model = moved(section, method)
    together = said(model, batch((9, 4, 6)))
    ends = batch((9, 4, 6)).trained.sum(1).cumsum(0).tolist()
    whole = batch((9, 4, 6))
    for row, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        length = int(whole.attention_mask[row].sum())
        cut = [part[row : row + 1, :length] for part in (whole.input_ids, whole.attention_mask, whole.trained)]
        assert apart(said(model, Batch(*cut, whole.targets[start:end], 1.0, (0,))), together[start:end]) < 1e-5


@pytest.mark.parametrize("section", KINDS, indirect=True)
def test_lora_adapts_every_layer_but_the_head(section):
    model = adapted(section, Lora(rank=2))
    lora = {name.split(".lora_")[0] for name in trainable(model) if "lora_" in name}
    assert len(lora) > 10
    assert not [name for name in lora if name.endswith(("classifier", "score"))]
    assert [name.rpartition(".")[2] for name in head_modules(model)] in (["classifier"], ["score"])


@pytest.mark.parametrize("method", [Full(), Lora(rank=4), Prefix(tokens=5)], ids=str)
@pytest.mark.parametrize("section", KINDS, indirect=True)
def test_the_plan_knows_how_many_weights_learn(section, method):
    shape = Shape.from_config(load_config(section), head=HEAD)
    found = sum(parameter.numel() for parameter in trainable(adapted(section, method)).values())
    assert learning(shape, method).params == found


@pytest.mark.parametrize("section", ["encoder"], indirect=True)
def test_the_encoder_engine_tags_as_the_trained_model_does(section, tmp_path):
    texts = batch()
    ids = [tuple(row[: int(n)].tolist()) for row, n in zip(texts.input_ids, texts.attention_mask.sum(1), strict=True)]
    wanted, folders = {}, {}
    for number, method in enumerate(SERVED):
        model = moved(section, method)
        wanted[str(number)] = said(model, texts).softmax(-1)
        folders[str(number)] = saved(model, section, method, tmp_path / str(number))

    for key, answers in classified(section, folders, ids).items():
        every = [[scores[name] for name in HEAD.labels] for answer in answers for _, scores in answer.tokens]
        found = torch.tensor(every)[texts.trained[texts.attention_mask.bool()]]
        assert apart(found, wanted[key]) < 1e-5, SERVED[int(key)]
