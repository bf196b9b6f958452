"""Engines: build them, read what became of each layer, or write the script that builds them."""

from .backend import build_engines
from .backends import BACKENDS, PORTABLE
from .builder_log import find_gemms, parse_builder_log
from .report import BatchRange, BuiltEngine, EngineReport, GemmInEngine, MarkedGemm
from .script import build_script

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
