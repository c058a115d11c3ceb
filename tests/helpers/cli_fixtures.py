"""A tiny model with a character tokenizer, data files, and the command run in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bridge.peft.cli import main

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<eos>{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}\n"
    "{% endfor %}"
)
UNMARKED_TEMPLATE = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}"


@contextmanager
def one_thread() -> Iterator[None]:
    """Quicker for tiny models, and sums in parallel would depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def char_tokenizer(**more: Any) -> PreTrainedTokenizerFast:
    vocabulary = {c: i for i, c in enumerate([*SPECIAL, *map(chr, range(32, 127)), "\n"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", **more}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def save_tiny_model(path: Path, *, seed: int = 0, template: str | None = None, **more: Any) -> Path:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 100,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            **more,
        }
    )
    transformers.utils.logging.disable_progress_bar()  # tests read what the command prints
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    transformers.utils.logging.enable_progress_bar()
    return path


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sums(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{i % 7}+{i % 5}=", "completion": str(i % 7 + i % 5)} for i in range(count)]


def finetune(*arguments: object) -> int:
    return main(["finetune", *map(str, arguments)])


def files_in(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def refused(capsys: Any, output: Path, *arguments: object) -> str:
    """Run, expect a refusal that leaves `output` as it was, and return its line."""
    before = files_in(output) if output.is_dir() else None
    capsys.readouterr()
    assert finetune("--output", output, *arguments) == 2
    printed = capsys.readouterr()
    assert (files_in(output) if output.is_dir() else None) == before
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert ";" in printed.err or "?" in printed.err or "See: " in printed.err  # the fix
    return printed.err
