"""transformers' own tensor parallelism: from_pretrained shards, the recipe follows."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

from bridge.peft import LoRA, adapter_state_dict, disable_adapters, load_adapter, save_adapter
from bridge.peft.tensors import full_tensor
from tests.helpers.ranks import on_ranks

pytestmark = pytest.mark.distributed
IDS = torch.arange(18).reshape(2, 9)


def close(actual, expected, **kwargs):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, **kwargs)


def compare_with_one_process():
    from transformers import AutoModelForCausalLM, DistributedConfig

    directory = Path(os.environ["MODEL_DIRECTORY"])
    whole = load_adapter(AutoModelForCausalLM.from_pretrained(directory), directory / "adapter")
    shards = DistributedConfig(tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(directory, distributed_config=shards)
    recipe = LoRA(dim=4, seed=1)
    fresh = adapter_state_dict(recipe(AutoModelForCausalLM.from_pretrained(directory)))
    for fqn, tensor in adapter_state_dict(recipe(model)).items():
        assert torch.equal(tensor, fresh[fqn]), fqn
    layer = model.model.layers[0]
    assert layer.mlp.down_proj.lora_a.weight.placements == (Shard(1),)
    assert layer.mlp.down_proj.lora_b.weight.placements == (Replicate(),)
    assert layer.self_attn.q_proj.lora_b.weight.placements == (Shard(0),)
    assert layer.self_attn.q_proj.lora_path().name == "fused"

    with torch.no_grad():
        base = model(IDS).logits
    load_adapter(model, directory / "adapter")
    mine, theirs = model(IDS, labels=IDS), whole(IDS, labels=IDS)
    close(mine.logits, theirs.logits)
    mine.loss.backward()
    theirs.loss.backward()
    for name, parameter in whole.named_parameters():
        if parameter.grad is not None:
            close(full_tensor(model.get_parameter(name).grad), parameter.grad, msg=name)
    norms = [
        torch.nn.utils.clip_grad_norm_([p for p in m.parameters() if p.requires_grad], 1e-3)
        for m in (model, whole)
    ]
    close(full_tensor(norms[0]), norms[1])
    # without gradients transformers computes on local tensors
    with torch.no_grad():
        close(model(IDS).logits, whole(IDS).logits)
        with disable_adapters(model):
            assert torch.equal(model(IDS).logits, base)
    mask = torch.ones_like(IDS)
    said = [m.generate(IDS, attention_mask=mask, max_new_tokens=4) for m in (model, whole)]
    assert torch.equal(*said)
    save_adapter(model, directory / "again")
    dist.barrier()
    for file in (directory / "adapter").iterdir():
        assert file.read_bytes() == (directory / "again" / file.name).read_bytes(), file.name
    assert isinstance(model.lm_head.weight, DTensor)


def test_a_model_that_from_pretrained_shards_is_adapted_trained_and_saved_as_a_whole_one(
    tmp_path, monkeypatch
):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(tmp_path)
    adapted = LoRA(dim=4, seed=1)(AutoModelForCausalLM.from_pretrained(tmp_path))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    save_adapter(adapted, tmp_path / "adapter")
    monkeypatch.setenv("MODEL_DIRECTORY", str(tmp_path))
    on_ranks(2, compare_with_one_process, tmp_path)
