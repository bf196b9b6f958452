"""Which of a model's outputs a class of the data is."""

from __future__ import annotations

from collections.abc import Mapping

from gpusq_compile.errors import InputError, nearest
from gpusq_compile.model_source import ModelSource
from gpusq_compile.sources.model import Classes

Outputs = dict[int, int]
"""The output of each class, by its number in the data."""


def match_classes(
    source: ModelSource,
    classes: Classes,
    found: Mapping[int, str],
    what: str,
    *,
    numbered: bool,
) -> Outputs:
    """The output that each class of the data stands for, and a remark that says how it was found.

    The first of these that can be:

    1. by name, where the model's classes have names and the data's are among them;
    2. by number: folders called `0`, `1`, ..., or ids that the model has outputs for;
    3. in order.

    Where the model knows names and the data has others, the remark is a warning.

    Args:
        source: gets the remark.
        found: the name of each class by its number in the data.
        what: what messages call the classes, e.g. `photos/train`.
        numbered: whether the numbers themselves may be the model's (the ids of COCO's
            categories), not only the order of the names.

    Raises:
        InputError: there are more classes than outputs, or most have names that the model knows
            and some do not.
    """
    origin = source.origin
    room = classes.count - classes.first
    if len(found) > room:
        raise InputError(
            "too-many-classes",
            f"{what} has {len(found)} classes, but {origin} has {room}",
            hint="take classes out, or give a model with a head for as many classes",
        )
    outputs, how = _by_name(classes, found, origin, what), "by name"
    if outputs is None:
        outputs, how = _by_number(classes, found, numbered), "by number"
    if outputs is None:
        outputs = {number: classes.first + i for i, number in enumerate(sorted(found))}
        how = "in order"
    those = "class of {0} is" if len(found) == 1 else f"{len(found)} classes of {{0}} are"
    text = f"the {those.format(what)} matched to {origin}'s {room} {how}"
    # Folders are called by numbers on purpose; categories have ids whether or not they are meant.
    if classes.names and (how == "in order" or (how == "by number" and numbered)):
        text += "; by their names none is the model's, so accuracy means nothing unless it was "
        text += "trained on them so numbered"
    elif how == "in order" and len(found) < room:
        text += ", to the first of them, so accuracy means nothing unless it was trained on them "
        text += "in this order"
    else:
        source.facts.append(("classes-matched", text))
        return outputs
    source.notes.append(("classes-not-matched", text))
    return outputs


def _by_name(classes: Classes, found: Mapping[int, str], origin: str, what: str) -> Outputs | None:
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


def _by_number(classes: Classes, found: Mapping[int, str], numbered: bool) -> Outputs | None:
    if not numbered and not all(name.isdecimal() for name in found.values()):
        return None
    numbers = {number: number if numbered else int(name) for number, name in found.items()}
    inside = all(classes.first <= index < classes.count for index in numbers.values())
    return numbers if inside and len(set(numbers.values())) == len(numbers) else None
