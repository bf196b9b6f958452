"""What one sample costs to compute: multiply-accumulates, bit operations, equivalent FLOPs.

- MACs: multiply-accumulates of every linear, convolution and attention product, counted on the
  graph. Softmax, normalizations and activation functions are left out, as everyone leaves them out,
  and convolutions that a pass inserted with constants of zeros and ones, to move and add values.
- FLOPs: two per MAC. GPUSQ-ViT's tables, like most, print MACs under that name.
- Bit operations: MACs x weight bits x activation bits x density, where density is the share of
  weights that a mask leaves. An attention product has two activations for factors.
- Equivalent FLOPs: the FLOPs divided by how many times as many of them a tensor core does in the
  same time: 8 in FP16, 16 in INT8, 32 in INT4, relative to FP32 (an NVIDIA T4: 8.1, 65, 130 and
  260 TFLOPS), and twice that where such a core skips the zeros of the mask: in FP16 and INT8 of
  one that is 2:4, in INT4 of one that comes in pairs. A sparse INT8 GEMM is thus worth 32 and a
  sparse INT4 GEMM 64. GPUSQ-ViT (CVPR 2023, tables 1 to 3, and table 2 of its appendix) reports
  31 and 62 for whole models and no formula; this is the one that these numbers are consistent with.

The figures before are those of the dense FP32 model. INT4 counts as on INT4 tensor cores: TensorRT,
which multiplies it as INT8, does half of that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.fx

from gpusq_compile.attention_plan import ATTENTION_PLAN, AttentionPlan
from gpusq_compile.execution import takes_sparse_kernels
from gpusq_compile.graph.attention import find_attentions
from gpusq_compile.graph.edit import NAMESPACE
from gpusq_compile.graph.query import (
    input_dependent,
    module_path,
    tensor_attribute,
    traced_batch,
    traced_shape,
    weight_source,
)
from gpusq_compile.plan import PLAN, LayerPlan, Treatment
from gpusq_compile.sparsity import PATTERNS

aten = torch.ops.aten

BITS = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}
THROUGHPUT = {"fp32": 1, "fp16": 8, "int8": 16, "int4": 32}
"""Multiply-accumulates in the time of one in FP32, dense."""

SKIPPING = 2
"""How many times as many where half of the weights are skipped."""

LINEAR = frozenset(
    {
        aten.linear.default,
        aten.conv1d.default,
        aten.conv1d.padding,
        aten.conv2d.default,
        aten.conv2d.padding,
        aten.conv3d.default,
        aten.conv3d.padding,
    }
)
TRANSPOSED = frozenset(
    {
        aten.conv_transpose1d.default,
        aten.conv_transpose2d.input,
        aten.conv_transpose3d.input,
    }
)
EITHER = aten.convolution.default
"""Plain or transposed, as its seventh argument says."""
PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default, aten.mm.default})
SUMMED_PRODUCTS = frozenset({aten.addmm.default, aten.baddbmm.default})

Kind = Literal["gemm", "attention"]


@dataclass(frozen=True)
class ComputeEntry:
    """One operator that multiplies, per sample.

    `kind` is "gemm" for a weight times an activation and "attention" for a product of two
    activations (both products of a fused attention are one entry). `weight` and `activation` are
    the types of its factors ("int8", "fp16", ...), `pattern` the weight's sparsity.
    """

    name: str
    kind: Kind
    macs: int
    weight: str
    activation: str
    pattern: str | None = None

    @property
    def compressed(self) -> bool:
        integer = self.weight in ("int8", "int4") or self.activation in ("int8", "int4")
        return integer or self.pattern is not None

    @property
    def density(self) -> float:
        return 1.0 if self.pattern is None else PATTERNS[self.pattern].density

    @property
    def bit_operations(self) -> float:
        return self.macs * BITS[self.weight] * BITS[self.activation] * self.density

    @property
    def speedup(self) -> float:
        """Its multiply-accumulates in the time of one in FP32; the slower factor decides.

        Zeros count where a tensor core skips them (PTX ISA, "mma.sp"): 2:4 in FP16 and INT8, pairs
        in INT4, which takes any other 2:4 mask as INT8, none in FP32.
        """
        if BITS[self.weight] <= 8 and BITS[self.activation] >= 16:
            # Dequantized to a dense operand before the product.
            return THROUGHPUT[self.activation]
        slower = min(self.weight, self.activation, key=THROUGHPUT.__getitem__)
        return max(THROUGHPUT[slower], self._sparse_throughput(slower))

    def _sparse_throughput(self, slower: str) -> float:
        """That of the fastest tensor core which skips the mask's zeros; 0 where none does."""
        if self.pattern is None:
            return 0
        if slower == "int4" and PATTERNS["pair4:8"].allows(PATTERNS[self.pattern]):
            return SKIPPING * THROUGHPUT["int4"]
        # INT8 instructions take 4-bit values as well.
        operands = "int8" if slower == "int4" else slower
        skips = operands in ("fp16", "int8") and takes_sparse_kernels(self.pattern)
        return SKIPPING * THROUGHPUT[operands] if skips else 0

    @property
    def equivalent_flops(self) -> float:
        return 2 * self.macs / self.speedup

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "macs": self.macs,
            "weight": self.weight,
            "activation": self.activation,
            "density": self.density,
            "bit_operations": self.bit_operations,
            "equivalent_flops": self.equivalent_flops,
        }


@dataclass(frozen=True)
class ComputeFigures:
    """Every operator that multiplies, in graph order, per sample."""

    entries: tuple[ComputeEntry, ...]

    @property
    def macs(self) -> int:
        return sum(entry.macs for entry in self.entries)

    def as_dict(self) -> dict[str, Any]:
        """The sums of the compressed GEMMs, of all GEMMs and of the model, and each operator."""
        gemms = [entry for entry in self.entries if entry.kind == "gemm"]
        return {
            "per": "sample",
            "compressed_gemms": summed(entry for entry in gemms if entry.compressed),
            "gemms": summed(gemms),
            "attention": summed(entry for entry in self.entries if entry.kind == "attention"),
            "model": summed(self.entries),
            "operators": [entry.as_dict() for entry in self.entries],
        }


def summed(entries: Iterable[ComputeEntry]) -> dict[str, Any]:
    """Sums before and after, and their ratios, None where there is nothing to compute."""
    entries = list(entries)
    macs = sum(entry.macs for entry in entries)
    flops, bits = 2 * macs, macs * BITS["fp32"] ** 2
    bits_after = sum(entry.bit_operations for entry in entries)
    flops_after = sum(entry.equivalent_flops for entry in entries)
    return {
        "macs": macs,
        "flops": flops,
        "bit_operations": _before_after(bits, bits_after),
        "equivalent_flops": _before_after(flops, flops_after),
    }


def _before_after(before: float, after: float) -> dict[str, float | None]:
    return {"before": before, "after": after, "ratio": before / after if after else None}


def compute_figures(graph_module: torch.fx.GraphModule, precision: str) -> ComputeFigures:
    """Count a traced graph, compressed as its nodes' plans say they are.

    Args:
        graph_module: its nodes carry shapes (`meta["val"]`); dimension 0 of the first input is the
            batch. What does not depend on the inputs runs once, when the engine is built, and is
            not counted.
        precision: the type of everything that is not quantized, "fp16" or "fp32".
    """
    dependent = input_dependent(graph_module.graph)
    quantized = _quantized_products(graph_module.graph)
    batch = traced_batch(graph_module.graph)
    taken: dict[str, int] = {}
    entries = []
    for node in graph_module.graph.nodes:
        if node.op != "call_function" or node not in dependent:
            continue
        macs = _macs(graph_module, node)
        if macs is None:
            continue
        name, type_ = _unique(node, taken), quantized.get(node, precision)
        entries.append(_entry(node, macs // batch, name, dependent, type_))
    return ComputeFigures(tuple(entries))


def _quantized_products(graph: torch.fx.Graph) -> dict[torch.fx.Node, str]:
    """The type that both products of each quantized attention multiply."""
    types: dict[torch.fx.Node, str] = {}
    for node, attention in find_attentions(graph).items():
        plan: AttentionPlan | None = node.meta.get(ATTENTION_PLAN)
        if plan is not None and plan.applied.activation and attention.scores is not None:
            types[attention.scores] = types[node] = plan.applied.activation
    return types


def _entry(
    node: torch.fx.Node, macs: int, name: str, dependent: set[torch.fx.Node], precision: str
) -> ComputeEntry:
    """`precision` is the type of what its plan leaves as it is."""
    plan: LayerPlan | None = node.meta.get(PLAN)
    applied = plan.applied if plan is not None else Treatment()
    activation = applied.activation or precision
    kind: Kind = "gemm"
    if node.target not in LINEAR | TRANSPOSED | {EITHER} and len(_factors(node) & dependent) != 1:
        kind = "attention"
    weight = applied.weight or (activation if kind == "attention" else precision)
    return ComputeEntry(name, kind, macs, weight, activation, applied.sparsity)


def _unique(node: torch.fx.Node, taken: dict[str, int]) -> str:
    plan: LayerPlan | None = node.meta.get(PLAN)
    name = plan.name if plan is not None else module_path(node) or node.name
    taken[name] = taken.get(name, 0) + 1
    return name if taken[name] == 1 else f"{name}#{taken[name]}"


def _factors(node: torch.fx.Node) -> set[torch.fx.Node]:
    if node.target in SUMMED_PRODUCTS:
        return {arg for arg in node.args[1:3] if isinstance(arg, torch.fx.Node)}
    return set(node.all_input_nodes)


def _macs(graph_module: torch.fx.GraphModule, node: torch.fx.Node) -> int | None:
    """Multiply-accumulates of the traced batch, None for an operator that does not multiply."""
    if node.target is EITHER and _is_inserted(weight_source(node)):
        return None
    transposed = node.target in TRANSPOSED or (node.target is EITHER and node.args[6])
    if transposed:
        return math.prod(_input_sizes(node, 0)) * math.prod(_weight_sizes(graph_module, node)[1:])
    if node.target in LINEAR or node.target is EITHER:
        return math.prod(_sizes(node)) * math.prod(_weight_sizes(graph_module, node)[1:])
    if node.target is aten.scaled_dot_product_attention.default:
        keys = _input_sizes(node, 1)[-2]
        return (math.prod(_input_sizes(node, 0)) + math.prod(_sizes(node))) * keys
    if node.target in PRODUCTS:
        return math.prod(_sizes(node)) * _input_sizes(node, 0)[-1]
    if node.target in SUMMED_PRODUCTS:
        return math.prod(_sizes(node)) * _input_sizes(node, 1)[-1]
    if node.target is aten.einsum.default:
        return _einsum_macs(node)
    return None


def _is_inserted(weight: torch.fx.Node | None) -> bool:
    return weight is not None and str(weight.target).startswith(f"{NAMESPACE}.")


def _einsum_macs(node: torch.fx.Node) -> int | None:
    """The output times every summed size; None for one factor, which multiplies nothing."""
    equation, operands = node.args[0], node.args[1]
    assert isinstance(equation, str)
    if not isinstance(operands, Sequence) or len(operands) != 2:
        return None
    sides = equation.replace(" ", "").split("->")
    inputs = sides[0].split(",")
    # Without an arrow the output has the labels that occur once.
    kept = sides[1] if len(sides) == 2 else "".join(c for c in sides[0] if sides[0].count(c) == 1)
    size = math.prod(_sizes(node))
    summed_sizes: dict[str, int] = {}
    for labels, operand in zip(inputs, operands, strict=True):
        assert isinstance(operand, torch.fx.Node)
        before, _, after = labels.partition("...")
        sizes = _sizes(operand)
        summed_sizes.update(zip(before, sizes, strict=False))
        summed_sizes.update(zip(reversed(after), reversed(sizes), strict=False))
    return size * math.prod(n for label, n in summed_sizes.items() if label not in kept)


def _weight_sizes(graph_module: torch.fx.GraphModule, node: torch.fx.Node) -> tuple[int, ...]:
    source = weight_source(node)
    if source is not None:
        return tuple(tensor_attribute(graph_module, str(source.target)).shape)
    return _input_sizes(node, 1)


def _input_sizes(node: torch.fx.Node, index: int) -> tuple[int, ...]:
    source = node.args[index]
    assert isinstance(source, torch.fx.Node)
    return _sizes(source)


def _sizes(node: torch.fx.Node) -> tuple[int, ...]:
    """The shape of the traced batch's value."""
    sizes = traced_shape(node)
    if sizes is None:
        raise RuntimeError(f"node {node.name} has no shape")
    return sizes
