"""Building a transformers model, and what its weights left open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from gpusq_compile.errors import InputError, Location
from gpusq_compile.sources.json_files import JsonFile
from gpusq_compile.sources.transformers_config import (
    INDEX,
    WEIGHTS,
    Place,
    hub_file,
    weight_files,
)
from gpusq_compile.sources.weights import listed, misfit, read_weights, stored_types, wrong_types

Notes = list[tuple[str, str]]


def build(
    place: Place,
    kind: Any,
    config: Any,
    file: Path | None,
    notes: Notes,
    *,
    tower: bool,
    insist: bool,
) -> tuple[Any, bool]:
    """The module in float32, and whether all of its weights are random.

    Its weights are those of `file`, of `place`, or random ones. What a folder's own weights leave
    out or have too much is a warning, as heads differ between tasks; `file` must have them all.

    Args:
        tower: whether it is the vision part alone of what the weights are of.
        insist: whether weights of which none is the model's are an error.

    Raises:
        InputError: the model cannot be built, or the weights do not fit.
    """
    if place.weights is None and file is None:
        for part in (config, getattr(config, "backbone_config", None)):
            if part is not None and getattr(part, "use_pretrained_backbone", False):
                part.use_pretrained_backbone = False  # It would be downloaded.
        try:
            return kind(config).float(), True
        except Exception as error:
            raise _not_built(place, kind, error) from error
    module, info = _load(place, kind, config, file)
    named = str(file) if file is not None else f"the weights of {place.origin}"
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    missing, unused = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    shapes = [
        f"{name} is {list(found)}, the model has {list(expected)}"
        for name, found, expected in sorted(info["mismatched_keys"])
    ]
    types = wrong_types(own, stored_types(_files(place, file)), unused)
    faults = [(shapes, "of another shape"), (types, "of another type")]
    if file is not None:
        faults = [(missing, "missing"), *faults]
    if any(names for names, _ in faults):
        raise misfit(named, faults, "the sizes in config.json are not those of these weights")
    random = {name for name, _ in module.named_parameters()} <= set(missing)
    if random and insist:
        raise InputError(
            "weights-mismatch",
            f"{named} have none of the {len(missing)} tensors of {kind.__name__}"
            + (f", but {listed(unused)}" if unused else ""),
            hint="config.json may name another class than the weights are of",
        )
    if missing:
        text = (
            f"none of its {len(missing)} tensors is among the weights: all are random"
            if random
            else f"{len(missing)} tensors are not among the weights and are random"
        )
        text += f" ({listed(missing)})"
        notes.append(("weights-incomplete", f"{place.origin}: {text}"))
    # A vision tower leaves the text part's tensors behind, and that is said already.
    if unused and not tower:
        text = f"{len(unused)} tensors of the weights are none of its own and are left out"
        notes.append(("weights-unused", f"{place.origin}: {text} ({listed(unused)})"))
    return module, random


def _load(place: Place, kind: Any, config: Any, file: Path | None) -> tuple[Any, dict[str, Any]]:
    # The library knows the names that a model's tensors had in its earlier versions.
    state = None if file is None else read_weights(file)
    try:
        module, info = kind.from_pretrained(
            None if file is not None else place.weights,
            config=config,
            state_dict=state,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=place.offline,
            dtype=torch.float32,
            # Named by the caller: the library's own error names none.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise InputError(
            "weights-unreadable", f"the weights of {place.origin} are damaged: {error}"
        ) from None
    except OSError as error:
        raise InputError("weights-unreadable", f"{place.origin}: {reason(error)}") from None
    except Exception as error:
        raise _not_built(place, kind, error) from error
    return module, info


def _files(place: Place, file: Path | None) -> list[Path]:
    """The safetensors files that a model was loaded from, as far as they are here."""
    if file is not None:
        return [file]
    name = str(place.weights)
    if Path(name).is_dir():
        return weight_files(Path(name))
    for wanted in (WEIGHTS, INDEX):
        # The cache has all files of a model in one folder.
        if found := hub_file(name, wanted, offline=True):
            return weight_files(found.parent)
    return []


def _not_built(place: Place, kind: Any, error: Exception) -> InputError:
    if isinstance(error, ImportError):
        return InputError(
            "library-not-installed",
            f"{kind.__name__} needs another library: {reason(error)}",
            hint="pip install 'gpusq-compile[models]'",
        )
    return InputError(
        "model-not-loaded",
        f"transformers could not build {kind.__name__} for {place.origin}: "
        f"{type(error).__name__}: {reason(error)}",
        location=blamed(place.config, error),
    )


def reason(error: Exception) -> str:
    """The whole text of an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def blamed(file: JsonFile, error: Exception) -> Location:
    """The value in a configuration that an error names, or the file.

    The library quotes the key, or, where it looked the value up somewhere, the value alone.
    """
    text = str(error)
    values = _values((), file.content)
    keyed = [keys for keys, _ in values if f"'{keys[-1]}'" in text]
    shown = [keys for keys, value in values if keys in keyed and f"{value!r}" in text]
    looked_up = [
        keys for keys, value in values if isinstance(error, KeyError) and value in error.args
    ]
    for found in (shown, keyed, looked_up):
        if len(found) == 1:
            return file.place(*found[0])
    return file.place()


def _values(above: tuple[str, ...], value: dict[str, Any]) -> list[tuple[tuple[str, ...], Any]]:
    """Every value in nested objects, with the keys that lead to it."""
    found: list[tuple[tuple[str, ...], Any]] = []
    for key, inner in value.items():
        found.append(((*above, key), inner))
        if isinstance(inner, dict):
            found += _values((*above, key), inner)
    return found
