"""Tokenize a text so that what is learned follows the very tokens that inference gives.

Inference tokenizes a prompt alone. Where a token of the whole text would reach across its end, the
text is cut there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any, Protocol

_CUT = (
    "an answer begins or ends inside a token of the whole text: it is learned after the tokens of "
    "the prompt alone, as inference gives them"
)
_NOT_CUT = (
    "an answer begins inside a token that the tokenizer cannot cut: it is learned after other "
    "tokens than inference gives; let the blank begin the answer instead of ending the prompt"
)
# What a continuation is tokenized behind, where tokenizers treat the start of a text specially.
_ANCHORS = ("", "\n", ".")


class Tokenizer(Protocol):
    """What is asked of a transformers tokenizer, for one text at a time."""

    eos_token_id: int | None
    pad_token_id: int | None
    chat_template: Any

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Mapping[str, list[int]]:
        """Return `input_ids` of the text."""
        ...

    def decode(self, token_ids: list[int], *, clean_up_tokenization_spaces: bool) -> str:
        """Return the text of the ids, special tokens included."""
        ...

    def convert_ids_to_tokens(self, ids: int) -> str | None:
        """Return the token of an id."""
        ...


@dataclass(frozen=True, kw_only=True)
class TextTokenizer:
    """A tokenizer, the ids that open and close a text, and the tokens that stop generation."""

    tokenizer: Tokenizer
    opening: list[int]
    closing: list[int]
    stops: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer, stop_ids: Collection[int]) -> TextTokenizer:
        """Try the tokenizer; generation stops on `stop_ids` and the end-of-sequence token."""
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = tokenizer("a")["input_ids"]
        starts = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        start = next(starts, 0)
        end = tokenizer.eos_token_id
        ids = [*stop_ids] if end is None else [end, *stop_ids]
        tokens = [tokenizer.convert_ids_to_tokens(token_id) for token_id in ids]
        return cls(
            tokenizer=tokenizer,
            opening=list(whole[:start]),
            closing=list(whole[start + len(bare) :]) if end is None else [end],
            stops=tuple(token for token in tokens if token),
        )

    def ids(self, text: str) -> list[int]:
        """Tokenize the text, and nothing before or after it."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decoded(self, ids: list[int]) -> str:
        """Return the text of the ids, blank for blank."""
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def opened(self, ids: list[int]) -> tuple[list[int], tuple[str, ...]]:
        """Put before the ids what inference puts there, once, and say if it was there already."""
        if self.opening and ids[: len(self.opening)] == self.opening:
            return [], (
                f"the text begins with {self.decoded(self.opening)}, which the tokenizer "
                "adds too: it is kept once; pass add_special_tokens=False at inference",
            )
        return self.opening, ()

    def closed(self, ids: list[int]) -> list[int]:
        """End the ids as a text ends, once."""
        is_closed = not self.closing or ids[-len(self.closing) :] == self.closing
        return ids if is_closed else [*ids, *self.closing]


def cut_at(
    whole: str, places: Sequence[int], text: TextTokenizer
) -> tuple[list[int], list[int], tuple[str, ...]]:
    """Tokenize so that a token begins at every place.

    Args:
        whole: the text.
        places: indices into it, in ascending order.
        text: the tokenizer.

    Returns:
        The ids; for each place how many ids stand before it; and what had to be done for it.
    """
    ids = text.ids(whole)
    bounds = [0, *places, len(whole)]
    apart = [text.ids(whole[start:end]) for start, end in pairwise(bounds)]
    if list(chain(*apart)) == ids:  # no token of the whole reaches across a place
        return ids, list(accumulate(map(len, apart[:-1]))), ()
    heads = [text.ids(whole[:place]) for place in places]
    if all(ids[: len(head)] == head for head in heads):
        return ids, [len(head) for head in heads], ()
    pieces: list[int] = []
    counts: list[int] = []
    done = 0
    for place in (*places, len(whole)):
        piece = _continuation(whole[:done], pieces, whole[done:place], text)
        if piece is None:
            return ids, [_shared(ids, head) for head in heads], (_NOT_CUT,)
        pieces += piece
        counts.append(len(pieces))
        done = place
    return pieces, counts[:-1], (_CUT,)


def _continuation(before: str, ids: list[int], piece: str, text: TextTokenizer) -> list[int] | None:
    """Tokenize a piece that follows `ids`, the ids of `before`; None if that cannot be done."""
    natural = text.ids(before + piece)
    if natural[: len(ids)] == ids:
        return natural[len(ids) :]
    wanted = text.decoded(natural)
    for anchor in _ANCHORS:
        start, whole = text.ids(anchor), text.ids(anchor + piece)
        tail = whole[len(start) :]
        if whole[: len(start)] == start and text.decoded([*ids, *tail]) == wanted:
            return tail
    return None


def _shared(ids: list[int], others: list[int]) -> int:
    """Count the ids that both begin with."""
    pairs = zip(ids, others, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(others)))
