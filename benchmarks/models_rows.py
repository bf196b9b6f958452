"""The rows of `models.py`: which models are compiled, and how each is named on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """A model to compile.

    `spec` is what the command line takes (a path is relative to the repository), or where `config`
    is set the transformers configuration of it, which is written to a file for `hf:FILE`.
    `environment` picks a size in a model file that has several. `verify` replaces limits of the
    rules. `aim_seconds` is what the compile should take on 2 cores without the engine.
    """

    name: str
    family: str
    spec: str = ""
    config: Mapping[str, Any] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    verify: Mapping[str, float] = field(default_factory=dict)
    aim_seconds: float | None = None


UNDECIDED = {"min_top1_agreement": 0.0}
"""For a classifier with random weights and images of its own: its best classes nearly tie, so which
of them wins says nothing. Everything else is verified as always."""


def timm(family: str, name: str, **rest: Any) -> Row:
    return Row(name, family, f"timm:{name}", **rest)


def torchvision(family: str, name: str) -> Row:
    return Row(f"torchvision {name}", family, f"torchvision:{name}")


def example(
    family: str,
    file: str,
    *,
    scope: str | None = None,
    verify: Mapping[str, float] | None = None,
    **environment: str,
) -> Row:
    name = " ".join([file, *environment.values()])
    arguments = ("--scope", scope) if scope else ()
    path = f"examples/{file}.py"
    return Row(
        name, family, path, environment=environment, arguments=arguments, verify=verify or {}
    )


def transformers(family: str, architecture: str, **config: Any) -> Row:
    """A model of transformers in the size that its configuration has by default."""
    return Row(architecture, family, config={"architectures": [architecture], **config})


def classifier(family: str, architecture: str, **config: Any) -> Row:
    """One of ImageNet's classes, as timm's are: by default they would be two, and of two logits
    of random weights any rounding turns the direction."""
    return transformers(family, architecture, num_labels=1000, **config)


FAMILIES: tuple[Row, ...] = (
    timm("DeiT", "deit_tiny_patch16_224"),
    timm("DeiT", "deit_small_patch16_224"),
    timm("DeiT", "deit_base_patch16_224", aim_seconds=60),
    timm("DeiT distilled", "deit_tiny_distilled_patch16_224"),
    timm("DeiT distilled", "deit_small_distilled_patch16_224"),
    timm("DeiT distilled", "deit_base_distilled_patch16_224"),
    timm("Swin", "swin_tiny_patch4_window7_224"),
    timm("Swin", "swin_small_patch4_window7_224"),
    timm("Swin", "swin_base_patch4_window7_224", aim_seconds=90),
    timm("Swin 384", "swin_base_patch4_window12_384"),
    timm("SwinV2", "swinv2_tiny_window8_256"),
    timm("SwinV2", "swinv2_small_window8_256"),
    timm("SwinV2", "swinv2_base_window8_256"),
    example("A-ViT", "avit", verify=UNDECIDED, AVIT="tiny"),
    example("A-ViT", "avit", verify=UNDECIDED, AVIT="small"),
    example("Mask R-CNN", "mask_rcnn_swin", scope="backbone", SWIN="tiny"),
    example("Mask R-CNN", "mask_rcnn_swin", scope="backbone", SWIN="small"),
    example("Cascade Mask R-CNN", "cascade_mask_rcnn_swin", scope="backbone", SWIN="tiny"),
    example("Cascade Mask R-CNN", "cascade_mask_rcnn_swin", scope="backbone", SWIN="small"),
    example("Cascade Mask R-CNN", "cascade_mask_rcnn_swin", scope="backbone", SWIN="base"),
    example("DETR", "detr_r50"),
    Row(
        "deformable_detr_r50",
        "Deformable DETR",
        "examples/deformable_detr_r50.py",
        aim_seconds=60,
    ),
    example("UperNet", "upernet_swin", UPERNET="tiny"),
    example("UperNet", "upernet_swin", UPERNET="small"),
    example("UperNet", "upernet_swin", UPERNET="base"),
)
"""The families of the GPUSQ-ViT paper, in its sizes."""

OTHERS: tuple[Row, ...] = (
    timm("class attention", "cait_xxs24_224"),
    timm("class attention", "xcit_tiny_12_p16_224"),
    timm("class attention", "volo_d1_224"),
    timm("relative positions", "beit_base_patch16_224"),
    timm("relative positions", "vit_relpos_small_patch16_224"),
    timm("relative positions", "convit_tiny"),
    timm("rotary embedding", "eva02_tiny_patch14_224"),
    timm("register tokens", "vit_little_patch16_reg4_gap_256"),
    timm("attention pooling", "vit_base_patch16_siglip_224"),
    timm("convolutional stem", "vit_tiny_r_s16_p8_224"),
    timm("convolutional stem", "levit_128"),
    timm("convolutional stem", "mobilevit_s"),
    timm("windows and grids", "maxvit_tiny_tf_224"),
    timm("windows and grids", "coatnet_0_rw_224"),
    timm("windows and grids", "twins_svt_small"),
    timm("windows and grids", "nest_tiny"),
    timm("pyramid", "pvt_v2_b1"),
    timm("pyramid", "hiera_tiny_224"),
    timm("pyramid", "mvitv2_tiny"),
    timm("pyramid", "davit_tiny"),
    timm("pyramid", "pit_ti_224"),
    timm("two branches", "crossvit_tiny_240"),
    timm("two branches", "tnt_s_legacy_patch16_224"),
    torchvision("torchvision", "vit_b_16"),
    torchvision("torchvision", "swin_v2_t"),
    torchvision("torchvision", "maxvit_t"),
    classifier("transformers", "ViTForImageClassification", model_type="vit"),
    classifier("transformers", "DeiTForImageClassification", model_type="deit"),
    classifier("transformers", "SwinForImageClassification", model_type="swin"),
    classifier("transformers", "BeitForImageClassification", model_type="beit"),
    classifier("transformers", "Dinov2ForImageClassification", model_type="dinov2"),
    transformers("transformers", "SegformerForSemanticSegmentation", model_type="segformer"),
    transformers("transformers", "CLIPVisionModel", model_type="clip_vision_model"),
    transformers("transformers", "SiglipVisionModel", model_type="siglip_vision_model"),
)
"""Any other vision transformer, by what is unusual about it."""

ROWS: tuple[Row, ...] = (*FAMILIES, *OTHERS)
