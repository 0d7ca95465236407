"""What has a name in several lists has the same one in each."""

import ast
import builtins
import inspect
import re
from collections import Counter
from pathlib import Path

import pytest

import shmipi
from shmipi import Cluster, _core, _lazy, atomic, errors, irq, names, smp
from shmipi.irq.bound import BoundIrq
from shmipi.irq.chips import CHIPS
from shmipi.smp.bound import BoundSmp

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "shmipi"
README = (ROOT / "README.md").read_text()


def imported_for_types(file: Path) -> dict[str, str]:
    """Return what a module imports under TYPE_CHECKING: name -> where it is from."""
    found = {}
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for line in node.body:
                assert isinstance(line, ast.ImportFrom)
                for name in line.names:
                    found[name.name] = str(line.module)
    return found


def test_the_face_is_the_same_for_readers_of_types_and_at_run_time() -> None:
    typed = imported_for_types(PACKAGE / "__init__.py")
    homes = {name: home for home, of in _lazy._HOMES.items() for name in of}
    modules = dict.fromkeys(_lazy._MODULES, "shmipi")
    assert typed == homes | modules
    assert sorted([*typed, "__version__"]) == sorted(shmipi.__all__)
    assert sum(map(len, _lazy._HOMES.values())) == len(homes), "listed twice"
    for name in shmipi.__all__:
        assert getattr(shmipi, name) is not None


def test_every_error_that_users_meet_is_in_the_face() -> None:
    defined = {
        name
        for name, thing in vars(errors).items()
        if isinstance(thing, type)
        and issubclass(thing, BaseException)
        and thing.__module__ == errors.__name__
    }
    # The base of those with an errno, and what the command line says of itself.
    assert defined - set(shmipi.__all__) == {"ShmipiOSError", "CommandError"}


def test_the_core_raises_errors_that_exist() -> None:
    wanted = re.findall(
        r"\{ &shi_py\.\w+, errors, \"(\w+)\" \}",
        (PACKAGE / "_core" / "py" / "base.c").read_text(),
    )
    assert len(wanted) > 10
    assert set(wanted) <= set(vars(errors))


def test_a_clusters_smp_has_what_smp_has() -> None:
    """But what is no function of a machine: types, constants, barriers."""
    text = inspect.getsource(BoundSmp)
    bound = {name for name in vars(BoundSmp) if not name.startswith("_")}
    bound |= set(re.findall(r"self\.([A-Za-z]\w*) = ", text))
    # Variables are not in __all__: `import *` would keep what they were.
    variables = {"cpu_online_mask", "nr_cpu_ids"}
    assert bound - set(smp.__all__) == variables <= set(dir(smp))
    barriers = {"smp_mb", "smp_rmb", "smp_wmb", "smp_load_acquire", "smp_store_release"}
    types = {"BoundSmp", "Completion", "CpuhpState", "NativeHandler", "WaitQueue"}
    elsewhere = {"completion", "wait_queue"}  # of Cluster itself
    nmi = "DONE FLAG_FIRST HANDLED IO_CHECK IPI_ALL_OTHERS LOCAL REASON_IOCHK"
    nmi += " REASON_SERR SERR UNKNOWN"
    constants = {f"NMI_{name}" for name in nmi.split()}
    softirqs = "HI TIMER NET_TX NET_RX BLOCK IRQ_POLL TASKLET SCHED HRTIMER RCU"
    constants |= {f"{name}_SOFTIRQ" for name in softirqs.split()} | {"NR_SOFTIRQS"}
    constants |= {"IRQ_WORK_LAZY", "IRQ_WORK_HARD_IRQ"}
    constants |= {"CPUHP_BP_PREPARE_DYN", "CPUHP_AP_ONLINE_DYN"}
    assert set(smp.__all__) - bound == barriers | types | elsewhere | constants
    assert all(hasattr(Cluster, name) for name in elsewhere)


def test_a_clusters_irq_has_what_irq_has() -> None:
    functions = {n for n in irq.__all__ if inspect.isfunction(getattr(irq, n))}
    functions -= {"chip", "irq", "__ipi_send_mask", "__ipi_send_single"}
    functions -= {"irqd_to_hwirq"}  # of an irq data, which knows its domain
    assert functions <= set(dir(BoundIrq)), functions - set(dir(BoundIrq))


def test_the_atomics_are_the_cores() -> None:
    cores = {n.removeprefix("atomic_") for n in dir(_core) if n.startswith("atomic_")}
    assert set(atomic.__all__) == cores


def test_what_python_says_of_the_core_is_there() -> None:
    """Written ``file.c, function``, as in the tables of the kernel's functions."""
    told = re.compile(r"\b(\w+\.c), (\w+(?:, \w+)*)$", re.M)
    rows = 0
    for file in PACKAGE.rglob("*.py"):
        for name, functions in told.findall(file.read_text()):
            found = list((PACKAGE / "_core").glob(f"*/{name}"))
            assert found, f"{file.name}: {name}"
            text = "".join(f.read_text() for f in found)
            for function in functions.split(", "):
                rows += 1
                assert re.search(rf"\b{function}\(", text), f"{file.name}: {function}"
    assert rows > 5


def test_what_a_header_declares_another_file_uses() -> None:
    """A function of one file alone is static there."""
    files = {
        file: re.sub(r"/\*.*?\*/", "", file.read_text(), flags=re.S)
        for folder in (PACKAGE / "_core", ROOT / "tests" / "native")
        for file in folder.rglob("*.[ch]")
    }
    words = {file: Counter(re.findall(r"\w+", text)) for file, text in files.items()}
    declared = [
        (header, name)
        for header, text in files.items()
        if header.suffix == ".h"
        for name in re.findall(
            r"^(?!static|#|typedef)[\w *]+?\b(shi_\w+)\s*\(", text, re.M
        )
    ]
    assert len(declared) > 100
    alone = [
        f"{header.parent.name}/{header.name}: {name}"
        for header, name in declared
        # Beside its own: a file, or an inline function or macro of the header.
        if words[header][name] == 1
        and sum(name in found for file, found in words.items() if file != header) < 2
    ]
    assert not alone
    total = sum(words.values(), Counter())
    macros = {
        name
        for header, text in files.items()
        if header.suffix == ".h"
        for name in re.findall(r"^#define (\w+)", text, re.M)
    }
    assert {name for name in macros if total[name] == 1} <= {"PY_SSIZE_T_CLEAN"}


def sources() -> str:
    files = [f for f in PACKAGE.rglob("*.py")] + list((ROOT / "tests").rglob("*.py"))
    return "".join(f.read_text() for f in files if f != Path(__file__))


def stub_names() -> list[tuple[str, str]]:
    """Return every public name of the core and of its types: (where, name)."""
    found = []
    for node in ast.parse((PACKAGE / "_core.pyi").read_text()).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.append(("_core", node.target.id))
        elif isinstance(node, ast.FunctionDef):
            found.append(("_core", node.name))
        elif isinstance(node, ast.ClassDef):
            found.append(("_core", node.name))
            found += [
                (node.name, n.name) for n in node.body if isinstance(n, ast.FunctionDef)
            ]
    return [(where, name) for where, name in found if not name.startswith("_")]


def test_every_name_of_the_core_is_used() -> None:
    """What the core offers and nobody asks for is dead, or a name that was changed."""
    used = set(re.findall(r"\w+", sources()))
    # Beside HANDLER and NO_CPU, which are looked at: what a CPU is otherwise.
    unused = {name for _, name in stub_names() if name not in used} - {"CPU_TASK"}
    assert unused == set()


# ---- the README ----------------------------------------------------------------------


def table(header: str) -> list[str]:
    """Return the first cells of the README's table that begins so, without quotes."""
    rows = rf"^\| {re.escape(header)} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)"
    (text,) = re.findall(rows, README, re.M)
    return re.findall(r"^\| `([^`]+)`", text, re.M)


def test_controllers() -> None:
    assert table("controller") == list(names.CONTROLLERS)
    assert sorted(CHIPS) == sorted(names.CONTROLLERS)


def test_idle_policies() -> None:
    assert sorted(table("idle")) == sorted(names.IDLE_POLICIES)


def test_benches() -> None:
    (row,) = re.findall(r"^\| `shmipi bench KIND` \| measures (.*) \|$", README, re.M)
    assert re.findall(r"`(\w+)`", row) == list(names.BENCHES)


HOLDERS = {
    "shmipi": shmipi,
    "smp": smp,
    "irq": irq,
    "atomic": atomic,
    "cluster": Cluster,
    "cluster.irq": BoundIrq,
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_names_that_the_readme_uses_exist(holder: str) -> None:
    used = set(re.findall(rf"(?<![\w./]){re.escape(holder)}\.([A-Za-z_]\w*)", README))
    used -= {"toml", "py", "so"}
    assert used, holder
    thing = HOLDERS[holder]
    known = set(dir(thing)) | set(getattr(thing, "__annotations__", ()))
    if thing is Cluster:
        known |= set(
            re.findall(r"self\.([a-z]\w*)\b[^=\n]* = ", inspect.getsource(Cluster))
        )
    assert used <= known, used - known


def test_files_that_the_readme_names_exist() -> None:
    named = set(re.findall(r"`((?:shmipi|scripts|tests)/[\w./-]+)`", README))
    assert len(named) > 2
    assert not [name for name in named if not (ROOT / name).exists()]


def test_errors_that_the_readme_names_exist() -> None:
    named = set(re.findall(r"\b([A-Z]\w+(?:Error|Warning))\b", README))
    assert len(named) > 5
    known = {*shmipi.__all__, *vars(builtins), "SignalError"}  # that one is posix_ipc's
    assert named <= known, named - known
