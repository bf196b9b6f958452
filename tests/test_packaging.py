"""The wheel holds gpusq_compile/ alone, whole, however it is built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path
from typing import Any

import pytest

import gpusq_compile

ROOT = Path(__file__).resolve().parents[1]
LINKS = ("passes", "rules")


def copy_checkout(to: Path, *, links: bool) -> Path:
    """A copy of what a clone has, with or without the links inside gpusq_compile/."""
    no_links = shutil.ignore_patterns("__pycache__", *(() if links else LINKS))
    no_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "gpusq_compile", to / "gpusq_compile", symlinks=True, ignore=no_links)
    for folder in ("passes", "rules", "tests", "examples"):
        shutil.copytree(ROOT / folder, to / folder, ignore=no_caches)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, to / file)
    return to


def build(kind: str, source: Path, to: Path) -> Path:
    """Builds a "wheel" or an "sdist" as pip does, but with the setuptools that is installed."""
    to.mkdir()
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(to)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return to / done.stdout.splitlines()[-1]


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return build("wheel", copy_checkout(folder / "checkout", links=True), folder / "dist")


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel unpacked, as pip lays it out."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_nothing_is_at_the_top_but_the_package_and_its_metadata(wheel: Path) -> None:
    top = {name.partition("/")[0] for name in names_in(wheel)}
    assert top == {"gpusq_compile", f"gpusq_compile-{gpusq_compile.__version__}.dist-info"}


def test_every_module_and_data_file_of_the_checkout_is_inside(wheel: Path) -> None:
    expected = set()
    for folder, inside in (
        ("gpusq_compile", "gpusq_compile"),
        ("passes", "gpusq_compile/passes"),
        ("rules", "gpusq_compile/rules"),
    ):
        for path in (ROOT / folder).rglob("*"):
            relative = path.relative_to(ROOT / folder)
            linked = folder == "gpusq_compile" and relative.parts[0] in LINKS
            if path.is_file() and path.suffix != ".pyc" and not linked:
                expected.add(f"{inside}/{relative.as_posix()}")
    assert {name for name in names_in(wheel) if ".dist-info/" not in name} == expected


def test_the_shipped_rules_and_passes_are_inside(wheel: Path) -> None:
    names = names_in(wheel)
    assert "gpusq_compile/rules/int8.yaml" in names
    assert "gpusq_compile/rules/int4.yaml" in names
    assert "gpusq_compile/rules/int4-pairwise.yaml" in names
    assert "gpusq_compile/rules/int4-weight-only.yaml" in names
    assert "gpusq_compile/rules/int8-attention.yaml" in names
    assert "gpusq_compile/rules/sparse-fp16.yaml" in names
    assert "gpusq_compile/rules/paper/deit_tiny.yaml" in names
    assert "gpusq_compile/passes/trace.py" in names
    assert "gpusq_compile/language/rules.schema.json" in names
    assert "gpusq_compile/report/report.schema.json" in names
    assert "gpusq_compile/codes/rules.md" in names


def test_the_links_make_no_difference(wheel: Path, tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout", links=False)
    assert names_in(build("wheel", checkout, tmp_path / "dist")) == names_in(wheel)


def test_a_wheel_made_from_the_sdist_is_the_same(wheel: Path, tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout", links=True)
    sdist = build("sdist", checkout, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        # Python 3.11.4 brought the argument, and Python 3.14 wants it.
        safely: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(tmp_path, **safely)
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert names_in(build("wheel", unpacked, tmp_path / "dist")) == names_in(wheel)


def test_the_metadata_names_version_licence_extras_and_commands(site: Path) -> None:
    (info,) = site.glob("*.dist-info")
    metadata = message_from_string((info / "METADATA").read_text())
    assert metadata["Name"] == "gpusq-compile"
    assert metadata["Version"] == gpusq_compile.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"rtx", "tensorrt", "models", "dev"} <= set(metadata.get_all("Provides-Extra", []))
    commands = (info / "entry_points.txt").read_text()
    assert "gpusq-compile = gpusq_compile.__main__:main" in commands
    assert "gpusq-report = gpusq_compile.report_cli:main" in commands
    assert (info / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_the_command_runs_from_the_wheel_in_another_folder(site: Path, tmp_path: Path) -> None:
    code = (
        "import gpusq_compile, runpy, sys\n"
        "print(gpusq_compile.__file__)\n"
        "sys.argv = ['gpusq-compile', '--list-passes']\n"
        "runpy.run_module('gpusq_compile', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[0]).is_relative_to(site)
    assert "sparsify" in done.stdout
