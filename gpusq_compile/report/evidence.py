"""What report.html shows and report.json is too small for: `evidence.json`.

Errors per layer, integer histograms, a crop of each pattern, and activation maps. It stands beside
report.json, so that the page can be made again without the model; arrays are base64 of uint8.
"""

from __future__ import annotations

import base64
import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

EVIDENCE = "evidence.json"
SCHEMA_VERSION = 1
MOST_DB = 100.0
"""Where a ratio has no noise at all, and what is written for anything above."""


@dataclass
class LayerEvidence:
    """The errors of one compressed layer in dB (SQNR: 10 log10 of signal energy by noise energy).

    Attributes:
        pruning_db: the dense weight against itself under its mask; no compensation counted.
        weight_db: the float weight under its mask against the values of its integers.
        activation_db: the layer's input against its fake-quantized self.
        output_db: the dense layer's output against that of the compressed one, with all errors of
            the layers before.
        zeros: the share of its weights that is zero in the final integers (or floats).
        histogram: how many of the sampled weights have each level, from -qmax to qmax; empty where
            the weight is not quantized.
    """

    pruning_db: float | None = None
    weight_db: float | None = None
    activation_db: float | None = None
    output_db: float | None = None
    zeros: float | None = None
    histogram: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Crop:
    """A corner of a weight in a pattern. `values` are integers, or floats where not quantized.

    Rows are output channels and columns run along the reduction axis, from zero.
    """

    layer: str
    pattern: str
    type: str
    group: int
    unit: int
    values: list[list[float]]


@dataclass(frozen=True)
class MapPair:
    """The activation maps of one image at one place: uint8 [height, width] as base64.

    Each is stretched over its own range. `method` is `grad-cam` or `activation`; `correlation`
    Pearson's between the two before the rounding to uint8, None where one is constant.
    """

    height: int
    width: int
    dense: str
    compressed: str
    method: str
    correlation: float | None


@dataclass(frozen=True)
class ImageMaps:
    """One image, uint8 [height, width, channels] as base64, and its maps by place (None: no map).

    `label` is the class that the data gives, the other two are top-1 of the models; None where
    there are none.
    """

    height: int
    width: int
    channels: int
    pixels: str
    label: int | None
    dense_class: int | None
    compressed_class: int | None
    maps: list[MapPair | None]


@dataclass
class Evidence:
    """Everything of one compilation, and the seconds that it took to look at each model.

    `source` is what the images are: `eval_data`, `calibration_data`, `train_data`, `noise` or
    `example_inputs`; `images` how many were looked at. `no_maps` says why there are no maps;
    `faults` what went wrong while looking.
    """

    layers: dict[str, LayerEvidence] = field(default_factory=dict)
    crops: list[Crop] = field(default_factory=list)
    places: list[dict[str, str]] = field(default_factory=list)
    maps: list[ImageMaps] = field(default_factory=list)
    no_maps: str | None = None
    source: str | None = None
    images: int = 0
    loss_weights: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The content of evidence.json; NaN and infinity are None."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


def decibels(signal: float, noise: float) -> float | None:
    """10 log10(signal / noise), at most `MOST_DB`; None where there is no signal."""
    if not (math.isfinite(signal) and math.isfinite(noise)) or signal <= 0:
        return None
    if noise <= signal * 10 ** (-MOST_DB / 10):
        return MOST_DB
    return round(10 * math.log10(signal / noise), 2)


def sqnr(reference: torch.Tensor, found: torch.Tensor) -> float | None:
    """Signal to noise of two tensors of one shape, in dB (`decibels`)."""
    reference, found = reference.double(), found.double()
    return decibels(float(reference.square().sum()), float((reference - found).square().sum()))


def as_base64(values: torch.Tensor) -> str:
    """A uint8 tensor, row after row."""
    return base64.b64encode(values.to(torch.uint8).cpu().contiguous().numpy().tobytes()).decode()


def write_evidence(path: Path, evidence: Evidence) -> dict[str, Any]:
    """Write evidence.json under a temporary name and rename it; returns its content."""
    content = evidence.as_dict()
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, allow_nan=False) + "\n")
    os.replace(temporary, path)
    return content
