"""What is wrong in a file of COCO's annotations is said with its place, and never guessed."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from gpusq_compile.errors import InputError
from gpusq_compile.model_source import ModelSource
from gpusq_compile.sources.coco import coco
from gpusq_compile.sources.model import Classes, Images, LibraryModel, Task
from tests.photos import HEIGHT, WIDTH, make_coco

torch = pytest.importorskip("torch")
pytest.importorskip("pycocotools")

Content = dict[str, Any]
Change = Callable[[Content], object]


def read(folder: Path, task: Task = "detection", *, masks: bool = False) -> ModelSource:
    """A source whose images have all been read once."""
    model = LibraryModel(
        "hf:mine", torch.nn.Identity(), task, Images((60, 80)), Classes(3), listed=True, masks=masks
    )
    source = ModelSource(model.origin, model.module, ())
    coco(source, model, folder)
    assert source.calibration_data is not None
    list(source.calibration_data())
    return source


def edited(folder: Path, change: Change) -> Path:
    """The simple layout with its annotations changed, one value a line."""
    make_coco(folder, ())
    file = folder / "annotations.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content, indent=1))
    return folder


def refused(folder: Path, change: Change, task: Task = "detection", **rest: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        read(edited(folder, change), task, **rest)
    return caught.value


def line_at(folder: Path, error: InputError) -> str:
    """The line of the file that an error names, from its column on."""
    assert error.location is not None
    assert error.location.line is not None
    assert error.location.column is not None
    lines = (folder / "annotations.json").read_text().splitlines()
    return lines[error.location.line - 1][error.location.column - 1 :]


def update(what: str, index: int, **values: Any) -> Change:
    return lambda content: content[what][index].update(values)


def without(what: str, index: int, key: str) -> Change:
    return lambda content: content[what][index].pop(key)


class TestPlaces:
    @pytest.mark.parametrize(
        ("change", "line", "message"),
        [
            (update("images", 1, file_name=None), "null,", "image 2 has the file_name None"),
            (update("images", 1, file_name=5), "5,", "image 2 has the file_name 5"),
            (update("images", 1, width="160"), '"160",', "image 2 has the width '160'"),
            (update("images", 1, id="2"), '"2",', "images[1] has the id '2'"),
            (update("categories", 1, id=[9]), "[", "categories[1] has the id [9]"),
            (update("categories", 1, name=["a"]), "[", "category 9 has the name ['a']"),
            (update("annotations", 2, image_id="1"), '"1",', "annotation 3 has the image_id '1'"),
            (update("annotations", 2, bbox=[1, 2, -3, 4]), "[", "has the bbox [1, 2, -3, 4]"),
            (update("annotations", 2, bbox=[1, 2, math.nan, 4]), "[", "[1, 2, nan, 4]"),
            (update("annotations", 2, bbox=[True, 2, 3, 4]), "[", "[True, 2, 3, 4]"),
            (update("annotations", 2, iscrowd="yes"), '"yes",', "has the iscrowd 'yes'"),
            (lambda c: c["annotations"].__setitem__(1, "x"), '"x",', "annotations[1] is 'x'"),
            (lambda c: c.update(images={}), "{},", "has no images, but {}"),
            (lambda c: c.update(images=None), "null,", "has no images, but None"),
        ],
    )
    def test_a_value_of_another_kind_is_named_where_it_is(
        self, change: Change, line: str, message: str, tmp_path: Path
    ) -> None:
        error = refused(tmp_path, change)
        assert error.code == "data-not-coco"
        assert message in error.message
        assert line_at(tmp_path, error) == line

    @pytest.mark.parametrize(
        ("what", "key", "name"),
        [
            ("images", "id", "images[1]"),
            ("images", "file_name", "image 2"),
            ("annotations", "id", "annotations[1]"),
            ("annotations", "image_id", "annotation 2"),
            ("annotations", "category_id", "annotation 2"),
            ("annotations", "bbox", "annotation 2"),
            ("categories", "id", "categories[1]"),
        ],
    )
    def test_a_key_that_is_missing_is_named_with_its_entry(
        self, what: str, key: str, name: str, tmp_path: Path
    ) -> None:
        error = refused(tmp_path, without(what, 1, key))
        assert error.code == "data-not-coco"
        assert error.message.startswith(f"{name} has no {key}, expected ")
        assert line_at(tmp_path, error) == "{"

    def test_a_mistyped_key_is_guessed(self, tmp_path: Path) -> None:
        def change(content: Content) -> None:
            content["annotations"][1]["box"] = content["annotations"][1].pop("bbox")

        assert refused(tmp_path, change).hint == "did you mean 'box' to be 'bbox'?"

    def test_a_mistyped_list_is_guessed(self, tmp_path: Path) -> None:
        error = refused(tmp_path, lambda c: c.update(annotation=c.pop("annotations")))
        assert error.hint == "did you mean 'annotation' to be 'annotations'?"

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("2.JPG", "did you mean '2.jpg'?"),
            ("2.jpeg", "did you mean '2.jpg'?"),
            ("images/2.jpg", "without that folder"),
        ],
    )
    def test_a_missing_image_is_guessed(self, name: str, hint: str, tmp_path: Path) -> None:
        error = refused(tmp_path, update("images", 2, file_name=name))
        assert error.code == "data-missing"
        assert hint in str(error.hint)
        assert line_at(tmp_path, error) == f'"{name}",'


class TestOnce:
    @pytest.mark.parametrize("what", ["images", "annotations", "categories"])
    def test_an_id_that_is_there_twice_is_an_error(self, what: str, tmp_path: Path) -> None:
        error = refused(tmp_path, lambda c: c[what][1].update(id=c[what][0]["id"]))
        assert error.code == "data-not-coco"
        assert error.message.startswith(f"{what}[1] has the id ")
        assert error.message.endswith(f", which {what}[0] has too")

    def test_a_category_that_is_there_twice_is_an_error(self, tmp_path: Path) -> None:
        error = refused(tmp_path, update("categories", 1, name="temple"))
        assert error.message == "categories[1] has the name 'temple', which categories[0] has too"


class TestBoxes:
    @pytest.mark.parametrize("box", [[WIDTH + 5, 10, 10, 10], [10, -20, 10, 20], [-9, -9, 5, 5]])
    def test_a_box_outside_its_image_is_an_error(self, box: list[int], tmp_path: Path) -> None:
        error = refused(tmp_path, update("annotations", 1, bbox=box))
        assert error.code == "data-not-coco"
        assert error.message.endswith(f"within its image of {WIDTH}x{HEIGHT}")
        assert line_at(tmp_path, error) == "["

    @pytest.mark.parametrize("box", [[10, 10, 0, 5], [10, 10, 5, 0], [10, 10, 5, 1e-30]])
    def test_a_box_without_an_area_is_left_out_and_said(
        self, box: list[int], tmp_path: Path
    ) -> None:
        source = read(edited(tmp_path, update("annotations", 1, bbox=box)))
        text = dict(source.notes)["objects-left-out"]
        assert text.startswith("1 of 6 boxes of ")
        assert f"annotation 2 with the bbox {box} in 2.jpg of {WIDTH}x{HEIGHT}" in text

    def test_a_box_given_by_two_corners_is_said_to_reach_over_the_border(
        self, tmp_path: Path
    ) -> None:
        box = [100, 80, WIDTH, HEIGHT]
        source = read(edited(tmp_path, update("annotations", 1, bbox=box)))
        text = dict(source.notes)["boxes-cut"]
        assert f"annotation 2 with the bbox {box}" in text
        assert "not two corners" in text

    def test_half_a_pixel_over_the_border_is_no_remark(self, tmp_path: Path) -> None:
        box = [100, 80, WIDTH - 99.5, HEIGHT - 79.5]
        source = read(edited(tmp_path, update("annotations", 1, bbox=box)))
        assert not {"boxes-cut", "objects-left-out"} & set(dict(source.notes))

    def test_boxes_that_are_shares_of_their_image_are_an_error(self, tmp_path: Path) -> None:
        def change(content: Content) -> None:
            for annotation in content["annotations"]:
                annotation["bbox"] = [0.1, 0.2, 0.3, 0.4]

        error = refused(tmp_path, change)
        assert error.code == "data-not-coco"
        assert "in pixels, not shares" in error.message

    def test_a_file_of_crowds_alone_trains_no_detector(self, tmp_path: Path) -> None:
        def change(content: Content) -> None:
            for annotation in content["annotations"]:
                annotation["iscrowd"] = 1

        error = refused(tmp_path, change)
        assert error.code == "no-objects"
        assert "of 6 annotations 6 are crowds" in error.message

    def test_some_crowds_are_counted(self, tmp_path: Path) -> None:
        source = read(edited(tmp_path, update("annotations", 1, iscrowd=1)))
        assert dict(source.facts)["crowds-left-out"].startswith("1 of 6 annotations of ")

    @settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(box=st.lists(st.floats(-400, 400) | st.integers(-400, 400), min_size=4, max_size=4))
    def test_every_box_that_is_read_is_one_that_a_detector_takes(
        self, box: list[float], tmp_path: Path
    ) -> None:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        change = update("annotations", 0, bbox=box)
        x, y, wide, high = box
        away = x >= WIDTH or y >= HEIGHT or x + wide <= 0 or y + high <= 0
        if min(wide, high) < 0 or (wide and high and away):
            assert refused(folder, change).code == "data-not-coco"
            return
        source = read(edited(folder, change))
        assert source.calibration_data is not None
        ((_, targets),) = source.calibration_data()
        for target in targets:
            corners = target["boxes"]
            assert (corners[:, 2:] > corners[:, :2]).all()
            assert len(corners) == len(target["labels"])
        left_out = "objects-left-out" in dict(source.notes)
        assert len(targets[1]["boxes"]) == (0 if left_out else 1)


class TestSizes:
    def test_an_image_of_another_size_than_the_file_says_is_named(self, tmp_path: Path) -> None:
        error = refused(tmp_path, update("images", 2, width=4000, height=3000))
        assert error.code == "image-size-differs"
        assert error.message.endswith(
            f"images/2.jpg is {WIDTH}x{HEIGHT}, and annotations.json says 4000x3000"
        )
        assert line_at(tmp_path, error) == "{"

    def test_a_box_outside_an_image_of_unsaid_size_is_an_error(self, tmp_path: Path) -> None:
        def change(content: Content) -> None:
            del content["images"][2]["width"], content["images"][2]["height"]
            content["annotations"][1]["bbox"] = [WIDTH + 5, 10, 10, 10]

        error = refused(tmp_path, change)
        assert error.message.endswith(f"within its image of {WIDTH}x{HEIGHT}")

    def test_an_image_that_its_exif_orientation_turns_is_explained(self, tmp_path: Path) -> None:
        folder = edited(tmp_path, update("images", 2, width=HEIGHT, height=WIDTH))
        path = folder / "images" / "2.jpg"
        photo = Image.open(path)
        exif = photo.getexif()
        exif[0x0112] = 6
        photo.save(path, exif=exif)
        with pytest.raises(InputError) as caught:
            read(folder)
        assert caught.value.code == "image-size-differs"
        assert "an EXIF orientation turns none" in str(caught.value.hint)


class TestOutlines:
    @pytest.mark.parametrize(
        ("outline", "part"),
        [
            ({"size": [3, 4], "counts": [5, 7]}, "it is of an image of 4x3, and its image has 160"),
            ({"size": [HEIGHT, WIDTH], "counts": [5, 7]}, "its counts are of 12 pixels"),
            ({"size": [HEIGHT, WIDTH], "counts": [5, -7]}, "its counts are [5, -7]"),
            ({"size": "x", "counts": [5, 7]}, "its size is 'x'"),
            ({"size": [HEIGHT, WIDTH], "counts": "bad"}, "Invalid RLE"),
            ([[500, 500, 600, 500, 600, 600]], "it lies outside its image of 160x120"),
            ([[1, 2, 3, 4, 5]], "[1, 2, 3, 4, 5] is no polygon"),
            ("x", "expected a list of polygons"),
        ],
    )
    @pytest.mark.parametrize("task", ["detection", "segmentation"])
    def test_one_that_is_not_of_its_image_is_an_error(
        self, outline: Any, part: str, task: Task, tmp_path: Path
    ) -> None:
        change = update("annotations", 1, segmentation=outline)
        error = refused(tmp_path, change, task, masks=task == "detection")
        assert error.code == "data-not-coco"
        assert error.message.startswith("annotation 2 ")
        assert part in error.message

    def test_a_detector_of_boxes_does_not_read_them(self, tmp_path: Path) -> None:
        read(edited(tmp_path, update("annotations", 1, segmentation="x")))
