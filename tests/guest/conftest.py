"""The built-in guest as its sources are now."""

import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "guest" / "micro"


@pytest.fixture(scope="session")
def kernel() -> Path:
    subprocess.run(["make", "-s", "-C", str(SOURCES)], check=True)
    return SOURCES / "micro.elf"
