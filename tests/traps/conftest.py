"""The trap tests have no fixtures of their own: they set their traps with those of the other suites."""

from tests.contract.conftest import core, huge_pages, make_image, serve
from tests.hostile.conftest import server
from tests.system.conftest import built, request_for, run, settings, template

__all__ = ["built", "core", "huge_pages", "make_image", "request_for", "run", "serve", "server", "settings", "template"]
