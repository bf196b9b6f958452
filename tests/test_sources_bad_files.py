"""What is wrong in the files of a transformers model is said with its place, and never guessed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpusq_compile.errors import InputError, Location
from gpusq_compile.load_model import load_source
from gpusq_compile.sources.json_files import JsonFile, read_json
from gpusq_compile.sources.model import Images, LibraryModel
from gpusq_compile.sources.transformers_images import input_images
from gpusq_compile.sources.transformers_processor import check_processor
from gpusq_compile.sources.weights import load_weights
from tests.tiny_transformers import config_of, save_config, save_model

VIT = "ViTForImageClassification"
PROCESSOR = {
    "do_normalize": True,
    "do_rescale": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "rescale_factor": 1 / 255,
    "resample": 2,
    "size": {"height": 32, "width": 32},
}

CONFIG = config_of(VIT)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
VALUES = (
    SCALARS
    | st.lists(SCALARS, max_size=3)
    | st.dictionaries(st.sampled_from(["height", "width", "shortest_edge", "x"]), SCALARS)
)


def refused(spec: str, **options: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        load_source(spec, **options)
    return caught.value


def with_config(folder: Path, kind: str = VIT, **changes: Any) -> Path:
    """A folder whose config.json has other values; those that are None are taken out."""
    save_config(kind, folder)
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}, indent=2))
    return folder


def line_of(path: Path, key: str) -> int:
    lines = path.read_text().splitlines()
    return next(i for i, line in enumerate(lines, start=1) if f'"{key}":' in line)


def note(folder: Path, code: str, **options: Any) -> str:
    notes = load_source(f"hf:{folder}", **options).notes
    return next(text for found, text in notes if found == code)


def change_weights(folder: Path, change: dict[str, Tensor | None]) -> None:
    """Put other tensors into a folder's weights; those that are None are taken out."""
    path = folder / "model.safetensors"
    state = {**load_file(path), **change}
    save_file({k: v for k, v in state.items() if v is not None}, path, metadata={"format": "pt"})


@contextmanager
def forbidden(path: Path) -> Iterator[None]:
    """Take every permission from a file or folder; skip where that keeps nobody out, as root."""
    path.chmod(0)
    try:
        if os.access(path, os.R_OK):
            pytest.skip("this user may read everything")
        yield
    finally:
        path.chmod(0o700)


class TestProcessor:
    @pytest.mark.parametrize(
        ("key", "value", "part"),
        [
            ("image_mean", "x", 'image_mean is "x", expected a number, or a list of 3'),
            ("image_mean", ["a", "b", "c"], "expected a number"),
            ("image_mean", [None] * 3, "image_mean is [null, null, null]"),
            ("image_mean", None, "image_mean is null"),
            ("image_mean", [], "image_mean is []"),
            ("image_mean", [0.5, 0.5], "the model takes 3 channels"),
            ("image_mean", [float("nan")] * 3, "image_mean is [NaN, NaN, NaN]"),
            ("image_std", [0.5, 0.5, 0.0], "expected a number above 0"),
            ("image_std", [-1, -1, -1], "expected a number above 0"),
            ("image_processor_type", 5, "image_processor_type is 5, expected the name of a class"),
            ("resample", [2], "resample is [2], expected Pillow's number of a filter: nearest 0"),
            ("resample", 99, "resample is 99"),
            ("resample", True, "resample is true"),
            ("crop_pct", 0, "crop_pct is 0, expected the share"),
            ("crop_pct", 1.5, "crop_pct is 1.5, expected the share"),
            ("crop_pct", "x", 'crop_pct is "x"'),
            ("rescale_factor", 0, "rescale_factor is 0, expected a number above 0"),
            ("rescale_factor", "x", 'rescale_factor is "x"'),
            ("rescale_factor", None, "rescale_factor is null"),
            ("size", -1, "size is -1, expected a whole number above 0"),
            ("size", 0, "size is 0"),
            ("size", True, "size is true"),
            ("size", [32], "size is [32]"),
            ("size", {"height": 32}, "expected height and width, or shortest_edge"),
            ("crop_size", "16", 'crop_size is "16"'),
            ("do_normalize", "false", 'do_normalize is "false", expected true or false'),
            ("do_rescale", 1, "do_rescale is 1"),
            ("do_center_crop", "yes", 'do_center_crop is "yes"'),
        ],
    )
    def test_a_value_that_says_nothing_is_refused_at_its_place(
        self, key: str, value: Any, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        save_config(VIT, tmp_path)
        path = Path("preprocessor_config.json")
        path.write_text(json.dumps({**PROCESSOR, key: value}, indent=2))
        error = refused("hf:.")
        assert error.code == "preprocessor-invalid"
        assert part in error.message
        assert error.location == Location(str(path), line_of(path, key), len(key) + 7)

    def test_a_mistyped_part_of_a_size_is_named_with_the_nearest(self, tmp_path: Path) -> None:
        folder = save_config(VIT, tmp_path, size={"hieght": 32, "width": 32})
        error = refused(f"hf:{folder}")
        assert "size has 'hieght'" in error.message
        assert error.hint == "did you mean 'height'?"
        folder = save_config(VIT, tmp_path, size={"height": "32", "width": 32})
        assert 'size.height is "32"' in refused(f"hf:{folder}").message

    @pytest.mark.parametrize("value", [0.5, [0.5], [0.5] * 3])
    def test_one_number_stands_for_all_channels(self, value: Any, tmp_path: Path) -> None:
        folder = save_config(VIT, tmp_path, **{**PROCESSOR, "image_mean": value})
        text = dict(load_source(f"hf:{folder}").facts)["input-images"]
        assert "mean 0.5 and deviation 0.5 (its preprocessor)" in text

    def test_null_leaves_a_step_out_as_in_the_library(self, tmp_path: Path) -> None:
        save_config(VIT, tmp_path, **{**PROCESSOR, "do_normalize": None})
        text = dict(load_source(f"hf:{tmp_path}").facts)["input-images"]
        assert "mean 0 and deviation 1" in text

    def test_an_unknown_class_of_preprocessors_is_said(self, tmp_path: Path) -> None:
        folder = save_config(VIT, tmp_path, **PROCESSOR, image_processor_type="MineProcessor")
        text = dict(load_source(f"hf:{folder}").facts)["input-images"]
        assert "its preprocessor, a MineProcessor, which transformers does not know" in text

    def test_a_size_unlike_the_configurations_is_a_warning(self, tmp_path: Path) -> None:
        save_config(VIT, tmp_path, **{**PROCESSOR, "size": {"height": 48, "width": 64}})
        text = note(tmp_path, "input-size-differs")
        assert "32x32, which it is compiled for, and its preprocessor makes 48x64" in text

    @settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=200)
    @given(st.dictionaries(st.sampled_from(sorted(PROCESSOR)), VALUES, max_size=4))
    def test_no_value_is_an_internal_error(self, said: dict[str, Any]) -> None:
        file = JsonFile("preprocessor_config.json", json.dumps(said), said)
        problem = None
        try:
            check_processor(file, 3)
        except InputError as error:
            problem = error
        if problem is None:
            images, _ = input_images(CONFIG, said, "vit")
            assert all(value > 0 for value in images.std)
        else:
            assert problem.code == "preprocessor-invalid"
            assert problem.location is not None
            assert problem.location.line == 1


class TestConfiguration:
    @pytest.mark.parametrize(
        ("key", "value", "part"),
        [
            ("architectures", 5, "architectures is 5, expected a list of names"),
            ("architectures", [5], "architectures is [5]"),
            ("architectures", VIT, f'architectures is "{VIT}"'),
            ("hidden_size", "32", "Field 'hidden_size' expected int, got str (value: '32')"),
            ("hidden_act", "gelluu", "KeyError: 'gelluu'"),
            ("image_size", 0, "image_size is 0, expected a whole number above 0"),
            ("num_attention_heads", 0, "num_attention_heads is 0"),
            ("num_labels", -1, "num_labels is -1, expected a whole number above 0"),
            ("id2label", ["cat"], 'id2label is ["cat"]'),
            ("id2label", {"a": "cat"}, "expected a name for each number of an output"),
            ("id2label", {"0": "cat", "7": "dog"}, "it names 7 and not 1"),
            ("quantization_config", {"quant_method": "gptq"}, "are quantized already (gptq)"),
        ],
    )
    def test_a_wrong_value_is_named_with_its_place_and_the_whole_reason(
        self, key: str, value: Any, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        error = refused(f"hf:{with_config(Path('mine'), **{key: value})}")
        assert part in error.message
        assert "\n" not in error.message
        line = line_of(Path("mine/config.json"), key)
        assert error.location == Location("mine/config.json", line, len(key) + 7)

    def test_a_reason_that_names_no_value_is_whole_too(self, tmp_path: Path) -> None:
        vision = {**config_of("CLIPModel").vision_config.to_dict(), "hidden_size": 33}
        error = refused(f"hf:{with_config(tmp_path, 'CLIPModel', vision_config=vision)}")
        assert "The hidden size (33) is not a multiple of the number of" in error.message
        assert error.location is not None
        assert error.location.file.endswith("config.json")

    def test_quantized_weights_are_refused_before_they_are_read(self, tmp_path: Path) -> None:
        folder = with_config(tmp_path, quantization_config={"quant_method": "bitsandbytes"})
        error = refused(f"hf:{folder}")
        assert error.code == "weights-quantized"
        assert error.hint == "take the float weights: the rules say how they are quantized"

    @pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
    def test_the_size_and_channels_may_be_the_vision_parts(self, kind: str, tmp_path: Path) -> None:
        named = f"{kind}ForImageClassification"
        folder = with_config(tmp_path, f"{kind}Model", architectures=[named])
        source = load_source(f"hf:{folder}")
        assert type(source.module).__name__ == named
        assert source.example_inputs[0].shape == (2, 3, 32, 32)
        assert "32x32 (its configuration)" in dict(source.facts)["input-images"]
        with torch.no_grad():
            assert source.module(*source.example_inputs).shape == (2, 2)

    def test_a_tower_that_is_named_takes_the_vision_part(self, tmp_path: Path) -> None:
        folder = with_config(tmp_path, "CLIPModel", architectures=["CLIPVisionModel"])
        assert type(load_source(f"hf:{folder}").module).__name__ == "CLIPVisionModel"


class TestGrey:
    def images(self, root: Path) -> str:
        for name in ("a", "b"):
            for index in range(5):
                (root / name).mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (32, 32), (255, 255, 255)).save(root / name / f"{index}.png")
        return f"imagefolder:{root}"

    def first(self, folder: Path, data: str) -> Tensor:
        source = load_source(f"hf:{folder}", data=data)
        assert source.calibration_data is not None
        inputs: Tensor = next(iter(source.calibration_data()))[0]
        return inputs

    @pytest.mark.parametrize("said", [{}, {"image_mean": [0.5] * 3}, {"image_mean": 0.5}])
    def test_a_model_of_one_channel_gets_grey_images(
        self, said: dict[str, Any], tmp_path: Path
    ) -> None:
        folder = with_config(tmp_path / "model", num_channels=1)
        if said:
            (folder / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **said}))
        found = self.first(folder, self.images(tmp_path / "photos"))
        assert found.shape[1:] == (1, 32, 32)
        torch.testing.assert_close(found, torch.ones_like(found))

    def test_means_of_colours_are_not_a_grey_models(self, tmp_path: Path) -> None:
        folder = with_config(tmp_path, num_channels=1)
        said = {**PROCESSOR, "image_mean": [0.1, 0.2, 0.3]}
        (folder / "preprocessor_config.json").write_text(json.dumps(said))
        assert "the model takes 1 channels" in refused(f"hf:{folder}").message


class TestWeights:
    def test_an_int8_tensor_is_not_taken_for_a_float_one(self, tmp_path: Path) -> None:
        save_model(VIT, tmp_path)
        name = next(k for k in load_file(tmp_path / "model.safetensors") if "query.weight" in k)
        change_weights(tmp_path, {name: torch.zeros(32, 32, dtype=torch.int8)})
        file = str(tmp_path / "model.safetensors")
        for error in (refused(f"hf:{tmp_path}"), refused(f"hf:{tmp_path}", weights=file)):
            assert error.code == "weights-mismatch"
            assert f"1 of another type (first: {name} is I8, the model has float32)" in (
                error.message
            )
            assert error.hint == "the compiler takes float weights, and quantizes them itself"

    def test_indices_among_the_weights_are_no_fault(self, tmp_path: Path) -> None:
        model = save_model("SwinForImageClassification", tmp_path)
        indices = {k: v for k, v in model.named_buffers() if not v.is_floating_point()}
        assert indices
        change_weights(tmp_path, {name: value.clone() for name, value in indices.items()})
        source = load_source(f"hf:{tmp_path}")
        assert "weights-incomplete" not in dict(source.notes)

    def test_weights_of_which_none_fits_are_said_to_be_random(self, tmp_path: Path) -> None:
        save_model(VIT, tmp_path)
        save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        text = note(tmp_path, "weights-incomplete")
        assert "none of its 40 tensors is among the weights: all are random" in text
        assert "has random weights" in note(tmp_path, "random-weights")
        error = refused(f"hf:{tmp_path}", weights="pretrained")
        assert error.code == "weights-mismatch"
        assert "none of the 40 tensors of ViTForImageClassification, but x" in error.message

    def test_a_new_head_is_named_with_pretrained_weights_too(self, tmp_path: Path) -> None:
        save_model(VIT, tmp_path)
        change_weights(tmp_path, {"classifier.weight": None, "classifier.bias": None})
        text = note(tmp_path, "weights-incomplete", weights="pretrained")
        assert "2 tensors" in text
        assert "(classifier.bias, classifier.weight)" in text

    def test_tensors_too_many_are_a_warning_in_every_library(self, tmp_path: Path) -> None:
        save_model(VIT, tmp_path)
        change_weights(tmp_path, {"mine": torch.zeros(3)})
        file = str(tmp_path / "model.safetensors")
        for weights in (None, file):
            assert "left out (mine)" in note(tmp_path, "weights-unused", weights=weights)
        layer = torch.nn.Linear(2, 2)
        save_file({**layer.state_dict(), "mine": torch.zeros(1)}, tmp_path / "layer.safetensors")
        model = LibraryModel("timm:layer", torch.nn.Linear(2, 2), "features", Images((2, 2)))
        load_weights(model, tmp_path / "layer.safetensors")
        assert torch.equal(model.module.state_dict()["weight"], layer.weight)
        assert [code for code, _ in model.notes] == ["weights-unused"]

    def test_types_are_compared_in_every_library(self, tmp_path: Path) -> None:
        path = tmp_path / "layer.safetensors"
        model = LibraryModel("timm:layer", torch.nn.Linear(2, 2), "features", Images((2, 2)))
        small = torch.zeros(2, 2).to(torch.float8_e4m3fn)
        for weight in (torch.zeros(2, 2, dtype=torch.int8), small):
            save_file({"weight": weight, "bias": torch.zeros(2)}, path)
            with pytest.raises(InputError, match="1 of another type \\(first: weight is "):
                load_weights(model, path)

    def test_a_file_that_an_index_names_must_be_there(self, tmp_path: Path) -> None:
        save_config(VIT, tmp_path)
        index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        error = refused(f"hf:{tmp_path}")
        assert error.code == "weights-missing"
        assert "model-00001-of-00002.safetensors, which is not there" in error.message

    @pytest.mark.parametrize("files", [{}, [], None])
    def test_an_index_that_names_no_file_is_refused(self, files: object, tmp_path: Path) -> None:
        save_config(VIT, tmp_path)
        index = {"metadata": {}, "weight_map": files}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        error = refused(f"hf:{tmp_path}")
        assert error.code == "weights-missing"
        assert "its weight_map names no file" in error.message

    def test_a_number_beyond_what_python_reads_is_no_traceback(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"hidden_size": ' + "9" * 5000 + "}")
        error = refused(f"hf:{tmp_path}")
        assert error.code == "config-not-json"

    def test_what_cannot_be_read_is_named_with_its_reason(self, tmp_path: Path) -> None:
        save_config(VIT, tmp_path)
        (tmp_path / "model.safetensors").mkdir()
        file = str(tmp_path / "model.safetensors")
        for options in ({}, {"weights": file}):
            error = refused(f"hf:{tmp_path}", **options)
            assert error.code == "file-unreadable"
            assert error.message.endswith("model.safetensors cannot be read: Is a directory")

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "."])
    def test_what_is_forbidden_is_bad_input(self, name: str, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        save_model(VIT, folder)
        with forbidden(folder / name):
            assert "Permission denied" in refused(f"hf:{folder}").message

    def test_forbidden_data_is_bad_input(self, tmp_path: Path) -> None:
        folder = save_config(VIT, tmp_path / "model")
        TestGrey().images(tmp_path / "photos")
        for path in (tmp_path / "photos", tmp_path / "photos" / "a"):
            with forbidden(path):
                error = refused(f"hf:{folder}", data=f"imagefolder:{tmp_path / 'photos'}")
                assert "Permission denied" in error.message

    def test_a_forbidden_model_file_is_bad_input(self, tmp_path: Path) -> None:
        path = tmp_path / "net.py"
        path.write_text("")
        with forbidden(path):
            assert "Permission denied" in refused(str(path)).message

    def test_a_name_that_is_too_long_for_a_file_is_bad_input(self) -> None:
        assert refused("hf:" + "x" * 300 + ".json").code == "file-unreadable"
        assert refused("x" * 300 + ".py").code == "file-unreadable"


class TestPaths:
    def test_a_home_is_expanded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        save_model(VIT, tmp_path / "model")
        TestGrey().images(tmp_path / "photos")
        file = "~/model/model.safetensors"
        source = load_source("hf:~/model", data="imagefolder:~/photos", weights=file)
        assert source.eval_data is not None
        assert [code for code, _ in source.notes if code.startswith("weights")] == []

    @pytest.mark.parametrize(
        ("spec", "options", "hint"),
        [
            ("hf:modells/vit/config.json", {}, "did you mean hf:models/vit/config.json?"),
            ("hf:models/vti", {}, "did you mean hf:models/vit?"),
            ("hf:models/vit", {"data": "imagefolder:fotos"}, "did you mean imagefolder:photos?"),
            ("hf:models/vit", {"weights": "models/vit/modle.safetensors"}, "model.safetensors? "),
            ("modls/net.py", {}, "did you mean models/net.py?"),
        ],
    )
    def test_a_mistyped_path_is_answered_with_the_nearest(
        self,
        spec: str,
        options: dict[str, Any],
        hint: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        save_model(VIT, Path("models/vit"))
        Path("photos").mkdir()
        Path("models/net.py").write_text("")
        assert hint in (refused(spec, **options).hint or "")


KEYS = st.text(min_size=1, max_size=5)


@given(st.dictionaries(KEYS, st.dictionaries(KEYS, st.integers() | st.text(), max_size=3)))
def test_every_value_of_a_json_file_is_found_at_its_place(content: dict[str, Any]) -> None:
    for indent in (None, 2):
        text = json.dumps(content, indent=indent)
        file = JsonFile("file.json", text, content)
        for key, inner in content.items():
            for name, value in inner.items():
                place = file.place(key, name)
                assert place.line is not None
                assert place.column is not None
                rest = text.split("\n")[place.line - 1][place.column - 1 :]
                assert rest.startswith(json.dumps(value))


def test_of_equal_keys_the_last_is_placed(tmp_path: Path) -> None:
    path = tmp_path / "twice.json"
    path.write_text('{\n  "a": 1,\n  "a": 2\n}')
    file = read_json(path, "config-not-json")
    assert file.content == {"a": 2}
    assert file.place("a").line == 3
    assert file.place("b") == Location(file.shown)
