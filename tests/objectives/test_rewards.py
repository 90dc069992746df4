"""What an answer is worth, and what is told of rewards that cannot be made."""

import numpy as np
import pytest

from ftray.config.rewards import ExactMatch, JsonSchema, Length, Numeric, Python, Regex
from ftray.errors import ConfigError, TrainError
from ftray.objectives.rewards import Answered, Rewards


def answered(answer, reference="", tokens=1, prompt="ask"):
    return Answered(
        prompt=prompt, prompt_ids=[1], answer=answer, tokens=tokens, reference=reference, row="rows.jsonl:7"
    )


def given(section, *answers):
    return Rewards([section])(answers)[:, 0].tolist()


def test_numeric_compares_values_and_not_their_spelling():
    reference = "16 - 7 = 9\n9 * 2 = 18\n#### 18"
    right = ["18", "18.0", "so $18.", "#### 18"]
    assert given(Numeric(), *(answered(text, reference) for text in right)) == [1.0] * 4
    assert given(Numeric(), answered("81", reference), answered("none", reference), answered("1", "no")) == [0.0] * 3


def test_exact_match_reads_over_white_space():
    assert given(ExactMatch(), answered("a  b\n", "a b"), answered("A b", "a b")) == [1.0, 0.0]


def test_a_pattern_is_found_anywhere():
    assert given(Regex(pattern=r"\bw9\b"), answered("w1 w9 w2"), answered("w99")) == [1.0, 0.0]


def test_json_must_parse_and_fit_its_schema():
    fits = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
    answers = ['{"name": "x"}', '{"name": 1}', '{"other": 1}', "[]", "{", "null"]
    assert given(JsonSchema(fits=fits), *map(answered, answers)) == [1.0, 0, 0, 0, 0, 0]


def test_a_long_answer_loses_up_to_1():
    lengths = [1, 10, 15, 20, 500]
    assert given(Length(tokens=10), *(answered("x", tokens=n) for n in lengths)) == [0.0, 0.0, -0.5, -1.0, -1.0]


def test_rewards_are_told_apart_and_weighed():
    rewards = Rewards([Regex(pattern="a", weight=2), Length(tokens=1, weight=0.5)])
    found = rewards([answered("a", tokens=2), answered("b")])
    assert found.tolist() == [[1.0, -1.0], [0.0, 0.0]]
    assert (found @ rewards.weights).tolist() == [1.5, 0.0]
    assert rewards.deciding is None
    assert Rewards([Regex(pattern="a"), Numeric()]).deciding == 1


@pytest.fixture
def module(tmp_path):
    (tmp_path / "beside.py").write_text("SHARE = 0.5\n")
    (tmp_path / "mine.py").write_text(
        "from beside import SHARE\n"
        "def brief(prompt, answer, reference):\n    return SHARE if reference is None else len(answer)\n"
        "def fails(**asked):\n    return 1 / 0\n"
        "def endless(**asked):\n    return float('inf')\n"
    )
    return tmp_path / "mine.py"


def python(module, name):
    return Python(function=f"{module}:{name}", trusted=True)


def test_a_function_of_ones_own_and_what_lies_beside_it(module):
    assert given(python(module, "brief"), answered("abc", "ref"), answered("abc")) == [3.0, 0.5]


def test_a_function_that_fails_is_told_with_the_answer_it_met(module):
    with pytest.raises(TrainError, match=r"mine.py:fails failed on an answer to rows.jsonl:7: ZeroDivisionError"):
        given(python(module, "fails"), answered("abc"))
    with pytest.raises(TrainError, match=r"rewards.0: python gave inf for an answer to rows.jsonl:7: 'abc'"):
        given(python(module, "endless"), answered("abc"))


def test_what_cannot_be_made_is_told_at_once(module):
    (module.parent / "broken.py").write_text("import no_such_module\n")
    sections = [
        Python(function="nowhere:f", trusted=True),
        python(module, "breif"),
        python(module.parent / "broken.py", "f"),
        JsonSchema(fits={"type": "objekt"}),
    ]
    with pytest.raises(ConfigError) as error:
        Rewards(sections)
    told = dict(error.value.problems)
    assert "there is no file nowhere.py" in told["objective.rewards.0.function"]
    assert "did you mean 'brief'?" in told["objective.rewards.1.function"]
    assert "No module named 'no_such_module'" in told["objective.rewards.2.function"]
    assert "'objekt' is not valid" in told["objective.rewards.3.fits"]


def test_no_answers_are_worth_nothing():
    assert Rewards([Numeric(), Regex(pattern="a")])([]).shape == (0, 2)
    assert np.isfinite(Rewards([Numeric()])([])).all()
