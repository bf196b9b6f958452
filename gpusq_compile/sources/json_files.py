"""JSON files of a person's, with the place of each value for messages."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpusq_compile.errors import InputError, Location, relative_to_cwd

SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True)
class JsonFile:
    """The object in a JSON file, and the text it was read from. `shown` is its path in messages."""

    shown: str
    text: str
    content: dict[str, Any]

    def place(self, *keys: str | int) -> Location:
        """Where the value of a key, of a key in it, and so on begins; the file where it is not.

        A number is the index of an item in a list.
        """
        position: int | None = _after_space(self.text, 0)
        for key in keys:
            opening = "[" if isinstance(key, int) else "{"
            if position is None or self.text[position : position + 1] != opening:
                return Location(self.shown)
            position = (
                _item_of(self.text, position, key)
                if isinstance(key, int)
                else _value_of(self.text, position, key)
            )
        if position is None or not keys:
            return Location(self.shown)
        return _location(self.shown, self.text, position)


def read_json(path: Path, code: str) -> JsonFile:
    """Read a file that holds one JSON object.

    Args:
        code: that of the error.

    Raises:
        InputError: it cannot be read, is not JSON, or holds something else.
    """
    shown = relative_to_cwd(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text)
    except json.JSONDecodeError as error:
        place = Location(shown, error.lineno, error.colno)
        raise InputError(code, f"no JSON: {error.msg}", location=place) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(code, f"{shown} cannot be read: {reason}") from None
    except RecursionError:
        raise InputError(code, f"{shown} is nested too deeply") from None
    except ValueError as error:  # A number of more digits than Python reads.
        raise InputError(code, f"{shown} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise InputError(code, f"{shown} is no JSON object")
    return JsonFile(shown, text, content)


def wrong_value(
    file: JsonFile, code: str, keys: Sequence[str], expected: str, hint: str | None = None
) -> InputError:
    """The error for the value of a key, of a key in it, and so on, that is none of the expected."""
    value: Any = file.content
    for key in keys:
        value = value[key]
    return InputError(
        code,
        f"{'.'.join(keys)} is {json.dumps(value):.60}, expected {expected}",
        location=file.place(*keys),
        hint=hint,
    )


def is_whole(value: object) -> bool:
    """Whether a value is a whole number in JSON, where true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _after_space(text: str, position: int) -> int:
    match = SPACE.match(text, position)
    return match.end() if match else position


def _value_of(text: str, position: int, wanted: str) -> int | None:
    """Where the value of a key begins, in the object that begins at `position`.

    The last of equal keys is the one that holds.
    """
    found = None
    decoder = json.JSONDecoder()
    position = _after_space(text, position + 1)
    while text[position] == '"':
        key, position = decoder.raw_decode(text, position)
        position = _after_space(text, _after_space(text, position) + 1)
        found = position if key == wanted else found
        _, position = decoder.raw_decode(text, position)
        position = _after_space(text, position)
        if text[position] == ",":
            position = _after_space(text, position + 1)
    return found


def _item_of(text: str, position: int, index: int) -> int | None:
    """Where an item begins, in the list that begins at `position`."""
    decoder = json.JSONDecoder()
    position = _after_space(text, position + 1)
    for _ in range(index):
        if text[position] == "]":
            return None
        _, position = decoder.raw_decode(text, position)
        position = _after_space(text, position)
        if text[position] == ",":
            position = _after_space(text, position + 1)
    return None if text[position] == "]" else position


def _location(shown: str, text: str, position: int) -> Location:
    line_start = text.rfind("\n", 0, position) + 1
    return Location(shown, text.count("\n", 0, position) + 1, position - line_start + 1)
