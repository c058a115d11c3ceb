"""A branch on Megatron's linears over two tensor parallel ranks: the numbers of one process."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from bridge.peft import adapter_state_dict
from bridge.peft.model.walk import adapted_modules
from bridge.peft.ops.dropout import SeededMask
from bridge.peft.parallel.agreement import check_alike
from bridge.peft.parallel.exchange import Dropped
from bridge.peft.parallel.grad_norm import clip_grad_norm_
from tests.helpers.megatron_ranks import (
    RECIPE,
    megatron_loop,
    trained,
    whole_gradients,
    whole_logits,
    with_random_b,
)
from tests.helpers.ranks import on_ranks

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def twenty_steps(model, loss_of):
    """Twenty steps of AdamW on batches of their own, clipped; the norms on the way."""
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    norms = []
    for step in range(20):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        group = model.output_layer.tp_group
        norms.append(clip_grad_norm_(model.parameters(), 0.1, group))
        optimizer.step()
    assert set(optimizer.state) == set(trained(model).values())
    return torch.stack(norms)


def results(recipe=RECIPE, **config):
    """All that must not depend on how many ranks compute it."""
    from tests.helpers.megatron import gpt, loss_of

    model = recipe(gpt(**config))
    found = {"start": {n: t.clone() for n, t in adapter_state_dict(model).items()}}
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    with_random_b(model)
    found["logits"] = whole_logits(model)
    loss = loss_of(model)
    loss.backward()
    found["loss"] = loss.detach()
    found["gradients"] = whole_gradients(model)
    found["norms"] = twenty_steps(model, loss_of)
    found["end"] = {n: t.clone() for n, t in adapter_state_dict(model).items()}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".adapter." in name)
        if not parameter.requires_grad:
            assert parameter.grad is None and torch.equal(parameter, base[name]), name
    return found


def compare_with_one_process():
    from tests.helpers.megatron import MOE, cuda_calls_answered_by_the_cpu, start

    # Megatron asks for sequence parallel where experts are split
    for config, ways in (({}, (False, True)), (MOE, (True,))):
        start(tensor=1)
        with cuda_calls_answered_by_the_cpu():
            expected = results(**config)
        for split in ways:
            start(tensor=2)
            with cuda_calls_answered_by_the_cpu():  # by sequence parallel's gathers
                found = results(sequence_parallel=split, **config)
            assert_same(found, expected)


def assert_same(found, expected):
    assert found["start"].keys() == expected["start"].keys()
    for name, tensor in found["start"].items():
        assert torch.equal(tensor, expected["start"][name]), name
    for name in ("logits", "loss", "gradients"):
        torch.testing.assert_close(found[name], expected[name], **CLOSE)
    torch.testing.assert_close(found["norms"], expected["norms"], rtol=1e-4, atol=0)
    torch.testing.assert_close(found["end"], expected["end"], rtol=1e-4, atol=1e-4)
    moved = [n for n, t in found["end"].items() if not torch.equal(t, found["start"][n])]
    assert len(moved) == len(found["start"])


@pytest.mark.distributed
def test_two_tensor_parallel_ranks_compute_what_one_process_computes(tmp_path):
    on_ranks(2, compare_with_one_process, tmp_path)


def compare_megatrons_own_loop():
    from tests.helpers.megatron import cuda_calls_answered_by_the_cpu, gpt, loss_of, start

    with cuda_calls_answered_by_the_cpu():
        start(tensor=1)
        plain = with_random_b(RECIPE(gpt()))
        loss_of(plain).backward()
        expected = megatron_loop(with_random_b(RECIPE(gpt())))
        torch.testing.assert_close(expected[0], whole_gradients(plain), **CLOSE)
        for split in (False, True):
            start(tensor=2)
            model = with_random_b(RECIPE(gpt(sequence_parallel=split)))
            gradients, norms, end = megatron_loop(model)
            torch.testing.assert_close(gradients, expected[0], **CLOSE)
            torch.testing.assert_close(norms, expected[1], rtol=1e-5, atol=0)
            torch.testing.assert_close(end, expected[2], rtol=1e-4, atol=1e-4)


@pytest.mark.distributed
def test_megatrons_own_ddp_optimizer_and_finalize_sum_nothing_twice(tmp_path):
    on_ranks(2, compare_megatrons_own_loop, tmp_path)


def draw_dropout_where_it_belongs():
    from tests.helpers.megatron import cuda_calls_answered_by_the_cpu, gpt, loss_of, start

    with cuda_calls_answered_by_the_cpu():
        for split in (False, True):
            for position in ("pre", "post"):
                start(tensor=2)
                recipe = dataclasses.replace(RECIPE, dropout=0.5, dropout_position=position)
                model = with_random_b(recipe(gpt(sequence_parallel=split))).train()
                layer = model.decoder.layers[0]
                for linear, is_column in (
                    (layer.self_attention.linear_qkv, True),
                    (layer.self_attention.linear_proj, False),
                ):
                    masks = drawn_masks(linear)
                    # whole on every rank but where the tensor, or its tokens, are split
                    whole = not split and is_column == (position == "pre")
                    assert torch.equal(*masks) == whole, (split, position, is_column)
                grads = []
                for again in (None, "full"):
                    model.config.recompute_granularity = again
                    model.config.recompute_method, model.config.recompute_num_layers = "uniform", 1
                    torch.manual_seed(11)
                    model.zero_grad()
                    loss_of(model).backward()
                    grads.append({n: g.clone() for n, g in whole_gradients(model).items()})
                    assert all(bool(g.any()) for g in grads[-1].values())
                # the masks of the first pass are those of the second, on every rank
                torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)
                # whole factors have got one gradient, whatever the masks
                for _, adapted in adapted_modules(model):
                    for matrix in (adapted.lora_a, adapted.lora_b):
                        if matrix.shard.dim is None:
                            check_alike(
                                matrix.weight.grad.tolist(), "gradients", "", dist.group.WORLD
                            )


def drawn_masks(linear):
    """The masks of both ranks in the next call of a linear."""
    seen = []
    whole = SeededMask.whole
    width = linear.base_weight.shape[1]
    with pytest.MonkeyPatch.context() as patch:
        original = Dropped.of.__func__

        def recorded(cls, *args):
            drop = original(cls, *args)
            seen.append(whole(drop.pre or drop.post))
            return drop

        patch.setattr(Dropped, "of", classmethod(recorded))
        linear(torch.ones(4, 2, width))
    masks = [torch.empty_like(seen[0], dtype=torch.uint8) for _ in range(2)]
    dist.all_gather(masks, seen[0].to(torch.uint8))
    return masks


@pytest.mark.distributed
def test_dropout_is_alike_where_tensors_are_whole_and_differs_where_they_are_split(tmp_path):
    on_ranks(2, draw_dropout_where_it_belongs, tmp_path)
