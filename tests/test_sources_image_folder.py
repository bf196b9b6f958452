"""`--data imagefolder:DIR`: photos by class, with a split or without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gpusq_compile.data import check_data, require_train_data
from gpusq_compile.errors import InputError
from gpusq_compile.model_source import ModelSource
from gpusq_compile.sources.class_folders import read_classes
from gpusq_compile.sources.classes import match_classes
from gpusq_compile.sources.data_spec import give_data
from gpusq_compile.sources.images import open_image
from gpusq_compile.sources.model import Classes, Images, LibraryModel
from tests.photos import NAMES, crops, make_image_folder, save_16_bit

ImageFolder = pytest.importorskip("torchvision.datasets").ImageFolder
pil_loader = pytest.importorskip("torchvision.datasets.folder").pil_loader


def given(folder: Path, classes: Classes | None = None, size: int = 32) -> ModelSource:
    """A source with the data of a folder, for a classifier of four unnamed classes."""
    model = LibraryModel(
        "timm:mine",
        torch.nn.Identity(),
        "classification",
        Images((size, size)),
        classes or Classes(4),
    )
    source = ModelSource(model.origin, model.module, ())
    give_data(source, model, f"imagefolder:{folder}")
    return source


def refused(folder: Path, classes: Classes | None = None) -> InputError:
    def read() -> None:
        source = given(folder, classes)
        assert source.train_data is not None
        list(source.train_data())

    with pytest.raises(InputError) as caught:
        read()
    return caught.value


def labels_of(factory: Any) -> list[int]:
    return [int(label) for _, labels in factory() for label in labels]


def codes(source: ModelSource) -> set[str]:
    return {code for code, _ in source.notes}


class TestSplits:
    def test_train_and_val_are_used_as_they_are(self, tmp_path: Path) -> None:
        make_image_folder(tmp_path / "train", {"a": 3, "b": 2})
        make_image_folder(tmp_path / "val", {"b": 2})
        source = given(tmp_path)
        assert sorted(labels_of(source.train_data)) == [0, 0, 0, 1, 1]
        assert labels_of(source.eval_data) == [1, 1]

    def test_without_a_split_each_fifth_image_is_held_out(self, tmp_path: Path) -> None:
        make_image_folder(tmp_path, {"a": 11, "b": 5})
        source = given(tmp_path)
        assert sorted(labels_of(source.train_data)) == [0] * 9 + [1] * 4
        assert labels_of(source.eval_data) == [0, 0, 1]
        assert "images-held-out" in dict(source.facts)

    def test_too_few_images_to_hold_any_out_are_said(self, tmp_path: Path) -> None:
        source = given(make_image_folder(tmp_path, {"a": 4, "b": 2}))
        assert source.eval_data is None
        assert "no-evaluation-images" in codes(source)

    def test_a_train_folder_alone_is_no_class(self, tmp_path: Path) -> None:
        make_image_folder(tmp_path / "train", {"a": 6, "b": 6})
        source = given(tmp_path)
        assert sorted(labels_of(source.train_data)) == [0] * 6 + [1] * 6
        assert source.eval_data is None
        assert "has no val/ folder" in dict(source.notes)["no-evaluation-images"]
        with pytest.raises(InputError) as caught:
            check_data(source, finetune=False, labelled=True)
        assert caught.value.code == "no-labelled-eval-data"
        assert caught.value.hint == "give --data imagefolder:DIR with val/ beside train/"

    def test_a_val_folder_alone_calibrates_and_evaluates(self, tmp_path: Path) -> None:
        make_image_folder(tmp_path / "val", {"a": 2, "b": 2})
        source = given(tmp_path)
        assert source.train_data is None
        assert source.calibration_data is not None
        assert labels_of(source.eval_data) == [0, 0, 1, 1]
        with pytest.raises(InputError) as caught:
            require_train_data(source, "sparse")
        hint = "give --data imagefolder:DIR with train/ beside val/, or compile without it"
        assert str(caught.value.hint).startswith(hint)

    def test_mistyped_names_of_a_split_are_said(self, tmp_path: Path) -> None:
        for folder in ("trian", "vaal"):
            make_image_folder(tmp_path / folder, {"a": 2, "b": 2})
        text = dict(given(tmp_path).notes)["classes-nested"]
        assert "its classes are trian, vaal, and not a, b" in text

    def test_a_class_of_val_that_train_has_not_is_an_error(self, tmp_path: Path) -> None:
        make_image_folder(tmp_path / "train", {"a": 2})
        make_image_folder(tmp_path / "val", {"b": 2})
        error = refused(tmp_path)
        assert error.code == "unknown-class"
        assert "has the class 'b'" in error.message

    def test_a_mistyped_class_of_val_is_guessed(self, tmp_path: Path) -> None:
        make_image_folder(tmp_path / "train", {"temple": 2})
        make_image_folder(tmp_path / "val", {"tempel": 2})
        assert refused(tmp_path).hint == "did you mean 'temple'?"

    @pytest.mark.parametrize(("train", "val"), [("Train", "Val"), ("TRAINING", "Validation")])
    def test_capitals_do_not_make_a_split_a_class(
        self, train: str, val: str, tmp_path: Path
    ) -> None:
        make_image_folder(tmp_path / train, {"a": 3, "b": 2})
        make_image_folder(tmp_path / val, {"b": 2})
        source = given(tmp_path)
        assert sorted(labels_of(source.train_data)) == [0, 0, 0, 1, 1]
        assert labels_of(source.eval_data) == [1, 1]

    @pytest.mark.parametrize(
        ("other", "end"),
        [
            ("vall", "not vall/; did you mean vall/ to be val/?"),
            ("eval", "not eval/; did you mean eval/ to be val/?"),
            ("zebra", "train/ is read, and not zebra/"),
        ],
    )
    def test_a_folder_beside_train_that_is_no_split_is_named(
        self, other: str, end: str, tmp_path: Path
    ) -> None:
        for folder in ("train", other):
            make_image_folder(tmp_path / folder, {"a": 2})
        assert dict(given(tmp_path).notes)["folders-left-out"].endswith(end)

    def test_a_test_folder_beside_val_is_passed_over_and_said(self, tmp_path: Path) -> None:
        for folder in ("train", "val", "test"):
            make_image_folder(tmp_path / folder, {"a": 2})
        assert dict(given(tmp_path).notes)["folders-left-out"].endswith("and not test/")

    def test_calibrating_on_what_is_evaluated_is_said(self, tmp_path: Path) -> None:
        make_image_folder(tmp_path / "val", {"a": 2, "b": 2})
        assert "calibrated-on-evaluation" in codes(given(tmp_path))
        make_image_folder(tmp_path / "train", {"a": 2, "b": 2})
        assert "calibrated-on-evaluation" not in codes(given(tmp_path))

    def test_calibration_sees_every_class_at_once(self, tmp_path: Path) -> None:
        source = given(make_image_folder(tmp_path, {"a": 4, "b": 2}))
        assert labels_of(source.calibration_data) == [0, 1, 0, 1, 0, 0]


class TestClasses:
    def test_names_that_the_model_knows_decide(self, tmp_path: Path) -> None:
        names = {0: ("cat",), 2: ("flower", "blossom"), 3: ("Temple",)}
        source = given(make_image_folder(tmp_path), Classes(4, names))
        assert set(labels_of(source.eval_data)) == {2, 3}
        assert "by name" in dict(source.facts)["classes-matched"]

    def test_numbers_are_outputs_and_not_sorted_as_text(self, tmp_path: Path) -> None:
        make_image_folder(tmp_path, {"2": 5, "10": 5})
        source = given(tmp_path, Classes(12, {0: ("cat",)}))
        assert set(labels_of(source.eval_data)) == {2, 10}
        assert source.notes == []

    def test_unknown_names_are_counted_in_order_with_a_warning(self, tmp_path: Path) -> None:
        source = given(make_image_folder(tmp_path))
        assert set(labels_of(source.eval_data)) == {0, 1}
        text = dict(source.notes)["classes-not-matched"]
        assert "in order" in text
        assert "so accuracy means nothing unless" in text

    def test_as_many_unnamed_classes_as_outputs_are_no_warning(self, tmp_path: Path) -> None:
        source = given(make_image_folder(tmp_path), Classes(2))
        assert source.notes == []

    def test_too_many_classes_are_an_error_with_both_counts(self, tmp_path: Path) -> None:
        make_image_folder(tmp_path, dict.fromkeys("abcde", 1))
        error = refused(tmp_path)
        assert error.code == "too-many-classes"
        assert "has 5 classes, but timm:mine has 4" in error.message

    def test_one_unknown_name_among_known_ones_is_an_error(self, tmp_path: Path) -> None:
        make_image_folder(tmp_path, {"temple": 1, "flower": 1, "kat": 1})
        names = {0: ("cat",), 1: ("flower",), 2: ("temple",)}
        error = refused(tmp_path, Classes(4, names))
        assert error.code == "unknown-class"
        assert error.hint == "did you mean 'cat'?"

    def test_a_name_of_two_outputs_decides_nothing(self) -> None:
        source = ModelSource("timm:mine", torch.nn.Identity(), ())
        twice = Classes(4, {0: ("crane",), 3: ("crane",)})
        assert match_classes(source, twice, {0: "crane"}, "data", numbered=False) == {0: 0}
        assert "classes-not-matched" in codes(source)


class TestImageFiles:
    def test_every_kind_of_image_becomes_what_the_model_takes(self, tmp_path: Path) -> None:
        folder = tmp_path / "a"
        folder.mkdir()
        photo = crops(0, 1)[0]
        for mode, suffix in (("RGB", "jpg"), ("L", "jpg"), ("RGBA", "png"), ("P", "png")):
            photo.convert(mode).save(folder / f"{mode}.{suffix}")
        photo.convert("CMYK").save(folder / "CMYK.JPEG")
        save_16_bit(folder / "grey16.png")
        source = given(tmp_path, Classes(1), size=24)
        assert source.train_data is not None
        ((images, _),) = [*source.train_data(), *(source.eval_data or list)()][:1]
        assert images.shape[1:] == (3, 24, 24)
        assert images.dtype == torch.float32

    def test_sixteen_bits_are_not_clipped(self, tmp_path: Path) -> None:
        for name in ("grey8", "grey16"):
            (tmp_path / name).mkdir()
        save_16_bit(tmp_path / "grey16" / "1.png")
        crops(0, 1)[0].convert("L").save(tmp_path / "grey8" / "1.png")
        source = given(tmp_path)
        assert source.calibration_data is not None
        ((images, labels),) = source.calibration_data()
        assert labels.tolist() == [0, 1]
        assert torch.allclose(images[0], images[1], atol=0.02)

    def test_a_file_that_is_no_image_is_named(self, tmp_path: Path) -> None:
        make_image_folder(tmp_path, {"a": 2})
        (tmp_path / "a" / "0.jpg").write_text("not an image")
        error = refused(tmp_path)
        assert error.code == "image-unreadable"
        assert error.message.startswith(f"{tmp_path}/a/0.jpg: ")

    @pytest.mark.parametrize("header", [b"P5 2 1 65535\n", b"P5 2 1 1023\n"])
    def test_sixteen_bits_of_a_pgm_are_scaled(self, header: bytes, tmp_path: Path) -> None:
        path = tmp_path / "grey.pgm"
        white = int(header.split()[-1])
        path.write_bytes(header + white.to_bytes(2, "big") + (white // 2).to_bytes(2, "big"))
        assert np.asarray(open_image(path, 1)).tolist() == [[255, 127]]

    @pytest.mark.parametrize("order", ["<u2", ">u2"])
    def test_sixteen_bits_of_a_tif_are_scaled_in_either_order(
        self, order: str, tmp_path: Path
    ) -> None:
        path = tmp_path / "grey.tif"
        Image.fromarray(np.array([[65535, 32768]], dtype=order)).save(path)
        assert np.asarray(open_image(path, 1)).tolist() == [[255, 128]]

    def test_a_link_to_nothing_is_not_called_damaged(self, tmp_path: Path) -> None:
        make_image_folder(tmp_path, {"a": 2})
        (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
        error = refused(tmp_path)
        assert error.code == "file-unreadable"
        assert "gone.png cannot be read: No such file" in error.message

    def test_a_truncated_photo_is_named(self, tmp_path: Path) -> None:
        make_image_folder(tmp_path, {"a": 2})
        photo = tmp_path / "a" / "1.jpg"
        photo.write_bytes(photo.read_bytes()[:900])
        error = refused(tmp_path)
        assert error.code == "image-unreadable"
        assert str(photo) in error.message

    def test_hidden_folders_and_other_files_are_no_classes(self, tmp_path: Path) -> None:
        make_image_folder(tmp_path)
        (tmp_path / ".cache").mkdir()
        (tmp_path / "__MACOSX").mkdir()
        (tmp_path / "readme.txt").write_text("photos")
        (tmp_path / NAMES[0] / "notes.txt").write_text("notes")
        source = given(tmp_path)
        assert "the 2 classes of" in dict(source.notes)["classes-not-matched"]

    def test_files_of_other_kinds_are_counted(self, tmp_path: Path) -> None:
        make_image_folder(tmp_path, {"a": 2, "b": 1})
        for name in ("a/1.gif", "a/2.HEIC", "b/3.heic", "b/notes", "b/.hidden.jpg"):
            (tmp_path / name).write_bytes(b"GIF")
        source = given(tmp_path)
        text = dict(source.notes)["files-left-out"]
        assert "2 files .heic, 1 file .gif and 1 file without extension are not read" in text
        assert f"the first {tmp_path}/a/1.gif; images are .jpg, " in text
        assert sorted(labels_of(source.train_data)) == [0, 0, 1]

    def test_links_that_lead_back_give_no_image_twice(self, tmp_path: Path) -> None:
        make_image_folder(tmp_path / "photos", {"a": 3, "b": 2})
        (tmp_path / "photos" / "a" / "again").symlink_to(tmp_path / "photos" / "a")
        (tmp_path / "photos" / "c").symlink_to(tmp_path / "photos" / "b")
        source = given(tmp_path / "photos")
        assert sorted(labels_of(source.calibration_data)) == [0, 0, 0, 1, 1, 2, 2]
        text = dict(source.notes)["folders-left-out"]
        assert "photos/a/again is a link to a folder whose images are read already" in text

    def test_several_links_that_lead_back_are_an_error(self, tmp_path: Path) -> None:
        """Following them would take for ever."""
        make_image_folder(tmp_path)
        for name in ("up", "again"):
            (tmp_path / NAMES[0] / name).symlink_to("..")
        error = refused(tmp_path)
        assert error.code == "data-not-an-imagefolder"
        names = [f"{tmp_path}/{NAMES[0]}/{name}" for name in ("again", "up")]
        assert error.message.startswith(f"{' and '.join(names)} are links that lead back")

    @pytest.mark.parametrize(
        ("pixels", "found"),
        [
            (np.linspace(0, 65535, 64, dtype=np.int32), "32 bits from 0 to 65535"),
            (np.linspace(-5, 5, 64, dtype=np.int32), "32 bits from -5 to 5"),
            (np.linspace(0, 1, 64, dtype=np.float32), "floats from 0 to 1"),
            (np.linspace(0, 4000, 64, dtype=np.float32), "floats from 0 to 4000"),
        ],
    )
    def test_thirty_two_bits_are_refused_and_not_clipped(
        self, pixels: Any, found: str, tmp_path: Path
    ) -> None:
        make_image_folder(tmp_path, {"a": 2})
        Image.fromarray(pixels.reshape(8, 8)).save(tmp_path / "a" / "0.tif")
        error = refused(tmp_path)
        assert error.code == "image-unreadable"
        assert f"0.tif has {found}, expected 8 bits from 0 to 255 or 16 bits" in error.message

    @pytest.mark.parametrize("kind", [np.int32, np.float32])
    def test_thirty_two_bits_that_eight_hold_are_read(self, kind: Any, tmp_path: Path) -> None:
        for name, dtype in (("a", np.uint8), ("b", kind)):
            (tmp_path / name).mkdir()
            pixels = np.arange(0, 256, 4).reshape(8, 8).astype(dtype)
            Image.fromarray(pixels).save(tmp_path / name / "1.tif")
        source = given(tmp_path, Classes(2))
        assert source.calibration_data is not None
        ((images, _),) = source.calibration_data()
        assert torch.equal(images[0], images[1])

    def test_pixels_are_those_of_torchvisions_own_loader(self, tmp_path: Path) -> None:
        """Orientation and transparency as in the pipelines that the models were trained in."""
        photo = crops(0, 1)[0]
        exif = photo.getexif()
        exif[0x0112] = 6
        photo.save(tmp_path / "turned.jpg", exif=exif)
        photo.putalpha(photo.convert("L"))
        photo.save(tmp_path / "clear.png")
        photo.convert("RGB").convert("P").save(tmp_path / "palette.png")
        for path in tmp_path.iterdir():
            assert open_image(path).tobytes() == pil_loader(path).tobytes()

    def test_images_are_those_of_torchvisions_own_dataset(self, tmp_path: Path) -> None:
        make_image_folder(tmp_path, {"b": 3, "a": 2})
        make_image_folder(tmp_path / "a", {"deep": 2})
        (tmp_path / "b" / "up.PNG").write_bytes(b"")
        own = ImageFolder(tmp_path)
        split = read_classes(ModelSource("timm:mine", torch.nn.Identity(), ()), tmp_path, 3)
        assert split.images.samples == own.samples
        assert split.names == own.classes == ["a", "b"]

    def test_images_beside_the_classes_are_counted(self, tmp_path: Path) -> None:
        make_image_folder(tmp_path)
        (tmp_path / "loose.png").write_bytes(b"")
        text = dict(given(tmp_path).notes)["files-left-out"]
        assert "1 file .png is not read" in text
        assert f"the first {tmp_path}/loose.png" in text

    def test_an_orientation_turns_nothing_as_in_training(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        exif = Image.Exif()
        exif[0x0112] = 6
        photo = crops(0, 1)[0]
        photo.save(tmp_path / "a" / "1.png", exif=exif)
        photo.save(tmp_path / "a" / "2.png")
        source = given(tmp_path, Classes(1))
        assert source.train_data is not None
        ((images, _),) = source.train_data()
        assert torch.equal(images[0], images[1])


class TestOtherFolders:
    @pytest.mark.parametrize("inside", [("train", "val"), ("Train",), ("temple", "flower")])
    def test_the_only_folder_is_named_where_it_is_meant(
        self, inside: tuple[str, ...], tmp_path: Path
    ) -> None:
        for name in inside:
            make_image_folder(tmp_path / "photos" / name, {"a": 1})
        error = refused(tmp_path)
        assert error.code == "data-not-an-imagefolder"
        assert "has one folder, photos/, which holds no image but " in error.message
        assert str(error.hint).startswith("did you mean imagefolder:")
        assert str(error.hint).endswith("/photos?")

    def test_one_class_with_images_in_folders_of_its_own_is_a_class(self, tmp_path: Path) -> None:
        make_image_folder(tmp_path / "cat", {"old": 3, "new": 3})
        crops(0, 1)[0].save(tmp_path / "cat" / "1.jpg")
        assert len(labels_of(given(tmp_path, Classes(1)).calibration_data)) == 6

    def test_a_class_without_an_image_is_named(self, tmp_path: Path) -> None:
        make_image_folder(tmp_path)
        (tmp_path / "empty").mkdir()
        error = refused(tmp_path)
        assert error.code == "data-not-an-imagefolder"
        assert "/empty has no image" in error.message

    def test_what_a_class_has_instead_of_images_is_said(self, tmp_path: Path) -> None:
        make_image_folder(tmp_path)
        (tmp_path / "heic").mkdir()
        (tmp_path / "heic" / "1.heic").write_bytes(b"")
        assert refused(tmp_path).message.endswith(".webp), but 1 file .heic")

    def test_images_without_class_folders_are_counted(self, tmp_path: Path) -> None:
        for index, photo in enumerate(crops(0, 3)):
            photo.save(tmp_path / f"{index}.jpg")
        error = refused(tmp_path)
        assert error.code == "data-not-an-imagefolder"
        assert "no folder of a class, but 3 images" in error.message
