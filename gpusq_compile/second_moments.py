"""What a layer's weight meets: its inputs as the rows of a GEMM, and their second moments.

A linear or a convolution computes `rows @ matrix.T`. Whatever compares two weights of a layer by
their outputs on data needs no more of the data than `rows.T @ rows`: the squared error of a change
D of the matrix, summed over outputs and rows, is the trace of `D @ moments @ D.T`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F

from gpusq_compile.compilation import Compilation
from gpusq_compile.data import batches, require_calibration_data
from gpusq_compile.errors import InputError
from gpusq_compile.graph.liveness import live_bytes
from gpusq_compile.graph.query import op_of
from gpusq_compile.graph.walk import Call, Walk
from gpusq_compile.inverse_factor import precision, write_inverse_factor
from gpusq_compile.plan import planned
from gpusq_compile.remarks import Remark, missed
from gpusq_compile.sparsity import REDUCTION_AXIS

WIDE = 512
"""Columns beyond which second moments are computed in blocks of so many, one of each mirrored pair
alone, and kept in float32."""

ROWS_AT_ONCE = 2048
"""Rows that are multiplied together where they are wide."""

MOST_BYTES = 1 << 28
"""What the values of all samples may take that are held at one layer: where they would take more,
the later samples wait for a layer where they do not. Each large image has many rows."""

LEAST_SAMPLES = 2
"""As many as a graph with a dynamic batch is traced with."""

MOST_ROWS = 1 << 16
"""Rows of a linear's input that second moments are computed from; of more, every n-th is taken."""

PATCHES_AT_ONCE = 1 << 23
"""Numbers in the patches of the images that are unfolded together, a whole image at least."""


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """A weight [out, in, ...] as the GEMM's matrix [out, columns].

    The reduction axis is innermost, so that a pattern's groups are runs of columns.
    """
    return weight.movedim(REDUCTION_AXIS, -1).flatten(1)


def as_weight(matrix: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The inverse of `as_matrix`: [out, columns] as a weight of `shape`."""
    out, size, *kernel = shape
    return matrix.reshape(out, *kernel, size).movedim(-1, REDUCTION_AXIS)


def input_rows(node: torch.fx.Node, value: torch.Tensor) -> Iterator[torch.Tensor]:
    """The input of a linear or of an ungrouped convolution, as float [rows, columns] in parts.

    Columns are in the order of `as_matrix`.
    """
    if op_of(node) == "linear":
        yield value.flatten(0, -2).float()
        return
    stride, padding, dilation = (_pair(node, index, default) for index, default in _GEOMETRY)
    weight = node.args[1]
    assert isinstance(weight, torch.fx.Node)
    kernel = tuple(weight.meta["val"].shape[2:])
    image = math.ceil(value[0].numel() * math.prod(kernel) / math.prod(stride))
    for part in torch.split(value, max(1, PATCHES_AT_ONCE // image)):
        yield _patch_rows(F.unfold(part.float(), kernel, dilation, padding, stride), kernel)


def _patch_rows(patches: torch.Tensor, kernel: tuple[int, ...]) -> torch.Tensor:
    """What `unfold` gives, [images, channels x kernel, places], as rows [.., kernel x channels]."""
    images, columns, places = patches.shape
    patches = patches.reshape(images, -1, math.prod(kernel), places)
    return patches.permute(0, 3, 2, 1).reshape(-1, columns)


_GEOMETRY = ((3, 1), (4, 0), (5, 1))
"""Where `aten.conv2d` has its stride, padding and dilation, and what they are by default."""


def _pair(node: torch.fx.Node, index: int, default: int) -> tuple[int, int]:
    value: Any = node.args[index] if len(node.args) > index else default
    first, *second = value if isinstance(value, (list, tuple)) else [value]
    return first, second[0] if second else first


def second_moments(rows: Iterable[torch.Tensor]) -> torch.Tensor:
    """The mean of x x^T over the rows x: [columns, columns], float64 or, if wide, float32."""
    total, count = torch.zeros(()), 0
    for part in _joined(rows):
        if count == 0:
            columns = part.shape[1]
            dtype = part.dtype if columns > WIDE else torch.float64
            total = part.new_zeros(columns, columns, dtype=dtype)
        _add_product_with_itself(total, part)
        count += part.shape[0]
    for first in range(0, len(total) if count else 0, WIDE):
        last = min(first + WIDE, len(total))
        total[last:, first:last] = total[first:last, last:].T
    return total.div_(max(count, 1))


def _joined(rows: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Wide rows in parts of at least `ROWS_AT_ONCE`: a product as large as theirs is worth it."""
    held: list[torch.Tensor] = []
    for part in rows:
        held.append(part)
        if part.shape[1] <= WIDE or sum(map(len, held)) >= ROWS_AT_ONCE:
            yield torch.cat(held) if len(held) > 1 else part
            held = []
    if held:
        yield torch.cat(held)


def _add_product_with_itself(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add `rows.T @ rows` to `total`; of a wide one the blocks on the diagonal and right of it."""
    if len(total) <= WIDE:
        total += (rows.T @ rows).to(total.dtype)
        return
    for first in range(0, len(total), WIDE):
        last = min(first + WIDE, len(total))
        total[first:last, first:].addmm_(rows[:, first:last].T, rows[:, first:])


def thinned(rows: torch.Tensor, step: int) -> torch.Tensor:
    """One of each `step` rows [rows, columns].

    Tokens come image by image. Each time the next of the `step` is taken, so that all tokens are
    seen even where the step divides their number.
    """
    if step == 1:
        return rows
    index = torch.arange(len(rows) // step, device=rows.device)
    return rows[index * step + index % step]


def mean_squares(rows: Iterable[torch.Tensor]) -> torch.Tensor:
    """The diagonal of `second_moments`, without the rest: float64 [columns]."""
    total, count = torch.zeros(()), 0
    for part in rows:
        total = total.to(part.device) + sum_of_squares(part)
        count += part.shape[0]
    return total / max(count, 1)


def sum_of_squares(rows: torch.Tensor) -> torch.Tensor:
    """float64 [columns] of `rows` [rows, columns], of which some at a time are made as wide."""
    parts = torch.split(rows, ROWS_AT_ONCE)
    return torch.stack([part.double().square_().sum(dim=0) for part in parts]).sum(dim=0)


class SecondMoments:
    """The second moments of a layer's inputs, and the factor of their inverse beside them.

    Of a wide layer they are the largest thing there is, so the factor takes the triangle that
    repeats the other one; see `write_inverse_factor`.
    """

    def __init__(self, square: torch.Tensor) -> None:
        """Take over what `second_moments` returns: [columns, columns]."""
        self.diagonal = square.diagonal().clone()
        self._square = square
        self._factor: tuple[float, torch.Tensor] | None = None

    def inverse_factor(self, damping: float) -> torch.Tensor:
        """U, to be read on and above the diagonal, with `U.T @ U` the inverse of the damped
        moments: [columns, columns], float64 or, if wide and the damping allows, float32.

        It is overwritten where one for another damping is asked for.

        Raises:
            ValueError: the moments are not finite.
        """
        if self._factor is None or self._factor[0] != damping:
            square = self._square.to(precision(len(self._square), damping))
            write_inverse_factor(square, self.diagonal, damping)
            self._factor = damping, square
        return self._factor[1]

    def output_errors(self, matrix: torch.Tensor, changed: Sequence[torch.Tensor]) -> list[float]:
        """||X W^T - X W'^T|| / ||X W^T|| for each W', the bias left out; 0 where the layer computes
        zeros.

        Args:
            matrix: W, [out, columns].
            changed: the W', as large.
        """
        matrix = matrix.to(self._square.dtype)
        energy = self._energy(matrix)
        errors = (self._energy(matrix - other.to(matrix.dtype)) for other in changed)
        return [math.sqrt(error / energy) if energy > 0 else 0.0 for error in errors]

    def _energy(self, matrix: torch.Tensor) -> float:
        """The trace of `matrix @ moments @ matrix.T`."""
        below = 0.0
        for first in range(0, len(self._square), WIDE):
            last = min(first + WIDE, len(self._square))
            own = matrix[:, first:last]
            product = own @ self._square[first:last, first:last].tril(-1)
            if last < len(self._square):
                product.addmm_(matrix[:, last:], self._square[last:, first:last])
            below += float(product.mul_(own).sum())
        squares = matrix.square().sum(dim=0, dtype=torch.float64)
        return max(float(squares @ self.diagonal.double()) + 2.0 * below, 0.0)


def samples_with_room(compilation: Compilation) -> dict[torch.fx.Node, int]:
    """Of how many samples the values may be held at a layer and at all behind it, at least
    `LEAST_SAMPLES`; of the layers to be compressed, in graph order."""
    graph = compilation.ir.graph
    held = live_bytes(graph)
    found = {}
    most = 0
    for node, _ in reversed(list(planned(graph))):
        most = max(most, held[node])
        found[node] = max(LEAST_SAMPLES, MOST_BYTES * compilation.probe_samples // max(most, 1))
    return dict(reversed(found.items()))


def looks_at_inputs(what: str) -> str:
    return f"{what} looks at the inputs of the layers"


@dataclass(frozen=True)
class Part:
    """The call of the compiled module for `samples` samples of calibration data."""

    call: Call
    samples: int


def calibration_parts(
    compilation: Compilation, what: str, samples: int, most: int | None = None
) -> list[Part]:
    """The calibration data whose inputs of the layers are looked at, about `samples` at a time.

    A graph with a dynamic batch takes any number from `LEAST_SAMPLES` on; for another one the
    batches stay whole.

    Args:
        what: what looks at them, for messages: `sparsity method obs`.
        most: parameters of the graph times samples from which on no further batch is read.

    Raises:
        InputError: there is no data.
    """
    name, factory = require_calibration_data(compilation.source, looks_at_inputs(what))
    parameters = sum(parameter.numel() for parameter in compilation.ir.parameters())
    found: list[Part] = []
    for batch in batches(factory, name, compilation.device, compilation.rules.calibration.batches):
        pieces = [batch]
        if compilation.source.dynamic_shapes is None:
            ends = even_ends(batch.size, samples)
            pieces = [batch.part(start, end) for start, end in pairwise(ends)]
        for piece in pieces:
            found.append(Part(compilation.network.scoped_inputs(piece.inputs), piece.size))
        if most is not None and parameters * sum(part.samples for part in found) >= most:
            break
    return found


def even_ends(size: int, most: int) -> list[int]:
    """Where to cut `size` samples into parts of at most `most` or, to have `LEAST_SAMPLES` in each,
    a few more: [0, ..., size]."""
    count = max(1, min(math.ceil(size / most), size // LEAST_SAMPLES))
    return [size * index // count for index in range(count + 1)]


def input_mean_squares(
    graph_module: torch.fx.GraphModule, calls: Sequence[Call], layers: Mapping[torch.fx.Node, str]
) -> dict[torch.fx.Node, torch.Tensor]:
    """The mean squares [columns] of the inputs of `layers`, in graph order, with their names.

    One batch after the other: as no layer changes in between, only one's values are held.

    Raises:
        InputError: an input is not finite.
    """
    sums: dict[torch.fx.Node, torch.Tensor] = {}
    counts = dict.fromkeys(layers, 0)
    for call in calls:
        walk = Walk(graph_module, [call])
        for node in layers:
            for rows in input_rows(node, walk.inputs_of(node)[0]):
                squares = sum_of_squares(rows)
                sums[node] = sums[node] + squares if node in sums else squares
                counts[node] += len(rows)
    return {node: _finite(sums[node] / counts[node], name) for node, name in layers.items()}


class LayerInputs:
    """The inputs of a graph's layers over the calibration data, asked for in graph order.

    A layer that was changed must be `settle`d before the next is asked for, which then sees its
    inputs as the changed layer leaves them.
    """

    def __init__(self, compilation: Compilation, what: str) -> None:
        """Read the calibration data; see `calibration_parts`."""
        self.what = what
        self.room = samples_with_room(compilation)
        parts = calibration_parts(compilation, what, min(self.room.values()))
        self.samples = list(accumulate(part.samples for part in parts))
        self.walk = Walk(compilation.ir, [part.call for part in parts], started=0)
        self.fewer: dict[str, int] = {}
        self._shared: tuple[object, SecondMoments] | None = None

    def moments(self, node: torch.fx.Node, layer: str) -> SecondMoments:
        """The second moments of a layer's inputs; linears that read one tensor share them.

        Raises:
            InputError: the input is not finite.
        """
        values = self._values(node, layer)
        source, linear = node.args[0], op_of(node) == "linear"
        if self._shared is not None and self._shared[0] is source and linear:
            return self._shared[1]
        self._shared = None
        total = _row_count(node, values) if linear else 0
        step = max(1, math.ceil(total / MOST_ROWS))
        square = second_moments(
            thinned(rows, step) for value in values for rows in input_rows(node, value)
        )
        # An input that is not finite leaves its square on the diagonal.
        _finite(square.diagonal(), layer)
        moments = SecondMoments(square)
        assert isinstance(source, torch.fx.Node)
        if linear and any(op_of(user) == "linear" and user > node for user in source.users):
            self._shared = (source, moments)
        return moments

    def mean_squares(self, node: torch.fx.Node, layer: str) -> torch.Tensor:
        """The mean square of each column of a layer's inputs.

        Raises:
            InputError: the input is not finite.
        """
        values = self._values(node, layer)
        squares = mean_squares(rows for value in values for rows in input_rows(node, value))
        return _finite(squares, layer)

    def settle(self, node: torch.fx.Node, weight: torch.Tensor) -> None:
        """Go on with `weight` as what the layer reads; a module computes the same by now."""
        source = node.args[1]
        assert isinstance(source, torch.fx.Node)
        self.walk.replace_values(source, [weight] * len(self.walk.runs))

    def remarks(self) -> list[Remark]:
        """What is to be said of the layers that have been looked at."""
        if not self.fewer:
            return []
        first, *others = self.fewer
        text = (
            f"{self.what} looked at {min(self.fewer.values())} of {self.samples[-1]} samples at "
            f"{first}{f' and {len(others)} more' if others else ''}: the values of all would take "
            f"over {MOST_BYTES >> 20} MiB there or behind"
        )
        return [missed("fewer-samples", text)]

    def _values(self, node: torch.fx.Node, layer: str) -> list[torch.Tensor]:
        """The layer's input, of each part of the data that has room."""
        # Those that are on their way first: where they are, the others may not have room.
        self.walk.run_to(node)
        self.walk.start(max(1, sum(samples <= self.room[node] for samples in self.samples)))
        values = self.walk.inputs_of(node)
        if self.walk.waiting and _row_count(node, values) < MOST_ROWS:
            self.fewer[layer] = self.samples[len(values) - 1]
        return values


def _row_count(node: torch.fx.Node, values: Sequence[torch.Tensor]) -> int:
    """How many rows `input_rows` has for all of them."""
    if op_of(node) == "linear":
        return sum(value[..., 0].numel() for value in values)
    places: int = math.prod(node.meta["val"].shape[2:])
    return sum(map(len, values)) * places


def _finite(squares: torch.Tensor, layer: str) -> torch.Tensor:
    if not bool(torch.isfinite(squares).all()):
        raise InputError(
            "activation-not-finite", f"calibration met NaN or infinite values at {layer}"
        )
    return squares
