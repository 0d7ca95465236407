"""The other end of ``shmipi bench peers``: two processes that wake each other in turn.

A program of its own, ``python -m shmipi.bench.peering NAME CORE CORE``, so that nothing
of a peer is in the processes that measure ours. It reads "CALLS WARMUP GAP_NS" from
standard input, a line a block, and answers with a line of JSON: ns of each round trip.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import queue
import secrets
import signal
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import Any, ClassVar, Final

__all__ = ["PEERS", "Peer"]

_PR_SET_PDEATHSIG: Final = 1


class Peer(ABC):
    """One way to wake another process and to be woken by its answer.

    ``ping`` sends and waits for the answer; ``pong`` does nothing but answer, for ever,
    in the other process. ``package`` is what has to be installed, "" for nothing.
    """

    name: ClassVar[str]
    what: ClassVar[str]
    package: ClassVar[str] = ""
    #: It never sleeps: its core is no other's while it is not stopped.
    polls: ClassVar[bool] = False
    module: ClassVar[str] = ""

    def __init__(self, core: int) -> None:
        self.core = core
        self.library: Any = import_module(self.module) if self.module else None
        self.make()

    def make(self) -> None:  # noqa: B027
        """Make what both need, before they part."""

    def begin(self) -> None:
        """Start the other end on its core."""
        parent = os.getpid()
        self.child = os.fork()
        if self.child:
            return
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == parent:
                os.sched_setaffinity(0, {self.core})
                gc.disable()
                self.pong()
        except BaseException as error:
            print(f"{self.name}: {error!r}", file=sys.stderr, flush=True)
        finally:
            os._exit(1)

    @abstractmethod
    def ping(self) -> None:
        """There and back."""

    def pong(self) -> None:
        """Answer."""
        while True:
            self.answer()

    def answer(self) -> None:  # noqa: B027
        """Answer once."""

    def end(self) -> None:
        """Leave nothing behind."""
        if getattr(self, "child", 0):
            os.kill(self.child, signal.SIGKILL)
            os.waitpid(self.child, 0)


class Threaded(Peer):
    """The other end is a thread of the same process."""

    def begin(self) -> None:
        """Start it."""

        def run() -> None:
            os.sched_setaffinity(threading.get_native_id(), {self.core})
            self.pong()

        threading.Thread(target=run, daemon=True).start()


class Two(Peer):
    """Two of something with ``put`` and ``get``, one for each direction."""

    def kind(self) -> Any:
        """Make one."""

    def make(self) -> None:
        """Make both."""
        self.there, self.back = self.kind(), self.kind()

    def ping(self) -> None:
        """There and back."""
        self.there.put(None)
        self.back.get()

    def answer(self) -> None:
        """Answer once."""
        self.there.get()
        self.back.put(None)


class Gates(Two):
    """Two semaphores."""

    def ping(self) -> None:
        """There and back."""
        self.there.release()
        self.back.acquire()

    def answer(self) -> None:
        """Answer once."""
        self.there.acquire()
        self.back.release()


_fork = multiprocessing.get_context("fork")


class Pipe(Peer):
    name, what = "Pipe", "multiprocessing.Pipe: send(None), recv()"

    def make(self) -> None:
        self.mine, self.its = _fork.Pipe()

    def ping(self) -> None:
        self.mine.send(None)
        self.mine.recv()

    def answer(self) -> None:
        self.its.send(self.its.recv())


class SimpleQueue(Two):
    name, what = "SimpleQueue", "two of multiprocessing.SimpleQueue"

    def kind(self) -> Any:
        return _fork.SimpleQueue()


class Queue(Two):
    name = "Queue"
    what = "two of multiprocessing.Queue, whose put() goes through a thread"

    def kind(self) -> Any:
        return _fork.Queue()


class Semaphore(Gates):
    name, what = "Semaphore", "two of multiprocessing.Semaphore"

    def kind(self) -> Any:
        return _fork.Semaphore(0)


class ThreadQueue(Threaded, Two):
    name, what = "thread queue", "two threads, two of queue.Queue"

    def kind(self) -> Any:
        return queue.Queue()


class ThreadSemaphore(Threaded, Gates):
    name, what = "thread semaphore", "two threads, two of threading.Semaphore"

    def kind(self) -> Any:
        return threading.Semaphore(0)


class PosixSemaphore(Gates):
    name, what = "posix_ipc semaphore", "two POSIX semaphores of posix_ipc"
    package, module = "posix_ipc", "posix_ipc"

    def kind(self) -> Any:
        made = self.library.Semaphore(f"/{_unused()}", self.library.O_CREX)
        made.unlink()
        return made


class PosixQueue(Two):
    name, what = "posix_ipc queue", "two POSIX message queues of posix_ipc"
    package, module = "posix_ipc", "posix_ipc"

    def kind(self) -> Any:
        made = self.library.MessageQueue(
            f"/{_unused()}", self.library.O_CREX, max_messages=2, max_message_size=8
        )
        made.unlink()
        return made

    def ping(self) -> None:
        self.there.send(b"x")
        self.back.receive()

    def answer(self) -> None:
        self.there.receive()
        self.back.send(b"x")


class Eventfd(Two):
    name, what = "os.eventfd", "two eventfds: eventfd_write, eventfd_read"

    def kind(self) -> Any:
        return os.eventfd(0)

    def ping(self) -> None:
        os.eventfd_write(self.there, 1)
        os.eventfd_read(self.back)

    def answer(self) -> None:
        os.eventfd_read(self.there)
        os.eventfd_write(self.back, 1)


class Signal(Peer):
    name, what = "signal", "os.kill and signal.sigwait, both ways"
    _SIGNALS: ClassVar = {signal.SIGUSR1}

    def make(self) -> None:
        self.parent = os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, self._SIGNALS)

    def ping(self) -> None:
        os.kill(self.child, signal.SIGUSR1)
        signal.sigwait(self._SIGNALS)

    def answer(self) -> None:
        signal.sigwait(self._SIGNALS)
        os.kill(self.parent, signal.SIGUSR1)


class Pool(Peer):
    name = "ProcessPoolExecutor"
    what = "concurrent.futures, one worker: submit(int).result()"

    def begin(self) -> None:
        from concurrent.futures import ProcessPoolExecutor

        self.pool = ProcessPoolExecutor(
            1, mp_context=_fork, initializer=_pinned, initargs=(self.core,)
        )
        self.ping()

    def ping(self) -> None:
        self.pool.submit(int).result()

    def end(self) -> None:
        self.pool.shutdown(cancel_futures=True)


class Zmq(Peer):
    name, what = "pyzmq", "two PAIR sockets, ipc://"
    package, module = "pyzmq", "zmq"

    def make(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.address = f"ipc://{self.folder.name}/peer"

    def begin(self) -> None:
        super().begin()
        self.socket = self.library.Context().socket(self.library.PAIR)
        self.socket.bind(self.address)

    def pong(self) -> None:
        socket = self.library.Context().socket(self.library.PAIR)
        socket.connect(self.address)
        while True:
            socket.send(socket.recv())

    def ping(self) -> None:
        self.socket.send(b"x")
        self.socket.recv()

    def end(self) -> None:
        super().end()
        self.socket.close(linger=0)
        self.folder.cleanup()


class FasterFifo(Two):
    name, what = "faster-fifo", "two of faster_fifo.Queue"
    package, module = "faster-fifo", "faster_fifo"

    def kind(self) -> Any:
        return self.library.Queue(max_size_bytes=65536)


class _Iceoryx2(Peer):
    package, module = "iceoryx2", "iceoryx2"

    def make(self) -> None:
        self.service = f"shmipi/{_unused()}"
        self.library.set_log_level(self.library.LogLevel.Fatal)

    def begin(self) -> None:
        super().begin()
        self.out, self.into = self.open("there", "back")
        time.sleep(0.3)  # until the other end has opened them too

    def pong(self) -> None:
        self.out, self.into = self.open("back", "there")
        super().pong()

    def node(self) -> Any:
        """Make this process known."""
        self.kept = self.library.NodeBuilder.new().create(self.library.ServiceType.Ipc)
        return self.kept

    def named(self, way: str) -> Any:
        """Return the name of one direction."""
        return self.library.ServiceName.new(f"{self.service}/{way}")

    def open(self, out: str, into: str) -> tuple[Any, Any]:
        """Open both directions."""
        raise NotImplementedError


class Iceoryx2Event(_Iceoryx2):
    name, what = "iceoryx2 event", "iceoryx2: notifier and listener, both ways"

    def open(self, out: str, into: str) -> tuple[Any, Any]:
        node = self.node()
        there = node.service_builder(self.named(out)).event().open_or_create()
        back = node.service_builder(self.named(into)).event().open_or_create()
        self.services = there, back
        return there.notifier_builder().create(), back.listener_builder().create()

    def ping(self) -> None:
        self.out.notify()
        while not self.into.timed_wait(self.library.Duration.from_secs(5)):
            pass

    def answer(self) -> None:
        if self.into.timed_wait(self.library.Duration.from_secs(5)):
            self.out.notify()


class Iceoryx2PubSub(_Iceoryx2):
    name = "iceoryx2 pubsub"
    polls = True
    what = "iceoryx2: publisher and subscriber, both ways, polled: nobody sleeps"

    def open(self, out: str, into: str) -> tuple[Any, Any]:
        node, kind = self.node(), ctypes.c_uint64
        there = node.service_builder(self.named(out)).publish_subscribe(kind)
        back = node.service_builder(self.named(into)).publish_subscribe(kind)
        self.services = there.open_or_create(), back.open_or_create()
        return (
            self.services[0].publisher_builder().create(),
            self.services[1].subscriber_builder().create(),
        )

    def ping(self) -> None:
        self.out.send_copy(ctypes.c_uint64(1))
        while self.into.receive() is None:
            pass

    def answer(self) -> None:
        while self.into.receive() is None:
            pass
        self.out.send_copy(ctypes.c_uint64(1))


class Mpi(Peer):
    name = "mpi4py"
    what = "two ranks under mpiexec: Send and Recv of one byte, polled: nobody sleeps"
    package, module = "mpi4py", "mpi4py.MPI"
    polls = True

    def make(self) -> None:
        self.world = self.library.COMM_WORLD
        self.byte = bytearray(1)

    def begin(self) -> None:
        if self.world.Get_rank():
            os.sched_setaffinity(0, {self.core})
            gc.disable()
            while True:
                self.world.Recv(self.byte, source=0)
                if self.byte[0]:
                    sys.exit(0)
                self.world.Send(self.byte, dest=0)
        elif self.world.Get_size() != 2:
            raise RuntimeError("mpiexec started no two ranks")

    def ping(self) -> None:
        self.world.Send(self.byte, dest=1)
        self.world.Recv(self.byte, source=1)

    def end(self) -> None:
        self.byte[0] = 1
        self.world.Send(self.byte, dest=1)


#: Every peer by its name, the standard library's first.
PEERS: Final[dict[str, type[Peer]]] = {
    peer.name: peer
    for peer in (
        *(Pipe, SimpleQueue, Queue, Semaphore, ThreadQueue, ThreadSemaphore),
        *(PosixSemaphore, PosixQueue, Eventfd, Signal, Pool),
        *(Zmq, Iceoryx2Event, Iceoryx2PubSub, Mpi, FasterFifo),
    )
}


def _unused() -> str:
    return f"shmipi.peer.{os.getpid()}.{secrets.token_hex(4)}"


def _pinned(core: int) -> None:
    os.sched_setaffinity(0, {core})
    gc.disable()


def _trips(ping: Callable[[], None], calls: int, warmup: int, gap_ns: int) -> list[int]:
    """Clock so many round trips, with a pause before each."""
    clock = time.perf_counter_ns
    found = []
    for number in range(-warmup, calls):
        end = clock() + gap_ns
        while clock() < end:
            pass
        start = clock()
        ping()
        took = clock() - start
        if number >= 0:
            found.append(took)
    return found


def main(name: str, first: int, second: int) -> int:
    """Serve one peer until standard input ends."""
    os.sched_setaffinity(0, {first})
    collections = [0]
    gc.callbacks.append(
        lambda phase, info: collections.__setitem__(
            0, collections[0] + (phase == "start")
        )
    )
    kind = PEERS[name]
    try:
        peer = kind(second)
        peer.begin()
    except Exception as error:
        print(json.dumps({"unavailable": f"{type(error).__name__}: {error}"}))
        return 0
    gc.collect()
    gc.disable()
    told = {"version": version(kind.package) if kind.package else None}
    print(json.dumps(told), flush=True)
    for line in sys.stdin:
        calls, warmup, gap_ns = map(int, line.split())
        before = collections[0]
        found = _trips(peer.ping, calls, warmup, gap_ns)
        answer = {
            "ns": found,
            "collections": collections[0] - before,
            "moved": os.sched_getaffinity(0) != {first},
        }
        print(json.dumps(answer), flush=True)
    peer.end()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
