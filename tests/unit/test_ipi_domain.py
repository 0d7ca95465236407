"""irq domains without a machine: descriptions, mappings, who sends for whom."""

import errno
import pickle
from types import SimpleNamespace

import pytest

from shmipi.cpumask import CpuMask
from shmipi.errors import ControllerError, DeviceTreeError, IrqError
from shmipi.irq import (
    INVALID_HWIRQ,
    IpiMapping,
    IrqChip,
    IrqData,
    IrqDesc,
    IrqDomainFlags,
    IrqFlags,
    __ipi_send_mask,
    __ipi_send_single,
    irq_chip_send_ipi,
    irq_desc_send_ipi,
)
from shmipi.irq.chips import CHIPS
from shmipi.irq.of import DomainNode, check_tree, parse_tree, root_name

TEXT = """
/* two IPI controllers
   and a device */
fast {
    compatible = "shmipi,ipi-per-cpu";
    interrupt-parent = <&root>;     // the controller
    reserved-ipi-vectors = <0x40 16 96 4>;
    shmipi,default;
};
sub { compatible = "shmipi,ipi";
      interrupt-parent = &fast; mti,reserved-ipi-vectors = <64 2>; };
timer { compatible = "shmipi,ppi"; }
"""
DICT = {
    "fast": {
        "compatible": "shmipi,ipi-per-cpu",
        "interrupt-parent": "root",
        "reserved-ipi-vectors": [0x40, 16, 96, 4],
        "shmipi,default": True,
    },
    "sub": {
        "compatible": "shmipi,ipi",
        "interrupt-parent": "fast",
        "mti,reserved-ipi-vectors": (64, 2),
    },
    "timer": {"compatible": "shmipi,ppi"},
}


# ---- descriptions --------------------------------------------------------------------


def test_text_and_dict_say_the_same():
    fast = frozenset([*range(64, 80), *range(96, 100)])
    nodes = (
        DomainNode("fast", "block", None, fast, True),
        DomainNode("sub", "", "fast", frozenset([64, 65])),
        DomainNode("timer", "none"),
    )
    assert parse_tree(DICT) == nodes
    assert parse_tree(TEXT) == nodes
    assert parse_tree(None) == parse_tree("") == parse_tree({}) == ()


@pytest.mark.parametrize(
    ("text", "says", "node"),
    [
        ('a { compatible = "shmipi,gic"; };', "compatible is 'shmipi,gic'", "a"),
        ("a { };", "compatible is None", "a"),
        ('a { compatible = "shmipi,ipi"; colour = "red"; };', "'colour'", "a"),
        ('a { compatible = "shmipi,ipi"; interrupt-parent = <1>; };', "parent is", "a"),
        (
            'a { compatible = "shmipi,ipi"; reserved-ipi-vectors = <1 2 3>; };',
            "pairs",
            "a",
        ),
        (
            'a { compatible = "shmipi,ipi"; reserved-ipi-vectors = <1 0>; };',
            "pairs",
            "a",
        ),
        (
            'a { compatible = "shmipi,ipi"; reserved-ipi-vectors = <1 99999>; };',
            "no controller has",
            "a",
        ),
        (
            'a { compatible = "shmipi,ipi"; reserved-ipi-vectors = "1 2"; };',
            "is cells",
            "a",
        ),
        ('a { compatible = "shmipi,ipi" };', "} stands where ; belongs", "a"),
        ('a { compatible = "shmipi,ipi";', "the text ends", "a"),
        ("a { compatible = shmipi; };", "shmipi is no value", "a"),
        ("a { x = <b>; };", "b is no number", "a"),
        ("a { }; a { };", "two nodes", "a"),
        ("7 { };", "7 stands where a node's name belongs", None),
        ("a {\n ? };", "line 2: '?'", None),
    ],
)
def test_descriptions_that_cannot_be(text, says, node):
    with pytest.raises(DeviceTreeError) as caught:
        parse_tree(text)
    assert says in str(caught.value)
    assert caught.value.node == node
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", ["", "x" * 32, "a\nb"])
def test_names_that_cannot_be(name):
    with pytest.raises(DeviceTreeError, match="1 to 31"):
        parse_tree({name: {"compatible": "shmipi,ipi"}})


def test_a_description_of_another_kind_is_a_type_error():
    with pytest.raises(TypeError, match="domains is 3"):
        parse_tree(3)
    with pytest.raises(DeviceTreeError, match="a node is a dict"):
        parse_tree({"a": "shmipi,ipi"})


@pytest.mark.parametrize(
    ("nodes", "says"),
    [
        ([DomainNode("a", parent="b")], "a: interrupt-parent b is no node above it"),
        ([DomainNode("b"), DomainNode("a", parent="b")], "has no reserved-ipi-vectors"),
        ([DomainNode("a", lines=frozenset([0xFD]))], "hwirq 253 is not apic's"),
        ([DomainNode("a", lines=frozenset([8]))], "hwirq 8 is not apic's"),
        (
            [
                DomainNode("a", lines=frozenset([64, 65])),
                DomainNode("b", lines=frozenset([65])),
            ],
            "b: hwirq 65 is not apic's to give",
        ),
        (
            [
                DomainNode("a", lines=frozenset([64])),
                DomainNode("b", parent="a", lines=frozenset([66])),
            ],
            "b: hwirq 66 is not a's to give",
        ),
        ([DomainNode("a"), DomainNode("a")], "a domain of this name already"),
        ([DomainNode("apic vector")], "a domain of this name already"),
        ([DomainNode("root")], "a domain of this name already"),
        (
            [DomainNode("a", default=True), DomainNode("b", default=True)],
            "a is the default already",
        ),
    ],
)
def test_trees_that_an_apic_cannot_have(nodes, says):
    with pytest.raises(DeviceTreeError) as caught:
        check_tree(nodes, CHIPS["apic"](), 2)
    assert says in str(caught.value)
    assert caught.value.node in {node.name for node in nodes}


def test_a_tree_that_an_apic_can_have():
    check_tree(parse_tree(TEXT), CHIPS["apic"](), 2)


def test_a_routed_controller_has_no_hwirq_for_all():
    chip = CHIPS["mips-gic"]()
    with pytest.raises(DeviceTreeError, match="interrupts one CPU"):
        check_tree([DomainNode("a", "single")], chip, 2)
    assert DomainNode("a").flags(chip) & IrqDomainFlags.IRQ_DOMAIN_FLAG_IPI_PER_CPU


def test_flags_have_the_kernels_values():
    assert IrqDomainFlags.IRQ_DOMAIN_FLAG_IPI_PER_CPU == 1 << 2
    assert IrqDomainFlags.IRQ_DOMAIN_FLAG_IPI_SINGLE == 1 << 3
    assert IrqFlags.IRQ_PER_CPU == 1 << 9
    assert IrqFlags.IRQ_NOREQUEST == 1 << 11
    assert IrqFlags.IRQ_NO_BALANCING == 1 << 13
    assert IrqFlags.IRQ_PER_CPU_DEVID == 1 << 17
    assert root_name(CHIPS["apic"]()) == "apic vector"


def test_an_error_survives_the_journey():
    error = IrqError("no", errno=errno.EBUSY, irq=5, domain="d", cpu=2)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.errno, copy.irq, copy.domain, copy.cpu) == (errno.EBUSY, 5, "d", 2)
    with pytest.raises(ValueError, match="8 CPUs, not 9") as caught:
        CHIPS["gicv2"]().for_cpus(9)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is ControllerError
    assert (copy.errno, copy.domain, copy.cpu) == (errno.EINVAL, "gicv2", 8)


# ---- mappings ------------------------------------------------------------------------


def test_one_hwirq_for_all():
    mapping = IpiMapping("single", 0, (64,))
    assert [mapping.hwirq(cpu) for cpu in (0, 3, 99)] == [64, 64, 64]
    assert mapping.nr_hwirqs == 1


def test_a_block_is_hwirq_base_plus_cpu_minus_offset():
    mapping = IpiMapping("block", 2, (64, 65, 66))
    assert (mapping.hwirq_base, mapping.cpu_offset, mapping.nr_hwirqs) == (64, 2, 3)
    for cpu in (2, 3, 4):
        assert mapping.hwirq(cpu) == mapping.hwirq_base + cpu - mapping.cpu_offset
    assert mapping.hwirq(1) == mapping.hwirq(5) == INVALID_HWIRQ


def test_a_cpumap_has_gaps():
    mapping = IpiMapping("cpumap", 1, (70, INVALID_HWIRQ, 64))
    assert [mapping.hwirq(cpu) for cpu in range(5)] == [
        INVALID_HWIRQ,
        70,
        INVALID_HWIRQ,
        64,
        INVALID_HWIRQ,
    ]
    assert mapping.nr_hwirqs == 2


# ---- who sends for whom --------------------------------------------------------------


class Table:
    """Just what sending asks of the machine's."""

    def __init__(self, mask="0-3", alive=True):
        self.mask, self.alive = CpuMask(mask), alive

    def cpus(self, mask):
        return CpuMask.of(mask)

    def affinity(self, virq):
        return self.mask

    def is_current(self, virq, epoch):
        return self.alive


def desc_of(chip, mapping=None, parent=None, flags=0, table=None):
    domain = SimpleNamespace(name="d", irq_chip=chip, parent=parent)
    mapping = mapping or IpiMapping("single", 0, (64,))
    return IrqDesc(
        table=table or Table(),
        irq=5,
        epoch=1,
        flags=IrqFlags(flags),
        domain=domain,
        hwirq=mapping.cpumap[0],
        ipi_base=5,
        ipi_nr=len(mapping.cpumap),
        ipi_offset=mapping.cpu_offset,
        name="",
        mapping=mapping,
    )


class Sent(list):
    """What was sent: (hwirq, CPUs)."""

    def mask(self, data, cpus):
        self.append((data.hwirq, str(cpus)))

    def single(self, data, cpu):
        self.append((data.hwirq, cpu))


def root(sent):
    chip = IrqChip("root", sent.mask, None, sent.mask)
    return SimpleNamespace(name="root", irq_chip=chip, parent=None)


def test_the_parent_sends_to_all_at_once_where_they_share_a_hwirq():
    sent = Sent()
    data = desc_of(IrqChip("d"), parent=root(sent)).irq_data
    irq_chip_send_ipi(data, CpuMask("0,2-3"))
    assert sent == [(64, "0,2-3")]


def test_the_parent_sends_to_each_by_its_hwirq_and_gaps_are_left_out():
    sent = Sent()
    mapping = IpiMapping("cpumap", 1, (70, INVALID_HWIRQ, 64))
    data = desc_of(IrqChip("d"), mapping, root(sent)).irq_data
    irq_chip_send_ipi(data, CpuMask("0-3"))
    assert sent == [(70, "1"), (64, "3")]


def test_a_domain_in_between_passes_it_on():
    sent = Sent()
    between = SimpleNamespace(
        name="b", irq_chip=IrqChip("b", irq_chip_send_ipi), parent=root(sent)
    )
    block = IpiMapping("block", 0, (64, 65))
    for mapping, got in (
        (None, [(64, "0-1")]),
        (block, [(64, "0"), (65, "1")]),
    ):
        sent.clear()
        irq_chip_send_ipi(
            desc_of(IrqChip("d"), mapping, between).irq_data, CpuMask("0-1")
        )
        assert sent == got


def test_a_parent_that_cannot_send_is_einval():
    parent = SimpleNamespace(name="p", irq_chip=IrqChip("p"), parent=None)
    for above in (parent, None):
        with pytest.raises(IrqError) as caught:
            irq_chip_send_ipi(
                desc_of(IrqChip("d"), parent=above).irq_data, CpuMask("0")
            )
        assert (caught.value.errno, caught.value.irq) == (errno.EINVAL, 5)


def test_unverified_sends_fall_back_on_the_operation_that_there_is():
    sent = Sent()
    masks = desc_of(IrqChip("d", None, None, sent.mask), table=Table("0", alive=False))
    __ipi_send_single(masks, 3)
    __ipi_send_mask(masks, "1-2")
    assert sent == [(64, "3"), (64, "1-2")]
    sent.clear()
    singles = desc_of(IrqChip("d", None, sent.single, None), table=Table("0"))
    __ipi_send_single(singles, 3)
    __ipi_send_mask(singles, "1-2")
    assert sent == [(64, 3), (64, 1), (64, 2)]


def test_a_mask_is_verified_but_not_of_a_global_ipi():
    sent = Sent()
    chip = IrqChip("d", sent.mask)
    with pytest.raises(IrqError) as caught:
        irq_desc_send_ipi(desc_of(chip), "2-5")
    error = caught.value
    assert (error.errno, error.irq, error.domain, error.cpu) == (
        errno.EINVAL,
        5,
        "d",
        4,
    )
    irq_desc_send_ipi(desc_of(chip, flags=IrqFlags.IRQD_GLOBAL_IPI), "2-5")
    irq_desc_send_ipi(desc_of(chip), "2-3")
    irq_desc_send_ipi(desc_of(chip), ())
    assert sent == [(64, "2-5"), (64, "2-3"), (64, "")]


def test_a_chip_without_send_ipi_is_einval():
    for flags in (0, IrqFlags.IRQD_GLOBAL_IPI):
        with pytest.raises(IrqError, match="no send_ipi") as caught:
            irq_desc_send_ipi(desc_of(IrqChip("d"), flags=flags), "0")
        assert caught.value.errno == errno.EINVAL


def test_a_stale_descriptor_is_refused_and_by_the_fast_path_not():
    sent = Sent()
    desc = desc_of(IrqChip("d", sent.mask, None, sent.mask), table=Table(alive=False))
    with pytest.raises(IrqError, match="was destroyed"):
        irq_desc_send_ipi(desc, "0")
    assert sent == []
    __ipi_send_mask(desc, "0")
    assert sent == [(64, "0")]


def test_irq_data_leads_to_the_root():
    sent = Sent()
    data = desc_of(IrqChip("d"), parent=root(sent)).irq_data
    assert data.parent.domain.name == "root"
    assert data.parent is not None
    assert isinstance(data.parent_data, IrqData)
    assert (data.parent.irq, data.parent.hwirq) == (5, 64)
    assert data.parent.parent is None
