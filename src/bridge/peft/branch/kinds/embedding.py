"""`torch.nn.Embedding` and its subclasses: a lookup into A, then B.

    y = W[id] + scale · B A[:, id]

W is (num_embeddings, embedding_dim); A is (dim, num_embeddings) and B (embedding_dim, dim), as for
a linear on one-hot rows. A starts at zero and B is drawn from N(0, 1), the other way round than on
a linear: a token that training never sees keeps its column of A at zero, and its embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridge.peft.branch.mixin import LoRAMixin
from bridge.peft.branch.options import BranchOptions
from bridge.peft.dtypes import TRAINABLE_DTYPES
from bridge.peft.ops.lookup import Lookup, lora_lookup
from bridge.peft.ops.reference import add_in_base_dtype
from bridge.peft.tensors import is_plain

#: Rows by which a forward of a subclass's own is compared with a lookup.
_ROWS = 16


class EmbeddingAdapter(LoRAMixin):
    """Embedding + LoRA; the base's own forward looks its rows up, and what it scales is scaled."""

    transposed = True
    in_all_linear = False
    peft_keys = ("lora_embedding_A", "lora_embedding_B")

    @classmethod
    def takes(cls, base_type: type[nn.Module]) -> bool:
        """Whether this is `nn.Embedding` or derives from it.

        Args:
            base_type: The class of a module before adaptation.
        """
        return issubclass(base_type, nn.Embedding)

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """As the mixin's; and what an embedding does beside looking rows up."""
        assert isinstance(module, nn.Embedding)
        if module.max_norm is not None:
            return "its forward rescales rows of its weight in place (max_norm), which is frozen"
        if module.sparse:
            return "its gradient is sparse, and that of A is not; build it with sparse=False"
        return super().refusal(module) or _own_forward_reason(module)

    @classmethod
    def features(cls, module: nn.Module) -> tuple[int, int]:
        """`(num_embeddings, embedding_dim)`."""
        return module.num_embeddings, module.embedding_dim  # pyright: ignore[reportReturnType]

    @classmethod
    def init_methods(cls, options: BranchOptions) -> tuple[str, str]:
        """A is zero and B is drawn, so that only what is looked up in training changes.

        With A frozen (LoRA-FA) it is the other way round, or nothing could be learnt.
        """
        return super().init_methods(options) if options.freeze_a else ("zeros", "normal")

    def sample_input(self, rows: int) -> Tensor:
        """Some tokens, but not the one that gets no gradient."""
        count = self.features(self)[0]
        ids = torch.randperm(count)[: rows + 1].to(self.base_weight.device)
        return ids[ids != lookup_of(self).padding_idx][:rows]

    def _add_branch(self, base_out: Tensor, x: Tensor) -> Tensor:
        if self.has_hooks_on_a_or_b():
            return self._add_branch_by_calls(base_out, x)
        a, b = self.lora_a.weight, self.lora_b.weight
        drop = self.dropout_now() if self.dropout_position == "post" else 0.0
        return lora_lookup(base_out, x, a, b, self.scale, lookup_of(self), drop)

    def _add_branch_by_calls(self, base_out: Tensor, x: Tensor) -> Tensor:
        """As the mixin's, of indices."""
        lookup, rows = lookup_of(self), self.lora_a(x)
        if lookup.padding_idx is not None:
            rows = torch.where((x == lookup.padding_idx).unsqueeze(-1), rows.detach(), rows)
        factor = 1.0 if lookup.factor is None else lookup.factor
        branch = self.lora_b(rows * self.scale) * factor
        branch = self.dropout(branch) if self.dropout_position == "post" else branch
        return add_in_base_dtype(base_out, branch)


def lookup_of(module: nn.Module) -> Lookup:
    """How an embedding looks its rows up.

    Args:
        module: An `nn.Embedding`, adapted or not; transformers' scaled ones have `embed_scale`.
    """
    assert isinstance(module, nn.Embedding)
    factor = getattr(module, "embed_scale", None)
    if isinstance(factor, Tensor) and module.weight.is_floating_point():
        factor = factor.to(module.weight.dtype)  # as Gemma's forward rounds it
    return Lookup(module.padding_idx, module.scale_grad_by_freq, factor)


def _own_forward_reason(module: nn.Embedding) -> str | None:
    """Why a subclass with a forward of its own cannot carry a branch: it counts positions, say."""
    weight = module.weight
    if type(module).forward is nn.Embedding.forward:
        return None
    if not is_plain(weight) or weight.dtype not in TRAINABLE_DTYPES:
        return None
    # not in order, or positions would look like tokens; in two dimensions, as models pass them
    ids = torch.arange(min(_ROWS, len(weight)), device=weight.device).flip(0)[None]
    factor = lookup_of(module).factor
    expected = F.embedding(ids, weight.detach()) * (1.0 if factor is None else factor)
    try:
        with torch.no_grad():
            out = module.forward(ids)
    except Exception as error:
        return f"its own forward does not take the indices alone: {str(error).splitlines()[0]:.60}"
    if not isinstance(out, Tensor) or out.shape != expected.shape:
        return "its own forward does not answer with (…, embedding_dim)"
    tolerance = 100 * torch.finfo(weight.dtype).eps
    if not out.is_meta and not torch.allclose(
        out.to(weight.dtype), expected, rtol=tolerance, atol=0.0
    ):
        return "its own forward is not a lookup of its rows (it counts positions, say)"
    return None
