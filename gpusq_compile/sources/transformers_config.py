"""`hf:WHAT`: where a transformers model lies, and what its configuration says.

WHAT is a folder with a config.json and, if there, safetensors weights; a configuration file
alone; or a name on the Hugging Face hub.
"""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gpusq_compile.errors import InputError, relative_to_cwd
from gpusq_compile.sources.json_files import JsonFile, read_json
from gpusq_compile.sources.paths import check_readable, nearest_path, typed_path
from gpusq_compile.sources.require import quiet_downloads, require

CONFIG = "config.json"
PROCESSOR = "preprocessor_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
HUB_TIMEOUT_S = 5.0
FORMS = "hf:DIR with a config.json, hf:CONFIG.json, or hf:NAME on the Hugging Face hub"


@dataclass(frozen=True)
class Place:
    """Where a model's configuration is, what its weights are loaded from, and how it is called.

    `weights` is a folder or a hub name; None means random ones. `offline` says that nothing is
    to be asked of the hub. `processor` is its preprocessor_config.json, if it has one.
    """

    origin: str
    config: JsonFile
    source: str
    weights: str | None
    processor: JsonFile | None
    offline: bool = True


def find(what: str) -> Place:
    """Find and read the configuration that `hf:WHAT` names.

    Raises:
        InputError: there is none, it cannot be read, or its weights are pickled or not all there.
        OSError: the system does not let the weights be read.
    """
    path = typed_path(what)
    origin = f"hf:{what}"
    if path.is_file():
        processor = path.with_name(PROCESSOR)
        return Place(origin, _read(path), str(path), None, _processor(processor))
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise InputError("config-missing", f"{path} has no {CONFIG}", hint=FORMS)
        weights = str(path) if _has_weights(path) else None
        config = _read(path / CONFIG)
        return Place(origin, config, str(path), weights, _processor(path / PROCESSOR))
    # A name of the hub looks like a path, but hardly like one whose folder is here.
    near = path.parent != Path() and path.parent.is_dir()
    if path.suffix == ".json" or near or not HUB_NAME.fullmatch(what):
        close = nearest_path(path)
        raise InputError(
            "config-missing",
            f"no file or folder at {path}",
            hint=f"did you mean hf:{close}?" if close else FORMS,
        )
    return _on_hub(origin, what)


def _has_weights(folder: Path) -> bool:
    """Whether a folder has safetensors weights; weights that only unpickling reads are an error."""
    found = sorted(folder.glob("*.safetensors"))
    for path in found:
        check_readable(path)
    if weight_files(folder) or found:
        return True
    pickled = [*folder.glob("pytorch_model*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
    if pickled:
        raise InputError(
            "weights-pickled",
            f"{relative_to_cwd(pickled[0])} is a pickle, which can run code when it is read",
            hint="where you trust it, load it with transformers and save_pretrained() it: that "
            "writes safetensors",
        )
    return False


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that the library reads in a folder: one, or those that an index names.

    Raises:
        InputError: the index cannot be read, or not every file that it names is there.
    """
    single = folder / WEIGHTS
    shards = _shards(folder / INDEX) if (folder / INDEX).exists() else []
    return [single] if single.is_file() else shards


def _shards(path: Path) -> list[Path]:
    """The files that an index of weights names."""
    index = _read(path)
    files = index.content.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise InputError(
            "weights-missing",
            "its weight_map names no file for any tensor",
            location=index.place("weight_map"),
            hint="copy the whole folder, or take the index away",
        )
    names = sorted({str(name) for name in files.values()})
    if lost := [name for name in names if not (path.parent / name).is_file()]:
        raise InputError(
            "weights-missing",
            f"it names {lost[0]}, which is not there ({len(lost)} of {len(names)} files are not)",
            location=index.place("weight_map"),
            hint="copy the whole folder, or take the index away",
        )
    return [path.parent / name for name in names]


def _read(path: Path) -> JsonFile:
    return read_json(path, "config-not-json")


def _processor(path: Path) -> JsonFile | None:
    return _read(path) if path.exists() else None


def _on_hub(origin: str, name: str) -> Place:
    """A model of the hub, or of the local cache where the hub cannot be reached."""
    require("transformers")
    offline = not hub_reachable()

    def file(wanted: str) -> JsonFile | None:
        found = hub_file(name, wanted, offline=offline)
        return None if found is None else _read(found)

    try:
        with quiet_downloads():
            config = file(CONFIG)
            processor = None if config is None else file(PROCESSOR)
    except (OSError, ValueError) as error:
        if offline:
            raise no_network(name) from None
        raise InputError(
            "unknown-model",
            f"the Hugging Face hub gives no model '{name}': {str(error).splitlines()[0]}",
            hint=FORMS,
        ) from None
    if config is None:
        if offline:
            raise no_network(name)
        raise InputError("config-missing", f"'{name}' on the Hugging Face hub has no {CONFIG}")
    return Place(origin, config, name, name, processor, offline)


def hub_file(name: str, wanted: str, *, offline: bool) -> Path | None:
    """A file of a model of the hub, in the local cache; None where the model has none such."""
    found = require("transformers.utils.hub").cached_file(
        name, wanted, local_files_only=offline, _raise_exceptions_for_missing_entries=False
    )
    return None if found is None else Path(found)


def hub_reachable() -> bool:
    """Whether the hub answers: its own client would retry for half a minute."""
    constants = require("huggingface_hub.constants")
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(constants.ENDPOINT, timeout=HUB_TIMEOUT_S):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


def no_network(name: str) -> InputError:
    endpoint = require("huggingface_hub.constants").ENDPOINT
    return InputError(
        "no-network",
        f"no file or folder '{name}' is here, and {endpoint} cannot be reached for a model of "
        "this name, nor is it in the local cache",
        hint=FORMS,
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the library's reports on stderr: what matters of them is said in remarks."""
    logging = require("transformers.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with quiet_downloads():
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
