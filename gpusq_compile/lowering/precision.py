"""Float32 -> FP16 around the quantized operators."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnxruntime.transformers.float16 import convert_float_to_float16


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Convert every float tensor to FP16; graph inputs and outputs stay FP32 behind one Cast each.

    Scales were learned as FP16 values, so their conversion is exact. Values beyond the FP16 range
    (masking constants) are clamped to it.
    """
    half = convert_float_to_float16(
        model,
        keep_io_types=True,
        disable_shape_infer=True,
        force_fp16_initializers=True,
        # The default list leaves operators in FP32 that TensorRT runs in FP16.
        op_block_list=[],
    )
    converted = ir.from_proto(half)
    common_passes.TopologicalSortPass()(converted)
    proto: onnx.ModelProto = ir.to_proto(converted)
    return proto
