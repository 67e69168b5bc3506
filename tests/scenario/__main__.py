"""Play a scenario again: ``python -m tests.scenario native 'serve; read 3' [TIMES]``.

Over ``native`` or ``reference``, TIMES times (1,000) or until it goes wrong; over ``model``, in every order of steps.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from .drivers import Failure, Stage
from .explore import Exploration
from .language import parse


def main(over: str, text: str, times: str = "1000") -> str | None:
    """Play it; the words to exit with when it went wrong."""
    scenario = parse(text)
    if over == "model":
        exploration = Exploration(scenario)
        print(f"{exploration.states} states")
        return str(exploration.finding) if exploration.finding else None
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, Stage(over, Path(folder)) as stage:
        for round_ in range(int(times)):
            try:
                stage.run(scenario)
            except Failure as failure:
                return f"round {round_}: {failure}"
    return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
