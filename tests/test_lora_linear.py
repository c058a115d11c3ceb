"""`LoRALinear`: an adapter beside a base that answers with tuples."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bridge.peft import LoRALinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class TupleLinear(nn.Linear):
    """Answers in one of the forms of Megatron's linears."""

    def __init__(self, form):
        super().__init__(4, 3)
        self.form = form

    def forward(self, x, *args, **kwargs):
        out, ln_out = F.linear(x, self.weight), x * 3
        forms = {
            "bare": out,
            "(out, None)": (out, None),
            "(out, bias)": (out, self.bias),
            "((out, ln_out), None)": ((out, ln_out), None),
            "((out, ln_out), bias)": ((out, ln_out), self.bias),
            "(out, bias, ln_out)": (out, self.bias, ln_out),
            "unknown": {"out": out},
        }
        return forms[self.form]


@pytest.mark.parametrize(
    "form",
    [
        "bare",
        "(out, None)",
        "(out, bias)",
        "((out, ln_out), None)",
        "((out, ln_out), bias)",
        "(out, bias, ln_out)",
    ],
)
def test_lora_linear_adds_the_adapter_to_every_form_of_result(form):
    base, adapter = TupleLinear(form), nn.Linear(4, 3, bias=False)
    layer = LoRALinear(base, adapter)
    x = torch.randn(4, 2).T
    fed = x * 3 if "ln_out" in form else x
    expected = F.linear(x, base.weight) + adapter(fed.contiguous())  # as the adapter is fed it
    result = layer(x, "passed", on=True)
    if form == "bare":
        assert torch.equal(result, expected)
    else:
        assert isinstance(result, tuple) and len(result) == 2
        assert torch.equal(result[0], expected)
        assert (result[1] is base.bias) if "bias" in form else (result[1] is None)
    output, bias, adapter_input = layer.base_linear_forward(x)
    assert torch.equal(output, F.linear(x, base.weight)) and adapter_input.is_contiguous()
    assert torch.equal(adapter_input, fed)
    assert (bias is base.bias) if "bias" in form else (bias is None)


def test_lora_linear_says_what_it_got_when_the_form_is_unknown():
    with pytest.raises(TypeError, match="got dict"):
        LoRALinear(TupleLinear("unknown"), nn.Linear(4, 3))(torch.randn(2, 4))
