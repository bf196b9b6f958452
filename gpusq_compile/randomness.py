"""The random numbers of torch, numpy and Python: seeded by place, and kept apart where need be."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and random."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def derived_seed(seed: int, *place: str | int) -> int:
    """A seed of its own for each place of a compilation, the same in every run."""
    text = "/".join(str(part) for part in (seed, *place))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


@contextmanager
def isolated_random(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Afterwards torch (CPU and `device`), numpy and `random` go on as if nothing was drawn.

    With `seed` they start from it inside, so that whatever is drawn there is the same each time.
    """
    devices = [device] if device.type == "cuda" else []
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=devices):
            if seed is not None:
                seed_everything(seed)
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
