"""Candidates on this machine's CPU or its GPU: prepared, called, compared with what is expected, timed."""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import statistics
from typing import Any, Callable, List, Sequence

from .errors import Refused
from .facts import caches
from .gpu import Gpu, GpuCall
from .interface import BYTES, DTYPES, NO_MEMORY, PARAMETERS, Difference, PackArgs, RunArgs, Sizes, aligned, pass_tensors
from .rotation import copies_of
from .timing import Call, alternate, sample, time_calls


class Cpu:
    """Candidates that run on the CPU: shared libraries with convgen's C runtime.

    Args:
        root: the bundle.
        layer: the manifest's entry: the shapes, and the inputs and expected output: files, or how inputs are drawn.
        check: the library that compares outputs.
        threads: of the calls.
    """

    #: Whether a process may be held to its memory by a limit of addresses.
    is_limited = True
    #: The facts of a machine that all results of a file share.
    machine_facts: tuple[str, ...] = ("cpuinfo", "cpus", "architecture")

    def __init__(self, root: str, layer: dict[str, Any], check: str, threads: int) -> None:
        self.root, self.layer, self.threads = root, layer, threads
        self.check = self.open(check)
        self.data = {name: self._tensor(made) for name, made in layer["data"].items()}
        self._pool = ctypes.c_void_p()

    def prepare(self, trial: dict[str, Any], apart: bool = False) -> tuple[Call, Call]:
        """A call of a candidate on the layer's inputs, and a function that gives the memory it writes.

        A call finds its weights in memory, as in a network.

        Args:
            apart: each buffer is memory of its own; of a GPU's, where else they are parts of one.

        Raises:
            Refused: this CPU cannot run the candidate's code.
            MemoryError: there is not enough memory.
            RuntimeError: the library refused.
        """
        library, name = self.open(trial["library"]), trial["name"]

        def function(suffix: str) -> Any:
            return getattr(library, name + "_" + suffix)

        error = function("error")
        error.restype = ctypes.c_char_p

        def require(status: int) -> None:
            if status == NO_MEMORY:
                raise MemoryError(error(status).decode())
            if status:
                raise RuntimeError(error(status).decode())

        if function("check_cpu")():
            raise Refused("this CPU lacks instructions of " + trial["target"])
        sizes = Sizes()
        require(function("sizes")(self.threads, ctypes.byref(sizes)))
        workspace, copies = aligned(sizes.workspace), self._packed(function("pack"), sizes, require)
        if self.threads > 1 and not self._pool:  # one pool serves all libraries
            require(function("pool_create")(self.threads, ctypes.byref(self._pool)))
        dst = (ctypes.c_char * sizes.dst)()
        ctypes.memset(dst, 0xFF, sizes.dst)  # NaN
        arguments = []
        for packed in copies:
            args = RunArgs(packed=packed, packed_size=sizes.packed, dst=ctypes.addressof(dst), dst_size=sizes.dst)
            args.workspace, args.workspace_size, args.pool = workspace, sizes.workspace, self._pool
            pass_tensors(args, sizes, self.data, "src", "residual")
            arguments.append(args)
        run, following = function("run"), itertools.cycle([ctypes.byref(args) for args in arguments]).__next__

        def call(_memory: Any = (arguments, dst)) -> None:
            status = run(following())
            if status:
                require(status)

        return call, lambda: dst

    def _packed(self, pack: Any, sizes: Sizes, require: Callable[[int], None]) -> List[ctypes.c_void_p]:
        """Copies of the packed weights, of which each call takes the next."""
        found = [aligned(sizes.packed) for _ in range(copies_of(sizes.packed, caches().get("3", 0)))]
        args = PackArgs(packed=found[0], packed_size=sizes.packed)
        pass_tensors(args, sizes, self.data, *PARAMETERS)
        require(pack(ctypes.byref(args)))
        for copy in found[1:]:
            ctypes.memmove(copy, found[0], sizes.packed)
        return found

    def difference(self, dst: Any, exact: bool) -> str:
        """How an output differs from the expected one; empty where it does not."""
        size = math.prod(self.layer["shape"])
        if exact and "digests" in self.layer:
            return self._differing_parts(dst, size)
        found, count, places = dst, size, None
        if "samples" in self.layer:
            count = self.layer["samples"]
            found, places = self._sampled(dst, size, count)
        bound = None if exact else self.data["bound"]
        result, dtype = Difference(), DTYPES[self.layer["dtype"]]
        self.check.convgen_compare(
            found, self.data["expected"], bound, ctypes.c_uint64(count), dtype, ctypes.byref(result)
        )
        if not result.wrong:
            return ""
        first = int(result.first) if places is None else int(places[result.first])
        values = f"expected {result.expected:.9g}, found {result.found:.9g}"
        return f"{result.wrong} of {count} elements; at {self._index(first)} {values}"

    def _differing_parts(self, dst: Any, size: int) -> str:
        """How an output differs from the one that the manifest has digests of."""
        expected, part = [int(digest, 16) for digest in self.layer["digests"]], self.layer["part"]
        found = (ctypes.c_uint64 * len(expected))()
        dtype = DTYPES[self.layer["dtype"]]
        self.check.convgen_digest(dst, ctypes.c_uint64(size), dtype, ctypes.c_uint64(part), found)
        wrong = [i for i, digest in enumerate(expected) if digest != found[i]]
        if not wrong:
            return ""
        first = self._index(wrong[0] * part)
        return f"{len(wrong)} of {len(expected)} parts of {part} elements; the first begins at {first}"

    def _sampled(self, dst: Any, size: int, count: int) -> tuple[Any, Any]:
        """The elements of an output of which the bundle has the expected values, and where they are."""
        places, width = (ctypes.c_uint64 * count)(), BYTES[self.layer["dtype"]]
        found = (ctypes.c_char * (count * width))()
        numbers = map(ctypes.c_uint64, (size, width, 0, count))
        self.check.convgen_sample(dst, *numbers, found, places)
        return found, places

    def _index(self, element: int) -> tuple[int, ...]:
        """Where an element of the output is, by its number."""
        at: list[int] = []
        for extent in reversed(self.layer["shape"]):
            element, index = divmod(element, extent)
            at.insert(0, index)
        return tuple(at)

    def time(self, call: Call, timing: dict[str, Any], hopeless: float) -> list[float]:
        """Samples of a call; ``timing`` is the manifest's."""
        seconds, sample_seconds = timing["trial_seconds"], timing["sample_seconds"]
        return time_calls(call, seconds=seconds, sample_seconds=sample_seconds, hopeless=hopeless)

    def compare(self, calls: Sequence[Call], timing: dict[str, Any]) -> list[list[float]]:
        """Samples of several calls taken in turn."""
        return alternate(calls, rounds=timing["rounds"], seconds=timing["duel_seconds"])

    def reference(self) -> float | None:
        """Seconds of a fixed piece of arithmetic, which show whether the machine is as fast as it was.

        None where the arithmetic tells nothing of the device's speed.
        """
        return statistics.median(sample(self.check.convgen_reference_kernel, 1) for _ in range(5))

    def open(self, file: str) -> Any:
        """A library of the bundle, loaded.

        Raises:
            Refused: the system cannot load it. Its bytes are right, so the C library is another one, or too old.
        """
        try:
            return ctypes.CDLL(os.path.join(self.root, file))
        except OSError as error:
            is_noexec = os.statvfs(self.root).f_flag & os.ST_NOEXEC
            raise Refused(f"{error}{': it lies on a file system mounted noexec' if is_noexec else ''}") from None

    def _tensor(self, made: Any) -> Any:
        """A tensor's memory: a file's bytes, or whole numbers that are drawn."""
        if isinstance(made, str):
            return self._load(made)
        memory = (ctypes.c_char * (made["count"] * BYTES[made["dtype"]]))()
        limits = ctypes.c_int64(made["low"]), ctypes.c_int64(made["high"])
        count, seed = ctypes.c_uint64(made["count"]), ctypes.c_uint64(made["seed"])
        self.check.convgen_draw(memory, count, DTYPES[made["dtype"]], seed, *limits)
        return memory

    def _load(self, file: str) -> Any:
        with open(os.path.join(self.root, file), "rb") as source:
            memory = (ctypes.c_char * os.fstat(source.fileno()).st_size)()
            source.readinto(memory)
        return memory


class Cuda(Cpu):
    """Candidates whose libraries run on a GPU; their inputs come from and their outputs go to the CPU's memory."""

    is_limited = False  # a driver sets aside more addresses than there is memory
    machine_facts = (*Cpu.machine_facts, "gpu")

    def __init__(self, root: str, layer: dict[str, Any], check: str, threads: int) -> None:
        super().__init__(root, layer, check, threads)
        self.gpu = Gpu()

    def prepare(self, trial: dict[str, Any], apart: bool = False) -> tuple[Call, Call]:
        call = GpuCall(self.gpu, self.open(trial["library"]), trial["name"], self.data, apart)
        return call, call.output

    def time(self, call: Call, timing: dict[str, Any], hopeless: float) -> list[float]:
        return self.gpu.time_calls(call, timing["trial_seconds"], timing["sample_seconds"], hopeless)

    def compare(self, calls: Sequence[Call], timing: dict[str, Any]) -> list[list[float]]:
        return self.gpu.alternate(calls, timing["rounds"], timing["duel_seconds"])

    def reference(self) -> None:
        """None: a GPU's clock is its own."""


#: Kinds of devices by the manifest's name for them.
DEVICES: dict[str, type[Cpu]] = {"cpu": Cpu, "cuda": Cuda}
