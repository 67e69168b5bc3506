"""The built-in guest on a real Firecracker: every command, and that it sees what is wrong with its memory."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.vmm import Vmm, figures

PAGE_BYTES = 4096
FOUR_GIB = 1 << 32

pytestmark = pytest.mark.skipif(
    not Path("/dev/kvm").exists(), reason="no /dev/kvm on this machine: nothing can run a guest"
)


@pytest.fixture(scope="module")
def guest(kernel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vmm]:
    """A guest with 128 MiB that the tests share; each leaves its memory right."""
    with Vmm(tmp_path_factory.mktemp("guest")) as vmm:
        vmm.boot(kernel, 128, "seed=7")
        yield vmm


@pytest.fixture
def empty(kernel: Path, tmp_path: Path) -> Iterator[Vmm]:
    """A guest of one's own that has written nothing yet: `written` then tells which pages a sweep rewrote."""
    with Vmm(tmp_path) as vmm:
        assert " filled=0 " in vmm.boot(kernel, 128, "fill=0")
        yield vmm


@pytest.fixture(scope="module")
def template(kernel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, int]]:
    """A snapshot: state file, memory file, physical address of heap page 0."""
    with Vmm(tmp_path_factory.mktemp("template")) as vmm:
        vmm.boot(kernel, 128)
        address = int(vmm.ask("info").split("regions=")[1].split("+")[0], 0)
        state, memory = vmm.snapshot()
    yield state, memory, address
    memory.unlink()


def written(vmm: Vmm) -> int:
    return figures(vmm.ask("info"))["written"]


def test_ready_line_and_info_agree(kernel: Path, tmp_path: Path) -> None:
    with Vmm(tmp_path) as vmm:
        ready = vmm.boot(kernel, 128, "seed=18446744073709551615 fill=10").split()
        info = figures(vmm.ask("info"))
    assert ready[:3] == ["ready", "micro", "1"]
    assert ready[3:] == [f"{key}={info[key]}" for key in ("pages", "filled", "seed")]
    assert info["seed"] == 2**64 - 1
    assert info["filled"] == info["written"] == info["pages"] // 10
    assert 0.99 * (127 << 20) < info["pages"] * PAGE_BYTES < info["memory_bytes"] <= 127 << 20
    assert 500_000 < info["tsc_khz"] < 10_000_000


def test_ping_tag_and_line_ends(guest: Vmm) -> None:
    assert guest.ask("ping") == "pong"
    assert guest.ask("#17 ping") == "#17 pong"
    guest.send(b"\r\n \n#a ping\r\n#b ping\r#c ping\n")
    assert [guest.line() for _ in range(3)] == ["#a pong", "#b pong", "#c pong"]
    tag = "#" + 32 * "t"
    assert guest.ask(f"{tag} ping") == f"{tag} pong"
    assert guest.ask("#17 help") == "#17 ok ping help info sweep check fresh load loads ticks balloon"


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("foo", "error: expected a command (help names them), came foo"),
        ("#9 foo\tbar", "#9 error: expected a command (help names them), came foo?bar"),
        ("#9", "#9 error: expected a command (help names them), came none"),
        (f"#{33 * 't'} ping", "error: expected a tag of at most 32 characters, came a longer one"),
        ("ping x", "error: expected no parameters, came x"),
        ("fresh page=1", "error: expected pages=, came page=1"),
        ("fresh pages", "error: pages: expected 1..1099511627776, came "),
        ("sweep pages=x", "error: pages: expected 1..1099511627776, came x"),
        ("sweep pages=-1", "error: pages: expected 1..1099511627776, came -1"),
        ("sweep seed=18446744073709551616", "error: seed: expected 0..18446744073709551615, came 18446744073709551616"),
        ("sweep write=101", "error: write: expected 0..100, came 101"),
        ("sweep order=up", "error: order: expected sequential|strided|scattered|random|zipf, came up"),
        ("sweep span=9 pages=10", "error: pages: expected 1..9, came 10"),
        ("sweep seed=1 seed=1", "error: seed: expected once, came twice"),
        (
            "sweep order=zipf replace=1",
            "error: replace: expected with order=sequential|strided|scattered, came with zipf",
        ),
        ("loads pages=4097", "error: pages: expected 1..4096, came 4097"),
        ("ticks reset=2", "error: reset: expected 0..1, came 2"),
    ],
)
def test_errors(guest: Vmm, line: str, answer: str) -> None:
    assert guest.ask(line) == answer
    assert guest.ask("ping") == "pong"


def test_heap_limits_are_answered(guest: Vmm) -> None:
    pages = figures(guest.ask("info"))["pages"]
    assert guest.ask(f"load page={pages}") == f"error: page: expected 0..{pages - 1}, came {pages}"
    assert guest.ask(f"sweep start={pages}") == f"error: start: expected 0..{pages - 1}, came {pages}"
    assert guest.ask(f"sweep start=1 span={pages}") == f"error: span: expected 1..{pages - 1}, came {pages}"
    assert guest.ask(f"loads start={pages - 2} stride=2 pages=2") == "error: pages: expected 1..1, came 2"
    figures(guest.ask(f"loads start={pages - 3} stride=2 pages=2"))


def test_longest_line_arrives_whole_and_longer_ones_are_refused(guest: Vmm) -> None:
    longest = "#x ping".ljust(255)
    assert guest.ask(longest) == "#x pong"
    too_long = "error: expected a line of at most 255 characters, came a longer one"
    assert guest.ask(longest + " ") == "#x " + too_long
    guest.send(b"y" * 5000 + b"\nping\n" * 50)
    assert [guest.line() for _ in range(51)] == [too_long] + 50 * ["pong"]


@pytest.mark.parametrize("order", ["sequential", "strided", "scattered"])
@pytest.mark.parametrize("shape", ["", "displace=64", "replace=30", "displace=64 replace=30"])
def test_orders_that_touch_each_page_once(guest: Vmm, order: str, shape: str) -> None:
    for pages, span in ((1, 1), (1001, 1001), (2048, 20000), (600, 1003)):
        got = figures(guest.ask(f"sweep order={order} stride=7 pages={pages} span={span} {shape}"))
        assert (got["pages"], got["distinct"], got["wrong"]) == (pages, pages, 0)


def test_runs(guest: Vmm) -> None:
    def ask(parameters: str) -> int:
        return figures(guest.ask(f"sweep pages=4000 span=20000 {parameters}"))["runs"]

    assert ask("order=sequential") == 1
    assert ask("order=strided") == 4000
    assert ask("order=strided stride=1") == 1
    assert 4000 / 2.7 < ask("order=scattered") < 4000 / 2.3
    assert 500 < ask("order=sequential displace=100") <= 1000


def test_random_and_zipf_repeat_themselves(guest: Vmm) -> None:
    random = figures(guest.ask("sweep order=random pages=10000 span=10000"))
    assert 6100 < random["distinct"] < 6550  # 1 - 1/e
    zipf = figures(guest.ask("sweep order=zipf pages=10000 span=10000"))
    assert 1500 < zipf["distinct"] < 4500
    assert figures(guest.ask("sweep order=zipf pages=100 span=1"))["distinct"] == 1
    assert random["wrong"] == zipf["wrong"] == 0


@pytest.mark.parametrize("order", ["sequential", "strided", "scattered"])
def test_displacing_keeps_the_pages_and_replacing_changes_some(empty: Vmm, order: str) -> None:
    sweep = f"sweep order={order} pages=2000 span=16001 write=100"
    figures(empty.ask(sweep))
    assert written(empty) == 2000
    figures(empty.ask(f"{sweep} displace=200"))
    assert written(empty) == 2000
    got = figures(empty.ask(f"{sweep} displace=200 replace=25"))
    assert got["distinct"] == 2000
    assert got["replaced"] > 0
    assert 2350 < written(empty) < 2650
    figures(empty.ask(f"{sweep} replace=25"))
    check = figures(empty.ask("check"))
    assert check["wrong"] == 0
    assert check["zero_pages"] == check["pages"] - written(empty)


def test_seed_chooses_other_pages(empty: Vmm) -> None:
    for seed in (1, 2):
        figures(empty.ask(f"sweep pages=1000 span=16000 write=100 seed={seed}"))
    assert 1800 < written(empty) < 2000


def test_rewriting_keeps_the_books(guest: Vmm) -> None:
    assert 900 < figures(guest.ask("sweep pages=2000 write=50"))["written"] < 1100
    # one page through all its versions and round again
    assert figures(guest.ask("sweep order=random span=1 pages=600 write=100"))["written"] == 600
    zero_pages = figures(guest.ask("check"))["zero_pages"]
    assert figures(guest.ask("fresh pages=100"))["wrong"] == 0
    after = figures(guest.ask("check"))
    assert (after["zero_pages"], after["wrong"]) == (zero_pages - 100, 0)


def test_fresh_passes_over_pages_that_a_sweep_wrote(empty: Vmm) -> None:
    figures(empty.ask("sweep start=10 span=5 pages=5 write=100 order=sequential"))
    figures(empty.ask("fresh pages=11"))
    info = figures(empty.ask("info"))
    assert (info["filled"], info["written"]) == (16, 16)
    left = info["pages"] - 16
    assert empty.ask(f"fresh pages={left + 1}") == f"error: pages: expected 1..{left}, came {left + 1}"
    figures(empty.ask(f"fresh pages={left}"))
    assert empty.ask("fresh") == "error: pages: expected no such pages left, came 1"
    assert figures(empty.ask("check")).items() >= {"zero_pages": 0, "wrong": 0}.items()


def test_timed_loads(guest: Vmm) -> None:
    assert figures(guest.ask("load page=3"))["wrong"] == 0
    got = figures(guest.ask("loads pages=4096 start=1 stride=3"))
    assert got["n"] == 4096
    assert got["wrong"] == 0
    assert 0 < got["min"] <= got["p50"] <= got["p99"] <= got["max"]


def test_compute_takes_the_time_asked_for(guest: Vmm) -> None:
    khz = figures(guest.ask("info"))["tsc_khz"]
    began = time.monotonic()
    cycles = figures(guest.ask("sweep pages=100 compute=1000000"))["cycles"]
    assert 0.1 * khz * 1000 <= cycles
    assert time.monotonic() - began >= 0.1


def test_a_pause_is_a_gap_and_a_long_command_is_not(guest: Vmm) -> None:
    figures(guest.ask("ticks reset=1"))
    before = figures(guest.ask("ticks"))["ticks"]
    figures(guest.ask("check"))
    after = figures(guest.ask("ticks"))
    assert after["ticks"] - before > figures(guest.ask("info"))["pages"]
    guest.call("PATCH", "/vm", state="Paused")
    time.sleep(0.5)
    guest.call("PATCH", "/vm", state="Resumed")
    assert figures(guest.ask("ticks"))["gap_max"] >= 0.5 * after["tsc_khz"] * 1000 > after["gap_max"]


def test_restored_guest_finds_everything_right(template: tuple[Path, Path, int], tmp_path: Path) -> None:
    state, memory, _ = template
    with Vmm(tmp_path) as vmm:
        vmm.load(state, memory)
        assert vmm.ask("#r ping".ljust(255)) == "#r pong"
        assert figures(vmm.ask("sweep write=30"))["wrong"] == 0
        assert figures(vmm.ask("check"))["wrong"] == 0


def test_a_sweep_goes_on_where_the_snapshot_caught_it(kernel: Path, tmp_path: Path) -> None:
    with Vmm(tmp_path / "first") as vmm:
        vmm.boot(kernel, 128)
        vmm.send(b"#half sweep pages=20000 order=random write=50 compute=20000\n")
        time.sleep(0.1)
        state, memory = vmm.snapshot()
    with Vmm(tmp_path / "second") as vmm:
        vmm.load(state, memory)
        answer = vmm.line()
        check = figures(vmm.ask("check"))
    memory.unlink()
    assert answer.startswith("#half ok pages=20000 ")
    assert " wrong=0 " in answer
    assert check["wrong"] == 0


@pytest.mark.parametrize(("page", "byte"), [(1000, 2051), (-1, 8)], ids=["data", "zeros"])
def test_one_flipped_byte_is_one_wrong_word(
    template: tuple[Path, Path, int], tmp_path: Path, page: int, byte: int
) -> None:
    state, memory, heap = template
    damaged = tmp_path / "memory"
    shutil.copyfile(memory, damaged)
    offset = (heap if page >= 0 else damaged.stat().st_size) + page * PAGE_BYTES + byte
    with damaged.open("r+b") as file:
        file.seek(offset)
        old = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([old ^ 0xFF]))
    with Vmm(tmp_path / "vmm") as vmm:
        vmm.load(state, damaged)
        got = figures(vmm.ask("check"))
        number = page % got["pages"]
        swept = figures(vmm.ask(f"sweep start={number} pages=1 span=1"))
    damaged.unlink()
    assert (got["wrong"], got["first_page"], got["first_word"]) == (1, number, byte // 8)
    assert got["got"] ^ got["want"] == 0xFF << byte % 8 * 8
    assert swept["wrong"] == 1
    assert swept["got"] == got["got"]


def test_a_changed_program_is_seen(template: tuple[Path, Path, int], kernel: Path, tmp_path: Path) -> None:
    state, memory, _ = template
    damaged = tmp_path / "memory"
    shutil.copyfile(memory, damaged)
    with damaged.open("r+b") as file:
        file.seek(0x100000)  # the first instruction, which never runs again
        file.write(b"\x90")
    with Vmm(tmp_path / "vmm") as vmm:
        vmm.load(state, damaged)
        answer = vmm.ask("check")
    damaged.unlink()
    assert " wrong=1 " in answer
    assert answer.endswith(" text=changed")


def test_memory_on_both_sides_of_the_gap(kernel: Path, tmp_path: Path) -> None:
    with Vmm(tmp_path) as vmm:
        vmm.boot(kernel, 3840, "fill=1")
        answer = vmm.ask("info")
        low, high = (region.split("+") for region in answer.split("regions=")[1].split(","))
        info = figures(answer)
        edge = int(low[1])
        assert int(high[0], 0) == FOUR_GIB
        assert edge + int(high[1]) == info["pages"]
        assert info["memory_bytes"] == 3839 << 20
        across = f"start={edge - 3000} span=6000 pages=6000 order=scattered"
        assert figures(vmm.ask(f"sweep {across} write=100")).items() >= {"wrong": 0, "written": 6000}.items()
        assert figures(vmm.ask(f"sweep {across} seed=5")).items() >= {"wrong": 0, "distinct": 6000}.items()
        figures(vmm.ask(f"sweep start={info['pages'] - 64} span=64 write=100"))
        assert figures(vmm.ask(f"loads start={edge - 1} pages=2"))["wrong"] == 0
        check = figures(vmm.ask("check"))
        assert check["wrong"] == 0
        assert check["zero_pages"] == info["pages"] - info["written"] - 6064
