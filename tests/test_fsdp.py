"""FSDP2 over two processes, sharded before or after the recipe: the numbers of one process."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from bridge.peft import LoRA, adapter_state_dict
from tests.helpers.fsdp import (
    RECIPE,
    Tiny,
    base,
    batch,
    close,
    full,
    loss_of,
    mine,
    move_b,
    shard,
    strict,
    trainable,
)
from tests.helpers.ranks import on_ranks

ORDERS = ("recipe first", "sharded first")


def sharded(order, recipe=RECIPE, shard=shard):
    model = base()
    steps = (recipe, shard) if order == "recipe first" else (shard, recipe)
    for step in steps:
        step(model)
    return model


def train(model, steps, part, accumulate=1):
    """AdamW with clipped gradients; the norms before clipping."""
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=3e-3)
    norms = []
    for step in range(steps):
        pieces = [[part(t).chunk(accumulate)[i] for t in batch(step)] for i in range(accumulate)]
        for i, piece in enumerate(pieces):
            if accumulate > 1 and hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(i == accumulate - 1)
            (loss_of(model, *piece) / accumulate).backward()
        norms.append(full(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)))
        optimizer.step()
        optimizer.zero_grad()
    assert len(optimizer.state) == len(trainable(model)) == 12
    return torch.stack(norms)


def check_contract(model, accumulate=1, steps=4):
    whole, before = RECIPE(base()), base().state_dict()
    close(adapter_state_dict(model), adapter_state_dict(whole), 0)
    for each in (whole, model):
        move_b(each)
    ids, classes = batch(0)
    torch.testing.assert_close(model(mine(ids)), mine(whole(ids)), rtol=0, atol=1e-5)
    loss_of(whole, ids, classes).backward()
    loss = loss_of(model, mine(ids), mine(classes))
    loss.backward()
    loss = loss.detach()
    dist.all_reduce(loss)
    torch.testing.assert_close(loss / 2, loss_of(whole, ids, classes).detach(), rtol=0, atol=1e-5)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
    gradients = {name: p.grad for name, p in trainable(model).items()}
    close(gradients, {name: p.grad for name, p in trainable(whole).items()}, 1e-5)
    for each in (whole, model):
        each.zero_grad()
    norms = train(model, steps, mine, accumulate), train(whole, steps, lambda t: t)
    torch.testing.assert_close(*norms, rtol=1e-4, atol=0)
    close(adapter_state_dict(model), adapter_state_dict(whole), 1e-4)
    after = {n: p for n, p in model.named_parameters() if "lora_" not in n}
    close(after, before, 0)


def contract():
    strict()
    for order in ORDERS:
        check_contract(sharded(order), steps=20)
        check_contract(sharded(order), accumulate=2)
        for reshard in (True, False):
            check_contract(sharded(order, shard=partial(shard, reshard_after_forward=reshard)))
        # the whole model as one group, and each linear as a group of its own
        check_contract(sharded(order, shard=partial(shard, parts=())))
        check_contract(sharded(order, shard=shard_each_linear))
        offloaded = partial(shard, offload_policy=CPUOffloadPolicy(pin_memory=False))
        check_contract(sharded(order, shard=offloaded))
        # hybrid: replicated over two, sharded over one
        mesh = dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        check_contract(sharded(order, shard=partial(shard, mesh=mesh)))


def shard_each_linear(model):
    return shard(model, parts=[m for m in model.modules() if isinstance(m, nn.Linear)])


def what_has_run_before():
    """The base is evaluated and trained for a step, then adapted: frozen, with new parameters."""
    strict()
    for reshard in (True, False):
        model = shard(base(), reshard_after_forward=reshard)
        loss_of(model, *map(mine, batch(9))).backward()
        model.zero_grad()
        with torch.no_grad():
            model(batch(9)[0])  # leaves gathered copies in the modules
        check_contract(RECIPE(model))


def remember_path(layer, *_):
    layer.path_in_forward = layer.lora_path()


def paths():
    """In a forward the layers compute on plain tensors, by the fast path."""
    for order in ORDERS:
        model = sharded(order)
        layers = [m for m in model.modules() if hasattr(m, "lora_path")]
        for layer in layers:
            layer.register_forward_hook(remember_path)
        model(batch(0)[0])
        assert [layer.path_in_forward.name for layer in layers] == ["fused"] * 6
    assert {row.path for row in RECIPE.plan(shard(base())).rows} == {"fused"}


def mixed_precision():
    strict()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ways = [partial(shard, mp_policy=policy, reshard_after_forward=r) for r in (True, False)]
    models = [move_b(sharded(order, shard=way)) for order in ORDERS for way in ways]
    whole = move_b(RECIPE(base()))
    ids, classes = batch(0)
    for model in models:
        assert model(mine(ids)).dtype == torch.bfloat16
        # A and B stay in float32: what is saved is not the copy that was computed with
        close(adapter_state_dict(model), adapter_state_dict(whole), 0)
        loss_of(model, mine(ids), mine(classes)).backward()
        assert {p.grad.dtype for p in trainable(model).values()} == {torch.float32}
    loss_of(whole, ids, classes).backward()
    first, *others = ({n: full(p.grad) for n, p in trainable(m).items()} for m in models)
    for other in others:
        close(first, other, 0)
    close(first, {n: p.grad for n, p in trainable(whole).items()}, 5e-3)


def from_meta():
    """meta, recipe and `fully_shard` in both orders, `to_empty`, the base from rank 0 alone."""
    strict()
    whole = RECIPE(base())
    state = base().state_dict() if dist.get_rank() == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    for steps in ((RECIPE, shard), (shard, RECIPE)):
        with torch.device("meta"):
            model = Tiny()
        for step in steps:
            step(model)
        model.to_empty(device="cpu")
        set_model_state_dict(model, copy.copy(state), options=options)
        close(dict(model.named_parameters()), dict(whole.named_parameters()), 0)
        assert all(not b.any() for n, b in adapter_state_dict(model).items() if "lora_b" in n)
        check_contract(model)


def dropout():
    recipe = LoRA(target_modules=["q", "up", "down"], dim=3, dropout=0.5, seed=7)
    outputs = []
    for order in (*ORDERS, *ORDERS):
        model = move_b(sharded(order, recipe)).train()
        torch.manual_seed(100 + dist.get_rank())
        outputs.append(model(batch(0)[0]).detach())
    assert all(torch.equal(outputs[0], output) for output in outputs)
    theirs = [torch.empty_like(outputs[0]) for _ in range(2)]
    dist.all_gather(theirs, outputs[0])
    assert not torch.allclose(*theirs)


def precisions_and_starts():
    paths()
    mixed_precision()
    from_meta()
    dropout()
    what_has_run_before()


def refusals():
    from bridge.peft import AdapterError, LinearAdapter, patch_linear_module
    from bridge.peft.parallel import fsdp

    model = shard(base())
    for make in (patch_linear_module, LinearAdapter):
        with pytest.raises(NotImplementedError, match=r"sharded.*LoRA\(...\)\(model\) adapts it"):
            make(model.blocks[0].q)
    known, fsdp._ARGUMENTS = fsdp._ARGUMENTS, ("another", "torch")
    before = list(model.state_dict())
    with pytest.raises(AdapterError, match=r"adapt the model first, then call fully_shard"):
        RECIPE(model)
    assert list(model.state_dict()) == before
    assert all(p.requires_grad for p in model.parameters())
    fsdp._ARGUMENTS = known
    RECIPE(model)
    above = shard(base(), parts=())
    with pytest.raises(AdapterError, match=r"above the ModuleList.*pass the whole model"):
        RECIPE(above.blocks)
    ignoring = base()
    fully_shard(ignoring, ignored_params=set(ignoring.parameters()))
    with pytest.raises(AdapterError, match=r"manages no parameter of a FSDPTiny"):
        RECIPE(ignoring)


@pytest.mark.distributed
def test_both_orders_keep_the_contract_in_every_way_of_sharding(tmp_path):
    on_ranks(2, contract, tmp_path)


@pytest.mark.distributed
def test_precisions_starts_and_dropout_in_both_orders(tmp_path):
    on_ranks(2, precisions_and_starts, tmp_path)


@pytest.mark.distributed
def test_what_fully_shard_cannot_take_up_is_refused_before_anything_changes(tmp_path):
    on_ranks(1, refusals, tmp_path)
