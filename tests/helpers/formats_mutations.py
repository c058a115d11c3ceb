"""Damage done to adapter directories, each kind at random from a seeded generator."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from random import Random

CONFIG, TENSORS, EXTRA = "adapter_config.json", "adapter_model.safetensors", "bridge_adapter.json"
REGEXES = [
    "(a+)+$",
    "(.*)*x",
    "(?:a?){40}a{40}",
    r"(\w+\.)*\w+(\w+)*!",
    ".*" * 60 + "z",
    "(?:" * 300 + ")" * 300,
    "[" + "a-z" * 3000 + "]*",
    r"(a)\1",
    "(?>a+)b",
    "(?i)first",
    "a{1000000000}",
    "(?:(?:){1000}){1000}",
    "((a{1,100}){1,100}){1,100}b",
    "(?!.*first).*",
    "(?<=a)b",
    "(",
    "",
    "^",
    "x" * 200_000,
]
VALUES = [
    *(None, True, False, 0, -1, 1, 3, 10**9, 10**400, 1e308, -1e308, 0.5, "", "x", "all-linear"),
    *([], {}, [[]], [None], [1], ["first"], ["second.0", "first"], {"": 1}, {"first": -3}),
    *({"a": {"b": {}}}, {"first": 2}, {".*": 70_000}, ["x" * 5000], "../../etc/passwd", "\ud800"),
    *REGEXES,
]
FIELDS = [
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "rank_pattern"),
    *("alpha_pattern", "layers_to_transform", "layers_pattern", "modules_to_save", "bias"),
    *("use_rslora", "fan_in_fan_out", "init_lora_weights", "peft_type", "use_dora", "lora_bias"),
    *("loftq_config", "target_parameters", "unknown_field", "base_model_name_or_path"),
]
EXTRA_FIELDS = [
    *("dropout_position", "lora_A_init_method", "exceptions", "base", "format", "parts"),
    *("layout", "prefix", "alpha", "dim", "dropout", "peft"),
]


def mutate(directory: Path, random: Random) -> str:
    """Damage one to three things in a directory; say which."""
    count = random.choice((1, 1, 1, 2, 3))
    return ", ".join(random.choice(MUTATIONS)(directory, random) for _ in range(count))


def _some_file(directory: Path, random: Random) -> Path:
    return directory / random.choice((CONFIG, TENSORS, TENSORS, EXTRA))


def flip_bytes(directory: Path, random: Random) -> str:
    path = _some_file(directory, random)
    if not path.is_file() or not path.stat().st_size:
        return "nothing"
    data = bytearray(path.read_bytes())
    head = random.random() < 0.5
    for _ in range(random.choice((1, 2, 8))):
        place = random.randrange(min(len(data), 1500) if head else len(data))
        data[place] = random.randrange(256)
    path.write_bytes(data)
    return f"flip bytes of {path.name}"


def cut_or_grow(directory: Path, random: Random) -> str:
    path = _some_file(directory, random)
    if not path.is_file():
        return "nothing"
    data = path.read_bytes()
    place = random.randrange(len(data) + 1)
    more = bytes(random.randrange(256) for _ in range(random.choice((0, 1, 100))))
    path.write_bytes(
        random.choice((data[:place], data[place:], data[:place] + more + data[place:], b"", more))
    )
    return f"cut or grow {path.name}"


def replace_file(directory: Path, random: Random) -> str:
    path = _some_file(directory, random)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    kind = random.choice(("gone", "directory", "fifo", "outside", "dangling", "loop", "pickle"))
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "outside":
        path.symlink_to(random.choice(("/etc/passwd", "/dev/zero", "/", "../outside.json")))
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "pickle":
        (directory / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    return f"{path.name}: {kind}"


def change_json(directory: Path, random: Random) -> str:
    name, fields = random.choice(((CONFIG, FIELDS), (CONFIG, FIELDS), (EXTRA, EXTRA_FIELDS)))
    value = _load(directory / name)
    if value is None:
        return "nothing"
    said = []
    for _ in range(random.choice((1, 1, 2))):
        field, new = random.choice(fields), random.choice(VALUES)
        inner = value.get(field)
        if isinstance(inner, dict) and inner and random.random() < 0.5:
            inner[random.choice((*inner, *REGEXES[:10]))] = new
        elif isinstance(inner, dict) and random.random() < 0.1:
            inner.update({f"absurd_{i}": 4 for i in range(30_000)})
        elif random.random() < 0.15:
            value.pop(field, None)
        else:
            value[field] = new
        said.append(f"{field}={new!r:.40}")
    text = json.dumps(value)
    if random.random() < 0.1:
        text = random.choice((text[:-1] + ',"r": 2, "r": 5}', "[" * 20_000, f"[{text}]", "NaN"))
    (directory / name).write_text(text)
    return f"{name}: {' '.join(said)}"


def change_header(directory: Path, random: Random) -> str:
    path = directory / TENSORS
    parts = _split(path)
    if parts is None:
        return "nothing"
    header, data = parts
    keys = [key for key in header if key != "__metadata__"]
    if not keys:
        return "nothing"
    key = random.choice(keys)
    what = random.choice(("dtype", "shape", "data_offsets", "rename", "drop", "copy", "entry", "n"))
    junk = random.choice((-1, 0, 2**63, 2**70, 1.5, True, None, "x", [], {}))
    if what == "dtype":
        header[key]["dtype"] = random.choice(("F64", "F16", "I64", "BOOL", "F8_E4M3", "U4", 3))
    elif what == "shape":
        sizes = header[key]["shape"]
        header[key]["shape"] = random.choice(
            (sizes[::-1], [*sizes, 1], sizes[:1], [], [junk, *sizes[1:]], junk, [0, 2**39])
        )
    elif what == "data_offsets":
        start, end = header[key]["data_offsets"]
        header[key]["data_offsets"] = random.choice(
            ([end, start], [start + 4, end + 4], [junk, end], [start, junk], [0, 2**40], junk)
        )
    elif what == "rename":
        new = random.choice(
            [
                *(key + "x", key[1:], key.upper(), key.replace("lora_A", "lora_B"), "", "\n"),
                *(key.replace("first", "fi.rst"), "\x1b[2J", "\ud800"),
                "base_model.model." + "a." * 5000 + "lora_A.weight",
            ]
        )
        header = {new if k == key else k: v for k, v in header.items()}
    elif what == "drop":
        del header[key]
    elif what == "copy":
        header[key.replace("lora_", "lora_lora_")] = header[key]
    elif what == "entry":
        header[key] = junk
    text = json.dumps(header)
    if what == "n" and random.random() < 0.5:
        text = text[:-1] + f", {json.dumps(key)}: {json.dumps(header[key])}}}"
    encoded = text.encode()
    size = len(encoded) if what != "n" else random.choice((len(encoded), 10**10, 2**64 - 1, 0, 7))
    path.write_bytes(size.to_bytes(8, "little") + encoded + data)
    return f"header: {what} of {key[-30:]}"


def change_values(directory: Path, random: Random) -> str:
    path = directory / TENSORS
    parts = _split(path)
    if parts is None or len(parts[1]) < 4:
        return "nothing"
    header, data = parts
    place = random.randrange(len(data) // 4) * 4
    bits = random.choice(
        (0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0, random.getrandbits(32))
    )
    changed = bytearray(data)
    changed[place : place + 4] = bits.to_bytes(4, "little")
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + changed)
    return f"value {bits:#x}"


def _load(path: Path) -> dict | None:
    try:
        value = json.loads(path.read_text()) if path.is_file() and not path.is_symlink() else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _split(path: Path) -> tuple[dict, bytes] | None:
    if not path.is_file() or path.is_symlink():
        return None
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + size])
        entries = [v for k, v in header.items() if k != "__metadata__"]
        assert all({"dtype", "shape", "data_offsets"} <= set(entry) for entry in entries)
        assert all(isinstance(entry["shape"], list) for entry in entries)
        assert all(len(entry["data_offsets"]) == 2 for entry in entries)
    except (ValueError, TypeError, AttributeError, AssertionError, OverflowError):
        return None
    return header, content[8 + size :]


MUTATIONS = [
    flip_bytes,
    cut_or_grow,
    replace_file,
    *(change_json,) * 3,
    *(change_header,) * 3,
    change_values,
]
