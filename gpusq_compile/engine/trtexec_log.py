"""Read what trtexec left of a build on another machine: its log and its layer information.

`build_engine.sh` writes `NAME.log` (`trtexec --verbose --profilingVerbosity=detailed`) and
`NAME.layers.json` (`--exportLayerInfo`) beside each engine. Either is enough; the log also says
which layers the builder found eligible for sparse kernels, and how long an inference took.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from gpusq_compile.engine.builder_log import BuilderLog, name_parts, parse_builder_log
from gpusq_compile.engine.layer_info import merged_layers, parse_layer_info
from gpusq_compile.errors import InputError, relative_to_cwd

LAYER_INFO = ".layers.json"
MOST_ERRORS = 3

_RUNNING = re.compile(r"^&&&& RUNNING TensorRT\.trtexec(?: \[TensorRT v(\d+)\])?(.*)$", re.M)
_ENDED = re.compile(r"^\s*&&&& (PASSED|FAILED|WAIVED) TensorRT\.trtexec", re.M)
_SPARSITY_OPTION = re.compile(r"--sparsity=(\w+)")
_SPARSITY_LINE = re.compile(r"\] Sparsity: (\w+)\s*$", re.M)
_CAPABILITY = re.compile(r"\] Compute Capability: (\d+)\.(\d+)\s*$", re.M)
_TIME = re.compile(r"\] GPU Compute Time: min = .*?(?:median|mean) = .*$", re.M)
_MEDIAN = re.compile(r"median = ([\d.]+) ms")
_MEAN = re.compile(r"mean = ([\d.]+) ms")
_ERROR = re.compile(r"^(?:\[[^\]]*\] )?\[E\] (.*)$", re.M)


@dataclass(frozen=True)
class ElsewhereBuild:
    """A build that trtexec did, as far as its files tell.

    `target` is the GPU ("sm86"), `sparse_flag` whether sparse kernels were allowed, `median_ms` the
    GPU time of one inference at the optimal shapes in milliseconds.
    """

    path: Path
    log: BuilderLog
    version: str | None = None
    target: str | None = None
    sparse_flag: bool | None = None
    median_ms: float | None = None


def read_build(path: Path, layers: Collection[str]) -> ElsewhereBuild:
    """Read a log, with the layer information beside it, or a layer information file alone.

    `layers` are the names of the model's weighted layers, some of which a log of that model names.

    Raises:
        InputError: engine-log-unreadable, -empty, -binary, -cut, -failed (the build was), -other
            (it names no layer of the model), layer-info-damaged.
    """
    text = _text(path)
    if path.name.endswith(".json"):
        build = ElsewhereBuild(path, _with_layer_info(parse_builder_log([]), path, text))
    else:
        build = _read_log(path, text)
        info = path.with_name(path.name.removesuffix(".log") + LAYER_INFO)
        if info != path and info.is_file():
            build = replace(build, log=_with_layer_info(build.log, info, _text(info)))
    if layers and not _named(build.log).intersection(layers):
        raise InputError(
            "engine-log-other",
            f"{relative_to_cwd(path)} names none of the model's {len(layers)} layers, such as "
            f"'{next(iter(layers))}'",
            hint="it is of another model, or trtexec ran without --verbose "
            "--profilingVerbosity=detailed; build_engine.sh gives both",
        )
    return build


def _text(path: Path) -> str:
    """The text of a file: UTF-8, or UTF-16 with its mark, which PowerShell's `>` writes."""
    shown = relative_to_cwd(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            "engine-log-unreadable", f"cannot read {shown}: {error.strerror}"
        ) from None
    encoding = "utf-8"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise InputError(
            "engine-log-binary",
            f"{shown} is no text",
            hint="give what trtexec printed (engine/NAME.log), not the engine",
        )
    if not text.strip():
        raise InputError("engine-log-empty", f"{shown} is empty")
    return text


def _read_log(path: Path, text: str) -> ElsewhereBuild:
    shown = relative_to_cwd(path)
    started, ended = _RUNNING.search(text), _ENDED.search(text)
    if (started is None) != (ended is None):
        where = "beginning" if started is None else "end"
        raise InputError(
            "engine-log-cut",
            f"{shown} is cut: its {where} is missing",
            hint="copy the whole file once trtexec is done",
        )
    if ended is not None and ended[1] != "PASSED":
        said = "".join(f"\n  {line}" for line in _ERROR.findall(text)[:MOST_ERRORS])
        raise InputError("engine-log-failed", f"{shown}: trtexec ended with {ended[1]}{said}")
    capability = _CAPABILITY.search(text)
    return ElsewhereBuild(
        path,
        parse_builder_log([text]),
        version=_version(started[1]) if started and started[1] else None,
        target=f"sm{capability[1]}{capability[2]}" if capability else None,
        sparse_flag=_sparse_flag(text, started[2] if started else None),
        median_ms=_median(text),
    )


def _version(digits: str) -> str:
    """8601 -> 8.6.1, 101300 -> 10.13.0: two digits for minor and patch from TensorRT 10 on."""
    number = int(digits)
    major, minor = divmod(number // 100, 100 if number >= 100_000 else 10)
    return f"{major}.{minor}.{number % 100}"


def _sparse_flag(text: str, command: str | None) -> bool | None:
    """What the command line says; without the option trtexec allows no sparse kernels."""
    if line := _SPARSITY_LINE.search(text):
        return line[1].lower() != "disabled"
    if command is None:
        return None
    option = _SPARSITY_OPTION.search(command)
    return option is not None and option[1] != "disable"


def _median(text: str) -> float | None:
    line = _TIME.search(text)
    found = (_MEDIAN.search(line[0]) or _MEAN.search(line[0])) if line else None
    return float(found[1]) if found else None


def _with_layer_info(log: BuilderLog, path: Path, text: str) -> BuilderLog:
    try:
        layers = parse_layer_info(text)
    except ValueError as error:
        raise InputError(
            "layer-info-damaged", f"{relative_to_cwd(path)} is no layer information: {error}"
        ) from None
    return replace(log, layers=merged_layers(log.layers, layers))


def _named(log: BuilderLog) -> set[str]:
    """Every ONNX node and layer that the log names, the parts of fused names too."""
    names = set(log.onnx_ops)
    for layer in log.layers:
        names.update(layer.onnx_nodes, name_parts(layer.name))
    for said in (log.eligible, log.picked):
        for entry in (said.names if said else None) or ():
            names.update(name_parts(entry))
    return names
