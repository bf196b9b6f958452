"""Decides what the rules do with each layer of a model, and says by which rules."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from gpusq_compile.errors import CheckFailed, InputError, Location
from gpusq_compile.language.loader import LocatedRule, Rules
from gpusq_compile.language.patterns import compile_pattern, is_glob
from gpusq_compile.language.problems import raise_together
from gpusq_compile.language.schema import (
    Distill,
    Match,
    Quantize,
    Rule,
    SizePredicate,
    Sparsity,
)

ACTIONS: Final = ("sparsity", "quantize", "distill")

_SHOWN_SIZES: Final = 4
_SHOWN_NAMES: Final = 8


@dataclass(frozen=True)
class Candidate:
    """A layer that rules can speak about.

    `op` and `roles` use the words of the language, `module_class` is the full dotted path of the
    class. `in_features` is the size of the reduction axis, `out_features` the number of output
    channels and `kernel_size` the longer side of a convolution's kernel, 1 of a linear; None where
    the layer has no such size.
    """

    name: str
    op: str
    roles: frozenset[str]
    module_class: str
    in_features: int | None
    out_features: int | None
    kernel_size: int | None = None


@dataclass(frozen=True)
class RuleHit:
    """A rule that matched a layer.

    `actions` are the ones it speaks about, `overridden` those of them on which a later rule has
    the last word.
    """

    rule: str
    location: Location
    actions: tuple[str, ...]
    overridden: tuple[str, ...] = ()

    def __str__(self) -> str:
        actions = [
            f"{action} (overridden)" if action in self.overridden else action
            for action in self.actions
        ]
        return f"{file_line(self.location)} {self.rule}: {', '.join(actions)}"


@dataclass(frozen=True)
class Decision:
    """What is to be done with one layer, and every rule that matched it, in order.

    An action is None where no rule names it, or the last word on it is `none`. `distill.every` is
    not applied here: which of the layers become taps is known once all of them are.
    """

    sparsity: Sparsity | None = None
    quantize: Quantize | None = None
    distill: Distill | None = None
    chain: tuple[RuleHit, ...] = ()


@dataclass(frozen=True)
class RuleWarning:
    """Something in the rules that works and is probably not meant."""

    code: str
    message: str
    location: Location

    def __str__(self) -> str:
        return f"{self.location}: warning[{self.code}]: {self.message}"


@dataclass(frozen=True)
class Decisions:
    """One decision for each candidate, in the candidates' order, and what looked odd."""

    decisions: tuple[Decision, ...]
    warnings: tuple[RuleWarning, ...]


def decide(rules: Rules, candidates: Sequence[Candidate]) -> Decisions:
    """What `rules` ask for on each of `candidates`, which are in graph order.

    For each action the last rule that matches and names it decides, with its whole block.

    Raises InputError (`rule-unmatched`) for a rule that matches nothing and is not optional, and
    CheckFailed (`expect-mismatch`) for one that matches another number than it expects.
    """
    matched = [
        [index for index, candidate in enumerate(candidates) if matches(rule.rule.match, candidate)]
        for rule in rules.rules
    ]
    _check_counts(rules, matched, candidates)
    deciders = _last_words(rules, matched, len(candidates))
    rules_of: list[list[int]] = [[] for _ in candidates]
    for rule_index, indexes in enumerate(matched):
        for index in indexes:
            rules_of[index].append(rule_index)
    decisions = []
    for index, rule_indexes in enumerate(rules_of):
        decider = deciders[index]
        hits = []
        for rule_index in rule_indexes:
            located = rules.rules[rule_index]
            actions = _actions(located)
            lost = tuple(action for action in actions if decider[action] != rule_index)
            hits.append(RuleHit(located.rule.id, located.location, actions, lost))
        blocks = {
            action: getattr(rules.rules[rule_index].rule, action)
            for action, rule_index in decider.items()
        }
        kept = {action: block for action, block in blocks.items() if block != "none"}
        decisions.append(Decision(**kept, chain=tuple(hits)))
    warnings = (*_shadowed(rules, matched, deciders), *_idle_patterns(rules, candidates))
    return Decisions(tuple(decisions), warnings)


def matches(match: Match, candidate: Candidate) -> bool:
    """Whether every condition of `match` holds for `candidate`."""
    return all(_holds(key, wanted, candidate) for key, wanted in _conditions(match))


def unmet(match: Match, candidate: Candidate) -> str | None:
    """The first condition of `match` that does not hold for `candidate`; None where all hold."""
    for key, wanted in _conditions(match):
        if not _holds(key, wanted, candidate):
            return _condition_text(key, wanted)
    return None


def file_line(location: Location) -> str:
    """`rules.yaml:12`, the short form that reports show."""
    return str(Location(location.file, location.line))


Condition = tuple[str, ...] | SizePredicate


def _conditions(match: Match) -> Iterator[tuple[str, Condition]]:
    return ((key, wanted) for key, wanted in match if wanted is not None)


def _holds(key: str, wanted: Condition, candidate: Candidate) -> bool:
    if isinstance(wanted, SizePredicate):
        return wanted.holds(getattr(candidate, key))
    if key == "op":
        return candidate.op in wanted
    if key == "role":
        return not candidate.roles.isdisjoint(wanted)
    return any(_pattern_holds(key, pattern, candidate) for pattern in wanted)


def _pattern_holds(key: str, pattern: str, candidate: Candidate) -> bool:
    name = candidate.name if key == "name" else candidate.module_class
    if key == "module" and is_glob(pattern) and "." not in pattern:
        name = name.rpartition(".")[2]
    return compile_pattern(pattern).fullmatch(name) is not None


def _actions(located: LocatedRule) -> tuple[str, ...]:
    return tuple(action for action in ACTIONS if getattr(located.rule, action) is not None)


def _last_words(rules: Rules, matched: Sequence[Sequence[int]], count: int) -> list[dict[str, int]]:
    """For each candidate, the index of the rule that decides each action."""
    deciders: list[dict[str, int]] = [{} for _ in range(count)]
    for rule_index, indexes in enumerate(matched):
        for index in indexes:
            for action in _actions(rules.rules[rule_index]):
                deciders[index][action] = rule_index
    return deciders


def _check_counts(
    rules: Rules, matched: Sequence[Sequence[int]], candidates: Sequence[Candidate]
) -> None:
    unmatched = []
    mismatched = []
    for located, indexes in zip(rules.rules, matched, strict=True):
        rule = located.rule
        if not indexes and rule.optional:
            continue
        if not indexes and rule.expect != 0:
            unmatched.append(_unmatched_error(located, candidates))
        elif rule.expect not in (None, len(indexes)):
            mismatched.append((located, [candidates[index].name for index in indexes]))
    raise_together(unmatched, rules.sources)
    if not mismatched:
        return
    texts = [
        f"rule '{located.rule.id}' expects {located.rule.expect} layers and matches {len(names)}"
        + (": " if names else "")
        + ", ".join([*names[:_SHOWN_NAMES], *(["..."] if len(names) > _SHOWN_NAMES else [])])
        for located, names in mismatched
    ]
    raise CheckFailed(
        "expect-mismatch",
        "; ".join(texts),
        location=mismatched[0][0].location,
        hint="correct the rule's match or its `expect`",
    )


def _unmatched_error(located: LocatedRule, candidates: Sequence[Candidate]) -> InputError:
    rule = located.rule
    text, hint = why_unmatched(rule, candidates)
    optional = "write `optional: true` if it need not match"
    return InputError(
        "rule-unmatched",
        text,
        location=located.location,
        hint=f"{hint}; or {optional}" if hint else optional,
    )


def why_unmatched(rule: Rule, candidates: Sequence[Candidate]) -> tuple[str, str | None]:
    """That a rule matches nothing, and how many layers each of its conditions leaves; a hint."""
    steps = []
    left: Sequence[Candidate] = candidates
    hint = None
    for key, wanted in _conditions(rule.match):
        before, left = left, [c for c in left if _holds(key, wanted, c)]
        steps.append(f"{_condition_text(key, wanted)} leaves {len(left)} of {len(before)}")
        if not left:
            hint = _hint(key, wanted, before, candidates) if before else None
            break
    why = f": {', '.join(steps)}" if candidates else ", for the model has no layer rules can match"
    return f"rule '{rule.id}' matches none of the {len(candidates)} layers{why}", hint


def condition_texts(match: Match) -> list[str]:
    """Each condition of `match` as it may be written in a rules file."""
    return [_condition_text(key, wanted) for key, wanted in _conditions(match)]


def _condition_text(key: str, wanted: Condition) -> str:
    if isinstance(wanted, SizePredicate):
        given = wanted.given()
        if set(given) == {"equals"}:
            return f"{key}: {given['equals']}"
        return f"{key}: {{{', '.join(f'{name}: {value}' for name, value in given.items())}}}"
    quoted = [f'"{word}"' if key in ("name", "module") else word for word in wanted]
    return f"{key}: {quoted[0] if len(quoted) == 1 else '[' + ', '.join(quoted) + ']'}"


def _hint(
    key: str, wanted: Condition, before: Sequence[Candidate], candidates: Sequence[Candidate]
) -> str:
    """What the layers that came this far have in place of what was wanted."""
    if isinstance(wanted, SizePredicate):
        sizes = sorted({size for c in before if (size := getattr(c, key)) is not None})
        if not sizes:
            return f"none of them has {key}"
        more = f" and {len(sizes) - _SHOWN_SIZES} more" if len(sizes) > _SHOWN_SIZES else ""
        return f"{key} found: {', '.join(map(str, sizes[:_SHOWN_SIZES]))}{more}"
    if key in ("op", "role"):
        there = {c.op for c in before} if key == "op" else {r for c in before for r in c.roles}
        return f"{key}s found: {', '.join(sorted(there)) or 'none'}"
    names = [c.name if key == "name" else c.module_class for c in before]
    for pattern in wanted:
        wider = pattern.replace("**", "*").replace("*", "**")
        if not is_glob(pattern) or wider == pattern:
            continue
        reached = sum(_pattern_holds(key, wider, c) for c in before)
        if reached:
            return f'* stays within one dotted part: "{wider}" would match {reached}'
    elsewhere = [c for c in candidates if _holds(key, wanted, c)]
    if elsewhere:
        others = "other layer has" if len(elsewhere) == 1 else "other layers have"
        return f"{len(elsewhere)} {others} such a {key}, '{elsewhere[0].name}' for one"
    close = _nearest_name(wanted, names)
    return f"the nearest {key} is '{close}'"


def _nearest_name(patterns: Sequence[str], names: Sequence[str]) -> str:
    def likeness(name: str) -> float:
        return max(difflib.SequenceMatcher(None, name, pattern).ratio() for pattern in patterns)

    return max(names, key=likeness)


def _shadowed(
    rules: Rules, matched: Sequence[Sequence[int]], deciders: Sequence[dict[str, int]]
) -> Iterator[RuleWarning]:
    for rule_index, (located, indexes) in enumerate(zip(rules.rules, matched, strict=True)):
        if not indexes:
            continue
        winners = {deciders[index][action] for index in indexes for action in _actions(located)}
        if rule_index in winners:
            continue
        by = ", ".join(f"'{rules.rules[winner].rule.id}'" for winner in sorted(winners))
        yield RuleWarning(
            "rule-shadowed",
            f"rule '{located.rule.id}' decides nothing: {by} overrides it on all "
            f"{len(indexes)} layers it matches",
            located.location,
        )


def _idle_patterns(rules: Rules, candidates: Sequence[Candidate]) -> Iterator[RuleWarning]:
    """Entries of a list of patterns that match no layer at all while others do."""
    for located in rules.rules:
        if located.rule.optional:
            continue
        for key in ("name", "module"):
            patterns: tuple[str, ...] = getattr(located.rule.match, key) or ()
            for pattern in patterns if len(patterns) > 1 else ():
                if not any(_pattern_holds(key, pattern, c) for c in candidates):
                    yield RuleWarning(
                        "pattern-unmatched",
                        f"rule '{located.rule.id}': {key} \"{pattern}\" matches no layer",
                        located.location,
                    )
