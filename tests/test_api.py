"""`compile_model`: a module and Python data in; files, a report and weights for the module out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gpusq_compile import CheckFailed, CompileResult, InputError, compile_model
from gpusq_compile.gates import Gates
from gpusq_compile.output import digest
from gpusq_compile.sparsity import PATTERNS, violations
from tests.compilations import EVERYTHING, make_rules, session_of
from tests.models import (
    CLASSES,
    Perceptron,
    Shape,
    TinyViT,
    images,
    labelled,
    noise,
    seeded,
)

DATA, HELD_OUT = labelled(3), labelled(3, seed=2)
ALL: dict[str, Any] = {"op": "linear"}
LAYERS = ["stem"] + [f"layers.0.{n}" for n in ("mix.wide", "mix.back", "feed.up", "feed.down")]


def tiny() -> TinyViT:
    return seeded(TinyViT, Shape(depth=1))


# --- a whole run ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> TinyViT:
    return tiny().train()


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled") / "out"


@pytest.fixture(scope="module")
def result(model: TinyViT, output: Path) -> CompileResult:
    return compile_model(
        model,
        (images(2),),
        rules="int8",
        output=output,
        train_data=DATA,
        calibration_data=[inputs for inputs, _ in DATA],
        eval_data=HELD_OUT,
        steps=3,
        engine="none",
        seed=5,
    )


def test_the_callers_module_stays_exactly_what_it_was(
    model: TinyViT, result: CompileResult
) -> None:
    untouched = tiny().state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, untouched[name]), name
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert result.report["finetune"]["sparse"]["steps"] == 3


def test_the_folder_holds_what_the_manifest_lists(result: CompileResult, output: Path) -> None:
    manifest = json.loads((output / "manifest.json").read_text())
    found = {str(p.relative_to(output)) for p in output.rglob("*") if p.is_file()}
    assert found == {"manifest.json", *manifest["files"]}
    assert found >= {"model.onnx", "report.json", "build_engine.sh"}
    for name, sha256 in manifest["files"].items():
        assert digest(output / name) == sha256
    assert manifest["seed"] == 5
    assert manifest["versions"]["torch"] == version("torch")
    assert set(result.files) == {output / name for name in found}
    assert result.output == output


def test_the_file_is_sparse_int8_opset_21_with_a_dynamic_batch(
    result: CompileResult, output: Path
) -> None:
    stored = onnx.load(output / "model.onnx")
    assert stored == result.onnx_model
    assert [(o.domain, o.version) for o in stored.opset_import] == [("", 21)]
    weights = {t.name: t for t in stored.graph.initializer}
    for layer in LAYERS:
        assert weights[f"{layer}.weight"].data_type == TensorProto.INT8
    session = session_of(result)
    for count in (1, 3, 7):
        [found] = session.run(None, {"x": images(count).numpy()})
        assert found.shape == (count, CLASSES)


def test_the_report_says_what_became_of_each_layer(result: CompileResult, output: Path) -> None:
    report = result.report
    assert report == json.loads((output / "report.json").read_text())
    assert (report["schema_version"], report["status"], report["error"]) == (1, "ok", None)
    layers = {layer["name"]: layer for layer in report["layers"]}
    assert list(layers) == [*LAYERS, "logits"]
    for name in LAYERS:
        assert layers[name]["applied"] == layers[name]["requested"]
        assert layers[name]["applied"]["sparsity"] == "2:4"
        assert layers[name]["mask_ok"] is True
        assert layers[name]["reasons"] == []
        assert layers[name]["engine"]["type"] == "unknown"
    assert layers["layers.0.mix.wide"]["applied"]["output"] == "int8"
    assert layers["logits"]["applied"] == {
        "sparsity": None,
        "weight": None,
        "activation": None,
        "output": None,
    }
    assert "dense-classifier" in layers["logits"]["rules"][-1]


def test_the_report_covers_the_whole_run(result: CompileResult) -> None:
    report = result.report
    assert [step["name"] for step in report["passes"]] == [
        "trace", "canonicalize", "mark", "split_attention",
        "permute", "tap", "sparsify", "finetune_sparse",
        "smooth", "quantize", "reconstruct", "finetune_quantized",
        "fold", "split_outputs", "export_onnx", "surgery", "set_precision",
            "store_int4", "verify_onnx", "pack", "build_engine",
    ]  # fmt: skip
    for phase in ("sparse", "quantize"):
        assert report["finetune"][phase]["stopped_by"] == "budget"
        assert len(report["finetune"][phase]["loss"]) == 3
    assert sum(report["finetune"]["quantize"]["tap_weights"].values()) == pytest.approx(1.0)
    assert set(report["accuracy"]) == {"dense", "sparse", "quantized", "onnx"}
    assert all(0 <= value <= 1 for value in report["accuracy"].values())
    assert report["verify"]["ok"] is True


def test_storage_is_counted_from_bytes_on_disk(
    model: TinyViT, result: CompileResult, output: Path
) -> None:
    storage = result.report["storage"]
    assert storage["model_bytes"] == (output / "model.onnx").stat().st_size
    dense = sum(4 * parameter.numel() for parameter in model.parameters())
    assert storage["dense_fp32_bytes"] == dense
    weights = [model.get_parameter(f"{layer}.weight").numel() for layer in LAYERS]
    channels = [model.get_parameter(f"{layer}.weight").shape[0] for layer in LAYERS]
    assert storage["gemm_bytes"] == sum(weights) + 2 * sum(channels)
    assert storage["gemm_ratio"] == pytest.approx(4 * sum(weights) / storage["gemm_bytes"])


# --- weights back into the eager model -----------------------------------------------------------


def test_the_weights_go_back_under_their_own_names_and_shapes(result: CompileResult) -> None:
    eager = tiny()
    state = result.state_dict()
    assert {name: value.shape for name, value in state.items()} == {
        name: parameter.shape for name, parameter in eager.named_parameters()
    }
    assert {value.dtype for value in state.values()} == {torch.float32}
    missing, unexpected = eager.load_state_dict(state, strict=False)
    assert (missing, unexpected) == ([], [])
    # The patch embedding is a convolution again, and sparse along all of its patch.
    assert state["stem.weight"].shape == (32, 2, 4, 4)
    assert violations(state["stem.weight"].flatten(1), PATTERNS["2:4"]) == 0


def test_the_eager_model_with_them_is_the_deployed_one_for_weight_only_rules() -> None:
    only_weights = {**EVERYTHING, "quantize": {"weight": "int8", "activation": "none"}}
    result = compile_model(tiny(), (images(2),), rules=make_rules(only_weights), finetune=False)
    eager = tiny()
    eager.load_state_dict(result.state_dict(), strict=False)
    batch = images(8, seed=3)
    with torch.no_grad():
        torch.testing.assert_close(eager(batch), result.graph(batch), rtol=1e-5, atol=1e-5)
        [found] = session_of(result).run(None, {"x": batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), eager(batch), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(eager(batch), tiny()(batch), atol=1e-3)


def test_the_graph_is_a_module_that_computes_what_the_file_computes(result: CompileResult) -> None:
    batch = images(8, seed=3)
    [found] = session_of(result).run(None, {"x": batch.numpy()})
    with torch.no_grad():
        expected = result.graph(batch)
    assert torch.nn.functional.cosine_similarity(torch.from_numpy(found), expected).min() > 0.999


# --- repeatability -------------------------------------------------------------------------------


def shuffled() -> Iterator[tuple[Tensor, Tensor]]:
    dataset = TensorDataset(*(torch.cat(part) for part in zip(*DATA, strict=True)))
    for inputs, labels in DataLoader(dataset, batch_size=8, shuffle=True):
        noise = torch.from_numpy(
            np.random.default_rng(np.random.randint(2**31)).normal(size=inputs.shape)
        )
        yield inputs + 0.05 * noise.float(), labels


def compiled_bytes(seed: int) -> bytes:
    found = compile_model(
        seeded(Perceptron2D),
        (images(2),),
        rules=make_rules(EVERYTHING),
        train_data=shuffled,
        calibration_data=DATA,
        steps=2,
        seed=seed,
    ).onnx_model
    assert found is not None
    return found.SerializeToString(deterministic=True)


class Perceptron2D(Perceptron):
    """A perceptron over flattened images."""

    def __init__(self) -> None:
        super().__init__((128, 64, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1))


def test_equal_seeds_give_the_same_file_bit_for_bit_and_others_do_not() -> None:
    first = compiled_bytes(11)
    torch.manual_seed(99)  # What ran before has no say.
    np.random.seed(99)
    assert compiled_bytes(11) == first
    assert compiled_bytes(12) != first


# --- failed checks -------------------------------------------------------------------------------


def failing(output: Path, **rest: Any) -> CheckFailed:
    inputs = noise(4, 32)
    options: dict[str, Any] = {"calibration_data": [inputs], "finetune": False, "engine": "none"}
    with pytest.raises(CheckFailed) as caught:
        compile_model(seeded(Perceptron), (inputs,), output=output, **(options | rest))
    assert caught.value.exit_code == 1
    return caught.value


def test_a_failed_verification_leaves_the_report_and_no_model_not_even_an_earlier_one(
    tmp_path: Path,
) -> None:
    inputs = noise(4, 32)
    compile_model(
        seeded(Perceptron), (inputs,), rules=make_rules(EVERYTHING), output=tmp_path,
        calibration_data=[inputs], finetune=False, engine="none",
    )  # fmt: skip
    assert (tmp_path / "model.onnx").exists()
    (tmp_path / "mine.txt").write_text("mine")
    error = failing(
        tmp_path, rules=make_rules(EVERYTHING, precision="fp16", verify={"max_difference": 1e-9})
    )
    assert error.code == "verify"
    assert "limit max_difference 1e-09" in error.message
    found = sorted(path.name for path in tmp_path.iterdir())
    kept = ["evidence.json", "report.html", "report.json"]
    assert found == sorted(["manifest.json", "mine.txt", *kept])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["status"] == "failed"
    assert report["error"] == {"code": "verify", "message": error.message}
    assert report["verify"]["ok"] is False
    assert list(json.loads((tmp_path / "manifest.json").read_text())["files"]) == kept


def test_a_drop_beyond_the_gate_says_by_how_much_and_leaves_no_model(tmp_path: Path) -> None:
    inputs = noise(64, 32)
    # Labels are what the dense model says, so that pruning can only lose.
    labels = seeded(Perceptron)(inputs).argmax(dim=1)
    error = failing(
        tmp_path,
        rules=make_rules(EVERYTHING),
        eval_data=[(inputs, labels)],
        gates=Gates(max_drop=0.5),
    )
    assert error.code == "max-drop"
    assert "from 100.00% to" in error.message
    assert "the gate allows 0.5" in error.message
    assert [path.name for path in tmp_path.glob("*.onnx")] == []


# --- what stops a run before it changes anything -------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code", "hint"),
    [
        ({"engine": "tensorflow"}, "unknown-engine", "did you mean 'tensorrt'?"),
        ({"targets": ["sm98"]}, "unknown-target", "valid: portable, sm100, sm120, sm80"),
        ({"steps": 0}, "steps", ""),
        ({"epochs": 0.0}, "epochs", "--no-finetune"),
        ({"epochs": float("nan")}, "epochs", "--no-finetune"),
        ({"steps": 1, "epochs": 1.0}, "steps-and-epochs", ""),
        ({"dump_after": ["quantise"]}, "unknown-pass", "did you mean 'quantize'?"),
        ({"device": "tpu"}, "unknown-device", "cpu, cuda"),
        ({"calibration_data": iter([noise(2, 32)])}, "data-iterates-once", "a list"),
        ({"scope": "frist"}, "unknown-scope", "did you mean 'first'?"),
        ({"rules": "int9"}, "unknown-rules", ""),
        ({"example_inputs": None}, "example-inputs", ""),
        ({"example_inputs": (3,)}, "example-inputs", "batch first"),
    ],
)
def test_an_option_that_cannot_be_is_refused_with_the_nearest_that_can(
    tmp_path: Path, options: dict[str, Any], code: str, hint: str
) -> None:
    arguments: dict[str, Any] = {
        "example_inputs": (noise(2, 32),),
        "rules": make_rules(EVERYTHING),
        "output": tmp_path / "out",
        **options,
    }
    with pytest.raises(InputError) as caught:
        compile_model(seeded(Perceptron), **arguments)
    assert caught.value.exit_code == 2
    if code != "unknown-rules":  # The rules' own codes have tests of their own.
        assert caught.value.code == code
    assert hint in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_weights_that_are_not_finite_are_named(value: float, kind: str) -> None:
    model = seeded(Perceptron)
    with torch.no_grad():
        model.second.weight[3, 4] = value
    with pytest.raises(InputError) as caught:
        compile_model(model, (noise(2, 32),), rules=make_rules(EVERYTHING))
    assert caught.value.code == "weights-not-finite"
    assert caught.value.message.startswith(f"second.weight [32, 64] is {kind} in 1 of 2048")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_type_are_refused_with_the_way_out(dtype: torch.dtype) -> None:
    inputs = noise(2, 32, dtype=dtype)
    with pytest.raises(InputError) as caught:
        compile_model(
            seeded(Perceptron).to(dtype),
            (inputs,),
            rules=make_rules(EVERYTHING),
            calibration_data=[inputs],
        )
    assert caught.value.code == "weights-not-float32"
    assert caught.value.message.startswith("first.weight [64, 32] is ")
    assert "expected float32" in caught.value.message
    assert "model.float()" in str(caught.value.hint)


class Divides(Perceptron):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 0 * 0


def test_a_model_whose_own_outputs_are_nan_is_refused() -> None:
    inputs = noise(2, 32)
    with pytest.raises(InputError) as caught:
        compile_model(
            seeded(Divides), (inputs,), rules=make_rules(EVERYTHING), calibration_data=[inputs],
            finetune=False,
        )  # fmt: skip
    assert caught.value.code == "outputs-not-finite"


def test_a_dry_run_matches_the_rules_and_writes_nothing(tmp_path: Path) -> None:
    result = compile_model(
        tiny(), (images(2),), rules="int8", output=tmp_path / "out", dry_run=True
    )
    layers = {layer["name"]: layer for layer in result.report["layers"]}
    assert layers["layers.0.feed.up"]["requested"]["weight"] == "int8"
    assert layers["layers.0.feed.up"]["applied"]["weight"] is None
    assert result.onnx_model is None
    assert result.output is None
    assert not (tmp_path / "out").exists()


def test_a_dry_run_refuses_to_dump() -> None:
    with pytest.raises(InputError) as caught:
        compile_model(tiny(), (images(2),), rules="int8", dry_run=True, dump_after=["all"])
    assert caught.value.code == "options-conflict"


def test_a_dry_run_needs_no_folder_to_write_in() -> None:
    # Below a device not even root can make a folder.
    output = Path(os.devnull) / "out"
    result = compile_model(tiny(), (images(2),), rules="int8", output=output, dry_run=True)
    assert result.report["layers"]
    with pytest.raises(InputError) as caught:
        compile_model(tiny(), (images(2),), rules="int8", output=output)
    assert caught.value.code == "output-not-writable"


def test_a_dry_run_names_a_file_in_place_of_its_output(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError) as caught:
        compile_model(tiny(), (images(2),), rules="int8", output=tmp_path / "out", dry_run=True)
    assert caught.value.code == "output-is-a-file"


@pytest.mark.parametrize(
    ("scope", "hint"),
    [
        ("layers.0.feed.upp", "did you mean 'layers.0.feed.up'? valid in layers.0.feed: "),
        ("layers.0.feeed.up", "did you mean 'layers.0.feed.up'? valid in layers.0: "),
        ("layers.7.feed", "valid in layers: layers.0"),
        ("layer.0.feed.up", "did you mean 'layers.0.feed.up'? valid: "),
    ],
)
def test_a_scope_of_any_depth_is_answered_with_the_nearest(scope: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        compile_model(tiny(), (images(2),), rules="int8", scope=scope, dry_run=True)
    assert caught.value.code == "unknown-scope"
    assert hint in (caught.value.hint or "")


class Several(nn.Module):
    """Outputs of several shapes, one value per image among them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Perceptron()
        self.score = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.inner(x)
        return y, self.score(y).squeeze(1)


def test_outputs_of_any_shape_are_verified() -> None:
    rule = {**EVERYTHING, "match": {"op": "linear", "out_features": {"min": 32}}}
    result = compile_model(
        seeded(Several), (noise(4, 32),), rules=make_rules(rule),
        calibration_data=[noise(4, 32)], finetune=False,
    )  # fmt: skip
    assert result.report["verify"]["ok"] is True
    shapes = [
        output.shape
        for output in session_of(result).run(None, {"x": np.zeros((5, 32), np.float32)})
    ]
    assert shapes == [(5, 32), (5,)]
