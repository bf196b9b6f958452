"""The chain requested -> mask verified -> eligible -> picked on the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from gpusq_compile.report.reasons import UNKNOWN, reason_lines

STEPS = ("mask_ok", "eligible", "picked")


def sparse_table(report: dict[str, Any]) -> Table | None:
    """One row per role, of the layers for which sparsity was requested; None if there are none."""
    roles: dict[str, list[dict[str, Any]]] = {}
    for layer in report["layers"]:
        if chain := layer.get("sparse_kernel"):
            roles.setdefault(layer["role"] or UNKNOWN, []).append(chain)
    if not roles:
        return None
    table = Table(title="sparse kernels", title_justify="left")
    table.add_column("role", no_wrap=True)
    for column in ("requested", "mask ok", "eligible", "picked"):
        table.add_column(column, justify="right", no_wrap=True)
    for role, chains in roles.items():
        table.add_row(role, *_counts(chains))
    if len(roles) > 1:
        table.add_section()
        table.add_row("all", *_counts([chain for chains in roles.values() for chain in chains]))
    return table


def _counts(chains: list[dict[str, Any]]) -> list[str]:
    return [str(len(chains)), *(_count([answer(c, step) for c in chains]) for step in STEPS)]


def answer(chain: dict[str, Any], step: str) -> bool | None:
    """Whether a layer passed this step; None where nobody looked or nothing tells."""
    if "refused" in chain["causes"]:
        return False
    value = chain[step]
    return {"yes": True, "no": False}.get(value) if isinstance(value, str) else value


def _count(answers: list[bool | None]) -> str:
    """How many are known to have passed; what is unknown is no zero, and is counted beside it."""
    known = [answer for answer in answers if answer is not None]
    if not known:
        return UNKNOWN
    unknown = len(answers) - len(known)
    return f"{sum(known)}" + (f" (+{unknown} unknown)" if unknown else "")


def sparse_lines(report: dict[str, Any]) -> list[str]:
    """Why layers have no sparse kernel: each reason once, with how many layers it holds for.

    What the rules could not apply is said with the other refusals.
    """
    pairs = (
        (layer["name"], chain["reason"])
        for layer in report["layers"]
        if (chain := layer.get("sparse_kernel"))
        and chain["reason"]
        and "refused" not in chain["causes"]
    )
    return reason_lines("no sparse kernel for", pairs)


def legend_lines(report: dict[str, Any]) -> list[str]:
    """What the columns of the table count, and who has not said anything yet."""
    lines = [
        "  requested: by a rule; mask ok: verified in the file; eligible: the builder could take a "
        "sparse kernel; picked: it did"
    ]
    chains = [chain for layer in report["layers"] if (chain := layer.get("sparse_kernel"))]
    if all(chain["picked"] == "unknown" and not chain["causes"] for chain in chains):
        lines.append(f"  {UNKNOWN}: nobody has said yet; build_engine.sh on your GPU tells")
    return lines
