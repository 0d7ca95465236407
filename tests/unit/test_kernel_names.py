"""What a kernel developer looks for is there, or the README says why not."""

import inspect
from pathlib import Path

import pytest

from shmipi import irq, smp
from shmipi.irq.bound import BoundIrq
from shmipi.irq.chips import apic
from shmipi.smp import BoundSmp

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
DIFFERENCES = README.partition("## Differences from the kernel")[2].partition("\n## ")[
    0
]

SMP = [
    "cpu_online",
    "cpus_read_lock",
    "cpus_read_unlock",
    "csd_lock_is_stuck",
    "get_cpu",
    "put_cpu",
    "raw_smp_processor_id",
    "INIT_CSD",
    "flush_smp_call_function_queue",
    "resched_cpu",
    "kick_process",
    "need_resched",
    "register_nmi_handler",
    "unregister_nmi_handler",
    "smp_send_nmi_ipi",
    "smp_send_safe_nmi_ipi",
    "smp_send_reschedule",
    "open_softirq",
    "raise_softirq",
    "raise_softirq_irqoff",
    "local_bh_disable",
    "local_bh_enable",
    "local_softirq_pending",
    "in_softirq",
    "in_serving_softirq",
    "preempt_count",
    "preemptible",
    "might_sleep",
    "kstat_softirqs_cpu",
    "stop_machine",
    "stop_machine_cpuslocked",
    "stop_cpus",
    "stop_one_cpu",
    "stop_one_cpu_nowait",
    "stop_two_cpus",
    "irq_work",
    "irq_work_queue",
    "irq_work_queue_on",
    "irq_work_sync",
    "smp_call_function_any",
    "on_each_cpu_cond",
    "smp_call_on_cpu",
    "kick_all_cpus_sync",
    "wake_up_if_idle",
    "wake_up_all_idle_cpus",
    "cpus_peek_for_pending_ipi",
]
VARIABLES = ["cpu_online_mask", "nr_cpu_ids"]
IRQ = [
    "irq_find_mapping",
    "irq_get_irq_data",
    "request_percpu_nmi",
    "irq_percpu_is_enabled",
    "irq_create_mapping",
    "enable_percpu_irq",
    "disable_percpu_irq",
    "request_percpu_irq",
    "free_percpu_irq",
    "synchronize_irq",
    "synchronize_hardirq",
]
VALUES = {
    "IRQ_NONE": 0,
    "IRQ_HANDLED": 1,
    "IRQ_TYPE_NONE": 0,
    "IRQ_TYPE_EDGE_RISING": 1,
    "IRQ_TYPE_EDGE_FALLING": 2,
    "IRQ_TYPE_EDGE_BOTH": 3,
    "IRQ_TYPE_LEVEL_HIGH": 4,
    "IRQ_TYPE_LEVEL_LOW": 8,
    "IRQ_TYPE_SENSE_MASK": 15,
}
NMI = {
    "NMI_LOCAL": 0,
    "NMI_UNKNOWN": 1,
    "NMI_SERR": 2,
    "NMI_IO_CHECK": 3,
    "NMI_FLAG_FIRST": 1,
    "NMI_DONE": 0,
    "NMI_HANDLED": 1,
    "NMI_REASON_SERR": 0x80,
    "NMI_REASON_IOCHK": 0x40,
    "NMI_IPI_ALL_OTHERS": -2,
}
ABSENT = [
    "__smp_call_single_queue",
    "apic_send_nmi_to_offline_cpu",
]


@pytest.mark.parametrize("name", SMP)
def test_of_kernel_smp(name):
    assert name in smp.__all__
    assert callable(getattr(smp, name))
    bound = BoundSmp.__init__.__code__.co_names
    assert hasattr(BoundSmp, name) or name in bound, "of cluster.smp, too"


@pytest.mark.parametrize("name", VARIABLES)
def test_variables_of_the_kernel(name, cluster):
    assert name in dir(smp)
    assert isinstance(getattr(BoundSmp, name), property)
    assert getattr(smp, name) == getattr(cluster.smp, name)
    assert cluster.run(getattr, smp, name, cpus=[0]) == [getattr(smp, name)]


@pytest.mark.parametrize("name", IRQ)
def test_of_kernel_irq(name):
    assert name in irq.__all__
    assert callable(getattr(irq, name))
    assert hasattr(BoundIrq, name)


def test_values_are_the_kernels():
    assert {name: int(getattr(irq, name)) for name in VALUES} == VALUES
    assert set(VALUES) | {"irqd_to_hwirq"} <= set(irq.__all__)


def test_values_of_nmis_are_the_kernels():
    assert {name: getattr(smp, name) for name in NMI} == NMI
    assert set(NMI) <= set(smp.__all__)


def test_register_nmi_handler_takes_what_the_kernels_does():
    takes = inspect.signature(smp.register_nmi_handler).parameters
    assert list(takes)[:4] == ["type", "handler", "flags", "name"]
    assert list(inspect.signature(smp.unregister_nmi_handler).parameters)[:2] == [
        "type",
        "name",
    ]


@pytest.mark.parametrize("name", ["", "_mask", "_all", "_self", "_allbutself"])
def test_of_the_apic(name):
    assert f"__apic_send_IPI{name}" in apic.__all__
    assert callable(getattr(apic, f"__apic_send_IPI{name}"))
    assert callable(getattr(apic.Apic, f"__apic_send_IPI{name}"))


@pytest.mark.parametrize("name", ABSENT)
def test_what_is_not_there_has_its_reason(name):
    assert not hasattr(smp, name)
    assert not hasattr(apic.Apic, name)
    assert f"`{name}`" in DIFFERENCES
