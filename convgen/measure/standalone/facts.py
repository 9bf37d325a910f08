"""What this machine is: what :mod:`convgen.hardware.machine` reads, for whoever imports the results."""

from __future__ import annotations

import contextlib
import glob
import os
import platform
import re
from typing import Any

from .driver import gpu_facts

#: Lines of /proc/cpuinfo that tell processors apart; others are clocks and serial numbers.
_KEPT = {
    *("vendor_id", "cpu family", "model", "stepping", "model name", "flags"),
    *("CPU implementer", "CPU part", "CPU variant", "CPU revision", "Features"),
}


def facts() -> dict[str, Any]:
    """This machine's processors, caches, memory and GPU, as JSON values."""
    usable = os.sched_getaffinity(0)
    return {
        "cpuinfo": processors(_read("/proc/cpuinfo")),
        "cpus": os.cpu_count() or 1,
        "architecture": platform.machine(),
        "cores": len({_core(cpu) for cpu in usable}),
        "logical": len(usable),
        "caches": caches(),
        "memory": physical_memory(),
        "gpu": gpu_facts(),
    }


def physical_memory() -> int:
    """Bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def processors(cpuinfo: str) -> str:
    """Of the text of /proc/cpuinfo the lines that tell processors apart, those of each kind of core once."""
    kinds: list[str] = []
    for block in re.split(r"\n\s*\n", cpuinfo.strip()):
        kept = "\n".join(line for line in block.splitlines() if line.partition(":")[0].strip() in _KEPT)
        if kept and kept not in kinds:
            kinds.append(kept)
    return "\n\n".join(kinds)


def pin(threads: int) -> None:
    """Keep this process on ``threads`` CPUs, on different physical cores as far as there are enough.

    Nothing happens where there are fewer CPUs, or where the system does not allow it.
    """
    seen: dict[str, int] = {}
    ranked = []  # a core's first CPU before any core's second
    for cpu in sorted(os.sched_getaffinity(0)):
        core = _core(cpu)
        seen[core] = seen.get(core, -1) + 1
        ranked.append((seen[core], cpu))
    if threads <= len(ranked):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, {cpu for _, cpu in sorted(ranked)[:threads]})


def _core(cpu: int) -> str:
    """A name that the logical CPUs of one core share."""
    return _read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").strip() or str(cpu)


def caches() -> dict[str, int]:
    """Level -> bytes of the data or unified cache of one core, where the system tells."""
    sizes = {}
    for folder in sorted(glob.glob("/sys/devices/system/cpu/cpu0/cache/index*")):
        kind, level, size = (_read(os.path.join(folder, name)).strip() for name in ("type", "level", "size"))
        match = re.match(r"(\d+)([KMG])\Z", size)
        if kind in ("Data", "Unified") and level.isdigit() and match:
            sizes[level] = int(match.group(1)) << {"K": 10, "M": 20, "G": 30}[match.group(2)]
    return sizes


def _read(path: str) -> str:
    """A file's text; empty where it cannot be read."""
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return ""
