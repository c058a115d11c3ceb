"""Adapter files of experts: PEFT's `target_parameters` and experts one by one, PEFT the judge."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bridge.peft import LoRA, load_adapter, merge, save_adapter
from bridge.peft.cli.inspect import describe
from bridge.peft.errors import AdapterError, AdapterFileError
from bridge.peft.formats.peft import read_adapter, write_adapter
from bridge.peft.merging.directory import merge_directory
from bridge.peft.model.walk import adapted_modules
from bridge.peft.resize import resize
from tests.helpers.moe_architectures import mixture, stacks
from tests.helpers.peft_files import loaded_by_peft, saved_by_peft, set_config

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
#: The linears of a gated MLP.
LINEARS = ["gate_proj", "up_proj", "down_proj"]
ENDS = tuple(f".{end}.weight" for end in (*LINEARS, "w1", "w2", "w3"))
IDS = torch.arange(3, 27)[None]
#: Architectures whose checkpoints hold the experts apart.
APART = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "longcat_flash", "phimoe", "jamba"]
#: Linears whose weight the model's own code reads.
READ = {"longcat_flash": ["classifier"]}
#: Those in which PEFT reads `gate_proj`, … of the config as the experts'.
REWRITTEN = ["deepseek_v3", "qwen3_next", "longcat_flash"]


def adapted(name, std=0.2, **options):
    settings = {"target_modules": (), "target_parameters": EXPERTS, "dim": 2, "alpha": 3, "seed": 0}
    model = LoRA(**{**settings, **options})(mixture(name)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in adapted_modules(model):
            layer.lora_b.weight.normal_(std=std, generator=generator)
    return model


def logits(model):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.eval()(input_ids=IDS).logits


def assert_alike(got, expected):
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "llama4_text", "aria_text"])
def test_ours_to_peft_and_back_give_the_same_logits(tmp_path, name):
    model = adapted(name, target_modules=["q_proj"], rank_pattern={"experts.down_proj": 3})
    save_adapter(model, tmp_path / "ours")
    assert_alike(logits(loaded_by_peft(mixture(name), tmp_path / "ours")), logits(model))
    assert torch.equal(logits(load_adapter(mixture(name), tmp_path / "ours")), logits(model))

    config = {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "lora_alpha": 3}
    theirs = saved_by_peft(mixture(name), tmp_path / "theirs", **config)
    assert_alike(logits(load_adapter(mixture(name), tmp_path / "theirs")), logits(theirs))


@pytest.mark.parametrize("parameter", EXPERTS)
@pytest.mark.parametrize("rslora", [True, False])
def test_one_parameter_of_a_module_both_ways(tmp_path, parameter, rslora):
    model = adapted("qwen3_moe", target_parameters=[parameter], use_rslora=rslora)
    save_adapter(model, tmp_path / "ours")
    assert_alike(logits(loaded_by_peft(mixture("qwen3_moe"), tmp_path / "ours")), logits(model))
    config = {"target_modules": [], "target_parameters": [parameter], "use_rslora": rslora}
    theirs = saved_by_peft(mixture("qwen3_moe"), tmp_path / "theirs", **config)
    assert_alike(logits(load_adapter(mixture("qwen3_moe"), tmp_path / "theirs")), logits(theirs))


def test_the_layout_is_the_one_that_peft_documents(tmp_path):
    model = adapted("qwen3_moe")
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    layer = model.model.layers[1].mlp.experts
    prefix = "base_model.model.model.layers.1.mlp.experts"
    for name, place in (("gate_up_proj", f"{prefix}.base_layer"), ("down_proj", prefix)):
        branch = layer.get_submodule(f"{name}_lora")
        a, b = tensors[f"{place}.lora_A.weight"], tensors[f"{place}.lora_B.weight"]
        for e in range(4):
            assert torch.equal(a[2 * e : 2 * e + 2], branch.lora_a.weight[e])
            assert torch.equal(b[:, e::4], branch.lora_b.weight[e])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] == sorted(EXPERTS) and config["target_modules"] == []


def test_dropout_is_kept_beside_a_config_that_peft_accepts(tmp_path):
    model = adapted("qwen3_moe", dropout=0.1)
    save_adapter(model, tmp_path)
    loaded_by_peft(mixture("qwen3_moe"), tmp_path)
    again = load_adapter(mixture("qwen3_moe"), tmp_path)
    assert {layer.dropout.p for _, layer in adapted_modules(again)} == {0.1}


def test_a_file_of_an_older_peft_with_the_sides_exchanged_is_read(tmp_path):
    model = adapted("qwen3_moe", target_parameters=["experts.down_proj"])
    save_adapter(model, tmp_path)
    (tmp_path / "bridge_adapter.json").unlink()
    tensors = {}
    for fqn, layer in adapted_modules(model):  # (r, out) and (in, r), as W + (B A)ᵀ takes them
        place = f"base_model.model.{fqn.rpartition('.')[0]}"
        a, b = layer.lora_b.weight.mT, layer.lora_a.weight.mT
        tensors[f"{place}.lora_A.weight"] = a.flatten(0, 1).detach().contiguous()
        tensors[f"{place}.lora_B.weight"] = b.permute(1, 2, 0).flatten(1).detach().contiguous()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert torch.equal(logits(load_adapter(mixture("qwen3_moe"), tmp_path)), logits(model))


@pytest.mark.parametrize("names", [["gate_proj", "up_proj", "down_proj", "o_proj"], "all-linear"])
@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_next", "qwen3_moe"])
def test_a_file_whose_targets_peft_has_rewritten_is_read_exactly(tmp_path, name, names):
    theirs = saved_by_peft(mixture(name), tmp_path, target_modules=names)
    loaded = load_adapter(mixture(name), tmp_path)
    assert_alike(logits(loaded), logits(theirs))
    assert any(layer.lora_a.weight.dim() == 3 for _, layer in adapted_modules(loaded))


@pytest.mark.parametrize("name", REWRITTEN)
def test_linears_that_peft_would_leave_out_of_our_file_are_told_of(tmp_path, name):
    model = adapted(name, target_modules="all-linear", exclude_modules=READ.get(name, ()))
    with pytest.warns(UserWarning, match="PEFT takes linears of these names for the experts'"):
        save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(mixture(name), tmp_path)), logits(model))


# -- experts one by one


def one_by_one(name, directory, dim=4, which=lambda key: ".experts." in key, **config):
    """A file with a branch of its own for every expert's linear, as separate ones have."""
    mixture(name).save_pretrained(directory / "base")
    tensors = {}
    for key, weight in load_file(directory / "base" / "model.safetensors").items():
        if which(key) and key.endswith(ENDS):
            generator = torch.Generator().manual_seed(len(tensors))
            fqn = f"base_model.model.{key.removesuffix('.weight')}"
            for half, shape in (("A", (dim, weight.shape[1])), ("B", (weight.shape[0], dim))):
                values = torch.empty(shape).normal_(std=0.2, generator=generator)
                tensors[f"{fqn}.lora_{half}.weight"] = values
    adapter = directory / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    targets = r".*\.experts\..*(w[123]|gate_proj|up_proj|down_proj)"
    fields = {"peft_type": "LORA", "r": dim, "lora_alpha": 8, "target_modules": targets}
    (adapter / "adapter_config.json").write_text(json.dumps({**fields, **config}))
    return adapter


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "qwen3_next"])
def test_experts_one_by_one_load_into_one_parameter_as_peft_loads_them(tmp_path, name):
    adapter = one_by_one(name, tmp_path)
    ours = load_adapter(mixture(name), adapter)
    assert_alike(logits(ours), logits(loaded_by_peft(mixture(name), adapter)))
    ranks = {fqn.rpartition(".")[2]: m.dim for fqn, m in adapted_modules(ours)}
    assert ranks == {"gate_up_proj": 8, "down_proj": 4}


@pytest.mark.parametrize("name", APART)
def test_experts_one_by_one_are_the_directory_merged_expert_by_expert(tmp_path, name):
    adapter = one_by_one(name, tmp_path, use_rslora=True, rank_pattern={}, lora_alpha=3)
    merge_directory(tmp_path / "base", [(adapter, 1.0)], tmp_path / "merged")
    merged = type(mixture(name)).from_pretrained(tmp_path / "merged")
    assert_alike(logits(load_adapter(mixture(name), adapter)), logits(merged))


@pytest.mark.parametrize("name", REWRITTEN)
def test_shared_experts_and_dense_layers_beside_them_are_read_too_which_peft_drops(tmp_path, name):
    adapter = one_by_one(name, tmp_path, which=lambda key: True, target_modules=LINEARS)
    merge_directory(tmp_path / "base", [(adapter, 1.0)], tmp_path / "merged")
    merged = type(mixture(name)).from_pretrained(tmp_path / "merged")
    assert_alike(logits(load_adapter(mixture(name), adapter)), logits(merged))
    theirs = logits(loaded_by_peft(mixture(name), adapter))
    assert (theirs - logits(merged)).abs().max() > 1e-3 * theirs.abs().max()


def test_one_linear_of_two_and_some_experts_only_leave_the_rest_as_it_was(tmp_path):
    adapter = one_by_one("qwen3_moe", tmp_path, which=lambda key: "experts.2.up_proj" in key)
    merge_directory(tmp_path / "base", [(adapter, 1.0)], tmp_path / "merged")
    merged = type(mixture("qwen3_moe")).from_pretrained(tmp_path / "merged")
    model = load_adapter(mixture("qwen3_moe"), adapter)
    assert_alike(logits(model), logits(merged))
    layer = dict(adapted_modules(model))["model.layers.0.mlp.experts.gate_up_proj"]
    assert not layer.lora_b.weight[[0, 1, 3]].any() and not layer.lora_b.weight[2, :16].any()


@pytest.mark.parametrize("name", APART)
def test_saved_apart_a_file_is_that_of_separate_experts_and_comes_back(tmp_path, name):
    model = adapted(name)
    save_adapter(model, tmp_path / "apart", experts="separate")
    keys = load_file(tmp_path / "apart" / "adapter_model.safetensors").keys()
    mixture(name).save_pretrained(tmp_path / "base")
    base = load_file(tmp_path / "base" / "model.safetensors").keys()
    names = {k.removeprefix("base_model.model.").partition(".lora_")[0] for k in keys}
    assert {f"{name}.weight" for name in names} <= base, "the checkpoint's own names"
    assert torch.equal(logits(load_adapter(mixture(name), tmp_path / "apart")), logits(model))
    merge_directory(tmp_path / "base", [(tmp_path / "apart", 1.0)], tmp_path / "merged")
    merged = type(mixture(name)).from_pretrained(tmp_path / "merged")
    assert_alike(logits(merged), logits(model))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_saved_apart_peft_reads_it(tmp_path, name):
    model = adapted(name, dropout=0.1)
    save_adapter(model, tmp_path, experts="separate")
    assert_alike(logits(loaded_by_peft(mixture(name), tmp_path)), logits(model))


def test_experts_that_the_checkpoint_holds_together_cannot_be_saved_apart(tmp_path):
    with pytest.raises(AdapterError, match="is one tensor in the model's checkpoint too"):
        save_adapter(adapted("gpt_oss"), tmp_path, experts="separate")
    with pytest.raises(AdapterError, match="'fused' or 'separate', got 'apart'"):
        save_adapter(adapted("gpt_oss"), tmp_path, experts="apart")


# -- what else reads such files


def test_resize_and_inspect_know_experts(tmp_path):
    model = adapted("qwen3_moe")
    save_adapter(model, tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    modules = describe(adapter)["modules"]
    found = {m["fqn"]: (m["matrices"], m["shape"], m["dim"], m["dead"]) for m in modules}
    assert found["model.layers.0.mlp.experts.gate_up_proj"] == (4, [32, 32], 2, False)
    larger, report = resize(adapter, 5)
    assert all(row.energy == 1 for row in report.rows)
    write_adapter(larger, tmp_path / "larger")
    assert_alike(logits(load_adapter(mixture("qwen3_moe"), tmp_path / "larger")), logits(model))
    smaller, report = resize(adapter, 1)
    assert all(0 < row.energy < 1 for row in report.rows)
    write_adapter(smaller, tmp_path / "smaller")
    small = load_adapter(mixture("qwen3_moe"), tmp_path / "smaller")
    assert {layer.dim for _, layer in adapted_modules(small)} == {1}


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_a_directory_that_holds_experts_apart_is_merged_as_the_model_is(tmp_path, name):
    model = adapted(name, target_modules=["o_proj"])
    save_adapter(model, tmp_path / "adapter")
    mixture(name).save_pretrained(tmp_path / "base")
    merge_directory(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "merged")
    before = logits(model)
    merge(model)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert_alike(logits(merged), before)
    for (fqn, ours), theirs in zip(merged.named_parameters(), base_parameters(model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6, msg=fqn)


def base_parameters(model):
    return [p for n, p in model.named_parameters() if ".lora_" not in n and "_lora." not in n]


def test_a_directory_that_holds_experts_in_one_tensor_says_what_to_do(tmp_path):
    save_adapter(adapted("gpt_oss"), tmp_path / "adapter")
    mixture("gpt_oss").save_pretrained(tmp_path / "base")
    with pytest.raises(AdapterError, match="a parameter in the checkpoint too.*merge.model."):
        merge_directory(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "merged")


def test_a_loaded_adapter_merges_into_the_same_function(tmp_path):
    adapter = one_by_one("mixtral", tmp_path)
    model = load_adapter(mixture("mixtral"), adapter)
    before = logits(model)
    merge(model)
    assert_alike(logits(model), before)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target_parameters": ["experts.down_proj"]}, "has 2 adapters on parameters in the file"),
        ({"r": 3}, "the config gives it rank 3, the file A"),
        ({"target_parameters": []}, "target_modules is empty"),
        ({"target_parameters": [3]}, "target_parameters must be"),
    ],
)
def test_a_config_that_does_not_fit_its_tensors_is_refused(tmp_path, fields, words):
    save_adapter(adapted("qwen3_moe"), tmp_path)
    (tmp_path / "bridge_adapter.json").unlink()
    set_config(tmp_path, **fields)
    with pytest.raises(AdapterFileError, match=words):
        load_adapter(mixture("qwen3_moe"), tmp_path)


def test_experts_of_another_number_or_width_are_refused(tmp_path):
    save_adapter(adapted("qwen3_moe"), tmp_path)
    for name, words in (("flex_olmo", "is 96×32"), ("nemotron_h", "does not have")):
        with pytest.raises(AdapterFileError, match=words):
            load_adapter(mixture(name), tmp_path)
    assert stacks(mixture("qwen3_moe"))


def test_a_router_beside_experts_is_a_linear_apart_and_on_disk(tmp_path):
    entries = ["experts.down_proj", "mlp.gate.weight"]
    model = adapted("qwen3_moe", target_modules=["q_proj"], target_parameters=entries)
    save_adapter(model, tmp_path / "adapter")
    save_adapter(model, tmp_path / "apart", experts="separate")
    assert "model.layers.0.mlp.gate" in read_adapter(tmp_path / "apart").tensors
    mixture("qwen3_moe").save_pretrained(tmp_path / "base")
    before = logits(model)
    assert_alike(logits(load_adapter(mixture("qwen3_moe"), tmp_path / "apart")), before)
    for name in ("adapter", "apart"):
        merge_directory(tmp_path / "base", [(tmp_path / name, 1.0)], tmp_path / f"merged-{name}")
        path = tmp_path / f"merged-{name}"
        merged = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        assert_alike(logits(merged), before)
