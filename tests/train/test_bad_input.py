"""What a user gets wrong ends in one message with the way out and exit code 2, before Ray is started."""

import json

import pytest

from ftray.cli import main

GOOD = [
    {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"it is {n}"}]}
    for n in range(30)
]


@pytest.fixture
def refused(tmp_path, capsys):
    """Checks a run with some keys changed; returns the message on stderr."""

    def check(rows=GOOD, **keys):
        data = tmp_path / "rows.jsonl"
        data.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        overrides = {"name": "bad", "data.sources": str(data), "storage": str(tmp_path / "store")} | keys
        run = tmp_path / "run.yaml"
        run.write_text("name: bad\ndata: {sources: rows.jsonl}\n")
        code = main(["check", str(run), *(f"{key.replace('__', '.')}={value}" for key, value in overrides.items())])
        said = capsys.readouterr()
        assert code == 2, said.out
        assert "Traceback" not in said.err
        return said.err + said.out

    return check


def test_a_missing_file(refused):
    assert "nowhere.jsonl" in refused(data__sources="nowhere.jsonl")


def test_an_empty_data_set(refused):
    assert "rows.jsonl" in refused(rows=[])


def test_a_row_that_is_no_json_is_an_error_where_the_run_is_strict(refused):
    said = refused(rows=[*GOOD[:2], "{not json", *GOOD[2:]], data__strict="true")
    assert "rows.jsonl:3" in said


def test_a_role_order_that_the_template_refuses(refused):
    rows = [{"messages": [{"role": "wizard", "content": "hm"}, {"role": "assistant", "content": "ha"}]}] * 3
    assert "rows.jsonl:1" in refused(rows=rows, data__strict="true")


def test_no_trained_tokens_at_all(refused):
    rows = [{"messages": [{"role": "user", "content": f"only a question {n}"}]} for n in range(5)]
    assert "train" in refused(rows=rows)


def test_a_label_that_no_row_has_been_told_of(refused):
    said = refused(evaluate__labels="[yes, no]", data__eval_fraction="0.5")
    assert "label" in said


def test_an_answer_without_the_number_that_it_is_to_be_compared_by(refused):
    rows = [{"prompt": f"name {n}", "completion": "Ann"} for n in range(30)]
    said = refused(rows=rows, evaluate__numeric="true", data__eval_fraction="0.5")
    assert "evaluate.numeric" in said
    assert "rows.jsonl:" in said


def test_a_gate_on_numbers_that_the_answers_do_not_hold(refused):
    said = refused(evaluate__gate="[loss < base, pass_at_1 >= 0.5]")
    assert "evaluate.gate.1: pass_at_1 is not measured" in said
    assert "evaluate.numeric: true" in said


@pytest.mark.parametrize(
    ("kind", "reports"),
    [("classification", "loss, accuracy, precision"), ("pretrain", "loss, perplexity, token_accuracy")],
)
def test_a_gate_on_right_answers_where_none_are_written(refused, kind, reports):
    labels = [{"label": "even"}, {"label": "odd"}] if kind == "classification" else [{}]
    rows = [{"text": f"row {n}", **labels[n % len(labels)]} for n in range(30)]
    said = refused(rows=rows, objective__kind=kind, evaluate__gate="[pass_at_1 >= 0.5]")
    assert f"{kind} writes no answers; name one of what it reports: {reports}" in said
    assert "numeric" not in said


def test_a_base_that_does_not_exist(refused):
    assert "model.base" in refused(model__base="./no-such-model")


def test_a_rank_larger_than_the_layer(refused):
    assert "method.rank" in refused(method__kind="lora", method__rank="4096")


def test_a_batch_that_does_not_divide(refused):
    assert "optim.batch_size: 9 does not divide over 2 workers; try" in refused(
        optim__batch_size="9", scale__workers="2"
    )


def test_more_workers_than_the_machine_has(refused):
    said = refused(scale__workers="512", optim__batch_size="512")
    assert "512 workers" in said
    assert "room for" in said


def test_a_storage_root_that_cannot_be_written(refused):
    assert "storage" in refused(storage="/proc/ftray").lower()


def test_a_gate_on_a_metric_that_does_not_exist(refused):
    assert "exact_match" in refused(evaluate__gate='["exact_mach >= 0.5"]')


def test_a_teacher_that_reads_other_tokens(refused, tmp_path):
    import shutil

    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    from ftray.models.builtin import builtin_folder

    shutil.copytree(builtin_folder("builtin:tiny"), tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    tokenizer.add_tokens([AddedToken("<another>")])
    tokenizer.save_pretrained(tmp_path / "teacher")
    said = refused(objective__kind="distill", objective__teacher=str(tmp_path / "teacher"))
    assert "objective.teacher" in said
    assert "vocabulary" in said
