"""Conversations are learned as transformers renders them: the assistant's words and their ends."""

import pytest

from bridge.peft import AdapterError
from bridge.peft.finetune.data import rows_of
from bridge.peft.finetune.samples import IGNORED, Sample, tokenize
from bridge.peft.finetune.shapes import recognise
from tests.helpers import chat
from tests.helpers.chat import byte_level, metaspace

MESSAGES = [
    {"role": "user", "content": "hello fox"},
    {"role": "assistant", "content": "yes "},
    {"role": "user", "content": "quick fox"},
    {"role": "assistant", "content": "no fox says"},
]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALL = {"function": {"name": "add", "arguments": {"a": 1}}}
TOKENIZERS = {"byte level": byte_level(bos=True), "metaspace": metaspace()}


def sample_of(tokenizer, template, *, stops=("<|im_end|>", "<|eot|>"), **columns) -> Sample:
    tokenizer.chat_template = template
    data = recognise(rows_of([columns], "data"), has_chat_template=True)
    stop_ids = [tokenizer.convert_tokens_to_ids(stop) for stop in stops]
    (sample,) = tokenize(data.rows, data.shape, tokenizer, stop_ids=stop_ids)
    return sample


def learned(tokenizer, sample: Sample) -> list[str]:
    """The text of every run of tokens that are learned."""
    runs: list[list[int]] = []
    for before, label in zip([IGNORED, *sample.labels], sample.labels, strict=False):
        if label != IGNORED:
            runs += [[]] if before == IGNORED else []
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs]


def starts(sample: Sample) -> list[int]:
    pairs = enumerate(zip([IGNORED, *sample.labels], sample.labels, strict=False))
    return [i for i, (before, label) in pairs if before == IGNORED != label]


def rendered(tokenizer, messages, **options) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, **options)["input_ids"]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (chat.CHATML, ["yes <|im_end|>", "no fox says<|im_end|>"]),
        (chat.HEADERS, ["yes<|eot|>", "no fox says<|eot|>"]),
        (chat.MODEL_ROLE, ["yes<|im_end|>", "no fox says<|im_end|>"]),
        (chat.CLOSED_ONCE, ["yes <|im_end|>", "no fox says<|im_end|>"]),
        (chat.MARKED, ["yes <|im_end|>", "no fox says<|im_end|>"]),
    ],
)
def test_answers_are_learned_with_their_ends_after_what_inference_gives(kind, template, answers):
    tokenizer = TOKENIZERS[kind]
    sample = sample_of(tokenizer, template, messages=MESSAGES)
    assert sample.input_ids == rendered(tokenizer, MESSAGES)
    assert [answer.strip() for answer in learned(tokenizer, sample)] == answers
    assert sample.remarks == ()
    for start, turn in zip(starts(sample), (1, 3), strict=True):
        prompt = rendered(tokenizer, MESSAGES[:turn], add_generation_prompt=True)
        assert sample.input_ids[:start] == prompt


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_an_answer_that_begins_inside_a_token_is_cut_as_inference_cuts_it(kind):
    tokenizer = TOKENIZERS[kind]
    sample = sample_of(tokenizer, chat.NO_END, messages=MESSAGES[:2])
    prompt = rendered(tokenizer, MESSAGES[:1], add_generation_prompt=True)
    assert sample.input_ids[: starts(sample)[0]] == prompt
    whole = tokenizer.decode(rendered(tokenizer, MESSAGES[:2]))
    assert tokenizer.decode(sample.input_ids) == whole + "</s>"
    assert "begins or ends inside a token" in sample.remarks[0]


def test_a_template_without_an_end_gets_the_end_token_and_it_is_said():
    tokenizer = TOKENIZERS["byte level"]
    sample = sample_of(tokenizer, chat.NO_END, messages=MESSAGES)
    assert learned(tokenizer, sample) == ["yes \n", "no fox says\n</s>"]
    assert "no token on which generation stops: </s> is appended and learned" in sample.remarks[-1]


def test_a_turns_own_end_on_which_generation_does_not_stop_is_followed_by_one_that_does():
    tokenizer = TOKENIZERS["byte level"]
    sample = sample_of(tokenizer, chat.CHATML, stops=(), messages=MESSAGES)
    assert learned(tokenizer, sample)[-1] == "no fox says<|im_end|>\n</s>"
    assert "</s> is appended" in sample.remarks[0]


def test_an_end_outside_the_marked_words_is_learned_and_it_is_said():
    tokenizer = TOKENIZERS["byte level"]
    sample = sample_of(tokenizer, chat.END_UNMARKED, messages=MESSAGES)
    assert sample.input_ids == rendered(tokenizer, MESSAGES)
    assert learned(tokenizer, sample) == ["yes </s>", "no fox says</s>"]
    assert "</s>, which ends an answer, stands outside" in sample.remarks[0]


def test_a_template_without_a_prompt_teaches_the_header_too():
    tokenizer = TOKENIZERS["byte level"]
    sample = sample_of(tokenizer, chat.NO_PROMPT, messages=MESSAGES[:2])
    given = rendered(tokenizer, MESSAGES[:1], add_generation_prompt=True)
    assert sample.input_ids[: starts(sample)[0]] == given
    assert learned(tokenizer, sample) == ["assistant: yes </s>"]


def test_turns_that_the_template_renders_otherwise_later_are_not_learned_and_it_is_said():
    tokenizer = TOKENIZERS["byte level"]
    first = {"role": "assistant", "content": "quick</think>yes"}
    messages = [MESSAGES[0], first, *MESSAGES[2:]]
    sample = sample_of(tokenizer, chat.FORGETS_THOUGHTS, messages=messages)
    assert learned(tokenizer, sample) == ["no fox says<|im_end|>"]
    assert "leaves out words of the messages" in sample.remarks[0]
    assert "an answer is not learned" in sample.remarks[1]


def test_loss_on_all_tokens_is_said_where_the_words_cannot_be_found():
    tokenizer = TOKENIZERS["byte level"]
    sample = sample_of(tokenizer, chat.BACKWARDS, messages=MESSAGES)
    assert sample.labels == sample.input_ids
    assert any("loss on all tokens" in remark for remark in sample.remarks)


def test_a_turn_of_weight_0_is_not_learned():
    tokenizer = TOKENIZERS["byte level"]
    messages = [MESSAGES[0], {**MESSAGES[1], "weight": 0}, *MESSAGES[2:]]
    for template in (chat.CHATML, chat.MARKED):
        sample = sample_of(tokenizer, template, messages=messages)
        assert learned(tokenizer, sample) == ["no fox says<|im_end|>"]
        assert sample.input_ids == rendered(tokenizer, MESSAGES)
    last = [*MESSAGES[:3], {**MESSAGES[3], "weight": 0}]
    assert learned(tokenizer, sample_of(tokenizer, chat.NO_END, messages=last)) == ["yes \n"]


def test_a_weight_that_cannot_be_honoured_is_refused():
    messages = [MESSAGES[0], {**MESSAGES[1], "weight": 0}, *MESSAGES[2:]]
    with pytest.raises(
        AdapterError, match='data:1 has "weight": 0, but the chat template does not'
    ):
        sample_of(TOKENIZERS["byte level"], chat.BACKWARDS, messages=messages)
    some = (
        "{% for m in messages %}{% if loop.last %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(AdapterError, match="marks 1 answers of 2 messages"):
        sample_of(TOKENIZERS["byte level"], some, messages=messages)


def test_tools_and_calls_are_rendered_as_transformers_renders_them():
    tokenizer = TOKENIZERS["byte level"]
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    messages = [MESSAGES[0], call, {"role": "tool", "content": "3"}, MESSAGES[3]]
    sample = sample_of(tokenizer, chat.HEADERS, messages=messages, tools=[TOOL])
    assert sample.input_ids == rendered(tokenizer, messages, tools=[TOOL])
    assert sample.remarks == ()
    called, answered = learned(tokenizer, sample)
    assert called.startswith('call {"name": "add"') and called.endswith("<|eot|>")
    assert answered == "no fox says<|eot|>"


def test_what_the_template_does_not_read_is_said():
    tokenizer = TOKENIZERS["byte level"]
    call = {"role": "assistant", "content": "", "tool_calls": [CALL], "train": False}
    sample = sample_of(tokenizer, chat.CHATML, messages=[MESSAGES[0], call], tools=[TOOL])
    assert any('does not read "tools"' in remark for remark in sample.remarks)
    assert any("does not read 'tool_calls', 'train'" in remark for remark in sample.remarks)
    dropped = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}</s>{% endif %}"
        "{% endfor %}"
    )
    sample = sample_of(tokenizer, dropped, messages=MESSAGES)
    assert "leaves out words of the messages" in sample.remarks[0]


@pytest.mark.parametrize(
    "template",
    [
        chat.CHATML,
        chat.HEADERS,
        chat.PARTS_ONLY,
        chat.CHATML.replace("{{ m.content }}", "{{ m.content if m.content is string }}"),
        chat.CHATML.replace(
            "m.content", "(m.content if m.content is string else m.content|tojson)"
        ),
    ],
)
def test_content_parts_and_strings_are_the_same_words_in_every_template(template):
    tokenizer = TOKENIZERS["byte level"]
    parts = [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        for message in MESSAGES
    ]
    judge = parts if template == chat.PARTS_ONLY else MESSAGES
    for messages in (parts, MESSAGES):
        sample = sample_of(tokenizer, template, messages=messages)
        assert sample.input_ids == rendered(tokenizer, judge)
        assert len(learned(tokenizer, sample)) == 2 and sample.remarks == ()


def test_tools_that_are_printed_are_not_taken_for_printed_content():
    tokenizer = TOKENIZERS["byte level"]
    message = {"role": "user", "content": [{"type": "text", "text": "hello"}]}
    template = "{{ tools }}" + chat.CHATML
    sample = sample_of(tokenizer, template, messages=[message, MESSAGES[1]], tools=[TOOL])
    plain = [{"role": "user", "content": "hello"}, MESSAGES[1]]
    assert sample.input_ids == rendered(tokenizer, plain, tools=[TOOL])


def test_words_that_the_template_writes_anyway_are_not_taken_for_the_content():
    tokenizer = TOKENIZERS["byte level"]
    messages = [{"role": "user", "content": "us"}, {"role": "assistant", "content": "s"}]
    sample = sample_of(tokenizer, chat.PARTS_ONLY, messages=messages)
    assert learned(tokenizer, sample) == ["s<|im_end|>"]


def test_a_prompt_that_begins_the_answer_otherwise_is_said():
    tokenizer = TOKENIZERS["byte level"]
    thinks = chat.CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif")
    sample = sample_of(tokenizer, thinks, messages=MESSAGES[:2])
    assert learned(tokenizer, sample) == ["<|im_start|>assistant\nyes <|im_end|>"]
    assert "the prompt for generation begins it otherwise" in sample.remarks[0]


@pytest.mark.parametrize("key", ["thinking", "reasoning_content"])
def test_thoughts_are_read_under_any_of_their_names(key):
    tokenizer = TOKENIZERS["byte level"]
    answer = {**MESSAGES[1], key: "quick"}
    thinks = chat.CHATML.replace("{{ m.content", "{{ m.reasoning_content }}{{ m.content")
    sample = sample_of(tokenizer, thinks, messages=[MESSAGES[0], answer])
    assert sample.input_ids == rendered(tokenizer, [MESSAGES[0], answer])
    assert "quick" in learned(tokenizer, sample)[0] and sample.remarks == ()
    assert (
        f"not read '{key}'"
        in sample_of(tokenizer, chat.CHATML, messages=[MESSAGES[0], answer]).remarks[0]
    )


def test_no_template_writes_a_second_bos():
    tokenizer = TOKENIZERS["byte level"]
    sample = sample_of(tokenizer, chat.HEADERS, messages=MESSAGES)
    assert sample.input_ids.count(tokenizer.bos_token_id) == 1


def test_messages_the_template_refuses_are_named_with_their_roles():
    system = {"role": "system", "content": "be brief"}
    said = r"data:1 does not fit .*\(System role not supported\); the roles are 'system', 'user'"
    with pytest.raises(AdapterError, match=said):
        sample_of(TOKENIZERS["byte level"], chat.MODEL_ROLE, messages=[system, *MESSAGES])


def test_a_conversation_in_which_nobody_answers_is_named_with_its_roles():
    messages = [MESSAGES[0], {"role": "model", "content": "yes"}]
    said = "data:1 has no token to learn: no message of role \"assistant\".*'user', 'model'"
    with pytest.raises(AdapterError, match=said):
        sample_of(TOKENIZERS["byte level"], chat.CHATML, messages=messages)


def test_a_set_of_templates_is_read_as_transformers_reads_it():
    tokenizer = TOKENIZERS["byte level"]
    templates = {"default": chat.CHATML, "tool_use": chat.HEADERS}
    for tools in ([], [TOOL]):
        sample = sample_of(tokenizer, templates, messages=MESSAGES, tools=tools)
        assert sample.input_ids == rendered(tokenizer, MESSAGES, tools=tools or None)
    said = "data:1 needs one of the tokenizer's chat templates, 'tool_use', 'rag', and none is"
    with pytest.raises(AdapterError, match=said):
        sample_of(tokenizer, {"tool_use": chat.HEADERS, "rag": chat.CHATML}, messages=MESSAGES)


def test_messages_without_any_template_are_refused():
    with pytest.raises(AdapterError, match="data:1 has messages but .* no chat template; write"):
        sample_of(TOKENIZERS["byte level"], None, messages=MESSAGES)
