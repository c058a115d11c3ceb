"""Hostile and damaged tensor files of adapters: refused in clear words, the model untouched."""

from __future__ import annotations

import json
import re

import pytest
import safetensors.torch as st
import torch

from bridge.peft.formats.files.safetensors_file import serialize
from tests.helpers.formats_tiny import CONFIG, TENSORS, A, refused, set_tensors, tiny_adapter


@pytest.fixture
def directory(tmp_path):
    return tiny_adapter(tmp_path / "adapter")


def _header(directory, change):
    content = (directory / TENSORS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    text, data = content[8 : 8 + size].decode(), content[8 + size :]
    new = change(text).encode()
    (directory / TENSORS).write_bytes(len(new).to_bytes(8, "little") + new + data)


def _entry(text, **fields):
    header = json.loads(text)
    header[A].update(fields)
    return json.dumps(header)


HEADERS = {
    "no json": lambda text: text.rstrip()[:-5],
    "a list": lambda text: "[]",
    "a key twice": lambda text: text.rstrip()[:-1] + f',"{A}":' + "{}}",
    "no shape": lambda text: text.replace('"shape"', '"shapes"', 1),
    "an integer dtype": lambda text: _entry(text, dtype="I32"),
    "a strange dtype": lambda text: _entry(text, dtype="F7"),
    "a dtype with a control character": lambda text: _entry(text, dtype="F3\x7f"),
    "a wider dtype": lambda text: _entry(text, dtype="F64"),
    "a larger shape": lambda text: _entry(text, shape=[200, 400]),
    "a negative shape": lambda text: _entry(text, shape=[-2, -4]),
    "a huge empty shape": lambda text: _entry(text, shape=[0, 2**62], data_offsets=[0, 0]),
    "offsets beyond the file": lambda text: _entry(text, data_offsets=[10**9, 10**9 + 32]),
    "offsets that overlap": lambda text: _entry(text, data_offsets=[4, 36]),
}


@pytest.mark.parametrize("name", HEADERS)
def test_damaged_headers_are_refused(directory, name):
    _header(directory, HEADERS[name])
    refused(directory, "adapter_model.safetensors")


def test_a_header_that_claims_ten_gigabytes_is_refused_unread(directory):
    content = (directory / TENSORS).read_bytes()
    (directory / TENSORS).write_bytes((10**10).to_bytes(8, "little") + content[8:])
    refused(directory, "its header claims 10,000,000,000 bytes")


@pytest.mark.parametrize("size", [0, 5, 8, 100, -1, -100])
def test_truncated_files_are_refused(directory, size):
    content = (directory / TENSORS).read_bytes()
    (directory / TENSORS).write_bytes(content[:size])
    refused(directory, "is damaged")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(directory, value):
    tensor = torch.ones(2, 4)
    tensor[1, 2] = value
    set_tensors(directory, base_model__model__first__lora_A__weight=tensor)
    refused(directory, "lora_A.weight holds NaN or inf")


TENSOR_CHANGES = {
    "A of another width": ("first__lora_A", torch.ones(2, 5), "first is 3×4"),
    "A of another rank": ("first__lora_A", torch.ones(3, 4), "not of one rank"),
    "A of three dimensions": ("first__lora_A", torch.ones(2, 4, 1), "is not a matrix"),
    "B of another height": ("second__lora_B", torch.ones(5, 2), "second is 2×3"),
    "no B": ("second__lora_B", None, "only the A of second"),
    "a magnitude": ("second__lora_magnitude_vector", torch.ones(2), "a magnitude for second"),
    "a magnitude of nothing": ("x__lora_magnitude_vector", torch.ones(2), "not a name in an"),
    "a strange module": ("third__lora_A", torch.ones(2, 2), "only the A of third"),
    "a weight of another shape": (
        "second",
        torch.ones(2),
        r"second.weight is \(2, 3\) in the model",
    ),
    "a lora of nothing": ("second__lora_C", torch.ones(2), "not a name in an adapter"),
}


@pytest.mark.parametrize("name", TENSOR_CHANGES)
def test_tensors_that_do_not_fit_are_refused(directory, name):
    key, tensor, words = TENSOR_CHANGES[name]
    set_tensors(directory, **{f"base_model__model__{key}__weight": tensor})
    refused(directory, words)


def test_keys_with_and_without_the_prefix_are_refused(directory):
    set_tensors(directory, first__lora_A__weight=torch.ones(2, 4))
    refused(directory, "not a name below")


def test_keys_with_control_characters_are_refused_and_not_printed(directory):
    set_tensors(directory, **{"base_model__model__\x1b[2J\n__lora_A__weight": torch.ones(2, 4)})
    refused(directory, re.escape(r"\x1b[2J\n"))


def test_our_files_are_byte_for_byte_those_of_safetensors():
    tensors = {
        "b": torch.randn(5, 2).to(torch.bfloat16).t(),
        "a": torch.randn(3, 4),
        "d": torch.randn(2, dtype=torch.float64),
        "c": torch.zeros(0, 3),
        'ü"': torch.ones(2).half(),
    }
    whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
    assert serialize(tensors) == st.save(whole, metadata={"format": "pt"})


def test_files_that_cannot_be_read_are_told(directory, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("builtins.open", fail)
    refused(directory, f"cannot read .*{CONFIG}: Input/output error")


def test_a_file_larger_than_memory_is_told(directory, monkeypatch):
    real = open

    class Huge:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def read(self, size=-1):
            if size < 0:
                raise MemoryError
            return self.file.read(size)

    monkeypatch.setattr(
        "builtins.open",
        lambda path, *a: Huge(real(path, *a)) if str(path).endswith(TENSORS) else real(path, *a),
    )
    refused(directory, "cannot read .*not enough memory")


def test_a_huge_config_is_refused(directory):
    (directory / CONFIG).write_bytes(b" " * 17_000_000)
    refused(directory, "larger than 16,000,000 bytes")
