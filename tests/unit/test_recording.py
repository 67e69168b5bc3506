"""access.log: what is written, what is read back, what is passed over."""

from __future__ import annotations

import errno
import os
import tracemalloc
from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmd import limits, recording
from vmd.errors import VmdError
from vmd.recording import Recording, offsets_for, read_access_log, refusal, write_access_log

HUGE = 2 << 20
MEMORY_BYTES = 64 << 20


def log(path: Path, text: bytes) -> Recording:
    path.write_bytes(text)
    return read_access_log(path, MEMORY_BYTES)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "access.log"


# --- writing ---------------------------------------------------------------------------------


@pytest.mark.seed(27)
def test_the_file_word_for_word(path: Path) -> None:
    offsets = array("Q", [8192, 0, 4096])
    write_access_log(path, Recording(4096, offsets, "a1", "5:6:ff", "settled", faults_per_tick=(2, 1, 0)))
    assert path.read_bytes() == (
        b"# vmd access-log 1\n"
        b"# snapshot: a1\n"
        b"# memory: 5:6:ff\n"
        b"# page-size: 4096\n"
        b"# pages: 3\n"
        b"# ended: settled\n"
        b"# faults-per-tick: 2,1,0\n"
        b"8192\n0\n4096\n"
    )
    assert [entry.name for entry in path.parent.iterdir()] == ["access.log"]


def test_what_is_not_known_has_no_line(path: Path) -> None:
    write_access_log(path, Recording(HUGE, array("Q")))
    assert path.read_bytes() == b"# vmd access-log 1\n# page-size: 2097152\n# pages: 0\n"


@pytest.mark.seed(27)
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os if step == "fsync" else Path, step, fail)
    with pytest.raises(VmdError, match=f"^write {path}: No space left on device$"):
        write_access_log(path, Recording(4096, array("Q", [0])))
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in path.parent.iterdir()] == ["access.log"]


def test_data_are_on_disk_before_the_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    sync, replace = os.fsync, Path.replace

    def noted_sync(fd: int) -> None:
        steps.append("fsync " + Path(f"/proc/self/fd/{fd}").readlink().name.replace(str(os.getpid()), "PID"))
        sync(fd)

    def noted_replace(old: Path, new: Path) -> Path:
        steps.append("rename")
        return replace(old, new)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    write_access_log(path, Recording(4096, array("Q", [0])))
    assert steps == ["fsync .access.log.PID.tmp", "rename", f"fsync {path.parent.name}"]


def test_a_directory_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(VmdError, match=r"^write .*/gone/access.log: No such file or directory$"):
        write_access_log(tmp_path / "gone" / "access.log", Recording(4096, array("Q")))


# --- reading ---------------------------------------------------------------------------------


recordings = st.builds(
    lambda huge, pages, snapshot, memory, ended, ticks: Recording(
        HUGE if huge else 4096,
        array("Q", [page * (HUGE if huge else 4096) for page in pages if not huge or page < 32]),
        snapshot,
        memory,
        ended,
        faults_per_tick=tuple(ticks),
    ),
    st.booleans(),
    st.lists(st.integers(0, (MEMORY_BYTES >> 12) - 1), unique=True, max_size=50),
    st.none() | st.text("0123456789abcdef", min_size=1, max_size=32),
    st.none() | st.just("5:6:ff"),
    st.sampled_from([None, "settled", "timeout", "exited", "stopped"]),
    st.lists(st.integers(0, 10**6), max_size=100),
)


@given(recordings)
def test_what_was_written_is_read(tmp_path_factory: pytest.TempPathFactory, written: Recording) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.log"
    write_access_log(path, written)
    assert read_access_log(path, MEMORY_BYTES) == written


def test_a_log_without_header(path: Path) -> None:
    assert log(path, b"4096\n0\n") == Recording(4096, array("Q", [4096, 0]))
    assert log(path, b"") == Recording(4096, array("Q"))


@pytest.mark.seed(23)
@pytest.mark.parametrize(
    ("line", "skipped"),
    [
        (b"", 0),
        (b"  ", 0),
        (b"# a comment", 0),
        (b"\t# another", 0),
        (b" 8192 ", 0),
        (b"8192\r", 0),
        (b"junk", 1),
        (b"-4096", 1),
        (b"+4096", 1),
        (b"0x1000", 1),
        (b"4_096", 1),
        (b"8192 8192", 1),
        (b"8192,12288", 1),
        (b"4097", 1),
        (b"4096.0", 1),
        (b"\xd9\xa3", 1),  # an Arabic digit
        (b"\0", 1),
        (b"4096", 1),  # a duplicate
        (b"%d" % MEMORY_BYTES, 1),
        (b"%d" % (MEMORY_BYTES - 4095), 1),
        (b"%d" % 2**64, 1),
        (b"9" * 5000, 1),
        (b"x" * 100_000, 1),
    ],
)
def test_bad_lines_are_passed_over_and_counted(path: Path, line: bytes, skipped: int) -> None:
    read = log(path, b"4096\n" + line + b"\n12288\n")
    wanted = [4096, 8192, 12288] if b"8192" in line and not skipped else [4096, 12288]
    assert (list(read.offsets), read.skipped) == (wanted, skipped)


def test_the_last_page_and_a_last_line_without_end(path: Path) -> None:
    assert list(log(path, b"%d" % (MEMORY_BYTES - 4096)).offsets) == [MEMORY_BYTES - 4096]


def test_misaligned_is_measured_by_the_logs_own_pages(path: Path) -> None:
    read = log(path, b"# page-size: 2097152\n4096\n2097152\n%d\n" % (MEMORY_BYTES - 4096))
    assert (list(read.offsets), read.skipped) == ([HUGE], 2)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"# vmd access-log 2\n4096\n", "access-log version '2'; this vmd reads 1"),
        (b"# vmd access-log x\n", "access-log version 'x'"),
        (b"# page-size: 0\n", "page-size: expected 4096 or 2097152, got 0"),
        (b"# page-size: 4K\n", "invalid literal"),
        (b"# page-size: -4096\n", "page-size: expected 4096"),
        (b"# faults-per-tick: 1,x\n", "invalid literal"),
        (b"# faults-per-tick: 1,-1\n", "faults-per-tick: expected numbers of faults, got -1"),
        (b"# faults-per-tick: 1" + b"0" * 400 + b"\n", "faults-per-tick: expected numbers of faults, got 10000"),
    ],
)
def test_a_header_that_is_not_understood(path: Path, text: bytes, why: str) -> None:
    with pytest.raises(VmdError, match=f"^read {path}: {why}"):
        log(path, text)


def test_what_a_log_calls_itself_can_be_shown(path: Path) -> None:
    read = log(path, b"# snapshot: a\x1b[2J\r\xff1\n# ended: b\tc\n")
    assert (read.snapshot, read.ended) == (r"a\x1b[2J\r\ufffd1", r"b\tc")


def test_what_is_no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path, why in {
        tmp_path / "gone": "No such file or directory",
        tmp_path: "not a regular file",
        fifo: "not a regular file",
        Path("/dev/zero"): "not a regular file",
        tmp_path / "a\0b": "null byte",
    }.items():
        with pytest.raises(VmdError, match=f"^read .*: .*({why})"):
            read_access_log(path, MEMORY_BYTES)
    monkeypatch.setattr(limits, "ACCESS_LOG_LINES_MAX", 1)
    with pytest.raises(VmdError, match="more than 21 bytes is no access log"):
        log(tmp_path / "long", b"4096\n8192\n12288\n1234567")
    with pytest.raises(VmdError, match="more than 1 lines is no access log"):
        log(tmp_path / "long", b"4096\n8192\n")


def test_no_more_is_read_than_a_log_of_that_memory_can_hold(tmp_path: Path) -> None:
    path = tmp_path / "line feeds"
    path.write_bytes(b"4096\n" + b"\n" * (20 << 20))
    tracemalloc.start()
    with pytest.raises(VmdError, match=f"^read {path}: more than .* is no access log of this memory"):
        read_access_log(path, MEMORY_BYTES)
    with pytest.raises(VmdError, match="lines is no access log of this memory"):
        log(tmp_path / "fewer", b"4096\n" + b"\n" * (1 << 20))
    assert tracemalloc.get_traced_memory()[1] < 6 << 20
    tracemalloc.stop()


@given(st.binary(max_size=300) | st.text("0123456789\n# :-", max_size=300).map(str.encode))
def test_any_bytes_are_a_log_or_an_error(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    try:
        read = log(tmp_path_factory.getbasetemp() / "any.log", text)
    except VmdError:
        return
    assert len(set(read.offsets)) == len(read.offsets)
    assert all(offset % 4096 == 0 and offset + read.page_size <= MEMORY_BYTES for offset in read.offsets)


@given(st.lists(st.integers(0, 2**15).map(lambda page: page * 4096) | st.integers(0, 2**65), max_size=60))
def test_all_at_once_and_line_by_line_agree(numbers: list[int]) -> None:
    body = b"".join(b"%d\n" % number for number in numbers)
    slow = recording._parse_line_by_line(body, 4096, MEMORY_BYTES)
    fast = recording._parse_clean(body, 4096, MEMORY_BYTES)
    assert fast == slow[0] if slow[1] == 0 else fast is None


# --- use -------------------------------------------------------------------------------------


@pytest.mark.seed(55)
def test_a_log_of_small_pages_names_the_huge_pages_that_hold_them() -> None:
    small = Recording(4096, array("Q", [HUGE + 8192, 4096, HUGE, 0, 5 * HUGE]))
    assert list(offsets_for(small, HUGE)) == [HUGE, 0, 5 * HUGE]
    assert offsets_for(small, 4096) == small.offsets


@pytest.mark.seed(55)
def test_a_log_of_huge_pages_names_all_small_pages_inside() -> None:
    offsets = offsets_for(Recording(HUGE, array("Q", [3 * HUGE, 0])), 4096)
    assert list(offsets) == [*range(3 * HUGE, 4 * HUGE, 4096), *range(0, HUGE, 4096)]
    assert len(offsets) == 1024


@pytest.mark.seed(54)
def test_a_log_of_something_else_is_refused() -> None:
    mine = Recording(4096, array("Q"), snapshot="a1", memory="5:6:ff")
    assert refusal(mine) is None
    assert refusal(mine, snapshot="a1", memory="5:6:ff") is None
    assert refusal(mine, snapshot="b2") == "recorded on snapshot a1, this is b2"
    assert refusal(mine, snapshot="a1", memory="5:7:ff") == "recorded on memory 5:6:ff, this is 5:7:ff"
    assert refusal(Recording(4096, array("Q")), snapshot="b2", memory="1:2:3") is None
    assert limits.ACCESS_LOG_LINES_MAX * 4096 == 64 << 30
