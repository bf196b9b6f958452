"""The GPU benchmark's plan and references hold on a machine without a GPU, and it says so there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.command_line import ONE_SHOT, TINY, compile_here

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return __import__("gpu_gemm")


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "gpu_gemm.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_dry_run_prints_the_plan_and_checks_the_references() -> None:
    done = run("--dry-run", "--model", "DeiT-B", "--batch", "1", "8")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 1 + 4 * 2 + 2
    # 197 tokens are 208 rows: 208 x 768 x 2304 MACs; FP16 moves both operands and the result.
    cells = lines[1].split()
    assert cells[:7] == ["DeiT-B", "qkv", "1", "208", "768", "2304", "368"]
    assert cells[7:] == ["4.82", "3.85", "3.27", "3.18", "2.22"]
    assert lines[-1] == "small fc, generated: int8 relative error 0.0e+00"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_ends_with_a_message_and_code_2(tmp_path: Path) -> None:
    done = run("-o", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert "no NVIDIA GPU" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_weights_of_a_compile_are_found_by_shape(
    tmp_path: Path,
    benchmark_module: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert compile_here(monkeypatch, capsys, TINY, *ONE_SHOT, "-o", tmp_path).code == 0
    weights = benchmark_module.compiled_weights(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    sparse = [layer for layer in report["layers"] if layer["applied"]["sparsity"]]
    assert sorted(list(t.shape) for t in weights.values()) == sorted(s["shape"] for s in sparse)
    n, k = sparse[0]["shape"]
    found, source = benchmark_module.weight_for(benchmark_module.Gemm("m", "fc", 20, k, n), weights)
    assert found is weights[source]
    other = benchmark_module.Gemm("m", "fc", 20, 64, 48)
    assert benchmark_module.weight_for(other, weights)[1] == "generated"


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    done = run("--dry-run", "--weights", str(tmp_path))
    assert done.returncode == 2
    assert "weights.safetensors" in done.stderr


def test_the_limit_is_the_slower_of_bandwidth_and_arithmetic(benchmark_module: ModuleType) -> None:
    gemm = benchmark_module.Gemm("m", "fc", 16, 1024, 4096)
    small, large = (
        {
            kernel: benchmark_module.limit_seconds(gemm, batch, kernel, "NVIDIA A100-SXM4-80GB")
            for kernel in benchmark_module.KERNELS
        }
        for batch in (1, 4096)
    )
    moved = 16 * 1024 * 2 + 1024 * 4096 * 2 + 16 * 4096 * 2
    assert small["fp16"] == pytest.approx(moved / 2039e9)
    # Half of the values and two bits for each: 10 bits of 16 are left in INT8, 18 of 32 in FP16.
    assert benchmark_module.traffic(gemm, 1, "int8-2:4") == 16 * 1024 + 1024 * 4096 * 10 // 16 + (
        16 * 4096 * 4
    )
    assert large["fp16"] == pytest.approx(2 * 16 * 4096 * 1024 * 4096 / 312e12)
    assert benchmark_module.limit_seconds(gemm, 1, "fp16", "some GPU") is None


@pytest.mark.parametrize(
    ("device", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", 3352),
        ("NVIDIA H100 PCIe", 2039),
        ("NVIDIA A100-SXM4-40GB", 1555),
        ("NVIDIA L4", 300),
        # Not the chip whose name theirs begins with.
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
    ],
)
def test_a_device_is_known_by_its_whole_name(
    benchmark_module: ModuleType, device: str, bandwidth: float | None
) -> None:
    peaks = benchmark_module.peaks_of(device)
    assert (peaks[0] if peaks else None) == bandwidth


def test_a_wrong_kernel_is_found_before_it_is_timed(benchmark_module: ModuleType) -> None:
    gemm = benchmark_module.Gemm("m", "fc", 32, 64, 96)
    weight = benchmark_module.generated_weight(64, 96)
    weight, rows = benchmark_module.operands(gemm, 1, weight, "cpu")
    result = benchmark_module.launches(weight, rows)["int8"]()()
    assert benchmark_module.check(result, weight, rows) == 0
    result[3, 5] += 1
    with pytest.raises(ArithmeticError, match="wrong result"):
        benchmark_module.check(result, weight, rows)
