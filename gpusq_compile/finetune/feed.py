"""The training batches of a phase, epoch after epoch, from any position on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from gpusq_compile.data import Batch, CheckedData, batches
from gpusq_compile.errors import InputError
from gpusq_compile.model_source import DataFactory
from gpusq_compile.processes import Processes, shard, share
from gpusq_compile.randomness import derived_seed, seed_everything


@dataclass
class Position:
    """Where the feed is: `taken` batches of epoch number `epoch` (from 0).

    `first` is the digest of the epoch's first batch, by which a resumed run knows that it reads
    the same data in the same order.
    """

    epoch: int = 0
    taken: int = 0
    first: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Feed:
    """Endless training batches. Every epoch is seeded by its number, not by what ran before.

    Args:
        seed: of the phase.
        length: batches of one epoch.
        start: where an earlier run stopped; the batches of its epoch up to there are read again
            and dropped.
    """

    def __init__(
        self,
        factory: DataFactory,
        device: torch.device,
        processes: Processes,
        *,
        seed: int,
        length: int,
        start: Position | None = None,
    ) -> None:
        self.factory = factory
        self.device = device
        self.processes = processes
        self.seed = seed
        self.length = length
        self.position = Position()
        self._epoch: Iterator[Batch | None] | None = None
        if start is not None and start.taken:
            self.position.epoch = start.epoch
            for _ in range(start.taken):
                self.next()
            if processes.first and self.position.first != start.first:
                raise InputError(
                    "resume-data-order",
                    f"epoch {start.epoch + 1} of train_data() begins with another batch than in "
                    "the run that is resumed",
                    hint="data that shuffles by a generator of its own must make it anew in each "
                    "call of train_data(); without --resume the run starts from the beginning",
                )

    def next(self) -> Batch | None:
        """This process's share of the next batch; None where it has none of it."""
        if self._epoch is None:
            seed_everything(derived_seed(self.seed, "epoch", self.position.epoch))
            self._epoch = self._batches()
        try:
            batch = next(self._epoch)
        except StopIteration:
            self.position = Position(self.position.epoch + 1)
            self._epoch = None
            return self.next()
        if self.position.taken == 0:
            self.position.first = digest(batch)
        self.position.taken += 1
        return batch

    def _batches(self) -> Iterator[Batch | None]:
        data = self.factory()
        checked = data if isinstance(data, CheckedData) else CheckedData(data, "train_data")
        checked.data, is_share = shard(checked.data, self.processes)
        count = 0
        for batch in batches(lambda: checked, "train_data", self.device):
            yield batch if is_share else share(batch, self.processes)
            count += 1
        # Of an incomplete last batch the other processes may have a share.
        yield from (None for _ in range(count, self.length if is_share else count))


def digest(batch: Batch | None) -> str:
    """SHA-256 of a batch's tensors, in hexadecimal."""
    found = hashlib.sha256()
    leaves = [] if batch is None else tree_leaves((batch.inputs, batch.labels, batch.raw))
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            found.update(bytes_of(leaf))
    return found.hexdigest()


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
