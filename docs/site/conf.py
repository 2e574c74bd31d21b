"""Sphinx's configuration of the documentation site (`make docs`).

The pages of docs/ are written for reading in the repository, too: their links lead to files there.  What the site adds
(the table of contents, the references, pages of the repository's root) is made here from what exists, so that nothing
is written twice.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

import tightfit

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

from references import command_line, public_interface  # noqa: E402  # beside this file, which is no package

project = "tightfit"
version = release = tightfit.__version__
author = "The tightfit developers"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
root_doc = "index"
exclude_patterns = ["schemas"]
myst_heading_anchors = 4
myst_url_schemes = ("http", "https", "mailto")
nitpick_ignore_regex = [("py:.*", ".*")]
default_role = "code"
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
suppress_warnings = ["myst.header"]

smartquotes = False
html_theme = "furo"
html_title = "tightfit"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
# Code without a language is the shell's, or what a program prints.
highlight_language = "text"

#: Pages of the repository's root, and what the site calls them.
_OF_THE_ROOT = {"README.md": "index", "CONTRIBUTING.md": "site/contributing", "CHANGELOG.md": "site/changelog"}
#: What only the site has, in the list of its pages.
_REFERENCES = """
**References**

- [Python](site/python.md): every public name.
- [Command line](site/command-line.md): every flag.
"""
#: A figure and its unit, which are not put on two lines.
_FIGURE = re.compile(r"(?<=\d) (?=(?:%|[KMG]i?B|ms|s|h)(?!\w))")
_ENTRY = re.compile(r"^- \[[^\]]*\]\(([^)]*)\)", re.MULTILINE)


def _within_the_site(text: str, page: str) -> str:
    """Return a page whose links out of docs/ lead to pages of the site, or are only text: it has no other files."""
    up = "../" * page.count("/")

    def link(found: re.Match[str]) -> str:
        picture, words, path = found.groups()
        name = _OF_THE_ROOT.get(path.partition("#")[0])
        return words if picture or name is None else f"[{words}]({up}{name}.md)"

    # Where the figures of a sentence lie beside the command that prints them, which stays.
    text = re.sub(r"\[figures\]\([^)\s]*\),\s+|,\s+\[figures\]\([^)\s]*\)", "", text)
    text = re.sub(r"(!?)\[([^\]]*)\]\(" + re.escape(up) + r"\.\./([^)\s]*)\)", link, text)
    return re.sub(r"\[([^\]]*)\]\([^):]*/\)", r"\1", text)  # folders


def _with_whole_figures(text: str) -> str:
    """Return a page in whose tables no figure is apart from its unit; what is code stays."""
    rows = text.split("\n")
    for place, row in enumerate(rows):
        if row.startswith("| "):
            parts = row.split("`")
            parts[::2] = [_FIGURE.sub("\N{NO-BREAK SPACE}", part) for part in parts[::2]]
            rows[place] = "`".join(parts)
    return "\n".join(rows)


def _table_of_contents(text: str) -> str:
    """Return hidden tables of contents: a group of the list of pages each."""
    tables = []
    for group in re.split(r"^\*\*(?=.*\*\*$)", text, flags=re.MULTILINE)[1:]:
        caption, _, entries = group.partition("**")
        links = _ENTRY.findall(entries)
        pages = [_OF_THE_ROOT.get(link.removeprefix("../"), link.removesuffix(".md")) for link in links]
        tables.append("\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"]))
    return "\n\n".join(tables)


def _page_of_the_root(path: str, page: str) -> str:
    """Return a file of the repository's root, with links as the page has to write them."""
    text = (ROOT / path).read_text(encoding="utf-8")
    up = "../" * page.count("/")
    return re.sub(r"\]\((?!https?:|#)(docs/)?", lambda found: f"]({up if found[1] else up + '../'}", text)


def _read(app: Sphinx, page: str, source: list[str]) -> None:
    contents = source[0].partition("\n\n")[2].partition("\n\n")[2]  # without the title, and what leads to the README
    if page == "index":
        readme, _, _ = _page_of_the_root("README.md", page).partition("## Documentation")
        contents += _REFERENCES
        source[0] = f"{readme}## Contents\n\n{contents}"
    for path, name in _OF_THE_ROOT.items():
        if page == name != "index":
            source[0] = _page_of_the_root(path, page)
    if page == "site/command-line":
        source[0] += command_line()
    if page == "site/python":
        source[0] += public_interface()
    source[0] = _with_whole_figures(_within_the_site(source[0], page))
    if page == "index":
        source[0] += "\n" + _table_of_contents(contents)


def _mark_examples(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Mark indented examples as code: in a docstring that people read in an editor, indenting them says enough."""
    marked: list[str] = []
    for place, line in enumerate(lines):
        if line.startswith("    ") and place > 1 and not lines[place - 1] and not lines[place - 2].startswith(" "):
            marked += ["::", ""]
        marked.append(line)
    lines[:] = marked


def setup(app: Sphinx) -> None:
    """Register what changes a page, and a docstring, before it is read."""
    app.connect("source-read", _read)
    app.connect("autodoc-process-docstring", _mark_examples, priority=400)  # before napoleon's
