"""A and B of convolutions: PEFT's files hold kernels, and everything here computes with matrices.

A   (rank, in_channels, …kernel)              <->  (rank, in_channels · kernel)
B   (out_channels, rank / groups, 1, …)       <->  (out_channels, rank), block-diagonal
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bridge.peft.errors import AdapterFileError


class Kernel(NamedTuple):
    """How the A and B of a convolution are shaped in a file.

    Attributes:
        size: (in_channels, …kernel).
        groups: Of the base; B has as many blocks on its diagonal.
    """

    size: tuple[int, ...]
    groups: int


def kernel_of(module: nn.Module) -> Kernel | None:
    """The kernel of a convolution; None for any other module.

    Args:
        module: Adapted or not.
    """
    if not isinstance(module, _ConvNd):
        return None
    return Kernel((module.in_channels, *module.kernel_size), module.groups)


def flattened(name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Kernel]:
    """A and B out of a file as matrices.

    Args:
        name: The module, for messages.
        a: (rank, in_channels, …kernel).
        b: (out_channels, rank / groups, 1, …).

    Raises:
        AdapterFileError: They do not belong together.
    """
    rank, width = a.shape[0], b.shape[1] if b.dim() > 1 else 0
    groups = rank // width if width else 0
    is_point = b.dim() == a.dim() and b.dim() in (3, 4, 5) and set(b.shape[2:]) == {1}
    if not is_point or not a.numel() or groups * width != rank or b.shape[0] % groups:
        raise AdapterFileError(
            f"{name}: A {tuple(a.shape)} and B {tuple(b.shape)} are not those of a convolution; "
            "save the adapter again"
        )
    columns = b.flatten(1)
    if groups > 1:
        columns = torch.block_diag(*columns.chunk(groups))
    return a.flatten(1), columns, Kernel(tuple(a.shape[1:]), groups)


def unflattened(a: Tensor, b: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Matrices A and B as a file holds them.

    Args:
        a: (rank, in_channels · kernel).
        b: (out_channels, rank), zero outside the blocks.
        kernel: The convolution's.
    """
    width, rows = b.shape[1] // kernel.groups, b.shape[0] // kernel.groups
    blocks = [
        b[g * rows : (g + 1) * rows, g * width : (g + 1) * width] for g in range(kernel.groups)
    ]
    points = (1,) * (len(kernel.size) - 1)
    return a.view(-1, *kernel.size), torch.cat(blocks).reshape(b.shape[0], width, *points)
