"""What holds for every compiled model of a family: it trained, is sparse, and its files compute."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import onnxruntime
import torch
from torch import Tensor, nn

from gpusq_compile.api import CompileResult
from gpusq_compile.language.schema import Verify
from gpusq_compile.lowering.runtime import compare, open_session, record, run_session
from gpusq_compile.sparsity import PATTERNS, violations


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that the user left to train, by name."""
    named = module.named_parameters()
    return {name: value.detach().clone() for name, value in named if value.requires_grad}


def compressed_layers(result: CompileResult) -> dict[str, str]:
    """The pattern of each compressed layer, by its name in the whole model."""
    scope = result.report["scope"]
    return {
        layer["name"] if scope is None else f"{scope}.{layer['name']}": layer["applied"]["sparsity"]
        for layer in result.report["layers"]
        if layer["applied"]["weight"]
    }


def check_trained(result: CompileResult, dense: Mapping[str, Tensor], *, steps: int) -> None:
    """Each phase took its steps by finite losses, and all that is trainable moved.

    `dense` are the model's parameters before. Those of the compressed layers are left out: pruning,
    rounding and another order of channels change them without any training.
    """
    for phase in ("sparse", "quantize"):
        report = result.report["finetune"][phase]
        assert (report["steps"], len(report["loss"])) == (steps, steps)
        for point in report["loss"]:
            assert all(math.isfinite(value) for value in point.values())
            assert min(point["hard"], point["feature"]) > 0
    trained, compressed = result.state_dict(), compressed_layers(result)
    others = [
        name for name in trained if name in dense and name.rpartition(".")[0] not in compressed
    ]
    assert len(others) >= 8
    still = [name for name in others if torch.equal(trained[name], dense[name])]
    assert still == []


def check_masks(result: CompileResult) -> None:
    """The deployed weights have their pattern's zeros, and not only zeros."""
    assert all(
        layer["mask_ok"] for layer in result.report["layers"] if layer["applied"]["sparsity"]
    )
    trained = result.state_dict()
    for layer, pattern in compressed_layers(result).items():
        weight = trained[f"{layer}.weight"].flatten(1)
        assert violations(weight, PATTERNS[pattern]) == 0, layer
        assert weight.any(), layer


def check_numbers(result: CompileResult, images: Tensor) -> None:
    """ONNX Runtime gives what the compiled graph gives, within the limits that it was verified by.

    Run with one image, and with all of `images` [B, 3, H, W]: other batches than the traced two.
    """
    assert result.report["verify"]["ok"] is True
    assert result.onnx_model is not None
    assert len(images) > 2
    session = open_session(result.onnx_model.SerializeToString())
    expected = [record(result.graph, (part,), {}) for part in (images[:1], images)]
    numerics = compare(expected, answers(session, [batch.inputs for batch in expected]), None)
    limits = Verify.model_validate(result.report["verify"]["limits"])
    assert numerics.samples == 1 + len(images)
    assert numerics.shortfalls(limits) == []
    # Numbers that are the same for every image would agree as well.
    assert any(len(output[:2].unique(dim=0)) > 1 for output in expected[1].outputs)


def answers(
    session: onnxruntime.InferenceSession, batches: Sequence[list[Tensor]]
) -> Iterator[list[Tensor]]:
    for inputs in batches:
        outputs = run_session(session, inputs)
        assert all(len(output) == len(inputs[0]) for output in outputs)
        yield outputs


def check_engine(result: CompileResult) -> None:
    """The engine has every compressed GEMM, in INT8 as far as its inspector can tell."""
    target = result.report["engine"]["targets"]["portable"]
    assert target["bytes"] > 0
    assert len(target["gemms"]) == len(compressed_layers(result))
    said = [(gemm["status"], gemm["actual"]) for gemm in target["gemms"]]
    assert set(said) <= {("passed", "int8"), ("unknown", "unknown")}
    # Of a layer that is fused into another kernel the inspector may say nothing.
    assert said.count(("unknown", "unknown")) <= 1
