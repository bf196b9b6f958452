"""The output folder: whole runs or nothing, a manifest of every file, other people's files kept."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from gpusq_compile.errors import InputError
from gpusq_compile.output import MANIFEST, digest, publish, staging, write_json


def run(output: Path, files: dict[str, str], **about: Any) -> list[Path]:
    """One run that stages `files` and publishes them."""
    with staging(output) as stage:
        for name, text in files.items():
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            (stage / name).write_text(text)
        return publish(stage, output, about)


def found(output: Path) -> dict[str, str]:
    """Every file in the folder but the manifest."""
    return {
        str(path.relative_to(output)): path.read_text()
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def manifest(output: Path) -> Any:
    return json.loads((output / MANIFEST).read_text())


FILES = {"model.onnx": "a model", "engine/sm89.plan": "an engine", "report.json": "{}"}


def test_every_file_is_published_and_listed_with_its_sha256(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    published = run(output, FILES, seed=7)
    assert found(output) == FILES
    assert sorted(published) == sorted(output / name for name in (*FILES, MANIFEST))
    assert manifest(output) == {
        "seed": 7,
        "files": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in FILES.items()},
    }


def test_no_staging_is_left_behind(tmp_path: Path) -> None:
    run(tmp_path, FILES)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "engine",
        MANIFEST,
        "model.onnx",
        "report.json",
    ]


def test_files_of_an_earlier_run_that_this_one_lacks_are_removed(tmp_path: Path) -> None:
    run(tmp_path, FILES)
    run(tmp_path, {"report.json": "failed"})
    assert found(tmp_path) == {"report.json": "failed"}
    assert list(manifest(tmp_path)["files"]) == ["report.json"]
    assert not (tmp_path / "engine").exists()


def test_foreign_files_are_kept(tmp_path: Path) -> None:
    run(tmp_path, FILES)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "engine" / "other.plan").write_text("mine too")
    run(tmp_path, {"report.json": "{}"})
    assert found(tmp_path) == {
        "notes.txt": "mine",
        "engine/other.plan": "mine too",
        "report.json": "{}",
    }
    assert set(manifest(tmp_path)["files"]) == {"report.json"}


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        "{}",
        '{"files": null}',
        '{"files": 3}',
        '{"files": {"../victim": "x", "/etc/victim": "x", "a/../../victim": "x"}}',
        '{"files": [17, null]}',
        "\udcff".encode("utf-8", "surrogateescape").decode("latin-1"),
    ],
)
def test_a_manifest_that_lies_removes_nothing_outside_the_folder(tmp_path: Path, text: str) -> None:
    output = tmp_path / "out"
    output.mkdir()
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (output / MANIFEST).write_text(text)
    run(output, {"report.json": "{}"})
    assert victim.read_text() == "mine"
    assert found(output) == {"report.json": "{}"}


def test_a_manifest_that_lists_a_folder_removes_nothing(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("mine")
    (tmp_path / MANIFEST).write_text('{"files": {"kept": "x", "": "x", ".": "x"}}')
    run(tmp_path, {"report.json": "{}"})
    assert found(tmp_path) == {"kept/file": "mine", "report.json": "{}"}


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    output, outside = tmp_path / "out", tmp_path / "outside"
    outside.mkdir()
    (outside / "victim").write_text("mine")
    output.mkdir()
    (output / "link").symlink_to(outside)
    (output / MANIFEST).write_text('{"files": {"link/victim": "x"}}')
    run(output, {"report.json": "{}"})
    assert (outside / "victim").read_text() == "mine"


def half_a_run(output: Path, end: BaseException) -> None:
    with staging(output) as stage:
        (stage / "model.onnx").write_text("half")
        raise end


def test_a_run_that_fails_leaves_nothing_not_even_the_folders_it_made(tmp_path: Path) -> None:
    output = tmp_path / "a" / "b"
    with pytest.raises(RuntimeError):
        half_a_run(output, RuntimeError())
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_leaves_an_earlier_one_as_it_was(tmp_path: Path) -> None:
    run(tmp_path, FILES)
    before = manifest(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        half_a_run(tmp_path, KeyboardInterrupt())
    assert found(tmp_path) == FILES
    assert manifest(tmp_path) == before


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "out"
    file.write_text("mine")
    with pytest.raises(InputError) as caught, staging(file):
        pass
    assert caught.value.code == "output-is-a-file"
    assert file.read_text() == "mine"


def test_an_output_under_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError) as caught, staging(tmp_path / "file" / "out"):
        pass
    assert caught.value.code == "output-not-writable"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError) as caught, staging(tmp_path / "out"):
            pass
    finally:
        tmp_path.chmod(0o700)
    assert caught.value.code == "output-not-writable"


def test_without_an_output_the_folder_is_temporary() -> None:
    with staging(None) as stage:
        (stage / "model.onnx").write_text("a model")
    assert not stage.exists()


def test_json_is_written_whole_and_holds_no_nan(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"a": [1, 2.5, None]})
    assert json.loads(file.read_text()) == {"a": [1, 2.5, None]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(file, {"a": float("nan")})
    assert json.loads(file.read_text()) == {"a": [1, 2.5, None]}


def test_a_digest_is_the_sha256_of_the_content(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    assert digest(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_logs_of_the_engines_of_an_earlier_run_are_set_aside(tmp_path: Path) -> None:
    run(tmp_path, FILES)
    for name in ("model.trt.log", "model.trt.layers.json", "model.trt.plan"):
        (tmp_path / "engine" / name).write_text("built from the first model")
    run(tmp_path, FILES)
    assert sorted(path.name for path in (tmp_path / "engine").iterdir()) == [
        "model.trt.layers.json.old",
        "model.trt.log.old",
        "model.trt.plan",
        "sm89.plan",
    ]
