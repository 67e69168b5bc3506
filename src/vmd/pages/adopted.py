"""A VM whose page server is gone, taken over by this process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path

from .contract import Ended, EndReason
from .journal import Journal
from .life import Server, settle
from .native import NativeCore
from .stats import ServedVm


class AdoptedServer(Server):
    """Serves the VM of ``journal``, the VMM being process ``vmm_pid``, from where the last page server left it.

    Everything is checked at construction, which raises `PagesFailed` and then has changed nothing.
    """

    core_name = "native"

    def __init__(self, journal: Path, vmm_pid: int, *, warn: Callable[[str], None] = lambda line: None) -> None:
        self._adopted = NativeCore.adopt(journal, vmm_pid)
        self._vm = self._adopted.served() if self._adopted else None
        super().__init__(warn, Journal.of(journal))
        if self._adopted is not None:
            self.vmm_pidfd = self._adopted.pidfd()

    def start(self) -> None:
        """Begin to serve; it does, or the VMM has exited, when this returns. Raises `VmdError`; the VM is as it was."""
        super().start()
        try:
            self.handshaken.result()
        except CancelledError:  # the VMM has exited
            pass
        except BaseException:
            self.close()
            raise

    def _served(self) -> ServedVm | None:
        return self._vm

    def _leaves_a_vm(self, reason: EndReason) -> bool:
        # Until there is a core that serves it, it is as it was found.
        return self._adopted is not None and (self._core is None or super()._leaves_a_vm(reason))

    def _serve(self) -> Ended:
        if self._adopted is None:
            self.handshaken.cancel()
            return Ended(EndReason.GONE)
        self._start_core(self._adopted)
        settle(self.handshaken, self._adopted.served().vmm_pid)
        return self._adopted.join()

    def _close_outlet(self) -> None:
        """It has none."""

    def _close_inputs(self) -> None:
        """The core has all that there is."""
