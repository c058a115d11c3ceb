"""Render conversations with the tokenizer's chat template and find the assistant's words in them.

A template with `{% generation %}` marks them. Without, they are what a conversation has more than
the prompt that inference would give: the same messages before, rendered with
`add_generation_prompt=True`. An answer is taken only where that prompt is exactly how the whole
conversation begins.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bridge.peft.errors import AdapterError
from bridge.peft.finetune.data import Row
from bridge.peft.finetune.messages import Messages
from bridge.peft.finetune.models import quiet_imports
from bridge.peft.finetune.shapes import named

with quiet_imports():
    from transformers.utils.chat_template_utils import render_jinja_template

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
# a content that no template writes itself
_PROBE = "bridge-peft-probe"
# keys that few templates read and whose loss changes no words
_HARMLESS = {"role", "content", "name", "tool_call_id"}
# transformers gives a template that reads one of these the value of another
_THOUGHTS = {"reasoning_content", "reasoning", "thinking"}

_ALL = (
    "the chat template does not tell where the assistant's words are ({% generation %}): "
    "loss on all tokens"
)
_CHANGES = (
    "an answer is not learned, because the chat template renders it otherwise once the "
    "conversation goes on; end a row with each such answer"
)
_OTHER_PROMPT = (
    "an answer is learned with the header that the chat template gives it, because the prompt "
    "for generation begins it otherwise: inference will give another context"
)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Where something to learn stands in a text; `is_last` if nothing follows it."""

    start: int
    end: int
    is_last: bool


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: what the chat template made of it.
        answers: what is learned, with the token that ends each turn.
        is_open: no token on which generation stops ends the last answer: one has to be appended.
        remarks: what the user should know, to be counted over all rows.
    """

    text: str
    answers: list[Answer]
    is_open: bool
    remarks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Chat:
    """A tokenizer's chat template with the tools of one row."""

    tokenizer: Any
    template: str
    tools: list[dict[str, Any]] | None

    def __call__(self, messages: Messages, *, prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            messages,
            tools=self.tools,
            chat_template=self.template,
            add_generation_prompt=prompt,
            tokenize=False,
        )


def render(
    row: Row, tokenizer: Any, stops: Collection[str], chat_template: str | None = None
) -> Rendered:
    """Render the row's messages and find what is learned of them.

    Args:
        row: with `messages`, and `tools` where there are any.
        tokenizer: a transformers tokenizer.
        stops: the tokens on which generation stops, as text.
        chat_template: in place of the tokenizer's own.

    Raises:
        AdapterError: there is no template for the row, or the template refuses it.
    """
    tools = row.columns.get("tools")
    try:
        template = tokenizer.get_chat_template(chat_template, tools)
    except ValueError:
        raise AdapterError(_no_template(row, tokenizer)) from None
    chat = _Chat(tokenizer=tokenizer, template=template, tools=tools)
    learned = [
        message["role"] == "assistant" and message.get("weight", 1) != 0
        for message in row.columns["messages"]
    ]
    messages = [
        {key: value for key, value in message.items() if key != "weight"}
        for message in row.columns["messages"]
    ]
    if not any(learned):
        raise AdapterError(
            f'{row.where} has no token to learn: no message of role "assistant" that is learned; '
            f"{_roles(messages)}"
        )
    messages, text = _rendered(chat, messages, row.where)
    remarks = list(_unread(messages, text, chat))
    if _MARKER.search(template):
        answers = _marked(chat, messages, learned, row.where)
    else:
        answers, remark = _by_prefixes(chat, messages, learned, text, row.where)
        remarks += remark
    answers, is_open, remark = _with_ends(answers, text, stops)
    return Rendered(text=text, answers=answers, is_open=is_open, remarks=(*remarks, *remark))


def _rendered(chat: _Chat, messages: Messages, where: str) -> tuple[Messages, str]:
    """Render with the contents as given, or as the other kind if the template reads only that."""
    has_parts = any(isinstance(message.get("content"), list) for message in messages)
    parts = [{"type": "text", "text": _PROBE}]
    given, other = (parts, _PROBE) if has_parts else (_PROBE, parts)
    if not _reads(chat, given) and _reads(chat, other):
        messages = [_as_string(m) if has_parts else _as_parts(m) for m in messages]
    text, problem = _attempt(chat, messages)
    if text is None:
        reason = " ".join(str(problem).split())
        raise AdapterError(
            f"{where} does not fit the chat template ({reason}); {_roles(messages)}: "
            "change the messages or the template"
        ) from problem
    return messages, text


def _reads(chat: _Chat, content: str | list[dict[str, str]]) -> bool:
    """Whether the template gives the words of such a content, and not the list as it is printed."""
    text, _ = _attempt(chat, [{"role": "user", "content": content}])
    if text is None or _PROBE not in text:
        return False
    return isinstance(content, str) or not (str(content) in text or json.dumps(content) in text)


def _attempt(
    chat: _Chat, messages: Messages, *, prompt: bool = False
) -> tuple[str | None, Exception | None]:
    try:
        return chat(messages, prompt=prompt), None
    except Exception as error:  # templates raise what they like
        return None, error


def _words(messages: Messages) -> Iterator[str]:
    for message in messages:
        if message["role"] in ("system", "user", "assistant"):
            content = message.get("content") or ""
            parts = [content] if isinstance(content, str) else [part["text"] for part in content]
            yield from (part.strip() for part in parts if part.strip())


def _as_string(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "".join(part["text"] for part in content)}


def _as_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


def _unread(messages: Messages, text: str, chat: _Chat) -> Iterator[str]:
    """Say what of the messages the template leaves out."""
    if not all(word in text for word in _words(messages)):
        yield "the chat template leaves out words of the messages"
    read = set(re.findall(r"\w+", chat.template))
    read |= _THOUGHTS if _THOUGHTS & read else set()
    if chat.tools and "tools" not in read:
        yield 'the chat template does not read "tools"'
    keys = dict.fromkeys(key for message in messages for key in message)
    if unread := [key for key in keys if key not in _HARMLESS | read]:
        yield f"the chat template does not read {named(unread)} of the messages"


def _marked(chat: _Chat, messages: Messages, learned: list[bool], where: str) -> list[Answer]:
    rendering: Any = render_jinja_template(
        conversations=[messages],
        tools=chat.tools,  # pyright: ignore[reportArgumentType]
        chat_template=chat.template,
        return_assistant_tokens_mask=True,
        **chat.tokenizer.special_tokens_map,
    )
    spans: list[tuple[int, int]] = rendering[1][0]
    wanted = [
        is_learned
        for message, is_learned in zip(messages, learned, strict=True)
        if message["role"] == "assistant"
    ]
    if not all(wanted):
        if len(wanted) != len(spans):
            raise AdapterError(
                f'{where} has "weight": 0, but the chat template marks {len(spans)} answers of '
                f'{len(wanted)} messages of role "assistant"; remove the weight or the row'
            )
        spans = [span for span, is_wanted in zip(spans, wanted, strict=True) if is_wanted]
    return [
        Answer(start=start, end=end, is_last=learned[-1] and (start, end) == spans[-1])
        for start, end in spans
        if end > start
    ]


def _by_prefixes(
    chat: _Chat, messages: Messages, learned: list[bool], text: str, where: str
) -> tuple[list[Answer], list[str]]:
    answers: list[Answer] = []
    remarks: set[str] = set()
    for index, is_learned in enumerate(learned):
        if not is_learned:
            continue
        span, remark = _span(chat, messages, index, text)
        remarks |= {remark} if remark else set()
        if span:
            start, end = span
            answers.append(Answer(start=start, end=end, is_last=index == len(messages) - 1))
    if answers:
        return answers, sorted(remarks)
    if sum(message["role"] == "assistant" for message in messages) > sum(learned):
        raise AdapterError(
            f'{where} has "weight": 0, but the chat template does not tell where the '
            "assistant's words are; mark them with {% generation %}"
        )
    return [Answer(start=0, end=len(text), is_last=True)], [_ALL]


def _span(
    chat: _Chat, messages: Messages, index: int, text: str
) -> tuple[tuple[int, int] | None, str | None]:
    """Find what message `index` adds to the text, and say so if inference prompts otherwise."""
    upto, _ = _attempt(chat, messages[: index + 1])
    # some templates end every rendering, not every turn, with the end-of-sequence token
    ends = [upto, upto.removesuffix(chat.tokenizer.eos_token or "")] if upto else []
    whole = next((end for end in ends if text.startswith(end)), None)
    if whole is None:
        return None, _CHANGES
    for prompt, remark in ((True, None), (False, _OTHER_PROMPT)):
        before, _ = _attempt(chat, messages[:index], prompt=prompt)
        if before and whole.startswith(before) and len(whole) > len(before):
            return (len(before), len(whole)), remark
    return None, _CHANGES


def _with_ends(
    answers: Sequence[Answer], text: str, stops: Collection[str]
) -> tuple[list[Answer], bool, list[str]]:
    """Let each answer end with the token on which generation stops, where the text has one."""
    ended, is_open, remarks = [], False, []
    for answer in answers:
        end = _end_inside(text, answer, stops)
        rest = text[answer.end :].lstrip()
        outside = next((stop for stop in stops if rest.startswith(stop)), None)
        if end is None and outside:
            end = len(text) - len(rest) + len(outside)
            remarks = [
                f"{outside}, which ends an answer, stands outside what the chat template marks as "
                "the assistant's words: it is learned too"
            ]
        elif end is None:
            is_open = answer.is_last
            end = len(text) if is_open else answer.end
        ended.append(replace(answer, end=end))
    return ended, is_open, remarks


def _end_inside(text: str, answer: Answer, stops: Collection[str]) -> int | None:
    """Return where the first stop ends of those that, with blanks, close the answer."""
    first, end = None, answer.end
    while True:
        body = text[answer.start : end].rstrip()
        stop = next((stop for stop in stops if body.endswith(stop)), None)
        if stop is None:
            return first
        first = answer.start + len(body)
        end = first - len(stop)


def _no_template(row: Row, tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        return (
            f"{row.where} has messages but the tokenizer has no chat template; "
            'write "prompt" and "completion" rows, or set tokenizer.chat_template and save it'
        )
    return (
        f"{row.where} needs one of the tokenizer's chat templates, "
        f'{named(tokenizer.chat_template)}, and none is "default"; name one so and save it'
    )


def _roles(messages: Messages) -> str:
    return f"the roles are {named(dict.fromkeys(m['role'] for m in messages))}"
