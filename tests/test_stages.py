"""Taps are where stages end, and at a model's two ends, however it is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpusq_compile.graph.query import static_shape
from gpusq_compile.plan import TAP_PLAN
from tests.compilations import TAPS, begin, make_rules, remarks_of, run_until
from tests.models import Block, Shape, TinyPyramid, TinyViT, images, noise, seeded
from tests.role_cases import layer_roles, tap_roles
from tests.unusual_transformers import (
    PixelPyramid,
    PooledQueries,
    QueriesFromTheSide,
)


@pytest.mark.parametrize("pool", ["mean", "token"])
def test_an_isotropic_model_is_tapped_at_its_embedding_last_block_and_final_norm(pool: Any) -> None:
    assert tap_roles(seeded(TinyViT, Shape(pool=pool)), images(2)) == [
        ("stem", "patch_embed"),
        ("layers.1", "stage_end"),
        ("last_norm", "final_projection"),
    ]


def test_a_pyramid_is_tapped_at_the_end_of_each_of_its_four_stages() -> None:
    model, inputs = seeded(TinyPyramid), images(2, size=(2, 32, 32))
    assert tap_roles(model, inputs) == [
        ("stem", "patch_embed"),
        *[(f"stages.{stage}.1", "stage_end") for stage in range(4)],
        ("last_norm", "final_projection"),
    ]


def test_every_other_block_is_no_stage_end() -> None:
    model = seeded(TinyViT, Shape(depth=3))
    ends = [name for name, role in tap_roles(model, images(2)) if role == "stage_end"]
    assert ends == ["layers.2"]


class PooledResidual(nn.Module):
    """A head with a skip connection of its own, after the tokens are pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.body = TinyViT(Shape(depth=1, classes=0))
        self.mix, self.logits = nn.Linear(32, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x).mean(dim=1)
        return self.logits(y + F.gelu(self.mix(y)))


def test_a_skip_connection_after_pooling_ends_no_stage() -> None:
    taps = tap_roles(seeded(PooledResidual), images(2))
    assert [name for name, role in taps if role == "stage_end"] == ["body.layers.0"]


def test_a_stage_may_begin_with_two_branches_and_end_in_a_batch_norm() -> None:
    assert tap_roles(seeded(PixelPyramid), images(2)) == [
        ("stem.tokens", "patch_embed"),
        ("stages.0", "stage_end"),
        ("stages.1", "stage_end"),
        ("last", "final_projection"),
    ]


def test_what_only_makes_queries_for_the_blocks_ends_no_stage() -> None:
    taps = tap_roles(seeded(QueriesFromTheSide), images(2, size=(2, 32, 32)))
    ends = [name for name, role in taps if role == "stage_end"]
    assert ends == ["stages.0", "stages.1"]


def test_an_attention_that_adds_its_pooled_queries_ends_no_stage() -> None:
    model, inputs = seeded(PooledQueries), images(2, size=(2, 16, 16))
    ends = [name for name, role in tap_roles(model, inputs) if role == "stage_end"]
    assert ends == ["blocks.0", "blocks.1"]
    roles = layer_roles(model, inputs)
    assert roles["blocks.0.back"] == roles["blocks.1.back"] == ("attention_proj",)


class FromEveryStage(TinyPyramid):
    """The maps of all stages together, as a segmentation head takes them."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x).permute(0, 2, 3, 1))
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x.mean(dim=(1, 2)))
        return torch.cat(found, dim=1)


def test_stages_that_a_head_reads_side_by_side_all_end() -> None:
    taps = tap_roles(seeded(FromEveryStage, stages=3), images(2, size=(2, 32, 32)))
    ends = [name for name, role in taps if role == "stage_end"]
    assert ends == [f"stages.{stage}.1" for stage in range(3)]


class PooledByConvolution(nn.Module):
    """Stages with a convolution per channel between them, which halves sides and doubles channels:
    one of twice the channels on a quarter of the pixels has half the numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 16, 1)
        self.first = Block(16, 2, "fused", "gelu")
        self.second = Block(32, 2, "fused", "gelu")
        self.pool = nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=16)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x).flatten(2).transpose(1, 2))
        x = self.pool(x.transpose(1, 2).unflatten(2, (7, 7)))
        return self.head(self.norm(self.second(x.flatten(2).transpose(1, 2))).mean(1))


def test_a_convolution_per_channel_that_pools_ends_a_stage() -> None:
    marked = run_until(begin(seeded(PooledByConvolution), noise(2, 2, 7, 7), "int8"), "mark")
    said = [r.reason for r in remarks_of(marked, "mark") if "end of stage" in r.reason]
    assert said == [
        "distill at end of stage 1 of 2: 49 tokens of 16",
        "distill at end of stage 2 of 2: 16 tokens of 32",
    ]


def test_a_tap_counts_tokens_wherever_the_batch_is() -> None:
    class SequenceFirst(TinyViT):
        def forward(self, x: Tensor) -> Tensor:
            tokens = self.last_norm(self.stem(x).flatten(2).permute(2, 0, 1))
            assert self.logits is not None
            return self.logits(tokens.mean(0))

    marked = run_until(begin(seeded(SequenceFirst), images(2), "int8"), "mark")
    said = [r.reason for r in remarks_of(marked, "mark") if r.code == "tap-marked"]
    assert said
    assert not [text for text in said if "None" in text]


class Encoder(nn.Module):
    """Blocks that add a position embedding to queries and keys anew, as DETR's do.

    With `given` the embedding is computed from a second input, else from the size of the first.
    """

    def __init__(self, *, given: bool = False, blocks: int = 3) -> None:
        super().__init__()
        self.given = given
        self.blocks = nn.ModuleList(nn.MultiheadAttention(32, 2) for _ in range(blocks))
        self.decoder = nn.MultiheadAttention(32, 2)
        self.queries = nn.Parameter(torch.randn(3, 32))
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        place = torch.ones(x.shape[0], 5, 32) * torch.arange(5.0)[:, None]
        if self.given:
            place = place * mask[:, :, None]
        for block in self.blocks:
            key = (x + place).transpose(0, 1)
            x = x + block(key, key, x.transpose(0, 1), need_weights=False)[0].transpose(0, 1)
        query = self.queries[:, None].expand(-1, x.shape[0], -1)
        keys = (x + place).transpose(0, 1)
        found = query + self.decoder(query, keys, x.transpose(0, 1), need_weights=False)[0]
        found = found + self.decoder(found, keys, x.transpose(0, 1), need_weights=False)[0]
        return self.norm(found.transpose(0, 1))


@pytest.mark.parametrize("given", [False, True], ids=["from the size", "from an input"])
def test_a_position_embedding_that_is_added_again_and_again_ends_no_stage(given: bool) -> None:
    model = seeded(Encoder, given=given)
    marked = run_until(begin(model, (noise(2, 5, 32), torch.ones(2, 5)), make_rules(TAPS)), "mark")
    sizes = [
        static_shape(node)
        for node in marked.ir.graph.nodes
        if TAP_PLAN in node.meta and node.meta[TAP_PLAN].role == "stage_end"
    ]
    # One end of the encoder, and one of the decoder: not one for each embedding between them.
    assert [sorted(size[:2], key=str) for size in sizes if size] == [[5, None], [3, None]]
