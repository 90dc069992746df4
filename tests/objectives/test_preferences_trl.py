"""Every loss is the one that TRL computes on the same texts with the same two models."""

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftray.config.methods import Full
from ftray.config.objectives import Dpo, Kto, Orpo
from ftray.data.tokens import TokenStore, TokenWriter
from tests.objectives.answers import VOCAB, begun, built, moved, objective_over, window_loss, write_judged, write_pairs

THEIRS = {"normalised": "sigmoid_norm"}  # our name -> theirs, where it differs


@pytest.fixture(scope="module")
def tokenizer(base):
    return AutoTokenizer.from_pretrained(base.base)


@pytest.fixture(scope="module")
def policy(base):
    return moved(built(base))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), count=5)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    return write_judged(tmp_path_factory.mktemp("judged"), count=6)


def options(folder):
    return {"output_dir": str(folder), "report_to": [], "use_cpu": True, "bf16": False, "disable_dropout": True}


def halves(store, row):
    """(prompt, chosen, rejected) as lists of ids."""
    cut, ids, trained = int(store.column("cut")[row]), store.ids(row).tolist(), store.trained(row)
    start = int(np.argmax(trained))
    return ids[:start], ids[start:cut], ids[cut + start :]


def ours(base, policy, section, store):
    """Our loss of all rows; the reference is read by the base before the policy's weights are put in."""
    objective = begun(objective_over(store, section), built(base), Full(), store)
    policy.eval()
    return window_loss(objective, policy, store, [np.arange(len(store))]).item()


def dpo_trainer(base, policy, tokenizer, folder, **config):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = Dataset.from_list([{"prompt": "AB", "chosen": "CD", "rejected": "EFG"}])
    reference = AutoModelForCausalLM.from_pretrained(base.base)
    args = DPOConfig(**options(folder), **config)
    return DPOTrainer(policy, reference, args, train_dataset=rows, processing_class=tokenizer)


def dpo_loss(trainer, store):
    texts = [halves(store, row) for row in range(len(store))]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    batch = trainer.data_collator([dict(zip(names, text, strict=True)) for text in texts])
    return trainer.compute_loss(trainer.model.eval(), batch).item()


@pytest.mark.parametrize(
    "section",
    [
        Dpo(),
        Dpo(beta=0.5, loss="hinge"),
        Dpo(beta=0.3, loss="ipo"),
        Dpo(loss="robust", label_smoothing=0.2),
        Dpo(beta=2.0, loss="normalised"),
    ],
    ids=lambda section: section.loss,
)
def test_dpo_costs_what_trls_costs(base, policy, tokenizer, pairs, tmp_path, section):
    config = {"beta": section.beta, "label_smoothing": section.label_smoothing}
    loss = THEIRS.get(section.loss, section.loss)
    trainer = dpo_trainer(base, policy, tokenizer, tmp_path, loss_type=[loss], **config)
    assert ours(base, policy, section, pairs) == pytest.approx(dpo_loss(trainer, pairs), abs=1e-5)


def test_the_chosen_answers_loss_is_trls_where_answers_are_equally_long(base, policy, tokenizer, tmp_path):
    """TRL's mean is over the tokens of a batch, ours over each answer's and then over pairs (arXiv 2404.19733)."""
    with TokenWriter(tmp_path / "even", VOCAB, ["pairs"]) as writer:
        for line in (1, 2, 3):
            ids, trained = np.random.default_rng(line).integers(3, VOCAB, 12), np.repeat([0, 1, 0, 1], [2, 5, 2, 3])
            ids[7:9] = ids[:2]
            writer.extend(ids, trained > 0, [12], [(0, writer.file_number("a"), line)], {"cut": np.array([7])})
    store = TokenStore.open(tmp_path / "even")
    trainer = dpo_trainer(base, policy, tokenizer, tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.7])
    assert ours(base, policy, Dpo(sft_weight=0.7), store) == pytest.approx(dpo_loss(trainer, store), abs=1e-5)


def test_orpo_costs_what_trls_parts_cost(base, policy, tokenizer, pairs, tmp_path):
    """TRL's own loss takes the chosen text's prompt into its likelihood; the paper's is of the answer, as ours is."""
    from datasets import Dataset
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    rows = Dataset.from_list([{"prompt": "AB", "chosen": "CD", "rejected": "EFG"}])
    args = ORPOConfig(**options(tmp_path), beta=0.3)
    trainer = ORPOTrainer(policy, args, train_dataset=rows, processing_class=tokenizer)
    features = []
    for row in range(len(pairs)):
        prompt, chosen, rejected = halves(pairs, row)
        feature = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for name, answer in (("chosen", chosen), ("rejected", rejected)):
            feature |= {
                f"{name}_input_ids": prompt + answer,
                f"{name}_attention_mask": [1] * len(prompt + answer),
                f"{name}_labels": [-100] * len(prompt) + answer,
            }
        features.append(feature)
    chosen, rejected, *_ = trainer.concatenated_forward(policy.eval(), trainer.data_collator(features))
    odds, *_ = trainer.odds_ratio_loss(chosen, rejected)
    theirs = (-chosen - odds).mean().item()
    assert ours(base, policy, Orpo(beta=0.3), pairs) == pytest.approx(theirs, abs=1e-5)


def test_orpo_costs_what_trls_costs_after_a_prompt_of_one_token(base, policy, tokenizer, tmp_path):
    from datasets import Dataset
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    with TokenWriter(tmp_path / "one", VOCAB, ["pairs"]) as writer:
        ids = np.array([5, 20, 21, 22, 5, 30, 31])
        writer.extend(ids, ids != 5, [7], [(0, writer.file_number("a"), 1)], {"cut": np.array([4])})
    rows = Dataset.from_list([{"prompt": "AB", "chosen": "CD", "rejected": "EFG"}])
    trainer = ORPOTrainer(policy, ORPOConfig(**options(tmp_path)), train_dataset=rows, processing_class=tokenizer)
    feature = {"prompt_input_ids": [5], "prompt_attention_mask": [1]}
    for name, answer in (("chosen", [20, 21, 22]), ("rejected", [30, 31])):
        feature |= {f"{name}_input_ids": [5, *answer], f"{name}_labels": [-100, *answer]}
        feature[f"{name}_attention_mask"] = [1] * (len(answer) + 1)
    theirs, _ = trainer.get_batch_loss_metrics(policy.eval(), trainer.data_collator([feature]))
    assert ours(base, policy, Orpo(), TokenStore.open(tmp_path / "one")) == pytest.approx(theirs.item(), abs=1e-5)


def test_kto_costs_what_trls_costs(base, policy, tokenizer, judged, tmp_path):
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    section = Kto(beta=0.4, desirable_weight=1.5, undesirable_weight=0.7)
    rows = Dataset.from_list([{"prompt": "AB", "completion": "CD", "label": label} for label in (True, False)])
    config = {"beta": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.7, "per_device_train_batch_size": 2}
    # the base as the policy: a model that was moved at random likes every answer less than it, and z0 would be cut at 0
    reference, better = policy.eval(), built(base).eval()
    args = KTOConfig(**options(tmp_path), **config)
    trainer = KTOTrainer(better, reference, args, train_dataset=rows, processing_class=tokenizer)

    objective = begun(objective_over(judged, section), reference, Full(), judged)
    mine = window_loss(objective, better, judged, [[0, 3], [1, 2], [4, 5]]).item()
    partners = objective._partners[judged.folder]
    features = []
    for row in range(len(judged)):
        start, ids = int(np.argmax(judged.trained(row))), judged.ids(row).tolist()
        other = judged.ids(partners[row])[int(np.argmax(judged.trained(partners[row]))) :].tolist()
        good = bool(judged.column("good")[row])
        features.append(
            {"prompt_ids": ids[:start], "completion_ids": ids[start:], "KL_completion_ids": other, "label": good}
        )
    theirs = trainer.compute_loss(trainer.model.eval(), trainer.data_collator(features)).item()
    assert mine == pytest.approx(theirs, abs=1e-5)
    assert objective.shift > 0
