"""Whether a TensorRT-RTX engine runs on this machine's GPU at all.

`try_engine` builds a small one for any GPU and one for this GPU alone, and runs this file on each:

    python benchmarks/rtx_engine.py ENGINE     # load it, run it once, compare the result
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

SIZE = 256
BATCH = 8
TIMEOUT = 300


def try_engine(capability: str) -> dict[str, Any]:
    """By target ("portable" and `capability`, such as "sm89"): `runs`, and the `reason` if not."""
    from gpusq_compile.errors import GpusqError

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for target in ("portable", capability):
            try:
                engine = build(Path(folder), target)
                # The runtime may abort: a process of its own.
                done = subprocess.run(
                    [sys.executable, __file__, str(engine)],
                    capture_output=True,
                    text=True,
                    timeout=TIMEOUT,
                    check=False,
                )
            except (GpusqError, subprocess.TimeoutExpired) as problem:
                found[target] = {"runs": False, "reason": str(problem)}
                continue
            said = "\n".join(done.stderr.strip().splitlines()[-3:])
            runs = done.returncode == 0
            found[target] = {"runs": runs, "reason": None if runs else said or done.returncode}
    return found


def build(folder: Path, target: str) -> Path:
    """An engine that multiplies [batch, SIZE] by ones."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from gpusq_compile.engine import build_engines

    ones = numpy_helper.from_array(torch.ones(SIZE, SIZE).numpy(), "w")
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", SIZE]) for name in "xy"
    ]
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "small", ends[:1], ends[1:], [ones])
    opset = helper.make_opsetid("", 21)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), folder / "small.onnx")
    report = build_engines(folder / "small.onnx", folder, backend="tensorrt-rtx", targets=(target,))
    return folder / report.targets[target].file


def run(path: Path) -> str | None:
    """Load an engine and run it once; what went wrong."""
    import tensorrt_rtx as trt

    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        return "the engine cannot be loaded"
    context = engine.create_execution_context()
    if context is None:
        return "the engine has no execution context"
    x, y = torch.ones(BATCH, SIZE, device="cuda"), torch.zeros(BATCH, SIZE, device="cuda")
    context.set_input_shape("x", tuple(x.shape))
    for name, tensor in (("x", x), ("y", y)):
        context.set_tensor_address(name, tensor.data_ptr())
    stream = torch.cuda.Stream()
    # The inputs were written on another stream.
    torch.cuda.synchronize()
    if not context.execute_async_v3(stream.cuda_stream):
        return "the inference failed"
    stream.synchronize()
    return None if bool((y == SIZE).all()) else "the inference gave a wrong result"


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])))
