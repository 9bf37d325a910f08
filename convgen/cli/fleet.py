"""``convgen fleet``: devices that measure for other machines."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import click

from ..cli import bundle
from .common import Command, emit, json_option, note, table

_UNSAFE = (
    "warning: {host} can be reached from other machines, and TVM's RPC has no authentication: whoever connects "
    "can run any program here. Listen on 127.0.0.1 and use an SSH tunnel (docs/fleet.md)."
)

tracker_option = click.option("--tracker", metavar="HOST:PORT", help="Where the tracker listens.")


def _host_option(command: Command) -> Command:
    return click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")(command)


@click.group(short_help="Measure on other machines.")
def fleet() -> None:
    """Measure on other machines.

    `convgen fleet tracker` runs somewhere, `convgen fleet serve` on every device, and `convgen tune --tracker
    HOST:PORT --device-key KEY` on the machine that compiles. A machine without a network: `pack`, `run`, `import`.
    """


@fleet.command(short_help="Know the devices, and share them out.")
@_host_option
@click.option("--port", type=click.IntRange(1, 65535), default=9190, show_default=True)
def tracker(host: str, port: int) -> None:
    """Know the devices, and share them out among those who ask: TVM's RPC tracker, until interrupted."""
    from ..measure.fleet import is_loopback, run_tracker

    if not is_loopback(host):
        note(_UNSAFE.format(host=host))
    _until_ended(run_tracker, host, port, lambda port: note(f"tracker at {host}:{port}"))


@fleet.command(short_help="Measure for others on this machine.")
@tracker_option
@click.option("--key", required=True, metavar="K", help="What kind of device this is; all of one key are alike.")
@_host_option
@click.option("--port", type=click.IntRange(1, 65535), help="[default: the first free one from 9090 on]")
@click.option("--proxy", metavar="HOST:PORT", help="TVM's RPC proxy, of a device that cannot be reached itself.")
@click.option("--threads-limit", type=click.IntRange(1, 1024), metavar="N", help="Threads of a candidate at most.")
@click.option("--name", default="", metavar="NAME", help="Of this device in records.  [default: the host's]")
def serve(
    tracker: str | None,
    key: str,
    host: str,
    port: int | None,
    proxy: str | None,
    threads_limit: int | None,
    name: str,
) -> None:
    """Measure for others on this machine, until interrupted: TVM's RPC server, reporting to a tracker."""
    from ..measure.fleet import is_loopback
    from ..measure.fleet import serve as serve_devices

    if not proxy and not is_loopback(host):
        note(_UNSAFE.format(host=host))
    _until_ended(
        serve_devices,
        tracker,
        key,
        host=host,
        port=port,
        proxy=proxy,
        threads_limit=threads_limit,
        name=name,
        note=note,
    )


@fleet.command(short_help="The devices a tracker knows.")
@click.option("--tracker", required=True, metavar="HOST:PORT", help="Where the tracker listens.")
@json_option
def status(tracker: str, as_json: bool) -> None:
    """The devices a tracker knows, by key: how many are free or busy, and how many requests wait for one."""
    from ..measure.fleet import status as known

    found = known(tracker)
    if as_json:
        emit([{"key": d.key, "devices": d.devices, "free": d.free, "busy": d.busy, "queued": d.queued} for d in found])
        return
    if not found:
        note(f"tracker {tracker}: no devices")
        return
    header = ("key", "devices>", "free>", "busy>", "queued>")
    click.echo(table(header, [(d.key, d.devices, d.free, d.busy, d.queued) for d in found]))


def _until_ended(run: Callable[..., None], *arguments: Any, **keywords: Any) -> None:
    """Run a server; a request to end is like Ctrl-C, so that it cleans up after itself."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run(*arguments, **keywords)


for command in (bundle.pack, bundle.run, bundle.import_):
    fleet.add_command(command)
