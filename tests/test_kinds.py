"""What every kind of base, part and function must do: one table, kind by column."""

import functools

import pytest
import torch
import torch.distributed as dist

from bridge.peft import LoRA, disable_adapters, load_adapter, merge, save_adapter, unmerge
from bridge.peft.tensors import full_tensor, is_plain
from tests.helpers.kinds import KINDS, by_peft, moved
from tests.helpers.ranks import on_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*KernelPreference"),
    pytest.mark.filterwarnings("ignore:.*ScaleCalculationMode"),
    # bitsandbytes' own, when the compiler meets it
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


def tried_under(column):
    """The kinds of a column, for `parametrize`."""
    return pytest.mark.parametrize(
        "name", [name for name, kind in KINDS.items() if column not in kind.not_under]
    )


def dense(tensor):
    """Its values; torchao's tensors cannot be compared as they are."""
    return tensor if is_plain(tensor) else tensor.dequantize()


def adapted(kind):
    return moved(LoRA(**kind.ours)(kind.base())).eval()


def output(kind, model):
    with torch.no_grad():
        return kind.run(model)


def assert_near(kind, got, expected, tolerance=None):
    """Equal within the kind's tolerance, of the largest expected value."""
    got, expected = got.detach().float(), expected.detach().float()
    atol = (tolerance or kind.tolerance) * float(expected.abs().max())
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def gradients(model):
    return {n: full_tensor(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def backward(kind, model, run=None):
    model.zero_grad()
    (run or kind.run)(model).float().square().mean().backward()
    return gradients(model)


@tried_under("PEFT")
def test_peft_computes_what_we_saved(name, tmp_path):
    kind = KINDS[name]
    model = adapted(kind)
    save_adapter(model, tmp_path)
    assert_near(kind, output(kind, by_peft(kind, tmp_path).eval()), output(kind, model))
    again = load_adapter(kind.base(), tmp_path).eval()
    assert torch.equal(output(kind, again), output(kind, model))


@tried_under("PEFT")
def test_we_compute_what_peft_saved(name, tmp_path):
    kind = KINDS[name]
    if kind.theirs is None:
        return  # what is saved is a plain LoRA, which the first row has
    theirs = moved(by_peft(kind)).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(kind.base(), tmp_path).eval()
    assert_near(kind, output(kind, ours), output(kind, theirs))


@tried_under("merge")
def test_merged_it_computes_the_same_and_unmerged_the_same_bits(name):
    kind = KINDS[name]
    model = adapted(kind)
    before = output(kind, model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    merge(model)
    assert_near(kind, output(kind, model), before, kind.merged)
    unmerge(model)
    assert torch.equal(output(kind, model), before)
    for key, value in model.state_dict().items():
        assert torch.equal(dense(value), dense(state[key])), key


@tried_under("disable")
def test_switched_off_it_is_the_base_bit_for_bit(name):
    kind = KINDS[name]
    model, base = adapted(kind), kind.base().eval()
    with disable_adapters(model):
        assert torch.equal(output(kind, model), output(kind, base))
    assert not torch.equal(output(kind, model), output(kind, base))


@tried_under("checkpointing")
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_in_backward_it_has_the_same_gradients(name, reentrant):
    kind = KINDS[name]
    model = adapted(kind)
    expected = backward(kind, model)
    wants = torch.zeros((), requires_grad=True)  # reentrant checkpoints want an input that does

    def run(model):
        return torch.utils.checkpoint.checkpoint(
            lambda _: kind.run(model), wants, use_reentrant=reentrant
        )

    got = backward(kind, model, run)
    assert got.keys() == expected.keys() and expected
    for fqn, gradient in expected.items():
        torch.testing.assert_close(got[fqn], gradient, msg=fqn)


@tried_under("compile")
def test_compiled_it_has_the_same_output_and_gradients(name):
    kind = KINDS[name]
    torch._dynamo.reset()
    model = adapted(kind)
    expected = backward(kind, model)
    compiled = torch.compile(model, backend="aot_eager")
    got = backward(kind, model, lambda _: kind.run(compiled))
    assert_near(kind, output(kind, compiled), output(kind, model))
    for fqn, gradient in expected.items():
        assert_near(kind, got[fqn], gradient)


def shard_all(names, directory):
    from torch.distributed.fsdp import fully_shard

    for name in names:
        kind = KINDS[name]
        whole, sharded = adapted(kind), load_adapter(kind.base(), directory / name).eval()
        fully_shard(sharded, mesh=dist.init_device_mesh("cpu", (2,)))
        expected = backward(kind, whole)
        got = backward(kind, sharded)
        assert got.keys() == expected.keys(), name
        for fqn, gradient in expected.items():
            assert_near(kind, got[fqn], gradient)
        assert_near(kind, output(kind, sharded), output(kind, whole))


@pytest.mark.distributed
def test_sharded_by_fsdp2_it_has_the_same_output_and_gradients(tmp_path):
    names = [name for name, kind in KINDS.items() if "FSDP2" not in kind.not_under]
    for name in names:
        save_adapter(adapted(KINDS[name]), tmp_path / name)
    on_ranks(2, functools.partial(shard_all, names, tmp_path), tmp_path)
