"""permute: channels whose order is not free keep it, and a remark says why."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpusq_compile.driver import run_passes
from gpusq_compile.passes import COMPRESSION
from gpusq_compile.remarks import Kind
from tests.compilations import begin, make_rules, remarks_of, run_until
from tests.models import (
    Convolution,
    Perceptron,
    noise,
    seeded,
)
from tests.permuting import PERMUTED, layers, permuted, permuted_in


class Case(nn.Module):
    """`up` -> something -> `down`: [B, 4, 32] -> [B, 4, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.gain = nn.Parameter(1 + 0.1 * noise(64))
        self.norm = nn.LayerNorm(64)
        self.conv = nn.Conv1d(64, 64, 3, padding=1, groups=64)
        self.small = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.between(F.gelu(self.up(x))))

    def between(self, hidden: Tensor) -> Tensor:
        return hidden


class GainBetween(Case):
    def between(self, hidden: Tensor) -> Tensor:
        return hidden * self.gain


class NormBetween(Case):
    def between(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden)


class ConvolutionBetween(Case):
    def between(self, hidden: Tensor) -> Tensor:
        return self.conv(hidden.transpose(1, 2)).transpose(1, 2)


class ReadTwice(Case):
    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x))
        return self.down(hidden) + self.small(hidden).mean()


class ReadInPart(Case):
    """The other reader sees the channels through a cut, behind data movement."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x))
        return self.down(hidden) + hidden.transpose(1, 2)[:, 5:7].exp().mean()


class ReturnedToo(Case):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        hidden = F.gelu(self.up(x))
        return self.down(hidden), hidden


class SharedUp(Case):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x))) + F.linear(x, self.up.weight).mean()


class ComputedUp(Case):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(F.linear(x, self.up.weight * 2)))


class ShiftedChannels(Case):
    """Half of the channels come from the token before: not every channel is treated alike."""

    def between(self, hidden: Tensor) -> Tensor:
        batch = hidden.shape[0]
        return hidden.reshape(batch, 8, 4, 8).transpose(1, 2).reshape(batch, 4, 64)


class SkipAround(Case):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(64, 64)

    def between(self, hidden: Tensor) -> Tensor:
        return hidden + self.second(hidden)


class KeysAreValues(Case):
    def between(self, hidden: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(torch.sin(hidden), hidden, hidden)


class QueriesFromValues(Case):
    def between(self, hidden: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(torch.sin(hidden), torch.cos(hidden), hidden)


class GroupedQueries(Case):
    """Two heads of queries share each head of values, which are repeated for them."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        value = self.narrow(x).unflatten(-1, (2, 16)).transpose(1, 2)
        value = value.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2)
        query = torch.sin(self.up(x)).unflatten(-1, (4, 16)).transpose(1, 2)
        out = F.scaled_dot_product_attention(query, query, value)
        return x + self.down(out.transpose(1, 2).flatten(2))


class CrossCovariance(Case):
    """Attention between channels, as in XCiT: the channels are what it sums over."""

    def between(self, hidden: Tensor) -> Tensor:
        scores = torch.sin(hidden).transpose(1, 2) @ torch.cos(hidden)
        return (scores.softmax(dim=-1) @ hidden.transpose(1, 2)).transpose(1, 2)


class ChannelsAsTokens(Case):
    """Each token's channels are cut into four pieces that attend to one another."""

    def between(self, hidden: Tensor) -> Tensor:
        pieces = hidden.reshape(-1, 16, 16)
        query = torch.sin(pieces)
        return F.scaled_dot_product_attention(query, query, pieces).reshape(hidden.shape)


REFUSED = [
    (GainBetween, "its channels meet another tensor in mul"),
    (NormBetween, "it reads the output of layer_norm"),
    (ConvolutionBetween, "its input goes through conv1d, which is not followed"),
    (ReadTwice, "small reads the same channels"),
    (ReadInPart, "exp reads the same channels"),
    (ReturnedToo, "the graph's output reads the same channels"),
    (SharedUp, "several operators read up.weight"),
    (ComputedUp, "the graph computes mul, which should be a stored tensor"),
    (SkipAround, "it reads the residual stream"),
    (KeysAreValues, "scaled_dot_product_attention weighs by the same channels"),
    (QueriesFromValues, "reads the same channels"),
    (GroupedQueries, "it reads one channel in several places"),
    (CrossCovariance, "matmul mixes its channels"),
    (ChannelsAsTokens, "scaled_dot_product_attention mixes its channels"),
    (ShiftedChannels, "holds different channels at different positions"),
]


@pytest.mark.parametrize(("model", "reason"), REFUSED, ids=[case.__name__ for case, _ in REFUSED])
def test_channels_whose_order_is_not_free_are_left_with_the_reason(
    model: type[Case], reason: str
) -> None:
    rule = {**PERMUTED, "match": {"name": "down"}}
    made = seeded(model)
    weight = made.down.weight.detach().clone()
    compilation = permuted(made, noise(2, 4, 32), rule)
    [fixed] = remarks_of(compilation, "permute", Kind.ANALYSIS)
    assert fixed.layer == "down"
    assert fixed.code == "order-fixed"
    assert reason in fixed.reason
    # Asked for, and done nowhere: that is not left unsaid.
    [nothing] = remarks_of(compilation, "permute", Kind.MISSED)
    assert nothing.code == "nothing-permuted"
    assert torch.equal(compilation.ir.state_dict()["down.weight"], weight)
    assert compilation.records[-1].change == 0.0


def test_layers_that_share_an_axis_keep_its_order_whatever_their_patterns() -> None:
    """An order for one pattern might cost the other, so neither is given one."""
    rules = [
        {**permuted_in("portable"), "id": "a", "match": {"name": "down"}},
        {**permuted_in("2:4"), "id": "b", "match": {"name": "small"}},
    ]
    compilation = permuted(seeded(ReadTwice), noise(2, 4, 32), *rules)
    assert compilation.records[-1].changed == 0
    fixed = layers(compilation, Kind.ANALYSIS)
    assert fixed["down"].endswith("small reads the same channels")
    assert fixed["small"].endswith("down reads the same channels")


class ShiftedHalf(Case):
    """Every input channel is one channel of `up`, but half of them are from one token before."""

    def between(self, hidden: Tensor) -> Tensor:
        batch = hidden.shape[0]
        halves = hidden.reshape(batch, 4, 2, 32)
        tokens = torch.arange(4)
        index = torch.stack([tokens, (tokens - 1) % 4], dim=1)
        return halves[:, index, torch.arange(2)].reshape(batch, 4, 64)


def test_an_operator_that_gathers_is_not_followed() -> None:
    compilation = permuted(
        seeded(ShiftedHalf), noise(2, 4, 32), {**PERMUTED, "match": {"name": "down"}}
    )
    [fixed] = remarks_of(compilation, "permute", Kind.ANALYSIS)
    assert fixed.reason.endswith("its input goes through index, which is not followed")


class Skewed(Case):
    """A pad that the next view skews by: the upper half of the channels is one token late."""

    def between(self, hidden: Tensor) -> Tensor:
        batch = hidden.shape[0]
        halves = hidden.reshape(batch, 4, 2, 32).transpose(1, 2)
        skewed = F.pad(halves, (0, 0, 0, 1)).reshape(batch, 10, 32)[:, :8]
        return skewed.reshape(batch, 2, 4, 32).transpose(1, 2).reshape(batch, 4, 64)


def test_channels_at_different_positions_do_not_trade_places() -> None:
    model = seeded(Skewed)
    old = model.down.weight.detach().clone()
    compilation = permuted(model, noise(2, 4, 32), {**PERMUTED, "match": {"name": "down"}})
    assert "down" in layers(compilation, Kind.PASSED)
    assert 0 < (compilation.records[-1].change or 0) < 1e-5
    new = compilation.ir.state_dict()["down.weight"]
    order = [int((column == old.T).all(dim=1).nonzero()) for column in new.T]
    assert sorted(order[:32]) == list(range(32))


class HalfFlipped(Case):
    """Heads of one token order and heads of another: channels mix within each only."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = F.gelu(self.up(x)).chunk(2, dim=-1)
        return self.down(torch.cat([first, second.flip(1)], dim=-1))


def test_joined_channels_are_not_followed() -> None:
    compilation = permuted(
        seeded(HalfFlipped), noise(2, 4, 32), {**PERMUTED, "match": {"name": "down"}}
    )
    [fixed] = remarks_of(compilation, "permute", Kind.ANALYSIS)
    assert fixed.reason.endswith("its input goes through cat, which is not followed")


def test_a_convolution_keeps_its_order() -> None:
    model = seeded(Convolution, 8, 8, 3, padding=1)
    compilation = permuted(model, noise(2, 8, 6, 6))
    [fixed] = remarks_of(compilation, "permute", Kind.ANALYSIS)
    assert fixed.reason.endswith("only a linear's can change places")


@pytest.mark.parametrize("first", ["permute", "tap"])
def test_a_tap_on_hidden_channels_keeps_their_order(first: str) -> None:
    tap = {"id": "tap", "match": {"name": "first"}, "distill": {"loss": "mse"}}
    compilation = begin(seeded(Perceptron), noise(4, 32), make_rules(PERMUTED, tap))
    run_until(compilation, "mark")
    second = "tap" if first == "permute" else "permute"
    run_passes(compilation, [COMPRESSION[first], COMPRESSION[second]])
    fixed = layers(compilation, Kind.ANALYSIS)
    assert fixed["second"].endswith("a tap shows its input channels to the fine-tune")
