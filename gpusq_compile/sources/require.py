"""Optional libraries, and what they print while they load a model."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gpusq_compile.errors import InputError


def require(package: str) -> Any:
    """Import an optional library, or raise InputError with the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(
            "library-not-installed",
            f"{package} cannot be imported: {error}",
            hint="pip install 'gpusq-compile[models]'",
        ) from None


@contextmanager
def quiet_downloads() -> Iterator[None]:
    """Without the download library's line for each retry; the last error says it all."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
