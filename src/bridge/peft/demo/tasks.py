"""The demo's two tasks: the same sums, answered in digits or in words.

Pre-training teaches the base model three things: sums in digits (`17+25=` gives `42`), differences
in words (`42-17=` gives `twenty-five`), and to spell a number (`42=` gives `forty-two`). So it can
add and it can spell, but it never saw a sum answered in words. That is what LoRA teaches:
`17+25=` gives `forty-two`.

Pairs of numbers are split once, whatever their order: a held-out pair is in no form part of
pre-training, nor of what LoRA learns from.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from importlib.resources import files
from itertools import combinations_with_replacement
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Split = Literal["train", "held_out"]
Example = dict[str, str]

MAX_ADDEND = 99
MAX_NUMBER = 2 * MAX_ADDEND
HELD_OUT_SHARE = 0.1

# another seed moves pairs of pre-training into the held-out set: then retrain the base model
_SPLIT_SEED = 0
_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_LONGEST_ANSWER = len("one hundred seventy-seven")


def base_model_dir() -> Path:
    """Return the directory of the embedded base model, as `from_pretrained` wants it."""
    directory = Path(str(files("bridge.peft.demo").joinpath("base_model")))
    if not (directory / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"no demo model in {directory}; reinstall bridge-peft or run scripts/train_demo_base.py"
        )
    return directory


def number_words(number: int) -> str:
    """Spell a number of 0 to 198 in English, for instance `one hundred forty-two`."""
    if not 0 <= number <= MAX_NUMBER:
        raise ValueError(f"can spell 0 to {MAX_NUMBER}, got {number}; pass a smaller number")
    if number >= 100:
        rest = number - 100
        return "one hundred" + (f" {number_words(rest)}" if rest else "")
    if number < 20:
        return _ONES[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")


def questions(split: Split) -> list[tuple[int, int]]:
    """Return every pair of addends of one split, sorted; `a+b` and `b+a` share a split."""
    if split not in ("train", "held_out"):
        raise ValueError(f"unknown split {split!r}; choose 'train' or 'held_out'")
    unordered = list(combinations_with_replacement(range(MAX_ADDEND + 1), 2))
    random.Random(_SPLIT_SEED).shuffle(unordered)
    cut = round(HELD_OUT_SHARE * len(unordered))
    chosen = unordered[:cut] if split == "held_out" else unordered[cut:]
    return sorted({pair for a, b in chosen for pair in ((a, b), (b, a))})


def digit_examples(split: Split, n: int | None = None, seed: int = 0) -> list[Example]:
    """Return sums answered in digits, the task the base model was pre-trained on.

    Args:
        split: `train` (seen in pre-training) or `held_out` (never seen).
        n: how many, drawn without repetition; None gives all of the split.
        seed: the order and choice of questions.

    Raises:
        ValueError: an unknown split, or an `n` below 1 or above the size of the split.
    """
    return _examples(split, n, seed, str)


def word_examples(split: Split, n: int | None = None, seed: int = 0) -> list[Example]:
    """Return the same questions answered in words, the task to learn with LoRA."""
    return _examples(split, n, seed, number_words)


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int = 512,
) -> tuple[float, list[str]]:
    """Answer the prompts greedily; the share of right answers in 0..1, and the answers.

    The model's training mode is restored afterwards.

    Raises:
        ValueError: there are no examples or the batch size is below 1.
    """
    if not examples or batch_size < 1:
        raise ValueError(
            f"nothing to answer: {len(examples)} examples in batches of {batch_size}; "
            "pass at least one example and batch_size >= 1"
        )
    was_training = model.training
    model.eval()
    try:
        answers: list[str] = []
        for start in range(0, len(examples), batch_size):
            prompts = [row["prompt"] for row in examples[start : start + batch_size]]
            answers += _answer(model, tokenizer, prompts)
    finally:
        model.train(was_training)
    right = sum(answer == row["completion"] for answer, row in zip(answers, examples, strict=True))
    return right / len(examples), answers


def _examples(split: Split, n: int | None, seed: int, spell: Callable[[int], str]) -> list[Example]:
    pairs = questions(split)
    count = len(pairs) if n is None else n
    if not 1 <= count <= len(pairs):
        raise ValueError(f"the {split} split has {len(pairs)} questions, got n={n}")
    chosen = random.Random(seed).sample(pairs, count)
    return [{"prompt": f"{a}+{b}=", "completion": spell(a + b)} for a, b in chosen]


def _answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]
) -> list[str]:
    # left padding: every row's next token is at the same position
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    inputs = inputs.to(model.device)
    generate = cast("Callable[..., torch.Tensor]", model.generate)
    with torch.no_grad():
        output = generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=_LONGEST_ANSWER + 1,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    completions = output[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(completions, skip_special_tokens=True)
