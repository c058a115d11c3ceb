"""Modules that a model names otherwise than the file: renamed, inside another model, fused."""

import json
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bridge.peft import AdapterError, load_adapter
from bridge.peft.merging.directory import merge_directory
from tests.helpers.peft_files import loaded_by_peft, rename_keys, saved_by_peft, set_config

transformers.utils.logging.disable_progress_bar()
_SMALL = {"intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
_VISION = {**_SMALL, "hidden_size": 24, "image_size": 8, "patch_size": 4}
_TEXT = {**_SMALL, "hidden_size": 32, "vocab_size": 64}
IDS = torch.arange(3, 20)[None]
IMAGE = torch.linspace(0, 2, 192).reshape(1, 3, 8, 8)


def llava():
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        text_config={**_TEXT, "model_type": "llama", "num_key_value_heads": 2},
        vision_config={**_VISION, "model_type": "clip_vision_model"},
        image_token_index=63,
    )
    return transformers.LlavaForConditionalGeneration(config)


def clip(**vision):
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=_TEXT, vision_config=_VISION | vision, projection_dim=16
    )
    return transformers.CLIPModel(config)


@torch.no_grad()
def outputs(model):
    model.eval()
    if isinstance(model, transformers.CLIPModel):
        out = model(input_ids=IDS, pixel_values=IMAGE)
        return torch.cat([out.text_embeds, out.image_embeds])
    words, image = model(input_ids=IDS).logits, model.model.vision_tower(IMAGE)
    return torch.cat([words.flatten(), image.last_hidden_state.flatten()])


def to_old_names(key):
    """From the names of transformers 5 to those before."""
    key = key.replace("model.model.language_model.", "model.language_model.model.")
    return key.replace("model.model.vision_tower.", "model.vision_tower.vision_model.")


def test_names_from_before_transformers_renamed_them_are_found(tmp_path):
    trained = saved_by_peft(llava(), tmp_path, target_modules=["q_proj"])
    rename_keys(tmp_path, to_old_names)
    theirs = outputs(loaded_by_peft(llava(), tmp_path))
    assert torch.equal(theirs, outputs(trained))
    torch.testing.assert_close(outputs(load_adapter(llava(), tmp_path)), theirs)


def test_patterns_in_old_names_count_under_the_new_ones(tmp_path):
    trained = saved_by_peft(
        llava(), tmp_path, target_modules=r".*language_model.*_proj", alpha_pattern={"q_proj": 3}
    )
    rename_keys(tmp_path, to_old_names)
    set_config(
        tmp_path,
        target_modules=r"language_model\.model\..*_proj",
        alpha_pattern={r"^language_model\.model\.layers\.0\.self_attn\.q_proj": 3},
    )
    torch.testing.assert_close(outputs(load_adapter(llava(), tmp_path)), outputs(trained))


def test_shapes_decide_between_two_towers(tmp_path):
    trained = saved_by_peft(clip(), tmp_path, target_modules=r".*text_model.*(q|out)_proj")
    rename_keys(tmp_path, lambda key: key.replace("text_model.", ""))
    set_config(tmp_path, target_modules=["q_proj", "out_proj"])
    with pytest.warns(UserWarning, match="calls encoder.* what is text_model.encoder"):
        loaded = load_adapter(clip(), tmp_path)
    torch.testing.assert_close(outputs(loaded), outputs(trained))
    with pytest.raises(AdapterError, match=r"may be any of text_model\..*, vision_model\."):
        load_adapter(clip(hidden_size=32), tmp_path)


def test_the_number_of_a_layer_is_never_exchanged(tmp_path):
    """An adapter of layer 5 is not one of the only layer of a smaller model."""
    saved_by_peft(llava(), tmp_path, target_modules=r".*language_model.*q_proj")
    rename_keys(tmp_path, lambda key: key.replace("layers.0", "layers.5"))
    with pytest.raises(AdapterError, match=r"layers.5.self_attn.q_proj, which Llava"):
        load_adapter(llava(), tmp_path)


def mixture():
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **{**_TEXT, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.2,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def test_an_adapter_of_experts_one_by_one_is_loaded_and_merged_exactly(tmp_path):
    mixture().save_pretrained(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    torch.manual_seed(1)
    tensors = {}
    for key, weight in weights.items():
        if ".experts." in key:
            name = f"base_model.model.{key.removesuffix('.weight')}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(4, weight.shape[1]) / 3
            tensors[f"{name}.lora_B.weight"] = torch.randn(weight.shape[0], 4) / 3
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    targets = ["gate_proj", "up_proj", "down_proj"]
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": targets}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    ours = load_adapter(mixture(), adapter).eval()
    merge_directory(tmp_path / "base", [(adapter, 1.0)], tmp_path / "merged")
    merged = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        theirs = loaded_by_peft(mixture(), adapter).eval()(input_ids=IDS).logits
        torch.testing.assert_close(merged(input_ids=IDS).logits, theirs)
        torch.testing.assert_close(ours(input_ids=IDS).logits, theirs)
