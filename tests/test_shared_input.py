"""Linears that share an input: the same results as one by one, whatever happens between calls."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from bridge.peft import AdapterError, LoRA, adapter_state_dict, disable_adapters, share_inputs
from bridge.peft.errors import TargetError
from bridge.peft.input_families import families
from tests.helpers import models

NODE = "SharedInputFunctionBackward"


class Attention(nn.Module):
    """Three linears of one input, or of two."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(6, 8, bias), nn.Linear(6, 4, bias)
        self.v_proj = nn.Linear(6, 4, bias)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        y = x if memory is None else memory
        return torch.cat([self.q_proj(x), self.k_proj(y), self.v_proj(y)], -1)


def adapted(shared: bool, dtype: torch.dtype = torch.float64, **recipe) -> Attention:
    """With A and B as if trained, the same at each call."""
    torch.manual_seed(0)
    model = LoRA(dim=2, alpha=6, seed=1, share_inputs=shared, **recipe)(Attention().to(dtype))
    for i, tensor in enumerate(adapter_state_dict(model).values()):
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i)))
    return model


def pair(**settings) -> tuple[Attention, Attention]:
    return adapted(True, **settings), adapted(False, **settings)


def data(dtype: torch.dtype = torch.float64, **options) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(2, 3, 6, dtype=dtype, **options)


def gradients(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Output, gradients of A and B, and of the inputs that want one."""
    out = model(*inputs)
    wanted = [p for p in model.parameters() if p.requires_grad]
    wanted += [x for x in inputs if x.requires_grad]
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), wanted)]


def nodes(outputs: list[Tensor]) -> set[str]:
    return {type(y.grad_fn).__name__ for y in outputs}


@pytest.mark.parametrize("grad", [True, False])
def test_results_and_gradients_are_those_of_the_linears_one_by_one(grad):
    shared, alone = pair()
    for _ in range(2):
        x = data(requires_grad=grad)
        for got, expected in zip(gradients(shared, x), gradients(alone, x), strict=True):
            assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_they_are_one_function_and_say_so():
    model, x = adapted(True), data()
    outputs = [model.q_proj(x), model.k_proj(x), model.v_proj(x)]
    assert nodes(outputs) == {NODE} and len({id(y.grad_fn) for y in outputs}) == 1
    path = model.k_proj.lora_path()
    assert path.name == "shared" and "q_proj and v_proj" in path.reason
    assert adapted(False).k_proj.lora_path().name == "fused"


def test_at_the_start_the_output_is_the_base_s_bit_for_bit():
    base, x = Attention(), data(torch.float32)
    expected = base(x)
    assert torch.equal(LoRA(dim=2, share_inputs=True)(base)(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_those_of_the_working_dtype(dtype):
    shared, alone = pair(dtype=dtype)
    exact = adapted(False)
    exact.load_state_dict({k: v.double() for k, v in shared.state_dict().items()})
    torch.manual_seed(4)
    x = torch.randn(300, 6, dtype=dtype, requires_grad=True)
    right = gradients(exact, x.detach().double().requires_grad_())
    errors = [
        sum(
            ((got.double() - r).norm() / r.norm()).square().item()
            for got, r in zip(gradients(model, x), right, strict=True)
        )
        for model in (shared, alone)
    ]
    assert 0 < errors[0] <= 1.1**2 * errors[1]


def test_mixed_dtypes_and_autocast_compute_the_same():
    shared, alone = pair(dtype=torch.bfloat16, lora_dtype=torch.float32)
    x = data(torch.bfloat16, requires_grad=True)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got, expected = gradients(shared, x), gradients(alone, x)
        for one, other in zip(got, expected, strict=True):
            assert_close(one, other, rtol=2e-2, atol=5e-2)


def test_cross_attention_learns_which_read_one_input():
    shared, alone = pair()
    for _ in range(4):
        x, memory = data(requires_grad=True), data().add(1).requires_grad_()
        got, expected = gradients(shared, x, memory), gradients(alone, x, memory)
        for one, other in zip(got, expected, strict=True):
            assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert shared.q_proj.lora_path().name == "fused"
    assert shared.v_proj.lora_path().name == "shared"
    x, memory = data(), data().add(1)
    outputs = [shared.q_proj(x), shared.k_proj(memory), shared.v_proj(memory)]
    assert [type(y.grad_fn).__name__ == NODE for y in outputs] == [False, True, True]


def change_b(model: Attention, x: Tensor) -> None:
    with torch.no_grad():
        model.k_proj.lora_b.weight.mul_(2)


def change_base(model: Attention, x: Tensor) -> None:
    with torch.no_grad():
        model.k_proj.weight.mul_(2)


def replace_a(model: Attention, x: Tensor) -> None:
    model.k_proj.lora_a.weight = nn.Parameter(model.k_proj.lora_a.weight.detach() + 1)


def change_x(model: Attention, x: Tensor) -> None:
    x.add_(1)


def change_scale(model: Attention, x: Tensor) -> None:
    model.k_proj.scale *= 2


def switch_off(model: Attention, x: Tensor) -> None:
    model.k_proj.adapter_enabled = False


def drop(model: Attention, x: Tensor) -> None:
    model.k_proj.dropout.p = 1 - 1e-9


@pytest.mark.parametrize(
    "change", [change_b, change_base, replace_a, change_x, change_scale, switch_off, drop]
)
def test_what_changes_between_the_calls_is_seen(change):
    shared, alone = pair()
    results = []
    for model in (shared, alone):
        x = data()
        model.q_proj(x)
        change(model, x)
        torch.manual_seed(3)
        results.append(model.k_proj(x))
    assert_close(*results, rtol=1e-12, atol=1e-12)


def test_gradient_mode_between_the_calls_is_seen():
    model, x = adapted(True), data()
    with torch.no_grad():
        model.q_proj(x)
    assert model.k_proj(x).requires_grad
    with torch.no_grad():
        assert not model.v_proj(x).requires_grad
    with torch.inference_mode():
        y = data()
        assert_close(model(y), adapted(False)(y), rtol=1e-12, atol=1e-12)


def test_linears_can_be_trained_one_by_one_with_one_input():
    shared, alone = pair()
    for model in (shared, alone):
        x = data()
        for name in ("q_proj", "k_proj", "v_proj", "q_proj"):
            model.get_submodule(name)(x).square().sum().backward()
    grads = ([p.grad for p in m.parameters() if p.requires_grad] for m in (shared, alone))
    for one, other in zip(*grads, strict=True):
        assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_result_that_no_loss_uses_has_no_gradient():
    model, x = adapted(True), data()
    q, _, _ = model.q_proj(x), model.k_proj(x), model.v_proj(x)
    q.sum().backward()
    assert model.q_proj.lora_a.weight.grad.any()
    assert not model.k_proj.lora_b.weight.grad.any()


def test_consumers_may_write_into_the_results():
    for model in pair():
        x = data(requires_grad=True)
        q, k = model.q_proj(x), model.k_proj(x)
        q.mul_(2)
        k[0].zero_()
        (q.sum() + k.sum()).backward()


def test_gradcheck_and_double_backward():
    model = adapted(True)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run(x: Tensor, *_: Tensor) -> Tensor:
        return model(x).square()

    x = data(requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *parameters))
    assert torch.autograd.gradgradcheck(run, (x, *parameters))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_computes_the_same(reentrant):
    shared, alone = pair()
    x = data(requires_grad=True)
    expected = gradients(alone, x)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = shared

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    model = Checkpointed()
    model(x).backward(torch.linspace(-1, 2, 96, dtype=x.dtype).view(2, 3, 16))
    got = [p.grad for p in model.parameters() if p.requires_grad] + [x.grad]
    for one, other in zip(got, expected[1:], strict=True):
        assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_copies_share_among_themselves():
    model, x = adapted(True), data()
    model.q_proj(x)  # results wait: no copy may take them along
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with torch.no_grad():
            for tensor in adapter_state_dict(other).values():
                tensor.zero_()
        outputs = [other.q_proj(x), other.k_proj(x)]
        assert nodes(outputs) == {NODE}
        with disable_adapters(model):
            assert torch.equal(outputs[1], model.k_proj(x))
    assert nodes([model.k_proj(x)]) == {NODE}


def test_a_replica_of_one_linear_computes_alone():
    model, x = adapted(True), data()
    replica = copy.copy(model.k_proj)
    assert nodes([replica(x)]) == {"LoRALinearFunctionBackward"}


def test_what_cannot_be_shared_is_computed_one_by_one():
    frozen_a = adapted(True)
    frozen_a.k_proj.lora_a.weight.requires_grad_(False)
    trained_base = adapted(True)
    trained_base.v_proj.weight.requires_grad_(True)
    for model, x in itertools.product((frozen_a, trained_base), [data(requires_grad=True)]):
        outputs = [model.q_proj(x), model.k_proj(x), model.v_proj(x)]
        assert NODE not in nodes(outputs)
        assert_close(torch.cat(outputs, -1), adapted(False)(x), rtol=1e-12, atol=1e-12)


def test_compiled_it_computes_the_same():
    torch.compiler.reset()
    shared, x = adapted(True, torch.float32), data(torch.float32, requires_grad=True)
    compiled = torch.compile(shared, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), adapted(False, torch.float32)(x))


@pytest.mark.parametrize("build", [models.llama, models.qwen2, models.bert, models.t5])
def test_whole_models_compute_the_same(build):
    torch.manual_seed(0)
    shared = LoRA(dim=2, seed=1, share_inputs=True)(build())
    alone = LoRA(dim=2, seed=1)(build())
    alone.load_state_dict(shared.state_dict())
    batch = models.inputs(shared)
    for model in (shared, alone):
        for i, tensor in enumerate(adapter_state_dict(model).values()):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i)) / 9)
        model.eval()
    for _ in range(3):
        losses, grads = [], []
        for model in (shared, alone):
            wanted = [p for p in model.parameters() if p.requires_grad]
            losses.append(model(**batch).logits.square().mean())
            grads.append(torch.autograd.grad(losses[-1], wanted, allow_unused=True))
        assert_close(*losses, rtol=1e-5, atol=1e-6)
        for one, other in zip(*grads, strict=True):
            if other is not None:
                assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_the_plan_says_what_is_shared():
    plan = LoRA(dim=2, share_inputs=True).plan(models.llama())
    paths = {row.fqn.rpartition(".")[2]: row for row in plan.rows}
    assert [paths[n].path for n in ("q_proj", "up_proj")] == ["shared", "shared"]
    assert [paths[n].path for n in ("o_proj", "down_proj")] == ["fused", "fused"]
    assert paths["up_proj"].reason.endswith("reads one input with gate_proj: one function")


def test_it_is_an_error_where_nothing_is_shared():
    with pytest.raises(TargetError, match="no siblings that read one input among 1 plain linears"):
        LoRA(target_modules="q_proj", share_inputs=True)(Attention())
    model = LoRA(target_modules="q_proj")(Attention())
    with pytest.raises(TargetError, match="q_proj/k_proj/v_proj"):
        share_inputs(model)
    with pytest.raises(AdapterError, match="without dropout only; pass dropout=0"):
        LoRA(share_inputs=True, dropout=0.1)


def test_nothing_is_patched_where_nothing_is_shared():
    model = Attention()
    with pytest.raises(TargetError):
        LoRA(target_modules="q_proj", share_inputs=True)(model)
    assert type(model.q_proj) is nn.Linear and model.q_proj.weight.requires_grad


def test_families_are_siblings_of_one_width():
    widths = {"a.q": 4, "a.k": 4, "a.v": 8, "b.q": 4, "a.o": 4, "gate_proj": 4, "up_proj": 4}
    assert families(widths) == [("a.q", "a.k"), ("gate_proj", "up_proj")]
