"""Tensor parallelism: no collective but those that the mathematics asks for, masks that agree."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from bridge.peft import (
    LinearAdapter,
    LoRA,
    adapter_state_dict,
    disable_adapters,
    patch_linear_module,
)
from bridge.peft.errors import AdapterError, UnsupportedLinearError
from bridge.peft.parallel.tensor import _masks_drawn
from bridge.peft.tensors import full_tensor
from tests.helpers.ranks import on_ranks

pytestmark = pytest.mark.distributed
# kept a DTensor in between: a local shard of an uneven split does not say how wide the whole is
COLUMN_KEPT = {"up": ColwiseParallel(use_local_output=False)}
PLAN = COLUMN_KEPT | {"down": RowwiseParallel()}


class MLP(nn.Module):
    """Up and down; the width of the middle divides unevenly."""

    def __init__(self, linear=nn.Linear, width=24):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = linear(8, width), linear(width, 8)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class OwnForward(nn.Linear):
    """A linear with a forward of its own, so that the branch is added to its result."""

    def forward(self, x):
        return super().forward(x) * 2


def mesh():
    return dist.init_device_mesh("cpu", (2,))


def with_values(model):
    """The model, with the same B whatever its layout."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, LinearAdapter)):
            b = layer.lora_b.weight
            values = 0.1 * torch.randn(b.shape, generator=generator)
            if isinstance(b, DTensor):
                values = distribute_tensor(values, b.device_mesh, b.placements, src_data_rank=None)
            b.copy_(values)
    return model


def both(linear=nn.Linear, width=24, dtype=torch.float32, **recipe):
    """The same adapted MLP whole, and sharded in both orders."""
    lora = LoRA(dim=4, seed=1, **recipe)
    base = MLP(linear, width).to(dtype)
    whole = with_values(lora(copy.deepcopy(base)))
    first = with_values(lora(parallelize_module(copy.deepcopy(base), mesh(), PLAN)))
    last = with_values(parallelize_module(lora(base), mesh(), PLAN))
    return whole, first, last


def compare(whole, sharded, x, **tolerance):
    whole.zero_grad()
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = sharded(mine), whole(theirs)
    torch.testing.assert_close(out, expected, **tolerance)
    out.square().mean().backward()
    expected.square().mean().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, **tolerance)
    for (name, p), q in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            assert p.grad.placements == p.placements
            torch.testing.assert_close(full_tensor(p.grad), q.grad, msg=name, **tolerance)


def numbers():
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2))
    for width in (24, 25):  # 25 rows divide unevenly
        for linear in (nn.Linear, OwnForward):
            whole, *sharded = both(linear, width)
            for model in sharded:
                compare(whole, model, x)
                with torch.no_grad():
                    torch.testing.assert_close(model(x), whole(x))
                with disable_adapters(model), disable_adapters(whole):
                    torch.testing.assert_close(model(x), whole(x))
    whole, first, _ = both()
    assert first.up.lora_path().name == "fused"
    whole, first, last = both(dtype=torch.bfloat16)  # under float32 A and B
    assert first.up.lora_a.weight.dtype == torch.float32
    compare(whole, first, x.bfloat16(), rtol=0.05, atol=0.05)
    compare(whole, last, x.bfloat16(), rtol=0.05, atol=0.05)
    whole, first, _ = both()
    for model in (whole, first):
        model.up.lora_a.requires_grad_(False)
    compare(whole, first, x)
    # one linear, patched on its own, and one that is replicated
    linear = nn.Linear(8, 6)
    dist.broadcast(linear.weight.data, 0)
    sharded = parallelize_module(copy.deepcopy(linear), mesh(), ColwiseParallel())
    assert patch_linear_module(sharded).lora_b.weight.placements == (Shard(0),)


def second_derivatives():
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(2), requires_grad=True)
    for model in both()[1:]:
        with pytest.raises(AdapterError, match="second derivatives .* tensor-parallel"):
            torch.autograd.grad(model(x).square().sum(), x, create_graph=True)


def by_tokens(module, inputs, device_mesh):
    (x,) = inputs
    return x if isinstance(x, DTensor) else DTensor.from_local(x, device_mesh, [Shard(0)])


def replicated():
    """Linears that every rank holds whole, between activations that are sharded by tokens."""
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    whole = with_values(LoRA(dim=4, seed=1)(MLP()))
    model = MLP()
    for layer in (model.up, model.down):
        distribute_module(layer, mesh(), input_fn=by_tokens)
    with_values(LoRA(dim=4, seed=1)(model))
    assert model.up.lora_a.weight.placements == (Replicate(),)
    mine = x.chunk(2)[dist.get_rank()]
    out = model(mine)
    torch.testing.assert_close(out.full_tensor(), whole(x))
    out.full_tensor().square().mean().backward()
    whole(x).square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        if q[1].grad is not None:
            torch.testing.assert_close(full_tensor(p.grad), q[1].grad, msg=name)


def collectives():
    """The base's own, and one sum for the replicated factor of each layer."""
    x = torch.randn(3, 8, requires_grad=True)

    def count(model):
        with CommDebugMode() as mode:
            model(x).sum().backward()
        return mode.get_total_counts()

    base = parallelize_module(MLP(), mesh(), PLAN).requires_grad_(False)
    with CommDebugMode() as forward, torch.no_grad():
        base(x)
    _, first, last = both()
    with CommDebugMode() as adapted, torch.no_grad():
        first(x)
    assert adapted.get_comm_counts() == forward.get_comm_counts()
    assert count(first) == count(last) == count(base) + 2


def masks():
    """The same elements dropped where all ranks hold them, others where each holds some."""
    for position in ("pre", "post"):
        recipe = LoRA(dim=8, seed=1, dropout=0.5, dropout_position=position)
        column = parallelize_module(MLP(), mesh(), COLUMN_KEPT)
        recipe(column)
        # A copies x to the output, so that the branch shows what was dropped
        layer = column.up
        identity = torch.eye(24, 8)
        with torch.no_grad():
            layer.lora_a.weight.to_local().copy_(torch.eye(8))
            layer.lora_b.weight.copy_(
                distribute_tensor(identity.repeat(1, 1), mesh(), [Shard(0)], src_data_rank=None)
            )
            layer.lora_b.weight.to_local().fill_(1.0)
        torch.manual_seed(3)
        ones = torch.ones(64, 8)
        base = nn.functional.linear(ones, full_tensor(layer.weight), full_tensor(layer.bias))
        branch = column.up(ones).full_tensor() - base
        mine, other = branch.chunk(2, dim=-1)
        if position == "pre":  # x is the same everywhere: so is what is left of it
            torch.testing.assert_close(mine, other)
        else:
            assert not torch.equal(mine == 0, other == 0)
            assert 0.4 < float((branch == 0).float().mean()) < 0.6
        assert torch.get_rng_state().sum() == _first(torch.get_rng_state().sum())


def _first(value):
    value = value.clone()
    dist.broadcast(value, 0)
    return value


def row_masks():
    """A row-parallel branch is dropped after its sum: every part of it by the same mask."""
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(2))
    whole, first, _ = both(dropout=0.5, dropout_position="post")
    for model in (whole, first):
        model.up.dropout.p = 0.0
    torch.manual_seed(3)
    expected = whole(x)
    torch.manual_seed(3)
    torch.testing.assert_close(first(x), expected)
    # recomputed in backward by the same masks
    for reentrant in (False, True):
        _, model, _ = both(dropout=0.5)
        torch.manual_seed(4)
        model(x).sum().backward()
        plain = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.requires_grad}
        model.zero_grad()
        torch.manual_seed(4)
        torch.utils.checkpoint.checkpoint(
            model, x.clone().requires_grad_(), use_reentrant=reentrant
        ).sum().backward()
        for name, grad in plain.items():
            torch.testing.assert_close(model.get_parameter(name).grad.full_tensor(), grad)


def refusals():
    _, model, _ = both(dropout=0.5)
    _masks_drawn.clear()
    torch.manual_seed(dist.get_rank())
    with pytest.raises(AdapterError, match="with the same s on all of them"):
        model(torch.ones(2, 8))
    grid = dist.init_device_mesh("cpu", (1, 2))
    both_ways = nn.Linear(8, 8)
    both_ways.weight = nn.Parameter(
        distribute_tensor(both_ways.weight, grid, [Replicate(), Shard(0)])
    )
    both_ways._distribute_module_applied = True
    with pytest.raises(UnsupportedLinearError, match="over a mesh of 2 dimensions"):
        patch_linear_module(both_ways)


def unfrozen():
    """SequenceParallel makes frozen norms trainable, which the first forward tells."""
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    LoRA(dim=4)(model)
    parallelize_module(model, mesh(), {"0": SequenceParallel(use_local_output=True)})
    with pytest.warns(UserWarning, match=r"0\.weight, 0\.bias: frozen by the recipe, and train"):
        model(torch.randn(3, 4, 8))


def unseeded():
    torch.manual_seed(dist.get_rank())
    model = LoRA(dim=4)(parallelize_module(MLP(), mesh(), PLAN))
    linear = patch_linear_module(parallelize_module(MLP(), mesh(), {"up": ColwiseParallel()}).up)
    for factor in (*adapter_state_dict(model).values(), full_tensor(linear.lora_a.weight)):
        assert torch.equal(factor, _first(factor))


def run(*bodies):
    for body in bodies:
        body()


def test_sharded_layers_agree_with_whole_ones(tmp_path):
    on_ranks(
        2, functools.partial(run, numbers, second_derivatives, replicated, collectives), tmp_path
    )


def test_masks_agree_where_activations_do_and_ranks_that_would_not_are_refused(tmp_path):
    on_ranks(2, functools.partial(run, masks, row_masks, unseeded, unfrozen, refusals), tmp_path)
