"""Roles that the rules give to layers by name, in place of those that were found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.fx

from gpusq_compile.errors import InputError, Location, nearest
from gpusq_compile.graph.query import is_weighted, module_stack, op_of
from gpusq_compile.graph.roles import Roles
from gpusq_compile.language.patterns import compile_pattern

MADE_OF_MODULES = ("stage_end", "final_projection")
"""Roles that a module has by what it computes; all others are its layers'."""


def with_named_roles(
    graph: torch.fx.Graph,
    found: Roles,
    named: Mapping[str, Sequence[str]],
    layers: Mapping[str, torch.fx.Node],
    residuals: set[torch.fx.Node],
    places: Mapping[str, Location],
) -> Roles:
    """The roles that were found, with the roles in `named` given to what these name instead.

    Args:
        named: for each role the patterns of layers' or modules' names.
        layers: the nodes by the names that rules know them by.
        residuals: the residual adds.
        places: where each role's names were written.

    Raises:
        InputError: a name matches neither a layer nor a module.
    """
    modules = _by_module(graph)
    given = {
        role: {
            node
            for pattern in patterns
            for node in _named(role, pattern, layers, modules, residuals, places.get(role))
        }
        for role, patterns in named.items()
    }
    roles: Roles = {}
    for node in graph.nodes:
        kept = [role for role, nodes in given.items() if node in nodes]
        kept += [role for role in found.get(node, ()) if role not in given]
        if kept:
            roles[node] = tuple(kept)
    return roles


def _named(
    role: str,
    pattern: str,
    layers: Mapping[str, torch.fx.Node],
    modules: Mapping[str, list[torch.fx.Node]],
    residuals: set[torch.fx.Node],
    place: Location | None,
) -> list[torch.fx.Node]:
    """The nodes that one name of a role stands for: a layer's, or else a module's."""
    matches = compile_pattern(pattern).fullmatch
    by_layer = role not in MADE_OF_MODULES
    fitting = {name: node for name, node in layers.items() if is_weighted(node) or not by_layer}
    found = [node for name, node in fitting.items() if matches(name)]
    if found:
        return found
    for path, nodes in modules.items():
        if not matches(path):
            continue
        if by_layer:
            found += [node for node in nodes if is_weighted(node)]
        else:
            found.append(max(residuals.intersection(nodes), default=nodes[-1]))
    if found:
        return found
    names = [*fitting, *(path for path in modules if not by_layer)]
    names += [path for path, nodes in modules.items() if by_layer and any(map(is_weighted, nodes))]
    close = nearest(pattern, names)
    what = "neither a layer nor a module" + (" with layers" if by_layer else "")
    if by_layer and (other := next((node for path, node in layers.items() if matches(path)), None)):
        what = f"a {op_of(other) or 'node'}, and this role is one of linears and convolutions,"
    raise InputError(
        "role-unmatched",
        f"roles: {role}: '{pattern}' names {what} of this model",
        location=place,
        hint=f"the nearest name is '{close}'" if close else "--dry-run lists the layers",
    )


def _by_module(graph: torch.fx.Graph) -> dict[str, list[torch.fx.Node]]:
    """The operators of each module and of those in it, in graph order, by its dotted name.

    Where a module returns several tensors, the last that it computes counts as its output.
    """
    modules: dict[str, list[torch.fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            for path in {path for path, _ in module_stack(node) if path}:
                modules.setdefault(path, []).append(node)
    return modules
