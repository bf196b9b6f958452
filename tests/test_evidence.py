"""What the page shows of the models themselves: errors, integers, masks and activation maps."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from gpusq_compile.report.cam import (
    ACTIVATION,
    GRAD_CAM,
    activation_map,
    as_grid,
    as_levels,
    as_pixels,
    correlation,
)
from gpusq_compile.report.evidence import MOST_DB, Evidence, decibels, sqnr
from gpusq_compile.report.observe import Observer, find_images
from gpusq_compile.second_moments import as_matrix
from gpusq_compile.sparsity import PATTERNS, Mask, violations
from tests.compilations import INT8, SPARSE, TAPS, begin, make_rules, outputs, run_until
from tests.models import Perceptron, Shape, TinyPyramid, TinyViT, images, labelled, noise, seeded

GEMMS = {"id": "gemms", "match": {"op": "linear"}, "sparsity": SPARSE, "quantize": INT8}


def observed(model: Any, rules: Any, inputs: Tensor, **rest: Any) -> tuple[Any, Evidence]:
    """A compilation run until fold, and what was seen on the way."""
    compilation = begin(model, inputs, rules, **rest)
    compilation.observer = Observer()
    run_until(compilation, "fold")
    return compilation, compilation.observer.evidence


@pytest.fixture(scope="module")
def pyramid() -> tuple[Any, Evidence]:
    pictures = images(6, size=(2, 32, 32))
    return observed(
        seeded(TinyPyramid),
        make_rules(GEMMS, TAPS),
        pictures,
        eval_data=[(pictures, torch.tensor([3, 3, 1, 1, 2, 0]))],
    )


def test_without_taps_the_maps_are_of_the_layers_that_the_rules_give_the_roles() -> None:
    pictures = images(2)
    rules = make_rules(GEMMS, roles={"stage_end": ["layers.0", "layers.2"]})
    _, evidence = observed(seeded(TinyViT, Shape(depth=3)), rules, pictures)
    ends = [place["name"] for place in evidence.places if place["role"] == "stage_end"]
    assert ends == ["layers.0", "layers.2"]


class TestDecibels:
    def test_ten_decibels_are_a_tenth_of_the_energy(self) -> None:
        assert sqnr(torch.tensor([10.0, 0.0]), torch.tensor([10.0, 1.0])) == 20.0
        assert decibels(10.0, 1.0) == 10.0

    def test_no_noise_is_the_largest_figure_and_no_signal_is_none(self) -> None:
        assert decibels(1.0, 0.0) == MOST_DB
        assert decibels(0.0, 1.0) is None
        assert decibels(float("nan"), 1.0) is None


class TestGrids:
    @pytest.mark.parametrize("prefix", [0, 1, 2, 5])
    def test_tokens_in_front_of_the_patches_are_left_out(self, prefix: int) -> None:
        tokens = noise(1, prefix + 14 * 14, 3)
        grid = as_grid(tokens, (224, 224))
        assert grid is not None
        assert torch.equal(grid, tokens[0, prefix:].reshape(14, 14, 3))

    def test_channels_may_be_first_or_last(self) -> None:
        first = noise(1, 96, 7, 7)
        assert torch.equal(as_grid(first, (224, 224)), first[0].movedim(0, -1))  # type: ignore[arg-type]
        last = noise(1, 7, 7, 96)
        assert torch.equal(as_grid(last, (224, 224)), last[0])  # type: ignore[arg-type]

    def test_a_grid_follows_the_images_sides(self) -> None:
        grid = as_grid(noise(1, 25 * 42, 4), (800, 1333))
        assert grid is not None
        assert grid.shape == (25, 42, 4)

    @pytest.mark.parametrize("shape", [(1, 10), (1, 11, 8), (2, 16, 8), (1, 1, 8)])
    def test_what_forms_no_grid_is_none(self, shape: tuple[int, ...]) -> None:
        assert as_grid(noise(*shape), (64, 64)) is None


class TestMaps:
    def test_grad_cam_weighs_channels_by_their_mean_gradient(self) -> None:
        feature, gradient = noise(1, 4, 4, 3), noise(1, 4, 4, 3, seed=1)
        found = activation_map(feature, gradient, (16, 16), None)
        assert found is not None
        weights = gradient[0].mean(dim=(0, 1))
        expected = torch.relu(sum(weights[c] * feature[0, :, :, c] for c in range(3)))  # type: ignore[arg-type]
        assert found.method == GRAD_CAM
        torch.testing.assert_close(found.values, expected)

    def test_without_a_gradient_at_the_positions_it_is_the_mean_activation(self) -> None:
        feature = noise(1, 4, 4, 3)
        for gradient in (None, torch.zeros_like(feature)):
            found = activation_map(feature, gradient, (16, 16), None)
            assert found is not None
            assert found.method == ACTIVATION
            torch.testing.assert_close(found.values, feature[0].abs().mean(dim=-1))

    def test_large_maps_are_averaged_down(self) -> None:
        found = activation_map(noise(1, 100, 200, 2), None, (400, 800), None)
        assert found is not None
        assert found.values.shape == (32, 64)

    def test_levels_span_the_range_of_the_map(self) -> None:
        assert as_levels(torch.tensor([[2.0, 3.0, 4.0]])).tolist() == [[0, 128, 255]]
        assert as_levels(torch.full((2, 2), 3.0)).tolist() == [[0, 0], [0, 0]]

    def test_correlation_ignores_scale_and_says_nothing_of_a_flat_map(self) -> None:
        one = noise(4, 4)
        assert correlation(one, 3 * one + 1) == 1.0
        assert correlation(one, -one) == -1.0
        assert correlation(one, torch.ones(4, 4)) is None

    def test_pixels_are_stretched_and_bounded(self) -> None:
        pixels = as_pixels(noise(3, 40, 80), most=20)
        assert pixels.shape == (10, 20, 3)
        assert (int(pixels.min()), int(pixels.max())) == (0, 255)
        assert as_pixels(noise(2, 8, 8), most=20).shape == (8, 8, 1)


class TestPyramid:
    """A model with four stages, compiled with real labels."""

    def test_places_are_patch_embedding_stage_ends_and_final_norm(self, pyramid: Any) -> None:
        titles = [place["title"] for place in pyramid[1].places]
        stages = [f"end of stage {i}" for i in (1, 2, 3, 4)]
        assert titles == ["patch embedding", *stages, "final norm"]

    def test_images_are_of_different_classes(self, pyramid: Any) -> None:
        assert [image.label for image in pyramid[1].maps] == [3, 1, 2]

    def test_each_place_has_a_map_of_both_models(self, pyramid: Any) -> None:
        for image in pyramid[1].maps:
            sizes = [(pair.height, pair.width) for pair in image.maps if pair]
            assert sizes == [(16, 16), (16, 16), (8, 8), (4, 4), (2, 2), (2, 2)][: len(sizes)]
            assert len(sizes) >= 4
            for pair in image.maps:
                if pair:
                    assert pair.method == GRAD_CAM
                    assert len(base64.b64decode(pair.dense)) == pair.height * pair.width
                    assert len(base64.b64decode(pair.compressed)) == pair.height * pair.width

    def test_grad_cam_is_that_of_the_model_itself(self) -> None:
        """Against autograd on the user's own module, with a hook where the tap is."""
        model = seeded(TinyPyramid)
        pictures = images(2, size=(2, 32, 32))
        _, evidence = observed(
            model, make_rules(GEMMS, TAPS), pictures, eval_data=[(pictures[:1], torch.tensor([0]))]
        )
        kept: list[Tensor] = []
        fresh = seeded(TinyPyramid)
        fresh.last_norm.register_forward_hook(lambda *call: kept.append(call[2]))
        logits = fresh(pictures[:1])
        (gradient,) = torch.autograd.grad(logits[0].max(), kept[0])
        weights = gradient[0].mean(dim=(0, 1))
        expected = (kept[0][0] * weights).sum(dim=-1).relu()
        pair = evidence.maps[0].maps[-1]
        assert evidence.maps[0].dense_class == int(logits[0].argmax())
        if pair is None:
            assert not bool(expected.any())
        else:
            found = list(base64.b64decode(pair.dense))
            assert found == as_levels(expected.detach()).flatten().tolist()

    def test_every_layer_has_its_errors(self, pyramid: Any) -> None:
        compilation, evidence = pyramid
        plans = [p for p in evidence.layers.values()]
        assert len(plans) > 8
        compressed = [p for p in plans if p.histogram]
        assert compressed
        for found in compressed:
            assert 4 < found.pruning_db < 20
            assert 30 < found.weight_db < 70
            assert 20 < found.activation_db < 70
            assert -10 < found.output_db < 60
            assert found.zeros >= 0.5
            assert len(found.histogram) == 255
        assert compilation.facts >= {"folded"}

    def test_it_fits_json(self, pyramid: Any) -> None:
        text = json.dumps(pyramid[1].as_dict(), allow_nan=False)
        assert json.loads(text)["schema_version"] == 1

    def test_nothing_went_wrong(self, pyramid: Any) -> None:
        assert pyramid[1].faults == []
        assert pyramid[1].no_maps is None
        assert set(pyramid[1].seconds) == {"before sparsify", "before quantize", "before fold"}


class TestWeights:
    RULES = make_rules(GEMMS)

    def test_rounding_is_that_of_the_stored_integers(self) -> None:
        compilation = begin(seeded(Perceptron), noise(8, 32), self.RULES)
        compilation.observer = Observer()
        run_until(compilation, "finetune_quantized")
        weight = compilation.ir.get_parameter("first.weight").detach().clone()
        masks = [m.mask for m in compilation.ir.modules() if isinstance(m, Mask)]
        run_until(compilation, "fold")
        found = compilation.observer.evidence.layers["first"]
        state = dict(compilation.ir.named_buffers()) | dict(compilation.ir.named_parameters())
        levels = state["first.weight"]
        scale = next(v for n, v in state.items() if n.endswith("weight_scale.first"))
        assert found.weight_db == sqnr(weight * masks[0], levels * scale[:, None])
        assert (
            found.histogram == torch.bincount(levels.flatten().long() + 127, minlength=255).tolist()
        )
        assert found.zeros == pytest.approx(float(levels.eq(0).float().mean()), abs=1e-4)

    def test_a_weight_rounded_by_gptq_is_compared_with_what_it_was(self) -> None:
        rules = make_rules({**GEMMS, "quantize": {**INT8, "weight": "int4", "rounding": "gptq"}})
        _, evidence = observed(seeded(Perceptron), rules, noise(64, 32))
        found = evidence.layers["first"].weight_db
        assert found is not None
        assert 10 < found < 30

    @pytest.mark.parametrize("pattern", ["2:4", "pair4:8", "portable"])
    def test_the_crop_is_a_piece_of_the_weight_in_its_pattern(self, pattern: str) -> None:
        rules = make_rules({**GEMMS, "sparsity": {"pattern": pattern}})
        compilation, evidence = observed(seeded(Perceptron), rules, noise(8, 32))
        (crop,) = evidence.crops
        values = torch.tensor(crop.values)
        assert (crop.pattern, crop.type, values.shape) == (pattern, "int8", (16, 32))
        assert violations(values, PATTERNS[pattern]) == 0
        weight = dict(compilation.ir.named_buffers()) | dict(compilation.ir.named_parameters())
        assert torch.equal(values, as_matrix(weight[f"{crop.layer}.weight"])[:16, :32].float())

    def test_a_layer_left_as_it_is_has_its_output_alone(self) -> None:
        rules = make_rules({**GEMMS, "match": {"name": "second"}})
        _, evidence = observed(seeded(Perceptron), rules, noise(8, 32))
        found = evidence.layers["first"]
        assert (found.pruning_db, found.weight_db, found.histogram) == (None, None, [])
        assert found.output_db == MOST_DB


class TestData:
    def test_without_data_there_are_errors_and_no_maps(self) -> None:
        compilation = begin(seeded(TinyViT), images(2), make_rules(GEMMS, TAPS))
        compilation.observer = Observer()
        compilation.source.synthetic = True
        run_until(compilation, "fold")
        evidence = compilation.observer.evidence
        assert evidence.source == "noise"
        assert "generated noise" in str(evidence.no_maps)
        assert evidence.maps == []
        assert all(layer.output_db is not None for layer in evidence.layers.values())

    def test_without_any_data_the_example_inputs_are_looked_at(self) -> None:
        rules = make_rules({**GEMMS, "quantize": {"weight": "int8", "activation": "none"}})
        compilation = begin(seeded(TinyViT), images(2), rules)
        compilation.source.calibration_data = None
        compilation.observer = Observer()
        run_until(compilation, "fold")
        evidence = compilation.observer.evidence
        assert (evidence.faults, evidence.source, evidence.images) == ([], "example_inputs", 1)
        assert "the example inputs" in str(evidence.no_maps)
        assert all(layer.output_db is not None for layer in evidence.layers.values())

    def test_evaluation_images_come_first(self) -> None:
        held_out = labelled(seed=3)
        compilation = begin(seeded(TinyViT), images(2), make_rules(GEMMS), eval_data=held_out)
        source, found = find_images(compilation)
        assert source == "eval_data"
        assert torch.equal(found[0].inputs[0], held_out[0][0][:1])
        assert [image.size for image in found] == [1, 1, 1]

    def test_a_class_token_alone_is_no_reason_for_an_empty_map(self) -> None:
        """Behind the last block no gradient reaches the patches: the activation is shown."""
        model = seeded(TinyViT, Shape(pool="token"))
        _, evidence = observed(model, make_rules(GEMMS, TAPS), images(4), eval_data=labelled())
        methods = [pair and pair.method for pair in evidence.maps[0].maps]
        assert methods[0] in (GRAD_CAM, None)
        assert methods[-1] == ACTIVATION

    def test_a_model_without_logits_shows_activations(self) -> None:
        model = seeded(TinyViT, Shape(classes=0))
        _, evidence = observed(model, make_rules(GEMMS, TAPS), images(4), data=[images(4)])
        pairs = [pair for image in evidence.maps for pair in image.maps]
        assert {pair.method for pair in pairs if pair} == {ACTIVATION}
        assert evidence.maps[0].dense_class is None
        assert evidence.source == "calibration_data"


class TestNothingChanges:
    def test_the_result_is_the_same_with_and_without(self) -> None:
        def compiled(observer: Observer | None) -> list[Tensor]:
            data = labelled()
            compilation = begin(
                seeded(TinyViT),
                images(2),
                make_rules(GEMMS, TAPS, finetune={"loss": {"alpha": 1}}),
                train_data=data,
                eval_data=labelled(seed=3),
                finetune=True,
                steps=2,
            )
            compilation.observer = observer
            return outputs(run_until(compilation, "fold"))

        for one, other in zip(compiled(None), compiled(Observer()), strict=True):
            assert torch.equal(one, other)

    def test_parameters_can_be_trained_as_before(self) -> None:
        compilation = begin(seeded(TinyViT), images(2), make_rules(GEMMS))
        run_until(compilation, "tap")
        before = {n: p.requires_grad for n, p in compilation.ir.named_parameters()}
        Observer().before(compilation, "sparsify")
        assert {n: p.requires_grad for n, p in compilation.ir.named_parameters()} == before

    def test_what_goes_wrong_while_looking_ends_nothing(self) -> None:
        def logits(_: Any) -> Tensor:
            raise ValueError("no such output")

        compilation = begin(
            seeded(TinyViT), images(2), make_rules(GEMMS, TAPS), data=[images(2)], logits=logits
        )
        compilation.observer = Observer()
        run_until(compilation, "fold")
        assert "no such output" in compilation.observer.evidence.faults[0]
