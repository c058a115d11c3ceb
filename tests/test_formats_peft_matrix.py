"""The real peft package reads what we write and we read what it writes, with equal logits."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import transformers
from torch import nn

from bridge.peft import LoRA, adapter_state_dict, disable_adapters, load_adapter, save_adapter
from bridge.peft.errors import AdapterFileError
from bridge.peft.formats.peft import read_adapter, write_adapter
from tests.helpers import models

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}
_SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def _mistral():
    return transformers.MistralForCausalLM(transformers.MistralConfig(**_SMALL))


def _gemma():
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**_SMALL, head_dim=8))


def _whisper():
    config = transformers.WhisperConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return transformers.WhisperForConditionalGeneration(config)


MODELS = {
    **models.ALL,
    "gpt2": models.gpt2,
    "mistral": _mistral,
    "gemma": _gemma,
    "whisper": _whisper,
}
SOME_TARGETS = {
    "gpt2": ["c_attn", "c_proj"],
    "bert": ["query", "value", "output.dense"],
    "t5": ["q", "v", "wi", "wo"],
    "mixtral": ["q_proj", "v_proj", "o_proj"],
    "whisper": ["q_proj", "v_proj", "fc1"],
}


def build(name):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MODELS[name]().eval()


def run(model, base):
    """Logits; the inputs are those of the base model's architecture."""
    if base.main_input_name == "input_features":
        features = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(3))
        batch = {"input_features": features, "decoder_input_ids": torch.tensor([[1, 5], [1, 9]])}
    else:
        batch = models.inputs(base)
    with torch.no_grad():
        return model.eval()(**batch).logits


def randomize(parameters):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def peft_of(base, **config):
    """A PEFT model over a copy of `base`, as if trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
    randomize(p for p in model.parameters() if p.requires_grad)
    return model.eval()


def save_quietly(model, directory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory)


def read_by_peft(base, directory):
    """PEFT's reading of a directory; a warning that names our config or keys is an error."""
    with warnings.catch_warnings():
        # transformers deprecates one of its own methods that PEFT calls
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), directory)


@pytest.mark.parametrize("targets", ["all-linear", "some"])
@pytest.mark.parametrize("name", MODELS)
def test_peft_reads_ours_without_a_warning_and_with_equal_logits(tmp_path, name, targets):
    base = build(name)
    some = SOME_TARGETS.get(name, ["q_proj", "v_proj", "down_proj"])
    ours = LoRA(
        target_modules=targets if targets == "all-linear" else some,
        dim=4,
        alpha=6,
        dropout=0.1,
    )(copy.deepcopy(base))
    randomize(adapter_state_dict(ours).values())
    save_adapter(ours, tmp_path)
    expected = run(ours, base)
    assert not torch.allclose(expected, run(base, base), **TOLERANCE)
    torch.testing.assert_close(run(read_by_peft(base, tmp_path), base), expected, **TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_we_read_what_peft_writes_with_equal_logits(tmp_path, name):
    base = build(name)
    targets = SOME_TARGETS.get(name, ["q_proj", "v_proj", "down_proj"])
    theirs = peft_of(base, target_modules=targets, r=4, lora_alpha=6, bias="none")
    save_quietly(theirs, tmp_path)
    ours = load_adapter(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(run(ours, base), run(theirs, base), **TOLERANCE)
    with disable_adapters(ours):
        assert torch.equal(run(ours, base), run(base, base))


PEFT_CONFIGS = {
    "regex": {"target_modules": r".*\.(self_attn\.[qv]|mlp\.down)_proj"},
    "lookahead": {"target_modules": r"^(?!.*layers\.0).*(?:q|v)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "full names": {"target_modules": ["model.layers.1.self_attn.q_proj"]},
    "exclude": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn"]},
    "exclude regex": {
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": r".*layers\.0\..*",
    },
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": 1},
    "layers and pattern": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "rank pattern": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {r"layers.1.self_attn.q_proj": 3, "^model.layers.0.*v_proj": 2},
        "alpha_pattern": {"v_proj": 5, r"model\.layers\.0\.self_attn\.q_proj": 9.5},
    },
    "rslora": {
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": True,
        "rank_pattern": {"v_proj": 3},
    },
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "lora_only bias": {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"},
    "all biases": {"target_modules": ["q_proj", "o_proj"], "bias": "all"},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved norms": {"target_modules": ["q_proj"], "modules_to_save": ["norm"], "bias": "all"},
}


@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_every_field_of_peft_means_the_same_here_and_survives_the_way_back(tmp_path, name):
    base = build("qwen2")
    theirs = peft_of(base, **{"r": 4, "lora_alpha": 8, **PEFT_CONFIGS[name]})
    save_quietly(theirs, tmp_path / "theirs")
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(run(ours, base), run(theirs, base), **TOLERANCE)
    with disable_adapters(ours):
        assert torch.equal(run(ours, base), run(base, base))
    save_adapter(ours, tmp_path / "ours")
    again = read_by_peft(base, tmp_path / "ours")
    torch.testing.assert_close(run(again, base), run(theirs, base), **TOLERANCE)
    mine, other = read_adapter(tmp_path / "ours"), read_adapter(tmp_path / "theirs")
    assert mine.tensors.keys() == other.tensors.keys()
    assert mine.whole.keys() == other.whole.keys()
    for fqn in mine.tensors:
        assert mine.scale(fqn) == other.scale(fqn)
        assert all(map(torch.equal, mine.tensors[fqn], other.tensors[fqn]))


def test_a_tied_head_saved_whole_is_untied_and_the_base_comes_back(tmp_path):
    torch.manual_seed(0)
    base = models.qwen2(tie_word_embeddings=True).eval()
    theirs = peft_of(base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    save_quietly(theirs, tmp_path)
    ours = load_adapter(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(run(ours, base), run(theirs, base), **TOLERANCE)
    assert torch.equal(ours.model.embed_tokens.weight, base.model.embed_tokens.weight)
    with disable_adapters(ours):
        assert torch.equal(run(ours, base), run(base, base))


def test_an_adapted_head_of_pefts_loads_and_a_head_of_another_base_is_refused(tmp_path):
    base = build("llama")
    theirs = peft_of(base, target_modules=["q_proj", "lm_head"])
    save_quietly(theirs, tmp_path / "theirs")
    assert "lm_head.weight" in read_adapter(tmp_path / "theirs").whole  # the base's own
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(run(ours, base), run(theirs, base), **TOLERANCE)
    assert not dict(ours.named_parameters())["lm_head.weight"].requires_grad
    save_adapter(ours, tmp_path / "ours")
    torch.testing.assert_close(
        run(read_by_peft(base, tmp_path / "ours"), base), run(theirs, base), **TOLERANCE
    )
    write_adapter(read_adapter(tmp_path / "theirs"), tmp_path / "again")
    load_adapter(copy.deepcopy(base).bfloat16(), tmp_path / "again")
    base.lm_head.weight.data += 1
    with pytest.raises(AdapterFileError, match="other values of it than the model"):
        load_adapter(base, tmp_path / "theirs")
    assert type(base.lm_head) is nn.Linear


def test_every_combination_of_ranks_and_alphas_is_read_alike(tmp_path):
    base = build("llama")
    ours = LoRA(
        target_modules=["q_proj", "k_proj", "up_proj"],
        dim=4,
        alpha=10,
        rank_pattern={"k_proj": 2, "model.layers.1.mlp.up_proj": 7},
        alpha_pattern={"layers.0.self_attn.q_proj": 3.7},
        use_rslora=True,
    )(copy.deepcopy(base))
    randomize(adapter_state_dict(ours).values())
    save_adapter(ours, tmp_path)
    theirs = read_by_peft(base, tmp_path)
    assert peft.LoraConfig.from_pretrained(tmp_path).use_rslora
    for fqn, module in theirs.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            assert module.scaling["default"] == ours.get_submodule(fqn).scale
    torch.testing.assert_close(run(theirs, base), run(ours, base), **TOLERANCE)


def test_a_scale_that_no_formula_gives_is_written_as_an_effective_alpha(tmp_path):
    base = build("llama")
    ours = LoRA(target_modules=["q_proj", "k_proj"], dim=7)(copy.deepcopy(base))
    ours.model.layers[0].self_attn.q_proj.scale = math.pi
    randomize(adapter_state_dict(ours).values())
    save_adapter(ours, tmp_path)
    theirs = read_by_peft(base, tmp_path)
    torch.testing.assert_close(run(theirs, base), run(ours, base), **TOLERANCE)
    loaded = load_adapter(copy.deepcopy(base), tmp_path)
    assert loaded.model.layers[0].self_attn.q_proj.scale == math.pi


class _Nested(nn.Module):
    """Names that trip readers which cut keys in the middle or match too much."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Linear(4, 4)
        self.lora_A = nn.Linear(4, 4)
        self.base_model = nn.ModuleDict({"model": nn.Linear(4, 4), "lora_B": nn.Linear(4, 4)})
        self.outer = nn.ModuleDict({"weight": nn.Linear(4, 4)})

    def forward(self, x):
        x = self.lora_A(self.weight(x))
        return self.outer["weight"](self.base_model["lora_B"](self.base_model["model"](x)))


@pytest.mark.parametrize(
    "targets",
    [
        ["re:weight"],
        ["lora_A", "base_model.model"],
        ["re:weight", "re:lora_A"],
        "all-linear",
        ["lora_B"],
    ],
)
def test_modules_with_the_names_of_keys_are_not_confused(tmp_path, targets):
    base = _Nested().eval()
    ours = LoRA(target_modules=targets, dim=2)(copy.deepcopy(base))
    randomize(adapter_state_dict(ours).values())
    save_adapter(ours, tmp_path)
    x = torch.randn(3, 4)
    assert torch.equal(load_adapter(copy.deepcopy(base), tmp_path)(x), ours(x))
    if targets == ["re:weight"]:
        torch.testing.assert_close(read_by_peft(base, tmp_path)(x), ours(x), **TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_our_files_say_what_peft_s_files_say(tmp_path, name):
    base = build(name)
    targets = SOME_TARGETS.get(name, ["q_proj", "v_proj"])[:2]
    ours = LoRA(target_modules=targets, dim=4, alpha=6, dropout=0.1)(copy.deepcopy(base))
    save_adapter(ours, tmp_path / "ours")
    mine = read_adapter(tmp_path / "ours")
    task = mine.config["task_type"]
    theirs = peft_of(
        base,
        target_modules=targets,
        r=4,
        lora_alpha=6,
        lora_dropout=0.1,
        task_type=task,
        fan_in_fan_out=name == "gpt2",
    )
    save_quietly(theirs, tmp_path / "theirs")
    other = read_adapter(tmp_path / "theirs")
    assert task == {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}.get(name)
    assert mine.tensors.keys() == other.tensors.keys()
    written_by_base_class = {"auto_mapping", "peft_version"}
    for field, value in other.config.items():
        if field == "target_modules":
            assert sorted(value) == sorted(mine.config[field])
        elif field in mine.config and field not in written_by_base_class:
            assert mine.config[field] == value, field
        elif field not in written_by_base_class:
            # a field that older versions of PEFT do not know, at its default
            assert value == getattr(peft.LoraConfig(), field), field
    assert mine.config.keys() <= other.config.keys()
