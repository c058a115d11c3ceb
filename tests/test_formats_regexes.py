"""Regexes out of files: the answers of `re`, in bounded time."""

from __future__ import annotations

import gc
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.peft.errors import AdapterFileError
from bridge.peft.formats.peft.config import parse_config
from bridge.peft.formats.peft.names import NameMatcher, Pattern
from bridge.peft.formats.peft.regexes import BoundedRegex, Budget
from tests.helpers.timing import quickest

#: Braces, sets and escapes that the `regex` package would read otherwise are among them.
_atoms = st.sampled_from(
    [
        *("a", "b", ".", r"\.", r"\d", "[ab]", "[^a]", "[^1]", r"\w", r"\W", r"\b", r"\B"),
        *("^", "$", r"\Z", "[a-c1]", "[[a]", "[a&&b]", "[a--b]", "[]a]", "[^]]", r"[\]{]"),
        *("{", "}", "{e}", "{e<=1}", "{i}", "{}", "{1", r"\{", r"\x61", "a{i<=2}", "a{1, 2}"),
    ]
)


def _grow(inner):
    quantifiers = st.sampled_from(
        ["*", "+", "?", "*?", "+?", "{2}", "{1,3}", "{0,2}?", "{2,}", "{,2}", "{,}", "*+", "{1,2}+"]
    )
    groups = st.sampled_from(["(?=", "(?!", "(?>", "(?i:", "(?s-i:", "(?x:", "(?P<n>", "("])
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda p: f"(?:{p[0]}|{p[1]})"),
        st.tuples(inner, inner).map(lambda p: f"({p[0]}){p[1]}\\1"),
        st.tuples(inner, quantifiers).map(lambda p: f"(?:{p[0]}){p[1]}"),
        st.tuples(groups, inner).map(lambda p: f"{p[0]}{p[1]})"),
        inner.map(lambda p: f"(?i){p}"),
        st.sampled_from(["(?<=a)", "(?<![ab]c)", "(?<=b.)"]),
    )


@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")
@settings(max_examples=400, deadline=None)
@given(
    source=st.recursive(_atoms, _grow, max_leaves=8),
    texts=st.lists(st.text("aAb.c1{e}]", min_size=1, max_size=7), min_size=1, max_size=4),
)
def test_it_answers_as_re_does(source, texts):
    try:
        theirs = re.compile(source)
    except re.error:
        with pytest.raises(AdapterFileError):
            BoundedRegex(source, "field", Budget())
        return
    ours = BoundedRegex(source, "field", Budget())
    for text in texts:
        assert ours.fullmatch(text) == (theirs.fullmatch(text) is not None), (source, text)
        assert ours.match(text) == (theirs.match(text) is not None), (source, text)


NAMES = [
    f"model.{part}layers.{i}.{name}"
    for part in ("", "language_model.", "vision_tower.")
    for i in range(32)
    for name in ("self_attn", "self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "norm")
]
#: What adapters in the wild carry.
REAL = [
    r".*\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
    r"^(?!.*vision).*(?:q|k|v)_proj",
    r"(?:.*?(?:vision|image|patch|language|text).*?(?:self_attn|attn|mlp|ffn).*?(?:k_proj|v_proj|"
    r"q_proj|gate_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:q_proj|o_proj))",
    "^(?:" + "|".join(map(re.escape, NAMES[::2])) + ")$",
]


REAL += [
    r"(?i).*\.Q_PROJ",
    r"(?s:.*)layers\.(?:1|2)\.(?=mlp).*(?<!norm)",
    r".*layers\.(\d)\1\..*",
    r"model\.layers\.[0-9]+\.mlp\.gate_proj|.*norm",
    "|".join(NAMES[::3]),
]


@pytest.mark.parametrize("source", REAL)
def test_regexes_of_real_adapters_are_answered_on_a_real_model(source):
    ours = NameMatcher(source, "field", Budget())
    assert [name in ours for name in NAMES] == [
        re.fullmatch(source, name) is not None for name in NAMES
    ]


HOSTILE = [
    "(a+)+$",
    "(.*)*x",
    "(?:.?){60}.{60}",
    r"(\w+\.)*\w+(\w+)*!",
    ".*" * 60 + "!",
    "(?:(?:.|..)+)+[!?]",
    "(?:(?:.{0,99999}){0,99999})[!?]",
    r"(.*)(.*)(.*)(.*)(.*)(.*)\6\5\4\3\2\1[!?]",
    "(?:.*.*)*" * 10 + "[!?]",
    "((.{1,100}){1,100}){1,100}!",
    "(?:(?:){1000}){1000}!",
    "(?=(.*.*)*!)" * 50,
    "(?:" + "|".join(f".*{i}.*{i}" for i in range(3000)) + ")!",
    "(?:" + "|".join(f".*{i}.*{i}" for i in range(1000)) + ")!",
    "[" + "".join(chr(i) for i in range(200, 19_000)) + "]*",
    r"[\x00-\uffff]" * 1400,
    "(?i)" + "[ -~]" * 3900,
    "(?:||||||||)*" * 1400,
    "(?:a|b)" * 2_800,
    "(?:a|b)" * 13_000,
    "(" * 5_000 + ")" * 5_000,
    "(?:" * 300 + ")" * 300,
    "a{1000000000}",
    "(?:(?:a{1000}){1000}){1000}",
    "(?:" * 30 + "a" + "{1000})" * 30,
    "[:" * 10_000,
    "\\N{" * 6_600,
    "(?i" * 6_600,
    "a{9}" * 3_000_000,
]


@pytest.mark.parametrize("source", HOSTILE, ids=lambda source: source[:30])
def test_no_regex_takes_longer_than_two_seconds(source):
    def match():
        try:
            ours = BoundedRegex(source, "field", Budget())
            for name in NAMES:
                ours.fullmatch(name)
        except AdapterFileError:
            pass

    # compiling cannot be stopped, and takes as long as the machine takes for 20,000 characters
    assert quickest(match, 1) < 2


def test_a_large_heap_is_not_counted_as_a_regex_s_time():
    thresholds = gc.get_threshold()
    gc.disable()
    heap = [[i] for i in range(3_000_000)]  # which a collection walks through, for half a second
    gc.set_threshold(1, 1, 1)
    gc.enable()
    try:
        budget = Budget()
        BoundedRegex(r"(.*\.)?(.*\.gate_up_proj)$", "field", budget)
        assert gc.isenabled()
    finally:
        gc.set_threshold(*thresholds)
    assert budget.left > 0.5 and heap


def test_all_regexes_of_a_file_share_one_second():
    slow = {f"(?:(?:.|..)+)+[!?]{{0,{i}}}[!?]": i for i in range(1, 50)}
    config = {"peft_type": "LORA", "target_modules": ["norm"]}

    def match():
        parsed = parse_config(config | {"rank_pattern": slow, "alpha_pattern": slow})
        for pattern in (parsed.rank_pattern, parsed.alpha_pattern):
            with pytest.raises(AdapterFileError, match="takes too long.*write the names"):
                pattern.value(NAMES[1], 8)

    assert quickest(match, 1) < 2  # 0.6 s of the processor, however busy that is


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("(", "not valid"),
        (r"\p{L}+", "not valid"),
        ("(?r)a", "not valid"),
        (r"\m\w+\M", "not valid"),
        (r"\L<names>", "not valid"),
        ("(?:a|(?i)b)", "not valid"),
        ("(a)(?(1)b|c)", "not supported"),
        ("[[:alpha:]]+", "not supported"),
        ("a(?#{e})", "not supported"),
        (r"(?i)\u017f", "not supported"),
        (".*x" * 7_000, "longer than 20,000"),
        ("x{20001}.", "longer than 20,000"),
    ],
)
def test_what_cannot_be_answered_as_re_does_is_refused(source, reason):
    with pytest.raises(AdapterFileError, match=f"field: the regex .* is {reason}.*write the names"):
        NameMatcher(source, "field", Budget())


def test_classes_are_not_asked_about_names_beyond_ascii():
    assert "couche.é" in NameMatcher(r"couche\..", "field", Budget())
    with pytest.raises(AdapterFileError, match="not supported for a module called 'couche.é'"):
        _ = "couche.é" in NameMatcher(r"couche\.\w", "field", Budget())


def peft_value(pattern, fqn, default):
    """How PEFT looks a pattern up."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", fqn):
            return value
    return default


@pytest.mark.parametrize(
    "pattern",
    [
        {"q_proj": 1, "self_attn.q_proj": 2},
        {"self_attn.q_proj": 2, "q_proj": 1},
        {"^model.layers.0.self_attn": 3, "self_attn": 4},
        {r"layers\.1\..*": 5, "o_proj": 6, r"layers\.1\.self_attn\.o_proj": 7},
        {"q_proj|o_proj": 8, "norm$": 9},
        {"": 1},
        {"model": 2, ".*proj": 3},
        {"^(?:model.layers.0.norm)$": 1, r"^(?:model\.layers\.1\.norm|norm)$": 2},
        {r"^model\.layers\.3\.norm$|o_proj": 4, "q_proj$": 5},
        {"q_proj)|(model.l": 6},
        {r"layers\.(\d)\3\.norm": 7, r"(?i:NORM)": 8},
        dict.fromkeys(NAMES[::2], 2) | dict.fromkeys(NAMES, 3),
    ],
)
def test_patterns_are_looked_up_as_peft_does(pattern):
    ours = Pattern(pattern, "rank_pattern", Budget())
    for name in [*NAMES, "q_proj", "self_attn.q_proj", "xq_proj"]:
        assert ours.value(name, 0) == peft_value(pattern, name, 0), name


def test_a_pattern_of_many_names_is_quick():
    names = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(250) for part in "qkvo"]
    values = {re.escape(f"model.layers.{i}.mlp.up_proj"): i + 1 for i in range(19_000)}

    def look_up():
        pattern = Pattern(values | {re.escape(name): 7 for name in names}, "rank_pattern", Budget())
        assert all(pattern.value(name, 0) == 7 for name in names)
        assert pattern.value("model.layers.9.mlp.up_proj", 0) == 10

    assert quickest(look_up, 1) < 1
