"""DoRA's layer: its start, what it computes, when its norms are made again, where m is from."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from bridge.peft import LoRA, adapter_state_dict, disable_adapters, merge, patch_linear_module
from bridge.peft.branch.functions import dora
from bridge.peft.errors import AdapterError, UnsupportedLinearError
from bridge.peft.ops.reference import dora_linear_reference
from tests.helpers.layers import DoublingLinear

RECIPE = LoRA(dim=4, seed=1, use_dora=True)


def body(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16, bias=bias), nn.ReLU(), nn.Linear(16, 8, bias=bias))


def trained(model):
    """B and m away from their start, as training would leave them."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, tensor in adapter_state_dict(model).items():
            if "lora_b" in name:
                tensor.normal_()
            elif "magnitude" in name:
                tensor.mul_(torch.rand_like(tensor) + 0.5)
    return model


def dense(layer, x):
    """The dense formula with the layer's tensors."""
    a, b, m = (p for p in layer.adapter_parameters().values())
    return dora_linear_reference(x, layer.base_weight, layer.bias, a, b, m, layer.scale)


def x_of(rows=5, width=12):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lora_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_at_the_start_the_output_is_the_base_s_bit_for_bit(dtype, lora_dtype, bias):
    base = body(bias).to(dtype)
    model = LoRA(dim=4, use_dora=True, lora_dtype=lora_dtype)(copy.deepcopy(base))
    x = x_of().to(dtype)
    assert torch.equal(model(x), base(x))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(x), base(x))


def test_it_computes_and_trains_what_the_dense_formula_says():
    model = trained(RECIPE(body())).double()
    x = x_of().double().requires_grad_()
    weights = [x, *(p for p in model.parameters() if p.requires_grad)]
    got = torch.autograd.grad(model(x).square().sum(), weights)
    y = dense(model[2], dense(model[0], x).relu())
    for mine, want in zip(got, torch.autograd.grad(y.square().sum(), weights), strict=True):
        assert_close(mine, want)
    assert len(weights) == 7


def test_a_few_steps_of_adamw_move_a_b_and_m_and_nothing_else():
    model, twin = RECIPE(body()), RECIPE(body())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 0.05, weight_decay=0.0)
    of_twin = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], 0.05)
    of_twin.param_groups[0]["weight_decay"] = 0.0
    x, y = x_of(32), torch.randn(32, 8)
    for _ in range(10):
        for net, step in ((model, optimizer), (twin, of_twin)):
            step.zero_grad()
            h = net[0](x) if net is model else dense(net[0], x)
            out = net[2](h.relu()) if net is model else dense(net[2], h.relu())
            (out - y).square().mean().backward()
            step.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
        assert_close(parameter, dict(twin.named_parameters())[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position", ["pre", "post"])
def test_dropout_acts_on_the_branch_alone_and_not_in_evaluation(position):
    model = trained(
        LoRA(dim=4, use_dora=True, dropout=0.5, dropout_position=position)(body())
    ).train()
    layer, x = model[0], x_of(4000)
    torch.manual_seed(0)
    first, second = layer(x), layer(x)
    torch.manual_seed(0)
    assert torch.equal(layer(x), first) and not torch.equal(first, second)
    expected = layer.eval()(x)
    assert_close(expected, dense(layer, x))
    assert_close(first.mean(0), expected.mean(0), rtol=0.2, atol=0.3)
    with torch.no_grad():
        layer.train().lora_b.weight.zero_()
    scaled = layer.lora_magnitude.weight / layer.weight.norm(dim=1)
    assert_close(layer(x), (layer.weight @ x.t()).t() * scaled + layer.bias)


def count_squares(monkeypatch):
    """How often |W|² was computed, as a list that grows."""
    calls = []
    square = dora.row_squares
    monkeypatch.setattr(dora, "row_squares", lambda w: calls.append(w) or square(w))
    return calls


def count_projections(monkeypatch):
    calls = []
    project = dora.project
    monkeypatch.setattr(dora, "project", lambda *t: calls.append(t) or project(*t))
    return calls


def test_norms_are_made_again_only_when_weights_change(monkeypatch):
    layer, x = trained(RECIPE(body()))[0], x_of()
    layer(x)
    squares, projections = count_squares(monkeypatch), count_projections(monkeypatch)
    layer(x)
    with torch.no_grad():
        layer(x)
        layer.lora_b.weight.normal_()  # the norm follows, W Aᵀ stays
        assert_close(layer(x), dense(layer, x))
    assert not squares and not projections
    for write in (
        lambda: layer.lora_a.weight.data.normal_(),  # in ways that torch counts, and does not
        lambda: nn.init.normal_(layer.lora_a.weight),
    ):
        write()
        assert_close(layer(x), dense(layer, x))
    assert not squares and len(projections) == 2
    with torch.no_grad():
        layer.weight.mul_(2)
    assert_close(layer(x), dense(layer, x))
    assert len(squares) == 1
    layer.weight = nn.Parameter(3 * layer.weight.detach(), requires_grad=False)
    assert_close(layer(x), dense(layer, x))
    layer.weight.data.mul_(2)
    layer.weight_was_written()
    assert_close(layer(x), dense(layer, x))
    assert_close(layer.double()(x.double()), dense(layer, x.double()))


def test_a_forward_in_inference_mode_leaves_nothing_that_training_could_not_use():
    layer = trained(RECIPE(body()))[0]
    with torch.inference_mode():
        layer(x_of())
    layer(x_of()).sum().backward()
    assert layer.lora_magnitude.weight.grad is not None


def test_copies_and_pickles_compute_the_same_and_carry_no_norms():
    model, x = trained(RECIPE(body())), x_of()
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    fresh = len(pickle.dumps(trained(RECIPE(body()))))
    data = pickle.dumps(model)
    assert torch.equal(pickle.loads(data)(x), expected) and len(data) <= fresh


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_it_has_the_same_gradients(reentrant):
    model, x = trained(LoRA(dim=4, use_dora=True, dropout=0.3)(body())).train(), x_of()
    weights = [p for p in model.parameters() if p.requires_grad]
    x.requires_grad_()
    torch.manual_seed(4)
    model(x).square().sum().backward()
    plain = [p.grad.clone() for p in weights]
    model.zero_grad()
    torch.manual_seed(4)
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for parameter, want in zip(weights, plain, strict=True):
        assert torch.equal(parameter.grad, want)


def test_compiled_it_is_one_graph_with_the_same_numbers():
    model, x = trained(RECIPE(body())), x_of()
    weights = [p for p in model.parameters() if p.requires_grad]
    want = [model(x), *torch.autograd.grad(model(x).square().sum(), weights)]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = [compiled(x), *torch.autograd.grad(compiled(x).square().sum(), weights)]
    for mine, other in zip(got, want, strict=True):
        assert_close(mine, other)


def test_functional_calls_and_transforms_compute_the_dense_formula():
    layer, x = trained(RECIPE(body()))[0], x_of()
    values = {n: p.detach() * 1.1 for n, p in layer.named_parameters()}
    got = torch.func.functional_call(layer, values, (x,))
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(values[name])
    assert_close(got, dense(layer, x))
    assert_close(torch.func.vmap(layer)(x.unsqueeze(1)).squeeze(1), got)


def test_disabled_it_is_the_base_and_merged_it_is_one_weight():
    base, x = body(), x_of()
    model = trained(RECIPE(copy.deepcopy(base)))
    expected = model(x)
    with disable_adapters(model):
        assert torch.equal(model(x), base(x))
    report = merge(model)
    assert_close(model(x), expected)
    layer = model[0]
    assert_close(layer.weight.norm(dim=1), layer.lora_magnitude.weight)
    assert len(report.rows) == 2 and report.rows[0].relative_update > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_untrained_it_merges_to_the_base_s_own_bits(dtype):
    base = body().to(dtype)
    model = RECIPE(copy.deepcopy(base))
    report = merge(model, keep_base=False)
    for ours, own in zip((model[0], model[2]), (base[0], base[2]), strict=True):
        assert torch.equal(ours.weight, own.weight)
    assert all(row.relative_update == 0 and row.unchanged == 0 for row in report.rows)


def test_the_plan_counts_the_magnitudes():
    plan = RECIPE.plan(body())
    model = RECIPE(body())
    assert plan.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert [row.magnitudes for row in plan.rows] == [16, 8]


def test_a_base_whose_forward_is_its_own_is_refused_and_left_as_it_was():
    model = nn.Sequential(DoublingLinear(8, 8), nn.Linear(8, 8))
    with pytest.raises(UnsupportedLinearError, match="with DoRA: its forward is not W x"):
        RECIPE(model)
    assert type(model[0]) is DoublingLinear and type(model[1]) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())
    assert not any("lora" in name for name, _ in model.named_modules())


def test_use_dora_must_be_a_flag():
    with pytest.raises(AdapterError, match="use_dora must be True or False"):
        LoRA(use_dora=1)


# Where m comes from: it has no values until the base has.


def on_meta():
    with torch.device("meta"):
        model = body()
    return RECIPE(model)


@pytest.mark.parametrize("assign", [False, True])
def test_made_on_meta_it_starts_from_the_base_s_checkpoint(assign):
    base, model = body(), on_meta()
    if not assign:
        model.to_empty(device="cpu")
    missing = model.load_state_dict(base.state_dict(), strict=False, assign=assign).missing_keys
    assert missing and all(".lora_" in name for name in missing)
    assert torch.equal(model(x_of()), base(x_of()))
    assert torch.equal(model[0].lora_magnitude.weight, RECIPE(body())[0].lora_magnitude.weight)


def test_without_a_base_it_has_no_values_and_says_so():
    model = on_meta().to_empty(device="cpu")
    with torch.no_grad():
        for own, other in zip((model[0], model[2]), (body()[0], body()[2]), strict=True):
            own.weight.copy_(other.weight)
            own.bias.copy_(other.bias)
    with pytest.raises(AdapterError, match="magnitude has no values"):
        model(x_of())
    for layer in (model[0], model[2]):
        layer.reset_magnitude()
    assert torch.equal(model(x_of()), body()(x_of()))


def test_another_base_s_checkpoint_sets_it_again_unless_it_was_trained():
    other = {k: v * 2 for k, v in body().state_dict().items()}
    model = RECIPE(body())
    model.load_state_dict(other, strict=False)
    assert_close(model[0].lora_magnitude.weight, 2 * body()[0].weight.norm(dim=1))
    touched = trained(RECIPE(body()))
    magnitude = touched[0].lora_magnitude.weight.clone()
    touched.load_state_dict(other, strict=False)
    assert torch.equal(touched[0].lora_magnitude.weight, magnitude)
    assert_close(touched(x_of()), dense(touched[2], dense(touched[0], x_of()).relu()))


def test_a_state_dict_with_everything_gives_everything_back():
    model, again = trained(RECIPE(body())), on_meta().to_empty(device="cpu")
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x_of()), model(x_of()))


def test_the_seed_s_own_layers_have_no_magnitude():
    layer = patch_linear_module(nn.Linear(4, 4))
    assert layer.magnitude is None
    assert set(layer.adapter_parameters()) == {"lora_a.weight", "lora_b.weight"}
