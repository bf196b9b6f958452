"""What goes into an engine build and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Answer = Literal["yes", "no", "unknown"]
Status = Literal["passed", "missed", "unknown"]


@dataclass(frozen=True)
class MarkedGemm:
    """A GEMM that the rules marked.

    `name` is both the layer's name and the name of its MatMul, Gemm or Conv node in the ONNX file.
    `expected` is the type in which the engine should multiply, `sparse` whether its weight was
    pruned. `weight` is the type in which the GEMM's own kernel should read the weight; None where
    that is `expected`.
    """

    name: str
    expected: Literal["int8", "fp16", "fp32"]
    sparse: bool = False
    weight: Literal["int4"] | None = None


@dataclass(frozen=True)
class MarkedAttention:
    """An attention that the rules marked: its ONNX products are named `NAME/qk` and `NAME/av`."""

    name: str
    expected: Literal["int8"] = "int8"


@dataclass(frozen=True)
class AttentionInEngine:
    """What one marked attention became.

    `actual` is the type that its fused kernel multiplies, "unfused" where the builder made separate
    layers of it, "unknown" where the log does not tell. `layer` names the engine layers that hold
    its products; `reason` explains every status but "passed".
    """

    name: str
    expected: str
    actual: str
    status: Status
    layer: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class BatchRange:
    """Batch sizes that an engine serves; it is tuned for `opt`."""

    min: int = 1
    opt: int = 8
    max: int = 16


@dataclass(frozen=True)
class GemmInEngine:
    """What one marked GEMM became.

    `actual` is the type of the operands it multiplies ("int8", "fp16", "fp32", "bf16", "fp8", ...)
    or "unknown" where the log does not tell. `layer` is the engine layer that holds it, `tactic`
    its kernel where the builder names one. `eligible` and `picked` say whether TensorRT found its
    weight fit for, and took, a sparse kernel. `reason` explains every status but "passed".
    `weight` is the type in which its kernel reads the weight, None where the weight is no constant
    of that kernel.
    """

    name: str
    expected: str
    actual: str
    status: Status
    layer: str | None = None
    tactic: str | None = None
    eligible: Answer = "unknown"
    picked: Answer = "unknown"
    reason: str | None = None
    weight: str | None = None


@dataclass(frozen=True)
class BuiltEngine:
    """One engine file. `file` is relative to the output folder, `seconds` the build's wall time."""

    file: str
    bytes: int
    seconds: float
    gemms: tuple[GemmInEngine, ...]
    attentions: tuple[AttentionInEngine, ...] = ()


@dataclass(frozen=True)
class EngineReport:
    """The engines of a run: by target name, with what could not be done in `remarks`.

    `backend` is "tensorrt", "tensorrt-rtx" or "none"; `version` the builder's own.
    """

    backend: str
    version: str | None
    targets: Mapping[str, BuiltEngine]
    remarks: tuple[str, ...] = ()

    def missed(self) -> tuple[tuple[str, GemmInEngine], ...]:
        """Every (target, GEMM) that has not the type it should have."""
        return tuple(
            (target, gemm)
            for target, engine in self.targets.items()
            for gemm in engine.gemms
            if gemm.status == "missed"
        )

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "backend": self.backend,
            "version": self.version,
            "targets": {
                target: {**asdict(engine), "gemms": [asdict(gemm) for gemm in engine.gemms]}
                for target, engine in self.targets.items()
            },
            "remarks": list(self.remarks),
        }
