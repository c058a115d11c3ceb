"""QLoRA from the command line: trained on what was quantised, merged into what that is dense."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file

from bridge.peft import AdapterError, load_adapter, merge, save_adapter
from bridge.peft.cli import main
from bridge.peft.merging.directory import merge_directory
from tests.helpers.cli_fixtures import finetune, refused, save_tiny_model
from tests.helpers.peft_files import saved_by_peft
from tests.helpers.quantised import load_llama, tiny_llama
from tests.test_quantised_models import assert_near, logits, trained

pytestmark = pytest.mark.usefixtures("one_cpu_thread")
transformers.utils.logging.disable_progress_bar()
kinds = pytest.mark.parametrize("kind", ["nf4", "int8"])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Llama wide enough for bitsandbytes' blocks, with a tokenizer of characters."""
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    return save_tiny_model(tmp_path_factory.mktemp("model"), **sizes)


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("base"))


@kinds
def test_finetune_quantises_trains_and_says_what_memory_it_saved(
    kind, model, data, tmp_path, capsys
):
    output = tmp_path / "out"
    arguments = ("--model", model, "--data", data, "--output", output, "--dim", 4, "--steps", 30)
    assert finetune(*arguments, "--learning-rate", 5e-3, "--quantize", kind) == 0
    printed = capsys.readouterr().out
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["eval_loss_after"] < metrics["eval_loss_before"] - 0.2
    assert metrics["quantize"] == kind
    saved = metrics["dense_base_bytes"] - metrics["base_bytes"]
    linears = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    bytes_a_weight = {"nf4": 0.6, "int8": 1.1}[kind]
    assert saved == pytest.approx(linears * (4 - bytes_a_weight), rel=0.2)
    assert f"{saved / 1e6:.1f} MB saved" in printed and f"--quantize {kind}" in printed
    assert json.loads((output / "run.json").read_text())["options"]["quantize"] == kind
    merged = tmp_path / "merged"
    command = ["merge", "--model", model, "--adapter", output, "--output", merged]
    assert main([*map(str, command), "--quantize", kind]) == 0
    dense = transformers.AutoModelForCausalLM.from_pretrained(merged)
    adapted = load_adapter(load_llama(model, kind), output, strict=True)
    assert_near(logits(dense), logits(adapted), {"nf4": 1e-5, "int8": 5e-2}[kind])


def test_what_is_quantised_already_is_not_quantised_again(model, data, tmp_path, capsys):
    small = tmp_path / "model"
    load_llama(model, "nf4").save_pretrained(small)
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(small)
    error = refused(capsys, tmp_path / "out", "--model", small, "--data", data, "--quantize", "nf4")
    assert "is quantised already (bitsandbytes)" in error
    error = refused(capsys, tmp_path / "out", "--model", model, "--data", data, "--quantize", "nf3")
    assert "one of nf4, int8" in error


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_merged_directory_is_what_was_trained_plus_the_update(kind, dtype, base_dir, tmp_path):
    adapted = trained(load_llama(base_dir, kind, dtype), target_modules=["q_proj", "down_proj"])
    save_adapter(adapted, tmp_path / "adapter")
    report = merge_directory(
        base_dir, [(tmp_path / "adapter", 1.0)], tmp_path / "merged", quantize=kind,
        dtype=torch.float32,
    )  # fmt: skip
    assert len(report.rows) == 4
    assert any("without a branch, written dequantised" in note for note in report.notes)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tolerance = {"nf4": 1e-5, "int8": 5e-2}[kind] if dtype == torch.float32 else 5e-2
    assert_near(logits(merged), logits(adapted), tolerance)
    merge(adapted, dense_dtype=torch.float32)
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    for fqn in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        assert_near(tensors[f"{fqn}.weight"], adapted.get_submodule(fqn).weight, 1e-6)


def test_int8_of_what_was_loaded_in_bfloat16_is_found_in_a_float32_checkpoint(model, tmp_path):
    adapted = trained(load_llama(model, "int8", torch.bfloat16))
    save_adapter(adapted, tmp_path / "adapter")
    merge_directory(model, [(tmp_path / "adapter", 1.0)], tmp_path / "merged", quantize="int8")
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    merge(adapted, dense_dtype=torch.float32)
    fqn = "model.layers.0.mlp.up_proj"
    assert_near(tensors[f"{fqn}.weight"], adapted.get_submodule(fqn).weight, 1e-6)


def test_merging_into_the_16_bit_weights_has_to_be_asked_for(base_dir, tmp_path):
    save_adapter(trained(load_llama(base_dir, "nf4")), tmp_path / "adapter")
    adapters = [(tmp_path / "adapter", 1.0)]
    message = r"trained on a base that was nf4, double quantised .* pass --quantize nf4"
    with pytest.raises(AdapterError, match=message):
        merge_directory(base_dir, adapters, tmp_path / "merged")
    with pytest.raises(AdapterError, match="pass --quantize nf4, got int8"):
        merge_directory(base_dir, adapters, tmp_path / "merged", quantize="int8")
    with pytest.raises(AdapterError, match="--quantize is 'nf3'; pass one of nf4, fp4, int8, none"):
        merge_directory(base_dir, adapters, tmp_path / "merged", quantize="nf3")
    assert not (tmp_path / "merged").exists()
    report = merge_directory(base_dir, adapters, tmp_path / "merged", quantize="none")
    assert "is merged into the weights that that was made from" in report.notes[0]


def test_another_base_is_found_by_its_quantised_values(base_dir, tmp_path):
    save_adapter(trained(load_llama(base_dir, "nf4")), tmp_path / "adapter")
    other = tmp_path / "other"
    shutil.copytree(base_dir, other)
    base = load_llama(base_dir, dtype=torch.bfloat16)
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight[0].neg_()
    base.save_pretrained(other)
    with pytest.raises(
        AdapterError, match=r"layers.1.mlp.up_proj, quantised to nf4, has other val"
    ):
        merge_directory(other, [(tmp_path / "adapter", 1.0)], tmp_path / "out", quantize="nf4")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()


def test_adapters_of_two_bases_are_not_summed(base_dir, tmp_path):
    for kind in ("nf4", "int8", None):
        save_adapter(trained(load_llama(base_dir, kind)), tmp_path / str(kind))
    for other in ("int8", "None"):
        adapters = [(tmp_path / "nf4", 0.5), (tmp_path / other, 0.5)]
        with pytest.raises(AdapterError, match="bases that were quantised differently"):
            merge_directory(base_dir, adapters, tmp_path / "out", quantize="nf4")


def test_an_adapter_of_peft_does_not_say_and_the_caller_does(base_dir, tmp_path):
    targets = ["q_proj", "v_proj"]
    theirs = saved_by_peft(
        load_llama(base_dir, "nf4"), tmp_path / "adapter", target_modules=targets
    )
    report = merge_directory(
        base_dir, [(tmp_path / "adapter", 1.0)], tmp_path / "out", quantize="nf4",
        dtype=torch.float32,
    )  # fmt: skip
    assert "does not say how its base was quantised" in report.notes[0]
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # quantised from the checkpoint's bfloat16, theirs from the same in float32
    assert_near(logits(merged), logits(theirs), 1e-2)


def test_a_checkpoint_that_is_quantised_itself_is_refused_with_the_way_to_merge_it(
    base_dir, tmp_path
):
    load_llama(base_dir, "nf4").save_pretrained(tmp_path / "small")
    save_adapter(trained(load_llama(base_dir, "nf4")), tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"is quantised in the checkpoint .* merge\(model\)"):
        merge_directory(
            tmp_path / "small", [(tmp_path / "adapter", 1.0)], tmp_path / "out", quantize="nf4"
        )


def test_an_interrupted_merge_goes_on(base_dir, tmp_path, monkeypatch):
    from bridge.peft.merging.directory import merge as module

    shards = tmp_path / "shards"
    load_llama(base_dir, dtype=torch.bfloat16).save_pretrained(shards, max_shard_size="40KB")
    save_adapter(trained(load_llama(base_dir, "nf4")), tmp_path / "adapter")
    arguments = (shards, [(tmp_path / "adapter", 1.0)])
    merge_directory(*arguments, tmp_path / "whole", quantize="nf4")
    calls, write = [], module.write_shard

    def breaks(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(*args, **kwargs)

    monkeypatch.setattr(module, "write_shard", breaks)
    with pytest.raises(KeyboardInterrupt):
        merge_directory(*arguments, tmp_path / "out", quantize="nf4")
    merge_directory(*arguments, tmp_path / "out", quantize="nf4")
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
