"""The pieces that the models of the rules language are made of: shorthands and base types.

Values are strict: a quoted number is text, `true` is not 1, NaN and infinity are refused. Where
a validator raises `PydanticCustomError`, the error's type is the stable code that users see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Tag,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from gpusq_compile.language.patterns import PatternError, compile_pattern

Off = Literal["none"]

T = TypeVar("T")


@dataclass(frozen=True)
class Shorthand:
    """Rewrites a value before its type is checked, and says so in the JSON schema."""

    rewrite: Callable[[Any], Any]
    json_schema: Callable[[dict[str, Any]], dict[str, Any]]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.rewrite, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return self.json_schema(handler(schema))


def _one_or_more(value: object) -> object:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _list(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _none_is_null(value: object) -> object:
    return None if value == "none" else value


def _refuse_null(value: object) -> object:
    if value is None:
        raise PydanticCustomError("missing-value", "the key has no value")
    return value


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    kept = [branch for branch in schema["anyOf"] if branch != {"type": "null"}]
    return {**schema, "anyOf": kept} if len(kept) > 1 else {**kept[0]}


def _block_or_none(value: object) -> str:
    return "<none>" if isinstance(value, str) else "<block>"


def _check_pattern(value: str) -> str:
    try:
        compile_pattern(value)
    except PatternError as error:
        context = {"text": error.message, "offset": error.offset}
        raise PydanticCustomError(error.code, "{text}", context) from None
    return value


def _check_unique(value: tuple[T, ...]) -> tuple[T, ...]:
    for index, item in enumerate(value):
        if item in value[:index]:
            shown = f"{item:g}" if isinstance(item, float) else item
            raise PydanticCustomError("duplicate-value", "{item} is listed twice", {"item": shown})
    return value


def _check_rising(value: tuple[float, ...]) -> tuple[float, ...]:
    _check_unique(value)
    for before, item in pairwise(value):
        if item < before:
            raise PydanticCustomError(
                "invalid-value",
                "{item} comes after {before}; expected rising numbers",
                {"item": f"{item:g}", "before": f"{before:g}"},
            )
    return value


PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]

# In an Annotated type the shorthand comes last, which makes pydantic run it first.
OneOrMore = Annotated[
    tuple[T, ...],
    Field(min_length=1),
    AfterValidator(_check_unique),
    Shorthand(_one_or_more, lambda schema: {"anyOf": [schema["items"], schema]}),
]
AnyNumber = Annotated[
    tuple[T, ...],
    AfterValidator(_check_unique),
    Shorthand(_one_or_more, lambda schema: {"anyOf": [schema["items"], schema]}),
]
ListOf = Annotated[tuple[T, ...], Shorthand(_list, lambda schema: schema)]
RisingNumbers = Annotated[
    tuple[PositiveFloat, ...],
    Field(min_length=1),
    AfterValidator(_check_rising),
    Shorthand(_list, lambda schema: schema),
]
BlockOrNone = Annotated[
    Annotated[T, Tag("<block>")] | Annotated[Off, Tag("<none>")], Discriminator(_block_or_none)
]
# A key that may be left out, but not written down without a value.
Given = Annotated[T | None, Shorthand(_refuse_null, _without_null)]
# A key that may be switched off: `none` and an empty value mean the same.
Nullable = Annotated[
    T | None,
    Shorthand(
        _none_is_null, lambda schema: {**schema, "anyOf": [*schema["anyOf"], {"const": "none"}]}
    ),
]
NamePattern = Annotated[str, Field(min_length=1), AfterValidator(_check_pattern)]
Identifier = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]


class Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
