"""How A and B start: by name, and reproducibly from (seed, FQN).

A follows Glorot & Bengio (2010, `"xavier"`) or He et al. (2015, `"uniform"`, the default of
`torch.nn.Linear`); B is zero (Hu et al., 2021), so a fresh adapter changes nothing. On an
embedding it is A that is zero and B that is drawn: a token's column of A then stays zero until the
token is trained on, and what training never sees keeps the base's embedding.

The full matrix is always drawn on the CPU in float32 and then cast, moved and, for a DTensor,
cut. So the numbers do not depend on the device, the dtype or how the parameter is sharded.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bridge.peft.tensors import sharded_like

A_INITIALIZERS: dict[str, Callable[..., Tensor]] = {
    "xavier": nn.init.xavier_uniform_,
    "uniform": functools.partial(nn.init.kaiming_uniform_, a=math.sqrt(5)),
}
#: All ways to fill a matrix but with zeros; an embedding's B is drawn `"normal"`.
_INITIALIZERS = {**A_INITIALIZERS, "normal": nn.init.normal_}


def derive_seed(seed: int, fqn: str) -> int:
    """Mix a run's seed with a module's name into a 63-bit seed of that module's own."""
    digest = hashlib.sha256(f"{seed}:{fqn}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@torch.no_grad()
def initialize(weight: Tensor, method: str, seed: int | None = None) -> None:
    """Fill `weight` in place.

    Args:
        weight: Any floating matrix, or a stack of them, which are drawn one after the other; a
            DTensor gets its shard of the full draw. A `meta` tensor is left alone.
        method: `"xavier"`, `"uniform"`, `"normal"` (of standard deviation 1) or `"zeros"`.
        seed: Seed of the draw, or None for torch's default CPU generator. A DTensor without a seed
            relies on every rank drawing the same numbers, so seed the ranks alike.
    """
    if weight.device.type == "meta":
        return
    if method == "zeros":
        weight.zero_()
        return
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    # Asked for by device: a `with torch.device("meta")` of the caller must not catch the draw.
    full = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
    for matrix in full.view(-1, *full.shape[-2:]):
        _INITIALIZERS[method](matrix, generator=generator)
    weight.copy_(sharded_like(full.to(weight.device, weight.dtype), weight))
