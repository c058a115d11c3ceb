"""Mutated adapter directories: an `AdapterError` or a load, never anything else, never a hang.

The number of cases comes from BRIDGE_PEFT_FUZZ_CASES; a failure names the case, which is all that
is needed to see it again.
"""

from __future__ import annotations

import copy
import os
import shutil
import time
import traceback
import warnings
from random import Random

import pytest
import torch
from torch import nn

from bridge.peft import LoRA, adapter_state_dict, load_adapter, save_adapter
from bridge.peft.errors import AdapterError
from bridge.peft.formats.convert.adapters import convert_adapter
from tests.helpers.formats_llama import LAYOUT, adapted
from tests.helpers.formats_mutations import mutate

CASES = int(os.environ.get("BRIDGE_PEFT_FUZZ_CASES", "2000"))
MAX_SECONDS = 5.0


def tiny_model():
    torch.manual_seed(0)
    layers = {"first": nn.Linear(4, 3), "second": nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))}
    return nn.ModuleDict(layers)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """One adapter in PEFT's files, one in Megatron's."""
    model = LoRA(dim=2, rank_pattern={"first": 1}, dropout=0.1)(tiny_model())
    model["second"][1].bias.requires_grad_(True)
    for tensor in adapter_state_dict(model).values():
        tensor.normal_()
    home = tmp_path_factory.mktemp("adapters")
    save_adapter(model, home / "peft")
    save_adapter(adapted(target_modules=["q_proj", "v_proj"]), home / "llama")
    convert_adapter(home / "llama", "megatron", home / "megatron", layout=LAYOUT)
    return home


def untouched(model, base):
    same = [torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True)]
    return (
        all(same)
        and all(p.requires_grad for p in model.parameters())
        and [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    )


def run_case(number, adapters, directory, base):
    """None, or what went wrong."""
    random = Random(f"case {number}")
    is_peft = random.random() < 0.8
    shutil.copytree(adapters / ("peft" if is_peft else "megatron"), directory / "in")
    what = mutate(directory / "in", random)
    model = copy.deepcopy(base)
    start = time.perf_counter()
    refused = True
    try:
        if is_peft:
            load_adapter(model, directory / "in")
        else:
            convert_adapter(directory / "in", "peft", directory / "out")
        refused = False
    except AdapterError as error:
        if "\n" in str(error) or not str(error).isprintable():
            return f"{number} ({what}): the message is not one printable line: {error!r}"
    except BaseException:
        return f"{number} ({what}): {traceback.format_exc()}"
    seconds = time.perf_counter() - start
    if seconds > MAX_SECONDS:
        return f"{number} ({what}): took {seconds:.1f} s"
    if refused and not untouched(model, base):
        return f"{number} ({what}): refused, and the model was touched"
    if refused and (directory / "out").exists():
        return f"{number} ({what}): refused, and something was written"
    return None


@pytest.mark.timeout(3600)
def test_mutated_directories_load_or_are_refused_cleanly(adapters, tmp_path):
    base = tiny_model()
    failures = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # another base is only told
        for number in range(CASES):
            directory = tmp_path / "case"
            directory.mkdir()
            if failure := run_case(number, adapters, directory, base):
                failures.append(failure)
            shutil.rmtree(directory)
            if len(failures) >= 5:
                break
    assert not failures, "\n".join(failures)
