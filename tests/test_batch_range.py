"""An engine is built for batch sizes that the model takes, and for no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpusq_compile import compile_model
from gpusq_compile.batch_range import batch_range
from gpusq_compile.engine import BatchRange
from gpusq_compile.errors import InputError
from tests.compilations import make_rules
from tests.models import noise, seeded
from tests.packed_cases import LOOSE

Dim = torch.export.Dim
RANGES: dict[str, tuple[Any, BatchRange]] = {
    "any": (Dim("batch"), BatchRange(1, 8, 16)),
    "few": (Dim("batch", max=4), BatchRange(1, 4, 4)),
    "no more than a default": (Dim("batch", max=12), BatchRange(1, 8, 12)),
    "many": (Dim("batch", min=32, max=64), BatchRange(32, 32, 32)),
    "from some on": (Dim("batch", min=6), BatchRange(6, 8, 16)),
    "threes": (3 * Dim("batch"), BatchRange(3, 6, 15)),
    "few threes": (3 * Dim("batch", max=4), BatchRange(3, 6, 12)),
    "odd": (2 * Dim("batch", min=4) + 1, BatchRange(9, 9, 15)),
}
SAMPLES = {"many": 32, "from some on": 6, "threes": 6, "few threes": 6, "odd": 11}


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


@pytest.mark.parametrize("case", RANGES)
def test_the_default_sizes_are_cut_to_the_models_limits(case: str) -> None:
    dim, expected = RANGES[case]
    inputs = (noise(SAMPLES.get(case, 2), 16),)
    program = torch.export.export(seeded(Sums), inputs, dynamic_shapes=({0: dim},))
    graph = program.module().graph
    assert isinstance(graph, torch.fx.Graph)
    assert batch_range(graph, program.range_constraints) == expected


def test_a_static_batch_leaves_the_default() -> None:
    program = torch.export.export(seeded(Sums), (noise(2, 16),))
    graph = program.module().graph
    assert isinstance(graph, torch.fx.Graph)
    assert batch_range(graph, program.range_constraints) == BatchRange()


class Apart(nn.Module):
    """The sums of two inputs, whose sizes have nothing to do with each other."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x.sum(1), y.sum(1)


def test_the_sizes_are_those_that_all_inputs_may_have() -> None:
    inputs = (noise(6, 16), noise(6, 16))
    shapes = ({0: Dim("threes_of", max=8) * 3}, {0: Dim("many", min=4, max=14)})
    program = torch.export.export(Apart(), inputs, dynamic_shapes=shapes)
    graph = program.module().graph
    assert isinstance(graph, torch.fx.Graph)
    assert batch_range(graph, program.range_constraints) == BatchRange(6, 6, 12)


def test_inputs_without_a_size_in_common_are_refused() -> None:
    with pytest.raises(InputError) as caught:
        compile_model(
            Apart(),
            (noise(4, 16), noise(6, 16)),
            rules=make_rules(),
            dynamic_shapes=({0: Dim("few", max=4)}, {0: Dim("many", min=6)}),
            finetune=False,
        )
    assert caught.value.code == "no-batch-size"
    assert caught.value.message == (
        "no batch is right for all inputs: 'x' takes 1 to 4, 'y' takes 6 or more"
    )
    assert "the same Dim" in (caught.value.hint or "")


def test_the_script_and_the_server_know_the_limits(tmp_path: Path) -> None:
    compile_model(
        seeded(Sums),
        (noise(3, 16),),
        rules=make_rules(verify=LOOSE),
        calibration_data=[noise(3, 16)],
        dynamic_shapes=({0: Dim("batch", max=4)},),
        finetune=False,
        engine="none",
        emit=["triton"],
        output=tmp_path,
    )
    script = (tmp_path / "build_engine.sh").read_text()
    assert "4x16" in script
    assert "16x16" not in script
    [config] = (tmp_path / "triton").glob("*/configs/tensorrt.pbtxt")
    assert "max_batch_size: 4\n" in config.read_text()
    assert "preferred_batch_size: [ 4 ]" in config.read_text()
