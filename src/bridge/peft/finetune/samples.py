"""Turn rows of text into token ids and labels of bounded length.

Labels are the token ids with -100 where no loss is taken: on prompts, and on what the assistant did
not say. What is learned follows the very tokens that inference gives the model: a text is cut where
an answer begins, should a token of the whole text reach across that place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from bridge.peft.errors import AdapterError
from bridge.peft.finetune.chat import render
from bridge.peft.finetune.data import Row
from bridge.peft.finetune.options import OnLong
from bridge.peft.finetune.shapes import Shape

IGNORED = -100

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

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of the ids, special tokens included."""
        ...

    def convert_ids_to_tokens(self, ids: int) -> str | None:
        """Return the token of an id."""
        ...


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row in tokens; `labels` has -100 where no loss is taken. Both have the same length.

    `remarks` says what was decided for the row; `remarks_of` counts them.
    """

    input_ids: list[int]
    labels: list[int]
    where: str
    remarks: tuple[str, ...] = ()


def tokenize(
    rows: Sequence[Row],
    shape: Shape,
    tokenizer: Tokenizer,
    chat_template: str | None = None,
    stop_ids: Collection[int] = (),
) -> list[Sample]:
    """Turn rows into samples, each closed with a token on which generation stops.

    Args:
        rows: rows of one shape, as `recognise` returns them.
        shape: as `recognise` tells it.
        tokenizer: the model's tokenizer.
        chat_template: for `messages`, in place of the tokenizer's own.
        stop_ids: on which generation stops, beside the tokenizer's end-of-sequence token.

    Raises:
        AdapterError: a row that cannot be rendered or has no token to learn, with the line.
    """
    text = _Text.of(tokenizer, stop_ids)
    encode: dict[Shape, Callable[[Row], Sample]] = {
        "text": lambda row: _text(row, text),
        "prompt/completion": lambda row: _completion(row, text),
        "messages": lambda row: _messages(row, text, chat_template),
    }
    samples = [encode[shape](row) for row in rows]
    for sample in samples:
        if not has_target(sample):
            raise AdapterError(f"{sample.where} has no token to learn; remove the line")
    return samples


def remarks_of(samples: Sequence[Sample], name: str) -> list[str]:
    """Say once what was decided for rows, and for how many.

    Args:
        samples: as tokenized.
        name: what the data is called.
    """
    counts = Counter(remark for sample in samples for remark in sample.remarks)
    return [
        f"{name}: in {count:,} of {len(samples):,} rows {remark}"
        for remark, count in counts.items()
    ]


def has_target(sample: Sample) -> bool:
    """Say whether any token is predicted: the first one never is."""
    return any(label != IGNORED for label in sample.labels[1:])


def fit_length(
    samples: list[Sample],
    max_length: int,
    on_long: OnLong,
    *,
    limit: int | None = None,
    name: str = "data",
) -> tuple[list[Sample], str | None]:
    """Bring every sample to at most `max_length` tokens, never silently.

    Args:
        samples: as tokenized.
        max_length: most tokens in a sample.
        on_long: what to do with longer ones.
        limit: most tokens that the model can take, where known; only for the message.
        name: what the data is called; only for the message.

    Returns:
        The samples that remain, and a line that says what was done (None if nothing was).

    Raises:
        AdapterError: there are longer samples and `on_long` is "error", or none would be left.
    """
    too_long = [sample for sample in samples if len(sample.input_ids) > max_length]
    if not too_long:
        return samples, None
    longest = max(too_long, key=lambda sample: len(sample.input_ids))
    size = len(longest.input_ids)
    count = f"{name}: {len(too_long)} of {len(samples)} samples are longer than {max_length} tokens"
    longer = f"--max-length {size}" if limit is None or size <= limit else "shorter samples"
    if on_long == "error":
        raise AdapterError(
            f"{count}, the longest has {size} ({longest.where}); pass {longer}, --on-long truncate "
            "or --on-long drop"
        )
    if on_long == "truncate":
        samples = [_shortened(sample, max_length) for sample in samples]
    else:
        samples = [sample for sample in samples if len(sample.input_ids) <= max_length]
    kept = [sample for sample in samples if has_target(sample)]
    if not kept:
        raise AdapterError(f"{count} and none would be left; pass {longer}")
    done = "cut" if on_long == "truncate" else "dropped"
    lost = len(samples) - len(kept)
    note = f"; {lost} of them lost every token to learn and were dropped" if lost else ""
    return kept, f"{count}, the longest has {size}: {done}{note}"


@dataclass(frozen=True, kw_only=True)
class _Text:
    """A tokenizer, and the ids with which it opens and we close a text."""

    tokenizer: Tokenizer
    opening: list[int]
    closing: list[int]
    stops: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer, stop_ids: Collection[int]) -> _Text:
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

    def opened(self, ids: list[int]) -> tuple[list[int], tuple[str, ...]]:
        """Put before the ids what inference puts there, once, and say if it was there already."""
        if self.opening and ids[: len(self.opening)] == self.opening:
            return [], (
                f"the text begins with {self.tokenizer.decode(self.opening)}, which the tokenizer "
                "adds too: it is kept once; pass add_special_tokens=False at inference",
            )
        return self.opening, ()

    def closed(self, ids: list[int]) -> list[int]:
        """End the ids as a text ends, once."""
        return (
            ids
            if not self.closing or ids[-len(self.closing) :] == self.closing
            else [
                *ids,
                *self.closing,
            ]
        )


def _text(row: Row, text: _Text) -> Sample:
    ids = text.ids(row.columns["text"])
    opening, remarks = text.opened(ids)
    ids = text.closed([*opening, *ids])
    return Sample(input_ids=ids, labels=list(ids), where=row.where, remarks=remarks)


def _completion(row: Row, text: _Text) -> Sample:
    prompt, completion = row.columns["prompt"], row.columns["completion"]
    ids, (start,), cut = _cut(prompt + completion, [len(prompt)], text)
    opening, twice = text.opened(ids)
    ids = text.closed([*opening, *ids])
    start += len(opening)
    labels = [IGNORED] * start + ids[start:]
    return Sample(input_ids=ids, labels=labels, where=row.where, remarks=(*twice, *cut))


def _messages(row: Row, text: _Text, chat_template: str | None) -> Sample:
    # the template writes the opening itself: nothing is added to what it renders
    rendered = render(row, text.tokenizer, text.stops, chat_template)
    places = [place for answer in rendered.answers for place in (answer.start, answer.end)]
    ids, at, remarks = _cut(rendered.text, places, text)
    labels = [IGNORED] * len(ids)
    for start, end in zip(at[::2], at[1::2], strict=True):
        labels[start:end] = ids[start:end]
    remarks = (*rendered.remarks, *remarks)
    end = text.tokenizer.eos_token_id
    if rendered.is_open and end is not None:
        ids, labels = [*ids, end], [*labels, end]
        remarks += (
            "the chat template ends the last answer with no token on which generation stops: "
            f"{text.tokenizer.decode([end])} is appended and learned",
        )
    return Sample(input_ids=ids, labels=labels, where=row.where, remarks=remarks)


def _cut(
    whole: str, places: Sequence[int], text: _Text
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


def _continuation(before: str, ids: list[int], piece: str, text: _Text) -> list[int] | None:
    """Tokenize a piece that follows `ids`, the ids of `before`; None if that cannot be done."""
    natural = text.ids(before + piece)
    if natural[: len(ids)] == ids:
        return natural[len(ids) :]
    wanted = text.tokenizer.decode(natural)
    for anchor in _ANCHORS:
        start, whole = text.ids(anchor), text.ids(anchor + piece)
        tail = whole[len(start) :]
        if whole[: len(start)] == start and text.tokenizer.decode([*ids, *tail]) == wanted:
            return tail
    return None


def _shared(ids: list[int], others: list[int]) -> int:
    """Count the ids that both begin with."""
    pairs = zip(ids, others, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(others)))


def _shortened(sample: Sample, max_length: int) -> Sample:
    return replace(
        sample, input_ids=sample.input_ids[:max_length], labels=sample.labels[:max_length]
    )
