"""A model of a page server: the same rules as the real cores, in steps that an explorer can put into any order.

A fault thread, two fillers and the gate between it and them, as in `crates/vmd-core/src/vm.rs`; the names of moments
are those of `language.POINTS`. What outlives a page server is its journal. Each of `Rules` can be broken, to see what
it is for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .kernel import Event, Fault, Kernel, Steps, image
from .language import PAGES

State = Literal["absent", "installed", "removed"]


@dataclass(frozen=True)
class Rules:
    """What a page server must do, one by one."""

    removes_first: bool = True
    """Of what was read, apply each REMOVE before any fault is served: the kernel hands out the faults first."""
    sticky: bool = True
    """A removed page is never absent again: only zeros go there."""
    zeros_again: bool = True
    """A fault on an installed page gets zeros: it was removed while it was being installed."""
    noted_after: bool = True
    """Note *installed* after the install: a death in between costs an EEXIST, not the page's bytes."""
    ring: bool = True
    """Read the messages straight into the journal and leave them there until they are applied."""
    gated: bool = True
    """A filler looks, installs and notes in one piece; no REMOVE is read meanwhile."""
    parked: bool = True
    """An install that is refused is tried again: the kernel does not repeat the fault."""
    lets_go: bool = True
    """A fault on a page that was unmapped since is nobody's any more: the filler was faster."""
    wakes: bool = True
    """Who adopts wakes all: the one before may have died with faults that it had read."""


@dataclass
class Journal:
    """What a page server leaves behind."""

    states: list[State] = field(default_factory=lambda: ["absent"] * PAGES)
    ring: list[Fault | Event] = field(default_factory=list)


@dataclass
class PageServer:
    """One page server; ``adopts``: of a VM that another one has served."""

    kernel: Kernel
    journal: Journal
    rules: Rules
    plan: tuple[int, ...]
    adopts: bool
    serving: bool = False
    failed: str | None = None  # why it has given the VM up, and killed it
    in_gate: int = 0  # so many fillers, or -1: the fault thread
    private: list[Fault | Event] = field(default_factory=list)  # what was read, where there is no ring
    faults: list[int] = field(default_factory=list)  # pages
    parked: list[int] = field(default_factory=list)

    # --- the fault thread ------------------------------------------------------------------------

    def serve(self) -> Steps:
        """Adopt if need be; then, each turn: read all, apply the REMOVEs, serve the faults."""
        if self.adopts:
            yield from self._adopt()
        self.serving = True
        while True:
            yield lambda: self.kernel.readable() or bool(self.parked) or self.kernel.exited
            if self.kernel.exited:
                return "gone"
            yield lambda: self.in_gate == 0
            self.in_gate = -1
            yield from self._read()
            self.faults += self.parked
            self.parked = []
            while self.faults:
                yield from self._install(self.faults.pop(0))
            self.in_gate = 0

    def _adopt(self) -> Steps:
        yield "adopt-apply"
        self._apply(self.journal.ring)
        self.journal.ring = []
        yield "adopt-wake"
        for page in range(PAGES if self.rules.wakes else 0):
            self.kernel.wake(page)
        yield "adopted"
        return ""

    def _read(self) -> Steps:
        messages = self.kernel.read()
        if self.rules.ring:
            self.journal.ring = messages
        else:
            self.private = messages
        yield "read"
        if not self.rules.removes_first:
            yield from self._serve_in_order_of_reading()
        self._apply(messages)
        yield "apply"
        self.journal.ring = []
        yield "clear"
        self.private = []
        return ""

    def _apply(self, messages: list[Fault | Event]) -> None:
        for message in messages:
            if isinstance(message, Fault):
                self.faults.append(message.page)
            else:
                for page in message.pages:
                    self.journal.states[page] = "removed" if self.rules.sticky else "absent"
        if self.adopts and not self.serving:
            self.faults = []  # they are woken instead

    def _serve_in_order_of_reading(self) -> Steps:
        for message in [*self.journal.ring, *self.private]:
            if isinstance(message, Fault):
                yield from self._install(message.page)
        return ""

    def _install(self, page: int) -> Steps:
        state = self.journal.states[page]
        if state == "installed" and not self.rules.zeros_again:
            self.kernel.wake(page)
            return "woken"
        content = image(page) if state == "absent" else "zero"
        if not self.rules.noted_after:
            self.journal.states[page] = "installed"
            yield "note"
        outcome = self.kernel.install(page, content)
        if outcome == "done":
            yield "install"
        if outcome in ("done", "present"):
            self.journal.states[page] = "installed"
            self.kernel.wake(page)
            yield "note"
        if outcome == "edge" and not (self.rules.lets_go and state == "removed"):
            self.failed = f"fault on page {page}: no memory is registered there"
        if outcome == "later":
            self.journal.states[page] = state
            self.parked += [page] if self.rules.parked else []
        return outcome

    # --- the fillers -----------------------------------------------------------------------------

    def fillers(self) -> dict[str, Steps]:
        """One for each half of the plan."""
        parts = {"filler 1": self.plan[::2], "filler 2": self.plan[1::2]}
        return {name: self._fill_all(part) for name, part in parts.items() if part}

    def _fill_all(self, part: tuple[int, ...]) -> Steps:
        """Install what is absent; a page that is refused twice is left to demand."""
        yield lambda: self.serving
        for page in part:
            outcome = yield from self._fill(page)
            if outcome == "later":
                yield "refused"
                outcome = yield from self._fill(page)
            if outcome == "gone":
                break
        return ""

    def _fill(self, page: int) -> Steps:
        absent = self.journal.states[page] == "absent"
        if not self.rules.gated:
            yield "looked"
        yield lambda: self.in_gate >= 0
        self.in_gate += 1
        if self.rules.gated:
            absent = self.journal.states[page] == "absent"
        outcome = self.kernel.install(page, image(page)) if absent else "present"
        if absent and outcome in ("done", "present"):
            yield "fill-install"
            self.journal.states[page] = "installed"
            yield "fill-note"
        self.in_gate -= 1
        return outcome
