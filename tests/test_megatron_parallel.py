"""A branch on Megatron's linears over two tensor parallel ranks: the numbers of one process."""

import pytest
import torch

from bridge.peft import adapter_state_dict
from bridge.peft.parallel.grad_norm import clip_grad_norm_
from tests.helpers.megatron_ranks import (
    RECIPE,
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
    from tests.helpers.megatron import cuda_calls_answered_by_the_cpu, start

    start(tensor=1)
    expected = results()
    for split in (False, True):
        start(tensor=2)
        with cuda_calls_answered_by_the_cpu():  # by sequence parallel's gathers
            found = results(sequence_parallel=split)
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
