"""The rules language, version 1, as frozen pydantic models.

Everything a rules file may say is declared here and in `training.py` once: type, default, bounds
and description. The JSON schema and `docs/rules.md` are generated from these models, and
`gpusq_compile.language.loader` turns their validation errors into messages with a place.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self, get_args

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from gpusq_compile.language.blocks import (
    AnyNumber,
    Block,
    BlockOrNone,
    Given,
    Identifier,
    ListOf,
    NamePattern,
    Nullable,
    OneOrMore,
    PositiveFloat,
    PositiveInt,
    Shorthand,
)
from gpusq_compile.language.training import Calibration, Finetune

LANGUAGE_VERSION: Final = 1

Op = Literal["linear", "conv2d", "layer_norm", "add", "attention"]
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
IntegerType = Literal["int8", "int4", "none"]
BlockSize = Literal[64, 128]
BLOCK_SIZES: Final[tuple[BlockSize, ...]] = get_args(BlockSize)
PassName = Literal[
    "permute",
    "tap",
    "sparsify",
    "finetune_sparse",
    "smooth",
    "quantize",
    "reconstruct",
    "finetune_quantized",
]


class Sparsity(Block):
    """Zeroes weights in a pattern that the sparse tensor cores skip."""

    pattern: Literal["2:4", "pair4:8", "portable"] = Field(
        description='`"2:4"` keeps two weights of each aligned group of four along the reduction '
        "axis, what the sparse FP16 and INT8 tensor cores take. `pair4:8` keeps two of the four "
        "aligned pairs of each eight, what the sparse INT4 tensor cores take (PTX `mma.sp`). "
        '`portable` keeps one aligned pair of each four, which both take. Quote `"2:4"`.'
    )
    method: Literal["magnitude", "wanda", "obs"] = Field(
        default="magnitude",
        description="How the weights that stay are chosen. `magnitude` keeps the largest; `wanda` "
        "the largest after multiplying by the norm of the input that they meet; `obs` those whose "
        "loss the others can make up for least, and corrects the others (SparseGPT). The last two "
        "look at the calibration data.",
    )
    permute: bool = Field(
        default=False,
        description="Before the mask is chosen, reorder the layer's input channels so that more "
        "of the weight survives, wherever that leaves the network's function as it is: the hidden "
        "axis of an MLP, and the channels within a head from V to the projection.",
    )


class Quantize(Block):
    """Stores and computes a layer in a small integer type.

    All of it is symmetric with zero-point 0: weights with one scale per output channel,
    activations and outputs with one scale per tensor. `int8` holds weights of -127 to 127 and
    activations of -128 to 127, `int4` weights of -7 to 7 and activations of -8 to 7. INT4 values
    are stored and multiplied as INT8, which is what the tensor cores take; with `block` weights
    are stored in 4 bits and multiplied in float.
    """

    weight: IntegerType = Field(description="Type of the stored weight.")
    activation: IntegerType = Field(
        default="int8",
        description="Type of the layer's input; of an attention, that of queries, keys, values and "
        "softmax output. With `none` only the weight is small and the layer computes in the "
        "target's precision.",
    )
    output: Literal["int8", "int4", "none", "auto"] = Field(
        default="none",
        description="Type of the layer's output. `int8` keeps the whole GEMM, epilogue included, "
        "on integers; TensorRT picks sparse INT8 kernels only then. `auto` is `int8` where a GPU "
        "of the target has no other sparse INT8 kernels, and `none` elsewhere.",
    )
    block: Nullable[BlockSize] = Field(
        default=None,
        description="For INT4 weights under float activations: one scale for each `block` input "
        "channels of each output channel, in place of one for all of them. The weight is stored "
        "in 4 bits, and TensorRT's GEMM dequantizes it on the way to its multiplications where it "
        "has two blocks or more.",
    )
    split: bool = Field(
        default=False,
        description="Store a layer whose output is cut into equal parts, such as a fused QKV, as "
        "one GEMM per part. Their values are those of the fused one; they share its quantized "
        "input, and TensorRT fuses them into one INT8 GEMM again.",
    )
    rounding: Literal["nearest", "gptq"] = Field(
        default="nearest",
        description="How the weights get onto the integer grid at first. `gptq` rounds them one "
        "input channel after the other and lets the later ones make up for each error on the "
        "calibration data; the fine-tune starts from there.",
    )
    smooth: Nullable[Annotated[float, Field(ge=0, le=1)]] = Field(
        default=None,
        description="Before quantization, move the spread between the input's channels from the "
        "LayerNorm in front of the layer into its weight: 0 moves nothing that activations have, 1 "
        "all of it (SmoothQuant's alpha). `none` leaves both alone.",
    )

    @model_validator(mode="after")
    def _quantizes_something(self) -> Self:
        if self.weight == self.activation == self.output == "none":
            raise PydanticCustomError(
                "empty-block",
                "the block quantizes nothing: weight, activation and output are all none",
                {"hint": "write `quantize: none` to switch quantization off"},
            )
        if self.rounding == "gptq" and self.weight == "none":
            raise PydanticCustomError(
                "contradiction",
                "rounding: gptq rounds the weight, and the weight stays in float",
                {"at": "rounding", "hint": "remove it, or give `weight` an integer type"},
            )
        if self.block is not None and (self.weight, self.activation, self.output) != (
            "int4",
            "none",
            "none",
        ):
            raise PydanticCustomError(
                "contradiction",
                "block divides the scales of INT4 weights in a GEMM that is float otherwise; here "
                "weight is {weight}, activation {activation} and output {output}",
                {
                    "at": "block",
                    "hint": "remove it, or write {weight: int4, activation: none, output: none}",
                    **{key: getattr(self, key) for key in ("weight", "activation", "output")},
                },
            )
        if self.smooth is not None and self.activation == "none":
            raise PydanticCustomError(
                "contradiction",
                "smooth evens out the channels of a quantized input, and the input stays in float",
                {"at": "smooth", "hint": "remove it, or give `activation` an integer type"},
            )
        return self


class Distill(Block):
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


class SizePredicate(Block):
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


def _number_is_equals(value: object) -> object:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return {"equals": value} if is_number else value


Size = Annotated[
    SizePredicate,
    Shorthand(
        _number_is_equals,
        lambda schema: {"anyOf": [{"type": "integer", "minimum": 1}, schema]},
    ),
]


class Match(Block):
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
    kernel_size: Given[Size] = Field(
        default=None,
        description="The longer side of a convolution's kernel, written like `in_features`; 1 of a "
        "linear. `op: [linear, conv2d]` with `kernel_size: 1` are the GEMMs of a model, those "
        "written as convolutions too.",
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


class Rule(Block):
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


DEFAULT_ORDER: Final[tuple[PassName, ...]] = get_args(PassName)


class Target(Block):
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


class Verify(Block):
    """Limits for the final ONNX file in ONNX Runtime against the fake-quantized graph.

    Both see the same real batches. A limit that is not kept fails the compile with exit code 1.
    """

    min_cosine: Annotated[float, Field(ge=-1, le=1)] = Field(
        default=0.99, description="Smallest cosine similarity of the outputs of one sample."
    )
    min_top1_agreement: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.97,
        description="Smallest share of samples for which both name the same class. Left out where "
        "the samples are generated noise, for want of data: no class is right there.",
    )
    max_difference: PositiveFloat = Field(
        default=0.5,
        description="Largest absolute difference of one output value, divided by the standard "
        "deviation of the reference outputs.",
    )


class RoleNames(Block):
    """Which layers have a role, in place of those that were found to have it.

    Each role takes names as `match` does, or a list of them. A module's name stands for what is in
    it: for `stage_end` and `final_projection` its last residual add, or else its output, for the
    other roles all its linears and convolutions. A name that matches nothing is an error. With
    `[]` no layer has the role. `--dry-run` shows the roles that were found.
    """

    patch_embed: Given[AnyNumber[NamePattern]] = Field(
        default=None, description="Where tokens begin: the last layer in front of the first block."
    )
    attention_qkv: Given[AnyNumber[NamePattern]] = Field(
        default=None, description="What makes queries, keys and values."
    )
    attention_proj: Given[AnyNumber[NamePattern]] = Field(
        default=None, description="The first layer behind an attention."
    )
    mlp: Given[AnyNumber[NamePattern]] = Field(
        default=None, description="The layers on both sides of an activation function."
    )
    stage_end: Given[AnyNumber[NamePattern]] = Field(
        default=None,
        description="The end of the last block of each stage; as many as there are stages.",
    )
    final_projection: Given[AnyNumber[NamePattern]] = Field(
        default=None, description="The last normalization, in front of the classifier."
    )
    classifier: Given[AnyNumber[NamePattern]] = Field(
        default=None, description="The layer that makes logits."
    )

    def given(self) -> dict[str, tuple[str, ...]]:
        """The names of each role that is spoken about."""
        return {role: names for role, names in self if names is not None}


class RulesFile(Block):
    """A rules file: what to do with which layers, for which target, with how much fine-tune."""

    version: Literal[1] = Field(description="Version of the rules language.")
    extends: Given[OneOrMore[str]] = Field(
        default=None,
        description="A shipped rules file by name, or a path relative to this file. Its rules come "
        "first, an equal id replaces a rule in its place, other keys are merged and this file "
        "wins. Of a list a later entry wins over an earlier one; what several of them extend is "
        "read once, before all of them.",
    )
    scope: Nullable[Annotated[str, Field(min_length=1)]] = Field(
        default=None, description="Dotted name of the submodule to compile; all of it without."
    )
    roles: RoleNames = Field(
        default=RoleNames(),
        description="Layers that have a role, where what was found is not what is meant.",
    )
    passes: OneOrMore[PassName] = Field(
        default=DEFAULT_ORDER,
        description="The order in which the compressing passes run. Each stands in it once; an "
        "order that cannot work is an error that says why.",
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
