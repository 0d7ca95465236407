"""The pytest plugin: machines and their traces as fixtures.

It is there wherever shmipi is installed (entry point ``shmipi``). ``cluster`` is a
machine that ends with the test; ``ipi_trace`` records it. Of a test that fails the
trace is kept in a file, which its report names: ``shmipi trace summary FILE`` shows it.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from shmipi.cluster import Cluster
    from shmipi.trace.kernel import Event
    from shmipi.trace.record import Recorder, Trace

__all__ = ["IpiTrace"]

_RECORDS = 1 << 14
_KEY = pytest.StashKey["IpiTrace"]()


class IpiTrace:
    """What the test's machine records: since the test began, or ``clear()``."""

    def __init__(self, cluster: Cluster, records: int) -> None:
        self._cluster = cluster
        self._trace: Trace | None = None
        self._records = records
        self._recorder = self._begin()

    def _begin(self) -> Recorder:
        self._cluster.tracing.start(self._records, lossless=True)
        recorder = self._cluster.tracing.recorder()
        recorder.run()
        return recorder

    def clear(self) -> None:
        """Forget what was recorded, and record on."""
        self._recorder.finish()
        self._trace = None
        self._recorder = self._begin()

    def stop(self) -> Trace:
        """Record no more, and return what was recorded; again: the same."""
        if self._trace is None:
            self._cluster.tracing.stop()
            self._trace = self._recorder.finish()
        return self._trace

    def events(self, name: str | None = None) -> list[Event]:
        """Stop, and return the kernel's events, oldest first, or those of a name."""
        from shmipi.trace import kernel

        return [
            event
            for event in kernel.events(self.stop())
            if name is None or event.name == name
        ]

    def summary(self) -> dict[str, Any]:
        """Stop, and return who interrupted whom: as ``shmipi trace summary --json``."""
        from shmipi.trace import timeline

        trace = self.stop()
        return timeline.summary(timeline.timeline(self.events(), trace.ncpus))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --shmipi-traces."""
    group = parser.getgroup("shmipi")
    group.addoption(
        "--shmipi-traces",
        metavar="DIR",
        help="where the traces of failed tests go (default: pytest's temporary folder)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers",
        "shmipi(ncpus=2, **options): the machine of the fixture `cluster`, as"
        " shmipi.Cluster takes them; trace_records: the size of ipi_trace's rings",
    )


def _options(request: pytest.FixtureRequest) -> dict[str, Any]:
    options: dict[str, Any] = {"ncpus": 2}
    for mark in reversed(list(request.node.iter_markers("shmipi"))):
        options.update(mark.kwargs)
        if mark.args:
            options["ncpus"] = mark.args[0]
    return options


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A ``shmipi.Cluster`` for this test: of 2 CPUs, or as the marker shmipi says."""
    from shmipi import Cluster

    options = _options(request)
    options.pop("trace_records", None)
    with Cluster(options.pop("ncpus"), **options) as machine:
        yield machine


@pytest.fixture
def ipi_trace(request: pytest.FixtureRequest, cluster: Cluster) -> Iterator[IpiTrace]:
    """What the machine of ``cluster`` records during the test: an ``IpiTrace``.

    When the test fails, it is kept in a file.
    """
    records = _options(request).get("trace_records", _RECORDS)
    trace = IpiTrace(cluster, records)
    request.node.stash[_KEY] = trace
    try:
        yield trace
    finally:
        trace.stop()


def _folder(config: pytest.Config, item: pytest.Item) -> Path:
    chosen = config.getoption("shmipi_traces")
    if chosen:
        folder = Path(chosen)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    factory = config._tmp_path_factory  # type: ignore[attr-defined]
    return Path(factory.mktemp("shmipi", numbered=True))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep the trace of a test that has failed, or a fixture of it, and say where."""
    report = yield
    trace = item.stash.get(_KEY, None)
    if not report.failed or trace is None:
        return report
    name = re.sub(r"[^\w.-]+", "_", item.nodeid)[-120:]
    name += f"-{zlib.crc32(item.nodeid.encode()):08x}"  # others may look like it
    try:
        found = trace.stop()
        path = _folder(item.config, item) / f"{name}.trace"
        found.save(path)
        lost = sum(found.lost.values())
        text = (
            f"{path}: {len(found.records)} records{f', {lost} lost' if lost else ''}\n"
            f"shmipi trace summary {path}"
        )
    except Exception as error:  # a trace never hides what the test has to say
        text = f"the trace could not be kept: {error}"
    report.sections.append(("shmipi trace", text))
    return report
