"""What a process needs that serves pages: room for descriptors, and lines that stay lines."""

from __future__ import annotations

import resource

# Ten descriptors a VM are room for 6,000 VMs. Not more, though the hard limit may be a million: a VMM
# inherits it and sizes its table of descriptors by it, 8 bytes of kernel memory each.
_DESCRIPTORS_MAX = 1 << 16


def raise_descriptor_limit() -> None:
    """Raise the soft limit of descriptors to the hard one, up to 65,536: login shells leave it at 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS_MAX)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def one_line(text: str) -> str:
    """``text`` with its control characters written out: a path may hold line feeds and worse."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or "\ud800" <= c <= "\udfff" else ascii(c)[1:-1] for c in text)
