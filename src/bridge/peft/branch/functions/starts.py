"""Starts of A and B out of the base's weight, beside which the weight itself stays untouched.

    y = W x + s (B A - B0 A0) x          A and B start as A0 and B0

PiSSA and OLoRA start from the large directions of W, and their authors take them out of W: the base
becomes W - s B0 A0. Here it stays W, and a frozen copy of the start is subtracted beside it, the
same function with the same gradients; so switching the adapter off, unmerging, quantised bases and
checkpoints are what they are for every adapter. What is saved is `[B, -B0] [A; A0]`, a plain LoRA
of twice the rank over the untouched base, the form in which PEFT saves these starts for that use.

PiSSA: Meng et al., 2024 (arXiv:2404.02948). OLoRA: Buyukakyuz, 2024 (arXiv:2406.01775).
Orthogonal: datta0.github.io/posts/rethink-lora-init; B A is zero, and nothing is subtracted.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from bridge.peft.errors import AdapterError

#: The starts that take both A and B, by name; `pissa_niter_N` is the fast approximation.
START_METHODS = ("orthogonal", "olora", "pissa", "pissa_niter_4", "pissa_niter_16")
#: Directions that the fast approximation looks for beyond the rank (Halko et al., 2011).
_OVERSAMPLED = 8
_FAST_PISSA = re.compile(r"pissa_niter_(\d{1,3})")


def is_start(method: str) -> bool:
    """Whether an initialisation is one of A and B together.

    Args:
        method: A `lora_A_init_method`.
    """
    return method in START_METHODS or _FAST_PISSA.fullmatch(method) is not None


def is_subtracted(method: str) -> bool:
    """Whether a start is no zero update, so that a frozen copy of it is subtracted.

    Args:
        method: A `lora_A_init_method`.
    """
    return is_start(method) and method != "orthogonal"


@torch.no_grad()
def start_of(
    method: str, weight: Tensor, dim: int, scale: float, seed: int | None
) -> tuple[Tensor, Tensor]:
    """A, (dim, in_features), and B, (out_features, dim), that a branch starts from.

    Args:
        method: One of `START_METHODS`.
        weight: W, (out_features, in_features), floating; it is not changed.
        dim: Rank.
        scale: Factor of the branch.
        seed: Seed of what is drawn; None uses torch's default CPU generator.

    Returns:
        In float32, or float64 of such a weight. Signs are fixed, so that they do not depend on the
        library that decomposes.

    Raises:
        AdapterError: The rank is more than the weight has, or odd (orthogonal), or the scale is
            not above 0.
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if is_subtracted(method) and dim > min(weight.shape):
        raise AdapterError(
            f"{method} takes {dim} directions out of a weight of {weight.shape[0]}×"
            f"{weight.shape[1]} (out×in), which has {min(weight.shape)}; lower the rank of this "
            "module (rank_pattern)"
        )
    if method == "orthogonal":
        return _orthogonal(weight, dim, seed)
    if method == "olora":
        q, r = torch.linalg.qr(weight)
        sign = torch.where(r.diagonal()[:dim] < 0, -1.0, 1.0).to(r)
        return sign[:, None] * r[:dim], q[:, :dim] * sign
    if scale <= 0:
        raise AdapterError(f"{method} needs a scale above 0, got {scale:g}; pass an alpha above 0")
    u, singular, vt = _directions(method, weight, dim, seed)
    largest = vt.gather(1, vt.abs().argmax(1, keepdim=True))
    root = (singular / scale).sqrt() * torch.where(largest.squeeze(1) < 0, -1.0, 1.0).to(vt)
    return root[:, None] * vt, u * root


def _directions(
    method: str, weight: Tensor, dim: int, seed: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values of a weight and their vectors: (out, dim), (dim,), (dim, in)."""
    fast = _FAST_PISSA.fullmatch(method)
    if fast is None:
        u, singular, vt = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :dim], singular[:dim], vt[:dim]
    if seed is None:
        seed = int(torch.randint(2**62, (), device="cpu"))
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        torch.manual_seed(seed)
        more = min(dim + _OVERSAMPLED, *weight.shape)
        u, singular, v = torch.svd_lowrank(weight, q=more, niter=int(fast[1]))
    return u[:, :dim], singular[:dim], v.mT[:dim]


def _orthogonal(weight: Tensor, dim: int, seed: int | None) -> tuple[Tensor, Tensor]:
    """A and B whose rows and columns lie in orthogonal halves of the rank, so that B A is zero."""
    if dim % 2:
        raise AdapterError(f"the orthogonal start needs an even rank, got {dim}")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    draw: Callable[..., Tensor] = lambda *shape: torch.randn(  # noqa: E731
        *shape, generator=generator, dtype=torch.float64, device="cpu"
    )
    halves = torch.linalg.qr(draw(dim, dim)).Q
    a = halves[0::2].T @ draw(dim // 2, weight.shape[1]) / 10
    b = draw(weight.shape[0], dim // 2) @ halves[1::2] / 10
    return a.to(weight), b.to(weight)


class LoRAStart(nn.Module):
    """The frozen A0 and B0 that are subtracted from a branch.

    Attributes:
        a: A0, (dim, in_features).
        b: B0, (out_features, dim).
    """

    a: nn.Parameter
    b: nn.Parameter

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(a.detach().clone(), requires_grad=False)
        self.b = nn.Parameter(b.detach().clone(), requires_grad=False)

    def forward(self) -> tuple[Tensor, Tensor]:
        """A0 and B0, by a call, for hooks that bring their values."""
        return self.a.view_as(self.a), self.b.view_as(self.b)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `to_empty` after `meta` would leave whatever the memory held before.
        was_meta = self.a.is_meta
        super()._apply(fn, recurse)
        if was_meta:
            with torch.no_grad():
                self.a.fill_(torch.nan)
                self.b.fill_(torch.nan)
        return self

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"{self.a.shape[1]}, {self.b.shape[0]}, dim={self.a.shape[0]}"


def joined(a: Tensor, b: Tensor, start: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """`[A; A0]` and `[B, -B0]`, whose product is `B A - B0 A0`; A and B without a start."""
    if start is None:
        return a, b
    return torch.cat([a, start[0]]), torch.cat([b, -start[1]], dim=1)


def split(a: Tensor, b: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A and B, and A0 and B0, out of what `joined` gave."""
    dim = a.shape[0] // 2
    return (a[:dim], b[:, :dim]), (a[dim:], -b[:, dim:])


def check_has_values(weight: Tensor, method: str) -> None:
    """Raise `AdapterError` unless a start can be taken out of a weight: it is here, and whole."""
    if weight.is_meta or hasattr(weight, "device_mesh"):
        where = "on the meta device" if weight.is_meta else "sharded (DTensor)"
        raise AdapterError(
            f"lora_A_init_method={method!r} is taken out of the base's weight, which is {where}; "
            "load the base, adapt it, then shard it"
        )
