"""Which linears of a model have their weight read by code that never calls them.

A module may hand `self.q_proj.weight` to a function (WavLM's attention, Mamba's `dt_proj`), past
whatever the linear's forward adds. The source of the modules' classes says so before they run.
"""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import re
from collections.abc import Iterator, Mapping

from torch import nn

from bridge.peft.branch.kinds.attention import OUT_PROJECTION
from bridge.peft.branch.kinds.experts import is_attention
from bridge.peft.branch.registry import kind_of

#: What is asked of a weight without computing with it; `data` is what is written through.
_METADATA = frozenset(
    (
        *("dtype", "device", "shape", "size", "dim", "ndim", "numel", "element_size", "is_meta"),
        *("data", "data_ptr", "requires_grad", "grad", "is_floating_point"),
        *("stride", "is_contiguous", "SCB", "quant_state"),
    )
)
#: Methods that read weights to set them up, not to compute.
_SETUP = re.compile(r"__init__|_?init_.*|_?tie_.*|reset_parameters|.*resize.*|_apply|extra_repr")
_READ = re.compile(r"(?<!self)\.weight\b")
#: A path from a module to a linear below it: attribute names, or None for any item of a list.
ChildPath = tuple[str | None, ...]


def read_weights(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """The modules whose `weight` other modules' code reads, with these.

    Args:
        model: The model; it is not run.

    Returns:
        `{linear: [a WavLMAttention]}`; empty where no source says so.
    """
    found: dict[nn.Module, list[nn.Module]] = {}
    for module in model.modules():
        if is_attention(module):  # torch's own, in whose source nothing is looked for
            found.setdefault(getattr(module, OUT_PROJECTION), []).append(module)
        for path in _paths_read_by(type(module)):
            for target in _reached(module, path):
                kind = kind_of(type(target))
                if kind is None or not kind.wraps:  # Megatron reads its weights to clip them
                    found.setdefault(target, []).append(module)
    return found


def source_mentions(cls: type, word: str) -> bool:
    """Whether the file of a class holds a word; True where there is no file to look into.

    Args:
        cls: A class; one of torch mentions nothing.
        word: Any text.
    """
    if cls.__module__.partition(".")[0] == "torch":
        return False
    file = _file_of(cls)
    return True if file is None else word in _text_of(file)


def _reached(module: nn.Module, path: ChildPath) -> Iterator[nn.Module]:
    if not path:
        yield module
        return
    name, *rest = path
    children = list(module.children()) if name is None else [getattr(module, name, None)]
    for child in children:
        if isinstance(child, nn.Module):
            yield from _reached(child, tuple(rest))


@functools.cache
def _paths_read_by(cls: type[nn.Module]) -> frozenset[ChildPath]:
    """The paths below `self` whose `weight` a class reads, in inherited methods too."""
    paths: set[ChildPath] = set()
    for base in cls.__mro__:
        if issubclass(base, nn.Module) and base.__module__.partition(".")[0] != "torch":
            paths |= _paths_in(base)
    return frozenset(paths)


@functools.cache
def _paths_in(cls: type) -> frozenset[ChildPath]:
    file = _file_of(cls)
    return _paths_by_class(file).get(cls.__qualname__, frozenset()) if file else frozenset()


@functools.cache
def _file_of(cls: type) -> str | None:
    try:
        return inspect.getsourcefile(cls)
    except TypeError:  # made where there is no file
        return None


@functools.cache
def _text_of(file: str) -> str:
    """The source as Python has it, of a notebook's cell too; empty where there is none."""
    return "".join(linecache.getlines(file))


@functools.cache
def _paths_by_class(file: str) -> dict[str, frozenset[ChildPath]]:
    """For each class of a file, by qualified name, the paths that its methods read."""
    text = _text_of(file)
    try:
        # most files read no weight of a child, and need not be parsed
        tree = ast.parse(text) if _READ.search(text) else ast.Module([], [])
    except (SyntaxError, ValueError):
        return {}
    return {name: frozenset(_reads(node)) for name, node in _classes(tree, "")}


def _classes(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.ClassDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield f"{prefix}{child.name}", child
            yield from _classes(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef):
            yield from _classes(child, f"{prefix}{child.name}.<locals>.")


def _reads(cls: ast.ClassDef) -> set[ChildPath]:
    """The paths whose weight a class computes with; not those that it writes in place."""
    read: set[ChildPath] = set()
    written: set[ChildPath] = set()
    for method in cls.body:
        if not isinstance(method, ast.FunctionDef) or _SETUP.fullmatch(method.name):
            continue
        nodes = list(ast.walk(method))
        parents = {child: node for node in nodes for child in ast.iter_child_nodes(node)}
        names = _aliases(nodes)
        for node in nodes:
            if isinstance(node, ast.Attribute) and node.attr == "weight":
                path, outer = _path(node.value, names), parents[node]
                if path and (isinstance(node.ctx, ast.Store) or _is_written(outer)):
                    written.add(path)
                elif path and _uses_values(outer):
                    read.add(path)
    return read - written


def _is_written(outer: ast.AST) -> bool:
    """Whether what stands around a weight writes into it."""
    match outer:
        case ast.Attribute(attr=name):
            return name.endswith("_") and not name.endswith("__")
        case ast.Subscript(ctx=ast.Store()):
            return True
    return False


def _aliases(nodes: list[ast.AST]) -> dict[str, ChildPath]:
    """The names that a method gives to children of its module, by assignment or in a loop."""
    names: dict[str, ChildPath] = {"self": ()}
    for node in nodes:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if path := _path(
                value, names
            ):
                names[name] = path
            case ast.For(target=target, iter=items) | ast.comprehension(target=target, iter=items):
                lists = [
                    p for n in ast.walk(items) if isinstance(n, ast.expr) and (p := _path(n, names))
                ]
                for name in ast.walk(target):
                    if isinstance(name, ast.Name) and lists:
                        names[name.id] = (*max(lists, key=len), None)
    return names


def _uses_values(outer: ast.AST) -> bool:
    """Whether what stands around a weight may compute with it, not only ask what it is."""
    match outer:
        case ast.Attribute(attr=name):
            return name not in _METADATA
        case ast.Call(func=ast.Name(id="isinstance" | "hasattr" | "type" | "id")):
            return False
        case ast.Compare(ops=[ast.Is() | ast.IsNot()]):
            return False
    return True


def _path(node: ast.expr, names: Mapping[str, ChildPath]) -> ChildPath | None:
    """`self.a.b[i]` as ("a", "b", None); None if it does not begin with the module itself."""
    match node:
        case ast.Name(id=name):
            return names.get(name)
        case ast.Attribute(value=value, attr=name):
            before, last = _path(value, names), name
        case ast.Subscript(value=value):
            before, last = _path(value, names), None
        case ast.Call(func=ast.Name(id="getattr"), args=[value, *_]):
            before, last = _path(value, names), None
        case _:
            return None
    return None if before is None else (*before, last)
