"""The layers: every point of the contract, as a user would see it."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from bridge.peft import LinearAdapter, TELinearAdapter, patch_linear_module
from bridge.peft.errors import AlreadyAdaptedError, UnsupportedLinearError
from tests.helpers.layers import DoublingLinear, make_trained

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# Reference values.


def test_forward_and_gradients_equal_numbers_worked_out_by_hand():
    # 3 tokens, 4 -> 5, rank 2, alpha 4: scale = 2. All numbers are small integers, so exact.
    layer = patch_linear_module(nn.Linear(4, 5), dim=2, alpha=4)
    w = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]]
    a = [[1, 0, 1, 0], [0, 1, 0, -1]]
    b = [[1, 0], [0, 1], [1, 1], [0, 0], [2, -1]]
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(w))
        layer.bias.copy_(torch.tensor([0.0, 0, 0, 0, 10]))
        layer.lora_a.weight.copy_(torch.tensor(a))
        layer.lora_b.weight.copy_(torch.tensor(b))
    x = torch.tensor([[1.0, 2, 3, 4], [0, 1, 0, 0], [1, 0, 0, 1]], requires_grad=True)
    y = layer(x)
    # A x = (4, -2), (0, 1), (1, -1); 2 B A x = (8,-4,4,0,20), (0,2,2,0,-2), (2,-2,0,0,6)
    expected = [[9, -2, 7, 4, 40], [0, 3, 2, 0, 9], [3, -2, 0, 1, 18]]
    assert torch.equal(y, torch.tensor(expected, dtype=torch.float32))

    dy = torch.tensor([[1.0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 1]])
    y.backward(dy)
    # dB = 2 dyT (A x); row 0 from token 0, row 1 from token 1, row 4 from token 2
    db = [[8, -4], [0, 2], [0, 0], [0, 0], [2, -2]]
    # 2 dy B = (2,0), (0,2), (4,-2); dA = its transpose times x
    da = [[6, 4, 6, 12], [-2, 2, 0, -2]]
    # dx = dy W + (2 dy B) A
    dx = [[3, 0, 2, 0], [0, 3, 0, -2], [5, -1, 5, 3]]
    assert torch.equal(layer.lora_b.weight.grad, torch.tensor(db, dtype=torch.float32))
    assert torch.equal(layer.lora_a.weight.grad, torch.tensor(da, dtype=torch.float32))
    assert torch.equal(x.grad, torch.tensor(dx, dtype=torch.float32))


# 1 - 3: attributes, names, what is trained.


def test_attributes_are_those_of_the_contract():
    layer = patch_linear_module(nn.Linear(6, 10), dim=4, alpha=8, dropout=0.25)
    assert (layer.dim, layer.alpha, layer.scale, layer.dropout_position) == (4, 8, 2.0, "post")
    assert isinstance(layer.dropout, nn.Dropout) and layer.dropout.p == 0.25
    assert layer.lora_a.weight.shape == (4, 6) and layer.lora_b.weight.shape == (10, 4)


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_gains_the_two_lora_keys_and_nothing_else(bias):
    base = nn.Linear(3, 5, bias=bias)
    names = set(base.state_dict())
    patched = patch_linear_module(copy.deepcopy(base), dim=2)
    assert set(patched.state_dict()) == names | {"lora_a.weight", "lora_b.weight"}
    incompatible = patched.load_state_dict(base.state_dict(), strict=False)
    assert set(incompatible.missing_keys) == {"lora_a.weight", "lora_b.weight"}
    assert incompatible.unexpected_keys == []


def test_base_is_frozen_and_lora_is_trainable():
    layer = patch_linear_module(nn.Linear(3, 5))
    trainable = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trainable == {"lora_a.weight", "lora_b.weight"}
    layer(torch.randn(2, 3)).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None
    assert layer.lora_b.weight.grad is not None


# 4: nothing changes before the first step.


@settings(deadline=None, max_examples=60)
@given(
    leading=st.lists(st.integers(0, 4), max_size=3),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5)),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from([nn.Linear, DoublingLinear]),
)
def test_output_is_bit_exact_base_at_init(leading, size, bias, dtype, kind):
    n_in, n_out, dim = size
    base = kind(n_in, n_out, bias=bias, dtype=dtype)
    x = torch.randn(*leading, n_in).to(dtype)
    expected = base(x)
    patched = patch_linear_module(base, dim=dim)
    assert patched is base
    actual = patched(x)
    assert actual.dtype == dtype and torch.equal(actual, expected)


@settings(deadline=None, max_examples=60)
@given(
    leading=st.lists(st.integers(0, 4), max_size=3),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5)),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_output_is_base_plus_scaled_branch(leading, size, bias, dtype):
    n_in, n_out, dim = size
    layer = make_trained(
        patch_linear_module(nn.Linear(n_in, n_out, bias=bias, dtype=dtype), dim=dim, alpha=2)
    )
    x = torch.randn(*leading, n_in).to(dtype)
    exact = F.linear(
        x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double()
    )
    exact += (
        2 / dim * (x.double() @ layer.lora_a.weight.double().T @ layer.lora_b.weight.double().T)
    )
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4}.get(dtype, 0.15)
    torch.testing.assert_close(layer(x).double(), exact, rtol=tolerance, atol=tolerance)


def test_double_backward_is_right():
    layer = make_trained(patch_linear_module(nn.Linear(3, 4, dtype=torch.float64), dim=2))
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x).pow(2), (x,))


# 5: initialisation.


def test_xavier_has_glorots_bound_and_spread():
    layer = patch_linear_module(nn.Linear(400, 300), dim=100, lora_A_init_method="xavier")
    bound = math.sqrt(6 / (400 + 100))
    a = layer.lora_a.weight
    assert a.min() < -0.98 * bound and 0.98 * bound < a.max() <= bound and abs(a.mean()) < 1e-3
    assert torch.count_nonzero(layer.lora_b.weight) == 0


def test_uniform_has_the_bound_of_nn_linear():
    layer = patch_linear_module(nn.Linear(400, 300), dim=100, lora_A_init_method="uniform")
    bound = 1 / math.sqrt(400)
    assert 0.98 * bound < layer.lora_a.weight.abs().max() <= bound


# 6: dropout.


@pytest.mark.parametrize("position", ["pre", "post"])
def test_dropout_leaves_the_base_alone_and_is_off_in_eval(position):
    layer = patch_linear_module(nn.Linear(64, 64), dim=8, dropout=0.5, dropout_position=position)
    x = torch.randn(16, 64)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))  # B = 0
    make_trained(layer)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_post_dropout_drops_outputs_and_pre_dropout_drops_inputs():
    x = torch.ones(2000, 1)
    for position in ("pre", "post"):
        layer = patch_linear_module(
            nn.Linear(1, 3, bias=False), dim=1, alpha=1, dropout=0.5, dropout_position=position
        )
        with torch.no_grad():
            layer.weight.zero_()
            layer.lora_a.weight.fill_(1)
            layer.lora_b.weight.fill_(1)
        kept = layer(x) != 0
        assert torch.equal(layer(x).unique(), torch.tensor([0.0, 2.0]))
        rows_agree = (kept.all(1) | (~kept).all(1)).float().mean()
        assert rows_agree == 1 if position == "pre" else rows_agree < 0.4
        assert 0.4 < kept.float().mean() < 0.6


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("lora_A_init_method", "gaussian", "'xavier', 'uniform'"),
        ("dropout_position", "middle", "'pre', 'post'"),
        ("dropout", 1.0, r"\[0, 1\)"),
        ("dropout", -0.1, r"\[0, 1\)"),
        ("dropout", math.nan, r"\[0, 1\)"),
        ("dim", 0, ">= 1"),
        ("dim", 2.0, "integer"),
        ("dim", True, "integer"),
        ("alpha", math.inf, "finite"),
        ("alpha", math.nan, "finite"),
        ("alpha", "32", "finite"),
        ("lora_dtype", torch.uint8, "bfloat16"),
    ],
)
@pytest.mark.parametrize("make", [patch_linear_module, LinearAdapter])
def test_bad_options_are_value_errors_and_touch_nothing(make, option, value, words):
    base = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=words):
        make(base, **{option: value})
    assert type(base) is nn.Linear and set(base.state_dict()) == {"weight", "bias"}
    assert base.weight.requires_grad


# 7: dtypes.


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", [nn.Linear, DoublingLinear])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_bf16_base_with_fp32_lora_takes_and_returns_bf16(autocast, kind, dropout):
    layer = patch_linear_module(
        kind(8, 8, dtype=torch.bfloat16), lora_dtype=torch.float32, dropout=dropout
    )
    make_trained(layer)
    x = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = layer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert layer.lora_a.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_dtype_defaults_to_that_of_the_base(dtype):
    layer = patch_linear_module(nn.Linear(3, 3, dtype=dtype))
    assert layer.lora_a.weight.dtype == layer.lora_b.weight.dtype == dtype


def test_a_base_that_is_not_floating_needs_lora_dtype():
    base = nn.Linear(4, 4)
    base.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="uint8.*lora_dtype=torch.bfloat16"):
        patch_linear_module(base)
    assert type(base) is nn.Linear and not hasattr(base, "lora_a")


# 8, 9: devices, meta.


def test_patching_keeps_the_object_and_every_tensor_of_the_base():
    base = nn.Linear(5, 7)
    weight, bias, pointer = base.weight, base.bias, base.weight.data_ptr()
    patched = patch_linear_module(base)
    assert patched is base and patched.weight is weight and patched.bias is bias
    assert patched.weight.data_ptr() == pointer
    assert isinstance(patched, LinearAdapter) and isinstance(patched, nn.Linear)


def test_a_subclass_keeps_its_class_and_its_own_forward():
    base = DoublingLinear(5, 7)
    x = torch.randn(2, 5)
    expected = base(x)
    patched = patch_linear_module(base)
    assert isinstance(patched, LinearAdapter) and isinstance(patched, DoublingLinear)
    assert torch.equal(patched(x), expected)


@pytest.mark.parametrize("swept", [False, True])
def test_meta_survives_materialisation_with_right_a_and_zero_b(swept):
    with torch.device("meta"):
        layer = patch_linear_module(nn.Linear(64, 32), dim=16)
    assert layer.lora_a.weight.is_meta and layer.lora_b.weight.is_meta
    layer.to_empty(device="cpu")
    if swept:
        for module in layer.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    assert torch.count_nonzero(layer.lora_b.weight) == 0
    bound = math.sqrt(6 / (64 + 16))
    assert 0.9 * bound < layer.lora_a.weight.abs().max() <= bound


def test_loading_a_base_checkpoint_by_assignment_materialises_the_branch_too():
    checkpoint = nn.Linear(6, 4).state_dict()
    with torch.device("meta"):
        layer = patch_linear_module(nn.Linear(6, 4))
    layer.load_state_dict(checkpoint, strict=False, assign=True)
    x = torch.randn(2, 6)
    assert torch.equal(layer(x), F.linear(x, checkpoint["weight"], checkpoint["bias"]))
    assert layer.lora_a.weight.abs().max() > 0


# 11: refusals.


@pytest.mark.parametrize("module", [nn.Conv2d(1, 1, 1), nn.Embedding(3, 3), nn.Bilinear(2, 2, 2)])
@pytest.mark.parametrize("make", [patch_linear_module, LinearAdapter])
def test_other_modules_are_refused_by_either_exception_type(module, make):
    for expected in (NotImplementedError, AssertionError):
        with pytest.raises(expected, match=type(module).__name__):
            make(module)


@pytest.mark.parametrize("thing", [None, "q_proj", nn.Linear])
@pytest.mark.parametrize("make", [patch_linear_module, LinearAdapter])
def test_things_that_are_not_modules_are_refused_alike(thing, make):
    with pytest.raises(UnsupportedLinearError, match="it is not a module; pass a linear"):
        make(thing)


def test_patching_again_is_refused_and_wipes_nothing():
    layer = make_trained(patch_linear_module(nn.Linear(3, 3)))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(AssertionError, match="already adapted"):
        patch_linear_module(layer)
    with pytest.raises(AssertionError, match="already adapted"):
        LinearAdapter(layer)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("name", ["super_fwd", "forward"])
def test_a_forward_patched_on_the_instance_is_refused(name):
    base = nn.Linear(3, 3)
    setattr(base, name, base.forward)
    with pytest.raises(AlreadyAdaptedError):
        patch_linear_module(base)
    assert type(base) is nn.Linear and base.weight.requires_grad


def test_linears_whose_forward_is_never_called_are_refused():
    with pytest.raises(UnsupportedLinearError, match="MultiheadAttention"):
        patch_linear_module(nn.MultiheadAttention(4, 2).out_proj)


def test_a_linear_whose_shape_is_not_known_yet_is_refused():
    with pytest.raises(UnsupportedLinearError, match="forward of the model first"):
        patch_linear_module(nn.LazyLinear(3))


def test_a_subclass_whose_attribute_would_be_overwritten_is_refused():
    base = DoublingLinear(3, 3)
    base.scale = torch.ones(3)
    with pytest.raises(UnsupportedLinearError, match="'scale'"):
        patch_linear_module(base)


# 15: the constructors copy.


def test_linear_adapter_copies_and_leaves_the_original_alone():
    original = nn.Linear(4, 3, dtype=torch.float64)
    adapter = LinearAdapter(original, dim=2)
    x = torch.randn(2, 4, dtype=torch.float64)
    assert torch.equal(adapter(x), original(x))
    assert adapter.weight.data_ptr() != original.weight.data_ptr()
    assert adapter.bias.data_ptr() != original.bias.data_ptr()
    assert original.weight.requires_grad and original.bias.requires_grad
    assert type(original) is nn.Linear


def test_linear_adapter_refuses_subclasses_whose_forward_it_would_lose():
    with pytest.raises(UnsupportedLinearError, match="patch_linear_module"):
        LinearAdapter(DoublingLinear(3, 3))


def test_init_adapter_adds_the_branch_without_changing_the_class():
    base = nn.Linear(4, 3)
    LinearAdapter._init_adapter(base, dim=2, alpha=4)
    assert type(base) is nn.Linear and base.scale == 2.0
    assert not base.weight.requires_grad and base.lora_a.weight.shape == (2, 4)


# Without Transformer Engine.


@pytest.mark.skipif("transformer_engine" in __import__("sys").modules, reason="TE is installed")
def test_te_linear_adapter_without_te_names_the_extra():
    with pytest.raises(ImportError, match=r"bridge-peft\[te\]"):
        TELinearAdapter(nn.Linear(2, 2))
