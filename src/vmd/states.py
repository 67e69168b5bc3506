"""The life of a sandbox as data: states, what moves it between them, what each verb needs.

::

    creating --ready--> running --pages gone--> frozen
        |                  |                      |
        | failed           | vmm gone             | vmm gone
        v                  v                      v
       gone <---kill--- (running, frozen, dead <--'  : kill)

*frozen*: the VMM lives and its page server does not; the guest stops at its next missing page.
*dead*: the VMM has exited and its files are still there.
"""

from __future__ import annotations

import enum

from .errors import Conflict


class State(enum.StrEnum):
    """What `vmd ls` shows; ``creating`` and ``gone`` are never stored."""

    CREATING = "creating"
    RUNNING = "running"
    FROZEN = "frozen"
    DEAD = "dead"
    GONE = "gone"


class Event(enum.StrEnum):
    """What moves a sandbox."""

    READY = "ready"
    FAILED = "failed"
    PAGES_GONE = "pages gone"
    VMM_GONE = "vmm gone"
    KILL = "kill"


MOVES: dict[tuple[State, Event], State] = {
    (State.CREATING, Event.READY): State.RUNNING,
    (State.CREATING, Event.FAILED): State.GONE,
    (State.RUNNING, Event.PAGES_GONE): State.FROZEN,
    (State.RUNNING, Event.VMM_GONE): State.DEAD,
    (State.RUNNING, Event.KILL): State.GONE,
    (State.FROZEN, Event.VMM_GONE): State.DEAD,
    (State.FROZEN, Event.KILL): State.GONE,
    (State.DEAD, Event.KILL): State.GONE,
}

# The states in which a verb makes sense; what is missing here needs none.
VERBS: dict[str, frozenset[State]] = {
    "exec": frozenset({State.RUNNING}),
    "kill": frozenset({State.RUNNING, State.FROZEN, State.DEAD}),
}

_WHY = {
    State.FROZEN: "its page server is gone",
    State.DEAD: "its VMM has exited",
    State.GONE: "it was killed",
    State.CREATING: "it is not ready yet",
}


def move(state: State, event: Event) -> State:
    """The state after ``event``. Raises `Conflict` where the table has no such move."""
    try:
        return MOVES[state, event]
    except KeyError:
        raise Conflict(f"a sandbox that is {state} cannot take '{event}'") from None


def guard(sandbox_id: str, state: State, verb: str) -> None:
    """Let ``verb`` pass, or raise `Conflict` that says what state forbids it."""
    if state not in VERBS[verb]:
        why = _WHY.get(state, "")
        raise Conflict(
            f"{verb} {sandbox_id}: the sandbox is {state}" + (f": {why}" if why else ""),
            hint=f"vmd kill {sandbox_id}" if state in (State.FROZEN, State.DEAD) else None,
        )


def observed(*, vmm_alive: bool, pages_alive: bool) -> State:
    """What a created sandbox is in, from what lives; a File sandbox counts as having its pages."""
    state = State.RUNNING
    if not vmm_alive:
        return move(state, Event.VMM_GONE)
    if not pages_alive:
        return move(state, Event.PAGES_GONE)
    return state
