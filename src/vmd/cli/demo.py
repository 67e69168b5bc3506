"""`vmd demo`: the whole flow on this host, measured."""

from __future__ import annotations

import click

from .. import demo as demos
from ..demo import WAYS, Report
from ..errors import RestoreFailed, TimedOut, VmdError, VmmError
from .common import begin, emit, json_option, progress, table, wait, warn


@click.command()
@click.option(
    "--runs",
    type=click.IntRange(min=1),
    default=demos.RUNS,
    show_default=True,
    metavar="N",
    help="Restores of each kind; they take turns.",
)
@click.option(
    "--mem",
    "mem_mib",
    type=click.IntRange(min=32),
    default=demos.MEM_MIB,
    show_default=True,
    metavar="MIB",
    help="Memory of the guest in MiB.",
)
@json_option  # fmt: skip
def demo(runs: int, mem_mib: int, as_json: bool) -> None:
    """Freeze a VM, record its start, then thaw it again and again, in three ways that take turns.

    File: Firecracker's own mapping of the memory file, page cache warm. On demand: userfaultfd,
    each page when it is asked for. Replay: userfaultfd, the recorded pages installed ahead.

    The template `demo` is kept for the next time. Exit code 1 when a word of guest memory was wrong.
    """
    settings = begin()
    try:
        with progress() as say:
            report = wait(demos.run(settings, runs=runs, mem_mib=mem_mib, warn=warn, progress=say))
    except (VmmError, RestoreFailed, TimedOut) as failure:  # most likely it is the host
        failure.hint = failure.hint or "vmd doctor"
        raise
    if as_json:
        emit(report.save())
    else:
        click.echo(_table(report))
        click.echo(f"\n{report.sentence()}")
    if report.wrong_words:
        raise VmdError(f"demo: {report.wrong_words} words of guest memory were wrong")


def _table(report: Report) -> str:
    core = "reference (slow)" if report.core == "reference" else report.core
    saved = report.save()
    rows = []
    for way in WAYS:
        row = saved[way.key]
        parts = row["parts_ms"]
        rows.append((
            way.label, "-" if way.backend == "file" else core, str(saved["runs"]), f"{row['median_ms']:.1f}",
            f"{row['p99_ms']:.1f}", f"{row['ratio_to_file']:.2f}", *(f"{parts[part]:.1f}" for part in demos.PARTS),
            str(row["wrong_words"]),
        ))  # fmt: skip
    head = ("way", "core", "n", "median ms", "p99 ms", "ratio to File", *demos.PARTS, "wrong words")
    megabytes = report.pages * 4096 / 1e6
    return (
        f"Spawn to checked answer: a {report.mem_mib} MiB guest checks every word of {report.pages} pages "
        f"({megabytes:.0f} MB)\n\n{table(head, rows)}"
    )
