"""Page servers that are killed, and those that take their place: `vmd pages serve --journal` and `vmd pages adopt`."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.fakes.vmm import FakeVmm
from tests.system.pages_serve.command import VMD, PageServer


class Adopter(PageServer):
    """One run of `vmd pages adopt`, seen from outside only."""

    def __init__(self, directory: Path, vmm_pid: int, journal: Path) -> None:
        self.socket = directory / "none"
        self.stats_path = directory / "stats.json"
        self._out, self._err = directory / "stdout", directory / "stderr"
        options: list[str | Path] = ["--pid", str(vmm_pid), "--journal", journal, "--stats", self.stats_path]
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [VMD, "pages", "adopt", *options], stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )
        self.pid = self.process.pid
        self._pidfd = os.pidfd_open(self.pid)


Adopt = Callable[[FakeVmm, Path], Adopter]


def kill(server: PageServer) -> None:
    """SIGKILL: nothing of it is written, said or tidied up any more."""
    server.send(signal.SIGKILL)
    server.process.wait()
    server.socket.unlink(missing_ok=True)
