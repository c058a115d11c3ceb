"""The package as a whole: its names, and what importing it costs."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import bridge.peft

NAMES = {
    "AdapterError", "AdapterWrapper", "LinearAdapter", "LoRA", "LoRALinear", "TELinearAdapter",
    "adapter_state_dict", "disable_adapters", "load_adapter", "merge", "optimizer_groups",
    "patch_linear_module", "save_adapter", "unmerge",
}  # fmt: skip


def test_the_public_names_are_frozen_and_documented():
    assert set(bridge.peft.__all__) == NAMES
    assert set(dir(bridge.peft)) >= NAMES
    for name in NAMES:
        assert getattr(bridge.peft, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = bridge.peft.nonsense


def test_a_name_is_the_function_whatever_was_imported_before():
    code = "import bridge.peft.merging, bridge.peft.lora; from bridge.peft import merge, LoRA; "
    code += "assert callable(merge) and callable(LoRA)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_core_imports_no_optional_package_and_no_more_than_torch():
    code = """
import sys, time, torch
start = time.perf_counter()
from bridge.peft import *
seconds = time.perf_counter() - start
extra = {"transformers", "peft", "trl", "rich", "typer", "numpy.testing", "bitsandbytes",
         "torch.distributed.tensor", "matplotlib"} & set(sys.modules)
print(seconds, extra)
assert not extra, extra
"""
    command = [sys.executable, "-c", code]
    answers = [
        subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for _ in range(3)  # one of them undisturbed
    ]
    assert min(float(answer.split()[0]) for answer in answers) < 0.5


def test_bridge_stays_a_namespace_package():
    assert not hasattr(sys.modules["bridge"], "__file__") or sys.modules["bridge"].__file__ is None


def test_the_docstring_example_of_patching_holds():
    layer = bridge.peft.patch_linear_module(nn.Linear(64, 64), dim=4)
    assert sorted(layer.state_dict()) == ["bias", "lora_a.weight", "lora_b.weight", "weight"]
    assert torch.is_tensor(layer(torch.ones(64)))
