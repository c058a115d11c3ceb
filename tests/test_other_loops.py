"""Other people's loops around an adapted model: trainers, offloading, tracing, wrappers."""

import tempfile
import types
import warnings
from functools import partial

import accelerate
import peft
import pytest
import torch
import torchao
import transformers
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torchao.float8 import Float8LinearConfig, convert_to_float8_training

from bridge.peft import (
    AdapterError,
    LoRA,
    adapter_state_dict,
    load_adapter,
    patch_linear_module,
    save_adapter,
)
from tests.helpers import models
from tests.helpers.ranks import on_ranks


def trained(model):
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "lora_b"):
                module.lora_b.weight.normal_()
    return model


def net():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def ids():
    return torch.randint(0, 64, (2, 5), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("heads", [[], ["lm_head"]], ids=["inside", "head"])
def test_offloading_after_adapting_computes_the_same(heads):
    model = trained(LoRA(dim=2, target_modules=["q_proj", *heads])(models.llama())).eval()
    with torch.no_grad():
        wanted = model(ids()).logits
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert torch.equal(model(ids()).logits, wanted)


def test_disk_offload_after_adapting_computes_the_same(tmp_path):
    model = trained(LoRA(dim=2, dropout=0.1)(net())).eval()
    x = torch.randn(3, 8)
    with torch.no_grad():
        wanted = model(x)
        accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
        assert torch.equal(model(x), wanted)


def test_a_forward_patched_on_the_instance_is_listed_and_the_rest_adapted():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model.b.forward = types.MethodType(lambda self, x: x, model.b)
    plan = LoRA(dim=2).plan(model)
    assert [row.fqn for row in plan.rows] == ["a"]
    assert "patched on the instance" in plan.not_adapted[0].reason
    assert list(adapter_state_dict(LoRA(dim=2)(model))) == ["a.lora_a.weight", "a.lora_b.weight"]


def test_an_error_half_way_leaves_the_model_as_it_was(monkeypatch):
    model = net()
    model[0].weight.requires_grad_(False)
    real = nn.Dropout.__init__
    calls = []

    def fail_at_the_second(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 2:
            raise MemoryError
        real(self, *args, **kwargs)

    monkeypatch.setattr(nn.Dropout, "__init__", fail_at_the_second)
    with pytest.raises(MemoryError):
        LoRA(dim=2)(model)
    monkeypatch.undo()
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert set(model.state_dict()) == set(net().state_dict())
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    LoRA(dim=2)(model)


def test_the_input_may_be_passed_by_its_name():
    x = torch.randn(2, 4)
    conv = transformers.pytorch_utils.Conv1D(3, 4)
    for layer, name in ((nn.Linear(4, 3), "input"), (nn.Linear(4, 3), "x"), (conv, "x")):
        adapted = trained(patch_linear_module(layer, dim=2))
        assert torch.equal(adapted(**{name: x}), adapted(x))
    with pytest.raises(TypeError, match="misses its input"):
        patch_linear_module(nn.Linear(4, 3), dim=2)()


def test_resizing_is_refused_where_it_would_lose_an_adapter_and_works_elsewhere():
    for tied in (False, True):
        head = LoRA(dim=2, target_modules=["lm_head"])(models.llama(tie_word_embeddings=tied))
        with pytest.raises(AdapterError, match="would replace the output head, which is adapted"):
            head.resize_token_embeddings(70)
    model = LoRA(dim=2, target_modules=["q_proj"])(models.llama())
    model.resize_token_embeddings(70)
    assert model(ids()).logits.shape[-1] == 70


def test_module_swaps_after_adapting_are_found_and_quantising_keeps_the_branch():
    model = LoRA(dim=4)(nn.Sequential(nn.Linear(64, 64))).bfloat16()
    convert_to_float8_training(model, config=Float8LinearConfig(emulate=True))
    with pytest.raises(AdapterError, match="0 was adapted and is a Float8Linear now"):
        model(torch.randn(16, 64, dtype=torch.bfloat16))
    model = trained(LoRA(dim=4)(nn.Sequential(nn.Linear(64, 64))))
    x = torch.randn(16, 64)
    wanted = model(x)
    torchao.quantize_(model, torchao.quantization.Int8WeightOnlyConfig())
    torch.testing.assert_close(model(x), wanted, rtol=0.05, atol=0.2)


def test_traces_and_exports_compute_the_same():
    model = trained(LoRA(dim=2)(net())).eval()
    x, other = torch.randn(3, 8), torch.randn(5, 8)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(other), model(other))


@pytest.mark.parametrize("wrap", [AveragedModel, torch.compile, nn.DataParallel])
def test_wrappers_stand_in_no_saved_name(wrap, tmp_path):
    model = trained(LoRA(dim=2)(net()))
    save_adapter(wrap(model), tmp_path)
    base = net()
    base.load_state_dict(model.state_dict(), strict=False)
    assert adapter_state_dict(load_adapter(base, tmp_path)).keys() == {
        f"{i}.lora_{x}.weight" for i in (0, 2) for x in "ab"
    }


def test_checkpoint_wrappers_stand_in_no_saved_name():
    model = LoRA(dim=2, target_modules=["q_proj"])(models.llama())
    names = list(adapter_state_dict(model))
    apply_activation_checkpointing(model, check_fn=lambda m: "DecoderLayer" in type(m).__name__)
    model(ids()).logits.sum().backward()
    assert list(adapter_state_dict(model)) == names


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_a_model_with_two_inputs_reaches_every_adapter(reentrant):
    config = transformers.WhisperConfig(
        **{f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers",)},
        **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": 16 for part in ("encoder", "decoder")},
        **{"vocab_size": 64, "d_model": 16, "num_mel_bins": 8, "max_source_positions": 10},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    )
    model = LoRA(dim=2)(transformers.WhisperForConditionalGeneration(config)).train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    sound = torch.randn(2, 8, 20)
    model(input_features=sound, decoder_input_ids=ids(), use_cache=False).logits.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_b" in n)


@pytest.mark.parametrize("frozen", ["lora_a", "lora_b", ""])
@pytest.mark.parametrize("position", ["pre", "post"])
def test_recomputation_draws_the_same_mask_whatever_is_frozen(frozen, position):
    layer = patch_linear_module(
        nn.Linear(16, 16, bias=False), dim=4, dropout=0.5, dropout_position=position
    )
    trained(layer).train()
    if frozen:
        getattr(layer, frozen).requires_grad_(False)
    x, dy = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
    torch.manual_seed(7)
    y = checkpoint(layer, x, use_reentrant=True)
    y.backward(dy)
    torch.testing.assert_close((x.grad * x).sum(), (dy * y).sum())  # y is linear in x
    torch.manual_seed(7)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y)


def test_a_4_bit_model_trains_in_transformers_trainer(tmp_path):
    models.llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    four_bits = transformers.BitsAndBytesConfig(load_in_4bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=four_bits, device_map="cpu"
    )
    LoRA(dim=4)(model)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=2, save_strategy="no"
    )
    rows = [{"input_ids": row, "labels": row} for row in ids().repeat(8, 1)]
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    state = adapter_state_dict(model)
    assert {t.dtype for t in state.values()} == {torch.float32}
    assert all(t.any() for n, t in state.items() if "lora_b" in n)


def test_float32_adapters_over_half_bases_train_with_a_scaler():
    model = LoRA(dim=2)(models.llama().half())
    assert {p.dtype for p in adapter_state_dict(model).values()} == {torch.float32}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(model(ids(), labels=ids()).loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert all(p.isfinite().all() for p in adapter_state_dict(model).values())


def test_a_model_that_peft_has_adapted_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, at PEFT
        other = peft.get_peft_model(models.llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for model in (other, other.base_model.model):
        with pytest.raises(AssertionError, match="already carries an adapter of PEFT"):
            LoRA(dim=2)(model)


def wrapped_first():
    model = nn.parallel.DistributedDataParallel(net())
    with pytest.raises(AdapterError, match="adapt the model first, then wrap it"):
        LoRA(dim=2)(model)
    save = partial(save_adapter, LoRA(dim=2)(net()))
    with tempfile.TemporaryDirectory() as directory:
        save(directory)
        with pytest.raises(AdapterError, match="adapt the model first, then wrap it"):
            load_adapter(model, directory)


@pytest.mark.distributed
def test_data_parallel_before_the_recipe_is_refused(tmp_path):
    on_ranks(2, wrapped_first, tmp_path)
