"""The floors of the house (DESIGN's law): who may import whom, read from the sources' imports."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src" / "litseek"
KERNELS = ROOT / "kernels" / "litseek_kernels"

FLOORS = {
    "kernels": 0,
    **dict.fromkeys(("losses", "optim", "data", "precision"), 1),
    "models": 2,
    "inference": 3,
    **dict.fromkeys(("parallel", "serving", "rl", "evals", "callbacks"), 4),
    "stages": 5,
    "cli": 6,
}
TOP_FILES = {"__init__": 0, "errors": 0, "copies": 0, "deferral": 0, "__main__": 6}
"""Files that lie in no folder of their own."""
FRAMEWORKS = ("lightning", "hydra", "omegaconf", "wandb", "torch.distributed")
"""What floors 0-2 do without, so that they can be read and used without a framework."""


def imports(tree: ast.AST, package: str) -> set[str]:
    """Every module a file names: imports at any depth, relative ones resolved, and uses as ``torch.distributed.x``."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            found.add("torch.distributed")
    return found


def folder_of(module: str) -> str | None:
    """The folder a litseek module belongs to; None for other libraries and for what floor 0 offers to everyone."""
    if module.split(".")[0] == "litseek_kernels":
        return "kernels"
    if module.split(".")[0] != "litseek":
        return None
    name = module.partition(".")[2].partition(".")[0]
    if name in FLOORS:
        return name
    if name == "__main__":
        return "cli"
    return None


def violations(path: Path, own: str, floor: int, package: str, text: str | None = None) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8") if text is None else text)
    bad = []
    for name in sorted(imports(tree, package)):
        folder = folder_of(name)
        if folder is not None and folder != own and FLOORS[folder] >= floor:
            bad.append(f"{path}: floor {floor} ({own}) imports {name} of floor {FLOORS[folder]}")
        if floor <= 2 and any(name == f or name.startswith(f + ".") for f in FRAMEWORKS):
            bad.append(f"{path}: floor {floor} imports {name}")
        if floor < 6 and name.split(".")[0] in ("hydra", "omegaconf"):
            bad.append(f"{path}: imports {name}, but only cli sees a DictConfig")
        if own == "kernels":
            top = name.split(".")[0]
            if top not in ("torch", "triton", "litseek_kernels") and top not in sys.stdlib_module_names:
                bad.append(f"{path}: kernels import torch and triton only, found {name}")
    return bad


def sources() -> list[tuple[Path, str, int, str]]:
    """(file, folder, floor, package) of every source file."""
    rows = []
    for path in sorted(SRC.rglob("*.py")):
        parts = path.relative_to(SRC).parts
        if len(parts) == 1:
            assert path.stem in TOP_FILES, f"{path} lies on no floor: put it into a folder"
            rows.append((path, "cli" if path.stem == "__main__" else path.stem, TOP_FILES[path.stem], "litseek"))
        else:
            assert parts[0] in FLOORS, f"folder {parts[0]} has no floor: add it to FLOORS and to the file tour"
            rows.append((path, parts[0], FLOORS[parts[0]], ".".join(("litseek", *parts[:-1]))))
    for path in sorted(KERNELS.rglob("*.py")):
        parts = path.relative_to(KERNELS.parent).parts
        rows.append((path, "kernels", 0, ".".join(parts[:-1])))
    return rows


def test_imports_go_down_the_floors():
    bad = [line for row in sources() for line in violations(*row)]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    ("folder", "text", "hits"),
    [
        ("models", "import lightning as L", 1),
        ("models", "from litseek.stages import base", 2),
        ("models", "from ..inference import cache", 2),
        ("data", "from litseek.losses import grpo", 2),
        ("data", "import torch\ntorch.distributed.get_rank()", 1),
        ("rl", "from omegaconf import DictConfig", 2),
        ("stages", "from litseek.errors import LitseekError\nfrom litseek.models import config\nimport lightning", 0),
        ("models", "from . import mla\nfrom litseek_kernels import ref", 0),
        ("kernels", "import numpy", 1),
    ],
)
def test_the_check_sees_a_violation(folder: str, text: str, hits: int):
    package = "litseek_kernels" if folder == "kernels" else f"litseek.{folder}"
    assert len(violations(Path("x.py"), folder, FLOORS[folder], package, text)) == hits


def test_kernels_is_no_package():
    """``kernels/__init__.py`` would shadow another package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
