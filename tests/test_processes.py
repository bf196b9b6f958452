"""Several processes train one model: the losses are those of one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

from gpusq_compile.data import Batch
from gpusq_compile.processes import Processes, joined, shard, share
from tests.command_line import compile_here, finish, start, variant

LOADER = """
from torch.utils.data import DataLoader, TensorDataset

def train_data():
    images, labels = (torch.cat(parts) for parts in zip(*labelled(1)))
    return DataLoader(TensorDataset(images[:45], labels[:45]), batch_size=16, shuffle=True)
"""
RULES = """\
version: 1
extends: int8
finetune:
  sparse: {max_steps: 5, lr: 1e-3, clip_norm: 1.0}
  quantize: {max_steps: 3, lr: 1e-3, batch_size: 32}
"""
LAUNCHERS = {
    "torchrun": ("-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "gpusq_compile"),
    "accelerate": (
        *("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("-m", "gpusq_compile"),
    ),
}


def losses(folder: Path) -> dict[str, list[dict[str, float]]]:
    report = json.loads((folder / "report.json").read_text())
    return {name: report["finetune"][name]["loss"] for name in ("sparse", "quantize")}


@pytest.mark.parametrize(
    ("launcher", "extra"), [("torchrun", LOADER), ("accelerate", "")], ids=["loader", "list"]
)
def test_two_processes_give_the_losses_and_weights_of_one(
    launcher: str,
    extra: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    path = variant(tmp_path, extra)
    Path("rules.yaml").write_text(RULES)
    arguments = ("--rules", "rules.yaml", "--engine", "none")
    one = compile_here(monkeypatch, capsys, path, *arguments, "-o", "one")
    assert one.code == 0, one.err
    # A launcher that runs beside this test must not take its port.
    monkeypatch.setenv("MASTER_PORT", str(20000 + hash(launcher) % 20000))
    command = (sys.executable, *LAUNCHERS[launcher])
    two = finish(start(path, *arguments, "-o", "two", cwd=tmp_path, command=command), 300)
    assert two.code == 0, two.err
    assert two.err.count("compiling") == 1
    alone, together = losses(Path("one")), losses(Path("two"))
    assert [len(alone[name]) for name in alone] == [5, 3]
    for name, curve in alone.items():
        for before, now in zip(curve, together[name], strict=True):
            assert now == pytest.approx(before, rel=1e-4, abs=1e-6)
    before_weights, after = (
        load_file("one/weights.safetensors"),
        load_file("two/weights.safetensors"),
    )
    assert before_weights.keys() == after.keys()
    for name, value in before_weights.items():
        if value.dtype == torch.float32:
            torch.testing.assert_close(after[name], value, rtol=1e-3, atol=1e-4)


@given(st.integers(1, 40), st.integers(1, 7))
def test_the_shares_of_a_batch_are_the_batch(size: int, world: int) -> None:
    values = torch.arange(size)
    batch = Batch((values, "constant"), values + 1)
    shares = [share(batch, Processes(rank, world)) for rank in range(world)]
    parts = [part for part in shares if part is not None]
    assert torch.equal(torch.cat([part.inputs[0] for part in parts]), values)
    labels: list[Any] = [part.labels for part in parts]
    assert torch.equal(torch.cat(labels), values + 1)
    assert all(part.inputs[1] == "constant" for part in parts)
    sizes = [part.size for part in parts]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 30), st.sampled_from([2, 4, 8]), st.sampled_from([1, 2]))
def test_every_process_loads_its_share_of_an_indexed_dataset_alone(
    images: int, batch: int, world: int
) -> None:
    loader = DataLoader(TensorDataset(torch.arange(images)), batch_size=batch)
    seen = []
    for rank in range(world):
        shares, cut = shard(loader, Processes(rank, world))
        assert cut == (world > 1)
        for (values,) in shares:
            assert len(values) <= batch // world
            seen.append(values)
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(images))


def test_other_data_is_read_whole() -> None:
    data = [torch.zeros(4)]
    assert shard(data, Processes(1, 2)) == (data, False)
    uneven = DataLoader(TensorDataset(torch.arange(9)), batch_size=3)
    assert shard(uneven, Processes(0, 2)) == (uneven, False)


def test_a_process_that_no_launcher_started_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined("cpu") as (processes, device):
        assert (processes, device) == (Processes(0, 1), "cpu")
        assert processes.first
        assert processes.sum(torch.ones(2)).tolist() == [1.0, 1.0]
