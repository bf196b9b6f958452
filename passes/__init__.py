"""The rewriting passes, one a file, and the order in which the compiler runs them."""

from __future__ import annotations

from gpusq_compile.pass_base import Pass
from gpusq_compile.passes import (
    build_engine,
    canonicalize,
    export_onnx,
    finetune_quantized,
    finetune_sparse,
    fold,
    mark,
    quantize,
    sparsify,
    surgery,
    tap,
    trace,
    verify_onnx,
)

PIPELINE: tuple[Pass, ...] = (
    trace.PASS,
    canonicalize.PASS,
    mark.PASS,
    sparsify.PASS,
    tap.PASS,
    finetune_sparse.PASS,
    quantize.PASS,
    finetune_quantized.PASS,
    fold.PASS,
    export_onnx.PASS,
    surgery.PASS,
    verify_onnx.PASS,
    build_engine.PASS,
)
