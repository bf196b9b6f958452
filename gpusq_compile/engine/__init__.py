"""Engines: build them, read what became of each layer, or write the script that builds them."""

from gpusq_compile.engine.backend import build_engines
from gpusq_compile.engine.backends import BACKENDS, PORTABLE
from gpusq_compile.engine.builder_log import find_gemms, parse_builder_log
from gpusq_compile.engine.report import (
    BatchRange,
    BuiltEngine,
    EngineReport,
    GemmInEngine,
    MarkedGemm,
)
from gpusq_compile.engine.script import build_script

__all__ = [
    "BACKENDS",
    "PORTABLE",
    "BatchRange",
    "BuiltEngine",
    "EngineReport",
    "GemmInEngine",
    "MarkedGemm",
    "build_engines",
    "build_script",
    "find_gemms",
    "parse_builder_log",
]
