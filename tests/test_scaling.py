"""What a plan costs each rank, on paper: against a fake process group and one real process."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.testing._internal.distributed.fake_pg import FakeStore

from bridge.peft import LoRA
from bridge.peft.cli import main
from bridge.peft.errors import AdapterError
from bridge.peft.ops import dispatch
from bridge.peft.scaling import Layout, per_rank
from bridge.peft.scaling.shapes import block_of
from tests.helpers import models
from tests.helpers.cli_fixtures import save_tiny_model
from tests.helpers.counting import local, saved_in

ROOT = Path(__file__).parent.parent
RECIPE = LoRA(dim=16, seed=1)
LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def llama_70b(**more):
    config = transformers.LlamaConfig(**LLAMA_70B | more)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def cost_of(model, recipe=RECIPE, **layout):
    return per_rank(recipe.plan(model), model, Layout(**{"tokens": 64} | layout))


@pytest.fixture
def fake_world():
    """A process group of 1,024 ranks, of which this process is the first and only one."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1024)
    yield
    dist.destroy_process_group()


def fake_shard(model, fsdp, dp):
    """Adapt a model and shard it over the first ranks of a fake process group."""
    from torch.distributed.fsdp import fully_shard

    RECIPE(model)
    ranks, names = torch.arange(dp * fsdp).reshape(dp, fsdp), ("dp", "fsdp")
    mesh = dist.DeviceMesh("cpu", ranks, mesh_dim_names=names)
    mesh = mesh if dp > 1 else mesh["fsdp"]
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def held(model, *, trained):
    """Bytes of a rank's parameters; on meta no two share a storage."""
    found = (local(p) for p in model.parameters() if p.requires_grad == trained)
    return sum(tensor.untyped_storage().nbytes() for tensor in found)


@pytest.mark.parametrize(
    ("layers", "fsdp", "dp"),
    [(80, 64, 16), (8, 8, 8), (8, 64, 1), (8, 1024, 1)],
)
def test_the_shards_of_a_70b_model_are_those_of_the_plan(layers, fsdp, dp, fake_world):
    model = llama_70b(num_hidden_layers=layers)
    cost = cost_of(model, world=fsdp * dp, fsdp=fsdp)
    fake_shard(model, fsdp, dp)
    assert held(model, trained=False) == cost.memory["base"]
    assert held(model, trained=True) == cost.memory["adapter"]


def test_the_shards_of_a_70b_model_under_tensor_parallel_are_those_of_the_plan(fake_world):
    from torch.distributed.tensor import parallel as tp

    styles = {
        "colwise": tp.ColwiseParallel(),
        "rowwise": tp.RowwiseParallel(),
        "embedding_rowwise": tp.RowwiseParallel(),
        "colwise_gather_output": tp.ColwiseParallel(),
    }
    model = llama_70b()
    cost = cost_of(model, world=64, tp=8, fsdp=1)
    mesh = dist.DeviceMesh("cpu", torch.arange(8))
    tp.parallelize_module(model, mesh, {name: styles[s] for name, s in model.tp_plan.items()})
    RECIPE(model)
    assert held(model, trained=False) == cost.memory["base"]
    assert held(model, trained=True) == cost.memory["adapter"]


def tiny(layers=3, dtype=torch.float32, **more):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": False}
    return models.llama(num_hidden_layers=layers, **sizes, **more).to(dtype).train()


def saved_by(model, recipe):
    """The plan's memory, and what autograd really saves in the blocks."""
    cost = cost_of(model, recipe, world=1, tokens=32)
    recipe(model)
    with saved_in(model, "model.layers.") as saved:
        model(input_ids=torch.ones(2, 16, dtype=torch.long))
    return cost.memory, saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_autograd_saves_is_what_the_plan_says(dtype, dropout, monkeypatch):
    monkeypatch.setattr(dispatch, "has_bfloat16", lambda device: True)
    memory, saved = saved_by(tiny(dtype=dtype), LoRA(dim=4, dropout=dropout, seed=1))
    assert saved["branches"] == pytest.approx(memory["branch_activations"], rel=0.01)
    assert saved["base"] == pytest.approx(memory["base_activations"], rel=0.01)


@pytest.mark.parametrize(
    "recipe", [{"use_dora": True}, {"freeze_a": True}, {"lora_A_init_method": "pissa"}], ids=str
)
def test_other_functions_keep_and_hold_what_the_plan_says(recipe):
    recipe = LoRA(dim=4, seed=1, **recipe)
    model = tiny()
    plan = recipe.plan(model)
    memory, saved = saved_by(model, recipe)
    assert saved["branches"] == pytest.approx(memory["branch_activations"], rel=0.02)
    assert memory["adapter"] == plan.adapter_file_bytes
    assert memory["gradients"] == 4 * plan.trainable
    if not recipe.freeze_a:
        with pytest.raises(AdapterError, match="pass --tp 1"):
            cost_of(tiny(), recipe, world=2, tp=2)


def test_what_autograd_saves_in_other_models_is_what_the_plan_says_or_called_unknown():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    memory, saved = saved_by(models.qwen2(**sizes).train(), LoRA(dim=4))
    assert saved["branches"] == memory["branch_activations"]
    assert saved["base"] == pytest.approx(memory["base_activations"], rel=0.01)
    config = models.llama(**sizes).config.to_dict() | {"model_type": "qwen3"}
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config)).train()
    memory, saved = saved_by(model, LoRA(dim=4))
    assert saved["branches"] == memory["branch_activations"]
    assert memory["base_activations"] is None  # it has norms of queries and keys


BATCH, LENGTH = 8, 32


def kept_by_forward(model):
    """Bytes that the allocator has given out during forward and not got back."""
    ids = torch.ones(BATCH, LENGTH, dtype=torch.long)
    model.model(input_ids=ids, use_cache=False)
    with torch.profiler.profile(profile_memory=True) as profile:
        kept = model.model(input_ids=ids, use_cache=False)
    del kept
    events = profile.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


def test_checkpointing_keeps_what_the_plan_says():
    recipe = LoRA(dim=4, seed=1)
    layout = {"world": 1, "tokens": BATCH * LENGTH}
    after = layout["tokens"] * (2 * 64 + 1) * 4  # the last norm, its scale, its result
    two, three = (kept_by_forward(recipe(tiny(layers))) for layers in (2, 3))
    assert two - after == pytest.approx(cost_of(tiny(2), recipe, **layout).bytes_kept, rel=0.05)
    model = tiny(8)
    cost = cost_of(model, recipe, checkpointing=True, **layout)
    recipe(model).activation_checkpointing_enable({"use_reentrant": False})
    inputs, one_block = kept_by_forward(model) - after, three - two
    assert inputs + one_block == pytest.approx(cost.bytes_kept, rel=0.05)


def test_a_module_trained_in_full_has_gradients_and_an_optimizer_state():
    recipe = LoRA(dim=4, modules_to_train=["lm_head"])
    without, cost = cost_of(tiny(), LoRA(dim=4), world=4), cost_of(tiny(), recipe, world=4)
    head = 64 * 64 * 4
    assert cost.memory["base"] == without.memory["base"]
    assert cost.memory["gradients"] == without.memory["gradients"] + head // 4
    assert cost.memory["optimizer"] == without.memory["optimizer"] + 2 * head // 4
    sent = [sum(t.adapter_bytes for t in c.traffic) for c in (without, cost)]
    assert sent[1] == sent[0] + head


def test_without_state_or_ranks_nothing_is_held_or_sent_for_them():
    cost = cost_of(tiny(), world=1, optimizer="sgd")
    assert cost.memory["optimizer"] == cost.memory["working_set"] == 0
    assert cost.traffic == () and cost.wire_bytes == 0


def test_blocks_that_no_gradient_reaches_are_not_gathered_again():
    recipe = LoRA(dim=4, target_modules=["*.layers.2.*.q_proj"])
    traffic = {t.what: t for t in cost_of(tiny(), recipe, world=2).traffic}
    assert traffic["weights, forward"].calls == 4 and traffic["weights, backward"].calls == 1


def test_wide_shards_of_a_are_told():
    model = llama_70b(num_hidden_layers=2)
    assert not cost_of(model, world=16).notes
    (note,) = cost_of(model, world=64).notes
    assert "over 64 ranks FSDP2 pads A and B" in note


def test_of_an_unknown_block_the_base_s_activations_are_not_known():
    cost = cost_of(models.gpt2(), LoRA(dim=4), world=2)
    assert cost.memory["base_activations"] is None
    assert "not known" in str(cost) and "a gated MLP and two norms alone" in cost.notes[-1]


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"world": 6, "tp": 4}, "world 6 is not a multiple of tp 4; pass a world of 8"),
        ({"world": 8, "tp": 2, "fsdp": 3}, "tp 2 × fsdp 3 = 6; pass an fsdp that divides 4"),
        ({"world": 0}, "world must be an integer >= 1, got 0"),
        ({"world": 2, "tokens": 0.5}, "tokens must be an integer >= 1, got 0.5"),
        ({"world": 2, "sequence_parallel": True}, "needs tensor parallel ranks; pass tp >= 2"),
        ({"world": 2, "optimizer": "lion"}, "optimizer must be one of adamw, sgd, got 'lion'"),
        ({"world": 8, "tp": 4}, "tp 4 does not divide the model's 2 num_key_value_heads"),
    ],
)
def test_sizes_that_do_not_fit_each_other_are_refused(sizes, said):
    with pytest.raises(AdapterError, match=said):
        cost_of(tiny(), **sizes)


def test_a_model_that_does_not_say_how_to_split_it_is_refused():
    with pytest.raises(AdapterError, match="has no tp_plan"):
        cost_of(models.gpt2(), LoRA(dim=4), world=2, tp=2)


@pytest.mark.parametrize(
    ("fqn", "block"),
    [
        ("model.layers.7.mlp.experts.3.up_proj.weight", "model.layers.7"),
        ("0.weight", "0"),
        ("decoder.block.11.layer.0.q.weight", "decoder.block.11"),
        ("model.embed_tokens.weight", ""),
        ("conv2d.weight", ""),
    ],
)
def test_a_block_is_the_name_up_to_its_first_number(fqn, block):
    assert block_of(fqn) == block


@pytest.mark.parametrize("name", ["70B", "405B"])
def test_the_tables_of_the_page_are_what_the_formulas_say(name):
    spec = importlib.util.spec_from_file_location("scaling_tables", ROOT / "scripts/scaling.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    page = (ROOT / "docs/scaling.md").read_text().split(f"\n{name} (")[1].splitlines()
    for row in tables.rows(name, worlds=[64]):
        assert row in page


def test_the_command_prints_and_exports_what_the_function_returns(tmp_path, capsys):
    path = save_tiny_model(tmp_path / "model")
    flags = ["--world", "8", "--tp", "2", "--fsdp", "2", "--tokens", "128", "--checkpointing"]
    arguments = ["plan", "--model", str(path), "--dtype", "bfloat16", "--dim", "4", *flags]
    config = transformers.AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    layout = {"world": 8, "tp": 2, "fsdp": 2, "tokens": 128, "checkpointing": True}
    cost = cost_of(model, LoRA(dim=4), **layout)
    assert main(arguments) == 0
    assert capsys.readouterr().out.endswith(f"\n\n{cost}\n")
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"] == json.loads(json.dumps(cost.to_dict()))
    assert main(["plan", "--model", str(path), "--tp", "2"]) == 2
    assert "--tp needs --world too" in capsys.readouterr().err
