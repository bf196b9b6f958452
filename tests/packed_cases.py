"""Compiles whose packed files several tests read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpusq_compile import CompileResult, compile_model, load_packed
from gpusq_compile.packed_graph import GRAPH
from tests.compilations import make_rules
from tests.models import Shape, TinyViT, images, labelled, noise, seeded

INT4 = {"weight": "int4", "activation": "int4"}
KINDS: dict[str, dict[str, Any]] = {
    "2:4 int8": {"sparsity": {"pattern": "2:4"}, "quantize": {"weight": "int8"}},
    "portable int4": {"sparsity": {"pattern": "portable"}, "quantize": INT4},
    "pair4:8 int4": {"sparsity": {"pattern": "pair4:8"}, "quantize": INT4},
    "sparse fp16": {"sparsity": {"pattern": "2:4"}},
    "dense int8": {"quantize": {"weight": "int8"}},
    "split int8": {"sparsity": {"pattern": "2:4"}, "quantize": {"weight": "int8", "split": True}},
}
BLOCKS = {
    "sparsity": {"pattern": "2:4"},
    "quantize": {"weight": "int4", "activation": "none", "block": 64},
}
LOOSE = {"min_cosine": -1, "min_top1_agreement": 0, "max_difference": 1e6}


class Mixed(nn.Module):
    """A convolution that stays one, a constant, infinity as an argument, and what nothing reads."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 16, 3, padding=1)
        self.mid = nn.Conv2d(16, 16, 3, stride=2)
        self.head = nn.Linear(16, 8)
        self.register_buffer("order", torch.arange(15, -1, -1), persistent=False)
        self.unread = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.stem(x).relu())
        x = x.flatten(2).amax(dim=2)[:, self.order]
        kept = x.masked_fill(x < -1e4, float("-inf"))
        return self.head(kept.sigmoid())


@dataclass
class Case:
    result: CompileResult
    folder: Path


def compiled(model: nn.Module, folder: Path, *rules: dict[str, Any]) -> Case:
    result = compile_model(
        model,
        (images(2),),
        rules=make_rules(*rules, precision="fp16", verify=LOOSE),
        calibration_data=labelled(2),
        finetune=False,
        engine="none",
        output=folder,
    )
    return Case(result, folder)


def state_of(model: nn.Module, kind: str, folder: Path) -> dict[str, Tensor]:
    """The state_dict of a model of [B, 8, 16], compiled by a key of `KINDS`; its packed files give
    the same."""
    result = compile_model(
        model,
        (noise(2, 8, 16),),
        rules=make_rules({"id": "all", "match": {"op": "linear"}, **KINDS[kind]}, verify=LOOSE),
        calibration_data=[noise(4, 8, 16)],
        finetune=False,
        engine="none",
        output=folder,
    )
    state = result.state_dict()
    packed = load_packed(folder).state_dict()
    assert state.keys() == packed.keys()
    assert all(torch.equal(state[name], packed[name]) for name in state)
    return state


def compile_kind(kind: str, folder: Path) -> Case:
    """A key of `KINDS` on a small transformer, `mixed` or `blocks`."""
    if kind == "mixed":
        rule = {"id": "all", "match": {"op": ["linear", "conv2d"]}, **KINDS["2:4 int8"]}
        return compiled(seeded(Mixed), folder, rule)
    if kind == "blocks":
        match = {"op": "linear", "in_features": {"multiple_of": 64}}
        rule = {"id": "wide", "match": match, **BLOCKS}
        return compiled(seeded(TinyViT, Shape(depth=1, dim=128)), folder, rule)
    rule = {"id": "all", "match": {"op": "linear"}, **KINDS[kind]}
    return compiled(seeded(TinyViT, Shape(depth=1)), folder, rule)


def document(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / GRAPH).read_text())
    return found
