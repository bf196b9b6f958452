"""The table of accuracy: a peer's later seeds wait for the rates that are tried at the first."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def accuracy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return __import__("accuracy")


def test_a_peers_later_seed_waits_for_the_rates_of_its_own_row(accuracy: ModuleType) -> None:
    later = accuracy.Job("peer-int8", "deit", 1)
    tried = [accuracy.Job("peer-int8", "deit", 0, lr=lr) for lr in accuracy.PEER_RATES]
    others = [
        accuracy.Job("peer-int4", "deit", 0, lr=accuracy.PEER_RATES[0]),
        accuracy.Job("peer-int8", "swin", 0, lr=accuracy.PEER_RATES[0]),
        accuracy.Job("int8", "deit", 0),
        later,
    ]
    assert accuracy.waits_for_rates(later, [*others, tried[-1]])
    assert not accuracy.waits_for_rates(later, others)


def test_no_other_job_waits(accuracy: ModuleType) -> None:
    jobs = accuracy.jobs()
    waiting = [job for job in jobs if accuracy.waits_for_rates(job, jobs)]
    assert {job.row for job in waiting} == {"peer-int8", "peer-int4"}
    assert all(job.seed != accuracy.SEEDS[0] and job.lr is None for job in waiting)
