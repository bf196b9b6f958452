"""A-ViT: tokens halt as the paper says, and compressed models keep the halting of their teacher."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from gpusq_compile import compile_model
from gpusq_compile.load_model import load_source
from tests.family_checks import (
    check_engine,
    check_masks,
    check_numbers,
    check_trained,
    parameters_of,
)

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "avit.py"


@pytest.fixture(scope="module")
def avit() -> ModuleType:
    """The example as the compiler loads it, with its neighbours importable."""
    load_source(str(EXAMPLE))
    spec = importlib.util.spec_from_file_location("avit", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["avit"] = module  # Its dataclasses look themselves up there.
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def held_out(avit: ModuleType) -> tuple[Tensor, Tensor]:
    batches = list(avit.eval_data())
    return torch.cat([images for images, _ in batches]), torch.cat([y for _, y in batches])


@torch.no_grad()
def by_the_paper(vit: Any, images: Tensor) -> dict[str, Tensor]:
    """The model with its tokens really removed, one image at a time."""
    found: dict[str, list[Tensor]] = {"logits": [], "halting": []}
    for image in images:
        x = vit.patch_embed(image[None]).flatten(2).transpose(1, 2)
        x = torch.cat([vit.cls_token, x], dim=1) + vit.pos_embed
        here = list(range(x.shape[1]))
        totals = [0.0] * x.shape[1]
        spread = torch.zeros(x.shape[1], len(vit.blocks))
        answer = torch.zeros(1, x.shape[2])
        last = len(vit.blocks) - 1
        for layer, block in enumerate(vit.blocks):
            if not here:
                break
            kept = x[:, here]
            kept = kept + block.attn(block.norm1(kept), torch.zeros(1, 1, 1, len(here)))
            kept = kept + block.mlp(block.norm2(kept))
            x[:, here] = kept
            still = []
            for token in here:
                score = float(torch.sigmoid(5.0 * x[0, token, 0] - 10.0))
                if layer == last or totals[token] + score >= 0.99:
                    probability = 1.0 - totals[token]
                else:
                    probability = score
                    still.append(token)
                spread[token, layer] = probability
                if token == 0:
                    answer += probability * x[:, 0]
                totals[token] += score
            here = still
        found["logits"].append(vit.head(vit.norm(answer)))
        found["halting"].append(spread.mean(dim=0, keepdim=True))
    return {name: torch.cat(values) for name, values in found.items()}


def test_masks_compute_what_removing_the_halted_tokens_computes(
    avit: ModuleType, held_out: tuple[Tensor, Tensor]
) -> None:
    vit = avit.model()
    images = held_out[0][:6]
    with torch.no_grad():
        outputs = vit(images)
    expected = by_the_paper(vit, images)
    torch.testing.assert_close(outputs["logits"], expected["logits"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(outputs["halting"], expected["halting"], rtol=1e-3, atol=1e-4)


def test_the_shipped_weights_are_right_and_let_tokens_halt_early(
    avit: ModuleType, held_out: tuple[Tensor, Tensor]
) -> None:
    images, labels = held_out
    with torch.no_grad():
        outputs = avit.model()(images)
    assert (outputs["logits"].argmax(dim=1) == labels).float().mean() >= 0.95
    torch.testing.assert_close(outputs["halting"].sum(dim=1), torch.ones(len(images)))
    depth = avit.expected_depth(outputs["halting"])
    assert depth.mean() < 3.7  # Of 4 layers.
    assert depth.std() > 0.02  # It depends on the image.


def test_the_weights_are_small(avit: ModuleType) -> None:
    assert avit.WEIGHTS.stat().st_size < 310_000


def test_a_model_without_any_token_left_still_answers(avit: ModuleType) -> None:
    vit = avit.model()
    with torch.no_grad():
        vit.pos_embed[..., 0] += 100.0  # Every token is sure after the first layer.
        outputs = vit(avit.example_inputs()[0])
    assert outputs["logits"].isfinite().all()
    torch.testing.assert_close(outputs["halting"][:, 0], torch.ones(2))


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_the_papers_sizes_have_deits_parameters(
    avit: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("AVIT", name)
    parameters = sum(p.numel() for p in avit.model().parameters())
    assert round(parameters / 1e6, 1) == {"tiny": 5.7, "small": 22.1}[name]
    assert avit.example_inputs()[0].shape == (2, 3, 224, 224)
    assert len(avit.train_data()) == 4


def test_an_unknown_size_is_named(avit: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVIT", "huge")
    with pytest.raises(ValueError, match="AVIT=huge: the sizes are digits, tiny, small"):
        avit.model()


@pytest.mark.parametrize("rules", ["int8", "int4"])
def test_it_compiles_with_its_own_loss_and_its_teachers_masks(
    avit: ModuleType, held_out: tuple[Tensor, Tensor], tmp_path: Path, rules: str
) -> None:
    result = compile_model(EXAMPLE, rules=rules, steps=3, engine="tensorrt-rtx", output=tmp_path)
    report = result.report
    check_trained(result, parameters_of(avit.model()), steps=3)
    check_masks(result)
    check_numbers(result, held_out[0][:5])
    check_engine(result)
    weights = {layer["name"]: layer["applied"]["weight"] for layer in report["layers"]}
    assert set(weights) == {"patch_embed", "head"} | {
        f"blocks.{block}.{name}"
        for block in range(4)
        for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert weights.pop("head") is None
    assert all(weights.values())
    remarks = [r for entry in report["passes"] for r in entry["remarks"]]
    # One mask behind each layer but the last, where every token halts.
    assert sum(remark["code"] == "decision-shared" for remark in remarks) == 3
    assert report["metrics"]["onnx"]["layers_spared"] > 0
