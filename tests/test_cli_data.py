"""Training data is read line by line, and every problem names its line and its mend."""

import json

import pytest

from bridge.peft import AdapterError
from bridge.peft.finetune.data import Row, data_digest, read_jsonl, rows_of, shape_of
from bridge.peft.finetune.samples import IGNORED, Sample, fit_length, tokenize
from tests.helpers.cli_fixtures import TEMPLATE, UNMARKED_TEMPLATE, char_tokenizer, write_rows


def row(**columns) -> Row:
    return Row(columns=columns, where="data:1")


def tokens(*rows: Row, template: str | None = None, **more):
    tokenizer = char_tokenizer(**more)
    tokenizer.chat_template = UNMARKED_TEMPLATE
    return tokenizer, tokenize(rows, shape_of(rows), tokenizer, template)


def learned(tokenizer, sample: Sample) -> str:
    return tokenizer.decode([label for label in sample.labels if label != IGNORED])


def test_rows_are_read_in_order_with_their_lines(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n{"text": "\xc3\xa9"}')
    assert read_jsonl(path) == [
        Row(columns={"text": "a"}, where=f"{path}:1"),
        Row(columns={"text": "é"}, where=f"{path}:3"),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{'text': 1}", r":2 is not JSON \(.*column 2\); write one JSON object a line"),
        (b'{"text": "cut",', r":2 is not JSON \(.*column 16\)"),
        (b'{"text": "\xff"}', ":2 is not UTF-8"),
        (b"[1]", ":2 is a JSON list, not an object"),
        (b"[" * 100_000, ":2 is n"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, said):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(AdapterError, match=said):
        read_jsonl(path)


def test_no_file_and_no_rows_are_refused(tmp_path):
    with pytest.raises(AdapterError, match="no data file .*; pass a JSONL file with --data"):
        read_jsonl(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(AdapterError, match="holds no rows"):
        read_jsonl(tmp_path / "empty.jsonl")


def test_digest_ignores_how_the_file_is_written(tmp_path):
    one = write_rows(tmp_path / "a.jsonl", [{"prompt": "1", "completion": "2"}])
    other = tmp_path / "b.jsonl"
    other.write_text('\n{"completion":  "2", "prompt": "1"}\n')
    assert data_digest(read_jsonl(one)) == data_digest(read_jsonl(other))
    assert data_digest(read_jsonl(one)) != data_digest(rows_of([{"text": "1"}], "x"))


@pytest.mark.parametrize(
    ("columns", "shape"),
    [
        ({"text": "a"}, "text"),
        ({"prompt": "a", "completion": "", "id": 3}, "prompt/completion"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages"),
    ],
)
def test_three_shapes_are_known(columns, shape):
    assert shape_of([row(**columns)]) == shape


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"question": "a"}, "has columns 'question'; every row needs"),
        ({}, "has columns none"),
        ({"prompt": "a"}, "has columns 'prompt'; every row needs"),
        ({"text": "a", "messages": []}, "has columns of messages and text; keep only"),
        ({"text": 3}, '"text" of type int; write a string'),
        ({"text": ""}, 'empty "text"'),
        ({"prompt": None, "completion": "a"}, '"prompt" of type NoneType'),
        ({"messages": []}, "write at least one such message"),
        ({"messages": [{"role": "user"}]}, "write at least one such message"),
        ({"messages": "hello"}, "write at least one such message"),
    ],
)
def test_columns_that_cannot_be_used_are_named(columns, said):
    with pytest.raises(AdapterError, match="data:1 .*" + said):
        shape_of([row(**columns)])


def test_mixed_rows_are_refused_with_both_lines():
    rows = rows_of([{"text": "a"}, {"prompt": "a", "completion": "b"}], "file")
    with pytest.raises(AdapterError, match="file:2 has prompt/completion .* file:1 has text"):
        shape_of(rows)


def test_text_is_learned_whole_and_closed_once():
    tokenizer, (sample,) = tokens(row(text="ab"))
    assert sample.labels == sample.input_ids
    assert tokenizer.decode(sample.input_ids) == "ab<eos>"
    _, (closed,) = tokens(row(text="ab<eos>"))
    assert closed.input_ids == sample.input_ids


def test_only_the_completion_is_learned():
    tokenizer, (sample,) = tokens(row(prompt="1+1=", completion="2"))
    assert tokenizer.decode(sample.input_ids) == "1+1=2<eos>"
    assert learned(tokenizer, sample) == "2<eos>"


def test_completion_starts_where_prompt_and_whole_first_differ():
    tokenizer = char_tokenizer()
    tokenizer.add_tokens(["=2"])  # joins the end of the prompt to the completion
    (sample,) = tokenize([row(prompt="1+1=", completion="2")], "prompt/completion", tokenizer)
    assert learned(tokenizer, sample) == "=2<eos>"


def test_without_an_end_token_samples_stay_open():
    tokenizer, (sample,) = tokens(row(text="ab"), eos_token=None)
    assert tokenizer.decode(sample.input_ids) == "ab"


def chat() -> Row:
    return row(
        messages=[
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "so"},
            {"role": "assistant", "content": "no"},
        ]
    )


def test_only_what_the_assistant_said_is_learned_where_the_template_marks_it():
    tokenizer, (sample,) = tokens(chat(), template=TEMPLATE)
    assert learned(tokenizer, sample) == "yes<eos>no<eos>"


def test_an_unmarked_template_is_learned_whole():
    tokenizer, (sample,) = tokens(chat())
    assert sample.labels == sample.input_ids
    assert tokenizer.decode(sample.input_ids).startswith("user:hi\nassistant:yes\n")


def test_messages_the_template_refuses_are_named():
    template = "{{ raise_exception('roles must alternate') }}{% generation %}{% endgeneration %}"
    with pytest.raises(AdapterError, match=r"data:1 does not fit .*roles must alternate"):
        tokens(chat(), template=template)


def test_a_row_with_nothing_to_learn_is_refused():
    with pytest.raises(AdapterError, match="data:1 has no token to learn; remove the line"):
        tokens(row(messages=[{"role": "user", "content": "hi"}]), template=TEMPLATE)


def samples(*lengths: int) -> list[Sample]:
    return [
        Sample(input_ids=[1] * n, labels=[IGNORED] * (n // 2) + [1] * (n - n // 2), where=f"d:{i}")
        for i, n in enumerate(lengths, start=1)
    ]


def test_short_samples_pass_without_a_word():
    given = samples(4, 8)
    assert fit_length(given, 8, "error") == (given, None)


def test_long_samples_are_an_error_that_counts_them_and_names_the_longest():
    with pytest.raises(AdapterError) as error:
        fit_length(samples(4, 9, 12), 8, "error")
    assert str(error.value) == (
        "2 of 3 samples are longer than 8 tokens, the longest has 12 (d:3); "
        "pass --max-length 12, --on-long truncate or --on-long drop"
    )
    with pytest.raises(AdapterError, match="pass shorter samples, --on-long truncate"):
        fit_length(samples(4, 12), 8, "error", limit=8)


def test_long_samples_are_dropped_or_cut_on_request_and_it_is_said():
    kept, note = fit_length(samples(4, 9), 8, "drop")
    assert [len(s.input_ids) for s in kept] == [4]
    assert note == "1 of 2 samples are longer than 8 tokens, the longest has 9: dropped"
    kept, note = fit_length(samples(4, 9), 8, "truncate")
    assert [len(s.input_ids) for s in kept] == [4, 8] and note is not None
    assert note.endswith(": cut")


def test_samples_cut_to_their_prompt_are_dropped_and_counted():
    kept, note = fit_length(samples(4, 40), 8, "truncate")
    assert [len(s.input_ids) for s in kept] == [4]
    assert note is not None and "1 of them lost every token to learn and were dropped" in note


@pytest.mark.parametrize("on_long", ["drop", "truncate"])
def test_nothing_left_is_an_error(on_long):
    with pytest.raises(AdapterError, match="none would be left; pass --max-length 40"):
        fit_length(samples(40), 8, on_long)


def test_rows_of_examples_are_named_after_their_source():
    (one,) = rows_of([{"text": "a"}], "demo")
    assert (one.where, json.dumps(one.columns)) == ("demo:1", '{"text": "a"}')
