"""Bad input and a system that refuses: one clear error each, and nothing left."""

import errno
import os
import shutil

import pytest

import shmipi
from shmipi import (
    BootError,
    Cluster,
    ClusterStateError,
    CpuOfflineError,
    RemoteCallError,
)
from shmipi.names import DOORBELLS

ROOT = pytest.mark.skipif(os.getuid() != 0, reason="needs root")


# ---- arguments of Cluster ------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ({"ncpus": 0}, ValueError, "1 to 4096"),
        ({"ncpus": -3}, ValueError, "1 to 4096"),
        ({"ncpus": 4097}, ValueError, "1 to 4096"),
        ({"ncpus": 10**30}, ValueError, "1 to 4096"),
        ({"ncpus": "2"}, TypeError, "number of CPUs"),
        ({"ncpus": 2.0}, TypeError, "number of CPUs"),
        ({"ncpus": True}, TypeError, "number of CPUs"),
        (
            {"doorbell": "bell"},
            ValueError,
            ", ".join(map(repr, DOORBELLS)),
        ),
        ({"doorbell": None}, ValueError, "futex"),
        ({"idle": "lazy"}, ValueError, "'auto', 'poll', 'haltpoll', 'halt'"),
        ({"controller": "pic"}, ValueError, "apic"),
        ({"kick": 9}, ValueError, "real-time signal"),
        ({"kick": 65}, ValueError, "real-time signal"),
        ({"kick": "yes"}, ValueError, "real-time signal"),
        ({"cores": []}, ValueError, "core"),
        ({"cores": [99999]}, (ValueError, BootError), "99999"),
        ({"cores": [-1]}, (ValueError, BootError), "-1"),
        ({"cores": "zero"}, ValueError, "zero"),
        ({"name": ""}, ValueError, "name"),
        ({"name": "a/b"}, ValueError, "letters"),
        ({"name": "x" * 33}, ValueError, "32"),
        ({"name": 7}, ValueError, "name"),
        ({"handlers": "noop"}, TypeError, "list"),
        ({"handlers": ["nope"]}, ValueError, "nope"),
        ({"handlers": ["/no/such.so:f"]}, BootError, "no file"),
    ],
    ids=str,
)
def test_arguments_of_cluster(arguments, kind, says):
    with pytest.raises(kind, match=says):
        Cluster(**{"ncpus": 2, **arguments})


def test_unknown_arguments():
    with pytest.raises(TypeError):
        Cluster(2, doorbel="futex")
    with pytest.raises(TypeError):
        Cluster(2, "halt")


def test_a_name_that_is_taken(boot):
    cluster = boot(1, name=f"taken{os.getpid()}")
    with pytest.raises(BootError, match="another name") as caught:
        Cluster(1, name=cluster.name)
    assert caught.value.errno == errno.EEXIST
    assert "shmipi clean" in str(caught.value)
    assert cluster.call(0, int) == 0  # the one that has it is not hurt
    name = cluster.name
    cluster.shutdown()
    assert boot(1, name=name).call(0, int) == 0


# ---- arguments of calls --------------------------------------------------------------


@pytest.mark.parametrize("cpu", ["1", 1.0, None, [1]])
def test_cpu_numbers_of_a_wrong_type(cluster, cpu):
    for call in (
        lambda: cluster.call(cpu, int),
        lambda: cluster.submit(cpu, int),
        lambda: cluster.smp.smp_call_function_single(cpu, id),
        lambda: cluster.smp.smp_send_reschedule(cpu),
    ):
        with pytest.raises(TypeError):
            call()


@pytest.mark.parametrize("cpu", [-1, 3, 4096, 2**31, -(2**31) - 1, 2**64, 10**30])
def test_negative_or_too_large_cpu_numbers(cluster, cpu):
    with pytest.raises(CpuOfflineError, match="CPUs 0-2") as caught:
        cluster.call(cpu, int)
    assert caught.value.errno == errno.ENXIO


@pytest.mark.parametrize("mask", ["0-3", [5], [-1], "2-0", "x", [0, 99], range(4)])
def test_masks_with_cpus_that_do_not_exist(cluster, mask):
    for call in (
        lambda: cluster.smp.smp_call_function_many(mask, id),
        lambda: cluster.smp.on_each_cpu_mask(mask, id),
        lambda: cluster.run(int, cpus=mask),
    ):
        with pytest.raises(ValueError, match=r".+"):
            call()


@pytest.mark.parametrize("mask", [3, 1.5, [0.5], ["a"], b"0"])
def test_masks_that_are_none(cluster, mask):
    for call in (
        lambda: cluster.smp.smp_call_function_many(mask, id),
        lambda: cluster.run(int, cpus=mask),
    ):
        with pytest.raises((TypeError, ValueError)):
            call()


def test_an_empty_mask(cluster):
    for mask in ([], "", shmipi.CpuMask()):
        with pytest.raises(ValueError, match="empty"):
            cluster.run(int, cpus=mask)


def test_smp_arguments(cluster):
    single = cluster.smp.smp_call_function_single
    for call in (
        single,
        lambda: single(1),
        lambda: single(1, None),
        lambda: single(1, id, 1, True, 5),
        lambda: single(1, id, inf=1),
        lambda: single(1, id, cpu=1),
        lambda: cluster.smp.smp_call_function_many("0"),
        lambda: cluster.smp.on_each_cpu("f"),
        lambda: cluster.smp.on_each_cpu_cond_mask("c", id),
        lambda: cluster.smp.smp_call_function_single_async(1),
    ):
        with pytest.raises(TypeError):
            call()
    cluster.call(1, int)


def test_a_cluster_does_not_travel(cluster):
    with pytest.raises(TypeError, match=r"shmipi\.smp"):
        cluster.call(1, lambda: cluster.cpus)
    with pytest.raises((TypeError, RemoteCallError)):
        cluster.call(1, cluster.call, 1, int)


def test_a_closed_cluster(boot):
    cluster = boot(2, idle="halt")
    csd = cluster.smp.CallSingleData(id)
    cluster.shutdown()
    for call in (
        lambda: cluster.call(1, int),
        lambda: cluster.submit(1, int),
        lambda: cluster.run(int),
        lambda: cluster.cpus,
        lambda: cluster.online_mask,
        lambda: cluster.counters(),
        lambda: cluster.interrupts(),
        lambda: cluster.online(1),
        lambda: cluster.offline(1),
        lambda: cluster.shared("a", "i8"),
        lambda: cluster.percpu("a", "i8"),
        lambda: cluster.smp.smp_call_function_single(1, id),
        lambda: cluster.smp.smp_call_function_single_async(1, csd),
        lambda: cluster.smp.on_each_cpu(id),
        lambda: cluster.smp.CallSingleData(id),
        cluster.__enter__,
    ):
        with pytest.raises(ClusterStateError, match="closed"):
            call()
    assert not csd.locked


def test_pending_futures_of_a_cluster_that_is_shut_down(boot):
    import time

    cluster = boot(2, idle="halt")
    future = cluster.submit(1, time.sleep, 20)
    start = time.monotonic()
    cluster.shutdown()
    assert time.monotonic() - start < 6
    assert isinstance(future.exception(1), shmipi.MachineDiedError)


# ---- a system that refuses -----------------------------------------------------------

BOOT = """
import sys
from shmipi import BootError, Cluster
try:
    with Cluster({ncpus}, idle="halt", doorbell={doorbell!r}) as cluster:
        print("booted", cluster.call({ncpus} - 1, abs, -1))
except BootError as error:
    print("BootError", error.errno, error)
"""


def refused(script, ncpus, doorbell, limit, value):
    text = (
        "import resource, numpy, posix_ipc, shmipi.cluster\n"
        f"resource.setrlimit({limit}, ({value}, {value}))\n"
    )
    return script(text + BOOT.format(ncpus=ncpus, doorbell=doorbell)).text


@pytest.mark.parametrize("doorbell", ["eventfd", "pipe"])
def test_rlimit_nofile(script, doorbell):
    text = refused(script, 64, doorbell, "resource.RLIMIT_NOFILE", 40)
    assert text.startswith(f"BootError {errno.EMFILE}")
    assert "ulimit -n" in text
    assert "futex" in text


@pytest.mark.parametrize("value", [5, 8, 12, 16, 20, 25])
def test_rlimit_nofile_at_any_moment(script, value):
    """However few there are: a machine or one clear error, and nothing is left."""
    text = refused(script, 2, "futex", "resource.RLIMIT_NOFILE", value)
    assert text.startswith(("BootError", "booted")), text


def test_rlimit_msgqueue(script):
    text = refused(script, 64, "mqueue", "resource.RLIMIT_MSGQUEUE", 4000)
    assert text.startswith("BootError")
    assert "ulimit -q" in text
    assert "futex" in text


def test_rlimit_fsize(script):
    text = refused(script, 2, "futex", "resource.RLIMIT_FSIZE", 1 << 20)
    assert text.startswith("BootError")
    assert "ulimit -f" in text


OTHER_USER = """
import os, resource, numpy, posix_ipc, shmipi.cluster
os.setgroups([])
os.setgid(65534)
os.setuid(54321)
resource.setrlimit(resource.RLIMIT_NPROC, (12, 12))
"""


@ROOT
def test_rlimit_nproc(script):
    """RLIMIT_NPROC does not bind root: as another user."""
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("no setpriv(1)")
    other = (setpriv, "--reuid=54321", "--regid=65534", "--clear-groups")
    if script("import shmipi.cluster", prefix=other, status=None).returncode:
        pytest.skip("another user cannot use this installation")
    done = script(OTHER_USER + BOOT.format(ncpus=64, doorbell="futex"))
    assert done.text.startswith("BootError"), done.text
    assert "RLIMIT_NPROC" in done.text


def in_small_shm(script, size, text, *, mount=None):
    """Run a host with a /dev/shm of its own, of that size."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("no unshare(1)")
    command = mount or f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    done = script(
        text,
        prefix=(unshare, "-m", "sh", "-c", f'{command} && exec "$@"', "sh"),
        status=None,
    )
    if "permission denied" in done.text.lower() or "must be superuser" in done.text:
        pytest.skip(done.text)
    assert done.returncode == 0, done.text
    return done.text


LEFT = """
import os
print("left", sorted(os.listdir("/dev/shm")))
"""


@ROOT
@pytest.mark.parametrize("doorbell", ["futex", "sem"])
def test_dev_shm_too_small_to_boot(script, doorbell):
    text = BOOT.format(ncpus=64, doorbell=doorbell) + LEFT
    printed = in_small_shm(script, "64k", text)
    assert printed.startswith(f"BootError {errno.ENOSPC}"), printed
    assert "remount" in printed
    assert "--shm-size" in printed
    assert printed.endswith("left []\n")


@ROOT
def test_results_when_dev_shm_is_full(script):
    """They wait for room while some are lent, and else it is said that the call ran."""
    printed = in_small_shm(
        script,
        "6m",
        """
        import time
        from shmipi import ArenaFullError, Cluster, RemoteCallError

        def wait(_):
            while not ran[99]:
                time.sleep(0.001)

        def big(n, size):
            ran[n] += 1
            return n, bytes(size)

        def fail(size):
            ran[0] += 1
            raise ValueError("x" * size)

        with Cluster(2, idle="halt") as cluster:
            ran = cluster.shared("ran", "i8", 100)
            # More than there is of memory, read one after the other; none is made
            # before all are asked for, which takes memory, too.
            cluster.smp.smp_call_function_single(1, wait, None, False)
            calls = [
                cluster._machine.post(1, big, (n, 300_000), None, False)
                for n in range(40)
            ]
            ran[99] = 1
            got = [cluster._machine.collect(call, 1, 10.0) for call in calls]
            print(got == [(n, bytes(300_000)) for n in range(40)], int(ran[:40].sum()))
            try:
                cluster.call(1, big, 50, 8 << 20)
            except RemoteCallError as error:
                cause = error.__cause__
                told = "has run" in str(cause)
                print(type(cause).__name__, cause.errno, told, ran[50])
            ran[0] = 0
            try:
                cluster.smp.smp_call_function_single(1, fail, 8 << 20)
            except RemoteCallError as error:
                print(type(error.__cause__).__name__, "has run" in str(error), ran[0])
            with open("/dev/shm/filler", "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass
            # Room for what is there already, at the most: an answer or the truth.
            ran[:] = 0
            outcomes = set()
            for n in range(60):
                try:
                    assert cluster.call(1, big, n, n * 2_000) == (n, bytes(n * 2_000))
                    outcomes.add("ok")
                except (ArenaFullError, RemoteCallError) as error:
                    assert "has run" in str(error) and ran[n] == 1, error
                    outcomes.add("has run")
            print(sorted(outcomes))
        """,
    )
    assert printed.splitlines() == [
        "True 40",
        f"ArenaFullError {errno.ENOSPC} True 1",
        "ArenaFullError True 1",
        "['has run', 'ok']",
    ]


@ROOT
def test_dev_shm_full_at_first_use(script):
    printed = in_small_shm(
        script,
        "2m",
        """
        import os
        from shmipi import ArenaFullError, Cluster, RemoteCallError

        with Cluster(2, idle="halt") as cluster:
            array = cluster.shared("a", "u1", 100_000)
            for what in (
                lambda: cluster.call(1, len, bytes(3 << 20)),
                lambda: cluster.shared("b", "u1", 3 << 20),
                lambda: cluster.percpu("c", "u1", 3 << 20),
            ):
                try:
                    what()
                    print("no error")
                except ArenaFullError as error:
                    says = str(error)
                    print(error.errno, "/dev/shm" in says, "shm-size" in says)
            print(cluster.call(1, len, bytes(1000)))
            array[:] = 1  # what was handed out is there
            with open("/dev/shm/filler", "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass
            # Full to the last page: errors, or answers; never SIGBUS.
            outcomes = set()
            for n in range(200):
                try:
                    cluster.call(n % 2, lambda x: bytes(len(x)), bytes(n * 500))
                    outcomes.add("ok")
                except (ArenaFullError, RemoteCallError) as error:
                    outcomes.add(type(error).__name__)
            alive = [cpu.state != "dead" for cpu in cluster.cpus]
            print("ArenaFullError" in outcomes, alive)
            os.unlink("/dev/shm/filler")
            print(cluster.call(1, len, bytes(50_000)))
        print("left", os.listdir("/dev/shm"))
        """,
    )
    assert printed.splitlines() == [
        *[f"{errno.ENOSPC} True True"] * 3,
        "1000",
        "True [True, True]",
        "50000",
        "left []",
    ]


@ROOT
def test_submitting_waits_while_what_was_submitted_fills_dev_shm(script):
    printed = in_small_shm(
        script,
        "32m",
        """
        import time
        from shmipi import ArenaFullError, Cluster

        def slow(data):
            time.sleep(0.01)
            return len(data)

        with Cluster(2, idle="halt") as cluster:
            cluster.call(1, slow, b"")
            with open("/dev/shm/filler", "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    file.truncate(file.tell() - (4 << 20))
            futures = [cluster.submit(1, slow, bytes(700_000)) for _ in range(20)]
            print({future.result(10) for future in futures})
            try:
                print(cluster.submit(1, slow, bytes(6 << 20)).result(10))
            except ArenaFullError as error:  # nothing would make room for it
                print(error.errno)
        """,
    )
    assert printed.splitlines() == ["{700000}", str(errno.ENOSPC)]


@ROOT
def test_no_dev_shm(script):
    text = BOOT.format(ncpus=2, doorbell="futex")
    printed = in_small_shm(
        script, 0, text, mount="mount -t tmpfs -o ro,size=64k tmpfs /dev/shm"
    )
    assert printed.startswith("BootError"), printed
    assert "/dev/shm" in printed


def test_a_single_core(script):
    """One core for everything: slower, and everything works."""
    done = script(
        """
        import os
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        from shmipi import Cluster, smp
        with Cluster() as cluster:
            print(cluster.ncpus, cluster.idle != "poll", {c.core for c in cluster.cpus})
            def task():
                for _ in range(100):
                    smp.smp_call_function(id)
                return smp.smp_processor_id()
            print(cluster.run(task), cluster.call(1, abs, -1))
        with Cluster(3, idle="poll") as cluster:
            print(cluster.run(task))
        """
    )
    core = min(os.sched_getaffinity(0))
    assert done.text.splitlines() == [
        f"2 True {{{core}}}",
        "[0, 1] 1",
        "[0, 1, 2]",
    ]


def test_where_it_may_not_pin(script):
    """A core outside the allowed set is refused before anything is started."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip("one core")
    done = script(
        f"""
        import os
        os.sched_setaffinity(0, {{{allowed[0]}}})
        from shmipi import BootError, Cluster
        try:
            with Cluster(2, cores=[{allowed[1]}]) as cluster:
                print("booted", cluster.call(1, abs, -1))
        except (BootError, ValueError) as error:
            print(type(error).__name__, error)
        """
    )
    assert done.text.startswith(("booted 1", "BootError", "ValueError"))
    if not done.text.startswith("booted"):
        assert str(allowed[1]) in done.text


SANDBOX = """
import ctypes, platform, struct, sys
from shmipi import BootError, Cluster

def forbid(numbers, code):
    number = numbers[platform.machine()]
    filters = b"".join(struct.pack("<HBBI", *entry) for entry in (
        (0x20, 0, 0, 0),                  # load the number of the system call
        (0x15, 0, 1, number),             # this one?
        (0x06, 0, 0, 0x00050000 | code),  # an error
        (0x06, 0, 0, 0x7FFF0000),         # allow
    ))
    buffer = ctypes.create_string_buffer(filters)
    program = struct.pack("@HP", 4, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    if libc.prctl(22, 2, program, 0, 0):
        print("no seccomp")
        sys.exit(0)

forbid({numbers}, {code})
try:
    with Cluster(2, idle="halt", doorbell={doorbell!r}) as cluster:
        print("booted", cluster.call(1, abs, -1))
except BootError as error:
    print("BootError", error.errno, error)
"""


@pytest.mark.parametrize(
    ("numbers", "code", "doorbell", "says"),
    [
        ({"x86_64": 203, "aarch64": 122}, errno.EPERM, "futex", "pin"),
        ({"x86_64": 434, "aarch64": 434}, errno.ENOSYS, "futex", "not implemented"),
        ({"x86_64": 240, "aarch64": 180}, errno.ENOSYS, "mqueue", "futex"),
        ({"x86_64": 290, "aarch64": 19}, errno.EPERM, "eventfd", "futex"),
    ],
    ids=["sched_setaffinity", "pidfd_open", "mq_open", "eventfd2"],
)
def test_a_sandbox_that_forbids(script, numbers, code, doorbell, says):
    """EPERM or ENOSYS from seccomp: one error that says what, and nothing is left."""
    done = script(SANDBOX.format(numbers=numbers, code=code, doorbell=doorbell))
    if done.text == "no seccomp\n":
        pytest.skip("no seccomp here")
    last = done.text.strip().splitlines()[-1]
    assert last.startswith("BootError"), done.text
    assert says in last
