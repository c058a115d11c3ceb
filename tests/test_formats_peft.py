"""Save and load in the files of Hugging Face PEFT."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bridge.peft import LoRA, adapter_state_dict, load_adapter, merge, save_adapter
from bridge.peft.errors import AdapterError, AlreadyAdaptedError
from bridge.peft.formats.peft import read_adapter, write_adapter


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)))


def trained(model: nn.Module, **recipe) -> nn.Module:
    """The model adapted, with A and B as if trained."""
    LoRA(**recipe)(model)
    generator = torch.Generator().manual_seed(1)
    for tensor in adapter_state_dict(model).values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model


def test_load_gives_back_what_was_saved_bit_for_bit(tmp_path):
    model = trained(small_model(), dim=3, alpha=7, dropout=0.25, dropout_position="post")
    save_adapter(model, tmp_path)
    loaded = load_adapter(small_model(), tmp_path)
    for ours, theirs in zip(model.modules(), loaded.modules(), strict=True):
        assert type(ours) is type(theirs)
        assert getattr(ours, "scale", None) == getattr(theirs, "scale", None)
        assert getattr(ours, "dropout_position", None) == getattr(theirs, "dropout_position", None)
    x = torch.randn(4, 6)
    assert torch.equal(model.eval()(x), loaded.eval()(x))
    assert [p.requires_grad for p in model.parameters()] == [
        p.requires_grad for p in loaded.parameters()
    ]


def test_loading_into_the_same_adapter_resumes_it(tmp_path):
    model = trained(small_model(), dim=3)
    save_adapter(model, tmp_path)
    other = LoRA(dim=3, seed=5)(small_model())
    assert load_adapter(other, tmp_path) is other
    for key, tensor in adapter_state_dict(model).items():
        assert torch.equal(tensor, adapter_state_dict(other)[key])


def test_loading_into_another_adapter_is_refused(tmp_path):
    save_adapter(trained(small_model(), dim=3), tmp_path)
    with pytest.raises(AlreadyAdaptedError, match="rank 4"):
        load_adapter(LoRA(dim=4)(small_model()), tmp_path)


def test_a_model_without_adapters_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="no adapters"):
        save_adapter(small_model(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_read_and_write_without_a_model_are_lossless(tmp_path):
    save_adapter(trained(small_model(), dim=3), tmp_path / "one")
    adapter = read_adapter(tmp_path / "one")
    write_adapter(adapter, tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_another_base_is_told_and_refused_when_strict(tmp_path):
    save_adapter(trained(small_model(), dim=3), tmp_path)
    with pytest.warns(UserWarning, match=r"0 has other values here \(3 modules differ\)"):
        load_adapter(small_model(seed=1), tmp_path)
    untouched = small_model(seed=1)
    with pytest.raises(AdapterError, match="original base"):
        load_adapter(untouched, tmp_path, strict=True)
    assert adapter_state_dict(untouched) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_same_base_in_another_floating_dtype_is_the_same_base(tmp_path, dtype):
    save_adapter(trained(small_model(), dim=3), tmp_path)
    load_adapter(small_model().to(dtype), tmp_path, strict=True)


def test_a_merged_model_keeps_the_fingerprint_of_its_base(tmp_path):
    model = trained(small_model(), dim=3)
    merge(model)
    save_adapter(model, tmp_path)
    load_adapter(small_model(), tmp_path, strict=True)
