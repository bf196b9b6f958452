"""A small member of each classification family compiles, trains and runs at any batch size.

The models are timm's own, made small by their constructors. Nothing here tells the compiler what
they are: roles and stages come from their graphs. The families that need a file are the examples:
A-ViT, the detectors and UperNet are tried in `test_examples_*.py`, by the same checks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from gpusq_compile import compile_model
from gpusq_compile.api import CompileResult
from gpusq_compile.lowering.runtime import open_session, run_session
from tests.family_checks import (
    check_engine,
    check_masks,
    check_numbers,
    check_trained,
    parameters_of,
)
from tests.models import seeded

RULES = ("int8", "int4")
STEPS = 2
CLASSES = 10


@dataclass(frozen=True)
class Family:
    """A model, and what the compiler should find in it."""

    build: Callable[[], nn.Module]
    stages: int
    classifiers: int
    roles: dict[str, int]
    image: int = 64


def small(name: str, **sizes: Any) -> Callable[[], nn.Module]:
    return partial(timm.create_model, name, num_classes=CLASSES, img_size=64, **sizes)


BLOCKS = {"patch_embed": 1, "attention_qkv": 2, "attention_proj": 2, "mlp": 4}
ISOTROPIC = {"depth": 2, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 2}
PYRAMID = {"embed_dim": 32, "num_heads": (1, 2, 4, 8), "window_size": 4, "mlp_ratio": 2}
PYRAMID_BLOCKS = {"patch_embed": 1, "attention_qkv": 4, "attention_proj": 4, "mlp": 8}
SHIFTED_BLOCKS = {"patch_embed": 1, "attention_qkv": 5, "attention_proj": 5, "mlp": 10}

FAMILIES = {
    "deit": Family(small("deit_tiny_patch16_224", **ISOTROPIC), 1, 1, BLOCKS),
    "deit_distilled": Family(small("deit_tiny_distilled_patch16_224", **ISOTROPIC), 1, 2, BLOCKS),
    "swin": Family(
        small("swin_tiny_patch4_window7_224", **PYRAMID, depths=(1, 1, 1, 1)), 4, 1, PYRAMID_BLOCKS
    ),
    "swinv2": Family(
        small("swinv2_tiny_window8_256", **PYRAMID, depths=(2, 1, 1, 1)), 4, 1, SHIFTED_BLOCKS
    ),
}
KINDS = [(family, rules) for family in FAMILIES for rules in RULES]


def pictures(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Smooth random images [count, 3, size, size], and labels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    images = nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    return images, torch.randint(0, CLASSES, (count,), generator=generator)


def untrained_model(name: str) -> nn.Module:
    found: nn.Module = seeded(FAMILIES[name].build)
    return found


def untrained_rules(rules: str) -> dict[str, Any]:
    """Shipped rules for weights that were never trained: which class wins says nothing."""
    return {"version": 1, "extends": rules, "verify": {"min_top1_agreement": 0}}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], CompileResult]:
    """Each family by each rules file, compiled once: trained two steps a phase, to an engine."""

    @cache
    def compiled(name: str, rules: str) -> CompileResult:
        batches = [pictures(8, FAMILIES[name].image, seed) for seed in range(2)]
        return compile_model(
            untrained_model(name),
            (batches[0][0][:2],),
            rules=untrained_rules(rules),
            train_data=batches,
            eval_data=batches,
            steps=STEPS,
            engine="tensorrt-rtx",
            output=tmp_path_factory.mktemp(f"{name}-{rules}"),
        )

    return compiled


Compiled = Callable[[str, str], CompileResult]


@pytest.mark.parametrize(("name", "rules"), KINDS)
def test_every_family_is_compressed_trained_and_verified(
    compiled: Compiled, name: str, rules: str
) -> None:
    result = compiled(name, rules)
    report = result.report
    assert report["status"] == "ok"
    assert report["verify"]["ok"] is True
    check_trained(result, parameters_of(untrained_model(name)), steps=STEPS)
    check_masks(result)
    layers = {layer["name"]: layer for layer in report["layers"]}
    wanted = [layer for layer in layers.values() if layer["role"] in FAMILIES[name].roles]
    bits = {"patch_embed": "int8"} if rules == "int4" else {}
    for layer in wanted:
        if layer["shape"][1] % 32:  # Swin's patches of 48 numbers
            assert layer["role"] == "patch_embed"
            assert layer["applied"]["weight"] is None
            continue
        assert layer["applied"]["weight"] == bits.get(layer["role"], rules)
        assert layer["applied"]["sparsity"] is not None
        assert layer["mask_ok"] is True
        assert layer["execution"]["kind"] == "sparse int8"
    heads = [layer for layer in layers.values() if layer["role"] == "classifier"]
    assert all(not any(layer["applied"].values()) for layer in heads)


@pytest.mark.parametrize("name", FAMILIES)
def test_roles_and_stages_are_found_from_the_graph(compiled: Compiled, name: str) -> None:
    report, family = compiled(name, "int8").report, FAMILIES[name]
    roles = Counter(layer["role"] for layer in report["layers"])
    assert {role: roles[role] for role in family.roles} == family.roles
    assert roles["classifier"] == family.classifiers
    mark = next(entry for entry in report["passes"] if entry["name"] == "mark")
    taps = [r["reason"].partition(":")[0] for r in mark["remarks"] if r["code"] == "tap-marked"]
    stages = [f"end of stage {i} of {family.stages}" for i in range(1, family.stages + 1)]
    expected = ["patch_embed", *stages, "final_projection"]
    assert taps == [f"distill at {what}" for what in expected]


@pytest.mark.parametrize(("name", "rules"), KINDS)
def test_the_file_runs_at_any_batch_size(compiled: Compiled, name: str, rules: str) -> None:
    result = compiled(name, rules)
    assert result.output is not None
    images = pictures(5, FAMILIES[name].image, seed=9)[0]
    check_numbers(result, images)
    session = open_session(result.output / "model.onnx")
    [together] = run_session(session, [images])
    for count in (1, 3):
        [part] = run_session(session, [images[:count]])
        torch.testing.assert_close(part, together[:count], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("name", "rules"), KINDS)
def test_the_engine_has_every_compressed_gemm_in_int8(
    compiled: Compiled, name: str, rules: str
) -> None:
    check_engine(compiled(name, rules))
