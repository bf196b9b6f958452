"""Attention is found however it is written, with its sizes, and what is odd about it is told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gpusq_compile.graph.attention import Attention, AttentionSizes, find_attentions
from tests.attentions import Around, Mix, Mixer, WindowAttention, fused, spelled_out
from tests.compilations import begin, make_rules, run_until
from tests.models import noise, seeded


def found(model: nn.Module, tokens: int = 6, dim: int = 64) -> list[Attention]:
    inputs = noise(2, tokens, dim)
    compilation = run_until(begin(model.eval(), inputs, make_rules()), "canonicalize")
    return list(find_attentions(compilation.ir.graph).values())


def mixing(mix: Mix, heads: int = 2) -> nn.Module:
    model: nn.Module = seeded(Around, Mixer(mix, heads=heads))
    return model


BIAS = torch.randn(6, 6)


@pytest.mark.parametrize(
    ("mix", "is_fused", "biased"),
    [
        (fused(), True, False),
        (fused(attn_mask=BIAS), True, True),
        (spelled_out(), False, False),
        (spelled_out(lambda scores: scores / 4 + BIAS), False, True),
        (spelled_out(lambda scores: (scores + BIAS).masked_fill(BIAS > 1, -1e4)), False, True),
        (spelled_out(lambda scores: torch.where(BIAS > 1, -1e4, scores)), False, True),
    ],
)
def test_attention_is_found_with_its_sizes(mix: Mix, is_fused: bool, biased: bool) -> None:
    [attention] = found(mixing(mix))
    assert attention.sizes == AttentionSizes(2, 32, 32, 6, 6)
    assert (attention.is_fused, attention.biased, attention.obstacle) == (is_fused, biased, None)


@pytest.mark.parametrize("spelled", [True, False])
def test_windows_with_bias_and_mask_are_found(spelled: bool) -> None:
    model = seeded(Around, WindowAttention(9, spelled_out=spelled))
    [attention] = found(model, tokens=36)
    assert attention.sizes == AttentionSizes(2, 32, 32, 9, 9)
    assert attention.biased
    assert attention.obstacle is None


def test_multihead_attention_is_found() -> None:
    class Library(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(64, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.inner(x, x, x, need_weights=False)[0]
            return result

    [attention] = found(seeded(Around, Library()))
    assert attention.sizes == AttentionSizes(2, 32, 32, 6, 6)
    assert attention.obstacle is None


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    shared = (k[:, :1], v[:, :1])
    return nn.functional.scaled_dot_product_attention(q, *shared, enable_gqa=True)


def read_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-2, -1)).softmax(dim=-1)
    return weights @ v + weights.mean()


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of three factors, which is no product of two matrices."""
    weights = (q @ k.transpose(-2, -1)).softmax(dim=-1)
    return torch.einsum("bhij,bhjd,d->bhid", weights, v, torch.ones(v.shape[-1]))


def two_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) + v @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def second_factor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v.transpose(-2, -1).matmul((q @ k.transpose(-2, -1)).softmax(dim=-1)).transpose(-2, -1)


@pytest.mark.parametrize(
    ("mix", "obstacle"),
    [
        (fused(is_causal=True), "causal"),
        (grouped, "grouped-query"),
        (spelled_out(torch.tanh), "tanh lies between the product and the softmax"),
        (spelled_out(dim=-2), "another axis than the last"),
        (read_twice, "read by others"),
        (by_einsum, "einsum is not followed"),
        (two_products, "several products"),
        (second_factor, "not the first factor"),
    ],
)
def test_what_is_odd_about_an_attention_is_told(mix: Mix, obstacle: str) -> None:
    [attention] = found(mixing(mix))
    assert attention.obstacle is not None
    assert obstacle in attention.obstacle


def test_dropout_inside_a_fused_attention_is_told() -> None:
    # Compiling such a model ends where it is traced, for its outputs differ from run to run.
    program = torch.export.export(mixing(fused(dropout_p=0.5)), (noise(2, 6, 64),))
    [attention] = find_attentions(program.graph).values()
    assert attention.obstacle == "it drops weights with probability 0.5"


def test_heads_in_the_axis_of_the_batch_are_one_head_each() -> None:
    """That is how an engine sees them, too: fused attention has four axes there."""

    def joined(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = [part.flatten(0, 1) for part in (q, k, v)]
        return fused()(*flat).unflatten(0, q.shape[:2])

    class Single(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return spelled_out()(x, x, x)

    [many] = found(mixing(joined))
    [one] = found(seeded(Around, Single()))
    assert (many.sizes.heads, one.sizes.heads) == (1, 1)
    assert many.obstacle is one.obstacle is None


def test_a_softmax_between_no_two_products_is_no_attention() -> None:
    class Probabilities(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(64, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x).softmax(dim=-1) @ x

    assert found(seeded(Probabilities)) == []
