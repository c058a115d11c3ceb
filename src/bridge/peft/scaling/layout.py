"""How the ranks of a run are divided, and what one of them works on in a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bridge.peft.errors import AdapterError

#: Tensors of an optimizer's state for each trained one, in its dtype; step counters not counted.
OPTIMIZERS = {"adamw": 2, "sgd": 0}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """`world = dp × fsdp × tp` ranks, tensor parallel ones next to each other.

    Attributes:
        world: All ranks of the run, one GPU each.
        tp: Ranks that share each linear's weight (tensor parallel).
        fsdp: Ranks over which parameters are sharded (FSDP2); None takes `world / tp`. What is
            left, `dp = world / (tp · fsdp)`, are replicas: DDP, or HSDP where `fsdp > 1`.
        tokens: Tokens of one forward and backward on one rank, padding included; the ranks of a
            tensor parallel group work on the same ones, so a step sees `tokens · dp · fsdp`.
        sequence_parallel: Between its linears a tensor parallel group also shards the tokens.
        checkpointing: Blocks keep their input and are computed again in backward.
        optimizer: `"adamw"` (two moments) or `"sgd"` (no state).

    Raises:
        AdapterError: The sizes do not fit each other.
    """

    world: int
    tokens: int
    tp: int = 1
    fsdp: int | None = None
    sequence_parallel: bool = False
    checkpointing: bool = False
    optimizer: Literal["adamw", "sgd"] = "adamw"

    def __post_init__(self) -> None:
        for name in ("world", "tokens", "tp", "fsdp"):
            value = getattr(self, name)
            if name == "fsdp" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise AdapterError(f"{name} must be an integer >= 1, got {value!r}")
        if self.world % self.tp:
            raise AdapterError(
                f"world {self.world} is not a multiple of tp {self.tp}; pass a world of "
                f"{self.tp * -(-self.world // self.tp)}, or a tp that divides {self.world}"
            )
        if self.fsdp is None:
            object.__setattr__(self, "fsdp", self.world // self.tp)
        if self.world % (self.tp * self.shards):
            raise AdapterError(
                f"world {self.world} is not a multiple of tp {self.tp} × fsdp {self.fsdp} = "
                f"{self.tp * self.shards}; pass an fsdp that divides {self.world // self.tp}"
            )
        if self.sequence_parallel and self.tp == 1:
            raise AdapterError("sequence_parallel needs tensor parallel ranks; pass tp >= 2")
        if self.optimizer not in OPTIMIZERS:
            raise AdapterError(
                f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}"
            )

    @property
    def shards(self) -> int:
        """Ranks over which parameters are sharded: `fsdp`, resolved."""
        assert self.fsdp is not None
        return self.fsdp

    @property
    def dp(self) -> int:
        """Replicas of the sharded, tensor parallel model."""
        return self.world // (self.tp * self.shards)

    @property
    def global_tokens(self) -> int:
        """Tokens of one step over all ranks."""
        return self.tokens * self.dp * self.shards

    def __str__(self) -> str:
        return (
            f"{self.world} ranks = dp {self.dp} × fsdp {self.fsdp} × tp {self.tp}; "
            f"{self.tokens:,} tokens a rank, {self.global_tokens:,} in all"
        )
