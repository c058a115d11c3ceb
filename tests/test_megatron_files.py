"""What is saved of a Megatron model does not depend on how many ranks saved it."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bridge.peft import (
    adapter_state_dict,
    disable_adapters,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)
from bridge.peft.doctor import doctor
from bridge.peft.model.sharded_state import adapter_sharded_state_dict
from bridge.peft.model.walk import adapted_modules
from tests.helpers.megatron_ranks import RECIPE, whole_logits, with_random_b
from tests.helpers.ranks import on_ranks

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def save_at_any_size():
    from tests.helpers.megatron import batch, gpt, positions, start

    root = Path(os.environ["ADAPTER_DIRECTORY"])
    rank = dist.get_rank()
    start(tensor=1)
    whole = with_random_b(RECIPE(gpt()))
    expected, logits = adapter_state_dict(whole), whole_logits(whole)
    if rank == 0:
        save_adapter(whole, root / "one")
    merged = merge(whole)
    weights = {n: t for n, t in whole.state_dict().items() if n.endswith("weight")}
    assert not any(".adapter." in name for name in weights)

    start(tensor=2)
    split = with_random_b(RECIPE(gpt()))
    save_adapter(split, root / "two")  # a collective, at the end of which the first rank has it
    dist.barrier()
    assert contents(root / "one") == contents(root / "two")

    # each loads what the other saved, without a word of another base
    again = load_adapter(gpt(), root / "one")
    assert all(torch.equal(t, expected[n]) for n, t in adapter_state_dict(again).items())
    torch.testing.assert_close(whole_logits(again), logits, **CLOSE)
    load_adapter(again, root / "two")  # once more, into the adapter that is there
    with disable_adapters(again):
        base = whole_logits(again)
    torch.testing.assert_close(base, whole_logits(gpt()), rtol=0, atol=0)

    inputs = dict(zip(("input_ids", "position_ids"), (batch()[0], positions()), strict=True))
    report = doctor(again, inputs={**inputs, "attention_mask": None})
    assert report.healthy, report

    kept = {f: m.base_weight.clone() for f, m in adapted_modules(again)}
    assert [r.fqn for r in merge(again).rows] == [r.fqn for r in merged.rows]
    for fqn, layer in adapted_modules(again):
        joined = layer.weight_shard(layer).joined(layer.base_weight)
        torch.testing.assert_close(joined, weights[f"{fqn}.weight"], **CLOSE)
    torch.testing.assert_close(whole_logits(again), logits, rtol=1e-4, atol=1e-5)
    unmerge(again)
    assert all(torch.equal(m.base_weight, kept[f]) for f, m in adapted_modules(again))

    start(tensor=1)
    one = load_adapter(gpt(), root / "two")
    assert all(torch.equal(t, expected[n]) for n, t in adapter_state_dict(one).items())


@pytest.mark.distributed
def test_a_saved_adapter_is_the_same_file_on_one_rank_and_on_two(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTER_DIRECTORY", str(tmp_path))
    on_ranks(2, save_at_any_size, tmp_path)


def scrambled(model):
    """The model with other values of A and B, which a checkpoint must replace."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(7.0)
    return model


def checkpoint_between_sizes():
    from megatron.core import dist_checkpointing

    from tests.helpers.megatron import cuda_calls_answered_by_the_cpu, gpt, start

    root = Path(os.environ["ADAPTER_DIRECTORY"])
    some = dataclasses.replace(RECIPE, target_modules=["*.layers.1.*"])
    apart = {"non_homogeneous_layers": True}
    for saved, loaded, alone, recipe, metadata in (
        (2, 1, False, RECIPE, {}),
        (1, 2, False, RECIPE, {}),
        (2, 1, True, RECIPE, {}),
        (1, 2, True, RECIPE, {}),
        (2, 1, True, some, apart),  # which layers there are differs, as Megatron says it
    ):

        def of(model, alone=alone, metadata=metadata):
            if alone:
                return adapter_sharded_state_dict(model, dict(metadata))
            return model.sharded_state_dict(metadata=dict(metadata))

        directory = root / f"{saved}-{loaded}-{alone}-{bool(metadata)}"
        if dist.get_rank() == 0:
            directory.mkdir()
        dist.barrier()
        with cuda_calls_answered_by_the_cpu():  # `save` waits for the GPU
            start(tensor=saved)
            model = with_random_b(recipe(gpt()))
            expected = adapter_state_dict(model), whole_logits(model)
            state = of(model)
            assert alone == all(".adapter." in name for name in state)
            dist_checkpointing.save(state, str(directory))
            start(tensor=loaded)
            # the base's weights are in the checkpoint, or the same without it
            model = scrambled(recipe(gpt(seed=0 if alone else 5)))
            state = dist_checkpointing.load(of(model), str(directory))
            missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected and not any(".adapter." in name for name in missing)
        for name, tensor in adapter_state_dict(model).items():
            assert torch.equal(tensor, expected[0][name]), name
        torch.testing.assert_close(whole_logits(model), expected[1], **CLOSE)


@pytest.mark.distributed
def test_distributed_checkpoints_load_on_another_number_of_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTER_DIRECTORY", str(tmp_path))
    on_ranks(2, checkpoint_between_sizes, tmp_path)
