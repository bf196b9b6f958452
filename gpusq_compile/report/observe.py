"""Look at the models of a compilation for report.html, while they are there.

The dense one before it is pruned, weights before they are rounded, the compressed one before it is
folded. Of each only samples are kept: at most `SAMPLES` numbers of everything together.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.fx

from gpusq_compile.compilation import Compilation
from gpusq_compile.data import Batch, batches
from gpusq_compile.errors import GpusqError
from gpusq_compile.graph.query import tensor_attribute
from gpusq_compile.plan import LayerPlan, planned
from gpusq_compile.quantization.fake_quantize import (
    FakeQuantize,
    broadcastable,
    quantize_values,
)
from gpusq_compile.randomness import isolated_random
from gpusq_compile.report.evidence import Crop, Evidence, LayerEvidence, decibels, sqnr
from gpusq_compile.report.map_view import MapObserver
from gpusq_compile.report.watch import Watch
from gpusq_compile.second_moments import as_matrix
from gpusq_compile.sparsity import PATTERNS, Mask

SAMPLES = 4 << 20
MOST_OF_A_LAYER = 1 << 16
IMAGES = 3
READ_BATCHES = 4
"""Batches that are looked through for images of different classes."""
CROP_ROWS, CROP_COLUMNS = 16, 32
DATA = ("eval_data", "calibration_data", "train_data")


class Observer:
    """What has been seen so far; `evidence` is complete once the compressed model was seen."""

    def __init__(self) -> None:
        self.evidence = Evidence()
        self.images: list[Batch] = []
        self.maps = MapObserver()
        self.size = 0
        self.dense_weights: dict[str, torch.Tensor] = {}
        self.float_weights: dict[str, torch.Tensor] = {}
        self.dense_outputs: dict[str, list[torch.Tensor]] = {}

    def before(self, compilation: Compilation, step: str) -> None:
        """Look at the graph as it is before the pass called `step`.

        A page that lacks a picture is better than no model: whatever goes wrong here is said on
        the page and as a warning, and ends nothing.
        """
        look = {
            "sparsify": self._see_dense,
            "quantize": self._see_float,
            "fold": self._see_compressed,
        }.get(step)
        if look is None:
            return
        started = time.monotonic()
        try:
            with (
                isolated_random(compilation.device, compilation.options.seed),
                frozen(compilation.ir),
            ):
                look(compilation)
        except Exception as error:
            reason = error.message if isinstance(error, GpusqError) else f"{error}"
            fault = f"before {step}: {type(error).__name__}: {reason}"
            compilation.console.warn(f"report.html will lack some of its pictures: {fault}")
            self.evidence.faults.append(fault)
        self.evidence.seconds[f"before {step}"] = round(time.monotonic() - started, 3)

    def _see_dense(self, compilation: Compilation) -> None:
        evidence, graph_module = self.evidence, compilation.ir
        loss = compilation.rules.finetune.loss
        evidence.loss_weights = {
            "alpha": loss.alpha,
            "beta": loss.beta,
            "gamma": loss.gamma,
            "temperature": loss.temperature,
        }
        plans = [plan for _, plan in stored_layers(graph_module.graph)]
        self.size = min(MOST_OF_A_LAYER, max(1024, SAMPLES // max(1, len(plans))))
        for plan in plans:
            weight = tensor_attribute(graph_module, plan.weight).detach()
            self.dense_weights[plan.name] = self._rows(weight)
        evidence.source, self.images = find_images(compilation)
        evidence.images = len(self.images)
        nodes = {node.name: plan.name for node, plan in stored_layers(graph_module.graph)}

        def see(node: torch.fx.Node, value: object, _: object) -> None:
            if node.name in nodes and isinstance(value, torch.Tensor):
                self.dense_outputs.setdefault(nodes[node.name], []).append(self._sample(value))

        self.maps.begin(compilation, evidence)
        for index, image in enumerate(self.images):
            self.maps.see(compilation, Watch(graph_module, see), image, index)

    def _see_float(self, compilation: Compilation) -> None:
        for node, plan in stored_layers(compilation.ir.graph):
            weight, mask, _ = weight_parts(compilation.ir, node, plan)
            self.float_weights[plan.name] = self._rows(weight if mask is None else weight * mask)

    def _see_compressed(self, compilation: Compilation) -> None:
        evidence, graph_module = self.evidence, compilation.ir
        for node, plan in stored_layers(graph_module.graph):
            evidence.layers[plan.name] = self._weight_evidence(graph_module, node, plan)
        evidence.crops = crops(graph_module)
        outputs: dict[str, Ratio] = {}
        quantizers: dict[str, Ratio] = {}
        nodes = {node.name: plan.name for node, plan in stored_layers(graph_module.graph)}
        modules = dict(graph_module.named_modules())
        places: dict[str, int] = {}

        def see(node: torch.fx.Node, value: object, given: object) -> None:
            if not isinstance(value, torch.Tensor):
                return
            if node.name in nodes:
                layer = nodes[node.name]
                number = places.get(layer, 0)
                places[layer] = number + 1
                if layer in self.dense_outputs:
                    before = self.dense_outputs[layer][number]
                    outputs.setdefault(layer, Ratio()).add(before, self._sample(value))
            module = modules.get(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, FakeQuantize) and module.channels is None:
                assert isinstance(given, torch.Tensor)
                quantizers.setdefault(node.name, Ratio()).add(
                    self._sample(given), self._sample(value)
                )

        for index, image in enumerate(self.images):
            self.maps.see(compilation, Watch(graph_module, see), image, index)
        self.maps.finish(evidence)
        for node, plan in stored_layers(graph_module.graph):
            layer_evidence = evidence.layers[plan.name]
            source = node.args[0]
            if isinstance(source, torch.fx.Node) and source.name in quantizers:
                layer_evidence.activation_db = quantizers[source.name].decibels()
            if plan.name in outputs:
                layer_evidence.output_db = outputs[plan.name].decibels()
        self.dense_weights, self.float_weights, self.dense_outputs = {}, {}, {}
        self.images = []

    def _weight_evidence(
        self, graph_module: torch.fx.GraphModule, node: torch.fx.Node, plan: LayerPlan
    ) -> LayerEvidence:
        found = LayerEvidence()
        weight, mask, quantizer = weight_parts(graph_module, node, plan)
        rows = self._rows(weight)
        if mask is not None:
            kept = self._rows(mask)
            rows = rows * kept
            dense = self.dense_weights.get(plan.name)
            if dense is not None:
                found.pruning_db = sqnr(dense, dense * kept)
        if quantizer is not None:
            levels, values = rounded(weight, mask, quantizer)
            levels, values = self._rows(levels), self._rows(values)
            qmax = quantizer.grid.qmax
            counts = torch.bincount(levels.flatten().long() + qmax, minlength=2 * qmax + 1)
            found.histogram = counts.tolist()
            found.zeros = share_of_zeros(levels)
            if torch.equal(values, rows):
                # GPTQ and reconstruction leave the stored weight on its grid.
                rows = self.float_weights.get(plan.name, rows)
            if not torch.equal(values, rows):
                found.weight_db = sqnr(rows, values)
        elif mask is not None:
            found.zeros = share_of_zeros(rows)
        return found

    def _rows(self, weight: torch.Tensor) -> torch.Tensor:
        """Whole output channels of a weight, evenly spaced and as many as may be kept, on the CPU:
        [channels, columns]."""
        matrix = weight.detach().flatten(1)
        count = max(1, min(matrix.shape[0], self.size // max(1, matrix.shape[1])))
        places = torch.linspace(0, matrix.shape[0] - 1, count).round().long()
        return matrix[places.to(matrix.device)].cpu()

    def _sample(self, value: torch.Tensor) -> torch.Tensor:
        """Values at random places, always the same for one size: float32, on the CPU."""
        flat = value.detach().flatten()
        most = self.size // IMAGES
        if flat.numel() <= most:
            return flat.float().cpu()
        generator = torch.Generator().manual_seed(0)
        places = torch.randint(flat.numel(), (most,), generator=generator)
        return flat[places.to(flat.device)].float().cpu()


class Ratio:
    """Signal and noise, summed over the images."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0

    def add(self, reference: torch.Tensor, found: torch.Tensor) -> None:
        self.signal += float(reference.double().square().sum())
        self.noise += float((reference.double() - found.double()).square().sum())

    def decibels(self) -> float | None:
        return decibels(self.signal, self.noise)


@contextmanager
def frozen(graph_module: torch.fx.GraphModule) -> Iterator[None]:
    """Without gradients of the parameters: those of the activations alone are asked for."""
    trained = [parameter for parameter in graph_module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad = True


def find_images(compilation: Compilation) -> tuple[str, list[Batch]]:
    """Where the images come from, and `IMAGES` of them one by one, of different classes if the
    first batches hold such."""
    source = compilation.source
    for name in DATA:
        factory = getattr(source, name)
        if factory is None:
            continue
        found: list[Batch] = []
        spare: list[Batch] = []
        for batch in batches(factory, name, compilation.device, READ_BATCHES):
            for index in range(batch.size if batch.inputs else 0):
                image = batch.part(index, index + 1)
                labels = [class_of(other) for other in found]
                fresh = class_of(image) is not None and class_of(image) not in labels
                kept = found if fresh else spare
                if len(kept) < IMAGES:
                    kept.append(image)
        if found or spare:
            kind = "noise" if source.synthetic and name != "eval_data" else name
            return kind, [*found, *spare][:IMAGES]
    example = Batch(source.example_inputs, None).to(compilation.device)
    return "example_inputs", [example.part(0, 1)]


def class_of(image: Batch) -> int | None:
    """The class label of a batch of one."""
    return None if image.labels is None else int(image.labels[0])


def stored_layers(graph: torch.fx.Graph) -> Iterator[tuple[torch.fx.Node, LayerPlan]]:
    """The layers with a stored weight; of one that the model computes there is nothing to show."""
    return ((node, plan) for node, plan in planned(graph) if plan.weight)


def weight_parts(
    graph_module: torch.fx.GraphModule, node: torch.fx.Node, plan: LayerPlan
) -> tuple[torch.Tensor, torch.Tensor | None, FakeQuantize | None]:
    """A layer's stored weight, its mask and its weight's quantizer."""
    mask, quantizer = None, None
    source = node.args[1]
    while isinstance(source, torch.fx.Node) and source.op == "call_module":
        module = graph_module.get_submodule(str(source.target))
        if isinstance(module, Mask):
            mask = module.mask
        elif isinstance(module, FakeQuantize):
            quantizer = module
        source = source.args[0]
    return tensor_attribute(graph_module, plan.weight).detach(), mask, quantizer


def rounded(
    weight: torch.Tensor, mask: torch.Tensor | None, quantizer: FakeQuantize
) -> tuple[torch.Tensor, torch.Tensor]:
    """The integers of a weight, int8, and the values that they stand for."""
    masked = weight if mask is None else weight * mask
    scale = quantizer.exported_scale()
    levels = quantize_values(masked, scale, quantizer.grid)
    return levels, levels * broadcastable(scale, masked)


def share_of_zeros(values: torch.Tensor) -> float:
    return round(float(values.eq(0).float().mean()), 4)


def crops(graph_module: torch.fx.GraphModule) -> list[Crop]:
    """A crop of one layer of each pattern and type: of an MLP in the middle, if there is one."""
    kinds: dict[tuple[str, str], list[tuple[torch.fx.Node, LayerPlan]]] = {}
    for node, plan in stored_layers(graph_module.graph):
        if plan.applied.sparsity is not None:
            treated = (plan.applied.sparsity, plan.applied.weight or "float")
            kinds.setdefault(treated, []).append((node, plan))
    found = []
    for (pattern, kind), layers in kinds.items():
        chosen = [layer for layer in layers if "mlp" in layer[1].roles] or layers
        node, plan = chosen[len(chosen) // 2]
        weight, mask, quantizer = weight_parts(graph_module, node, plan)
        values = weight if mask is None else weight * mask
        if quantizer is not None:
            values, _ = rounded(weight, mask, quantizer)
        corner = as_matrix(values)[:CROP_ROWS, :CROP_COLUMNS].double().cpu()
        numbers = [[round(value, 5) for value in row] for row in corner.tolist()]
        shape = PATTERNS[pattern]
        found.append(Crop(plan.name, pattern, kind, shape.group, shape.unit, numbers))
    return found
