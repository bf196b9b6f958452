"""Several processes that train one model: one per GPU, or per machine (accelerate, torchrun).

Each process traces, calibrates and rewrites the same model, takes its share of each training
batch, and sums gradients with the others; the first alone lowers and writes the result. A batch
of the training data is the global batch, so the number of processes changes no loss, but for two
things that each process does alone: it divides by the variance of its own share (`normalize`), and
draws the random augmentation of the images that it loads.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from gpusq_compile.data import Batch

LOADER_SETTINGS = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
)
"""What a DataLoader keeps when its batches become shares."""


@dataclass(frozen=True)
class Processes:
    """This process's `rank` among `world` processes."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.world > 1:
            torch.distributed.barrier()

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of `value` over all processes, in place."""
        if self.world > 1:
            torch.distributed.all_reduce(value)
        return value


@contextmanager
def joined(device: str) -> Iterator[tuple[Processes, str]]:
    """Join the processes that a launcher started, if one did, and leave them at the end.

    Gives this process's place, and its device: with several GPUs, the one of its local rank.

    Launchers tell by the environment (torchrun's `WORLD_SIZE`, `RANK`, `LOCAL_RANK`, `MASTER_ADDR`
    and `MASTER_PORT`, which `accelerate launch` sets too). The backend is NCCL on GPUs, else gloo.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        yield Processes(), device
        return
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    try:
        chosen = str(state.device) if device == "cuda" else device
        yield Processes(state.process_index, state.num_processes), chosen
    finally:
        state.destroy_process_group()


def shard(data: Iterable[Any], processes: Processes) -> tuple[Iterable[Any], bool]:
    """`data` for this process, and whether its batches are shares already.

    Of a DataLoader over a dataset with indices each process loads its share alone. Anything else
    is read whole by every process, and `share` cuts its batches.
    """
    indexed = (
        type(data) is DataLoader
        and data.batch_size is not None
        and not isinstance(data.dataset, IterableDataset)
        and data.batch_size % processes.world == 0
    )
    if processes.world == 1 or not indexed:
        return data, False
    from accelerate.data_loader import BatchSamplerShard

    assert isinstance(data, DataLoader)
    # accelerate's own loader would shuffle by a generator that starts anew in every epoch.
    sampler = BatchSamplerShard(
        data.batch_sampler,
        num_processes=processes.world,
        process_index=processes.rank,
        split_batches=True,
        even_batches=False,
    )
    settings = {name: getattr(data, name) for name in LOADER_SETTINGS}
    return DataLoader(data.dataset, batch_sampler=sampler, **settings), True


def share(batch: Batch, processes: Processes) -> Batch | None:
    """The consecutive part of a batch that is this process's; None where nothing is left for it."""
    if processes.world == 1:
        return batch
    size = batch.size
    start = size * processes.rank // processes.world
    end = size * (processes.rank + 1) // processes.world
    if start == end:
        return None

    return batch.part(start, end)
