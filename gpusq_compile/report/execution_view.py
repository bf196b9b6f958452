"""What TensorRT will do with the layers, in sentences."""

from __future__ import annotations

from collections import Counter
from typing import Any

LEFT = "left as it is"
IN_VAIN = "accuracy and storage only: "
"""How `execution.why` ends of a layer that no rule changed, and begins where a mask is not used."""


def execution_lines(report: dict[str, Any]) -> list[str]:
    """How many layers run as what, and why a mask makes nothing faster.

    What the rules could not apply is said with the refusals.
    """
    found = [layer["execution"] for layer in report["layers"] if "execution" in layer]
    if not found:
        return []
    kinds = Counter((entry["kind"], entry["why"].endswith(LEFT)) for entry in found)
    counts = [
        f"{count} {kind}{f' ({LEFT})' if left else ''}"
        for (kind, left), count in kinds.most_common()
    ]
    noun = "layer" if kinds.most_common(1)[0][1] == 1 else "layers"
    counts[0] = counts[0].replace(" ", f" {noun} ", 1)
    reasons = Counter(
        (entry["kind"], entry["why"]) for entry in found if entry["why"].startswith(IN_VAIN)
    )
    lines = [f"  {count} {kind}: {why}" for (kind, why), count in reasons.most_common()]
    return [f"runs as: {', '.join(counts)}", *lines]
