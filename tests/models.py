"""Tiny real models: each is a whole network of one kind, small enough to compile in seconds.

All sizes that the shipped rules ask for (multiples of 32) hold, so that `int8` takes every linear
but the classifier. No library's names are used: what the compiler finds, it finds from the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE = (2, 8, 8)
CLASSES = 10

Attention = Literal["fused", "separate", "multihead", "softmax", "qk_norm"]
Mlp = Literal["gelu", "swiglu", "fused_swiglu"]
Pool = Literal["mean", "token"]


class FusedAttention(nn.Module):
    """One linear for queries, keys and values, cut by `unbind`; fused attention operator."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wide = nn.Linear(dim, 3 * dim)
        self.back = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        wide = self.wide(x).reshape(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = wide.permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.back(x.transpose(1, 2).reshape(batch, tokens, dim))


class SeparateAttention(nn.Module):
    """Three linears on one input; with `spelled_out` the softmax is written by hand."""

    def __init__(
        self, dim: int, heads: int, *, spelled_out: bool = False, norm: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        self.spelled_out = spelled_out
        self.ask = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim, bias=False)
        self.val = nn.Linear(dim, dim)
        self.back = nn.Linear(dim, dim)
        self.ask_norm = nn.LayerNorm(dim // heads) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape

        def by_head(y: Tensor) -> Tensor:
            return y.view(batch, tokens, self.heads, dim // self.heads).transpose(1, 2)

        q, k, v = self.ask_norm(by_head(self.ask(x))), by_head(self.key(x)), by_head(self.val(x))
        if self.spelled_out:
            scores = (q @ k.transpose(-2, -1)) * (dim // self.heads) ** -0.5
            y = scores.softmax(dim=-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.back(y.transpose(1, 2).reshape(batch, tokens, dim))


class LibraryAttention(nn.Module):
    """`nn.MultiheadAttention`, whose packed weight is a parameter and no module's `weight`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x, x, x, need_weights=False)[0]
        return y


def make_attention(kind: Attention, dim: int, heads: int) -> nn.Module:
    if kind == "fused":
        return FusedAttention(dim, heads)
    if kind == "multihead":
        return LibraryAttention(dim, heads)
    return SeparateAttention(dim, heads, spelled_out=kind == "softmax", norm=kind == "qk_norm")


class GeluMlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(2 * dim, dim)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down(F.gelu(self.up(x))))


class SwigluMlp(nn.Module):
    """`down(silu(gate(x)) * up(x))`; with `fused` gate and up are one linear."""

    def __init__(self, dim: int, *, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        if fused:
            self.both = nn.Linear(dim, 4 * dim)
        else:
            self.gate = nn.Linear(dim, 2 * dim)
            self.up = nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, dim=-1) if self.fused else (self.gate(x), self.up(x))
        return self.down(F.silu(gate) * up)


def make_mlp(kind: Mlp, dim: int) -> nn.Module:
    return GeluMlp(dim) if kind == "gelu" else SwigluMlp(dim, fused=kind == "fused_swiglu")


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, attention: Attention, mlp: Mlp) -> None:
        super().__init__()
        self.before = nn.LayerNorm(dim)
        self.mix = make_attention(attention, dim, heads)
        self.between = nn.LayerNorm(dim)
        self.feed = make_mlp(mlp, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.before(x))
        return x + self.feed(self.between(x))


@dataclass(frozen=True)
class Shape:
    """What a `TinyViT` is made of. `classes` 0 leaves the classifier out."""

    attention: Attention = "fused"
    mlp: Mlp = "gelu"
    pool: Pool = "mean"
    dim: int = 32
    depth: int = 2
    heads: int = 2
    classes: int = CLASSES


class TinyViT(nn.Module):
    """Images [B, 2, 8, 8] -> logits [B, classes], or tokens [B, 4, dim] without a classifier."""

    def __init__(self, shape: Shape | None = None) -> None:
        super().__init__()
        self.shape = shape = shape or Shape()
        self.stem = nn.Conv2d(IMAGE[0], shape.dim, kernel_size=4, stride=4)
        tokens = 4 + (shape.pool == "token")
        self.place = nn.Parameter(0.02 * torch.randn(1, tokens, shape.dim))
        self.token = (
            nn.Parameter(0.02 * torch.randn(1, 1, shape.dim)) if shape.pool == "token" else None
        )
        self.layers = nn.ModuleList(
            Block(shape.dim, shape.heads, shape.attention, shape.mlp) for _ in range(shape.depth)
        )
        self.last_norm = nn.LayerNorm(shape.dim)
        self.logits = nn.Linear(shape.dim, shape.classes) if shape.classes else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        if self.token is not None:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.place
        for layer in self.layers:
            x = layer(x)
        x = self.last_norm(x)
        if self.logits is None:
            return x
        return self.logits(x[:, 0] if self.token is not None else x.mean(dim=1))


class WindowBlock(nn.Module):
    """A block whose attention stays within windows of 2 x 2; feature maps are [B, H, W, C]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.before = nn.LayerNorm(dim)
        self.mix = FusedAttention(dim, 2)
        self.between = nn.LayerNorm(dim)
        self.feed = GeluMlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        y = self.before(x).view(batch, height // 2, 2, width // 2, 2, dim)
        y = self.mix(y.permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, dim))
        y = y.view(batch, height // 2, width // 2, 2, 2, dim).permute(0, 1, 3, 2, 4, 5)
        x = x + y.reshape(batch, height, width, dim)
        return x + self.feed(self.between(x))


class Merge(nn.Module):
    """Four neighbouring tokens become one of twice the width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.shrink = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        x = x.view(batch, height // 2, 2, width // 2, 2, dim).permute(0, 1, 3, 2, 4, 5)
        return self.shrink(self.norm(x.reshape(batch, height // 2, width // 2, 4 * dim)))


class TinyPyramid(nn.Module):
    """Four stages, as in a Swin transformer: images [B, 2, 32, 32] -> logits [B, 10]."""

    def __init__(self, dim: int = 16, stages: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(IMAGE[0], dim, kernel_size=2, stride=2)
        self.stem_norm = nn.LayerNorm(dim)
        self.stages = nn.ModuleList()
        for index in range(stages):
            merge = Merge(dim * 2 ** (index - 1)) if index else nn.Identity()
            self.stages.append(nn.Sequential(merge, WindowBlock(dim * 2**index)))
        self.last_norm = nn.LayerNorm(dim * 2 ** (stages - 1))
        self.logits = nn.Linear(dim * 2 ** (stages - 1), CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x).permute(0, 2, 3, 1))
        for stage in self.stages:
            x = stage(x)
        return self.logits(self.last_norm(x).mean(dim=(1, 2)))


class Perceptron(nn.Module):
    """Two linears: the smallest thing that every pass has something to do with."""

    def __init__(self, sizes: tuple[int, int, int] = (32, 64, 32)) -> None:
        super().__init__()
        first, hidden, last = sizes
        self.first = nn.Linear(first, hidden)
        self.second = nn.Linear(hidden, last)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(x)))


class Convolution(nn.Module):
    """One convolution alone, with the arguments of `nn.Conv2d`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Detector(nn.Module):
    """A user's model around a backbone: the backbone is called by keyword, inputs are prepared
    outside it, and the outputs are a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = TinyViT(Shape(classes=0, depth=1))
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.boxes = nn.Linear(32, 4)
        self.classes = nn.Linear(32, CLASSES)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        features = self.backbone(x=image * self.gain).mean(dim=1)
        return {"boxes": self.boxes(features), "classes": self.classes(features)}


def seeded(build: Any, *args: Any, seed: int = 0, **kwargs: Any) -> Any:
    """`build(*args, **kwargs)` with weights that are a function of `seed`, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build(*args, **kwargs).eval()


def noise(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values that are a function of `seed`: a test sees the same ones in every run."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def images(count: int, *, seed: int = 1, size: tuple[int, int, int] = IMAGE) -> Tensor:
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(seed))


def labelled(batches: int = 3, size: int = 8, *, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Images with labels that are a function of the image, so that there is something to learn."""
    generator = torch.Generator().manual_seed(7)
    directions = torch.randn(CLASSES, IMAGE[0] * IMAGE[1] * IMAGE[2], generator=generator)
    found = []
    for index in range(batches):
        batch = images(size, seed=1000 * seed + index)
        found.append((batch, (batch.flatten(1) @ directions.T).argmax(dim=1)))
    return found
