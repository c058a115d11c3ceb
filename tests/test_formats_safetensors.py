"""Safetensors files: headers as the library reads them, and only bytes that are values."""

from __future__ import annotations

import pytest
import torch
from safetensors import torch as st
from torch import Tensor

from bridge.peft.errors import AdapterError
from bridge.peft.formats.files.safetensors_file import (
    Entry,
    header_bytes,
    read_header,
    read_tensors,
    serialize,
)


def test_headers_are_written_as_safetensors_reads_them(tmp_path):
    entries = (Entry("b", "F32", (2,), 0, 8), Entry("ä", "I64", (), 8, 16))
    path = tmp_path / "x.safetensors"
    path.write_bytes(header_bytes(entries, {}) + bytes(16))
    assert st.load_file(path).keys() == {"b", "ä"}
    assert len(header_bytes(entries, {})) % 8 == 0
    with open(path, "rb") as file:
        header = read_header(path, file)
    assert (header.entries, header.metadata) == (entries, {"format": "pt"})


def test_what_is_written_is_read_and_is_the_same_every_time(tmp_path):
    shared = torch.randn(4, 6)
    tensors = {"b": shared.t(), "a": shared[1], "c": shared.bfloat16(), "none": torch.zeros(0, 3)}
    (tmp_path / "x").write_bytes(serialize(tensors))
    read = read_tensors(tmp_path / "x")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[key], tensor) for key, tensor in tensors.items())
    assert serialize(dict(reversed(tensors.items()))) == serialize(tensors)


class _Wrapper(Tensor):
    """A tensor whose memory is not its values, as sharded and quantised ones are."""


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.ones(3).as_subclass(_Wrapper), "it is a _Wrapper of torch.float32"),
        (torch.nn.Parameter(torch.ones(3).as_subclass(_Wrapper)), "it is a _Wrapper"),
        (torch.ones(3).to_sparse(), "a Tensor of torch.float32 in layout torch.sparse_coo"),
        (torch.arange(3), "a Tensor of torch.int64"),
    ],
)
def test_what_has_no_values_at_its_address_is_refused(tensor, said):
    with pytest.raises(AdapterError, match=f"cannot write x: .*{said}.*pass an ordinary tensor"):
        serialize({"x": tensor})
