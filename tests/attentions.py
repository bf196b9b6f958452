"""Attentions written in the ways that libraries write them, in a small network around each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values [B, heads, tokens, head_dim] -> [B, heads, tokens, head_dim]."""

ATTENTION_INT8: dict[str, Any] = {
    "id": "attention",
    "match": {"op": "attention"},
    "quantize": {"weight": "none", "activation": "int8", "output": "auto"},
}
LINEARS_INT8: dict[str, Any] = {
    "id": "linears",
    "match": {"op": "linear"},
    "quantize": {"weight": "int8"},
}


class Mixer(nn.Module):
    """A fused QKV linear, `mix`, and a projection: [B, tokens, dim] -> [B, tokens, dim]."""

    def __init__(self, mix: Mix, *, dim: int = 64, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.mix = mix
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        parts = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(self.mix(q, k, v).transpose(1, 2).reshape(batch, -1, dim))


class Around(nn.Module):
    """`attn` between a norm and a residual add, as in every block, and a head behind it."""

    def __init__(self, attn: nn.Module, dim: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attn = attn
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.attn(self.norm(x))).mean(dim=1))


class Stack(nn.Module):
    """Blocks of one width whose attentions have different numbers of heads."""

    def __init__(self, heads: tuple[int, ...], dim: int = 64) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mixer(fused(), dim=dim, heads=count) for count in heads)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(dim=1))


class WindowAttention(nn.Module):
    """Attention in windows as Swin has it: a learned bias, and a mask that differs by window.

    [B, windows * size, dim] -> the same. `spelled_out` views the windows apart to mask them, as
    torchvision does; otherwise the mask is repeated over the batch, as timm does.
    """

    mask: Tensor

    def __init__(
        self, size: int, windows: int = 4, *, heads: int = 2, dim: int = 64, spelled_out: bool
    ) -> None:
        super().__init__()
        self.size, self.windows, self.heads = size, windows, heads
        self.spelled_out = spelled_out
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.randn(heads, size, size))
        hidden = torch.rand(windows, size, size) < 0.3
        self.register_buffer("mask", torch.zeros(windows, size, size).masked_fill(hidden, -100.0))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        x = x.reshape(-1, self.size, dim)
        parts = self.qkv(x).reshape(x.shape[0], self.size, 3, self.heads, dim // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mask = self.mask.view(1, self.windows, 1, self.size, self.size)
        shape = (-1, self.heads, self.size, self.size)
        if self.spelled_out:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + self.bias.unsqueeze(0)
            apart = scores.view(-1, self.windows, *shape[1:]) + mask
            x = apart.view(shape).softmax(dim=-1) @ v
        else:
            repeated = mask.expand(batch, -1, self.heads, -1, -1).reshape(shape)
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=repeated + self.bias)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))


def fused(**arguments: Any) -> Mix:
    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **arguments)

    return mix


def spelled_out(
    score: Callable[[Tensor], Tensor] = lambda scores: scores * 0.2, *, dim: int = -1
) -> Mix:
    """Attention whose scores go through `score` before the softmax over axis `dim`."""

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return score(q @ k.transpose(-2, -1)).softmax(dim=dim) @ v

    return mix
