"""Operators that write to their input: replaced exactly, or left to a second trace."""

from __future__ import annotations

import linecache
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpusq_compile.errors import InputError
from gpusq_compile.graph.functional import is_write, make_functional
from gpusq_compile.passes.trace import unlift
from tests.compilations import begin, make_rules, outputs, run_until
from tests.models import noise

Function = Callable[[Tensor], Tensor]


class Calls(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


def traced(function: Function) -> torch.fx.GraphModule:
    shapes = ({0: torch.export.Dim("batch")},)
    model = Calls(function).eval()
    return unlift(torch.export.export(model, (noise(2, 4, 8),), dynamic_shapes=shapes))


def on_itself(x: Tensor) -> Tensor:
    return F.relu_(x.mul_(2).add_(1))


def on_a_slice(x: Tensor) -> Tensor:
    x[..., :2] += 1
    return x * 2


def on_a_part_of_a_part(x: Tensor) -> Tensor:
    x.transpose(0, 1)[0].mul_(3)
    x[:, 1, 2:5] = x[:, 0, 2:5].clone()
    return x


def on_what_was_made_here(x: Tensor) -> Tensor:
    table = torch.zeros(4, 8)
    table[1] = 1.5
    table[:, 2:4].fill_(7)
    return x + table


def on_what_is_read_before(x: Tensor) -> Tensor:
    before = x.sum(dim=1)
    x.mul_(2)
    return x.sum(dim=1) - before


EXACT = (on_itself, on_a_slice, on_a_part_of_a_part, on_what_was_made_here, on_what_is_read_before)


@pytest.mark.parametrize("function", EXACT, ids=lambda function: function.__name__)
def test_writes_become_values(function: Function) -> None:
    graph_module = traced(function)
    assert any(is_write(node) for node in graph_module.graph.nodes)
    expected = [graph_module(noise(size, 4, 8, seed=size)) for size in (2, 3)]
    assert make_functional(graph_module)
    assert not any(is_write(node) for node in graph_module.graph.nodes)
    for size, value in zip((2, 3), expected, strict=True):
        assert torch.equal(graph_module(noise(size, 4, 8, seed=size)), value)


def read_through_another_view(x: Tensor) -> Tensor:
    other = x.reshape(-1, 8)
    x.mul_(2)
    return other + 1


def of_another_type(x: Tensor) -> Tensor:
    counts = torch.ones(4, 8, dtype=torch.float16)
    counts.mul_(x[0])
    return x + counts


@pytest.mark.parametrize("function", [read_through_another_view, of_another_type])
def test_what_it_cannot_follow_is_traced_again(function: Function) -> None:
    assert not make_functional(traced(function))
    model = Calls(function).eval()
    compilation = run_until(begin(model, noise(2, 4, 8), make_rules()), "trace")
    assert not any(is_write(node) for node in compilation.ir.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(outputs(compilation)[0], model(*compilation.probe[0]))


class Counts(nn.Module):
    """Writes to a buffer through a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("seen").view(-1).zero_()
        return self.layer(x)


class Averages(nn.Module):
    """Writes to a buffer what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        self.get_buffer("mean").mul_(0.9).add_(0.1 * y.mean(0))
        return y


@pytest.mark.parametrize(
    ("model", "line"),
    [(Counts, ".view(-1).zero_()"), (Averages, ".mul_(0.9)")],
)
def test_a_write_to_a_buffer_is_refused_at_its_line(model: type[nn.Module], line: str) -> None:
    with pytest.raises(InputError) as caught:
        run_until(begin(model().eval(), noise(2, 8), make_rules()), "trace")
    assert caught.value.code == "buffer-written"
    location = caught.value.location
    assert location is not None
    assert line in linecache.getline(location.file, location.line or 0)
