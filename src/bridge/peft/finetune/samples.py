"""Turn rows of text into token ids and labels of bounded length.

Labels are the token ids with -100 where no loss is taken: on prompts, and on what the assistant did
not say where the chat template can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from bridge.peft.errors import AdapterError
from bridge.peft.finetune.data import Row, Shape
from bridge.peft.finetune.options import OnLong

IGNORED = -100


class Tokenizer(Protocol):
    """What is asked of a transformers tokenizer, for one text at a time."""

    eos_token_id: int | None
    pad_token_id: int | None
    chat_template: Any

    def __call__(self, text: str) -> Mapping[str, list[int]]:
        """Return `input_ids` of the text."""
        ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Mapping[str, list[int]]:
        """Return `input_ids`, and `assistant_masks` where asked, of the messages."""
        ...


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row in tokens; `labels` has -100 where no loss is taken. Both have the same length."""

    input_ids: list[int]
    labels: list[int]
    where: str


def tokenize(
    rows: Sequence[Row],
    shape: Shape,
    tokenizer: Tokenizer,
    chat_template: str | None = None,
) -> list[Sample]:
    """Turn rows into samples, each closed with the end-of-sequence token where there is one.

    Args:
        rows: rows of one shape.
        shape: as `shape_of` tells it.
        tokenizer: the model's tokenizer.
        chat_template: for `messages`, a template with generation markers: loss on the assistant's
            words only. None renders the tokenizer's own and takes loss on all tokens.

    Raises:
        AdapterError: a row that cannot be rendered or has no token to learn, with the line.
    """
    encode: dict[Shape, Callable[[Row], Sample]] = {
        "text": lambda row: _text(row, tokenizer),
        "prompt/completion": lambda row: _completion(row, tokenizer),
        "messages": lambda row: _messages(row, tokenizer, chat_template),
    }
    samples = [encode[shape](row) for row in rows]
    for sample in samples:
        if not has_target(sample):
            raise AdapterError(f"{sample.where} has no token to learn; remove the line")
    return samples


def has_target(sample: Sample) -> bool:
    """Say whether any token is predicted: the first one never is."""
    return any(label != IGNORED for label in sample.labels[1:])


def fit_length(
    samples: list[Sample], max_length: int, on_long: OnLong, *, limit: int | None = None
) -> tuple[list[Sample], str | None]:
    """Bring every sample to at most `max_length` tokens, never silently.

    Args:
        samples: as tokenized.
        max_length: most tokens in a sample.
        on_long: what to do with longer ones.
        limit: most tokens that the model can take, where known; only for the message.

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
    count = f"{len(too_long)} of {len(samples)} samples are longer than {max_length} tokens"
    longer = f"--max-length {size}" if limit is None or size <= limit else "shorter samples"
    if on_long == "error":
        raise AdapterError(
            f"{count}, the longest has {size} ({longest.where}); pass {longer}, --on-long truncate "
            "or --on-long drop"
        )
    if on_long == "truncate":
        samples = [_cut(sample, max_length) for sample in samples]
    else:
        samples = [sample for sample in samples if len(sample.input_ids) <= max_length]
    kept = [sample for sample in samples if has_target(sample)]
    if not kept:
        raise AdapterError(f"{count} and none would be left; pass {longer}")
    done = "cut" if on_long == "truncate" else "dropped"
    lost = len(samples) - len(kept)
    note = f"; {lost} of them lost every token to learn and were dropped" if lost else ""
    return kept, f"{count}, the longest has {size}: {done}{note}"


def _text(row: Row, tokenizer: Tokenizer) -> Sample:
    ids = _closed(tokenizer(row.columns["text"])["input_ids"], tokenizer)
    return Sample(input_ids=ids, labels=list(ids), where=row.where)


def _completion(row: Row, tokenizer: Tokenizer) -> Sample:
    prompt, completion = row.columns["prompt"], row.columns["completion"]
    prompt_ids = tokenizer(prompt)["input_ids"]
    ids = _closed(tokenizer(prompt + completion)["input_ids"], tokenizer)
    # A token may join the end of the prompt to the start of the completion, and a tokenizer may
    # close the lone prompt: the completion starts where the two first differ.
    start = next(
        (i for i, (a, b) in enumerate(zip(prompt_ids, ids, strict=False)) if a != b),
        min(len(prompt_ids), len(ids)),
    )
    return Sample(input_ids=ids, labels=[IGNORED] * start + ids[start:], where=row.where)


def _messages(row: Row, tokenizer: Tokenizer, template: str | None) -> Sample:
    try:
        rendered = tokenizer.apply_chat_template(
            row.columns["messages"],
            chat_template=template,
            return_dict=True,
            return_assistant_tokens_mask=template is not None,
        )
    except Exception as error:  # templates raise what they like
        raise AdapterError(
            f"{row.where} does not fit the chat template ({error}); mend the messages"
        ) from error
    ids = list(rendered["input_ids"])
    if template is None:
        return Sample(input_ids=ids, labels=list(ids), where=row.where)
    mask = rendered["assistant_masks"]
    labels = [token if said else IGNORED for token, said in zip(ids, mask, strict=True)]
    return Sample(input_ids=ids, labels=labels, where=row.where)


def _closed(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """End the ids with the end-of-sequence token, once, where the tokenizer has one."""
    end = tokenizer.eos_token_id
    return list(ids) if end is None or (ids and ids[-1] == end) else [*ids, end]


def _cut(sample: Sample, max_length: int) -> Sample:
    return replace(
        sample, input_ids=sample.input_ids[:max_length], labels=sample.labels[:max_length]
    )
