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
echo "[V] [TRT] (Sparsity) Found 3 layer(s) eligible to use sparse tactics"
echo "[I] Throughput: 1234.5 qps"
echo "[I] GPU Compute Time: min = 0.5 ms, max = 0.6 ms, mean = 0.55 ms"
exit @EXIT@
"""

HELPS = {
    "8601": "--int8 --fp16 Enable precisions",
    "101300": "--fp16 --int8 --stronglyTyped Create a strongly typed network.",
    "110000": "--stronglyTyped Always on.",
    "110400": "--sparsity=spec Control sparsity.",
}


def run(
    folder: Path, text: str, *, version: str = "101300", code: int = 0, trtexec: bool = True
) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """Run the script in a PATH that holds the fake trtexec; its result and the calls made."""
    tools = folder / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "mkdir", "mv", "rm", "sed", "grep", "tail", "env"):
        found = shutil.which(tool)
        assert found is not None
        (tools / tool).symlink_to(found)
    if trtexec:
        fake = FAKE_TRTEXEC.replace("@VERSION@", version).replace("@HELP@", HELPS[version])
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
        "--sparsity=enable",
        "--builderOptimizationLevel=4",
        "--profilingVerbosity=detailed",
        "--exportLayerInfo=engine/model.trt.layers.json",
        "--saveEngine=engine/.model.trt.plan.partial",
        "--minShapes=x:1x3x224x224",
        "--optShapes=x:8x3x224x224",
        "--maxShapes=x:32x3x224x224",
        "--noDataTransfers",
        "--useCudaGraph",
        "--useSpinWait",
        "--verbose",
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
    assert done.stdout.count("(Sparsity) Found 3") == 2


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
        assert "@" not in text.replace('${typing[@]+"${typing[@]}"}', "")
        script.write_text(text)
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_a_dynamic_dimension_beside_the_batch_is_refused() -> None:
    with pytest.raises(InputError, match="'x': dimension 2 is dynamic"):
        build_script((), BatchRange(), {"x": (None, 3, None, 224)})
