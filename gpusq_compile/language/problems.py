"""What is wrong with a rules file, in words: pydantic's errors, placed and translated."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from pydantic import BaseModel

from gpusq_compile.errors import InputError, Location, did_you_mean, nearest
from gpusq_compile.language.document import Node, Scalar
from gpusq_compile.language.schema import RulesFile

MAX_SHOWN: Final = 10

# Codes of the language, for `--explain` and the reference.
CODES: Final[Mapping[str, str]] = {
    "contradiction": "Two keys of one block contradict each other.",
    "duplicate-id": "Two rules of one file have the same id.",
    "duplicate-key": "A key is given twice in one mapping; YAML would drop one of the two.",
    "duplicate-value": "A list names the same value twice.",
    "empty-block": "A block switches on nothing at all.",
    "empty-match": "A match has no condition and would take every layer.",
    "empty-value": "A list or a text that must hold something is empty.",
    "expect-mismatch": "A rule matches another number of layers than its `expect` says.",
    "extends-cycle": "A rules file extends itself, directly or through others.",
    "invalid-glob": "A glob has a character class that cannot be read.",
    "invalid-regex": "What follows `re:` is not a Python regular expression.",
    "invalid-value": "A value is not allowed at its place.",
    "missing-key": "A key that is needed at its place is missing.",
    "missing-value": "A key stands there without a value.",
    "no-rules": "The file and what it extends hold no key `rules`.",
    "not-finite": "A number is NaN or infinite.",
    "out-of-range": "A number is too small or too large.",
    "pattern-unmatched": "Warning: one name pattern of a rule's list matches no layer.",
    "role-unmatched": "A name that a role is given to is neither a layer nor a module.",
    "rule-shadowed": "Warning: later rules override everything that a rule decides.",
    "rule-unmatched": "A rule that is not optional matches no layer of the model.",
    "rule-without-action": "A rule matches layers and says nothing about them.",
    "rules-file-empty": "The rules file is empty.",
    "rules-file-missing": "The rules file does not exist.",
    "rules-file-not-utf8": "The rules file is not UTF-8 text.",
    "rules-file-too-large": "The rules file is too large or nested too deeply to be one.",
    "rules-file-unreadable": "The rules file exists and cannot be read.",
    "rules-is-folder": "The path of the rules file is a folder.",
    "rules-not-a-mapping": "The rules file is not a mapping of keys to values.",
    "unknown-alias": "A YAML alias names an anchor that does not exist.",
    "unknown-dtype": "A type that cannot be quantized to.",
    "unknown-key": "A key that the language does not have at this place.",
    "unknown-op": "An operator that rules cannot match.",
    "unknown-pattern": "A sparsity pattern that is not known.",
    "unknown-role": "A role that layers cannot have.",
    "unknown-rules-name": "Neither a file nor the name of a shipped rules file.",
    "unknown-target": "A runtime, GPU generation or precision that cannot be built for.",
    "unknown-value": "A value outside the list of valid ones.",
    "unknown-version": "A version of the rules language that this compiler does not know.",
    "unquoted-glob": "A glob without quotes, which YAML reads as an alias.",
    "unquoted-pattern": "A pattern such as 2:4 without quotes.",
    "unused-key": "A key that has no effect beside another one.",
    "wrong-type": "A value of the wrong kind, such as text in place of a number.",
    "yaml-syntax": "The file is not valid YAML.",
    "yaml-tag": "A YAML tag. Rules hold plain values only and never run code.",
}

_CODE_OF_KEY: Final = {
    "weight": "unknown-dtype",
    "activation": "unknown-dtype",
    "output": "unknown-dtype",
    "pattern": "unknown-pattern",
    "runtime": "unknown-target",
    "compute": "unknown-target",
    "precision": "unknown-target",
    "role": "unknown-role",
    "op": "unknown-op",
}
_EXAMPLES: Final = {
    "sparsity": '{pattern: "2:4"}',
    "quantize": "{weight: int8, activation: int8}",
    "distill": "{loss: mse}",
    "match": "{op: linear}",
    "in_features": "{multiple_of: 32}",
    "out_features": "{multiple_of: 32}",
    "kernel_size": "1",
    "roles": '{stage_end: "blocks.*"}',
    "target": "{compute: [portable]}",
    "calibration": "{batches: 8}",
    "finetune": "{labels: hard}",
    "loss": "{alpha: 1, beta: 10, gamma: 5}",
    "sparse": "{epochs: 2}",
    "reconstruct": "{steps: 200}",
    "verify": "{min_cosine: 0.99}",
    "rules": "[{id: gemms, match: {op: linear}, quantize: none}]",
}
_BOUNDS: Final = {
    "gt": "greater than",
    "ge": "of at least",
    "lt": "less than",
    "le": "of at most",
}


class InputErrors(InputError):
    """Several errors of one file, shown together; code, place and hint are the first one's."""

    def __init__(self, errors: Sequence[InputError]) -> None:
        first = errors[0]
        super().__init__(first.code, first.message, location=first.location, hint=first.hint)
        self.errors = tuple(errors)

    def __str__(self) -> str:
        shown = [str(error) for error in self.errors[:MAX_SHOWN]]
        if len(self.errors) > MAX_SHOWN:
            shown.append(f"... and {len(self.errors) - MAX_SHOWN} more errors")
        return "\n".join(shown)


def raise_together(errors: Iterable[InputError], files: Sequence[str]) -> None:
    """Raise what is in `errors`, in the order of `files` and lines; return if there is nothing."""

    def order(error: InputError) -> tuple[int, int, int]:
        at = error.location or Location("")
        index = files.index(at.file) if at.file in files else len(files)
        return index, at.line or 0, at.column or 0

    ordered = sorted(errors, key=order)
    if len(ordered) > 1:
        raise InputErrors(ordered)
    if ordered:
        raise ordered[0]


def translate(errors: Iterable[Mapping[str, Any]], root: Node) -> list[InputError]:
    """pydantic's `errors()` about `root` as errors with a place, a code and a hint."""
    found = [_translate(error, root) for error in errors]
    return [error for error in found if error is not None]


def _translate(error: Mapping[str, Any], root: Node) -> InputError | None:
    # Parts in angle brackets name a branch of `block or none`; they are in no file.
    path = [part for part in error["loc"] if not str(part).startswith("<")]
    node, missing = _walk(root, path)
    keys = [part for part in path if isinstance(part, str)]
    key = keys[-1] if keys else ""
    kind: str = error["type"]
    context: Mapping[str, Any] = error.get("ctx", {})
    # A check of a whole block may name the key that it is about.
    node = node.get(context["at"]) or node if "at" in context else node
    given = _describe(node.value)

    def made(code: str, message: str, hint: str | None = None) -> InputError:
        return InputError(code, message, location=node.at, hint=hint)

    if kind == "extra_forbidden":
        return _unknown_key(node, path)
    if kind == "missing":
        owner = f"in {_place_name(path[:-1])}" if len(path) > 1 else ""
        example = _EXAMPLES.get(key)
        add = f"add `{key}: {example or '...'}`"
        return made("missing-key", f"the key '{key}' is missing {owner}".rstrip(), add)
    if kind == "literal_error":
        return _unknown_value(node, path, key, missing)
    if kind in ("too_short", "string_too_short"):
        # pydantic counts a list's valid entries, so a list of one bad entry is short to it too.
        if node.value != (() if kind == "too_short" else ""):
            return None
        return made("empty-value", f"{key}: expected at least one value, found nothing")
    if kind in CODES:
        if "offset" in context and node.text_column is not None:
            column = node.text_column + context["offset"]
            at = Location(node.at.file, node.at.line, column)
            return InputError(kind, f"{key}: {error['msg']}", location=at)
        hint: str | None = context.get("hint")
        if kind == "missing-value":
            hint = f"write `{key}: none` to switch it off" if _has_off(path) else "remove the key"
            return made(kind, f"{key}: the key has no value", hint)
        return made(kind, error["msg"], hint)
    if kind == "finite_number":
        return made("not-finite", f"{key}: expected a finite number, found {given}")
    for bound, words in _BOUNDS.items():
        if bound in context:
            limit = context[bound]
            shown = int(limit) if limit == int(limit) else limit
            return made("out-of-range", f"{key}: expected a number {words} {shown}, found {given}")
    if kind in ("string_pattern_mismatch", "string_too_long"):
        return made(
            "invalid-value",
            f"{key}: expected at most 80 letters, digits, '.', '_' or '-', the first a letter or "
            f"digit; found {given}",
        )
    return _wrong_type(node, path, kind, key)


def _wrong_type(node: Node, path: Sequence[str | int], kind: str, key: str) -> InputError:
    number = "a whole number" if kind.startswith("int") else "a number"
    expected = {
        "string_type": "text",
        "bool_type": "true or false",
        "tuple_type": "a list",
        "model_type": "a mapping",
    }.get(kind, number)
    hint = None
    if kind == "model_type" and isinstance(path[-1], int):
        key, expected = _place_name(path), "a mapping with the keys id and match"
    elif kind in ("model_type", "tuple_type"):
        example = _EXAMPLES.get(key)
        expected += " or none" if _has_off(path) else ""
        if key in ("in_features", "out_features", "kernel_size"):
            expected = "a number or a mapping"
        hint = f"for example `{key}: {example}`" if example else None
    elif kind == "string_type":
        hint = f'for text, quote it: "{node.value}"' if _is_scalar(node) else None
    elif isinstance(node.value, str) and node.quoted and _reads_as_number(node.value):
        hint = f"remove the quotes: {node.value}"
    message = f"{key}: expected {expected}, found {_describe(node.value)}"
    return InputError("wrong-type", message, location=node.at, hint=hint)


def _unknown_value(
    node: Node, path: Sequence[str | int], key: str, missing: Sequence[str | int]
) -> InputError:
    code = _CODE_OF_KEY.get(key, "unknown-value")
    if "calibration" in path:
        code = "unknown-value"
    valid = _literals(path)
    if key in _EXAMPLES and _has_off(path):
        message = f"{key}: expected none or a mapping, found {_describe(node.value)}"
        return InputError(
            "unknown-value",
            message,
            location=node.at,
            hint=f"write `{key}: {_EXAMPLES[key]}` or `{key}: none`",
        )
    if not isinstance(node.value, str):
        found = _describe(node.value)
        message = f"{key}: expected {_or(valid)}, found {found}"
        return InputError("wrong-type", message, location=node.at)
    message = f"{key}: '{node.value}' is not one of {_or(valid)}"
    hint = did_you_mean(node.value, valid)
    if code == "unknown-pattern":
        message = f"{key}: '{node.value}' is not a known pattern"
        hint = 'the known ones are "2:4" (FP16, INT8), pair4:8 (INT4) and portable (all of them)'
    return InputError(code, message, location=node.at, hint=hint)


def _unknown_key(node: Node, path: Sequence[str | int]) -> InputError:
    key = str(path[-1])
    owner = _model_at(path[:-1])
    valid = list(owner.model_fields) if owner else []
    homes = [name for name, model in _homes() if key in model.model_fields and model is not owner]
    if homes and nearest(key, valid) != key:
        hint = f"'{key}' is a key of {' and of '.join(homes)}: check the indentation"
    else:
        hint = did_you_mean(key, valid)
    where = f"in {_place_name(path[:-1])}" if len(path) > 1 else "at the top level"
    return InputError(
        "unknown-key", f"unknown key '{key}' {where}", location=node.key_at or node.at, hint=hint
    )


def _walk(root: Node, path: Sequence[str | int]) -> tuple[Node, Sequence[str | int]]:
    """The deepest node on `path` that the document has, and the parts it does not have."""
    node = root
    for index, part in enumerate(path):
        if isinstance(part, str):
            child = node.get(part)
        else:
            children = node.items()
            child = children[part] if part < len(children) else None
        if child is None:
            return node, path[index:]
        node = child
    return node, ()


def _place_name(path: Sequence[str | int]) -> str:
    """`rules[2].match` for a path of keys and indexes."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "the file"


def _annotation_at(path: Sequence[str | int]) -> Any:
    annotation: Any = RulesFile
    for part in path:
        if isinstance(part, int):
            continue
        model = _model_in(annotation)
        if model is None or part not in model.model_fields:
            return None
        annotation = model.model_fields[part].annotation
    return annotation


def _leaves(annotation: Any) -> list[Any]:
    """The types inside unions, tuples and annotations."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _leaves(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType, tuple):
        return [leaf for part in typing.get_args(annotation) for leaf in _leaves(part)]
    return [annotation]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    for leaf in _leaves(annotation):
        if isinstance(leaf, type) and issubclass(leaf, BaseModel):
            return leaf
    return None


def _model_at(path: Sequence[str | int]) -> type[BaseModel] | None:
    annotation = _annotation_at(path)
    return _model_in(annotation)


def _literals(path: Sequence[str | int]) -> list[str]:
    return [
        str(value)
        for leaf in _leaves(_annotation_at(path))
        if typing.get_origin(leaf) is typing.Literal
        for value in typing.get_args(leaf)
    ]


def _has_off(path: Sequence[str | int]) -> bool:
    """Whether the key at `path` takes a block or the word none."""
    return "none" in _literals(path) and _model_at(path) is not None


def _homes() -> list[tuple[str, type[BaseModel]]]:
    """Each kind of block with the words that name its place."""
    homes: list[tuple[str, type[BaseModel]]] = [("the top level", RulesFile)]

    def visit(model: type[BaseModel], prefix: str) -> None:
        for key, field in model.model_fields.items():
            inner = _model_in(field.annotation)
            if inner is None or any(inner is known for _, known in homes):
                continue
            name = "a rule" if key == "rules" else f"`{prefix}{key}`"
            homes.append((name, inner))
            visit(inner, "" if key == "rules" else f"{prefix}{key}.")

    visit(RulesFile, "")
    return homes


def _describe(value: Scalar | tuple[Node, ...] | dict[str, Node]) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"'{value[:57]}...'" if len(value) > 60 else f"'{value}'"
    if isinstance(value, tuple):
        return "a list"
    if isinstance(value, dict):
        return "a mapping"
    return str(value)


def _is_scalar(node: Node) -> bool:
    return isinstance(node.value, bool | int | float)


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _or(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + (" or " if len(words) > 1 else "") + words[-1] if words else ""
