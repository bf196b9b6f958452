"""Trains the A-ViT for digits from scratch and writes `avit.safetensors` beside `avit.py`.

    python examples/train_avit.py

About two minutes on two cores. First the task alone, for the paper starts from a trained DeiT
too; then with the losses that let tokens halt. The held-out images are used only to print the
accuracy: the weights are those of the last epoch, in FP16.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import avit

SIZE = avit.SIZES["digits"]


@torch.no_grad()
def held_out(model: nn.Module) -> tuple[float, float]:
    """Top-1 accuracy on the held-out images, 0 to 1, and the layer that a token halts at."""
    model.eval()
    hits, depth = [], []
    for images, labels in avit.ScaledUp(avit.digits_vit.eval_data(), SIZE, SIZE.eval_batch):
        outputs = model(images)
        hits.append(outputs["logits"].argmax(1) == labels)
        depth.append(avit.expected_depth(outputs["halting"]))
    model.train()
    return torch.cat(hits).float().mean().item(), torch.cat(depth).mean().item()


def train(model: nn.Module, epochs: int, peak_lr: float, *, adaptive: bool) -> None:
    batches = avit.ScaledUp(avit.digits_vit.train_data(), SIZE, SIZE.batch)
    target = avit.target_distribution(SIZE.depth, SIZE.target_depth)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr=peak_lr,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak_lr, total_steps=epochs * len(batches), pct_start=0.1
    )

    def loss(outputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        if adaptive:
            return avit.adaptive_loss(outputs, labels, target)
        return F.cross_entropy(outputs["logits"], labels, label_smoothing=0.1)

    for epoch in range(1, epochs + 1):
        for images, labels in batches:
            value = loss(model(images), labels)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
        if epoch % 10 == 0 or epoch == epochs:
            accuracy, depth = held_out(model)
            print(
                f"epoch {epoch:3d}  loss {value.item():.4f}  held-out {accuracy:.4f}  "
                f"depth {depth:.2f} of {SIZE.depth}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40, help="of each of the two phases")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=avit.WEIGHTS)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    model = avit.AViT(SIZE)
    train(model, arguments.epochs, arguments.lr, adaptive=False)
    train(model, arguments.epochs, arguments.lr / 2, adaptive=True)
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, arguments.output)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    accuracy, depth = held_out(model)
    size = arguments.output.stat().st_size
    print(f"{arguments.output}: {size:,} bytes, held-out top-1 {accuracy:.4f}, depth {depth:.2f}")


if __name__ == "__main__":
    main()
