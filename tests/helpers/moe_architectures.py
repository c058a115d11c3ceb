"""Tiny mixtures of experts of transformers whose experts lie in one parameter a projection."""

import copy

import torch
import transformers

from tests.helpers.architectures import (
    _GROUPED,
    _HEAD_DIM,
    _LATENT,
    _LOCAL_MOE,
    _MOE,
    _TEXT,
    ARCHITECTURES,
    tiny,
)

_SHARED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
_LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_MORE = {
    "afmoe": (
        "AfmoeForCausalLM",
        {**_HEAD_DIM, **_MOE, "num_experts": 4, "num_shared_experts": 1, "num_dense_layers": 1},
    ),
    "aria_text": (
        "AriaTextForCausalLM",
        {**_GROUPED, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    ),
    "cohere2_moe": ("Cohere2MoeForCausalLM", {**_HEAD_DIM, **_MOE, "num_experts": 4}),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        {
            **_TEXT,
            **_MOE,
            **_LATENT,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "dots1": ("Dots1ForCausalLM", {**_HEAD_DIM, **_MOE, **_SHARED, "first_k_dense_replace": 1}),
    "ernie4_5_moe": (
        "Ernie4_5_MoeForCausalLM",
        {
            **_GROUPED,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 16,
            "moe_num_shared_experts": 1,
        },
    ),
    "flex_olmo": ("FlexOlmoForCausalLM", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "glm4_moe": ("Glm4MoeForCausalLM", {**_HEAD_DIM, **_MOE, **_SHARED}),
    "granitemoeshared": (
        "GraniteMoeSharedForCausalLM",
        {**_GROUPED, **_LOCAL_MOE, "shared_intermediate_size": 16},
    ),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", {**_HEAD_DIM, "num_experts": 4, "moe_topk": 2}),
    "jetmoe": (
        "JetMoeForCausalLM",
        {**_TEXT, **_LOCAL_MOE, "num_key_value_heads": 2, "kv_channels": 8},
    ),
    "lfm2_moe": (
        "Lfm2MoeForCausalLM",
        {
            **_GROUPED,
            **_MOE,
            "num_experts": 4,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention"],
        },
    ),
    "minimax": (
        "MiniMaxForCausalLM",
        {
            **_HEAD_DIM,
            **_LOCAL_MOE,
            "layer_types": ["full_attention", "linear_attention"],
            "block_size": 4,
        },
    ),
    "minimax_m2": ("MiniMaxM2ForCausalLM", {**_HEAD_DIM, **_LOCAL_MOE}),
    "nemotron_h": (
        "NemotronHForCausalLM",
        {
            **_HEAD_DIM,
            **_MOE,
            **_SHARED,
            "layers_block_type": ["moe", "attention"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 4,
            "chunk_size": 4,
            "moe_shared_expert_intermediate_size": 16,
        },
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeForCausalLM",
        {
            **_HEAD_DIM,
            **_MOE,
            **_LINEAR_ATTENTION,
            "num_experts": 4,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "solar_open": ("SolarOpenForCausalLM", {**_HEAD_DIM, **_MOE, **_SHARED}),
}
#: Those of the general list whose experts are one parameter.
_LISTED = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "deepseek_v3"),
    *("longcat_flash", "phimoe", "llama4_text", "jamba", "qwen3_next"),
)
ALL = (*_LISTED, *_MORE)
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def mixture(name: str, implementation: str = "eager") -> torch.nn.Module:
    """The tiny model of an architecture, with the same weights always, in evaluation."""
    if name in ARCHITECTURES:
        model = tiny(name)
    else:
        class_name, settings = _MORE[name]
        cls = getattr(transformers, class_name)
        torch.manual_seed(0)
        model = cls(cls.config_class(**copy.deepcopy(settings))).eval()
    if model._can_set_experts_implementation():
        model.set_experts_implementation(implementation)
    return model


def implementations(name: str) -> tuple[str, ...]:
    """The ways in which an architecture can compute its experts here; some know one only."""
    cls = ARCHITECTURES[name][0] if name in ARCHITECTURES else _MORE[name][0]
    can_choose = getattr(transformers, cls)._can_set_experts_implementation()
    return IMPLEMENTATIONS if can_choose else ("eager",)


def stacks(model: torch.nn.Module) -> list[str]:
    """The names of a model's parameters that hold several matrices, convolutions aside."""
    return [n for n, p in model.named_parameters() if p.dim() == 3 and "conv" not in n]
