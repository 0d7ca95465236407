"""The rooms of ``shmipi.irq``: what an import may name."""

import ast
from pathlib import Path

import shmipi.irq

#: From the records up: a file imports only from what stands before it.
ROOMS = (
    "chips",
    "table",
    "irqdesc",
    "of",
    "irqdomain",
    "ipi",
    "manage",
    "coprocessor",
    "bound",
    "current",
    "__init__",
)
HOUSE = Path(shmipi.irq.__file__).parent


def room_of(path):
    return path.relative_to(HOUSE).parts[0].removesuffix(".py")


def imported(node):
    """The rooms of ``shmipi.irq`` that one import statement names."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        return []
    assert not getattr(node, "level", 0), "imports are absolute here"
    below = [n.split(".")[2] for n in names if n.startswith("shmipi.irq.")]
    return [name if name in ROOMS else "__init__" for name in below]


def test_every_file_has_its_room():
    assert {room_of(path) for path in HOUSE.rglob("*.py")} == set(ROOMS)


def test_imports_point_down_also_those_for_types_and_inside_functions():
    wrong, seen = [], 0
    for path in HOUSE.rglob("*.py"):
        here = room_of(path)
        for node in ast.walk(ast.parse(path.read_text())):
            for there in imported(node):
                seen += 1
                if here == there == "chips":
                    continue
                if ROOMS.index(there) >= ROOMS.index(here):
                    wrong.append(f"{here} imports {there} (line {node.lineno})")
    assert wrong == []
    assert seen > 20


def test_no_import_hides_in_a_function():
    wrong = [
        f"{path.name}: {function.name}"
        for path in HOUSE.rglob("*.py")
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        and any(imported(node) for node in ast.walk(function))
    ]
    assert wrong == []
