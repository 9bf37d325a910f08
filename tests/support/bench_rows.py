"""Rows of a bench with written figures."""

from __future__ import annotations

from typing import Any

from convgen.problem.spec import ConvSpec
from convgen.report.rows import Row

A, B = "conv2d n1 ic64 oc64 i56x56 k3x3 s1x1 p1x1 relu", "conv2d n1 ic64 oc256 i56x56 k1x1 s1x1 p0x0"


def timing(name: str, seconds: float | None, problem: str = "") -> dict[str, Any]:
    version = "1.0" if seconds else None
    return {"name": name, "version": version, "way": "", "seconds": seconds, "rounds": [], "problem": problem}


def row(
    spec: str = A,
    threads: int = 1,
    *,
    own: float = 1e-3,
    default: float | None = None,
    ort: float | None = 2e-3,
    torch: float | None = 3e-3,
    interval: tuple[float, float] | None = (1.8, 2.1),
    count: int = 1,
    **more: Any,
) -> Row:
    peers = [timing("onnxruntime", ort), timing("torch", torch, "" if torch else "not installed")]
    best = min((seconds for seconds in (ort, torch) if seconds), default=None)
    kernels = [timing("tuned", own), timing("default", default)] if default else [timing("default", own)]
    return Row(
        {
            "spec": spec,
            "threads": threads,
            "flops": ConvSpec.parse(spec).flops,
            "kernels": kernels,
            "peers": peers,
            "ratio": best / own if best else None,
            "interval": list(interval) if best and interval else None,
            "best_peer": "onnxruntime" if best else None,
            "names": ["layer"],
            "count": count,
            "schedule": "cpu_direct",
            "peak": 100e9,
            "date": "2026-01-01",
            "cpu": "CPU",
            "fingerprint": "cpu-0",
            "python": "3.11",
            "versions": {"convgen": "0.1.0"},
            **more,
        }
    )


def new(*arguments: Any, seconds: float = 5e-4, limited_by: str = "compute", **more: Any) -> Row:
    """With what rows of older versions lack."""
    return row(*arguments, mode="warm", roofline={"seconds": seconds, "limited_by": limited_by}, **more)
