"""A quantised model of transformers: saved, loaded, exchanged with PEFT, merged, saved dense."""

import copy
import warnings

import pytest
import torch
import transformers

from bridge.peft import LoRA, disable_adapters, load_adapter, merge, save_adapter, unmerge
from bridge.peft.branch.quantised.table import format_of
from bridge.peft.doctor import doctor
from bridge.peft.errors import AdapterError
from bridge.peft.formats.peft import read_adapter
from tests.helpers.peft_files import loaded_by_peft, saved_by_peft
from tests.helpers.quantised import load_llama, tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*KernelPreference"),
    pytest.mark.filterwarnings("ignore:.*ScaleCalculationMode"),
    pytest.mark.usefixtures("one_cpu_thread"),
]
kinds = pytest.mark.parametrize("kind", ["nf4", "int8"])
#: The 8-bit linears quantise their inputs, so a last bit in x may become a step of 1/127 of it.
TOLERANCE = {"nf4": 1e-5, "int8": 2e-2}


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("base"))


def logits(model):
    ids = torch.arange(4, 20).view(2, 8)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


def trained(model, **recipe):
    """Adapt a model and give every B values of its own."""
    LoRA(**{"dim": 4, "seed": 0} | recipe)(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def assert_near(got, expected, tolerance):
    size = float(expected.abs().max())
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * size)


@kinds
def test_our_file_gives_peft_the_same_logits_on_the_same_quantised_base(kind, base_dir, tmp_path):
    model = trained(load_llama(base_dir, kind))
    save_adapter(model, tmp_path)
    theirs = loaded_by_peft(load_llama(base_dir, kind), tmp_path)
    assert_near(logits(theirs), logits(model), TOLERANCE[kind])
    ours = load_adapter(load_llama(base_dir, kind), tmp_path, strict=True)
    assert torch.equal(logits(ours), logits(model))


@kinds
def test_a_file_of_peft_gives_us_the_same_logits_on_the_same_quantised_base(
    kind, base_dir, tmp_path
):
    theirs = saved_by_peft(
        load_llama(base_dir, kind), tmp_path, target_modules=["q_proj", "v_proj"]
    )
    ours = load_adapter(load_llama(base_dir, kind), tmp_path)
    assert_near(logits(ours), logits(theirs), TOLERANCE[kind])


@kinds
def test_a_merged_model_is_saved_dense_and_answers_as_the_adapted_one(kind, base_dir, tmp_path):
    model = trained(load_llama(base_dir, kind))
    adapted = logits(model)
    with disable_adapters(model):
        base = logits(model)
    config = copy.deepcopy(model.config.quantization_config)
    merge(model, dense_dtype=torch.float32)
    assert_near(logits(model), adapted, max(1e-5, 2 * TOLERANCE[kind]))
    with disable_adapters(model):
        assert torch.equal(logits(model), base)
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path)
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any(format_of(module) for module in dense.modules())
    assert torch.equal(logits(dense), logits(model))
    unmerge(model)
    assert model.config.quantization_config.to_dict() == config.to_dict()
    assert model.is_quantized and torch.equal(logits(model), adapted)


def test_what_carries_no_branch_stays_quantised_and_the_config_says_which(base_dir, tmp_path):
    model = trained(load_llama(base_dir, "nf4"), target_modules=["q_proj", "down_proj"])
    adapted = logits(model)
    report = merge(model, dense_dtype=torch.float32)
    assert "quantised linears without a branch stay as they are" in report.notes[0]
    skipped = model.config.quantization_config.llm_int8_skip_modules
    assert "lm_head" in skipped and "model.layers.1.mlp.down_proj" in skipped
    model.save_pretrained(tmp_path)
    mixed = load_llama(tmp_path)
    attention = mixed.model.layers[0].self_attn
    assert format_of(attention.q_proj) is None and format_of(attention.k_proj) is not None
    assert_near(logits(mixed), logits(model), 1e-5)
    unmerge(model)
    assert model.config.quantization_config.llm_int8_skip_modules is None
    assert torch.equal(logits(model), adapted)


def test_a_model_quantised_again_is_saved_as_a_quantised_one(base_dir, tmp_path):
    model = trained(load_llama(base_dir, "nf4"))
    before = logits(model)
    report = merge(model, requantize=True)
    assert all(row.max_error > 0 for row in report.rows)
    model.save_pretrained(tmp_path)
    loaded = load_llama(tmp_path)
    assert_near(logits(loaded), logits(model), 1e-5)
    unmerge(model)
    assert torch.equal(logits(model), before)


def test_a_file_knows_the_base_that_it_was_trained_on(base_dir, tmp_path):
    save_adapter(trained(load_llama(base_dir, "nf4"), target_modules=["q_proj"]), tmp_path)
    extra = read_adapter(tmp_path).extra
    (group,) = extra["quantised"]
    assert group["settings"]["kind"] == "nf4" and group["settings"]["double_quantised"]
    assert len(group["modules"]) == 14 and "model.layers.0.mlp.up_proj" in group["modules"]
    for other in (load_llama(base_dir), load_llama(base_dir, "int8")):
        with pytest.raises(
            AdapterError, match=r"here and was nf4, double quantised \(bitsandbytes\)"
        ):
            load_adapter(other, tmp_path, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(load_llama(base_dir, "nf4"), tmp_path)


def test_a_merged_model_still_knows_its_base(base_dir, tmp_path):
    model = trained(load_llama(base_dir, "nf4"))
    save_adapter(model, tmp_path / "before")
    merge(model)
    save_adapter(model, tmp_path / "merged")
    before, merged = (read_adapter(tmp_path / name).extra for name in ("before", "merged"))
    assert before == merged


def test_other_scales_are_another_base(base_dir, tmp_path):
    model = trained(load_llama(base_dir, "int8"), target_modules=["q_proj"])
    save_adapter(model, tmp_path)
    other = load_llama(base_dir, "int8")
    other.model.layers[0].self_attn.q_proj.weight.SCB.mul_(2)
    with pytest.raises(AdapterError, match="layers.0.self_attn.q_proj has other scales here"):
        load_adapter(other, tmp_path, strict=True)


@kinds
def test_the_doctor_finds_a_quantised_model_well(kind, base_dir):
    report = doctor(load_llama(base_dir, kind))
    assert report.healthy, report
    assert report["forward and backward of the model"].status == "pass", report


@kinds
def test_the_trainer_takes_a_quantised_base(kind, base_dir, tmp_path):
    model = trained(load_llama(base_dir, kind))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=2, learning_rate=1e-2
    )
    ids = torch.arange(4, 20).view(2, 8)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    moved = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[n], p) for n, p in frozen.items())
    assert not any(torch.equal(parameters[n], p) for n, p in moved.items())


# the compiler makes an instance of bitsandbytes' autograd function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_checkpointing_and_compiling_change_no_gradient(base_dir):
    def gradients(prepare):
        model = trained(load_llama(base_dir, "nf4")).train()
        run = prepare(model)
        ids = torch.arange(4, 20).view(2, 8)
        run(input_ids=ids).logits.square().mean().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    def checkpointing(model):
        model.activation_checkpointing_enable({"use_reentrant": True})
        return model

    plain = gradients(lambda model: model)
    for prepare in (checkpointing, lambda model: torch.compile(model, backend="aot_eager")):
        for name, gradient in gradients(prepare).items():
            assert_near(gradient, plain[name], 1e-4)
