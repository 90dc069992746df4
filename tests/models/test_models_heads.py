"""A base under a head that reads: every method begins, learns, is saved, read back and merged, on encoders and on
causal bases, and padding changes nothing."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    GPT2Config,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from ftray.config.methods import (
    AdaLora,
    Bottleneck,
    Freeze,
    Full,
    Ia3,
    LoHa,
    LoKr,
    Lora,
    Norms,
    Oft,
    Prefix,
    Prompt,
    PTuning,
    Vera,
)
from ftray.config.schema import Model
from ftray.errors import ModelError
from ftray.models import virtual
from ftray.models.adapt import adapt, check_method, default_lr, reader_servability, trainable
from ftray.models.heads import Head, head_parameters, read_head
from ftray.models.load import Shape, load_base, load_config, load_tokenizer, meta_model
from ftray.models.merge import load_version, merge
from ftray.models.save import load_state_into, save_version
from ftray.store.admission import admit
from ftray.train.memory import learning
from tests.models.asking import classified

HEAD = Head("SEQ_CLS", ("refund", "card lost", "other"))
MERGED = [
    Lora(rank=4),
    Lora(rank=4, dora=True),
    Lora(rank=4, init="pissa"),
    AdaLora(rank=2),
    LoHa(rank=4),
    LoKr(rank=4),
    Ia3(),
    Oft(block=16),
    Vera(rank=16),
    Norms(),
]
APART = [
    Bottleneck(size=8),
    Bottleneck(size=8, placement="pfeiffer"),
    Prefix(tokens=5),
    Prefix(tokens=5, projection=16),
    Prompt(tokens=5),
    PTuning(tokens=5, width=24),
]
WHOLE = [Full(), Freeze(last_layers=1), Freeze(last_layers=0)]
EVERY = [*MERGED, *APART, *WHOLE]
KINDS = ["encoder", "causal"]


def write_encoder(folder, *, pooler=False):
    """A BERT without the pooler that its classifier needs, as many encoders are published."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=2,
        initializer_range=0.1,
    )
    BertModel(config, add_pooling_layer=pooler).save_pretrained(folder)
    vocabulary = {token: i for i, token in enumerate(["[CLS]", "[SEP]", "[PAD]", "[UNK]", *map(chr, range(33, 125))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=pair, special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    return Model(base=str(folder))


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def section(request, base, encoder):
    return {"encoder": encoder, "causal": base}[request.param]


def adapted(section, method, *, seed=3, head=HEAD):
    model = load_base(section, method=method, dtype=torch.float32, head=head)
    return adapt(model, method, seed=seed, steps=20)


def moved(section, method):
    """Adapted, and moved away from where it began."""
    model = adapted(section, method)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(trainable(model).items()):
            size = {"adalora": 0.2, "vera": 0.5}.get(method.kind, 0.05)
            parameter += size * torch.randn(parameter.shape, generator=generator)
            if "lora_E" in name:
                parameter[: number // 3 % 3] = 0
    return model.eval()


def saved(model, section, method, folder):
    state = {name: parameter.detach().float() for name, parameter in trainable(model).items()}
    save_version(model, folder, method=method, state=state, tokenizer=load_tokenizer(section))
    return folder


def padded(lengths=(9, 4, 6)):
    """Rows of several lengths, padded with token 2."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.full((len(lengths), max(lengths)), 2)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(3, 96, (length,), generator=generator)
    return ids, (ids != 2).long()


def logits(model, ids, mask):
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=mask).logits.float()


def apart(one, other):
    return (one - other).abs().max().item()


@pytest.mark.parametrize("method", EVERY, ids=str)
@pytest.mark.parametrize("section", KINDS, indirect=True)
def test_a_version_computes_the_same_live_in_plain_peft_read_back_and_merged(section, tmp_path, method):
    model = moved(section, method)
    ids, mask = padded()
    wanted = logits(model, ids, mask)
    folder = saved(model, section, method, tmp_path / "v1")
    admit(folder, {"base": section.base})
    assert read_head(folder) == HEAD

    rest = {} if method in WHOLE else {"method": method.model_dump()}
    reloaded, _ = load_version(section, folder, rest, torch.float32)
    assert apart(logits(reloaded, ids, mask), wanted) < 1e-5

    fresh = adapted(section, method, seed=3 if method.kind == "vera" else 8)
    assert apart(logits(fresh, ids, mask), wanted) > 1e-3
    load_state_into(fresh, folder, method)
    assert apart(logits(fresh, ids, mask), wanted) < 1e-5

    if method in WHOLE:
        plain = AutoModelForSequenceClassification.from_pretrained(folder)
        assert plain.config.id2label == dict(enumerate(HEAD.labels))
    else:
        plain = AutoModelForSequenceClassification.from_pretrained(section.base, num_labels=3)
        plain = PeftModel.from_pretrained(plain, folder)
    for row in range(len(ids)):  # a text alone: plain PEFT cannot tell padding behind virtual tokens of a causal base
        alone = ids[row : row + 1, : mask[row].sum()]
        assert apart(logits(plain, alone, torch.ones_like(alone)), wanted[row]) < 1e-5

    if method in MERGED:
        merged = merge(section, folder, tmp_path / "merged", torch.float32)
        assert read_head(merged) == HEAD
        again = AutoModelForSequenceClassification.from_pretrained(merged)
        assert again.config.id2label == dict(enumerate(HEAD.labels))
        assert apart(logits(again, ids, mask), wanted) < 2e-5


@pytest.mark.parametrize("method", EVERY, ids=str)
@pytest.mark.parametrize("section", KINDS, indirect=True)
def test_a_few_steps_lower_the_loss_and_the_head_always_learns(section, method):
    model = adapted(section, method)
    ids, mask = padded((9, 4, 6, 7))
    right = torch.tensor([0, 1, 2, 1])
    learnt = trainable(model)
    optimizer = torch.optim.AdamW(learnt.values(), lr=default_lr(method, 100_000, head=True))
    before = {name: parameter.detach().clone() for name, parameter in learnt.items()}
    found = []
    for _ in range(8):
        torch.manual_seed(0)
        model.train()
        loss = torch.nn.functional.cross_entropy(model(input_ids=ids, attention_mask=mask).logits, right)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < found[0]
    heads = [name for name in learnt if "classifier" in name or "score" in name or "pooler" in name]
    # with keys and values alone PEFT asks BERT for its pooler's output, as the model itself does
    assert len(heads) == (4 if "classifier" in " ".join(heads) else 1)
    assert all(not torch.equal(before[name], learnt[name]) for name in heads)
    assert all(parameter.grad is not None for parameter in learnt.values())


@pytest.mark.parametrize("method", [Lora(rank=4), Prefix(tokens=4), Prompt(tokens=4), Full()], ids=str)
@pytest.mark.parametrize("section", KINDS, indirect=True)
def test_a_text_has_the_same_logits_alone_and_padded(section, method):
    model = moved(section, method)
    ids, mask = padded()
    together = logits(model, ids, mask)
    for row in range(len(ids)):
        alone = ids[row : row + 1, : mask[row].sum()]
        assert apart(together[row], logits(model, alone, torch.ones_like(alone))[0]) < 1e-5


@pytest.mark.parametrize("method", [m for m in EVERY if m not in WHOLE], ids=str)
@pytest.mark.parametrize("section", KINDS, indirect=True)
def test_an_adapter_begins_as_the_base_under_the_same_head(section, method):
    ids, mask = padded()
    model = adapted(section, method)
    with virtual.left_away(model):
        found = logits(model, ids, mask)
    torch.testing.assert_close(found, logits(adapted(section, Full()), ids, mask), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("section", KINDS, indirect=True)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_keeps_its_head_whole(section, bits):
    method = Lora(rank=4, bits=bits)
    model = adapted(section, method)
    ids, mask = padded()
    model(input_ids=ids, attention_mask=mask).logits.sum().backward()
    heads = {name: p for name, p in trainable(model).items() if "lora_" not in name}
    assert heads
    assert all(parameter.dtype == torch.float32 and parameter.grad is not None for parameter in heads.values())


@pytest.mark.parametrize("section", KINDS, indirect=True)
def test_a_head_begins_by_the_runs_seed_alone(section):
    def head(seed):
        torch.manual_seed(np.random.randint(1000))
        model = adapted(section, Full(), seed=seed)
        names = head_parameters(model)
        return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if name in names])

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))


@pytest.mark.parametrize("method", EVERY, ids=str)
@pytest.mark.parametrize("section", KINDS, indirect=True)
def test_the_plan_knows_how_many_weights_learn(section, method):
    shape = Shape.from_config(load_config(section), head=HEAD)
    found = sum(parameter.numel() for parameter in trainable(adapted(section, method)).values())
    if method.kind == "freeze":  # norms are spread over the blocks
        assert learning(shape, method).params == pytest.approx(found, rel=0.05)
    else:
        assert learning(shape, method).params == found


def test_a_base_with_a_head_for_other_labels_gets_a_new_one(encoder, tmp_path):
    folder = saved(moved(encoder, Full()), encoder, Full(), tmp_path / "v1")
    other = Head("SEQ_CLS", tuple("abcde"))
    model = adapted(Model(base=str(folder)), Lora(rank=2), head=other)
    assert model.get_base_model().config.num_labels == 5
    same = adapted(Model(base=str(folder)), Full())
    ids, mask = padded()
    assert apart(logits(same, ids, mask), logits(moved(encoder, Full()), ids, mask)) < 1e-5, "its own head goes on"


def test_a_head_for_tokens_and_one_for_a_number_are_loaded_alike(encoder, base):
    ids, mask = padded()
    tags = adapted(encoder, Lora(rank=2), head=Head("TOKEN_CLS", ("O", "B-x")))
    assert logits(tags, ids, mask).shape == (3, 9, 2)
    assert tags.peft_config["default"].task_type == "TOKEN_CLS"
    reward = adapted(base, Lora(rank=2), head=Head("SEQ_CLS", ("reward",), "value"))
    assert logits(reward, ids, mask).shape == (3, 1)


@pytest.mark.parametrize(
    ("config", "method", "said"),
    [
        (RobertaConfig(), Prefix(), r"method\.kind: a RobertaForSequenceClassification takes no keys and values"),
        (BertConfig(), Bottleneck(placement="parallel"), r"auto knows no parallel places in a BertForSequence"),
        (BertConfig(), Lora(targets=["querry"]), r"no layer is called 'querry'; did you mean 'query'"),
        (GPT2Config(), LoHa(), r"loha cannot adapt the Conv1D layers"),
    ],
    ids=["prefix", "parallel", "misspelt", "conv1d"],
)
def test_a_method_that_does_not_fit_a_headed_base_is_refused_by_configuration_alone(config, method, said):
    with pytest.raises(ModelError, match=said):
        check_method(config, method, head=HEAD)


def test_a_model_without_such_a_head_is_refused(tmp_path):
    from transformers import SegformerConfig, ViTConfig

    for config in (ViTConfig(), SegformerConfig()):
        with pytest.raises(ModelError, match=r"has no AutoModelForSequenceClassification; take a BERT-like encoder"):
            meta_model(config, head=HEAD)


def test_layers_of_the_head_are_no_targets(encoder):
    model = load_base(encoder, method=Lora(), dtype=torch.float32, head=HEAD)
    adapter = adapt(model, Lora(rank=2, targets=["dense"]), seed=1)
    learnt = [name for name in trainable(adapter) if "lora_" in name]
    assert learnt
    assert not [name for name in learnt if "pooler" in name or "classifier" in name]


SERVED = [m for m in (*MERGED, *WHOLE) if reader_servability(m, encoder=True) in ("adapter", "model")]


def test_the_encoder_engine_answers_as_the_trained_model_does(encoder, tmp_path):
    assert {m.kind for m in SERVED} >= {"lora", "adalora", "loha", "lokr", "ia3", "oft", "norms", "full", "freeze"}
    ids, mask = padded()
    texts = [tuple(row[: int(length)].tolist()) for row, length in zip(ids, mask.sum(1), strict=True)]
    wanted, folders = {}, {}
    for number, method in enumerate(SERVED):
        model = moved(encoder, method)
        wanted[str(number)] = logits(model, ids, mask).softmax(-1)
        folders[str(number)] = saved(model, encoder, method, tmp_path / str(number))

    for key, answers in classified(encoder, folders, texts).items():
        found = torch.tensor([[answer.scores[name] for name in HEAD.labels] for answer in answers])
        assert apart(found, wanted[key]) < 1e-5, SERVED[int(key)]


def test_rates_under_a_head_suit_small_encoders():
    mini, bert = 22_700_000, 110_000_000
    assert default_lr(Lora(), mini, head=True) == 1e-3
    assert default_lr(Lora(), mini, head=True, tags=True) == pytest.approx(3e-4, rel=0.1)
    assert default_lr(Full(), mini, head=True) == pytest.approx(1e-4, rel=0.1)
    assert default_lr(Full(), bert, head=True) == pytest.approx(3e-5, rel=0.1)
    assert max(default_lr(method, mini, head=True) for method in EVERY) == 5e-3


def test_a_version_says_whether_it_is_served():
    assert reader_servability(Vera(), encoder=True) == "merge"
    assert {reader_servability(m, encoder=True) for m in APART} == {"none"}
    assert {reader_servability(m, encoder=False) for m in EVERY} == {"none"}


def test_labels_stand_in_a_versions_files(encoder, tmp_path):
    folder = saved(moved(encoder, Lora(rank=2)), encoder, Lora(rank=2), tmp_path / "v1")
    assert json.loads((folder / "labels.json").read_text())["id2label"]["1"] == "card lost"
