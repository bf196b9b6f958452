"""`--data KIND:DIR`: what a library's model is calibrated, trained and evaluated on."""

from __future__ import annotations

from pathlib import Path

from gpusq_compile.errors import InputError, did_you_mean
from gpusq_compile.model_source import ModelSource
from gpusq_compile.sources.coco import coco
from gpusq_compile.sources.image_folder import image_folder
from gpusq_compile.sources.images import check_channels
from gpusq_compile.sources.model import LibraryModel, Task
from gpusq_compile.sources.paths import nearest_path, typed_path

READERS = {"imagefolder": image_folder, "coco": coco}
KINDS: dict[Task, tuple[str, ...]] = {
    "classification": ("imagefolder",),
    "detection": ("coco",),
    "segmentation": ("coco",),
    "features": ("imagefolder", "coco"),
}
"""The kinds of data that have what a task's loss needs."""


def kinds_for(task: Task) -> str:
    """The `--data` of a task as a hint shows it."""
    return " or ".join(f"{kind}:DIR" for kind in KINDS[task])


def give_data(source: ModelSource, model: LibraryModel, data: str) -> None:
    """Give `source` what `--data` names.

    Raises:
        InputError: the kind is unknown or has not what the model needs, there is no such folder,
            or what is in it cannot be read.
    """
    kind, _, folder = data.partition(":")
    if kind not in READERS or not folder:
        bare = Path(data).is_dir()
        raise InputError(
            "unknown-data",
            f"--data {data} is not a form this version reads",
            hint=f"did you mean {KINDS[model.task][0]}:{data}?"
            if bare
            else did_you_mean(kind, READERS) + "; each is followed by :DIR",
        )
    root = typed_path(folder)
    if not root.is_dir():
        near = f" ({root} is a file)" if root.exists() else ""
        close = None if near else nearest_path(root)
        raise InputError(
            "data-missing",
            f"no folder at {root} (from --data {data}){near}",
            hint=f"did you mean {kind}:{close}?" if close else None,
        )
    if kind not in KINDS[model.task]:
        raise InputError(
            "data-for-another-task",
            f"--data {data}: {model.origin} is a model for {model.task}, which needs "
            f"{kinds_for(model.task)}",
        )
    check_channels(model.origin, model.images)
    READERS[kind](source, model, root)
