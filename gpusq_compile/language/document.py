"""A YAML document or a Python mapping as a tree of values that remember where they were written.

Only the node tree of the YAML library is used and plain values are made from it here, so no tag
can construct an object. Scalars are read as YAML 1.2 says, whatever a `%YAML` line asks for.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from ruamel.yaml import YAML
from ruamel.yaml.composer import ComposerError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from gpusq_compile.errors import InputError, Location, did_you_mean

MAX_BYTES: Final = 1_000_000
MAX_NODES: Final = 20_000
MAX_DEPTH: Final = 32

Scalar = bool | int | float | str | None

_CORE: Final = "tag:yaml.org,2002:"
_PLAIN_TAGS: Final = frozenset(
    _CORE + name
    for name in ("str", "int", "float", "bool", "null", "map", "seq", "merge", "timestamp", "value")
)
_RATIO: Final = re.compile(r"\d+:\d+")
_SAFE_PLAIN: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Node:
    """A value with its place; children of a sequence or mapping are nodes too."""

    value: Scalar | tuple[Node, ...] | dict[str, Node]
    at: Location
    key_at: Location | None = None
    quoted: bool = False
    # The column where the text starts, if the file holds it letter by letter on one line.
    text_column: int | None = None

    def plain(self) -> Any:
        """The value without places: dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, tuple):
            return [child.plain() for child in self.value]
        return self.value

    def get(self, key: str) -> Node | None:
        """The child of a mapping with this key, or None."""
        return self.value.get(key) if isinstance(self.value, dict) else None

    def items(self) -> tuple[Node, ...]:
        """The children of a sequence, or nothing."""
        return self.value if isinstance(self.value, tuple) else ()


@dataclass(frozen=True)
class Document:
    """The root of a document and what was wrong with it that does not stop a further look."""

    root: Node
    problems: tuple[InputError, ...]


def parse_yaml(text: str, file: str) -> Document:
    """The document in `text`; `file` is the name that locations show.

    Raises InputError: `yaml-syntax`, `unquoted-glob`, `unknown-alias`, `rules-file-empty`,
    `rules-file-too-large`. Tags, duplicate keys and an unquoted `2:4` become problems.
    """
    try:
        node = YAML(typ="safe", pure=True).compose(text)
    except RecursionError:
        raise _too_large(file, "it is nested too deeply") from None
    except YAMLError as error:
        raise _syntax_error(error, text, file) from None
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
        # The library's own checks of `%YAML` versions and of escapes such as "\Uffffffff".
        raise InputError(
            "yaml-syntax",
            f"the file is not YAML: a directive or an escape cannot be read ({error})",
            location=Location(file),
        ) from None
    reader = _Reader(file)
    root = None if node is None else reader.node(node, depth=0)
    if root is None or (root.value is None and not reader.problems):
        raise InputError(
            "rules-file-empty",
            "the file says nothing; expected a mapping that starts with `version: 1`",
            location=Location(file),
        )
    return Document(root, tuple(reader.problems))


def parse_mapping(data: Mapping[Any, Any], name: str) -> Document:
    """The document in a Python mapping; locations show the path of keys behind `name`.

    Raises InputError (`rules-file-too-large`). Values of other types become problems.
    """
    problems: list[InputError] = []

    def node(value: Any, path: str, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise _too_large(name, "it is nested too deeply, or contains itself")
        at = Location(path)
        if isinstance(value, Mapping):
            children = {}
            for key, child in value.items():
                if not isinstance(key, str):
                    problems.append(
                        InputError("wrong-type", f"{key!r} is no text key", location=at)
                    )
                made = node(child, f"{path}.{key}", depth + 1)
                children[str(key)] = replace(made, key_at=made.at)
            return Node(children, at)
        if isinstance(value, list | tuple):
            items = (node(child, f"{path}[{i}]", depth + 1) for i, child in enumerate(value))
            return Node(tuple(items), at)
        if isinstance(value, Path):
            return Node(str(value), at, quoted=True)
        if value is None or type(value) in (bool, int, float, str):
            return Node(value, at, quoted=isinstance(value, str))
        problems.append(
            InputError(
                "wrong-type",
                f"found a value of type {type(value).__name__}; expected a mapping, a list, text, "
                "a number, a truth value or None",
                location=at,
            )
        )
        return Node(None, at)

    return Document(node(data, name, 0), tuple(problems))


def dump_yaml(data: Mapping[str, Any]) -> str:
    """`data` as YAML 1.2 text that `parse_yaml` reads back to the same values."""
    stream = io.StringIO()
    yaml = YAML()
    yaml.width = 100
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.dump(_quoted(data), stream)
    return stream.getvalue()


def _quoted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _quoted(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_quoted(child) for child in value]
    is_word = isinstance(value, str) and _SAFE_PLAIN.fullmatch(value)
    if isinstance(value, str) and (not is_word or value.lower() in ("null", "true", "false")):
        return DoubleQuotedScalarString(value)
    return value


def _too_large(file: str, why: str) -> InputError:
    return InputError("rules-file-too-large", why, location=Location(file))


class _Reader:
    """Turns the YAML library's nodes into ours and collects problems on the way."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[InputError] = []
        self.count = 0

    def node(self, source: Any, depth: int) -> Node:
        self.count += 1
        if depth > MAX_DEPTH:
            raise _too_large(
                self.file,
                f"it is nested more than {MAX_DEPTH} levels deep, or an alias contains itself",
            )
        if self.count > MAX_NODES:
            raise _too_large(self.file, f"it holds more than {MAX_NODES} values, aliases included")
        at = self.place(source)
        tag = str(source.tag)
        if tag not in _PLAIN_TAGS:
            self.tag_problem(source)
            return Node(None, at)
        if isinstance(source, MappingNode):
            return Node(dict(self.entries(source, depth)), at)
        if isinstance(source, SequenceNode):
            return Node(tuple(self.node(item, depth + 1) for item in source.value), at)
        assert isinstance(source, ScalarNode)
        return self.scalar(source, tag, at)

    def entries(self, source: MappingNode, depth: int) -> Iterator[tuple[str, Node]]:
        """The keys and values: those that `<<` brings in first, so that written ones win."""
        written: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        for key_source, value_source in source.value:
            key_at = self.place(key_source)
            value = self.node(value_source, depth + 1)
            if not self.is_key(key_source, source):
                continue
            key = str(key_source.value)
            if key_source.style is None and key == "<<":
                for block in value.items() or (value,):
                    if not isinstance(block.value, dict):
                        self.problem(
                            value.at, "wrong-type", "`<<` takes a mapping or a list of mappings", ""
                        )
                        continue
                    merged = {**block.value, **merged}
            elif key in written:
                first = written[key].key_at
                self.problem(
                    key_at,
                    "duplicate-key",
                    f"the key '{key}' is given twice; first in line {first.line if first else '?'}",
                    "remove one of the two",
                )
            else:
                is_absent = isinstance(value_source, ScalarNode) and not value_source.value
                at = key_at if is_absent and value.value is None else value.at
                written[key] = replace(value, key_at=key_at, at=at)
        return iter({**merged, **written}.items())

    def is_key(self, source: Any, mapping: MappingNode) -> bool:
        """Whether a key is plain text; if not, that is a problem."""
        if isinstance(source, ScalarNode) and str(source.tag) in _PLAIN_TAGS:
            return True
        if isinstance(source, ScalarNode):
            self.tag_problem(source)
        elif isinstance(source, MappingNode) and mapping.flow_style:
            self.problem(
                self.place(mapping),
                "wrong-type",
                "a mapping cannot be a key, and a template such as {{ x }} is not filled in",
                "put text in quotes, or remove a brace",
            )
        else:
            self.problem(self.place(source), "wrong-type", "a key must be text", "quote it")
        return False

    def tag_problem(self, source: Any) -> None:
        self.problem(
            self.place(source),
            "yaml-tag",
            f"the tag {_shown_tag(str(source.tag))} is not allowed: rules hold plain values, and "
            "nothing in them is ever run",
            "remove the tag",
        )

    def scalar(self, source: ScalarNode, tag: str, at: Location) -> Node:
        text = str(source.value)
        if source.style is not None:
            opened = source.start_mark.column + 1
            end = source.end_mark
            # One line and two quotes longer than the text: nothing was escaped or folded.
            same = (
                source.style in ("'", '"')
                and end.line == source.start_mark.line
                and end.column - source.start_mark.column == len(text) + 2
            )
            return Node(text, at, quoted=True, text_column=opened + 1 if same else None)
        if _RATIO.fullmatch(text):
            self.problem(
                at,
                "unquoted-pattern",
                f"{text} without quotes is a number in base 60 to some YAML readers",
                f'quote it: "{text}"',
            )
        return Node(_scalar_value(text, tag), at, text_column=at.column)

    def place(self, source: Any) -> Location:
        mark = source.start_mark
        return Location(self.file, mark.line + 1, mark.column + 1)

    def problem(self, at: Location, code: str, message: str, hint: str) -> None:
        self.problems.append(InputError(code, message, location=at, hint=hint or None))


def _scalar_value(text: str, tag: str) -> Scalar:
    """A plain scalar's value by the YAML 1.2 core schema; text where it is none of the others."""
    lowered = text.lower()
    if tag == _CORE + "null":
        return None
    if tag == _CORE + "bool" and lowered in ("true", "false"):
        return lowered == "true"
    if tag == _CORE + "int":
        digits = lowered.replace("_", "").replace("0o", "0O", 1)
        for prefix, base in (("0O", 8), ("0x", 16), ("0b", 2)):
            if digits.startswith(prefix):
                return _number(text, lambda t, base=base: int(t[2:], base), digits)
        return _number(text, int, digits)
    if tag == _CORE + "float":
        digits = lowered.replace("_", "")
        sign = -1.0 if digits.startswith("-") else 1.0
        if digits.lstrip("+-") == ".inf":
            return sign * math.inf
        return math.nan if digits == ".nan" else _number(text, float, digits)
    return text


def _number(text: str, convert: Any, digits: str) -> Scalar:
    try:
        number = convert(digits)
    except ValueError:
        return text
    assert isinstance(number, int | float)
    return number


def _shown_tag(tag: str) -> str:
    return "!!" + tag.removeprefix(_CORE) if tag.startswith(_CORE) else tag


_CANNOT_START: Final = re.compile(r"found character '(.+)' that cannot start any token")


def _syntax_error(error: YAMLError, text: str, file: str) -> InputError:
    """The library's complaint in words for the person who wrote the file."""
    if isinstance(error, ReaderError):
        before = text[: error.position]
        line = before.count("\n") + 1
        column = len(before) - (before.rfind("\n") + 1) + 1
        return InputError(
            "yaml-syntax",
            f"the character {_character(error.character)!r} is not allowed in YAML",
            location=Location(file, line, column),
        )
    if not isinstance(error, MarkedYAMLError):
        return InputError("yaml-syntax", f"the file is not YAML: {error}", location=Location(file))
    mark, opened = error.problem_mark, error.context_mark
    problem, context = error.problem or "", error.context or ""
    if context == "while scanning an alias" or problem.startswith("found undefined alias"):
        star = opened if context else mark
        return _alias_error(text, Location(file, star.line + 1, star.column + 1))
    mark = mark or opened
    place = Location(file, mark.line + 1, mark.column + 1) if mark else Location(file)
    message, hint = f"{problem} {context}".strip() or "the file is not YAML", None
    wrong_start = _CANNOT_START.fullmatch(problem)
    indentation = "indent the keys of one block by the same number of spaces"
    if mark and re.match(r" *\t", _line(text, mark.line)):
        message, hint = "a tab cannot indent a line", "use spaces"
    elif wrong_start:
        message = f"a value cannot start with '{wrong_start[1]}'"
        hint = "put the value in quotes"
    elif problem == "mapping values are not allowed here":
        message = "a key is not allowed at this place: wrong indentation, or text with ': ' in it"
        hint = f"{indentation}, and put text that contains ': ' in quotes"
    elif problem.startswith("expected <block end>"):
        message, hint = "wrong indentation: the line fits no open block", indentation
    elif problem == "could not find expected ':'":
        message, hint = "a key without a value", "write `key: value`"
        place = Location(file, opened.line + 1, opened.column + 1)
    elif problem == "sequence entries are not allowed here":
        message, hint = "a list entry is not allowed at this place", "start it on a line of its own"
    elif problem.startswith("found unknown escape character"):
        message = f"{problem} in a text with double quotes"
        hint = "use single quotes, which keep every backslash: 're:blocks\\.\\d+'"
    elif context in ("while scanning a quoted scalar", "while scanning a double-quoted scalar"):
        message, hint = "a quote is opened here and never closed", "close it"
        place = Location(file, opened.line + 1, opened.column + 1)
    elif context in ("while parsing a flow sequence", "while parsing a flow mapping"):
        bracket = "[" if context.endswith("sequence") else "{"
        close = "]" if bracket == "[" else "}"
        message = (
            f"expected ',' or '{close}' for the '{bracket}' of line {opened.line + 1}, "
            f"column {opened.column + 1}"
        )
        hint = "close the bracket, or put text with one of ,[]{}: in quotes"
    elif isinstance(error, ComposerError) and "single document" in context:
        message, hint = "a second document starts here", "keep one document in the file"
    return InputError("yaml-syntax", message, location=place, hint=hint)


def _character(found: object) -> str:
    return chr(found) if isinstance(found, int) else str(found)


def _line(text: str, index: int) -> str:
    lines = text.splitlines()
    return lines[index] if index < len(lines) else ""


def _alias_error(text: str, place: Location) -> InputError:
    """`*name` where no anchor is called so: almost always a glob that lacks its quotes."""
    line = _line(text, (place.line or 1) - 1)
    found = re.match(r"\*[^\s,\]}#]*", line[(place.column or 1) - 1 :])
    word = found[0] if found else "*"
    anchors = re.findall(r"(?<!\S)&([A-Za-z0-9_-]+)", text)
    if anchors and re.fullmatch(r"\*[A-Za-z0-9_-]+", word):
        return InputError(
            "unknown-alias",
            f"{word} names no anchor of this file",
            location=place,
            hint=f'{did_you_mean(word[1:], anchors)}; a glob needs quotes: "{word}"',
        )
    return InputError(
        "unquoted-glob",
        f"{word} without quotes is a YAML alias, not a glob",
        location=place,
        hint=f'quote it: "{word}"',
    )
