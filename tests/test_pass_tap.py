"""tap: feature maps of the critical layers can be read, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpusq_compile.compilation import Compilation
from gpusq_compile.finetune.taps import features_of, listen, taps_of
from gpusq_compile.remarks import Kind
from tests.compilations import TAPS, begin, fork, make_rules, outputs, remarks_of, run_until
from tests.models import TinyViT, images, labelled, seeded


@pytest.fixture(scope="module")
def model() -> TinyViT:
    return seeded(TinyViT)


@pytest.fixture(scope="module")
def tapped(model: TinyViT) -> Compilation:
    rule = {**TAPS, "distill": {"theta": 0.5}}
    return run_until(begin(model, images(4), make_rules(rule)), "tap")


def test_taps_change_no_value(tapped: Compilation, model: TinyViT) -> None:
    record = tapped.records[-1]
    assert record.change == 0.0
    with torch.no_grad():
        torch.testing.assert_close(tapped.ir(images(3)), model(images(3)))


def test_each_tap_is_the_feature_map_of_its_layer(tapped: Compilation, model: TinyViT) -> None:
    compilation = fork(tapped)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> None:
        def hook(_: torch.nn.Module, __: object, output: Tensor) -> None:
            seen[name] = output

        handles.append(model.get_submodule(name).register_forward_hook(hook))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for name in ("stem", "layers.1", "last_norm"):
        keep(name)
    batch = images(3)
    listen(compilation.ir)
    with torch.no_grad():
        model(batch)
        compilation.ir(batch)
    for handle in handles:
        handle.remove()
    taps = taps_of(compilation.ir)
    assert [tap.role for tap in taps] == ["patch_embed", "stage_end", "final_projection"]
    assert [tap.theta for tap in taps] == [0.5, 0.5, 0.5]
    patch, block, final = features_of(taps)
    # The patch embedding is a linear over patches now: tokens first, as the blocks see them.
    torch.testing.assert_close(patch, seen["stem"].flatten(2).transpose(1, 2))
    torch.testing.assert_close(block, seen["layers.1"])
    torch.testing.assert_close(final, seen["last_norm"])


def test_a_feature_is_taken_once_and_only_while_listening(tapped: Compilation) -> None:
    compilation = fork(tapped)
    taps = taps_of(compilation.ir)
    outputs(compilation)
    with pytest.raises(RuntimeError, match=f"tap {taps[0].name} saw no forward pass"):
        features_of(taps)
    listen(compilation.ir)
    outputs(compilation)
    features_of(taps)
    with pytest.raises(RuntimeError, match="saw no forward pass"):
        features_of(taps)
    outputs(compilation)
    listen(compilation.ir, False)
    assert all(tap.feature is None for tap in taps)


def test_each_tap_is_told(tapped: Compilation) -> None:
    remarks = remarks_of(tapped, "tap", Kind.PASSED)
    assert [remark.reason for remark in remarks] == [
        "patch_embed, theta 0.5",
        "stage_end, theta 0.5",
        "final_projection, theta 0.5",
    ]
    assert [remark.layer for remark in remarks] == [tap.name for tap in taps_of(tapped.ir)]


def test_rules_without_taps_are_told_so() -> None:
    data = labelled(1)
    for finetune, kind in ((True, Kind.MISSED), (False, Kind.ANALYSIS)):
        compilation = begin(
            seeded(TinyViT), images(2), make_rules(), train_data=data, finetune=finetune
        )
        run_until(compilation, "tap")
        [remark] = remarks_of(compilation, "tap")
        # Without a fine-tune nobody misses them.
        assert (remark.kind, remark.code) == (kind, "no-taps")
        assert remark.reason == "no rule names a layer to distill at"
        assert taps_of(compilation.ir) == []
