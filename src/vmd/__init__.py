"""vmd: Firecracker sandboxes that start before their memory has arrived.

The flow, in reading order; `docs/flow.md` tells it as a story:

=================  ======================================================================
`template`         1   image + kernel + boot recipe -> a booted, settled VM, frozen; build, list, remove
`snapshot`         2   freeze: vmstate, memory with its zero runs punched out, manifest
`recording`        3   access.log and the settle detector; `plot` draws one
`backend`          4   which backend serves a restore, and what its page server does beside demand
`restore`          4   thaw: the only long story, told in short steps
`pages`            5   page faults, the heart: contract, handshake, reference core, native core
`pager`            5'  the process that serves all sandboxes, its standby, what their journals say
`sandbox`          6   one sandbox: owns process, page server, directory; ask, kill
`demo`                 the whole flow on this host, measured
=================  ======================================================================

The rules that all of them obey: `errors`, `limits`, `states`, `settings`; `store` is what is on disk, `slots` how many
restores go on at once.
Machinery: `vmm` (Firecracker), `guest` (the built-in one), `host` (the doctor), `cli`.

Imports point one way (a house test keeps it so):
``cli -> demo -> sandbox -> template -> restore -> backend -> {pager, pages, vmm, snapshot, recording} -> store,
settings -> states, limits, errors``; ``pages`` never imports ``vmm``: it serves any Firecracker.
"""

from __future__ import annotations

# As type checkers know it. `typing` takes ten milliseconds, in which Ctrl-C would be a traceback (see `__main__`).
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .errors import VmdError as VmdError
    from .pages.server import PageServer as PageServer
    from .pages.server import serve_pages as serve_pages
    from .sandbox import Sandbox as Sandbox
    from .sandbox import create as create
    from .settings import Settings as Settings

__all__ = ["PageServer", "Sandbox", "Settings", "VmdError", "create", "serve_pages"]

_HOMES = {
    "PageServer": "pages.server",
    "Sandbox": "sandbox",
    "Settings": "settings",
    "VmdError": "errors",
    "create": "sandbox",
    "serve_pages": "pages.server",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: `vmd ls` must not pay for what it does not need."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
