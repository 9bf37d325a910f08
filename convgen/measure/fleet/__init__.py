"""Measuring on other machines, through TVM's own RPC tracker and servers.

A device runs :func:`serve`: TVM's RPC server, which also answers ``convgen.…`` functions and reports to TVM's tracker.
The build machine's :class:`RemoteRunner` asks the tracker for every device of a key and sends candidates to all of
them. A device does to a candidate what :mod:`convgen.measure.trial` does here, in a worker process of its own: a
candidate that crashes costs a trial and not the server.

A candidate's library and ``candidate.json`` travel with each trial. The inputs and the expected output of a layer
travel to each device once, which keeps them by their digest.

TVM's RPC has no authentication: whoever reaches a server can run any program there.
"""

from __future__ import annotations

from .device import serve
from .remote import RemoteRunner
from .tracker import Devices, is_loopback, parse_address, run_tracker, status

__all__ = ["Devices", "RemoteRunner", "is_loopback", "parse_address", "run_tracker", "serve", "status"]
