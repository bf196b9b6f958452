"""The rules in the report: what each asks for, for the questions that are asked later."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpusq_compile.language.blocks import Block
from gpusq_compile.language.loader import Rules
from gpusq_compile.language.matching import ACTIONS, Candidate, file_line, unmet
from gpusq_compile.language.schema import Match


def rule_entries(rules: Rules) -> list[dict[str, Any]]:
    """Each rule in order: its id, its `file:line`, its match, and its actions as written."""
    return [
        {
            "id": located.rule.id,
            "at": file_line(located.location),
            "match": located.rule.match.model_dump(mode="json", exclude_none=True),
            "actions": {
                action: block.model_dump(mode="json", exclude_unset=True)
                if isinstance(block, Block)
                else block
                for action in ACTIONS
                if (block := getattr(located.rule, action)) is not None
            },
        }
        for located in rules.rules
    ]


def chain_of(
    hits: Iterable[str], rules: Sequence[Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any], tuple[str, ...]]]:
    """The rules that matched a layer, from its texts in the report, each with its actions that a
    later rule overrides."""
    by_text = {f"{rule['at']} {rule['id']}": rule for rule in rules}
    found = []
    for hit in hits:
        rule = next((r for text, r in by_text.items() if hit.startswith(f"{text}: ")), None)
        if rule is not None:
            lost = tuple(a for a in rule["actions"] if f"{a} (overridden)" in hit)
            found.append((rule, lost))
    return found


def misses(
    layer: Mapping[str, Any], rules: Sequence[Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any], str]]:
    """The rules that do not match a layer of the report, each with the condition that does not
    hold; none where the report does not say enough to be sure."""
    if "roles" not in layer:
        return []
    shape = layer["shape"]
    candidate = Candidate(
        name=layer["name"],
        op=layer["op"],
        roles=frozenset(layer["roles"]),
        module_class=layer["module"],
        in_features=shape[1] if len(shape) > 1 else None,
        out_features=shape[0] if shape else None,
    )
    matched = {f"{rule['at']} {rule['id']}" for rule, _ in chain_of(layer["rules"], rules)}
    found = []
    for rule in rules:
        condition = unmet(Match.model_validate(rule["match"]), candidate)
        if (condition is None) != (f"{rule['at']} {rule['id']}" in matched):
            return []  # A part of a split layer has the rules of the whole.
        if condition is not None:
            found.append((rule, condition))
    return found
