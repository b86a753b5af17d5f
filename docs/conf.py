"""Sphinx's configuration: the pages of docs/, README, CHANGELOG, CONTRIBUTING and LICENSE, and the modules' docstrings.

`make docs` builds the site. Pages are written for GitHub too: links between them are relative, and a page outside docs/
has a stub in docs/project/, which is replaced by the page itself when the site is built.
"""

import re
import sys
from pathlib import Path
from typing import Any

from pygments.lexers.special import TextLexer

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT / "scripts"))

project = "llama-gguf-inference"
author = "the contributors of llama-gguf-inference"
project_copyright = author
version = release = (ROOT / "VERSION").read_text(encoding="utf-8").strip()
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
exclude_patterns = ["_build", "site"]
nitpicky = False
highlight_language = "text"
smartquotes = False

myst_heading_anchors = 4
myst_enable_extensions: list[str] = []

# A prompt is shown, but not copied.
copybutton_prompt_text = "$ "
copybutton_line_continuation_character = "\\"

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints = "signature"

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["site"]
html_css_files = ["site.css"]
html_copy_source = False
html_search_scorer = str(DOCS / "search_scorer.js")
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}

# A page of the site → the file outside docs/ that it shows.
OUTSIDE = {
    "index": "README.md",
    "project/CHANGELOG": "CHANGELOG.md",
    "project/CONTRIBUTING": "CONTRIBUTING.md",
    "project/SECURITY": "SECURITY.md",
    "project/CODE_OF_CONDUCT": "CODE_OF_CONDUCT.md",
    "project/LICENSE": "LICENSE",
}
PAGE_OF = {file: f"{page}.md" for page, file in OUTSIDE.items()} | {"scripts/": "modules/index.md"}
LINK = re.compile(r"(?<=\]\()([^)#\s]+)")
NAMED_AS_FILE = re.compile(r"\[(?:docs/)?\w+\.md\](?=\()")


def show_outside_page(app: Any, docname: str, source: list[str]) -> None:
    """Replace a stub by the file that it stands for, and make every link lead to a page of the site."""
    file = OUTSIDE.get(docname)
    folder = ROOT if file else DOCS
    text = (ROOT / file).read_text(encoding="utf-8") if file else source[0]
    if file and not file.endswith(".md"):
        text = f"# {file.capitalize()}\n\n{text}"
    text = LINK.sub(lambda link: site_link(link[1], folder, (DOCS / docname).parent), text)
    text = NAMED_AS_FILE.sub("[]", text)  # the title of the page takes the place of the file's name
    source[0] = f"{text}\n{source[0]}" if docname == "index" else text


def site_link(link: str, folder: Path, page_folder: Path) -> str:
    """Return a link of a file in `folder` as one from a page in `page_folder`; unchanged if it leads to no page."""
    if re.match(r"[a-z]+:", link):
        return link
    target = (folder / link).resolve()
    if folder == DOCS and DOCS in target.parents:
        return link
    name = target.relative_to(ROOT).as_posix() + ("/" if link.endswith("/") else "")
    page = PAGE_OF.get(name) or (name.removeprefix("docs/") if name.startswith("docs/") else None)
    if page is None:
        return link
    return "../" * len(page_folder.relative_to(DOCS).parts) + page


def escape_docstring(_app: Any, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Make reStructuredText of a docstring, which is plain text with code in single backquotes."""
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines).rstrip())
    lines[:] = [*"\n\n".join(map(_paragraph, paragraphs)).splitlines(), ""]


def _paragraph(text: str) -> str:
    rows = text.splitlines()
    if rows and all(row.startswith("    ") for row in rows):
        return "::\n\n" + text
    if any(row.startswith(" ") for row in rows) and not re.match(r"\s*(?:[-*]|\d+\.) ", text):
        return "\n".join(f"| {_inline(row)}" for row in rows)
    return _inline(text)


def _inline(text: str) -> str:
    parts = re.split(r"(`[^`\n]+`)", text)
    return "".join(f"`{part}`" if part.startswith("`") else re.sub(r"([*`|\\])|(_)(?!\w)", r"\\\1\2", part)
                   for part in parts)  # fmt: skip


def setup(app: Any) -> None:
    app.add_lexer("log", TextLexer)  # lines of a log, which wrap: see site/site.css
    app.connect("source-read", show_outside_page)
    app.connect("autodoc-process-docstring", escape_docstring)
