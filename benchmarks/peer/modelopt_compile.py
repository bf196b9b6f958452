"""The same compile by NVIDIA Model Optimizer, in its own process and virtual environment.

2:4 by magnitude, INT8 with calibration, ONNX with a dynamic batch, through its documented calls.
Prints one JSON object: seconds per phase and versions.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

seconds: dict[str, float] = {}


@contextmanager
def phase(name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def compile_to(path: Path) -> None:
    with phase("import"):
        import modelopt.torch.quantization as mtq
        import modelopt.torch.sparsity as mts
        from modelopt.torch._deploy.utils import OnnxBytes, get_onnx_bytes_and_metadata

        import timm_model

    with phase("model"):
        model = timm_model.model()
        batches = timm_model.calibration_data()

    def calibrate(model):  # type: ignore[no-untyped-def]
        for images in batches:
            model(images)

    with phase("sparsify"):
        model = mts.sparsify(model, mode="sparse_magnitude")
        model = mts.export(model)
    with phase("quantize"):
        model = mtq.quantize(model, mtq.INT8_DEFAULT_CFG, forward_loop=calibrate)
    with phase("onnx"):
        data, _ = get_onnx_bytes_and_metadata(
            model,
            dummy_input=timm_model.example_inputs(),
            model_name=timm_model.NAME,
            dynamic_axes={"x": {0: "batch"}},
        )
        OnnxBytes.from_bytes(data).write_to_disk(str(path))


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write to")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with redirect_stdout(sys.stderr):
        compile_to(arguments.output)
    packages = ("nvidia-modelopt", "torch", "onnx", "timm")
    print(
        json.dumps({"seconds": seconds, "versions": {name: installed(name) for name in packages}})
    )


if __name__ == "__main__":
    main()
