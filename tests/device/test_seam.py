"""Nothing outside `tightfit.device` asks what kind a device is: a further kind is one file and one line there."""

from __future__ import annotations

import ast
from pathlib import Path

import tightfit
from tightfit.device.registry import KINDS

PACKAGE = Path(tightfit.__file__).parent

#: What only devices of one kind have.
KIND_MODULES = (
    "torch.accelerator",
    "torch.backends.cuda",
    "torch.backends.cudnn",
    "torch.backends.mps",
    "torch.cuda",
    "torch.mps",
    "torch.mtia",
    "torch.xpu",
)
KIND_ATTRIBUTES = ("is_cpu", "is_cuda", "is_ipu", "is_meta", "is_mps", "is_mtia", "is_vulkan", "is_xla", "is_xpu")

#: Outside the folder, with the reason.
EXCEPTIONS: dict[str, str] = {
    "_torch_private/described.py": "what asks whether CUDA is here is told that it is, for a GPU that is described",
}


def questions_of_kind(tree: ast.AST) -> list[str]:
    """Places that ask for a device's kind, or use what only one kind has."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            is_type = node.attr == "type" and "device" in ast.unparse(node.value)
            is_asked = is_type or node.attr in KIND_ATTRIBUTES or ast.unparse(node) in KIND_MODULES
        elif isinstance(node, ast.Import):
            is_asked = any(alias.name.startswith(KIND_MODULES) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            is_asked = any(name.startswith(KIND_MODULES) for name in names)
        elif isinstance(node, ast.Compare | ast.MatchValue):
            sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else [node.value]
            parts = [part for side in sides for part in (side.elts if isinstance(side, ast.Tuple) else [side])]
            is_asked = any(isinstance(part, ast.Constant) and _names_kind(part.value) for part in parts)
        else:
            continue
        if is_asked:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def _names_kind(constant: object) -> bool:
    return str(constant).partition(":")[0] in [kind.kind for kind in KINDS]


def test_only_the_device_folder_asks_what_kind_a_device_is() -> None:
    offenders = [
        f"{name}: {question}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if not (name := path.relative_to(PACKAGE).as_posix()).startswith("device/") and name not in EXCEPTIONS
        for question in questions_of_kind(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert offenders == []


def test_the_exceptions_are_needed() -> None:
    for name in EXCEPTIONS:
        assert questions_of_kind(ast.parse((PACKAGE / name).read_text(encoding="utf-8")))


def test_questions_are_seen() -> None:
    code = """
import torch.cuda
from torch import cuda
torch.autocast(tensor.device.type)
if x in ("auto", "cuda:1"):
    torch.cuda.synchronize(t.is_cuda)
match kind:
    case "cpu":
        torch.backends.cudnn.benchmark = False
node.type == "call"; tensor.to("cpu"); torch.device("cuda", 1)
"""
    assert sorted({int(found.split()[1].rstrip(":")) for found in questions_of_kind(ast.parse(code))}) == [
        2, 3, 4, 5, 6, 8, 9
    ]  # fmt: skip
