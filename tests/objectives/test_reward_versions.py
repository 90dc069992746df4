"""Reward models of the registry: named by number before a run starts, refused where they do not fit, and learnt from by
whole runs, whose versions are judged by them."""

import re

import numpy as np
import pytest
import torch
from run_drill import VOCAB, run_all, run_of
from run_drill import write_base as write_small_base

from ftray.config.methods import Full, Lora
from ftray.config.schema import Model, Run
from ftray.errors import ConfigError, FtrayError, ModelError
from ftray.evaluate.compare import win_rate
from ftray.models import reward
from ftray.models.adapt import adapt, trainable
from ftray.models.heads import REWARD
from ftray.models.load import fingerprint, load_base, load_tokenizer
from ftray.models.save import save_version
from ftray.objectives import labels
from ftray.objectives.rewards import Answered, Rewards
from ftray.objectives.worth import Worth
from ftray.store.paths import Storage
from ftray.store.registry import Registry
from ftray.store.runs import RunFolder
from ftray.train.known import Known
from ftray.train.publish import _comparison
from tests.models.conftest import write_base as write_other_base

LIKED = 9


def publish(storage, folder, base, *, name="liking", kind="reward", liked=LIKED):
    """A reward version on a base: the more an answer's last token is like w9, the more it is worth."""
    method = Lora(rank=2)
    model = adapt(load_base(base, method=method, dtype=torch.float32, head=REWARD), method, seed=1)
    state = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}
    head = next(name for name in state if "score" in name)
    with torch.no_grad():  # what the base's last layer says where the liked word has just been read
        ids = torch.arange(VOCAB)[:, None]
        states = model.get_base_model().model(input_ids=ids).last_hidden_state[:, 0]
        direction = states[liked] - states.mean(0)
        state[head] = (direction / (direction @ direction))[None] * 4
    save_version(model, folder, method=method, state=state, tokenizer=load_tokenizer(base))
    card = {"base": base.base, "base_fingerprint": fingerprint(base), "method": method.model_dump()}
    return Registry(storage).publish(name, folder, {**card, "objective": {"kind": kind}}, folder.name)


@pytest.fixture(scope="module")
def liking(rollout_folder, tmp_path_factory):
    storage = Storage(str(rollout_folder / "store"))
    base = Model(base=str(rollout_folder / "base"))
    return publish(storage, tmp_path_factory.mktemp("liking"), base)


def section(version="liking", **more):
    return {"kind": "rloo", "samples": 2, "rewards": [{"kind": "version", "version": version}], **more}


def run(folder, version="liking", **sections):
    return Run.model_validate(run_of(folder, "judged", section(version), **sections))


def test_a_version_is_named_by_number_and_stays_with_a_resumed_run(rollout_folder, liking, tmp_path):
    storage = Storage(str(rollout_folder / "store"))
    asked = run(rollout_folder, evaluate={"judge": "liking"})
    first = reward.pinned(asked, storage)
    assert reward.named(first) == {"objective.rewards.0.version": "liking@v1", "evaluate.judge": "liking@v1"}
    publish(storage, tmp_path / "newer", Model(base=str(rollout_folder / "base")))
    assert reward.named(reward.pinned(asked, storage))["evaluate.judge"] == "liking@v2"
    resumed = reward.pinned(asked, storage, began=first.model_dump(mode="json"))
    assert reward.named(resumed)["evaluate.judge"] == "liking@v1"


def test_what_cannot_score_is_refused_before_anything_starts(rollout_folder, liking, tmp_path):
    storage = Storage(str(rollout_folder / "store"))

    def refused(kind, pattern, version):
        with pytest.raises(kind, match=pattern):
            Known.of(run(rollout_folder, version), storage)

    refused(FtrayError, r"objective\.rewards\.0\.version: there is no adapter 'likin'.*did you mean 'liking'", "likin")
    publish(storage, tmp_path / "sft", Model(base=str(rollout_folder / "base")), name="writer", kind="sft")
    refused(ModelError, r"writer@v1 was trained with objective sft and is no reward model; train one", "writer")
    other = write_other_base(tmp_path / "other")
    publish(storage, tmp_path / "reader", other, name="reader")
    refused(ModelError, r"reader@v1 is a reward model of another tokenizer than .*base, whose tokens", "reader")
    judged = run(rollout_folder, evaluate={"judge": "reader"})
    with pytest.raises(ModelError, match=r"evaluate\.judge: reader@v1 is a reward model of another tokenizer"):
        Known.of(judged, storage)


def test_an_encoder_is_no_base_of_a_reward_model():
    from transformers import BertConfig

    from ftray.train.known import check_method

    asked = Run.model_validate({"name": "a", "data": {"sources": "a"}, "objective": {"kind": "reward"}})
    with pytest.raises(
        ModelError, match="is an encoder, and a reward model reads what a policy writes; take the causal"
    ):
        check_method(asked, BertConfig())


def test_the_plan_counts_a_reward_model(rollout_folder, liking):
    storage = Storage(str(rollout_folder / "store"))
    model = reward.load("liking", storage, dtype=torch.float32)
    own = sum(parameter.numel() for name, parameter in model.named_parameters() if ".default." in name)
    assert Known.of(run(rollout_folder), storage).beside == own
    whole = sum(parameter.numel() for parameter in model.parameters()) - own
    full = run(rollout_folder, method={"kind": "full"})
    assert Known.of(full, storage).beside == whole


def test_an_adapter_over_the_policys_base_takes_no_second_base(rollout_folder, liking):
    storage, base = Storage(str(rollout_folder / "store")), Model(base=str(rollout_folder / "base"))
    policy = adapt(load_base(base, method=Lora(), dtype=torch.float32), Lora(rank=4), seed=0)
    alone = reward.load("liking@v1", storage, dtype=torch.float32)
    beside = reward.load("liking@v1", storage, dtype=torch.float32, beside=policy)
    held = {parameter.data_ptr() for parameter in policy.parameters()}
    own = [name for name, parameter in beside.named_parameters() if parameter.data_ptr() not in held]
    assert own
    assert all(".default." in name or "original_module" in name for name in own), own
    texts = [[5, 6, 7], [9, 9]]
    found = [Worth(model, dtype=torch.float32, tokens=64)(texts) for model in (alone, beside)]
    np.testing.assert_array_equal(*found)
    full = adapt(load_base(base, method=Lora(), dtype=torch.float32), Full(), seed=0)
    learning = {parameter.data_ptr() for parameter in full.parameters()}
    apart = reward.load("liking@v1", storage, dtype=torch.float32, beside=full)
    assert not learning & {parameter.data_ptr() for parameter in apart.parameters()}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"objective": {"kind": "reward"}}, "evaluate.judge: scores answers to held-out prompts, and reward has none"),
        ({"objective": {"kind": "pretrain"}}, "evaluate.judge: scores answers to held-out prompts, and pretrain has"),
        ({"evaluate": {"judge": "liking", "generate_rows": 0}}, "evaluate.judge: scores generated answers; set"),
        ({"evaluate": {"judge": "liking@v2@x"}}, "'liking@v2@x' names no version; write name, name@v2 or name@prod"),
    ],
)
def test_a_judge_needs_answers(sections, said):
    from ftray.config.load import run_from

    values = {"name": "a", "data": {"sources": "a"}, "evaluate": {"judge": "liking"}, **sections}
    with pytest.raises(ConfigError, match=re.escape(said)):
        run_from(values)


def test_texts_are_worth_the_same_alone_and_together(rollout_folder, liking):
    model = reward.load("liking@v1", Storage(str(rollout_folder / "store")), dtype=torch.float32)
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, VOCAB, n).tolist() for n in (5, 1, 17, 3, 8, 2)]
    together = Worth(model, dtype=torch.float32, tokens=24)(texts)
    with torch.no_grad():
        alone = [labels.read(model, labels.padded([np.array(text)])).item() for text in texts]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert Worth(model, dtype=torch.float32, tokens=24)([]).shape == (0,)
    rewards = Rewards(run(rollout_folder).objective.rewards)
    rewards.meet(lambda version: Worth(model, dtype=torch.float32, tokens=24))
    answered = [Answered(prompt="", prompt_ids=(), answer="", tokens=1, reference="", row="a:1", ids=t) for t in texts]
    np.testing.assert_allclose(rewards(answered)[:, 0], alone, atol=1e-5)


def test_a_win_is_a_higher_score_and_a_tie_is_half():
    assert win_rate([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, -1.0]) == 2.5 / 4


@pytest.mark.parametrize("judged", [True, False])
def test_a_report_counts_wins_over_the_base_and_the_gate_holds_them(rollout_folder, tmp_path, judged):
    storage, folder = Storage(str(tmp_path)), RunFolder(Storage(str(tmp_path)), "judged")
    for name, worth in (("before", [0.0, 2.0, 4.0, -1.0]), ("after", [1.0, 2.0, 3.0, 0.0])):
        answers = [{"worth": one if judged else None} for one in worth]
        storage.write_json(f"{folder.key}/{name}.json", {"scores": {"judge_score": sum(worth) / 4}, "answers": answers})
    gate = ["win_rate >= 0.6", "win_rate > base", "judge_score > base"]
    found = _comparison(run(rollout_folder, evaluate={"gate": gate}), storage, folder)
    assert (found.before.win_rate, found.after.win_rate) == ((0.5, 0.625) if judged else (None, None))
    assert [rule.passed for rule in found.gate] == [judged, judged, True]


def test_runs_learn_what_a_reward_version_likes_and_are_judged_by_it(rollout_folder, liking):
    kinds = {"ppo": {"kind": "ppo", "samples": 4, "epochs": 2}, "grpo": {"kind": "grpo", "samples": 4}}
    runs = [
        run_of(
            rollout_folder,
            f"liking-{kind}",
            {**section("liking@v1"), **more},
            optim={"steps": 8, "batch_size": 8},
            evaluate={"judge": "liking@v1"},
        )
        for kind, more in kinds.items()
    ]
    two = run_all(rollout_folder, runs)
    for name, rows in two.items():
        learnt = [row["reward"] for row in rows if row["kind"] == "train"]
        assert np.mean(learnt[-2:]) > np.mean(learnt[:2]), name
        before, after = (next(row for row in rows if row["kind"] == when) for when in ("before", "after"))
        assert after["scores"]["judge_score"] == pytest.approx(after["scores"]["reward"], abs=1e-5)
        assert after["scores"]["judge_score"] > before["scores"]["judge_score"]
        assert after["scores"]["kl"] > before["scores"]["kl"] == 0
        worth = [answer["worth"] for answer in after["answers"]]
        assert np.mean(worth) == pytest.approx(after["scores"]["judge_score"])


def test_another_base_of_the_same_words_may_be_judged(rollout_folder, liking, tmp_path):
    write_small_base(tmp_path / "twin")
    twin = run(rollout_folder, model={"base": str(tmp_path / "twin")})
    assert Known.of(twin, Storage(str(rollout_folder / "store"))).beside
