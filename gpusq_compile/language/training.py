"""The models of the rules' `calibration` and `finetune` blocks: scales, losses and phases."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from gpusq_compile.language.blocks import (
    Block,
    BlockOrNone,
    Nullable,
    PositiveFloat,
    PositiveInt,
    RisingNumbers,
)


class Calibration(Block):
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
    damping: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.01,
        description="Share of the mean of the input's second moments that is added to each of "
        "them; for `method: obs` and `rounding: gptq` only.",
    )


class Loss(Block):
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


class Phase(Block):
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
        default=0.9, description="Momentum of SGD; the first beta of AdamW."
    )
    batch_size: Nullable[PositiveInt] = Field(
        default=None,
        description="Images per optimizer step, over all processes: gradients of as many batches "
        "of the training data are accumulated as that takes. `none` makes each batch a step.",
    )
    schedule: Literal["cosine", "constant", "multistep", "step", "polynomial"] = Field(
        default="cosine",
        description="How the learning rate goes on after the warm-up: along a `cosine` to 0, "
        "`constant`, times `decay` at each of the `milestones` (`multistep`) or every `step_size` "
        "epochs (`step`), or by the `power` of what is left (`polynomial`).",
    )
    milestones: Nullable[RisingNumbers] = Field(
        default=None,
        description="Epochs at which `schedule: multistep` decays, in rising order; needed there.",
    )
    step_size: Nullable[PositiveFloat] = Field(
        default=None,
        description="Epochs between two decays of `schedule: step`; needed there.",
    )
    decay: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.1, description="Factor of each decay of `schedule: multistep` and `step`."
    )
    power: PositiveFloat = Field(default=1.0, description="Exponent of `schedule: polynomial`.")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Steps over which the learning rate rises linearly from 0."
    )
    clip_norm: Nullable[PositiveFloat] = Field(
        default=None, description="Largest norm of the whole gradient; `none` to leave it alone."
    )
    autocast: Nullable[Literal["bfloat16", "float16"]] = Field(
        default=None,
        description="Type that the forward passes of teacher and student compute in; losses, "
        "weights and scales stay float32. `none` computes in float32.",
    )
    eval_every: Nullable[PositiveInt] = Field(
        default=None, description="Steps between two evaluations on the evaluation data."
    )
    keep: Literal["last", "best"] = Field(
        default="last",
        description="The weights that the phase ends with: the `last`, or the `best` by the "
        "evaluation data (evaluated after every epoch where `eval_every` is not given).",
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

    @model_validator(mode="after")
    def _knows_when_to_decay(self) -> Self:
        for schedule, key, example in (
            ("multistep", "milestones", "[27, 33]"),
            ("step", "step_size", "40"),
        ):
            if self.schedule == schedule and getattr(self, key) is None:
                raise PydanticCustomError(
                    "missing-key",
                    "schedule: {schedule} needs the key '{key}'",
                    {
                        "schedule": schedule,
                        "key": key,
                        "at": "schedule",
                        "hint": f"add `{key}: {example}`, in epochs",
                    },
                )
        return self


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


class Reconstruct(Block):
    """Fits each sparse quantized block to the dense one by itself, in order, without labels."""

    steps: PositiveInt = Field(default=200, description="Optimizer steps per block.")
    lr: PositiveFloat = Field(default=1e-4, description="Learning rate of the weights.")
    scale_lr: PositiveFloat = Field(
        default=1e-3, description="Learning rate of the scale factors, as in `finetune.quantize`."
    )
    batches: PositiveInt = Field(
        default=8, description="Batches of the calibration data that the blocks are fitted to."
    )


class Finetune(Block):
    """The two phases of distillation: dense to sparse, then sparse to sparse and quantized."""

    loss: Loss = Field(default=Loss(), description="Weights of the three loss parts.")
    labels: Literal["hard", "soft", "required"] = Field(
        default="hard",
        description="Stand-in for labels where the data has none: the teacher's argmax (`hard`) "
        "or its probabilities (`soft`). With `required` a batch without labels is an error.",
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
    decisions: Literal["teacher", "own"] = Field(
        default="teacher",
        description="Where the model decides by comparing what it computed (which tokens stop, "
        "which expert an image goes to), the student computes with the `teacher`'s decisions "
        "during the fine-tune, or with its `own`. Evaluated and deployed it makes its own.",
    )
    sparse: BlockOrNone[Phase] = Field(
        default=Phase(), description="The phase after pruning, or `none`: skip it."
    )
    reconstruct: BlockOrNone[Reconstruct] = Field(
        default="none",
        description="Block-wise reconstruction between quantization and its fine-tune phase.",
    )
    quantize: BlockOrNone[QuantizePhase] = Field(
        default=QuantizePhase(), description="The phase after quantization, or `none`: skip it."
    )
