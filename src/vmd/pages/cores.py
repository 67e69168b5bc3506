"""Which core serves: the native one where it is installed, else the reference, which says so."""

from __future__ import annotations

from ..errors import VmdError
from ..settings import Settings
from .contract import PageCore, Service
from .handshake import Handshake
from .journal import Journal
from .source import Image

CORE_VERSION = "0.1.0"
"""The two distributions are released together; the contract between them has no other version."""

_BUILD = "build it with `make develop`"


def core_name(wanted: str | None = None) -> str:
    """``native`` or ``reference``: ``wanted``, else ``VMD_CORE``, else native when installed.

    Raises `VmdError` when native is asked for and not installed.
    """
    wanted = wanted or Settings.read().core
    if wanted == "reference":
        return wanted
    try:
        import vmd_core
    except ImportError as missing:
        if wanted == "native":
            raise VmdError(f"core native: {missing}", hint=_BUILD) from missing
        return "reference"
    if vmd_core.VERSION != CORE_VERSION:
        raise VmdError(f"core native: expected version {CORE_VERSION}, got {vmd_core.VERSION}", hint=_BUILD)
    return "native"


def make_core(
    name: str, handshake: Handshake, image: Image, service: Service, journal: Journal | None = None
) -> PageCore:
    """A core that takes over the handshake's descriptors and the image. ``journal``: native only."""
    if name == "native":
        from .native import NativeCore

        return NativeCore(handshake, image, service, journal)
    from .reference import ReferenceCore

    return ReferenceCore(handshake, image, service)
