"""What all tests share."""

import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Small tensors everywhere: a second thread would mostly wait for the first, also in subprocesses.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

with warnings.catch_warnings():
    # Optional packages complain at import about each other and the machine; not ours to fix.
    warnings.simplefilter("ignore")
    import bitsandbytes  # noqa: F401
    import transformers  # noqa: F401


@pytest.fixture(autouse=True)
def _same_random_numbers_in_every_test():
    torch.manual_seed(0)


# The inputs of the command's tests; a test file that needs others defines its own.


@pytest.fixture(scope="module")
def one_cpu_thread():
    """One thread for the tests of a module, its own fixtures included."""
    from tests.helpers.cli_fixtures import one_thread

    with one_thread():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The directory of a tiny Llama with a tokenizer of characters."""
    from tests.helpers.cli_fixtures import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A JSONL file of 300 sums and their answers."""
    from tests.helpers.cli_fixtures import sums, write_rows

    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", sums(300))


@pytest.fixture(scope="module")
def one_megatron_rank(tmp_path_factory):
    """Megatron's groups of this process alone."""
    import torch.distributed as dist

    from tests.helpers.megatron import parallel_state, start

    store = tmp_path_factory.mktemp("rendezvous") / "store"
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{store}")
    start()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
