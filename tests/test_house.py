"""The house is as CONTRIBUTING draws it, and the linter knows every room."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "bridge" / "peft"


def rooms():
    """The folders and files of the package's first level, and those below `merging`."""
    found = {
        path.stem
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))
    }
    return found - {"__init__", "__main__"}


def test_contributing_lists_every_room_in_the_order_that_the_linter_keeps():
    table = (ROOT / "CONTRIBUTING.md").read_text().split("| floor |")[1].split("\n\n")[0]
    listed = [
        name.strip("/").replace("/", ".")
        for row in table.splitlines()[2:]
        for name in re.findall(r"`([^`]+)`", row.split("|")[1])
    ]
    assert {name for name in listed if "." not in name} == rooms()
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    floors = next(c for c in contracts["contracts"] if c["name"] == "imports run downward")
    layers = [
        {name.strip().replace("merging.in_memory", "merging") for name in layer.split("|")}
        for layer in floors["layers"]
    ]
    order = [next(i for i, names in enumerate(layers) if name in names) for name in listed]
    assert order == sorted(order)


def test_the_core_names_every_room_but_the_commands_and_the_training_job():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    core = next(c for c in contracts["contracts"] if c["name"].startswith("the core needs"))
    named = {name.removeprefix("bridge.peft.") for name in core["source_modules"]}
    assert rooms() - named == {"cli", "finetune", "demo"}
