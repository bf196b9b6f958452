"""Add to a report what builds on another machine say: the logs that `build_engine.sh` left.

The report itself stays as the run wrote it: it is what manifest.json has the digest of, and a log
may be replaced at any time. What is added lives in the copy that is shown.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpusq_compile.engine.attention import find_attentions
from gpusq_compile.engine.builder_log import find_gemms
from gpusq_compile.engine.trtexec_log import ElsewhereBuild, read_build
from gpusq_compile.errors import InputError, relative_to_cwd
from gpusq_compile.report.sparse_chain import attentions_of, gemms_of, sparse_chain


def read_logs(
    report: dict[str, Any], found: Sequence[Path], given: Sequence[Path]
) -> tuple[list[ElsewhereBuild], list[InputError]]:
    """The builds of the logs, those that were `given` first, and what is wrong with those `found`.

    Raises:
        InputError: a log that was given is none of this model.
    """
    layers = [layer["name"] for layer in report["layers"]]
    builds = [read_build(path, layers) for path in given]
    known = {path.resolve() for path in given}
    faults = []
    for path in found:
        if path.resolve() in known:
            continue
        try:
            builds.append(read_build(path, layers))
        except InputError as error:
            faults.append(error)
    return builds, faults


def with_logs(report: dict[str, Any], builds: Sequence[ElsewhereBuild]) -> dict[str, Any]:
    """A copy of the report with an entry per build in `engine_logs`, the quantized attentions' too.

    Each layer's `sparse_kernel` is that of the first build with sparse kernels, or of the first.
    """
    if not builds:
        return report
    report = copy.deepcopy(report)
    report["engine_logs"] = entries = [_entry(report, build) for build in builds]
    shown = next((entry for entry in entries if entry["sparse"] is not False), entries[0])
    for layer in report["layers"]:
        layer["sparse_kernel"] = shown["layers"].get(layer["name"])
    return report


def _entry(report: dict[str, Any], build: ElsewhereBuild) -> dict[str, Any]:
    asked = report.get("target", {})
    precision = asked.get("precision", "fp16")
    targets = [build.target] if build.target else asked.get("compute", [])
    gemms = find_gemms(build.log, gemms_of(report["layers"], precision))
    attentions = find_attentions(build.log, attentions_of(report.get("attentions", [])))
    by_name = {gemm.name: gemm for gemm in gemms}
    chains = {
        layer["name"]: sparse_chain(
            layer,
            by_name.get(layer["name"]),
            precision=precision,
            targets=targets,
            sparse_flag=build.sparse_flag,
        )
        for layer in report["layers"]
    }
    return {
        "file": relative_to_cwd(build.path),
        "version": build.version,
        "target": build.target,
        "sparse": build.sparse_flag,
        "median_ms": build.median_ms,
        "gemms": len(gemms),
        "planned_type": sum(gemm.status == "passed" for gemm in gemms),
        "unknown_type": sum(gemm.status == "unknown" for gemm in gemms),
        "missed": [
            {"layer": gemm.name, "type": gemm.actual, "reason": gemm.reason}
            for gemm in gemms
            if gemm.status == "missed"
        ],
        "eligible": build.log.eligible.count if build.log.eligible else None,
        "picked": build.log.picked.count if build.log.picked else None,
        "layers": chains,
        "attentions": [asdict(attention) for attention in attentions],
    }
