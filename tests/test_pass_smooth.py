"""smooth: LayerNorms hand the spread of their channels on, and the function is the one it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gpusq_compile.compilation import Compilation
from gpusq_compile.driver import run_passes
from gpusq_compile.errors import InputError
from gpusq_compile.passes import COMPRESSION
from gpusq_compile.passes.smooth import LARGEST_SCALE, smoothing_scale
from gpusq_compile.remarks import Kind
from tests.compilations import INT8, SPARSE, begin, make_rules, outputs, remarks_of, run_until
from tests.models import Shape, TinyPyramid, TinyViT, images, noise, seeded

SMOOTH: dict[str, Any] = {
    "id": "all",
    "match": {"op": ["linear", "conv2d"]},
    "quantize": {**INT8, "smooth": 0.5},
}


def outliers(model: nn.Module, gain: float = 40.0) -> nn.Module:
    """The model with a few loud channels behind each LayerNorm, as trained transformers have."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm) and module.elementwise_affine:
                module.weight[::11] *= gain
                module.bias.add_(0.1 * noise(*module.bias.shape))
    return model


def smoothed(model: nn.Module, inputs: Tensor, *rules: Any, **options: Any) -> Compilation:
    begun = begin(model, inputs, make_rules(*(rules or (SMOOTH,))), **options)
    return run_until(begun, "smooth")


def reasons(compilation: Compilation, kind: Kind) -> dict[str | None, str]:
    return {remark.layer: remark.reason for remark in remarks_of(compilation, "smooth", kind)}


# --- the scale -----------------------------------------------------------------------------------


def test_the_scale_is_that_of_the_paper_up_to_a_common_factor() -> None:
    activations, weights = torch.tensor([1.0, 8.0, 2.0]), torch.tensor([0.5, 0.25, 4.0])
    for alpha in (0.0, 0.3, 0.5, 1.0):
        paper = activations**alpha / weights ** (1 - alpha)
        ours = smoothing_scale(activations, weights, alpha)
        torch.testing.assert_close(ours / ours[0], paper / paper[0])
        assert float(ours.log().mean()) == pytest.approx(0, abs=1e-6)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 2.0**100, width=32), st.floats(0, 2.0**100, width=32)),
        min_size=1,
        max_size=12,
    ),
    st.floats(0, 1),
)
def test_every_scale_is_sane_and_dead_channels_keep_one(
    ranges: list[tuple[float, float]], alpha: float
) -> None:
    activations, weights = torch.tensor(ranges).T
    scale = smoothing_scale(activations, weights, alpha)
    assert bool(((scale >= 1 / LARGEST_SCALE) & (scale <= LARGEST_SCALE)).all())
    dead = (activations == 0) | (weights == 0)
    assert bool((scale[dead] == 1).all())


# --- real networks -------------------------------------------------------------------------------


def test_norms_and_columns_are_scaled_by_what_the_data_shows() -> None:
    model = outliers(seeded(TinyViT, Shape(depth=1)))
    norm, up = model.get_submodule("layers.0.between"), model.get_submodule("layers.0.feed.up")
    assert isinstance(norm, nn.LayerNorm)
    assert isinstance(up, nn.Linear)
    seen: list[Tensor] = []
    handle = norm.register_forward_hook(lambda _, __, value: seen.append(value))
    data = [(images(5, seed=3), None), (images(3, seed=4), None)]
    with torch.no_grad():
        for batch, _ in data:
            model(batch)
    handle.remove()
    largest = torch.cat([value.flatten(0, -2) for value in seen]).abs().amax(dim=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scale = smoothing_scale(largest, up.weight.abs().amax(dim=0), 0.5)
    compilation = smoothed(model, images(2), data=data)
    after = compilation.ir.state_dict()
    place = "layers.0.between"
    torch.testing.assert_close(after[f"{place}.weight"], before[f"{place}.weight"] / scale)
    torch.testing.assert_close(after[f"{place}.bias"], before[f"{place}.bias"] / scale)
    wide = "layers.0.feed.up.weight"
    torch.testing.assert_close(after[wide], before[wide] * scale)
    same = ("layers.0.feed.down.weight", "layers.0.feed.up.bias", "last_norm.weight")
    assert all(torch.equal(after[name], before[name]) for name in same)
    assert {name: value.shape for name, value in after.items() if "stem" not in name} == {
        name: value.shape for name, value in before.items() if "stem" not in name
    }


def test_the_function_stays_and_every_layer_is_accounted_for() -> None:
    compilation = smoothed(outliers(seeded(TinyViT, Shape(depth=1))), images(2))
    record = compilation.records[-1]
    assert 0 < (record.change or 0) < 1e-5
    assert (record.matched, record.changed, record.skipped) == (6, 2, 4)
    done = reasons(compilation, Kind.PASSED)
    assert done.keys() == {"layers.0.mix.wide", "layers.0.feed.up"}
    for text in done.values():
        before, after = (float(part.split()[-2]) for part in text.split(":")[1].split(","))
        assert before > 10 > after >= 1
    left = reasons(compilation, Kind.ANALYSIS)
    assert left.keys() == {"stem", "layers.0.mix.back", "layers.0.feed.down", "logits"}
    assert "it comes from the model's input" in left["stem"]
    assert "it comes from scaled_dot_product_attention" in left["layers.0.mix.back"]
    assert "it comes from gelu, not from a LayerNorm" in left["layers.0.feed.down"]


def test_linears_that_share_a_norm_share_its_scale() -> None:
    model = outliers(seeded(TinyViT, Shape(attention="separate", mlp="swiglu", depth=1)))
    compilation = smoothed(model, images(2))
    assert 0 < (compilation.records[-1].change or 0) < 1e-5
    names = ("mix.ask", "mix.key", "mix.val", "feed.gate", "feed.up")
    assert reasons(compilation, Kind.PASSED).keys() == {f"layers.0.{name}" for name in names}


def test_windows_and_patch_merging_between_norm_and_linear_are_followed() -> None:
    model = outliers(seeded(TinyPyramid, stages=2))
    compilation = smoothed(model, images(2, size=(2, 32, 32)))
    assert 0 < (compilation.records[-1].change or 0) < 1e-5
    done = reasons(compilation, Kind.PASSED)
    assert sum(str(name).endswith("mix.wide") for name in done) == 2
    assert sum(str(name).endswith("shrink") for name in done) == 1


def test_one_scale_per_tensor_fits_better_afterwards() -> None:
    def error(**quantize: Any) -> float:
        model = outliers(seeded(TinyViT))
        rule = {**SMOOTH, "match": {"role": ["attention_qkv", "mlp"]}}
        rule["quantize"] = {**INT8, **quantize}
        compilation = run_until(begin(model, images(8), make_rules(rule)), "smooth")
        [exact] = outputs(compilation)
        [rounded] = outputs(run_until(compilation, "quantize"))
        return float((rounded - exact).square().mean())

    assert error(smooth=0.5) < 0.5 * error()


def test_a_mask_stays_and_what_it_zeroed_stays_zero() -> None:
    rule = {**SMOOTH, "sparsity": SPARSE, "match": {"op": "linear"}}
    compilation = begin(outliers(seeded(TinyViT, Shape(depth=1))), images(2), make_rules(rule))
    run_until(compilation, "finetune_sparse")
    path = "layers.0.feed.up.weight"
    zero = compilation.ir.state_dict()[path] == 0
    masks = {k: v.clone() for k, v in compilation.ir.state_dict().items() if k.endswith(".mask")}
    run_until(compilation, "smooth")
    assert 0 < (compilation.records[-1].change or 0) < 1e-5
    after = compilation.ir.state_dict()
    assert torch.equal(after[path] == 0, zero)
    assert int(zero.sum()) == zero.numel() // 2
    assert masks
    assert all(torch.equal(after[name], mask) for name, mask in masks.items())


def test_channels_that_are_always_zero_do_no_harm() -> None:
    model = outliers(seeded(TinyViT, Shape(depth=1)))
    norm, up = model.get_submodule("layers.0.between"), model.get_submodule("layers.0.feed.up")
    assert isinstance(norm, nn.LayerNorm)
    assert isinstance(up, nn.Linear)
    with torch.no_grad():
        norm.weight[3:5] = 0.0
        norm.bias[3:5] = 0.0
        up.weight[:, 9] = 0.0
    old = up.weight.detach().clone()
    compilation = smoothed(model, images(2))
    assert 0 < (compilation.records[-1].change or 0) < 1e-5
    new = compilation.ir.state_dict()["layers.0.feed.up.weight"]
    assert torch.equal(new[:, [3, 4, 9]], old[:, [3, 4, 9]])
    assert not torch.equal(new, old)


def test_nothing_leaves_the_range_of_fp16() -> None:
    model = outliers(seeded(TinyViT, Shape(depth=1)), gain=1e4)
    compilation = smoothed(model, images(2))
    for name, value in compilation.ir.state_dict().items():
        old = model.state_dict().get(name)
        if old is not None and old.shape == value.shape:
            assert float(value.abs().max()) <= LARGEST_SCALE * float(old.abs().max()) * 1.0001
            assert bool(value.half().isfinite().all())


def test_rules_that_do_not_ask_change_nothing() -> None:
    model = outliers(seeded(TinyViT, Shape(depth=1)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compilation = smoothed(model, images(2), {**SMOOTH, "quantize": INT8})
    assert compilation.records[-1].change == 0.0
    assert remarks_of(compilation, "smooth") == []
    after = compilation.ir.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if "stem" not in name)


# --- refusals ------------------------------------------------------------------------------------


class Case(nn.Module):
    """`norm` -> something -> `up`: [B, 4, 32] -> [B, 4, 32]."""

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32, elementwise_affine=affine)
        self.up = nn.Linear(32, 32)
        self.other = nn.Linear(32, 32)
        self.out = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.up(self.norm(x))))


class WithoutAffine(Case):
    def __init__(self) -> None:
        super().__init__(affine=False)


class ReadByAnAdd(Case):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return y + self.out(F.gelu(self.up(y)))


class ReturnedToo(Case):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = self.norm(x)
        return self.out(F.gelu(self.up(y))), y


class SharedNorm(Case):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.up(self.norm(x))) + self.norm(x.flip(1)))


class OtherLinear(Case):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.out(F.gelu(self.up(y)) + self.other(y))


class ChannelsMixed(Case):
    """Tokens become channels and channels tokens before the linear reads them."""

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        y = self.norm(x).transpose(1, 2).reshape(batch, 4, 32)
        return self.out(F.gelu(self.up(y)))


class OverTwoAxes(Case):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm((4, 32))


class BeforeConvolution(Case):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Conv2d(32, 32, 3, padding=1)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x).unflatten(1, (2, 2)).permute(0, 3, 1, 2)
        return self.out(F.gelu(self.up(y)).flatten(2).transpose(1, 2))


class NormIsWeight(Case):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.out(F.gelu(self.up(y))) + F.linear(x, y[0]).mean()


REFUSED = [
    (WithoutAffine, "its LayerNorm has no weight that could take the scale"),
    (ReadByAnAdd, "add reads it, and only a linear's columns can be scaled"),
    (ReturnedToo, "the graph's output reads it, and only"),
    (SharedNorm, "several operators read norm.weight"),
    (OtherLinear, "other reads it too, and does not ask for smoothing"),
    (ChannelsMixed, "holds different channels at different positions"),
    (OverTwoAxes, "its LayerNorm normalizes over several axes"),
    (NormIsWeight, "linear_2 reads it, and only a linear's columns can be scaled"),
    (BeforeConvolution, "up reads it, and only a linear's columns can be scaled"),
]


@pytest.mark.parametrize(("model", "reason"), REFUSED, ids=[case.__name__ for case, _ in REFUSED])
def test_a_norm_that_cannot_be_scaled_is_left_with_the_reason(
    model: type[Case], reason: str
) -> None:
    made = seeded(model)
    weight = made.up.weight.detach().clone()
    compilation = smoothed(made, noise(2, 4, 32), {**SMOOTH, "match": {"name": "up"}})
    [left] = remarks_of(compilation, "smooth", Kind.ANALYSIS)
    assert (left.layer, left.code) == ("up", "not-smoothed")
    assert reason in left.reason
    [nothing] = remarks_of(compilation, "smooth", Kind.MISSED)
    assert nothing.code == "nothing-smoothed"
    assert torch.equal(compilation.ir.state_dict()["up.weight"], weight)
    assert compilation.records[-1].change == 0.0


def test_layers_that_ask_for_different_values_are_refused() -> None:
    rules = [
        {"id": f"r-{name}", "match": {"name": name}, "quantize": {**INT8, "smooth": alpha}}
        for name, alpha in (("up", 0.5), ("other", 0.75))
    ]
    compilation = smoothed(seeded(OtherLinear), noise(2, 4, 32), *rules)
    left = reasons(compilation, Kind.ANALYSIS)
    assert left.keys() == {"up", "other"}
    assert all(text.endswith("ask for different values: [0.5, 0.75]") for text in left.values())


@pytest.mark.parametrize("first", ["smooth", "tap"])
def test_a_tap_on_the_norm_keeps_its_scale(first: str) -> None:
    tap = {"id": "tap", "match": {"op": "layer_norm"}, "distill": {"loss": "mse"}}
    rules = make_rules({**SMOOTH, "match": {"name": "up"}}, tap)
    compilation = run_until(begin(seeded(Case), noise(2, 4, 32), rules), "mark")
    second = "tap" if first == "smooth" else "smooth"
    run_passes(compilation, [COMPRESSION[first], COMPRESSION[second]])
    assert reasons(compilation, Kind.ANALYSIS)["up"].endswith("a tap shows it to the fine-tune")


def test_activations_that_are_not_finite_are_named() -> None:
    model = seeded(Case)
    data = [(noise(2, 4, 32), None), (torch.full((2, 4, 32), 1e38), None)]
    with torch.no_grad():
        model.norm.eps = 0.0
    begun = begin(
        model, noise(2, 4, 32), make_rules({**SMOOTH, "match": {"name": "up"}}), data=data
    )
    with pytest.raises(InputError, match="NaN or infinite values at layer_norm") as caught:
        run_until(begun, "smooth")
    assert caught.value.code == "activation-not-finite"
