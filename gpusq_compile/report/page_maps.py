"""The page's gallery of activation maps: of one run, or of two runs on the same images."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from gpusq_compile.report.page_figures import looked_at
from gpusq_compile.report.png import GRAY, INDEXED, RGB, as_address, png

HEAT = ((0, (0, 0, 4)), (0.3, (87, 16, 110)), (0.55, (188, 55, 84)), (0.8, (249, 142, 9)))
HOTTEST = (252, 255, 164)
SMALL = 64
"""Pixels of the longer side under which an image is shown as squares."""
MOST_LEVELS_APART = 8
"""Of 255: up to here two maps of the dense model are the same but for another machine's rounding.
"""
NO_MAP = "nothing speaks for the class, or the positions form no grid"


@dataclass(frozen=True)
class Seen:
    """What one run saw. `label` is what its model is called, `name` the run itself."""

    label: str
    name: str
    evidence: Mapping[str, Any] | None


def compressed_name(report: Mapping[str, Any]) -> str:
    """What the compressed model is called beside the dense one: INT8, INT4, sparse."""
    types = Counter(
        layer["applied"]["activation"] or layer["applied"]["weight"]
        for layer in report["layers"]
        if any(layer["applied"].values())
    )
    first = types.most_common(1)[0][0] if types else None
    return str(first).upper() if first else "sparse"


def map_gallery(
    report: Mapping[str, Any], evidence: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """Each image of a run with its maps as indexed PNGs, to lie over it: dense and compressed."""
    seen = Seen(compressed_name(report), "", evidence)
    return [shown_image([(seen, image)], number) for number, image in enumerate(images_of(seen), 1)]


@dataclass(frozen=True)
class Beside:
    """Two runs' maps: of images that both looked at, of one run's alone by its place, and what
    keeps maps from standing side by side."""

    both: list[dict[str, Any]]
    alone: tuple[list[dict[str, Any]], list[dict[str, Any]]]
    reasons: list[str]


def maps_beside(first: Seen, second: Seen) -> Beside:
    """The maps of two runs, joined by the images' pixels and the places' names."""
    rest = images_of(second)
    both: list[tuple[Any, Any]] = []
    alone: list[Any] = []
    for image in images_of(first):
        other = next((other for other in rest if same_pixels(image, other)), None)
        if other is None:
            alone.append(image)
        else:
            rest.remove(other)
            both.append((image, other))
    start, end = len(both) + 1, len(both) + len(alone) + 1
    return Beside(
        [shown_image([(first, a), (second, b)], number) for number, (a, b) in enumerate(both, 1)],
        (
            [shown_image([(first, image)], number) for number, image in enumerate(alone, start)],
            [shown_image([(second, image)], number) for number, image in enumerate(rest, end)],
        ),
        [
            *(reason for seen in (first, second) if (reason := without_maps(seen))),
            *different_images(first, second, len(both)),
            *different_models(first, second, both),
        ],
    )


def images_of(seen: Seen) -> list[Any]:
    """The images that have maps."""
    return [] if without_maps(seen) else list((seen.evidence or {})["maps"])


def without_maps(seen: Seen) -> str | None:
    """Why a run has no maps; None where it has some."""
    if seen.evidence is None:
        return f"{seen.label} has no maps: evidence.json of {seen.name} is missing or damaged."
    if seen.evidence["no_maps"]:
        return f"{seen.label} has no maps. {seen.evidence['no_maps']}"
    if not seen.evidence["maps"]:
        return f"{seen.label} has no maps: its run ended before the compressed model stood."
    return None


def same_pixels(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one[key] == other[key] for key in ("height", "width", "channels", "pixels"))


def different_images(first: Seen, second: Seen, both: int) -> list[str]:
    """Why not all images stand side by side."""
    one, other = images_of(first), images_of(second)
    if not one or not other or both == len(one) == len(other):
        return []
    found = (
        f"{both or 'No'} {'image is' if both in (0, 1) else 'images are'} the same in both runs, "
        f"by the pixels: {first.label} looked at {looked_at(first.evidence)}, "
        f"{second.label} at {looked_at(second.evidence)}"
    )
    sizes = [
        sorted({f"{image['width']} x {image['height']}" for image in run}) for run in (one, other)
    ]
    if sizes[0] != sizes[1]:
        found += f", of {' and '.join(sizes[0])} pixels and of {' and '.join(sizes[1])}"
    return [f"{found}. Runs that are given the same eval_data look at the same images of it."]


def different_models(first: Seen, second: Seen, both: Sequence[tuple[Any, Any]]) -> list[str]:
    """That the runs did not start from the same dense model, where its maps say so."""
    for one, other in both:
        others = maps_by_place(second, other)
        for name, pair in maps_by_place(first, one).items():
            if pair and others.get(name) and not same_dense(pair, others[name]):
                return [
                    f"The dense models of {first.name} and {second.name} have different maps: "
                    "where they do, each run stands beside its own dense model."
                ]
    return []


def maps_by_place(seen: Seen, image: Mapping[str, Any]) -> dict[str, Any]:
    """The pair of maps at each place by its name, None where there is none."""
    names = [place["name"] for place in places_of(seen)]
    return dict(zip(names, image["maps"], strict=True))


def places_of(seen: Seen) -> list[dict[str, str]]:
    return list((seen.evidence or {})["places"])


def same_dense(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two pairs of maps have the same map of the dense model."""
    if any(one[key] != other[key] for key in ("height", "width", "method")):
        return False
    levels = zip(base64.b64decode(one["dense"]), base64.b64decode(other["dense"]), strict=True)
    return all(abs(a - b) <= MOST_LEVELS_APART for a, b in levels)


def shown_image(runs: Sequence[tuple[Seen, Any]], number: int) -> dict[str, Any]:
    """An image with what the models say of it, and a figure for each place of any run.

    Args:
        runs: each run with what it saw of this image.
        number: what the page calls the image, from 1.
    """
    image = runs[0][1]
    kind = GRAY if image["channels"] == 1 else RGB
    pixels = base64.b64decode(image["pixels"])
    places = {place["name"]: place for seen, _ in reversed(runs) for place in places_of(seen)}
    order = dict.fromkeys(place["name"] for seen, _ in runs for place in places_of(seen))
    found = [(seen, maps_by_place(seen, image)) for seen, image in runs]
    figures = [shown_place(places[name], found) for name in order]
    return {
        "number": number,
        "title": f"image {number}" if image["label"] is None else f"class {image['label']}",
        "said": classes(runs),
        "small": max(image["height"], image["width"]) < SMALL,
        "width": image["width"],
        "height": image["height"],
        "address": as_address(png(pixels, image["width"], image["height"], kind)),
        "places": figures,
        "cells": max([2, *(len(figure["cells"]) for figure in figures)]),
    }


def classes(runs: Sequence[tuple[Seen, Any]]) -> list[str]:
    """The class that each model prefers; the dense one's once where the runs agree."""
    dense = dict.fromkeys(image["dense_class"] for _, image in runs)
    found = [f"dense says {top}" for top in dense if top is not None]
    return found and [
        " or ".join([found[0], *(str(top) for top in list(dense)[1:])]),
        *(f"{seen.label} says {image['compressed_class']}" for seen, image in runs),
    ]


def shown_place(
    place: Mapping[str, str], runs: Sequence[tuple[Seen, Mapping[str, Any]]]
) -> dict[str, Any]:
    """The maps at one place: dense and each run's; each run beside its own dense where they differ.

    Args:
        runs: each run with its pairs of maps by place.
    """
    name = place["name"]
    pairs = [(seen, maps[name]) for seen, maps in runs if maps.get(name)]
    together = all(same_dense(pairs[0][1], pair) for _, pair in pairs[1:])
    cells: list[dict[str, str]] = []
    said: list[dict[str, Any]] = []
    for index, (seen, pair) in enumerate(pairs):
        method = "Grad-CAM" if pair["method"] == "grad-cam" else "mean activation"
        if index == 0 or not together:
            label = "dense" if together else f"dense of {seen.label}"
            cells.append(shown_map(pair, "dense", label, method))
            said.append({"method": method, "correlations": []})
        cells.append(shown_map(pair, "compressed", seen.label, method))
        if pair["correlation"] is not None:
            label = seen.label if len(runs) > 1 else ""
            said[-1]["correlations"].append((label, pair["correlation"]))
    missing = [
        f"{f'{seen.label}: ' if len(runs) > 1 else ''}"
        f"{NO_MAP if name in maps else 'the run has no such place'}"
        for seen, maps in runs
        if not maps.get(name)
    ]
    return {**place, "cells": cells, "said": said, "missing": missing}


def shown_map(pair: Mapping[str, Any], which: str, label: str, method: str) -> dict[str, str]:
    levels = base64.b64decode(pair[which])
    address = heat(levels, pair["width"], pair["height"])
    return {"label": label, "method": method, "address": address}


def heat(levels: bytes, width: int, height: int) -> str:
    """A map as a picture: from transparent over purple and red to yellow."""
    steps = bytes(value >> 3 for value in levels)
    return as_address(png(steps, width, height, INDEXED, PALETTE))


def color(share: float) -> tuple[int, int, int, int]:
    stops = [*HEAT, (1.0, HOTTEST)]
    for (low, one), (high, other) in pairwise(stops):
        if share <= high:
            part = (share - low) / (high - low)
            red, green, blue = (round(a + (b - a) * part) for a, b in zip(one, other, strict=True))
            return red, green, blue, round(70 + 135 * min(1.0, 1.2 * share))
    return (*HOTTEST, 205)


PALETTE = [color(index / 31) for index in range(32)]
