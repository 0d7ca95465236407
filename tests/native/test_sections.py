"""How many core sections a call takes of its sender: on the host, each is a mutex."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.native

COUNTER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <string.h>

static unsigned long taken;

unsigned long sections_taken(void)
{
    return __atomic_load_n(&taken, __ATOMIC_RELAXED);
}

int pthread_mutex_lock(pthread_mutex_t *mutex)
{
    static int (*real)(pthread_mutex_t *);
    Dl_info from;
    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "pthread_mutex_lock");
    if (dladdr(__builtin_return_address(0), &from) && from.dli_fname &&
        strstr(from.dli_fname, "/_core."))
        __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED);
    return real(mutex);
}
"""

CALLS = """
import ctypes, json, os
import shmipi

def nothing(*args, **kwargs):
    pass

taken = ctypes.CDLL(os.environ["COUNTER"]).sections_taken
taken.restype = ctypes.c_ulong
noop = shmipi.NativeHandler("noop")
with shmipi.Cluster(2, idle="poll") as cluster:
    smp = cluster.smp
    ways = {
        "call": lambda: cluster.call(1, nothing),
        "call, inline": lambda: cluster.call(1, nothing, 7),
        "call, pickled": lambda: cluster.call(1, nothing, [1, 2], key="word" * 50),
        "call, native": lambda: cluster.call(1, noop),
        "single": lambda: smp.smp_call_function_single(1, nothing),
        "single, pickled": lambda: smp.smp_call_function_single(1, nothing, [1]),
        "single, native": lambda: smp.smp_call_function_single(1, noop),
        "nobody waits": lambda: smp.smp_call_function_single(1, nothing, 7, False),
        "many": lambda: smp.smp_call_function_many("0-1", nothing),
        "many, pickled": lambda: smp.smp_call_function_many("0-1", nothing, [1]),
    }
    counts = {}
    for name, call in ways.items():
        call()  # once before, so that the function has its number
        found = []
        for _ in range(5):
            before = taken()
            call()
            found.append(taken() - before)
        counts[name] = found
print(json.dumps(counts))
"""


def test_a_call_takes_two_sections_of_its_sender(tmp_path: Path) -> None:
    """One to post it, one to give its csd back; the same with a result as without."""
    compiler = os.environ.get("CC", "cc").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip("no C compiler: needs one to count what a process does")
    counter = tmp_path / "counter.so"
    (tmp_path / "counter.c").write_text(COUNTER)
    subprocess.run(
        [
            *(*compiler, "-shared", "-fPIC", "-O1", str(tmp_path / "counter.c")),
            *("-o", str(counter), "-ldl"),
        ],
        check=True,
    )
    done = subprocess.run(
        [sys.executable, "-c", CALLS],
        env={**os.environ, "LD_PRELOAD": str(counter), "COUNTER": str(counter)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # The least of a few: a wait that lasts looks around, which may take sections.
    counts = {name: min(found) for name, found in json.loads(done.stdout).items()}
    assert counts == {
        **dict.fromkeys(("call", "call, inline", "call, pickled", "call, native"), 2),
        **dict.fromkeys(("single", "single, pickled", "single, native"), 2),
        "nobody waits": 1,
        "many": 2 + 1 + 2,  # two csds, the doorbells, two given back
        "many, pickled": 1 + 2 + 1 + 2,  # the payload has a csd of its own
    }
