"""Format labelled figures as an HTML table, for records that are the last line of a notebook's cell."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


def html_table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """Return a table with a title and two columns: labels, and what they say.

    >>> html_table("plan", [("budget", "8 < 9 GiB")])
    '<table><caption>plan</caption><tr><th>budget</th><td>8 &lt; 9 GiB</td></tr></table>'
    """
    lines = "".join(f"<tr><th>{escape(label)}</th><td>{escape(text)}</td></tr>" for label, text in rows)
    return f"<table><caption>{escape(title)}</caption>{lines}</table>"
