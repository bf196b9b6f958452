"""Small ONNX vision transformers, as the lowering emits them, for the engine tests.

Opset 21, strongly typed, dynamic batch; the node of each GEMM with weights carries its layer's
name. Random weights, pruned 2:4 along the reduction axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Layout = Literal["kn", "nk"]


@dataclass(frozen=True)
class BlockSpec:
    """What to build. `dim` is a multiple of `heads`; `tokens` counts the patches."""

    dim: int = 64
    heads: int = 2
    tokens: int = 16
    blocks: int = 1
    patch: int = 4
    classes: int = 32
    quantize: bool = True
    qkv_output: bool = True
    quantize_outputs: bool = False
    quantize_attention: bool = False
    dtype: Literal["fp16", "fp32"] = "fp16"
    layout: Layout = "kn"
    scale_axis: Literal["out", "reduction", "tensor"] = "out"
    seed: int = 0


class _Graph:
    """Collects nodes and initializers; every method returns the name of the tensor it made."""

    def __init__(self, spec: BlockSpec) -> None:
        self.spec = spec
        self.rng = np.random.default_rng(spec.seed)
        self.float = np.float16 if spec.dtype == "fp16" else np.float32
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def const(self, name: str, value: NDArray[np.generic]) -> str:
        self.initializers[name] = numpy_helper.from_array(value, name)
        return name

    def ints(self, name: str, values: list[int]) -> str:
        return self.const(name, np.array(values, dtype=np.int64))

    def node(self, op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        output = f"{name}.out"
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def qdq(self, x: str, name: str, scale: float = 0.05) -> str:
        s = self.const(f"{name}.scale", np.array(scale, dtype=self.float))
        z = self.const(f"{name}.zero_point", np.array(0, dtype=np.int8))
        q = self.node("QuantizeLinear", [x, s, z], f"{name}.quantize")
        return self.node("DequantizeLinear", [q, s, z], f"{name}.dequantize")

    def weight(self, name: str, shape: tuple[int, ...], *, reduction: int, out: int) -> str:
        """A 2:4 weight: INT8 with a DequantizeLinear where the spec quantizes, else float."""
        values = self.rng.normal(0, 0.05, size=shape)
        rows = np.moveaxis(values, reduction, -1)
        if rows.shape[-1] % 4 == 0:
            groups = rows.reshape(-1, 4)
            keep = np.argsort(-np.abs(groups), axis=1)[:, :2]
            mask = np.zeros_like(groups, dtype=bool)
            np.put_along_axis(mask, keep, True, axis=1)
            values = np.moveaxis((groups * mask).reshape(rows.shape), -1, reduction)
        if not self.spec.quantize:
            return self.const(f"{name}.weight", values.astype(self.float))
        w = self.const(
            f"{name}.weight", np.clip(np.rint(values / 0.002), -127, 127).astype(np.int8)
        )
        if self.spec.scale_axis == "tensor":
            s = self.const(f"{name}.weight_scale", np.array(0.002, dtype=self.float))
            return self.node("DequantizeLinear", [w, s], f"{name}.weight_dequantize")
        axis = out if self.spec.scale_axis == "out" else reduction
        s = self.const(f"{name}.weight_scale", np.full(shape[axis], 0.002, dtype=self.float))
        return self.node("DequantizeLinear", [w, s], f"{name}.weight_dequantize", axis=axis)

    def linear(self, x: str, name: str, n_in: int, n_out: int, *, output: bool = False) -> str:
        if self.spec.quantize:
            x = self.qdq(x, f"{name}.input")
        if self.spec.layout == "kn":
            w = self.weight(name, (n_in, n_out), reduction=0, out=1)
        else:
            w = self.weight(name, (n_out, n_in), reduction=1, out=0)
            w = self.node("Transpose", [w], f"{name}.weight_transpose", perm=[1, 0])
        y = self.node("MatMul", [x, w], name)
        b = self.const(f"{name}.bias", self.rng.normal(0, 0.02, n_out).astype(self.float))
        y = self.node("Add", [y, b], f"{name}.bias_add")
        if self.spec.quantize and output:
            y = self.qdq(y, f"{name}.output")
        return y

    def layer_norm(self, x: str, name: str) -> str:
        scale = self.const(f"{name}.weight", np.ones(self.spec.dim, dtype=self.float))
        bias = self.const(f"{name}.bias", np.zeros(self.spec.dim, dtype=self.float))
        return self.node("LayerNormalization", [x, scale, bias], name, axis=-1, epsilon=1e-6)

    def attention(self, x: str, name: str) -> str:
        spec = self.spec
        head = spec.dim // spec.heads
        y = self.linear(x, f"{name}.qkv", spec.dim, 3 * spec.dim, output=spec.qkv_output)
        shape = self.ints(f"{name}.split_shape", [0, 0, 3, spec.heads, head])
        y = self.node("Reshape", [y, shape], f"{name}.split")
        y = self.node("Transpose", [y], f"{name}.to_heads", perm=[2, 0, 3, 1, 4])
        parts = []
        for index, part in enumerate(("q", "k", "v")):
            number = self.const(f"{name}.{part}_index", np.array(index, dtype=np.int64))
            parts.append(self.node("Gather", [y, number], f"{name}.{part}", axis=0))
        q, k, v = parts
        root = self.const(f"{name}.root", np.array(head**-0.5, dtype=self.float))
        q = self.node("Mul", [q, root], f"{name}.scale_q")
        k = self.node("Transpose", [k], f"{name}.k_t", perm=[0, 1, 3, 2])
        if spec.quantize_attention:
            q, k, v = (self.qdq(t, f"{name}.{n}_q") for t, n in ((q, "q"), (k, "k"), (v, "v")))
        a = self.node("MatMul", [q, k], f"{name}.scores")
        a = self.node("Softmax", [a], f"{name}.softmax", axis=-1)
        if spec.quantize_attention:
            a = self.qdq(a, f"{name}.softmax_q", scale=1 / 127)
        a = self.node("MatMul", [a, v], f"{name}.context")
        a = self.node("Transpose", [a], f"{name}.from_heads", perm=[0, 2, 1, 3])
        merged = self.ints(f"{name}.merge_shape", [0, 0, spec.dim])
        a = self.node("Reshape", [a, merged], f"{name}.merge")
        return self.linear(a, f"{name}.proj", spec.dim, spec.dim, output=spec.quantize_outputs)

    def gelu(self, x: str, name: str) -> str:
        return self.node("Gelu", [x], name)

    def mlp(self, x: str, name: str) -> str:
        spec = self.spec
        y = self.linear(x, f"{name}.fc1", spec.dim, 4 * spec.dim, output=spec.quantize_outputs)
        y = self.gelu(y, f"{name}.act")
        return self.linear(y, f"{name}.fc2", 4 * spec.dim, spec.dim, output=spec.quantize_outputs)


def gemm_names(spec: BlockSpec) -> list[str]:
    """The layers that `save_vit` marks, in graph order."""
    names = ["patch_embed.proj"]
    for i in range(spec.blocks):
        names += [f"blocks.{i}.{n}" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    return [*names, "head"]


def save_vit(path: Path, spec: BlockSpec) -> Path:
    """Write a ViT: Conv patch embedding, blocks, mean over tokens, Gemm head.

    Input `x`: [batch, 3, side, side]; output `logits`: [batch, classes], dtype of the spec.
    """
    g = _Graph(spec)
    side = round(spec.tokens**0.5) * spec.patch
    element = TensorProto.FLOAT16 if spec.dtype == "fp16" else TensorProto.FLOAT
    x = g.qdq("x", "patch_embed.proj.input") if spec.quantize else "x"
    w = g.weight("patch_embed.proj", (spec.dim, 3, spec.patch, spec.patch), reduction=1, out=0)
    bias = g.const("patch_embed.proj.bias", np.zeros(spec.dim, dtype=g.float))
    y = g.node("Conv", [x, w, bias], "patch_embed.proj", strides=[spec.patch, spec.patch])
    y = g.node("Reshape", [y, g.ints("flat", [0, 0, -1])], "patch_embed.flatten")
    y = g.node("Transpose", [y], "patch_embed.transpose", perm=[0, 2, 1])
    for i in range(spec.blocks):
        name = f"blocks.{i}"
        attended = g.attention(g.layer_norm(y, f"{name}.norm1"), f"{name}.attn")
        y = g.node("Add", [y, attended], f"{name}.residual1")
        fed = g.mlp(g.layer_norm(y, f"{name}.norm2"), f"{name}.mlp")
        y = g.node("Add", [y, fed], f"{name}.residual2")
    y = g.layer_norm(y, "norm")
    y = g.node("ReduceMean", [y, g.ints("token_axis", [1])], "pool", keepdims=0)
    if spec.quantize:
        y = g.qdq(y, "head.input")
    w = g.weight("head", (spec.classes, spec.dim), reduction=1, out=0)
    bias = g.const("head.bias", np.zeros(spec.classes, dtype=g.float))
    g.nodes.append(helper.make_node("Gemm", [y, w, bias], ["logits"], name="head", transB=1))
    graph = helper.make_graph(
        g.nodes,
        "vit",
        [helper.make_tensor_value_info("x", element, ["batch", 3, side, side])],
        [helper.make_tensor_value_info("logits", element, ["batch", spec.classes])],
        list(g.initializers.values()),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path
