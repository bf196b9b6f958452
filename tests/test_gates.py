"""Gates hold up to their limit, and say in one line which one fails and by how much."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from gpusq_compile import CheckFailed, InputError, compile_model
from gpusq_compile.gates import Gates, check_gates, missed_remarks, sparse_share
from tests.models import Shape, TinyViT, images, labelled, seeded
from tests.reports import RULES, frozen, layer_of, make_report


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_report(tmp_path_factory.mktemp("gates"))


@pytest.fixture
def report(made: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(made)


def test_without_gates_nothing_fails(report: dict[str, Any]) -> None:
    check_gates(report, Gates())


def test_a_drop_up_to_the_limit_passes(report: dict[str, Any]) -> None:
    report["accuracy"].update({"dense": 0.95, "onnx": 0.94})
    check_gates(report, Gates(max_drop=1.5))
    with pytest.raises(CheckFailed, match=r"top-1 fell by 1\.00 points, from 95\.00% to 94\.00%"):
        check_gates(report, Gates(max_drop=0.5))


def test_an_accuracy_that_nobody_measured_fails(report: dict[str, Any]) -> None:
    report["accuracy"]["dense"] = None
    with pytest.raises(CheckFailed, match="no labelled eval_data"):
        check_gates(report, Gates(max_drop=5))


def test_strict_names_what_was_not_done_and_how_much_more(report: dict[str, Any]) -> None:
    left = missed_remarks(report)
    assert left[0].startswith("mark: stem: blocks of 64 do not divide its 32 input channels")
    with pytest.raises(CheckFailed) as caught:
        check_gates(report, Gates(strict=True))
    assert caught.value.code == "strict"
    more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
    assert caught.value.message == left[0] + more


def test_all_that_is_aligned_is_eligible_and_counted_by_its_weights(
    report: dict[str, Any],
) -> None:
    found = sparse_share(report)
    aligned = [layer for layer in report["layers"] if layer["shape"][0] % 32 == 0]
    # The classifier has ten outputs, and counts since it is sparse all the same.
    assert found.eligible == sum(a * b for a, b in (x["shape"] for x in aligned)) + 10 * 32
    assert found.eligible - found.sparse == 64 * 32
    assert found.missing == (("layers.0.feed.up", "no rule asks for it"),)


def test_a_share_below_the_gate_names_the_layers_and_the_reason(report: dict[str, Any]) -> None:
    share = sparse_share(report).share
    assert 0.8 < share < 0.95
    check_gates(report, Gates(require_sparse=share))
    with pytest.raises(CheckFailed) as caught:
        check_gates(report, Gates(require_sparse=0.95))
    assert caught.value.code == "require-sparse"
    assert caught.value.message == (
        f"{share:.1%} of the weights that could be sparse have sparse kernels, the gate asks for "
        "95.0%; not layers.0.feed.up: no rule asks for it"
    )


def test_what_an_engine_says_is_picked_counts_alone(report: dict[str, Any]) -> None:
    before = sparse_share(report)
    chain = layer_of(report, "layers.1.feed.up")["sparse_kernel"]
    chain.update({"picked": "no", "eligible": "yes", "reason": "a dense kernel was faster"})
    found = sparse_share(report)
    assert before.sparse - found.sparse == 64 * 32
    with pytest.raises(CheckFailed, match=r"run on sparse kernels, .*; not layers\.\d\.feed\.up"):
        check_gates(report, Gates(require_sparse=0.9))
    chain["picked"] = "yes"
    layer_of(report, "layers.1.feed.up")["execution"]["kind"] = "dense int8"
    assert sparse_share(report).sparse == before.sparse


def test_a_mask_that_is_broken_in_the_file_does_not_count(report: dict[str, Any]) -> None:
    before = sparse_share(report).sparse
    layer_of(report, "layers.1.feed.up")["mask_ok"] = False
    assert before - sparse_share(report).sparse == 64 * 32


def test_a_model_without_a_layer_that_could_be_sparse_fails(report: dict[str, Any]) -> None:
    report["layers"] = []
    with pytest.raises(CheckFailed, match="no layer of this model has sizes that sparse kernels"):
        check_gates(report, Gates(require_sparse=0.5))


def test_the_plan_of_a_dry_run_has_a_share_too(tmp_path: Path, made: dict[str, Any]) -> None:
    planned = make_report(tmp_path, dry_run=True)
    assert planned["layers"][1]["applied"]["sparsity"] is None
    assert sparse_share(planned).share == sparse_share(made).share


def test_a_report_of_an_earlier_version_has_a_share_too() -> None:
    assert 0 < sparse_share(frozen()).share <= 1


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_share_that_cannot_be_is_refused(value: float) -> None:
    with pytest.raises(InputError, match="expected 0 to 1"):
        Gates(require_sparse=value)


def test_a_compile_that_fails_a_gate_leaves_its_report_and_no_model(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(RULES)
    with pytest.raises(CheckFailed, match="the gate asks for 99"):
        compile_model(
            seeded(TinyViT, Shape(depth=2)),
            (images(2),),
            rules=tmp_path / "mine.yaml",
            output=tmp_path / "out",
            calibration_data=labelled(1),
            finetune=False,
            engine="none",
            gates=Gates(require_sparse=0.99),
        )
    assert not (tmp_path / "out" / "model.onnx").exists()
    assert '"code": "require-sparse"' in (tmp_path / "out" / "report.json").read_text()
