"""The build machine's side of a session with a device: functions that run in a process of their own, which holds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: This process's session, TVM's RPCSession.
_session: Any = None


def open_session(address: tuple[str, int], key: str) -> dict[str, Any]:
    """Wait for a device of that key; returns what it says about itself."""
    global _session
    from tvm.rpc import connect_tracker

    _session = None
    _session = connect_tracker(*address).request(key, max_retry=1)
    return dict(call("describe", None))


def call(function: str, request: Any) -> Any:
    """A device's answer to a function of :class:`~convgen.measure.fleet.device.Device`."""
    return json.loads(str(_session.get_function(f"convgen.{function}")(json.dumps(request))))


def measure_there(function: str, paths: list[str], directory: str, digest: str, request: dict[str, Any]) -> Any:
    """Send what the device lacks, then the candidates, and measure."""
    if not call("has", digest):
        names = sorted(path.name for path in Path(directory).glob("*.npy"))
        for name in names:
            _session.upload(str(Path(directory) / name), name)
        call("keep", {"digest": digest, "names": names})
    for index, path in enumerate(paths):
        _session.upload(path, f"{index}.so")
        _session.upload(str(Path(path).with_name("candidate.json")), f"{index}.json")
    return call(function, request | {"digest": digest, "candidates": len(paths)})
