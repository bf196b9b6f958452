"""Frozen teachers: copies of the student's graph from before a pass compressed it."""

from __future__ import annotations

import copy

import torch
import torch.fx

from gpusq_compile.attention_plan import planned_attentions
from gpusq_compile.compilation import Compilation
from gpusq_compile.graph.query import module_calls
from gpusq_compile.plan import planned
from gpusq_compile.sparsity import Mask


def frozen_copy(graph_module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A copy of the graph with nothing trainable.

    Before pruning it is M_DF, the dense teacher of the sparse phase; before quantization it is
    M_SF, the sparse teacher of the quantized phase.
    """
    teacher = copy.deepcopy(graph_module)
    return teacher.requires_grad_(False).eval()


def needs_dense_teacher(compilation: Compilation) -> bool:
    """Whether a later pass learns from the dense model: a phase, its W_j, or reconstruction."""
    prunes = any(plan.sparsity for _, plan in planned(compilation.ir.graph))
    phase = compilation.options.finetune and compilation.rules.finetune.sparse != "none"
    return (
        (phase and prunes)
        or quantized_phase_follows(compilation)
        or reconstruction_follows(compilation)
    )


def quantized_phase_follows(compilation: Compilation) -> bool:
    return compilation.rules.finetune.quantize != "none" and _quantizes(compilation)


def reconstruction_follows(compilation: Compilation) -> bool:
    return compilation.rules.finetune.reconstruct != "none" and _quantizes(compilation)


def _quantizes(compilation: Compilation) -> bool:
    graph = compilation.ir.graph
    quantizes = any(plan.quantize for _, plan in planned(graph)) or any(
        plan.quantize for _, plan in planned_attentions(graph)
    )
    return compilation.options.finetune and quantizes


def zero_masked_weights(graph_module: torch.fx.GraphModule) -> None:
    """Set the stored weights to zero where their mask is.

    From zero, a masked entry stays exactly zero: its gradient is zero, and so are its weight
    decay and its optimizer state.
    """
    for node, module in module_calls(graph_module):
        if isinstance(module, Mask):
            source = node.args[0]
            assert isinstance(source, torch.fx.Node)
            with torch.no_grad():
                graph_module.get_parameter(str(source.target)).mul_(module.mask)
