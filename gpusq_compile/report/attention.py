"""What became of the attentions, in sentences."""

from __future__ import annotations

from collections import Counter
from typing import Any


def attention_lines(report: dict[str, Any]) -> list[str]:
    """How many attentions are quantized, how many each engine fuses, and why the others are not;
    the engines of logs from elsewhere too.

    Nothing where the rules ask nothing of any.
    """
    attentions = report.get("attentions", [])
    asked = [a for a in attentions if any(a["requested"].values()) or a["reasons"]]
    if not asked:
        return []
    planned = sum(attention["planned"] for attention in attentions)
    lines = [f"attention: {planned} of {len(attentions)} in INT8"]
    engines = [*(report["engine"] or {"targets": {}})["targets"].items()]
    engines += [(log["file"], log) for log in report.get("engine_logs", [])]
    for target, built in engines:
        found = built.get("attentions", [])
        fused = sum(attention["status"] == "passed" for attention in found)
        unknown = sum(attention["status"] == "unknown" for attention in found)
        lines.append(
            f"  {target}: {fused} of {len(found)} fused in one INT8 kernel each"
            + (f", {unknown} unknown" if unknown else "")
        )
        lines += [
            f"  missed in {target}: {attention['name']} is {attention['actual']}: "
            f"{attention['reason']}"
            for attention in found
            if attention["status"] == "missed"
        ]
    reasons = Counter(reason for attention in asked for reason in attention["reasons"])
    return lines + [f"  refused on {count}: {text}" for text, count in reasons.most_common()]
