"""Which path is taken when, and that every one of them computes the layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import bitsandbytes
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor, init_device_mesh
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from bridge.peft.ops.dispatch import choose_path, lora_add, lora_linear
from bridge.peft.ops.dropout import SeededMask
from bridge.peft.ops.reference import lora_linear_reference

SCALE = 0.7


def case(dtype: torch.dtype = torch.float64, tokens: int = 6) -> tuple[Tensor, ...]:
    """x, W, b, A, B of a 5 -> 4 layer of rank 2; x, A and B want gradients."""
    shapes = ((tokens, 5), (4, 5), (4,), (2, 5), (4, 2))
    x, w, bias, a, b = (torch.randn(*shape, dtype=dtype) for shape in shapes)
    return x.requires_grad_(), w, bias, a.requires_grad_(), b.requires_grad_()


def added(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, *rest: object) -> Tensor:
    """`lora_add` over the base's own result, with the arguments of `lora_linear`."""
    return lora_add(F.linear(x, w, bias), x, a, b, *rest)  # pyright: ignore


BOTH = pytest.mark.parametrize("op", [lora_linear, added])
Op = Callable[..., Tensor]


class Subclass(Tensor):
    pass


def test_a_path_says_its_name_and_why():
    x, *weights = case()
    assert choose_path(x, *weights).name == "fused"
    assert choose_path(x, None).name == "fused"
    assert choose_path(x, plain_linear=False).name == "branch"
    assert choose_path(torch.empty(3, device="meta")).name == "fused"
    assert choose_path().name == "fused"
    for tensor, why in (
        (x.as_subclass(Subclass), "Subclass"),
        (x.to(torch.complex64), "complex64"),
        (torch.empty(3, dtype=torch.uint8), "uint8"),
    ):
        path = choose_path(tensor, *weights)
        assert path.name == "reference"
        assert why in path.reason
    assert "frozen" in choose_path(x, trains_b=False).reason
    assert torch.func.vmap(lambda x: x * (choose_path(x).name == "reference"))(x).abs().sum() > 0


@BOTH
def test_half_frozen_adapters_save_no_input(op: Op):
    x, w, bias, a, b = case()
    a.requires_grad_(False)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = op(x, w, bias, a, b, SCALE)
    assert all(t.data_ptr() != x.data_ptr() for t in saved)
    want = lora_linear_reference(x, w, bias, a, b, SCALE)
    assert_close(torch.autograd.grad(y.sum(), (x, b)), torch.autograd.grad(want.sum(), (x, b)))


@BOTH
def test_no_grad_and_inference_mode(op: Op):
    t = case()
    want = lora_linear_reference(*t, SCALE)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_close(op(*t, SCALE), want.detach())


@BOTH
def test_complex_numbers_take_the_formula(op: Op):
    t = case(torch.complex128)
    assert_close(op(*t, SCALE), lora_linear_reference(*t, SCALE))


@BOTH
def test_tensor_subclasses_take_the_formula(op: Op):
    x, *rest = case()
    y = op(x.as_subclass(Subclass), *rest, SCALE)
    assert_close(y.as_subclass(Tensor), lora_linear_reference(x, *rest, SCALE))
    y.sum().backward()
    assert x.grad is not None


@BOTH
def test_vmap_grad_and_forward_mode(op: Op):
    x, w, bias, a, b = case()
    want = lora_linear_reference(x, w, bias, a, b, SCALE)
    assert_close(torch.func.vmap(lambda x: op(x, w, bias, a, b, SCALE))(x), want)
    got = torch.func.grad(lambda a: op(x, w, bias, a, b, SCALE).square().sum())(a)
    assert_close(got, torch.autograd.grad(want.square().sum(), a)[0])
    tangent = torch.randn_like(x)
    merged = w + SCALE * b @ a
    got = torch.func.jvp(lambda x: op(x, w, bias, a, b, SCALE), (x,), (tangent,))
    assert_close(got[1], F.linear(tangent, merged))
    with torch.autograd.forward_ad.dual_level():
        y = op(torch.autograd.forward_ad.make_dual(x, tangent), w, bias, a, b, SCALE)
        assert_close(torch.autograd.forward_ad.unpack_dual(y).tangent, F.linear(tangent, merged))


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@BOTH
def test_dtensors_take_the_formula(op: Op, mesh: dist.DeviceMesh):
    t = case()
    placed = [distribute_tensor(v.detach(), mesh, [Replicate()]).requires_grad_() for v in t]
    y = op(*placed, SCALE)
    assert isinstance(y, DTensor)
    assert_close(y.to_local(), lora_linear_reference(*t, SCALE))
    assert choose_path(*placed).reason.startswith("DTensor")
    y.sum().backward()


@BOTH
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_meta_tensors_give_shapes(op: Op, p: float):
    t = [v.detach().to("meta").requires_grad_(v.requires_grad) for v in case()]
    y = op(*t, SCALE, p, "pre")
    assert (y.shape, y.device.type) == ((6, 4), "meta")


@BOTH
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lora", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_casts_what_the_linear_would(
    op: Op, p: float, weights: torch.dtype, lora: torch.dtype
):
    x, w, bias, a, b = case(torch.float32, tokens=64)
    w, bias = w.to(weights), bias.to(weights)
    a, b = (v.detach().to(lora).requires_grad_() for v in (a, b))
    with torch.autocast("cpu", torch.bfloat16):
        base = F.linear(x, w, bias)
        y = op(x, w, bias, a, b, SCALE, p, "post")
        at_start = op(x, w, bias, a, torch.zeros_like(b, requires_grad=True), SCALE, p, "post")
    assert y.dtype == base.dtype == torch.bfloat16
    assert torch.equal(at_start, base)
    grads = torch.autograd.grad(y.float().square().sum(), (x, a, b))
    assert [g.dtype for g in grads] == [torch.float32, lora, lora]
    if p == 0.0:
        exact = lora_linear_reference(x, w.float(), bias.float(), a.float(), b.float(), SCALE)
        assert_close(y.float(), exact, atol=0.15, rtol=0.02)
        want = torch.autograd.grad(exact.square().sum(), (x, a, b))
        for g, v in zip(grads, want, strict=True):
            assert (g - v).norm() < 0.03 * v.norm()


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_quantised_bases_keep_their_result_and_train(kind: str, position: str, p: float):
    # dropout must not put a quantised base off the fast path, nor crash it
    plain = nn.Linear(64, 32).requires_grad_(False)
    if kind == "4bit":
        base = bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4")
    else:
        base = bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    base.load_state_dict(plain.state_dict())
    base.requires_grad_(False).to("cpu")
    x = torch.randn(3, 7, 64, dtype=torch.bfloat16, requires_grad=True)
    a, b = torch.randn(4, 64, requires_grad=True), torch.zeros(32, 4, requires_grad=True)
    assert choose_path(a, b, plain_linear=False).name == "branch"
    out = base(x)
    y = lora_add(out, x, a, b, SCALE, p, position)
    assert torch.equal(y, out)
    y.float().square().sum().backward()
    assert x.grad is not None and b.grad is not None and b.grad.abs().sum() > 0


@BOTH
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(op: Op, use_reentrant: bool):
    t = case()
    checkpoint(op, *t, SCALE, use_reentrant=use_reentrant).square().sum().backward()
    want = torch.autograd.grad(lora_linear_reference(*t, SCALE).square().sum(), (t[0], t[3], t[4]))
    assert_close([t[i].grad for i in (0, 3, 4)], list(want))


class Stack(nn.Module):
    """Three layers that differ in their weights only."""

    def __init__(self, op: Op, p: float, position: str) -> None:
        super().__init__()
        self.op, self.p, self.position = op, p, position
        self.layers = nn.ParameterList([torch.randn(8, 8) for _ in range(3)])
        self.a = nn.ParameterList([torch.randn(2, 8) for _ in range(3)])
        self.b = nn.ParameterList([torch.randn(8, 2) for _ in range(3)])

    def layer(self, x: Tensor, i: int) -> Tensor:
        w, a, b = self.layers[i].detach(), self.a[i], self.b[i]
        return self.op(x, w, None, a, b, SCALE, self.p, self.position)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(3):
            x = torch.tanh(self.layer(x, i))
        return x


@BOTH
@pytest.mark.parametrize(("p", "position"), [(0.0, "pre"), (0.3, "pre"), (0.3, "post")])
def test_compiled_whole_it_computes_the_same(op: Op, p: float, position: str):
    torch.compiler.reset()
    model, x = Stack(op, p, position), torch.randn(5, 8, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    y = compiled(x)
    y.sum().backward()
    # compiled, the words of each mask are drawn in order from the default generator
    torch.manual_seed(3)
    want = x.detach().requires_grad_()
    h = want
    for i in range(3):
        w, a, b = model.layers[i].detach(), model.a[i], model.b[i]
        mask = SeededMask(5, 8, p, x.device, seed=None) if p else None
        kept = None if mask is None else mask.whole()
        drop = 0.0 if mask is None else 1 - mask.keep_probability
        h = torch.tanh(lora_linear_reference(h, w, None, a, b, SCALE, drop, position, kept))
    assert_close(y, h)
    assert_close(x.grad, torch.autograd.grad(h.sum(), want)[0])


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_alike_layers_compile_once(p: float):
    torch.compiler.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]):
        graphs.append(graph)
        return graph.forward

    layers = [nn.Linear(8, 8, bias=False).requires_grad_(False) for _ in range(4)]
    lora = [(torch.randn(2, 8, requires_grad=True), torch.randn(8, 2, requires_grad=True))] * 4

    @torch.compile(fullgraph=True, backend=backend)
    def one(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x, w, None, a, b, SCALE, p, "pre")

    x = torch.randn(5, 8)
    for layer, (a, b) in zip(layers, lora, strict=True):
        x = one(x.detach(), layer.weight.detach(), a, b)
    assert len(graphs) == 1


def test_inductor_saves_one_input_and_the_words_of_the_mask():
    torch.compiler.reset()
    x, w = torch.randn(300, 64, requires_grad=True), torch.randn(48, 64)
    a, b = torch.randn(2, 64, requires_grad=True), torch.randn(48, 2, requires_grad=True)
    saved: list[Tensor] = []
    run = torch.compile(lambda: lora_linear(x, w, None, a, b, SCALE, 0.3, "pre"), fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = run()
    weights = {t.data_ptr() for t in (w, a, b)}
    total = sum(t.numel() * t.element_size() for t in saved if t.data_ptr() not in weights)
    # x, whole or masked, but not both; h; two words a token and three a feature
    assert total <= 4 * 300 * 64 + 4 * 300 * 2 + 2 * (2 * 300 + 3 * 64)
    y.sum().backward()


@BOTH
def test_dropout_leaves_the_path_as_it_is(op: Op):
    # the functions of the fast path, not the formula, made the result
    t = case()
    for p, position in itertools.product((0.0, 0.5), ("pre", "post")):
        name = type(op(*t, SCALE, p, position).grad_fn).__name__
        assert name in ("LoRALinearFunctionBackward", "LoRAAddFunctionBackward")
