"""`shmipi doctor`: what it finds, on this computer and on others made of text files."""

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from shmipi.cli import main
from shmipi.machine.facts import Facts, gather, steal_seconds
from shmipi.report.doctor import examine, render, summary

QUEUES = {"fs/mqueue/queues_max": 4096}
SOFT, HARD = "fs/pipe-user-pages-soft", "fs/pipe-user-pages-hard"


@pytest.fixture(scope="module")
def facts() -> Facts:
    """A quiet computer with eight cores that allows everything."""
    free = {"NOFILE", "NPROC", "SIGPENDING", "MSGQUEUE", "AS"}
    return replace(
        gather(),
        cpu_model="test",
        cores="0-7",
        ncores=8,
        physical_cores=8,
        nodes=1,
        smt=False,
        virtualisation=None,
        container=None,
        steal_s=0.0,
        steal_share=0.0,
        load_1m=0.1,
        governors=("performance",),
        turbo=False,
        idle_driver="intel_idle",
        idle_exit_us=2,
        clocksource="tsc",
        timer_slack_ns=50_000,
        mitigations={},
        isolated_cores="2-7",
        nohz_full_cores="2-7",
        cgroup_quota_cores=None,
        cgroup_throttled_s=0.0,
        cgroup_throttled_periods=0,
        rlimits={name: (None, None) for name in free},
        privileged=False,
        user_tasks=10,
        pids_max=None,
        pids_current=None,
        pid_max=4194304,
        threads_max=1_000_000,
        sysctls={**QUEUES, SOFT: 16384, HARD: 0},
        shm_size_bytes=16 << 30,
        shm_free_bytes=16 << 30,
        memory_available_bytes=32 << 30,
        pinning_error=None,
        pidfd_error=None,
    )


def test_a_quiet_computer_has_nothing_against_it(facts: Facts) -> None:
    findings = examine(facts, 1024)
    assert {finding.level for finding in findings} == {"ok"}
    assert summary(findings, 1024).startswith("nothing stands against")


@pytest.mark.parametrize(
    ("change", "name", "level"),
    [
        ({"ncores": 1, "cores": "0"}, "cores", "warning"),
        ({"ncores": 2, "cores": "0-1"}, "cores", "note"),
        ({"smt": True, "physical_cores": 4}, "SMT", "note"),
        ({"smt": True, "physical_cores": 1}, "SMT", "warning"),
        ({"nodes": 2}, "NUMA", "note"),
        ({"load_1m": 7.5}, "load", "warning"),
        ({"virtualisation": "KVM"}, "virtualisation", "note"),
        ({"steal_share": 0.2, "steal_s": 9.0}, "steal", "warning"),
        ({"steal_share": 0.005, "steal_s": 9.0}, "steal", "note"),
        ({"governors": ("powersave",)}, "governor", "warning"),
        ({"governors": ("performance", "schedutil")}, "governor", "warning"),
        ({"turbo": True}, "turbo", "note"),
        ({"idle_exit_us": 200}, "idle states", "note"),
        ({"clocksource": "hpet"}, "clocksource", "warning"),
        ({"timer_slack_ns": 50_000_000}, "timer slack", "warning"),
        ({"mitigations": {"meltdown": "PTI"}}, "mitigations", "note"),
        ({"isolated_cores": ""}, "isolated cores", "note"),
        ({"cgroup_quota_cores": 1.5}, "cgroup quota", "warning"),
        ({"cgroup_throttled_s": 3.0}, "throttling", "warning"),
        ({"pinning_error": "Operation not permitted"}, "pinning", "warning"),
        ({"pidfd_error": "Function not implemented"}, "pidfd", "warning"),
        ({"shm_size_bytes": None, "shm_free_bytes": None}, "/dev/shm", "warning"),
        ({"shm_free_bytes": 64 << 20}, "/dev/shm", "note"),
        ({"shm_free_bytes": 2 << 20}, "/dev/shm", "warning"),
        ({"memory_available_bytes": 1 << 29}, "memory", "warning"),
        ({"pids_max": 500, "pids_current": 3}, "pids.max", "warning"),
        ({"pids_max": 1030, "pids_current": 30}, "pids.max", "warning"),
        ({"pid_max": 1000}, "kernel.pid_max", "warning"),
        ({"threads_max": 1000}, "kernel.threads-max", "warning"),
        ({"sysctls": {"fs/mqueue/queues_max": 256}}, "fs.mqueue", "note"),
        ({"sysctls": {}}, "fs.mqueue", "note"),
        ({"sysctls": {**QUEUES, SOFT: 512}}, "fs.pipe-user-pages-soft", "note"),
        ({"sysctls": {**QUEUES, HARD: 512}}, "fs.pipe-user-pages-hard", "note"),
    ],
)
def test_each_trouble_is_found_alone(
    facts: Facts, change: dict, name: str, level: str
) -> None:
    found = [f for f in examine(replace(facts, **change), 1024) if f.level != "ok"]
    assert [(finding.name, finding.level) for finding in found] == [(name, level)]
    assert found[0].why
    assert found[0].advice not in ("", "nothing to do")


@pytest.mark.parametrize(
    ("name", "limit", "level"),
    [
        ("NOFILE", (1024, 1024), "warning"),
        ("NOFILE", (1024, 4096), "note"),
        ("NOFILE", (4096, 4096), "ok"),
        ("SIGPENDING", (100, 100), "warning"),
        ("NPROC", (1030, None), "warning"),
        ("NPROC", (1100, None), "ok"),
        ("MSGQUEUE", (819, 819), "note"),
        ("AS", (8 << 30, None), "warning"),
    ],
)
def test_resource_limits(facts: Facts, name: str, limit, level: str) -> None:
    changed = replace(facts, rlimits={**facts.rlimits, name: limit})
    (found,) = [f for f in examine(changed, 1024) if f.name == f"RLIMIT_{name}"]
    assert found.level == level
    # The limit of processes does not bind root.
    if name == "NPROC":
        root = examine(replace(changed, privileged=True), 1024)
        assert all(f.level == "ok" for f in root if f.name == "RLIMIT_NPROC")


def test_size_is_judged_for_the_machine_asked_for(facts: Facts) -> None:
    small = replace(facts, shm_free_bytes=10 << 20, pids_max=100, pids_current=1)
    assert all(finding.level == "ok" for finding in examine(small, 16))
    names = [f.name for f in examine(small, 1024) if f.level != "ok"]
    assert names == ["/dev/shm", "pids.max"]


def test_text_names_what_to_do_for_troubles_only(facts: Facts) -> None:
    stream = io.StringIO()
    findings = examine(replace(facts, governors=("powersave",)), 4)
    render(findings, 4, stream)
    text = stream.getvalue()
    assert "cpupower frequency-set -g performance" in text
    assert text.count("nothing to do") == 0
    assert text.endswith("1 to change, 0 to know (judged for 4 CPUs)\n")
    assert max(map(len, text.splitlines())) <= 100


def test_a_terminal_gets_a_table_without_interpreting_values(facts: Facts) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    render(examine(replace(facts, cpu_model="Foo [red]CPU[/x]"), 4), 4, stream)
    assert "[/x]" in stream.getvalue()


def test_gather_where_nothing_can_be_read(tmp_path: Path) -> None:
    blank = gather(sys=tmp_path / "sys", proc=tmp_path / "proc")
    assert blank.ncores == len(os.sched_getaffinity(0))
    assert blank.steal_s is None
    assert blank.cgroup_quota_cores is None
    assert blank.sysctls == {}
    assert steal_seconds(proc=tmp_path) is None
    findings = examine(blank, 4)
    assert "fs.mqueue" in {finding.name for finding in findings}
    json.dumps(blank.as_dict())


def test_gather_reads_what_is_there(tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    files = {
        f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_governor": "powersave",
        f"sys/devices/system/cpu/cpu{core}/cpuidle/state0/latency": "0",
        f"sys/devices/system/cpu/cpu{core}/cpuidle/state1/latency": "133",
        f"sys/devices/system/cpu/cpu{core}/cpuidle/state2/latency": "900",
        f"sys/devices/system/cpu/cpu{core}/cpuidle/state2/disable": "1",
        "sys/devices/system/cpu/intel_pstate/no_turbo": "0",
        "sys/devices/system/cpu/isolated": "2-3",
        "sys/devices/system/cpu/nohz_full": "(null)",
        "sys/devices/system/cpu/vulnerabilities/meltdown": "Mitigation: PTI",
        "sys/devices/system/cpu/vulnerabilities/mds": "Not affected",
        "sys/devices/system/clocksource/clocksource0/current_clocksource": "hpet",
        "sys/class/dmi/id/sys_vendor": "QEMU",
        "sys/fs/cgroup/cpu.max": "200000 100000",
        "sys/fs/cgroup/cpu.stat": "nr_throttled 7\nthrottled_usec 2500000",
        "sys/fs/cgroup/pids.max": "77",
        "sys/fs/cgroup/pids.current": "5",
        "proc/self/cgroup": "0::/",
        "proc/cpuinfo": "processor : 0\nmodel name : Fast One\nflags : fpu hypervisor",
        "proc/stat": f"cpu  9 9 9 9 9 9 9 9 0 0\ncpu{core} 600 0 300 99 99 0 0 100 0 0",
        "proc/loadavg": "1.25 1 1 1/100 12345",
        "proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    2048 kB",
        "proc/sys/fs/mqueue/queues_max": "256",
        "proc/sys/kernel/pid_max": "32768",
        "proc/self/timerslack_ns": "50000",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    facts = gather(sys=tmp_path / "sys", proc=tmp_path / "proc")
    hertz = os.sysconf("SC_CLK_TCK")
    assert facts.governors == ("powersave",)
    assert facts.idle_exit_us == 133
    assert facts.turbo is True
    assert (facts.isolated_cores, facts.nohz_full_cores) == ("2-3", "")
    assert facts.mitigations == {"meltdown": "Mitigation: PTI"}
    assert facts.clocksource == "hpet"
    assert facts.virtualisation == "KVM/QEMU"
    assert facts.cgroup_quota_cores == 2.0
    assert (facts.cgroup_throttled_s, facts.cgroup_throttled_periods) == (2.5, 7)
    assert (facts.pids_max, facts.pids_current) == (77, 5)
    assert facts.cpu_model == "Fast One"
    assert facts.steal_s == pytest.approx(100 / hertz)
    assert facts.steal_share == pytest.approx(0.1)
    assert facts.load_1m == 1.25
    assert facts.memory_available_bytes == 2048 * 1024
    assert facts.sysctls == {"fs/mqueue/queues_max": 256}
    assert (facts.pid_max, facts.timer_slack_ns) == (32768, 50000)


def test_json_is_all_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--cpus", "8", "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    document = json.loads(captured.out)
    assert document["schema"] == "shmipi.doctor/1"
    assert document["ncpus"] == 8
    assert document["machine"]["ncores"] == len(os.sched_getaffinity(0))
    for finding in document["findings"]:
        assert set(finding) == {"name", "level", "value", "why", "advice"}
        assert finding["level"] in ("ok", "note", "warning")
        assert all(finding.values())


def test_json_to_a_file_beside_the_text(tmp_path: Path, capsys) -> None:
    file = tmp_path / "doctor.json"
    assert main(["doctor", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    document = json.loads(file.read_text())
    assert document["verdict"] in text
    for finding in document["findings"]:
        assert finding["name"] in text
