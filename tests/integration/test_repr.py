"""What a machine's objects say of themselves."""

import numpy as np

from shmipi import TraceEvent, smp


def test_reprs_name_the_machine(boot):
    cluster = boot(2, name="lab-of-reprs")
    name = "Cluster 'lab-of-reprs'"
    assert repr(cluster.smp) == f"<smp of {name}>"
    assert repr(cluster.irq) == f"<irq of {name}>"
    assert repr(cluster.chip) == f"<Apic of {name}: {cluster.chip.description}>"

    def there():
        from shmipi import irq

        return repr(irq.irq()), repr(irq.chip())

    assert cluster.run(there, cpus=[1]) == [(repr(cluster.irq), repr(cluster.chip))]


def test_a_csd_says_whether_it_is_locked(boot):
    cluster = boot(2)
    csd = cluster.smp.CallSingleData(smp.NativeHandler("noop"))
    unlocked = "<CallSingleData func=NativeHandler('noop') locked=False>"
    assert repr(csd) == unlocked

    def hold(csd=None):
        smp.local_irq_disable()
        go[0] = 1
        while go[0] != 2:
            pass
        smp.local_irq_enable()

    go = cluster.shared("go", "i8", 1)
    task = cluster._machine.post(1, hold, (), None, True)
    while not go[0]:
        pass
    cluster.smp.smp_call_function_single_async(1, csd)
    assert repr(csd) == unlocked.replace("False", "True")
    go[0] = 2
    cluster._machine.collect(task, 1, 5.0)
    assert repr(csd) == unlocked
    cluster.shutdown()
    assert repr(csd) == unlocked


def test_trace_events_are_named_in_public(boot):
    cluster = boot(2, trace=True)
    cluster.call(1, int)
    records = cluster.trace_events()
    queued = records[records["event"] == TraceEvent.csd_queue_cpu]
    assert queued["slot"].tolist() == [cluster.ncpus]  # by the host
    assert queued["cpu"].tolist() == [1]
    names = {TraceEvent(number).name for number in np.unique(records["event"])}
    assert {"call_begin", "csd_function_entry", "csd_unlock"} <= names
