"""The command ``vmd``, also as ``python -m vmd``."""

from __future__ import annotations

import signal

# Until a command runs there is nothing to undo: Ctrl-C ends this process as it ends any other, and
# is not a traceback out of half an import.
signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> None:
    """The entry point: load the command line and run it."""
    from .cli import main as run

    run()


if __name__ == "__main__":
    main()
