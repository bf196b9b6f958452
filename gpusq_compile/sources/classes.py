"""Which of a model's outputs a class of the data is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gpusq_compile.errors import InputError, nearest
from gpusq_compile.sources.model import Classes

Mapped = tuple[dict[int, int], str, bool]
"""The output of each class by its number in the data, how it was found, and whether that is
certain."""


def match_classes(
    classes: Classes, found: Mapping[int, str], origin: str, what: str, *, numbered: bool
) -> Mapped:
    """The output that each class of the data stands for.

    The first of these that can be:

    1. by name, where the model's classes have names and the data's are among them;
    2. by number: folders called `0`, `1`, ..., or ids that the model has outputs for;
    3. in order.

    Args:
        found: the name of each class by its number in the data.
        what: what messages call the classes, e.g. `photos/train`.
        numbered: whether the numbers themselves may be the model's (the ids of COCO's
            categories), not only the order of the names.

    Raises:
        InputError: there are more classes than outputs, or most have names that the model knows
            and some do not.
    """
    room = classes.count - classes.first
    if len(found) > room:
        raise InputError(
            "too-many-classes",
            f"{what} has {len(found)} classes, but {origin} has {room} outputs",
            hint="take classes out, or give a model with a head for as many classes",
        )
    if (by_name := _by_name(classes, found, origin, what)) is not None:
        return by_name, "by name", True
    numbers = _numbers(found, numbered)
    if numbers and all(classes.first <= n < classes.count for n in numbers.values()):
        return numbers, "by number", True
    order = {number: classes.first + index for index, number in enumerate(sorted(found))}
    return order, "in order", len(found) == room


def _by_name(
    classes: Classes, found: Mapping[int, str], origin: str, what: str
) -> dict[int, int] | None:
    known: dict[str, set[int]] = {}
    for index, names in classes.names.items():
        for name in names:
            known.setdefault(_plain(name), set()).add(index)
    # ImageNet has two cranes: a name alone does not tell which.
    single = {name: next(iter(indices)) for name, indices in known.items() if len(indices) == 1}
    hits = {n: single[_plain(name)] for n, name in found.items() if _plain(name) in single}
    if len(hits) == len(found) and len(set(hits.values())) == len(hits):
        return hits
    unknown = [name for number, name in found.items() if number not in hits]
    if 2 * len(hits) <= len(found) or not unknown:
        return None
    close = nearest(_plain(unknown[0]), single)
    raise InputError(
        "unknown-class",
        f"{what}: {len(hits)} of {len(found)} classes are {origin}'s, but it has no class "
        f"'{unknown[0]}'",
        hint=f"did you mean '{close}'?" if close else None,
    )


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", " ")


def _numbers(found: Mapping[int, str], numbered: bool) -> dict[int, int]:
    if numbered:
        return {number: number for number in found}
    if not all(name.isdecimal() for name in found.values()):
        return {}
    numbers = {number: int(name) for number, name in found.items()}
    return numbers if len(set(numbers.values())) == len(numbers) else {}


def listed(names: Sequence[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
