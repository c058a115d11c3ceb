"""Turn rows of text into token ids and labels of bounded length.

Labels are the token ids with -100 where no loss is taken: on prompts, and on what the assistant did
not say. What is learned follows the very tokens that inference gives the model: a text is cut where
an answer begins, should a token of the whole text reach across that place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from bridge.peft.errors import AdapterError
from bridge.peft.finetune.chat import render
from bridge.peft.finetune.data import Row
from bridge.peft.finetune.options import OnLong
from bridge.peft.finetune.shapes import Shape
from bridge.peft.finetune.tokens import TextTokenizer, Tokenizer, cut_at

IGNORED = -100


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
    text = TextTokenizer.of(tokenizer, stop_ids)
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


def _text(row: Row, text: TextTokenizer) -> Sample:
    ids = text.ids(row.columns["text"])
    opening, remarks = text.opened(ids)
    ids = text.closed([*opening, *ids])
    return Sample(input_ids=ids, labels=list(ids), where=row.where, remarks=remarks)


def _completion(row: Row, text: TextTokenizer) -> Sample:
    prompt, completion = row.columns["prompt"], row.columns["completion"]
    ids, (start,), cut = cut_at(prompt + completion, [len(prompt)], text)
    opening, twice = text.opened(ids)
    ids = text.closed([*opening, *ids])
    start += len(opening)
    labels = [IGNORED] * start + ids[start:]
    return Sample(input_ids=ids, labels=labels, where=row.where, remarks=(*twice, *cut))


def _messages(row: Row, text: TextTokenizer, chat_template: str | None) -> Sample:
    # the template writes the opening itself: nothing is added to what it renders
    rendered = render(row, text.tokenizer, text.stops, chat_template)
    places = [place for answer in rendered.answers for place in (answer.start, answer.end)]
    ids, at, remarks = cut_at(rendered.text, places, text)
    labels = [IGNORED] * len(ids)
    for start, end in zip(at[::2], at[1::2], strict=True):
        labels[start:end] = ids[start:end]
    remarks = (*rendered.remarks, *remarks)
    end = text.tokenizer.eos_token_id
    if rendered.is_open and end is not None:
        ids, labels = [*ids, end], [*labels, end]
        remarks += (
            "the chat template ends the last answer with no token on which generation stops: "
            f"{text.decoded([end])} is appended and learned",
        )
    return Sample(input_ids=ids, labels=labels, where=row.where, remarks=remarks)


def _shortened(sample: Sample, max_length: int) -> Sample:
    return replace(
        sample, input_ids=sample.input_ids[:max_length], labels=sample.labels[:max_length]
    )
