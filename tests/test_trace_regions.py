"""Regions without gradients or autocast are part of the graph, and RMSNorm compiles."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gpusq_compile.errors import InputError
from gpusq_compile.graph.roles import find_roles
from gpusq_compile.lowering.runtime import open_session, run_session
from tests.compilations import begin, make_rules, run_until, targets
from tests.models import noise, seeded


class Regions(nn.Module):
    """Linears in a region each."""

    def __init__(self, autocast: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.autocast = autocast

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            x = self.first(x).relu()
        with torch.autocast("cpu", enabled=self.autocast):
            y, z = self.second(x), x + 1
        return y * 2, z


def test_regions_that_change_nothing_are_in_line() -> None:
    model = Regions().eval()
    compilation = run_until(begin(model, (noise(3, 32),), make_rules()), "canonicalize")
    assert targets(compilation).count("aten.linear.default") == 2
    assert not any("wrap" in target for target in targets(compilation))
    for ours, theirs in zip(compilation.ir(noise(5, 32)), model(noise(5, 32)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_autocast_that_casts_is_refused() -> None:
    compilation = begin(Regions(autocast=True).eval(), (noise(3, 32),), make_rules())
    with pytest.raises(InputError, match="autocast changes the types"):
        run_until(compilation, "canonicalize")


class Nested(Regions):
    """A region without autocast within another one."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", enabled=False):
            x = self.first(x)
            with torch.autocast("cpu", enabled=False):
                y = self.second(x)
            return x + y, y


def test_a_region_within_a_region_is_in_line_too() -> None:
    model = seeded(Nested)
    compilation = run_until(begin(model, (noise(3, 32),), make_rules()), "canonicalize")
    assert targets(compilation).count("aten.linear.default") == 2
    for ours, theirs in zip(compilation.ir(noise(5, 32)), model(noise(5, 32)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("eps", [None, 1e-6])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(32,), (4, 32)])
def test_rms_norm_is_the_same_in_the_file(
    eps: float | None, weighted: bool, shape: tuple[int, ...], tmp_path: Path
) -> None:
    norm = nn.RMSNorm(shape, eps=eps, elementwise_affine=weighted)
    if weighted:
        nn.init.normal_(norm.weight)
    model = nn.Sequential(nn.Linear(32, 32), norm).eval()
    given = begin(
        model,
        (noise(3, 4, 32),),
        make_rules({"id": "all", "match": {"op": "linear"}, "quantize": "none"}),
        tmp_path,
    )
    compilation = run_until(given, "surgery")
    assert compilation.onnx_model is not None
    batch = noise(5, 4, 32)
    [found] = run_session(open_session(compilation.onnx_model.SerializeToString()), [batch])
    torch.testing.assert_close(found, model(batch))


def test_an_rms_norm_in_front_of_the_classifier_is_the_final_norm() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.RMSNorm(32), nn.Linear(32, 8)).eval()
    compilation = run_until(begin(model, (noise(3, 4, 32),), make_rules()), "canonicalize")
    roles = find_roles(compilation.ir.graph)
    [final] = [node for node, found in roles.items() if "final_projection" in found]
    assert final.target is torch.ops.aten.rms_norm.default
