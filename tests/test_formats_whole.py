"""What is trained or new beside the branches: saved, loaded and merged, PEFT as the judge."""

import warnings
from itertools import product

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bridge.peft import AdapterError, LoRA, load_adapter, merge, save_adapter
from bridge.peft.errors import AlreadyAdaptedError
from bridge.peft.formats.peft import read_adapter
from bridge.peft.merging.directory import merge_directory
from tests.helpers import models
from tests.helpers.formats_tiny import tiny_adapter, tiny_model
from tests.helpers.peft_files import TENSORS, loaded_by_peft, logits, saved_by_peft

transformers.utils.logging.disable_progress_bar()
TOLERANCE = {"rtol": 1e-5, "atol": 3e-5}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base_dir(request, tmp_path):
    torch.manual_seed(0)
    model = models.llama(tie_word_embeddings=request.param, initializer_range=0.2)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(directory, tokens=None, seed=1):
    model = transformers.LlamaForCausalLM.from_pretrained(directory)
    if tokens:
        torch.manual_seed(seed)
        model.resize_token_embeddings(tokens, mean_resizing=False)
    return model


def in_full(directory):
    return {key for key in load_file(directory / TENSORS) if "lora_" not in key}


SAVED = (None, ["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"])


@pytest.mark.parametrize(("saved", "tokens"), [*product(SAVED, (None, 67))])
def test_modules_to_save_of_pefts_files_are_loaded_merged_and_saved_again(
    base_dir, tmp_path, saved, tokens
):
    options = {"modules_to_save": saved, "task_type": "CAUSAL_LM"}
    trained = saved_by_peft(
        load(base_dir, tokens), tmp_path / "theirs", target_modules=["q_proj"], **options
    )
    wanted = logits(trained)
    ours = load_adapter(load(base_dir, tokens, seed=2), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), wanted, **TOLERANCE)
    trainable = {n for n, p in ours.named_parameters() if p.requires_grad and "lora_" not in n}
    assert trainable == {
        name for name in (HEAD, EMBEDDING) if saved and name.split(".")[-2] in saved
    }
    save_adapter(ours, tmp_path / "ours")
    again = loaded_by_peft(load(base_dir, tokens, seed=3), tmp_path / "ours")
    torch.testing.assert_close(logits(again), wanted, **TOLERANCE)

    is_tied = ours.config.tie_word_embeddings or trained.config.tie_word_embeddings
    if tokens is None and saved in (["embed_tokens"], ["lm_head"]) and is_tied:
        with pytest.raises(AdapterError, match=r"tied to .*(--untie|in Python)"):
            merge_directory(base_dir, [(tmp_path / "theirs", 1.0)], tmp_path / "merged")
    else:
        report = merge_directory(base_dir, [(tmp_path / "theirs", 1.0)], tmp_path / "merged")
        assert bool(report.notes) == bool(saved or tokens)
        merged = load(tmp_path / "merged")
        assert merged.config.vocab_size == (tokens or 64)
        torch.testing.assert_close(logits(merged), wanted, **TOLERANCE)
    merge(ours)
    ours.save_pretrained(tmp_path / "in_python")
    torch.testing.assert_close(logits(load(tmp_path / "in_python")), wanted, **TOLERANCE)


def test_a_resized_vocabulary_is_saved_with_one_warning_and_comes_back(base_dir, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LoRA(target_modules=["q_proj"], dim=4, seed=1)(load(base_dir, 67))
    with pytest.warns(UserWarning, match=r"saved in full though not trained.*embed_tokens") as said:
        save_adapter(model, tmp_path / "ours")
    assert len(said) == 1
    assert in_full(tmp_path / "ours") >= {f"base_model.model.{EMBEDDING}"}
    assert read_adapter(tmp_path / "ours").config["modules_to_save"] is None
    again = load_adapter(load(base_dir, 67, seed=2), tmp_path / "ours", strict=True)
    assert torch.equal(logits(again), logits(model))
    assert not again.model.embed_tokens.weight.requires_grad
    theirs = loaded_by_peft(load(base_dir, 67, seed=3), tmp_path / "ours")
    torch.testing.assert_close(logits(theirs), logits(model), **TOLERANCE)


def test_an_adapted_head_of_a_new_vocabulary_comes_back(base_dir, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LoRA(target_modules=["lm_head"], dim=4, seed=1)(load(base_dir, 67))
        model.lm_head.lora_b.weight.data.normal_()
        save_adapter(model, tmp_path / "ours")
        again = load_adapter(load(base_dir, 67, seed=2), tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))
    theirs = loaded_by_peft(load(base_dir, 67, seed=3), tmp_path / "ours")
    torch.testing.assert_close(logits(theirs), logits(model), **TOLERANCE)


def test_a_new_head_that_stayed_frozen_is_saved_and_comes_back(base_dir, tmp_path):
    def classifier(seed):
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return transformers.LlamaForSequenceClassification.from_pretrained(
                base_dir, num_labels=3, pad_token_id=0
            )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LoRA(target_modules=["q_proj"], dim=4, seed=1)(classifier(1))
    with pytest.warns(UserWarning, match=r"saved in full though not trained.*score.weight"):
        save_adapter(model, tmp_path / "ours")
    assert in_full(tmp_path / "ours") == {"base_model.model.score.weight"}
    wanted = logits(model)
    assert torch.equal(logits(load_adapter(classifier(2), tmp_path / "ours")), wanted)
    theirs = loaded_by_peft(classifier(3), tmp_path / "ours")
    torch.testing.assert_close(logits(theirs), wanted, **TOLERANCE)
    words = r"^the adapter brings score.weight in full, which the checkpoint does not hold"
    with pytest.raises(AdapterError, match=words):
        merge_directory(base_dir, [(tmp_path / "ours", 1.0)], tmp_path / "merged")


@pytest.mark.parametrize("targets", [["query"], ["query", "dense"], ["query", "dense", "out_proj"]])
def test_a_random_head_of_two_linears_comes_back_adapted_or_not(tmp_path, targets):
    config = transformers.RobertaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=40,
    )
    transformers.RobertaForMaskedLM(config).save_pretrained(tmp_path / "base")

    def classifier(seed):
        torch.manual_seed(seed)
        return transformers.RobertaForSequenceClassification.from_pretrained(tmp_path / "base")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LoRA(target_modules=targets, dim=2)(classifier(1))
        save_adapter(model, tmp_path / "ours")
        again = load_adapter(classifier(2), tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))
    theirs = loaded_by_peft(classifier(3), tmp_path / "ours")
    torch.testing.assert_close(logits(theirs), logits(model), **TOLERANCE)


def test_the_state_of_a_whole_live_peft_model_is_read(base_dir, tmp_path):
    """The base's own values beside A and B say nothing new; others are loaded as PEFT does."""
    trained = saved_by_peft(load(base_dir), tmp_path / "theirs", target_modules=["q_proj"])
    state = {f"base_model.model.{k}": t.clone() for k, t in trained.state_dict().items()}
    save_file(state, tmp_path / "theirs" / TENSORS)
    ours = load_adapter(load(base_dir), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(trained), **TOLERANCE)
    assert len([p for p in ours.parameters() if p.requires_grad]) == 4
    key = "base_model.model.model.norm.weight"
    save_file(state | {key: state[key] * 2}, tmp_path / "theirs" / TENSORS)
    with pytest.warns(
        UserWarning, match=r"other values than the model of model.norm.weight, which"
    ):
        ours = load_adapter(load(base_dir), tmp_path / "theirs")
    theirs = logits(loaded_by_peft(load(base_dir), tmp_path / "theirs"))
    torch.testing.assert_close(logits(ours), theirs, **TOLERANCE)
    assert not ours.model.norm.weight.requires_grad


def test_two_values_of_one_module_are_refused(tmp_path, base_dir):
    saved_by_peft(
        load(base_dir),
        tmp_path / "theirs",
        target_modules=["q_proj"],
        modules_to_save=["lm_head"],
    )
    path = tmp_path / "theirs" / TENSORS
    tensors = load_file(path)
    copy = "base_model.model.lm_head.modules_to_save.weight"
    save_file(tensors | {copy: tensors["base_model.model.lm_head.weight"].clone()}, path)
    assert set(read_adapter(tmp_path / "theirs").whole) == {HEAD}
    save_file(tensors | {copy: torch.zeros(64, 32)}, path)
    with pytest.raises(AdapterError, match="two values of lm_head.weight that differ"):
        read_adapter(tmp_path / "theirs")


def test_the_dtype_of_a_and_b_is_the_callers(tmp_path):
    directory = tiny_adapter(tmp_path)
    half = load_adapter(tiny_model(), directory, lora_dtype=torch.bfloat16)
    assert half["first"].lora_a.weight.dtype == torch.bfloat16
    whole = load_adapter(tiny_model().bfloat16(), directory)
    assert whole["first"].lora_a.weight.dtype == torch.float32
    with pytest.raises(AlreadyAdaptedError, match="lora_dtype"):
        load_adapter(half, directory, lora_dtype=torch.float32)
