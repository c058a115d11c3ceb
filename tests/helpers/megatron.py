"""A small `GPTModel` of Megatron Core on the CPU, whole or tensor parallel, and its batches."""

from __future__ import annotations

import contextlib
import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it misses: apex, Transformer Engine
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

VOCABULARY, LENGTH, BATCH = 64, 8, 2
#: A mixture of experts, one after another; its dispatcher is the one that needs no CUDA stream.
MOE = {
    "experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "allgather",
}
TARGETS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


class SDPA(nn.Module):
    """Causal attention by torch; Megatron's own allocates its mask on a GPU."""

    def __init__(self, config, **kwargs):
        super().__init__()
        self.grouped = config.num_query_groups != config.num_attention_heads

    def forward(self, query, key, value, attention_mask, **kwargs):
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # (s, b, heads, d) before
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        return out.permute(2, 0, 1, 3).flatten(2)


class Norm(nn.RMSNorm):
    """Megatron's own without Apex refuses sequence parallel."""

    def __init__(self, config, hidden_size, eps=1e-5, **kwargs):
        super().__init__(hidden_size, eps=eps)


class _OnTheCPU(TorchFunctionMode):
    """`device="cuda"` means the CPU, and its tensors have the names of CUDA's types."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.")
        return result


@contextlib.contextmanager
def cuda_calls_answered_by_the_cpu():
    """Megatron asks CUDA for devices, tensors and random states inline; here the CPU answers."""
    with pytest.MonkeyPatch.context() as patch, _OnTheCPU():
        patch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
        patch.setattr(torch.cuda, "synchronize", lambda *args: None)
        patch.setattr(random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.empty(0))
        patch.setattr(random, "_set_cuda_rng_state", lambda *args, **kwargs: None)
        # names that Megatron defines with Transformer Engine only, and reads without it
        patch.setattr(moe_utils, "te_general_gemm", None, raising=False)
        no_fp8 = types.SimpleNamespace(is_fp8_enabled=lambda: False)
        patch.setattr(random, "FP8GlobalStateManager", no_fp8, raising=False)
        nothing = lambda **kwargs: contextlib.nullcontext()
        patch.setattr(random, "activation_recompute_forward", nothing, raising=False)
        patch.setattr(random, "fp8_autocast", nothing, raising=False)
        patch.setattr(random.CudaRNGStatesTracker, "fork", lambda *a: contextlib.nullcontext())
        yield


def start(tensor=1, **sizes):
    """Make Megatron's groups of the default process group, anew."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor, **sizes)


def gpt(seed=0, experts=None, grouped_gemm=False, position="learned_absolute", **config):
    """A model of two layers; the same seed gives the same whole weights on any number of ranks."""
    torch.manual_seed(seed)
    settings = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 48,
        "use_cpu_initialization": True,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "num_moe_experts": experts,
        "moe_grouped_gemm": grouped_gemm,
        **config,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is deprecated, or switched off on one rank
        spec = get_gpt_layer_local_spec(experts, grouped_gemm, normalization="RMSNorm")
        spec.submodules.self_attention.submodules.core_attention = SDPA
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = Norm
        made = TransformerConfig(normalization="RMSNorm", **settings)
        return GPTModel(
            made,
            TransformerBlockSubmodules([spec] * made.num_layers, layer_norm=Norm),
            vocab_size=VOCABULARY,
            max_sequence_length=LENGTH,
            position_embedding_type=position,
            share_embeddings_and_output_weights=False,
        )


def batch(seed=0):
    """Token ids and labels, (batch, length)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def positions():
    return torch.arange(LENGTH).expand(BATCH, -1)


def loss_of(model, seed=0):
    """The mean loss of one batch, the same number on every rank."""
    device = next(model.parameters()).device
    ids, labels = (t.to(device) for t in batch(seed))
    return model(ids, positions().to(device), None, labels=labels).mean()
