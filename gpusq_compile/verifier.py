"""The laws of the IR, checked after every pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.fx

from gpusq_compile.attention_plan import planned_attentions
from gpusq_compile.errors import InternalError
from gpusq_compile.finetune.decisions import Decision
from gpusq_compile.finetune.taps import Tap
from gpusq_compile.graph.query import weight_source
from gpusq_compile.plan import planned
from gpusq_compile.quantization.fake_quantize import FakeQuantize
from gpusq_compile.sparsity import Mask

Law = Callable[[torch.fx.GraphModule], list[str]]


def verify_ir(graph_module: torch.fx.GraphModule, after: str) -> None:
    """Check every law.

    Raises:
        InternalError: naming the pass that broke a law, the node and the law.
    """
    try:
        graph_module.graph.lint()
    except RuntimeError as error:
        raise InternalError("ir-lint", f"after pass '{after}': {error}") from error
    broken = [text for law in LAWS for text in law(graph_module)]
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise InternalError("ir-law", f"after pass '{after}': {broken[0]}{more}")


def every_value_has_a_shape(graph_module: torch.fx.GraphModule) -> list[str]:
    return [
        f"node {node.name} carries no value metadata"
        for node in graph_module.graph.nodes
        if node.op in ("call_function", "call_module", "get_attr") and "val" not in node.meta
    ]


def only_known_modules_are_called(graph_module: torch.fx.GraphModule) -> list[str]:
    modules = dict(graph_module.named_modules())
    return [
        f"node {node.name} calls {type(modules.get(str(node.target))).__name__}, which is neither "
        "mask, fake-quantizer, tap nor decision"
        for node in graph_module.graph.nodes
        if node.op == "call_module"
        and not isinstance(modules.get(str(node.target)), (Mask, FakeQuantize, Tap, Decision))
    ]


def plans_name_their_weight(graph_module: torch.fx.GraphModule) -> list[str]:
    broken = []
    for node, plan in planned(graph_module.graph):
        source = weight_source(node)
        if source is not None and str(source.target) != plan.weight:
            broken.append(f"layer {plan.name} reads {source.target}, but plans for {plan.weight}")
    return broken


def layer_names_are_unique(graph_module: torch.fx.GraphModule) -> list[str]:
    graph = graph_module.graph
    names = [plan.name for _, plan in planned(graph)]
    names += [plan.name for _, plan in planned_attentions(graph)]
    return [f"two layers are named {name}" for name in sorted(set(names)) if names.count(name) > 1]


def quantized_weights_are_masked_first(graph_module: torch.fx.GraphModule) -> list[str]:
    """A mask after the fake-quantizer would train scales on values that are thrown away."""
    modules = dict(graph_module.named_modules())
    broken = []
    for node in graph_module.graph.nodes:
        if node.op != "call_module" or not isinstance(modules[str(node.target)], Mask):
            continue
        source = node.args[0]
        if source.op == "call_module" and isinstance(modules[str(source.target)], FakeQuantize):
            broken.append(f"node {node.name} masks a value that is already quantized")
    return broken


def every_insertion_has_its_own_module(graph_module: torch.fx.GraphModule) -> list[str]:
    """Two layers that shared a mask or a scale would silently share what was computed for one."""
    targets = [str(n.target) for n in graph_module.graph.nodes if n.op == "call_module"]
    return [f"{t} is called twice" for t in sorted(set(targets)) if targets.count(t) > 1]


LAWS: tuple[Law, ...] = (
    every_insertion_has_its_own_module,
    every_value_has_a_shape,
    only_known_modules_are_called,
    plans_name_their_weight,
    layer_names_are_unique,
    quantized_weights_are_masked_first,
)
