"""What the formulas of scaling say is what real ranks hold and communicate."""

import functools

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn

from bridge.peft import LoRA
from bridge.peft.scaling import Layout, per_rank
from tests.helpers import models
from tests.helpers.counting import Collectives, local, saved_in, size_of, storage_bytes
from tests.helpers.ranks import on_ranks

pytestmark = pytest.mark.distributed

RECIPE = LoRA(dim=4, seed=1)
BATCH, LENGTH = 2, 8
CLOSE = functools.partial(pytest.approx, rel=0.05)


def base_model(dtype=torch.float32):
    torch.manual_seed(0)
    more = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": False}
    return models.llama(num_hidden_layers=3, **more).to(dtype)


def batch():
    ids = torch.randint(0, 64, (BATCH, LENGTH))
    return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(LENGTH)[None]}


def tensor_parallel(model, mesh, *, sequence):
    """As the model's own plan says, by torch's styles."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor import parallel as tp

    tokens = {"output_layouts": Shard(1)} if sequence else {}
    inputs = {"input_layouts": Shard(1)} if sequence else {}
    styles = {
        "colwise": tp.ColwiseParallel(),
        "rowwise": tp.RowwiseParallel(**tokens),
        "embedding_rowwise": tp.RowwiseParallel(input_layouts=Replicate(), **tokens),
        "colwise_gather_output": tp.ColwiseParallel(output_layouts=Replicate(), **inputs),
    }
    plan = {name: styles[style] for name, style in model.tp_plan.items()}
    if sequence:
        here, all_ = {"hidden_states": Shard(1)}, {"hidden_states": Replicate()}
        plan["model.layers.*.self_attn"] = tp.PrepareModuleInput(
            input_kwarg_layouts=here, desired_input_kwarg_layouts=all_
        )
        plan["model.layers.*.mlp"] = tp.PrepareModuleInput(
            input_layouts=Shard(1), desired_input_layouts=Replicate()
        )
        for norm in ("norm", "layers.*.input_layernorm", "layers.*.post_attention_layernorm"):
            plan[f"model.{norm}"] = tp.SequenceParallel(use_local_output=True)
    tp.parallelize_module(model, mesh, plan)


def laid_out(model, layout, saved):
    """The model adapted and laid out, and what its process groups are for.

    Args:
        saved: Where it is saved, for transformers to split it itself; else None.
    """
    sizes = (layout.dp, layout.shards, layout.tp)
    mesh = dist.init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "fsdp", "tp"))
    if saved:
        own = transformers.DistributedConfig(tp_plan="auto")
        model = transformers.AutoModelForCausalLM.from_pretrained(saved, distributed_config=own)
        mesh = model.lm_head.weight.device_mesh
        return RECIPE(model.train()), {mesh.get_group().group_name: "tp"}
    if layout.tp > 1:
        tensor_parallel(model, mesh["tp"], sequence=layout.sequence_parallel)
    RECIPE(model)
    if layout.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.config.use_cache = False
    kinds = {mesh.get_group(name).group_name: name for name in ("dp", "fsdp", "tp")}
    if layout.shards > 1:
        from torch.distributed.fsdp import fully_shard

        over = mesh["dp", "fsdp"] if layout.dp > 1 else mesh["fsdp"]
        for layer in model.model.layers:
            fully_shard(layer, mesh=over)
        fully_shard(model, mesh=over)
    elif layout.dp > 1:
        return nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group("dp")), kinds
    return model, kinds


def check_memory(model, layout, cost, optimizer):
    held = storage_bytes if layout.shards > 1 else lambda tensors: sum(map(size_of, tensors))
    trained = [p for p in model.parameters() if p.requires_grad]
    states = [v for s in optimizer.state.values() for k, v in s.items() if k != "step"]
    assert held(local(p) for p in model.parameters() if not p.requires_grad) == cost.memory["base"]
    assert held(map(local, trained)) == cost.memory["adapter"]
    assert held(local(p.grad) for p in trained) == cost.memory["gradients"]
    assert held(map(local, states)) == CLOSE(cost.memory["optimizer"])


def check_traffic(seen, cost):
    expected_calls, expected_bytes = {}, {}
    for t in cost.traffic:
        key = t.collective, t.over
        expected_bytes[key] = expected_bytes.get(key, 0) + t.bytes
        expected_calls[key] = expected_calls.get(key, 0) + (t.calls or 0)
    assert seen.bytes.keys() == expected_bytes.keys()
    for key, count in seen.bytes.items():
        assert count == CLOSE(expected_bytes[key]), key
        assert seen.calls[key] == expected_calls[key] or key == ("all-reduce", "dp"), key


def check(saved=None, **sizes):
    layout = Layout(tokens=BATCH * LENGTH, **sizes)
    model = base_model(torch.bfloat16 if layout.tp == 1 and layout.shards > 1 else torch.float32)
    cost = per_rank(RECIPE.plan(model), model, layout)
    model, kinds = laid_out(model.train(), layout, saved)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    inputs = batch()
    with Collectives(kinds) as seen:
        model(**inputs).loss.backward()
    optimizer.step()
    check_memory(model, layout, cost, optimizer)
    check_traffic(seen, cost)
    if layout.shards > 1:
        assert seen.peak == CLOSE(cost.memory["working_set"])
    elif not layout.checkpointing and layout.dp == 1:
        with saved_in(model, "model.layers.") as saved:
            model(**inputs)
        assert saved["branches"] == CLOSE(cost.memory["branch_activations"])
        assert saved["base"] == CLOSE(cost.memory["base_activations"])


def run(layouts):
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for sizes in layouts:
        check(world=dist.get_world_size(), **sizes)


TWO = [
    {"fsdp": 1},
    {"fsdp": 2},
    {"fsdp": 2, "checkpointing": True},
    {"tp": 2},
    {"tp": 2, "checkpointing": True},
    {"tp": 2, "sequence_parallel": True},
    {"tp": 2, "sequence_parallel": True, "checkpointing": True},
]
FOUR = [{"fsdp": 4}, {"fsdp": 2}, {"fsdp": 2, "tp": 2}]


@pytest.mark.parametrize(("world", "layouts"), [(2, TWO), (4, FOUR)], ids=["2 ranks", "4 ranks"])
def test_what_ranks_hold_and_communicate_is_what_the_plan_says(world, layouts, tmp_path):
    base_model().save_pretrained(saved := tmp_path / "model")
    if world == 2:
        layouts = [*layouts, {"tp": 2, "saved": saved}]
    on_ranks(world, functools.partial(run, layouts), tmp_path)
