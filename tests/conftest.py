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
