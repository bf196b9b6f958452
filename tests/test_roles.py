"""Roles are found from the dataflow: the same part of a network has the same role, however it is
written, and no name of a library decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpusq_compile.graph.query import static_shape
from gpusq_compile.graph.roles import ROLES
from gpusq_compile.plan import TAP_PLAN
from tests.compilations import TAPS, begin, make_rules, plans_of, run_until
from tests.models import Shape, TinyPyramid, TinyViT, images, noise, seeded

BLOCK = "layers.0"
FUSED = {"mix.wide": "attention_qkv", "mix.back": "attention_proj"}
SEPARATE = {
    "mix.ask": "attention_qkv",
    "mix.key": "attention_qkv",
    "mix.val": "attention_qkv",
    "mix.back": "attention_proj",
}
LIBRARY = {"mix.inner.in_proj": "attention_qkv", "mix.inner.out_proj": "attention_proj"}
GELU = {"feed.up": "mlp", "feed.down": "mlp"}

VARIANTS: dict[str, tuple[Shape, dict[str, str]]] = {
    "fused qkv": (Shape(depth=1), FUSED | GELU),
    "separate q, k, v": (Shape(depth=1, attention="separate"), SEPARATE | GELU),
    "softmax by hand": (Shape(depth=1, attention="softmax"), SEPARATE | GELU),
    "normalized query": (Shape(depth=1, attention="qk_norm"), SEPARATE | GELU),
    "nn.MultiheadAttention": (Shape(depth=1, attention="multihead"), LIBRARY | GELU),
    "class token": (Shape(depth=1, pool="token"), FUSED | GELU),
    "swiglu": (
        Shape(depth=1, mlp="swiglu"),
        FUSED | {"feed.gate": "mlp", "feed.up": "mlp", "feed.down": "mlp"},
    ),
    "fused swiglu": (
        Shape(depth=1, mlp="fused_swiglu"),
        FUSED | {"feed.both": "mlp", "feed.down": "mlp"},
    ),
}


def layer_roles(model: nn.Module, inputs: Tensor) -> dict[str, tuple[str, ...]]:
    everything = {"id": "all", "match": {"op": ["linear", "conv2d"]}, "quantize": "none"}
    marked = run_until(begin(model, inputs, make_rules(everything)), "mark")
    return {name: plan.roles for name, plan in plans_of(marked).items()}


def tap_roles(model: nn.Module, inputs: Tensor, **distill: Any) -> list[tuple[str, str]]:
    """(tap's name up to the operator's number, role) in graph order."""
    rule = {**TAPS, "distill": {"loss": "mse", **distill}}
    marked = run_until(begin(model, inputs, make_rules(rule)), "mark")
    plans = [node.meta[TAP_PLAN] for node in marked.ir.graph.nodes if TAP_PLAN in node.meta]
    return [(plan.name.rpartition(".add")[0] or plan.name, plan.role) for plan in plans]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_linear_of_a_vision_transformer_has_its_role(variant: str) -> None:
    shape, block = VARIANTS[variant]
    expected = {
        "stem": ("patch_embed",),
        **{f"{BLOCK}.{name}": (role,) for name, role in block.items()},
        "logits": ("classifier",),
    }
    assert layer_roles(seeded(TinyViT, shape), images(2)) == expected


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


def test_a_merging_layer_belongs_to_no_part_and_windows_change_no_role() -> None:
    roles = layer_roles(seeded(TinyPyramid, stages=2), images(2, size=(2, 32, 32)))
    assert roles["stages.1.0.shrink"] == ()
    assert roles["stages.1.1.mix.wide"] == ("attention_qkv",)
    assert roles["stages.1.1.mix.back"] == ("attention_proj",)
    assert roles["stages.1.1.feed.down"] == ("mlp",)


def test_a_model_without_classifier_has_none_and_its_last_norm_is_the_final_projection() -> None:
    model = seeded(TinyViT, Shape(classes=0))
    assert "classifier" not in {
        role for roles in layer_roles(model, images(2)).values() for role in roles
    }
    assert tap_roles(model, images(2))[-1] == ("last_norm", "final_projection")


def test_every_other_block_is_no_stage_end() -> None:
    model = seeded(TinyViT, Shape(depth=3))
    ends = [name for name, role in tap_roles(model, images(2)) if role == "stage_end"]
    assert ends == ["layers.2"]


class Plain(nn.Module):
    """A perceptron: no attention, no residual, nothing that is a transformer's part."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


def test_without_attention_there_is_no_stage() -> None:
    assert layer_roles(Plain().eval(), noise(2, 8)) == {
        "a": ("patch_embed",),
        "b": ("mlp",),
        "c": ("classifier",),
    }
    assert "stage_end" not in {role for _, role in tap_roles(Plain().eval(), noise(2, 8))}


class RotaryAttention(nn.Module):
    """Queries and keys are turned by their position: a sum of two halves that is no residual."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ask, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.val, self.back = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.register_buffer("angle", torch.linspace(0, 3, 4 * dim).reshape(4, dim))

    def turned(self, x: Tensor) -> Tensor:
        angle = self.get_buffer("angle")
        first, second = x.chunk(2, dim=-1)
        return x * angle.cos() + torch.cat([-second, first], dim=-1) * angle.sin()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.turned(self.ask(x)), self.turned(self.key(x)), self.val(x)
        return self.back(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])


def test_a_rotary_embedding_is_no_residual() -> None:
    model = seeded(TinyViT, Shape(depth=1))
    model.layers[0].mix = seeded(RotaryAttention, 32)
    roles = layer_roles(model, images(2))
    assert {name: roles[f"{BLOCK}.mix.{name}"] for name in ("ask", "key", "val", "back")} == {
        "ask": ("attention_qkv",),
        "key": ("attention_qkv",),
        "val": ("attention_qkv",),
        "back": ("attention_proj",),
    }
    assert [role for _, role in tap_roles(model, images(2))].count("stage_end") == 1


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


class Probabilities(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(dim=1)


def test_a_softmax_over_the_logits_hides_no_classifier() -> None:
    assert layer_roles(Probabilities().eval(), noise(2, 8))["c"] == ("classifier",)


def test_the_table_of_roles_is_the_rules_languages() -> None:
    from typing import get_args

    from gpusq_compile.language.schema import Role

    assert get_args(Role) == ROLES


# --- encoders and decoders -----------------------------------------------------------------------


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
