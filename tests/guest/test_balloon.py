"""The balloon of the built-in guest on a real Firecracker: pages go, come back as zeros, and what does not is seen."""

import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.vmm import eventually
from tests.guest.vmm import Vmm, figures
from tests.support import guest_memory

MIB = 128
PAGE_BYTES = 4096
PAGES_A_MIB = 256
OWN_PAGES = 4  # of the guest: maps that it touches when there is something to note

pytestmark = pytest.mark.skipif(
    not Path("/dev/kvm").exists(), reason="no /dev/kvm on this machine: nothing can run a guest"
)


@pytest.fixture
def guest(kernel: Path, tmp_path: Path) -> Iterator[Vmm]:
    """A guest with a balloon that is still empty."""
    with Vmm(tmp_path / "vmm") as vmm:
        vmm.boot(kernel, MIB, balloon=True)
        yield vmm


def ask_for(vmm: Vmm, mib: int) -> None:
    """What the balloon shall hold; the guest follows in its own time."""
    vmm.call("PATCH", "/balloon", amount_mib=mib)


def balloon(vmm: Vmm) -> dict[str, int]:
    return figures(vmm.ask("balloon"))


def settle(vmm: Vmm, pages: int) -> dict[str, int]:
    """The balloon's figures once it holds that many pages."""
    return eventually(lambda: got if (got := balloon(vmm))["held"] == pages else None, f"{pages} pages held")


def resize(vmm: Vmm, mib: int) -> dict[str, int]:
    ask_for(vmm, mib)
    return settle(vmm, mib * PAGES_A_MIB)


def resident(vmm: Vmm) -> int:
    return guest_memory.resident(vmm.process.pid, MIB << 20)


def silent(vmm: Vmm) -> bool:
    assert vmm.process.stdout is not None
    return not select.select([vmm.process.stdout], [], [], 0)[0]


def checked(vmm: Vmm) -> dict[str, int]:
    check = figures(vmm.ask("check"))
    assert check["wrong"] == 0
    return check


def test_pages_go_and_come_back_as_zeros(guest: Vmm) -> None:
    assert balloon(guest) == {"device": 1, "target": 0, "held": 0, "inflated": 0, "deflated": 0, "stale": 0}
    before, full = checked(guest), resident(guest)
    taken = resize(guest, 16)
    assert taken == {"device": 1, "target": 4096, "held": 4096, "inflated": 4096, "deflated": 0, "stale": 0}
    left = full - 4096 + OWN_PAGES
    eventually(lambda: resident(guest) <= left, "the host has its pages")
    check = checked(guest)
    assert (check["pages"], check["skipped"]) == (before["pages"] - 4096, 4096)
    assert resident(guest) <= left  # neither the check nor anything else touched them
    back = resize(guest, 0)
    assert (back["inflated"], back["deflated"], back["stale"]) == (4096, 4096, 0)
    after = checked(guest)
    assert (after["pages"], after["zero_pages"]) == (before["pages"], before["zero_pages"] + 4096)
    assert "skipped" not in after
    assert figures(guest.ask("info"))["written"] == after["pages"] - after["zero_pages"]


def test_pages_that_came_back_are_used_again(guest: Vmm) -> None:
    zeros = checked(guest)["zero_pages"]
    resize(guest, 4)
    resize(guest, 0)
    assert figures(guest.ask("fresh pages=24"))["wrong"] == 0
    assert figures(guest.ask("sweep write=100 pages=24364"))["wrong"] == 0
    assert checked(guest)["zero_pages"] == zeros
    assert figures(guest.ask(f"fresh pages={zeros}"))["wrong"] == 0
    assert checked(guest)["zero_pages"] == 0


def test_it_goes_and_comes_while_a_sweep_runs(guest: Vmm) -> None:
    full = resident(guest)
    guest.send(b"sweep pages=24000 compute=50000 write=20\n")  # 1.2 s at least
    ask_for(guest, 32)
    eventually(lambda: resident(guest) <= full - 8192 + OWN_PAGES, "32 MiB are gone")
    assert silent(guest)
    ask_for(guest, 0)
    eventually(lambda: resident(guest) > full - 4096, "half of them are back")
    assert silent(guest)
    swept = figures(guest.line())
    assert swept["wrong"] == 0
    assert swept["skipped"] > 0
    assert swept["pages"] + swept["skipped"] == 24000
    back = settle(guest, 0)
    assert (back["inflated"], back["deflated"], back["stale"]) == (8192, 8192, 0)
    checked(guest)


def test_a_check_makes_way_too(guest: Vmm) -> None:
    guest.send(b"check\n" * 30)  # which leaves the guest no time to wait for a command
    ask_for(guest, 32)
    skipped = [figures(guest.line()).get("skipped", 0) for _ in range(30)]
    assert skipped == sorted(skipped)
    assert skipped[-1] == 8192
    assert balloon(guest)["held"] == 8192


def test_which_pages_it_gives_up(guest: Vmm) -> None:
    pages = figures(guest.ask("info"))["pages"]

    def inside(page: int) -> bool:
        answer = guest.ask(f"load page={page}")
        assert answer in {f"error: expected pages outside the balloon, came {page}"} or " wrong=0" in answer
        return answer.startswith("error")

    assert guest.ask("balloon stride=0").startswith("error: stride: expected 1..")
    assert guest.ask(f"balloon next={pages}") == f"error: next: expected 0..{pages - 1}, came {pages}"
    figures(guest.ask("balloon next=700 stride=7"))
    resize(guest, 1)
    assert [page for page in range(690, 705) if inside(page)] == [693, 700]
    assert [page for page in range(14) if inside(page)] == [0, 7]
    # 101 pages down to page 0, the other 155 from the top of the heap
    assert [page for page in range(pages - 14, pages) if inside(page)] == [pages - 14, pages - 7]
    last = pages - 155 * 7
    assert (inside(last), inside(last - 7)) == (True, False)
    assert guest.ask("loads start=1 stride=6 pages=2") == "error: expected pages outside the balloon, came 7"
    figures(guest.ask("balloon next=700"))
    resize(guest, 2)  # page by page past those that are in already
    assert [page for page in range(690, 705) if inside(page)] == [692, 693, 699, 700]


def test_all_of_the_heap(guest: Vmm) -> None:
    pages = figures(guest.ask("info"))["pages"]
    ask_for(guest, MIB)
    assert settle(guest, pages)["target"] == MIB * PAGES_A_MIB > pages
    assert figures(guest.ask("sweep pages=100")).items() >= {"pages": 0, "skipped": 100}.items()
    assert checked(guest)["pages"] == 0
    assert guest.ask("fresh") == "error: pages: expected no such pages left, came 1"
    assert resize(guest, 0)["stale"] == 0
    assert checked(guest)["zero_pages"] == pages


def test_a_snapshot_keeps_what_the_balloon_holds(guest: Vmm, tmp_path: Path) -> None:
    resize(guest, 16)
    state, memory = guest.snapshot()
    with Vmm(tmp_path / "restored") as vmm:
        vmm.load(state, memory)
        assert balloon(vmm)["held"] == 4096
        assert checked(vmm)["skipped"] == 4096
        assert resize(vmm, 8)["stale"] == 0
        assert resize(vmm, 24)["inflated"] == 4096 + 16 * PAGES_A_MIB
        assert resize(vmm, 0)["stale"] == 0
        checked(vmm)
    memory.unlink()


@pytest.mark.parametrize("half", ["goes", "comes"])
def test_it_goes_on_where_the_snapshot_caught_it(guest: Vmm, tmp_path: Path, half: str) -> None:
    if half == "comes":
        resize(guest, 64)
    full = resident(guest)
    goal = 64 if half == "goes" else 0
    ask_for(guest, goal)
    eventually(lambda: abs(resident(guest) - full) > 1000, "it has begun")
    state, memory = guest.snapshot()
    with Vmm(tmp_path / "restored") as vmm:
        vmm.load(state, memory)
        first = balloon(vmm)
        assert first["held"] not in (0, 64 * PAGES_A_MIB)
        assert settle(vmm, goal * PAGES_A_MIB)["stale"] == 0
        assert resize(vmm, 0)["stale"] == 0
        checked(vmm)
    memory.unlink()


def test_a_word_that_is_not_zero_is_stale_and_stays_wrong(guest: Vmm) -> None:
    address = int(guest.ask("info").split("regions=")[1].split("+")[0], 0)
    figures(guest.ask("balloon next=700"))
    full = resident(guest)
    resize(guest, 1)
    eventually(lambda: resident(guest) <= full - PAGES_A_MIB + OWN_PAGES, "the host has its pages")
    with Path(f"/proc/{guest.process.pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek(guest_memory.address(guest.process.pid, MIB << 20) + address + 600 * PAGE_BYTES + 5 * 8)
        memory.write(b"\x17")
    back = resize(guest, 0)
    assert back["stale"] == 1
    seen = {"first_page": 600, "first_word": 5, "got": 0x17, "want": 0}
    assert back.items() >= seen.items()
    assert figures(guest.ask("check")).items() >= ({"wrong": 1} | seen).items()
    assert figures(guest.ask("sweep start=600 span=1 pages=1"))["wrong"] == 1


def test_without_a_balloon_nothing_is_different(kernel: Path, tmp_path: Path) -> None:
    with Vmm(tmp_path) as vmm:
        vmm.boot(kernel, 16)
        assert vmm.ask("balloon") == "ok device=0 target=0 held=0 inflated=0 deflated=0 stale=0"
        assert "skipped" not in vmm.ask("check") + vmm.ask("sweep")
        with pytest.raises(RuntimeError, match="No balloon device"):
            ask_for(vmm, 1)


def test_on_both_sides_of_the_gap(kernel: Path, tmp_path: Path) -> None:
    with Vmm(tmp_path) as vmm:
        vmm.boot(kernel, 3840, "fill=1", balloon=True)
        edge = int(vmm.ask("info").split("regions=")[1].split(",")[0].split("+")[1])
        across = f"start={edge - 300} span=600 pages=600"
        assert figures(vmm.ask(f"sweep {across} write=100"))["written"] == 600
        figures(vmm.ask(f"balloon next={edge + 127}"))
        resize(vmm, 1)
        assert figures(vmm.ask(f"sweep {across}")).items() >= {"wrong": 0, "skipped": PAGES_A_MIB}.items()
        assert resize(vmm, 0)["stale"] == 0
        swept = figures(vmm.ask(f"sweep {across}"))
        assert (swept["pages"], swept["wrong"]) == (600, 0)
