"""`--data coco:DIR`: photos with boxes and outlines, for detectors and segmentation models."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gpusq_compile.errors import InputError
from gpusq_compile.load_model import load_source
from gpusq_compile.model_source import ModelSource
from gpusq_compile.sources.coco import coco
from gpusq_compile.sources.model import Classes, Images, LibraryModel, Task
from tests.photos import HEIGHT, WIDTH, crops, make_coco
from tests.tiny_transformers import save_config

pytest.importorskip("pycocotools")


def model_for(task: Task, **rest: Any) -> LibraryModel:
    classes = rest.pop("classes", Classes(3))
    return LibraryModel("hf:mine", nn.Identity(), task, Images((60, 80)), classes, **rest)


def given(folder: Path, model: LibraryModel) -> ModelSource:
    source = ModelSource(model.origin, model.module, ())
    coco(source, model, folder)
    return source


def one_batch(source: ModelSource) -> Any:
    """All four photos in the order of the file."""
    assert source.calibration_data is not None
    (batch,) = source.calibration_data()
    return batch


def refused(folder: Path, model: LibraryModel | None = None) -> InputError:
    with pytest.raises(InputError) as caught:
        one_batch(given(folder, model or model_for("detection")))
    return caught.value


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The simple layout with its annotations changed."""
    make_coco(folder, ())
    file = folder / "annotations.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return folder


class TestTargets:
    def test_transformers_detectors_get_relative_centres_and_sizes(self, tmp_path: Path) -> None:
        pixels, targets = one_batch(given(make_coco(tmp_path), model_for("detection")))
        assert pixels.shape == (4, 3, 60, 80)
        assert [len(target["boxes"]) for target in targets] == [0, 1, 2, 3]
        first = targets[1]["boxes"][0] * torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
        assert torch.allclose(first, torch.tensor([10 + 20.0, 20 + 15.0, 40.0, 30.0]))
        assert targets[3]["class_labels"].tolist() == [0, 1, 0]

    def test_torchvision_detectors_get_corners_and_masks_in_pixels(self, tmp_path: Path) -> None:
        model = model_for("detection", listed=True, masks=True, classes=Classes(3, first=1))
        images, targets = one_batch(given(make_coco(tmp_path), model))
        assert [image.shape for image in images] == [(3, 60, 80)] * 4
        target = targets[1]
        assert torch.allclose(target["boxes"], torch.tensor([[5.0, 10.0, 25.0, 25.0]]))
        assert target["labels"].tolist() == [1]
        assert target["masks"].shape == (1, 60, 80)
        places = target["masks"][0].nonzero()
        assert places.min(dim=0).values.tolist() == [10, 5]
        assert places.max(dim=0).values.tolist() == [24, 24]
        assert targets[0]["masks"].shape == (0, 60, 80)

    def test_segmentation_models_get_a_class_for_each_covered_pixel(self, tmp_path: Path) -> None:
        _, labels = one_batch(given(make_coco(tmp_path), model_for("segmentation")))
        assert labels.shape == (4, 60, 80)
        assert (labels[0] == 255).all()
        assert labels[1].unique().tolist() == [0, 255]
        assert int((labels[1] == 0).sum()) == 20 * 15

    def test_crowds_and_boxes_without_an_area_are_left_out(self, tmp_path: Path) -> None:
        def change(content: dict[str, Any]) -> None:
            content["annotations"][-1]["iscrowd"] = 1
            content["annotations"][-2]["bbox"][2] = 0

        _, targets = one_batch(given(edited(tmp_path, change), model_for("detection")))
        assert [len(target["boxes"]) for target in targets] == [0, 1, 2, 1]

    def test_of_a_box_that_reaches_over_the_border_the_rest_is_left(self, tmp_path: Path) -> None:
        def change(content: dict[str, Any]) -> None:
            content["annotations"][0]["bbox"] = [WIDTH - 20, -10, 200, 50]

        model = model_for("detection", listed=True, classes=Classes(3, first=1))
        _, targets = one_batch(given(edited(tmp_path, change), model))
        assert torch.allclose(targets[1]["boxes"], torch.tensor([[70.0, 0.0, 80.0, 20.0]]))

    def test_outlines_of_one_file_may_be_polygons_and_runs(self, tmp_path: Path) -> None:
        def change(content: dict[str, Any]) -> None:
            before, inside = 20 * HEIGHT, 30 * HEIGHT
            counts = [before, inside, WIDTH * HEIGHT - before - inside]
            content["annotations"][0]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": counts}

        _, labels = one_batch(given(edited(tmp_path, change), model_for("segmentation")))
        assert (labels[1] == 0).nonzero()[:, 1].unique().tolist() == list(range(10, 25))

    def test_images_without_sizes_in_the_file_are_read_by_their_own(self, tmp_path: Path) -> None:
        def change(content: dict[str, Any]) -> None:
            for image in content["images"]:
                del image["width"], image["height"]

        _, labels = one_batch(given(edited(tmp_path, change), model_for("segmentation")))
        assert int((labels[1] == 0).sum()) == 20 * 15

    def test_features_need_no_targets(self, tmp_path: Path) -> None:
        batch = one_batch(given(make_coco(tmp_path), model_for("features", classes=None)))
        assert batch.shape == (4, 3, 60, 80)


class TestCategories:
    @pytest.mark.parametrize(
        ("classes", "found"),
        [
            (Classes(3, {0: ("flower",), 2: ("temple",)}), [2, 0, 2]),
            (Classes(91), [7, 9, 7]),
            (Classes(3), [0, 1, 0]),
            (Classes(3, first=1), [1, 2, 1]),
        ],
    )
    def test_categories_are_matched_by_name_then_id_then_order(
        self, classes: Classes, found: list[int], tmp_path: Path
    ) -> None:
        source = given(make_coco(tmp_path), model_for("detection", classes=classes))
        assert one_batch(source)[1][3]["class_labels"].tolist() == found

    def test_more_categories_than_outputs_are_an_error(self, tmp_path: Path) -> None:
        error = refused(make_coco(tmp_path), model_for("detection", classes=Classes(1)))
        assert error.code == "too-many-classes"
        assert "has 2 classes, but hf:mine has 1" in error.message


class TestLayouts:
    def test_the_splits_of_cocos_own_layout(self, tmp_path: Path) -> None:
        source = given(make_coco(tmp_path), model_for("detection"))
        assert source.train_data is not None
        assert source.eval_data is not None
        assert source.notes[-1][0] != "no-evaluation-images"

    def test_a_split_for_the_evaluation_alone_calibrates_and_says_so(self, tmp_path: Path) -> None:
        source = given(make_coco(tmp_path, ("val2017",)), model_for("detection"))
        assert source.train_data is None
        assert source.calibration_data is not None
        assert source.eval_data is not None
        assert "calibrated-on-evaluation" in dict(source.notes)
        assert "instances_train*.json" in source.data_forms

    def test_of_two_files_of_one_split_the_other_is_named(self, tmp_path: Path) -> None:
        source = given(make_coco(tmp_path, ("train2014", "train2017")), model_for("detection"))
        text = dict(source.notes)["files-left-out"]
        assert text.endswith("instances_train2014.json is read, and not instances_train2017.json")

    def test_the_simple_layout_has_nothing_to_evaluate_on_and_says_so(self, tmp_path: Path) -> None:
        source = given(make_coco(tmp_path, ()), model_for("detection"))
        assert source.train_data is not None
        assert source.eval_data is None
        assert "no-evaluation-images" in dict(source.notes)


class TestFaults:
    def test_a_folder_of_another_form_is_refused_with_the_form(self, tmp_path: Path) -> None:
        error = refused(tmp_path)
        assert error.code == "data-not-coco"
        assert "instances_train*.json" in str(error.hint)

    def test_annotations_of_another_name_are_said_to_be_there(self, tmp_path: Path) -> None:
        (tmp_path / "train").mkdir()
        (tmp_path / "train" / "_annotations.coco.json").write_text("{}")
        error = refused(tmp_path)
        assert error.message.endswith("but train/_annotations.coco.json")

    def test_annotations_without_their_images_are_refused(self, tmp_path: Path) -> None:
        make_coco(tmp_path, ("train2017",))
        (tmp_path / "train2017").rename(tmp_path / "elsewhere")
        error = refused(tmp_path)
        assert error.code == "data-missing"
        assert "train2017" in error.message

    def test_a_missing_image_is_named(self, tmp_path: Path) -> None:
        make_coco(tmp_path, ())
        (tmp_path / "images" / "2.jpg").unlink()
        error = refused(tmp_path)
        assert error.code == "data-missing"
        assert "images/2.jpg" in error.message

    def test_a_damaged_image_is_named(self, tmp_path: Path) -> None:
        make_coco(tmp_path, ())
        (tmp_path / "images" / "2.jpg").write_bytes(b"torn")
        error = refused(tmp_path)
        assert error.code == "image-unreadable"
        assert "images/2.jpg" in error.message

    def test_what_is_no_json_is_named_with_its_place(self, tmp_path: Path) -> None:
        make_coco(tmp_path, ())
        (tmp_path / "annotations.json").write_text('{"images": [}')
        error = refused(tmp_path)
        assert error.code == "data-not-coco"
        assert str(error.location).endswith("annotations.json:1:13")
        assert error.message.startswith("no JSON: ")

    @pytest.mark.parametrize(
        ("change", "part"),
        [
            (lambda c: c.pop("categories"), "has no categories"),
            (lambda c: c["annotations"].clear(), "has no annotations"),
            (lambda c: c["annotations"][0].update(category_id=4), "category_id 4"),
            (lambda c: c["annotations"][0].pop("bbox"), "annotation 1 has no bbox"),
            (
                lambda c: c["annotations"][0].update(bbox=[1, 2, 3]),
                "annotation 1 has the bbox [1, 2, 3]",
            ),
            (lambda c: c["annotations"][0].update(bbox=[1, "x", 3, 4]), "[1, 'x', 3, 4]"),
            (lambda c: c["annotations"][0].update(image_id=77), "image_id 77"),
        ],
    )
    def test_what_an_annotation_lacks_is_said(
        self, change: Callable[[dict[str, Any]], object], part: str, tmp_path: Path
    ) -> None:
        error = refused(edited(tmp_path, change))
        assert error.code == "data-not-coco"
        assert part in error.message

    @pytest.mark.parametrize(
        ("change", "keys", "part"),
        [
            (lambda c: c["images"][2].pop("id"), ("images", 2), "images[2] has no id"),
            (
                lambda c: c["images"][2].update(id="7"),
                ("images", 2, "id"),
                "images[2] has the id '7'",
            ),
            (
                lambda c: c["images"][2].update(id=1),
                ("images", 2, "id"),
                "images[2] has the id 1, which images[0] has too",
            ),
            (
                lambda c: c["annotations"][3].update(id=1),
                ("annotations", 3, "id"),
                "annotations[3] has the id 1, which annotations[0] has too",
            ),
            (
                lambda c: c["categories"][1].update(id=7),
                ("categories", 1, "id"),
                "categories[1] has the id 7, which categories[0] has too",
            ),
            (lambda c: c["categories"].append(3), ("categories", 2), "categories[2] is 3"),
            (
                lambda c: c["images"][1].update(file_name=None),
                ("images", 1, "file_name"),
                "image 2 has the file_name None",
            ),
            (lambda c: c["images"][1].pop("file_name"), ("images", 1), "image 2 has no file_name"),
            (
                lambda c: c["images"][1].update(width="wide"),
                ("images", 1, "width"),
                "image 2 has the width 'wide'",
            ),
            (
                lambda c: c["annotations"][2].update(image_id=[1]),
                ("annotations", 2, "image_id"),
                "annotation 3 has the image_id [1]",
            ),
            (
                lambda c: c["annotations"][2].update(bbox=[10, 10, -4, 5]),
                ("annotations", 2, "bbox"),
                "has the bbox [10, 10, -4, 5], expected",
            ),
            (
                lambda c: c["annotations"][2].update(bbox=[WIDTH, 10, 4, 5]),
                ("annotations", 2, "bbox"),
                f"within its image of {WIDTH}x{HEIGHT}",
            ),
        ],
    )
    def test_a_fault_is_told_at_its_place(
        self,
        change: Callable[[dict[str, Any]], object],
        keys: tuple[str | int, ...],
        part: str,
        tmp_path: Path,
    ) -> None:
        edited(tmp_path, change)
        file = tmp_path / "annotations.json"
        file.write_text(json.dumps(json.loads(file.read_text()), indent=1))
        error = refused(tmp_path)
        assert error.code == "data-not-coco"
        assert part in error.message
        assert error.location is not None
        assert error.location.line is not None
        assert error.location.column is not None
        value = json.loads(file.read_text())
        for key in keys:
            value = value[key]
        rest = file.read_text().splitlines()[error.location.line - 1 :]
        rest[0] = rest[0][error.location.column - 1 :]
        assert json.JSONDecoder().raw_decode("\n".join(rest))[0] == value

    def test_boxes_that_reach_beyond_their_image_are_cut_and_counted(self, tmp_path: Path) -> None:
        def change(content: dict[str, Any]) -> None:
            content["annotations"][0]["bbox"] = [WIDTH - 10, 10, 30, 10]
            content["annotations"][1]["bbox"] = [WIDTH - 10, 10, 10.9, 10]

        source = given(edited(tmp_path, change), model_for("detection"))
        text = dict(source.notes)["boxes-cut"]
        assert text.startswith("1 of 6 boxes of ")
        assert f"annotation 1 with the bbox [{WIDTH - 10}, 10, 30, 10] in 1.jpg" in text
        _, targets = one_batch(source)
        centre, _, width, _ = targets[1]["boxes"][0].tolist()
        assert centre + width / 2 == pytest.approx(1.0)
        assert width == pytest.approx(10 / WIDTH)

    def test_what_a_detector_does_not_see_is_counted(self, tmp_path: Path) -> None:
        def change(content: dict[str, Any]) -> None:
            content["annotations"][-1]["iscrowd"] = 1
            content["annotations"][-2]["bbox"][2] = 0

        source = given(edited(tmp_path, change), model_for("detection"))
        assert dict(source.facts)["crowds-left-out"].startswith("1 of 6 annotations of ")
        text = dict(source.notes)["objects-left-out"]
        assert text.startswith("1 of 6 boxes of ")
        assert "annotation 5 with the bbox [40, 30, 0, 30] in 3.jpg" in text

    def test_crowds_alone_are_nothing_to_train_a_detector_on(self, tmp_path: Path) -> None:
        def change(content: dict[str, Any]) -> None:
            for annotation in content["annotations"]:
                annotation["iscrowd"] = 1

        error = refused(edited(tmp_path, change))
        assert error.code == "no-objects"
        assert "of 6 annotations 6 are crowds, and 0 have no area" in error.message
        labels = one_batch(given(tmp_path, model_for("segmentation")))[1]
        assert bool((labels[1] != 255).any()), "they cover pixels all the same"

    def test_an_image_of_another_size_than_annotated_is_named(self, tmp_path: Path) -> None:
        folder = edited(tmp_path, lambda c: c["images"][1].update(width=320, height=240))
        error = refused(folder)
        assert error.code == "image-size-differs"
        assert f"images/1.jpg is {WIDTH}x{HEIGHT}, and" in error.message
        assert "says 320x240" in error.message

    def test_a_mask_of_another_size_than_its_image_is_named(self, tmp_path: Path) -> None:
        def change(content: dict[str, Any]) -> None:
            content["annotations"][0]["segmentation"] = {"size": [60, 80], "counts": [0, 4800]}

        error = refused(edited(tmp_path, change), model_for("segmentation"))
        assert error.code == "data-not-coco"
        assert (
            "annotation 1 has a segmentation that cannot be read: it is of an image of 80x60"
            in (error.message)
        )

    def test_a_box_without_an_outline_cannot_train_a_segmentation(self, tmp_path: Path) -> None:
        folder = edited(tmp_path, lambda c: c["annotations"][0].pop("segmentation"))
        error = refused(folder, model_for("segmentation"))
        assert error.code == "no-outlines"
        assert "annotation 1 has a box" in error.message

    @pytest.mark.parametrize("outline", [[[1, 2]], [["x", 1, 2, 3, 4, 5]], {"counts": 3}])
    def test_an_outline_that_cannot_be_read_is_named(self, outline: Any, tmp_path: Path) -> None:
        folder = edited(tmp_path, lambda c: c["annotations"][0].update(segmentation=outline))
        error = refused(folder, model_for("segmentation"))
        assert error.code == "data-not-coco"
        assert "annotation 1 has a segmentation that cannot be read" in error.message

    def test_a_category_that_only_the_evaluation_has_is_named(self, tmp_path: Path) -> None:
        def rename(content: dict[str, Any]) -> None:
            content["categories"][0]["name"] += "s"

        make_coco(tmp_path, ("train", "val"))
        known = json.loads((tmp_path / "annotations/instances_train.json").read_text())
        name = known["categories"][0]["name"]
        path = tmp_path / "annotations/instances_val.json"
        content = json.loads(path.read_text())
        rename(content)
        path.write_text(json.dumps(content))
        error = refused(tmp_path)
        assert error.code == "unknown-class"
        assert f"the evaluation's category '{name}s'" in error.message
        assert error.hint == f"did you mean '{name}'?"


class TestLosses:
    """What a transformers model computes from labels itself is what the fine-tune minimizes."""

    @pytest.mark.parametrize(
        "kind",
        [
            "DetrForObjectDetection",
            "DeformableDetrForObjectDetection",
            "YolosForObjectDetection",
            "SegformerForSemanticSegmentation",
        ],
    )
    def test_the_loss_of_the_outputs_is_the_models_own(self, kind: str, tmp_path: Path) -> None:
        folder = save_config(kind, tmp_path / "model", size={"height": 64, "width": 64})
        data = f"coco:{make_coco(tmp_path / 'data')}"
        source = load_source(f"hf:{folder}", data=data)
        module: Any = source.module
        module.config.auxiliary_loss = False
        assert source.loss is not None
        pixels, labels = one_batch(source)
        own = type(module).forward(module, pixels, labels=labels).loss
        found = source.loss(outputs_only(module), (pixels, labels))
        assert torch.allclose(found, own)
        assert found.requires_grad
        assert source.metrics is not None
        with torch.no_grad():
            (value,) = source.metrics(module(pixels), (pixels, labels)).values()
        assert 0 <= value <= 1

    def test_perfect_boxes_are_all_found(self, tmp_path: Path) -> None:
        folder = save_config("DetrForObjectDetection", tmp_path / "model")
        source = load_source(f"hf:{folder}", data=f"coco:{make_coco(tmp_path / 'data')}")
        assert source.metrics is not None
        boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.2, 0.3, 0.1, 0.2]]])
        targets = [{"boxes": boxes[0], "class_labels": torch.tensor([2, 0])}]
        logits = 9.0 * nn.functional.one_hot(torch.tensor([[2, 1]]), 4).float()
        found = source.metrics({"logits": logits, "pred_boxes": boxes}, (None, targets))
        assert found == {"recall_50": 0.5}


def outputs_only(module: nn.Module) -> torch.fx.GraphModule:
    """A graph that takes images alone, as a compiled one does."""
    root = nn.Module()
    root.whole = module
    graph = torch.fx.Graph()
    graph.output(graph.call_module("whole", (graph.placeholder("pixel_values"),)))
    return torch.fx.GraphModule(root, graph)


def test_without_pycocotools_it_is_said_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    error = refused(make_coco(tmp_path))
    assert error.code == "library-not-installed"
    assert error.hint == "pip install 'gpusq-compile[models]'"


def test_photos_of_one_kind_differ() -> None:
    """The crops that the folders are made of are no copies of one another."""
    assert len({photo.tobytes() for photo in crops(0, 6)}) == 6
