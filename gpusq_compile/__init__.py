"""gpusq-compile: a declarative graph-rewriting compiler for vision transformers.

`compile_model` takes a trained model and a rules file to a verified 2:4-sparse, quantized ONNX
graph and a TensorRT engine; the command line `gpusq-compile` is a thin layer over it. `load_packed`
reads the packed weights back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpusq_compile.errors import CheckFailed, GpusqError, InputError, InternalError

if TYPE_CHECKING:
    from gpusq_compile.api import CompileResult, compile_model
    from gpusq_compile.packed_model import PackedModel, load_packed

__version__ = "0.1.0"

__all__ = [
    "CheckFailed",
    "CompileResult",
    "GpusqError",
    "InputError",
    "InternalError",
    "PackedModel",
    "__version__",
    "compile_model",
    "load_packed",
]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: `--help` and errors in the rules should not wait for it.
    if name in ("CompileResult", "compile_model"):
        from gpusq_compile import api

        return getattr(api, name)
    if name in ("PackedModel", "load_packed"):
        from gpusq_compile import packed_model

        return getattr(packed_model, name)
    raise AttributeError(f"module 'gpusq_compile' has no attribute '{name}'")
