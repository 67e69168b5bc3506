"""Which backend, and what its page server does beside demand: both breakers with their exact meaning."""

from __future__ import annotations

from array import array
from dataclasses import replace
from pathlib import Path

import pytest

from vmd.backend import Asked, Request, choose_backend, plan_service
from vmd.errors import BackendUnavailable
from vmd.pages.contract import Beside
from vmd.recording import Recording, write_access_log
from vmd.settings import Settings
from vmd.snapshot import Snapshot

SMALL, HUGE = 4096, 2 << 20
CLOSED = Settings.read({})
OPEN = replace(CLOSED, uffd_enabled=False)
SNAPSHOT = Snapshot(Path("/nowhere"), "a" * 32, SMALL, "1.12.1", "6.0.0", 1, 64 << 20, "", "")


@pytest.mark.parametrize(
    ("asked", "settings", "page_size", "backend", "reason"),
    [
        ("auto", CLOSED, SMALL, "uffd", "userfaultfd is in service"),
        ("uffd", CLOSED, SMALL, "uffd", "asked for"),
        ("file", CLOSED, SMALL, "file", "asked for"),
        ("auto", CLOSED, HUGE, "uffd", "userfaultfd is in service"),
        ("uffd", CLOSED, HUGE, "uffd", "asked for"),
        ("auto", OPEN, SMALL, "file", "breaker open: VMD_UFFD_ENABLED=false"),
        ("file", OPEN, SMALL, "file", "asked for"),
    ],
)
def test_the_backend_and_its_reason(
    asked: Asked, settings: Settings, page_size: int, backend: str, reason: str
) -> None:
    choice = choose_backend(asked, settings, page_size)
    assert (choice.backend, choice.reason) == (backend, reason)


@pytest.mark.parametrize(
    ("asked", "settings", "page_size", "words"),
    [
        ("uffd", OPEN, SMALL, "backend uffd: VMD_UFFD_ENABLED=false"),
        ("uffd", OPEN, HUGE, "2 MiB pages need userfaultfd, and VMD_UFFD_ENABLED=false"),
        ("auto", OPEN, HUGE, "2 MiB pages need userfaultfd, and VMD_UFFD_ENABLED=false"),
        ("file", OPEN, HUGE, "backend file: Firecracker loads 2 MiB pages through userfaultfd only"),
        ("file", CLOSED, HUGE, "backend file: Firecracker loads 2 MiB pages through userfaultfd only"),
    ],
)
def test_what_is_out_of_service_is_refused_with_a_hint(
    asked: Asked, settings: Settings, page_size: int, words: str
) -> None:
    with pytest.raises(BackendUnavailable, match=words) as refused:
        choose_backend(asked, settings, page_size)
    assert refused.value.code == "backend_unavailable"
    assert refused.value.hint


def request(log: Path | None, *, record: bool = False, page_size: int = SMALL) -> Request:
    return Request("s1", "t9", replace(SNAPSHOT, page_size=page_size), access_log=log, record=record)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "access.log"
    write_access_log(path, Recording(SMALL, array("Q", [8192, 0, 4 << 20]), snapshot=SNAPSHOT.snapshot_id))
    return path


def test_a_log_is_replayed_in_its_order(log: Path) -> None:
    service = plan_service(request(log), CLOSED, pytest.fail)
    assert (service.beside, list(service.offsets), service.skipped) == (Beside.REPLAY, [8192, 0, 4 << 20], 0)
    huge = plan_service(request(log, page_size=HUGE), CLOSED, pytest.fail)
    assert list(huge.offsets) == [0, 4 << 20]


def test_no_log_means_sequential_up_to_the_bound(tmp_path: Path) -> None:
    settings = replace(CLOSED, prefetch_bytes_max=123)
    for missing in (None, tmp_path / "nothing"):
        service = plan_service(request(missing), settings, pytest.fail)
        assert (service.beside, service.prefetch_bytes_max) == (Beside.SEQUENTIAL, 123)


def test_prefetch_off_means_demand_only(log: Path) -> None:
    off = replace(CLOSED, prefetch_enabled=False)
    for one in (log, None):
        assert plan_service(request(one), off, pytest.fail).beside is Beside.NOTHING


def test_a_recording_page_server_records(log: Path) -> None:
    assert plan_service(request(log, record=True), CLOSED, pytest.fail).beside is Beside.RECORD


@pytest.mark.seed(54)
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("# vmd access-log 1\n# snapshot: other\n4096\n", "recorded on snapshot other"),
        ("# vmd access-log 7\n4096\n", "version"),
        ("# vmd access-log 1\n# page-size: 5\n", "page-size"),
    ],
)
def test_a_log_that_is_refused_means_demand_only_and_one_warning(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    path.write_text(text)
    warnings: list[str] = []
    service = plan_service(request(path), CLOSED, warnings.append)
    assert service.beside is Beside.NOTHING
    assert service.refused is not None
    assert words in service.refused
    (warning,) = warnings
    assert words in warning


def test_an_unreadable_log_is_refused(tmp_path: Path) -> None:
    warnings: list[str] = []
    assert plan_service(request(tmp_path), CLOSED, warnings.append).beside is Beside.NOTHING
    assert len(warnings) == 1


@pytest.mark.seed(23)
def test_bad_lines_are_counted_in_one_warning(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    path.write_text("4096\njunk\n4096\n4097\n99999999999\n8192\n")
    warnings: list[str] = []
    service = plan_service(request(path), CLOSED, warnings.append)
    assert (list(service.offsets), service.skipped) == ([4096, 8192], 4)
    assert len(warnings) == 1
    assert "4 bad lines skipped" in warnings[0]


def test_a_log_that_was_replaced_is_read_again(log: Path) -> None:
    plan_service(request(log), CLOSED, pytest.fail)
    write_access_log(log, Recording(SMALL, array("Q", [4096]), snapshot=SNAPSHOT.snapshot_id))
    assert list(plan_service(request(log), CLOSED, pytest.fail).offsets) == [4096]
