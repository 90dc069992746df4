"""What a user gets wrong about rewards ends in one message with the way out and exit code 2, before Ray is started."""

import json

import pytest
import yaml

from ftray.cli import main
from ftray.config.load import run_from
from ftray.errors import ConfigError

ROWS = [{"prompt": f"add {n} and 1", "answer": str(n + 1)} for n in range(20)]


@pytest.fixture
def refused(tmp_path, capsys):
    """Checks a run with these rewards; returns the message."""

    def check(rewards, rows=ROWS, **objective):
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        section = {"kind": "grpo", "max_new_tokens": 8, "rewards": rewards, **objective}
        run = {"name": "bad", "storage": str(tmp_path / "store"), "data": {"sources": "rows.jsonl"}}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({**run, "objective": section}))
        code = main(["check", str(tmp_path / "run.yaml")])
        said = capsys.readouterr()
        assert code == 2, said.out
        assert "Traceback" not in said.err
        return said.err + said.out

    return check


def test_no_rewards(refused):
    assert "objective.rewards: is empty; name at least one" in refused([])


def test_a_pattern_that_does_not_compile(refused):
    said = refused([{"kind": "regex", "pattern": "(w9"}])
    assert "objective.rewards.0.pattern: '(w9' is no regular expression: missing )" in said


def test_a_kind_that_does_not_exist(refused):
    assert "did you mean 'numeric'?" in refused([{"kind": "numerical"}])


def test_a_reward_that_compares_where_rows_have_no_reference(refused):
    rows = [*ROWS[:3], {"prompt": "add"}, *ROWS[3:], {"prompt": "two"}]
    rows = [{"messages": [{"role": "user", "content": row["prompt"]}, *_given(row)]} for row in rows]
    said = refused([{"kind": "regex", "pattern": "1"}, {"kind": "numeric"}], rows=rows)
    assert "objective.rewards.1: numeric compares with a reference, which 2 rows lack:" in said
    assert "rows.jsonl:4" in said
    assert "rows.jsonl:22" in said


def _given(row):
    return [{"role": "assistant", "content": row["answer"]}] if "answer" in row else []


def test_code_that_is_not_trusted(refused):
    said = refused([{"kind": "python", "function": "mine:score"}])
    assert "objective.rewards.0.trusted: mine.py:score is code that workers run with your rights" in said


def test_a_module_that_is_not_there(refused):
    said = refused([{"kind": "python", "function": "mine:score", "trusted": True}])
    assert "objective.rewards.0.function: there is no file mine.py" in said


def test_a_function_that_is_not_there(refused, tmp_path):
    (tmp_path / "mine.py").write_text("def scores(**asked):\n    return 1\n")
    said = refused([{"kind": "python", "function": "mine:score", "trusted": True}])
    assert "has no function 'score'; did you mean 'scores'?" in said


def test_a_schema_that_is_none(refused):
    assert "objective.rewards.0.fits: is no JSON schema" in refused(
        [{"kind": "json_schema", "fits": {"type": "thing"}}]
    )


def test_an_answer_that_leaves_no_room_for_its_prompt(refused):
    said = refused([{"kind": "numeric"}], max_new_tokens=1024)
    assert "objective.max_new_tokens: 1024 leave no room for a prompt" in said


def test_a_micro_batch_counts_answers():
    run = {
        "name": "good",
        "data": {"sources": "rows.jsonl"},
        "objective": {"kind": "grpo", "samples": 8, "rewards": [{"kind": "numeric"}]},
        "optim": {"batch_size": 4, "micro_batch_size": 16},
    }
    assert run_from(run).optim.micro_batch_size == 16
    run["optim"] = {"batch_size": 4, "micro_batch_size": 12}
    with pytest.raises(ConfigError, match=r"32 is not a multiple of micro_batch_size x workers = 12; try 3"):
        run_from(run)


def test_a_method_that_changes_the_base():
    with pytest.raises(ConfigError, match=r"method.init: pissa changes the base, which ppo compares with"):
        run_from(
            {
                "name": "bad",
                "data": {"sources": "rows.jsonl"},
                "method": {"kind": "lora", "init": "pissa"},
                "objective": {"kind": "ppo", "rewards": [{"kind": "numeric"}]},
            }
        )


def test_a_good_run_is_planned(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "mine.py").write_text("def score(prompt, answer, reference):\n    return len(answer)\n")
    rewards = [{"kind": "numeric"}, {"kind": "python", "function": "mine:score", "trusted": True}]
    section = {"kind": "ppo", "max_new_tokens": 8, "rewards": rewards}
    run = {"name": "good", "storage": str(tmp_path / "store"), "data": {"sources": "rows.jsonl"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**run, "objective": section}))
    assert main(["check", str(tmp_path / "run.yaml")]) == 0
    assert "«" in capsys.readouterr().out  # the reference of the example that is shown
