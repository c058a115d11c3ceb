"""Train the demo's base model from nothing and save it where the package ships it.

    python scripts/train_demo_base.py            # overwrites src/bridge/peft/demo/base_model

Corpus: 8,999 of the 10,000 sums of two numbers up to 99, answered in digits; the differences of the
same pairs, answered in words; the numbers 0 to 198, spelled. A sum answered in words never occurs,
nor does a held-out pair in any form. It takes about 11 minutes on one core (OMP_NUM_THREADS=1),
prints the accuracies, and is seeded: one machine gives the same weights each time.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import Progress, TextColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bridge.peft.demo.tasks import (
    MAX_NUMBER,
    Example,
    digit_examples,
    exact_match,
    number_words,
    questions,
    word_examples,
)

TARGET = Path(__file__).parents[1] / "src" / "bridge" / "peft" / "demo" / "base_model"
PAD, BEGIN, END, UNKNOWN = SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
CHARACTERS = "0123456789+=- abcdefghijklmnopqrstuvwxyz"
IGNORED = -100

Sample = tuple[list[int], list[int]]


def naming_examples() -> list[Example]:
    """Return every number spelled.

    Returns:
        199 rows such as `{"prompt": "42=", "completion": "forty-two"}`.
    """
    return [
        {"prompt": f"{number}=", "completion": number_words(number)}
        for number in range(MAX_NUMBER + 1)
    ]


def difference_examples() -> list[Example]:
    """Return differences answered in words, of the `train` pairs only.

    Returns:
        Rows such as `{"prompt": "42-17=", "completion": "twenty-five"}`; none is negative.
    """
    return [
        {"prompt": f"{a}-{b}=", "completion": number_words(a - b)}
        for a, b in questions("train")
        if a >= b
    ]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer: a number word is one token, anything else one token a character."""
    words = sorted(set(re.findall("[a-z]+", " ".join(map(number_words, range(MAX_NUMBER + 1))))))
    # the likeliest segmentation wins: one word at -1 beats its letters at -10 each
    scores = [(token, 0.0) for token in SPECIAL]
    scores += [(token, -10.0) for token in CHARACTERS] + [(token, -1.0) for token in words]
    core = Tokenizer(models.Unigram(scores, unk_id=SPECIAL.index(UNKNOWN)))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-z]+|[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, SPECIAL.index(BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=64,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a small Llama in float32, initialised from torch's global seed."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.05,
        tie_word_embeddings=False,
        dtype="float32",
        bos_token_id=SPECIAL.index(BEGIN),
        eos_token_id=SPECIAL.index(END),
        pad_token_id=SPECIAL.index(PAD),
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]]) -> list[Sample]:
    """Return token ids and labels of each row; only the completion and `</s>` are learned."""
    samples: list[Sample] = []
    for row in rows:
        prompt = tokenizer.encode(row["prompt"])
        ids = tokenizer.encode(row["prompt"] + row["completion"] + END)
        samples.append((ids, [IGNORED] * len(prompt) + ids[len(prompt) :]))
    return samples


def batch_loss(model: LlamaForCausalLM, samples: list[Sample]) -> torch.Tensor:
    """Return the summed next-token loss of right-padded samples over the count of samples."""
    longest = max(len(ids) for ids, _ in samples)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in samples])
    labels = torch.tensor([row + [IGNORED] * (longest - len(row)) for _, row in samples])
    # no attention mask: padding is on the right, where the causal mask hides it already
    logits = model(input_ids=ids).logits[:, :-1]
    total = F.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / len(samples)


def train(
    model: LlamaForCausalLM,
    draw_batch: Callable[[], list[Sample]],
    steps: int,
    learning_rate: float,
    weight_decay: float,
) -> None:
    """Train all weights with AdamW: a linear warm-up of a twentieth of the steps, then a cosine."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay
    )
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    with Progress(*Progress.get_default_columns(), TextColumn("loss {task.fields[loss]}")) as bar:
        task = bar.add_task("training", total=steps, loss="-")
        for _ in range(steps):
            loss = batch_loss(model, draw_batch())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.update(task, advance=1, loss=f"{loss.item():.4f}")


def main(
    output: Annotated[Path, typer.Option(help="Directory to write.")] = TARGET,
    steps: Annotated[int, typer.Option(min=1)] = 1400,
    sums: Annotated[int, typer.Option(min=1, help="Sums in a batch.")] = 256,
    differences: Annotated[int, typer.Option(min=1, help="Differences in a batch.")] = 128,
    names: Annotated[int, typer.Option(min=1, help="Spelled numbers in a batch.")] = 32,
    learning_rate: Annotated[float, typer.Option(min=0)] = 2e-3,
    weight_decay: Annotated[float, typer.Option(min=0)] = 0.1,
    seed: int = 0,
) -> None:
    """Train the base model, report its accuracy, save it."""
    started = time.monotonic()
    torch.manual_seed(seed)
    draw = random.Random(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    shares = (
        (sums, encode(tokenizer, digit_examples("train"))),
        (differences, encode(tokenizer, difference_examples())),
        (names, encode(tokenizer, naming_examples())),
    )

    def draw_batch() -> list[Sample]:
        return [sample for count, part in shares for sample in draw.choices(part, k=count)]

    train(model, draw_batch, steps, learning_rate, weight_decay)
    for name, rows in (
        ("sums seen in training", digit_examples("train")),
        ("held-out sums", digit_examples("held_out")),
        ("held-out sums in words", word_examples("held_out")),
        ("differences in words", difference_examples()),
        ("spelled numbers", naming_examples()),
    ):
        print(f"{name}: {exact_match(model, tokenizer, rows)[0]:.2%} exact")
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"{output}: {model.num_parameters():,} parameters, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    typer.run(main)
