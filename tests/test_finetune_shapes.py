"""Rows of every known layout are recognised, said and brought to one shape; others are named."""

import pytest

from bridge.peft import AdapterError
from bridge.peft.finetune.data import rows_of
from bridge.peft.finetune.shapes import Recognised, recognise

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yes"}
SYSTEM = {"role": "system", "content": "be brief"}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def read(*rows, has_chat_template: bool = True) -> Recognised:
    return recognise(rows_of(rows, "file"), has_chat_template=has_chat_template)


def messages_of(*rows, **more):
    recognised = read(*rows, **more)
    assert recognised.shape == "messages"
    return recognised.rows[0].columns["messages"]


@pytest.mark.parametrize(
    ("columns", "shape", "said"),
    [
        ({"text": "a"}, "text", "data: 1 row of text"),
        ({"prompt": "a", "completion": ""}, "prompt/completion", "data: 1 row of prompt/comp"),
        ({"messages": [USER, ANSWER]}, "messages", "data: 1 row of messages"),
        (
            {"conversations": [{"from": "human", "value": "hi"}]},
            "messages",
            "data: 1 row of ShareGPT conversations, read as messages",
        ),
        (
            {"instruction": "a", "output": "b"},
            "messages",
            "data: 1 row of Alpaca instructions, read as messages",
        ),
    ],
)
def test_layouts_are_recognised_and_said(columns, shape, said):
    recognised = read(columns)
    assert recognised.shape == shape
    assert recognised.notes[0].startswith(said)


def test_sharegpt_conversations_become_messages():
    row = {
        "system": "be brief",
        "conversations": [
            {"from": "human", "value": "hi"},
            {"from": "gpt", "value": "yes", "weight": 0},
            {"from": "observation", "value": "3"},
        ],
    }
    assert messages_of(row) == [
        SYSTEM,
        USER,
        {**ANSWER, "weight": 0},
        {"role": "tool", "content": "3"},
    ]
    assert messages_of({"conversations": [USER, ANSWER]}) == [USER, ANSWER]


@pytest.mark.parametrize("given", ["", None, "  "])
def test_alpaca_rows_without_input_are_the_instruction_alone(given):
    row = {"instruction": "hi", "input": given, "output": "yes"}
    assert messages_of(row) == [USER, ANSWER]


def test_alpaca_rows_with_input_and_system_message():
    row = {"instruction": "Add.", "input": "1 2", "output": "yes", "system": "be brief"}
    question = {"role": "user", "content": "Add.\n\n1 2"}
    assert messages_of(row) == [SYSTEM, question, ANSWER]


def test_alpaca_rows_are_prompts_where_there_is_no_chat_template():
    row = {"instruction": "Add.", "input": "1 2", "output": "yes", "text": "all of it again"}
    recognised = read(row, has_chat_template=False)
    assert recognised.shape == "prompt/completion"
    assert recognised.rows[0].columns == {"prompt": "Add.\n\n1 2\n\n", "completion": "yes"}
    assert "with a blank line after the instruction and after the input" in recognised.notes[0]
    assert recognised.notes[1] == "data: columns not read: 'text'"


def test_a_system_column_is_a_message_where_there_is_a_chat_template():
    row = {"system": "be brief", "prompt": "hi", "completion": "yes"}
    without = {"prompt": "hi", "completion": "yes"}
    assert messages_of(row, without) == [SYSTEM, USER, ANSWER]
    with pytest.raises(AdapterError, match='file:1 has a "system" message but .*no chat template'):
        read(row, has_chat_template=False)
    assert messages_of({"system": "be brief", "messages": [USER, ANSWER]})[0] == SYSTEM
    assert read({**row, "system": ""}).shape == "prompt/completion"


def test_two_system_messages_are_refused():
    with pytest.raises(AdapterError, match=r'file:1 has a "system" column and .*; keep one'):
        read({"system": "a", "messages": [SYSTEM, USER, ANSWER]})


def test_a_prompt_of_messages_is_context_that_is_not_learned():
    row = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
    assert messages_of(row) == [USER, {**ANSWER, "weight": 0}, USER, ANSWER]


def test_prompts_of_strings_and_of_messages_are_not_mixed():
    rows = [{"prompt": [USER], "completion": [ANSWER]}, {"prompt": "a", "completion": "b"}]
    with pytest.raises(AdapterError, match="file:2 has prompt/completion columns but file:1 has"):
        read(*rows)
    with pytest.raises(AdapterError, match='file:1 has "completion" of type str; write a list'):
        read({"prompt": [USER], "completion": "b"})


def test_tools_stand_beside_the_messages_also_as_json_in_a_string():
    for tools in ([TOOL], '[{"type": "function", "function": {"name": "add", "parameters": {}}}]'):
        (row,) = read({"messages": [USER, CALL], "tools": tools}).rows
        assert row.columns["tools"] == [TOOL]
    for nothing in ("", [], None):
        (row,) = read({"messages": [USER, ANSWER], "tools": nothing}).rows
        assert "tools" not in row.columns


def test_content_may_be_null_beside_tool_calls():
    assert messages_of({"messages": [USER, {**CALL, "content": None}]}) == [USER, CALL]


def test_columns_that_are_not_read_are_named_at_most_five():
    row = {"text": "a", **{name: 1 for name in "bcdefgh"}}
    assert read(row).notes[1] == ("data: columns not read: 'b', 'c', 'd', 'e', 'f' and 2 more")


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"question": "a"}, "has columns 'question'; every row needs"),
        ({}, "has columns none"),
        ({"prompt": "a"}, "has columns 'prompt'; every row needs"),
        ({"prompt": None, "completion": "a"}, r"columns 'completion' \(null: 'prompt'\); every"),
        ({"text": "a", "messages": []}, "has columns of messages and of text; keep those of one"),
        ({"text": 3}, '"text" of type int; write a string'),
        ({"text": ""}, 'empty "text"'),
        ({"prompt": 1, "completion": "a"}, '"prompt" of type int'),
        ({"instruction": "a", "output": 1}, '"output" of type int'),
        ({"messages": []}, 'has no message in "messages"; write at least one'),
        ({"messages": "hello"}, '"messages" of type str; write a list'),
        ({"messages": ["hello"]}, '"messages", message 1, is a str; write'),
        ({"messages": [{"content": "a"}]}, 'message 1, has no "role"'),
        ({"messages": [{"role": 1, "content": "a"}]}, 'message 1, has a "role" of type int'),
        ({"messages": [USER, {"role": "assistant"}]}, 'message 2, of role "assistant" has no "co'),
        (
            {"messages": [{"role": "user", "content": 1}]},
            'of role "user" has "content" of type int',
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            'of role "user" has a content part of type "image"',
        ),
        ({"messages": [{"role": "user", "content": ["a"]}]}, 'content part of type "str"'),
        ({"messages": [{**ANSWER, "weight": 0.5}]}, '"assistant" has "weight": 0.5, .*write 1 or'),
        ({"messages": [{**ANSWER, "weight": "0"}]}, 'has "weight": "0"'),
        ({"messages": [{**USER, "weight": 1}]}, 'of role "user" has "weight": 1, but only what'),
        ({"messages": [USER, ANSWER], "tools": "["}, '"tools" that are not JSON'),
        ({"messages": [USER, ANSWER], "tools": '["\\ud83d"]'}, "has half of a surrogate pair"),
        ({"messages": [USER, ANSWER], "tools": "{}"}, '"tools" that are not objects'),
        ({"messages": [USER, ANSWER], "tools": [1]}, '"tools" that are not objects'),
        ({"messages": [USER, ANSWER], "tools": 1}, '"tools" that are not objects'),
        ({"messages": [USER, ANSWER], "system": 1}, '"system" of type int'),
        (
            {"conversations": [{"from": "narrator", "value": "a"}]},
            '"conversations", message 1, has "from": "narrator"; known are human, user, gpt',
        ),
        ({"conversations": [{"from": "gpt"}]}, 'message 1, from "gpt" has no string as "value"'),
    ],
)
def test_columns_that_cannot_be_used_are_named(columns, said):
    with pytest.raises(AdapterError, match="^file:1.* " + said):
        read(columns)


def test_mixed_rows_are_refused_with_both_lines():
    with pytest.raises(AdapterError, match="file:2 has prompt/completion .* file:1 has text"):
        read({"text": "a"}, {"prompt": "a", "completion": "b"})
