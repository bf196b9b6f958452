"""Roles are found from the dataflow: the same part of a network has the same role, however it is
written, and no name of a library decides."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import Shape, TinyPyramid, TinyViT, images, noise, seeded
from tests.role_cases import layer_roles, tap_roles
from tests.unusual_transformers import (
    AddedQueries,
    BatchedProducts,
    ChannelAttention,
    ClassTokens,
    Einsum,
    LinearAttention,
    PixelPyramid,
    Spatial,
    StemViT,
    TalkingHeads,
    TokenMixer,
    WeightsFromTokens,
)

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


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_linear_of_a_vision_transformer_has_its_role(variant: str) -> None:
    shape, block = VARIANTS[variant]
    expected = {
        "stem": ("patch_embed",),
        **{f"{BLOCK}.{name}": (role,) for name, role in block.items()},
        "logits": ("classifier",),
    }
    assert layer_roles(seeded(TinyViT, shape), images(2)) == expected


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


def test_a_layer_that_is_compiled_alone_is_no_classifier() -> None:
    layer = nn.Linear(32, 32)
    assert layer_roles(seeded(lambda: nn.Sequential(layer)), noise(2, 4, 32))["0"] == (
        "patch_embed",
        "final_projection",
    )
    head = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 10))
    assert layer_roles(seeded(lambda: head), noise(2, 32)) == {"1": ("classifier",)}


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


class Probabilities(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(dim=1)


def test_a_softmax_over_the_logits_hides_no_classifier() -> None:
    assert layer_roles(Probabilities().eval(), noise(2, 8))["c"] == ("classifier",)


def test_tokens_begin_behind_the_stem() -> None:
    roles = layer_roles(seeded(StemViT), images(2))
    stem = {name.rpartition(".")[2]: found for name, found in roles.items() if ".stem." in name}
    assert stem == {"wide": (), "wider": (), "tokens": ("patch_embed",)}
    assert tap_roles(seeded(StemViT), images(2))[0] == ("body.stem.tokens", "patch_embed")


def test_convolutions_of_one_pixel_have_the_roles_of_linears() -> None:
    roles = layer_roles(seeded(PixelPyramid), images(2))
    named = {name: found[0] for name, found in roles.items() if found}
    stage = {
        "mix.wide": "attention_qkv",
        "mix.back": "attention_proj",
        "feed.up": "mlp",
        "feed.down": "mlp",
    }
    assert named == {
        "stem.tokens": "patch_embed",
        **{f"stages.{i}.{name}": role for i in range(2) for name, role in stage.items()},
        "logits": "classifier",
    }


class SampledTokens(nn.Module):
    """Each token reads the map where it says itself, as in "Deformable DETR" (ICLR 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(2, 32, 4, stride=4), nn.LayerNorm(32)
        self.places, self.moves = nn.Linear(32, 2), nn.Linear(32, 2)
        self.values, self.back = nn.Linear(32, 32), nn.Linear(32, 32)
        self.classes, self.boxes = (
            nn.Linear(32, 3),
            nn.ModuleList(nn.Linear(32, size) for size in (32, 32, 4)),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(x)
        tokens = x.flatten(2).mT
        at = self.places(tokens).sigmoid() + self.moves(tokens)
        found = F.grid_sample(self.values(tokens).mT.unflatten(2, x.shape[2:]), at[:, None] * 2 - 1)
        tokens = self.norm(tokens + self.back(found.squeeze(2).mT))
        first, second, last = self.boxes
        return self.classes(tokens), last(second(first(tokens).relu()).relu())


def test_what_says_places_to_sample_makes_no_mlp() -> None:
    roles = layer_roles(seeded(SampledTokens), images(2))
    assert roles == {
        "embed": ("patch_embed",),
        **dict.fromkeys(("places", "moves", "values", "back"), ()),
        **dict.fromkeys(("boxes.0", "boxes.1"), ("mlp",)),
        **dict.fromkeys(("boxes.2", "classes"), ("classifier",)),
    }


def test_heads_with_and_without_hidden_layers_share_the_final_norm() -> None:
    taps = tap_roles(seeded(SampledTokens), images(2))
    assert [name for name, role in taps if role == "final_projection"] == ["norm"]


MIXERS: tuple[type[TokenMixer], ...] = (
    TalkingHeads,
    LinearAttention,
    ChannelAttention,
    AddedQueries,
    BatchedProducts,
    Einsum,
)


@pytest.mark.parametrize("mixer", MIXERS, ids=lambda mixer: mixer.__name__)
@pytest.mark.parametrize("scaled", [False, True])
def test_attention_is_known_by_its_products_however_it_is_written(
    mixer: type[TokenMixer], scaled: bool
) -> None:
    model = seeded(lambda: Spatial(mixer(), scaled))
    named = {name: found[0] for name, found in layer_roles(model, images(2)).items() if found}
    assert named == {
        "stem": "patch_embed",
        "mix.wide": "attention_qkv",
        "mix.back": "attention_proj",
        "feed.up": "mlp",
        "feed.down": "mlp",
        "logits": "classifier",
    }
    taps = tap_roles(model, images(2))
    assert [role for _, role in taps] == ["patch_embed", "stage_end", "final_projection"]


def test_weights_that_a_layer_computes_from_tokens_make_an_attention() -> None:
    roles = layer_roles(seeded(lambda: Spatial(WeightsFromTokens())), images(2))
    assert roles["mix.weights"] == roles["mix.values"] == ("attention_qkv",)
    assert roles["mix.back"] == ("attention_proj",)


def test_attention_of_a_class_token_alone_is_a_stage_of_its_own() -> None:
    model = seeded(ClassTokens)
    roles = layer_roles(model, images(2))
    for name, role in (
        ("ask", "attention_qkv"),
        ("keys", "attention_qkv"),
        ("back", "attention_proj"),
    ):
        assert roles[f"look.{name}"] == (role,)
    ends = [name for name, role in tap_roles(model, images(2)) if role == "stage_end"]
    assert [name.partition("_")[0] for name in ends] == ["body.layers.0", "add"]


class LearnedQueries(nn.Module):
    """A decoder: learned queries look at the encoder's tokens, and give a start for each box
    that depends on no image ("Deformable DETR")."""

    def __init__(self) -> None:
        super().__init__()
        self.body = TinyViT(Shape(depth=1, classes=0))
        self.queries = nn.Parameter(torch.randn(6, 32))
        self.start, self.ask, self.key = nn.Linear(32, 4), nn.Linear(32, 32), nn.Linear(32, 32)
        self.val, self.back, self.logits = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 10)
        self.boxes, self.norm = nn.Linear(32, 4), nn.LayerNorm(32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.body(x)
        queries = self.queries.expand(x.shape[0], -1, -1)
        start = self.start(queries).sigmoid()
        q, k, v = (y[:, None] for y in (self.ask(queries), self.key(tokens), self.val(tokens)))
        found = self.norm(queries + self.back(F.scaled_dot_product_attention(q, k, v).squeeze(1)))
        return self.logits(found), self.boxes(found) + start


def test_what_depends_on_the_batch_size_alone_is_no_classifier_and_is_not_tapped() -> None:
    roles = layer_roles(seeded(LearnedQueries), images(2))
    assert roles["start"] == ()
    assert roles["logits"] == roles["boxes"] == ("classifier",)
    assert roles["ask"] == ("attention_qkv",)
    assert tap_roles(seeded(LearnedQueries), images(2)) == [
        ("body.stem", "patch_embed"),
        ("body.layers.0", "stage_end"),
        ("norm", "final_projection"),
    ]


class Hybrid(nn.Module):
    """A residual convolutional network in front of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 16, 3, padding=1)
        self.near, self.nearer = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.body = TinyViT(Shape(depth=1))
        self.body.stem = nn.Conv2d(16, 32, 4, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.relu(x + self.nearer(F.relu(self.near(x))))
        return self.body(x)


def test_what_lies_before_the_tokens_has_no_role_and_ends_no_stage() -> None:
    roles = layer_roles(seeded(Hybrid), images(2))
    assert roles["body.stem"] == ("patch_embed",)
    assert {roles[name] for name in ("first", "near", "nearer")} == {()}
    ends = [name for name, role in tap_roles(seeded(Hybrid), images(2)) if role == "stage_end"]
    assert ends == ["body.layers.0"]
