"""Random layers, random candidates, the full validation: looks for what nobody thought of.

Spec ``k`` of a seed and its candidates depend on the seed, ``k``, the target and the schedules there
are; how fast a machine is decides only how many are checked. Each candidate is checked in a worker
process, so that a compiler that crashes or hangs is a finding and not the end:
``python -m convgen.check.fuzz`` is the worker.

A failure is shrunk, one field or pick at a time, for as long as it fails in the same way (after
Zeller & Hildebrandt, *Simplifying and Isolating Failure-Inducing Input*, IEEE TSE 28(2), 2002), and
reported as the command that repeats it.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Event, Lock
from typing import Any, TypeVar

from ..errors import BuildError, Inapplicable, SpecError, UnsupportedError
from ..hardware.target import Target, check_native, resolve
from ..kernel.kernel import compile_candidate
from ..lowering.candidates import default_candidate, parse_candidate
from ..lowering.discover import schedule as find_schedule
from ..lowering.discover import schedules, schedules_of
from ..lowering.schedule import Picks, Schedule
from ..problem.activation import DEFAULTS, Activation
from ..problem.dtypes import DTYPES
from ..problem.spec import ACCURACIES, ConvSpec

#: A layer's multiply-accumulates and a tensor's elements, at most: compiling is to take most of the time.
MOST_MACS, MOST_ELEMENTS = 2_000_000, 200_000
#: Taps of a kernel, at most: some schedules unroll them all, and LLVM takes long over that.
MOST_TAPS = 125
#: Channels per group, and pixels per axis by rank, at most.
MOST_CHANNELS, MOST_PIXELS = 130, {1: 150, 2: 30, 3: 9}
#: Specs drawn for a schedule until it applies; points of a space until one is valid.
DRAWS = 6000
#: Seconds a worker has for one candidate.
LIMIT = 100.0
#: Candidates after which a worker is replaced: TVM leaks a little with every compilation.
WORKER_USES = 200
#: Seconds spent on shrinking one finding, and findings shrunk that are of one kind and schedule.
SHRINK_SECONDS, MOST_SHRUNK = 120.0, 2

#: How a check can end.
KINDS = {
    "ok": "passed",
    "wrong": "values are not what ONNX Runtime computes, on floats or integers",
    "memory": "an access outside a buffer, or the kernel refused the call",
    "threads": "the result depends on the number of threads or the placement of the buffers",
    "special": "NaN or infinities are not where ONNX Runtime has them",
    "refusal": "a buffer was accepted that must be refused",
    "build": "lowering, compiling or linking failed",
    "refused": "a default or valid picks, the reference or the default candidate was said not to apply",
    "descriptor": "the spec is another one after it was written down and read back",
    "error": "an exception that is not raised on purpose",
    "crash": "the process died",
    "hang": "no answer in time",
}

#: What the draw is weighted towards.
FEATURES: dict[str, Callable[[ConvSpec], bool]] = {
    "batch 0": lambda s: s.n == 0,
    "batch 1": lambda s: s.n == 1,
    "batch 2": lambda s: s.n == 2,
    "one channel": lambda s: 1 in (s.ic, s.oc),
    "one pixel": lambda s: 1 in (math.prod(s.in_spatial), s.out_pixels),
    "groups = 1": lambda s: s.groups == 1,
    "groups in between": lambda s: 1 < s.groups < s.ic,
    "groups = ic": lambda s: s.is_depthwise,
    "kernel = input": lambda s: s.kernel == s.in_spatial,
    "stride > kernel": lambda s: any(t > k for t, k in zip(s.stride, s.kernel, strict=True)),
    "dilation past the input": lambda s: any(
        k > 1 and d > i for k, d, i in zip(s.kernel, s.dilation, s.in_spatial, strict=True)
    ),
    "padding > kernel": lambda s: any(max(p) > k for p, k in zip(s.padding, s.kernel, strict=True)),
    "asymmetric padding": lambda s: any(begin != end for begin, end in s.padding),
}


@dataclass(frozen=True)
class Case:
    """A candidate to check, in the words of the command line.

    ``schedule`` is None for whatever is the layer's default, ``picks`` None for the schedule's own.
    """

    spec: ConvSpec
    target: str
    threads: int
    seed: int
    schedule: str | None = None
    picks: Picks | None = None

    @property
    def command(self) -> str:
        """The command that repeats the check."""
        chosen = "--no-records" if self.schedule is None else f"--schedule {self.schedule}"
        if self.picks is not None:
            chosen += f' --picks "{self.picks}"'
        layer = f'"{self.spec.descriptor}" --target {self.target} --threads {self.threads}'
        return f"convgen validate {layer} {chosen} --seed {self.seed}"

    def to_dict(self) -> dict[str, Any]:
        """The arguments of :func:`check`."""
        picks = None if self.picks is None else str(self.picks)
        return {**vars(self), "spec": self.spec.descriptor, "picks": picks}


# ---- drawing ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """A spec, the candidates to check, and what could not be drawn, with the reason."""

    spec: ConvSpec
    cases: tuple[Case, ...]
    skipped: tuple[str, ...]


def draw(seed: int, index: int, target: Target, *, threads: int | None = None, schedule: str | None = None) -> Draw:
    """Spec ``index`` of a seed with its candidates.

    A schedule is drawn first and then specs until it applies, so that each is reached equally
    often. The candidates: the layer's default; that schedule's default and a random valid point; and
    one of any schedule that applies. What must be valid and is not is a candidate too: it is refused.

    Args:
        threads: of the kernels; drawn where None.
        schedule: the only one to draw candidates of.
    """
    rng = random.Random(f"{seed} {index}")
    lanes = (target.vector_bits // 32,)
    wanted = find_schedule(schedule or rng.choice(list(schedules_of(target.kind))))
    for _ in range(DRAWS):
        spec = _spec(rng, lanes)
        why = wanted.reason_against(spec.core, target)
        if why is not None:  # for lack of nothing but accuracy, or of a type with fractions?
            loose = spec.with_(accuracy="relaxed", dtype="f32" if spec.dtype == "i8" else spec.dtype)
            if wanted.reason_against(loose.core, target) is None:
                spec, why = loose, None
        if why is None:
            spec = _off_the_tiles(rng, spec, wanted, target)
            break
    core = spec.core
    skipped = [f"{wanted.id} applies to none of {DRAWS} specs: {why}"] if why else []
    applicable = [s for s in schedules().values() if s.reason_against(core, target) is None]

    common = (spec, target.spelling, threads or rng.choice((2, 3, 3, 5)), rng.randrange(1000))
    cases = []
    if schedule is None:
        try:
            best = default_candidate(spec, target)
            cases.append(Case(*common, best.schedule.id, best.picks))
        except UnsupportedError:
            cases.append(Case(*common))
        if find_schedule("reference") not in applicable:
            cases.append(Case(*common, "reference"))
        for other in applicable:
            default = other.default(core, target)
            if other.reason_against(core, target, default):
                cases.append(Case(*common, other.id, default))
    if wanted in applicable:
        cases.append(Case(*common, wanted.id, wanted.default(core, target)))
        for chosen in (wanted, wanted if schedule else rng.choice(applicable)):
            picks = _valid_picks(rng, chosen, core, target)
            if picks is None:
                skipped.append(f"{chosen.id}: none of {DRAWS} points of a space is valid")
            else:
                cases.append(Case(*common, chosen.id, picks))
    return Draw(spec, tuple(dict.fromkeys(cases)), tuple(skipped))


def _valid_picks(rng: random.Random, schedule: Schedule, core: ConvSpec, target: Target) -> Picks | None:
    space = schedule.space(core, target)
    points = (space.sample(rng) for _ in range(DRAWS))
    return next((p for p in points if schedule.reason_against(core, target, p) is None), None)


def _is_small(spec: ConvSpec) -> bool:
    few = spec.macs <= MOST_MACS and math.prod(spec.kernel) <= MOST_TAPS
    return few and all(math.prod(shape) <= MOST_ELEMENTS for shape in spec.shapes.values())


def _off_the_tiles(rng: random.Random, spec: ConvSpec, schedule: Schedule, target: Target) -> ConvSpec:
    """The spec with sizes at and beside multiples of the schedule's own numbers, where it still applies."""
    domains = schedule.space(spec.core, target).domains.values()
    tiles = [v for v in dict.fromkeys(v for values in domains for v in values) if type(v) is int and v > 1]
    if not tiles:
        return spec
    for _ in range(8):
        changes: dict[str, Any] = {}
        if rng.random() < 0.7:
            ic, oc = (_near(rng, tiles, MOST_CHANNELS) for _ in range(2))
            if spec.is_depthwise:
                changes = {"ic": ic, "groups": ic, "oc": ic * (spec.oc // spec.ic)}
            else:
                changes = {"ic": ic * spec.groups, "oc": oc * spec.groups}
        if rng.random() < 0.6:
            most = MOST_PIXELS[spec.rank]
            axes = zip(spec.kernel, spec.stride, spec.dilation, spec.padding, strict=True)
            sizes = [_size(rng, _near(rng, tiles, most), *axis, transposed=spec.transposed) for axis in axes]
            changes["in_spatial"] = tuple(sizes)
        with suppress(SpecError):
            changed = spec.with_(**changes)
            if _is_small(changed) and schedule.reason_against(changed.core, target) is None:
                return changed
    return spec


def _near(rng: random.Random, tiles: Sequence[int], most: int) -> int:
    """A size up to ``most``: a few tiles, or one more or less; or a small number."""
    size = rng.choice(tiles) * rng.choice((1, 1, 1, 2, 3)) + rng.choice((-1, 0, 1))
    return size if rng.random() < 0.65 and 1 <= size <= most else rng.randint(1, min(5, most))


def _size(
    rng: random.Random,
    size: int,
    kernel: int,
    stride: int,
    dilation: int,
    padding: tuple[int, int],
    *,
    transposed: bool,
) -> int:
    """An axis' input size: ``size`` itself, or such that the output has it; at least what the kernel covers."""
    window, pads = (kernel - 1) * dilation + 1, sum(padding)
    if rng.random() < 0.5:
        size = (size + pads - window) // stride + 1 if transposed else (size - 1) * stride + window - pads
    return max(size, 1, 0 if transposed else window - pads)


def _spec(rng: random.Random, tiles: Sequence[int]) -> ConvSpec:
    """A small spec of any kind."""
    while True:
        with suppress(SpecError):  # a transposed convolution that is cropped to nothing
            spec = ConvSpec(**_fields(rng, tiles))
            if _is_small(spec):
                return spec


def _fields(rng: random.Random, tiles: Sequence[int]) -> dict[str, Any]:
    rank, transposed = rng.choice((1, 2, 2, 3)), rng.random() < 0.3
    axes = [_axis(rng, transposed) for _ in range(rank)]
    if rng.random() < 0.6:
        axes = [dict(axes[0]) for _ in axes]  # alike, but for the size
    for axis in axes:
        if not axis["in_spatial"]:
            near = _near(rng, tiles, MOST_PIXELS[rank])
            window = axis["kernel"], axis["stride"], axis["dilation"], axis["padding"]
            axis["in_spatial"] = _size(rng, near, *window, transposed=transposed)
    fields = {
        **_channels(rng, tiles),
        **{name: tuple(axis[name] for axis in axes) for name in axes[0]},
        "n": rng.choice((1, 1, 1, 1, 2, 2, 0)),
        "transposed": transposed,
        "bias": rng.random() < 0.6,
        "residual": rng.random() < 0.3,
        "activation": _activation(rng),
        "accuracy": rng.choice(ACCURACIES),
        "dtype": rng.choice(DTYPES),
        "layout": rng.choice(("nchw", "nhwc")),
    }
    if fields["dtype"] == "i8":  # which has no others
        fields |= {"transposed": False, "output_padding": 0, "residual": False, "accuracy": "standard"}
        fields["activation"] = rng.choice(("none", "relu"))
    return fields


def _axis(rng: random.Random, transposed: bool) -> dict[str, Any]:
    """What is along one spatial axis; its input size is 0 where that is open."""
    kernel, dilation = rng.choice((1, 1, 1, 2, 3, 3, 3, 4, 5, 7)), rng.choice((1, 1, 1, 1, 2, 3))
    stride, size = rng.choice((1, 1, 1, 1, 2, 2, 3)), 0
    twist = rng.choice(("", "", "", "", "whole", "past", "stride", "padding", "pixel"))
    if twist == "whole":
        size, dilation = kernel, 1
    elif twist == "past":
        size, kernel = rng.randint(1, 4), max(kernel, 2)
        dilation = size + rng.randint(1, 2)
    elif twist == "stride":
        stride = kernel + rng.randint(1, 3)
    elif twist == "pixel":
        size = 1
    window = (kernel - 1) * dilation + 1
    if twist == "padding":
        padding = [kernel + rng.randint(1, 3), rng.randint(0, kernel + 2)]
    elif size:  # as much as it takes, on any side
        missing = 0 if transposed else max(0, window - size)
        begin = rng.randint(0, missing)
        padding = [begin, missing - begin + rng.choice((0, 0, 1))]
    else:
        same = (window - 1) // 2
        padding = rng.choice(([0, 0], [0, 0], [same, same], [rng.randint(0, same), rng.randint(0, window // 2)]))
    extra = rng.choice((0, max(stride, dilation) - 1)) if transposed else 0
    return {
        "in_spatial": size,
        "kernel": kernel,
        "stride": stride,
        "dilation": dilation,
        "padding": tuple(rng.sample(padding, 2)),
        "output_padding": extra,
    }


def _channels(rng: random.Random, tiles: Sequence[int]) -> dict[str, int]:
    kind = rng.choice(("dense", "dense", "dense", "dense", "between", "between", "depthwise", "depthwise", "one"))
    ic, oc = (_near(rng, tiles, MOST_CHANNELS) for _ in range(2))
    if kind == "one":
        ic, oc = rng.choice(((1, oc), (ic, 1), (1, 1)))
    if kind == "between":
        groups = rng.choice((2, 3, 4, 5))
        if rng.random() < 0.4:  # whole vectors of a group, which some schedules ask for
            ic, oc = (tiles[0] * rng.choice((1, 1, 2)) for _ in range(2))
        return {"ic": groups * max(ic, 2), "oc": groups * oc, "groups": groups}
    if kind == "depthwise":
        return {"ic": max(ic, 2), "oc": max(ic, 2) * rng.choice((1, 1, 1, 2, 3)), "groups": max(ic, 2)}
    return {"ic": ic, "oc": oc, "groups": 1}


def _activation(rng: random.Random) -> str:
    """None or relu half of the time; any parameters half of the time."""
    name = rng.choice(("none", "relu", rng.choice(list(DEFAULTS)), rng.choice(list(DEFAULTS))))
    params = sorted(rng.choice((-1.0, 0.25, 0.5, 1.5, 3.0)) for _ in DEFAULTS[name])
    return str(Activation(name, tuple(params) if rng.random() < 0.5 else DEFAULTS[name]))


# ---- checking ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How a check ended: one of :data:`KINDS`, what was found, the checks made, and the largest
    error as a fraction of its bound.
    """

    kind: str
    message: str = ""
    checks: tuple[str, ...] = ()
    error: float = 0.0


def check(spec: str, target: str, threads: int, seed: int, schedule: str | None, picks: str | None) -> Outcome:
    """Build a candidate and validate it, as ``convgen validate`` does; never raises."""
    from .validate import validate

    try:
        layer, where = ConvSpec.parse(spec), _resolved(target)
        if schedule is None:
            candidate = default_candidate(layer, where)
        else:
            candidate = parse_candidate(layer, where, schedule, picks)
        report = validate(compile_candidate(layer, where, candidate, threads), seed=seed)
    except BuildError as error:
        return Outcome("build", str(error))
    except (SpecError, Inapplicable, UnsupportedError) as error:
        return Outcome("refused", str(error))
    except Exception as error:  # whatever it is, it is a finding
        return Outcome("error", f"{type(error).__name__}: {error}")
    made = tuple(made.name for made in report.checks)
    for failed in report.checks:
        if not failed.passed:
            kind = "wrong" if failed.name in ("float", "exact") else failed.name
            return Outcome(kind, f"{failed.name}: {failed.found}", made)
    return Outcome("ok", "", made, report.worst_error)


@cache
def _resolved(target: str) -> Target:
    return resolve(target)


def misread(spec: ConvSpec) -> Outcome | None:
    """What is wrong with the spec after it was written down and read back, if anything is."""
    readers: dict[str, Callable[[], ConvSpec]] = {
        "descriptor": lambda: ConvSpec.parse(spec.descriptor),
        "dictionary": lambda: ConvSpec.from_dict(json.loads(json.dumps(spec.to_dict()))),
    }
    for form, read in readers.items():
        try:
            found = read()
        except SpecError as error:
            return Outcome("descriptor", f"{form}: {error}")
        if found != spec or found.key != spec.key:
            return Outcome("descriptor", f"{form}: expected {spec}, found {found}")
    return None


class Worker:
    """A process that checks one case after the other; another takes its place when it dies or hangs."""

    def __init__(self, limit: float = LIMIT) -> None:
        self._limit, self._uses = limit, 0
        self._process: tuple[subprocess.Popen[bytes], Connection] | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="convgen-"))

    def check(self, case: Case) -> Outcome:
        """How the case ends; ``crash`` and ``hang`` are ends of the process."""
        if self._uses >= WORKER_USES:
            self.stop()
        starts = self._process is None
        process, pipe = self._process = self._process or self._start()
        self._uses += 1
        with suppress(EOFError, ConnectionError):
            if starts:
                pipe.recv()  # ready: to start is none of the case's time
            pipe.send(case.to_dict())
            if pipe.poll(self._limit):
                return Outcome(**pipe.recv())
            self.stop()
            return Outcome("hang", f"no answer within {self._limit:.0f} s")
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)  # its pipe ends a moment before it does
        self.stop()
        said = (self._folder / "stderr").read_text(errors="replace").strip()[-500:]
        status = process.returncode
        return Outcome("crash", f"{f'signal {-status}' if status < 0 else f'exit status {status}'}: {said}")

    def _start(self) -> tuple[subprocess.Popen[bytes], Connection]:
        ours, theirs = Pipe()
        shutil.rmtree(self._folder, ignore_errors=True)  # what a killed process left behind
        self._folder.mkdir()
        with theirs, (self._folder / "stderr").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "convgen.check.fuzz", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdout=log,
                stderr=log,
                env={**os.environ, "TMPDIR": str(self._folder)},
                start_new_session=True,  # Ctrl-C is not for it, and what it started ends with it
            )
        return process, ours

    def kill(self) -> None:
        """End the process and whatever it started; from any thread. A check that waits for it sees a crash."""
        if self._process:
            with suppress(ProcessLookupError):
                os.killpg(self._process[0].pid, signal.SIGKILL)

    def stop(self) -> None:
        """End the process; the next check starts another."""
        self.kill()
        if self._process:
            process, pipe = self._process
            process.wait()
            pipe.close()
        self._process, self._uses = None, 0

    def close(self) -> None:
        """End for good."""
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)


def _serve(pipe: Connection) -> None:
    """What a worker process does until its starter is gone."""
    from ..check import validate  # noqa: F401 - imports ONNX Runtime, and takes a while

    faulthandler.enable()
    pipe.send("ready")
    with suppress(EOFError):
        while True:
            pipe.send(asdict(check(**pipe.recv())))


# ---- shrinking --------------------------------------------------------------------------------

T = TypeVar("T", bound=Hashable)
Step = Callable[[T], Iterable[T]]


def shrink(value: T, steps: Sequence[Step[T]], fails: Callable[[T], bool], until: float = math.inf) -> T:
    """The simplest value that ``steps`` lead to and that still ``fails``.

    A step gives simpler values, the simplest first, and is repeated while one of them fails; all
    steps are, until none helps or the clock says ``until``. Nothing is tried twice.
    """
    tried = {value}

    def simpler(step: Step[T]) -> T | None:
        for candidate in step(value):
            if candidate not in tried and time.monotonic() < until:
                tried.add(candidate)
                if fails(candidate):
                    return candidate
        return None

    before = None
    while before != value:
        before = value
        for step in steps:
            while (found := simpler(step)) is not None:
                value = found
    return value


Changes = dict[str, Any]


def _smaller(value: int, least: int) -> list[int]:
    """Down to ``least``: that itself, the middle, one less."""
    return [v for v in dict.fromkeys((least, (least + value) // 2, value - 1)) if least <= v < value]


def _plain(name: str, neutral: Any) -> Callable[[ConvSpec], Iterator[Changes]]:
    """A field at its neutral value."""

    def step(spec: ConvSpec) -> Iterator[Changes]:
        if getattr(spec, name) != neutral:
            yield {name: neutral}

    return step


def _epilogue(spec: ConvSpec) -> Iterator[Changes]:
    yield {"bias": False, "residual": False, "activation": "none"}
    yield {"residual": False}
    yield {"activation": "none"}
    yield {"bias": False}


SPATIAL = ("in_spatial", "kernel", "stride", "padding", "dilation", "output_padding")


def _fewer_axes(spec: ConvSpec) -> Iterator[Changes]:
    for axis in range(spec.rank if spec.rank > 1 else 0):
        yield {name: (v := getattr(spec, name))[:axis] + v[axis + 1 :] for name in SPATIAL}


def _not_transposed(spec: ConvSpec) -> Iterator[Changes]:
    if spec.transposed:
        yield {"transposed": False, "output_padding": (0,) * spec.rank}


def _groups(spec: ConvSpec) -> Iterator[Changes]:
    ic, oc = spec.ic // spec.groups, spec.oc // spec.groups
    for groups in _smaller(spec.groups, 1):
        yield {"groups": groups, "ic": ic * groups, "oc": oc * groups}


def _channels_of(name: str) -> Callable[[ConvSpec], Iterator[Changes]]:
    def step(spec: ConvSpec) -> Iterator[Changes]:
        for count in _smaller(getattr(spec, name) // spec.groups, 1):
            yield {name: count * spec.groups}

    return step


def _axis_by_axis(name: str, least: int) -> Callable[[ConvSpec], Iterator[Changes]]:
    """Smaller numbers along all axes, then along one."""

    def step(spec: ConvSpec) -> Iterator[Changes]:
        values = getattr(spec, name)
        yield {name: (least,) * spec.rank}
        for axis in range(spec.rank):
            for value in _smaller(values[axis], least):
                yield {name: (*values[:axis], value, *values[axis + 1 :])}

    return step


def _less_padding(spec: ConvSpec) -> Iterator[Changes]:
    yield {"padding": ((0, 0),) * spec.rank}
    for axis, (begin, end) in enumerate(spec.padding):
        for pair in [(b, end) for b in _smaller(begin, 0)] + [(begin, e) for e in _smaller(end, 0)]:
            yield {"padding": (*spec.padding[:axis], pair, *spec.padding[axis + 1 :])}


SPEC_STEPS: tuple[Callable[[ConvSpec], Iterable[Changes]], ...] = (
    _epilogue,
    _plain("dtype", "f32"),
    _plain("layout", "nchw"),
    _plain("accuracy", "standard"),
    _plain("n", 1),
    _fewer_axes,
    _not_transposed,
    _groups,
    _axis_by_axis("output_padding", 0),
    _axis_by_axis("stride", 1),
    _axis_by_axis("dilation", 1),
    _less_padding,
    _axis_by_axis("kernel", 1),
    _axis_by_axis("in_spatial", 1),
    _channels_of("ic"),
    _channels_of("oc"),
)


def case_steps(target: Target) -> list[Step[Case]]:
    """The steps from a case to simpler ones: its spec, its picks, its threads and seed."""

    def of_spec(step: Callable[[ConvSpec], Iterable[Changes]]) -> Step[Case]:
        def simpler(case: Case) -> Iterator[Case]:
            for changes in step(case.spec):
                with suppress(SpecError):
                    yield from _refitted(replace(case, spec=case.spec.with_(**changes)), target)

        return simpler

    return [*map(of_spec, SPEC_STEPS), partial(_simpler_picks, target=target), _simpler_run]


def _refitted(case: Case, target: Target) -> Iterator[Case]:
    """The case with picks of its spec's own space: the nearest to those it has, and the default."""
    core = case.spec.core
    schedule = find_schedule(case.schedule) if case.schedule else None
    if schedule is None or case.picks is None:
        yield case
    elif schedule.reason_against(core, target) is None:
        default = schedule.default(core, target)
        domains = schedule.space(core, target).domains
        near = Picks(**{name: _nearest(values, case.picks.get(name)) for name, values in domains.items()})
        if schedule.reason_against(core, target, near) is None:
            yield replace(case, picks=near)
        yield replace(case, picks=default)


def _nearest(values: Sequence[Any], wanted: Any) -> Any:
    below = [v for v in values if type(v) is type(wanted) is int and v <= wanted]
    return wanted if wanted in values else max(below, default=values[0])


def _simpler_picks(case: Case, target: Target) -> Iterator[Case]:
    """The default, then earlier values of the domains."""
    if not case.schedule or not case.picks:
        return
    schedule, core = find_schedule(case.schedule), case.spec.core
    yield replace(case, picks=schedule.default(core, target))
    for name, values in schedule.space(core, target).domains.items():
        present = case.picks[name]
        for value in values[: values.index(present) if present in values else None]:
            picks = case.picks.replace(**{name: value})
            if schedule.reason_against(core, target, picks) is None:
                yield replace(case, picks=picks)


def _simpler_run(case: Case) -> Iterator[Case]:
    yield replace(case, seed=0)
    yield from (replace(case, threads=threads) for threads in (1, 2) if threads < case.threads)


# ---- the run ----------------------------------------------------------------------------------


@dataclass
class Finding:
    """A failure: its kind, what was found, the spec's index, the case as drawn and as shrunk.

    ``repeats`` says whether it failed in the same way when it was checked again; None: it was not.
    """

    kind: str
    message: str
    index: int
    drawn: Case | None
    command: str
    repeats: bool | None = None

    @property
    def schedule(self) -> str:
        """Its schedule's id."""
        return (self.drawn.schedule if self.drawn else None) or "default"

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, the drawn case as its command."""
        return {**vars(self), "schedule": self.schedule, "drawn": self.drawn.command if self.drawn else None}


@dataclass
class Summary:
    """What a run has done so far."""

    seed: int
    target: str
    start: int = 0
    seconds: float = 0.0
    specs: int = 0
    candidates: int = 0
    interrupted: bool = False
    operators: Counter[str] = field(default_factory=Counter)
    dtypes: Counter[str] = field(default_factory=Counter)
    features: Counter[str] = field(default_factory=Counter)
    checks: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    #: Candidates by schedule, and by schedule and operator.
    schedules: dict[str, Counter[str]] = field(default_factory=dict)
    #: The largest error by schedule, as a fraction of its bound.
    errors: dict[str, float] = field(default_factory=dict)
    #: What took longest to build and validate: seconds, and the command.
    slowest: tuple[float, str] = (0.0, "")
    findings: list[Finding] = field(default_factory=list)

    def add_spec(self, drawn: Draw) -> None:
        spec = drawn.spec
        self.specs += 1
        self.operators[spec.operator] += 1
        self.dtypes[spec.dtype] += 1
        self.features.update(name for name, has in FEATURES.items() if has(spec))
        self.skipped.update(drawn.skipped)

    def add_candidate(self, case: Case, outcome: Outcome, seconds: float) -> None:
        name = case.schedule or "default"
        self.candidates += 1
        self.checks.update(outcome.checks)
        self.schedules.setdefault(name, Counter())[case.spec.operator] += 1
        self.errors[name] = max(self.errors.get(name, 0.0), outcome.error)
        self.slowest = max(self.slowest, (seconds, case.command))

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return {**vars(self), "findings": [finding.to_dict() for finding in self.findings]}


class Fuzzer:
    """A run over the specs of a seed.

    Args:
        threads, schedule: as of :func:`draw`.
        workers: candidates checked at once, each in a process of its own.
        limit: seconds for one candidate.

    Raises:
        UnsupportedError: the target is unknown or does not run here, or there is no such schedule.
    """

    def __init__(
        self,
        seed: int,
        target: str | Target = "cpu",
        *,
        threads: int | None = None,
        schedule: str | None = None,
        workers: int = 1,
        limit: float = LIMIT,
    ) -> None:
        self.target, self.threads, self.schedule = resolve(target), threads, schedule
        check_native(self.target)
        find_schedule(schedule or "reference")  # imports all of them
        self.summary = Summary(seed, self.target.spelling)
        self._workers, self._limit = workers, limit
        self._lock, self._stopped = Lock(), Event()

    def run(
        self,
        *,
        seconds: float | None = None,
        specs: int | None = None,
        start: int = 0,
        progress: Callable[[Summary], None] = lambda summary: None,
    ) -> Summary:
        """Check specs from ``start`` on, for some seconds, or so many, whichever ends first.

        An interrupt ends the run and is noted in the summary. ``progress`` is called a few times a
        second, from this thread.
        """
        began = time.monotonic()
        self.summary.start = start
        self._indices = iter(range(start, sys.maxsize if specs is None else start + specs))
        self._end = math.inf if seconds is None else began + seconds
        workers = [Worker(self._limit) for _ in range(self._workers)]
        with ThreadPoolExecutor(len(workers)) as pool:
            try:
                jobs = {pool.submit(self._work, worker) for worker in workers}
                while jobs:
                    done, jobs = wait(jobs, timeout=0.2, return_when=FIRST_COMPLETED)
                    for job in done:
                        job.result()
                    self.summary.seconds = time.monotonic() - began
                    with self._lock:
                        progress(self.summary)
            except KeyboardInterrupt:
                self.summary.interrupted = True
            finally:
                self._stopped.set()
                for worker in workers:
                    worker.kill()
        return self.summary

    def _work(self, worker: Worker) -> None:
        """One spec after the other, until the end."""
        try:
            while not self._stopped.is_set() and time.monotonic() < self._end:
                with self._lock:
                    index = next(self._indices, None)
                if index is None:
                    return
                self._check_spec(index, worker)
        finally:
            worker.close()

    def _check_spec(self, index: int, worker: Worker) -> None:
        summary = self.summary
        try:
            drawn = draw(summary.seed, index, self.target, threads=self.threads, schedule=self.schedule)
        except Exception as error:  # a schedule failed that was only asked
            found = Finding("error", f"{type(error).__name__}: {error}", index, None, self._draw_again(index))
            with self._lock:
                if found.message in (f.message for f in summary.findings):
                    summary.skipped[found.message] += 1
                else:
                    summary.findings.append(found)
            return
        with self._lock:
            summary.add_spec(drawn)
        for case in drawn.cases:
            began = time.monotonic()
            outcome = _outcome(case, worker)
            if self._stopped.is_set():
                return
            with self._lock:
                summary.add_candidate(case, outcome, time.monotonic() - began)
            if outcome.kind != "ok":
                self._found(index, case, outcome, worker)

    def _found(self, index: int, case: Case, outcome: Outcome, worker: Worker) -> None:
        """Note a failure, and shrink it where it is among the first of its kind."""
        found = Finding(outcome.kind, outcome.message, index, case, self._again(index, case, outcome))
        with self._lock:
            like = [f for f in self.summary.findings if f.kind == found.kind and f.schedule == found.schedule]
            self.summary.findings.append(found)
        if len(like) >= MOST_SHRUNK:
            return
        last = outcome

        def fails(simpler: Case) -> bool:
            nonlocal last
            seen = _outcome(simpler, worker)
            if seen.kind != outcome.kind or self._stopped.is_set():
                return False
            last = seen
            return True

        repeats = fails(case)
        if repeats:
            shrunk = shrink(case, case_steps(self.target), fails, time.monotonic() + SHRINK_SECONDS)
            found.command, found.message = self._again(index, shrunk, outcome), last.message
        found.repeats = None if self._stopped.is_set() and not repeats else repeats

    def _again(self, index: int, case: Case, outcome: Outcome) -> str:
        return self._draw_again(index) if outcome.kind == "descriptor" else case.command

    def _draw_again(self, index: int) -> str:
        options = f"--seed {self.summary.seed} --start {index} --specs 1 --target {self.target}"
        options += f" --threads {self.threads}" if self.threads else ""
        return f"convgen fuzz {options}" + (f" --schedule {self.schedule}" if self.schedule else "")


def _outcome(case: Case, worker: Worker) -> Outcome:
    return misread(case.spec) or worker.check(case)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
