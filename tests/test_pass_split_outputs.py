"""A fused QKV becomes one GEMM per part, with the same integers and scales, or says why not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpusq_compile import compile_model
from gpusq_compile.graph.query import tensor_attribute
from gpusq_compile.numerics import largest_difference
from gpusq_compile.plan import planned
from gpusq_compile.quantization.operators import DEQUANTIZE
from tests.compilations import begin, fork, make_rules, outputs, plan_of, remarks_of, run_until
from tests.models import Shape, TinyPyramid, TinyViT, images, noise, seeded

SPLIT = {"weight": "int8", "split": True}


def rules(name: str = "**", precision: str = "fp32", **quantize: Any) -> dict[str, Any]:
    return make_rules(
        {
            "id": "all",
            "match": {"op": "linear"},
            "sparsity": {"pattern": "2:4"},
            "quantize": {"weight": "int8"},
        },
        {"id": "cut", "match": {"name": name}, "quantize": {**SPLIT, **quantize}},
        precision=precision,
    )


class Cutting(nn.Module):
    """A linear whose output [B, N, 3 * 32] is handed to `cut`, and what that returns is summed."""

    def __init__(self, cut: Callable[[Tensor], Any], out: int = 96, *, bias: bool = True) -> None:
        super().__init__()
        self.wide = nn.Linear(32, out, bias=bias)
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        parts = self.cut(self.wide(x))
        # Each part counts differently: parts that trade places are seen.
        return sum((i + 1.0) * part.flatten(1) for i, part in enumerate(parts))


def by_view(y: Tensor) -> Any:
    return y.view(y.shape[0], 5, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)


def by_index(y: Tensor) -> Any:
    y = y.reshape(-1, 5, 3, 4, 8).permute(2, 0, 3, 1, 4)
    return y[0], y[1], y[-1]


def heads_first(y: Tensor) -> Any:
    """Rows of one part are not next to each other."""
    return y.view(y.shape[0], 5, 4, 3, 8).transpose(2, 3).unbind(2)


def parts_inside_heads(y: Tensor) -> Any:
    return y.view(y.shape[0], 5, 4, 24).transpose(1, 2).chunk(3, dim=-1)


def by_slices(y: Tensor) -> Any:
    return y[..., :32], y[..., 32:64], y[..., 64:]


def like_multihead(y: Tensor) -> Any:
    y = y.unflatten(-1, (3, 32)).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
    return y[0], y[1], y[2]


CUTS: dict[str, Callable[[Tensor], Any]] = {
    "view": by_view,
    "index": by_index,
    "heads first": heads_first,
    "inside heads": parts_inside_heads,
    "chunk": lambda y: y.chunk(3, dim=-1),
    "split": lambda y: y.split(32, dim=2),
    "sizes": lambda y: y.split([32, 32, 32], dim=-1),
    "slices": by_slices,
    "multihead": like_multihead,
    "two views": lambda y: by_view(y.view(y.shape[0], 5, 96).view(y.shape[0], 5, 96)),
    "unused": lambda y: y.chunk(3, dim=-1)[1:],
}


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("output", ["none", "int8", "int4"])
def test_every_way_to_cut_gives_one_gemm_per_part_and_the_same_outputs(
    name: str, output: str
) -> None:
    inputs = noise(2, 5, 32)
    folded = run_until(begin(seeded(Cutting, CUTS[name]), inputs, rules(output=output)), "fold")
    expected = outputs(folded)
    split = run_until(fork(folded), "split_outputs")
    (found,) = outputs(split)
    assert largest_difference(found, expected[0]) < 1e-6
    plans = [plan for _, plan in planned(split.ir.graph)]
    read = [1, 2] if name == "unused" else [0, 1, 2]
    assert [plan.name for plan in plans] == [f"wide.part{index}" for index in read]
    assert [plan.shape for plan in plans] == [(32, 32)] * len(read)
    assert all(plan.applied == plan_of(folded, "wide").applied for plan in plans)
    inputs_of = {node.args[0] for node, _ in planned(split.ir.graph)}
    assert len(inputs_of) == 1, "the parts share one quantized input"


@pytest.mark.parametrize("name", ["view", "heads first", "inside heads"])
def test_integers_and_scales_go_to_their_part_unchanged(name: str) -> None:
    folded = run_until(begin(seeded(Cutting, CUTS[name]), noise(2, 5, 32), rules()), "fold")
    levels = tensor_attribute(folded.ir, "wide.weight").clone()
    scale = tensor_attribute(folded.ir, "gpusq.weight_scale.wide").clone()
    bias = tensor_attribute(folded.ir, "wide.bias").clone()
    split = run_until(fork(folded), "split_outputs")
    seen = []
    for node, plan in planned(split.ir.graph):
        assert plan.part is not None
        rows = list(plan.part.rows)
        seen += rows
        dequantize = node.args[1]
        assert isinstance(dequantize, torch.fx.Node)
        assert dequantize.target is DEQUANTIZE
        stored, steps = (
            tensor_attribute(split.ir, str(source.target)) for source in dequantize.all_input_nodes
        )
        assert torch.equal(stored, levels[rows])
        assert torch.equal(steps, scale[rows])
        own_bias = node.args[2]
        assert isinstance(own_bias, torch.fx.Node)
        assert torch.equal(tensor_attribute(split.ir, str(own_bias.target)), bias[rows])
    assert sorted(seen) == list(range(96))
    assert "wide.weight" not in split.ir.state_dict(), "nothing is stored twice"
    assert "wide.bias" not in split.ir.state_dict()


def whole(y: Tensor) -> Any:
    return (y,)


def also_whole(y: Tensor) -> Any:
    q, k, v = y.chunk(3, dim=-1)
    return q * y.mean(), k, v


def uneven(y: Tensor) -> Any:
    q, k = y.split([32, 64], dim=-1)
    return q, k[..., :32]


def along_tokens(y: Tensor) -> Any:
    return y.unbind(1)


def through_gelu(y: Tensor) -> Any:
    return nn.functional.gelu(y).chunk(3, dim=-1)


def mixed_view(y: Tensor) -> Any:
    return y.reshape(y.shape[0], 3, 160).unbind(1)


@pytest.mark.parametrize(
    ("cut", "reason"),
    [
        (whole, "its output goes through flatten as a whole"),
        (also_whole, "its output is read as a whole by "),
        (uneven, "it is cut into parts of different sizes"),
        (along_tokens, "it is cut along another axis than its channels"),
        (through_gelu, "its output goes through gelu as a whole"),
        (mixed_view, "reshape joins its channels with other axes"),
    ],
)
def test_what_cannot_be_split_stays_whole_and_says_why(cut: Any, reason: str) -> None:
    compilation = run_until(begin(seeded(Cutting, cut), noise(2, 5, 32), rules()), "split_outputs")
    (remark,) = remarks_of(compilation, "split_outputs")
    assert remark.kind == "missed"
    assert remark.layer == "wide"
    assert reason in remark.reason
    plan = plan_of(compilation, "wide")
    assert plan.reasons == (remark.reason,)
    assert plan.applied.weight == "int8"


def test_a_convolution_is_not_split() -> None:
    document = make_rules(
        {"id": "conv", "match": {"op": "conv2d"}, "quantize": SPLIT},
    )
    model = seeded(partial(nn.Conv2d, 4, 8, 3, padding=1))
    compilation = run_until(begin(model, images(2, size=(4, 8, 8)), document), "split_outputs")
    (remark,) = remarks_of(compilation, "split_outputs")
    assert remark.reason == "not split: only the output of a linear is cut into parts"


def test_nothing_is_split_unasked() -> None:
    compilation = run_until(
        begin(seeded(Cutting, by_view), noise(2, 5, 32), make_rules()), "split_outputs"
    )
    assert not remarks_of(compilation, "split_outputs")
    assert [plan.name for _, plan in planned(compilation.ir.graph)] == ["wide"]


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize(
    ("model", "size", "layer"),
    [
        (TinyViT, (2, 8, 8), "layers.0.mix.wide"),
        (partial(TinyViT, Shape(attention="multihead")), (2, 8, 8), "layers.0.mix.inner.in_proj"),
        (partial(TinyViT, Shape(mlp="fused_swiglu")), (2, 8, 8), "layers.0.feed.both"),
        (TinyPyramid, (2, 32, 32), "stages.3.1.mix.wide"),
    ],
)
def test_the_written_file_holds_each_part_and_computes_the_same(
    model: Any, size: tuple[int, int, int], layer: str, precision: str
) -> None:
    shown = images(4, size=size)
    compiled = compile_model(
        seeded(model),
        (shown,),
        rules=rules(layer, precision),
        calibration_data=[shown],
        finetune=False,
        engine="none",
    )
    assert compiled.report["verify"]["ok"]
    layers = {entry["name"]: entry for entry in compiled.report["layers"]}
    parts = [name for name in layers if name.startswith(f"{layer}.part")]
    assert len(parts) == (2 if layer.endswith("both") else 3)
    assert all(layers[part]["mask_ok"] for part in parts)
    assert compiled.onnx_model is not None
    by_name = {node.name: node for node in compiled.onnx_model.graph.node}
    onnx.checker.check_model(compiled.onnx_model)
    assert len({by_name[part].input[0] for part in parts}) == 1


def test_the_user_gets_whole_weights_back() -> None:
    model = seeded(Cutting, heads_first)
    inputs = noise(2, 5, 32)
    whole, split = (
        compile_model(
            model, (inputs,), rules=document, calibration_data=[inputs], finetune=False
        ).state_dict()
        for document in (make_rules(), rules())
    )
    assert split.keys() == whole.keys() == model.state_dict().keys()
    for name, value in whole.items():
        assert torch.equal(split[name], value)


class ChunkedAttention(nn.Module):
    """Attention whose fused QKV is cut by `chunk`, the form in which TensorRT loses INT8."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.qkv = nn.Linear(64, 192)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 32)).transpose(1, 2) for part in by_chunk(self.qkv(x)))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def by_chunk(y: Tensor) -> tuple[Tensor, ...]:
    return y.chunk(3, dim=-1)


@pytest.mark.parametrize(
    ("treatment", "actual"),
    [({}, "fp16"), ({"split": True}, "int8"), ({"output": "int8"}, "int8")],
)
def test_a_fused_qkv_stays_int8_in_the_engine_only_when_mended(
    treatment: dict[str, Any], actual: str, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    inputs = noise(2, 16, 64)
    quantize = {"weight": "int8", **treatment}
    report = compile_model(
        seeded(ChunkedAttention),
        (inputs,),
        rules=make_rules(
            {"id": "qkv", "match": {"op": "linear"}, "quantize": quantize}, precision="fp16"
        ),
        calibration_data=[inputs],
        finetune=False,
        engine="tensorrt-rtx",
        output=tmp_path,
    ).report
    types = {layer["name"]: layer["engine"]["type"] for layer in report["layers"]}
    split = [f"qkv.part{index}" for index in range(3)] if "split" in treatment else ["qkv"]
    assert types == dict.fromkeys(split, actual)
