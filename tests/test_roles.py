"""Roles are found from the dataflow: the same part of a network has the same role, however it is
written, and no name of a library decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpusq_compile.errors import InputError
from gpusq_compile.graph.query import static_shape
from gpusq_compile.graph.roles import ROLES
from gpusq_compile.plan import TAP_PLAN
from tests.compilations import TAPS, begin, make_rules, plans_of, remarks_of, run_until
from tests.models import Block, Shape, TinyPyramid, TinyViT, images, noise, seeded
from tests.unusual_transformers import (
    AddedQueries,
    BatchedProducts,
    ChannelAttention,
    ClassTokens,
    Einsum,
    LinearAttention,
    PixelPyramid,
    QueriesFromTheSide,
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


def test_a_layer_that_is_compiled_alone_is_no_classifier() -> None:
    layer = nn.Linear(32, 32)
    assert layer_roles(seeded(lambda: nn.Sequential(layer)), noise(2, 4, 32))["0"] == (
        "patch_embed",
        "final_projection",
    )
    head = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 10))
    assert layer_roles(seeded(lambda: head), noise(2, 32)) == {"1": ("classifier",)}


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


def test_a_stage_may_begin_with_two_branches_and_end_in_a_batch_norm() -> None:
    assert tap_roles(seeded(PixelPyramid), images(2)) == [
        ("stem.tokens", "patch_embed"),
        ("stages.0", "stage_end"),
        ("stages.1", "stage_end"),
        ("last", "final_projection"),
    ]


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


def test_what_only_makes_queries_for_the_blocks_ends_no_stage() -> None:
    taps = tap_roles(seeded(QueriesFromTheSide), images(2, size=(2, 32, 32)))
    ends = [name for name, role in taps if role == "stage_end"]
    assert ends == ["stages.0", "stages.1"]


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


NAMED = [
    ("stage_end", ["layers.0", "layers.2"], ["layers.0", "layers.2"]),
    ("stage_end", "layers.*", ["layers.0", "layers.1", "layers.2"]),
    ("stage_end", "layers.1.feed", ["layers.1.feed.down"]),
    ("stage_end", [], []),
    ("final_projection", "layers.2.between", ["layers.2.between"]),
    ("patch_embed", "layers.0.mix.wide", ["layers.0.mix.wide"]),
]


@pytest.mark.parametrize(("role", "names", "expected"), NAMED)
def test_rules_name_the_layers_of_a_role(role: str, names: Any, expected: list[str]) -> None:
    rules = make_rules(TAPS, roles={role: names})
    marked = run_until(begin(seeded(TinyViT, Shape(depth=3)), images(2), rules), "mark")
    plans = [node.meta[TAP_PLAN] for node in marked.ir.graph.nodes if TAP_PLAN in node.meta]
    found = [plan.name.rpartition(".add")[0] or plan.name for plan in plans if plan.role == role]
    assert found == expected
    others = {"patch_embed", "stage_end", "final_projection"} - {role}
    assert others <= {plan.role for plan in plans}


def test_a_module_stands_for_its_layers_where_a_role_is_one_of_layers() -> None:
    rules = make_rules(TAPS, roles={"mlp": ["layers.0.mix", "layers.1.feed.up"]})
    marked = run_until(begin(seeded(TinyViT), images(2), rules), "mark")
    named = [name for name, plan in plans_of(marked).items() if "mlp" in plan.roles]
    assert named == ["layers.0.mix.wide", "layers.0.mix.back", "layers.1.feed.up"]


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


def test_a_role_of_layers_for_a_norm_is_an_error_that_says_so(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(
        "version: 1\nroles: {mlp: last_norm}\n"
        "rules: [{id: a, match: {op: linear}, quantize: none}]\n"
    )
    with pytest.raises(InputError, match="'last_norm' names a layer_norm, and this role"):
        run_until(begin(seeded(TinyViT), images(2), str(file)), "mark")


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


def test_a_role_for_a_name_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(
        "version: 1\nroles:\n  stage_end: [layers.0, layer.1]\n"
        "rules: [{id: a, match: {op: linear}, quantize: none}]\n"
    )
    with pytest.raises(InputError) as caught:
        run_until(begin(seeded(TinyViT), images(2), str(file)), "mark")
    assert caught.value.code == "role-unmatched"
    assert str(caught.value.location).endswith("rules.yaml:3:14")
    assert "'layer.1'" in caught.value.message
    assert "'layers.1'" in (caught.value.hint or "")


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
