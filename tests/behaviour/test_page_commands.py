"""The commands of docs/, typed as they are printed, with a gateway and the mock backend."""

import shutil
from pathlib import Path

import pytest

from support.pages import Step, matches, shell, steps, type_into_shell
from support.paths import ROOT
from support.together import aside

DOCS = ROOT / "docs"
KEY, OPERATOR_KEY = "sk-page-0123456789abcdef", "sk-page-ops-0123456789abcdef"
KEYS = f"alice:{KEY}:1000\nops:{OPERATOR_KEY}:1000 role=operator\n"
PAGES = sorted(page.name for page in DOCS.glob("*.md") if steps(page.read_text(encoding="utf-8")))
CREATES_KEYS, REPLACES_KEYS = "AUTHENTICATION.md", "UPGRADE.md"

pytestmark = pytest.mark.skipif(not shutil.which("curl"), reason="the pages use curl")


def wrong_outputs(folder: Path, keys: str, names: list[str]) -> dict[str, list[tuple[Step, str]]]:
    """Type pages, each into a shell of its own, with one gateway. Return what else than shown was printed, by page."""
    wrong = {}
    with shell(folder, keys) as environ:
        given = {**environ, "KEY": KEY, "OPS": OPERATOR_KEY, "BACKUP": str(folder / "backup")}
        given |= {"GATEWAY_URL": environ["URL"], "GATEWAY_KEY": KEY}  # as docs/CLIENTS.md calls them
        for name in names:
            walk = steps((DOCS / name).read_text(encoding="utf-8"))
            seen = zip(walk, type_into_shell(walk, given), strict=True)
            wrong[name] = [(step, text) for step, text in seen if not matches(text, step.printed or "…")]
    return wrong


@aside
def test_each_command_of_the_page_about_keys_prints_what_the_page_says(tmp_path: Path) -> None:
    assert wrong_outputs(tmp_path, "", [CREATES_KEYS]) == {CREATES_KEYS: []}


@aside
def test_each_command_of_the_other_pages_prints_what_its_page_says(tmp_path: Path) -> None:
    names = [*sorted({*PAGES} - {CREATES_KEYS, REPLACES_KEYS}), REPLACES_KEYS]
    assert wrong_outputs(tmp_path, KEYS, names) == {name: [] for name in names}


def test_the_pages_that_show_commands_are_typed() -> None:
    assert {"ACCESS_LOG.md", "AUTHENTICATION.md", "CLIENTS.md", "QUICKSTART.md", "UPGRADE.md"} <= set(PAGES)
    assert len(steps((DOCS / "AUTHENTICATION.md").read_text(encoding="utf-8"))) > 40


def test_steps_are_read_with_their_outputs() -> None:
    page = "```sh\none \\\n  more\ntwo   # 2\n```\n\n```sh\nthree\n```\n\nIt prints this:\n\n```json\n{…}\n```\n"
    assert steps(page) == [Step("one more", None), Step("two", "2"), Step("three", "{…}")]
    assert matches('{"a": 1}', "{…}")
    assert not matches('{"a": 1', "{…}")
