"""The steps of a release: the section of the changelog, the version, the names of the images."""

from datetime import date
from pathlib import Path

import pytest

import release
from release import ReleaseError, parse_version
from support.paths import ROOT

CHANGELOG = """# Changelog

## [Unreleased]

### Added

- Something new.

## [1.0.0] - 2026-01-02

### Fixed

- Something old.
"""
DEPLOYMENT = """
          # image: comment
          image: registry.example.com/llama-gguf-inference:0.9.0
          image: other.example.com/other:0.9.0
"""


def project(folder: Path) -> Path:
    (folder / "CHANGELOG.md").write_text(CHANGELOG)
    (folder / "VERSION").write_text("1.0.0\n")
    kubernetes = folder / "deploy" / "kubernetes"
    kubernetes.mkdir(parents=True)
    (kubernetes / "deployment.yaml").write_text(DEPLOYMENT)
    return folder


def run(*arguments: str) -> int:
    return release.main(list(arguments))


def test_cut_moves_what_is_unreleased_and_writes_the_version(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(project(tmp_path))
    assert run("--root", root, "cut", "1.1.0-rc.2", "--date", "2026-03-04") == 0
    assert "## [Unreleased]\n\n## [1.1.0-rc.2] - 2026-03-04\n\n### Added\n" in (tmp_path / "CHANGELOG.md").read_text()
    assert (tmp_path / "VERSION").read_text() == "1.1.0-rc.2\n"
    changed = (tmp_path / "deploy" / "kubernetes" / "deployment.yaml").read_text()
    assert changed == DEPLOYMENT.replace("inference:0.9.0", "inference:1.1.0-rc.2")
    assert run("--root", root, "check", "v1.1.0-rc.2") == 0
    assert run("--root", root, "notes", "1.1.0-rc.2") == 0
    assert capsys.readouterr().out == "### Added\n\n- Something new.\n"


def test_nothing_is_cut_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(project(tmp_path))
    assert run("--root", root, "cut", "1.0.0") == 1
    assert "has a section [1.0.0] already" in capsys.readouterr().err
    assert run("--root", root, "cut", "1.1.0") == 0
    assert run("--root", root, "cut", "1.2.0") == 1
    assert "has nothing in [Unreleased]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ("v1.0.1", "the tag is v1.0.1, but VERSION is 1.0.0: the tag must be v1.0.0"),
        ("1.0.0", "the tag is 1.0.0, but VERSION is 1.0.0: the tag must be v1.0.0"),
        ("v1.0", "'v1.0' is not a version"),
    ],
)
def test_a_tag_that_is_not_the_version_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tag: str, message: str
) -> None:
    root = str(project(tmp_path))
    assert run("--root", root, "check", "v1.0.0") == 0
    assert run("--root", root, "check", tag) == 1
    assert message in capsys.readouterr().err


def test_a_version_without_a_section_has_no_notes() -> None:
    with pytest.raises(ReleaseError, match=r"no section \[2.0.0\]"):
        release.notes(CHANGELOG, parse_version("2.0.0"))


@pytest.mark.parametrize("text", ["", "1", "1.2", "01.2.3", "1.2.3+build", "1.2.3-", "1.2.3-a..b", "1.2.3 ", "v1.2.٣"])
def test_what_is_not_a_version_is_refused(text: str) -> None:
    with pytest.raises(ReleaseError):
        parse_version(text)


def test_a_release_moves_all_names_and_a_pre_release_only_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tags", "v1.2.3", "--image", "ghcr.io/Me/x", "--suffix=-cpu") == 0
    names = [f"ghcr.io/me/x:{name}-cpu" for name in ("1.2.3", "1.2", "1", "latest")]
    assert capsys.readouterr().out.split() == names
    assert run("tags", "v1.2.3-rc.1", "--image", "x") == 0
    assert capsys.readouterr().out == "x:1.2.3-rc.1\n"


def test_cut_adds_only_a_heading() -> None:
    changed = release.cut(CHANGELOG, parse_version("1.1.0"), date(2026, 3, 4))
    assert changed.replace("\n## [1.1.0] - 2026-03-04\n", "") == CHANGELOG


def test_the_projects_own_version_is_one() -> None:
    parse_version((ROOT / "VERSION").read_text().strip())
    assert "Unreleased" in release.sections((ROOT / "CHANGELOG.md").read_text())
