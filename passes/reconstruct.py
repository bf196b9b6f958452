"""reconstruct: fit each sparse quantized block to the dense one, from data without labels.

Needs `quantized`, and the dense teacher that sparsify kept. The blocks of the graph are trained
one after the other, weights and scale factors, on calibration data; masks stay frozen. A block
that would not come closer to the dense one stays as it was. Guarantees `reconstructed`.
"""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_leaves

from gpusq_compile.compilation import Compilation
from gpusq_compile.data import calibration_calls
from gpusq_compile.finetune.loop import skip_reason, skipped
from gpusq_compile.finetune.reconstruction import Reconstruction, reconstruct
from gpusq_compile.graph.walk import Call
from gpusq_compile.language.training import Reconstruct
from gpusq_compile.pass_base import Pass, PassResult
from gpusq_compile.quantization.fake_quantize import FakeQuantize
from gpusq_compile.remarks import Remark, analysis, missed, passed


def run(compilation: Compilation) -> PassResult:
    result = PassResult()
    settings = compilation.rules.finetune.reconstruct
    reason = skip_reason(compilation, "reconstruct", FakeQuantize)
    if reason is not None:
        result.matched = result.skipped = 1
        result.remarks.append(analysis("reconstruct-skipped", reason))
        compilation.finetune["reconstruct"] = {**skipped(reason), "blocks": []}
        return result
    assert isinstance(settings, Reconstruct)
    calls = calibration_calls(
        compilation.source, compilation.network, compilation.device, settings.batches
    )
    found = reconstruct(compilation, calls, settings)
    compilation.dense_teacher = None
    if not found:
        reason = "no quantized layer has a part in a floating-point output"
        result.matched = result.skipped = 1
        result.remarks.append(missed("reconstruct-skipped", reason))
        compilation.finetune["reconstruct"] = {**skipped(reason), "blocks": []}
        return result
    result.matched = len(found)
    result.changed = sum(block.kept for block in found)
    result.skipped = result.matched - result.changed
    result.remarks += [remark_on(block) for block in found]
    if compilation.source.synthetic:
        text = (
            "no data was given, so the blocks were fitted to generated noise and not to real "
            f"images; --data {compilation.source.data_forms} gives real ones"
        )
        compilation.console.warn(text)
        result.remarks.append(missed("synthetic-reconstruction", text))
    compilation.finetune["reconstruct"] = {
        "steps": sum(block.steps for block in found),
        "seconds": round(sum(block.seconds for block in found), 3),
        "images": sum(images_in(call) for call in calls),
        "stopped_by": "budget",
        "loss": [],
        "blocks": [block.as_dict() for block in found],
        "settings": settings.model_dump(mode="json"),
    }
    return result


def remark_on(block: Reconstruction) -> Remark:
    """What the fit did to the block's error, or why the block stayed as it was."""
    if block.kept:
        text = f"error {block.before:.2e} -> {block.after:.2e} of the variance"
        return passed("reconstructed", f"{text} in {block.steps} steps", block.name)
    if block.steps:
        text = (
            f"{block.steps} steps brought the error from {block.before:.2e} to "
            f"{block.reached:.2e} of the variance, so the block stays as it was"
        )
        return missed("not-reconstructed", text, block.name)
    exact = "its output is that of the dense one already"
    shared = "it shares every parameter with the rest of the model"
    return analysis("not-reconstructed", shared if block.before else exact, block.name)


def images_in(call: Call) -> int:
    return next(len(leaf) for leaf in tree_leaves(call) if torch.is_tensor(leaf) and leaf.ndim)


PASS = Pass(
    name="reconstruct",
    summary="fit each quantized block to the dense one on unlabelled data",
    run=run,
    requires=("quantized",),
    ensures=("reconstructed",),
)
