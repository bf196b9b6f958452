"""`--resume`: a run that was ended at any moment goes on, and ends with the very same weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpusq_compile.api import CompileResult, compile_model
from gpusq_compile.errors import CheckFailed, InputError
from gpusq_compile.finetune.checkpoint import (
    RUN,
    STATE,
    TEMPORARY,
    TENSORS,
    Checkpoints,
    check_resumable,
    differences,
    random_state,
    restore_random_state,
)
from tests.command_line import compile_here, finish, start, variant
from tests.compilations import EVERYTHING, TAPS, make_rules
from tests.models import Shape, TinyViT, images, labelled, seeded

DATA = labelled(3)
SMALL_STEPS = {"lr": 1e-3}
FINETUNE: dict[str, Any] = {
    "sparse": {**SMALL_STEPS, "max_steps": 5, "epochs": 9, "keep": "best", "eval_every": 2},
    "quantize": {**SMALL_STEPS, "max_steps": 4, "epochs": 9, "batch_size": 16, "patience": 100},
}
OPTIONS: dict[str, Any] = {"checkpoint_every": 1, "engine": "none", "seed": 5}


class Stopped(KeyboardInterrupt):
    """The end of a process, as far as one process can have it: nothing below catches it."""


class Shuffled:
    """Data whose order and noise follow torch's global seed; the process ends at a batch of it."""

    def __init__(self, end_at: int | None = None) -> None:
        self.given = 0
        self.end_at = end_at

    def __call__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.randperm(len(DATA)).tolist():
            self.given += 1
            if self.given == self.end_at:
                raise Stopped
            inputs, labels = DATA[index]
            yield inputs + 0.1 * torch.randn_like(inputs), labels


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums over more threads than one have no fixed order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def compiled(output: Path, data: Any = None, **changes: Any) -> CompileResult:
    finetune = changes.pop("finetune", FINETUNE)
    arguments = {
        "rules": make_rules(TAPS, EVERYTHING, finetune=finetune),
        "train_data": data or Shuffled(),
        "calibration_data": DATA,
        "eval_data": DATA,
        "output": output,
        **OPTIONS,
        **changes,
    }
    model = arguments.pop("model", None) or seeded(TinyViT, Shape(depth=1))
    return compile_model(model, (images(2),), **arguments)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a run that nothing interrupted."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("whole")
    compiled(output)
    return output


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A run that ended in its quantize phase."""
    with pytest.raises(Stopped):
        compiled(tmp_path, Shuffled(end_at=20))
    return tmp_path


# --- the same weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("end_at", [1, 6, 9, 15, 19, 21])
def test_a_run_that_ended_at_any_batch_goes_on_to_the_very_same_weights(
    end_at: int, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        compiled(tmp_path, Shuffled(end_at=end_at))
    assert not (tmp_path / "weights.safetensors").exists()
    resumed = compiled(tmp_path, resume=True)
    for same in ("weights.safetensors", "graph.json"):
        assert (tmp_path / same).read_bytes() == (whole / same).read_bytes()
    before = json.loads((whole / "report.json").read_text())["finetune"]
    for phase in ("sparse", "quantize"):
        report = resumed.report["finetune"][phase]
        for key in ("steps", "images", "loss", "evaluations", "kept_step", "stopped_by"):
            assert report[key] == before[phase][key], (phase, key)


def test_a_finished_run_leaves_no_checkpoint(whole: Path) -> None:
    assert not (whole / "checkpoint").exists()


def test_a_killed_process_goes_on_to_the_very_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL, which no handler sees, while checkpoints are being written."""
    monkeypatch.chdir(tmp_path)
    path = variant(tmp_path)
    arguments = ("--rules", "int8", "--engine", "none", "--steps", "40", "--checkpoint-every", "1")
    whole = compile_here(monkeypatch, capsys, path, *arguments, "-o", "whole")
    assert whole.code == 0, whole.err
    process = start(path, *arguments, "-o", "out", cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("out/checkpoint/sparse-000000[3-9]")):
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    assert finish(process).code == -signal.SIGKILL
    assert not Path("out/model.onnx").exists()
    resumed = compile_here(monkeypatch, capsys, path, *arguments, "-o", "out", "--resume")
    assert resumed.code == 0, resumed.err
    report = json.loads(Path("out/report.json").read_text())
    assert report["finetune"]["sparse"]["resumed_at"] >= 3
    same = "weights.safetensors"
    assert Path("out", same).read_bytes() == Path("whole", same).read_bytes()
    left = {path.name for path in Path("out").iterdir()}
    assert left == {path.name for path in Path("whole").iterdir()}


def test_without_a_checkpoint_the_run_starts_from_the_beginning_and_says_so(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from gpusq_compile.console import Console

    compiled(tmp_path, resume=True, console=Console())
    assert "no checkpoint in" in capfd.readouterr().err
    same = "weights.safetensors"
    assert (tmp_path / same).read_bytes() == (whole / same).read_bytes()


def test_a_run_without_resume_drops_the_checkpoint_and_says_so(
    stopped: Path, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from gpusq_compile.console import Console

    compiled(stopped, console=Console())
    assert "dropping the checkpoint of an earlier run" in capfd.readouterr().err.replace("\n", " ")
    same = "weights.safetensors"
    assert (stopped / same).read_bytes() == (whole / same).read_bytes()


# --- what cannot be resumed ----------------------------------------------------------------------


def other_model() -> Any:
    model = seeded(TinyViT, Shape(depth=1))
    with torch.no_grad():
        model.last_norm.bias.add_(1.0)
    return model


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"finetune": {**FINETUNE, "sparse": {**FINETUNE["sparse"], "lr": 2e-3}}},
            "rules.finetune.sparse.lr was 0.001 and is 0.002",
        ),
        ({"model": other_model()}, "model.weights was"),
        ({"model": seeded(TinyViT, Shape(depth=2))}, "model.structure was"),
        ({"data": lambda: DATA[:2]}, "data.train_data.batches was"),
        ({"calibration_data": DATA[1:]}, "data.calibration_data.batches was 3 and is 2"),
        ({"seed": 6}, "options.seed was 5 and is 6"),
        ({"steps": 7}, "options.steps was not there and is 7"),
    ],
    ids=["rules", "weights", "structure", "data", "calibration", "seed", "steps"],
)
def test_what_differs_is_named_and_the_checkpoint_stays(
    stopped: Path, changes: dict[str, Any], named: str
) -> None:
    kept = sorted(path for path in (stopped / "checkpoint").rglob("*"))
    with pytest.raises(InputError) as caught:
        compiled(stopped, resume=True, **changes)
    assert caught.value.code == "resume-differs"
    assert named in caught.value.message
    assert sorted(path for path in (stopped / "checkpoint").rglob("*")) == kept


def test_a_checkpoint_that_is_cut_short_is_named(stopped: Path) -> None:
    [path] = (stopped / "checkpoint").glob("quantize-*")
    whole = (path / TENSORS).read_bytes()
    (path / TENSORS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError) as caught:
        compiled(stopped, resume=True)
    assert caught.value.code == "checkpoint-damaged"
    assert path.name in str(caught.value)


def test_a_checkpoint_of_another_model_is_refused(stopped: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with pytest.raises(Stopped):
        compiled(other, Shuffled(end_at=9), model=seeded(TinyViT, Shape(depth=2)))
    [foreign] = (other / "checkpoint").glob("sparse-*")
    for path in (stopped / "checkpoint").glob("*-*"):
        shutil.rmtree(path)
    shutil.copytree(foreign, stopped / "checkpoint" / foreign.name)
    with pytest.raises(InputError) as caught:
        compiled(stopped, resume=True)
    assert caught.value.code == "checkpoint-damaged"
    assert "another model" in caught.value.message


def test_data_that_comes_in_another_order_is_refused(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def own_order(end_at: int) -> Any:
        given = 0

        def data() -> Iterator[tuple[Tensor, Tensor]]:
            nonlocal given
            for index in torch.randperm(len(DATA), generator=generator).tolist():
                given += 1
                if given == end_at:
                    raise Stopped
                yield DATA[index][0] + float(torch.rand(1, generator=generator)), DATA[index][1]

        return data

    with pytest.raises(Stopped):
        compiled(tmp_path, own_order(11))
    # What the fingerprint reads is another draw too: it stands for any first batch.
    run = tmp_path / "checkpoint" / RUN
    document = json.loads(run.read_text())
    with pytest.raises(InputError, match=r"resume-differs|started with something else"):
        compiled(tmp_path, own_order(10**6), resume=True)
    generator.manual_seed(0)
    assert document["data"]["train_data"]["batches"] is None


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    finetune = {"sparse": {"epochs": 20, "lr": 1e20, "optimizer": "sgd", "schedule": "constant"}}
    with pytest.raises(CheckFailed) as caught:
        compiled(tmp_path, finetune=finetune)
    assert caught.value.code == "loss-not-finite"
    assert "the last good checkpoint is kept" in str(caught.value.hint)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint",
        "evidence.json",
        "manifest.json",
        "report.html",
        "report.json",
    ]
    [kept] = (tmp_path / "checkpoint").glob("sparse-*")
    assert json.loads((kept / STATE).read_text())["report"]["curve"]


# --- the files -----------------------------------------------------------------------------------


def checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(folder, {"rules": 1}, every=2)


def test_the_newest_checkpoint_of_each_phase_is_kept(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    for phase, step in (("sparse", 1), ("sparse", 2), ("quantize", 1), ("quantize", 12)):
        kept.save(phase, step, {"w": torch.full((2,), float(step))}, {"note": [1, None]})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["quantize-0000012", RUN, "sparse-0000002"]
    found = kept.load("quantize")
    assert found is not None
    tensors, state = found
    assert torch.equal(tensors["w"], torch.full((2,), 12.0))
    assert (state["step"], state["note"]) == (12, [1, None])
    assert kept.load("other") is None


def test_the_end_of_a_phase_is_kept_beside_what_was_there_until_it_is_whole(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    kept.save("sparse", 2, {"w": torch.ones(1)}, {"score": float("nan")})
    kept.save("sparse", 2, {"w": torch.ones(1)}, {"last": True}, end=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [RUN, "sparse-0000002-end"]
    found = kept.load("sparse")
    assert found is not None
    assert found[1]["last"]


def test_a_checkpoint_that_was_being_written_does_not_count(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    kept.save("sparse", 1, {"w": torch.ones(1)}, {})
    (tmp_path / TEMPORARY).mkdir()
    (tmp_path / TEMPORARY / TENSORS).write_bytes(b"half")
    found = kept.load("sparse")
    assert found is not None
    assert found[1]["step"] == 1
    kept.save("sparse", 2, {"w": torch.ones(1)}, {})
    assert not (tmp_path / TEMPORARY).exists()


@pytest.mark.parametrize("content", ["", "{", '{"sha256": 3}', "[]"])
def test_a_damaged_state_is_named(content: str, tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    kept.save("sparse", 1, {"w": torch.ones(1)}, {})
    (tmp_path / "sparse-0000001" / STATE).write_text(content)
    with pytest.raises(InputError, match="cut short"):
        kept.load("sparse")


def test_nothing_in_a_checkpoint_is_pickled(stopped: Path) -> None:
    files = [path.name for path in (stopped / "checkpoint").rglob("*") if path.is_file()]
    assert sorted(set(files)) == [RUN, STATE, TENSORS]


def test_a_run_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / RUN).write_text("{")
    with pytest.raises(InputError, match="no JSON"):
        check_resumable(tmp_path, {})


def test_differences_have_dotted_names() -> None:
    before = {"a": {"b": [1, {"c": 2}]}, "d": 1}
    now = {"a": {"b": [1, {"c": 3}]}, "e": "x" * 50}
    assert differences(before, now) == [
        "a.b[1].c was 2 and is 3",
        "d was 1 and is not there",
        f'e was not there and is "{"x" * 36}...',
    ]
    assert differences(before, before) == []


def test_random_generators_go_on_where_they_were() -> None:
    import random

    import numpy as np

    device = torch.device("cpu")

    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(1))]

    draw()
    tensors, state = random_state(device)
    state = json.loads(json.dumps(state))
    expected = draw()
    draw()
    restore_random_state(device, tensors, state)
    assert draw() == expected
