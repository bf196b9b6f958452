"""Vision transformers of the libraries compile as they are, each for what is unusual in it.

Of every layer it is said whether it is compressed, and if not, why. All are a block or two of a
few channels, built from a configuration: nothing is downloaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpusq_compile import compile_model
from gpusq_compile.graph.query import value_dependent
from gpusq_compile.plan import TAP_PLAN
from tests.compilations import TAPS, begin, make_rules, plans_of, run_until
from tests.tiny_transformers import SEGFORMER

timm: Any = pytest.importorskip("timm")
torchvision: Any = pytest.importorskip("torchvision")
transformers: Any = pytest.importorskip("transformers")

RULES: dict[str, Any] = {
    "version": 1,
    "extends": "int8",
    "target": {"precision": "fp32"},
    "rules": [
        {
            "id": "gemms",
            "match": {
                "op": ["linear", "conv2d"],
                "kernel_size": 1,
                "in_features": {"multiple_of": 32},
                "out_features": {"multiple_of": 32},
            },
            "sparsity": {"pattern": "2:4"},
            "quantize": {"weight": "int8", "output": "auto"},
        }
    ],
    "calibration": {"batches": 1},
}
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}
PLAIN: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 64,
    "num_heads": 2,
    "depth": 1,
}


class Tower(nn.Module):
    """A model of transformers by its pixels alone, with the first of its outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        found: Tensor = self.model(pixel_values=pixel_values)[0]
        return found


def hf(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return Tower(getattr(transformers, model)(getattr(transformers, config)(**settings)))

    return build


def of_timm(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model: nn.Module = timm.create_model(name, **settings)
        return model

    return build


def pyramid(**more: Any) -> dict[str, Any]:
    return {"embed_dim": 32, "depths": [1, 1], "num_heads": [1, 2], "window_size": [4, 4]} | more


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "class attention, talking heads": (of_timm("cait_xxs24_224", **PLAIN, depth_token_only=1), 32),
    "relative positions": (of_timm("beit_base_patch16_224", **PLAIN), 32),
    "rotary positions, gated units": (of_timm("eva02_tiny_patch14_224", **PLAIN, mlp_ratio=2), 32),
    "register tokens": (of_timm("vit_small_patch14_reg4_dinov2", **PLAIN), 32),
    "channel attention, stem": (
        of_timm("xcit_nano_12_p16_224", depth=1, embed_dim=64, num_heads=2),
        64,
    ),
    "one-pixel convolutions": (
        of_timm("levit_conv_128s", embed_dim=(64, 64), key_dim=16, num_heads=(2, 2), depth=(1, 1)),
        224,
    ),
    "two positions tables": (of_timm("convit_tiny", **PLAIN), 32),
    "windows in blocks": (
        lambda: timm.models.nest.Nest(
            32, 3, 4, num_levels=2, embed_dims=(32, 64), num_heads=(1, 2), depths=(1, 1)
        ),
        32,
    ),
    "multihead module": (
        lambda: torchvision.models.VisionTransformer(32, 8, 1, 2, 64, 128, num_classes=10),
        32,
    ),
    "windows, cosine attention": (
        lambda: torchvision.models.SwinTransformer(
            [4, 4], **pyramid(), block=torchvision.models.swin_transformer.SwinTransformerBlockV2
        ),
        32,
    ),
    "hf vit": (hf("ViTForImageClassification", "ViTConfig", **SMALL), 32),
    "hf deit": (hf("DeiTForImageClassificationWithTeacher", "DeiTConfig", **SMALL), 32),
    "hf beit": (
        hf("BeitForImageClassification", "BeitConfig", use_relative_position_bias=True, **SMALL),
        32,
    ),
    "hf dinov2": (hf("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **SMALL), 32),
    "hf dinov3": (hf("DINOv3ViTModel", "DINOv3ViTConfig", **SMALL), 32),
    "hf clip": (hf("CLIPVisionModelWithProjection", "CLIPVisionConfig", **SMALL), 32),
    "hf siglip": (hf("SiglipVisionModel", "SiglipVisionConfig", **SMALL), 32),
    "hf swin": (
        hf(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=32,
            **{**pyramid(), "window_size": 4},
        ),
        32,
    ),
    "hf segformer": (
        hf(
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            **{**SEGFORMER, "decoder_hidden_size": 64},
        ),
        64,
    ),
}


CLASSIFIER = "left dense by rule dense-classifier"
UNASKED = "no rule asks for its kernel and sizes"
CONSTANT = "its input is a constant, so the layer runs once, when the engine is built"

LAYERS: dict[str, tuple[int, dict[str, str]]] = {
    "class attention, talking heads": (
        11,
        {"blocks.0.attn.proj_l": UNASKED, "blocks.0.attn.proj_w": UNASKED, "head": CLASSIFIER},
    ),
    "relative positions": (5, {"head": CLASSIFIER}),
    "rotary positions, gated units": (5, {}),
    "register tokens": (5, {}),
    "channel attention, stem": (
        16,
        {
            "patch_embed.proj.0.0": UNASKED,
            "patch_embed.proj.2.0": UNASKED,
            "patch_embed.proj.4.0": UNASKED,
            "patch_embed.proj.6.0": UNASKED,
            "pos_embed.token_projection": CONSTANT,
            "blocks.0.local_mp.conv1": UNASKED,
            "blocks.0.local_mp.conv2": UNASKED,
            "head": CLASSIFIER,
        },
    ),
    "one-pixel convolutions": (
        13,
        {
            "stem.conv1.linear": UNASKED,
            "stem.conv2.linear": UNASKED,
            "stem.conv3.linear": UNASKED,
            "stem.conv4.linear": UNASKED,
            "head.linear": CLASSIFIER,
            "head_dist.linear": CLASSIFIER,
        },
    ),
    "two positions tables": (6, {"blocks.0.attn.pos_proj": UNASKED, "head": CLASSIFIER}),
    "windows in blocks": (
        8,
        {"patch_embed.proj": UNASKED, "levels.1.pool.conv": UNASKED, "head": CLASSIFIER},
    ),
    "multihead module": (5, {"heads.head": CLASSIFIER}),
    "windows, cosine attention": (
        9,
        {
            "features.0.0": UNASKED,
            "features.1.0.attn.cpb_mlp.0": UNASKED,
            "features.1.0.attn.cpb_mlp.2": UNASKED,
            "features.3.0.attn.cpb_mlp.0": UNASKED,
            "features.3.0.attn.cpb_mlp.2": UNASKED,
            "head": CLASSIFIER,
        },
    ),
    "hf vit": (7, {"model.classifier": CLASSIFIER}),
    "hf deit": (
        7,
        {"model.cls_classifier": CLASSIFIER, "model.distillation_classifier": CLASSIFIER},
    ),
    "hf beit": (7, {"model.classifier": CLASSIFIER}),
    "hf dinov2": (7, {}),
    "hf dinov3": (7, {}),
    "hf clip": (7, {"model.visual_projection": CLASSIFIER}),
    "hf siglip": (7, {}),
    "hf swin": (
        13,
        {
            "model.swin.embeddings.patch_embeddings.projection": UNASKED,
            "model.classifier": CLASSIFIER,
        },
    ),
    "hf segformer": (
        16,
        {
            "model.segformer.stages.0.patch_embeddings.proj": UNASKED,
            "model.segformer.stages.0.blocks.0.mlp.dwconv.dwconv": UNASKED,
            "model.segformer.stages.1.patch_embeddings.proj": UNASKED,
            "model.segformer.stages.1.blocks.0.mlp.dwconv.dwconv": UNASKED,
            "model.decode_head.classifier": CLASSIFIER,
        },
    ),
}
"""How many layers are compressed, and why each of the others is not."""


def why_left(layer: dict[str, Any]) -> str:
    """Why a layer was left as it is: the reason of a refusal, or what the rules ask of it."""
    if any(layer["requested"].values()):
        assert layer["reasons"], layer["name"]
        return "; ".join(layer["reasons"])
    assert layer["reasons"] == []
    asking = [rule for rule in layer["rules"] if not rule.endswith(": distill")]
    if not asking:
        rows, columns, *kernel = layer["shape"]
        assert rows % 32 or columns % 32 or max(kernel, default=1) > 1, layer["name"]
        return UNASKED
    assert "dense-classifier" in asking[-1]
    assert "classifier" in layer["roles"]
    return CLASSIFIER


def test_every_model_has_its_layers_counted() -> None:
    assert LAYERS.keys() == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_it_compiles_with_every_fitting_layer_sparse_and_int8(name: str) -> None:
    build, size = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, images = build().eval(), torch.randn(2, 3, size, size)
    result = compile_model(
        model,
        (images,),
        rules=RULES,
        calibration_data=[images],
        finetune=False,
        engine="none",
    )
    layers = result.report["layers"]
    assert result.report["verify"]["ok"]
    for layer in layers:
        if any(layer["applied"].values()):
            assert layer["applied"]["sparsity"] == "2:4", layer["name"]
            assert layer["applied"]["weight"] == "int8", layer["name"]
            assert layer["applied"] == layer["requested"], layer["name"]
    left = {
        layer["name"]: why_left(layer) for layer in layers if not any(layer["applied"].values())
    }
    assert (len(layers) - len(left), left) == LAYERS[name]
    roles = Counter(role for layer in layers for role in layer["roles"])
    assert roles["patch_embed"] == 1
    assert min(roles[role] for role in ("attention_qkv", "attention_proj", "mlp")) > 0


def ends_of_stages(model: nn.Module, images: Tensor) -> list[str]:
    """The modules of the stage ends that are tapped."""
    marked = run_until(begin(model, images, make_rules(TAPS)), "mark")
    plans = [node.meta[TAP_PLAN] for node in marked.ir.graph.nodes if TAP_PLAN in node.meta]
    return [plan.name.rpartition(".")[0] for plan in plans if plan.role == "stage_end"]


def test_generators_of_global_queries_make_no_stages() -> None:
    model = timm.models.gcvit.GlobalContextVit(
        img_size=(64, 64), embed_dim=16, depths=(2, 2, 2, 2), num_heads=(1, 1, 2, 2)
    )
    assert ends_of_stages(model.eval(), torch.randn(2, 3, 64, 64)) == [
        "stages.1.downsample.conv_block",
        "stages.2.downsample.conv_block",
        "stages.3.downsample.conv_block",
        "stages.3.blocks.1",
    ]


def test_reference_points_of_learned_queries_are_no_classifier() -> None:
    backbone = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage3", "stage4"],
    )
    small = {"encoder_layers": 1, "decoder_layers": 2, "d_model": 32, "num_queries": 4}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_feature_levels": 2}
    config = transformers.DeformableDetrConfig(
        use_timm_backbone=False, backbone_config=backbone, **small, **heads
    )
    detector = transformers.DeformableDetrForObjectDetection(config).eval()
    marked = run_until(begin(detector, torch.randn(2, 3, 64, 64), make_rules(TAPS)), "mark")
    classifiers = {n for n, plan in plans_of(marked).items() if "classifier" in plan.roles}
    assert {name.partition(".")[0] for name in classifiers} == {"class_embed", "bbox_embed"}
    tapped = [node for node in marked.ir.graph.nodes if TAP_PLAN in node.meta]
    assert len(tapped) >= 3
    assert value_dependent(marked.ir.graph).issuperset(tapped)
