"""Which attentions TensorRT computes as one fused INT8 kernel.

Found by building engines with TensorRT for RTX 1.7 for portable targets: with Q/DQ on queries,
keys, values and the softmax output the builder made one INT8 layer (`_gemm_mha_v2`) of each
attention with these sizes, and separate products with an FP16 matrix of scores between them of
every other. A scale before or after the first product, biases and masks, constant or computed,
and the number of axes in front made no difference, nor did float32 around it. What reads the output
must quantize it: with a float output none was fused.
"""

from __future__ import annotations

from gpusq_compile.graph.attention import AttentionSizes

HEAD_DIMS = (16, 32, 64)
MAX_KEYS = 512


def unfused(sizes: AttentionSizes) -> str | None:
    """Why TensorRT would not fuse an attention of these sizes in INT8; None where it does."""
    head_dim, keys, queries = sizes.head_dim, sizes.keys, sizes.queries
    if head_dim is None or keys is None or queries is None:
        what = "head size" if head_dim is None else "number of keys or queries"
        return f"its {what} is dynamic, and TensorRT fuses INT8 attention of known sizes"
    if head_dim not in HEAD_DIMS:
        return f"TensorRT fuses INT8 attention with heads of 16, 32 or 64, not of {head_dim}"
    if sizes.value_dim != head_dim:
        return (
            "TensorRT fuses INT8 attention whose keys and values have one size, "
            f"not {head_dim} and {sizes.value_dim}"
        )
    if sizes.heads == 1:
        return "TensorRT does not fuse INT8 attention of a single head"
    if keys > MAX_KEYS:
        return f"TensorRT fuses INT8 attention over {MAX_KEYS} keys at most, not over {keys}"
    if queries == 1:
        return "TensorRT does not fuse INT8 attention of a single query"
    return None
