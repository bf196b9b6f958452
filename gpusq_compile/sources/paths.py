"""Paths as a person types them: `~` expanded, and the nearest existing one for a mistyped one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpusq_compile.errors import InputError, nearest, relative_to_cwd


def typed_path(text: str) -> Path:
    """The path of `text`, with a leading `~` expanded where that names a home."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def nearest_path(path: Path) -> Path | None:
    """An existing path like `path`, whose first missing part may be mistyped, or None."""
    missing = path
    while missing.parent != missing and not missing.parent.is_dir():
        missing = missing.parent
    rest = path.relative_to(missing)
    try:
        # A link whose target is gone is listed too.
        siblings = sorted(place.name for place in missing.parent.iterdir() if place.exists())
    except OSError:
        return None
    close = nearest(missing.name, siblings)
    if close is None:
        return None
    found = missing.with_name(close)
    return found / rest if (found / rest).exists() else found


def unreadable(path: Path, error: OSError) -> InputError:
    """The error for a file or folder that is there, and that the system does not let be read."""
    return InputError(
        "file-unreadable", f"{relative_to_cwd(path)} cannot be read: {error.strerror or error}"
    )


def check_readable(path: Path) -> None:
    """Raise the system's OSError for a file that it does not let be read.

    The libraries' readers of weights say of any such file that it is not there.
    """
    path.open("rb").close()


@contextmanager
def readable_files() -> Iterator[None]:
    """Blame the file that a person named for what the system says of it."""
    try:
        yield
    except OSError as error:
        if not isinstance(error.filename, str):
            raise
        raise unreadable(Path(error.filename), error) from error
