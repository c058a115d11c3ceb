"""The embedded model and its tasks are what the demo says they are."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripts.train_demo_base import difference_examples, naming_examples

from bridge.peft.demo import tasks as demo
from bridge.peft.demo.defaults import DEMO_BEFORE_AT_MOST

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(demo.base_model_dir())


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(demo.base_model_dir())


def value_of(words: str) -> int:
    """Read number words without the code under test: add up the words, multiply at "hundred"."""
    tens = "twenty thirty forty fifty sixty seventy eighty ninety".split()
    ones = (
        "zero one two three four five six seven eight nine ten eleven twelve thirteen "
        "fourteen fifteen sixteen seventeen eighteen nineteen"
    ).split()
    values = {word: 20 + 10 * i for i, word in enumerate(tens)}
    values |= {word: i for i, word in enumerate(ones)}
    total = 0
    for word in words.replace("-", " ").split():
        total = total * 100 if word == "hundred" else total + values[word]
    return total


def test_words_read_back_as_the_number_for_every_possible_sum():
    assert [value_of(demo.number_words(n)) for n in range(199)] == list(range(199))


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (42, "forty-two"),
        (100, "one hundred"),
        (101, "one hundred one"),
        (118, "one hundred eighteen"),
        (130, "one hundred thirty"),
        (198, "one hundred ninety-eight"),
    ],
)
def test_words_are_spelled_as_english_spells_them(number, words):
    assert demo.number_words(number) == words


@pytest.mark.parametrize("number", [-1, 199])
def test_a_number_no_sum_gives_is_refused(number):
    with pytest.raises(ValueError, match=f"0 to 198, got {number}"):
        demo.number_words(number)


def test_splits_are_disjoint_in_both_orders_and_cover_every_sum():
    train, held_out = set(demo.questions("train")), set(demo.questions("held_out"))
    assert not train & held_out
    assert not {(b, a) for a, b in train} & held_out
    assert train | held_out == {(a, b) for a in range(100) for b in range(100)}
    assert 900 <= len(held_out) <= 1100


@pytest.mark.parametrize("examples", [demo.digit_examples, demo.word_examples])
def test_no_held_out_prompt_is_among_the_training_prompts(examples):
    training = {row["prompt"] for row in examples("train")}
    assert not training & {row["prompt"] for row in examples("held_out")}


def test_pre_training_spells_numbers_and_differences_but_never_a_sum():
    names, differences = naming_examples(), difference_examples()
    assert len(names) == 199
    assert names[42] == {"prompt": "42=", "completion": "forty-two"}
    assert {"prompt": "42-17=", "completion": "twenty-five"} in differences
    assert all("+" not in row["prompt"] for row in names + differences)


def test_pre_training_holds_no_difference_of_a_held_out_pair():
    held_out = {f"{a}-{b}=" for a, b in demo.questions("held_out")}
    assert not held_out & {row["prompt"] for row in difference_examples()}


def test_differences_are_right_and_never_negative():
    for row in difference_examples():
        left, right = row["prompt"].rstrip("=").split("-")
        assert value_of(row["completion"]) == int(left) - int(right) >= 0


def test_both_tasks_ask_the_same_questions_and_give_the_same_sums():
    digits, words = demo.digit_examples("train", 200, 3), demo.word_examples("train", 200, 3)
    for digit_row, word_row in zip(digits, words, strict=True):
        assert digit_row["prompt"] == word_row["prompt"]
        left, right = digit_row["prompt"].rstrip("=").split("+")
        assert int(left) + int(right) == int(digit_row["completion"])
        assert value_of(word_row["completion"]) == int(left) + int(right)


def test_examples_are_fixed_by_the_seed_and_drawn_without_repetition():
    first = demo.word_examples("train", 500, 1)
    assert first == demo.word_examples("train", 500, 1)
    assert first != demo.word_examples("train", 500, 2)
    assert len({row["prompt"] for row in first}) == 500


@pytest.mark.parametrize("n", [0, -1, 10_000])
def test_more_examples_than_there_are_is_refused(n):
    with pytest.raises(ValueError, match=f"got n={n}"):
        demo.word_examples("held_out", n)


def test_an_unknown_split_is_refused_with_the_names_of_the_two():
    with pytest.raises(ValueError, match="'train' or 'held_out'"):
        demo.questions("test")  # type: ignore[arg-type]


def test_importing_the_demo_imports_no_optional_package():
    code = (
        "import sys, bridge.peft.demo.tasks; "
        "print([m for m in ('transformers', 'trl', 'datasets') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_model_directory_is_below_five_megabytes_and_holds_no_pickle():
    paths = list(demo.base_model_dir().iterdir())
    assert sum(path.stat().st_size for path in paths) < 5_000_000
    assert {path.suffix for path in paths} == {".json", ".safetensors"}


def test_a_package_without_its_model_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "files", lambda package: Path(tmp_path))
    with pytest.raises(FileNotFoundError, match="reinstall"):
        demo.base_model_dir()


def test_model_and_tokenizer_load_without_a_log_warning():
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        transformers.AutoTokenizer.from_pretrained(demo.base_model_dir())
        loaded = transformers.AutoModelForCausalLM.from_pretrained(demo.base_model_dir())
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in records] == []
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_tokenizer_round_trips_every_example(tokenizer):
    for row in demo.word_examples("held_out") + naming_examples():
        text = row["prompt"] + row["completion"]
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_digit_is_a_token_and_a_number_word_is_a_token(tokenizer):
    tokens = tokenizer.tokenize("17+25=one hundred forty-two")
    assert tokens == ["1", "7", "+", "2", "5", "=", "one", " ", "hundred", " ", "forty", "-", "two"]


def test_other_lower_case_text_is_read_letter_by_letter(tokenizer):
    assert tokenizer.tokenize("hello") == ["h", "e", "l", "l", "o"]


def test_prompt_tokens_are_a_prefix_of_prompt_completion_and_end_token(tokenizer):
    for row in demo.word_examples("held_out"):
        prompt = tokenizer(row["prompt"])["input_ids"]
        full = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        assert full[: len(prompt)] == prompt
        assert full[-1] == tokenizer.eos_token_id
        assert full.count(tokenizer.eos_token_id) == 1


def test_base_model_adds_held_out_numbers_in_digits(model, tokenizer):
    accuracy, answers = demo.exact_match(model, tokenizer, demo.digit_examples("held_out", 300))
    assert accuracy >= 0.97
    assert len(answers) == 300


def test_base_model_spells_numbers_but_never_sums(model, tokenizer):
    assert demo.exact_match(model, tokenizer, naming_examples())[0] == 1.0
    held_out = demo.word_examples("held_out", 300)
    assert demo.exact_match(model, tokenizer, held_out)[0] < DEMO_BEFORE_AT_MOST


def test_answers_do_not_depend_on_the_batch_size(model, tokenizer):
    rows = demo.digit_examples("held_out", 40) + naming_examples()[::20]
    at_once = demo.exact_match(model, tokenizer, rows)
    assert at_once == demo.exact_match(model, tokenizer, rows, batch_size=7)


def test_exact_match_counts_only_complete_answers(model, tokenizer):
    rows = [
        {"prompt": "20+22=", "completion": "42"},
        {"prompt": "20+22=", "completion": "4"},
        {"prompt": "20+22=", "completion": "42 "},
        {"prompt": "42=", "completion": "forty-two"},
    ]
    accuracy, answers = demo.exact_match(model, tokenizer, rows)
    assert answers == ["42", "42", "42", "forty-two"]
    assert accuracy == 0.5


@pytest.mark.parametrize("training", [True, False])
def test_exact_match_leaves_the_training_mode_as_it_was(model, tokenizer, training):
    model.train(training)
    demo.exact_match(model, tokenizer, demo.digit_examples("held_out", 2))
    assert model.training is training
    model.eval()


@pytest.mark.parametrize(("n", "batch_size"), [(0, 4), (2, 0)])
def test_nothing_to_answer_is_refused(model, tokenizer, n, batch_size):
    with pytest.raises(ValueError, match="nothing to answer"):
        demo.exact_match(model, tokenizer, demo.digit_examples("train", 2)[:n], batch_size)
