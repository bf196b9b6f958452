"""The rules language, version 1, as frozen pydantic models.

Everything a rules file may say is declared here once: type, default, bounds and description.
The JSON schema and `docs/rules.md` are generated from these models, and
`gpusq_compile.language.loader` turns their validation errors into messages with a place.

Values are strict: a quoted number is text, `true` is not 1, NaN and infinity are refused. Where
a validator raises `PydanticCustomError`, the error's type is the stable code that users see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Tag,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from gpusq_compile.language.patterns import PatternError, compile_pattern

LANGUAGE_VERSION: Final = 1

Op = Literal["linear", "conv2d", "layer_norm", "add"]
Role = Literal[
    "patch_embed",
    "attention_qkv",
    "attention_proj",
    "mlp",
    "stage_end",
    "final_projection",
    "classifier",
]
Compute = Literal["sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "portable"]
IntegerType = Literal["int8", "none"]
Off = Literal["none"]

T = TypeVar("T")


@dataclass(frozen=True)
class _Shorthand:
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


def _number_is_equals(value: object) -> object:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return {"equals": value} if is_number else value


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
            raise PydanticCustomError("duplicate-value", "{item} is listed twice", {"item": item})
    return value


# In an Annotated type the shorthand comes last, which makes pydantic run it first.
OneOrMore = Annotated[
    tuple[T, ...],
    Field(min_length=1),
    AfterValidator(_check_unique),
    _Shorthand(_one_or_more, lambda schema: {"anyOf": [schema["items"], schema]}),
]
ListOf = Annotated[tuple[T, ...], _Shorthand(_list, lambda schema: schema)]
BlockOrNone = Annotated[
    Annotated[T, Tag("<block>")] | Annotated[Off, Tag("<none>")], Discriminator(_block_or_none)
]
# A key that may be left out, but not written down without a value.
Given = Annotated[T | None, _Shorthand(_refuse_null, _without_null)]
# A key that may be switched off: `none` and an empty value mean the same.
Nullable = Annotated[
    T | None,
    _Shorthand(
        _none_is_null, lambda schema: {**schema, "anyOf": [*schema["anyOf"], {"const": "none"}]}
    ),
]
NamePattern = Annotated[str, Field(min_length=1), AfterValidator(_check_pattern)]
Identifier = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Sparsity(_Block):
    """Zeroes weights in a pattern that the sparse tensor cores skip."""

    pattern: Literal["2:4"] = Field(
        description='`"2:4"` keeps at most two weights of each aligned group of four along the '
        "reduction axis. The quotes are needed."
    )
    method: Literal["magnitude"] = Field(
        default="magnitude",
        description="How the weights that stay are chosen: `magnitude` keeps the largest.",
    )


class Quantize(_Block):
    """Stores and computes a layer in a small integer type.

    All of it is symmetric with zero-point 0: weights with one scale per output channel,
    activations and outputs with one scale per tensor.
    """

    weight: IntegerType = Field(description="Type of the stored weight.")
    activation: IntegerType = Field(
        default="int8",
        description="Type of the layer's input. With `none` only the weight is small and the "
        "layer computes in the target's precision.",
    )
    output: IntegerType = Field(
        default="none",
        description="Type of the layer's output. `int8` keeps the whole GEMM, epilogue included, "
        "on integers; TensorRT picks sparse INT8 kernels only then.",
    )

    @model_validator(mode="after")
    def _quantizes_something(self) -> Self:
        if self.weight == self.activation == self.output == "none":
            raise PydanticCustomError(
                "empty-block",
                "the block quantizes nothing: weight, activation and output are all none",
                {"hint": "write `quantize: none` to switch quantization off"},
            )
        return self


class Distill(_Block):
    """Makes a layer's output a tap: the student is pulled towards the teacher there."""

    loss: Literal["mse"] = Field(
        default="mse", description="Distance between teacher and student at the tap."
    )
    theta: PositiveFloat = Field(
        default=1.0, description="Weight of this tap within the feature loss."
    )
    every: PositiveInt = Field(
        default=1,
        description="Of the layers that are given this block, in graph order, tap each n-th one; "
        "the last is always tapped.",
    )


class SizePredicate(_Block):
    """A condition on a layer's size. The conditions given must all hold."""

    equals: Given[PositiveInt] = Field(
        default=None, description="The size is this one; `in_features: 768` is the short form."
    )
    multiple_of: Given[PositiveInt] = Field(
        default=None, description="The size is a multiple of this number."
    )
    min: Given[PositiveInt] = Field(default=None, description="The size is at least this.")
    max: Given[PositiveInt] = Field(default=None, description="The size is at most this.")

    @model_validator(mode="after")
    def _can_hold(self) -> Self:
        if not self.given():
            raise PydanticCustomError(
                "empty-block",
                "the predicate has no condition",
                {"hint": "give at least one of equals, multiple_of, min, max"},
            )
        if self.min is not None and self.max is not None and self.min > self.max:
            raise PydanticCustomError(
                "contradiction",
                "no size is at least {min} and at most {max}",
                {"min": self.min, "max": self.max},
            )
        return self

    def given(self) -> dict[str, int]:
        """The conditions that were given, by key."""
        return {key: value for key, value in self if value is not None}

    def holds(self, size: int | None) -> bool:
        """Whether `size` meets every condition; a layer without such a size never does."""
        if size is None:
            return False
        return (
            (self.equals is None or size == self.equals)
            and (self.multiple_of is None or size % self.multiple_of == 0)
            and (self.min is None or size >= self.min)
            and (self.max is None or size <= self.max)
        )


Size = Annotated[
    SizePredicate,
    _Shorthand(
        _number_is_equals,
        lambda schema: {"anyOf": [{"type": "integer", "minimum": 1}, schema]},
    ),
]


class Match(_Block):
    """Which layers a rule speaks about: every key given must hold, any entry of a list does."""

    op: Given[OneOrMore[Op]] = Field(default=None, description="Kind of operator. One or a list.")
    role: Given[OneOrMore[Role]] = Field(
        default=None,
        description="Part that the layer plays in the network, found from the graph. One or a "
        "list.",
    )
    name: Given[OneOrMore[NamePattern]] = Field(
        default=None,
        description="Dotted name of the layer: a glob (`*` stays within one part, `**` crosses "
        'parts: `"**.qkv"`) or `"re:..."`, a regular expression for the whole name. One or a '
        "list. Quote it.",
    )
    module: Given[OneOrMore[NamePattern]] = Field(
        default=None,
        description="Class of the layer's module, as a glob or `re:...`: of the class name "
        "(`Linear`), or of the full path where the pattern has a dot "
        "(`torch.nn.modules.linear.Linear`). One or a list.",
    )
    in_features: Given[Size] = Field(
        default=None,
        description="Size of the reduction axis: a number, or `{multiple_of: 32, min: 64}`.",
    )
    out_features: Given[Size] = Field(
        default=None, description="Number of output channels, written like `in_features`."
    )

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if all(value is None for _, value in self):
            raise PydanticCustomError(
                "empty-match",
                "the match has no condition, so it would take every layer",
                {"hint": 'write `match: {op: linear}`, or `match: {name: "**"}` for every layer'},
            )
        return self


class Rule(_Block):
    """One match and what to do with the layers it takes.

    Rules are read in order. For each action (`sparsity`, `quantize`, `distill`) the last rule
    that matches a layer and names the action decides, with its whole block. A layer that no rule
    matches stays as it is.
    """

    id: Identifier = Field(
        description="Name of the rule, unique in the file. A file that extends another one "
        "replaces an inherited rule by using its id."
    )
    match: Match = Field(description="The layers that the rule speaks about.")
    sparsity: Given[BlockOrNone[Sparsity]] = Field(
        default=None, description="Prune the weight, or `none`: leave it dense."
    )
    quantize: Given[BlockOrNone[Quantize]] = Field(
        default=None, description="Quantize the layer, or `none`: leave it in float."
    )
    distill: Given[BlockOrNone[Distill]] = Field(
        default=None, description="Tap the output for the fine-tune, or `none`: do not tap it."
    )
    optional: bool = Field(
        default=False,
        description="Whether the rule may match no layer; without it that is an error.",
    )
    expect: Nullable[Annotated[int, Field(ge=0)]] = Field(
        default=None,
        description="How many layers the rule must match (an optional one: or none); another count "
        "fails the compile with exit code 1.",
    )

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.sparsity is None and self.quantize is None and self.distill is None:
            raise PydanticCustomError(
                "rule-without-action",
                "rule '{id}' says nothing about the layers it matches",
                {"id": self.id, "hint": "give it at least one of sparsity, quantize, distill"},
            )
        return self


class Target(_Block):
    """What the result is built for."""

    runtime: Literal["tensorrt"] = Field(default="tensorrt", description="The inference runtime.")
    compute: OneOrMore[Compute] = Field(
        default=("portable",),
        description="GPU generations to build an engine for. `portable` is one engine for all "
        "generations that the builder can serve at once. One or a list.",
    )
    precision: Literal["fp16", "fp32"] = Field(
        default="fp16", description="Float type of everything that is not quantized."
    )


class Calibration(_Block):
    """How the scales are found before the quantized fine-tune starts to learn them."""

    batches: PositiveInt = Field(
        default=8, description="Batches of the calibration data that are looked at."
    )
    weight: Literal["max", "mse"] = Field(
        default="mse",
        description="Range of the weights per output channel: the largest magnitude, or the range "
        "with the smallest squared rounding error.",
    )
    activation: Literal["max", "percentile", "mse"] = Field(
        default="percentile",
        description="Range of the activations per tensor: the largest magnitude, a percentile of "
        "the magnitudes, or the range with the smallest squared rounding error.",
    )
    percentile: Annotated[float, Field(gt=0, le=100)] = Field(
        default=99.99, description="The percentile, in percent; for `activation: percentile` only."
    )


class Loss(_Block):
    """`alpha * hard label + beta * soft logits + gamma * features`, the loss of both phases."""

    alpha: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="Weight of the cross-entropy with the labels."
    )
    beta: Annotated[float, Field(ge=0)] = Field(
        default=10.0, description="Weight of the KL divergence from the teacher's logits."
    )
    gamma: Annotated[float, Field(ge=0)] = Field(
        default=5.0, description="Weight of the feature loss over the taps."
    )
    temperature: PositiveFloat = Field(
        default=1.0,
        description="Temperature of the soft logits. The KL term is multiplied by its square.",
    )

    @model_validator(mode="after")
    def _trains_something(self) -> Self:
        if self.alpha == self.beta == self.gamma == 0:
            raise PydanticCustomError(
                "empty-block",
                "alpha, beta and gamma are all 0, so there is nothing to learn from",
                {"hint": "switch a phase off with `sparse: none` or `quantize: none`"},
            )
        return self


class Phase(_Block):
    """One phase of the fine-tune. It ends at the first of its limits that is met."""

    epochs: PositiveFloat = Field(
        default=2.0, description="Passes over the training data; may be a fraction."
    )
    max_steps: Nullable[PositiveInt] = Field(
        default=None, description="Largest number of optimizer steps; `none` for no such limit."
    )
    optimizer: Literal["adamw", "sgd"] = Field(default="adamw", description="The optimizer.")
    lr: PositiveFloat = Field(
        default=1e-4, description="Learning rate of the weights at its highest."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.01,
        description="Weight decay of the weight matrices. It never reaches a pruned weight, a "
        "bias, a norm or a scale factor.",
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.9, description="Momentum; for `optimizer: sgd` only."
    )
    schedule: Literal["cosine", "constant"] = Field(
        default="cosine", description="How the learning rate goes on after the warm-up."
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Steps over which the learning rate rises linearly from 0."
    )
    clip_norm: Nullable[PositiveFloat] = Field(
        default=None, description="Largest norm of the whole gradient; `none` to leave it alone."
    )
    threshold: Nullable[PositiveFloat] = Field(
        default=None,
        description="The phase ends once the smoothed loss is below this value; `none` for no "
        "such limit.",
    )
    patience: Nullable[PositiveInt] = Field(
        default=None,
        description="The phase ends after this many steps without a better smoothed loss; `none` "
        "for no such limit.",
    )


class QuantizePhase(Phase):
    """The phase after quantization: like the sparse one, and the scale factors learn too."""

    lr: PositiveFloat = Field(
        default=5e-5, description="Learning rate of the weights at its highest."
    )
    scale_lr: PositiveFloat = Field(
        default=1e-3,
        description="Learning rate of the scale factors at its highest. They are learned as "
        "logarithms, so with AdamW it is the relative change of a step.",
    )


class Finetune(_Block):
    """The two phases of distillation: dense to sparse, then sparse to sparse and quantized."""

    loss: Loss = Field(default=Loss(), description="Weights of the three loss parts.")
    labels: Literal["hard", "soft"] = Field(
        default="hard",
        description="Stand-in for labels where the data has none: the teacher's argmax (`hard`) "
        "or its probabilities (`soft`).",
    )
    tap_weights: Literal["prune_loss", "uniform"] = Field(
        default="prune_loss",
        description="Weights of the taps in the quantize phase: each tap's share of the loss "
        "between the dense and the sparse model, or all alike.",
    )
    normalize: Literal["none", "teacher_variance"] = Field(
        default="none",
        description="`teacher_variance` divides each tap's loss by the variance of the teacher's "
        "output there, so that layers with large values do not drown the others.",
    )
    sparse: BlockOrNone[Phase] = Field(
        default=Phase(), description="The phase after pruning, or `none`: skip it."
    )
    quantize: BlockOrNone[QuantizePhase] = Field(
        default=QuantizePhase(), description="The phase after quantization, or `none`: skip it."
    )


class Verify(_Block):
    """Limits for the final ONNX file in ONNX Runtime against the fake-quantized graph.

    Both see the same real batches. A limit that is not kept fails the compile with exit code 1.
    """

    min_cosine: Annotated[float, Field(ge=-1, le=1)] = Field(
        default=0.99, description="Smallest cosine similarity of the outputs of one sample."
    )
    min_top1_agreement: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.97, description="Smallest share of samples for which both name the same class."
    )
    max_difference: PositiveFloat = Field(
        default=0.5,
        description="Largest absolute difference of one output value, divided by the standard "
        "deviation of the reference outputs.",
    )


class RulesFile(_Block):
    """A rules file: what to do with which layers, for which target, with how much fine-tune."""

    version: Literal[1] = Field(description="Version of the rules language.")
    extends: Given[str] = Field(
        default=None,
        description="A shipped rules file by name, or a path relative to this file. Its rules come "
        "first, an equal id replaces a rule in its place, other keys are merged and this file "
        "wins.",
    )
    scope: Nullable[Annotated[str, Field(min_length=1)]] = Field(
        default=None, description="Dotted name of the submodule to compile; all of it without."
    )
    target: Target = Field(default=Target(), description="What the result is built for.")
    rules: ListOf[Rule] = Field(default=(), description="The rules, in order.")
    calibration: Calibration = Field(
        default=Calibration(), description="How scales are found from data."
    )
    finetune: Finetune = Field(
        default=Finetune(), description="The two phases of the distillation."
    )
    verify: Verify = Field(
        default=Verify(), description="Limits of the check on the final ONNX file."
    )
