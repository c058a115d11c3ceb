"""Files, merging and disabling of a model that FSDP2 shards: what one process does, bit for bit."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from bridge.peft import (
    AdapterError,
    LoRA,
    adapter_state_dict,
    disable_adapters,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)
from bridge.peft.doctor import doctor
from bridge.peft.formats.peft import read_adapter
from tests.helpers.fsdp import RECIPE, base, batch, close, full, loss_of, move_b, shard, strict
from tests.helpers.layers import DoublingLinear
from tests.helpers.ranks import on_ranks

WITH_HEAD = LoRA(
    target_modules=["q", "up", "down"], dim=3, alpha=6, seed=7, modules_to_train=["head"]
)
#: After a forward the modules hold gathered copies in another dtype.
COMPUTED = partial(
    shard,
    mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16),
    reshard_after_forward=False,
)
#: Likewise, in the dtype of the parameters.
KEPT = partial(shard, reshard_after_forward=False)


def trained(recipe=WITH_HEAD, shard=None, order=("recipe", "shard"), dtype=torch.float32):
    """A model with values in B and in the head that is trained beside it."""
    model = base().to(dtype)
    steps = {"recipe": recipe, "shard": shard or (lambda model: model)}
    for step in order:
        steps[step](model)
    move_b(model)
    with torch.no_grad():
        for parameter in model.head.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    return model


def outputs(model):
    with torch.no_grad():
        return model(batch(0)[0])


def save_by_one(model, name):
    """Save a model that is whole on every rank, once."""
    if dist.get_rank() == 0:
        save_adapter(model, directory(name))
    dist.barrier()
    return directory(name)


def directory(name):
    return Path(os.environ["ADAPTER_DIRECTORY"]) / name


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def the_same_file():
    for recipe, name in ((RECIPE, "branches"), (WITH_HEAD, "with a head")):
        one = contents(save_by_one(trained(recipe), name))
        for order in (("recipe", "shard"), ("shard", "recipe")):
            model = trained(recipe, shard, order)
            save_adapter(model, directory("sharded"))
            assert contents(directory("sharded")) == one
            # the gathered copies are not what is saved
            model = trained(recipe, COMPUTED, order)
            outputs(model)
            save_adapter(model, directory("computed"))
            assert contents(directory("computed")) == one
    # A and B on every rank, the head alone in shards
    save_adapter(trained(shard=lambda model: fully_shard(model.head)), directory("head"))
    assert contents(directory("head")) == one


def loading():
    whole = trained()
    path, wanted = save_by_one(whole, "adapter"), outputs(whole)
    targets = {
        "sharded": shard(base()),
        "sharded, then adapted": WITH_HEAD(shard(base())),
        "adapted, then sharded": KEPT(WITH_HEAD(base())),
    }
    for model in list(targets.values()):
        for _ in range(2):  # as it is, and when it holds gathered copies
            load_adapter(model, path)
            torch.testing.assert_close(outputs(model), wanted, rtol=0, atol=1e-5)
        close(adapter_state_dict(model), adapter_state_dict(whole), 0)
        assert torch.equal(full(model.head.weight), whole.head.weight)
        loss_of(model, *batch(0)).backward()
        assert model.head.weight.grad is not None
        assert model.blocks[0].q.lora_a.weight.grad is not None
        assert model.blocks[0].q.weight.grad is None


def disabling():
    whole = trained()
    path, wanted, of_base = save_by_one(whole, "adapter"), outputs(whole), outputs(base())
    for model in (
        load_adapter(shard(base()), path),
        trained(shard=shard),
        trained(shard=KEPT, order=("shard", "recipe")),
    ):
        loss = loss_of(model, *batch(0))  # its graph lives on while the adapters are off
        with disable_adapters(model):
            torch.testing.assert_close(outputs(model), of_base, rtol=0, atol=1e-5)
            assert not model.head.weight.requires_grad
        torch.testing.assert_close(outputs(model), wanted, rtol=0, atol=1e-5)
        loss.backward()
        loss_of(whole, *batch(0)).backward()
        close(
            {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
            {n: p.grad for n, p in whole.named_parameters() if p.grad is not None},
            1e-5,
        )
        whole.zero_grad()


def merging():
    for dtype in (torch.float32, torch.bfloat16):
        recipe = WITH_HEAD if dtype == torch.float32 else RECIPE
        whole, model = trained(recipe, dtype=dtype), trained(recipe, KEPT, dtype=dtype)
        before, wanted = dict(base().to(dtype).named_parameters()), outputs(whole)
        outputs(model)
        report, report_of_whole = merge(model), merge(whole)
        assert report == report_of_whole and len(report.rows) == 6
        after = {n: p for n, p in model.named_parameters() if n in before}
        close(after, {n: p for n, p in whole.named_parameters() if n in before}, 0)
        assert model.state_dict().keys() == whole.state_dict().keys() == before.keys()
        tolerance = 1e-5 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(outputs(model), outputs(whole), rtol=0, atol=tolerance)
        with disable_adapters(model), disable_adapters(whole):
            torch.testing.assert_close(outputs(model), outputs(whole), rtol=0, atol=tolerance)
        save_adapter(model, directory("merged"))
        assert contents(save_by_one(whole, "one")) == contents(directory("merged"))
        unmerge(model)
        frozen = {n: p for n, p in model.named_parameters() if n in before and "head" not in n}
        close(frozen, {n: before[n] for n in frozen}, 0)
        torch.testing.assert_close(outputs(model), wanted, rtol=0, atol=tolerance)


def merging_conv1d():
    from transformers.pytorch_utils import Conv1D

    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(move_b(LoRA(dim=3, seed=7)(nn.ModuleDict({"up": Conv1D(20, 12)}))))
    fully_shard(models[1]["up"])
    for model in models:
        merge(model)
    assert torch.equal(full(models[1]["up"].weight), models[0]["up"].weight)


def a_random_frozen_module():
    """A head from no checkpoint is saved, though sharding loses the marks that tell it."""
    contents_of = {}
    for name in ("one", "sharded"):
        model = base()
        for fqn, parameter in model.named_parameters():
            if "head" not in fqn:
                parameter._is_hf_initialized = True
        with pytest.warns(UserWarning, match="head: from no checkpoint"):
            move_b(RECIPE(model))
        with pytest.warns(UserWarning, match="saved in full though not trained"):
            if name == "one":
                save_adapter(model, directory(f"{name}{dist.get_rank()}"))
                contents_of[name] = contents(directory(f"{name}{dist.get_rank()}"))
            else:
                save_adapter(shard(model), directory(name))
                contents_of[name] = contents(directory(name))
    assert contents_of["one"] == contents_of["sharded"]
    assert {"head.weight", "head.bias"} == set(read_adapter(directory("sharded")).whole)


def refusals():
    tied = base()
    tied.head.weight = tied.embed.weight = nn.Parameter(torch.randn(16, 12))
    tied.head.bias = None
    model = shard(LoRA(target_modules=["head"], dim=2)(tied))
    for untie in (False, True):
        with pytest.raises(AdapterError, match=r"head shares its weight with embed.weight"):
            merge(model, untie=untie)
    own = nn.Sequential(DoublingLinear(12, 12))
    fully_shard(LoRA(dim=2)(own))
    with pytest.raises(AdapterError, match="own forward cannot be tried on a shard"):
        merge(own)
    broken = trained(shard=shard)
    if dist.get_rank() == 1:
        broken.blocks[1].up.weight.to_local()[0, 0] = torch.nan
    with pytest.raises(AdapterError, match=r"blocks.1.up: base weight holds NaN"):
        merge(broken)
    assert not any(getattr(m, "merged", False) for m in broken.modules())
    # new values for one of two tied parameters: FSDP2 would tie them again
    path = save_by_one(_with_head_of_its_own(), "untied")
    tied = base()
    tied.head = nn.Linear(12, 16, bias=False)
    tied.head.weight = tied.embed.weight
    shard(tied)
    with pytest.raises(AdapterError, match=r"head.weight shares its values"):
        load_adapter(tied, path)
    assert not adapter_state_dict(tied)


def missing_on_one_rank():
    whole = trained()
    path = save_by_one(whole, "somewhere")
    here = path if dist.get_rank() == 0 else path / "not-here"
    for model in (shard(base()), trained(shard=shard)):
        with pytest.raises(AdapterError, match=r"not-here is not an adapter directory"):
            load_adapter(model, here)


def doctoring():
    for model in (trained(shard=shard), trained(shard=shard, order=("shard", "recipe"))):
        for _ in range(2):  # as it is, and when it holds gathered copies
            report = doctor(model, inputs={"ids": batch(0)[0]})
            assert report["state"].status == "warn" and "sharded" in report["state"].detail
            outputs(model)


def _with_head_of_its_own():
    model = base()
    model.head = nn.Linear(12, 16, bias=False)
    return LoRA(target_modules=["q"], dim=2, seed=1, modules_to_train=["head"])(model)


def everything():
    strict()
    the_same_file()
    loading()
    disabling()
    merging()
    merging_conv1d()
    refusals()
    missing_on_one_rank()
    doctoring()
    a_random_frozen_module()


@pytest.mark.distributed
def test_sharded_models_save_load_disable_and_merge_as_one_process_does(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTER_DIRECTORY", str(tmp_path / "adapters"))
    on_ranks(2, everything, tmp_path)
