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
# It creates its own keys.
WALKS = {"AUTHENTICATION.md": ""}
PAGES = sorted(page.name for page in DOCS.glob("*.md") if steps(page.read_text(encoding="utf-8")))

pytestmark = pytest.mark.skipif(not shutil.which("curl"), reason="the pages use curl")


@pytest.mark.parametrize("name", PAGES)
@aside
def test_each_command_of_a_page_prints_what_the_page_says(tmp_path: Path, name: str) -> None:
    walk = steps((DOCS / name).read_text(encoding="utf-8"))
    with shell(tmp_path, WALKS.get(name, KEYS)) as environ:
        printed = type_into_shell(
            walk, {**environ, "KEY": KEY, "OPS": OPERATOR_KEY, "BACKUP": str(tmp_path / "backup")}
        )
    seen = zip(walk, printed, strict=True)
    wrong = [(step, text) for step, text in seen if not matches(text, step.printed or "…")]
    assert wrong == []


def test_the_pages_that_show_commands_are_typed() -> None:
    assert {"ACCESS_LOG.md", "AUTHENTICATION.md", "CLIENTS.md", "QUICKSTART.md", "UPGRADE.md"} <= set(PAGES)
    assert len(steps((DOCS / "AUTHENTICATION.md").read_text(encoding="utf-8"))) > 40


def test_steps_are_read_with_their_outputs() -> None:
    page = "```sh\none \\\n  more\ntwo   # 2\n```\n\n```sh\nthree\n```\n\nIt prints this:\n\n```json\n{…}\n```\n"
    assert steps(page) == [Step("one more", None), Step("two", "2"), Step("three", "{…}")]
    assert matches('{"a": 1}', "{…}")
    assert not matches('{"a": 1', "{…}")
