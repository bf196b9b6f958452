"""Transformers in unusual forms, none with a library's names: what roles are found in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import GeluMlp, Shape, TinyViT

DIM, HEADS, SIZE = 32, 2, 4


class Stem(nn.Module):
    """Two 3x3 convolutions with an activation between, and the convolution that makes tokens."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.wide = nn.Conv2d(2, 16, 3, padding=1)
        self.wide_norm = nn.BatchNorm2d(16)
        self.wider = nn.Conv2d(16, 16, 3, padding=1)
        self.tokens = nn.Conv2d(16, dim, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(F.relu(self.wider(F.relu(self.wide_norm(self.wide(x))))))


class StemViT(nn.Module):
    """A plain transformer behind a convolutional stem."""

    def __init__(self) -> None:
        super().__init__()
        self.body = TinyViT(Shape(depth=1))
        self.body.add_module("stem", Stem())
        self.body.place = nn.Parameter(torch.zeros(1, 16, DIM))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class PixelAttention(nn.Module):
    """Attention whose GEMMs are convolutions of one pixel: [B, dim, H, W] -> the same."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.wide = nn.Conv2d(dim, 3 * dim, 1)
        self.wide_norm = nn.BatchNorm2d(3 * dim)
        self.back = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, dim, height, width = x.shape
        parts = self.wide_norm(self.wide(x)).view(batch, 3, HEADS, dim // HEADS, height * width)
        q, k, v = parts.transpose(-2, -1).unbind(1)
        y = ((q @ k.transpose(-2, -1)) * 0.25).softmax(dim=-1) @ v
        return self.back(F.hardswish(y.transpose(-2, -1).reshape(batch, dim, height, width)))


class PixelMlp(nn.Module):
    """An MLP of 1x1 convolutions around one that keeps channels apart."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.up = nn.Conv2d(dim, 2 * dim, 1)
        self.near = nn.Conv2d(2 * dim, 2 * dim, 3, padding=1, groups=2 * dim)
        self.down = nn.Conv2d(2 * dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.near(self.up(x))))


class PixelStage(nn.Module):
    """Two residual units; `shrink` halves the map first, with weights on both branches."""

    def __init__(self, dim: int, wider: int | None = None) -> None:
        super().__init__()
        out = wider or dim
        self.side = nn.Conv2d(dim, out, 1, stride=2) if wider else None
        self.shrink = nn.Conv2d(dim, out, 3, stride=2, padding=1) if wider else None
        self.mix, self.feed = PixelAttention(out), PixelMlp(out)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        if self.side is not None and self.shrink is not None:
            x = self.side(x) + F.relu(self.shrink(x))
        x = x + self.mix(self.norm(x))
        return x + self.feed(x)


class PixelPyramid(nn.Module):
    """Two stages of convolutions and attention, no linear but the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Stem()
        self.stages = nn.ModuleList([PixelStage(DIM), PixelStage(DIM, 2 * DIM)])
        self.last = nn.BatchNorm1d(2 * DIM)
        self.logits = nn.Linear(2 * DIM, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.logits(self.last(x.mean(dim=(2, 3))))


class TokenMixer(nn.Module):
    """A fused QKV linear, `mix(q, k, v)` on [B, heads, tokens, channels], and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.back = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        parts = self.wide(x).reshape(batch, tokens, 3, HEADS, dim // HEADS)
        y = self.mix(*parts.permute(2, 0, 3, 1, 4).unbind(0))
        return self.back(y.transpose(1, 2).reshape(batch, tokens, dim))


class TalkingHeads(TokenMixer):
    """Heads are mixed before and after the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.before((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weights = self.after(scores.softmax(dim=-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return weights @ v


class LinearAttention(TokenMixer):
    """No softmax: keys meet values first, and queries what comes of it."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.relu(q), F.relu(k)
        return (q @ (k.transpose(-2, -1) @ v)) / (q @ k.sum(2).unsqueeze(-1) + 1.0)


class ChannelAttention(TokenMixer):
    """Channels look at channels."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.normalize(q, dim=-2), F.normalize(k, dim=-2)
        weights = (q.transpose(-2, -1) @ k).softmax(dim=-1)
        return (weights @ v.transpose(-2, -1)).transpose(-2, -1)


class AddedQueries(TokenMixer):
    """The queries are added to what attention gives, within its branch."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q + F.scaled_dot_product_attention(q, k, v)


class BatchedProducts(TokenMixer):
    """`baddbmm` with a table of positions, heads within the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(0.1 * torch.ones(1, 16, 16))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (part.flatten(0, 1) for part in (q, k, v))
        scores = torch.baddbmm(self.table, q, k.transpose(1, 2), alpha=0.25)
        return torch.bmm(scores.softmax(dim=-1), v).unflatten(0, (-1, HEADS))


class Einsum(TokenMixer):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * 0.25
        return torch.einsum("bhij,bhjd->bhid", scores.softmax(dim=-1), v)


class WeightsFromTokens(nn.Module):
    """Each token's weights over the tokens come from a layer and not from a product."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.values = nn.Linear(DIM, 16), nn.Linear(DIM, DIM)
        self.back = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.weights(x).softmax(dim=-1) @ self.values(x))


class Spatial(nn.Module):
    """Any mixer in a pre-norm transformer of 16 tokens, its residual streams scaled."""

    def __init__(self, mixer: nn.Module, scaled: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, DIM, 2, stride=2)
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(3))
        self.mix, self.feed = mixer, GeluMlp(DIM)
        self.gain = nn.Parameter(torch.ones(DIM)) if scaled else None
        self.logits = nn.Linear(DIM, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        for norm, part in zip(self.norms, (self.mix, self.feed), strict=False):
            skip = x if self.gain is None else x * self.gain
            x = skip + part(norm(x))
        return self.logits(self.norms[2](x).mean(dim=1))


class ClassAttention(nn.Module):
    """One token asks all of them: [B, tokens, dim] -> [B, 1, dim]."""

    def __init__(self) -> None:
        super().__init__()
        self.ask, self.keys, self.values = (nn.Linear(DIM, DIM) for _ in range(3))
        self.back = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        parts = (self.ask(x[:, :1]), self.keys(x), self.values(x))
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.back(y.transpose(1, 2).flatten(2))


class ClassTokens(nn.Module):
    """A transformer without class token, and a block behind it in which one looks at all."""

    def __init__(self) -> None:
        super().__init__()
        self.body = TinyViT(Shape(depth=1, classes=0))
        self.token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.look, self.feed = ClassAttention(), GeluMlp(DIM)
        self.norm = nn.LayerNorm(DIM)
        self.logits = nn.Linear(DIM, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        token = self.token.expand(x.shape[0], -1, -1)
        token = token + self.look(torch.cat([token, x], dim=1))
        token = token + self.feed(token)
        return self.logits(self.norm(token)[:, 0])


class QueriesFromTheSide(nn.Module):
    """Two stages whose second blocks look for queries that a generator with two resolutions of its
    own makes of the stage's first map, as in "Global Context Vision Transformers"."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 2, stride=2)
        self.stages = nn.ModuleList([QueryStage(8), QueryStage(16)])
        self.shrink = nn.Conv2d(8, 16, 2, stride=2)
        self.norm, self.logits = nn.LayerNorm(16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages[1](self.shrink(self.stages[0](self.stem(x))))
        return self.logits(self.norm(x.mean(dim=(2, 3))))


class QueryStage(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.generate = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(2))
        self.blocks = nn.ModuleList(PixelMlp(dim) for _ in range(2))
        self.key, self.val, self.back = (nn.Conv2d(dim, dim, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        asked = x
        for generate in self.generate:
            asked = F.max_pool2d(asked + F.gelu(generate(asked)), 2)
        x = x + self.blocks[0](x)
        q, k, v = (y.flatten(2).mT[:, None] for y in (asked, self.key(x), self.val(x)))
        found = F.scaled_dot_product_attention(q, k, v).mean(dim=(1, 2))[:, :, None, None]
        x = x + self.back(found.expand_as(x))
        return x + self.blocks[1](x)


class PooledQueries(nn.Module):
    """Two blocks whose attentions add their queries to what they give; that of the second pools
    them by convolutions per channel, as in "MViTv2", and so the block has weights on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 16, 2, stride=2)
        self.blocks = nn.ModuleList([PooledBlock(16, 16, 1), PooledBlock(16, 32, 2)])
        self.norm, self.logits = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        return self.logits(self.norm(x).mean(dim=(1, 2)))


class PooledBlock(nn.Module):
    """[B, H, W, dim] -> [B, H / stride, W / stride, wide]"""

    def __init__(self, dim: int, wide: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(wide)
        self.qkv, self.back = nn.Linear(dim, 3 * wide), nn.Linear(wide, wide)
        self.pool = nn.Conv2d(wide, wide, 3, stride=stride, padding=1, groups=wide)
        self.short = nn.Linear(dim, wide) if dim != wide else nn.Identity()
        self.mlp = nn.Sequential(nn.Linear(wide, 2 * wide), nn.GELU(), nn.Linear(2 * wide, wide))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).movedim(-1, 1).chunk(3, dim=1)
        q = self.pool(q)
        tokens = (y.flatten(2).mT[:, None] for y in (q, k, v))
        found = q + F.scaled_dot_product_attention(*tokens)[:, 0].mT.unflatten(2, q.shape[2:])
        short = F.max_pool2d(self.short(x).movedim(-1, 1), self.stride)
        x = short.movedim(1, -1) + self.back(found.movedim(1, -1))
        return x + self.mlp(self.norm2(x))
