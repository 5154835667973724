"""Law on files: length, names, and nothing in them that belongs to one machine."""

from __future__ import annotations

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 450
"""Lines a source file may have; about 300 is the aim."""
TEXT = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".html", ".css", ".js", ".svg", ".csv", ".json", ".jsonl", ""}
SKIPPED = {".git", ".venv", "runs", "dist", "build", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"}

HOMES = "work|root|home|tmp|Users|mnt"
INDEXES = "index[-_]url|trusted[-_]host|find-links|artifactory|[.]internal[.]"
MACHINE = {
    "a path of one machine": rf"(?<![\w.])/({HOMES})/[\w.]",
    "a registry or package index": INDEXES,
    "a private address": r"(?<![=\w.])(10|192\.168|172\.(1[6-9]|2\d|3[01]))(\.\d{1,3}){2,3}\b",
}


@cache
def repository_files() -> list[Path]:
    """Tracked files and new ones that git does not ignore; in a source archive without git, every file."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True)
    if found.returncode == 0:
        paths = [ROOT / name for name in found.stdout.decode().split("\0") if name]
    else:
        paths = [p for p in ROOT.rglob("*") if not SKIPPED & set(p.relative_to(ROOT).parts)]
    return sorted(p for p in paths if p.is_file())


def test_files_stay_short():
    long = {
        str(path.relative_to(ROOT)): lines
        for path in repository_files()
        if path.suffix == ".py" and (lines := len(path.read_text(encoding="utf-8").splitlines())) > LIMIT
    }
    assert not long, f"more than {LIMIT} lines: {long}"


def test_no_file_is_called_utils():
    vague = re.compile(r"_*(utils?|helpers?|misc|common)\.py")
    bad = [p for p in repository_files() if vague.fullmatch(p.name)]
    assert not bad, f"name these by what they do: {bad}"


def test_packages_export_only():
    """``__init__.py`` holds a docstring, imports and constants such as ``__all__``; code has a name of its own."""
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
    for path in repository_files():
        if path.name != "__init__.py" or "tests" in path.parts:
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert docstring or isinstance(node, allowed), f"{path}:{node.lineno} is more than an export"


@pytest.mark.parametrize("what", MACHINE)
def test_nothing_of_one_machine(what: str):
    pattern = re.compile(MACHINE[what])
    bad = []
    for path in repository_files():
        if path.suffix not in TEXT or path == Path(__file__).resolve():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if pattern.search(line):
                bad.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert not bad, f"{what}:\n" + "\n".join(bad)


def test_no_build_output_is_tracked():
    bad = [p for p in repository_files() if p.suffix in {".pyc", ".pt", ".ckpt", ".safetensors", ".whl", ".distcp"}]
    assert not bad, f"not for git: {bad}"
