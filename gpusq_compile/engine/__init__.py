"""Engines: build them, read what became of each layer, or write the script that builds them."""

from gpusq_compile.engine.attention import find_attentions
from gpusq_compile.engine.backend import build_engines
from gpusq_compile.engine.backends import BACKENDS, PORTABLE
from gpusq_compile.engine.builder_log import find_gemms, parse_builder_log
from gpusq_compile.engine.report import (
    AttentionInEngine,
    BatchRange,
    BuiltEngine,
    EngineReport,
    GemmInEngine,
    MarkedAttention,
    MarkedGemm,
)
from gpusq_compile.engine.script import build_script

__all__ = [
    "BACKENDS",
    "PORTABLE",
    "AttentionInEngine",
    "BatchRange",
    "BuiltEngine",
    "EngineReport",
    "GemmInEngine",
    "MarkedAttention",
    "MarkedGemm",
    "build_engines",
    "build_script",
    "find_attentions",
    "find_gemms",
    "parse_builder_log",
]
