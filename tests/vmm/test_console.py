"""The serial line against a guest of the test's own, who says what a real one never would."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.vmm.conftest import run
from vmd import limits
from vmd.errors import TimedOut, UsageError, VmmError
from vmd.vmm.console import Console


class Guest:
    """Both FIFOs, held as a VMM holds them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("console.in", "console.out"):
            os.mkfifo(directory / name)
        self.stdin = os.open(directory / "console.in", os.O_RDWR)
        self.stdout = os.open(directory / "console.out", os.O_RDWR | os.O_NONBLOCK)

    def hear(self) -> tuple[bytes, bytes]:
        """The next question as ``(tag, command)``."""
        tag, _, command = os.read(self.stdin, 4096).rstrip(b"\n").partition(b" ")
        return tag, command

    def say(self, text: bytes) -> None:
        os.write(self.stdout, text)

    @contextmanager
    def answering(self, answer: Callable[[bytes, bytes], None]) -> Iterator[None]:
        """Call ``answer(tag, command)`` for the next question, in a thread."""
        thread = threading.Thread(target=lambda: answer(*self.hear()))
        thread.start()
        yield
        thread.join()

    def die(self) -> None:
        os.close(self.stdin)
        os.close(self.stdout)


@pytest.fixture
def guest(run_dir: Path) -> Iterator[Guest]:
    guest = Guest(run_dir)
    yield guest
    for fd in (guest.stdin, guest.stdout):
        with contextlib.suppress(OSError):  # the guest has died
            os.close(fd)
    for path in run_dir.iterdir():
        path.unlink()


def ask(guest: Guest, line: str = "ping", seconds: float = 5) -> str:
    return run(Console(guest.directory).ask(line, seconds))


def test_only_the_answer_to_this_question_counts(guest: Guest) -> None:
    guest.say(b"ready micro 1\n#deadbeef pong\nhalf a li")

    def answer(tag: bytes, command: bytes) -> None:
        assert command == b"sweep pages=1"
        guest.say(b"ne\n#deadbeef wrong\nnoise\n\n" + tag[:2])
        time.sleep(0.01)
        guest.say(tag[2:] + b" ok pages=1\r\nnoise\n")

    with guest.answering(answer):
        assert ask(guest, "sweep pages=1") == "ok pages=1"


def test_a_line_that_lost_its_end_hides_nothing(guest: Guest) -> None:
    with guest.answering(lambda tag, _: guest.say(b"cut off" + tag + b" pong\n")):
        assert ask(guest) == "pong"


@pytest.mark.parametrize("line", ["", " ", "a\nb", "a\0", "ü", "\x1b[0m"])
def test_what_is_not_one_line_of_ascii_is_refused(guest: Guest, line: str) -> None:
    with pytest.raises(UsageError, match="console: a command is one line of printable ASCII"):
        ask(guest, line)


def test_the_longest_command_fits_and_one_more_does_not(guest: Guest) -> None:
    longest = limits.CONSOLE_LINE_BYTES_MAX - 6
    with guest.answering(lambda tag, command: guest.say(tag + b" %d\n" % len(command))):
        assert ask(guest, "x" * longest) == str(longest)
    with pytest.raises(UsageError, match=f"a command of {longest + 1} bytes; {longest} is the most"):
        ask(guest, "x" * (longest + 1))


def test_an_answer_without_end_is_cut_short(guest: Guest) -> None:
    with (
        guest.answering(lambda tag, _: guest.say(tag + b" " + b"x" * (limits.CONSOLE_REPLY_BYTES_MAX + 1))),
        pytest.raises(VmmError, match="console: an answer of more than 4096 bytes"),
    ):
        ask(guest)


def test_a_line_without_end_before_the_answer_is_passed_over(guest: Guest) -> None:
    def answer(tag: bytes, _: bytes) -> None:
        for _piece in range(100):
            guest.say(b"x" * 500)
            time.sleep(0.0005)
        guest.say(tag + b" pong\n")

    with guest.answering(answer):
        assert ask(guest) == "pong"


def test_a_guest_that_never_stops_printing_holds_nobody(guest: Guest) -> None:
    stop = threading.Event()

    def spam() -> None:
        while not stop.is_set():
            with contextlib.suppress(BlockingIOError):
                guest.say(b"spam\n" * 800)
            time.sleep(0.0001)

    thread = threading.Thread(target=spam)
    thread.start()
    try:
        began = time.monotonic()
        with pytest.raises(TimedOut, match=r"^console: no answer to 'ping' within 0.3 s$"):
            ask(guest, seconds=0.3)
        assert time.monotonic() - began < 1.5
    finally:
        stop.set()
        thread.join()


def test_a_guest_that_does_not_read_is_not_waited_for(guest: Guest) -> None:
    os.set_blocking(guest.stdin, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(guest.stdin, b"x" * 4096)
    with pytest.raises(TimedOut):
        ask(guest, seconds=0.2)


def test_questions_take_turns(guest: Guest) -> None:
    def answer_all() -> None:
        for _ in range(20):
            tag, command = guest.hear()  # one question at a time, or this line holds two
            guest.say(tag + b" " + command + b"\n")

    thread = threading.Thread(target=answer_all)
    thread.start()

    async def ask_all() -> list[str]:
        return await asyncio.gather(*(Console(guest.directory).ask(f"ping {i}", 10) for i in range(20)))

    assert run(ask_all()) == [f"ping {i}" for i in range(20)]
    thread.join()


def test_the_wait_for_a_turn_is_bounded(guest: Guest) -> None:
    lock = os.open(guest.directory / "console.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(TimedOut):
        ask(guest, seconds=0.1)
    os.close(lock)


def test_wait_line_hears_what_was_said_before(guest: Guest) -> None:
    guest.say(b"booting\nready micro 1 pages=3\nmore\n")
    assert run(Console(guest.directory).wait_line("ready", 5)) == "ready micro 1 pages=3"
    with pytest.raises(TimedOut, match=r"^console: no line 'ready' within 0.1 s$"):
        run(Console(guest.directory).wait_line("ready", 0.1))


def test_death_ends_the_wait(guest: Guest) -> None:
    with guest.answering(lambda *_: guest.die()), pytest.raises(VmmError, match=r"^console: the VMM has exited$"):
        ask(guest, seconds=30)
    with pytest.raises(VmmError, match="the VMM has exited"):
        ask(guest, seconds=30)


def test_the_second_opinion_ends_it_too(guest: Guest) -> None:
    with pytest.raises(VmmError, match=r"^console: the VMM has exited$"):
        run(Console(guest.directory, alive=lambda: False).ask("ping", 30))


def test_no_vm_there(tmp_path: Path) -> None:
    with pytest.raises(VmmError, match=r"console.lock: No such file or directory"):
        run(Console(tmp_path / "gone").ask("ping", 5))
    with pytest.raises(VmmError, match=r"console.out: No such file or directory"):
        run(Console(tmp_path).ask("ping", 5))
