"""Reports and evidence to make pages of: of a tiny compile, and of many layers made up."""

from __future__ import annotations

from typing import Any

from gpusq_compile.report.evidence import Evidence, LayerEvidence

NOTHING: dict[str, Any] = {
    "sparsity": None,
    "weight": None,
    "activation": None,
    "output": None,
}
INT8 = {"sparsity": "2:4", "weight": "int8", "activation": "int8", "output": "int8"}


def make_layer(name: str, *, refused: str | None = None, size: int = 1000) -> dict[str, Any]:
    """A layer of report.json: 2:4 and INT8, or refused."""
    return {
        "name": name,
        "role": "mlp",
        "op": "linear",
        "shape": [64, 32],
        "requested": INT8,
        "applied": NOTHING if refused else INT8,
        "reasons": [refused] if refused else [],
        "rules": ["rules/int8.yaml:12 gemms: sparsity, quantize"],
        "mask_ok": None if refused else True,
        "weight_bytes": None if refused else size,
        "packed_bytes": None if refused else size,
        "execution": {
            "kind": "dense fp16" if refused else "sparse int8",
            "why": "the layer was left as it is" if refused else "sparse INT8 kernels take 2:4",
        },
        "engine": {"type": "unknown", "eligible": "unknown", "picked": "unknown"}
        | {"reason": None, "targets": {}},
        "sparse_kernel": None,
    }


def make_report(layers: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """A report of a finished run with nothing but layers."""
    return {
        "schema_version": 1,
        "tool": {"name": "gpusq-compile", "version": "1.2.3"},
        "status": "ok",
        "error": None,
        "model": "models/vit.py",
        "scope": None,
        "rules": ["rules/int8.yaml"],
        "target": {"compute": ["sm89"], "precision": "fp16"},
        "seed": 0,
        "device": "cpu",
        "passes": [],
        "layers": layers,
        "attentions": [],
        "finetune": {},
        "accuracy": {"dense": None, "sparse": None, "quantized": None, "onnx": None},
        "metrics": {},
        "verify": {},
        "storage": None,
        "compute": None,
        "engine": None,
        **changes,
    }


def make_remark(layer: str | None, reason: str, kind: str = "missed") -> dict[str, Any]:
    return {"kind": kind, "code": "refused", "layer": layer, "reason": reason}


def make_pass(name: str, *remarks: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "matched": 1,
        "changed": 1,
        "skipped": 0,
        "seconds": 0.5,
        "change": None,
        "remarks": list(remarks),
    }


def many(count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A report of `count` layers, every tenth refused, and its evidence."""
    layers = [
        make_layer(
            f"blocks.{index}.mlp.fc1",
            refused="the reduction axis has 30 columns, no multiple of 4"
            if not index % 10
            else None,
            size=1000 + index * 7 % 991,
        )
        for index in range(count)
    ]
    remarks = [
        make_remark(layer["name"], "2:4 keeps 93.5% of the energy", "passed") for layer in layers
    ]
    evidence = Evidence(source="eval_data", images=3)
    for index, layer in enumerate(layers):
        if not layer["reasons"]:
            histogram = [(level * 37 + index) % 101 for level in range(255)]
            evidence.layers[layer["name"]] = LayerEvidence(
                8.0 + index % 7, 40.0 + index % 11, 35.0, 20.0 - index * 15 / count, 0.5, histogram
            )
    report = make_report(
        layers, passes=[make_pass("sparsify", *remarks), make_pass("quantize", *remarks)]
    )
    return report, evidence.as_dict()
