"""`docs/rules.md`: the reference of the rules language and of the shipped rule files.

Keys, types, defaults and descriptions come from the models; what a shipped file is for comes from
the comment at its top, and why each of its rules is there from the comment above the rule.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from gpusq_compile.language.document import dump_yaml
from gpusq_compile.language.json_schema import build_schema
from gpusq_compile.language.loader import Rules, load_rules
from gpusq_compile.language.matching import ACTIONS, condition_texts
from gpusq_compile.language.problems import CODES
from gpusq_compile.language.schema import (
    Distill,
    Match,
    Quantize,
    RoleNames,
    Rule,
    RulesFile,
    SizePredicate,
    Sparsity,
    Target,
    Verify,
)
from gpusq_compile.language.training import (
    Calibration,
    Finetune,
    Loss,
    Phase,
    QuantizePhase,
    Reconstruct,
)
from gpusq_compile.rules import shipped_rules

REFERENCE_PATH: Final = Path(__file__).resolve().parents[2] / "docs" / "rules.md"

_SECTIONS: Final[tuple[tuple[str, type[BaseModel]], ...]] = (
    ("The file", RulesFile),
    ("target", Target),
    ("roles", RoleNames),
    ("A rule", Rule),
    ("match", Match),
    ("Sizes", SizePredicate),
    ("sparsity", Sparsity),
    ("quantize", Quantize),
    ("distill", Distill),
    ("calibration", Calibration),
    ("finetune", Finetune),
    ("finetune.loss", Loss),
    ("finetune.sparse", Phase),
    ("finetune.quantize", QuantizePhase),
    ("finetune.reconstruct", Reconstruct),
    ("verify", Verify),
)

_INTRODUCTION: Final = """\
<!-- Written by `python -m gpusq_compile.language`; edit the models instead. -->
# Rules

A rules file says what happens to which layers of a model, for which target, and with how much
fine-tune. It is YAML 1.2, and every key that the language does not know is an error.

```yaml
version: 1
extends: int8                       # a shipped name, or a path relative to this file
rules:
  - id: dense-first-block
    match: {name: "blocks.0.**"}    # globs and patterns need their quotes
    sparsity: none
finetune:
  sparse: {epochs: 5}
```

    gpusq-compile model.py --rules int8            # a shipped file
    gpusq-compile model.py --rules my-rules.yaml   # a file of your own

From Python, `compile_model(..., rules=...)` takes the same names and paths, or a mapping with the
same keys.

## How rules decide

- Rules are read in order. For each of the actions `sparsity`, `quantize` and `distill`, the last
  rule that matches a layer and names the action decides, with its whole block. The word `none`
  switches the action off; an action that a rule does not name is left to the other rules.
- Within `match` every key must hold; of a list any entry may.
- In a glob `*` and `?` stay within one dotted part of a name, `**` crosses parts and `**.` also
  stands for no part: `"**.qkv"` is every layer called `qkv`. A pattern that starts with `re:` is a
  Python regular expression. Both are compared with the whole name, case-sensitively.
- A rule that matches no layer is an error, unless it is `optional: true`. A rule whose every
  decision later rules override is a warning.
- What a rule asks for and a layer's shape or the target does not allow is not done, and reported
  with its reason.
- A file that `extends` another one starts from its rules. A rule with an inherited id replaces
  that rule in its place, others are added at the end; all other blocks are merged key by key, and
  the file that extends wins.

For completion in an editor, write the schema to a file with
`python -m gpusq_compile.language --print > rules.schema.json` and start the rules
with `# yaml-language-server: $schema=rules.schema.json`.
"""


_RECIPES: Final = """\
### `paper/...`

The training of each model in Table 1 of GPUSQ-ViT's appendix, on top of `int8`. With
`extends: [int4, paper/NAME]` a file of your own has the same in INT4. AdamW throughout, with a
momentum (first beta) of 0.9, and both phases alike.

| file | what it is for | epochs | images per step | rate | weight decay | schedule |
|---|---|---|---|---|---|---|
"""


def reference_text() -> str:
    """The text of docs/rules.md. Raises ValueError for a shipped file without its comments."""
    parts = [_INTRODUCTION, "## Keys\n"]
    schema = build_schema()
    parts += [_section(title, model, schema) for title, model in _SECTIONS]
    parts.append("## Shipped rule files\n")
    shipped = shipped_rules()
    parts += [_shipped_section(name, path) for name, path in shipped.items() if "/" not in name]
    parts.append(_recipes({name: path for name, path in shipped.items() if "/" in name}))
    parts.append("## Error codes\n")
    parts.append("".join(f"- `{code}`: {meaning}\n" for code, meaning in sorted(CODES.items())))
    return "\n".join(parts)


def _section(title: str, model: type[BaseModel], schema: dict[str, Any]) -> str:
    own = schema if model is RulesFile else schema["$defs"][model.__name__]
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, field in model.model_fields.items():
        kind = _cell(_type_text(own["properties"][key]))
        default = "needed" if field.is_required() else _default_text(field.default)
        rows.append(f"| `{key}` | {kind} | {default} | {_cell(field.description or '')} |")
    description = "\n\n".join(
        " ".join(paragraph.split()) for paragraph in (model.__doc__ or "").split("\n\n")
    )
    heading = f"`{title}`" if title == title.lower() else title
    return f"### {heading}\n\n{description}\n\n" + "\n".join(rows) + "\n"


def _default_text(default: Any) -> str:
    if default is None or default == ():
        return ""
    if isinstance(default, BaseModel):
        return "its defaults"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, tuple):
        return f"`[{', '.join(default)}]`"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def _type_text(schema: dict[str, Any]) -> str:
    """A property's JSON schema in words."""
    branches = schema.get("anyOf") or schema.get("oneOf")
    if branches:
        lists = [branch for branch in branches if branch.get("type") == "array"]
        if lists and lists[0]["items"] in branches:
            return f"{_type_text(lists[0]['items'])}; or a list"
        texts = [_type_text(branch) for branch in branches if branch != {"type": "null"}]
        return " or ".join(texts)
    if "$ref" in schema:
        names = {model.__name__: title for title, model in _SECTIONS}
        title = names[schema["$ref"].rpartition("/")[2]]
        return f"[block](#{title.lower().replace(' ', '-').replace('.', '')})"
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema["type"] == "array":
        return f"list of {_type_text(schema['items'])}"
    bounds = {
        "minimum": "at least",
        "exclusiveMinimum": "greater than",
        "maximum": "at most",
        "exclusiveMaximum": "less than",
    }
    limits = [f"{words} {schema[key]:g}" for key, words in bounds.items() if key in schema]
    names_of = {"string": "text", "boolean": "`true`, `false`"}
    kind = names_of.get(schema["type"], schema["type"])
    return f"{kind}, {', '.join(limits)}" if limits else kind


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _shipped_section(name: str, path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    rules = load_rules(path)
    purpose = _comment(lines[: _first_code_line(lines)])
    if not purpose:
        raise ValueError(f"{path.name}: the comment at the top that says its purpose is missing")
    rows = ["| rule | layers | what it does | why |", "|---|---|---|---|"]
    own_file = rules.sources[-1]
    for located in rules.rules:
        if located.location.file != own_file:
            rows.append(_row(located.rule, "inherited"))
            continue
        start = (located.location.line or 1) - 1
        above = start
        while above > 0 and lines[above - 1].strip().startswith("#"):
            above -= 1
        why = " ".join(_comment(lines[above:start]).split())
        if not why:
            raise ValueError(f"{path.name}: rule '{located.rule.id}' has no comment above it")
        rows.append(_row(located.rule, why))
    return f"### `{name}`\n\n{purpose}\n\n" + "\n".join(rows) + "\n\n" + _budget(rules)


def _recipes(shipped: dict[str, Path]) -> str:
    """One row for each file that only says how to train."""
    rows = []
    for name, path in shipped.items():
        lines = path.read_text(encoding="utf-8").splitlines()
        purpose = _comment(lines[: _first_code_line(lines)]).partition(":")[0]
        if not purpose:
            raise ValueError(
                f"{path.name}: the comment at the top that says its purpose is missing"
            )
        phase = load_rules(path).finetune.sparse
        assert isinstance(phase, Phase)
        when = ""
        if phase.milestones is not None:
            when = f" at {' and '.join(f'{epoch:g}' for epoch in phase.milestones)}"
        elif phase.step_size is not None:
            when = f" every {phase.step_size:g}"
        rows.append(
            f"| `{name}` | {purpose} | {phase.epochs:g} | {phase.batch_size} | {phase.lr:g} | "
            f"{phase.weight_decay:g} | {phase.schedule}{when} |\n"
        )
    return _RECIPES + "".join(rows)


def _row(rule: Rule, why: str) -> str:
    layers = "; ".join(f"`{text}`" for text in condition_texts(rule.match))
    actions = []
    for action in ACTIONS:
        block = getattr(rule, action)
        if isinstance(block, BaseModel):
            values = dump_yaml(block.model_dump(exclude_unset=True)).strip().replace("\n", ", ")
            actions.append(f"`{action}: {{{values}}}`")
        elif block is not None:
            actions.append(f"`{action}: none`")
    return f"| `{rule.id}` | {_cell(layers)} | {_cell('; '.join(actions))} | {_cell(why)} |"


def _budget(rules: Rules) -> str:
    phases = []
    for name in ("sparse", "quantize"):
        phase = getattr(rules.finetune, name)
        said = "none" if phase == "none" else f"{phase.epochs:g} epochs at a rate of {phase.lr:g}"
        phases.append(f"{name}: {said}")
    target = rules.target
    return (
        f"Target: {target.runtime}, {', '.join(target.compute)}, {target.precision}. "
        f"Fine-tune: {'; '.join(phases)}.\n"
    )


def _first_code_line(lines: list[str]) -> int:
    for index, line in enumerate(lines):
        if not line.startswith("#"):
            return index
    return len(lines)


def _comment(lines: list[str]) -> str:
    """The text of comment lines, as paragraphs."""
    text = [line.strip().removeprefix("#").strip() for line in lines]
    return "\n".join(text).strip()
