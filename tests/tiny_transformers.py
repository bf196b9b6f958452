"""Tiny transformers models, as folders with a config.json and perhaps weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers: Any = pytest.importorskip("transformers")

VIT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
SWIN: dict[str, Any] = {
    "image_size": 64,
    "patch_size": 4,
    "embed_dim": 32,
    "depths": [1, 1],
    "num_heads": [2, 4],
    "window_size": 4,
}
DETR: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_queries": 6,
    "num_labels": 3,
}
SEGFORMER: dict[str, Any] = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [32, 64],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 32,
}


def resnet(*stages: str) -> Any:
    return transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        out_features=list(stages),
    )


def config_of(kind: str) -> Any:
    """A tiny configuration by the name of its class, with that class among its architectures."""
    t = transformers
    made = {
        "ViTForImageClassification": lambda: t.ViTConfig(**VIT, num_labels=4),
        "SwinForImageClassification": lambda: t.SwinConfig(**SWIN, num_labels=4),
        "CLIPModel": lambda: t.CLIPConfig(text_config=TEXT, vision_config=VIT),
        "SiglipModel": lambda: t.SiglipConfig(text_config=TEXT, vision_config=VIT),
        "DetrForObjectDetection": lambda: t.DetrConfig(
            **DETR, backbone_config=resnet("stage4"), auxiliary_loss=True
        ),
        "DeformableDetrForObjectDetection": lambda: t.DeformableDetrConfig(
            **DETR,
            backbone_config=resnet("stage2", "stage3", "stage4"),
            num_feature_levels=3,
        ),
        "YolosForObjectDetection": lambda: t.YolosConfig(
            **{**VIT, "image_size": [32, 48]}, num_detection_tokens=5, num_labels=3
        ),
        "SegformerForSemanticSegmentation": lambda: t.SegformerConfig(**SEGFORMER, num_labels=3),
        "Dinov2Backbone": lambda: t.Dinov2Config(**VIT, out_features=["stage1", "stage2"]),
        "BertModel": lambda: t.BertConfig(**TEXT),
    }
    config = made[kind]()
    config.architectures = [kind]
    return config


def save_config(kind: str, folder: Path, **processor: Any) -> Path:
    """A folder with a config.json and, if anything is said of it, a preprocessor_config.json."""
    config_of(kind).save_pretrained(folder)
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def save_model(kind: str, folder: Path) -> Any:
    """A folder with safetensors weights too; returns the model."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config_of(kind)).eval()
    model.save_pretrained(folder)
    return model
