"""Paste the code that an explanation ends with into the script that it is about."""

from __future__ import annotations

import re
import textwrap


def pasted(source: str, code: str) -> str:
    """The script with the code in it, as a user would paste it."""
    if "TightfitCallback" in code:
        import_line, _, use = code.partition("\n\n")
        if "callbacks=" in use:
            callbacks = use[use.index("callbacks=") : -1]
            return f"{import_line}\n" + source.replace("trainer = Trainer(", f"trainer = Trainer({callbacks}, ")
        return f"{import_line}\n" + source.replace("trainer.train()", f"{use.partition('  #')[0]}\ntrainer.train()")
    once, _, loop = code.partition("# in the loop, instead of ")
    place = re.match(r"\S+, (?:from )?line (\d+)(?: on)?:\n", loop)
    assert place is not None, code
    lines = source.splitlines()
    first = int(place[1]) - 1
    body = once[once.index("def loss_of") : once.index("    return ")].splitlines()[1:]
    count = len([line for line in body if not line.endswith((" = batch", ".values()"))])
    indent = lines[first][: len(lines[first]) - len(lines[first].lstrip())]
    new = f"if not _applied:\n{textwrap.indent(once, '    ')}\n    _applied.append(applied)\napplied = _applied[0]\n"
    new += loop[place.end() :]
    return "\n".join(["_applied = []", *lines[:first], textwrap.indent(new, indent), *lines[first + count :], ""])
