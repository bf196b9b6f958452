"""Activation maps of a few images, from the dense model and then from the compressed one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx

from gpusq_compile.compilation import Compilation
from gpusq_compile.data import Batch, has_logits, logits_of
from gpusq_compile.finetune.taps import Tap
from gpusq_compile.graph.query import module_calls, module_path
from gpusq_compile.offers import collect
from gpusq_compile.report.cam import (
    GRAD_CAM,
    Map,
    activation_map,
    as_levels,
    as_pixels,
    correlation,
)
from gpusq_compile.report.evidence import Evidence, ImageMaps, MapPair, as_base64
from gpusq_compile.report.watch import Watch

MOST_PLACES = 6
MOST_PIXELS = 192
"""Pixels of the longer side of an image on the page."""
LARGE = 1 << 16
"""Elements from which on a tensor is kept in half for a backward pass."""
TITLES = {"patch_embed": "patch embedding", "final_projection": "final norm"}


@dataclass
class Seen:
    """What the dense model made of one image."""

    label: int | None
    top: int | None = None
    pixels: torch.Tensor | None = None
    maps: list[Map | None] = field(default_factory=list)


class MapObserver:
    """The maps of each image, first by the dense model and then by the compressed one."""

    def __init__(self) -> None:
        self.nodes: list[str] = []
        self.seen: list[Seen] = []
        self.pairs: list[ImageMaps] = []
        self.wanted = False

    def begin(self, compilation: Compilation, evidence: Evidence) -> None:
        """Choose the places, and say where there will be no maps."""
        places = find_places(compilation)
        self.nodes = [node for node, _ in places]
        evidence.places = [place for _, place in places]
        if evidence.source in ("noise", "example_inputs"):
            what = "generated noise" if evidence.source == "noise" else "the example inputs"
            evidence.no_maps = (
                f"There was nothing to look at but {what}: maps of images need eval_data or "
                "calibration_data."
            )
        elif not places:
            evidence.no_maps = "The graph has no patch embedding, stage end or final norm."
        self.wanted = evidence.no_maps is None

    def see(self, compilation: Compilation, watch: Watch, image: Batch, index: int) -> None:
        """Run the user's model with `watch` on an image: the dense one where it is new."""
        if not self.wanted:
            with torch.no_grad():
                compilation.network.run(watch, image.inputs)
            return
        dense = self.seen[index] if index < len(self.seen) else None
        watch.places = self.nodes
        with torch.set_grad_enabled(gives_logits(compilation)), saved_in_half():
            outputs = compilation.network.run(watch, image.inputs)
            top, gradients = class_gradients(compilation, watch, outputs, dense)
        features = dict(watch.kept)
        watch.kept = {}
        if watch.image is None:
            self.wanted = False
            return
        size = (watch.image.shape[2], watch.image.shape[3])
        maps: list[Map | None] = []
        for place, node in enumerate(self.nodes):
            before = dense.maps[place] if dense else None
            if node not in features or (dense and before is None):
                maps.append(None)
                continue
            gradient = gradients.get(node)
            method = before.method if before else None
            found = activation_map(features[node].detach(), gradient, size, method)
            maps.append(found and Map(found.values.cpu(), found.method))
        if dense is None:
            label = None if image.labels is None else int(image.labels[0])
            self.seen.append(Seen(label, top, as_pixels(watch.image[0], MOST_PIXELS), maps))
        else:
            self.pairs.append(joined(dense, top, maps))

    def finish(self, evidence: Evidence) -> None:
        evidence.maps = self.pairs
        if evidence.no_maps is None and not any(any(pair.maps) for pair in self.pairs):
            evidence.no_maps = (
                "The model reads no images [batch, channels, height, width]."
                if not self.wanted
                else "The features at these places form no grid over the image."
            )
        self.seen = []


def find_places(compilation: Compilation) -> list[tuple[str, dict[str, str]]]:
    """Names of nodes to make maps of, with what they are: the taps, else the nodes of such roles.

    The roles are those that `--dry-run` shows: where the rules name layers for one, these.
    At most `MOST_PLACES`: the first, the last, and what is evenly between.
    """
    calls = module_calls(compilation.ir)
    taps = [(n.name, m.name, m.role) for n, m in calls if isinstance(m, Tap)]
    if not taps:
        wanted = ("patch_embed", "stage_end", "final_projection")
        taps = [
            (offer.node.name, module_path(offer.node) or offer.node.name, role)
            for offer in collect(compilation.ir, compilation.rules, compilation.parameters.tied)
            for role in offer.roles
            if role in wanted
        ]
    stages = [name for name, _, role in taps if role == "stage_end"]
    found = []
    for name, path, role in taps:
        title = TITLES.get(role, role)
        if role == "stage_end":
            title = f"end of stage {stages.index(name) + 1}" if len(stages) > 1 else "last block"
        found.append((name, {"name": path, "role": role, "title": title}))
    if len(found) <= MOST_PLACES:
        return found
    last = len(found) - 1
    picks = sorted({round(i * last / (MOST_PLACES - 1)) for i in range(MOST_PLACES)})
    return [found[index] for index in picks]


def gives_logits(compilation: Compilation) -> bool:
    """Whether it is known before a run that there will be a class score."""
    if compilation.source.logits is not None:
        return True
    return compilation.network.scope is None and has_logits(compilation.reference, None)


@contextmanager
def saved_in_half() -> Iterator[None]:
    """Keep what a backward pass needs as bfloat16: its eight bits are enough for a picture.

    Otherwise the effective weights of a base-size model and one image's activations would be the
    largest things in memory of the whole compilation.
    """

    def pack(value: torch.Tensor) -> tuple[torch.Tensor, bool]:
        large = value.dtype == torch.float32 and value.numel() >= LARGE
        return (value.bfloat16() if large else value), large

    def unpack(packed: tuple[torch.Tensor, bool]) -> torch.Tensor:
        value, large = packed
        return value.float() if large else value

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def class_gradients(
    compilation: Compilation, watch: Watch, outputs: Any, dense: Seen | None
) -> tuple[int | None, dict[str, torch.Tensor]]:
    """The first class of a sample, and the gradients of the dense model's first class by place."""
    find = compilation.source.logits
    if not torch.is_grad_enabled() or not has_logits(outputs, find):
        return None, {}
    logits = logits_of(outputs, find)
    top = int(logits[0].argmax())
    score = logits[0, top if dense is None or dense.top is None else dense.top]
    kept = {name: value for name, value in watch.kept.items() if value.requires_grad}
    if not score.requires_grad or not kept:
        return top, {}
    found = torch.autograd.grad(score, list(kept.values()), allow_unused=True)
    return top, {
        name: torch.zeros_like(value) if gradient is None else gradient
        for (name, value), gradient in zip(kept.items(), found, strict=True)
    }


def joined(dense: Seen, top: int | None, maps: list[Map | None]) -> ImageMaps:
    assert dense.pixels is not None
    height, width, channels = dense.pixels.shape
    return ImageMaps(
        height,
        width,
        channels,
        as_base64(dense.pixels),
        dense.label,
        dense.top,
        top,
        [pair(one, other) for one, other in zip(dense.maps, maps, strict=True)],
    )


def pair(dense: Map | None, compressed: Map | None) -> MapPair | None:
    if dense is None or compressed is None:
        return None
    height, width = dense.values.shape
    if dense.method == GRAD_CAM and not bool(dense.values.any()):
        return None
    return MapPair(
        height,
        width,
        as_base64(as_levels(dense.values)),
        as_base64(as_levels(compressed.values)),
        dense.method,
        correlation(dense.values, compressed.values),
    )
