"""A-ViT: a vision transformer whose tokens stop at different depths, each when it is sure.

Written from Yin et al., "A-ViT: Adaptive Tokens for Efficient Vision Transformer" (CVPR 2022),
section 3. It is a DeiT; what makes it adaptive has no weights of its own. This is a complete model
file for gpusq-compile:

    gpusq-compile examples/avit.py --rules int8 -o out/avit

`AVIT=digits` (the default) is a small one with the weights beside this file, which
`train_avit.py` made. `AVIT=tiny` and `AVIT=small` are the paper's sizes at 224 x 224, with random
weights: trained ones would be fine-tuned from DeiT's on ImageNet. All see scikit-learn's
handwritten digits, scaled up.

Every layer is computed for every token, under masks: so the model can be traced, and its masks
are data. In the fine-tune the student computes with its teacher's masks; the compiler finds them
(`finetune.decisions` in docs/rules.md). The gate that decides is one number of a token's embedding
and a sigmoid: there is no layer in it to compress, and it stays in float.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import digits_vit

WEIGHTS = Path(__file__).with_suffix(".safetensors")

BLOCKED = -1e4
"""Added to the score of a halted token: no weight is left after the softmax, and FP16 holds it."""


@dataclass(frozen=True)
class Size:
    """Of a model. `target_depth` is the layer that tokens are expected to halt at, from 1.

    `images` limits the data: one pass over the digits takes the larger models an hour. Calibration
    and evaluation look at `eval_batch` of them at once: a compile's memory grows with it.
    """

    image: int
    patch: int
    dim: int
    depth: int
    heads: int
    mlp_ratio: int
    classes: int
    target_depth: int
    batch: int
    eval_batch: int
    images: int | None = None


SIZES = {
    "digits": Size(32, 8, 64, 4, 4, 2, classes=10, target_depth=3, batch=64, eval_batch=64),
    "tiny": Size(
        224, 16, 192, 12, 3, 4, classes=1000, target_depth=8, batch=8, eval_batch=2, images=32
    ),
    "small": Size(
        224, 16, 384, 12, 6, 4, classes=1000, target_depth=8, batch=8, eval_batch=2, images=32
    ),
}


@dataclass(frozen=True)
class Halting:
    """The gate (equation 5): sigmoid(gamma * e_0 + beta); a token stops at a sum of 1 - epsilon."""

    gamma: float = 5.0
    beta: float = -10.0
    epsilon: float = 0.01


class Attention(nn.Module):
    """Multi-head self-attention that `bias` [B, 1, 1, tokens] is added to the scores of."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))


class Block(nn.Module):
    """A pre-norm transformer block over the tokens that `alive` [B, tokens] has ones for.

    A halted token goes in as zeros and no other token attends to it.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = digits_vit.Mlp(dim, mlp_ratio * dim)

    def forward(self, x: Tensor, alive: Tensor) -> Tensor:
        x = x * alive.unsqueeze(2)
        bias = ((1.0 - alive) * BLOCKED)[:, None, None, :]
        x = x + self.attn(self.norm1(x), bias)
        return x + self.mlp(self.norm2(x))


class AViT(nn.Module):
    """Images [B, 3, H, W] to logits [B, classes] and what the losses of adaptivity need.

    The outputs are `logits` and `halting` [B, depth]: how the tokens' halting probabilities are
    spread over the layers, as a mean over the tokens. A probability is the score at the layers that
    a token passes, what is missing to 1 at the one it halts at, and 0 behind it.

    The paper's losses also know the number of that layer. It jumps where a score comes to lie on
    the other side of the threshold, and no gradient goes through it; the probabilities change by
    `epsilon` there at most. So the expected layer stands for it here, and the outputs of a
    compiled file can be held against the graph's.
    """

    def __init__(self, size: Size, halting: Halting | None = None) -> None:
        super().__init__()
        self.halting = halting or Halting()
        self.patch_embed = nn.Conv2d(3, size.dim, kernel_size=size.patch, stride=size.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.dim))
        tokens = (size.image // size.patch) ** 2 + 1
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, size.dim))
        self.blocks = nn.ModuleList(
            Block(size.dim, size.heads, size.mlp_ratio) for _ in range(size.depth)
        )
        self.norm = nn.LayerNorm(size.dim, eps=1e-6)
        self.head = nn.Linear(size.dim, size.classes)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        # All [B, tokens], and all in float but `runs`.
        alive = images.new_ones(x.shape[:2])
        total = images.new_zeros(x.shape[:2])
        answer: float | Tensor = 0.0
        halting: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            x = block(x, alive)
            score = alive * torch.sigmoid(self.halting.gamma * x[..., 0] + self.halting.beta)
            remainder = (1.0 - total).clamp(min=0.0)
            if index + 1 < len(self.blocks):
                # The token mask: False from the layer on at which a token halts.
                runs = total + score < 1.0 - self.halting.epsilon
                stays = alive * runs.to(alive.dtype)
            else:
                stays = images.new_zeros(x.shape[:2])
            stops = alive - stays
            probability = stays * score + stops * remainder
            halting.append(probability.mean(dim=1))
            # The answer is the class token's state, weighted by where it halts (equation 7).
            answer = answer + probability[:, :1] * x[:, 0]
            total = total + score
            alive = stays
        return {
            "logits": self.head(self.norm(answer)),
            "halting": torch.stack(halting, dim=1),
        }


def target_distribution(depth: int, center: int) -> Tensor:
    """Where tokens are expected to halt [depth]: a normal distribution around a layer, from 1."""
    layers = torch.arange(1, depth + 1, dtype=torch.float32)
    density = torch.exp(-0.5 * (layers - center) ** 2)
    return density / density.sum()


def expected_depth(halting: Tensor) -> Tensor:
    """The layer [B] that a token halts at, from 1, as a mean over the tokens."""
    layers = torch.arange(1, halting.shape[1] + 1, device=halting.device, dtype=halting.dtype)
    return (halting * layers).sum(dim=1)


def adaptive_loss(outputs: dict[str, Tensor], labels: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy + 0.1 * distributional prior (equation 11) + 0.0005 * ponder (equation 9).

    The prior is the KL divergence of where the tokens halt from where they are expected to.
    """
    task = F.cross_entropy(outputs["logits"], labels)
    halting = outputs["halting"].mean(dim=0).clamp(min=1e-8)
    prior = (halting * (halting / target.to(halting)).log()).sum()
    return task + 0.1 * prior + 5e-4 * expected_depth(outputs["halting"]).mean()


def chosen_size() -> Size:
    name = os.environ.get("AVIT", "digits")
    if name not in SIZES:
        raise ValueError(f"AVIT={name}: the sizes are {', '.join(SIZES)}")
    return SIZES[name]


class ScaledUp:
    """A loader's digits [B, 1, 8, 8] as colour images of a model's size, `at_once` in a batch."""

    def __init__(self, loader: Iterable[Any], size: Size, at_once: int) -> None:
        self.loader = loader
        self.size = size
        self.at_once = at_once

    def __len__(self) -> int:
        return sum(1 for _ in self._batches())

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        shape = (self.size.image, self.size.image)
        for images, labels in self._batches():
            large = F.interpolate(images, shape, mode="bilinear", align_corners=False)
            yield large.expand(-1, 3, -1, -1).contiguous(), labels

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        images = self.size.images
        return islice(self._all_batches(), None if images is None else images // self.at_once)

    def _all_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.loader:
            yield from zip(images.split(self.at_once), labels.split(self.at_once), strict=True)


def model() -> nn.Module:
    """The model that `AVIT` names, in eval mode; the one for digits is trained."""
    size = chosen_size()
    torch.manual_seed(0)
    vit = AViT(size)
    if size == SIZES["digits"]:
        if not WEIGHTS.is_file():
            raise FileNotFoundError(
                f"{WEIGHTS} is missing; make it with: python {WEIGHTS.parent / 'train_avit.py'}"
            )
        # They are stored in FP16.
        vit.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    return vit.eval()


def example_inputs() -> tuple[Tensor, ...]:
    """Float32 images [2, 3, H, W]."""
    images, _ = next(iter(eval_data()))
    return (images[:2],)


def train_data() -> ScaledUp:
    size = chosen_size()
    return ScaledUp(digits_vit.train_data(), size, size.batch)


def calibration_data() -> ScaledUp:
    size = chosen_size()
    return ScaledUp(digits_vit.calibration_data(), size, size.eval_batch)


def eval_data() -> ScaledUp:
    size = chosen_size()
    return ScaledUp(digits_vit.eval_data(), size, size.eval_batch)


def logits(outputs: dict[str, Tensor]) -> Tensor:
    return outputs["logits"]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The task and how long the tokens run, as in training."""
    images, labels = batch
    size = chosen_size()
    return adaptive_loss(model(images), labels, target_distribution(size.depth, size.target_depth))


def metrics(outputs: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Top-1, and the layers that a token is spared on the mean; higher is better."""
    right = outputs["logits"].argmax(dim=1) == batch[1]
    spared = chosen_size().depth - expected_depth(outputs["halting"]).mean()
    return {"accuracy": right.float().mean().item(), "layers_spared": spared.item()}
