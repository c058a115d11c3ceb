"""PiSSA, OLoRA, orthogonal starts: the base is never touched, the file is a plain LoRA."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from bridge.peft import (
    LinearAdapter,
    LoRA,
    adapter_state_dict,
    disable_adapters,
    load_adapter,
    merge,
    patch_linear_module,
    save_adapter,
    unmerge,
)
from bridge.peft.branch.functions.starts import start_of
from bridge.peft.doctor import doctor
from bridge.peft.errors import AdapterError, AlreadyAdaptedError
from bridge.peft.formats.peft import read_adapter, write_adapter
from bridge.peft.formats.peft.describe import adapter_of
from bridge.peft.resize import resize
from tests.helpers import models
from tests.helpers.ranks import on_ranks
from tests.test_formats_peft_matrix import (
    TOLERANCE,
    build,
    peft_of,
    read_by_peft,
    run,
    save_quietly,
)

SUBTRACTED = ["pissa", "pissa_niter_4", "olora"]
STARTS = [*SUBTRACTED, "orthogonal"]


def body(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 16, bias=bias), nn.ReLU(), nn.Linear(16, 12, bias=bias))


def adapted(method, base=None, **recipe):
    recipe = {"dim": 4, "alpha": 8, "seed": 1} | recipe
    return LoRA(lora_A_init_method=method, **recipe)(body() if base is None else base)


def moved(model):
    """A and B a little away from their start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "magnitude" not in name:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def x_of():
    return torch.randn(5, 24, generator=torch.Generator().manual_seed(9))


def test_pissa_is_the_best_approximation_and_olora_the_first_rows_of_qr():
    weight = body()[0].weight.detach()
    u, s, v = torch.linalg.svd(weight)
    nearest = u[:, :4] @ s[:4].diag() @ v[:4]
    a, b = start_of("pissa", weight, 4, 2.0, None)
    assert_close(2.0 * b @ a, nearest)
    assert_close(a @ a.t(), b.t() @ b)  # each has the square root of the singular values
    a, b = start_of("pissa_niter_16", weight, 4, 2.0, 0)
    assert float((weight - 2.0 * b @ a).norm() / (weight - nearest).norm()) < 1.001
    q, r = torch.linalg.qr(weight)
    a, b = start_of("olora", weight, 4, 2.0, None)
    assert_close(b @ a, q[:, :4] @ r[:4])
    assert_close(b.t() @ b, torch.eye(4), rtol=1e-5, atol=1e-5)
    a, b = start_of("orthogonal", weight, 4, 2.0, 0)
    assert_close(b @ a, torch.zeros_like(weight), rtol=0.0, atol=1e-6)
    assert float(a.norm()) > 0.1 and float(b.norm()) > 0.1


@pytest.mark.parametrize("method", STARTS)
def test_at_the_start_the_model_is_its_base_to_rounding_and_the_base_is_untouched(method):
    base, x = body(), x_of()
    model = adapted(method, copy.deepcopy(base))
    assert_close(model(x), base(x))
    for own, mine in zip((base[0], base[2]), (model[0], model[2]), strict=True):
        assert torch.equal(own.weight, mine.weight)
        assert bool((mine.lora_b.weight.norm() > 0.1).all())
    with disable_adapters(moved(model)):
        assert torch.equal(model(x), base(x))
    assert not torch.allclose(model(x), base(x), rtol=1e-2)


@pytest.mark.parametrize("method", SUBTRACTED)
def test_gradients_are_those_of_the_authors_form_with_the_start_taken_out_of_w(method):
    model, x = moved(adapted(method)), x_of()
    layer = model[0]
    got = torch.autograd.grad(layer(x).square().sum(), (layer.lora_a.weight, layer.lora_b.weight))
    a, b = (p.detach().clone().requires_grad_() for p in (layer.lora_a.weight, layer.lora_b.weight))
    residual = layer.weight - layer.scale * layer.start.b @ layer.start.a
    y = F.linear(x, residual, layer.bias) + layer.scale * F.linear(F.linear(x, a), b)
    want = torch.autograd.grad(y.square().sum(), (a, b))
    for mine, other in zip(got, want, strict=True):
        assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", SUBTRACTED)
def test_only_a_and_b_train_and_all_four_are_in_the_state(method):
    model = adapted(method, nn.Sequential(nn.Linear(24, 16)))
    assert set(adapter_state_dict(model)) == {
        f"0.{name}" for name in ("lora_a.weight", "lora_b.weight", "lora_start.a", "lora_start.b")
    }
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"0.lora_a.weight", "0.lora_b.weight"}
    plan = LoRA(dim=4, lora_A_init_method=method).plan(nn.Sequential(nn.Linear(24, 16)))
    assert plan.trainable == 4 * 40 and plan.adapter_file_bytes == 2 * 4 * 4 * 40


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", STARTS)
def test_peft_reads_the_file_as_a_plain_lora_over_the_untouched_base(tmp_path, name, method):
    base = build(name)
    targets = ["c_attn", "c_proj"] if name == "gpt2" else ["q_proj", "down_proj"]
    model = moved(adapted(method, copy.deepcopy(base), target_modules=targets))
    save_adapter(model, tmp_path)
    file = read_adapter(tmp_path)
    assert file.config["init_lora_weights"] is True
    assert {file.rank(fqn) for fqn in file.tensors} == {4 if method == "orthogonal" else 8}
    expected = run(model, base)
    assert not torch.allclose(expected, run(base, base), **TOLERANCE)
    torch.testing.assert_close(run(read_by_peft(base, tmp_path), base), expected, **TOLERANCE)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("method", STARTS)
def test_saved_and_loaded_training_goes_on_from_the_same_split(tmp_path, method, use_rslora):
    base = nn.ModuleDict({"body": body()})
    model = moved(adapted(method, copy.deepcopy(base), use_rslora=use_rslora))
    save_adapter(model, tmp_path)
    fresh = load_adapter(copy.deepcopy(base), tmp_path)
    resumed = load_adapter(adapted(method, copy.deepcopy(base), use_rslora=use_rslora), tmp_path)
    for again in (fresh, resumed):
        mine, other = adapter_state_dict(again), adapter_state_dict(model)
        assert mine.keys() == other.keys()
        for key, tensor in mine.items():
            assert torch.equal(tensor, other[key]), key
        assert [n for n, p in again.named_parameters() if p.requires_grad] == [
            n for n, p in model.named_parameters() if p.requires_grad
        ]
        assert again["body"][0].scale == model["body"][0].scale
    if method != "orthogonal":
        plain = LoRA(dim=8, alpha=16, use_rslora=use_rslora)(copy.deepcopy(base))
        with pytest.raises(AlreadyAdaptedError, match="differ in their start"):
            load_adapter(plain, tmp_path)


@pytest.mark.parametrize("method", SUBTRACTED)
@pytest.mark.parametrize("use_dora", [False, True])
def test_merged_it_is_the_same_and_unmerged_the_base_s_bits_are_back(method, use_dora):
    base, x = body(), x_of()
    model = moved(adapted(method, copy.deepcopy(base), use_dora=use_dora))
    expected = model(x)
    merge(model)
    assert_close(model(x), expected)
    assert not any("lora" in key for key in model.state_dict())
    unmerge(model)
    assert torch.equal(model(x), expected)
    for own, mine in zip(base, model, strict=True):
        if isinstance(own, nn.Linear):
            assert torch.equal(own.weight, mine.weight)


def test_the_start_does_not_depend_on_the_dtype_of_the_branch_or_on_random_numbers():
    for method in STARTS:
        torch.manual_seed(5)
        first = adapter_state_dict(adapted(method))
        torch.manual_seed(6)
        for key, tensor in adapter_state_dict(adapted(method)).items():
            assert torch.equal(tensor, first[key]), (method, key)
    exact = adapter_state_dict(adapted("pissa", body().double()))
    for key, tensor in adapter_state_dict(adapted("pissa")).items():
        assert_close(tensor.double(), exact[key], rtol=1e-3, atol=1e-4)


def test_quantised_bases_and_dropout_take_a_start_too():
    import bitsandbytes as bnb

    made = bnb.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32)
    made.load_state_dict(nn.Linear(64, 32).state_dict())
    model = nn.Sequential(made.to("cpu"))
    x = torch.randn(5, 64)
    with torch.no_grad():
        want = model(x)
    LoRA(dim=4, lora_A_init_method="pissa", dropout=0.5)(model)
    assert_close(model.train()(x), want, rtol=1e-4, atol=1e-4)  # what is subtracted drops alike
    model[0].lora_b.weight.data.add_(0.1)
    model(x).sum().backward()
    assert model[0].lora_a.weight.grad is not None


def shard_and_save():
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (2,))
    for method in ("pissa", "olora"):
        whole = moved(adapted(method))
        sharded = moved(adapted(method))
        for module in (sharded[0], sharded):
            fully_shard(module, mesh=mesh)
        x = x_of()
        assert_close(sharded(x), whole(x))
        for key, tensor in adapter_state_dict(sharded).items():
            assert torch.equal(tensor, adapter_state_dict(whole)[key]), key
        mine, other = adapter_of(nn.Sequential(sharded)), adapter_of(nn.Sequential(whole))
        for fqn, pair in mine.tensors.items():
            assert all(map(torch.equal, pair, other.tensors[fqn]))


@pytest.mark.distributed
def test_sharded_by_fsdp2_it_computes_and_saves_the_same(tmp_path):
    on_ranks(2, shard_and_save, tmp_path)


@pytest.mark.parametrize("method", STARTS)
def test_the_doctor_finds_it_healthy(tmp_path, method):
    base = models.llama()
    model = moved(adapted(method, copy.deepcopy(base), target_modules=["q_proj"]))
    save_adapter(model, tmp_path)
    before = adapter_state_dict(copy.deepcopy(model))
    for report in (doctor(model), doctor(base, tmp_path)):
        assert report.healthy, str(report)
    assert all(torch.equal(t, before[n]) for n, t in adapter_state_dict(model).items())


def test_the_layer_s_own_constructor_and_patching_start_so_too():
    linear = nn.Linear(24, 16)
    copied = LinearAdapter(linear, dim=4, lora_A_init_method="pissa")
    patched = patch_linear_module(copy.deepcopy(linear), dim=4, lora_A_init_method="pissa")
    for layer in (copied, patched):
        assert_close(layer(x_of()), linear(x_of()))
        assert bool(layer.lora_b.weight.any()) and layer.start is not None
    with pytest.raises(AdapterError, match="patch_linear_module does that"):
        LinearAdapter._init_adapter(nn.Linear(4, 4), lora_A_init_method="olora")


def test_resized_it_is_a_plain_adapter(tmp_path):
    base = nn.ModuleDict({"body": body()})
    model = moved(adapted("pissa", copy.deepcopy(base)))
    save_adapter(model, tmp_path / "8")
    write_adapter(resize(read_adapter(tmp_path / "8"), 12)[0], tmp_path / "12")
    again = load_adapter(copy.deepcopy(base), tmp_path / "12")
    assert again["body"][0].start is None and again["body"][0].dim == 12
    assert_close(again["body"](x_of()), model["body"](x_of()))


def test_what_no_start_can_be_taken_out_of_is_refused_and_left_as_it_was():
    with torch.device("meta"):
        empty = body()
    with pytest.raises(AdapterError, match="which is on the meta device"):
        adapted("pissa", empty)
    for method, recipe, words in (
        ("pissa", {"dim": 13}, "which has 12; lower the rank"),
        ("pissa", {"alpha": -1}, "needs a scale above 0"),
        ("orthogonal", {"dim": 3}, "needs an even rank"),
    ):
        model = body()
        with pytest.raises(AdapterError, match=words):
            adapted(method, model, **recipe)
        assert all(type(m) in (nn.Linear, nn.ReLU) for m in model)
        assert all(p.requires_grad for p in model.parameters())
        assert len(model.state_dict()) == 4
    with pytest.raises(AdapterError, match="'pissa'"):
        LoRA(lora_A_init_method="pissa_niter_x")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_of_peft_s_own_files_the_converted_ones_are_read_and_the_others_refused(tmp_path, init):
    base = build("llama")
    config = {"target_modules": ["q_proj"], "r": 4, "lora_alpha": 8, "init_lora_weights": init}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
        theirs.peft_config["default"].init_lora_weights = True
        theirs.save_pretrained(tmp_path / "start")
        theirs.peft_config["default"].init_lora_weights = init
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.05)
        theirs.save_pretrained(
            tmp_path / "both", path_initial_model_for_weight_conversion=str(tmp_path / "start")
        )
    ours = load_adapter(copy.deepcopy(base), tmp_path / "both")
    torch.testing.assert_close(run(ours, base), run(theirs, base), rtol=1e-4, atol=1e-5)
    save_quietly(peft_of(base, **config), tmp_path / "bare")
    with pytest.raises(AdapterError, match="path_initial_model_for_weight_conversion"):
        load_adapter(copy.deepcopy(base), tmp_path / "bare")
