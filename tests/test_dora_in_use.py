"""DoRA on quantised bases, sharded, offloaded, read past its forward; in the tools around it."""

import copy
import json
import warnings

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from bridge.peft import (
    LinearAdapter,
    LoRA,
    adapter_state_dict,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)
from bridge.peft.branch.kinds import MegatronLinearAdapter
from bridge.peft.cli import main
from bridge.peft.cli.inspect import describe
from bridge.peft.doctor import doctor
from bridge.peft.errors import AdapterError
from bridge.peft.formats.convert.adapters import convert_adapter
from bridge.peft.formats.peft import read_adapter
from bridge.peft.merging.directory import merge_directory
from bridge.peft.resize import resize
from tests.helpers import models
from tests.helpers.ranks import on_ranks
from tests.test_dora import RECIPE, body, dense, trained, x_of


def four_bit(layer):
    import bitsandbytes as bnb

    made = bnb.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu"), lambda m: bnb.functional.dequantize_4bit(
        m.weight.data, m.weight.quant_state
    )


def eight_bit(layer):
    import bitsandbytes as bnb

    made = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    made.load_state_dict(layer.state_dict())
    made = made.to("cpu")
    scales = made.weight.SCB.clone()
    return made, lambda m: m.weight.data * (scales / 127).unsqueeze(1)


def torchao_int8(layer):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(copy.deepcopy(layer))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_(model, Int8WeightOnlyConfig())
    return model[0], lambda m: m.weight.dequantize()


@pytest.mark.parametrize("make", [four_bit, eight_bit, torchao_int8])
def test_on_a_quantised_base_the_norms_are_of_the_weights_that_it_multiplies_with(make):
    torch.manual_seed(0)
    base, values = make(nn.Linear(64, 32))
    model = nn.Sequential(base)
    x = torch.randn(6, 64)
    with torch.no_grad():
        plain = base(x)
    LoRA(dim=4, use_dora=True)(model)
    layer = model[0]
    assert torch.equal(layer(x), plain)
    assert_close(layer.lora_magnitude.weight, values(layer).float().norm(dim=1))
    trained(model)
    a, b, m = (p.detach() for p in layer.adapter_parameters().values())
    x.requires_grad_()
    got = layer(x)
    norm = (values(layer).float() + layer.scale * b @ a).norm(dim=1)
    bias = layer.bias.detach().float()
    want = m / norm * (plain - bias + layer.scale * x @ a.t() @ b.t()) + bias
    assert_close(got, want, rtol=1e-4, atol=1e-4)
    got.square().sum().backward()
    gradients = [x.grad, *(p.grad for p in layer.adapter_parameters().values())]
    assert all(g is not None and bool(g.any()) for g in gradients)


def shard_and_compare():
    from torch.distributed.fsdp import fully_shard

    whole = trained(RECIPE(body()))
    with torch.device("meta"):
        sharded = body()
    RECIPE(sharded)
    mesh = dist.init_device_mesh("cpu", (2,))
    for module in (sharded[0], sharded):
        fully_shard(module, mesh=mesh)
    sharded.to_empty(device="cpu")
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(sharded, body().state_dict(), options=options)
    x = x_of()
    assert torch.equal(sharded(x), body()(x))  # m is |W|, shard by shard
    fresh = adapter_state_dict(RECIPE(body()))
    for name, tensor in adapter_state_dict(sharded).items():
        assert torch.equal(tensor, fresh[name]), name
    sharded.reshard()
    set_model_state_dict(sharded, whole.state_dict(), options=options)
    for _ in range(2):  # the second time with what the first one knows
        sharded.zero_grad()
        whole.zero_grad()
        sharded(x).square().mean().backward()
        whole(x).square().mean().backward()
        for shard, tensor in zip(sharded.parameters(), whole.parameters(), strict=True):
            assert shard.requires_grad == tensor.requires_grad
            if tensor.grad is not None:
                assert_close(shard.grad.full_tensor(), tensor.grad)
        with torch.no_grad():
            for model in (sharded, whole):
                for layer in (model[0], model[2]):
                    for parameter in layer.adapter_parameters().values():
                        parameter.mul_(1.5)


def shard_first():
    from torch.distributed.fsdp import fully_shard

    whole, sharded = RECIPE(body()), body()
    mesh = dist.init_device_mesh("cpu", (2,))
    for module in (sharded[0], sharded):
        fully_shard(module, mesh=mesh)
    RECIPE(sharded)
    x = x_of()
    assert torch.equal(sharded(x), body()(x))
    fresh = adapter_state_dict(whole)
    for name, tensor in adapter_state_dict(sharded).items():
        assert torch.equal(tensor, fresh[name]), name
    for model in (whole, sharded):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert_close(sharded(x), whole(x))
    trained = adapter_state_dict(whole)
    for name, tensor in adapter_state_dict(sharded).items():
        assert_close(tensor, trained[name])
    expected = whole(x)
    merge(sharded)
    assert_close(sharded(x), expected)
    unmerge(sharded)
    assert_close(sharded(x), expected)
    sharded.reshard()
    for layer in (sharded[0], sharded[2]):
        layer.reset_magnitude()
    dense = [
        layer.weight + layer.scale * layer.lora_b.weight @ layer.lora_a.weight
        for layer in (whole[0], whole[2])
    ]
    for layer, weight in zip((sharded[0], sharded[2]), dense, strict=True):
        assert_close(layer.lora_magnitude.weight.full_tensor(), weight.norm(dim=1))


@pytest.mark.distributed
def test_a_model_that_is_sharded_already_gets_whole_magnitudes_in_shards(tmp_path):
    on_ranks(2, shard_first, tmp_path)


@pytest.mark.distributed
def test_fsdp2_from_meta_starts_and_trains_as_one_process_does(tmp_path):
    on_ranks(2, shard_and_compare, tmp_path)


def shard_by_columns():
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = dist.init_device_mesh("cpu", (2,))
    with pytest.raises(NotImplementedError, match="DoRA needs the norms"):
        parallelize_module(RECIPE(body()), mesh, {"0": ColwiseParallel()})
    model = parallelize_module(body(), mesh, {"0": ColwiseParallel()})
    with pytest.raises(NotImplementedError, match="DoRA needs the norms"):
        RECIPE(model)
    assert type(model[0]) is nn.Linear


@pytest.mark.distributed
def test_over_tensor_parallel_weights_it_is_refused_by_name(tmp_path):
    on_ranks(2, shard_by_columns, tmp_path)


def test_offloaded_by_accelerate_it_computes_the_same():
    from accelerate import cpu_offload

    model, x = trained(RECIPE(body())), x_of()
    with torch.no_grad():
        expected = model(x)
        offloaded = cpu_offload(copy.deepcopy(model), execution_device="cpu")
        assert offloaded[0].weight.is_meta
        assert_close(offloaded(x), expected)
        assert_close(offloaded(x), expected)


class Reader(nn.Module):
    """A module that takes its linear's weight into a product of its own."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(12, 8)

    def forward(self, x):
        return F.linear(x, self.proj.weight, self.proj.bias)


def test_where_other_code_reads_the_weight_its_rows_are_rescaled():
    base, x = Reader(), x_of()
    model = LoRA(dim=4, use_dora=True)(copy.deepcopy(base))
    assert_close(model(x), base(x))
    layer = trained(model).proj
    weights = [*layer.adapter_parameters().values()]
    got = torch.autograd.grad(model(x).square().sum(), weights)
    want = torch.autograd.grad(dense(layer, x).square().sum(), weights)
    for mine, other in zip(got, want, strict=True):
        assert_close(mine, other)


@pytest.mark.parametrize("recipe", [{"use_dora": True}, {"lora_A_init_method": "pissa"}], ids=str)
@pytest.mark.parametrize("called", [False, True])
def test_with_hooks_on_a_and_b_values_and_gradients_are_the_same(recipe, called):
    torch.manual_seed(0)
    model = trained(LoRA(dim=4, **recipe)(Reader() if not called else nn.Sequential(*body())))
    layer, x = model.proj if not called else model[0], x_of()
    weights = [p for p in layer.parameters() if p.requires_grad]
    run = layer if called else model
    want = [run(x), *torch.autograd.grad(run(x).square().sum(), weights)]
    layer.lora_a.register_forward_hook(lambda *_: None)
    got = [run(x), *torch.autograd.grad(run(x).square().sum(), weights)]
    for mine, other in zip(got, want, strict=True):
        assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", [{"use_dora": True}, {"lora_A_init_method": "olora"}], ids=str)
def test_a_kind_that_takes_no_other_function_refuses_them_and_stays_as_it_was(recipe, monkeypatch):
    monkeypatch.setattr(LinearAdapter, "takes_functions", False)
    model = body()
    with pytest.raises(NotImplementedError, match="which is for linears"):
        LoRA(dim=2, **recipe)(model)
    assert type(model[0]) is nn.Linear and all(p.requires_grad for p in model.parameters())
    assert not MegatronLinearAdapter.takes_functions


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_on_disk_it_is_the_model_merged_in_memory(tmp_path, kind, dtype):
    torch.manual_seed(0)
    base = getattr(models, kind)().to(dtype).eval()
    base.save_pretrained(tmp_path / "base")
    targets = ["c_attn", "c_proj"] if kind == "gpt2" else ["q_proj", "down_proj"]
    model = trained(LoRA(target_modules=targets, dim=3, use_dora=True)(copy.deepcopy(base)))
    save_adapter(model, tmp_path / "adapter")
    report = merge_directory(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    in_memory = merge(model)
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        key = name if name in written else name.removeprefix("transformer.")
        if key in written:
            eps = torch.finfo(dtype).eps
            assert_close(written[key], tensor, rtol=2 * eps, atol=eps * float(tensor.abs().max()))
    mine = {row.fqn: row.relative_update for row in report.rows}
    for row in in_memory.rows:
        assert_close(mine[row.fqn], row.relative_update, rtol=1e-3, atol=0.0)
    with pytest.raises(AdapterError, match="cannot be weighted or summed"):
        merge_directory(tmp_path / "base", [(tmp_path / "adapter", 0.5)], tmp_path / "half")


def test_the_doctor_finds_a_dora_model_and_its_file_healthy(tmp_path):
    base = models.llama()
    model = trained(
        LoRA(target_modules=["q_proj", "up_proj"], dim=2, use_dora=True)(copy.deepcopy(base))
    )
    before = {n: p.clone() for n, p in model.named_parameters()}
    save_adapter(model, tmp_path)
    for report in (doctor(model), doctor(base, tmp_path)):
        assert report.healthy, str(report)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    expected = model(**models.inputs(base)).logits
    again = load_adapter(copy.deepcopy(base), tmp_path)
    assert torch.equal(again(**models.inputs(base)).logits, expected)


def test_inspect_counts_the_magnitudes_and_says_dora(tmp_path, capsys):
    model = trained(RECIPE(body()))
    save_adapter(nn.ModuleDict({"body": model}), tmp_path)
    report = describe(read_adapter(tmp_path))
    assert report["use_dora"]
    assert report["parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert main(["inspect", str(tmp_path)]) == 0
    assert ", DoRA" in capsys.readouterr().out


def test_a_higher_rank_is_the_same_function_and_a_lower_one_is_refused(tmp_path):
    base = nn.ModuleDict({"body": body()})
    model = trained(LoRA(dim=4, use_dora=True)(copy.deepcopy(base)))
    file = read_adapter(save_adapter(model, tmp_path / "4"))
    with pytest.raises(AdapterError, match="a DoRA adapter cannot get the lower rank 2"):
        resize(file, 2)
    from bridge.peft.formats.peft import write_adapter

    write_adapter(resize(file, 6)[0], tmp_path / "6")
    wider = load_adapter(copy.deepcopy(base), tmp_path / "6")
    assert_close(wider["body"](x_of()), model["body"](x_of()))


def test_formats_without_magnitudes_refuse_it_and_a_bare_state_dict_is_read(tmp_path):
    base = models.llama()
    model = trained(
        LoRA(target_modules=["q_proj"], dim=2, alpha=4, use_dora=True)(copy.deepcopy(base))
    )
    save_adapter(model, tmp_path / "adapter")
    base.config.save_pretrained(tmp_path)
    from bridge.peft.formats.convert.layout import AttentionLayout

    layout = AttentionLayout.of_model(tmp_path)
    for target in ("megatron", "torchtune", "mlx"):
        with pytest.raises(AdapterError, match="is DoRA's, whose magnitudes"):
            convert_adapter(tmp_path / "adapter", target, tmp_path / target, layout=layout)
    save_file(
        {n: t.contiguous() for n, t in adapter_state_dict(model).items()},
        tmp_path / "bare.safetensors",
    )
    convert_adapter(tmp_path / "bare.safetensors", "peft", tmp_path / "peft", alpha=4)
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["use_dora"]
    again = load_adapter(copy.deepcopy(base), tmp_path / "peft")
    inputs = models.inputs(base)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_modules_with_and_without_a_magnitude_do_not_fit_into_one_file(tmp_path):
    model = RECIPE(body())
    del model[0].lora_magnitude
    with pytest.raises(AdapterError, match="one flag for all modules"):
        save_adapter(nn.ModuleDict({"body": model}), tmp_path)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_it_trains_step_after_step_as_it_does_plainly(reentrant):
    losses = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = LoRA(dim=4, seed=0, use_dora=True)(models.llama()).train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        losses.append([])
        for step in range(4):  # the norms of one step are kept for its recomputation
            ids = torch.arange(3 + step, 15 + step)[None]
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            assert all(p.grad is not None for p in trained)
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_the_norms_that_are_kept_hold_no_graph():
    model = LoRA(dim=4, use_dora=True)(nn.Sequential(nn.Linear(8, 8)))
    for _ in range(2):
        model(torch.randn(2, 8)).sum().backward()
        kept = vars(model[0].lora_magnitude._known).values()
        assert not any(t.requires_grad for t in kept if isinstance(t, torch.Tensor))
