"""From a Megatron run to PEFT and back: the same logits in every place."""

import pytest
import torch
import transformers
from peft import PeftModel

from bridge.peft import LoRA, adapter_state_dict, load_adapter, merge, save_adapter
from bridge.peft.formats.convert.adapters import convert_adapter
from bridge.peft.formats.convert.layout import AttentionLayout, split_qkv
from bridge.peft.formats.peft import read_adapter
from tests.helpers import megatron
from tests.helpers.megatron import LENGTH, VOCABULARY, batch, gpt, loss_of, positions

pytestmark = pytest.mark.usefixtures("one_megatron_rank")
LAYOUT = AttentionLayout(heads=4, groups=2, head_dim=8, layers=2)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def cuda_calls_answered_by_the_cpu():
    """Rotary positions ask CUDA for its device."""
    with megatron.cuda_calls_answered_by_the_cpu():
        yield


def base():
    """A Megatron model that is a Llama: rotary positions, RMS norms, gated MLP, grouped heads."""
    return gpt(position="rope", layernorm_epsilon=1e-6).eval()


def as_llama(model):
    """The Llama of transformers with the weights of a Megatron model, adapted or not."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        rms_norm_eps=1e-6,
    )
    theirs = model.state_dict()
    ours = {
        "model.embed_tokens.weight": theirs["embedding.word_embeddings.weight"],
        "model.norm.weight": theirs["decoder.final_layernorm.weight"],
        "lm_head.weight": theirs["output_layer.weight"],
    }
    for i in range(2):
        there, here = f"decoder.layers.{i}.", f"model.layers.{i}."
        parts = split_qkv(theirs[f"{there}self_attention.linear_qkv.weight"], LAYOUT)
        gate, up = theirs[f"{there}mlp.linear_fc1.weight"].chunk(2)
        ours |= {f"{here}self_attn.{name}.weight": t for name, t in parts.items()}
        ours |= {
            f"{here}self_attn.o_proj.weight": theirs[f"{there}self_attention.linear_proj.weight"],
            f"{here}mlp.gate_proj.weight": gate,
            f"{here}mlp.up_proj.weight": up,
            f"{here}mlp.down_proj.weight": theirs[f"{there}mlp.linear_fc2.weight"],
            f"{here}input_layernorm.weight": theirs[f"{there}input_layernorm.weight"],
            f"{here}post_attention_layernorm.weight": theirs[f"{there}pre_mlp_layernorm.weight"],
        }
    llama = transformers.LlamaForCausalLM(config).eval()
    llama.load_state_dict(ours)
    return llama


def megatron_logits(model):
    with torch.no_grad():
        return model(batch()[0], positions(), None)


def llama_logits(model):
    with torch.no_grad():
        return model(input_ids=batch()[0]).logits


@pytest.fixture
def trained():
    """A Megatron model after a few real steps, its modules of two ranks."""
    recipe = LoRA(dim=4, alpha=8, rank_pattern={"linear_fc2": 2}, seed=1)
    model = recipe(base()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(5):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    return model.eval()


def test_the_double_of_the_base_is_a_llama():
    torch.testing.assert_close(llama_logits(as_llama(base())), megatron_logits(base()), **CLOSE)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_megatron_run_loads_in_peft_over_the_same_weights(trained, tmp_path):
    save_adapter(trained, tmp_path / "megatron")
    done = convert_adapter(tmp_path / "megatron", "peft", tmp_path / "peft", layout=LAYOUT)
    assert (done.source, done.target) == ("megatron", "peft")
    expected = megatron_logits(trained)
    assert not torch.allclose(expected, megatron_logits(base()), **CLOSE)
    in_peft = PeftModel.from_pretrained(as_llama(base()), tmp_path / "peft")
    torch.testing.assert_close(llama_logits(in_peft), expected, **CLOSE)
    in_ours = load_adapter(as_llama(base()), tmp_path / "peft")
    torch.testing.assert_close(llama_logits(in_ours), expected, **CLOSE)


def test_the_merged_export_is_the_dense_oracle_of_the_adapter(trained):
    expected = megatron_logits(trained)
    state = trained.state_dict()
    oracle = {n: t.clone() for n, t in state.items() if t is not None and ".adapter." not in n}
    adapter, scales = adapter_state_dict(trained), {"linear_fc2": 4.0}
    for name, a in adapter.items():
        if name.endswith("linear_in.weight"):
            fqn = name.removesuffix(".adapter.linear_in.weight")
            b = adapter[f"{fqn}.adapter.linear_out.weight"]
            oracle[f"{fqn}.weight"] += scales.get(fqn.rpartition(".")[2], 2.0) * b @ a
    merge(trained)
    exported = trained.state_dict()
    assert exported.keys() == base().state_dict().keys()
    for name, tensor in oracle.items():
        torch.testing.assert_close(exported[name], tensor, **CLOSE)
    torch.testing.assert_close(llama_logits(as_llama(trained)), expected, **CLOSE)


def test_an_adapter_of_peft_loads_into_a_megatron_model(tmp_path):
    llama = LoRA(dim=2, alpha=4, seed=3)(as_llama(base()))
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            if name.endswith("lora_b.weight"):
                parameter.normal_(std=0.1)
    save_adapter(llama, tmp_path / "peft")
    convert_adapter(tmp_path / "peft", "megatron", tmp_path / "megatron", layout=LAYOUT)
    model = load_adapter(base(), tmp_path / "megatron")
    torch.testing.assert_close(megatron_logits(model), llama_logits(llama), **CLOSE)
    # and what this model saves is the adapter that it came from, its parts stacked
    save_adapter(model, tmp_path / "again")
    convert_adapter(tmp_path / "again", "peft", tmp_path / "back", layout=LAYOUT)
    back = load_adapter(as_llama(base()), tmp_path / "back")
    torch.testing.assert_close(llama_logits(back), llama_logits(llama), **CLOSE)


def test_the_dropout_position_survives_the_change_of_names(tmp_path):
    save_adapter(LoRA(dim=2, dropout=0.5, dropout_position="post")(base()), tmp_path / "megatron")
    convert_adapter(tmp_path / "megatron", "peft", tmp_path / "peft", layout=LAYOUT)
    converted = read_adapter(tmp_path / "peft")
    assert converted.extra["dropout_position"] == "post"
    assert converted.parsed.lora_dropout == 0.5
