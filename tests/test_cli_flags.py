"""Flags come from dataclass fields: their names, help, defaults and parsing."""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import pytest
import torch
import typer

from bridge.peft import AdapterError, LoRA
from bridge.peft.cli.flags import takes_fields_of
from bridge.peft.dtypes import parse_dtype
from bridge.peft.finetune.options import TrainingOptions

LORA_FLAGS = [
    "--target-modules",
    "--target-parameters",
    "--exclude-modules",
    "--dim",
    "--alpha",
    "--dropout",
    "--dropout-position",
    "--lora-a-init-method",
    "--lora-dtype",
    "--rank-pattern",
    "--alpha-pattern",
    "--use-rslora",
    "--use-dora",
    "--freeze-a",
    "--modules-to-train",
    "--trainable-tokens",
    "--parts",
]
LAYOUT_FLAGS = [
    "--world",
    "--tokens",
    "--tp",
    "--fsdp",
    "--sequence-parallel",
    "--checkpointing",
    "--optimizer",
]
TRAINING_FLAGS = [
    "--learning-rate",
    "--schedule",
    "--warmup",
    "--weight-decay",
    "--lora-plus-ratio",
    "--max-grad-norm",
    "--epochs",
    "--steps",
    "--batch-size",
    "--gradient-accumulation",
    "--max-length",
    "--on-long",
    "--dtype",
    "--quantize",
    "--seed",
    "--gradient-checkpointing",
    "--eval-share",
    "--eval-every",
    "--save-every",
    "--log-every",
    "--keep-checkpoints",
    "--parallel",
    "--timeout",
]
FINETUNE_FLAGS = [
    "--model",
    "--data",
    "--eval-data",
    "--output",
    "--resume",
    "--overwrite",
    "--dry-run",
]


def names_of(command: str) -> list[str]:
    """The flags as they are parsed; a flag that can be switched off has two."""
    alone = typer.Typer(add_completion=False)
    alone.command()(import_module(f"bridge.peft.cli.{command}").command)
    parameters = typer.main.get_command(alone).params
    return [name for p in parameters for name in [*p.opts, *p.secondary_opts]]


def test_flags_of_finetune_are_frozen():
    assert names_of("finetune") == FINETUNE_FLAGS + LORA_FLAGS + TRAINING_FLAGS


def test_flags_of_plan_are_frozen():
    assert names_of("plan") == ["--model", "--dtype", "--json", *LORA_FLAGS, *LAYOUT_FLAGS]


def helps_of(group: type) -> dict[str, str]:
    """The help of each flag, by field."""

    @takes_fields_of(group=group)
    def command(*, group: dict) -> None: ...

    parameters = inspect.signature(command).parameters
    return {name: p.annotation.__metadata__[0].help for name, p in parameters.items()}


@pytest.mark.parametrize("group", [LoRA, TrainingOptions])
def test_every_flag_has_a_help_and_shows_its_default(group):
    helps = helps_of(group)
    for field in dataclasses.fields(group):
        assert helps[field.name].endswith(".") and len(helps[field.name]) > 10
        if field.default not in (None, False, (), dataclasses.MISSING):
            assert f"(default {field.default})" in helps[field.name]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A dataclass of every kind of field.

    Attributes:
        names: Documented in the class,
            over two lines.
        ratio: A number.

    Raises:
        ValueError: never.
    """

    names: str | Sequence[str] = "all-linear"
    ratio: float = 0.5
    count: int | None = None
    word: Literal["a", "b"] = "a"
    kind: torch.dtype | None = None
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    on: bool = True
    off: bool = False


def run_with(**words):
    @takes_fields_of(group=Sample)
    def command(*, group: dict) -> dict:
        return group

    given = dict.fromkeys(inspect.signature(command).parameters)
    return command(**{**given, **words})


def test_flags_that_are_not_given_stay_out():
    assert run_with() == {}


def test_words_become_the_values_of_the_fields():
    assert run_with(names=["q_proj, v_proj", "re:a{1,2}"]) == {
        "names": ["q_proj", "v_proj", "re:a{1,2}"]
    }
    assert run_with(names=["all-linear"]) == {"names": "all-linear"}
    assert run_with(kind="bfloat16") == {"kind": torch.bfloat16}
    assert run_with(numbers=["q=16", "re:x=2=1.5"]) == {"numbers": {"q": 16, "re:x=2": 1.5}}
    assert run_with(on=False, off=True, word="b", count=3, ratio=1.0) == {
        "on": False,
        "off": True,
        "word": "b",
        "count": 3,
        "ratio": 1.0,
    }


@pytest.mark.parametrize("word", ["q", "=3", "q=", "q=x"])
def test_a_pattern_without_a_number_is_refused(word):
    with pytest.raises(AdapterError, match="is not PATTERN=NUMBER"):
        run_with(numbers=[word])


def test_unknown_dtype_is_refused_with_the_known_ones():
    with pytest.raises(AdapterError, match="unknown dtype 'int8'; pass one of float32, bfloat16"):
        parse_dtype("int8")


def test_help_comes_from_the_docstring_of_the_class():
    helps = helps_of(Sample)
    assert helps["names"] == "Documented in the class, over two lines (default all-linear)."
    assert helps["ratio"] == "A number (default 0.5)."


def test_a_field_of_unknown_type_is_our_mistake():
    @dataclass
    class Odd:
        field: complex = 1j

    with pytest.raises(TypeError, match="no flag for field field"):
        helps_of(Odd)


def recipe_with(**words):
    @takes_fields_of(group=LoRA)
    def command(*, group: dict) -> dict:
        return group

    given = dict.fromkeys(inspect.signature(command).parameters)
    return command(**{**given, **words})


def test_lists_for_modules_are_read_from_words():
    assert recipe_with(trainable_tokens=["5,6"]) == {"trainable_tokens": [5, 6]}
    named = recipe_with(trainable_tokens=["wte=5", "wpe=1,2"], parts=["c_attn=q,v"])
    assert named["trainable_tokens"] == {"wte": [5], "wpe": [1, 2]}
    assert named["parts"] == {"c_attn": ["q", "v"]}
    assert recipe_with(parts=["qkv=0:8,16:24"]) == {"parts": {"qkv": [(0, 8), (16, 24)]}}


def test_a_list_of_which_a_part_is_named_is_refused():
    with pytest.raises(AdapterError, match="for some items only"):
        recipe_with(trainable_tokens=["wte=5", "6"])
