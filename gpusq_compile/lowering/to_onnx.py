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

from gpusq_compile.errors import CheckFailed, Location
from gpusq_compile.graph.query import operator_name, place_in, place_of
from gpusq_compile.lowering.exporter_table import OPSET, made_once
from gpusq_compile.quantization.operators import DEQUANTIZE, QUANTIZE

STACK_TRACE = "pkg.torch.onnx.stack_trace"
"""Where the exporter leaves a node's stack trace."""


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


WAY_OUT = (
    "--scope PATH compiles a submodule without it; or write that line with operators that ONNX has"
)
_TRANSLATED = re.compile(
    r"(?:translating node|While executing) %(?P<name>\w+).*?target=(?P<target>[\w.]+)"
)


def to_onnx(
    program: torch.export.ExportedProgram, places: dict[str, Location] | None = None
) -> onnx.ModelProto:
    """Translate the program; weights stay in the model, its first dimension stays dynamic.

    Args:
        places: filled with the place in the source that each ONNX node comes from, by its name.

    Raises:
        CheckFailed: the exporter has no translation for an operator.
    """
    model = translated(program)
    if places is not None:
        for node in model.graph:
            place = place_in(node.metadata_props.get(STACK_TRACE, ""))
            if node.name and place is not None:
                places[node.name] = place
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


def translated(program: torch.export.ExportedProgram) -> ir.Model:
    """The program as the exporter translates it, before any simplification.

    Raises:
        CheckFailed: the exporter has no translation for an operator.
    """
    try:
        with quiet_exporter(), made_once():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
                custom_translation_table=TRANSLATIONS,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise _failure(program, error) from error
    assert exported is not None
    return exported.model


def _failure(program: torch.export.ExportedProgram, error: Exception) -> CheckFailed:
    """The exporter's failure in a line: the operator it has no translation for, and its place."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
    found = _TRANSLATED.search(str(error))
    if found is None:
        text = f"PyTorch's ONNX exporter failed: {type(cause).__name__}: {reason}"
        return CheckFailed("onnx-export", text, hint=WAY_OUT)
    name = found["target"].removeprefix("torch.ops.").removesuffix(".default").rpartition(".")[2]
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    # A decomposed program's nodes are not the given one's: the operator's name tells them.
    same = [n for n in nodes if n.name == found["name"]]
    same += [n for n in nodes if operator_name(n).strip("_") in name or name in str(n.target)]
    place = place_of(same[0]) if same else None
    text = f"PyTorch's ONNX exporter cannot translate this use of the operator '{name}': {reason}"
    return CheckFailed("onnx-export", text, location=place, hint=WAY_OUT)


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
