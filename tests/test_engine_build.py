"""Engines are really built, with TensorRT-RTX, and what became of each layer is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from onnx import numpy_helper

from gpusq_compile.engine import BatchRange, MarkedGemm, build_engines
from gpusq_compile.engine.backend import layer_of_node
from gpusq_compile.engine.backends import choose_backend
from gpusq_compile.errors import CheckFailed, InputError
from tests.engine_blocks import BlockSpec, gemm_names, save_vit

ROOT = Path(__file__).resolve().parents[1]

try:
    import tensorrt_rtx  # noqa: F401

    MISSING = ""
except Exception as error:
    MISSING = f"tensorrt_rtx cannot be imported: {error}"

needs_rtx = pytest.mark.skipif(bool(MISSING), reason=MISSING or "tensorrt_rtx is here")

# Twelve blocks as wide as DeiT-Tiny's: long enough to be interrupted in the middle.
DEIT = BlockSpec(dim=192, heads=3, tokens=196, blocks=12, patch=16, classes=1000)


def marked(spec: BlockSpec) -> list[MarkedGemm]:
    return [
        MarkedGemm(name, "int8" if spec.quantize else spec.dtype, sparse=True)
        for name in gemm_names(spec)
    ]


def statuses(tmp_path: Path, spec: BlockSpec) -> dict[str, str]:
    """{layer: "type status"} of a portable engine."""
    report = build_engines(
        save_vit(tmp_path / "model.onnx", spec),
        tmp_path,
        backend="tensorrt-rtx",
        gemms=marked(spec),
    )
    return {g.name: f"{g.actual} {g.status}" for g in report.targets["portable"].gemms}


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob("*") if p.name.startswith(".") or "partial" in p.name]


@needs_rtx
def test_portable_engine_holds_every_marked_gemm_in_int8(tmp_path: Path) -> None:
    spec = BlockSpec()
    seen: list[tuple[str, str, float]] = []
    report = build_engines(
        save_vit(tmp_path / "model.onnx", spec),
        tmp_path,
        backend="tensorrt-rtx",
        gemms=marked(spec),
        progress=lambda target, phase, fraction: seen.append((target, phase, fraction)),
    )
    assert report.backend == "tensorrt-rtx"
    engine = report.targets["portable"]
    plan = tmp_path / "engine" / "model.plan"
    assert (engine.file, engine.bytes) == ("engine/model.plan", plan.stat().st_size)
    assert engine.bytes > 10_000
    assert [g.name for g in engine.gemms] == gemm_names(spec)
    assert {(g.actual, g.status) for g in engine.gemms} == {("int8", "passed")}
    assert report.missed() == ()
    assert {(g.eligible, g.picked) for g in engine.gemms} == {("unknown", "unknown")}
    assert any("sparse kernels is unknown" in remark for remark in report.remarks)
    fractions = [fraction for _, _, fraction in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert len({phase for _, phase, _ in seen}) > 3
    assert leftovers(tmp_path) == []
    assert json.loads(json.dumps(report.as_dict()))["targets"]["portable"]["gemms"][1]["name"] == (
        "blocks.0.attn.qkv"
    )


@needs_rtx
def test_fused_qkv_loses_int8_without_output_qdq_and_the_report_says_why(tmp_path: Path) -> None:
    spec = BlockSpec(qkv_output=False)
    report = build_engines(
        save_vit(tmp_path / "model.onnx", spec),
        tmp_path,
        backend="tensorrt-rtx",
        gemms=marked(spec),
    )
    ((target, qkv),) = report.missed()
    assert (target, qkv.name, qkv.actual) == ("portable", "blocks.0.attn.qkv", "fp16")
    assert qkv.reason is not None
    assert "dequantizes the weight" in qkv.reason
    assert "Q/DQ on the layer's output" in qkv.reason


@needs_rtx
@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        pytest.param(BlockSpec(layout="nk"), "int8 passed", id="weights transposed"),
        pytest.param(BlockSpec(dtype="fp32"), "int8 passed", id="fp32 around int8"),
        pytest.param(BlockSpec(quantize_outputs=True), "int8 passed", id="all outputs quantized"),
        pytest.param(BlockSpec(quantize=False), "fp16 passed", id="sparse fp16"),
        pytest.param(BlockSpec(quantize=False, dtype="fp32"), "fp32 passed", id="sparse fp32"),
        pytest.param(
            BlockSpec(scale_axis="tensor", qkv_output=False),
            "int8 passed",
            id="fused qkv, scale per tensor",
        ),
        pytest.param(BlockSpec(scale_axis="reduction"), "fp16 missed", id="scale along reduction"),
    ],
)
def test_every_gemm_of_a_block_is_found_with_its_type(
    tmp_path: Path, spec: BlockSpec, expected: str
) -> None:
    assert statuses(tmp_path, spec) == dict.fromkeys(gemm_names(spec), expected)


@needs_rtx
def test_deit_tiny_sized_model_keeps_all_fifty_gemms_in_int8(tmp_path: Path) -> None:
    found = statuses(tmp_path, DEIT)
    assert len(found) == 50
    assert set(found.values()) == {"int8 passed"}


@needs_rtx
def test_one_engine_for_each_named_target(tmp_path: Path) -> None:
    path = save_vit(tmp_path / "model.onnx", BlockSpec())
    report = build_engines(
        path, tmp_path, backend="tensorrt-rtx", targets=("sm80", "sm120", "sm80")
    )
    assert [e.file for e in report.targets.values()] == [
        "engine/model.sm80.plan",
        "engine/model.sm120.plan",
    ]
    plans = [(tmp_path / e.file).read_bytes() for e in report.targets.values()]
    assert plans[0] != plans[1]


@needs_rtx
def test_a_static_batch_builds_without_a_profile(tmp_path: Path) -> None:
    path = save_vit(tmp_path / "model.onnx", BlockSpec())
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, path)
    report = build_engines(path, tmp_path, backend="tensorrt-rtx", gemms=marked(BlockSpec()))
    assert report.missed() == ()


def test_backend_none_builds_nothing(tmp_path: Path) -> None:
    report = build_engines(tmp_path / "model.onnx", tmp_path, backend="none")
    assert (report.backend, report.targets) == ("none", {})
    assert list(tmp_path.iterdir()) == []


@needs_rtx
@pytest.mark.parametrize("targets", [("sm90",), ("sm_89",), ("portabel",)])
def test_a_target_it_cannot_build_for_is_refused_with_the_list(
    tmp_path: Path, targets: tuple[str, ...]
) -> None:
    path = save_vit(tmp_path / "model.onnx", BlockSpec())
    with pytest.raises(InputError) as caught:
        build_engines(path, tmp_path, backend="tensorrt-rtx", targets=targets)
    assert caught.value.code == "unsupported-target"
    assert "it can for portable, sm120, sm80, sm86, sm89; or" in str(caught.value)


def test_an_unknown_backend_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'tensorrt-rtx'") as caught:
        build_engines(tmp_path / "m.onnx", tmp_path, backend="tensorrt_rtx")  # type: ignore[arg-type]
    assert caught.value.code == "unknown-engine-backend"


@pytest.mark.parametrize("batch", [BatchRange(0, 1, 1), BatchRange(4, 2, 8), BatchRange(1, 9, 8)])
def test_batch_sizes_out_of_order_are_refused(tmp_path: Path, batch: BatchRange) -> None:
    with pytest.raises(InputError) as caught:
        build_engines(tmp_path / "model.onnx", tmp_path, batch=batch)
    assert caught.value.code == "bad-batch-range"


def replace_initializer(path: Path, name: str, value: np.ndarray) -> None:
    model = onnx.load(path)
    (found,) = [i for i in model.graph.initializer if i.name == name]
    found.CopyFrom(numpy_helper.from_array(value, name))
    onnx.save(model, path)


@needs_rtx
@pytest.mark.parametrize(
    ("name", "value", "node", "said"),
    [
        (
            "blocks.0.mlp.fc1.input.zero_point",
            np.array(3, np.int8),
            "blocks.0.mlp.fc1.input.quantize",
            "Non-zero zero point is not supported",
        ),
        (
            "blocks.0.mlp.fc1.weight_scale",
            np.zeros(256, np.float16),
            "blocks.0.mlp.fc1.weight_dequantize",
            "Scale coefficients must all be positive",
        ),
        (
            "blocks.0.mlp.fc1.bias",
            np.zeros(256, np.float32),
            "blocks.0.mlp.fc1.bias_add",
            "types Half and Float",
        ),
    ],
)
def test_a_node_the_parser_rejects_is_named_with_its_layer(
    tmp_path: Path, name: str, value: np.ndarray, node: str, said: str
) -> None:
    path = save_vit(tmp_path / "model.onnx", BlockSpec())
    replace_initializer(path, name, value)
    with pytest.raises(CheckFailed) as caught:
        build_engines(path, tmp_path, backend="tensorrt-rtx", gemms=marked(BlockSpec()))
    text = str(caught.value)
    assert caught.value.code == "engine-parse-failed"
    assert f"node '{node}'" in text
    assert "layer 'blocks.0.mlp.fc1'" in text
    assert said in text
    assert "cudaError" not in text
    assert leftovers(tmp_path) == []
    assert not (tmp_path / "engine" / "model.plan").exists()


@needs_rtx
@pytest.mark.parametrize("content", [b"", b"hello world" * 10, "cut"])
def test_a_file_that_is_no_model_is_an_error(tmp_path: Path, content: bytes | str) -> None:
    path = save_vit(tmp_path / "model.onnx", BlockSpec())
    path.write_bytes(path.read_bytes()[:5000] if isinstance(content, str) else content)
    with pytest.raises(CheckFailed) as caught:
        build_engines(path, tmp_path, backend="tensorrt-rtx")
    assert caught.value.code == "engine-parse-failed"


@needs_rtx
def test_a_dynamic_dimension_beside_the_batch_is_named(tmp_path: Path) -> None:
    path = save_vit(tmp_path / "model.onnx", BlockSpec())
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    onnx.save(model, path)
    with pytest.raises(CheckFailed, match=r"input 'x' .* dimension 2 is dynamic") as caught:
        build_engines(path, tmp_path, backend="tensorrt-rtx")
    assert caught.value.code == "engine-dynamic-shape"


@needs_rtx
def test_a_missing_onnx_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        build_engines(tmp_path / "model.onnx", tmp_path, backend="tensorrt-rtx")
    assert caught.value.code == "onnx-file-missing"


@needs_rtx
def test_an_output_folder_that_is_a_file_is_an_error_and_stays(tmp_path: Path) -> None:
    path = save_vit(tmp_path / "model.onnx", BlockSpec())
    taken = tmp_path / "out"
    taken.write_text("mine")
    with pytest.raises(InputError) as caught:
        build_engines(path, taken, backend="tensorrt-rtx")
    assert caught.value.code == "engine-not-writable"
    assert taken.read_text() == "mine"


LIMITED = """
import resource, sys
from pathlib import Path
from gpusq_compile.engine import build_engines
from gpusq_compile.errors import InputError
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
try:
    build_engines(Path("model.onnx"), Path("."), backend="tensorrt-rtx")
except InputError as error:
    print(error)
"""


@needs_rtx
def test_a_write_that_stops_midway_leaves_no_file(tmp_path: Path) -> None:
    save_vit(tmp_path / "model.onnx", BlockSpec())
    done = subprocess.run(
        [sys.executable, "-c", LIMITED],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("error[engine-not-writable]: cannot write engine/model.plan")
    assert list((tmp_path / "engine").iterdir()) == []


INTERRUPTED = """
import sys
from pathlib import Path
from gpusq_compile.engine import build_engines
build_engines(
    Path("model.onnx"),
    Path("."),
    backend="tensorrt-rtx",
    progress=lambda target, phase, fraction: print(phase, flush=True),
)
"""


@needs_rtx
@pytest.mark.parametrize("ending", ["SIGINT", "SIGINT to the group", "SIGKILL"])
def test_an_interrupted_build_leaves_no_file_and_no_process(tmp_path: Path, ending: str) -> None:
    save_vit(tmp_path / "model.onnx", DEIT)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    parent = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert parent.stdout is not None
    # The last phase that reports before the builder works silently for most of its time.
    while "refit" not in parent.stdout.readline():
        assert parent.poll() is None
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) == 1
    assert (tmp_path / "engine").exists()
    if ending == "SIGINT to the group":
        os.killpg(parent.pid, signal.SIGINT)
    else:
        os.kill(parent.pid, getattr(signal, ending.split()[0]))
    _, stderr = parent.communicate(timeout=30)
    assert parent.returncode == (-signal.SIGKILL if ending == "SIGKILL" else -signal.SIGINT)
    if ending != "SIGKILL":
        assert "KeyboardInterrupt" in stderr
    psutil.wait_procs(children, timeout=30)
    assert [c for c in children if c.is_running()] == []
    assert list((tmp_path / "engine").iterdir()) == []
    assert list(scratch.iterdir()) == []


@needs_rtx
def test_a_builder_that_is_killed_is_reported_and_leaves_no_file(tmp_path: Path) -> None:
    path = save_vit(tmp_path / "model.onnx", BlockSpec())

    killed: list[int] = []

    def kill_the_builder(target: str, phase: str, fraction: float) -> None:
        if not killed:
            for child in psutil.Process().children():
                if "worker.py" in " ".join(child.cmdline()):
                    killed.append(child.pid)
                    child.kill()

    with pytest.raises(CheckFailed, match="SIGKILL") as caught:
        build_engines(path, tmp_path, backend="tensorrt-rtx", progress=kill_the_builder)
    assert caught.value.code == "engine-build-failed"
    assert "memory" in str(caught.value)
    assert list((tmp_path / "engine").iterdir()) == []


def no_interpreter(folder: Path) -> str:
    return str(folder / "nothing")


def one_that_ends(folder: Path) -> str:
    """A process that reads nothing and says why it ends."""
    script = folder / "python"
    script.write_text("#!/bin/sh\nexec <&-\necho no such library >&2\nexit 127\n")
    script.chmod(0o755)
    return str(script)


@needs_rtx
@pytest.mark.parametrize(
    ("python", "said"), [(no_interpreter, "cannot be started"), (one_that_ends, "no such library")]
)
def test_a_builder_that_does_not_start_is_no_fault_of_the_folder(
    python: Callable[[Path], str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_vit(tmp_path / "model.onnx", BlockSpec())
    choose_backend("tensorrt-rtx", ["portable"])  # It asks a process of this interpreter.
    monkeypatch.setattr(sys, "executable", python(tmp_path))
    with pytest.raises(CheckFailed, match=said) as caught:
        build_engines(path, tmp_path, backend="tensorrt-rtx")
    assert caught.value.code == "engine-build-failed"
    assert list((tmp_path / "engine").iterdir()) == []


@pytest.mark.parametrize(
    ("node", "layer"),
    [
        ("blocks.0.mlp.fc1", "blocks.0.mlp.fc1"),
        ("blocks.0.mlp.fc1.bias_add", "blocks.0.mlp.fc1"),
        ("blocks.0.mlp.fc2.input.quantize", "blocks.0.mlp.fc2"),
        ("blocks.0.attn.qkv.weight_dequantize", "blocks.0.attn.qkv"),
        ("no such node", None),
    ],
)
def test_a_node_belongs_to_the_nearest_marked_layer(
    tmp_path: Path, node: str, layer: str | None
) -> None:
    path = save_vit(tmp_path / "model.onnx", BlockSpec())
    assert layer_of_node(path, node, marked(BlockSpec())) == layer
