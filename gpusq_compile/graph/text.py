"""The IR as readable text, one line a node, for dumps and golden files."""

from __future__ import annotations

import torch
import torch.fx

from gpusq_compile.graph.query import module_path, static_shape


def graph_text(graph_module: torch.fx.GraphModule) -> str:
    """`%name = operator(arguments)  # [shape] module.path`, parameters by their path."""
    lines = []
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            continue
        if node.op == "output":
            lines.append(f"return {_argument(node.args[0])}")
            continue
        shape = static_shape(node)
        size = (
            ""
            if shape is None
            else " [" + ", ".join("?" if s is None else str(s) for s in shape) + "]"
        )
        where = module_path(node)
        arguments = [_argument(argument) for argument in node.args]
        arguments += [f"{key}={_argument(value)}" for key, value in node.kwargs.items()]
        call = "input" if node.op == "placeholder" else f"{_target(node)}({', '.join(arguments)})"
        comment = f"{size} {where}".rstrip()
        lines.append(f"%{node.name} = {call}" + (f"  #{comment}" if comment else ""))
    return "\n".join(lines) + "\n"


def _target(node: torch.fx.Node) -> str:
    if node.op == "call_module":
        return f"module[{node.target}]"
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    return getattr(node.target, "__name__", str(node.target))


def _argument(value: object) -> str:
    if isinstance(value, torch.fx.Node):
        return str(value.target) if value.op == "get_attr" else f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_argument(item) for item in value) + "]"
    return repr(value)
