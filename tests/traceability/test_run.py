"""A run of a small suite under our accounting, from outside: what fails it, and what its last lines are."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import host

TESTS = Path(__file__).parents[1]
NOT_DUE = "".join(f"{n} later\n" for n in range(3, 56))
HOLDS = "import pytest\n@pytest.mark.seed(1, 2)\ndef test_it(): pass\n"


class Suite:
    def __init__(self, folder: Path) -> None:
        self.root = folder
        for part in ("conftest.py", "support", "traceability"):
            copy = shutil.copytree if (TESTS / part).is_dir() else shutil.copy
            copy(TESTS / part, self._make("tests") / part)
        for path in (folder / "tests").rglob("test_*.py"):
            path.unlink()
        shutil.copy(TESTS.parent / "pyproject.toml", folder)
        self.write("traceability/not_due.txt", NOT_DUE)
        self.write("test_it.py", HOLDS)

    def _make(self, name: str) -> Path:
        (self.root / name).mkdir(exist_ok=True)
        return self.root / name

    def write(self, name: str, text: str) -> None:
        (self.root / "tests" / name).write_text(text)

    def run(self, *options: str) -> tuple[int, list[str]]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
        done = subprocess.run(command, cwd=self.root, env=env, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout.splitlines()


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return Suite(tmp_path)


def test_a_whole_run_without_gap_ends_with_pytests_closing_line(suite: Suite) -> None:
    code, lines = suite.run()
    assert code == 0
    assert "1 passed" in lines[-1]
    assert any(line.startswith("checks: 2 of 55 hold, 53 not due (3, 4,") for line in lines)
    assert "skipped: 0" in lines


def test_a_gap_fails_the_whole_run_and_no_part_of_it(suite: Suite) -> None:
    suite.write("traceability/not_due.txt", NOT_DUE.replace("9 later\n", "", 1))
    code, lines = suite.run()
    assert code == 1
    assert "1 passed" in lines[-1]
    assert any(line.startswith("GAP check 9 ") for line in lines)
    assert suite.run("-k", "it")[0] == 0
    assert suite.run("tests/test_it.py")[0] == 0
    assert suite.run("tests")[0] == 1


def test_a_leak_fails_the_test_and_the_check_that_it_carried(suite: Suite) -> None:
    suite.write("test_it.py", "import os\n" + HOLDS.replace("pass", "os.open('/dev/zero', os.O_RDONLY)"))
    code, lines = suite.run()
    assert code == 1
    assert "E         1 x descriptor /dev/zero" in lines
    assert "1 passed, 1 error" in lines[-1]
    assert any(line.startswith("GAP check 1 ") for line in lines)


def test_skips_are_counted_with_their_reasons(suite: Suite) -> None:
    suite.write("test_that.py", "import pytest\ndef test_that(): pytest.skip('no moon')\n")
    code, lines = suite.run()
    assert code == 0
    assert "skipped: 1 (1 x no moon)" in lines


@pytest.mark.skipif(not host.host_is_complete(), reason="the host lacks KVM, userfaultfd or root")
def test_a_skip_of_a_host_test_on_a_complete_host_is_a_failure(suite: Suite) -> None:
    skipped = HOLDS.replace("@pytest", "@pytest.mark.needs_kvm\n@pytest", 1).replace("pass", "pytest.skip('tired')")
    suite.write("test_it.py", skipped)
    code, lines = suite.run()
    assert code == 1
    assert "1 failed" in lines[-1]
    assert any("skipped on a host that has all it needs" in line and "tired" in line for line in lines)


def test_on_a_poorer_host_it_is_a_skip_and_no_gap(suite: Suite) -> None:
    suite.write("test_it.py", HOLDS.replace("@pytest", "@pytest.mark.needs_kvm\n@pytest", 1))
    device = "tests/support/host.py"
    text = (suite.root / device).read_text().replace('"/dev/kvm"', '"/dev/absent"')
    (suite.root / device).write_text(text)
    code, lines = suite.run()
    assert code == 0
    assert "skipped: 1 (1 x /dev/absent is missing)" in lines
    assert any("2 not provable on this host (1, 2)" in line for line in lines)
