"""Device time of the GEMMs of vision transformers: dense and 2:4, FP16 and INT8.

    make bench-gpu-gemm                                  # on a machine with an NVIDIA GPU
    python benchmarks/gpu_gemm.py --weights out/model    # with the weights of a compiled model
    python benchmarks/gpu_gemm.py --dry-run              # anywhere: the plan, and the references

For each linear of DeiT-B, Swin-B (by stage) and ViT-L, at each batch size, what PyTorch offers is
measured on equal operands:

- `fp16`: cuBLAS, dense. `int8`: `torch._int_mm` (cuBLASLt), dense, INT32 out.
- `fp16-2:4`, `int8-2:4`: cuSPARSELt (`torch._cslt_compress`, `_cslt_sparse_mm`), its fastest
  algorithm searched first; FP16 and INT32 out. `int8-2:4-fp16`: the same with FP16 out.

Weights are 2:4 and rounded to INT8 per output channel as this compiler does it; of --weights DIR
those that fit a shape are taken in their place. Every kernel's result is compared with a reference
before it is timed. A CUDA graph of 20 launches is timed by CUDA events, 30 times, and the median is
kept: what small operands find in the L2 cache, they find there in a network too. Rows are batch x
tokens, rounded up to 16 for all kernels, since the INT8 ones take no others.

`limit` is the least time that the GPU's memory bandwidth and arithmetic allow, from its data sheet;
it is unknown for GPUs that are not in PEAKS. At the end a TensorRT-RTX engine is built, loaded and
run once, to know whether they run on this GPU at all.

Writes `results/gpu_gemm.json` (-o for another folder). Exit code 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from compile_time import RESULTS, versions
from gpusq_compile.errors import InputError
from gpusq_compile.packed_model import load_packed
from gpusq_compile.sparsity import PATTERNS, magnitude_mask, violations
from rtx_engine import try_engine

BATCHES = (1, 8, 64, 256)
ROW_MULTIPLE = 16
LAUNCHES, SAMPLES = 20, 30
KERNELS = ("fp16", "int8", "fp16-2:4", "int8-2:4", "int8-2:4-fp16")
OUTPUT_BYTES = {"fp16": 2, "int8": 4, "fp16-2:4": 2, "int8-2:4": 4, "int8-2:4-fp16": 2}

# Part of the device's name -> GB/s, dense FP16 TFLOPS, dense INT8 TOPS (NVIDIA's data sheets;
# 2:4 doubles the last two). The first that fits is taken.
PEAKS = {
    "A100-SXM4-80GB": (2039, 312, 624),
    "A100 80GB PCIe": (1935, 312, 624),
    "A100": (1555, 312, 624),
    "A30": (933, 165, 330),
    "A10": (600, 125, 250),
    "L40S": (864, 362, 733),
    "L4": (300, 121, 242),
    "H100 PCIe": (2039, 756, 1513),
    "H100 NVL": (3938, 835, 1671),
    "H100": (3352, 989, 1979),
    "H200": (4800, 989, 1979),
}


@dataclass(frozen=True)
class Gemm:
    """One linear: `tokens` rows a sample, k input and n output channels."""

    model: str
    layer: str
    tokens: int
    k: int
    n: int

    def rows(self, batch: int) -> int:
        return -(-batch * self.tokens // ROW_MULTIPLE) * ROW_MULTIPLE

    def macs(self, batch: int) -> int:
        return self.rows(batch) * self.k * self.n


def block(model: str, dim: int, tokens: int, stage: str = "") -> list[Gemm]:
    """The four linears of a transformer block with an MLP of four times its width."""
    sizes = {
        "qkv": (dim, 3 * dim),
        "proj": (dim, dim),
        "fc1": (dim, 4 * dim),
        "fc2": (4 * dim, dim),
    }
    return [Gemm(model, stage + name, tokens, k, n) for name, (k, n) in sizes.items()]


GEMMS = [
    *block("DeiT-B", 768, 197),
    *(g for i in range(4) for g in block("Swin-B", 128 << i, (56 >> i) ** 2, f"stage{i + 1}.")),
    *block("ViT-L", 1024, 197),
]


def traffic(gemm: Gemm, batch: int, kernel: str) -> int:
    """Bytes that a kernel reads and writes at least; 2:4 keeps half, and 2 bits of place each."""
    element = 2 if kernel.startswith("fp16") else 1
    weights = gemm.k * gemm.n
    stored = weights * element
    if "2:4" in kernel:
        stored = weights // 2 * element + weights // 2 * 2 // 8
    rows = gemm.rows(batch)
    return rows * gemm.k * element + stored + rows * gemm.n * OUTPUT_BYTES[kernel]


def peaks_of(device: str) -> tuple[float, float, float] | None:
    found = (peaks for name, peaks in PEAKS.items() if re.search(rf"\b{name}\b", device))
    return next(found, None)


def limit_seconds(gemm: Gemm, batch: int, kernel: str, device: str) -> float | None:
    """The least time that the device's peaks allow, None for an unknown device."""
    peaks = peaks_of(device)
    if peaks is None:
        return None
    bandwidth, fp16, int8 = peaks
    rate = (fp16 if kernel.startswith("fp16") else int8) * (2 if "2:4" in kernel else 1)
    arithmetic = 2 * gemm.macs(batch) / (rate * 1e12)
    return max(traffic(gemm, batch, kernel) / (bandwidth * 1e9), arithmetic)


def generated_weight(k: int, n: int) -> Tensor:
    """A 2:4 weight, int8 [n, k], pruned and rounded as the compiler does it."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(k * 1009 + n))
    weight *= magnitude_mask(weight, PATTERNS["2:4"])
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / scale).round().clamp(-127, 127).to(torch.int8)


def compiled_weights(folder: Path) -> dict[str, Tensor]:
    """The 2:4 INT8 weights that a compile left in `folder`, int8 [n, k] by layer name."""
    model = load_packed(folder)
    tensors = {layer.name: model.tensors[layer.weight] for layer in model.graph.layers}
    weights = {name: t for name, t in tensors.items() if t.dtype == torch.int8 and t.ndim == 2}
    pattern = PATTERNS["2:4"]
    return {
        name: t for name, t in weights.items() if not t.shape[1] % 4 and not violations(t, pattern)
    }


def weight_for(gemm: Gemm, compiled: dict[str, Tensor]) -> tuple[Tensor, str]:
    """The weight of a shape, int8 [n, k], and where it is from."""
    for name, tensor in compiled.items():
        if tuple(tensor.shape) == (gemm.n, gemm.k):
            return tensor, name
    return generated_weight(gemm.k, gemm.n), "generated"


Launch = Callable[[], Tensor]


def launches(weight: Tensor, rows: Tensor) -> dict[str, Callable[[], Launch]]:
    """How to make each kernel ready; all return [rows, n] of rows [m, k] by weight [n, k].

    The weights are made ready (transposed, compressed) once, as an engine does it when it is built.
    """
    half_weight, half_rows = weight.half(), rows.half()

    def sparse(w: Tensor, x: Tensor, out: torch.dtype) -> Launch:
        compressed = torch._cslt_compress(w)
        options: dict[str, Any] = {"out_dtype": out, "transpose_result": True}
        try:
            algorithm = int(torch._cslt_sparse_mm_search(compressed, x.t(), **options))
        except (AttributeError, RuntimeError):
            algorithm = 0

        def multiply() -> Tensor:
            found: Tensor = torch._cslt_sparse_mm(compressed, x.t(), alg_id=algorithm, **options)
            return found if found.shape[0] == x.shape[0] else found.t()

        return multiply

    return {
        "fp16": lambda: partial(torch.mm, half_rows, half_weight.t()),
        "int8": lambda: partial(torch._int_mm, rows, weight.t()),
        "fp16-2:4": lambda: sparse(half_weight, half_rows, torch.float16),
        "int8-2:4": lambda: sparse(weight, rows, torch.int32),
        "int8-2:4-fp16": lambda: sparse(weight, rows, torch.float16),
    }


def operands(gemm: Gemm, batch: int, weight: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """Weight and rows as small integers, so that no sum leaves the range of FP16."""
    generator = torch.Generator(device=device).manual_seed(0)
    shape = (gemm.rows(batch), gemm.k)
    rows = torch.randint(-4, 5, shape, generator=generator, device=device, dtype=torch.int8)
    return weight.to(device), rows


def check(result: Tensor, weight: Tensor, rows: Tensor, samples: int = 64) -> float:
    """The largest error of the first rows, relative to the largest true value; INT32 has none.

    Raises:
        ArithmeticError: it is larger than rounding explains.
    """
    true = rows[:samples].double() @ weight.double().t()
    error = float((result[:samples].double() - true).abs().max() / true.abs().max())
    if not error <= (0 if result.dtype == torch.int32 else 2e-3):
        raise ArithmeticError(f"wrong result, relative error {error:.2g}")
    return error


def device_seconds(launch: Launch) -> tuple[list[float], bool]:
    """Seconds of one launch, by sample, and whether a CUDA graph was used."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            launch()
        stream.synchronize()
        graph: torch.cuda.CUDAGraph | None = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(LAUNCHES):
                    launch()
        except RuntimeError:
            # Then the time between launches counts too.
            graph = None
            torch.cuda.synchronize()
        taken = []
        for _ in range(SAMPLES + 3):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            if graph is not None:
                graph.replay()
            else:
                for _ in range(LAUNCHES):
                    launch()
            end.record(stream)
            end.synchronize()
            taken.append(start.elapsed_time(end) / 1e3 / LAUNCHES)
    return taken[3:], graph is not None


def measure(gemm: Gemm, batch: int, compiled: dict[str, Tensor], device: str) -> dict[str, Any]:
    """One row of the results: every kernel's median, or why it could not be had."""
    weight, source = weight_for(gemm, compiled)
    row: dict[str, Any] = plan_row(gemm, batch, device) | {"weights": source}
    weight, rows = operands(gemm, batch, weight, "cuda")
    for name, prepare in launches(weight, rows).items():
        entry = row["kernels"][name]
        try:
            launch = prepare()
            entry["error"] = check(launch(), weight, rows)
            taken, entry["cuda_graph"] = device_seconds(launch)
        # PyTorch raises RuntimeError, NotImplementedError or AttributeError, as versions differ.
        except Exception as problem:
            entry["failed"] = f"{type(problem).__name__}: {problem}".split("\n")[0]
            continue
        entry["seconds"] = median(taken)
        entry["spread"] = max(taken) / min(taken)
        if entry["limit_seconds"]:
            entry["of_limit"] = entry["limit_seconds"] / entry["seconds"]
    dense = row["kernels"]["fp16"].get("seconds")
    for entry in row["kernels"].values():
        if dense and "seconds" in entry:
            entry["speedup"] = dense / entry["seconds"]
    return row


def plan_row(gemm: Gemm, batch: int, device: str) -> dict[str, Any]:
    kernels = {
        name: {
            "bytes": traffic(gemm, batch, name),
            "limit_seconds": limit_seconds(gemm, batch, name, device),
        }
        for name in KERNELS
    }
    about = asdict(gemm) | {"batch": batch, "rows": gemm.rows(batch), "macs": gemm.macs(batch)}
    return about | {"kernels": kernels}


def show(row: dict[str, Any]) -> str:
    cells = []
    for name, entry in row["kernels"].items():
        if "seconds" in entry:
            cells.append(f"{name} {entry['seconds'] * 1e6:.1f} us ({entry.get('speedup', 0):.2f}x)")
        else:
            cells.append(f"{name} failed")
    return f"{row['model']} {row['layer']} batch {row['batch']}: {', '.join(cells)}"


def show_plan(rows: Iterable[dict[str, Any]]) -> None:
    print(f"{'layer':<22}{'batch':>6}{'rows':>8}{'K':>6}{'N':>6}{'MMACs':>10}", end="")
    print("".join(f"{name + ' MB':>18}" for name in KERNELS))
    for row in rows:
        layer = f"{row['model']} {row['layer']}"
        print(f"{layer:<22}{row['batch']:>6}{row['rows']:>8}{row['k']:>6}{row['n']:>6}", end="")
        print(f"{row['macs'] / 1e6:>10.0f}", end="")
        print("".join(f"{entry['bytes'] / 1e6:>18.2f}" for entry in row["kernels"].values()))


def check_references(compiled: dict[str, Tensor]) -> None:
    """On the CPU: that masks are 2:4, and that dense products agree with the references."""
    small = Gemm("small", "fc", tokens=20, k=64, n=96)
    for gemm in (small, *(GEMMS[:4] if compiled else ())):
        weight, source = weight_for(gemm, compiled)
        if violations(weight, PATTERNS["2:4"]):
            raise ArithmeticError(f"{source} is not 2:4")
        weight, rows = operands(gemm, 1, weight, "cpu")
        ready = launches(weight, rows)
        for name in ("fp16", "int8"):
            error = check(ready[name]()(), weight, rows)
            print(f"{gemm.model} {gemm.layer}, {source}: {name} relative error {error:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="print the plan, check references")
    parser.add_argument("--weights", type=Path, help="output folder of a compile")
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--model", choices=sorted({gemm.model for gemm in GEMMS}))
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="folder for the results")
    arguments = parser.parse_args()
    if min(arguments.batch) < 1:
        parser.error("--batch: sizes are 1 or more")
    gemms = [gemm for gemm in GEMMS if arguments.model in (None, gemm.model)]
    work = [(gemm, batch) for gemm in gemms for batch in arguments.batch]
    try:
        compiled = compiled_weights(arguments.weights) if arguments.weights else {}
    except InputError as problem:
        print(problem, file=sys.stderr)
        sys.exit(2)
    has_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if has_gpu else "none"
    if arguments.dry_run:
        show_plan(plan_row(gemm, batch, device) for gemm, batch in work)
        check_references(compiled)
        return
    if not has_gpu:
        print("error: no NVIDIA GPU that PyTorch can use; --dry-run works without", file=sys.stderr)
        sys.exit(2)
    major, minor = torch.cuda.get_device_capability()
    results: dict[str, Any] = {
        "schema_version": 1,
        "device": device,
        "capability": f"sm{major}{minor}",
        "peaks": peaks_of(device) or "unknown",
        "versions": versions() | {"cuda": torch.version.cuda},
        "launches": LAUNCHES,
        "samples": SAMPLES,
        "rows": [],
    }
    for gemm, batch in work:
        results["rows"].append(measure(gemm, batch, compiled, device))
        print(show(results["rows"][-1]), file=sys.stderr)
    results["tensorrt_rtx"] = try_engine(results["capability"])
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "gpu_gemm.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
