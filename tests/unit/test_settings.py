"""The environment: read once, and refused where it is not understood."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmd import settings as settings_module
from vmd.errors import UsageError
from vmd.settings import Settings, default_run_dir

BREAKERS = {"VMD_UFFD_ENABLED": "uffd_enabled", "VMD_UFFD_PREFETCH_ENABLED": "prefetch_enabled"}
NUMBERS = ("VMD_UFFD_RECORD_MAX_SECONDS", "VMD_MAX_CONCURRENT_RESTORES", "VMD_PREFETCH_MAX_BYTES")


def test_defaults() -> None:
    settings = Settings.read({})
    assert settings == Settings(
        state_dir=Path("/var/lib/vmd"), run_dir=Path(default_run_dir()), firecracker=None, jailer=None,
        uffd_enabled=True, prefetch_enabled=True, record_seconds_max=10.0, concurrent_restores_max=100,
        prefetch_bytes_max=1 << 30, core=None,
    )  # fmt: skip
    assert default_run_dir() in ("/run/vmd", "/dev/shm/vmd")


@pytest.mark.parametrize("variable", BREAKERS)
def test_switches_understand_eight_words_and_no_more(variable: str) -> None:
    for words, value in ((("true", "1", "yes", "on"), True), (("false", "0", "no", "off"), False)):
        for word in words:
            for spelled in (word, word.upper(), word.title()):
                assert getattr(Settings.read({variable: spelled}), BREAKERS[variable]) is value
    for word in ("", " ", "maybe", "2", "-1", "truee", "y", "enabled", "on ", "\u0661"):
        with pytest.raises(UsageError, match=f"^{variable}: expected true/1/yes/on or false/0/no/off, got "):
            Settings.read({variable: word})


@pytest.mark.parametrize("variable", NUMBERS)
def test_numbers_are_numbers(variable: str) -> None:
    assert Settings.read({variable: ""}) == Settings.read({})
    for word in ("x", "-1", "nan", "inf", "1e400", "1 2", "\u0661x"):
        with pytest.raises(UsageError, match=f"^{variable}: expected "):
            Settings.read({variable: word})


def test_least_values() -> None:
    for variable in ("VMD_UFFD_RECORD_MAX_SECONDS", "VMD_MAX_CONCURRENT_RESTORES"):
        with pytest.raises(UsageError, match=variable):
            Settings.read({variable: "0"})
    assert Settings.read({"VMD_PREFETCH_MAX_BYTES": "0"}).prefetch_bytes_max == 0
    assert Settings.read({"VMD_UFFD_RECORD_MAX_SECONDS": "0.5"}).record_seconds_max == 0.5


def test_the_core_is_one_of_two() -> None:
    for core in ("native", "reference"):
        assert Settings.read({"VMD_CORE": core}).core == core
    with pytest.raises(UsageError, match="VMD_CORE: expected native or reference, got 'fast'"):
        Settings.read({"VMD_CORE": "fast"})


def test_an_error_is_a_usage_error() -> None:
    with pytest.raises(UsageError) as refused:
        Settings.read({"VMD_UFFD_ENABLED": "perhaps"})
    assert refused.value.exit_code == 2


def test_whole_numbers_have_a_bound() -> None:
    most = (1 << 64) - 1
    assert Settings.read({"VMD_PREFETCH_MAX_BYTES": str(most)}).prefetch_bytes_max == most
    for word in (str(most + 1), "9" * 21, "9" * 5000):
        with pytest.raises(UsageError, match=f"^VMD_PREFETCH_MAX_BYTES: expected .* to {most}, got '") as refused:
            Settings.read({"VMD_PREFETCH_MAX_BYTES": word})
        assert len(str(refused.value)) < 200


def test_directories_are_absolute_and_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    for word in ("real", "./link", str(tmp_path / "link")):
        settings = Settings.read({"VMD_STATE_DIR": word, "VMD_RUN_DIR": word})
        assert (settings.state_dir, settings.run_dir) == (tmp_path / "real", tmp_path / "real")


def test_a_link_that_nobody_asked_for_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vmd").symlink_to("/")
    monkeypatch.setattr(settings_module, "default_run_dir", lambda: str(tmp_path / "vmd"))
    assert Settings.read({}).run_dir == tmp_path / "vmd"
