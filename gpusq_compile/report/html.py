"""`report.html`: the report as one page that needs nothing else, neither network nor files.

Made from report.json and evidence.json alone, without torch. Every text of the user's is escaped by
the template engine; the page's own policy allows one script, by its digest, and no connection.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import posixpath
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from gpusq_compile.report import page_figures as figures
from gpusq_compile.report.compute_view import PAPER
from gpusq_compile.report.log_view import log_lines
from gpusq_compile.report.page_layers import layer_details, layer_rows
from gpusq_compile.report.page_maps import map_gallery
from gpusq_compile.report.page_summary import (
    accuracy_rows,
    chain_rows,
    compute_rows,
    engine_targets,
    headline,
    missed_groups,
    pass_rows,
    tiles,
)

PAGE = "report.html"
TEMPLATES = files("gpusq_compile.report") / "templates"


def write_page(path: Path, report: Mapping[str, Any], evidence: Mapping[str, Any] | None) -> None:
    """Write the page of a run.

    Args:
        report: the content of report.json, with or without what logs say.
        evidence: the content of evidence.json, None where there is none.
    """
    write_whole(path, run_page(report, evidence))


def write_whole(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it, so that it is there whole or not at all.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def run_page(report: Mapping[str, Any], evidence: Mapping[str, Any] | None) -> str:
    """The page as one HTML document."""
    rows = layer_rows(report, evidence)
    context = {
        "report": report,
        "tool": report["tool"],
        "evidence": evidence,
        "name": short_name(report["model"]),
        "headline": headline(report),
        "tiles": tiles(report),
        "missed": missed_groups(report),
        "accuracy": accuracy_rows(report),
        "rows": rows,
        "roles": Counter(row["role"] for row in rows),
        "states": Counter(row["state"] for row in rows),
        "strip": figures.error_strip(report, evidence),
        "looked_at": figures.looked_at(evidence),
        "losses": figures.losses(report, evidence),
        "tap_weights": figures.tap_weights(report),
        "storage": figures.storage_bars(report),
        "compute": compute_rows(report),
        "paper_compute": PAPER,
        "crops": figures.crops(evidence),
        "histograms": figures.histograms(report, evidence),
        "maps": map_gallery(report, evidence),
        "targets": engine_targets(report),
        "chain": chain_rows(report),
        "logs": log_lines(dict(report)),
        "passes": pass_rows(report),
        "looked": sum((evidence or {}).get("seconds", {}).values()),
    }
    return render("page.html", context, layer_details(report, evidence))


def render(template: str, context: Mapping[str, Any], layers: list[dict[str, Any]]) -> str:
    """A page with its script, style and data: what unfolds behind layers, and the strip."""
    script = template_text("page.js")
    return (
        environment()
        .get_template(template)
        .render(
            **context,
            policy=policy(script),
            style=Markup(template_text("page.css")),
            script=Markup(script),
            data=embedded({"layers": layers, "strip": data_of(context["strip"])}),
        )
    )


def data_of(strip: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if strip is None else strip["data"]


def embedded(value: Any) -> Markup:
    """JSON for a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def policy(script: str) -> str:
    """The content security policy of the page: this script, its style sheet, pictures within."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def short_name(model: str) -> str:
    return posixpath.basename(model.replace("\\", "/").rstrip("/")) or model


def template_text(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def environment() -> Environment:
    found = Environment(
        autoescape=True,
        loader=FunctionLoader(template_text),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["number"] = number
    found.filters["percent"] = percent
    found.filters["breakable"] = breakable
    return found


def number(value: float | None, form: str = ".4g") -> str:
    return "–" if value is None else format(value, form).replace("-", "\u2212")


def breakable(name: str) -> Markup:
    """A dotted name that may go on in the next line after each dot."""
    return Markup(str(escape(name)).replace(".", ".<wbr>"))


def percent(value: float | None, form: str = ".2%") -> str:
    return "–" if value is None else format(value, form).replace("%", " %")
