"""Save and load in the files of Hugging Face PEFT."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from bridge.peft import (
    LoRA,
    adapter_state_dict,
    disable_adapters,
    load_adapter,
    merge,
    patch_linear_module,
    save_adapter,
)
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


def test_modules_come_in_the_order_of_the_file_each_time(tmp_path):
    """So that errors and tables name them in one order, from process to process."""
    save_adapter(LoRA(dim=2)(nn.Sequential(*[nn.Linear(3, 3) for _ in range(20)])), tmp_path)
    names = [list(read_adapter(tmp_path).tensors) for _ in range(5)]
    assert names == 5 * [sorted(names[0])] and len(names[0]) == 20


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


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrapped_models_are_saved_and_loaded_under_their_own_names(tmp_path, wrap):
    save_adapter(wrap(trained(small_model(), dim=3)), tmp_path)
    assert set(read_adapter(tmp_path).tensors) == {"0", "1.0", "1.1"}
    wrapped = wrap(small_model())
    assert load_adapter(wrapped, tmp_path) is wrapped
    assert len(adapter_state_dict(wrapped)) == 6


def test_compiled_blocks_are_saved_and_loaded_under_their_own_names(tmp_path):
    model = trained(small_model(), dim=3)
    model[1].compile()
    model[1] = torch.compile(model[1])
    save_adapter(model, tmp_path)
    assert set(read_adapter(tmp_path).tensors) == {"0", "1.0", "1.1"}
    load_adapter(small_model(), tmp_path)


def test_sharded_matrices_are_gathered(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = trained(small_model(), dim=3)
        save_adapter(model, tmp_path / "whole")
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        save_adapter(model, tmp_path / "sharded")
    finally:
        torch.distributed.destroy_process_group()
    whole, sharded = (read_adapter(tmp_path / name) for name in ("whole", "sharded"))
    assert whole.config == sharded.config
    for fqn, pair in whole.tensors.items():
        assert all(map(torch.equal, pair, sharded.tensors[fqn]))


def test_a_quantised_base_takes_the_dtype_of_the_file(tmp_path):
    import bitsandbytes

    def quantised():
        torch.manual_seed(0)
        layer = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
        return nn.Sequential(layer.to("cpu"))

    model = trained(quantised(), dim=3, lora_dtype=torch.bfloat16)
    save_adapter(model, tmp_path)
    loaded = load_adapter(quantised(), tmp_path, strict=True, lora_dtype=torch.bfloat16)
    assert loaded[0].lora_a.weight.dtype == torch.bfloat16
    x = torch.randn(2, 64)
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(AdapterError, match="float32 here and was nf4, double quantised"):
        load_adapter(nn.Sequential(nn.Linear(64, 64)), tmp_path, strict=True)


def test_settings_that_differ_between_modules_come_back(tmp_path):
    model = small_model()
    patch_linear_module(model[0], dim=2, dropout=0.5, dropout_position="pre")
    patch_linear_module(model[1][0], dim=3, lora_A_init_method="uniform")
    patch_linear_module(model[1][1], dim=3)
    model.requires_grad_(False)
    save_adapter(model, tmp_path)
    loaded = load_adapter(small_model(), tmp_path)
    for name in ("0", "1.0", "1.1"):
        ours, theirs = model.get_submodule(name), loaded.get_submodule(name)
        assert ours.dropout.p == theirs.dropout.p
        assert ours.dropout_position == theirs.dropout_position
        assert ours.lora_a.init_method == theirs.lora_a.init_method


def test_parameters_trained_beside_the_adapter_are_saved_and_come_back(tmp_path):
    model = trained(small_model(), target_modules=["1.0"], dim=3)
    model[1][1].requires_grad_(True)
    model[1][0].bias.requires_grad_(True)
    with torch.no_grad():
        model[1][1].weight.add_(1)
        model[1][0].bias.add_(1)
    save_adapter(model, tmp_path)
    config = read_adapter(tmp_path).config
    assert (config["modules_to_save"], config["bias"]) == (["1.1"], "lora_only")
    loaded = load_adapter(small_model(), tmp_path)
    x = torch.randn(2, 6)
    assert torch.equal(loaded(x), model(x))
    assert loaded[1][1].weight.requires_grad and not loaded[0].weight.requires_grad
    with disable_adapters(loaded):
        assert torch.equal(loaded(x), small_model()(x))
    save_adapter(loaded, tmp_path / "again")
    assert read_adapter(tmp_path / "again").whole.keys() == read_adapter(tmp_path).whole.keys()


def test_loading_draws_nothing_from_the_global_generator(tmp_path):
    save_adapter(trained(small_model(), dim=3), tmp_path)
    model = small_model()
    before = torch.get_rng_state()
    load_adapter(model, tmp_path)
    assert torch.equal(before, torch.get_rng_state())


def test_a_weight_that_is_a_tensor_subclass_is_known_by_what_is_in_it(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def quantised():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16)
        quantize_(model, Int8WeightOnlyConfig())
        return model

    model = trained(quantised(), dim=3, lora_dtype=torch.bfloat16)
    save_adapter(model, tmp_path)
    assert read_adapter(tmp_path).extra["base"]["0"]["quantised"] == "int8 (torchao)"
    loaded = load_adapter(quantised(), tmp_path, strict=True, lora_dtype=torch.bfloat16)
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    assert torch.equal(loaded(x), model(x))
