"""Regions without gradients or autocast are part of the graph, and RMSNorm compiles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gpusq_compile.errors import InputError
from tests.compilations import begin, make_rules, run_until, targets
from tests.models import noise


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
    with pytest.raises(InputError, match="wrap_with_autocast"):
        run_until(compilation, "canonicalize")


@pytest.mark.parametrize("eps", [None, 1e-6])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(32,), (4, 32)])
def test_rms_norm_is_spelled_out(eps: float | None, weighted: bool, shape: tuple[int, ...]) -> None:
    norm = nn.RMSNorm(shape, eps=eps, elementwise_affine=weighted)
    if weighted:
        nn.init.normal_(norm.weight)
    model = nn.Sequential(nn.Linear(32, 32), norm).eval()
    compilation = run_until(begin(model, (noise(3, 4, 32),), make_rules()), "canonicalize")
    assert "aten.rms_norm.default" not in targets(compilation)
    torch.testing.assert_close(compilation.ir(noise(5, 4, 32)), model(noise(5, 4, 32)))
