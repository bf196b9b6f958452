"""Frozen teachers: a copy of the student's graph without some of what passes inserted."""

from __future__ import annotations

import copy

import torch
import torch.fx
from torch import nn

from gpusq_compile.graph.edit import finish
from gpusq_compile.sparsity import Mask


def frozen_copy(
    graph_module: torch.fx.GraphModule, *, without: type[nn.Module]
) -> torch.fx.GraphModule:
    """A copy of the graph with every call of a `without` module bypassed and nothing trainable.

    Without `Mask` it is M_DF, the dense teacher of the sparse phase; without `FakeQuantize` it is
    M_SF, the sparse teacher of the quantized phase.
    """
    teacher = copy.deepcopy(graph_module)
    modules = dict(teacher.named_modules())
    for node in list(teacher.graph.nodes):
        if node.op == "call_module" and isinstance(modules[str(node.target)], without):
            node.replace_all_uses_with(node.args[0])
            teacher.graph.erase_node(node)
    finish(teacher)
    return teacher.requires_grad_(False).eval()


def zero_masked_weights(graph_module: torch.fx.GraphModule) -> int:
    """Set the stored weights to zero where their mask is; returns how many masks there are.

    From zero, a masked entry stays exactly zero: its gradient is zero, and so are its weight
    decay and its optimizer state.
    """
    count = 0
    modules = dict(graph_module.named_modules())
    for node in graph_module.graph.nodes:
        if node.op != "call_module":
            continue
        module = modules[str(node.target)]
        if isinstance(module, Mask):
            weight = graph_module.get_parameter(str(node.args[0].target))
            with torch.no_grad():
                weight.mul_(module.mask)
            count += 1
    return count
