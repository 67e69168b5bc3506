"""The built-in guest: a bare-metal ELF of a few KiB, built here and carried by the package."""

from __future__ import annotations

from .common import ROOT, need_tools, put, run, step


def _work() -> bool:
    need_tools(["gcc", "ld", "make"], ["gcc", "libc6-dev", "binutils", "make"], "the built-in guest")
    run("make", "-C", "guest/micro")
    put(ROOT / "guest" / "micro" / "micro.elf", ROOT / "src" / "vmd" / "guest" / "micro.elf", 0o644)
    return True


if __name__ == "__main__":
    step("guest", _work)
