"""A rules file that is missing, unreadable or extends such a one: code, place and a way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpusq_compile.language.problems import CODES
from tests.bad_rules import Case, check_case, failure
from tests.test_rules_bad_keys import CASES as KEYS
from tests.test_rules_bad_settings import CASES as SETTINGS
from tests.test_rules_bad_yaml import CASES as YAML

DATA = Path(__file__).parent / "data" / "rules"

CASES: dict[str, Case] = {
    "extends is a mapping": ("version: 1\nextends: {a: 1}\n", "wrong-type", 2, 10, "path", ""),
    "extends a number among names": (
        "version: 1\nextends: [int8, 8]\n",
        "wrong-type",
        2,
        17,
        "a list of them",
        "",
    ),
    "extends nothing": ("version: 1\nextends: []\n", "wrong-type", 2, 10, "path", "int8"),
    "extends one file twice": (
        "version: 1\nextends: [int8, int8]\n",
        "duplicate-value",
        2,
        17,
        "'int8' is listed twice",
        "",
    ),
    "extends of an unknown name": (
        "version: 1\nextends: int9\n",
        "unknown-rules-name",
        2,
        10,
        "'int9'",
        "did you mean 'int8'?",
    ),
    "extends of a missing file": (
        "version: 1\nextends: other.yaml\n",
        "rules-file-missing",
        2,
        10,
        "'other.yaml'",
        "",
    ),
    "extends of a paper's model without its folder": (
        "version: 1\nextends: deit_tiny\n",
        "unknown-rules-name",
        2,
        10,
        "'deit_tiny'",
        "did you mean 'paper/deit_tiny'?",
    ),
    "extends of itself": ("version: 1\nextends: rules.yaml\n", "extends-cycle", 2, 10, "->", ""),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_file_ends_with_its_code_place_and_hint(name: str, tmp_path: Path) -> None:
    check_case(CASES[name], tmp_path)


def test_every_code_of_a_file_has_a_case() -> None:
    tables = (CASES, KEYS, SETTINGS, YAML)
    elsewhere = {
        "expect-mismatch",
        "pattern-unmatched",
        "role-unmatched",
        "rule-shadowed",
        "rule-unmatched",
        "rules-file-not-utf8",
        "rules-file-unreadable",
        "rules-is-folder",
    }
    assert {case[1] for cases in tables for case in cases.values()} == set(CODES) - elsewhere


def test_missing_file_names_a_close_one(tmp_path: Path) -> None:
    (tmp_path / "my-rules.yaml").write_text("version: 1\nrules: []\n")
    error = failure(tmp_path / "my-rule.yaml")
    assert error.code == "rules-file-missing"
    assert "my-rules.yaml" in (error.hint or "")


def test_missing_file_with_a_shipped_name_points_to_the_shipped_rules() -> None:
    for spec in ("int8.yaml", Path("int8")):
        error = failure(spec)
        assert error.code == "rules-file-missing"
        assert "'int8'" in (error.hint or "")


def test_missing_folder_is_said() -> None:
    assert "folder" in (failure("/no/such/place/rules.yaml").hint or "")


@pytest.mark.parametrize("spec", ["int9", "paper/int8", "", "int8\0"])
def test_unknown_shipped_name_lists_the_shipped_ones(spec: str) -> None:
    error = failure(spec)
    assert error.code in ("unknown-rules-name", "rules-is-folder")
    assert "int8" in (error.hint or "")
    assert "sparse-fp16" in (error.hint or "")


def test_folder_in_place_of_a_file(tmp_path: Path) -> None:
    assert failure(tmp_path).code == "rules-is-folder"
    assert failure(str(tmp_path)).code == "rules-is-folder"


def test_file_name_beyond_the_limit_of_the_system() -> None:
    error = failure("x" * 5000 + ".yaml")
    assert error.code == "rules-file-unreadable"
    assert len(str(error)) < 1000


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux's /proc")
def test_unreadable_file() -> None:
    error = failure(Path("/proc/self/mem"))
    assert error.code == "rules-file-unreadable"
    assert str(error.location) == "/proc/self/mem"


def test_file_that_is_not_utf8_has_the_place_of_the_byte() -> None:
    error = failure(DATA / "latin1.yaml")
    assert error.code == "rules-file-not-utf8"
    assert error.location is not None
    assert (error.location.line, error.location.column) == (2, 6)
    assert "0xe9" in error.message


def test_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_bytes(bytes(range(256)) * 8)
    assert failure(path).code in ("yaml-syntax", "rules-file-not-utf8")


def test_huge_file_is_refused_without_reading_all_of_it() -> None:
    assert failure(Path("/dev/zero")).code == "rules-file-too-large"


def test_error_in_the_extended_file_has_that_file_as_its_place(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("version: 1\nrules: []\nfinetune: {labels: none}\n")
    (tmp_path / "child.yaml").write_text("version: 1\nextends: base.yaml\n")
    error = failure(tmp_path / "child.yaml")
    assert error.code == "unknown-value"
    assert error.location is not None
    assert error.location.file.endswith("base.yaml")
    assert (error.location.line, error.location.column) == (3, 20)


def test_version_of_the_extended_file_is_checked(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("version: 2\n")
    (tmp_path / "child.yaml").write_text("version: 1\nextends: base.yaml\n")
    error = failure(tmp_path / "child.yaml")
    assert error.code == "unknown-version"
    assert error.location is not None
    assert error.location.file.endswith("base.yaml")


def test_cycle_over_two_files_names_the_way_round() -> None:
    error = failure(DATA / "loop_a.yaml")
    assert error.code == "extends-cycle"
    assert error.message.count("loop_a.yaml") == 2
    assert error.location is not None
    assert error.location.file.endswith("loop_b.yaml")
