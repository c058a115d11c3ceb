"""A CPU double of `transformer_engine.pytorch.Linear` (2.20): the behaviours an adapter meets.

Copied from its documentation and checked against its published Python source:

- the constructor's signature; its third positional argument is `sequence_parallel`, not `bias`;
- `forward(inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False)`;
- `bias=False` leaves `self.bias` an empty plain tensor of shape (0,), not a Parameter;
- `return_bias=True` returns `(out, bias)` and does not add the bias;
- `parameters_split` makes parameters such as `q_weight` and no `weight`;
- outside autocast every parameter below the module, children included, must have the input's
  dtype, else TypeError; once checked, a dtype is not checked again;
- `_extra_state` in the state dict;
- an fp8 primary weight is a tensor subclass whose `.dtype` is nominal.

Not copied: fp8 arithmetic, tensor parallelism, CUDA, meta initialisation on a device.
"""

import types

import torch
from torch import nn
from torch.nn import functional as F


class Float8Tensor(torch.Tensor):
    """A weight in fp8, of nominal dtype."""


class Linear(nn.Module):
    def __init__(
        self,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        rng_tracker_name=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        parameters_split=None,
        device="cpu",
        save_original_input=False,
        symmetric_ar_type=None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.sequence_parallel, self.tp_group, self.tp_size = sequence_parallel, tp_group, tp_size
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.parallel_mode, self.use_bias, self.return_bias = parallel_mode, bias, return_bias
        self.save_original_input, self.symmetric_ar_type = save_original_input, symmetric_ar_type
        self.get_rng_state_tracker, self.rng_tracker_name = get_rng_state_tracker, rng_tracker_name
        self.activation_dtype = None
        dtype = params_dtype or torch.get_default_dtype()
        names = [f"{name}_" for name in parameters_split or ()] or [""]
        rows = out_features // len(names)
        for name in names:
            weight = torch.randn(rows, in_features, dtype=dtype, device=device)
            self.register_parameter(f"{name}weight", nn.Parameter(weight))
            empty = torch.empty(0, dtype=dtype, device=device)
            if bias:
                self.register_parameter(
                    f"{name}bias", nn.Parameter(torch.randn(rows, dtype=dtype, device=device))
                )
            else:
                setattr(self, f"{name}bias", empty)

    def set_activation_dtype(self, inp):
        if torch.is_autocast_enabled("cpu"):
            self.activation_dtype = torch.get_autocast_dtype("cpu")
            return
        if self.activation_dtype == inp.dtype:
            return
        for name, param in self.named_parameters():
            if param.dtype != inp.dtype:
                raise TypeError(f"input is {inp.dtype}, parameter {name!r} is {param.dtype}")
        self.activation_dtype = inp.dtype

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        self.seen = (is_first_microbatch, fp8_output, fp8_grad)
        self.set_activation_dtype(inp)
        dtype = self.activation_dtype
        out = F.linear(inp.to(dtype), self.weight.to(dtype))
        if self.use_bias and not self.return_bias:
            out = out + self.bias.to(dtype)
        return (out, self.bias.to(dtype)) if self.return_bias else out

    def reset_parameters(self, defer_init=False):
        for parameter in self.parameters(recurse=False):
            parameter.data.normal_()

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        pass


def modules():
    """The double as entries of `sys.modules`."""
    package = types.ModuleType("transformer_engine")
    pytorch = types.ModuleType("transformer_engine.pytorch")
    pytorch.Linear = Linear
    package.pytorch = pytorch
    return {"transformer_engine": package, "transformer_engine.pytorch": pytorch}
