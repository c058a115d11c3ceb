"""The LoRA recipe: match, plan, patch in place."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from bridge.peft.branch.functions.starts import is_start
from bridge.peft.branch.initializers import derive_seed
from bridge.peft.branch.options import (
    BranchOptions,
    DropoutPosition,
    InitMethod,
    are_ranges,
    check_alpha,
    check_dim,
)
from bridge.peft.branch.patch import adapted_class
from bridge.peft.dtypes import sound_dtype
from bridge.peft.errors import AdapterError, TargetError
from bridge.peft.model.adapt import Planned, PlannedTokens, adapt_in_place, check_can_be_adapted
from bridge.peft.model.fused_parts import rows_of_parts
from bridge.peft.model.pretrained import random_modules
from bridge.peft.model.size import model_size
from bridge.peft.model.trained_parameters import check_can_be_trained
from bridge.peft.model.walk import (
    unwrap,
)
from bridge.peft.model.weight_reads import read_weights
from bridge.peft.parallel.fsdp import reshard
from bridge.peft.parallel.layout import agreed_seed
from bridge.peft.parameter_targets import match_parameters
from bridge.peft.plan import Plan
from bridge.peft.plan_rows import plan_row, tokens_row, trained_row
from bridge.peft.recipe_notes import notes
from bridge.peft.targets import (
    ALL_LINEAR,
    Candidate,
    Skipped,
    did_you_mean,
    match_modules,
    match_targets,
    tied_linears,
)
from bridge.peft.token_targets import checked_tokens, match_tokens

Model = TypeVar("Model", bound=nn.Module)
#: The fields that hold entries.
_ENTRIES = ("target_modules", "target_parameters", "exclude_modules", "modules_to_train")


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """A LoRA recipe (Hu et al., 2021, arXiv:2106.09685): `model = LoRA(dim=16)(model)`.

    Attributes:
        target_modules: Names (`"q_proj"`), wildcards (`"*.layers.0.*.q_proj"`), regexes
            (`"re:.*_proj"`), or `"all-linear"`: every linear but the output head. Embeddings and
            the output head are adapted where they are named.
        target_parameters: Entries of the same kinds for parameters that modules multiply with
            themselves: experts in one stack (`"experts.gate_up_proj"`), a router's weight.
        exclude_modules: Entries of the same kinds, to leave alone.
        dim: Rank of the update.
        alpha: Scaling numerator; `scale = alpha / dim`.
        dropout: Probability in [0, 1) that an element of the branch is dropped in training.
        dropout_position: `"pre"` (on the branch's input) or `"post"` (on its output).
        lora_A_init_method: `"xavier"` or `"uniform"`, with B = 0; or a start of A and B together:
            `"orthogonal"`, or out of the base's weight `"olora"`, `"pissa"`, `"pissa_niter_4"`.
        lora_dtype: Dtype of A and B; None takes float32 over half-precision and quantised bases,
            else the base weight's.
        rank_pattern: Ranks for some modules, by entry; the first that matches counts.
        alpha_pattern: Alphas for some modules, likewise.
        use_rslora: `scale = alpha / sqrt(dim)`.
        use_dora: Train the magnitudes of the weight's rows too, and their direction by A and B
            (Liu et al., 2024, arXiv:2402.09353).
        freeze_a: Train B alone and leave A as it was drawn (LoRA-FA, Zhang et al., 2023,
            arXiv:2308.03303); backward then needs no input of the adapted layers.
        modules_to_train: Entries of modules to train in full beside the branches, and to save
            with them: a new head, resized embeddings (PEFT's `modules_to_save`).
        trainable_tokens: Tokens whose rows in the embedding are trained, beside the branches: the
            indices for the input embedding, or `{"embed_tokens": indices}` (PEFT's
            `trainable_token_indices`). What is tied to the embedding follows.
        parts: Parts of fused projections to adapt, by entry: `{"c_attn": ["q", "v"]}`, or ranges
            of rows, `{"my_qkv": [(0, 64), (128, 192)]}`; the other rows of B stay zero.
        seed: A depends on (seed, FQN) alone; None draws the seed from torch's default generator.

    Raises:
        ValueError: A value is out of its range; raised once, at construction.
    """

    target_modules: str | Sequence[str] = ALL_LINEAR
    target_parameters: Sequence[str] = ()
    exclude_modules: Sequence[str] = ()
    dim: int = 32
    alpha: float = 32
    dropout: float = 0.0
    dropout_position: DropoutPosition = "pre"
    lora_A_init_method: InitMethod = "xavier"
    lora_dtype: torch.dtype | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    freeze_a: bool = False
    modules_to_train: Sequence[str] = ()
    trainable_tokens: Mapping[str, Sequence[int]] | Sequence[int] = ()
    parts: Mapping[str, Sequence[str | Sequence[int]]] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in _ENTRIES:
            object.__setattr__(self, name, _entries(self, name))
        if not self.target_modules and not self.target_parameters:
            raise AdapterError(f"target_modules is empty; pass names or {ALL_LINEAR!r}")
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(pattern := getattr(self, name), Mapping):
                raise AdapterError(f"{name} must map entries to numbers, got {pattern!r}")
            # A copy: what the caller does with theirs later is not checked.
            object.__setattr__(self, name, dict(pattern))
        object.__setattr__(self, "trainable_tokens", checked_tokens(self.trainable_tokens))
        object.__setattr__(self, "parts", _checked_parts(self.parts))
        for key, dim in self.rank_pattern.items():
            check_dim(dim, f"rank_pattern[{key!r}]")
        for key, alpha in self.alpha_pattern.items():
            check_alpha(alpha, f"alpha_pattern[{key!r}]")
        for key in (*self.rank_pattern, *self.alpha_pattern, *self.parts):
            _check_entry("a pattern", key)
        if self.seed is not None and (not isinstance(self.seed, int) or self.seed < 0):
            raise AdapterError(f"seed must be an integer >= 0 or None, got {self.seed!r}")
        for name in ("use_rslora", "use_dora", "freeze_a"):
            if not isinstance(flag := getattr(self, name), bool):
                raise AdapterError(f"{name} must be True or False, got {flag!r}")
        if self.target_parameters and (self.use_dora or is_start(self.lora_A_init_method)):
            asked = "use_dora" if self.use_dora else f"{self.lora_A_init_method!r}"
            raise AdapterError(
                f"{asked} is for linears, and target_parameters names other parameters; leave one "
                "of the two out"
            )
        self._common_options()

    def options_for(self, candidate: Candidate) -> BranchOptions:
        """The branch options of one module, its rank and alpha patterns applied.

        Args:
            candidate: The module under all its names.
        """
        dim = _first_match(self.rank_pattern, candidate, self.dim)
        alpha = _first_match(self.alpha_pattern, candidate, self.alpha)
        return self._options(dim, alpha, self.lora_dtype or sound_dtype(candidate.weight.dtype))

    def _planned_options(self, model: nn.Module, candidate: Candidate) -> BranchOptions:
        """`options_for`, and the rows of B that the chosen parts of the module are."""
        options, parts = self.options_for(candidate), _first_match(self.parts, candidate, ())
        if not parts:
            return options
        kind = None if candidate.parameter else adapted_class(type(candidate.module))
        if kind is None or kind.wraps or not kind.in_all_linear:
            raise TargetError(
                f"parts: {candidate.fqn} is a {type(candidate.module).__name__}, of which parts "
                "cannot be adapted alone"
            )
        if is_start(self.lora_A_init_method):
            raise TargetError(
                f"parts: with lora_A_init_method={self.lora_A_init_method!r} B starts out of the "
                'whole weight; use "xavier" or "uniform"'
            )
        rows = rows_of_parts(model, candidate.fqn, kind.features(candidate.module)[1], parts)
        return dataclasses.replace(options, rows=rows)

    def _common_options(self) -> BranchOptions:
        return self._options(self.dim, self.alpha, self.lora_dtype)

    def _options(self, dim: int, alpha: float, lora_dtype: torch.dtype | None) -> BranchOptions:
        return BranchOptions(
            dim=dim,
            alpha=alpha,
            dropout=self.dropout,
            dropout_position=self.dropout_position,
            lora_A_init_method=self.lora_A_init_method,
            lora_dtype=lora_dtype,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            freeze_a=self.freeze_a,
        )

    def plan(self, model: nn.Module) -> Plan:
        """Say what would be adapted and what it costs; touches nothing, works on `meta`.

        Args:
            model: The base model.

        Raises:
            TargetError: A target, exclusion or pattern matches nothing that can be adapted.
            AlreadyAdaptedError: The model carries adapters already.
        """
        check_can_be_adapted(model)
        root = unwrap(model)
        chosen, skipped, trained = self._match(root)
        tokens = self._match_tokens(root, chosen, trained)
        read = read_weights(root)
        size = model_size(root)
        return Plan(
            rows=tuple(
                plan_row(candidate, options, read)
                for candidate, options in zip(chosen, self._all_options(root, chosen), strict=True)
            ),
            trained_in_full=tuple(trained_row(candidate) for candidate in trained),
            token_rows=tuple(map(tokens_row, tokens)),
            not_adapted=tuple(skipped),
            base_parameters=size.parameters,
            base_bytes=size.bytes,
            quantised=size.quantised,
            notes=tuple(notes(root, chosen, trained, tokens, self._common_options())),
        )

    def __call__(self, model: Model) -> Model:
        """Freeze the model and adapt its targets, in place; every check comes before.

        Args:
            model: The base model, on any device, `meta` included.

        Returns:
            The same model.

        Raises:
            TargetError: A target, exclusion or pattern matches nothing that can be adapted.
            AlreadyAdaptedError: The model carries adapters already.
        """
        check_can_be_adapted(model)
        root = unwrap(model)
        reshard(root)
        chosen, _, trained = self._match(root)
        tokens = self._match_tokens(root, chosen, trained)
        all_options = self._all_options(root, chosen)
        for note in notes(root, chosen, trained, tokens, self._common_options()):
            warnings.warn(note, stacklevel=2)
        seed = self.seed
        if seed is None:
            seed = agreed_seed(root, int(torch.randint(2**62, (), device="cpu")))
        adapt_in_place(
            root,
            [
                Planned(c.fqn, c.module, options, derive_seed(seed, c.fqn), c.parameter)
                for c, options in zip(chosen, all_options, strict=True)
            ],
            [candidate.module for candidate in trained],
            tokens,
        )
        return model

    def _match(self, model: nn.Module) -> tuple[list[Candidate], list[Skipped], list[Candidate]]:
        """What to adapt, what is left alone and why, and what to train in full."""
        trained = match_modules(model, self.modules_to_train, "modules_to_train")
        for candidate in trained:
            check_can_be_trained(candidate.fqn, candidate.module)
        alone: dict[nn.Module, str] = {}
        if self.target_modules == ALL_LINEAR:
            alone |= dict.fromkeys(tied_linears(model), "shares its weight with another linear")
            for module in random_modules(model).values():
                alone |= dict.fromkeys(module.modules(), "its weight is from no checkpoint")
        for candidate in trained:
            alone |= dict.fromkeys(candidate.module.modules(), "trained in full")
        stacks, frozen, exclude = match_parameters(
            model, self.target_parameters, self.exclude_modules, alone
        )
        chosen, skipped = [], []
        if self.target_modules:
            chosen, skipped = match_targets(model, self.target_modules, exclude, alone)
        chosen, skipped = chosen + stacks, skipped + frozen
        in_full = {id(p): c.fqn for c in trained for p in c.module.parameters()}
        for candidate in chosen:
            if owner := in_full.get(id(candidate.weight)):
                raise TargetError(
                    f"modules_to_train trains the weight of {candidate.fqn} in full (by {owner}), "
                    "which target_modules adapts; leave it out of one"
                )
        patterns = {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        for name, pattern in (patterns | {"parts": self.parts}).items():
            for entry in pattern:
                if not any(candidate.matches(entry) for candidate in chosen):
                    what = "targets" if stacks else "linears"
                    raise TargetError(
                        f"{name} entry {entry!r} matches none of the {len(chosen)} {what} "
                        f"to adapt{did_you_mean(entry, chosen)}"
                    )
        return chosen, skipped, trained

    def _all_options(self, model: nn.Module, chosen: Sequence[Candidate]) -> list[BranchOptions]:
        return [self._planned_options(model, candidate) for candidate in chosen]

    def _match_tokens(
        self, model: nn.Module, chosen: Sequence[Candidate], trained: Sequence[Candidate]
    ) -> list[PlannedTokens]:
        """The embeddings of which some rows are trained, and nothing else."""
        assert isinstance(self.trainable_tokens, Mapping)
        planned = match_tokens(model, self.trainable_tokens)
        whole = {m for candidate in trained for m in candidate.module.modules()}
        branches = {candidate.module for candidate in chosen}
        for fqn, *modules in ((p.fqn, p.module, *p.followers) for p in planned):
            for others, what in ((branches, "target_modules"), (whole, "modules_to_train")):
                if not others.isdisjoint(modules):
                    raise TargetError(
                        f"{fqn}, or what is tied to it, is named in trainable_tokens and in "
                        f"{what}; leave it out of one"
                    )
        dtype = self.lora_dtype
        return [plan._replace(dtype=dtype) for plan in planned] if dtype else planned


def _entries(recipe: LoRA, name: str) -> str | tuple[str, ...]:
    value: Any = getattr(recipe, name)
    if value == ALL_LINEAR and name == "target_modules":
        return value
    if not isinstance(value, Iterable):
        raise AdapterError(f"{name} takes names, wildcards or re:regexes, got {value!r}")
    entries = (value,) if isinstance(value, str) else tuple(value)
    for entry in entries:
        _check_entry(name, entry)
    return entries


def _check_entry(where: str, entry: Any) -> None:
    if not isinstance(entry, str) or not entry:
        raise AdapterError(f"{where} takes names, wildcards or re:regexes, got {entry!r}")
    if entry.startswith("re:"):
        try:
            re.compile(entry[3:])
        except re.error as error:
            raise AdapterError(f"{where} entry {entry!r} is not a valid regex: {error}") from error


def _checked_parts(parts: Any) -> dict[str, tuple[str | Sequence[int], ...]]:
    if not isinstance(parts, Mapping):
        raise AdapterError(f"parts must map entries to parts, got {parts!r:.80}")
    for value in parts.values():
        is_list = isinstance(value, Sequence) and not isinstance(value, str) and value
        if not is_list or not all(isinstance(p, str) or are_ranges([p]) for p in value):
            raise AdapterError(
                "parts takes names and (first, end) of rows, like {'c_attn': ['q', 'v']}, got "
                f"{parts!r:.80}"
            )
    return {entry: tuple(value) for entry, value in parts.items()}


def _first_match(pattern: Mapping[str, Any], candidate: Candidate, default: Any) -> Any:
    return next((value for key, value in pattern.items() if candidate.matches(key)), default)
