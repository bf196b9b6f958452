"""What trtexec left of a build elsewhere says of each layer how far its sparsity got, and why."""

from __future__ import annotations

import copy
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import rich.console
from hypothesis import given
from hypothesis import strategies as st

from gpusq_compile.engine import MarkedGemm, find_gemms
from gpusq_compile.engine.layer_info import parse_layer_info
from gpusq_compile.engine.trtexec_log import ElsewhereBuild, read_build
from gpusq_compile.errors import InputError
from gpusq_compile.report.attention import attention_lines
from gpusq_compile.report.engine_logs import read_logs, with_logs
from gpusq_compile.report.log_view import log_lines, planned_type
from gpusq_compile.report.sparse_view import sparse_lines, sparse_table
from tests.engine_logs import DATA, FC1, FC2, PROJ, QKV, SHAPES, make_layer, make_report

MARKED = [MarkedGemm(name, "int8", sparse=True) for name in SHAPES]


def text_of(table: Any) -> str:
    console = rich.console.Console(width=80, no_color=True)
    with console.capture() as shown:
        console.print(table)
    return shown.get()


def chains(report: dict[str, Any], *names: str) -> dict[str, Any]:
    """What the report says of each layer with the logs of these names in tests/data/engine."""
    builds, _ = read_logs(report, [], [DATA / name for name in names])
    return {layer["name"]: layer["sparse_kernel"] for layer in with_logs(report, builds)["layers"]}


def steps(chain: dict[str, Any]) -> tuple[str, str, list[str]]:
    return chain["eligible"], chain["picked"], chain["causes"]


def test_names_of_tensorrt_8_give_each_layer_its_answers_and_causes() -> None:
    found = chains(make_report(), "trtexec_8_block.log")
    assert steps(found[FC1]) == ("yes", "yes", [])
    assert steps(found[FC2]) == ("yes", "yes", [])
    assert steps(found[QKV]) == ("yes", "no", ["fused-qkv", "output-not-int8"])
    assert steps(found[PROJ]) == ("yes", "no", ["output-not-int8"])
    assert "loses INT8" in found[QKV]["reason"]
    assert found[FC1]["reason"] is None


def test_counts_of_tensorrt_10_are_told_apart_by_the_kernels_names() -> None:
    report = make_report()
    int8_out = {**report["layers"][3]["applied"], "output": "int8"}
    report["layers"][3]["applied"] = int8_out
    found = chains(report, "trtexec_10_block.log")
    assert steps(found[QKV]) == ("yes", "yes", [])
    assert steps(found[FC1]) == ("yes", "yes", [])
    # Two were chosen and two kernels are named sparse: the others got none.
    assert steps(found[PROJ]) == ("unknown", "no", ["output-not-int8"])
    assert steps(found[FC2]) == ("unknown", "no", ["dense-faster"])


def test_counts_that_the_names_do_not_account_for_leave_the_others_unknown(tmp_path: Path) -> None:
    text = (DATA / "trtexec_10_block.log").read_text().replace("Chose 2", "Chose 3")
    (tmp_path / "x.log").write_text(text)
    found = chains(make_report(), str(tmp_path / "x.log"))
    assert steps(found[QKV]) == ("yes", "yes", [])
    assert steps(found[PROJ]) == ("unknown", "unknown", [])


def test_a_build_without_the_flag_says_so_and_nothing_else() -> None:
    found = chains(make_report(), "trtexec_10_block.dense.log")
    assert {tuple(chain["causes"]) for chain in found.values()} == {("flag-off",)}
    assert {chain["picked"] for chain in found.values()} == {"no"}


def test_the_sparse_build_is_shown_whatever_the_order_and_both_are_kept() -> None:
    names = ["trtexec_10_block.dense.log", "trtexec_10_block.log"]
    assert steps(chains(make_report(), *names)[QKV]) == ("yes", "yes", [])
    builds, _ = read_logs(make_report(), [DATA / name for name in names], [])
    entries = with_logs(make_report(), builds)["engine_logs"]
    assert [entry["sparse"] for entry in entries] == [False, True]
    assert entries[0]["layers"][QKV]["causes"] == ["flag-off"]


@pytest.mark.parametrize("name", ["inspector_8_block.json", "inspector_11_block.json"])
def test_the_inspectors_json_alone_says_eligible_and_picked(name: str) -> None:
    report = make_report()
    found = chains(report, name)
    assert steps(found[FC1]) == ("yes", "yes", [])
    assert steps(found[QKV])[0] == "no"
    # Sparse weights under a kernel whose name says nothing of sparsity.
    assert steps(found[FC2])[:2] == ("yes", "unknown")
    gemms = find_gemms(read_build(DATA / name, [FC1]).log, [MarkedGemm(FC1, "int8")])
    assert (gemms[0].actual, gemms[0].status) == ("int8", "passed")


def test_the_layer_information_beside_a_log_adds_to_it(tmp_path: Path) -> None:
    shutil.copy(DATA / "trtexec_10_block.log", tmp_path / "m.log")
    alone = {g.name: g for g in find_gemms(read_build(tmp_path / "m.log", [FC1]).log, MARKED)}
    info = json.loads((DATA / "inspector_11_block.json").read_text())
    in_log = {QKV: f"{QKV}_myl0_4", FC1: f"{FC1}_myl0_9", FC2: f"{FC2}_myl0_12"}
    for layer in info["Layers"]:
        layer |= {"Name": in_log[layer["Name"]], "HasSparseWeights": 1, "TacticName": ""}
    (tmp_path / "m.layers.json").write_text(json.dumps(info))
    both = {g.name: g for g in find_gemms(read_build(tmp_path / "m.log", [FC1]).log, MARKED)}
    assert (alone[FC2].eligible, both[FC2].eligible) == ("unknown", "yes")
    assert both[PROJ] == alone[PROJ]
    assert [both[name].tactic for name in SHAPES] == [alone[name].tactic for name in SHAPES]


def test_version_gpu_flag_and_time_are_read() -> None:
    old, new = (read_build(DATA / f"trtexec_{v}_block.log", [FC1]) for v in (8, 10))
    facts = [(b.version, b.target, b.sparse_flag, b.median_ms) for b in (old, new)]
    assert facts == [("8.6.1", "sm86", True, 1.2), ("10.13.0", "sm80", True, 1.0)]


def test_without_the_options_in_the_log_the_command_line_says_the_flag(tmp_path: Path) -> None:
    def flag(text: str) -> bool | None:
        (tmp_path / "x.log").write_text(text)
        return read_build(tmp_path / "x.log", [FC1]).sparse_flag

    text = (DATA / "trtexec_10_block.log").read_text().replace("[I] Sparsity: Enabled", "[I] -")
    assert flag(text) is True
    assert flag(text.replace("--sparsity=enable ", "")) is False
    # Another tool's log has neither.
    assert flag("\n".join(line for line in text.split("\n") if "&&&&" not in line)) is None


def test_sm90_has_kernels_with_float_outputs(tmp_path: Path) -> None:
    text = (DATA / "trtexec_10_block.log").read_text()
    (tmp_path / "x.log").write_text(text.replace("Capability: 8.0", "Capability: 9.0"))
    found = chains(make_report(), str(tmp_path / "x.log"))
    assert steps(found[PROJ]) == ("unknown", "no", ["dense-faster"])


def test_what_was_refused_or_is_broken_breaks_the_chain_before_the_engine() -> None:
    report = make_report()
    plain = dict.fromkeys(("sparsity", "weight", "activation", "output"))
    report["layers"][0] |= {"applied": plain, "reasons": ["no multiple of 4"], "mask_ok": None}
    report["layers"][1] |= {"mask_ok": False}
    report["layers"][2] |= {"requested": plain, "applied": plain}
    found = chains(report, "trtexec_8_block.log")
    assert (found[QKV]["causes"], found[QKV]["reason"]) == (["refused"], "no multiple of 4")
    assert found[PROJ]["causes"] == ["mask-broken"]
    assert found[FC1] is None
    assert report["layers"][0]["sparse_kernel"] is None, "the report itself stays as it was"


def test_the_table_counts_by_role_and_unknown_is_no_zero() -> None:
    report = make_report()
    assert sparse_table(report) is None
    nothing: dict[str, Any] = {
        "eligible": "unknown",
        "picked": "unknown",
        "causes": [],
        "reason": None,
    }
    for layer in report["layers"]:
        layer["sparse_kernel"] = {"requested": "2:4", "mask_ok": True, **nothing}
    assert row(report, "all") == ["4", "4", "-", "-"]
    builds, _ = read_logs(report, [], [DATA / "trtexec_10_block.log"])
    read = with_logs(report, builds)
    assert row(read, "all") == ["4", "4", "2 (+2 unknown)", "2"]
    assert row(read, "mlp") == ["2", "2", "1 (+1 unknown)", "1"]
    assert row(read, "attention_proj") == ["1", "1", "-", "0"]


def row(report: dict[str, Any], role: str) -> list[str]:
    """The cells of a row of the table, as they are shown."""
    lines = [re.split(r"[│┃]", line) for line in text_of(sparse_table(report)).splitlines()]
    cells = [[cell.strip() for cell in line[1:-1]] for line in lines if len(line) > 1]
    (found,) = (line[1:] for line in cells if line[0] == role)
    return found


def test_reasons_are_said_once_with_how_many_layers_they_hold_for() -> None:
    builds, _ = read_logs(make_report(), [], [DATA / "trtexec_10_block.log"])
    (line,) = sparse_lines(with_logs(make_report(), builds))
    assert line.startswith(
        "no sparse kernel for 2 layers (blocks.0.attn.proj, blocks.0.mlp.fc2): "
        "its output is not INT8"
    )


def test_the_lines_say_types_counts_and_the_gain_of_sparse_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("block.log", "block.dense.log"):
        shutil.copy(DATA / f"trtexec_10_{name}", tmp_path / name)
    paths = [Path("block.dense.log"), Path("block.log")]
    report = with_logs(make_report(), read_logs(make_report(), paths, [])[0])
    assert log_lines(report) == [
        "block.dense.log: TensorRT 10.13.0 for sm80; 4 of 4 GEMMs in the planned type; "
        "sparse kernels off; 1.3 ms",
        "block.log: TensorRT 10.13.0 for sm80; 4 of 4 GEMMs in the planned type; "
        "layers that the builder counts: 4 eligible, 2 picked; 1 ms",
        "block: 1 ms with sparse kernels, 1.3 ms without: 1.30x",
    ]
    old = with_logs(make_report(), read_logs(make_report(), [], [DATA / "trtexec_8_block.log"])[0])
    assert f"  missed: {QKV} is fp16: " in log_lines(old)[1]


FULL = (DATA / "trtexec_10_block.log").read_bytes()
FAILED = FULL.replace(b"&&&& PASSED", b"[E] no memory\n&&&& FAILED")


@pytest.mark.parametrize(
    ("name", "data", "code", "part"),
    [
        ("x.log", None, "engine-log-unreadable", "cannot read"),
        ("x.log", b"", "engine-log-empty", "x.log is empty"),
        ("x.log", b" \n\n", "engine-log-empty", "x.log is empty"),
        ("x.log", b"\x7fELF\x00\x01\x02plan", "engine-log-binary", "is no text"),
        ("x.log", FULL + b"\xff\xfe\xfd", "engine-log-binary", "is no text"),
        ("x.log", FULL[:3000], "engine-log-cut", "its end is missing"),
        ("x.log", FULL[-3000:], "engine-log-cut", "its beginning is missing"),
        ("x.log", FAILED, "engine-log-failed", "ended with FAILED\n  no memory"),
        ("x.log", FULL.replace(b"blocks.0", b"stage.7"), "engine-log-other", f"'{QKV}'"),
        ("x.log", b"what a fine day", "engine-log-other", "none of the model's 4 layers"),
        ("x.layers.json", b"{", "layer-info-damaged", "no layer information"),
        ("x.layers.json", b"[" * 100_000, "layer-info-damaged", "no layer information"),
        ("x.layers.json", b'{"Layers": 3}', "layer-info-damaged", "no list 'Layers'"),
        ("x.layers.json", b'{"Layers": ["a"]}', "layer-info-damaged", "profilingVerbosity"),
        ("x.layers.json", b'{"Layers": []}', "engine-log-other", "none of the model's"),
    ],
)
def test_what_is_no_log_of_the_model_is_refused_by_name(
    name: str, data: bytes | None, code: str, part: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_build(path, list(SHAPES))
    assert caught.value.code == code
    assert part in str(caught.value)


def test_a_log_that_windows_wrote_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.log").write_bytes(FULL.decode().replace("\n", "\r\n").encode("utf-16"))
    read = read_build(tmp_path / "x.log", list(SHAPES))
    assert read.log == read_build(DATA / "trtexec_10_block.log", list(SHAPES)).log
    assert (read.sparse_flag, read.target) == (True, "sm80")


@given(st.integers(0, FULL.index(b"&&&& PASSED")), st.booleans())
def test_no_log_that_is_cut_at_one_end_is_taken_for_a_whole_one(at: int, front: bool) -> None:
    start = FULL.index(b"&&&& RUNNING") + 1
    assert read_bytes(FULL[max(at, start) :] if front else FULL[:at]) is None


def read_bytes(data: bytes) -> ElsewhereBuild | None:
    """A build of these bytes, None where they are refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.log"
        path.write_bytes(data)
        try:
            return read_build(path, list(SHAPES))
        except InputError:
            return None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=9,
)


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(
                [
                    "Name",
                    "Inputs",
                    "Constants",
                    "Weights",
                    "TacticName",
                    "Metadata",
                    "LayerType",
                    "HasSparseWeights",
                ]
            ),
            json_values,
        ),
        max_size=4,
    )
)
def test_no_json_makes_the_reader_fail_otherwise_than_by_name(layers: list[Any]) -> None:
    try:
        found = parse_layer_info(json.dumps({"Layers": layers}))
    except ValueError:
        return
    assert len(found) == sum("Name" in layer for layer in layers)


def test_faults_of_logs_that_were_found_are_handed_back_and_of_given_ones_raised(
    tmp_path: Path,
) -> None:
    (tmp_path / "x.log").write_text("")
    report = make_report()
    before = copy.deepcopy(report)
    builds, faults = read_logs(report, [tmp_path / "x.log"], [])
    assert (builds, [fault.code for fault in faults]) == ([], ["engine-log-empty"])
    assert with_logs(report, builds) == before
    with pytest.raises(InputError, match=r"engine-log-empty"):
        read_logs(report, [], [tmp_path / "x.log"])


def test_weights_of_four_bits_are_looked_for_in_a_log_from_elsewhere() -> None:
    names = ("layers.0.feed.up", "layers.0.feed.down")
    asked = {"sparsity": None, "weight": "int4", "activation": None, "output": None}
    shape: dict[str, Any] = {"role": "mlp", "shape": [64, 64], "requested": asked, "applied": asked}

    def missed(kind: str) -> list[dict[str, Any]]:
        execution = {"kind": kind, "why": "because"}
        report = make_report()
        report["layers"] = [
            make_layer(QKV, **shape, execution=execution) | {"name": name} for name in names
        ]
        builds, _ = read_logs(report, [], [DATA / "rtx_int4_blocks.log"])
        [entry] = with_logs(report, builds)["engine_logs"]
        assert entry["gemms"] == 2
        found: list[dict[str, Any]] = entry["missed"]
        return found

    [up] = missed("weight-only int4")
    assert up["layer"] == names[0]
    assert "dequantizes the whole weight ahead of the product" in up["reason"]
    # Per channel they are stored in INT8, and only the type of the product is asked about.
    assert missed("weight-only int8") == []


MHA = (
    "Name: _gemm_mha_v2_myl0_5, LayerType: kgen, Inputs: [{inputs}], Constants: [], Outputs: "
    "[ {{ Name: o, Dimensions: [-1,6,197,64], Datatype: Int8, Format: Linear }}], TacticName: "
    "_gemm_mha_v2_0x1, StreamId: 0, Metadata: [ONNX Layer: {name}/av][ONNX Layer: {name}/softmax]"
    "[ONNX Layer: {name}/qk]\n"
)


def with_attention(path: Path, dtype: str, name: str = "blocks.0.attn") -> Path:
    """A log at `path` in which an attention is one kernel on factors of this type."""
    factor = f"{{ Name: t, Dimensions: [-1,6,197,64], Datatype: {dtype}, Format: Linear }}"
    text = (DATA / "trtexec_10_block.log").read_text()
    at = text.index(f"Name: {PROJ}_myl0_6")
    line = MHA.format(inputs=", ".join([factor] * 3), name=name)
    path.write_text(text[:at] + line + text[at:])
    return path


@pytest.mark.parametrize(
    ("dtype", "name", "shown"),
    [
        ("Int8", "blocks.0.attn", ["  a.log: 1 of 1 fused in one INT8 kernel each"]),
        (
            "Half",
            "blocks.0.attn",
            [
                "  a.log: 0 of 1 fused in one INT8 kernel each",
                "  missed in a.log: blocks.0.attn is fp16: engine layer '_gemm_mha_v2_myl0_5' "
                "takes fp16, fp16, fp16",
            ],
        ),
        ("Int8", "other", ["  a.log: 0 of 1 fused in one INT8 kernel each, 1 unknown"]),
    ],
)
def test_attentions_are_answered_from_a_log_from_elsewhere(
    dtype: str, name: str, shown: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with_attention(tmp_path / "a.log", dtype, name)
    asked = {"sparsity": None, "weight": None, "activation": "int8", "output": None}
    nothing = dict.fromkeys(asked)
    quantized = {"name": "blocks.0.attn", "planned": True, "requested": asked, "applied": asked}
    left = {"name": "blocks.1.attn", "planned": False, "requested": nothing, "applied": nothing}
    report = make_report() | {
        "engine": None,
        "attentions": [entry | {"reasons": []} for entry in (quantized, left)],
    }
    builds, _ = read_logs(report, [], [Path("a.log")])
    read = with_logs(report, builds)
    [found] = read["engine_logs"][0]["attentions"]
    assert (found["name"], found["expected"]) == ("blocks.0.attn", "int8")
    assert attention_lines(read) == ["attention: 1 of 2 in INT8", *shown]
    assert read["engine_logs"][0]["planned_type"] == 4


@pytest.mark.parametrize(
    ("right", "unknown", "said"),
    [
        (4, 0, "4 of 4 GEMMs in the planned type"),
        (1, 2, "1 of 2 GEMMs in the planned type, 2 not told"),
        (0, 4, "no GEMM's type is told"),
    ],
)
def test_types_that_a_log_does_not_tell_are_not_counted_as_wrong(
    right: int, unknown: int, said: str
) -> None:
    entry = {"gemms": 4, "planned_type": right, "unknown_type": unknown}
    assert planned_type(entry) == said
