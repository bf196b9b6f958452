"""Real reports for the tests of their views: one compile of each kind, shared by a test file."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from gpusq_compile import compile_model
from gpusq_compile.language.loader import load_rules
from tests.models import Shape, TinyViT, images, labelled, seeded

FROZEN = Path(__file__).parent / "data" / "reports" / "version-1.json"
"""A report as an earlier version wrote it; it never changes."""

RULES = """\
version: 1
extends: int8
rules:
  - id: dense-first
    match: {name: "layers.0.feed.up"}
    sparsity: none
  - id: pairs
    match: {role: classifier}
    sparsity: {pattern: "2:4"}
    quantize: none
  - id: odd
    match: {role: patch_embed, op: linear}
    quantize: {weight: int4, activation: none, block: 64}
  - id: narrow
    match: {name: ["**.down", "**.donw"]}
    quantize: none
"""
"""`int8` with one rule that is overridden, one that is refused, and a pattern without a match."""


def make_report(folder: Path, rules: str = RULES, **options: Any) -> dict[str, Any]:
    """The report of a real one-shot compile of a small transformer."""
    path = folder / "mine.yaml"
    path.write_text(rules)
    result = compile_model(
        seeded(TinyViT, Shape(depth=2)),
        (images(2),),
        rules=load_rules(path),
        output=folder / "out",
        **{
            "calibration_data": labelled(1),
            "eval_data": labelled(2),
            "finetune": False,
            "engine": "none",
            **options,
        },
    )
    return copy.deepcopy(result.report)


def frozen() -> dict[str, Any]:
    report: dict[str, Any] = json.loads(FROZEN.read_text())
    return report


def layer_of(report: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(layer for layer in report["layers"] if layer["name"] == name)
    return found
