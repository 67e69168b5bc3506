"""What a guest may see: the rules that every page server must keep, and that name none.

A page of a guest is missing or has a content: the ``image``'s bytes, ``zero``, or one of these with the guest's own
word at its start, ``image*`` and ``zero*``. All that may happen to it, in any order that threads and joins leave
open:

- *fill*: a missing page gets the image's bytes; zeros if it is a hole of the image, or was ever removed;
- *touch*: needs a page that is there; a write stars it;
- *remove*, in two steps, between which other threads go on: the page counts as removed; then what is there goes;
- *unmap*: what is there goes for good.

Every page can be looked at alone: no rule joins two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from .language import HOLES, PAGES, Deed, Plain, Remove, Scenario, Thread, Touch, Unmap

Result = str | tuple[str, ...]
Results = Mapping[int, Result]
"""What operations gave, by their place in the scenario; one that did not return is not in it.

A touch that reads: ``image``, ``zero`` or ``mine``; ``check all``: the contents of all pages, ``-`` for one that is
unmapped; all else: ``ok``.
"""

SEEN = {"image": "image", "zero": "zero", "image*": "mine", "zero*": "mine"}
"""What a touch sees of a content."""


class _Step(NamedTuple):
    what: str  # touch, write, note, drop, unmap, check, join
    op: int


class _State(NamedTuple):
    done: tuple[int, ...]  # steps that each thread has done, the main thread's first
    content: str | None = None
    removed: bool = False


def explain(scenario: Scenario, results: Results) -> str | None:
    """None: a guest may see this. Otherwise what it may not see, in words."""
    for page in range(PAGES):
        history = _History(scenario, page)
        if not history.allows(results):
            return history.wrong(results)
    return None


class _History:
    """One page's part of a scenario."""

    def __init__(self, scenario: Scenario, page: int) -> None:
        self._scenario = scenario
        self._page = page
        self._fill = "zero" if page in HOLES else "image"
        threads: dict[int, list[_Step]] = {0: []}
        for at, op in enumerate(scenario.ops):
            if isinstance(op, Thread):
                threads.setdefault(op.number, []).extend(_steps(at, op.deed, page))
            elif isinstance(op, Deed):
                threads[0] += _steps(at, op, page)
            elif isinstance(op, Plain) and op.words in ("join", "check all"):
                threads[0] += [_Step("join", at), _Step("check", at)][: 1 + (op.words == "check all")]
        self._threads = tuple(threads.values())

    def allows(self, results: Results) -> bool:
        """Whether some order of events gives these results."""
        start = _State((0,) * len(self._threads))
        seen, left = {start}, [start]
        while left:
            state = left.pop()
            if self._is_over(state, results):
                return True
            for after in self._after(state, results):
                if after not in seen:
                    seen.add(after)
                    left.append(after)
        return False

    def wrong(self, results: Results) -> str:
        """Name the operation whose result is the odd one out, and what it might have given instead."""
        for at in sorted(results):
            others = dict.fromkeys(self._with(results[at], content) for content in (*SEEN, "-"))
            if instead := [self._of(other) for other in others if self.allows({**results, at: other})]:
                odd = f"{self._scenario.ops[at]} gives {self._of(results[at])}"
                return f"page {self._page}: {odd}, may give {' or '.join(instead)}"
        return f"page {self._page}: no order of events gives all of these"

    def _is_over(self, state: _State, results: Results) -> bool:
        left = (steps[done:] for steps, done in zip(self._threads, state.done, strict=True))
        return not any(step.op in results for steps in left for step in steps)

    def _after(self, state: _State, results: Results) -> Iterator[_State]:
        if state.content is None:
            yield state._replace(content="zero" if state.removed else self._fill)
        main_at = self._threads[0][state.done[0]].op if state.done[0] < len(self._threads[0]) else math.inf
        for thread, steps in enumerate(self._threads):
            if state.done[thread] < len(steps):
                step = steps[state.done[thread]]
                given_out = thread == 0 or step.op < main_at
                if given_out and (step.what != "join" or self._joined(state, step.op)):
                    done = (*state.done[:thread], state.done[thread] + 1, *state.done[thread + 1 :])
                    yield from self._do(step, state._replace(done=done), results.get(step.op))

    def _joined(self, state: _State, at: int) -> bool:
        others = zip(self._threads[1:], state.done[1:], strict=True)
        return all(done == len(steps) or steps[done].op > at for steps, done in others)

    def _do(self, step: _Step, state: _State, result: Result | None) -> Iterator[_State]:
        """The state after ``step``; none if the step is not possible there, or gives something else."""
        match step.what, state.content:
            case "note", _:
                yield state._replace(removed=True)
            case "drop", content:
                yield state._replace(content=None if content != "-" else content)
            case "unmap", _:
                yield state._replace(content="-")
            case "write", str(content) if result in (None, "ok"):
                yield state._replace(content=content.rstrip("*") + "*")
            case "touch", str(content) if result in (None, SEEN[content]):
                yield state
            case "check", str(content) if result is None or self._of(result) == content:
                yield state
            case "join", _:
                yield state

    def _of(self, result: Result) -> str:
        """The part of a result that is about this page."""
        return result if isinstance(result, str) else result[self._page]

    def _with(self, result: Result, content: str) -> Result:
        """The same result, had the page another content."""
        if isinstance(result, str):
            return SEEN.get(content, result)
        return (*result[: self._page], content, *result[self._page + 1 :])


def _steps(at: int, deed: Deed, page: int) -> list[_Step]:
    if page not in deed.pages:
        return []
    match deed:
        case Touch():
            return [_Step("write" if deed.writes else "touch", at)]
        case Remove():
            return [_Step("note", at), _Step("drop", at)]
        case Unmap():
            return [_Step("unmap", at)]
