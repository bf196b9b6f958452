"""Every code that the source can show a person, found by reading the source.

A code is what a function, an error or a dataclass of ours takes as its parameter `code`; so a new
helper that takes one is found without being listed here.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYDANTIC = "PydanticCustomError"
BUILT = {"no-{}-function": ("no-model-function", "no-example-inputs-function")}
"""Codes that are put together from a name, by their form."""

HANDED_ON = ("error['type']",)
"""Expressions that are a code made elsewhere: pydantic's error has that of its validator."""

KINDS = {
    "InputError": "input error",
    "CheckFailed": "check failed",
    "InternalError": "internal error",
    "passed": "passed",
    "missed": "missed",
    "analysis": "analysis",
    "RuleWarning": "analysis",
    "Cause": "sparse kernel",
}
"""What a code is, by what is made of it; all else of ours becomes an input error."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Use:
    """One place where a code stands in the source. `text` is the call, in one line."""

    code: str
    kind: str
    file: str
    line: int
    text: str


def source_files() -> list[Path]:
    # The links in the package would show each pass twice.
    found = [*(ROOT / "gpusq_compile").rglob("*.py"), *(ROOT / "passes").glob("*.py")]
    return sorted({path.resolve() for path in found})


def scan(files: Iterable[Path] | None = None) -> tuple[list[Use], list[str]]:
    """Every use of a code, and the places where the scan cannot tell which code it is."""
    trees = {path: ast.parse(path.read_text()) for path in files or source_files()}
    takers = dict(_takers(trees.values()))
    constants = dict(pair for tree in trees.values() for pair in _constants(tree))
    uses: list[Use] = []
    unknown: list[str] = []
    for path, tree in trees.items():
        file = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
        for call, function in _calls(tree):
            names = _aliased(call.func, function)
            if not names <= set(takers):
                continue
            argument = _argument(call, takers[next(iter(names))])
            if argument is None:
                continue
            found = _codes(argument, function, constants)
            if found is None:
                unknown.append(f"{file}:{call.lineno}: {ast.unparse(call)}")
                continue
            text = ast.unparse(call)
            for kind in sorted(KINDS.get(name, "input error") for name in names):
                uses += [Use(code, kind, file, call.lineno, text) for code in found]
        for note, kind, line in _notes(tree):
            uses.append(Use(note, kind, file, line, note))
    return uses, unknown


def kinds_of(uses: Iterable[Use]) -> dict[str, set[str]]:
    """Each code with all that it can be."""
    found: dict[str, set[str]] = defaultdict(set)
    for use in uses:
        found[use.code].add(use.kind)
    return dict(found)


def _takers(trees: Iterable[ast.Module]) -> Iterator[tuple[str, int]]:
    """What takes a code, by name, and at which position."""
    yield PYDANTIC, 0
    nodes = [node for tree in trees for node in ast.walk(tree)]
    errors = {"GpusqError"}
    for node in nodes:
        if isinstance(node, Function) and node.name != "__init__":
            names = [argument.arg for argument in node.args.args if argument.arg != "self"]
            if "code" in names:
                yield node.name, names.index("code")
        elif isinstance(node, ast.ClassDef):
            bases = {_name(base) for base in node.bases}
            if bases & errors and not any(isinstance(item, Function) for item in node.body):
                errors.add(node.name)
                yield node.name, 0
            fields = [
                item.target.id
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            ]
            if "code" in fields:
                yield node.name, fields.index("code")
            for item in node.body:
                if isinstance(item, Function) and item.name == "__init__":
                    names = [a.arg for a in item.args.args if a.arg != "self"]
                    if "code" in names:
                        yield node.name, names.index("code")


def _constants(tree: ast.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The module's constants that hold a text, or a mapping to texts."""
    for node in tree.body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        target = node.target if isinstance(node, ast.AnnAssign) else target
        if isinstance(target, ast.Name) and value is not None:
            texts = _texts(value)
            if texts is not None:
                yield target.id, texts


def _texts(value: ast.expr) -> tuple[str, ...] | None:
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return (value.value,)
    if isinstance(value, ast.Dict):
        parts = [_texts(item) for item in value.values]
        return None if None in parts else tuple(text for part in parts for text in part or ())
    return None


def _calls(tree: ast.Module) -> Iterator[tuple[ast.Call, Function | None]]:
    """Every call, with the innermost function that it stands in."""

    def visit(
        node: ast.AST, function: Function | None
    ) -> Iterator[tuple[ast.Call, Function | None]]:
        if isinstance(node, ast.Call):
            yield node, function
        inner = node if isinstance(node, Function) else function
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inner)

    yield from visit(tree, None)


def _aliased(called: ast.expr, function: Function | None) -> set[str]:
    """The names that a call may mean: `note = missed if wanted else analysis` gives one two."""
    name = _name(called)
    for node in ast.walk(function) if function else ():
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.IfExp):
            targets = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if name in targets:
                return {_name(node.value.body), _name(node.value.orelse)}
    return {name}


def _notes(tree: ast.Module) -> Iterator[tuple[str, str, int]]:
    """The codes of `notes` and `facts`, pairs of a code and a text, which the trace makes remarks
    of, with their kind."""
    for node in ast.walk(tree):
        for name, kind in (("notes", "missed"), ("facts", "analysis")):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "append"
                and name in ast.unparse(node.func.value)
                and isinstance(node.args[0], ast.Tuple)
            ):
                yield (_texts(node.args[0].elts[0]) or ("",))[0], kind, node.lineno
            elif isinstance(node, ast.keyword) and node.arg == name:
                for pair in ast.walk(node.value):
                    if isinstance(pair, ast.Tuple) and pair.elts and (text := _texts(pair.elts[0])):
                        yield text[0], kind, pair.lineno


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else ""


def _argument(call: ast.Call, position: int) -> ast.expr | None:
    for keyword in call.keywords:
        if keyword.arg == "code":
            return keyword.value
    return call.args[position] if position < len(call.args) else None


def _codes(
    value: ast.expr, function: Function | None, constants: dict[str, tuple[str, ...]]
) -> tuple[str, ...] | None:
    """The codes that an expression can be; none where it hands on a code made elsewhere."""
    if (texts := _texts(value)) is not None:
        return texts
    if isinstance(value, ast.IfExp):
        parts = [_codes(part, function, constants) for part in (value.body, value.orelse)]
        return None if None in parts else tuple(code for part in parts for code in part or ())
    if isinstance(value, ast.Subscript):
        if ast.unparse(value) in HANDED_ON:
            return ()
        return _codes(value.value, function, constants)
    if isinstance(value, ast.Attribute) and value.attr == "code":
        return ()
    if isinstance(value, ast.JoinedStr):
        form = "".join(
            str(part.value) if isinstance(part, ast.Constant) else "{}" for part in value.values
        )
        return BUILT.get(form)
    if isinstance(value, ast.Call) and _name(value.func) == "get":
        assert isinstance(value.func, ast.Attribute)
        parts = [_codes(v, function, constants) for v in (value.func.value, value.args[-1])]
        return None if None in parts else tuple(code for part in parts for code in part or ())
    if isinstance(value, ast.Name):
        if value.id in constants:
            return constants[value.id]
        return _local(value.id, function, constants)
    return None


def _local(
    name: str, function: Function | None, constants: dict[str, tuple[str, ...]]
) -> tuple[str, ...] | None:
    if function is None:
        return None
    if name in [argument.arg for argument in function.args.args]:
        return ()  # Its callers are scanned themselves.
    found: list[str] = []
    known = False
    for node in ast.walk(function):
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            assert isinstance(node, ast.Assign | ast.AnnAssign)
            codes = _codes(node.value, function, constants) if node.value else ()
            if codes is None:
                return None
            known = True
            found += codes
        # Pairs of a note are found where they are made.
        if isinstance(node, ast.For) and re.search("notes|facts", ast.unparse(node.iter)):
            known = True
    return tuple(found) if known else None
