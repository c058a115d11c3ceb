"""One recipe, any layout: the numbers, the files and the frozen base are those of one process."""

import filecmp
import functools
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bridge.peft import adapter_state_dict, load_adapter, save_adapter
from bridge.peft.tensors import full_tensor
from tests.helpers.parallel_model import LAYOUTS, RECIPE, base_model, batch, loss_of
from tests.helpers.ranks import on_ranks

pytestmark = pytest.mark.distributed
STEPS, MAX_NORM = 20, 0.05


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def names(model):
    """Trained parameters by the names of the unwrapped model, whole."""
    return {n.removeprefix("module."): p for n, p in trained(model).items()}


def base_of(model):
    return {n: full_tensor(p) for n, p in model.named_parameters() if not p.requires_grad}


def step(model, optimizer, ids):
    loss = loss_of(model, ids)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trained(model).values(), MAX_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach(), float(full_tensor(norm))


def one_process(directory):
    """The reference: gradients of the first step, the norms, and the adapter after the last."""
    model = RECIPE(base_model())
    load_adapter(model, directory / "start")
    loss_of(model, batch(0)).backward()
    gradients = {n: p.grad.clone() for n, p in trained(model).items()}
    model.zero_grad()
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    runs = [step(model, optimizer, batch(number)) for number in range(STEPS)]
    return model, gradients, [float(loss) for loss, _ in runs], [norm for _, norm in runs]


def check(name, directory):
    lay_out, data_ranks = LAYOUTS[name]
    fresh = RECIPE(base_model())
    reference, gradients, losses, norms = one_process(directory)
    model = lay_out(base_model())
    for fqn, tensor in adapter_state_dict(model).items():
        assert torch.equal(tensor, adapter_state_dict(fresh)[fqn]), fqn
    load_adapter(model, directory / "start")
    before = base_of(model)
    rank = dist.get_rank() * data_ranks // dist.get_world_size()

    def mine(ids):
        return ids.chunk(data_ranks)[rank]

    loss_of(model, mine(batch(0))).backward()
    for fqn, parameter in names(model).items():
        grad = full_tensor(parameter.grad)
        torch.testing.assert_close(grad, gradients[fqn], rtol=1e-5, atol=1e-6, msg=fqn)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    model.zero_grad()
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    for number in range(STEPS):
        loss, norm = step(model, optimizer, mine(batch(number)))
        loss = loss.clone()
        dist.all_reduce(loss)
        assert float(loss) / dist.get_world_size() == pytest.approx(losses[number], rel=1e-5)
        assert norm == pytest.approx(norms[number], rel=1e-5)
    assert set(map(id, optimizer.state)) == set(map(id, trained(model).values()))
    for fqn, parameter in names(model).items():
        expected = reference.get_parameter(fqn)
        torch.testing.assert_close(full_tensor(parameter), expected, rtol=1e-4, atol=1e-4, msg=fqn)
    for fqn, tensor in base_of(model).items():
        assert torch.equal(tensor, before[fqn]), fqn
    load_adapter(model, directory / "start")
    save_adapter(model, directory / "again")
    dist.barrier()
    assert same_files(directory / "start", directory / "again")


def same_files(first, second):
    files = sorted(p.name for p in first.iterdir())
    return filecmp.cmpfiles(first, second, files, shallow=False)[0] == files


def run(layouts):
    directory = Path(os.environ["ADAPTER_DIRECTORY"])
    for name in layouts:
        check(name, directory)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """An adapter that one process saved, B and head changed since the start."""
    model = RECIPE(base_model())
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_adapter(model, tmp_path / "start")
    monkeypatch.setenv("ADAPTER_DIRECTORY", str(tmp_path))
    return tmp_path


TWO = [name for name in LAYOUTS if "FSDP2 x" not in name and "then" not in name]
FOUR = [name for name in LAYOUTS if name not in TWO]


@pytest.mark.parametrize(("count", "layouts"), [(2, TWO), (4, FOUR)], ids=["2 ranks", "4 ranks"])
def test_every_layout_computes_trains_and_saves_as_one_process(count, layouts, start):
    on_ranks(count, functools.partial(run, layouts), start)
