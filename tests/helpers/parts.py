"""Models whose embeddings, heads and other parts are adapted, moved away from their start."""

from __future__ import annotations

import copy
import warnings

import torch
import transformers

from bridge.peft import LoRA, adapter_state_dict
from tests.helpers import models

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft


def gemma3(**more):
    """A model whose embedding scales its rows."""
    config = transformers.Gemma3TextConfig(**models._small(head_dim=8, pad_token_id=0, **more))
    return transformers.Gemma3ForCausalLM(config)


def build(make, **more):
    torch.manual_seed(0)
    return make(**more).eval()


def moved(model, size=0.3):
    """The adapted model, everything that its adapter trains moved away from its start."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in adapter_state_dict(model).values():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * size)
    return model


def adapted(base, **recipe):
    """A copy of `base`, adapted and moved; notes of the recipe are the caller's affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return moved(LoRA(**({"dim": 4, "seed": 1} | recipe))(copy.deepcopy(base)))


def logits(model, ids=None):
    if ids is None:
        ids = models.inputs(model)["input_ids"]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def read_by_peft(base, directory):
    """PEFT's reading of a directory; a warning that names our config or keys is an error."""
    with warnings.catch_warnings():
        # transformers deprecates one of its own methods that PEFT calls
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        # PEFT says of every tied model that merging it would change the other end too
        warnings.filterwarnings("ignore", message=".*`ensure_weight_tying` is not set.*")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), directory)
