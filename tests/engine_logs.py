"""The report of the transformer block that the logs in tests/data/engine are of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data" / "engine"
QKV, PROJ, FC1, FC2 = (f"blocks.0.{n}" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))
SHAPES = {QKV: [1152, 384], PROJ: [384, 384], FC1: [1536, 384], FC2: [384, 1536]}
ROLES = {QKV: "attention_qkv", PROJ: "attention_proj", FC1: "mlp", FC2: "mlp"}


def make_layer(name: str, **changes: Any) -> dict[str, Any]:
    treatment = {"sparsity": "2:4", "weight": "int8", "activation": "int8", "output": None}
    return {
        "name": name,
        "role": ROLES[name],
        "op": "linear",
        "shape": SHAPES[name],
        "requested": treatment,
        "applied": treatment,
        "reasons": [],
        "mask_ok": True,
        "sparse_kernel": None,
        **changes,
    }


def make_report() -> dict[str, Any]:
    return {
        "target": {"compute": ["portable"], "precision": "fp16"},
        "layers": [make_layer(name) for name in SHAPES],
    }
