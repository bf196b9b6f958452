"""`build_engine.sh` calls trtexec with the options that each of its versions needs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from gpusq_compile.engine import BatchRange, build_script
from gpusq_compile.errors import InputError

SHAPE = {"x": (None, 3, 224, 224)}

# Stands in for NVIDIA's trtexec, which cannot be installed everywhere: answers --help as the
# versions do, writes down its arguments, makes the engine file and prints what is looked for.
FAKE_TRTEXEC = r"""#!/usr/bin/env bash
if [ "$1" = --help ]; then
  echo "&&&& RUNNING TensorRT.trtexec [TensorRT v@VERSION@] # trtexec --help"
  echo "@HELP@"
  exit 0
fi
for argument in "$@"; do printf '%s\n' "$argument"; done >>"$CALLS"
echo -- >>"$CALLS"
for argument in "$@"; do
  case "$argument" in --saveEngine=*) echo plan >"${argument#--saveEngine=}" ;; esac
done
median=1.5
case "$*" in *--sparsity=enable*) median=1.2
  case @VERSION@ in
    8*)
      echo "[I] [TRT] (Sparsity) Layers eligible for sparse math: fc1, fc2"
      echo "[I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers: fc1" ;;
    *)
      echo "[V] [TRT] (Sparsity) Found 9 layer(s) eligible to use sparse tactics"
      echo "[V] [TRT] (Sparsity) Found 3 layer(s) eligible to use sparse tactics"
      echo "[V] [TRT] (Sparsity) Chose 1 layer(s) using sparse tactics" ;;
  esac
  echo "Name: fc1_myl0_3, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [8,64] }], Outputs: \
[ { Name: y, Dimensions: [8,64] }], TacticName: sm80_xmma_sparse_gemm_i8i8_i8i32_f32, StreamId: 0"
  echo "Name: fc2, LayerType: gemm, Inputs: [], Outputs: [], TacticName: sm80_xmma_gemm_i8i8, X: 0"
esac
echo "[I] Throughput: 1234.5 qps"
echo "[I] GPU Compute Time: min = 0.5 ms, max = 0.6 ms, mean = 0.55 ms, median = $median ms, \
percentile(99%) = 0.6 ms"
echo "[I] Total GPU Compute Time: 3.1 s"
exit @EXIT@
"""

RUNS = (
    "--builderOptimizationLevel --profilingVerbosity --noDataTransfers --useCudaGraph "
    "--useSpinWait --verbose --sparsity"
)
HELPS = {
    "8601": f"--int8 --fp16 Enable precisions {RUNS}",
    "101300": f"--fp16 --int8 --stronglyTyped Create a strongly typed network. {RUNS}",
    "110000": f"--stronglyTyped Always on. {RUNS}",
    "110400": f"--sparsity=spec Control sparsity. {RUNS}",
}


def run(
    folder: Path,
    text: str,
    *,
    version: str = "101300",
    code: int = 0,
    trtexec: bool = True,
    said: str | None = None,
) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """Run the script in a PATH that holds the fake trtexec; its result and the calls made."""
    tools = folder / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "mkdir", "mv", "rm", "sed", "grep", "tail", "env", "awk"):
        found = shutil.which(tool)
        assert found is not None
        (tools / tool).symlink_to(found)
    if trtexec:
        fake = FAKE_TRTEXEC.replace("@VERSION@", version).replace("@HELP@", said or HELPS[version])
        (tools / "trtexec").write_text(fake.replace("@EXIT@", str(code)))
        (tools / "trtexec").chmod(0o755)
    out = folder / "out put"
    out.mkdir()
    (out / "model.onnx").write_bytes(b"onnx")
    script = out / "build_engine.sh"
    script.write_text(text)
    calls = folder / "calls"
    done = subprocess.run(
        [str(tools / "bash"), str(script)],
        cwd=folder,
        env={"PATH": str(tools), "CALLS": str(calls), "HOME": os.environ.get("HOME", "/")},
        capture_output=True,
        text=True,
        check=False,
    )
    if not calls.exists():
        return done, []
    blocks = calls.read_text().split("--\n")
    return done, [block.splitlines() for block in blocks if block]


def test_ten_x_builds_the_sparse_and_the_dense_engine_and_times_both(tmp_path: Path) -> None:
    text = build_script(("portable",), BatchRange(1, 8, 32), SHAPE)
    done, calls = run(tmp_path, text)
    assert done.returncode == 0, done.stderr
    expected = [
        "--onnx=model.onnx",
        "--stronglyTyped",
        "--builderOptimizationLevel=4",
        "--profilingVerbosity=detailed",
        "--noDataTransfers",
        "--useCudaGraph",
        "--useSpinWait",
        "--verbose",
        "--sparsity=enable",
        "--exportLayerInfo=engine/model.trt.layers.json",
        "--saveEngine=engine/.model.trt.plan.partial",
        "--minShapes=x:1x3x224x224",
        "--optShapes=x:8x3x224x224",
        "--maxShapes=x:32x3x224x224",
    ]
    dense = [
        line.replace("model.trt", "model.trt.dense").replace("=enable", "=disable")
        for line in expected
    ]
    assert calls == [expected, dense]
    engines = sorted(p.name for p in (tmp_path / "out put" / "engine").iterdir())
    assert engines == [
        "model.trt.dense.log",
        "model.trt.dense.plan",
        "model.trt.log",
        "model.trt.plan",
    ]
    assert done.stdout.count("GPU Compute Time: min = 0.5 ms") == 2
    assert done.stdout.count("(Sparsity) Found 3") == 1


@pytest.mark.parametrize("version", HELPS)
def test_it_ends_with_the_ratio_and_the_sparse_layers(tmp_path: Path, version: str) -> None:
    done, _ = run(tmp_path, build_script((), BatchRange(1, 4, 8), SHAPE), version=version)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    said = lines[lines.index("sparse kernels:") :]
    if version == "8601":
        assert said[1].endswith("eligible for sparse math: fc1, fc2")
        assert said[2].endswith("picked sparse implementation for layers: fc1")
    else:
        # Said for every selection of tactics; the last one holds.
        assert said[1].endswith("Found 3 layer(s) eligible to use sparse tactics")
        assert said[2].endswith("Chose 1 layer(s) using sparse tactics")
    assert said[3] == "  fc1_myl0_3"
    assert "gpusq-report" in said[4]
    assert said[5] == (
        "median GPU time at batch 4: sparse 1.2 ms, dense 1.5 ms, sparse/dense 0.800 "
        "(1.25x as fast)"
    )
    assert len(said) == 6


def test_an_option_that_this_trtexec_lacks_is_left_out_and_said(tmp_path: Path) -> None:
    fewer = HELPS["8601"].replace("--builderOptimizationLevel ", "")
    text = build_script((), BatchRange(), SHAPE)
    done, calls = run(tmp_path, text, version="8601", said=fewer)
    assert done.returncode == 0, done.stderr
    assert not any("builderOptimizationLevel" in line for line in calls[0])
    assert "--useSpinWait" in calls[0]
    assert "warning: this trtexec has no --builderOptimizationLevel" in done.stderr


def test_a_failing_old_trtexec_is_said_to_be_too_old(tmp_path: Path) -> None:
    text = build_script((), BatchRange(), SHAPE)
    done, _ = run(tmp_path, text, version="8601", code=1)
    assert done.returncode == 1
    assert (
        "TensorRT 8.6 has no FP16 scales and no opset 21: use TensorRT 10 or later" in done.stderr
    )


@pytest.mark.parametrize(
    ("version", "typing"),
    [
        ("8601", ["--fp16", "--int8"]),
        ("101300", ["--stronglyTyped"]),
        ("110000", []),
        ("110400", []),
    ],
)
def test_the_typing_option_follows_the_version(
    tmp_path: Path, version: str, typing: list[str]
) -> None:
    done, calls = run(tmp_path, build_script((), BatchRange(), SHAPE), version=version)
    assert done.returncode == 0, done.stderr
    known = ("--fp16", "--int8", "--stronglyTyped")
    assert [line for line in calls[0] if line in known] == typing
    assert ("predates TensorRT 10" in done.stderr) == (version == "8601")


def test_without_trtexec_it_says_how_to_get_it(tmp_path: Path) -> None:
    if any(Path(p).exists() for p in ("/usr/src/tensorrt/bin/trtexec", "/opt/tensorrt/bin")):
        pytest.skip("this machine has trtexec where the script looks for it")
    done, calls = run(tmp_path, build_script((), BatchRange(), SHAPE), trtexec=False)
    assert (done.returncode, calls) == (2, [])
    assert "trtexec was not found" in done.stderr
    assert "https://developer.nvidia.com/tensorrt" in done.stderr


def test_a_failing_trtexec_ends_it_with_the_log_and_leaves_no_engine(tmp_path: Path) -> None:
    done, calls = run(tmp_path, build_script((), BatchRange(), SHAPE), code=1)
    assert (done.returncode, len(calls)) == (1, 1)
    assert "trtexec failed" in done.stderr
    assert "Throughput: 1234.5 qps" in done.stderr
    assert [p.name for p in (tmp_path / "out put" / "engine").iterdir()] == ["model.trt.log"]


def test_a_dense_model_builds_one_engine_and_a_static_one_takes_no_shapes(tmp_path: Path) -> None:
    text = build_script((), BatchRange(), {"x": (2, 3, 8, 8)}, sparse=False)
    done, calls = run(tmp_path, text)
    assert done.returncode == 0, done.stderr
    assert len(calls) == 1
    assert "--sparsity=disable" in calls[0]
    assert [line for line in calls[0] if "Shapes" in line] == []


def test_several_inputs_share_the_batch(tmp_path: Path) -> None:
    inputs = {"image": (None, 3, 8, 8), "mask": (None, 8), "fixed": (4,)}
    _, calls = run(tmp_path, build_script((), BatchRange(2, 4, 6), inputs))
    assert "--optShapes=image:4x3x8x8,mask:4x8" in calls[0]


@pytest.mark.parametrize(
    ("said", "status", "warning"),
    [
        (r"8.9\n9.9\n", 0, ""),
        (r"9.0\n8.9\n", 0, "compiled for sm80 sm89, but this GPU is sm90"),
        ("it has failed", 9, "but this GPU is unknown"),
    ],
)
def test_a_gpu_that_is_no_target_is_warned_about(
    tmp_path: Path, said: str, status: int, warning: str
) -> None:
    text = build_script(("sm80", "sm89"), BatchRange(), SHAPE)
    smi = f"#!/bin/sh\nprintf '{said}'\nexit {status}\n"
    (tmp_path / "smi").write_text(smi)
    (tmp_path / "smi").chmod(0o755)
    text = text.replace("nvidia-smi", str(tmp_path / "smi"))
    done, calls = run(tmp_path, text)
    assert (done.returncode, len(calls)) == (0, 2)
    assert warning in done.stderr
    assert ("warning" in done.stderr) == bool(warning)


def test_names_that_a_shell_would_read_are_quoted(tmp_path: Path) -> None:
    text = build_script((), BatchRange(), {"x $(touch pwned)": (None, 4)})
    done, calls = run(tmp_path, text)
    assert done.returncode == 0, done.stderr
    assert "--minShapes=x $(touch pwned):1x4" in calls[0]
    assert not (tmp_path / "out put" / "pwned").exists()


def test_bash_accepts_it(tmp_path: Path) -> None:
    script = tmp_path / "build_engine.sh"
    for text in (
        build_script(("sm89",), BatchRange(), SHAPE),
        build_script((), BatchRange(), {}, sparse=False, half=False),
    ):
        for array in ("typing", "options"):
            text = text.replace(f'${{{array}[@]+"${{{array}[@]}}"}}', "$known")
        assert "@" not in text
        script.write_text(text)
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_shellcheck_finds_nothing(tmp_path: Path) -> None:
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    script = tmp_path / "build_engine.sh"
    for text in (
        build_script(("sm89",), BatchRange(), SHAPE),
        build_script((), BatchRange(), {}, sparse=False, half=False),
    ):
        script.write_text(text)
        done = subprocess.run([shellcheck, str(script)], capture_output=True, text=True)
        assert done.stdout == ""


def test_a_dynamic_dimension_beside_the_batch_is_refused() -> None:
    with pytest.raises(InputError, match="'x': dimension 2 is dynamic"):
        build_script((), BatchRange(), {"x": (None, 3, None, 224)})
