"""--emit triton writes a model repository that Triton Inference Server can read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
from google.protobuf.text_format import ParseError
from onnx import TensorProto, helper

from gpusq_compile import InputError, compile_model
from gpusq_compile.engine.report import BatchRange
from gpusq_compile.triton import config, repository_name, share, write_repository
from tests.command_line import ONE_SHOT, TINY, compile_here
from tests.compilations import make_rules
from tests.models import Perceptron, noise, seeded
from tests.triton_config import TYPES, parse_config

Tensors = dict[str, tuple[int, list[Any]]]


def model(inputs: Tensors, outputs: Tensors) -> onnx.ModelProto:
    """A file of these inputs and outputs; a text is the name of a size that varies."""
    ins, outs = (
        [helper.make_tensor_value_info(name, kind, sizes) for name, (kind, sizes) in x.items()]
        for x in (inputs, outputs)
    )
    return helper.make_model(helper.make_graph([], "graph", ins, outs))


IMAGES: Tensors = {"images": (TensorProto.FLOAT, ["batch", 3, 224, 224])}
LOGITS: Tensors = {"logits": (TensorProto.FLOAT, ["batch", 1000])}


def test_the_command_writes_a_repository_with_the_model_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = compile_here(monkeypatch, capsys, TINY, *ONE_SHOT, "-o", "out", "--emit", "triton")
    assert run.code == 0
    home = Path("out/triton/tiny")
    files = sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())
    assert files == [
        "1/model.onnx",
        "config.pbtxt",
        "configs/onnxruntime.pbtxt",
        "configs/tensorrt.pbtxt",
    ]
    assert (home / "1/model.onnx").read_bytes() == Path("out/model.onnx").read_bytes()
    listed = json.loads(Path("out/manifest.json").read_text())["files"]
    assert {f"triton/tiny/{name}" for name in files} <= set(listed)
    served = parse_config((home / "config.pbtxt").read_text())
    assert (served.name, served.backend, served.max_batch_size) == ("tiny", "onnxruntime", 16)
    session = onnxruntime.InferenceSession(str(home / "1" / served.default_model_filename))
    for own, theirs in (
        (served.input, session.get_inputs()),
        (served.output, session.get_outputs()),
    ):
        assert [(t.name, list(t.dims)) for t in own] == [(t.name, t.shape[1:]) for t in theirs]
        assert {t.data_type for t in own} == {TYPES["TYPE_FP32"]}
    compile_here(monkeypatch, capsys, TINY, *ONE_SHOT, "-o", "out", "-q")
    assert not Path("out/triton").exists(), "a run without it leaves nothing of the last one's"


def test_requests_are_batched_up_to_what_engines_are_built_for() -> None:
    served = parse_config(config(model(IMAGES, LOGITS), "vit", "onnxruntime", BatchRange()))
    assert served.max_batch_size == BatchRange().max
    assert list(served.dynamic_batching.preferred_batch_size) == [8, 16]
    assert served.dynamic_batching.max_queue_delay_microseconds > 0
    assert list(served.input[0].dims) == [3, 224, 224]


def test_the_engine_of_the_gpu_machine_has_a_config_of_its_own() -> None:
    served = parse_config(config(model(IMAGES, LOGITS), "vit", "tensorrt", BatchRange()))
    assert (served.backend, served.default_model_filename) == ("tensorrt", "model.plan")


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ({"images": (TensorProto.FLOAT, [1, 3, 8, 8])}, LOGITS),
        (IMAGES, {"mean": (TensorProto.FLOAT, [10])}),
        ({**IMAGES, "scale": (TensorProto.FLOAT, [1])}, LOGITS),
        ({**IMAGES, "factor": (TensorProto.FLOAT, [])}, LOGITS),
    ],
)
def test_a_tensor_without_the_batch_switches_batching_off(inputs: Any, outputs: Any) -> None:
    served = parse_config(config(model(inputs, outputs), "vit", "onnxruntime", BatchRange()))
    assert served.max_batch_size == 0
    assert not served.HasField("dynamic_batching")
    first = next(iter(inputs.values()))[1]
    assert list(served.input[0].dims) == [-1 if s == "batch" else s for s in first]


def test_sizes_that_vary_and_other_types_are_said() -> None:
    inputs: Tensors = {
        "pixels": (TensorProto.FLOAT16, ["batch", 3, "height", "width"]),
        "mask": (TensorProto.BOOL, ["batch", "height", "width"]),
        "ids": (TensorProto.INT64, ["batch"]),
    }
    served = parse_config(config(model(inputs, LOGITS), "vit", "onnxruntime", BatchRange()))
    pixels, mask, ids = served.input
    assert (pixels.data_type, list(pixels.dims)) == (TYPES["TYPE_FP16"], [3, -1, -1])
    assert (mask.data_type, list(mask.dims)) == (TYPES["TYPE_BOOL"], [-1, -1])
    assert (ids.data_type, list(ids.dims)) == (TYPES["TYPE_INT64"], [1])
    assert ids.HasField("reshape")
    assert list(ids.reshape.shape) == []
    assert not mask.HasField("reshape")


def test_an_engine_of_tensorrt_is_served_in_the_first_place(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"onnx")
    (tmp_path / "model.sm89.plan").write_bytes(b"plan")
    built = model(IMAGES, LOGITS)
    repository = tmp_path / "triton"
    write_repository(
        built,
        tmp_path / "model.onnx",
        repository,
        "vit",
        BatchRange(),
        tmp_path / "model.sm89.plan",
    )
    assert (repository / "vit/1/model.plan").read_bytes() == b"plan"
    assert parse_config((repository / "vit/config.pbtxt").read_text()).backend == "tensorrt"


def test_where_there_are_no_hard_links_the_model_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr("os.link", refuse)
    (tmp_path / "a").write_bytes(b"onnx")
    share(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"onnx"


@pytest.mark.parametrize(
    ("origin", "name"),
    [
        ("examples/digits_vit.py", "digits_vit"),
        ("timm:deit_tiny_patch16_224", "timm-deit_tiny_patch16_224"),
        ("hf:google/vit base", "hf-google-vit-base"),
        ("::", "model"),
    ],
)
def test_a_model_is_called_as_its_source(origin: str, name: str) -> None:
    assert repository_name(origin) == name


def test_a_key_that_triton_does_not_know_would_be_found() -> None:
    with pytest.raises(ParseError):
        parse_config('name: "vit"\nmax_batchsize: 8\n')


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"emit": ["trition"]}, "unknown-emit"),
        ({"emit": ["triton"], "dry_run": True}, "options-conflict"),
        ({"emit": ["triton"], "output": None}, "emit-without-output"),
    ],
)
def test_what_cannot_be_emitted_is_refused(
    options: dict[str, Any], code: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        compile_model(
            seeded(Perceptron),
            (noise(2, 32),),
            rules=make_rules(),
            **{"output": tmp_path / "out", **options},
        )
    assert caught.value.code == code
    assert not (tmp_path / "out").exists()
