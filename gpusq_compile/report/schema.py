"""What report.json holds: every key with its type and meaning, and the JSON schema made of them.

The schema is published with the package (`gpusq-report --schema`) and is open: a later version may
add keys without another `schema_version`; it will not take a key away, nor give one a new meaning.
A key that not every report of version 1 has is not required.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_PATH: Final = Path(__file__).resolve().with_name("report.schema.json")

Measured = Annotated[float | None, Field(description="null stands for NaN or infinity.")]
Answer = Literal["yes", "no", "unknown"]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Tool(Entry):
    """What wrote the report."""

    name: str
    version: str


class Failure(Entry):
    """The check or gate that failed."""

    code: str = Field(description="Stable name; gpusq-compile --explain CODE has its page.")
    message: str


class Target(Entry):
    compute: list[str] = Field(description="GPU generations, such as sm89, or portable.")
    precision: str = Field(description="Float type of what is not quantized.")


class RuleEntry(Entry):
    """One rule as resolved, in order."""

    id: str
    at: str = Field(description="Where it is written, file:line.")
    match: dict[str, Any]
    actions: dict[str, Any] = Field(
        description="Of sparsity, quantize and distill those it names, as written, or none."
    )


class Remark(Entry):
    kind: Literal["passed", "missed", "analysis"]
    code: str = Field(description="Stable name; gpusq-compile --explain CODE has its page.")
    layer: str | None
    reason: str


class PassEntry(Entry):
    """One pass that ran, in order."""

    name: str
    matched: Count = Field(description="Places it looked at because they were asked for.")
    changed: Count = Field(description="Places it rewrote.")
    skipped: Count = Field(description="Places it left, each with a remark that says why.")
    seconds: Seconds
    change: Measured = Field(
        description="Largest change of the outputs that it caused, in their standard deviations; "
        "null where no output changed hands."
    )
    remarks: list[Remark]


class Treatment(Entry):
    """How a layer is compressed; null is left as it is."""

    sparsity: str | None = Field(description="The pattern.")
    weight: str | None
    activation: str | None
    output: str | None


class Execution(Entry):
    """What TensorRT makes of the layer, by its types and mask."""

    kind: str = Field(description='Such as "sparse int8", "dense fp16" or "weight-only int4".')
    why: str


class LayerInEngine(Entry):
    """The layer in the first engine; its type in each of them by target."""

    type: str = Field(description="Type that is multiplied, or unknown.")
    eligible: Answer
    picked: Answer
    reason: str | None
    targets: dict[str, str]


class SparseKernel(Entry):
    """How far a layer's sparsity got: requested, in the file, eligible, picked."""

    requested: str
    mask_ok: bool | None
    eligible: Answer
    picked: Answer
    causes: list[str] = Field(description="Codes of what broke the chain.")
    reason: str | None


class Layer(Entry):
    """One operator with a weight, in graph order."""

    name: str = Field(description="The user's dotted name, without .weight.")
    role: str | None
    roles: list[str] = []
    op: str
    module: str = Field(default="", description="Full class of the user's module.")
    shape: list[Count] = Field(description="Of the weight: [out, in] or [out, in, kh, kw].")
    requested: Treatment
    applied: Treatment
    reasons: list[str] = Field(description="Why what was requested was refused.")
    rules: list[str] = Field(
        description='Rules that matched, in order: "file:line id: actions", with "(overridden)" '
        "behind those that a later one decides."
    )
    mask_ok: bool | None = Field(description="Whether the stored weight has its pattern.")
    weight_bytes: Count | None = Field(description="In model.onnx, with scales.")
    packed_bytes: Count | None = Field(default=None, description="In weights.safetensors.")
    execution: Execution | None = None
    engine: LayerInEngine
    sparse_kernel: SparseKernel | None = Field(
        default=None, description="null where no sparsity was requested."
    )


class AttentionInEngineTypes(Entry):
    type: str
    reason: str | None
    targets: dict[str, str]


class Attention(Entry):
    """One attention. `applied.activation` is the type of queries, keys, values and softmax."""

    name: str
    heads: Count | None
    head_dim: Count | None
    value_dim: Count | None
    queries: Count | None
    keys: Count | None
    biased: bool
    requested: Treatment
    planned: bool
    applied: Treatment
    reasons: list[str]
    rules: list[str]
    engine: AttentionInEngineTypes


class Tap(Entry):
    """Where the student follows the teacher."""

    name: str
    role: str
    theta: float
    rules: list[str]


class FitBlock(Entry):
    """One block of the reconstruction; errors in units of its output's variance."""

    layers: list[str]
    before: Measured
    after: Measured
    steps: Count
    seconds: Seconds


class Phase(Entry):
    """One phase of the fine-tune, or the reconstruction."""

    steps: Count
    seconds: Seconds
    images: Count
    stopped_by: str = Field(description="budget, threshold, patience or skipped.")
    reason: str | None = Field(default=None, description="Why it was skipped.")
    loss: list[dict[str, Measured]] = Field(
        description="Points of the curve: step (from 1), total, hard, soft, feature."
    )
    evaluations: list[dict[str, Measured]] = Field(
        default=[], description="step, then what was measured there."
    )
    kept_step: Count | None = Field(default=None, description="Step whose weights were kept.")
    resumed_at: Count | None = None
    settings: dict[str, Any] = {}
    tap_weights: dict[str, Measured] | None = Field(
        default=None, description="Weight of each tap in the quantized phase (W_j)."
    )
    blocks: list[FitBlock] | None = None


class Accuracy(Entry):
    """Top-1 by stage; null where it was not measured."""

    dense: Share | None
    sparse: Share | None
    quantized: Share | None
    onnx: Share | None


class Structure(Entry):
    layers: Count
    attentions: Count = 0
    faults: list[str]


class Numerics(Entry):
    """ONNX Runtime on the final file against the fake-quantized graph."""

    samples: Count
    min_cosine: Measured
    max_difference: Measured = Field(description="In standard deviations of the outputs.")
    worst_output: Count
    disagreements: Count | None
    median_lead: Measured = Field(
        default=None,
        description="What the best class leads the next one by in the graph's outputs, in their "
        "standard deviations; null where they are no logits.",
    )
    equal_answers: Measured = Field(
        default=None,
        description="Share of equal elements of the outputs without floats; null if all have.",
    )
    floats: bool = Field(default=True, description="Whether any output holds floats.")
    top1_agreement: Measured


class Limits(Entry):
    min_cosine: float
    min_top1_agreement: float
    max_difference: float


class Verify(Entry):
    """The checks of the final file; empty where they did not run."""

    structure: Structure | None = None
    numerics: Numerics | None = None
    limits: Limits | None = None
    ok: bool | None = None


class PaperRatio(Entry):
    printed: float
    derived: float


class Storage(Entry):
    """Bytes, and how many times fewer than FP32."""

    gemm_bytes: Count = Field(description="Compressed weights in model.onnx, with scales.")
    model_bytes: Count
    dense_fp32_bytes: Count
    gemm_dense_fp32_bytes: Count
    gemm_ratio: float | None
    model_ratio: float | None
    packed_bytes: Count | None = None
    packed_gemm_bytes: Count | None = None
    packed_scale_bytes: Count | None = None
    packed_gemm_ratio: float | None = None
    packed_gemm_ratio_with_scales: float | None = None
    packed_model_ratio: float | None = None
    paper_gemm_ratio: PaperRatio | None = None


class BeforeAfter(Entry):
    before: float
    after: float
    ratio: float | None


class ComputeSum(Entry):
    macs: Count
    flops: Count
    bit_operations: BeforeAfter
    equivalent_flops: BeforeAfter


class ComputeOperator(Entry):
    name: str
    kind: Literal["gemm", "attention"]
    macs: Count
    weight: str
    activation: str
    density: Share
    bit_operations: float
    equivalent_flops: float


class Compute(Entry):
    """What a sample costs to compute; docs/engines.md says how it is counted."""

    per: Literal["sample"]
    compressed_gemms: ComputeSum
    gemms: ComputeSum
    attention: ComputeSum
    model: ComputeSum
    operators: list[ComputeOperator]


class Gemm(Entry):
    """What one compressed layer became in an engine."""

    name: str
    expected: str
    actual: str
    status: Literal["passed", "missed", "unknown"]
    layer: str | None = Field(description="The engine's layer that holds it.")
    tactic: str | None
    eligible: Answer
    picked: Answer
    reason: str | None
    weight: str | None = Field(default=None, description="Type in which the weight is read.")


class FusedAttention(Entry):
    name: str
    expected: str
    actual: str
    status: Literal["passed", "missed", "unknown"]
    layer: str | None
    reason: str | None


class BuiltEngine(Entry):
    file: str = Field(description="Relative to the output folder.")
    bytes: Count
    seconds: Seconds
    gemms: list[Gemm]
    attentions: list[FusedAttention] = []


class Engines(Entry):
    backend: str | None
    version: str | None
    targets: dict[str, BuiltEngine]
    remarks: list[str]


class MissedGemm(Entry):
    layer: str
    type: str
    reason: str | None


class EngineLog(Entry):
    """A build elsewhere whose log was read: `gpusq-report --format json` adds it."""

    file: str
    version: str | None
    target: str | None
    sparse: bool | None = Field(description="Whether sparse kernels were allowed.")
    median_ms: float | None
    gemms: Count
    planned_type: Count
    unknown_type: Count
    missed: list[MissedGemm]
    eligible: Count | None
    picked: Count | None
    layers: dict[str, SparseKernel | None]
    attentions: list[FusedAttention]


class Report(Entry):
    """The report of one run of gpusq-compile."""

    schema_version: Literal[1]
    tool: Tool
    status: Literal["ok", "failed"]
    error: Failure | None
    model: str
    scope: str | None
    rules: list[str] = Field(description="Files, the outermost parent first.")
    rule_list: list[RuleEntry] = []
    target: Target | None = None
    seed: Count
    device: str
    seconds: Seconds | None = Field(default=None, description="Wall time of the whole compile.")
    passes: list[PassEntry]
    layers: list[Layer]
    attentions: list[Attention] = []
    taps: list[Tap] = []
    finetune: dict[str, Phase] = Field(description="By name: sparse, reconstruct, quantize.")
    accuracy: Accuracy
    metrics: dict[str, dict[str, Measured]] = Field(
        default={}, description="By stage, then by the name that the model file gave."
    )
    verify: Verify
    storage: Storage | None
    compute: Compute | None = None
    engine: Engines | None
    engine_logs: list[EngineLog] = []


def build_schema(*, closed: bool = False) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of report.json; a closed one refuses keys that it does not
    describe."""
    schema = Report.model_json_schema()
    _tidy(schema, closed)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "gpusq-compile report, version 1",
        **{key: value for key, value in schema.items() if key != "title"},
    }


def schema_text() -> str:
    """The text of the shipped schema file."""
    return json.dumps(build_schema(), indent=2, ensure_ascii=False) + "\n"


def _tidy(value: Any, closed: bool) -> None:
    """Drop titles made from key names and defaults, and what closes an object."""
    if isinstance(value, dict):
        if isinstance(value.get("title"), str):
            del value["title"]
        if "anyOf" in value or "type" in value or "$ref" in value:
            value.pop("default", None)
        if value.get("additionalProperties") is False and not closed:
            del value["additionalProperties"]
        if isinstance(value.get("description"), str):
            value["description"] = " ".join(value["description"].split())
    children = value.values() if isinstance(value, dict) else value
    for child in children:
        if isinstance(child, dict | list):
            _tidy(child, closed)
