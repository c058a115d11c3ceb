"""CPU doubles of Megatron Core's Transformer Engine linears (megatron-core 0.16, TE 2.20).

Copied from the published source of `megatron.core.extensions.transformer_engine`:

- the names of the classes and their module, by which they are known;
- `_tp_group`, `config`, `parallel_mode`, `te_return_bias`; local sizes in `in_features` and
  `out_features`; no `explicit_expert_comm` attribute;
- `forward(x)` answers `(out, bias or None)`; the form with a layer norm in front answers
  `((out, ln_out), bias or None)`, or `(out, bias, ln_out)`, while `return_layernorm_output` is set.

Not copied: fp8, tensor parallelism, the base class `te.Linear`.
"""

from __future__ import annotations

import types

import torch
from torch import nn
from torch.nn import functional as F

_MODULE = "megatron.core.extensions.transformer_engine"


class _TELinear(nn.Module):
    parallel_mode = "column"

    def __init__(self, in_features, out_features, bias=True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.config = types.SimpleNamespace(pipeline_model_parallel_size=1)
        self._tp_group, self.tp_size, self.te_return_bias = None, 1, bias
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / in_features**0.5)
        self.bias = nn.Parameter(torch.randn(out_features)) if bias else torch.empty(0)

    def forward(self, x):
        return F.linear(x, self.weight), self.bias if self.te_return_bias else None


class TEColumnParallelLinear(_TELinear):
    pass


class TERowParallelLinear(_TELinear):
    parallel_mode = "row"


class TELayerNormColumnParallelLinear(_TELinear):
    def __init__(self, in_features, out_features, bias=True):
        super().__init__(in_features, out_features, bias)
        self.layer_norm_weight = nn.Parameter(torch.rand(in_features) + 0.5)
        self.return_layernorm_output = False

    def forward(self, x):
        normed = F.layer_norm(x, x.shape[-1:], self.layer_norm_weight)
        out = F.linear(normed, self.weight)
        if not self.return_layernorm_output:
            return out, self.bias if self.te_return_bias else None
        return (out, self.bias, normed) if self.te_return_bias else ((out, normed), None)


for _cls in (TEColumnParallelLinear, TERowParallelLinear, TELayerNormColumnParallelLinear):
    _cls.__module__ = _MODULE
