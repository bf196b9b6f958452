"""Globs stay within or cross dotted parts as the language says."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusq_compile.language.patterns import PatternError, compile_pattern


def is_match(pattern: str, name: str) -> bool:
    return compile_pattern(pattern).fullmatch(name) is not None


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("head", "head", True),
        ("head", "Head", False),
        ("head", "head.fc", False),
        ("*", "head", True),
        ("*", "head.fc", False),
        ("*.qkv", "attn.qkv", True),
        ("*.qkv", "blocks.0.attn.qkv", False),
        ("**.qkv", "blocks.0.attn.qkv", True),
        ("**.qkv", "qkv", True),
        ("**.qkv", "blocks.0.attn.my_qkv", False),
        ("**qkv", "blocks.0.attn.my_qkv", True),
        ("blocks.**", "blocks.0.attn", True),
        ("blocks.**", "blocks", False),
        ("blocks.**", "my.blocks.0", False),
        ("blocks.**.fc1", "blocks.fc1", True),
        ("blocks.**.fc1", "blocks.0.mlp.fc1", True),
        ("blocks.*.mlp.fc?", "blocks.11.mlp.fc2", True),
        ("blocks.?.mlp.fc?", "blocks.11.mlp.fc2", False),
        ("a?b", "a.b", False),
        ("**", "", True),
        ("**", "a.b.c", True),
        ("***", "a.b.c", True),
        ("blocks.[0-5].*", "blocks.3.attn", True),
        ("blocks.[0-5].*", "blocks.6.attn", False),
        ("blocks.[!0].*", "blocks.1.attn", True),
        ("blocks.[!0].*", "blocks.0.attn", False),
        ("a[!b]c", "a.c", False),
        ("a[.]c", "a.c", True),
        ("a+b", "a+b", True),
        ("a+b", "aab", False),
        ("a.b", "axb", False),
        ("re:blocks\\.\\d+\\.attn", "blocks.10.attn", True),
        ("re:blocks", "blocks.0", False),
        ("re:.*qkv", "blocks.0.attn.qkv", True),
    ],
)
def test_glob(pattern: str, name: str, expected: bool) -> None:
    assert is_match(pattern, name) is expected


@pytest.mark.parametrize(
    ("pattern", "code", "offset"),
    [
        ("re:(", "invalid-regex", 3),
        ("re:a**", "invalid-regex", 5),
        ("re:", "invalid-regex", 0),
        ("re:a{99999999999}", "invalid-regex", 0),
        ("a.[", "invalid-glob", 2),
        ("a.[]", "invalid-glob", 2),
        ("a.[9-0]", "invalid-glob", 2),
    ],
)
def test_bad_pattern_says_where(pattern: str, code: str, offset: int) -> None:
    with pytest.raises(PatternError) as caught:
        compile_pattern(pattern)
    assert (caught.value.code, caught.value.offset) == (code, offset)


part = st.text("ab0_", min_size=1, max_size=3)
names = st.lists(part, min_size=1, max_size=4).map(".".join)
glob_part = st.one_of(part, st.just("*"), st.just("**"), st.text("ab*?", min_size=1, max_size=3))
globs = st.lists(glob_part, min_size=1, max_size=4).map(".".join)


def by_hand(pattern: str, name: str, starts_part: bool = True) -> bool:
    """The semantics of globs again, as plain recursion."""
    if not pattern:
        return not name
    if pattern.startswith("**"):
        rest = pattern.lstrip("*")
        if starts_part and rest.startswith("."):
            starts = [0] + [i + 1 for i, char in enumerate(name) if char == "."]
            return any(by_hand(rest[1:], name[i:]) for i in starts)
        return any(by_hand(rest, name[i:], False) for i in range(len(name) + 1))
    if pattern[0] == "*":
        reach = name.find(".") if "." in name else len(name)
        return any(by_hand(pattern[1:], name[i:], False) for i in range(reach + 1))
    if not name or (name[0] == "." if pattern[0] == "?" else name[0] != pattern[0]):
        return False
    return by_hand(pattern[1:], name[1:], pattern[0] == ".")


@given(pattern=globs, name=names)
def test_globs_agree_with_a_plain_recursion(pattern: str, name: str) -> None:
    assert is_match(pattern, name) is by_hand(pattern, name)


@given(name=names)
def test_a_name_without_wildcards_is_a_pattern_for_itself_alone(name: str) -> None:
    assert is_match(name, name)
    assert not is_match(name, name + ".x")


@given(pattern=st.text())
def test_any_text_is_a_pattern_or_says_why_not(pattern: str) -> None:
    for text in (pattern, "re:" + pattern, f"a[{pattern}]"):
        with contextlib.suppress(PatternError):
            compile_pattern(text)
            continue
        with pytest.raises(PatternError) as caught:
            compile_pattern(text)
        assert 0 <= caught.value.offset <= len(text)
