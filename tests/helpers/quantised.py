"""Quantised linears of every format that runs on a CPU, by name, and a small quantised Llama."""

import warnings

import bitsandbytes as bnb
import torch
import transformers
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        quantize_,
    )
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

N_IN, N_OUT = 128, 128


def dense_linear(dtype=torch.float32, seed=0, size=(N_IN, N_OUT)):
    """A linear with the same values whenever it is made."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(*size, dtype=dtype)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / N_IN**0.5)
    return linear


def four_bit(dtype=torch.float32, **settings):
    """A `Linear4bit` with the values of `dense_linear`."""
    layer = bnb.nn.Linear4bit(N_IN, N_OUT, compute_dtype=dtype, **settings)
    layer.load_state_dict(dense_linear().state_dict())
    return layer.to("cpu")


def eight_bit(**settings):
    """A `Linear8bitLt` with the values of `dense_linear`."""
    layer = bnb.nn.Linear8bitLt(N_IN, N_OUT, has_fp16_weights=False, **settings)
    layer.load_state_dict(dense_linear().state_dict())
    return layer.to("cpu")


def torchao(config, dtype=torch.bfloat16):
    """A linear whose weight torchao quantised."""
    model = nn.Sequential(dense_linear(dtype))
    quantize_(model, config)
    return model[0]


def torchao_nf4(size=(N_IN, N_OUT)):
    """A linear whose weight is torchao's NF4."""
    linear = dense_linear(torch.bfloat16, size=size)
    linear.weight = nn.Parameter(to_nf4(linear.weight.detach()), requires_grad=False)
    return linear


INT4 = IntxWeightOnlyConfig(weight_dtype=torch.int4)
#: name -> (maker, dtype of x, relative error of its own arithmetic)
KINDS = {
    "nf4": (lambda: four_bit(quant_type="nf4", compress_statistics=False), torch.float32, 1e-6),
    "nf4 double": (lambda: four_bit(quant_type="nf4"), torch.float32, 1e-6),
    "nf4 bfloat16": (lambda: four_bit(torch.bfloat16, quant_type="nf4"), torch.bfloat16, 2e-2),
    "nf4 float32 storage": (
        lambda: four_bit(quant_type="nf4", quant_storage=torch.float32),
        torch.float32,
        1e-6,
    ),
    "fp4": (lambda: four_bit(quant_type="fp4"), torch.float32, 1e-6),
    "int8": (eight_bit, torch.float32, 3e-2),
    "int8 outliers": (lambda: eight_bit(threshold=2.0), torch.float32, 3e-2),
    "torchao int8": (lambda: torchao(Int8WeightOnlyConfig()), torch.bfloat16, 2e-2),
    "torchao int8 float32": (
        lambda: torchao(Int8WeightOnlyConfig(), torch.float32),
        torch.float32,
        1e-6,
    ),
    "torchao float8": (lambda: torchao(Float8WeightOnlyConfig()), torch.bfloat16, 2e-2),
    "torchao int4": (lambda: torchao(INT4), torch.bfloat16, 2e-2),
    "torchao nf4": (torchao_nf4, torch.bfloat16, 2e-2),
}


def tiny_llama(path, **settings):
    """Save a small Llama in bfloat16 whose linears bitsandbytes can quantise; its directory."""
    config = transformers.LlamaConfig(
        **{"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
        **settings,
    )
    torch.manual_seed(3)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def load_llama(path, kind=None, dtype=torch.float32):
    """Load it, quantised by bitsandbytes as `kind` says.

    Without the CPU layout for inference of machines with AVX-512, which rounds to bfloat16.
    """
    how = {
        "nf4": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
        },
        "int8": {"load_in_8bit": True},
        None: {},
    }[kind]
    options = {"quantization_config": transformers.BitsAndBytesConfig(**how)} if how else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, device_map="cpu", **options
    )
    return without_inference_layout(model)


def without_inference_layout(model):
    """Keep a model's 4-bit linears in the layout in which they were quantised."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model
