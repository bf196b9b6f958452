"""What every row of the accuracy benchmark shares: budget, batches, losses, and its result file.

Imports neither gpusq_compile nor its peer, so that each can be run in an environment of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import fashion_mnist

# Both phases of the fine-tune, of every row that has one.
STEPS = int(os.environ.get("ACCURACY_STEPS", "120"))
BATCH = 64
# Peak learning rates of the two phases, chosen on the validation images: for four bits the second
# phase has more to recover.
LEARNING_RATES = (3e-4, 1.5e-4)
LEARNING_RATES_INT4 = (3e-4, 5e-4)
WEIGHT_DECAY = 0.01
# alpha, beta and gamma: labels, logits (temperature 1), features.
ALPHA, BETA, GAMMA = 1.0, 10.0, 5.0
CALIBRATION_BATCHES = 8

VALIDATION_IMAGES = 5_000
"""The last of the training images: learning rates are chosen on them, never on the test images."""


@dataclass(frozen=True)
class Job:
    """One row of the table on one teacher with one seed.

    `split` is `test`, or `validation`: train without the last images and predict those. `lr` are
    the peak learning rates of the two phases, None for those of the recipe.
    """

    row: str
    teacher: str
    seed: int
    split: str = "test"
    lr: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        rates = "" if self.lr is None else f"-lr{self.lr[0]:g}-{self.lr[1]:g}"
        return f"{self.row}{rates}-{self.teacher}-{self.seed}"

    def arguments(self) -> list[str]:
        """What `parse_job` reads back."""
        words = [self.row, self.teacher, str(self.seed), "--split", self.split]
        return words + (["--lr", *map(str, self.lr)] if self.lr else [])

    @property
    def rates(self) -> tuple[float, float]:
        default = LEARNING_RATES_INT4 if self.row.startswith("int4") else LEARNING_RATES
        return self.lr or default

    def save_to(self, folder: Path) -> Path:
        return folder / ("validation" if self.split == "validation" else "") / f"{self.name}.json"


def parse_job(description: str) -> tuple[Job, Path]:
    """The job on the command line, and the folder that its result goes to."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("row")
    parser.add_argument("teacher", choices=sorted(fashion_mnist.TEACHERS))
    parser.add_argument("seed", type=int)
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--lr", type=float, nargs=2, metavar=("SPARSE", "QUANTIZE"))
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the result")
    given = parser.parse_args()
    lr = tuple(given.lr) if given.lr else None
    return Job(given.row, given.teacher, given.seed, given.split, lr), given.output


class Epochs:
    """The training batches of one seed: each epoch is `STEPS` augmented batches, drawn anew.

    A pass that is read to its end is followed by the next epoch; one that is left early (a look at
    the first batches) starts the same epoch again. So the batches of the two phases depend on the
    seed alone, whoever reads them.
    """

    def __init__(self, images: fashion_mnist.Images, seed: int, labelled: bool = True) -> None:
        self.images = images
        self.seed = seed
        self.labelled = labelled
        self.epoch = 0
        self.digests: list[str] = []

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(1_000 * self.seed + self.epoch)
        digest = hashlib.sha256()
        batches = fashion_mnist.augmented(self.images, BATCH, generator)
        for step, (pixels, labels) in enumerate(batches, start=1):
            digest.update(labels.numpy().tobytes())
            digest.update(pixels.sum().numpy().tobytes())
            if step == STEPS:
                self.epoch += 1
                self.digests.append(digest.hexdigest()[:16])
            yield (pixels, labels) if self.labelled else pixels
            if step == STEPS:
                return


class Task:
    """The data of one job: training epochs, calibration batches, and the images to predict."""

    def __init__(self, job: Job, labelled: bool = True) -> None:
        torch.manual_seed(job.seed)
        train = fashion_mnist.load("train")
        if job.split == "validation":
            kept = len(train) - VALIDATION_IMAGES
            self.evaluated = fashion_mnist.Images(train.pixels[kept:], train.labels[kept:])
            train = fashion_mnist.Images(train.pixels[:kept], train.labels[:kept])
        else:
            self.evaluated = fashion_mnist.load("test")
        self.job = job
        self.epochs = Epochs(train, job.seed, labelled)
        generator = torch.Generator().manual_seed(1_000 * job.seed + 999)
        picked = torch.randperm(len(train), generator=generator)[: CALIBRATION_BATCHES * BATCH]
        self.calibration = list(train.pixels[picked].split(BATCH))
        self.started = time.monotonic()

    def save(self, folder: Path, model: torch.nn.Module, about: dict[str, Any]) -> None:
        """Predict the images with the finished model, and write the row's result."""
        trained = time.monotonic() - self.started
        predicted = fashion_mnist.predictions(model, self.evaluated)
        right = predicted == self.evaluated.labels
        result = {
            "job": asdict(self.job),
            "fingerprint": fingerprint(self.job),
            "top1": 100 * float(right.float().mean()),
            "right": to_hex(right),
            "seconds": {
                "compile": round(trained, 1),
                "total": round(time.monotonic() - self.started, 1),
            },
            "batches": self.epochs.digests,
            **about,
        }
        path = self.job.save_to(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(path)


def fingerprint(job: Job) -> str:
    """What a result depends on beside the code: it is run again when this changes."""
    weights = fashion_mnist.WEIGHTS / f"{job.teacher}.safetensors"
    parts = [asdict(job), STEPS, BATCH, job.rates, WEIGHT_DECAY, ALPHA, BETA, GAMMA]
    digest = hashlib.sha256(weights.read_bytes())
    digest.update(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def to_hex(right: torch.Tensor) -> str:
    """Booleans [n] as one hexadecimal number of n bits, the first image first."""
    bits = "".join("1" if value else "0" for value in right.tolist())
    return f"{int(bits, 2):0{len(bits) // 4}x}"


def from_hex(text: str) -> list[bool]:
    """The booleans that `to_hex` wrote."""
    return [bit == "1" for digit in text for bit in f"{int(digit, 16):04b}"]
