"""Library models through the command line: what they are, compiled, and trained on photos."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from rich.console import Console

from gpusq_compile.cli import default_output
from gpusq_compile.plan import Treatment
from gpusq_compile.report.terminal import plan_table, show_plan
from tests.command_line import ONE_SHOT, Run, compile_here
from tests.photos import make_coco, make_image_folder
from tests.tiny_transformers import save_config, save_model

pytest.importorskip("torchvision")

Compile = Callable[..., Run]
BRIEF = ("--rules", "int8", "--engine", "none")


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Compile:
    """The command line in a folder of its own; fails on any other exit code than `code`."""
    monkeypatch.chdir(tmp_path)

    def compiled(*args: object, code: int = 0) -> Run:
        found = compile_here(monkeypatch, capsys, *args)
        assert found.code == code, found.err
        assert "Traceback" not in found.err
        return found

    return compiled


def report_of(folder: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((Path(folder) / "report.json").read_text())
    return report


class TestTransformers:
    @pytest.mark.parametrize(
        ("kind", "outputs"),
        [
            ("ViTForImageClassification", 1),
            ("SwinForImageClassification", 1),
            ("CLIPModel", 2),
        ],
    )
    def test_a_configuration_compiles_to_a_verified_model(
        self, kind: str, outputs: int, run: Compile
    ) -> None:
        save_config(kind, Path("mine"))
        run("hf:mine/config.json", *ONE_SHOT, "-o", "out")
        model = onnx.load("out/model.onnx")
        assert len(model.graph.input) == 1
        assert len(model.graph.output) == outputs
        report = report_of("out")
        assert report["status"] == "ok"
        assert all(layer["mask_ok"] for layer in report["layers"] if layer["applied"]["sparsity"])
        assert any(layer["applied"]["sparsity"] for layer in report["layers"])

    def test_a_folder_is_shown_without_compiling_it(self, run: Compile) -> None:
        save_model("CLIPModel", Path("mine"))
        found = run("hf:mine", "--rules", "int8", "--dry-run")
        assert "its vision tower is compiled (CLIPVisionModel)" in found.err
        assert "random weights" not in found.err
        assert "nothing was written" in found.err

    def test_labelled_photos_train_it(self, run: Compile) -> None:
        save_model("ViTForImageClassification", Path("mine"))
        make_image_folder(Path("photos"))
        run("hf:mine", *BRIEF, "--steps", 2, "--data", "imagefolder:photos", "-o", "out")
        report = report_of("out")
        assert [report["finetune"][phase]["steps"] for phase in ("sparse", "quantize")] == [2, 2]
        assert report["finetune"]["sparse"]["loss"][0]["hard"] > 0
        assert report["accuracy"]["onnx"] is not None

    def test_a_vision_tower_learns_from_its_features_alone(self, run: Compile) -> None:
        save_model("CLIPModel", Path("mine"))
        make_image_folder(Path("photos"))
        found = run("hf:mine", *BRIEF, "--steps", 2, "--data", "imagefolder:photos", "-o", "out")
        assert "by the distances at the distillation taps alone" in found.err
        losses = report_of("out")["finetune"]["sparse"]["loss"]
        assert losses[0]["hard"] == 0
        assert losses[0]["feature"] > 0

    def test_outlines_train_a_segmentation(self, run: Compile) -> None:
        size = {"height": 64, "width": 64}
        save_config("SegformerForSemanticSegmentation", Path("mine"), size=size)
        make_coco(Path("photos"))
        run("hf:mine", *BRIEF, "--steps", 2, "--data", "coco:photos", "-o", "out")
        report = report_of("out")
        assert report["finetune"]["sparse"]["loss"][0]["hard"] > 0
        assert set(report["metrics"]["onnx"]) == {"pixel_accuracy"}

    @pytest.mark.parametrize("scope", [None, "model.encoder"])
    def test_a_detector_and_a_part_of_it_train_by_its_own_loss(
        self, scope: str | None, run: Compile
    ) -> None:
        save_config("DetrForObjectDetection", Path("mine"), size={"height": 64, "width": 64})
        make_coco(Path("photos"))
        part = () if scope is None else ("--scope", scope)
        run("hf:mine", *BRIEF, *part, "--data", "coco:photos", "--steps", 2, "-o", "out")
        report = report_of("out")
        assert report["scope"] == scope
        assert report["finetune"]["sparse"]["loss"][0]["hard"] > 0
        assert set(report["metrics"]["onnx"]) == {"recall_50"}

    def test_data_of_another_task_is_refused_with_the_right_kind(self, run: Compile) -> None:
        save_config("DetrForObjectDetection", Path("mine"), size={"height": 64, "width": 64})
        make_image_folder(Path("photos"))
        found = run("hf:mine", *ONE_SHOT, "--data", "imagefolder:photos", code=2)
        assert "error[data-for-another-task]" in found.error
        assert "a model for detection, which needs coco:DIR" in found.error


class TestTorchvision:
    DETECTOR = "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn"

    def test_a_detector_compiles_by_its_parts_which_are_named(self, run: Compile) -> None:
        found = run(self.DETECTOR, "--rules", "int8", "--dry-run", code=2)
        assert "error[scope-needed]" in found.error
        assert "--scope backbone or --scope roi_heads.box_head" in found.error

    def test_a_part_of_a_detector_is_planned_on_annotated_photos(self, run: Compile) -> None:
        make_coco(Path("photos"))
        args = ("--scope", "roi_heads.box_head", "--data", "coco:photos")
        found = run(self.DETECTOR, "--rules", "int8", "--dry-run", *args)
        assert "fc7" in found.err
        assert "the 2 classes of photos are matched" in found.err

    @pytest.mark.parametrize(
        ("name", "part"),
        [
            ("raft_small", "estimates optical flow"),
            ("swin3d_t", "takes videos"),
            ("quantized_resnet18", "is quantized already"),
            ("keypointrcnn_resnet50_fpn", "needs key points as targets"),
        ],
    )
    def test_models_of_anything_but_images_are_refused(
        self, name: str, part: str, run: Compile
    ) -> None:
        found = run(f"torchvision:{name}", *ONE_SHOT, code=2)
        assert "error[model-not-supported]" in found.error
        assert part in found.error


class TestPlan:
    def test_layers_that_differ_in_a_number_are_one_row(self) -> None:
        names = [
            "conv_proj",
            *(
                f"layers.encoder_layer_{index}.mlp.{part}"
                for index in (8, 9, 10)
                for part in (0, 3)
            ),
            *(f"blocks.{index}.fc1" for index in (0, 1)),
            "blocks.1.fc2",
            "head",
        ]
        shapes = {"0": [64, 32], "3": [32, 64]}
        asked = Treatment("2:4", "int8", "int8").as_dict()
        layers = [
            {
                "name": n,
                "role": None,
                "shape": shapes.get(n[-1], [8, 8]),
                "requested": asked,
                "reasons": [],
            }
            for n in names
        ]
        table = plan_table({"layers": layers})
        rows = list(zip(table.columns[0].cells, table.columns[1].cells, strict=True))
        assert rows == [
            ("conv_proj", "1"),
            ("layers.encoder_layer_*.mlp.*", "3"),
            ("layers.encoder_layer_*.mlp.*", "3"),
            ("blocks.*.fc1", "2"),
            ("blocks.1.fc2", "1"),
            ("head", "1"),
        ]

    @pytest.mark.parametrize("width", [60, 300])
    def test_no_name_is_cut_or_folded_whatever_the_width(self, width: int) -> None:
        name = "detr.model.backbone.model.encoder.stages.1.layers.0.layer.1.convolution"
        asked = Treatment("2:4", "int8", "int8").as_dict()
        layer = {"name": name, "role": "mlp", "shape": [64, 32], "requested": asked, "reasons": []}
        stream = io.StringIO()
        report = {"layers": [layer, layer | {"name": "head"}], "passes": [], "attentions": []}
        show_plan(report, Console(file=stream, width=width))
        lines = stream.getvalue().splitlines()
        [found] = [index for index, line in enumerate(lines) if name in line]
        cells = lines[found + (width == 60)].replace("│", " ").split()
        assert cells[width == 300 :] == ["1", "mlp", "64x32", "2:4", "int8", "int8", "-"]

    def test_taps_say_which_stage_ends_there_and_at_what_size(self, run: Compile) -> None:
        save_config("SwinForImageClassification", Path("mine"))
        lines = run("hf:mine", "--rules", "int8", "--dry-run").err.splitlines()
        taps = [line.partition(": ")[2] for line in lines if line.startswith("  swin.")]
        assert taps == [
            "patch_embed: 256 tokens of 32",
            "end of stage 1 of 2: 256 tokens of 32",
            "end of stage 2 of 2: 64 tokens of 64",
            "final_projection: 64 tokens of 64",
        ]


def test_the_default_folder_is_called_after_the_model(tmp_path: Path) -> None:
    folder = save_config("ViTForImageClassification", tmp_path / "mine")
    assert default_output(f"hf:{folder}") == Path("out/hf-mine")
    assert default_output(f"hf:{folder / 'config.json'}") == Path("out/hf-mine")
    assert default_output("hf:google/vit") == Path("out/hf-google-vit")
    assert default_output("timm:vit_tiny") == Path("out/timm-vit_tiny")
