"""The life of a sandbox: the table, and the one function that moves along it."""

from __future__ import annotations

import itertools

import pytest

from vmd.errors import Conflict
from vmd.states import MOVES, VERBS, Event, State, guard, move, observed


def test_every_pair_is_a_move_of_the_table_or_refused() -> None:
    for state, event in itertools.product(State, Event):
        if (state, event) in MOVES:
            assert move(state, event) is MOVES[state, event]
        else:
            with pytest.raises(Conflict, match=f"a sandbox that is {state} cannot take '{event}'"):
                move(state, event)


def test_every_state_is_reached_and_only_gone_is_final() -> None:
    assert {State.CREATING, *MOVES.values()} == set(State)
    assert {state for state, _ in MOVES} == set(State) - {State.GONE}


def test_nothing_comes_back_to_life() -> None:
    rank = [State.CREATING, State.RUNNING, State.FROZEN, State.DEAD, State.GONE]
    for (before, _), after in MOVES.items():
        assert rank.index(after) > rank.index(before)


@pytest.mark.parametrize(
    ("vmm_alive", "pages_alive", "state"),
    [
        (True, True, State.RUNNING),
        (True, False, State.FROZEN),
        (False, True, State.DEAD),
        (False, False, State.DEAD),
    ],
)
def test_what_lives_says_the_state(vmm_alive: bool, pages_alive: bool, state: State) -> None:
    assert observed(vmm_alive=vmm_alive, pages_alive=pages_alive) is state


def test_verbs_are_guarded() -> None:
    for verb, states in VERBS.items():
        for state in State:
            if state in states:
                guard("sb-x", state, verb)
            else:
                with pytest.raises(Conflict, match=f"^{verb} sb-x: the sandbox is {state}: "):
                    guard("sb-x", state, verb)


def test_a_refusal_names_the_way_out() -> None:
    with pytest.raises(Conflict) as refused:
        guard("sb-x", State.FROZEN, "exec")
    assert refused.value.hint == "vmd kill sb-x"
