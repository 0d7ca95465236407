"""Interrupt controllers, irq descriptors, IPI domains."""

from shmipi.irq.current import chip

__all__ = ["chip"]
