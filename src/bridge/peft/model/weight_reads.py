"""Which linears of a model have their weight read by code that never calls them.

A module may hand `self.q_proj.weight` to a function (WavLM's attention, Mamba's `dt_proj`), past
whatever the linear's forward adds. The source of the modules' classes says so before they run.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Iterator

from torch import nn

#: What is asked of a weight without computing with it; `data` is what is written through.
_METADATA = frozenset(
    (
        *("dtype", "device", "shape", "size", "dim", "ndim", "numel", "element_size", "is_meta"),
        *(
            "data",
            "requires_grad",
            "is_floating_point",
            "data_ptr",
            "grad",
            "stride",
            "is_contiguous",
        ),
    )
)
#: Methods that read weights to set them up, not to compute.
_SETUP = re.compile(r"__init__|_?init_.*|_?tie_.*|reset_parameters|.*resize.*|_apply|extra_repr")
_READ = re.compile(r"\bself\.(?!weight\b)[\w.]+(?:\[[^\]]*\])?\.weight\b")
#: A path from a module to a linear below it: attribute names, or None for any item of a list.
Path = tuple[str | None, ...]


def read_weights(model: nn.Module) -> dict[nn.Module, str]:
    """The modules whose `weight` another module's code reads, with that module's class name.

    Args:
        model: The model; it is not run.

    Returns:
        `{linear: "WavLMAttention"}`; empty where no source says so.
    """
    found: dict[nn.Module, str] = {}
    for module in model.modules():
        for path in _paths_read_by(type(module)):
            for target in _reached(module, path):
                found.setdefault(target, type(module).__name__)
    return found


def _reached(module: nn.Module, path: Path) -> Iterator[nn.Module]:
    if not path:
        yield module
        return
    name, *rest = path
    children = list(module.children()) if name is None else [getattr(module, name, None)]
    for child in children:
        if isinstance(child, nn.Module):
            yield from _reached(child, tuple(rest))


@functools.cache
def _paths_read_by(cls: type[nn.Module]) -> frozenset[Path]:
    """The paths below `self` whose `weight` a class reads, in inherited methods too."""
    paths: set[Path] = set()
    for base in cls.__mro__:
        if issubclass(base, nn.Module) and base.__module__.partition(".")[0] != "torch":
            paths |= _paths_in(base)
    return frozenset(paths)


@functools.cache
def _paths_in(cls: type) -> frozenset[Path]:
    try:
        file = inspect.getsourcefile(cls)
    except TypeError:  # made where there is no file
        return frozenset()
    return _paths_by_class(file).get(cls.__qualname__, frozenset()) if file else frozenset()


@functools.cache
def _paths_by_class(file: str) -> dict[str, frozenset[Path]]:
    """For each class of a file, by qualified name, the paths that its methods read."""
    try:
        with open(file, encoding="utf-8") as source:
            text = source.read()
        # most files read no weight of a child, and need not be parsed
        tree = ast.parse(text) if _READ.search(text) else ast.Module([], [])
    except (OSError, SyntaxError, ValueError):
        return {}
    return {name: frozenset(_reads(node)) for name, node in _classes(tree, "")}


def _classes(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.ClassDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield f"{prefix}{child.name}", child
            yield from _classes(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef):
            yield from _classes(child, f"{prefix}{child.name}.<locals>.")


def _reads(cls: ast.ClassDef) -> Iterator[Path]:
    for method in cls.body:
        if not isinstance(method, ast.FunctionDef) or _SETUP.fullmatch(method.name):
            continue
        nodes = list(ast.walk(method))
        parents = {child: node for node in nodes for child in ast.iter_child_nodes(node)}
        for node in nodes:
            if isinstance(node, ast.Attribute) and node.attr == "weight":
                path = _path(node.value)
                if path and isinstance(node.ctx, ast.Load) and _uses_values(parents[node]):
                    yield path


def _uses_values(outer: ast.AST) -> bool:
    """Whether what stands around a weight may compute with it, not ask what it is or write it."""
    match outer:
        case ast.Attribute(attr=name):
            in_place = name.endswith("_") and not name.endswith("__")
            return name not in _METADATA and not in_place
        case ast.Subscript(ctx=ast.Store()):
            return False
        case ast.Call(func=ast.Name(id="isinstance" | "hasattr" | "type" | "id")):
            return False
        case ast.Compare(ops=[ast.Is() | ast.IsNot()]):
            return False
    return True


def _path(node: ast.expr) -> Path | None:
    """`self.a.b[i]` as ("a", "b", None); None if it does not begin with `self`."""
    if isinstance(node, ast.Name):
        return () if node.id == "self" else None
    if isinstance(node, ast.Attribute):
        before = _path(node.value)
        return None if before is None else (*before, node.attr)
    if isinstance(node, ast.Subscript):
        before = _path(node.value)
        return None if before is None else (*before, None)
    return None
