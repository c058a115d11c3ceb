"""Data files of every kind are read, and every problem names its file, its line and its fix."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from bridge.peft import AdapterError
from bridge.peft.finetune.data import Row, data_digest, read_rows, rows_of
from tests.helpers.cli_fixtures import write_rows

PAIRS = [{"prompt": "1+1=", "completion": "2"}, {"prompt": 'say "a,b"\n', "completion": "é"}]


def test_rows_are_read_in_order_with_their_lines(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n{"text": "\xc3\xa9"}')
    assert read_rows(path) == [
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
        (b'{"text": "half \\ud83d"}', r":2 has half of a surrogate pair, \\ud83d, in 'text'"),
        (b'{"m": [{"content": "\\ude00"}]}', r":2 has half of a surrogate pair, \\ude00, in 'm'"),
        (b'{"\\ude00": "a"}', r":2 has half of a surrogate pair, \\ude00, in '\\ude00'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, said):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(AdapterError, match=said) as error:
        read_rows(path)
    str(error.value).encode()  # what was wrong in the file is no reason that it cannot be printed


def test_a_whole_surrogate_pair_is_one_character(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00"}\n')
    assert read_rows(path)[0].columns == {"text": "😀"}


def test_a_json_array_is_read_row_by_row(tmp_path):
    path = tmp_path / "data.json"
    path.write_text("\n" + json.dumps(PAIRS, indent=2))
    rows = read_rows(path)
    assert [row.columns for row in rows] == PAIRS
    assert rows[1].where == f"{path}, row 2"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"text": "a"},\n {"text": }]', "data.json:2 is not JSON"),
        ('[{"text": "a"},\n "b"]', "data.json, row 2 is a JSON str, not an object"),
        ("[]", "data.json holds no rows"),
        ('[{"text": "\\ud83d"}]', "data.json, row 1 has half of a surrogate pair"),
    ],
)
def test_a_bad_json_array_is_named_with_its_place(tmp_path, text, said):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(AdapterError, match=said):
        read_rows(path)


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t"), ("CSV", ",")])
def test_cells_are_read_as_they_are_written(tmp_path, suffix, delimiter):
    path = tmp_path / f"data.{suffix}"
    lines = ["prompt,completion", '007,"two\nlines"', "NA,true", '"a,b",']
    written = "\n".join(lines).replace(",", delimiter) + "\n"
    path.write_text(written, encoding="utf-8-sig")
    rows = read_rows(path)
    assert [tuple(row.columns.values()) for row in rows] == [
        ("007", "two\nlines"),
        ("NA", "true"),
        (f"a{delimiter}b", ""),
    ]
    assert [row.where.rpartition(":")[2] for row in rows] == ["2", "4", "5"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["prompt,completion", "a,b", "a,b,c"], ":3 has 3 cells but the header has 2"),
        (["prompt,prompt", "a,b"], ":1 names column 'prompt' twice"),
        (["text", 'a"', '"b'], r":3 is not CSV \(.*\); close every quoted cell"),
        (["text"], "holds no rows"),
    ],
)
def test_a_bad_table_is_named_with_its_line(tmp_path, lines, said):
    path = tmp_path / "data.csv"
    path.write_text("\n".join(lines))
    with pytest.raises(AdapterError, match=said):
        read_rows(path)


def test_a_table_that_is_not_utf_8_is_named_with_its_line(tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes(b"text\ngood\n\xe9\n")
    with pytest.raises(AdapterError, match="data.csv:3 is not UTF-8"):
        read_rows(path)


def test_a_document_longer_than_the_csv_readers_own_limit_is_read(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("text\n" + "a" * 200_000 + "\n")
    assert len(read_rows(path)[0].columns["text"]) == 200_000


def test_parquet_gives_the_rows_that_were_written(tmp_path):
    path = tmp_path / "data.parquet"
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    chats = [
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}],
        [{"role": "user", "content": "1"}, {"role": "assistant", "tool_calls": [call]}],
    ]
    table = pyarrow.Table.from_pylist([{"messages": chat} for chat in chats])
    pyarrow.parquet.write_table(table, path)
    rows = read_rows(path)
    # a column has all the keys of all its rows: those without a value are not there
    assert [row.columns["messages"] for row in rows] == chats
    assert rows[1].where == f"{path}, row 2"


def test_a_file_that_is_not_parquet_is_refused(tmp_path):
    path = tmp_path / "data.parquet"
    path.write_text("text")
    with pytest.raises(AdapterError, match=r"data.parquet is not Parquet \(.*\); write"):
        read_rows(path)


def test_no_file_and_no_rows_are_refused(tmp_path):
    with pytest.raises(AdapterError, match="no data file .*; pass a JSONL, JSON.* with --data"):
        read_rows(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(AdapterError, match="holds no rows"):
        read_rows(tmp_path / "empty.jsonl")


def test_rows_of_the_evaluation_data_say_so(tmp_path):
    path = write_rows(tmp_path / "data.jsonl", PAIRS)
    assert read_rows(path, evaluation=True)[1].where == f"evaluation data {path}:2"
    path.write_text("nonsense")
    with pytest.raises(AdapterError, match="^evaluation data .*data.jsonl:1 is not JSON"):
        read_rows(path, evaluation=True)


def test_digest_ignores_how_the_file_is_written(tmp_path):
    one = write_rows(tmp_path / "a.jsonl", [{"prompt": "1", "completion": "2"}])
    other = tmp_path / "b.jsonl"
    other.write_text('\n{"completion":  "2", "prompt": "1"}\n')
    assert data_digest(read_rows(one)) == data_digest(read_rows(other))
    assert data_digest(read_rows(one)) != data_digest(rows_of([{"text": "1"}], "x"))


def test_rows_of_examples_are_named_after_their_source():
    (one,) = rows_of([{"text": "a"}], "demo")
    assert (one.where, json.dumps(one.columns)) == ("demo:1", '{"text": "a"}')
