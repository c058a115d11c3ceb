"""What is learned follows the very tokens that inference gives, and ends as inference ends."""

import pytest

from bridge.peft import AdapterError
from bridge.peft.finetune.data import Row, rows_of
from bridge.peft.finetune.samples import IGNORED, Sample, fit_length, remarks_of, tokenize
from bridge.peft.finetune.shapes import recognise
from tests.helpers.chat import byte_level, metaspace, word_piece
from tests.helpers.cli_fixtures import char_tokenizer


def row(**columns) -> Row:
    return Row(columns=columns, where="data:1")


def tokens(tokenizer, **columns) -> Sample:
    data = recognise([row(**columns)], has_chat_template=bool(tokenizer.chat_template))
    (sample,) = tokenize(data.rows, data.shape, tokenizer)
    return sample


def learned(tokenizer, sample: Sample) -> str:
    return tokenizer.decode([label for label in sample.labels if label != IGNORED])


def context(sample: Sample) -> list[int]:
    """What stands before the first token that is learned."""
    return sample.input_ids[: next(i for i, x in enumerate(sample.labels) if x != IGNORED)]


def test_text_is_learned_whole_and_closed_once():
    tokenizer = char_tokenizer()
    sample = tokens(tokenizer, text="ab")
    assert sample.labels == sample.input_ids
    assert tokenizer.decode(sample.input_ids) == "ab<eos>"
    assert tokens(tokenizer, text="ab<eos>").input_ids == sample.input_ids


def test_only_the_completion_is_learned():
    tokenizer = char_tokenizer()
    sample = tokens(tokenizer, prompt="1+1=", completion="2")
    assert tokenizer.decode(sample.input_ids) == "1+1=2<eos>"
    assert learned(tokenizer, sample) == "2<eos>"
    assert sample.remarks == ()


TOKENIZERS = {
    "byte level": byte_level(),
    "byte level, trimmed offsets": byte_level(trim_offsets=True),
    "byte level with BOS": byte_level(bos=True),
    "metaspace": metaspace(),
    "metaspace without BOS": metaspace(bos=False),
}
BOUNDARIES = [
    ("user: hello\nassistant:", " yes"),
    ("user: hello\nassistant: ", "yes"),
    ("user: hello\nassistant: ", " yes"),
    ("user: hello\nassi", "stant: fox"),
    ("hello ", "\n\nfox"),
    ("hello = ", "é 😀 no"),
    ("", "hello fox"),
    ("hello fox", ""),
]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(("prompt", "completion"), BOUNDARIES)
def test_the_completion_follows_the_tokens_of_the_prompt_alone(kind, prompt, completion):
    tokenizer = TOKENIZERS[kind]
    given, whole = (tokenizer(text)["input_ids"] for text in (prompt, prompt + completion))
    if not given:  # nothing is ever predicted from nothing
        given = whole[:0]
    sample = tokens(tokenizer, prompt=prompt, completion=completion)
    assert context(sample) == given
    assert sample.input_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(sample.input_ids[:-1]) == tokenizer.decode(whole)
    was_cut = sample.input_ids[:-1] != whole
    assert was_cut == any("inside a token" in remark for remark in sample.remarks)


@pytest.mark.parametrize("kind", ["byte level", "metaspace"])
def test_a_prompt_that_ends_with_a_blank_is_cut_inside_the_token_and_it_is_said(kind):
    tokenizer = TOKENIZERS[kind]
    rows = [row(prompt="hello ", completion="fox"), row(prompt="hello", completion=" fox")]
    samples = tokenize(rows, "prompt/completion", tokenizer)
    assert learned(tokenizer, samples[0]).strip() == "fox</s>"
    (remark,) = remarks_of(samples, "data")
    assert remark.startswith("data: in 1 of 2 rows an answer begins or ends inside a token")


def test_a_boundary_that_cannot_be_cut_is_learned_whole_and_it_is_said():
    tokenizer = word_piece()
    given = tokenizer("the brow")["input_ids"][:-1]  # without the [SEP] that closes it
    sample = tokens(tokenizer, prompt="the brow", completion="n fox")
    assert context(sample) != given
    assert learned(tokenizer, sample) == "brown fox [SEP]"
    assert "the tokenizer cannot cut" in sample.remarks[0]


def test_what_the_tokenizer_closes_a_lone_prompt_with_is_not_in_the_middle():
    tokenizer = word_piece()
    sample = tokens(tokenizer, prompt="hello fox", completion=" says yes")
    assert tokenizer.decode(sample.input_ids) == "[CLS] hello fox says yes [SEP]"
    assert learned(tokenizer, sample) == "says yes [SEP]"


def test_a_completion_may_end_with_the_end_token_itself():
    tokenizer = byte_level()
    sample = tokens(tokenizer, prompt="hello", completion=" fox</s>")
    assert learned(tokenizer, sample) == " fox</s>"


@pytest.mark.parametrize(
    "columns", [{"text": "<s>hello"}, {"prompt": "<s>hello", "completion": " fox"}]
)
@pytest.mark.parametrize("kind", ["byte level with BOS", "metaspace"])
def test_a_text_that_begins_with_the_bos_gets_no_second_one(kind, columns):
    tokenizer = TOKENIZERS[kind]
    sample = tokens(tokenizer, **columns)
    assert sample.input_ids.count(tokenizer.bos_token_id) == 1
    assert "begins with <s>, which the tokenizer adds too" in sample.remarks[0]


def test_without_an_end_token_samples_stay_open():
    tokenizer = char_tokenizer(eos_token=None)
    assert tokenizer.decode(tokens(tokenizer, text="ab").input_ids) == "ab"


def test_a_row_with_nothing_to_learn_is_refused():
    with pytest.raises(AdapterError, match="data:1 has no token to learn; remove the line"):
        tokens(char_tokenizer(eos_token=None), prompt="ab", completion="")


def test_remarks_are_counted_over_the_rows():
    rows = rows_of([{"text": "<s>hello"}, {"text": "<s>fox"}, {"text": "fox"}], "file")
    (line,) = remarks_of(tokenize(rows, "text", TOKENIZERS["metaspace"]), "evaluation data")
    assert line.startswith("evaluation data: in 2 of 3 rows the text begins with <s>")


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
        fit_length(samples(4, 9, 12), 8, "error", name="evaluation data")
    assert str(error.value) == (
        "evaluation data: 2 of 3 samples are longer than 8 tokens, the longest has 12 (d:3); "
        "pass --max-length 12, --on-long truncate or --on-long drop"
    )
    with pytest.raises(AdapterError, match="pass shorter samples, --on-long truncate"):
        fit_length(samples(4, 12), 8, "error", limit=8)


def test_long_samples_are_dropped_or_cut_on_request_and_it_is_said():
    kept, note = fit_length(samples(4, 9), 8, "drop")
    assert [len(s.input_ids) for s in kept] == [4]
    assert note == "data: 1 of 2 samples are longer than 8 tokens, the longest has 9: dropped"
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
