"""What the documents show type-checks against the installed package, as in an editor or a user's own checks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.test_readme import DOCS, README, blocks

#: What the README takes as given.
GIVEN = """\
from collections.abc import Iterable
import torch
model: torch.nn.Module
batch: tuple[torch.Tensor, torch.Tensor]
batches: Iterable[tuple[torch.Tensor, torch.Tensor]]
optimizer: torch.optim.Optimizer
def loss_fn(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return torch.nn.functional.mse_loss(model(batch[0]), batch[1])
"""
PAGES = [README, *(page for page in DOCS if blocks(page, "python"))]


#: Each of these mistakes is to be noticed: the annotations are not all Any.
WRONG = """\
import tightfit
applied = tightfit.fit(model, batch, budget=8.5, loss=loss_fn)
tightfit.solve(applied.plan, budget_bytes=2**20)
applied.verdict.ok
"""
#: Other packages' annotations are not in question, and to read PyTorch's takes half a minute.
SETTINGS = """\
[mypy]
strict = True
disallow_subclassing_any = False
follow_imports = skip
[mypy-tightfit.*]
follow_imports = silent
[mypy-own_loop]
allow_untyped_defs = True
allow_untyped_calls = True
"""


def test_the_python_of_the_documents_type_checks(tmp_path: Path) -> None:
    for page in PAGES:
        code = "\n".join([GIVEN if page == README else "", *blocks(page, "python")])
        (tmp_path / f"{page.stem.lower().replace('-', '_')}.py").write_text(code, encoding="utf-8")
    (tmp_path / "wrong.py").write_text(GIVEN + WRONG, encoding="utf-8")
    (tmp_path / "mypy.ini").write_text(SETTINGS, encoding="utf-8")
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", "--no-incremental", "."],
        cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, "MYPYPATH": ""},
    )  # fmt: skip
    problems = found.stdout.splitlines()
    own = [line for line in problems if not line.startswith("wrong.py")]
    assert own == [], found.stderr
    for number, said in enumerate(['"budget"', '"solve"', "union-attr"], start=2 + len(GIVEN.splitlines())):
        assert any(line.startswith(f"wrong.py:{number}: error") and said in line for line in problems), problems
