"""Fingerprints of the code that schedules generate: proof that a change of the code base changed none of it.

For every layer of ``bench/problems``, on the targets and in the modes below, each applicable schedule's default is
lowered. Hashed are its picks, its predicted seconds, the scheduled TIR, the tensors it packs, and of a GPU's
schedule the CUDA source with its launches and tensor maps. Names of variables and blocks do not count: they are
numbered as they come, so that a variable may be called something better.

    python tests/lowering/fingerprints.py           compare with the committed ones; exit status 1 where any differs
    python tests/lowering/fingerprints.py --write   commit to what the schedules generate now

Nothing depends on the machine this runs on: targets are resolved for :data:`MACHINE`.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from convgen.cuda.code import generate
from convgen.errors import Inapplicable, SpecError
from convgen.formats.sources import read_specs
from convgen.hardware.machine import Machine
from convgen.hardware.target import Target, resolve
from convgen.lowering.discover import schedules_of
from convgen.lowering.lower import lower
from convgen.lowering.schedule import Candidate, Schedule
from convgen.problem.spec import ConvSpec

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "lowering" / "fingerprints"

TARGETS = ("cpu:znver4", "cpu:znver5", "cpu:haswell", "cuda:sm_80", "cuda:sm_90a")
MODES: dict[str, dict[str, Any]] = {
    "f32 nchw": {"dtype": "f32", "layout": "nchw"},
    "f16 nhwc": {"dtype": "f16", "layout": "nhwc"},
    "i8 nchw": {"dtype": "i8", "layout": "nchw", "residual": False},
}
#: The machine that kernels are for: two cores, caches of 32 KiB, 1 MiB and 32 MiB. It has no name and no feature.
MACHINE = Machine(
    cpu="",
    fingerprint="none",
    features=frozenset(),
    cores=2,
    logical=2,
    l1=32 << 10,
    l2=1 << 20,
    l3=32 << 20,
    memory=16 << 30,
    arch="x86_64",
    llvm="",
    gpu=None,
)

#: A string, which stays; or a name, unless it is an attribute's or that of a keyword argument.
_TOKEN = re.compile(r"\"[^\"\n]*\"|(?<![\w.])[A-Za-z_]\w*(?!=[^=]|\w)")
_KEPT_IN_TIR = frozenset(
    """T I R Class None True False and as class def else elif except for from if import in is not or pass range return
    staticmethod while with""".split()  # noqa: SIM905
)
_KEPT_IN_CUDA = frozenset(
    """__global__ __device__ __shared__ __restrict__ __launch_bounds__ __align__ __grid_constant__ alignas blockIdx bool
    break case char const continue default do double else extern float float2 float4 for half half2 if int int2 int4
    inline int8_t int16_t int32_t int64_t long nv_bfloat16 return short signed sizeof static struct switch threadIdx
    uint uint2 uint4 uint8_t uint16_t uint32_t uint64_t unsigned void volatile while x y z w""".split()  # noqa: SIM905
)


def layers() -> list[ConvSpec]:
    """Every different layer of ``bench/problems``."""
    files = sorted((ROOT / "bench" / "problems").glob("*.json"))
    return list(dict.fromkeys(entry.spec for file in files for entry in read_specs(str(file))))


def in_mode(spec: ConvSpec, mode: str) -> ConvSpec | None:
    """A layer stored as the mode has it, without what that cannot have; None where it has no such layer."""
    try:
        changed = spec.with_(**MODES[mode])
    except SpecError:
        try:
            changed = spec.with_(**MODES[mode], activation="none")
        except SpecError:
            return None
    return changed


def _numbered(text: str, kept: frozenset[str], *, calls: bool) -> str:
    """The text with identifiers numbered in order of appearance, but those kept and, with ``calls``, what is called."""
    numbers: dict[str, str] = {}

    def number(match: re.Match[str]) -> str:
        name = match[0]
        is_called = calls and text[match.end() : match.end() + 1] in ("(", "<")
        if name in kept or name.startswith(("cg_", '"')) or is_called:
            return name
        return numbers.setdefault(name, f"v{len(numbers)}")

    return _TOKEN.sub(number, text)


def canonical_tir(text: str) -> str:
    """TVMScript without the names of variables and blocks."""
    text = re.sub(r"T\.sblock\(\"[^\"]*\"\)", "T.sblock()", text)
    return _numbered(text, _KEPT_IN_TIR, calls=False)


def canonical_cuda(text: str) -> str:
    """CUDA source without the names of variables."""
    return _numbered(text, _KEPT_IN_CUDA, calls=True)


def fingerprint(spec: ConvSpec, target: Target, schedule: Schedule) -> str:
    """Eight hexadecimal digits of everything a schedule's default generates for a layer.

    Raises:
        Inapplicable: the schedule does not apply.
    """
    core = spec.core
    schedule.check(core, target)
    picks = schedule.default(core, target)
    lowered = lower(spec, target, Candidate(schedule, picks))
    parts = [
        " ".join(f"{name}={value}" for name, value in picks.items()),
        f"{schedule.cost(core, target):.12e}",
        repr(lowered.packed),
    ]
    parts.append(canonical_tir(str(lowered.module.script())))
    if target.kind == "cuda":
        device = generate(lowered)
        parts += [canonical_cuda(device.text), repr(device.workspace)]
        parts += [re.sub(r"'\w+'", "''", repr(launch)) for launch in device.launches]
    return hashlib.sha256("\n\0".join(parts).encode()).hexdigest()[:8]


def lines(target: Target, mode: str, specs: list[ConvSpec]) -> Iterator[str]:
    """A line for each layer: its descriptor, then ``schedule:fingerprint`` of each schedule that applies."""
    for layer in specs:
        spec = in_mode(layer, mode)
        if spec is None:
            continue
        found = []
        for schedule in schedules_of(target.kind).values():
            try:
                found.append(f"{schedule.id}:{fingerprint(spec, target, schedule)}")
            except Inapplicable:
                continue
        yield f"{spec.descriptor}\t{' '.join(found)}"


def path_of(target: str, mode: str) -> Path:
    """Where the lines of a target and mode are kept."""
    return FOLDER / f"{target.replace(':', '-')} {mode}.txt".replace(" ", "-")


def compute(target: str, mode: str) -> list[str]:
    """All lines of a target and mode."""
    return list(lines(resolve(target, MACHINE), mode, layers()))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="keep what the schedules generate now")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--targets", nargs="*", choices=TARGETS, default=TARGETS, help="of these only")
    options = parser.parse_args()
    pairs = [(target, mode) for target in options.targets for mode in MODES]
    differences = 0
    with ProcessPoolExecutor(options.jobs) as pool:
        for (target, mode), found in zip(pairs, pool.map(compute, *zip(*pairs, strict=True)), strict=True):
            path = path_of(target, mode)
            if options.write:
                path.parent.mkdir(exist_ok=True)
                path.write_text("".join(f"{line}\n" for line in found))
            else:
                known = set(path.read_text().splitlines())
                changed = [line for line in found if line not in known]
                gone = known - set(found)
                differences += len(changed) + len(gone)
                for line in [f"+ {line}" for line in changed] + [f"- {line}" for line in sorted(gone)]:
                    print(line)
            print(f"{target}, {mode}: {len(found)} layers", file=sys.stderr, flush=True)
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
