"""What the tests share: machines that are always ended, and a look for what is left.

Every test is followed by a look for processes and shared objects that it made and did
not end: one that leaks fails, whatever it was about.
"""

import atexit
import compileall
import contextlib
import functools
import gc
import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

import shmipi
from shmipi.machine.segment import full_name
from shmipi.names import DOORBELLS

#: In the environment of everything the tests start: also finds what was orphaned.
_TOKEN = f"SHMIPI_TEST_RUN={secrets.token_hex(8)}"
os.environ.update([_TOKEN.split("=")])  # type: ignore[list-item]

_SHM = Path("/dev/shm")
_QUEUES = Path("/dev/mqueue")
_LEAK_WAIT_S = 2.0
#: Machines that several tests use, from their boot to their end.
_SHARED: list[Any] = []
#: Where this shmipi is: for hosts in processes of their own.
PACKAGE_HOME = str(Path(shmipi.__file__).resolve().parents[1])
#: The names of all machines that the tests made, hosts in other processes included.
_NAMES = Path(tempfile.mkstemp(prefix="shmipi-tests-")[1])
atexit.register(_NAMES.unlink, missing_ok=True)
#: Tells a program that hangs to print where its threads stand; no test uses it.
_STACKS = signal.SIGPWR

_PRELUDE = f"""\
import faulthandler as _faulthandler
import sys as _sys
_faulthandler.register({int(_STACKS)}, _sys.__stderr__, all_threads=True)
import os as _os
from shmipi.machine import segment as _segment

def _create(name, create=_segment.create):
    fd = _os.open({str(_NAMES)!r}, _os.O_WRONLY | _os.O_APPEND)
    _os.write(fd, name.encode() + b"\\n")
    _os.close(fd)
    return create(name)

_segment.create = _create
"""
exec(_PRELUDE, {})

# Of a thousand interpreters, too: OpenBLAS has a thread for each core, that spins for a
# while before it sleeps, which is as much work as the rest of a start.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# The tests start a thousand interpreters. Where these may not write bytecode
# ($PYTHONDONTWRITEBYTECODE), each of them would compile the whole package anew.
compileall.compile_dir(Path(shmipi.__file__).parent, quiet=2)

# What nohup(1) and a shell's `&` ignore would be ignored by all that the tests start,
# of which some must end by just these signals.
for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) == signal.SIG_IGN:
        _default = _number == signal.SIGINT
        signal.signal(
            _number, signal.default_int_handler if _default else signal.SIG_DFL
        )


def _beside(name: str) -> Any:
    """The module of this name in this folder, which is no package."""
    path = Path(__file__).with_name(f"{name}.py")
    spec: Any = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_pulse = _beside("pulse")

# ---- what of it runs -----------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --doorbells."""
    parser.addoption(
        "--doorbells",
        metavar="NAMES",
        help="of tests for each doorbell only those, for example: futex,signal",
    )


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Leave out the other doorbells; mark what may be run once more."""
    if config.pluginmanager.has_plugin("rerunfailures"):
        for item in items:
            item.add_marker(pytest.mark.flaky(reruns=1, condition=_no_fault_of_its_own))
    if config.getoption("doorbells") is None:
        return
    unknown = set(wanted := config.getoption("doorbells").split(",")) - set(DOORBELLS)
    if unknown:
        raise pytest.UsageError(f"--doorbells: {sorted(unknown)}: no such doorbell")
    others = set(DOORBELLS) - set(wanted)

    def of_another(item: pytest.Item) -> bool:
        spec = getattr(item, "callspec", None)
        return spec is not None and spec.params.get("doorbell") in others

    left_out = [item for item in items if of_another(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not of_another(item)]


# ---- several processes that share a run ----------------------------------------------

#: When the test that runs began.
_begun = 0.0


def _no_fault_of_its_own() -> bool:
    """Is it that the computer stood still while the test that failed ran?"""
    return _pulse.stood_still(_begun, time.monotonic()) > 0


def _watch_the_computer(config: pytest.Config) -> None:
    """Start tests/pulse.py, which ends with this process, however that ends."""
    handle, os.environ[_pulse.BOOK] = tempfile.mkstemp(prefix="shmipi-tests-pulse-")
    os.close(handle)
    token = _TOKEN.partition("=")[0]  # it is no test's, and not left behind by one
    process = subprocess.Popen(
        [sys.executable, "-S", _pulse.__file__, os.environ[_pulse.BOOK]],
        stdin=subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name != token},
    )
    # Which removes the file.
    config.add_cleanup(functools.partial(process.communicate, timeout=10))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say it: then what was measured meanwhile is not to be trusted either."""
    if lost := _pulse.stood_still(0.0, time.monotonic()):
        terminalreporter.write_line(
            f"The computer stood still for {lost:.1f} s, added up over its cores: tests"
            " that failed meanwhile were run once more."
        )


#: The file in which a worker says which tests have which of these marks: who deals the
#: tests out collects none itself.
_MARKED = "SHMIPI_TESTS_MARKED"
_MARKS = ("alone", "long")


def pytest_configure(config: pytest.Config) -> None:
    """Make these files, in the process that deals out."""
    if hasattr(config, "workerinput"):
        return
    _watch_the_computer(config)
    if config.getoption("dist", "no") != "no":
        handle, os.environ[_MARKED] = tempfile.mkstemp(prefix="shmipi-tests-marked-")
        os.close(handle)
        atexit.register(Path(os.environ[_MARKED]).unlink, missing_ok=True)


@pytest.hookimpl(tryfirst=True)  # before xdist tells that it has ended
def pytest_collection_finish(session: pytest.Session) -> None:
    """Write it, in one of the workers: all collect the same."""
    if os.environ.get("PYTEST_XDIST_WORKER") == "gw0":
        marked = {
            mark: [i.nodeid for i in session.items if i.get_closest_marker(mark)]
            for mark in _MARKS
        }
        Path(os.environ[_MARKED]).write_text(json.dumps(marked))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deal out as tests/schedule.py does, unless another way was asked for."""
    if config.getoption("dist") != "loadscope":
        return None
    marked = Path(os.environ[_MARKED])
    return _beside("schedule").Schedule(
        config, log, lambda: json.loads(marked.read_text())
    )


# ---- what a failure looked like ------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[Any]:
    """Say of a test that failed what all that the tests started was at just then.

    Whether something waits, for what, or is kept from a core cannot be seen later.
    """
    report = yield
    if report.failed:
        seen = [_computer()]
        for pid in [os.getpid(), *sorted(_processes(set()))]:
            seen.append(f"{pid} {_describe(pid)}")
            seen += [f"  {line}" for line in _threads(pid)]
        title = f"What ran at the end of its {report.when}"
        report.sections.append((title, "\n".join(seen)))
    return report


def _computer() -> str:
    """How busy it is; HYP: waits for pages that its own host had to fetch."""
    said = [f"load {Path('/proc/loadavg').read_text().strip()}"]
    for what in ("cpu", "io", "memory"):
        with contextlib.suppress(OSError):
            some = Path(f"/proc/pressure/{what}").read_text().partition("\n")[0]
            said.append(f"{what}: {some}")
    for line in Path("/proc/interrupts").read_text().splitlines():
        if line.lstrip().startswith("HYP:"):
            said.append(" ".join(line.split()[: 1 + (os.cpu_count() or 1)]))
    return "; ".join(said)


def _threads(pid: int) -> list[str]:
    """Where each thread of a process stands, and what it had of the cores."""
    said = []
    for thread in sorted(Path(f"/proc/{pid}/task").glob("*")):
        with contextlib.suppress(OSError):
            fields = (thread / "stat").read_text().rpartition(")")[2].split()
            had, waited, _ = (thread / "schedstat").read_text().split()
            # "running", or the call's number and arguments, of a futex what it expects.
            call = " ".join((thread / "syscall").read_text().split()[:5])
            said.append(
                f"{thread.name} ({(thread / 'comm').read_text().strip()}):"
                f" {fields[0]} on core {fields[36]}, {(thread / 'wchan').read_text()},"
                f" call {call},"
                f" ran {int(had) / 1e6:.0f} ms,"
                f" waited for a core {int(waited) / 1e6:.0f} ms"
            )
    return said


# ---- the look for leaks --------------------------------------------------------------


def _pids() -> set[str]:
    return set(filter(str.isdigit, os.listdir("/proc")))


def _processes(before: set[str]) -> set[int]:
    """Pids of live processes that the tests started, whoever their parent is now.

    Only of those that were not there `before`: what all the others have in their
    environment takes time to read, and each test is followed by this.
    """
    token, found = _TOKEN.encode(), set()
    for pid in _pids() - before:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
            if token in file.read():
                found.add(int(pid))
    return found


def _objects() -> set[Path]:
    """Shared objects of machines that the tests made: others may run here as well."""
    names, found = set(_NAMES.read_text().split()), set()
    for folder in (_SHM, _QUEUES):
        with contextlib.suppress(OSError):
            for path in folder.iterdir():
                parts = path.name.removeprefix("sem.").split(".")
                if parts[0] == "shmipi" and len(parts) > 2 and parts[2] in names:
                    found.add(path)
    return found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Take away what a failed test left in cycles: its sockets are not the next one's.

    A ResourceWarning about them is an error of whatever test runs just then.
    """
    global _begun
    _begun = time.monotonic()
    failed = item.session.testsfailed
    result = yield
    if item.session.testsfailed != failed:
        for name in ("last_type", "last_value", "last_traceback", "last_exc"):
            with contextlib.suppress(AttributeError):
                delattr(sys, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gc.collect()
    return result


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves a process or an object of its machine."""
    with look_for_leaks():
        yield


@contextlib.contextmanager
def look_for_leaks() -> Iterator[None]:
    """Fail for what is left of the time in the `with`, but for shared machines."""
    before, objects = _pids(), _objects()
    yield
    seen, looked = time.monotonic(), 0.0
    while True:
        over = looked > _LEAK_WAIT_S  # before the last look
        left = _processes(before) - _shared_processes()
        lost = _objects() - objects - _shared_objects()
        if not left and not lost:
            return
        if over:
            break
        time.sleep(0.01)
        now = time.monotonic()
        looked += min(now - seen, 0.1)  # as in `eventually`
        seen = now
    names = [f"{pid}: {_describe(pid)}" for pid in sorted(left)]
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for path in lost:
        path.unlink(missing_ok=True)
    pytest.fail(f"left behind: processes {names}, objects {sorted(map(str, lost))}")


def _shared_processes() -> set[int]:
    """Those that machines which outlive a test have now: a test may boot some anew."""
    found = set()
    for cluster in _SHARED:
        found.add(cluster._machine.firmware_pid)
        with contextlib.suppress(shmipi.MachineDiedError):
            found.update(cpu.pid for cpu in cluster.cpus)
    return found


def _shared_objects() -> set[Path]:
    return {_SHM / full_name(cluster.name) for cluster in _SHARED}


def _describe(pid: int) -> str:
    with contextlib.suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")[:80]
        return f"{state} {line.decode(errors='replace')}"
    return "gone by now"


@pytest.fixture(autouse=True, scope="module")
def functions_travel(request: pytest.FixtureRequest) -> Iterator[None]:
    """Send the functions of test modules by value: a CPU need not import pytest."""
    cloudpickle.register_pickle_by_value(request.module)
    yield
    cloudpickle.unregister_pickle_by_value(request.module)


# ---- machines ------------------------------------------------------------------------


def make_cluster(
    ncpus: int | None = 2, *, steps: bool = False, arena_bytes: int = 0, **options: Any
) -> Any:
    """A Cluster; with `steps` or `arena_bytes`, which are for tests, past its face."""
    from shmipi import cluster as module

    if not steps and not arena_bytes:
        return module.Cluster(ncpus, **options)
    values: dict[str, Any] = {
        "idle": "auto",
        "doorbell": "futex",
        "kick": True,
        "controller": "apic",
        "cores": "auto",
        "name": None,
        "handlers": (),
        "trace": False,
        **options,
    }
    plan = module._plan(ncpus, steps=steps, arena_bytes=arena_bytes, **values)
    cluster = module.Cluster.__new__(module.Cluster)
    cluster._open(plan)
    return cluster


@pytest.fixture
def boot() -> Iterator[Callable[..., Any]]:
    """`boot(ncpus, **options)`: a Cluster that ends with the test."""
    clusters: list[Any] = []

    def start(*args: Any, **options: Any) -> Any:
        clusters.append(make_cluster(*args, **options))
        return clusters[-1]

    yield start
    for cluster in clusters:
        cluster.shutdown()


@contextlib.contextmanager
def shared_cluster(*args: Any, **options: Any) -> Iterator[Any]:
    """A machine for several tests. At its end nothing is left of it, as of a test's."""
    with look_for_leaks():
        cluster = make_cluster(*args, **options)
        _SHARED.append(cluster)
        try:
            yield cluster
        finally:
            _SHARED.remove(cluster)
            cluster.shutdown()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three CPUs that halt, shared by a module's tests: leave them as they were."""
    with shared_cluster(3, idle="halt") as made:
        yield made


@pytest.fixture(scope="module")
def cluster_with_steps() -> Iterator[Any]:
    """Four CPUs that halt and can be killed at labelled steps, shared by a module."""
    with shared_cluster(4, idle="halt", steps=True) as made:
        yield made


@pytest.fixture(scope="module")
def cluster_until_failure(
    request: pytest.FixtureRequest,
) -> Iterator[Callable[..., contextlib.AbstractContextManager[Any]]]:
    """`with cluster_until_failure(ncpus, **options) as cluster:` for each test.

    A machine that one test of the module after the other uses, for each choice of
    options; the first one after a failure, which may have left it in any state, boots a
    new one.
    """
    with contextlib.ExitStack() as stack:
        kept: dict[str, Any] = {}

        @contextlib.contextmanager
        def use(*args: Any, **options: Any) -> Iterator[Any]:
            key = repr((args, sorted(options.items())))
            if key not in kept:
                kept[key] = stack.enter_context(shared_cluster(*args, **options))
            failed = request.session.testsfailed
            try:
                yield kept[key]
            except BaseException:
                failed = -1
                raise
            finally:
                if request.session.testsfailed != failed:
                    kept.clear()
                    stack.close()

        yield use


# ---- tools ---------------------------------------------------------------------------


@pytest.fixture
def eventually() -> Callable[..., float]:
    """`eventually(condition, seconds=5)`: wait for it; how long that took, in s.

    A look for which the computer gave no time counts for little: what is waited for had
    none either.
    """

    def wait(condition: Callable[[], object], seconds: float = 5.0) -> float:
        start = seen = time.monotonic()
        looked = 0.0
        while not condition():
            assert looked < seconds, "it did not happen"
            time.sleep(0.001)
            now = time.monotonic()
            looked += min(now - seen, 0.1)
            seen = now
        return time.monotonic() - start

    return wait


@pytest.fixture
def own_time() -> Callable[[], float]:
    """`own_time()`: seconds on a clock that stands while the computer is kept from us.

    That is while threads of this process could run and were not let: by others here, or
    by others on the computer that this one is a guest of.
    """

    queued: dict[str, float] = {}  # of each thread, of those that have ended too

    def lost() -> float:
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):  # it ends while it is looked at
                ns = int((thread / "schedstat").read_text().split()[1])
                queued[thread.name] = ns / 1e9
        stolen = int(Path("/proc/stat").read_text().split()[8])
        return sum(queued.values()) + stolen / os.sysconf("SC_CLK_TCK")

    def now() -> float:
        while True:  # both of one moment: not kept from the core between the looks
            before, at = lost(), time.monotonic()
            if lost() - before < 0.001:
                return at - before

    return now


@pytest.fixture
def gate(cluster: Any) -> Iterator[tuple[Callable[..., Any], Callable[[], None]]]:
    """`work, let_go = gate`: a function that returns its argument after `let_go()`."""
    go = cluster.shared("gate", "i8", 1)
    go[0] = 0

    def work(value: Any = None) -> Any:
        end = time.monotonic() + 20
        while not go[0] and time.monotonic() < end:
            time.sleep(0.001)
        return value

    def let_go() -> None:
        go[0] = 1

    yield work, let_go
    let_go()


@pytest.fixture
def background() -> Iterator[Callable[..., Any]]:
    """`background(func, *args)`: a thread; `.end(seconds)` gives result or error."""
    started: list[Background] = []

    def start(func: Callable[..., Any], *args: Any) -> Background:
        started.append(Background(func, args))
        return started[-1]

    yield start
    for thread in started:
        thread.join(10.0)
        assert not thread.is_alive(), "a thread of the test hangs"


class Background(threading.Thread):
    """Runs a function; daemonic, so that a hang fails the test and not the run."""

    def __init__(self, func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        super().__init__(daemon=True)
        self.work = lambda: func(*args)
        self.result: Any = None
        self.error: BaseException | None = None
        self.finished_at = 0.0
        self.start()

    def run(self) -> None:
        try:
            self.result = self.work()
        except BaseException as error:
            self.error = error
        self.finished_at = time.monotonic()

    def end(self, seconds: float = 5.0) -> Any:
        self.join(seconds)
        assert not self.is_alive(), f"still at it after {seconds} s"
        if self.error is not None:
            raise self.error
        return self.result


def _where(pid: int) -> str:
    """What the threads of a program of `script` do; it prints their Python stacks."""
    said = _threads(pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, _STACKS)
        time.sleep(1.0)  # of one that is stopped there are none
    return "\n".join([*said, _computer()])


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """`script(text)`: start a Python program as a host of its own; a Popen.

    Its standard output is a pipe; with `wait=True` (default) it has ended and what it
    printed is in `.text`.
    """
    started: list[subprocess.Popen[str]] = []

    def start(
        text: str,
        *args: str,
        wait: bool = True,
        timeout: float = 30.0,
        status: int | None = 0,
        prefix: tuple[str, ...] = (),
        flags: tuple[str, ...] = ("-W", "error"),
        **options: Any,
    ) -> Any:
        path = tmp_path / f"host{len(started)}.py"
        path.write_text(_PRELUDE + textwrap.dedent(text))
        environment = {**os.environ, "PYTHONPATH": PACKAGE_HOME}
        process: Any = subprocess.Popen(
            [*prefix, sys.executable, *flags, str(path), *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            **{"stdin": subprocess.DEVNULL, **options},
        )
        started.append(process)
        if wait:
            try:
                process.text, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                state = _where(process.pid)
                process.kill()
                process.text, _ = process.communicate()
                pytest.fail(f"the program hangs; it printed:\n{process.text}\n{state}")
            assert status is None or process.returncode == status, process.text
        return process

    yield start
    for process in started:
        with process:
            if process.poll() is None:
                process.kill()
