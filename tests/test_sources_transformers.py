"""`hf:` in place of a model file: folders, configurations and hub names of transformers models."""

from __future__ import annotations

import hashlib
import http.server
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpusq_compile.errors import InputError
from gpusq_compile.load_model import load_source
from gpusq_compile.model_source import ModelSource
from gpusq_compile.sources.images import classified_image, whole_image
from gpusq_compile.sources.transformers_images import input_images
from tests.tiny_transformers import config_of, save_config, save_model

COMMIT = "a" * 40


def outputs(source: ModelSource) -> Any:
    with torch.no_grad():
        return source.module(*source.example_inputs)


def codes(entries: list[tuple[str, str]]) -> list[str]:
    return [code for code, _ in entries]


def text_of(entries: list[tuple[str, str]], code: str) -> str:
    return next(text for found, text in entries if found == code)


def refused(spec: str, **options: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        load_source(spec, **options)
    return caught.value


class TestWeights:
    def test_a_folders_weights_are_the_saved_ones(self, tmp_path: Path) -> None:
        saved = save_model("ViTForImageClassification", tmp_path).state_dict()
        source = load_source(f"hf:{tmp_path}")
        loaded = source.module.state_dict()
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[name], saved[name]) for name in saved)
        assert source.notes == []

    def test_a_vision_tower_gets_its_part_of_the_weights(self, tmp_path: Path) -> None:
        whole = save_model("CLIPModel", tmp_path)
        source = load_source(f"hf:{tmp_path}")
        own = source.module.state_dict()
        saved = {
            name.removeprefix("vision_model."): value
            for name, value in whole.state_dict().items()
            if name.startswith("vision_model.")
        }
        assert own
        assert all(torch.equal(value, saved[name]) for name, value in own.items())
        assert source.notes == []
        assert "its vision tower is compiled (CLIPVisionModel)" in text_of(
            source.facts, "model-chosen"
        )

    @pytest.mark.parametrize("file", [True, False])
    def test_a_configuration_alone_has_random_weights_and_says_so(
        self, file: bool, tmp_path: Path
    ) -> None:
        folder = save_config("ViTForImageClassification", tmp_path)
        source = load_source(f"hf:{folder / 'config.json' if file else folder}")
        assert "has random weights" in text_of(source.notes, "random-weights")

    def test_a_safetensors_file_fills_a_configuration(self, tmp_path: Path) -> None:
        saved = save_model("ViTForImageClassification", tmp_path / "whole")
        config = save_config("ViTForImageClassification", tmp_path / "bare") / "config.json"
        weights = str(tmp_path / "whole" / "model.safetensors")
        source = load_source(f"hf:{config}", weights=weights)
        assert source.notes == []
        head = source.module.state_dict()["classifier.weight"]
        assert torch.equal(head, saved.state_dict()["classifier.weight"])

    def test_half_precision_weights_become_float32(self, tmp_path: Path) -> None:
        save_model("ViTForImageClassification", tmp_path / "a").half().save_pretrained(tmp_path)
        source = load_source(f"hf:{tmp_path}")
        assert {value.dtype for value in source.module.parameters()} == {torch.float32}

    def test_missing_tensors_are_named(self, tmp_path: Path) -> None:
        save_model("ViTForImageClassification", tmp_path).vit.save_pretrained(tmp_path / "body")
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "body" / "config.json").write_text(json.dumps(config))
        source = load_source(f"hf:{tmp_path / 'body'}")
        text = text_of(source.notes, "weights-incomplete")
        assert "2 tensors are not among the weights and are random" in text
        assert "(classifier.bias, classifier.weight)" in text

    def test_pickled_weights_are_not_read(self, tmp_path: Path) -> None:
        save_config("ViTForImageClassification", tmp_path)
        (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
        error = refused(f"hf:{tmp_path}")
        assert error.code == "weights-pickled"
        assert "pytorch_model.bin is a pickle" in error.message

    def test_damaged_weights_are_named(self, tmp_path: Path) -> None:
        save_config("ViTForImageClassification", tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"not tensors")
        assert refused(f"hf:{tmp_path}").code == "weights-unreadable"

    def test_weights_of_other_shapes_are_refused(self, tmp_path: Path) -> None:
        save_model("ViTForImageClassification", tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
        file = str(tmp_path / "model.safetensors")
        for error in (refused(f"hf:{tmp_path}"), refused(f"hf:{tmp_path}", weights=file)):
            assert error.code == "weights-mismatch"
            assert "tensors 6 of another shape" in error.message
            assert "layers.0.mlp.fc1.bias is [64], the model has [96]" in error.message
            assert error.hint == "the sizes in config.json are not those of these weights"

    def test_pretrained_weights_that_are_not_there_are_an_error(self, tmp_path: Path) -> None:
        save_config("ViTForImageClassification", tmp_path)
        assert refused(f"hf:{tmp_path}", weights="pretrained").code == "weights-missing"


def test_without_transformers_it_is_said_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_config("ViTForImageClassification", tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    error = refused(f"hf:{folder}")
    assert error.code == "library-not-installed"
    assert error.hint == "pip install 'gpusq-compile[models]'"


class TestClass:
    @pytest.mark.parametrize(
        ("kind", "shapes"),
        [
            ("ViTForImageClassification", {"": [2, 4]}),
            ("SwinForImageClassification", {"": [2, 4]}),
            ("CLIPModel", {"last_hidden_state": [2, 17, 32], "pooler_output": [2, 32]}),
            ("SiglipModel", {"last_hidden_state": [2, 16, 32], "pooler_output": [2, 32]}),
            ("DetrForObjectDetection", {"logits": [2, 6, 4], "pred_boxes": [2, 6, 4]}),
            ("YolosForObjectDetection", {"logits": [2, 5, 4], "pred_boxes": [2, 5, 4]}),
            ("SegformerForSemanticSegmentation", {"": [2, 3, 16, 16]}),
            ("Dinov2Backbone", {"feature_maps_0": [2, 32, 4, 4], "feature_maps_1": [2, 32, 4, 4]}),
        ],
    )
    def test_pixel_values_alone_give_tensors_by_name(
        self, kind: str, shapes: dict[str, list[int]], tmp_path: Path
    ) -> None:
        size = {"height": 64, "width": 64}
        found = outputs(load_source(f"hf:{save_config(kind, tmp_path, size=size)}"))
        named = {"": found} if isinstance(found, Tensor) else found
        assert {name: list(value.shape) for name, value in named.items()} == shapes

    def test_without_architectures_an_auto_class_is_taken_and_said(self, tmp_path: Path) -> None:
        config = config_of("ViTForImageClassification").to_dict()
        path = tmp_path / "mine.json"
        path.write_text(json.dumps({**config, "architectures": None}))
        source = load_source(f"hf:{path}")
        assert type(source.module).__name__ == "ViTForImageClassification"
        text = text_of(source.facts, "model-chosen")
        assert text == "the configuration names no class: ViTForImageClassification is built"

    def test_names_of_tensors_are_the_librarys(self, tmp_path: Path) -> None:
        source = load_source(f"hf:{save_config('ViTForImageClassification', tmp_path)}")
        assert "vit.layernorm.weight" in source.module.state_dict()

    def test_the_data_that_fits_is_known(self, tmp_path: Path) -> None:
        size = {"height": 64, "width": 64}
        folder = save_config("SegformerForSemanticSegmentation", tmp_path, size=size)
        assert load_source(f"hf:{folder}").data_forms == "coco:DIR"

    def test_a_model_of_text_is_refused(self, tmp_path: Path) -> None:
        error = refused(f"hf:{save_config('BertModel', tmp_path)}")
        assert error.code == "not-an-image-model"
        assert "is a bert model (BertModel)" in error.message

    def test_code_beside_a_configuration_is_never_run(self, tmp_path: Path) -> None:
        ran = tmp_path / "ran"
        (tmp_path / "modeling.py").write_text(f"open({str(ran)!r}, 'w')")
        config = {"model_type": "vitt", "auto_map": {"AutoModel": "modeling.Model"}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        error = refused(f"hf:{tmp_path}")
        assert error.code == "unknown-model"
        assert "code of its own, which is never run" in error.message
        assert error.hint == "did you mean 'vit'?"
        assert not ran.exists()


class TestImages:
    def test_the_configurations_size_goes_first(self, tmp_path: Path) -> None:
        size = {"height": 48, "width": 48}
        folder = save_config(
            "ViTForImageClassification", tmp_path, size=size, image_mean=[0.1, 0.2, 0.3]
        )
        source = load_source(f"hf:{folder}")
        assert source.example_inputs[0].shape == (2, 3, 32, 32)
        text = text_of(source.facts, "input-images")
        assert "images of 32x32 (its configuration), normalized with mean 0.1/0.2/0.3" in text

    def test_the_preprocessors_size_serves_where_there_is_no_other(self, tmp_path: Path) -> None:
        size = {"shortest_edge": 96, "longest_edge": 128}
        source = load_source(f"hf:{save_config('DetrForObjectDetection', tmp_path, size=size)}")
        assert source.example_inputs[0].shape == (2, 3, 96, 96)

    def test_without_a_preprocessor_the_familys_own_is_said(self, tmp_path: Path) -> None:
        source = load_source(f"hf:{save_config('SegformerForSemanticSegmentation', tmp_path)}")
        assert source.example_inputs[0].shape == (2, 3, 512, 512)
        text = text_of(source.facts, "input-images")
        assert "512x512 (the default of segformer)" in text

    @pytest.mark.parametrize(
        ("kind", "said"),
        [
            ("ViTImageProcessor", {"image_mean": [0.1, 0.2, 0.3]}),
            ("ViTImageProcessor", {"do_normalize": False}),
            ("ViTImageProcessor", {"do_rescale": False, "image_mean": [9, 8, 7]}),
            ("ViTImageProcessor", {"rescale_factor": 1 / 127.5, "image_std": [2, 3, 4]}),
            ("MobileViTImageProcessor", {"do_center_crop": False}),
            ("MobileViTImageProcessor", {"do_flip_channel_order": False, "do_center_crop": False}),
        ],
    )
    def test_pixels_are_those_of_the_librarys_own_preprocessor(
        self, kind: str, said: dict[str, Any]
    ) -> None:
        size = {"height": 32, "width": 32}
        pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        photo = Image.fromarray(pixels)
        library = getattr(transformers, kind)(size=size, **said)
        expected = library(photo, return_tensors="pt")["pixel_values"][0]
        file = {"size": size, "image_processor_type": kind, **said}
        images, _ = input_images(config_of("ViTForImageClassification"), file, "vit")
        torch.testing.assert_close(whole_image(images)(photo), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("size", [32, 384])
    @pytest.mark.parametrize(
        ("kind", "said"),
        [
            ("ConvNextImageProcessorPil", {"crop_pct": 0.8}),
            ("PoolFormerImageProcessorPil", {"crop_pct": 0.8, "do_center_crop": True}),
            ("CLIPImageProcessorPil", {"do_center_crop": True}),
        ],
    )
    def test_an_image_is_resized_and_cut_as_by_the_librarys_own_preprocessor(
        self, kind: str, said: dict[str, Any], size: int
    ) -> None:
        said = {"size": {"shortest_edge": size}, **said}
        if "do_center_crop" in said:
            said["crop_size"] = {"height": size, "width": size}
        pixels = np.random.default_rng(0).integers(0, 256, (25, 30, 3), dtype=np.uint8)
        photo = Image.fromarray(pixels).resize((600, 500), Image.Resampling.BICUBIC)
        library = getattr(transformers, kind)(**said)
        expected = library(photo, return_tensors="pt")["pixel_values"][0]
        config = config_of("ViTForImageClassification")
        config.image_size = size
        file = {"image_processor_type": kind, **said}
        images, _ = input_images(config, file, "vit")
        found = classified_image(images)(photo)
        assert found.shape == expected.shape
        assert float((found - expected).abs().max()) < 0.1

    def test_every_filter_of_pillow_is_known(self) -> None:
        config = config_of("ViTForImageClassification")
        photo = Image.fromarray(np.arange(3 * 40 * 40, dtype=np.uint8).reshape(40, 40, 3))
        for number in map(Image.Resampling, range(6)):
            images, _ = input_images(config, {"resample": number.value}, "vit")
            expected = np.asarray(photo.resize((32, 32), number), dtype=np.float32) / 255
            found = whole_image(images)(photo) * 0.5 + 0.5
            np.testing.assert_allclose(found.permute(1, 2, 0), expected, atol=1e-5)


class TestBadPaths:
    @pytest.mark.parametrize(
        ("spec", "code", "part"),
        [
            ("hf:nowhere.json", "config-missing", "no file or folder at nowhere.json"),
            ("hf:folder/confg.json", "config-missing", "did you mean hf:folder/config.json?"),
            ("hf:folder/cnfig", "config-missing", "did you mean hf:folder/config.json?"),
            ("hf:empty", "config-missing", "empty has no config.json"),
            ("hf:torn.json", "config-not-json", "torn.json:1:2: "),
            ("hf:list.json", "config-not-json", "list.json is no JSON object"),
            ("hf:untyped.json", "unknown-model", "has no model_type"),
            ("hf:wrong.json", "config-invalid", "refuses the configuration"),
            ("hff:folder", "unknown-model-library", "did you mean 'hf'?"),
        ],
    )
    def test_what_is_wrong_is_named(
        self, spec: str, code: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        save_config("ViTForImageClassification", tmp_path / "folder")
        Path("empty").mkdir()
        Path("torn.json").write_text("{torn")
        Path("list.json").write_text("[]")
        Path("untyped.json").write_text("{}")
        Path("wrong.json").write_text('{"model_type": "vit", "hidden_size": "many"}')
        error = refused(spec)
        assert error.code == code
        assert part in str(error)


class Hub(http.server.BaseHTTPRequestHandler):
    """What a client asks the Hugging Face hub for to get the files of the model `tiny/vit`."""

    folder: Path

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        path = self.path.split("?")[0].strip("/")
        content = self.content(path)
        self.send_response(404 if content is None else 200)
        if content is None:
            self.send_header(
                "X-Error-Code", "EntryNotFound" if "tiny/vit" in path else "RepoNotFound"
            )
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content or b"").hexdigest()}"')
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if with_body:
            self.wfile.write(content or b"")

    def content(self, path: str) -> bytes | None:
        """A file, the list of all files, or about the model; None for what there is not."""
        if not path:
            return b""
        if path.startswith("api/models/tiny/vit/tree/"):
            files = [file for file in self.folder.iterdir() if file.is_file()]
            return json.dumps([entry(file) for file in files]).encode()
        if path.startswith("api/models/tiny/vit/"):
            return json.dumps({"id": "tiny/vit", "sha": COMMIT}).encode()
        file = self.folder / path.rpartition("/")[2]
        return file.read_bytes() if path.startswith("tiny/vit/") and file.is_file() else None

    def log_message(self, *args: Any) -> None:
        pass


def entry(file: Path) -> dict[str, Any]:
    """A file in the hub's list of a model's files."""
    return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": file.name}


class TestHub:
    @pytest.fixture
    def hub(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[http.server.HTTPServer]:
        """A hub on this machine with one model, and an empty cache."""
        constants = pytest.importorskip("huggingface_hub").constants
        handler = type("OneModel", (Hub,), {"folder": tmp_path / "vit"})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
        server.server_close()

    def test_a_name_is_downloaded_once_and_then_served_from_the_cache(
        self, hub: http.server.HTTPServer, tmp_path: Path
    ) -> None:
        saved = save_model("ViTForImageClassification", tmp_path / "vit").state_dict()
        for gone in (False, True):
            if gone:
                hub.shutdown()
                hub.server_close()
            source = load_source("hf:tiny/vit")
            loaded = source.module.state_dict()
            assert all(torch.equal(loaded[name], saved[name]) for name in saved)
            assert source.notes == []

    def test_every_shard_of_the_weights_is_checked(
        self, hub: http.server.HTTPServer, tmp_path: Path
    ) -> None:
        model = save_model("ViTForImageClassification", tmp_path / "vit")
        (tmp_path / "vit" / "model.safetensors").unlink()
        model.save_pretrained(tmp_path / "vit", max_shard_size="30KB")
        shards = sorted((tmp_path / "vit").glob("model-*.safetensors"))
        assert len(shards) > 1
        state = load_file(shards[-1])
        name = sorted(name for name in state if name.endswith("weight"))[0]
        state[name] = state[name].to(torch.int8)
        save_file(state, shards[-1], metadata={"format": "pt"})
        for spec in ("hf:tiny/vit", f"hf:{tmp_path / 'vit'}"):
            error = refused(spec)
            assert error.code == "weights-mismatch"
            assert f"1 of another type (first: {name} is I8" in error.message

    def test_an_unknown_name_is_an_error(self, hub: http.server.HTTPServer) -> None:
        error = refused("hf:tiny/other")
        assert error.code == "unknown-model"
        assert "gives no model 'tiny/other'" in error.message

    def test_without_a_network_it_is_said_at_once(
        self, hub: http.server.HTTPServer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        hub.shutdown()
        hub.server_close()
        error = refused("hf:tiny/vit")
        assert error.code == "no-network"
        assert "cannot be reached" in error.message
        assert "Retry" not in capsys.readouterr().err
