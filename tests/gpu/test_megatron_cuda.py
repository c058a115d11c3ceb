"""A branch on Megatron's linears on real GPUs: nothing of CUDA is answered by the CPU here."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

pytestmark = pytest.mark.gpu


@pytest.fixture
def one_gpu(tmp_path):
    pytest.importorskip("megatron.core")
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from tests.helpers.megatron import parallel_state, start

    dist.init_process_group("nccl", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    start()
    model_parallel_cuda_manual_seed(0)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def losses(model, steps=5):
    from tests.helpers.megatron import loss_of

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_it_trains_on_a_gpu_as_on_a_cpu_and_recomputes_the_same(one_gpu):
    from tests.helpers.megatron import gpt
    from tests.helpers.megatron_ranks import RECIPE

    first = losses(RECIPE(gpt().cuda()))
    again = {"recompute_granularity": "full", "recompute_method": "uniform"}
    second = losses(RECIPE(gpt(recompute_num_layers=1, **again).cuda()))
    assert first == pytest.approx(second, rel=1e-5)
    assert first != pytest.approx([first[0]] * 5, rel=1e-3)


def test_dropout_is_recomputed_on_a_gpu(one_gpu):
    from tests.helpers.megatron import gpt
    from tests.helpers.megatron_ranks import RECIPE

    recipe = dataclasses.replace(RECIPE, dropout=0.3)
    again = {"recompute_granularity": "full", "recompute_method": "uniform"}
    found = []
    for settings in ({}, {"recompute_num_layers": 1, **again}):
        model = recipe(gpt(**settings).cuda()).train()
        torch.manual_seed(5)
        found.append(losses(model))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_megatrons_own_loop_and_checkpoint_run_on_a_gpu(one_gpu, tmp_path):
    from megatron.core import dist_checkpointing

    from bridge.peft import adapter_state_dict
    from bridge.peft.model.sharded_state import adapter_sharded_state_dict
    from tests.helpers.megatron import gpt
    from tests.helpers.megatron_ranks import RECIPE, megatron_loop, with_random_b

    model = with_random_b(RECIPE(gpt().cuda()))
    megatron_loop(model)
    expected = adapter_state_dict(model)
    (tmp_path / "saved").mkdir()
    dist_checkpointing.save(adapter_sharded_state_dict(model), str(tmp_path / "saved"))
    other = RECIPE(gpt().cuda())
    state = dist_checkpointing.load(adapter_sharded_state_dict(other), str(tmp_path / "saved"))
    other.load_state_dict(state, strict=False)
    for name, tensor in adapter_state_dict(other).items():
        assert torch.equal(tensor, expected[name]), name
