"""A wrong ioctl number or feature bit may fail without a sound: both cores' numbers are the compiler's."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vmd.pages import uffd

HEADER = Path("/usr/include/linux/userfaultfd.h")
ABI = Path(__file__).parents[2] / "crates" / "vmd-core" / "src" / "abi.rs"

IOCTLS = [f"UFFDIO_{name}" for name in ("API", "REGISTER", "UNREGISTER", "WAKE", "COPY", "ZEROPAGE", "POISON")]
EVENTS = [f"EVENT_{name}" for name in ("PAGEFAULT", "FORK", "REMAP", "REMOVE", "UNMAP")]
FEATURES = [f"FEATURE_{name}" for name in ("EVENT_FORK", "EVENT_REMAP", "EVENT_REMOVE", "EVENT_UNMAP", "POISON")]
OLDEST_HEADER_LACKS = {"UFFDIO_POISON", "FEATURE_POISON"}
"""Newer than Linux 6.1, which is the oldest that we run on."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What the C compiler makes of <linux/userfaultfd.h>; what that header lacks is left out."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not HEADER.exists():
        pytest.skip("no C compiler, or no linux/userfaultfd.h")
    directory = tmp_path_factory.mktemp("header")
    names = {name: name if name.startswith("UFFDIO") else f"UFFD_{name}" for name in IOCTLS + EVENTS + FEATURES}
    lines = [
        f'#ifdef {macro}\n    printf("{name} %llu\\n", (unsigned long long)({macro}));\n#endif'
        for name, macro in names.items()
    ]
    lines.append('    printf("MESSAGE_BYTES %zu\\n", sizeof(struct uffd_msg));')
    source = directory / "numbers.c"
    head = "#include <stdio.h>\n#include <sys/ioctl.h>\n#include <linux/userfaultfd.h>\nint main(void) {\n"
    source.write_text(head + "\n".join(lines) + "\n    return 0;\n}\n")
    subprocess.run([compiler, "-o", directory / "numbers", source], check=True)
    printed = subprocess.run([directory / "numbers"], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in map(str.split, printed.splitlines())}


def test_the_python_numbers(compiled: dict[str, int]) -> None:
    assert {*IOCTLS, *EVENTS, *FEATURES} - compiled.keys() <= OLDEST_HEADER_LACKS
    assert {name: getattr(uffd, name) for name in compiled} == compiled


def test_the_native_numbers(compiled: dict[str, int]) -> None:
    found = re.findall(
        r"^pub const ((?:UFFDIO|EVENT|FEATURE)_\w+): u\d+ = (0x[0-9a-f_]+);", ABI.read_text(), re.MULTILINE
    )
    numbers = {name: int(value.replace("_", ""), 16) for name, value in found}
    assert {"UFFDIO_COPY", "UFFDIO_ZEROPAGE", "UFFDIO_WAKE", "EVENT_PAGEFAULT", "EVENT_REMOVE"} <= numbers.keys()
    assert numbers.keys() - compiled.keys() <= OLDEST_HEADER_LACKS
    assert {name: compiled.get(name, value) for name, value in numbers.items()} == numbers
