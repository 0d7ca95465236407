"""The house: which file may know which, in the C core and in the package.

In the core an arrow goes from a file to another where it includes its header, or where
its object needs a symbol that the other's object has. ``X.c`` and ``X.h`` are one file
here. Rooms are ranked, an arrow that goes up is a fault, and so is a circle of files.
"""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "shmipi" / "_core"
OBJECTS = ROOT / "build" / "house"

FLAGS = [
    *("-std=gnu11", "-O0", "-w", "-fvisibility=hidden", "-pthread"),
    *(f"-I{CORE}", f"-I{sysconfig.get_paths()['include']}"),
]

# base < irq < smp < users < {measure, py}; the binding has classes over what measures.
BELOW = {
    "base": {"base"},
    "irq": {"base", "irq"},
    "smp": {"base", "irq", "smp"},
    "users": {"base", "irq", "smp", "users"},
    "measure": {"base", "irq", "smp", "users", "measure"},
    "py": {"base", "irq", "smp", "users", "measure", "py"},
}

# What is not yet as it should be. These lists only ever get shorter.
KNOWN_UP: set[tuple[str, str]] = set()
KNOWN_CIRCLES: list[set[str]] = []

# The package, from the top down: a room may import its own and those after it.
ROOMS = [
    {"__main__"},
    {"cli"},
    {"bench", "stress", "report", "testing"},
    {"cluster", "task"},
    {"users"},
    {"smp", "irq", "trace", "atomic"},
    {"machine"},
    {"cpumask", "errors", "names", "_lazy", "_version", "__init__"},
    {"_core"},
]
KNOWN_IMPORTS_UP: set[tuple[str, str]] = set()
KNOWN_IMPORT_CIRCLES: list[set[str]] = []

Graph = dict[str, set[str]]


def circles(graph: Graph) -> list[set[str]]:
    """The strongly connected components of more than one node (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            circle = set()
            while node not in circle:
                circle.add(stack.pop())
            if len(circle) > 1:
                found.append(circle)

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def compare(found: list[set[str]], known: list[set[str]]) -> None:
    new = [sorted(circle) for circle in found if not any(circle <= k for k in known)]
    assert not new, "a circle of files: what they share belongs into one below them"
    gone = [sorted(k) for k in known if not any(circle <= k for circle in found)]
    assert not gone, "no circle any more: take it out of the list of known ones"


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a", "e"}}
    assert circles(graph) == [{"b", "c"}]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == [{"a", "b", "c"}]


# ---- the core ------------------------------------------------------------------------


def unit(path: Path) -> str:
    return str(path.relative_to(CORE).with_suffix(""))


def sources(pattern: str) -> list[Path]:
    return sorted(CORE.glob(f"*/{pattern}"))


def included(path: Path) -> Iterator[Path]:
    for name in re.findall(r'^#include "(.+)"$', path.read_text(), re.MULTILINE):
        header = CORE / name
        assert header.exists(), f"{unit(path)}: include {name!r} does not name a room"
        yield header


def includes() -> Graph:
    graph: Graph = {}
    for path in sources("*.[ch]"):
        graph.setdefault(unit(path), set()).update(map(unit, included(path)))
    return graph


def native_script() -> ModuleType:
    """scripts/native: it knows the compiler and its flags."""
    path = str(ROOT / "scripts" / "native")
    loader = importlib.machinery.SourceFileLoader("native_script", path)
    spec = importlib.util.spec_from_loader("native_script", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def compiled(path: Path, compiler: list[str], newest: float) -> Path:
    """Its object, without optimisation: calls that are inlined are arrows too."""
    target = OBJECTS / path.relative_to(CORE).with_suffix(".o")
    if target.exists() and target.stat().st_mtime > max(newest, path.stat().st_mtime):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_suffix(f".{os.getpid()}.o")
    first = ["-include", str(OBJECTS / "first.h")] if path.parent.name == "py" else []
    command = [*compiler, *FLAGS, *first, "-c", str(path), "-o", str(scratch)]
    subprocess.run(command, check=True)
    scratch.rename(target)  # others may do the same at this moment
    return target


def precompiled(compiler: list[str]) -> None:
    """Python's headers, which are most of what a file of the binding is compiled of.

    A compiler that makes no use of it reads them itself.
    """
    OBJECTS.mkdir(parents=True, exist_ok=True)
    header = OBJECTS / "first.h"
    scratch = OBJECTS / f"first.{os.getpid()}.gch"
    text = '#include "base/sys.h"\n#define PY_SSIZE_T_CLEAN\n#include <Python.h>\n'
    if header.exists() and header.read_text() == text:
        return
    header.write_text(text)
    command = [*compiler, *FLAGS, "-x", "c-header", str(header), "-o", str(scratch)]
    if subprocess.run(command, check=False).returncode == 0:
        scratch.rename(OBJECTS / "first.h.gch")


def symbols(path: Path) -> tuple[set[str], set[str]]:
    """What an object has, and what it needs."""
    output = subprocess.run(
        ["nm", "-P", "-g", str(path)], check=True, capture_output=True, text=True
    ).stdout
    has, needs = set(), set()
    for line in output.splitlines():
        name, kind, *_ = line.split()
        (needs if kind in "Uwv" else has).add(name)
    return has, needs


Tables = dict[str, tuple[set[str], set[str]]]


@pytest.fixture(scope="module")
def tables() -> Tables:
    """What each file's object has, and what it needs."""
    compiler = native_script().compiler()
    if compiler is None or shutil.which("nm") is None:
        pytest.skip("symbols of objects: needs a C compiler and nm (binutils)")
    newest = max(path.stat().st_mtime for path in sources("*.h"))
    precompiled(compiler)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(
            pool.map(lambda path: compiled(path, compiler, newest), sources("*.c"))
        )
    return {unit(p): symbols(o) for p, o in zip(sources("*.c"), objects, strict=True)}


@pytest.fixture(scope="module")
def arrows(tables: Tables) -> Graph:
    """All arrows between files of the core: by includes, and by symbols."""
    graph = includes()
    home = {name: where for where, (has, _) in tables.items() for name in has}
    assert {"shi_queue_push", "PyInit__core"} <= home.keys()
    for where, (_, needs) in tables.items():
        graph[where].update(home[name] for name in needs if name in home)
    return graph


def room(name: str) -> str:
    return name.partition("/")[0]


def arrows_up(graph: Graph) -> set[tuple[str, str]]:
    return {
        (of, to)
        for of, known in graph.items()
        for to in known
        if room(to) not in BELOW[room(of)]
    }


def test_rooms_are_those_of_the_core() -> None:
    assert {room(unit(path)) for path in sources("*.[ch]")} == BELOW.keys()


def test_includes_point_down() -> None:
    """Also where nothing can be compiled."""
    assert arrows_up(includes()) <= KNOWN_UP


@pytest.mark.long  # it compiles the core
def test_no_arrow_of_the_core_goes_up(arrows: Graph) -> None:
    found = arrows_up(arrows)
    assert not found - KNOWN_UP, "a file needs one of a room above it"
    assert not KNOWN_UP - found, "it does not any more: take it out of KNOWN_UP"


def test_no_circle_of_files_in_the_core(arrows: Graph) -> None:
    compare(circles(arrows), KNOWN_CIRCLES)


@pytest.mark.parametrize(
    ("name", "users"),
    {
        # One way to post: users, benches and native tests take it. A csd of one's own
        # (CallSingleData, a task of several) is filled before, and queued like theirs.
        "shi_queue_push": {"smp/smp"},
        "shi_call_post": {
            *("measure/bench", "measure/replay"),
            *("py/outgoing", "users/rcu", "users/tick"),
        },
        "shi_call_many": {"measure/bench", "measure/replay", "py/many", "users/each"},
        "shi_call_single": {"py/csd", "py/post", "smp/stop", "users/csds"},
        # One loop over the wait.
        "shi_wait_spin": {"smp/smp"},
        "shi_wait_sleep": {"smp/smp"},
    }.items(),
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_there_is_one_way(tables: Tables, name: str, users: set[str]) -> None:
    assert any(name in has for has, _ in tables.values())
    assert {where for where, (_, needs) in tables.items() if name in needs} == users


# ---- the package ---------------------------------------------------------------------

PACKAGE = ROOT / "shmipi"
MODULES = {
    ".".join(("shmipi", *path.relative_to(PACKAGE).with_suffix("").parts))
    .removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}  # fmt: skip


def type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(tree: ast.AST, late: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements; `late`: also those inside functions, for when they run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            if late:
                yield from imports(node, late)
        elif type_checking(node):
            continue
        else:
            yield from imports(node, late)


def named(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """The modules of the package that an import statement names."""
    if isinstance(node, ast.Import):
        names: Iterable[str] = (alias.name for alias in node.names)
    else:
        assert not node.level, "imports are absolute here"
        assert node.module
        whole = (f"{node.module}.{alias.name}" for alias in node.names)
        names = [
            n if n in MODULES or n == "shmipi._core" else node.module for n in whole
        ]
    for name in names:
        if name.split(".")[0] == "shmipi":
            yield name


def import_graph(late: bool) -> Graph:
    graph: Graph = {}
    for name, path in MODULES.items():
        known = {
            other
            for node in imports(ast.parse(path.read_text()), late)
            for other in named(node)
        }
        # To import a module runs the packages that it is in, but for those we are in.
        known |= {
            ".".join(parts[:n])
            for parts in [other.split(".") for other in known]
            for n in range(2, len(parts))
            if not f"{name}.".startswith(".".join(parts[:n]) + ".")
        }
        graph[name] = known - {name}
    return graph


def rank(name: str) -> int:
    part = [*name.split("."), "__init__"][1]
    (level,) = [level for level, names in enumerate(ROOMS) if part in names]
    return level


def test_every_module_has_a_room() -> None:
    assert all(rank(name) >= 0 for name in [*MODULES, "shmipi._core"])


def test_no_import_goes_up() -> None:
    graph = import_graph(late=True)
    found = {(a, b) for a, known in graph.items() for b in known if rank(b) < rank(a)}
    assert not found - KNOWN_IMPORTS_UP, "a module imports one of a room above it"
    assert not KNOWN_IMPORTS_UP - found, "it does not any more: take it out of the list"


def test_no_circle_when_modules_are_imported() -> None:
    compare(circles(import_graph(late=False)), [])


def test_no_circle_of_modules() -> None:
    """Also by imports inside functions: those only put a circle off."""
    compare(circles(import_graph(late=True)), KNOWN_IMPORT_CIRCLES)


def test_imports_inside_functions_are_found() -> None:
    tree = ast.parse(
        "import a\nif TYPE_CHECKING:\n import b\ndef f():\n from c import d\n"
        "class C:\n import e\n"
    )
    found = [ast.unparse(node) for node in imports(tree, late=True)]
    assert found == ["import a", "from c import d", "import e"]
    found = [ast.unparse(node) for node in imports(tree, late=False)]
    assert found == ["import a", "import e"]
