"""What travels with a function, and when again: what the host sees is what runs."""

import gc
import os
import pickle
import struct
import subprocess
import threading
import time
import weakref

import pytest

from shmipi import (
    ArenaFullError,
    Cluster,
    FunctionTableFullError,
    _core,
    atomic,
    smp,
)

# ---- what is assigned on the host is what runs ---------------------------------------


def test_changed_globals_helpers_attributes_and_classes_travel(script):
    """Each was sent once, and stayed as it was then."""
    done = script(
        """
        from shmipi import Cluster

        COUNT = 1
        def helper(): return "old"
        def with_default(x=1): return x
        def outer(f):
            def inner(*args): return f(*args)
            return inner
        decorated = outer(with_default)
        class Kind:
            v = 1
            def method(self, x=1): return x, COUNT
        class Derived(Kind): pass
        kept = Kind()

        def f(): return COUNT, helper(), f.tag, with_default(), decorated()
        f.tag = "old"
        def k(): return Kind.v, kept.v, Derived().method(), Derived.v
        def builtin(): return len("abc")
        def missing(): return not_there

        with Cluster(2, idle="halt") as cluster:
            def check(what):
                for function in (f, k, builtin):
                    here = function()
                    for way in (cluster.call, lambda *a: cluster.submit(*a).result()):
                        for cpu in (0, 1):
                            there = way(cpu, function)
                            assert there == here, (what, function, there, here)
                    assert cluster.run(function) == [here] * 2, (what, function)
                    assert cluster.call(1, lambda: function()) == here, (what, "nested")

            check("first")
            COUNT = 2
            check("a global")
            def helper(): return "new"
            check("a helper that is defined anew")
            f.tag = "new"
            check("an attribute")
            f.more = 1; del f.more
            check("an attribute that came and went")
            Kind.v = 2
            check("a class attribute")
            Derived.v = 3
            check("one that hides the base's")
            del Derived.v
            check("and goes again")
            Kind.method = lambda self: "new"
            check("a method")
            kept = Derived()
            check("an instance")
            with_default.__defaults__ = (5,)
            check("a default of a helper, also behind a decorator")
            def len(x): return "not the builtin"
            check("a global that hides a builtin")
            del len
            check("and goes again")
            COUNT = [COUNT]
            check("another type")
            one, two, Kind.v = COUNT, 22, 1
            COUNT = two
            assert cluster.call(1, lambda: (COUNT, Kind.v)) == (22, 1)
            COUNT, Kind.v = one, 2
            check("what was there before, while another function was sent")
            f.__name__ = "other"
            assert cluster.call(1, lambda: f.__name__) == "other"
            for _ in range(2):
                try:
                    cluster.call(1, missing)
                except Exception as error:
                    assert type(error.__cause__) is NameError, error
                else:
                    raise AssertionError
            not_there = "now it is"
            assert cluster.call(1, missing) == "now it is"
            del not_there
            try:
                cluster.call(1, missing)
            except Exception as error:
                assert type(error.__cause__) is NameError, error
            else:
                raise AssertionError
            print("same")
        """
    )
    assert done.text == "same\n"


def test_functions_of_main_share_their_globals_on_a_cpu(script):
    done = script(
        """
        import pickle, sys
        from shmipi import Cluster, smp

        n = 0
        K = 1
        class Point:
            made = 0
            def __init__(self, x):
                self.x = x
                Point.made += 1
            def twice(self): return 2 * self.x * K
        def bump():
            global n
            n += 1
            return n
        def peek(): return n
        def by_name(p): return pickle.loads(pickle.dumps(p)).x, isinstance(p, Point)
        def show(info): global shown; shown = n
        def seen(): return shown
        def tell(cpu): smp.smp_call_function_single(cpu, show, None, True)

        with Cluster(2, idle="halt") as cluster:
            # A CPU sees its own assignments at the next call, in every function.
            print([cluster.call(1, bump) for _ in range(3)], cluster.call(1, peek))
            print(cluster.call(1, lambda: n), cluster.call(0, peek), n)
            # What the host did not assign is not undone when a function is sent again.
            K = 2
            print(cluster.call(1, lambda: (n, K)))
            bump.tag = 1
            print(cluster.call(1, bump))
            # What it assigned is.
            n = 10
            print([cluster.call(1, x) for x in (peek, bump, peek)], n)
            # One class on a CPU for one of the host.
            p = Point(3)
            print(cluster.call(1, by_name, p), type(cluster.call(1, Point, 4)) is Point)
            made = lambda: Point(1).made
            print([cluster.call(1, made) for _ in range(2)], Point.made)
            print(cluster.call(1, Point.twice, p), p.twice())
            print(cluster.call(1, lambda: sys.modules["__main__"].Point is Point))
            # What comes back changes nothing here.
            back = cluster.call(1, lambda: bump)
            print(back() == back() - 1, n, Point.made, Point(2).twice(), K)
            # A CPU sends what it has assigned, as the host does. The host's 10 is news
            # to CPU 0, and no longer to CPU 1.
            print(cluster.run(tell, 0, cpus=[1]), cluster.call(0, seen))
            print(cluster.call(0, peek), cluster.call(1, peek))
        """
    )
    assert done.text.splitlines() == [
        "[1, 2, 3] 3",
        "3 0 0",
        "(3, 2)",
        "4",
        "[10, 11, 11] 10",
        "(3, True) True",
        "[3, 4] 1",
        "12 12",
        "True",
        "True 10 1 8 2",
        "[None] 11",
        "10 11",
    ]


def test_hosts_of_one_machine_have_a_main_module_each(script):
    """Their functions and globals may have the same names on the same CPU."""
    other = script(
        """
        import sys
        from shmipi import Cluster

        def helper(): return "the other's"
        def f(): return helper(), n

        n = 0
        cluster = Cluster.attach(sys.stdin.readline().strip())
        with cluster:
            for line in sys.stdin:
                n += 1
                print(cluster.call(0, f), flush=True)
        """,
        wait=False,
        stdin=subprocess.PIPE,
    )
    done = script(
        """
        import sys
        from shmipi import Cluster

        n = 100
        def helper(): return "the first's"
        def f(): return helper(), n

        with Cluster(1, idle="halt") as cluster:
            print(cluster.name, flush=True)
            for line in sys.stdin:
                n += 1
                print(cluster.call(0, f), flush=True)
        """,
        wait=False,
        stdin=subprocess.PIPE,
    )
    name = done.stdout.readline()
    other.stdin.write(name)
    for n in range(1, 4):
        answers = ("the first's", 100 + n), ("the other's", n)
        for host, answer in zip((done, other), answers, strict=True):
            host.stdin.write("\n")
            host.stdin.flush()
            assert host.stdout.readline() == f"{answer}\n"
    for host in (other, done):
        host.stdin.close()
        assert host.wait(10) == 0


def test_what_unpickling_runs_finds_its_globals(script):
    """A class or an object may be made by code that uses them, in any order."""
    done = script(
        """
        import pickle
        from shmipi import Cluster

        class Base:
            names = []
            def __init_subclass__(cls):
                Base.names.append(PREFIX + cls.__name__)
        class Made:
            def __setstate__(self, state): self.tag = helper(state)
            def __getstate__(self): return "state"
        class Remade:
            def __init__(self, x): self.x = helper(x), Made.__name__
            def __reduce__(self): return Remade, (1,)
        def helper(x): return PREFIX, x, Base.__name__
        PREFIX = "a "
        class Derived(Base): pass
        a, b = Made(), Remade(1)
        def f(): return Derived.__name__, "a Derived" in Base.names, a.tag, b.x
        a.tag = helper("state")

        with Cluster(2, idle="halt") as cluster:
            print(cluster.call(1, f) == f(), cluster.call(0, lambda x: x.x, b) == b.x)
            print(type(cluster.call(1, lambda: b)) is Remade)
        """
    )
    assert done.text.splitlines() == ["True True", "True"]


def test_functions_that_are_defined_anew_as_in_a_notebook(script):
    """Cells are run with exec in the dict of ``__main__``, or of no module at all."""
    done = script(
        """
        import __main__
        from shmipi import Cluster

        def notebook(space):
            def cell(text): exec(text, space)
            cell("FACTOR = 2")
            cell("def helper(x): return x * FACTOR")
            cell("def f(x): return helper(x) + 1")
            cell("class Kind:\\n    def get(self): return FACTOR")
            cell("def k(): return Kind().get(), isinstance(Kind(), Kind)")
            answers = []
            for text in (
                "pass",
                "FACTOR = 3",
                "def helper(x): return x - FACTOR",
                "def f(x): return helper(x), 'new'",
                "class Kind:\\n    def get(self): return 'new', FACTOR",
                "FACTOR = 4",
                "old = f\\ndef g(x): return old(x), FACTOR",
                "f = g; helper = abs",
            ):
                cell(text)
                for name, args in (("f", (5,)), ("k", ())):
                    here = space[name](*args)
                    there = cluster.call(1, space[name], *args)
                    assert here == there, (text, here, there)
                    answers.append(there)
            return answers

        with Cluster(2, idle="halt") as cluster:
            mine = notebook(__main__.__dict__)
            print(mine == notebook({}) == notebook({"__name__": "no.module"}), mine[-2])
        """
    )
    assert done.text == "True ((5, 'new'), 4)\n"


def test_what_pickles_as_a_name_travels_where_no_import_leads_to_it(script):
    """Each was looked up in the CPU's ``__main__``, which has no such thing."""
    done = script(
        """
        import functools, sys, typing
        from shmipi import Cluster

        Number = typing.NewType("Number", int)
        P = typing.ParamSpec("P")
        Ts = typing.TypeVarTuple("Ts")
        OFFSET = 1

        def decorator(function: typing.Callable[P, int]) -> typing.Callable[P, int]:
            @functools.wraps(function)
            def inner(*args: P.args, **kwargs: P.kwargs) -> int:
                return function(*args, **kwargs)
            inner.__annotations__ = {"args": P.args, "kwargs": P.kwargs}
            return inner

        @decorator
        def several(*args: typing.Unpack[Ts]) -> int:
            return len(args) + OFFSET

        if sys.version_info >= (3, 12):
            exec("type Alias = int | None\\ndef aliased(x: Alias) -> Alias: return x")
        else:
            aliased = int

        @functools.lru_cache
        def fib(n: Number) -> Number:
            return n if n < 2 else fib(n - 1) + fib(n - 2)

        class Kind:
            @functools.lru_cache(maxsize=3)
            def get(self, x):
                return x + OFFSET

        def typed(n: Number) -> Number: return Number(n + 1)
        def use(): return fib(30), Kind().get(4), Kind.get.cache_parameters()
        def called(): return fib.cache_info().misses

        with Cluster(1, idle="halt") as cluster:
            print(cluster.call(0, typed, 1), cluster.call(0, fib, 20))
            print(cluster.call(0, several, 1, 2), cluster.call(0, aliased, 3))
            print(cluster.call(0, use), cluster.call(0, called))
            OFFSET = 2
            Kind.get = functools.cache(lambda self, x: x * OFFSET)
            print(cluster.call(0, use), cluster.call(0, called))
            print(cluster.call(0, functools.cache(len), "abc"))
        """
    )
    assert done.text.splitlines() == [
        "2 6765",
        "3 3",
        "(832040, 5, {'maxsize': 3, 'typed': False}) 31",
        "(832040, 8, {'maxsize': None, 'typed': False}) 31",
        "3",
    ]


def test_content_that_changes_in_place_travels_with_what_is_sent_next(script):
    """It is not noticed by itself; the remedies that the README names."""
    done = script(
        """
        from shmipi import Cluster

        TABLE = {"a": 1}
        def f(): return TABLE["a"]

        with Cluster(2, idle="halt") as cluster:
            print(cluster.call(1, f))
            TABLE["a"] = 2
            print(cluster.call(1, lambda: TABLE["a"]), cluster.call(1, f))
            TABLE["a"] = 3
            TABLE = dict(TABLE)
            print(cluster.call(1, f))
        """
    )
    assert done.text.splitlines() == ["1", "2 2", "3"]


def test_random_changes_are_seen_by_every_cpu_as_they_are_here(script):
    done = script(
        """
        import random, time
        from shmipi import Cluster

        seed = random.randrange(10**6)
        rng = random.Random(seed)

        A = B = C = 0
        def h1(x=0, *, k=0): return ("h1", A, x, k)
        def h2(): return ("h2", B, h1(), getattr(h2, "tag", None))
        class Base:
            v = 0
            def get(self): return (C, type(self).__name__, self.v)
        class Sub(Base):
            def more(self): return super().get(), h1()
        one = Sub()
        def make():
            x, y = 0, h1
            def closure(d=0): return (x, y(), d, B)
            def set_cells(new_x, new_y):
                nonlocal x, y
                x, y = new_x, new_y
            return closure, set_cells
        closure, set_cells = make()
        def f(): return (A, h1(), h2())
        def g(): return (one.get(), Sub().more(), Sub.v, Base.v)
        def top(): return (f(), g(), closure())
        functions = [f, g, top, closure, h1, h2, Sub.more]

        def value():
            return rng.choice([rng.randrange(3), str(rng.randrange(3)), [1], None, 2.5,
                               (1, 2), 10**6])

        def change():
            global A, B, C, h1, h2, one, f
            what = rng.randrange(14)
            if what == 0: A = value()
            elif what == 1: B = value()
            elif what == 2: C = value()
            elif what == 3: h1.__defaults__ = (value(),)
            elif what == 4: h1.__kwdefaults__ = {"k": value()}
            elif what == 5: h2.tag = value()
            elif what == 6: h2.__dict__.pop("tag", None)
            elif what == 7: Base.v = value()
            elif what == 8: Sub.v = value()
            elif what == 9: "v" in vars(Sub) and delattr(Sub, "v")
            elif what == 10: set_cells(value(), rng.choice([h1, h2]))
            elif what == 11: closure.__defaults__ = (value(),)
            elif what == 12:
                n = rng.randrange(100)
                def h1(x=n, *, k=0): return ("new h1", n, A, x, k)
            elif what == 13:
                one = Sub()
                one.v = value()

        with Cluster(3, idle="halt") as cluster:
            rounds = 0
            while rounds < 300:
                for _ in range(rng.randrange(3)):
                    change()
                rounds += 1
                function = rng.choice(functions)
                args = (one,) if function is Sub.more else ()
                here = function(*args)
                cpu, how = rng.randrange(3), rng.randrange(4)
                if how == 0:
                    there = cluster.call(cpu, function, *args)
                elif how == 1:
                    there = cluster.submit(cpu, function, *args).result()
                elif how == 2:
                    there = cluster.run(function, *args, cpus=[cpu])[0]
                else:
                    there = cluster.call(cpu, lambda: function(*args))
                assert there == here, (seed, rounds, function, there, here)
            print("same")
        """,
    )
    assert done.text == "same\n"


def test_a_queued_call_runs_with_what_its_closure_held_when_it_was_sent(cluster):
    """Also where a later one, with something else, overtakes it."""
    got = cluster.shared("queued", "i8", 8)
    got[:] = 0
    go = cluster.shared("queued-go", "i8", 1)
    go[0] = 0
    x = 1

    def f(_):
        got[int(atomic.fetch_add(got, 0, 1)) + 1] = x

    def block():
        while not go[0]:
            time.sleep(0.001)

    first = cluster.submit(1, block)
    cluster.smp.smp_call_function_single(1, f, None, False)
    x = 2
    cluster.smp.smp_call_function_single(1, f, None, False)
    x = 3
    last = cluster.submit(1, f, None)
    go[0] = 1
    first.result(10), last.result(10)
    cluster.call(1, int)
    assert sorted(got[1:4].tolist()) == [1, 2, 3]


# ---- publishing runs Python code -----------------------------------------------------


def test_a_change_during_pickling_is_not_lost(cluster, background):
    """Another thread pickles the old state while this one assigns and calls."""
    started, go = threading.Event(), threading.Event()

    class Slow:
        def __reduce__(self):
            started.set()
            go.wait(5)
            return int, (1,)

    x = 0

    def f():
        return x

    assert cluster.call(1, f) == 0
    x = Slow()
    other = background(cluster.call, 1, f)
    assert started.wait(5)
    x = 2
    assert cluster.call(1, f) == 2
    go.set()
    assert other.end() in (1, 2)
    assert [cluster.call(1, f) for _ in range(3)] == [2] * 3


def test_a_change_by_pickling_itself_is_not_lost(cluster):
    class Evil:
        def __reduce__(self):
            nonlocal x
            x = 20
            return int, (10,)

    x = 0

    def f():
        return x

    assert cluster.call(1, f) == 0
    x = Evil()
    assert cluster.call(1, f) in (10, 20)
    assert [cluster.call(1, f) for _ in range(2)] == [20, 20]


def test_what_changes_at_each_pickling_is_sent_all_the_same(cluster):
    count = 0

    class Restless:
        def __reduce__(self):
            nonlocal count, x
            count += 1
            x = Restless()
            return int, (count,)

    x = Restless()

    def f():
        return x

    answers = [cluster.call(1, f) for _ in range(4)]
    assert sorted(set(answers)) == answers


def test_a_finalizer_during_republishing_does_not_change_what_runs(cluster):
    """It calls the function itself, and gives its number to another one."""
    others = []
    inner = []

    class Last:
        armed = True

        def __reduce__(self):
            return int, ()

        def __del__(self):
            nonlocal x
            if Last.armed:
                Last.armed = False
                x = [2]
                inner.append(cluster.call(1, f, "inner"))
                others.append(lambda a: ("another function", a))
                inner.append(cluster.call(1, others[0], 0))

    x = 0

    def f(a):
        return "f", a, x

    for how in ("call", "single", "submit"):
        Last.armed = True
        others.clear()
        inner.clear()
        x = [Last()]
        assert cluster.call(1, f, 0) == ("f", 0, [0])
        x = [1]  # the last reference to the old list is what was kept of it
        if how == "single":
            cluster.smp.smp_call_function_single(1, f, "outer")
        elif how == "call":
            assert cluster.call(1, f, "outer")[:2] == ("f", "outer")
        else:
            assert cluster.submit(1, f, "outer").result(10)[:2] == ("f", "outer")
        assert inner == [("f", "inner", [2]), ("another function", 0)]


def test_the_collector_may_run_such_a_finalizer_anywhere(boot):
    """Memory is allocated all along publishing, and each time it may start."""
    cluster = boot(2, idle="halt")
    busy, others, wrong = [], [], []

    class Box:
        def __init__(self, v):
            self.v = v

        def __reduce__(self):
            if not busy:
                Circle()
            return int, (self.v,)

    class Circle:
        def __init__(self):
            self.me = self

        def __del__(self):
            if busy:
                return
            busy.append(1)
            try:
                if cluster.call(1, f, "inner")[0] != "f":
                    wrong.append("inner")
                others.append(lambda a: ("another", a))
                cluster.call(1, others[-1], 0)
                del others[:-25]
            finally:
                busy.clear()

    x = y = Box(0)

    def f(a):
        return "f", a, x, y

    cluster.call(1, f, 0)
    old = gc.get_threshold()
    gc.set_threshold(5, 1000, 1000)
    try:
        for k in range(150):
            x = Box(k)
            y = Box(k)
            assert cluster.call(1, f, k) == ("f", k, k, k)
    finally:
        gc.set_threshold(*old)
        busy.append(1)  # the rest of them end without a call
        gc.collect()
    assert not wrong


# ---- the handlers of irqs and NMIs ---------------------------------------------------


@pytest.mark.parametrize("gone", [False, True], ids=["republished", "dropped"])
def test_a_requested_irqs_handler_keeps_its_number(boot, gone):
    cluster = boot(3, idle="halt")
    hits = cluster.shared("hits", "i8", 3)
    x = 0

    def handler(virq, dev_id):
        atomic.fetch_add(hits, smp.smp_processor_id(), 1)
        return x

    virq = cluster.irq.irq_reserve_ipi(None, "all")
    cluster.irq.request_percpu_irq(virq, handler, "mine", 0)
    cluster.irq.enable_percpu_irq_mask(virq)
    cluster.irq.ipi_send_mask(virq, "0")
    cluster.run(int)
    assert hits.tolist() == [1, 0, 0]
    x = 1
    published = cluster.irq._requested[virq][1]
    cluster.smp.smp_call_function_single(0, published, virq)
    if gone:
        cluster.irq._requested.clear()
        del handler, published
        gc.collect()
    for n in range(20):  # they take numbers that are free, and CPU 0 forgets dead ones
        cluster.call(0, eval(f"lambda: {n}"))
    hits[:] = 0
    for _ in range(2):
        cluster.irq.ipi_send_mask(virq, "all")
        cluster.run(int)
    assert hits.tolist() == [2, 2, 2]
    counters = cluster.counters()
    assert not counters["unraisable"].any()
    assert not counters["irq_other"].any()


def test_an_irqs_number_is_given_back_with_the_irq(boot):
    cluster = boot(1, idle="halt")
    virq = cluster.irq.irq_reserve_ipi(None, "all")

    def published():
        return len({_number_of(cluster, eval("lambda: 0")) for _ in range(5)})

    for _ in range(50):

        def handler(*_):
            pass

        cluster.irq.request_percpu_irq(virq, handler, "mine", 0)
        cluster.smp.register_nmi_handler(smp.NMI_LOCAL, handler, 0, "mine")
        cluster.smp.unregister_nmi_handler(smp.NMI_LOCAL, "mine")
        cluster.irq.free_percpu_irq(virq, 0)
        del handler
    assert published() == 1
    assert _number_of(cluster, lambda: 1) < 10


def _number_of(cluster, function):
    """The number that a function gets: the first of the table that was free."""
    cluster.call(0, function)
    return int(_functions(cluster)[0].nonzero()[0].max())


def _functions(cluster):
    """The host's function table: serials, lengths, offsets."""
    import numpy as np

    memory = memoryview(cluster._machine)
    header = struct.Struct("<8sII64s 11Q 2I").unpack_from(memory, 0)
    region = header[7] + cluster.ncpus * header[8]
    table = np.frombuffer(cluster._machine, "u4", 64 * 8, region + header[9])
    table = table.reshape(64, 8)
    return table[:, 0], table[:, 1], table[:, 2], region + header[10]


def test_an_nmi_handler_keeps_its_number(boot, eventually):
    cluster = boot(2, idle="halt")
    nmis = cluster.shared("nmis", "i8", 2)
    x = 0

    def handler(*_):
        atomic.fetch_add(nmis, smp.smp_processor_id(), 1 + 0 * x)

    cluster.smp.register_nmi_handler(smp.NMI_LOCAL, handler, 0, "handler")
    x = 1
    cluster.smp.smp_call_function_single(0, handler, 0)
    del handler
    gc.collect()
    for n in range(20):
        cluster.call(0, eval(f"lambda: {n}"))
    nmis[:] = 0
    for cpu in range(2):
        cluster._machine.nmi_send(cpu)
    eventually(lambda: nmis.tolist() == [1, 1])
    assert not cluster.counters()["unraisable"].any()


# ---- memory --------------------------------------------------------------------------


class _Evil:
    def __reduce__(self):
        return exec, ("import shmipi; shmipi.shared('believed')[0] += 1",)


def test_a_functions_pickle_is_copied_before_it_is_checked(boot):
    """Who overwrites it after the check must not have it unpickled."""
    cluster = boot(1, idle="halt")
    believed = cluster.shared("believed", "i8", 1)
    cluster.call(0, int)
    evil = pickle.dumps(_Evil())
    memory = memoryview(cluster._machine)
    fields = {name: offset for name, offset, _ in _core.SLOT_FIELDS}
    header = struct.Struct("<8sII64s 11Q 2I").unpack_from(memory, 0)
    running = header[5] + fields["waiting_for"] + 12  # of CPU 0's slot
    for delay in (0.0003, 0.0006, 0.001, 0.0015, 0.002, 0.003):
        big = os.urandom(64) * 125_000

        def f(big=big):
            return len(big)

        outcome = []

        def call(f=f, outcome=outcome):
            try:
                outcome.append(cluster.call(0, f))
            except Exception as error:
                outcome.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        while thread.is_alive() and memory[running : running + 4] == bytes(4):
            pass
        end = time.perf_counter() + delay
        while time.perf_counter() < end:
            pass
        serials, lengths, offsets, arena = _functions(cluster)
        for serial, length, offset in zip(serials, lengths, offsets, strict=True):
            if serial and length > 7_000_000:
                at = arena + int(offset)
                memory[at : at + len(evil)] = evil
        thread.join(10)
        assert believed[0] == 0
        assert len(outcome) == 1
        del f, call, big, serials, lengths, offsets
    memory.release()


def test_a_closed_cluster_lets_go_of_its_functions(boot):
    class Content:
        pass

    def plain(a):
        return a

    references = []
    for _ in range(3):
        cluster = boot(1, idle="halt")
        content, table = Content(), [Content()]
        references += [weakref.ref(content), weakref.ref(table[0])]
        content.me = content

        def f(a=table, content=content):
            return content is None or a is None or plain(1)

        content.f = f
        assert cluster.call(0, f) == 1
        assert cluster.call(0, plain, 1) == 1
        cluster.smp.smp_call_function_single(0, plain, 1)
        assert cluster.submit(0, plain, 2).result(10) == 2
        references.append(weakref.ref(f))
        cluster.shutdown()
        assert weakref.getweakrefcount(plain) == 0
        del f, content, table
    gc.collect()
    assert [reference() for reference in references] == [None] * 9


def test_what_is_redefined_is_not_kept_by_what_was_sent(boot):
    """A function that its own globals lead back to ends when they are rebound."""
    cluster = boot(1, idle="halt")
    ended = []
    for _ in range(30):
        space = {"__name__": "nowhere"}
        exec("def f(): return len(ALL)", space)
        space["ALL"] = [space["f"]]
        assert cluster.call(0, space["f"]) == 1
        ended.append(weakref.ref(space["f"]))
        space["ALL"] = None
        del space
    for n in range(30):
        cluster.call(0, eval(f"lambda: {n}"))
    gc.collect()
    assert [reference() for reference in ended] == [None] * 30


def test_a_class_that_was_sent_ends_with_its_last_reference(boot):
    """And all that was noted of it, also where only the collector can end it."""
    cluster = boot(1, idle="halt")
    ended = []
    for _ in range(30):

        class Kind:
            __slots__ = ("__weakref__", "slot")

            def get(self):
                return __class__.__name__

            value = property(lambda self: 1)

        class Plain:
            value = property(lambda self: 1)

        for kind in (Kind, Plain):
            cluster.call(0, lambda kind: kind().value, kind)
            cluster.smp.smp_call_function_single(0, type, kind)
            cluster.submit(0, kind, 1)  # it takes no argument: all the same
            ended += [weakref.ref(kind), weakref.ref(kind.value.fget)]
        assert cluster.call(0, Kind.get, None) == "Kind"
        del kind, Kind, Plain
    cluster.call(0, int)
    gc.collect()
    assert [reference() for reference in ended] == [None] * 120


def test_too_many_functions_are_said_as_such(boot):
    cluster = boot(1, idle="halt")
    functions = [eval("lambda _: 0") for _ in range(16_384)]
    cluster.smp.smp_call_function_single(0, time.sleep, 0.0)
    for function in functions[:-1]:
        cluster.smp.smp_call_function_single(0, function)
    with pytest.raises(FunctionTableFullError, match=r"16384 functions.*argument"):
        cluster.smp.smp_call_function_single(0, functions[-1])
    assert issubclass(FunctionTableFullError, ArenaFullError)
    assert cluster.call(0, functions[0], 1) == 0
    del functions[1:], function
    assert cluster.call(0, lambda: 2) == 2


def test_functions_in_circles_do_not_fill_the_table(boot):
    cluster = boot(1, idle="halt")
    gc.disable()
    try:
        for n in range(200):

            def f(n=n):
                return n, f

            assert cluster.call(0, f)[0] == n
    finally:
        gc.enable()
    assert isinstance(cluster, Cluster)
