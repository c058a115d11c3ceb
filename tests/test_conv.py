"""Convolutions as targets, grouped ones too; PEFT is the judge of the files."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from bridge.peft import (
    LoRA,
    adapter_state_dict,
    disable_adapters,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)
from bridge.peft.branch.options import BranchOptions
from bridge.peft.branch.patch import patch_in_place
from bridge.peft.doctor import doctor
from bridge.peft.errors import AdapterError, UnsupportedLinearError
from bridge.peft.formats.peft import read_adapter, write_adapter
from bridge.peft.merging.directory import merge_directory
from bridge.peft.resize import resize
from tests.helpers import parts, peft_files

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Net(nn.Module):
    """A convolution to adapt, and a linear."""

    def __init__(self, conv, size):
        super().__init__()
        self.conv, self.out, self.size = conv, nn.Linear(8, 3), size

    def forward(self, x):
        return self.out(self.conv(x).flatten(2).mean(-1))


CONVS = {
    "1d": (lambda: nn.Conv1d(4, 8, 3, stride=2, padding=1), (4, 9)),
    "2d": (lambda: nn.Conv2d(4, 8, (3, 2), padding=(1, 0), bias=False), (4, 6, 5)),
    "3d": (lambda: nn.Conv3d(4, 8, 2, stride=(1, 2, 1)), (4, 4, 4, 4)),
    "point": (lambda: nn.Conv2d(4, 8, 1), (4, 5, 5)),
    "same": (lambda: nn.Conv1d(4, 8, 3, padding="same"), (4, 9)),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2), (4, 6, 6)),
    "depthwise": (lambda: nn.Conv1d(4, 8, 3, padding=1, groups=4), (4, 9)),
}
#: Which PEFT cannot: it gives A no dilation.
MORE = {**CONVS, "dilated": (lambda: nn.Conv2d(4, 8, 3, dilation=2, padding=2), (4, 7, 7))}
UNGROUPED = [name for name in MORE if name not in ("grouped", "depthwise")]
RECIPE = {"target_modules": ["conv"], "dim": 4, "alpha": 6}


def net(name):
    torch.manual_seed(0)
    make, size = MORE[name]
    return Net(make(), size).eval()


def x_of(model):
    return torch.randn(2, *model.size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MORE)
def test_output_is_the_base_s_at_the_start_and_only_a_and_b_are_trained(name):
    base = net(name)
    model = LoRA(**RECIPE, seed=1)(copy.deepcopy(base))
    x = x_of(base)
    assert torch.equal(model(x), base(x))
    with disable_adapters(model):
        assert torch.equal(parts.moved(model)(x), base(x))
    assert {k for k in model.state_dict() if "lora" not in k} == base.state_dict().keys()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"conv.lora_a.weight", "conv.lora_b.weight"}


@pytest.mark.parametrize("name", UNGROUPED)
def test_output_is_that_of_the_dense_sum_and_a_merge_is_exact(name):
    model = parts.adapted(net(name), **RECIPE)
    layer, x = model.conv, x_of(model)
    before, expected = layer.weight.clone(), model(x)
    dense = copy.deepcopy(net(name))
    update = layer.scale * (layer.lora_b.weight @ layer.lora_a.weight)
    with torch.no_grad():
        dense.conv.weight.add_(update.view_as(dense.conv.weight))
    torch.testing.assert_close(expected, dense(x), **CLOSE)
    merge(model)
    torch.testing.assert_close(model(x), expected, **CLOSE)
    unmerge(model)
    assert torch.equal(model(x), expected) and torch.equal(layer.weight, before)


@pytest.mark.parametrize("name", MORE)
def test_gradients_agree_with_float64(name):
    gradients = []
    for dtype in (torch.float32, torch.float64):
        model = parts.adapted(net(name), **RECIPE).to(dtype)
        (model(x_of(model).to(dtype)).square().sum()).backward()
        gradients.append([p.grad.double() for p in model.parameters() if p.requires_grad])
    for got, wanted in zip(*gradients, strict=True):
        assert wanted.any()
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_peft_reads_ours(tmp_path, name):
    base = net(name)
    ours = parts.adapted(base, **RECIPE)
    save_adapter(ours, tmp_path)
    theirs = parts.read_by_peft(base, tmp_path)
    torch.testing.assert_close(theirs(x_of(base)), ours(x_of(base)), **CLOSE)


@pytest.mark.parametrize("name", CONVS)
def test_we_read_peft_s(tmp_path, name):
    base = net(name)
    theirs = peft_files.saved_by_peft(
        copy.deepcopy(base), tmp_path, target_modules=["conv"], init_lora_weights=False
    )
    ours = load_adapter(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(ours(x_of(base)), theirs(x_of(base)), **CLOSE)
    save_adapter(ours, tmp_path / "again")
    stored = [load_file(d / peft_files.TENSORS) for d in (tmp_path, tmp_path / "again")]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][key], stored[1][key]) for key in stored[0])


def test_a_group_s_rows_of_b_keep_to_its_block_in_training():
    model = LoRA(**RECIPE, seed=1)(net("grouped"))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for _ in range(3):
        model(x_of(model)).square().mean().backward()
        optimizer.step()
    b = model.conv.lora_b.weight.detach()
    assert not b[:4, 2:].any() and not b[4:, :2].any() and b[:4, :2].all() and b[4:, 2:].all()


@pytest.mark.filterwarnings("ignore:.*own forward is not W x")
def test_a_grouped_update_is_not_merged_or_resized(tmp_path):
    model = parts.adapted(net("grouped"), **RECIPE)
    with pytest.raises(AdapterError, match="keep it unmerged"):
        merge(model)
    save_adapter(model, tmp_path)
    with pytest.raises(AdapterError, match="cannot be resized"):
        resize(read_adapter(tmp_path), 2)
    with pytest.raises(AdapterError, match="rank 3 over 2 groups"):
        LoRA(target_modules=["conv"], dim=3)(net("grouped"))


@pytest.mark.parametrize("dim", [2, 6])
def test_an_ungrouped_one_is_resized(tmp_path, dim):
    base = net("2d")
    save_adapter(parts.adapted(base, **RECIPE), tmp_path / "a")
    file, _ = resize(read_adapter(tmp_path / "a"), dim)
    write_adapter(file, tmp_path / "b")
    theirs = parts.read_by_peft(base, tmp_path / "b")
    ours = load_adapter(base, tmp_path / "b")
    torch.testing.assert_close(theirs(x_of(base)), ours(x_of(base)), **CLOSE)


class Padded(nn.Conv1d):
    def forward(self, x):
        return super().forward(F.pad(x, (2, 0)))


@pytest.mark.parametrize(
    ("conv", "words"),
    [
        (nn.Conv1d(4, 4, 3, padding=1, padding_mode="reflect"), "pads with 'reflect'"),
        (Padded(4, 4, 3), "may pad or shift its input"),
        (nn.ConvTranspose1d(4, 4, 3), "no embedding or convolution"),
    ],
)
def test_what_does_more_than_convolve_is_refused(conv, words):
    with pytest.raises(UnsupportedLinearError, match=words):
        patch_in_place(conv, BranchOptions())


@pytest.mark.parametrize("position", ["pre", "post"])
def test_dropout_drops_in_training_only(position):
    model = parts.adapted(net("2d"), **RECIPE, dropout=0.5, dropout_position=position)
    x = x_of(model)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", ["2d", "grouped"])
def test_copies_hooks_and_compiled_graphs_compute_the_same(copied, name):
    model = parts.adapted(net(name), **RECIPE)
    x, expected = x_of(model), model(x_of(model))
    assert torch.equal(copied(model)(x), expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    model.conv.lora_a.register_forward_pre_hook(lambda module, args: None)
    torch.testing.assert_close(model(x), expected)


def test_half_precision_bases_keep_their_dtype():
    model = LoRA(**RECIPE)(net("2d").to(torch.bfloat16))
    assert model.conv.lora_a.weight.dtype == torch.float32
    assert model.conv(x_of(model).bfloat16()).dtype == torch.bfloat16


def test_all_linear_takes_no_convolution_and_the_plan_counts_one():
    base = net("2d")
    assert [row.fqn for row in LoRA().plan(base).rows] == ["out"]
    plan = LoRA(**RECIPE).plan(base)
    model = LoRA(**RECIPE)(base)
    assert plan.trainable == sum(t.numel() for t in adapter_state_dict(model).values())
    report = doctor(model, inputs={"x": x_of(model)})
    assert report.healthy, str(report)


def test_a_file_of_another_kernel_is_refused(tmp_path):
    save_adapter(parts.adapted(net("2d"), **RECIPE), tmp_path)
    other = Net(nn.Conv2d(4, 8, (2, 3)), (4, 6, 5))
    with pytest.raises(AdapterError, match=r"as a convolution of kernel \(4, 3, 2\) and 1 groups"):
        load_adapter(other, tmp_path)


def vit():
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=8,
        patch_size=4,
    )
    return transformers.ViTForImageClassification(config)


def test_a_model_s_directory_is_merged(tmp_path):
    base = parts.build(vit)
    base.save_pretrained(tmp_path / "base")
    model = parts.adapted(base, dim=4, target_modules=["projection"])
    save_adapter(model, tmp_path / "adapter")
    merge_directory(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    merged = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out").eval()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(merged(x).logits, model(x).logits, **CLOSE)
