"""Exported libraries under attack: an error or documented behaviour, no crash, no leak, nothing written."""

from __future__ import annotations

import copy
import ctypes
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attacked_library import PROGRAM, SPEC, WARNINGS, succeed
from naive import compile_naive, convolve, link_naive, operands
from paths import SUPPORT
from planted import SOURCE, interface

from convgen.errors import KernelError
from convgen.kernel import library as library_module
from convgen.kernel.export import header_text, write_library
from convgen.kernel.library import Layer, Library, aligned
from convgen.lowering.entry import entry_source
from convgen.lowering.runtime import SOURCES, source

# ---- a hostile program in C ----------------------------------------------------------------------

#: How the library and its caller are compiled -> arguments of the program.
BUILDS = {"": ["20000", "fork"], "address,undefined": ["5000"], "thread": ["500"], "valgrind": ["40"]}


@pytest.mark.parametrize("build", BUILDS)
def test_a_hostile_program(build: str, tmp_path: Path) -> None:
    """Wrong arguments in one to three ways, and a thousand right calls from many threads at once.

    The library is compiled with its caller, kernel included, so that the sanitizers see all of it.
    """
    files = {name: source(name) for name in SOURCES}
    files["planted.h"] = header_text(interface())
    files["entry.c"] = entry_source(interface(), "digest")
    files["generated.c"] = SOURCE.format(store="t.dst[at] = v", before="")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    flags: tuple[str, ...] = ()
    command: tuple[str, ...] = ("./program", "1", *BUILDS[build])
    if build == "valgrind":
        if shutil.which("valgrind") is None:
            pytest.skip("there is no valgrind")
        checks = ("--quiet", "--error-exitcode=9", "--leak-check=full", "--errors-for-leak-kinds=all")
        command = ("valgrind", *checks, *command)
    elif build:
        flags = (f"-fsanitize={build}", "-fno-sanitize-recover=all")
        (tmp_path / "empty.c").write_text("int main(void) { return 0; }\n")
        if subprocess.run(["cc", *flags, "empty.c"], cwd=tmp_path, capture_output=True, check=False).returncode:
            pytest.skip(f"the C compiler has no -fsanitize={build}")
    sources: tuple[str | Path, ...] = (PROGRAM, *(name for name in files if name.endswith(".c")))
    succeed("cc", *WARNINGS, *flags, "-I.", *sources, "-o", "program", cwd=tmp_path)
    assert "0 failures\n" in succeed(*command, cwd=tmp_path)


UNLOAD = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include "first.h"

typedef struct {
    void *library;
    int (*run)(const convgen_run_args *), (*create)(int, convgen_pool **);
    void (*destroy)(convgen_pool *);
    convgen_run_args args;
} layer;

static void *symbol(void *library, const char *name, const char *suffix)
{
    char text[64];
    snprintf(text, sizeof text, "%s_%s", name, suffix);
    void *found = dlsym(library, text);
    if (found == NULL)
        abort();
    return found;
}

static void *zeros(size_t size)
{
    return size ? memset(aligned_alloc(64, (size + 63) / 64 * 64), 0, size) : NULL;
}

static layer open_layer(const char *name)
{
    char path[64];
    convgen_sizes s;
    snprintf(path, sizeof path, "./lib%s.so", name);
    layer l = {.library = dlopen(path, RTLD_NOW | RTLD_LOCAL)};
    if (l.library == NULL || ((int (*)(int, convgen_sizes *))symbol(l.library, name, "sizes"))(3, &s))
        abort();
    l.run = symbol(l.library, name, "run");
    l.create = symbol(l.library, name, "pool_create");
    l.destroy = symbol(l.library, name, "pool_destroy");
    void *packed = zeros(s.packed), *weights = zeros(s.weights), *bias = zeros(s.bias);
    const convgen_pack_args p = {.weights = weights, .weights_size = s.weights, .bias = bias, .bias_size = s.bias,
                                 .packed = packed, .packed_size = s.packed};
    if (((int (*)(const convgen_pack_args *))symbol(l.library, name, "pack"))(&p))
        abort();
    free(weights), free(bias);
    l.args = (convgen_run_args){zeros(s.src), s.src, packed, s.packed, zeros(s.residual), s.residual,
                                zeros(s.dst), s.dst, zeros(s.workspace), s.workspace, NULL};
    return l;
}

static void close_layer(layer l)
{
    free((void *)l.args.src), free((void *)l.args.packed), free((void *)l.args.residual);
    free(l.args.dst), free(l.args.workspace);
    if (dlclose(l.library))
        abort();
}

static int loaded(const char *name)
{
    char line[512];
    int found = 0;
    FILE *maps = fopen("/proc/self/maps", "r");
    while (fgets(line, sizeof line, maps))
        found |= strstr(line, name) != NULL;
    fclose(maps);
    return found;
}

int main(int argc, char **argv)
{
    for (int i = argc > 1 ? atoi(argv[1]) : 1; i > 0; --i) {
        layer first = open_layer("first"), second = open_layer("second");
        convgen_pool *pool = NULL;
        if (first.create(3, &pool))
            return 1;
        first.args.pool = second.args.pool = pool;
        if (first.run(&first.args) || second.run(&second.args))
            return 2;
        close_layer(second); /* it has no pool of its own */
        if (loaded("libsecond.so") || first.run(&first.args))
            return 3;
        first.destroy(pool);
        close_layer(first);
        if (loaded("libfirst.so"))
            return 4;
        const pid_t child = fork(); /* what the library did about forks is gone with it */
        if (child == 0)
            _exit(0);
        int status = -1;
        if (waitpid(child, &status, 0) != child || status)
            return 5;
    }
    puts("fine");
    return 0;
}
"""


def test_libraries_are_unloaded(tmp_path: Path) -> None:
    """With their pools destroyed, as the header says; and those without a pool at any time."""
    for name, spec in {"first": SPEC, "second": SPEC.with_(activation="none")}.items():
        interface, path = compile_naive(spec, tmp_path, "shared", name)
        write_library(tmp_path / name, interface, path, {"threads": 1})
        for file in (f"lib{name}.so", f"{name}.h"):
            shutil.copy(tmp_path / name / file, tmp_path)
    (tmp_path / "unload.c").write_text(UNLOAD)
    succeed("cc", "-std=c11", "-g", "unload.c", "-ldl", "-o", "unload", cwd=tmp_path)
    assert succeed("./unload", "20", cwd=tmp_path) == "fine\n"
    if shutil.which("valgrind"):
        succeed("valgrind", "--quiet", "--error-exitcode=9", "--leak-check=full", "./unload", cwd=tmp_path)


# ---- hostile arrays ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    _, path = link_naive(SPEC, tmp_path_factory.mktemp("library"), "shared")
    return Library(path, SPEC, SPEC.name, 2)


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
    return operands(SPEC)


@pytest.fixture(scope="module")
def layer(library: Library, inputs: dict[str, np.ndarray]) -> Layer:
    return library.bind(inputs["weights"], inputs["bias"])


def twice(array: np.ndarray) -> np.ndarray:
    return np.concatenate([array, array])


def strided(array: np.ndarray) -> np.ndarray:
    return np.repeat(array, 2, axis=-1)[..., ::2]


def misplaced(array: np.ndarray) -> np.ndarray:
    """The same values at an address that is one byte off."""
    raw = np.empty(array.nbytes + 65, np.uint8)
    start = -raw.ctypes.data % 64 + 1
    moved = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    moved[...] = array
    return moved


def spread(array: np.ndarray) -> np.ndarray:
    """One element everywhere."""
    return np.lib.stride_tricks.as_strided(array, array.shape, (0,) * array.ndim)


def reverted(array: np.ndarray) -> np.ndarray:
    return array[..., ::-1]


#: What lies otherwise than the kernel reads it, and the arguments that are copied then.
ANYHOW = (strided, misplaced, spread, reverted)
COPIED = {("pack", "weights"), ("pack", "bias"), ("layer", "x"), ("layer", "residual")}

WRONG: list[Callable[[np.ndarray], Any]] = [
    lambda a: None,
    lambda a: a.tolist(),
    lambda a: a.tobytes(),
    lambda a: a[:-1],
    lambda a: a[None],
    lambda a: a.reshape(-1)[: a.size // 2],
    twice,
    lambda a: a.astype(np.float64),
    lambda a: a.astype(a.dtype.newbyteorder(">")) if a.dtype.itemsize > 1 else a.astype(np.int8),
    lambda a: a.astype(object),
    lambda a: a.astype(np.complex64),
    strided,
    misplaced,
    spread,
    reverted,
    lambda a: memoryview(a),  # type: ignore[arg-type] # before Python 3.12, type stubs do not know its buffer
    lambda a: object(),
    lambda a: np.float32(1),
    lambda a: np.array(None),
]


def test_wrong_arrays_are_refused_and_nothing_is_written(
    library: Library, layer: Layer, inputs: dict[str, np.ndarray]
) -> None:
    """Every argument of every call, wrong in every way."""
    workspace = aligned(library.sizes().workspace)
    calls: dict[str, tuple[Callable[..., object], dict[str, np.ndarray]]] = {
        "pack": (library.pack, {"weights": inputs["weights"], "bias": inputs["bias"], "packed": layer.packed.copy()}),
        "run": (
            library.run,
            {"src": inputs["src"], "packed": layer.packed, "residual": inputs["residual"], "workspace": workspace},
        ),
        "layer": (layer, {"x": inputs["src"], "residual": inputs["residual"]}),
        "verify": (library.verify_packed, {"packed": layer.packed}),
    }
    dst = np.full(SPEC.dst_shape, 7, np.float32)
    packed = layer.packed.copy()
    for name, (call, arguments) in calls.items():
        out = {"run": {"dst": dst}, "layer": {"out": dst}}.get(name, {})
        arguments = arguments | out
        for argument, right in arguments.items():
            for wrong in WRONG:
                value = wrong(right)
                if value is None and argument in ("packed", "workspace", "out") and name != "verify":
                    continue  # None: new memory
                if argument == "workspace" and wrong is twice:
                    continue  # more is welcome
                if wrong in ANYHOW and (name, argument) in COPIED:
                    continue
                with pytest.raises(KernelError, match=f"^{argument}"):
                    call(**arguments | {argument: value})
        if "out" in arguments or "dst" in arguments:
            assert (dst == 7).all()
    np.testing.assert_array_equal(layer.packed, packed)
    expected = convolve(SPEC, inputs)
    np.testing.assert_array_equal(layer(inputs["src"], residual=inputs["residual"]), expected)


@pytest.mark.parametrize("lies", ANYHOW)
def test_arrays_that_lie_otherwise_are_copied(
    library: Library, inputs: dict[str, np.ndarray], lies: Callable[[np.ndarray], np.ndarray]
) -> None:
    given = {name: lies(array) for name, array in inputs.items()}
    found = library.bind(given["weights"], given["bias"])(given["src"], residual=given["residual"])
    np.testing.assert_array_equal(found, convolve(SPEC, {name: array.copy() for name, array in given.items()}))


def test_arrays_of_another_layer_are_refused(library: Library, layer: Layer, tmp_path: Path) -> None:
    spec = SPEC.with_(n=1)
    _, path = link_naive(spec, tmp_path, "shared")
    other, given = Library(path, spec, spec.name, 2), operands(spec)
    theirs = other.bind(given["weights"], given["bias"])
    with pytest.raises(KernelError, match=r"x: expected shape \(2, 3, 20, 20\), found \(1, 3, 20, 20\)"):
        layer(given["src"], residual=given["residual"])
    assert theirs.packed.size == layer.packed.size
    with pytest.raises(KernelError, match="packed was not written by this library"):
        library.run(
            operands(SPEC)["src"], theirs.packed, np.empty(SPEC.dst_shape, np.float32), operands(SPEC)["residual"]
        )
    assert not library.verify_packed(theirs.packed)


def test_every_flipped_bit_of_packed_weights_shows(library: Library, layer: Layer, inputs: dict[str, Any]) -> None:
    """verify_packed sees each; a run sees those of the header but for the checksum, and computes with the rest."""
    packed = aligned(layer.packed.size)
    packed[:] = layer.packed
    rng = random.Random(1)
    for at in [*range(64), *rng.sample(range(64, packed.size), 60), packed.size - 1]:
        packed[at] ^= 1 << rng.randrange(8)
        assert not library.verify_packed(packed), at
        out = np.full(SPEC.dst_shape, 7, np.float32)
        arguments = (inputs["src"], packed, out, inputs["residual"])
        if at < 64 and not 40 <= at < 48:
            with pytest.raises(KernelError, match="packed was not written by this library"):
                library.run(*arguments)
            assert (out == 7).all()
        else:
            library.run(*arguments)
        packed[at] = layer.packed[at]
    assert library.verify_packed(packed)


def test_an_empty_batch_touches_nothing(tmp_path: Path) -> None:
    """Whatever it is given: there is nothing to read and nothing to write."""
    spec = SPEC.with_(n=0)
    _, path = link_naive(spec, tmp_path, "shared")
    empty = Library(path, spec, spec.name, 2)
    args = library_module._RunArgs()
    assert empty._run(ctypes.byref(args)) == 0
    for field in args._fields_:
        setattr(args, field[0], 0xDEADBEEF)
    assert empty._run(ctypes.byref(args)) == 0
    assert empty._run(None) != 0


# ---- many callers --------------------------------------------------------------------------------


def test_a_thousand_calls_at_once(library: Library, inputs: dict[str, np.ndarray]) -> None:
    """From forty threads, on pools of every size at once, through each way to call; the same bits from all."""
    path = library._dll._name
    expected = convolve(SPEC, inputs).astype(np.float32)
    libraries = [Library(path, SPEC, SPEC.name, threads) for threads in (1, 2, 3, 5)]
    layers = [one.bind(inputs["weights"], inputs["bias"]) for one in libraries]
    start, wrong = threading.Barrier(40), []

    def caller(index: int) -> None:
        one, layer = libraries[index % 4], layers[index % 4]
        workspace = aligned(one.sizes().workspace)
        start.wait()
        for repeat in range(26):
            out = np.full(SPEC.dst_shape, np.nan, np.float32)
            if repeat % 3 == 0:
                layer(inputs["src"], residual=inputs["residual"], out=out)
            else:
                given = workspace if repeat % 3 == 1 else None
                one.run(inputs["src"], layer.packed, out, inputs["residual"], workspace=given)
            if out.tobytes() != expected.tobytes():
                wrong.append((index, repeat))

    callers = [threading.Thread(target=caller, args=(index,)) for index in range(40)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert wrong == []


FORK = """
import os, sys, threading
from naive import convolve, operands
from convgen.kernel.library import Library
from convgen.problem.spec import ConvSpec
spec = ConvSpec.parse(sys.argv[2])
inputs = operands(spec)
expected = convolve(spec, inputs)
def make(threads):
    return Library(sys.argv[1], spec, spec.name, threads).bind(inputs["weights"], inputs["bias"])
def right(layer):
    return bool((layer(inputs["src"], residual=inputs["residual"]) == expected).all())
layer, stop, results = make(3), threading.Event(), []
def call():
    while not stop.is_set():
        results.append(right(layer))
callers = [threading.Thread(target=call) for _ in range(3)]
for thread in callers:
    thread.start()
children = []
for _ in range(12):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if right(layer) and right(make(2)) and right(make(3)) and right(make(1)) else 1)
    children.append(pid)
assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 12
stop.set()
for thread in callers:
    thread.join()
assert results and all(results) and right(layer)
print("fine")
"""


def test_forks_during_calls(library: Library) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORK, library._dll._name, str(SPEC)]
    environment = {**os.environ, "PYTHONPATH": str(SUPPORT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.stdout == "fine\n", done.stderr


def test_a_loaded_library_stays_in_its_process(library: Library, layer: Layer) -> None:
    for item in (library, layer):
        assert copy.copy(item) is copy.deepcopy(item) is item
        with pytest.raises(TypeError, match=f"cannot pickle {type(item).__name__}: it is loaded into this process"):
            pickle.dumps(item)
