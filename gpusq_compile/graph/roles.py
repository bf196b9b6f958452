"""Roles of operators, found from the graph's dataflow and not from any library's names.

A GEMM is a linear or an ungrouped convolution of one pixel. Grouped convolutions, normalizations
and activations lie on the way from one GEMM to the next.
- `patch_embed` (linear, conv2d): where tokens begin: the last of the weighted operators that all
  that reaches the first attention goes through. In front of it may lie a stem.
- `attention_qkv` (GEMM): its output reaches a product of an attention with no other one between.
- `attention_proj` (GEMM): the first one behind an attention.
- `mlp` (GEMM): one of two that have an activation function between them.
- `stage_end` (add): the last residual add of a stage.
- `final_projection` (normalization): the last one before the classifier.
- `classifier` (GEMM): its output reaches the graph's output with no other weighted operator,
  normalization or residual add between, and it is not the first operator with weights.

A stage is a run of residual adds that hand on one feature map, with no weight between them; an
isotropic model has one stage. Adds that only feed the branches of other ones make no stage.
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.fx

from gpusq_compile.graph.dominators import Dominators
from gpusq_compile.graph.products import (
    SOFTMAX,
    attention_parts,
    carries_values,
    with_stored_factor,
)
from gpusq_compile.graph.query import (
    input_dependent,
    is_gemm,
    is_size,
    is_weighted,
    mixes_channels,
    output_nodes,
    static_shape,
    traced_elements,
    value_dependent,
    walk_inputs,
    walk_users,
)

aten = torch.ops.aten

ROLES = (
    "patch_embed",
    "attention_qkv",
    "attention_proj",
    "mlp",
    "stage_end",
    "final_projection",
    "classifier",
)

ACTIVATIONS = {
    aten.celu.default,
    aten.elu.default,
    aten.gelu.default,
    aten.hardsigmoid.default,
    aten.hardswish.default,
    aten.hardtanh.default,
    aten.leaky_relu.default,
    aten.mish.default,
    aten.prelu.default,
    aten.relu.default,
    aten.relu6.default,
    aten.selu.default,
    aten.sigmoid.default,
    aten.silu.default,
    aten.softplus.default,
    aten.tanh.default,
}
NORMALIZATIONS = {
    aten.layer_norm.default,
    aten.group_norm.default,
    aten.batch_norm.default,
    aten.instance_norm.default,
    aten.rms_norm.default,
}

SAMPLERS = {
    aten.grid_sampler.default,
    aten.grid_sampler_2d.default,
    aten.grid_sampler_3d.default,
}
"""They read values at places that other values say: neither goes on as it was."""

SCALINGS = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.reshape.default}

Roles = dict[torch.fx.Node, tuple[str, ...]]


def find_roles(graph: torch.fx.Graph) -> Roles:
    """The roles of the graph's nodes; a node may have several, most have none."""
    return _Search(graph).run()


def residual_adds(graph: torch.fx.Graph, dependent: set[torch.fx.Node]) -> list[torch.fx.Node]:
    """Adds of a feature map and something computed from that feature map, in one shape.

    Args:
        dependent: the nodes that depend on the inputs' values.
    """
    skips = [(node, skipped(node)) for node in _adds_of_maps(graph, dependent)]
    # What is added again in block after block is a position embedding, not the feature map.
    added = Counter(skip for _, skip in skips)
    return [node for node, skip in skips if skip is not None and added[skip] == 1]


def skipped(add: torch.fx.Node) -> torch.fx.Node | None:
    """The operand of a residual add that skips the branch; None where the add is no such one.

    It is what the branch was computed from, or that after it was scaled: then there are weights in
    the branch, which the two halves of a rotary embedding do not have.
    """
    earlier, later = sorted(add.all_input_nodes)
    if earlier in branch_from(earlier, later):
        return earlier
    for operand, other in ((earlier, later), (later, earlier)):
        base = unscaled(operand)
        branch = branch_from(base, other) if base is not operand else set()
        if base in branch and any(
            is_weighted(node) and base in branch_from(base, node) for node in branch - {base}
        ):
            return operand
    return None


def unscaled(node: torch.fx.Node) -> torch.fx.Node:
    """What a node scales, where it does nothing else."""
    while node.target in SCALINGS and isinstance(node.args[0], torch.fx.Node):
        node = node.args[0]
    return node


def branch_from(start: torch.fx.Node, end: torch.fx.Node) -> set[torch.fx.Node]:
    """`end` and what it is computed from, not further back than to `start`."""
    if end <= start:
        return {end}
    return {end, *walk_inputs(end, lambda node: node > start and not is_size(node))}


class _Search:
    """The search for roles in one graph, and what it asks of the graph again and again."""

    def __init__(self, graph: torch.fx.Graph) -> None:
        self.graph = graph
        self.dependent = input_dependent(graph)
        self.by_value = value_dependent(graph)
        self.dominators = Dominators(graph, self.by_value)
        parts = attention_parts(graph, self.dependent)
        self.attentions, self.head_mixers = parts.products, parts.head_mixers
        self.other_gemms = set(with_stored_factor(graph, self.dependent))
        self.trunk = residual_adds(graph, self.by_value)
        self.joins = set(_branch_joins(graph, self.dependent))
        self.leave_to_branches(_nested(self.trunk))

    def leave_to_branches(self, adds: set[torch.fx.Node]) -> None:
        """Take residual adds for parts of the branches of other ones: they hand on no map."""
        self.joins |= adds
        self.trunk = [node for node in self.trunk if node not in adds]
        self.in_trunk = set(self.trunk)

    def run(self) -> Roles:
        found: dict[torch.fx.Node, list[str]] = {}

        def add(role: str, nodes: list[torch.fx.Node]) -> None:
            for node in nodes:
                found.setdefault(node, []).append(role)

        classifiers = self.classifiers()
        gemms = [node for node in self.graph.nodes if is_gemm(node) and node in self.dependent]
        queries = {node for node in gemms if self.feeds_attention(node)}
        self.leave_to_branches({node for node in self.trunk if self.adds_queries(node, queries)})
        embeds = [n for n in self.patch_embeddings(queries) if n not in classifiers]
        add("patch_embed", embeds)
        for node in gemms:
            if node in classifiers or node in self.head_mixers or node in found:
                continue
            if node in queries:
                add("attention_qkv", [node])
            elif self.reads_attention(node):
                add("attention_proj", [node])
            elif self.has_activation_to_another(node):
                add("mlp", [node])
        for node in gemms:
            if node not in found and node not in classifiers and self.feeds_mlp(node, found):
                add("mlp", [node])
        add("stage_end", self.stage_ends(embeds))
        add("final_projection", self.final_projections(classifiers))
        add("classifier", classifiers)
        return {node: tuple(roles) for node, roles in found.items()}

    def within(self, node: torch.fx.Node) -> bool:
        """An operator between two GEMMs of one branch of a block."""
        return (
            carries_values(node)
            and not mixes_channels(node)
            and node not in self.other_gemms
            and node.target not in SAMPLERS
            and node not in self.attentions
            and node not in self.in_trunk
        )

    def within_branch(self, node: torch.fx.Node) -> bool:
        """The same, where no second branch with weights of its own joins."""
        return self.within(node) and node not in self.joins

    def feeds_attention(self, node: torch.fx.Node) -> bool:
        """Whether a GEMM makes queries, keys, values, or attention weights from each token."""

        def through(user: torch.fx.Node) -> bool:
            # A softmax over something that no input decides is a table of positions.
            return self.within(user) and (user.target not in SOFTMAX or user in self.by_value)

        return any(user in self.attentions for user in walk_users(node, through))

    def reads_attention(self, node: torch.fx.Node) -> bool:
        return any(source in self.attentions for source in self.upstream(node))

    def upstream(self, node: torch.fx.Node) -> list[torch.fx.Node]:
        """What a weighted operator's input is made of, back to the GEMMs before it."""
        data = node.args[0]
        assert isinstance(data, torch.fx.Node)
        return [data, *(walk_inputs(data, self.within) if self.within(data) else ())]

    def has_activation_to_another(self, node: torch.fx.Node) -> bool:
        """Whether an activation function lies between a GEMM and the one before or behind it."""
        for source in self.upstream(node):
            if source.target in ACTIVATIONS and self.within_branch(source):
                return any(is_gemm(n) for n in walk_inputs(source, self.within_branch))
        for user in walk_users(node, self.within_branch):
            if user.target in ACTIVATIONS and self.within_branch(user):
                return any(is_gemm(n) for n in walk_users(user, self.within_branch))
        return False

    def has_activation_behind(self, node: torch.fx.Node) -> bool:
        """Whether a GEMM is followed by an activation function before anything joins it."""
        return any(user.target in ACTIVATIONS for user in walk_users(node, self.within_branch))

    def feeds_mlp(self, node: torch.fx.Node, found: dict[torch.fx.Node, list[str]]) -> bool:
        """Whether a GEMM feeds an `mlp` one: the ungated half of a gated unit (SwiGLU) does."""
        return any("mlp" in found.get(user, ()) for user in walk_users(node, self.within_branch))

    def patch_embeddings(self, queries: set[torch.fx.Node]) -> list[torch.fx.Node]:
        """The last weighted operators that all on the way to the first attentions goes through.

        A model without attention has them in front of its first residual block; one without any
        has the first weighted operators.
        """
        behind: set[torch.fx.Node] = set()
        for node in self.graph.nodes:
            if node in self.attentions or not behind.isdisjoint(node.all_input_nodes):
                behind.add(node)
        starts = [n for n in self.graph.nodes if n in self.attentions] or self.trunk[:1]
        found: list[torch.fx.Node] = []
        for start in starts:
            above = (n for n in self.dominators.of(start) if mixes_channels(n) and n not in queries)
            nearest = next(above, None)
            if nearest is not None and nearest not in behind and nearest not in found:
                found.append(nearest)
        if found:
            return sorted(found)
        # Without one (a bare encoder, a scope of one block) a QKV layer may come first.
        return [node for node in self.first_weighted() if node not in queries]

    def first_weighted(self) -> list[torch.fx.Node]:
        """Weighted operators on the input's path with no weighted operator upstream."""
        found: list[torch.fx.Node] = []
        after: set[torch.fx.Node] = set()
        for node in self.graph.nodes:
            if not after.isdisjoint(node.all_input_nodes):
                after.add(node)
            elif is_weighted(node) and node in self.by_value:
                found.append(node)
                after.add(node)
        return found

    def classifiers(self) -> list[torch.fx.Node]:
        def through(node: torch.fx.Node) -> bool:
            # Probabilities in place of logits change nothing about who the classifier is.
            return self.within(node) and node.target not in NORMALIZATIONS

        found: list[torch.fx.Node] = []
        for output in output_nodes(self.graph):
            reachable = [output, *(walk_inputs(output, through) if through(output) else ())]
            for node in reachable:
                # What is read off learned queries alone classifies nothing, whatever the batch.
                if is_gemm(node) and node in self.by_value and node not in found:
                    found.append(node)
        return [node for node in found if not self.is_first(node)]

    def is_first(self, node: torch.fx.Node) -> bool:
        """Whether nothing that the input goes through before reads a stored tensor, as where a
        scope is one layer."""
        above = walk_inputs(node, lambda source: source in self.by_value)
        return not any(
            parameter.op == "get_attr"
            for source in above
            if source in self.by_value
            for parameter in source.all_input_nodes
        )

    def stage_ends(self, embeds: list[torch.fx.Node]) -> list[torch.fx.Node]:
        """The residual adds behind the patch embedding that no other one continues.

        One continues another if it adds to that one's result, moved or normalized at most, and has
        about as many elements: a class token makes no stage, and another resolution does.
        """
        main = self.main_path()
        adds = [node for node in self.trunk if node in main and (not embeds or node > embeds[0])]
        continued: set[torch.fx.Node] = set()
        for node in adds:
            skip = skipped(node)
            assert skip is not None
            size = traced_elements(node)
            above = walk_inputs(skip, self.hands_on) if self.hands_on(skip) else ()
            for source in (skip, *above):
                if size / 2 < traced_elements(source) < size * 2:
                    continued.add(source)
        return [node for node in adds if node not in continued]

    def main_path(self) -> set[torch.fx.Node]:
        """What the outputs are computed from when each residual add hands on what it skips.

        What is left out only joins the branches of blocks, such as a generator of queries with
        resolutions of its own. What all that reaches an output goes through is never left out: a
        decoder's residual adds start from queries, and read the encoder within their branches.
        """
        queue = output_nodes(self.graph)
        for output in list(queue):
            queue += self.dominators.of(output)
        found: set[torch.fx.Node] = set()
        while queue:
            node = queue.pop()
            if node in found or node not in self.by_value:
                continue
            found.add(node)
            skip = skipped(node) if node in self.in_trunk else None
            queue += node.all_input_nodes if skip is None else [skip]
        return found

    def adds_queries(self, add: torch.fx.Node, queries: set[torch.fx.Node]) -> bool:
        """Whether what skips the branch are queries, pooled or not: an attention that adds them to
        its result, as MViTv2's does."""
        skip = skipped(add)
        assert skip is not None
        above = walk_inputs(skip, self.within) if self.within(skip) else ()
        return not queries.isdisjoint((skip, *above))

    def hands_on(self, node: torch.fx.Node) -> bool:
        """Whether a node goes on with a feature map: no weights make another of it.

        Weights for each channel do, where they change its size, as a pooling by a convolution does.
        """
        if mixes_channels(node) or not carries_values(node) or node in self.in_trunk:
            return False
        return not is_weighted(node) or static_shape(node) == static_shape(_source(node))

    def final_projections(self, classifiers: list[torch.fx.Node]) -> list[torch.fx.Node]:
        """The normalization that feeds each classifier; without one, what feeds it.

        A classifier with hidden layers (the boxes of a detector) is fed through these.
        """
        starts = [node.args[0] for node in classifiers] or output_nodes(self.graph)
        found: list[torch.fx.Node] = []
        for start in starts:
            assert isinstance(start, torch.fx.Node)

            def through(node: torch.fx.Node) -> bool:
                return self.within(node) or (is_gemm(node) and self.has_activation_behind(node))

            upstream = [start, *(walk_inputs(start, through) if through(start) else ())]
            norms = [node for node in upstream if node.target in NORMALIZATIONS]
            choice = norms[0] if norms else start
            if choice not in found:
                found.append(choice)
        return found


def _adds_of_maps(graph: torch.fx.Graph, dependent: set[torch.fx.Node]) -> list[torch.fx.Node]:
    """Adds of two different feature maps of one shape."""
    return [
        node
        for node in graph.nodes
        if node.target is aten.add.Tensor
        and len(node.all_input_nodes) == 2
        and all(operand in dependent for operand in node.all_input_nodes)
        and static_shape(node.all_input_nodes[0]) == static_shape(node.all_input_nodes[1])
        and len(static_shape(node) or ()) >= 3
    ]


def _source(node: torch.fx.Node) -> torch.fx.Node:
    source = node.args[0]
    assert isinstance(source, torch.fx.Node)
    return source


def _nested(residuals: list[torch.fx.Node]) -> set[torch.fx.Node]:
    """The residual adds within the branch of another one (of an attention that adds its queries,
    of what computes queries from the map)."""
    found: set[torch.fx.Node] = set()
    for node in residuals:
        skip = skipped(node)
        assert skip is not None
        if not any(skip in branch_from(skip, n) for n in node.all_input_nodes if n is not skip):
            skip = unscaled(skip)
        for operand in node.all_input_nodes:
            inner = branch_from(skip, operand).intersection(residuals) if operand > skip else set()
            found |= {add for add in inner if add > skip and skip in branch_from(skip, add)}
    return found


def _branch_joins(graph: torch.fx.Graph, dependent: set[torch.fx.Node]) -> list[torch.fx.Node]:
    """Adds of two branches that each have weights of their own, as where a block changes sizes."""

    def unweighted(node: torch.fx.Node) -> bool:
        return carries_values(node) and not mixes_channels(node)

    def weighted_above(node: torch.fx.Node) -> set[torch.fx.Node]:
        above = [node, *(walk_inputs(node, unweighted) if unweighted(node) else ())]
        return {source for source in above if mixes_channels(source)}

    found = []
    for node in _adds_of_maps(graph, dependent):
        first, second = (weighted_above(operand) for operand in node.all_input_nodes)
        if first and second and first.isdisjoint(second):
            found.append(node)
    return found
