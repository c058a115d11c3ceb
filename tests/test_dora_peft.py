"""DoRA's files: the real peft package reads ours and we read its, with equal logits."""

import copy

import pytest
import torch
from torch import nn

from bridge.peft import (
    LoRA,
    adapter_state_dict,
    disable_adapters,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)
from bridge.peft.errors import AdapterFileError, AlreadyAdaptedError
from bridge.peft.formats.peft import read_adapter, write_adapter
from tests.test_formats_peft_matrix import (
    TOLERANCE,
    build,
    peft_of,
    read_by_peft,
    run,
    save_quietly,
)

#: Model, targets, and more of the config: packed and transposed Conv1D, biases, square ones.
CASES = {
    "llama": ("llama", ["q_proj", "v_proj", "down_proj"], {}),
    "qwen2, biases": ("qwen2", ["q_proj", "o_proj"], {}),
    "gpt2, Conv1D": ("gpt2", ["c_attn", "c_proj"], {}),
    "rslora": ("llama", ["q_proj", "up_proj"], {"use_rslora": True}),
    "ranks": ("llama", ["q_proj", "v_proj"], {"rank_pattern": {"v_proj": 2}}),
}


def trained(model):
    """A, B away from their start, and magnitudes a tenth or so from theirs."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
            elif parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def theirs_of(base, targets, fields):
    return trained(
        peft_of(base, target_modules=targets, r=4, lora_alpha=6, use_dora=True, **fields)
    )


@pytest.mark.parametrize("name", CASES)
def test_peft_reads_ours_with_equal_logits(tmp_path, name):
    kind, targets, fields = CASES[name]
    base = build(kind)
    ours = LoRA(target_modules=targets, dim=4, alpha=6, use_dora=True, **fields)(
        copy.deepcopy(base)
    )
    assert torch.equal(run(ours, base), run(base, base))
    expected = run(trained(ours), base)
    save_adapter(ours, tmp_path)
    assert not torch.allclose(expected, run(base, base), **TOLERANCE)
    torch.testing.assert_close(run(read_by_peft(base, tmp_path), base), expected, **TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_we_read_what_peft_writes_and_give_it_back_as_it_was(tmp_path, name):
    kind, targets, fields = CASES[name]
    base = build(kind)
    theirs = theirs_of(base, targets, fields)
    save_quietly(theirs, tmp_path / "theirs")
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(run(ours, base), run(theirs, base), **TOLERANCE)
    with disable_adapters(ours):
        assert torch.equal(run(ours, base), run(base, base))
    save_adapter(ours, tmp_path / "ours")
    mine, other = read_adapter(tmp_path / "ours"), read_adapter(tmp_path / "theirs")
    assert mine.parsed.use_dora and mine.magnitudes.keys() == other.magnitudes.keys()
    for fqn, magnitude in mine.magnitudes.items():
        assert torch.equal(magnitude, other.magnitudes[fqn])
        assert all(map(torch.equal, mine.tensors[fqn], other.tensors[fqn]))


@pytest.mark.parametrize("name", CASES)
def test_merged_it_is_peft_s_merged_model_and_unmerging_gives_the_base_s_bits(tmp_path, name):
    kind, targets, fields = CASES[name]
    base = build(kind)
    theirs = theirs_of(base, targets, fields)
    save_quietly(theirs, tmp_path)
    ours = load_adapter(copy.deepcopy(base), tmp_path)
    branches, before = run(ours, base), adapter_state_dict(ours)
    report = merge(ours)
    torch.testing.assert_close(run(ours, base), branches, **TOLERANCE)
    torch.testing.assert_close(run(theirs.merge_and_unload(), base), branches, **TOLERANCE)
    assert all(row.relative_update > 1e-3 and row.unchanged < 0.1 for row in report.rows)
    assert not any("lora" in key for key in ours.state_dict())
    unmerge(ours)
    assert torch.equal(run(ours, base), branches)
    assert before.keys() == adapter_state_dict(ours).keys()
    with disable_adapters(ours):
        assert torch.equal(run(ours, base), run(base, base))


def test_a_training_step_is_peft_s(tmp_path):
    base = build("llama").train()
    theirs = theirs_of(base, ["q_proj", "down_proj"], {}).train()
    save_quietly(theirs, tmp_path)
    ours = load_adapter(copy.deepcopy(base), tmp_path).train()
    ids = torch.randint(0, 64, (2, 9))
    theirs(input_ids=ids, labels=ids).loss.backward()
    ours(input_ids=ids, labels=ids).loss.backward()
    found = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert len(found) == 3 * sum(1 for _ in read_adapter(tmp_path).tensors)
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            own = name.removeprefix("base_model.model.").replace(".default", "")
            own = own.replace("lora_magnitude_vector", "lora_magnitude")
            own = own.replace("lora_A", "lora_a").replace("lora_B", "lora_b")
            torch.testing.assert_close(found[own], parameter.grad, rtol=1e-4, atol=1e-6)


def test_the_file_has_peft_s_own_key_and_live_spellings_are_read_too(tmp_path):
    base = build("llama")
    ours = trained(LoRA(target_modules=["q_proj"], dim=2, use_dora=True)(copy.deepcopy(base)))
    save_adapter(ours, tmp_path / "a")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    keys = [key for key in tensors if "magnitude" in key]
    assert keys and all(key.endswith(".q_proj.lora_magnitude_vector") for key in keys)
    for spelling in ("_vector.weight", "_vector.default.weight", "_vector.default", ".weight"):
        renamed = {
            k.replace("_magnitude_vector", f"_magnitude{spelling}"): t for k, t in tensors.items()
        }
        save_file(renamed, file)
        again = load_adapter(copy.deepcopy(base), tmp_path / "a")
        assert torch.equal(run(again, base), run(ours, base))


def test_contradictions_between_config_and_tensors_are_refused(tmp_path):
    base = build("llama")
    save_adapter(
        LoRA(target_modules=["q_proj"], dim=2, use_dora=True)(copy.deepcopy(base)), tmp_path
    )
    file = read_adapter(tmp_path)
    magnitudes = dict(file.magnitudes)
    fqn = next(iter(magnitudes))

    def reading_of(config, values):
        file.magnitudes.clear()
        file.magnitudes.update(values)
        file.config.update(config)
        write_adapter(file, tmp_path)
        return read_adapter(tmp_path)

    with pytest.raises(AdapterFileError, match="its config does not say use_dora"):
        reading_of({"use_dora": False}, magnitudes)
    with pytest.raises(AdapterFileError, match="has no magnitude for"):
        reading_of({"use_dora": True}, {})
    with pytest.raises(AdapterFileError, match="the magnitude is"):
        reading_of({"use_dora": True}, magnitudes | {fqn: torch.ones(3)})


def test_a_file_with_dora_and_a_model_without_are_told_apart(tmp_path):
    base = build("llama")
    recipe = {"target_modules": ["q_proj"], "dim": 2}
    save_adapter(LoRA(**recipe, use_dora=True)(copy.deepcopy(base)), tmp_path)
    with pytest.raises(AlreadyAdaptedError, match="differ in DoRA"):
        load_adapter(LoRA(**recipe)(copy.deepcopy(base)), tmp_path)
    resumed = load_adapter(trained(LoRA(**recipe, use_dora=True)(copy.deepcopy(base))), tmp_path)
    assert torch.equal(run(resumed, base), run(base, base))


def test_a_square_conv1d_takes_the_norms_of_its_outputs():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = LoRA(dim=2, use_dora=True)(nn.Sequential(Conv1D(8, 8)))
    layer = model[0]
    torch.testing.assert_close(layer.lora_magnitude.weight, layer.weight.norm(dim=0))
