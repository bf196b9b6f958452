"""A small vision transformer on scikit-learn's handwritten digits: 1,797 real 8x8 images.

This is a complete model file for gpusq-compile. The compiler finds the functions by name:

    gpusq-compile examples/digits_vit.py --rules int8 -o out/digits

`train_digits_vit.py` made the weights beside it. 360 images, 36 of each digit, are held out:
they are what `eval_data` returns, and neither training nor calibration sees them.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, default_collate

WEIGHTS = Path(__file__).with_suffix(".safetensors")

IMAGE_SIZE = 8
CLASSES = 10
HELD_OUT_PER_CLASS = 36
SPLIT_SEED = 0
BATCH_SIZE = 64
# Pixels are 0 to 16; mean and standard deviation over the 1,437 training images.
PIXEL_MEAN, PIXEL_STD = 4.8914, 6.0167


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_ratio * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Cuts images of shape (B, 1, 8, 8) into tokens of shape (B, 16, dim)."""

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, dim, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Images of shape (B, 1, 8, 8) to logits of shape (B, 10)."""

    def __init__(
        self, dim: int = 64, depth: int = 4, heads: int = 4, mlp_ratio: int = 4, patch: int = 2
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(dim, patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, (IMAGE_SIZE // patch) ** 2, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, mlp_ratio) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, CLASSES)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x) + self.pos_embed
        x = self.norm(self.blocks(x))
        return self.head(x.mean(dim=1))


@lru_cache(maxsize=1)
def _split() -> tuple[TensorDataset, TensorDataset]:
    """The training part and the held-out part, always the same images in the same order."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn: pip install 'gpusq-compile[examples]'"
        ) from error
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1)
    images = (images - PIXEL_MEAN) / PIXEL_STD
    labels = torch.from_numpy(digits.target).long()

    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    per_class = [order[labels[order] == digit] for digit in range(CLASSES)]
    held_out = torch.cat([indices[:HELD_OUT_PER_CLASS] for indices in per_class]).sort().values
    train = torch.cat([indices[HELD_OUT_PER_CLASS:] for indices in per_class]).sort().values
    return (
        TensorDataset(images[train], labels[train]),
        TensorDataset(images[held_out], labels[held_out]),
    )


def _shifted(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Collates a batch, moving each image by up to one pixel each way."""
    images, labels = default_collate(samples)
    black = (0.0 - PIXEL_MEAN) / PIXEL_STD
    padded = F.pad(images, (1, 1, 1, 1), value=black)
    windows = padded.unfold(2, IMAGE_SIZE, 1).unfold(3, IMAGE_SIZE, 1)  # (B, 1, 3, 3, 8, 8)
    down, right = torch.randint(0, 3, (2, len(images)))
    return windows[torch.arange(len(images)), :, down, right], labels


def model() -> nn.Module:
    """The trained model, in eval mode."""
    if not WEIGHTS.is_file():
        raise FileNotFoundError(
            f"{WEIGHTS} is missing; make it with: python {WEIGHTS.parent / 'train_digits_vit.py'}"
        )
    vit = VisionTransformer()
    vit.load_state_dict(load_file(WEIGHTS))
    return vit.eval()


def example_inputs() -> tuple[Tensor, ...]:
    """One batch as `model` takes it: float32, normalised, shape (2, 1, 8, 8)."""
    images, _ = _split()[1][:2]
    return (images,)


def train_data() -> DataLoader[tuple[Tensor, ...]]:
    """1,437 images in (inputs, labels) batches; order and shifts follow torch's global seed."""
    return DataLoader(_split()[0], batch_size=BATCH_SIZE, shuffle=True, collate_fn=_shifted)


def calibration_data() -> DataLoader[tuple[Tensor, ...]]:
    """The training images as they are, in a fixed order."""
    return DataLoader(_split()[0], batch_size=BATCH_SIZE)


def eval_data() -> DataLoader[tuple[Tensor, ...]]:
    """The 360 held-out images in (inputs, labels) batches."""
    return DataLoader(_split()[1], batch_size=BATCH_SIZE)
