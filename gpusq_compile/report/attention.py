"""What became of the attentions, in sentences."""

from __future__ import annotations

from collections import Counter
from typing import Any


def attention_lines(report: dict[str, Any]) -> list[str]:
    """How many attentions are quantized, how many each engine fuses, and why the others are not.

    Nothing where the rules ask nothing of any. A report of a dry run tells what is planned.
    """
    attentions = report.get("attentions", [])
    asked = [a for a in attentions if any(a["requested"].values()) or a["reasons"]]
    if not asked:
        return []
    done = [a for a in attentions if a["applied"]["activation"]]
    planned = [a for a in asked if a["requested"]["activation"] and not a["reasons"]]
    lines = [f"attention: {len(done or planned)} of {len(attentions)} in INT8"]
    engines = (report["engine"] or {"targets": {}})["targets"]
    for target, built in engines.items():
        found = built.get("attentions", [])
        fused = sum(attention["status"] == "passed" for attention in found)
        lines.append(f"  {target}: {fused} of {len(found)} fused in one INT8 kernel each")
        lines += [
            f"  missed in {target}: {attention['name']} is {attention['actual']}: "
            f"{attention['reason']}"
            for attention in found
            if attention["status"] == "missed"
        ]
    reasons = Counter(reason for attention in asked for reason in attention["reasons"])
    return lines + [f"  refused on {count}: {text}" for text, count in reasons.most_common()]
