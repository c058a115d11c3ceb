"""README and docs are true: every command and every Python block in them runs.

A block that cannot run here says so in the line above it: `<!-- not run: the reason -->`.
"""

import ast
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers

from bridge.peft import LoRA, save_adapter
from bridge.peft.cli import main
from bridge.peft.demo.tasks import base_model_dir
from tests.helpers.cli_fixtures import one_thread, sums, write_rows

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
#: The blocks that are not run, by page.
NOT_RUN = {
    "CONTRIBUTING.md": ["clones the repository and sets up an environment"],
    "README.md": ["each sets up an environment of its own", "installs packages"],
    "parallel.md": [
        "needs two processes; examples/train_tensor_parallel.py does the like and is run by the "
        "tests",
        "starts several processes",
        "needs a Megatron model; examples/train_megatron.py does the like and is run by the tests",
    ],
    "quickstart.md": ["installs packages", "starts several processes"],
}
#: What torchrun tells a process that is the only one.
ONLY_PROCESS = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
#: What the pages call a base model's directory, and an adapter's.
MODELS = ("DIR", "llama", "path/to/model")
ADAPTERS = ("out", "a", "b")


class Block(NamedTuple):
    """A fenced block: its language, its lines, and why it is not run, if it is not."""

    language: str
    text: str
    not_run: str


def blocks(page):
    found = re.findall(
        r"(?:<!-- not run: (.+?) -->\n)?^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S
    )
    return [Block(language, text, reason) for reason, language, text in found]


def commands(block):
    """The command lines of a block, as words; a line that ends in a backslash goes on."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def load(**more):
    model = transformers.AutoModelForCausalLM.from_pretrained(base_model_dir(), **more)
    return model.eval()


def adapted(**recipe):
    """The demo's base with an adapter whose B is not zero."""
    model = LoRA(**({"dim": 8, "seed": 0} | recipe))(load())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                parameter.normal_(std=0.02)
    return model


def quantised():
    options = transformers.BitsAndBytesConfig(load_in_4bit=True)
    return load(quantization_config=options, dtype=torch.bfloat16)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A directory with what the pages take for granted: a model, an adapter, data."""
    monkeypatch.chdir(tmp_path)
    transformers.utils.logging.disable_progress_bar()
    for name in MODELS:
        shutil.copytree(base_model_dir(), tmp_path / name)
    save_adapter(adapted(), ADAPTERS[0])
    for name in ADAPTERS[1:]:
        shutil.copytree(ADAPTERS[0], name)
    write_rows(tmp_path / "train.jsonl", sums(24))
    with one_thread():
        yield tmp_path
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    transformers.utils.logging.enable_progress_bar()


def names_of(page):
    """What the prose of a page presupposes; made when a page uses it."""
    source = "\n".join(b.text for b in blocks(page) if b.language == "python")
    makers = {
        "model": adapted,
        "base_model": load,
        "quantised_model": quantised,
        "config": lambda: transformers.AutoConfig.from_pretrained(base_model_dir()),
        "batch": lambda: dict.fromkeys(("input_ids", "labels"), torch.arange(1, 9)[None]),
    }
    return {name: make() for name, make in makers.items() if re.search(rf"\b{name}\b", source)}


def test_only_the_blocks_listed_here_are_not_run():
    found = {p.name: [b.not_run for b in blocks(p) if b.not_run] for p in PAGES}
    assert {name: reasons for name, reasons in found.items() if reasons} == NOT_RUN


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_block_escapes(page):
    text = page.read_text()
    assert text.count("```") == 2 * len(blocks(page))
    marks = re.findall("^<!-- not run", text, re.M)
    assert len(marks) == sum(bool(b.not_run) for b in blocks(page))
    for block in blocks(page):
        assert block.language in ("sh", "python", "")
        if not block.language:  # a formula, a listing of files
            assert not re.search(
                r"^(\$ |bridge-peft |pip |import |from \w+ import )", block.text, re.M
            )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_every_command_and_python_block_runs(page, workplace, capsys, monkeypatch):
    names = names_of(page)
    if "init_process_group" in page.read_text():
        for variable, value in ONLY_PROCESS.items():
            monkeypatch.setenv(variable, value)
    for block in blocks(page):
        if block.not_run:
            continue
        if block.language == "python":
            exec(compile(block.text, f"{page.name}: {block.text[:40]!r}", "exec"), names)
        elif block.language == "sh":
            for words in commands(block):
                run(words, capsys)


def run(words, capsys):
    """Run one command line in this process; what an earlier one wrote to its output is removed."""
    assert words[0] == "bridge-peft", f"mark the block of {words} as not run"
    if "--output" in words and "--resume" not in words:
        shutil.rmtree(words[words.index("--output") + 1], ignore_errors=True)
    code = main(words[1:])
    assert code == 0, f"{shlex.join(words)}: {capsys.readouterr().err}"


def test_every_make_target_that_a_page_names_exists():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        assert set(re.findall(r"`make (\w+)", page.read_text())) <= targets, page.name


def test_every_link_between_the_pages_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_limits_quote_messages_that_the_library_says():
    said = "\n".join(messages())
    page = (ROOT / "docs" / "limits.md").read_text()
    quoted = [row.split("|")[2].strip() for row in page.splitlines() if row.startswith("| ")]
    quoted = [cell.strip("`") for cell in quoted if cell.startswith("`")]
    assert len(quoted) > 50
    for message in quoted:
        parts = [re.escape(part.strip()) for part in message.split("…") if part.strip()]
        assert re.search(".*".join(parts), said), message


def messages():
    """Every string in the library, on one line each, with `…` where a value goes."""
    for path in (ROOT / "src").rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                yield " ".join("".join(map(str, parts)).split())
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield " ".join(node.value.split())
