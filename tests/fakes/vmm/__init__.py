"""A VMM without a guest: a process of its own that owns memory and faults on it when told to."""

from .driver import FakeVmm, Job, Span, eventually

__all__ = ["FakeVmm", "Job", "Span", "eventually"]
