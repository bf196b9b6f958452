"""Train the two teachers of the accuracy benchmark from random weights: about an hour on a core.

    python benchmarks/train_teachers.py deit
    python benchmarks/train_teachers.py swin

Writes `teachers/NAME.safetensors` and `teachers/NAME.json` (accuracy on the 10,000 test images by
epoch, and the settings). The weights of the last epoch are kept, not the best ones, so the test
images choose nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import time

import torch
from safetensors.torch import save_file
from torch import nn

import fashion_mnist

BATCH = 128
LR = 1e-3
WEIGHT_DECAY = 0.05
WARMUP_STEPS = 300
LABEL_SMOOTHING = 0.1
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=sorted(fashion_mnist.TEACHERS))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bfloat16", action="store_true", help="autocast to bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    train, test = fashion_mnist.load("train"), fashion_mnist.load("test")
    model = fashion_mnist.TEACHERS[options.name]()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98))
    total = options.epochs * (len(train) // BATCH)

    def rate(step: int) -> float:
        return min((step + 1) / WARMUP_STEPS, 0.5 * (1 + math.cos(math.pi * step / total)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    history = []
    started = time.monotonic()
    for epoch in range(1, options.epochs + 1):
        model.train()
        for pixels, labels in fashion_mnist.augmented(train, BATCH, generator):
            with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
                logits = model(pixels)
            loss = nn.functional.cross_entropy(
                logits.float(), labels, label_smoothing=LABEL_SMOOTHING
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        model.eval()
        right = (fashion_mnist.predictions(model, test) == test.labels).float().mean()
        minutes = (time.monotonic() - started) / 60
        history.append({"epoch": epoch, "top1": float(right) * 100})
        print(f"{options.name} epoch {epoch}: {right:.2%} after {minutes:.1f} min", flush=True)
        save(options, model, history, minutes)


def save(
    options: argparse.Namespace, model: nn.Module, history: list[dict[str, float]], minutes: float
) -> None:
    fashion_mnist.WEIGHTS.mkdir(exist_ok=True)
    path = fashion_mnist.WEIGHTS / f"{options.name}.safetensors"
    # Half the bytes in the repository; `load_teacher` makes float32 of them again.
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, path)
    about = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": options.epochs,
        "batch": BATCH,
        "lr": LR,
        "weight_decay": WEIGHT_DECAY,
        "label_smoothing": LABEL_SMOOTHING,
        "autocast": "bfloat16" if options.bfloat16 else None,
        "seed": SEED,
        "minutes": round(minutes, 1),
        "history": history,
    }
    path.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
