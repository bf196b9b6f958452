"""Name patterns of the rules language: dotted globs and `re:` regular expressions.

A glob is compared with a whole dotted name, case-sensitively:

- `*` and `?` stay within one dotted part, `[0-5]` and `[!ab]` are one character of a part;
- `**` crosses parts, and `**.` also stands for no part at all, so `**.qkv` matches both `qkv`
  and `blocks.0.attn.qkv`.

A pattern that starts with `re:` is a Python regular expression for the whole name.
"""

from __future__ import annotations

import functools
import re
import warnings

REGEX_PREFIX = "re:"


class PatternError(ValueError):
    """A pattern that cannot be compiled; `offset` is where in its text, counted from 0."""

    def __init__(self, code: str, message: str, offset: int) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.offset = offset


@functools.lru_cache(maxsize=1024)
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The regular expression of a glob or `re:` pattern, for use with `fullmatch`.

    Raises PatternError (`invalid-regex`, `invalid-glob`).
    """
    with warnings.catch_warnings():
        # Python warns of spellings that later versions may read in another way, such as `[[`.
        warnings.simplefilter("ignore")
        return _compile_glob(pattern) if is_glob(pattern) else _compile_regex(pattern)


def is_glob(pattern: str) -> bool:
    """Whether `pattern` is a glob, in contrast to a `re:` regular expression."""
    return not pattern.startswith(REGEX_PREFIX)


def _compile_regex(pattern: str) -> re.Pattern[str]:
    text = pattern.removeprefix(REGEX_PREFIX)
    if not text:
        raise PatternError("invalid-regex", "there is no regular expression after re:", 0)
    try:
        return re.compile(text)
    except re.error as error:
        offset = len(REGEX_PREFIX) + (error.pos or 0)
        raise PatternError(
            "invalid-regex", f"not a regular expression: {error.msg}", offset
        ) from None
    except (OverflowError, RecursionError):
        raise PatternError(
            "invalid-regex", "not a regular expression: a number or nesting is too large", 0
        ) from None


def _compile_glob(pattern: str) -> re.Pattern[str]:
    parts: list[str] = []
    index = 0
    while index < len(pattern):
        rest = pattern[index:]
        if rest.startswith("**"):
            stars = len(rest) - len(rest.lstrip("*"))
            starts_part = index == 0 or pattern[index - 1] == "."
            if starts_part and rest[stars : stars + 1] == ".":
                parts.append(r"(?:[^.]+\.)*")
                stars += 1
            else:
                parts.append(".*")
            index += stars
        elif rest[0] == "*":
            parts.append("[^.]*")
            index += 1
        elif rest[0] == "?":
            parts.append("[^.]")
            index += 1
        elif rest[0] == "[":
            text, length = _character_class(pattern, index)
            parts.append(text)
            index += length
        else:
            parts.append(re.escape(rest[0]))
            index += 1
    return re.compile("".join(parts))


def _character_class(pattern: str, start: int) -> tuple[str, int]:
    """The regular expression of the `[...]` at `start`, and how many characters it takes."""
    found = re.match(r"\[(!?)([^\]]+)\]", pattern[start:])
    if found is None:
        raise PatternError("invalid-glob", "'[' has no matching ']' with characters between", start)
    negated, body = found[1], re.sub(r"([\\^\[&~|])", r"\\\1", found[2])
    text = f"[^.{body}]" if negated else f"[{body}]"
    try:
        re.compile(text)
    except re.error as error:
        raise PatternError("invalid-glob", f"{found[0]}: {error.msg}", start) from None
    return text, len(found[0])
