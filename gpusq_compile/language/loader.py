"""Reads rules: a file, a shipped name or a Python mapping, with everything it extends."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, get_args

from pydantic import BaseModel, ValidationError

from gpusq_compile.errors import InputError, Location, nearest, relative_to_cwd
from gpusq_compile.language.document import (
    MAX_BYTES,
    Document,
    Node,
    dump_yaml,
    parse_mapping,
    parse_yaml,
)
from gpusq_compile.language.problems import raise_together, translate
from gpusq_compile.language.schema import LANGUAGE_VERSION, Rule, RulesFile, Target, Verify
from gpusq_compile.language.training import Calibration, Finetune, Phase, QuantizePhase
from gpusq_compile.rules import shipped_rules

MAPPING_NAME: Final = "<rules>"
_YAML_SUFFIXES: Final = (".yaml", ".yml")


@dataclass(frozen=True)
class _Dependent:
    """`key` has an effect only where the key `other` of the same block has one of `values`."""

    block: tuple[str, ...]
    model: type[BaseModel]
    key: str
    other: str
    values: tuple[str, ...]

    def chosen(self, selector: Node | None) -> str | None:
        """The value of `other` that holds; None where the file has an unknown one."""
        field = self.model.model_fields[self.other]
        value = selector.value if selector else field.default
        return str(value) if value in get_args(field.annotation) else None


_USED_ONLY_WITH: Final = (
    _Dependent(("calibration",), Calibration, "percentile", "activation", ("percentile",)),
    *(
        _Dependent(("finetune", phase), model, key, "schedule", schedules)
        for phase, model in (("sparse", Phase), ("quantize", QuantizePhase))
        for key, schedules in (
            ("milestones", ("multistep",)),
            ("step_size", ("step",)),
            ("decay", ("multistep", "step")),
            ("power", ("polynomial",)),
        )
    ),
)


@dataclass(frozen=True)
class LocatedRule:
    """A rule and where it was written."""

    rule: Rule
    location: Location


@dataclass(frozen=True)
class Rules:
    """Rules with everything they extend, as the compiler uses them.

    `sources` are the files that were read, the outermost parent first; `<rules>` stands for a
    Python mapping. `passes_at` is where the order of the passes was written, if it was,
    and `roles_at` where each role's names were.
    """

    file: RulesFile
    rules: tuple[LocatedRule, ...]
    sources: tuple[str, ...]
    passes_at: Location | None = None
    roles_at: Mapping[str, Location] = field(default_factory=dict)

    @property
    def target(self) -> Target:
        """What the result is built for."""
        return self.file.target

    @property
    def scope(self) -> str | None:
        """Dotted name of the submodule to compile; None for the whole model."""
        return self.file.scope

    @property
    def calibration(self) -> Calibration:
        """How scales are found from data."""
        return self.file.calibration

    @property
    def finetune(self) -> Finetune:
        """The two phases of the distillation."""
        return self.file.finetune

    @property
    def verify(self) -> Verify:
        """Limits of the check on the final ONNX file."""
        return self.file.verify

    def as_dict(self) -> dict[str, Any]:
        """The resolved document as plain values; `load_rules` reads it back to the same rules."""
        document: dict[str, Any] = self.file.model_dump(mode="json", exclude_none=True)
        if not document["roles"]:
            del document["roles"]
        for unused in _USED_ONLY_WITH:
            block: Any = document
            for part in unused.block:
                block = block[part]
            if isinstance(block, dict) and block[unused.other] not in unused.values:
                block.pop(unused.key, None)
        return document

    def to_yaml(self) -> str:
        """The resolved document as YAML text."""
        return dump_yaml(self.as_dict())


def load_rules(spec: str | Path | Mapping[str, Any]) -> Rules:
    """The rules of a shipped name (`int8`), a path to a YAML file, or a mapping.

    A string that is a shipped name is that; a file of the same name is `./int8`. Relative paths
    in `extends` start at the folder of the file that says so, in a mapping at the current folder.

    Raises InputError with the place of what is wrong. Several errors of the content are raised
    together as `problems.InputErrors`. The codes are in `problems.CODES`.
    """
    documents = _read_chain(spec)
    files = [document.root.at.file for document in documents]
    problems = [problem for document in documents for problem in document.problems]
    root = documents[0].root
    for document in documents[1:]:
        root = _merge(root, document.root)
    assert isinstance(root.value, dict)
    content = {key: node for key, node in root.value.items() if key not in ("extends", "version")}
    resolved = replace(root, value=content)
    file = None
    try:
        file = RulesFile.model_validate({**resolved.plain(), "version": LANGUAGE_VERSION})
    except ValidationError as error:
        found = translate(error.errors(include_url=False, include_input=False), resolved)
        problems = _without_echo(problems, found)
    problems += _unused_keys(resolved, files)
    if not problems and "rules" not in content:
        problems.append(
            InputError(
                "no-rules",
                "there are no rules, so there is nothing to do",
                location=documents[-1].root.at,
                hint="add `rules:` with a list of rules, or `extends: int8`",
            )
        )
    raise_together(problems, files)
    assert file is not None
    located = zip(file.rules, content["rules"].items(), strict=True)
    rules = tuple(LocatedRule(rule, node.at) for rule, node in located)
    order = content.get("passes")
    given = content["roles"].value if "roles" in content else {}
    roles_at = {role: node.at for role, node in given.items()} if isinstance(given, dict) else {}
    return Rules(file, rules, tuple(files), order.at if order else None, roles_at)


def _without_echo(written: Sequence[InputError], found: Sequence[InputError]) -> list[InputError]:
    """Both lists, with one complaint for each place where the text as written was wrong too."""
    wrong_pattern = {error.location for error in found if error.code == "unknown-pattern"}
    kept = [error for error in written if error.location not in wrong_pattern]
    places = {error.location for error in kept}
    return kept + [error for error in found if error.location not in places]


def _read_chain(spec: str | Path | Mapping[str, Any]) -> list[Document]:
    """The document of `spec` after all it extends, each once and the outermost parent first."""
    documents: list[Document] = []
    read: set[Path] = set()

    def read_with_parents(
        spec: str | Path | Mapping[str, Any],
        base: Path,
        asked_at: Location | None,
        children: tuple[Path, ...],
    ) -> None:
        if isinstance(spec, Mapping):
            document = parse_mapping(spec, MAPPING_NAME)
        else:
            path = _find(spec, base, asked_at)
            identity = path.resolve()
            if identity in children:
                chain = [*children[children.index(identity) :], identity]
                raise InputError(
                    "extends-cycle",
                    "the file extends itself: "
                    + " -> ".join(relative_to_cwd(file) for file in chain),
                    location=asked_at,
                )
            if identity in read:
                return
            read.add(identity)
            document = _read_file(path)
            base, children = path.parent, (*children, identity)
        document = _checked_alone(document)
        for parent in _parents(document):
            read_with_parents(str(parent.value), base, parent.at, children)
        documents.append(document)

    read_with_parents(spec, Path(), None, ())
    return documents


def _parents(document: Document) -> Sequence[Node]:
    """The names and paths that a document extends, in their order."""
    extends = document.root.get("extends")
    if extends is None:
        return ()
    parents = extends.items() if isinstance(extends.value, tuple) else (extends,)
    wrong = [parent for parent in parents or (extends,) if not isinstance(parent.value, str)]
    if wrong:
        raise InputError(
            "wrong-type",
            "extends: expected a shipped name or a path, or a list of them",
            location=wrong[0].at,
            hint="write `extends: int8`, or remove the key",
        )
    names = [parent.value for parent in parents]
    for index, parent in enumerate(parents):
        if parent.value in names[:index]:
            message = f"extends: '{parent.value}' is listed twice"
            raise InputError("duplicate-value", message, location=parent.at)
    return parents


def _shipped_hint(text: str, shipped: Mapping[str, Path]) -> str:
    """The nearest shipped name, and the others; those of a folder only where it is named."""
    by_leaf = {name.rpartition("/")[2]: name for name in shipped}
    close = nearest(text, [*shipped, *by_leaf])
    start = f"did you mean '{by_leaf.get(close, close)}'? " if close else ""
    folder = text.partition("/")[0]
    listed = [name for name in shipped if "/" not in name or name.startswith(f"{folder}/")]
    folders = {name.partition("/")[0] for name in shipped if name not in listed}
    return f"{start}valid: {', '.join([*listed, *(f'{name}/...' for name in sorted(folders))])}"


def _find(spec: str | Path, base: Path, asked_at: Location | None) -> Path:
    """The file that `spec` names; it exists and is no folder."""
    shipped = shipped_rules()
    if isinstance(spec, str) and spec in shipped:
        return shipped[spec]
    path = base / Path(spec).expanduser()
    text = os.fspath(spec)
    text = text if len(text) <= 200 else text[:197] + "..."
    try:
        if path.is_dir():
            raise InputError(
                "rules-is-folder",
                f"'{text}' is a folder; expected a rules file",
                location=asked_at,
                hint=f"name one file in it, or a shipped one; {_shipped_hint('', shipped)}",
            )
        if path.exists():
            return path
    except (OSError, ValueError) as error:
        raise InputError(
            "rules-file-unreadable",
            f"cannot look at '{text}': {getattr(error, 'strerror', None) or error}",
            location=asked_at,
        ) from None
    is_path = isinstance(spec, Path) or path.suffix in _YAML_SUFFIXES
    if not is_path:
        raise InputError(
            "unknown-rules-name",
            f"'{text}' is neither a file nor a shipped rules file",
            location=asked_at,
            hint=_shipped_hint(text, shipped),
        )
    raise InputError(
        "rules-file-missing",
        f"the rules file '{text}' does not exist",
        location=asked_at,
        hint=_missing_hint(path, shipped),
    )


def _missing_hint(path: Path, shipped: Mapping[str, Path]) -> str:
    if path.stem in shipped:
        return f"did you mean the shipped rules? name them: '{path.stem}'"
    try:
        beside = [p.name for p in path.parent.iterdir() if p.suffix in _YAML_SUFFIXES]
    except OSError:
        return f"the folder '{path.parent}' does not exist either"
    close = nearest(path.name, beside)
    if close:
        return f"did you mean '{path.parent / close}'?"
    return _shipped_hint(path.stem, shipped)


def _read_file(path: Path) -> Document:
    name = relative_to_cwd(path)
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            "rules-file-unreadable", f"cannot read it: {reason}", location=Location(name)
        ) from None
    if len(data) > MAX_BYTES:
        raise InputError(
            "rules-file-too-large",
            f"it has more than {MAX_BYTES} bytes; is it a rules file?",
            location=Location(name),
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line_start = before.rfind(b"\n") + 1
        column = len(before[line_start:].decode("utf-8", errors="replace")) + 1
        raise InputError(
            "rules-file-not-utf8",
            f"the byte 0x{data[error.start]:02x} is not UTF-8 text",
            location=Location(name, before.count(b"\n") + 1, column),
            hint="save the file as UTF-8",
        ) from None
    return parse_yaml(text, name)


def _checked_alone(document: Document) -> Document:
    """Checks what concerns one file, before another one is merged with it."""
    root = document.root
    if not isinstance(root.value, dict):
        raise InputError(
            "rules-not-a-mapping",
            "expected a mapping that starts with `version: 1`",
            location=root.at,
        )
    problems = list(document.problems)
    version = root.get("version")
    if version is None:
        problems.append(
            InputError(
                "missing-key",
                "the key 'version' is missing",
                location=root.at,
                hint=f"add `version: {LANGUAGE_VERSION}` as the first line",
            )
        )
    elif type(version.value) is not int or version.value != LANGUAGE_VERSION:
        # Nothing else in a file of another language is worth a complaint.
        raise_together((p for p in problems if p.location == version.at), ())
        raise _unknown_version(version)
    first_at: dict[str, Location] = {}
    rules = root.get("rules")
    for rule in rules.items() if rules else ():
        rule_id = rule.get("id")
        if rule_id is None or not isinstance(rule_id.value, str):
            continue
        if rule_id.value in first_at:
            first = first_at[rule_id.value]
            problems.append(
                InputError(
                    "duplicate-id",
                    f"the id '{rule_id.value}' is taken; first at {first}",
                    location=rule_id.at,
                    hint="give each rule an id of its own",
                )
            )
        first_at.setdefault(rule_id.value, rule_id.at)
    return Document(root, tuple(problems))


def _unknown_version(version: Node) -> InputError:
    value = version.value
    hint = f"write `version: {LANGUAGE_VERSION}`"
    if isinstance(value, str) and value == str(LANGUAGE_VERSION):
        found, hint = f"the text '{value}'", f"remove the quotes: `version: {LANGUAGE_VERSION}`"
    elif isinstance(value, dict | tuple):
        found = "a block"
    else:
        found = "nothing" if value is None else f"'{value}'"
        newer = type(value) is int and value > LANGUAGE_VERSION
        hint = "a newer compiler may read the file" if newer else hint
    return InputError(
        "unknown-version",
        f"version: found {found}; this compiler reads version {LANGUAGE_VERSION}",
        location=version.at,
        hint=hint,
    )


def _merge(parent: Node, child: Node) -> Node:
    """`parent` with what `child` says: mappings deeply, rules by id, all else replaced."""
    assert isinstance(parent.value, dict)
    assert isinstance(child.value, dict)
    merged = dict(parent.value)
    for key, node in child.value.items():
        old = merged.get(key)
        if old is not None and isinstance(old.value, dict) and isinstance(node.value, dict):
            merged[key] = _merge(old, node)
        elif (
            key == "rules"
            and old is not None
            and isinstance(old.value, tuple)
            and isinstance(node.value, tuple)
        ):
            merged[key] = replace(node, value=_merge_rules(old.value, node.value))
        else:
            merged[key] = node
    return replace(child, value=merged)


def _merge_rules(parent: Sequence[Node], child: Sequence[Node]) -> tuple[Node, ...]:
    rules = list(parent)
    places = {_rule_id(rule): index for index, rule in enumerate(parent) if _rule_id(rule)}
    for rule in child:
        index = places.get(_rule_id(rule))
        if index is None:
            rules.append(rule)
        else:
            rules[index] = rule
    return tuple(rules)


def _rule_id(rule: Node) -> str | None:
    node = rule.get("id")
    return node.value if node is not None and isinstance(node.value, str) else None


def _unused_keys(root: Node, files: Sequence[str]) -> list[InputError]:
    """Keys without effect, unless a later file took the effect from an earlier one's key."""
    problems = []
    for unused in _USED_ONLY_WITH:
        block: Node | None = root
        for part in unused.block:
            block = block.get(part) if block else None
        node = block.get(unused.key) if block else None
        selector = block.get(unused.other) if block else None
        chosen = unused.chosen(selector)
        if node is None or node.value in (None, "none") or chosen in (None, *unused.values):
            continue
        if selector is not None and _order(selector, files) > _order(node, files):
            continue
        others = " or ".join(f"`{unused.other}: {value}`" for value in unused.values)
        problems.append(
            InputError(
                "unused-key",
                f"{unused.key} has no effect with `{unused.other}: {chosen}`",
                location=node.key_at or node.at,
                hint=f"remove it, or write {others}",
            )
        )
    return problems


def _order(node: Node, files: Sequence[str]) -> int:
    # A mapping's places are paths of keys, and it is always the last that was read.
    return files.index(node.at.file) if node.at.file in files else len(files)
