"""report.html: what it says, that it needs nothing else, and that no text of a user's is markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gpusq_compile.report import png, svg
from gpusq_compile.report.evidence import Evidence
from gpusq_compile.report.html import run_page
from gpusq_compile.report.page_layers import packed_histogram, treatment, why
from gpusq_compile.report.page_summary import headline, missed_groups
from tests.pages import NOTHING, make_layer, make_pass, make_remark, make_report, many

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


class Elements(HTMLParser):
    """The elements and the texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))


def embedded(text: str) -> Any:
    return json.loads(Elements(text).scripts[0])


@pytest.fixture(scope="module")
def hostile() -> str:
    """A page in which every text that a user can choose is an attack."""
    layer = make_layer(f"blocks.{HOSTILE}", refused=HOSTILE)
    layer["rules"] = [HOSTILE]
    layer["role"] = HOSTILE
    report = make_report(
        [layer],
        model=HOSTILE,
        scope=HOSTILE,
        rules=[HOSTILE],
        status="failed",
        error={"code": "verify", "message": HOSTILE},
        passes=[make_pass("mark", make_remark(layer["name"], HOSTILE), make_remark(None, HOSTILE))],
        metrics={"dense": {HOSTILE: 0.5}},
        finetune={"quantize": {"steps": 0, "loss": [], "reason": HOSTILE}},
    )
    report["finetune"]["quantize"]["tap_weights"] = {HOSTILE: 1.0}
    evidence = Evidence(no_maps=HOSTILE, faults=[HOSTILE]).as_dict()
    evidence["layers"] = {layer["name"]: {"output_db": 3.0}}
    return run_page(report, evidence)


def test_no_text_of_the_users_becomes_an_element(hostile: str) -> None:
    found = Elements(hostile)
    assert [tag for tag, _ in found.tags].count("script") == 2
    assert "img" not in [tag for tag, _ in found.tags]
    assert not [name for _, attributes in found.tags for name in attributes if name[:2] == "on"]
    assert found.text.count("<img src=x onerror=alert(2)>") >= 8


def test_user_texts_in_the_data_cannot_end_the_script(hostile: str) -> None:
    facts = dict(embedded(hostile)["layers"][0]["facts"])
    assert facts["refused"] == [HOSTILE]
    assert facts["rules"] == [HOSTILE]
    assert facts["passes"] == [f"mark: missed: {HOSTILE}"]


def test_the_policy_allows_the_one_script_and_no_connection(hostile: str) -> None:
    found = Elements(hostile)
    policy = next(a["content"] for _, a in found.tags if a.get("http-equiv"))
    digest = base64.b64encode(hashlib.sha256(found.scripts[1].encode()).digest()).decode()
    assert policy is not None
    assert f"script-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")
    addresses = [a.get(key) for _, a in found.tags for key in ("src", "href") if a.get(key)]
    assert all(address.startswith(("#", "data:")) for address in addresses if address)
    assert "http" not in re.sub(r"http-equiv|http://www.w3.org/2000/svg", "", hostile)


def test_each_row_says_the_reason() -> None:
    report = make_report([make_layer("fc1"), make_layer("fc2", refused="30 columns")])
    text = Elements(run_page(report, None)).text
    assert "sparse INT8 kernels take 2:4" in text
    assert "30 columns" in text
    chain = {"causes": ["shape"], "reason": "too narrow"}
    assert why(make_layer("fc") | {"sparse_kernel": chain}).endswith("no sparse kernel: too narrow")


def test_what_is_not_there_is_said() -> None:
    text = Elements(run_page(make_report([make_layer("fc")]), None)).text
    for said in (
        "Accuracy was not measured",
        "Nothing was measured",
        "No phase was reached",
        "No file was written",
        "No maps: evidence.json is missing",
        "No engine was built here",
    ):
        assert said in text, said


def test_a_run_that_failed_before_there_was_a_graph_has_a_page() -> None:
    error = {"code": "loss-not-finite", "message": "the loss became nan at step 3"}
    text = Elements(run_page(make_report([], status="failed", error=error), None)).text
    assert "the loss became nan at step 3" in text
    assert "failed" in text


def test_a_thousand_layers_stay_small() -> None:
    text = run_page(*many(1000))
    assert len(text) < 2_000_000
    assert len(embedded(text)["layers"]) == 1000
    rows = [a for tag, a in Elements(text).tags if tag == "tr" and "data-index" in a]
    assert [row["data-index"] for row in rows] == [str(index) for index in range(1, 1001)]


def test_losses_are_drawn_as_they_add_up() -> None:
    curve = [
        {"step": step, "total": 7.0 / step, "hard": 1.0 / step, "soft": 0.1 / step, "feature": 1.0}
        for step in (1, 2, 3)
    ]
    phase = {"steps": 3, "seconds": 1.0, "images": 24, "stopped_by": "budget", "loss": curve}
    report = make_report([make_layer("fc")], finetune={"sparse": phase})
    evidence = Evidence(loss_weights={"alpha": 1.0, "beta": 10.0, "gamma": 5.0}).as_dict()
    found = Elements(run_page(report, evidence))
    chart = next(a for _, a in found.tags if a.get("data-points"))
    points = json.loads(str(chart["data-points"]))
    assert points["x"] == [1, 2, 3]
    assert points["lines"][0] == ["total", [7.0, 3.5, 2.333]]
    assert points["lines"][2] == ["10 × soft logits", [1.0, 0.5, 0.3333]]
    assert "3 steps, 24 images, 1 s; stopped by budget" in found.text


def test_the_headline_says_what_most_layers_run_as() -> None:
    layers = [make_layer("a"), make_layer("b"), make_layer("c", refused="no")]
    accuracy = {"dense": 0.9, "sparse": None, "quantized": 0.89, "onnx": 0.895}
    said = headline(make_report(layers, accuracy=accuracy))
    assert said == "2 of 3 layers run as sparse int8; top-1 is 89.50 % (\u22120.50 points)."
    for layer in layers[:2]:
        layer["applied"] = layer["applied"] | {"weight": "int4"}
    assert "sparse int8 with int4 values" in headline(make_report(layers, accuracy=accuracy))


def test_what_was_missed_is_grouped_by_reason() -> None:
    remarks = [make_remark(f"fc{index}", "too narrow") for index in range(5)]
    (group,) = missed_groups(make_report([], passes=[make_pass("mark", *remarks)]))
    assert (group["count"], group["layers"]) == (5, "fc0, fc1, fc2 and 2 more")


def test_the_treatment_is_short_where_all_types_are_one() -> None:
    assert treatment(NOTHING) == "dense"
    assert treatment(make_layer("fc")["applied"]) == "2:4 · int8"
    assert treatment({**NOTHING, "weight": "int4"}) == "W int4"


def test_a_histogram_is_cut_at_zero_alone() -> None:
    heights = base64.b64decode(packed_histogram([1, 2, 100, 4, 0]))
    assert list(heights) == [64, 128, 255, 255, 0]
    assert packed_histogram([]) == ""


def test_a_picture_is_a_png_that_decodes_to_its_pixels() -> None:
    file = png.png(bytes(range(6)), 3, 2, png.GRAY)
    assert file.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">IIBB", file[16:26]) == (3, 2, 8, 0)
    start = file.index(b"IDAT") + 4
    size = struct.unpack(">I", file[start - 8 : start - 4])[0]
    assert zlib.decompress(file[start : start + size]) == bytes([0, 0, 1, 2, 0, 3, 4, 5])
    with pytest.raises(ValueError, match="no 3 x 2"):
        png.png(b"12345", 3, 2, png.GRAY)


@pytest.mark.parametrize(("low", "high"), [(0.09, 1.5), (1e-5, 3.0), (0.95, 1.02), (2.0, 2.0)])
def test_a_logarithmic_axis_has_two_to_six_ticks_around_the_data(low: float, high: float) -> None:
    ticks = svg.log_ticks(low, high)
    assert 2 <= len(ticks) <= 6 or low == high
    assert ticks == sorted(ticks)


def test_values_that_are_missing_break_a_line() -> None:
    chart = svg.line_chart("loss", "step", [1, 2, 3, 4], [svg.Series("x", "s1", [1, 2, None, 3])])
    assert len(re.findall(r"M\d", re.findall(r' d="([^"]*)"', chart)[0])) == 2
    assert svg.line_chart("loss", "step", [1], [svg.Series("x", "s1", [None])]) == ""


def test_pairs_of_a_mask_stand_together() -> None:
    drawn = svg.mask_crop([[3, -2, 0, 0, 0, 0, 1, 1]], 4, 2, True, "crop")
    assert drawn.count('class="gone"') == 4
    assert drawn.count('class="plus"') == 3
    assert ">-2</text>" in drawn


def test_the_templates_hold_no_address_of_a_network() -> None:
    folder = Path(svg.__file__).parent / "templates"
    for path in folder.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "//" not in re.sub(r"^\s*// .*$", "", text, flags=re.MULTILINE), path.name
