"""``convgen fleet``: devices that measure for other machines."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import click

from . import bundle
from .common import Command, Option, emit, json_option, note
from .tables import say_table, table

_UNSAFE = (
    "warning: {host} can be reached from other machines, and TVM's RPC has no authentication: whoever connects "
    "can run any program here. Listen on 127.0.0.1 and use an SSH tunnel (docs/fleet.md)."
)


def _tracker_option(required: bool = False) -> Option:
    return click.option("--tracker", metavar="HOST:PORT", required=required, help="Address of the tracker.")


def _host_option(command: Command) -> Command:
    return click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")(command)


@click.group(short_help="Measure on other machines.")
def fleet() -> None:
    """Measure on other machines.

    Run `convgen fleet tracker` on any machine, `convgen fleet serve` on every device, and `convgen tune --tracker
    HOST:PORT --device-key KEY` on the machine that compiles. For a device without a network there are `pack`,
    `run` and `import`.
    """


@fleet.command(short_help="Run a tracker, which shares out devices.")
@_host_option
@click.option("--port", type=click.IntRange(1, 65535), default=9190, show_default=True, help="Port to listen on.")
def tracker(host: str, port: int) -> None:
    """Run a tracker until interrupted: it knows the devices and shares them out among those who ask for one.

    It is TVM's RPC tracker.
    """
    from ..measure.fleet import is_loopback, run_tracker

    if not is_loopback(host):
        note(_UNSAFE.format(host=host))
    _until_ended(run_tracker, host, port, lambda port: note(f"tracker at {host}:{port}"))


@fleet.command(short_help="Let others measure on this machine.")
@_tracker_option()
@click.option(
    "--key", required=True, metavar="K", help="Name of this kind of device: devices with the same key must be alike."
)
@_host_option
@click.option(
    "--port", type=click.IntRange(1, 65535), help="Port to listen on.  [default: the first free one from 9090 on]"
)
@click.option("--proxy", metavar="HOST:PORT", help="TVM's RPC proxy, for a device that cannot be reached directly.")
@click.option(
    "--threads-limit", type=click.IntRange(1, 1024), metavar="N", help="Most threads that a candidate may run on."
)
@click.option("--name", default="", metavar="NAME", help="Name of this device in records.  [default: the host's]")
def serve(
    tracker: str | None,
    key: str,
    host: str,
    port: int | None,
    proxy: str | None,
    threads_limit: int | None,
    name: str,
) -> None:
    """Let others measure on this machine, until interrupted.

    It is TVM's RPC server, which reports to a tracker.
    """
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


@fleet.command(short_help="List the devices that a tracker knows.")
@_tracker_option(required=True)
@json_option
def status(tracker: str, as_json: bool) -> None:
    """List the devices that a tracker knows, by key: how many are free or busy, and how many requests wait."""
    from ..measure.fleet import status as devices_of

    keys = devices_of(tracker)
    if as_json:
        emit([{"key": d.key, "devices": d.devices, "free": d.free, "busy": d.busy, "queued": d.queued} for d in keys])
        return
    if not keys:
        note(f"tracker {tracker}: no devices")
        return
    header = ("key", "devices>", "free>", "busy>", "queued>")
    say_table(table(header, [(d.key, d.devices, d.free, d.busy, d.queued) for d in keys]))


def _until_ended(run: Callable[..., None], *arguments: Any, **keywords: Any) -> None:
    """Run a server; a request to end counts as Ctrl-C, so that the server cleans up after itself."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run(*arguments, **keywords)


for command in (bundle.pack, bundle.run, bundle.import_):
    fleet.add_command(command)
