"""Stages: one for each kind of core and test file, at rest between tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

import pytest

from tests.scenario.drivers import Stage
from vmd.errors import VmdError
from vmd.pages.cores import core_name


@pytest.fixture(scope="module")
def stages(session_dirs: tuple[Path, Path]) -> Iterator[dict[str, Stage]]:
    """A stage for each core that there is; the native one may be missing."""
    folder = Path(mkdtemp(dir=session_dirs[0]))  # on a tmpfs: journals are written there
    made = {}
    with ExitStack() as stack:
        stack.callback(rmtree, folder)
        for core in ("reference", "native"):
            try:
                made[core] = stack.enter_context(Stage(core_name(core), folder))
            except VmdError:
                continue
        yield made


@pytest.fixture(params=["reference", "native"])
def stage(request: pytest.FixtureRequest, stages: dict[str, Stage]) -> Iterator[Stage]:
    """A place to run scenarios, for each kind of core."""
    if request.param not in stages:
        pytest.skip("native core not built")
    stages[request.param].be_patient()
    stages[request.param].deaths.clear()
    yield stages[request.param]
    stages[request.param].rest()
