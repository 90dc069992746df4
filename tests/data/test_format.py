"""Rows of every layout become the same messages; a layout is recognised, or the error names the columns."""

import json

import pytest

from ftray.config.schema import Source
from ftray.data.format import Unusable, recognise
from ftray.errors import DataError

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def _layout(*rows, objective="sft", template=None, system=None, **source):
    return recognise(rows, Source(path="x.jsonl", **source), objective=objective, template=template, system=system)


def _messages(row, **options):
    return _layout(row, **options).example(row).messages


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"id": "7", "messages": TALK}, "messages"),
        ({"conversations": TALK}, "messages"),
        ({"messages": json.dumps(TALK)}, "messages"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"prompt": TALK[:1], "completion": TALK[1:], "label": True}, "prompt_completion"),
        ({"prompt": json.dumps(TALK[:1]), "completion": json.dumps(TALK[1:])}, "prompt_completion"),
        ({"question": "a", "answer": "b"}, "prompt_completion"),
        ({"input": "a", "output": "b"}, "prompt_completion"),
        ({"instruction": "a", "input": "", "output": "b"}, "instruction"),
        ({"instruction": "a", "output": "b"}, "instruction"),
        ({"instruction": "a", "response": "b"}, "prompt_completion"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "sharegpt"),
    ],
)
def test_every_layout_is_recognised_and_gives_the_same_messages(row, kind):
    layout = _layout(row)
    assert layout.kind == kind
    assert layout.example(row).messages == TALK


def test_the_layout_is_found_when_the_first_row_has_no_value():
    assert _layout({"messages": None}, {"messages": TALK}).kind == "messages"


def test_text_is_recognised_alone_or_beside_what_is_about_it():
    assert _layout({"text": "a", "id": 1, "url": "u"}).kind == "text"
    assert _layout({"text": "a", "category": "b"}, objective="pretrain").kind == "text"


def test_a_text_with_a_label_is_not_taken_for_a_text_to_learn():
    with pytest.raises(DataError, match=r"cannot tell.*its columns are text, category.*columns: \{prompt"):
        _layout({"text": "a", "category": "b"})


def test_mapped_columns_make_a_pair():
    columns = {"prompt": "text", "completion": "category"}
    layout = _layout({"text": "a", "category": "b", "split": "x"}, columns=columns)
    assert layout.example({"text": "a", "category": "b"}).messages == TALK
    assert layout.unused == ("split",)


def test_a_mapped_column_wins_over_one_that_is_recognised():
    row = {"question": "no", "answer": "b", "asked": "a"}
    assert _messages(row, columns={"prompt": "asked"}) == TALK
    row = {"messages": [], "q": "a", "a": "b"}
    assert _messages(row, columns={"prompt": "q", "completion": "a"}) == TALK


def test_a_column_that_does_not_exist_suggests_one_that_does():
    with pytest.raises(DataError, match=r"no column 'txt'.*did you mean 'text'\?; its columns are text, category"):
        _layout({"text": "a", "category": "b"}, columns={"prompt": "txt", "completion": "category"})


def test_a_named_format_says_which_columns_it_needs():
    with pytest.raises(DataError, match="format instruction needs columns 'instruction' and 'output'"):
        _layout({"question": "a", "answer": "b"}, format="instruction")


def test_an_instruction_and_its_input_are_one_question():
    assert _messages({"instruction": "Sort.", "input": "3 1 2", "output": "1 2 3"})[0]["content"] == "Sort.\n\n3 1 2"


def test_a_template_fills_any_column():
    row = {"text": "card lost", "category": "b", "lang": "en"}
    columns = {"prompt": "text", "completion": "category"}
    messages = _messages(row, columns=columns, template="[{lang}] {prompt} or {text} {{json}}")
    assert messages[0]["content"] == "[en] card lost or card lost {json}"
    messages = _messages({"instruction": "I", "output": "b"}, template="{instruction}|{input}|")
    assert messages[0]["content"] == "I||"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{promt}", r"names \{promt\}; did you mean 'prompt'\?"),
        ("{prompt", "write literal braces twice"),
        ("{prompt.__class__}", "not a column name"),
        ("{0}", "not a column name"),
        ("{}", "not a column name"),
    ],
)
def test_a_wrong_template_is_an_error_at_once(template, message):
    with pytest.raises(DataError, match=message):
        _layout({"prompt": "a", "completion": "b"}, template=template)


def test_a_template_for_messages_is_an_error():
    with pytest.raises(DataError, match="its rows are messages; leave the template out"):
        _layout({"messages": TALK}, template="{messages}")


def test_a_system_message_is_put_before_rows_that_have_none():
    assert _messages({"messages": TALK}, system="S") == [{"role": "system", "content": "S"}, *TALK]
    own = [{"role": "developer", "content": "own"}, *TALK]
    assert _messages({"messages": own}, system="S")[0] == {"role": "system", "content": "own"}


def test_a_json_answer_stays_the_text_it_is():
    for answer in ('[{"item": "latte"}]', '{"item": "latte"}', "[1, 2]"):
        assert _messages({"prompt": "a", "completion": answer})[1]["content"] == answer
    assert _messages({"prompt": "a", "completion": {"item": "é"}})[1]["content"] == '{"item": "é"}'
    assert _messages({"prompt": "a", "completion": 42})[1]["content"] == "42"


def test_answers_inside_a_prompt_are_not_trained():
    row = {"prompt": [*TALK, TALK[0]], "completion": TALK[1:]}
    assert [message.get("weight") for message in _messages(row)] == [None, 0, None, None]


def test_tools_and_their_calls_are_objects_whatever_they_were():
    call = {"id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}
    turns = [TALK[0], {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "3"}]
    row = {"messages": [*turns, TALK[1]], "tools": json.dumps([{"type": "function", "function": {"name": "f"}}])}
    example = _layout(row).example(row)
    assert example.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert example.tools == [{"type": "function", "function": {"name": "f"}}]
    assert example.last_answer == 3


def test_text_parts_of_a_content_are_joined():
    row = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, TALK[1]]}
    assert _messages(row) == TALK


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ("hello", "messages are not a list: str"),
        ([], "no messages"),
        ([7], "a message is not an object: message 1"),
        ([{"role": "wizard", "content": "x"}], "unknown role: message 1 has role 'wizard'"),
        ([{"content": "x"}], "unknown role: message 1 has role None"),
        ([{"role": ["user"], "content": "x"}], "unknown role"),
        ([TALK[0], {"role": "assistant"}], "a message has no content: message 2"),
        ([{"role": "user", "content": 7}], "a message's content is not text: message 1 has int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "a message's content is not only text"),
        ([TALK[0], {**TALK[1], "weight": 0.5}], "a message's weight is not 0 or 1: message 2 has 0.5"),
        ([TALK[0], {"role": "assistant", "tool_calls": [{}]}], "a tool call names no function: message 2"),
        ([TALK[0], {"role": "assistant", "tool_calls": 7}], "tool calls are not a list: message 2"),
        ([TALK[0]], "no message of the assistant"),
    ],
)
def test_a_bad_conversation_is_refused_with_the_message_named(turns, reason):
    layout = _layout({"messages": TALK})
    with pytest.raises(Unusable) as refused:
        layout.example({"messages": turns})
    assert refused.value.reason.startswith(reason)
    assert refused.value.bad


def test_a_row_without_a_value_names_the_column():
    layout = _layout({"question": "a", "answer": "b"})
    for row in ({"question": "a"}, {"question": "a", "answer": None}):
        with pytest.raises(Unusable, match="no value in column 'answer'"):
            layout.example(row)
    with pytest.raises(Unusable, match="column 'completion' is not text"):
        layout.example({"question": "a", "answer": True})
