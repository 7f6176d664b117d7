"""The order of the house (docs and DESIGN section 2): a file imports only from lower floors or its own folder."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "lowbit"
FLOORS = {
    "errors": 0, "scheme": 0, "tensor": 0, "stats": 0, "recipe": 0, "progress": 0, "native": 0,
    "numerics": 1,
    "kernels": 2,
    "algorithms": 3, "checkpoints": 3,
    "models": 4,
    "transforms": 5, "evaluation": 5,
    "pipeline": 6,
    "hf": 7, "report": 7, "training": 7, "export": 7, "runtime": 7,
    "cli": 8,
}  # fmt: skip
TOP = ("__init__", "__main__")
FILES = sorted(ROOT.rglob("*.py"))


def place(file: Path) -> str:
    """The folder (or floor-0 file) directly inside lowbit/ that a file belongs to."""
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(file: Path) -> set[str]:
    """What a file imports of lowbit: names directly inside the package."""
    found: set[str] = set()
    package = ("lowbit", *file.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lowbit.")}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            target = (*base, *(node.module or "").split(".")) if node.module else base
            if target and target[0] == "lowbit":
                found |= {target[1]} if len(target) > 1 else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_downwards(file):
    here = place(file)
    if here in TOP:
        return
    assert here in FLOORS, f"{here} has no floor: put it into the table above, and into DESIGN section 2"
    for name in imported(file) - {"__version__"}:
        assert name in FLOORS, f"imports lowbit.{name}, which has no floor"
        assert name == here or FLOORS[name] < FLOORS[here] or FLOORS[here] == FLOORS[name] == 0, f"floor {FLOORS[here]} imports lowbit.{name} of floor {FLOORS[name]}"


def test_the_reader_of_imports_sees_all_kinds():
    assert imported(ROOT / "algorithms" / "rtn.py") >= {"numerics", "errors", "scheme", "stats", "tensor"}
    assert "checkpoints" in imported(ROOT / "models" / "skeleton.py")
    assert len(FILES) > 30
