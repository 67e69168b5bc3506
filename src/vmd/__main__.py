"""The command ``vmd``, also as ``python -m vmd``."""

from __future__ import annotations

# `signal` would first load `enum`, and Ctrl-C meanwhile be a traceback out of half an import.
import _signal  # type: ignore[import-not-found]

# Until a command runs there is nothing to undo: Ctrl-C ends this process as it ends any other. What
# comes before this line is the interpreter's own start.
_signal.signal(_signal.SIGINT, _signal.SIG_DFL)


def main() -> None:
    """The entry point: load the command line and run it."""
    from .cli import main as run

    run()


if __name__ == "__main__":
    main()
