"""Trains the digits model from scratch and writes `digits_vit.safetensors` beside this file.

    python examples/train_digits_vit.py

About two minutes on two cores. The held-out images are used only to print the accuracy: the
weights are those of the last epoch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import digits_vit


@torch.no_grad()
def held_out_accuracy(model: nn.Module) -> float:
    """Top-1 accuracy on the held-out images, 0 to 1."""
    was_training = model.training
    model.eval()
    hits = [(model(images).argmax(1) == labels) for images, labels in digits_vit.eval_data()]
    model.train(was_training)
    return torch.cat(hits).float().mean().item()


def train(epochs: int, peak_lr: float, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = digits_vit.VisionTransformer()
    batches = digits_vit.train_data()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr=peak_lr,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak_lr, total_steps=epochs * len(batches), pct_start=0.1
    )
    for epoch in range(1, epochs + 1):
        for images, labels in batches:
            loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch % 10 == 0 or epoch == epochs:
            accuracy = held_out_accuracy(model)
            print(f"epoch {epoch:3d}  loss {loss.item():.4f}  held-out {accuracy:.4f}", flush=True)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=digits_vit.WEIGHTS)
    arguments = parser.parse_args()

    model = train(arguments.epochs, arguments.lr, arguments.seed)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, arguments.output)
    size = arguments.output.stat().st_size
    print(
        f"{arguments.output}: {size:,} bytes, held-out top-1 {held_out_accuracy(model):.4f} "
        f"of {len(digits_vit.eval_data().dataset)} images"
    )


if __name__ == "__main__":
    main()
