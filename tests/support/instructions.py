"""What instructions need of a CPU, as GNU's assembler knows it: it refuses those that it is not allowed."""

from __future__ import annotations

import functools
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

#: What the assembler calls the instructions that all CPUs of an architecture have.
BASELINE = {"x86_64": "generic64", "aarch64": "armv8-a"}
#: Features that the assembler calls by other names than convgen.
NAMES = {
    "avxvnni": "avx_vnni", "amx-tile": "amx_tile", "amx-bf16": "amx_bf16", "amx-int8": "amx_int8",
    **{f"avx512{name}": f"avx512_{name}" for name in ("vnni", "vbmi2", "bitalg", "vpopcntdq", "bf16", "fp16")},
    "asimd": "simd", "asimdrdm": "rdma", "asimddp": "dotprod", "asimdhp": "fp16", "asimdfhm": "fp16fml",
    "fcma": "compnum", "atomics": "lse",
}  # fmt: skip
#: What older CPUs pass over, and what is used only where the CPU says that it can be.
HARMLESS = ("endbr64", "xgetbv")


def tool(name: str, arch: str) -> str:
    """``as`` or ``objdump`` for an architecture; the test is skipped where there is none."""
    full = name if arch == platform.machine() else f"{arch}-linux-gnu-{name}"
    if not shutil.which(full):
        pytest.skip(f"{full} is not installed")
    return full


def instructions(file: Path, arch: str) -> list[str]:
    """The different instructions of an object file or library, without the addresses they jump to."""
    command = [tool("objdump", arch), "--disassemble", "--no-show-raw-insn", "--no-addresses", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    comment = re.compile(r"\s+# .*" if arch == "x86_64" else r"\s+//.*")
    address = re.compile(r"(\b(0x)?[0-9a-f]+ )?<[^>]*>")
    lines = (comment.sub("", line.strip()) for line in text.splitlines() if line.startswith("\t"))
    plain = {re.sub(r"^(data16 |cs )+", "", address.sub(".", line)) for line in lines}
    return sorted(line for line in plain if line != "..." and not line.startswith(HARMLESS))


@functools.cache
def _unknown(isa: tuple[str, ...], arch: str) -> list[str]:
    """Those of the features that the assembler, which may be old, has never heard of."""
    return [name for name in isa if _assemble([], (name,), arch).returncode]


def _assemble(lines: list[str], isa: Iterable[str], arch: str) -> subprocess.CompletedProcess[str]:
    allowed = "+".join([BASELINE[arch], *(NAMES.get(name, name) for name in isa)])
    return subprocess.run(
        [tool("as", arch), f"-march={allowed}", "-o", "/dev/null", "-"],
        input="\n".join(lines) + "\n", capture_output=True, text=True, check=False,
    )  # fmt: skip


def beyond(file: Path, isa: Iterable[str], arch: str) -> list[str]:
    """The instructions of a file that not every CPU has which has the features of ``isa``."""
    isa, lines = tuple(isa), instructions(file, arch)
    assert lines
    if unknown := _unknown(isa, arch):
        pytest.skip(f"the assembler does not know {', '.join(unknown)}")
    done = _assemble(lines, isa, arch)
    errors = re.findall(r"^\{standard input\}:(\d+): Error: (.*)$", done.stderr, re.MULTILINE)
    assert bool(errors) == bool(done.returncode), done.stderr
    return [f"{lines[int(number) - 1]}: {error}" for number, error in errors]
