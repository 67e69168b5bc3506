"""A page server in a process of its own, which dies where it is told to: ``server.py JSON``.

Keys: ``journal``; ``vmm_pid`` to go on from it, or ``socket`` and ``memory`` to wait there for a handshake;
``beside``, ``offsets``, ``prefetch_bytes_max``: as in `vmd.pages.contract.Service`; ``death``: null, or a point
and how often it is passed first; ``refused``: null, or which copies are refused, as if a REMOVE were pending:
after so many so many.

Says ``listening`` when a VMM can connect, ``adopting`` before it looks for its VM, ``serving`` when it serves.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from array import array
from pathlib import Path
from typing import Any

from vmd.pages.contract import Beside, Death, Injection, Outcome, Service
from vmd.pages.handshake import Listener, receive
from vmd.pages.journal import Journal
from vmd.pages.native import NativeCore
from vmd.pages.source import Image

PR_SET_PDEATHSIG = 1


def service_of(request: dict[str, Any]) -> Service:
    """What to do beside demand, and when to die of it."""
    death, refused = request["death"], request["refused"]
    return Service(
        Beside(request["beside"]),
        array("Q", request["offsets"]),
        prefetch_bytes_max=request["prefetch_bytes_max"],
        injections=[Injection("copy", Outcome.LATER, refused[1], after=refused[0])] if refused else [],
        death=Death(death[0], death[1], real=True) if death else None,
    )


def wait_for_vmm(request: dict[str, Any]) -> NativeCore:
    """A core for the VMM that shakes hands."""
    image = Image(Path(request["memory"]))
    journal = Journal.create(Path(request["journal"]), image, "native")
    listener = Listener(Path(request["socket"]))
    print("listening", flush=True)
    handshake = receive(listener, image.size, os.eventfd(0), retry=False)
    assert handshake is not None
    listener.close()
    return NativeCore(handshake, image, service_of(request), journal)


def go_on(request: dict[str, Any]) -> NativeCore:
    """A core for the VMM of the journal."""
    print("adopting", flush=True)
    core = NativeCore.adopt(Path(request["journal"]), request["vmm_pid"], service_of(request))
    assert core is not None
    return core


def main() -> None:
    """See the module."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    request = json.loads(sys.argv[1])
    core = wait_for_vmm(request) if request["vmm_pid"] is None else go_on(request)
    core.start()
    print("serving", flush=True)
    print(core.join(), file=sys.stderr)  # never: it is killed


if __name__ == "__main__":
    main()
