"""The kinds of base that a branch can stand on: one file each, listed here and nowhere else."""

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from bridge.peft.branch.kinds.attention import AttentionOutputAdapter
from bridge.peft.branch.kinds.conv import ConvAdapter
from bridge.peft.branch.kinds.conv1d import Conv1DAdapter
from bridge.peft.branch.kinds.embedding import EmbeddingAdapter
from bridge.peft.branch.kinds.linear import LinearAdapter
from bridge.peft.branch.kinds.megatron import MegatronLinearAdapter
from bridge.peft.branch.kinds.packed import PackedLinearAdapter
from bridge.peft.branch.kinds.read_linear import ReadLinearAdapter
from bridge.peft.branch.kinds.transformer_engine import TELinearAdapter
from bridge.peft.branch.mixin import LoRAMixin

#: Most specific first: the first that takes a class is its kind.
KINDS: tuple[type[LoRAMixin], ...] = (
    MegatronLinearAdapter,
    TELinearAdapter,
    Conv1DAdapter,
    LinearAdapter,
    PackedLinearAdapter,
    EmbeddingAdapter,
    ConvAdapter,
)
#: The kinds of linears whose weight other code of their model reads, by class.
READ_KINDS: dict[type[nn.Module], type[LoRAMixin]] = {
    nn.Linear: ReadLinearAdapter,
    NonDynamicallyQuantizableLinear: AttentionOutputAdapter,
}
