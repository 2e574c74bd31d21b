"""The names that a script's lines read and give values to, and the code that is made of them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tightfit.explanation.code import Script, fit_code
from tightfit.explanation.site import Site, loss_source, names_read_first


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("output, hidden = model(source, hidden)", ["model", "source", "hidden"]),
        ("out = model(x)\nloss = f(out)", ["model", "x", "f"]),
        ("total += loss", ["total", "loss"]),
        ("for x in rows:\n    h = cell(x, h)\n    t = h\n    u = t", ["rows", "cell", "h"]),
        ("loss = sum(one for one in model(x) if one)", ["sum", "model", "x"]),
        ("parts = {k: v for k, v in d.items() if k not in bad}", ["d", "bad"]),
        ("f = lambda q, r=z: q + r + w", ["z", "w"]),
        ("with autocast('cpu') as a:\n    y = model(x)\n    loss = f(y, a)", ["autocast", "model", "x", "f"]),
        ("if (n := len(x)) > 2:\n    y = n", ["len", "x"]),
        ("y: Tensor = y.view(-1)", ["y"]),
    ],
)
def test_names_that_are_read_before_they_have_a_value(code: str, names: list[str]) -> None:
    assert names_read_first(ast.parse(code).body) == names


def loop_of(script: Script) -> str:
    code = fit_code(script, 2**20)
    ast.parse(code)
    return code.partition("# in the loop, instead of ")[2].partition("\n")[2]


def test_lines_whose_results_the_script_reads_on_stay_the_loop_s_own() -> None:
    script = Script(
        batch="(source, hidden)",
        loss_lines=("output, hidden = model(source, hidden)", "loss = f(output)"),
        used_elsewhere=("hidden",),
        let_go=("output",),
    )
    use = loop_of(script).splitlines()
    assert use[:3] == [
        "with applied.step((source, hidden)):",
        "    output, hidden = model(source, hidden)",
        "    loss = f(output)",
    ]
    assert use[3].startswith("    del output  #")
    assert use[4].startswith("# hidden: read after the loss")


@pytest.mark.parametrize(
    ("result", "used", "use"),
    [
        ("loss", (), "loss = applied.loss(model, batch)"),
        ("f(out)", (), "return applied.loss(model, batch)"),
        ("f(out)", ("out",), "with applied.step(batch):\n    out = model(batch)\n    return f(out)"),
    ],
)
def test_what_a_function_returns_is_returned(result: str, used: tuple[str, ...], use: str) -> None:
    script = Script(loss_lines=("out = model(batch)",), loss_result=result, used_elsewhere=used)
    assert loop_of(script).partition("\n#")[0] == use


def test_variables_of_other_functions_are_not_the_loop_s(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "def forward(x):\n    output = f(x)\n    return output\n\n\n"
        "def show():\n    print(state)\n\n\n"
        "for x in rows:\n    output, state, again = model(x, again)\n    loss = f(output)\n    loss.backward()\n"
    )
    call = Site(file=str(script), line=11, function=0, names={}, tensors={}, host="")
    found = loss_source(call, None)
    assert found is not None
    assert found.used_elsewhere == ("state", "again")
    assert found.names_let_go() == ("output",)
    assert found.names_read() == ["model", "x", "again", "f"]
