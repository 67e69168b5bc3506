"""The page server in plain Python: slow, obvious, and the oracle of the native one.

`core`: the fault thread; `memory`: page states and installs; `filler`: replay and sequential
prefetch; `tally`: counters. `crates/vmd-core` is the same in Rust.
"""

from .core import ReferenceCore

__all__ = ["ReferenceCore"]
