"""verify_onnx: is the final file what was asked for, and does it compute the same?

Needs `onnx_final`. Writes the file, reads it back, and checks on what it read:
- structure: sparsity on the stored integers, scales, axes, zero-points of every layer, and Q/DQ on
  all that a quantized attention multiplies;
- numerics: ONNX Runtime against the fake-quantized graph on real batches, within the rules'
  limits, and top-1 and metrics over the evaluation data.
Guarantees `verified`.

Raises CheckFailed with the layer or the limit that fell short.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict

import onnx
import torch

from gpusq_compile.accuracy import measure
from gpusq_compile.attention_plan import planned_attentions
from gpusq_compile.batch_inputs import size_of
from gpusq_compile.compilation import Compilation
from gpusq_compile.data import logits_of
from gpusq_compile.errors import CheckFailed, InputError
from gpusq_compile.lowering.check import check_layers
from gpusq_compile.lowering.check_attention import check_attentions
from gpusq_compile.lowering.runtime import (
    Expected,
    Numerics,
    SessionModule,
    at_its_line,
    compare,
    open_session,
    run_session,
    structured,
)
from gpusq_compile.output_cache import Cached
from gpusq_compile.pass_base import Pass, PassResult
from gpusq_compile.plan import Treatment, planned
from gpusq_compile.remarks import analysis, passed

MODEL_FILE = "model.onnx"


def run(compilation: Compilation) -> PassResult:
    assert compilation.onnx_model is not None
    path = compilation.workdir / MODEL_FILE
    onnx.save(compilation.onnx_model, path)
    written = onnx.load(path)
    plans = [plan for _, plan in planned(compilation.ir.graph) if plan.applied != Treatment()]
    stored = check_layers(written, plans)
    compilation.stored = {layer.name: layer for layer in stored}
    result = PassResult(matched=len(stored), changed=0)
    broken = [f"{layer.name}: {fault}" for layer in stored for fault in layer.faults]
    attentions = [plan for _, plan in planned_attentions(compilation.ir.graph)]
    attentions = [plan for plan in attentions if plan.applied != Treatment()]
    broken += check_attentions(written, attentions)
    del written
    assert compilation.convention is not None
    with at_its_line(compilation.onnx_places):
        session = open_session(path)
        runtime = SessionModule(session, compilation.convention, compilation.device)
        stand_in = Cached(runtime)
        found = answers(stand_in, runtime, compilation.expected)
        numerics = compare(compilation.expected, found, logits_finder(compilation))
    limits = compilation.rules.verify
    decides = numerics.disagreements is not None or not numerics.floats
    if compilation.source.synthetic and decides:
        # On noise no class is right, and which of them wins is an accident of the last digits.
        limits = limits.model_copy(update={"min_top1_agreement": 0.0})
        text = (
            f"{said_of_answers(numerics)}, on generated noise, where none is right: the limit on "
            "them is left out"
        )
        result.remarks.append(analysis("top1-on-noise", text))
    compilation.verify = {
        "structure": {
            "layers": len(stored),
            "attentions": len(attentions),
            "faults": broken,
        },
        "numerics": {**asdict(numerics), "top1_agreement": numerics.top1_agreement},
        "limits": limits.model_dump(mode="json"),
    }
    faults = broken + numerics.shortfalls(limits)
    compilation.verify["ok"] = not faults
    if faults:
        more = f" (and {len(faults) - 1} more, in the report)" if len(faults) > 1 else ""
        raise CheckFailed("verify", f"{faults[0]}{more}", hint=way_out(numerics, faults[0]))
    result.remarks.append(passed("structure", f"{len(stored)} layers are stored as planned"))
    result.remarks.append(
        analysis(
            "numerics",
            f"{numerics.samples} samples: cosine >= {numerics.min_cosine:.6f}, "
            f"{said_of_answers(numerics)}, "
            f"largest difference {numerics.max_difference:.4f} std",
        )
    )
    measure(compilation, "onnx", stand_in)
    return result


def said_of_answers(numerics: Numerics) -> str:
    if not numerics.floats:
        return f"{numerics.equal_answers or 0.0:.1%} of the answers are equal"
    if numerics.disagreements is None:
        return "no top-1"
    return f"{numerics.disagreements} of {numerics.samples} top-1 answers differ"


def answers(
    stand_in: Cached, runtime: SessionModule, expected: list[Expected]
) -> Iterator[list[torch.Tensor]]:
    """The runtime's outputs batch by batch; `stand_in` keeps them, to measure with."""
    for batch in expected:
        outputs = run_session(runtime.session, batch.inputs)
        stand_in.keep(batch.inputs, runtime.restored(outputs))
        yield outputs


def way_out(numerics: Numerics, fault: str) -> str | None:
    """What to say where answers differ: whether the model itself hardly decides between them."""
    if "min_top1_agreement" not in fault:
        return None
    if not numerics.undecided:
        return (
            "more calibration data make the share more certain, and a fine-tune the answers; "
            "`verify: {min_top1_agreement: ...}` in the rules sets the limit"
        )
    return (
        f"in the graph the best class leads the next one by {numerics.median_lead:.2f} standard "
        f"deviations in the median, and outputs differ by up to {numerics.max_difference:.2f}: the "
        "model is undecided, as one without trained weights is; `verify: {min_top1_agreement: 0}` "
        "in the rules leaves top-1 out"
    )


def logits_finder(compilation: Compilation) -> Callable[[list[torch.Tensor]], torch.Tensor] | None:
    """From the compiled module's flat outputs to logits; None where they are none of the samples.

    A row of logits may also stand for a pixel or a box, of which there is no top-1 to agree on.
    """
    convention = compilation.convention
    assert convention is not None
    if compilation.network.scope is not None:
        return None

    def find(outputs: list[torch.Tensor]) -> torch.Tensor:
        return logits_of(structured(outputs, convention), compilation.source.logits)

    first = compilation.expected[0]
    try:
        rows = len(find(first.outputs))
    except InputError:
        return None
    return find if rows == size_of(tuple(first.inputs)) else None


PASS = Pass(
    name="verify_onnx",
    summary="check the written file's structure and numerics",
    run=run,
    requires=("onnx_final",),
    ensures=("verified",),
)
