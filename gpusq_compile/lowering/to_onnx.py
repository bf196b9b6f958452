"""`ExportedProgram` -> ONNX through PyTorch's own exporter."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from typing import Any, cast

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import onnxscript.optimizer
import torch
from onnxscript import FLOAT, INT8, opset21

from gpusq_compile.errors import CheckFailed
from gpusq_compile.graph.query import source_frames
from gpusq_compile.quantization.operators import DEQUANTIZE, QUANTIZE
from gpusq_compile.user_code import innermost_place

OPSET = 21


def _quantize(value: FLOAT, scale: FLOAT) -> INT8:
    # Without a zero-point QuantizeLinear would give uint8; TensorRT wants the int8 one spelled out.
    zero = onnx.helper.make_tensor("zero", onnx.TensorProto.INT8, [], [0])
    levels: INT8 = opset21.QuantizeLinear(value, scale, opset21.Constant(value=zero))  # type: ignore[type-var, assignment]
    return levels


def _dequantize(levels: INT8, scale: FLOAT) -> FLOAT:
    shape, scales = cast(Any, levels).shape, cast(Any, scale).shape
    if len(scales) == 2:
        block = shape[1] // scales[1]
        return opset21.DequantizeLinear(levels, scale, axis=1, block_size=block)
    # A scalar scale ignores the axis; a vector is per output channel, which is axis 0.
    return opset21.DequantizeLinear(levels, scale, axis=0)


TRANSLATIONS: dict[Any, Any] = {
    QUANTIZE: _quantize,
    DEQUANTIZE: _dequantize,
}


def to_onnx(program: torch.export.ExportedProgram) -> onnx.ModelProto:
    """Translate the program; weights stay in the model, its first dimension stays dynamic.

    Raises:
        CheckFailed: the exporter has no translation for an operator.
    """
    try:
        with quiet_exporter():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
                custom_translation_table=TRANSLATIONS,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise _export_failed(program, error) from error
    assert exported is not None
    model = exported.model
    # The whole optimizer of onnxscript takes longer than the translation; these passes leave
    # nothing that matters to it. Quantized weights are never folded back to float, and a weight's
    # Transpose is left for the surgery, which finds the weight by its name.
    onnxscript.optimizer.fold_constants(
        model,
        onnx_shape_inference=True,
        should_fold=lambda node: False if node.op_type == "Transpose" else None,
    )
    for simplify in (
        common_passes.IdentityEliminationPass(),
        common_passes.CommonSubexpressionEliminationPass(),
        common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common_passes.RemoveUnusedNodesPass(),
        common_passes.ClearMetadataAndDocStringPass(),
    ):
        simplify(model)
    return ir.to_proto(model)


def _export_failed(program: torch.export.ExportedProgram, error: Exception) -> CheckFailed:
    """The exporter's error in words, with the operator and its place where the error names one."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
    named = re.search(r"(?:translating node|While executing) %(\w+)", str(error))
    nodes = {node.name: node for node in program.graph.nodes}
    node = nodes.get(named.group(1)) if named else None
    if node is None:
        return CheckFailed("onnx-export", f"the ONNX exporter cannot translate the graph: {reason}")
    return CheckFailed(
        "onnx-export",
        f"the ONNX exporter cannot translate this use of {node.target}: {reason}",
        location=innermost_place(source_frames(node)),
        hint="--scope PATH, or `scope:` in the rules, compiles a submodule without it",
    )


@contextlib.contextmanager
def quiet_exporter() -> Any:
    """The exporter prints progress and warnings that mean nothing to our users."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
