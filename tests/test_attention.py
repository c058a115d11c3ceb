"""`nn.MultiheadAttention`: both projections adapted, in every way that torch computes them."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
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
from bridge.peft.cli import main
from bridge.peft.doctor import doctor
from bridge.peft.errors import TargetError, UnsupportedLinearError
from tests.helpers.kinds import KINDS, Attention, by_peft, moved

X = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(5))


class Encoder(nn.Module):
    """Two encoder layers and a decoder layer, whose second attention is one of two sequences."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        sizes = {"d_model": 16, "nhead": 2, "dim_feedforward": 32, "dropout": 0.0}
        layer = nn.TransformerEncoderLayer(**sizes, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoderLayer(**sizes, batch_first=True)

    def forward(self, x):
        return self.decoder(x, self.encoder(x))


ATTENTIONS = ["self_attn", "multihead_attn"]


def adapted(**options):
    options = {"target_modules": ATTENTIONS, "dim": 4, "alpha": 6, "seed": 0} | options
    return LoRA(**options)(Encoder())


def dense(model):
    """A plain model whose weights are W + s B A, by the formula."""
    plain = Encoder()
    with torch.no_grad():
        for name, tensor in plain.named_parameters():
            owner, _, last = name.rpartition(".")
            layer = model.get_submodule(owner)
            branch = layer if last == "weight" else getattr(layer, f"{last}_lora", None)
            if hasattr(branch, "lora_a"):
                tensor += branch.scale * (branch.lora_b.weight @ branch.lora_a.weight)
    return plain


def test_the_attention_s_name_adapts_both_projections_of_every_attention():
    model = adapted()
    names = {name.removesuffix(".lora_a.weight") for name in adapter_state_dict(model)}
    attentions = [f"encoder.layers.{i}.self_attn" for i in range(2)]
    attentions += ["decoder.self_attn", "decoder.multihead_attn"]
    for attention in attentions:
        assert {f"{attention}.in_proj_weight_lora", f"{attention}.out_proj"} <= names
    assert set(Encoder().state_dict()) <= set(model.state_dict())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(adapter_state_dict(model))


def test_at_the_start_the_output_is_the_base_s_bit_for_bit():
    assert torch.equal(adapted()(X), Encoder()(X))


def test_in_training_and_evaluation_it_computes_with_the_sum():
    model = moved(adapted())
    expected = dense(model)
    for training in (True, False):
        model.train(training)
        expected.train(training)
        torch.testing.assert_close(model(X), expected(X), rtol=0, atol=1e-5)
        with torch.no_grad():  # where torch has fused kernels that take the weights
            torch.testing.assert_close(model(X), expected(X), rtol=0, atol=1e-5)


def test_the_gradients_are_those_of_the_sum_in_float64():
    model = moved(adapted(lora_dtype=torch.float64)).double()
    plain = dense(model).double()
    for m in (model, plain):
        m(X.double()).square().sum().backward()
    for name in ("encoder.layers.1.self_attn", "decoder.multihead_attn"):
        attention, twin = model.get_submodule(name), plain.get_submodule(name)
        pairs = (
            (attention.in_proj_weight_lora, twin.in_proj_weight.grad),
            (attention.out_proj, twin.out_proj.weight.grad),
        )
        for branch, gradient in pairs:
            a, b = branch.lora_a.weight, branch.lora_b.weight
            torch.testing.assert_close(b.grad, branch.scale * gradient @ a.T)
            torch.testing.assert_close(a.grad, branch.scale * b.T @ gradient)


def test_masks_and_answers_of_torch_stay():
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2, batch_first=True)})
    plain = copy.deepcopy(base)
    attention = LoRA(target_modules=["attention"], dim=2)(base)["attention"]
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[0, 4:] = True
    for options in ({}, {"need_weights": False}, {"average_attn_weights": False}):
        got = attention(X, X, X, key_padding_mask=mask, **options)
        expected = plain["attention"](X, X, X, key_padding_mask=mask, **options)
        assert torch.equal(got[0], expected[0])
        assert (got[1] is None and expected[1] is None) or torch.equal(got[1], expected[1])


def test_the_plan_says_how_it_is_computed_and_what_is_left_out():
    plan = LoRA(target_modules=["self_attn"], dim=4).plan(Encoder())
    rows = {row.fqn: row for row in plan.rows}
    row = rows["decoder.self_attn.in_proj_weight"]
    assert (row.in_features, row.out_features, row.path) == (16, 48, "read")
    assert rows["decoder.self_attn.out_proj"].path == "read"
    left = {skipped.fqn: skipped.reason for skipped in plan.not_adapted}
    assert "target_modules=['multihead_attn']" in left["decoder.multihead_attn"]
    assert not any("self_attn" in fqn for fqn in left)
    assert plan.trainable == 3 * (4 * (16 + 48) + 4 * (16 + 16))


def test_all_linear_leaves_attentions_alone_and_says_so():
    plan = LoRA(dim=4).plan(Encoder())
    assert not any("attn" in row.fqn for row in plan.rows)
    left = {skipped.fqn: skipped.reason for skipped in plan.not_adapted}
    assert "adapts its projections" in left["encoder.layers.0.self_attn"]
    assert "name the attention itself" in left["encoder.layers.0.self_attn.out_proj"]


def test_patterns_mean_both_projections_by_the_attention_s_name():
    model = adapted(rank_pattern={"multihead_attn": 2}, alpha_pattern={"decoder.self_attn": 8})
    decoder = model.decoder
    for branch in (decoder.multihead_attn.in_proj_weight_lora, decoder.multihead_attn.out_proj):
        assert branch.dim == 2
    for branch in (decoder.self_attn.in_proj_weight_lora, decoder.self_attn.out_proj):
        assert branch.alpha == 8


def test_excluded_attentions_stay_as_they_are():
    model = adapted(exclude_modules=["decoder.self_attn"])
    assert type(model.decoder.self_attn) is nn.MultiheadAttention
    assert not any("decoder.self_attn" in name for name in adapter_state_dict(model))


@pytest.mark.filterwarnings("ignore:.*fused kernel, where PEFT's")
def test_merge_unmerge_disable_copies_pickles_and_the_doctor():
    model = moved(adapted())
    before, base = model(X), Encoder()(X)
    with disable_adapters(model):
        assert torch.equal(model(X), base)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(X), before)
    merge(model)
    torch.testing.assert_close(model(X), before, rtol=0, atol=1e-5)
    unmerge(model)
    assert torch.equal(model(X), before)
    report = doctor(model, inputs={"x": X})
    assert report.healthy, str(report)


def test_what_cannot_be_adapted_is_refused_and_nothing_is_changed():
    attention = nn.MultiheadAttention(16, 2, kdim=8)
    apart = nn.ModuleDict({"attention": attention, "linear": nn.Linear(16, 16)})
    with pytest.raises(TargetError, match="kdim"):
        LoRA(target_modules=["attention"])(apart)
    model = Encoder()
    for options in ({"use_dora": True}, {"lora_A_init_method": "pissa"}):
        with pytest.raises(UnsupportedLinearError, match="in_proj_weight"):
            LoRA(target_modules=ATTENTIONS, **options)(model)
        assert type(model.decoder.self_attn) is nn.MultiheadAttention
        assert type(model.decoder.self_attn.out_proj) is type(Encoder().decoder.self_attn.out_proj)
        assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(TargetError, match="modules_to_train trains the weight of .*out_proj"):
        LoRA(target_modules=ATTENTIONS, modules_to_train=["self_attn.out_proj"])(model)
    with pytest.raises(TargetError, match="parts"):
        LoRA(target_modules=ATTENTIONS, parts={"self_attn": ["q"]})(model)


def test_dropout_is_said_not_to_act():
    with pytest.warns(UserWarning, match="in_proj_weight, .*out_proj.*dropout cannot act"):
        LoRA(target_modules=["attention"], dropout=0.1)(
            nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2)})
        )


def test_the_file_is_one_module_of_peft_per_attention(tmp_path):
    model = moved(adapted(rank_pattern={"multihead_attn": 2}))
    with pytest.warns(UserWarning, match=r"encoder.layers.0, .*fused kernel, where PEFT's"):
        save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["multihead_attn", "self_attn"]
    assert (config["r"], config["lora_alpha"]) == (4, 6)
    again = load_adapter(Encoder(), tmp_path)
    assert torch.equal(again(X), model(X))
    for name, tensor in adapter_state_dict(model).items():
        assert torch.equal(adapter_state_dict(again)[name], tensor)
    load_adapter(again, tmp_path)  # and into one that is adapted alike
    assert torch.equal(again(X), model(X))


def test_a_file_of_a_later_peft_counts_the_output_once(tmp_path):
    kind = KINDS["MultiheadAttention"]
    moved(by_peft(kind)).save_pretrained(tmp_path)
    key = "base_model.model.first.base_layer.out_proj.lora_B.weight"
    in_file = load_file(tmp_path / "adapter_model.safetensors")[key]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for version, factor in (("0.21.2", 2), (None, 2), ("0.22.0", 1), ("1.0", 1)):
        changed = json.dumps(config | {"peft_version": version})
        (tmp_path / "adapter_config.json").write_text(changed)
        model = load_adapter(Attention(), tmp_path)
        assert torch.equal(model.first.out_proj.lora_b.weight, factor * in_file)


def test_one_projection_alone_is_a_parameter_in_the_file(tmp_path):
    model = moved(LoRA(target_modules=(), target_parameters=["first.in_proj_weight"])(Attention()))
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["first.in_proj_weight"]
    x = torch.randn(6, 128)
    assert torch.equal(load_adapter(Attention(), tmp_path)(x), model(x))


def test_biases_beside_it_are_saved_under_peft_s_names(tmp_path):
    kind = KINDS["MultiheadAttention"]
    model = moved(LoRA(**kind.ours)(kind.base()))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.requires_grad_(True)
            torch.nn.init.normal_(parameter)
    save_adapter(model, tmp_path)
    assert torch.equal(kind.run(load_adapter(kind.base(), tmp_path)), kind.run(model))
    theirs = by_peft(kind, tmp_path).eval()
    torch.testing.assert_close(kind.run(theirs), kind.run(model.eval()), rtol=1e-5, atol=1e-5)


def test_a_module_that_is_called_base_layer_is_no_attention_of_peft_s(tmp_path):
    def wrapped():
        torch.manual_seed(0)
        inner = nn.ModuleDict({"out_proj": nn.Linear(8, 8), "other": nn.Linear(8, 8)})
        return nn.ModuleDict({"mixer": nn.ModuleDict({"base_layer": inner})})

    ranks = {"out_proj": 2}
    model = moved(LoRA(target_modules="all-linear", dim=4, rank_pattern=ranks)(wrapped()))
    save_adapter(model, tmp_path)
    again = load_adapter(wrapped(), tmp_path)
    for name, tensor in adapter_state_dict(model).items():
        assert torch.equal(adapter_state_dict(again)[name], tensor), name


def test_a_damaged_file_is_refused(tmp_path):
    kind = KINDS["MultiheadAttention"]
    save_adapter(moved(LoRA(**kind.ours)(kind.base())), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.first.base_layer.out_proj.lora_B.weight"
    save_file(tensors | {name: tensors[name][:-1]}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="first.out_proj is 128×128"):
        load_adapter(kind.base(), tmp_path)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@torch.no_grad()
def test_an_encoder_that_zeroes_padding_says_so_and_is_itself_again_when_it_is_merged():
    def encoder():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        return nn.TransformerEncoder(layer, 2).eval()

    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[0, 4:] = True
    base = encoder()(X, src_key_padding_mask=mask)
    assert not base[0, 4:].any()
    for targets in (["self_attn"], ["linear1"], ["self_attn", "linear1", "linear2"]):
        with pytest.warns(UserWarning, match="TransformerEncoder: .*zeros at padded positions"):
            model = LoRA(target_modules=targets, dim=2)(encoder())
        out = model(X, src_key_padding_mask=mask)
        torch.testing.assert_close(out[~mask], base[~mask], rtol=0, atol=1e-5)
        with disable_adapters(model):
            assert torch.equal(model(X, src_key_padding_mask=mask), base)
        merge(model)
        assert torch.equal(model(X, src_key_padding_mask=mask), base)
        with disable_adapters(model):
            assert torch.equal(model(X, src_key_padding_mask=mask), base)
        assert torch.equal(model(X, src_key_padding_mask=mask), base)
        unmerge(model)
        assert torch.equal(model(X, src_key_padding_mask=mask), out)


def test_inspect_tells_of_the_update_as_it_is(tmp_path, capsys):
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2)})
    moved(LoRA(target_modules=["attention"], dim=2)(model))
    save_adapter(model, tmp_path)
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    modules = {m["fqn"]: m for m in json.loads(capsys.readouterr().out)["modules"]}
    layer = model["attention"].out_proj
    norm = (layer.scale * layer.lora_b.weight @ layer.lora_a.weight).norm().item()
    assert modules["attention.out_proj"]["update_norm"] == pytest.approx(norm)
    assert "attention.in_proj_weight" in modules
