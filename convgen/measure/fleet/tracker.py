"""TVM's RPC tracker: addresses, what it knows, running one."""

from __future__ import annotations

import ipaddress
import re
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

from ...errors import MeasureError, SpecError
from ...interrupts import interrupts_blocked


def parse_address(field_name: str, text: str) -> tuple[str, int]:
    """``host:port``, an IPv6 host in brackets.

    Raises:
        SpecError: the text is no address; names the field.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise SpecError(field_name, "HOST:PORT", repr(text))
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens at ``host``."""
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host or "0.0.0.0", None)}
        return bool(addresses) and all(ipaddress.ip_address(address).is_loopback for address in addresses)
    except (OSError, ValueError):
        return False


@dataclass(frozen=True)
class Devices:
    """The devices of one key: how many there are, how many nobody uses, how many requests wait for one."""

    key: str
    devices: int
    free: int
    queued: int

    @property
    def busy(self) -> int:
        return max(0, self.devices - self.free)


def status(tracker: str) -> list[Devices]:
    """What the tracker at ``host:port`` knows, by key.

    Raises:
        SpecError: ``tracker`` is no address.
        MeasureError: no tracker answers there.
    """
    from tvm.rpc import base

    address = parse_address("tracker", tracker)
    try:
        with socket.create_connection(address, timeout=5.0) as connection:
            connection.sendall(struct.pack("<i", base.RPC_TRACKER_MAGIC))
            if struct.unpack("<i", base.recvall(connection, 4))[0] != base.RPC_TRACKER_MAGIC:
                raise ValueError("another answer")
            base.sendjson(connection, [base.TrackerCode.SUMMARY])
            code, summary = base.recvjson(connection)
        servers = [str(server["key"]).removeprefix("server:") for server in summary["server_info"]]
        queues = {str(key): (int(q["free"]), int(q["pending"])) for key, q in summary["queue_info"].items()}
        if code != base.TrackerCode.SUCCESS:
            raise ValueError(f"code {code}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
        raise MeasureError(f"tracker: expected TVM's RPC tracker at {tracker}, found {error}") from error
    counts: dict[str, int] = dict.fromkeys(queues, 0)
    for server in servers:  # a proxy reports all its keys in one
        inner = re.fullmatch(r"proxy\[(.*)\]", server)
        for key in inner[1].split(",") if inner else [server]:
            counts[key] = counts.get(key, 0) + 1
    rows = [(key, count, *queues.get(key, (0, 0))) for key, count in sorted(counts.items())]
    return [Devices(key, max(count, free), free, queued) for key, count, free, queued in rows if key]


def run_tracker(host: str, port: int, ready: Callable[[int], None] = lambda port: None) -> None:
    """Be TVM's tracker until interrupted; ``ready`` is told the port.

    Raises:
        MeasureError: the port is taken or not allowed.
    """
    from tvm.rpc import base
    from tvm.rpc.tracker import PopenTrackerServerState

    try:
        with interrupts_blocked():
            state = PopenTrackerServerState(host, port, port + 1, silent=True)
    except (OSError, ValueError) as error:
        raise MeasureError(f"tracker: expected a free port at {host}:{port}, found {error}") from error
    try:
        ready(state.port)
        while state.thread.is_alive():
            state.thread.join(0.5)
    finally:
        with socket.create_connection((host, state.port), timeout=5.0) as connection:
            connection.sendall(struct.pack("<i", base.RPC_TRACKER_MAGIC))
            base.recvall(connection, 4)
            base.sendjson(connection, [base.TrackerCode.STOP, state.stop_key])
