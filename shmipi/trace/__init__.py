"""What a machine counts and records, and the views of it."""

from shmipi.trace.events import TraceEvent

__all__ = ["TraceEvent"]
