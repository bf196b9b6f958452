"""Frozen teachers: a copy of the student's graph without some of what passes inserted."""

from __future__ import annotations

import copy

import torch
import torch.fx
from torch import nn

from gpusq_compile.graph.edit import bypass, finish
from gpusq_compile.graph.query import module_calls
from gpusq_compile.sparsity import Mask


def frozen_copy(
    graph_module: torch.fx.GraphModule, *, without: type[nn.Module]
) -> torch.fx.GraphModule:
    """A copy of the graph with every call of a `without` module bypassed and nothing trainable.

    Without `Mask` it is M_DF, the dense teacher of the sparse phase; without `FakeQuantize` it is
    M_SF, the sparse teacher of the quantized phase.
    """
    teacher = copy.deepcopy(graph_module)
    for node, module in module_calls(teacher):
        if isinstance(module, without):
            bypass(node)
    finish(teacher)
    return teacher.requires_grad_(False).eval()


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
