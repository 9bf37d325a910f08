"""What processors have: by LLVM, by Linux, by the C compiler, and by the processor itself."""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from processors import features, names, spellings

from convgen.errors import UnsupportedError
from convgen.hardware.isa import CHECKED, forbidden
from convgen.hardware.machine import machine
from convgen.hardware.target import resolve
from convgen.lowering.runtime import source

ARCHES = list(CHECKED)
#: Of LLVM's features, those with no instruction that a compiler makes of ordinary code, and those that no CPU that
#: kernels are tuned for has. A new one belongs here, or to what is checked, or to what only steers the compiler.
OFF = {
    "x86_64": """adx aes amx-avx512 amx-complex amx-fp16 amx-fp8 amx-movrs amx-tf32 avx10.1
        avx10.2 avx512vp2intersect avxifma avxneconvert avxvnniint16 avxvnniint8 ccmp cldemote clflushopt clwb clzero
        cmpccxadd crc32 cx16 egpr enqcmd fma4 fsgsbase hreset invpcid kl lwp movdir64b movdiri movrs mwaitx ndd nf
        pclmul pconfig pku ppx prefetchi prfchw ptwrite push2pop2 rdpid rdpru rdrnd rdseed sahf serialize sha sha512
        shstk sm3 sm4 tbm tsxldtrk uintr usermsr vaes vpclmulqdq waitpkg wbnoinvd widekl xop xsave xsavec xsaveopt
        xsaves zu""",
    "aarch64": """CONTEXTIDREL2 aes altnzcv am amvs brbe bti ccdp ccidx ccpp chk clrbhb crc cssc dit ecv el2vmsa el3 ete
        faminmax fgt flagm fp8 fp8dot2 fp8dot4 fp8fma fpac fptoint hbc hcx jsconv lor ls64 lse2 lut mec mops mpam mte
        nmi nv pan pan-rwv pauth perfmon predres ras rand rcpc rcpc-immo rcpc3 rme sb sel2 sha2 sha3 sm4 sme sme-b16b16
        sme-f16f16 sme-f64f64 sme-i16i64 sme2 sme2p1 spe spe-eef specres2 specrestrict ssbs sve-aes sve-b16b16
        sve-bitperm sve-sha3 sve-sm4 tlb-rmi tracev8.4 trbe uaops v8r vh wfxt xs""",
}


@pytest.mark.parametrize("arch", ARCHES)
def test_of_every_processor_only_what_can_be_asked_for_is_on(arch: str) -> None:
    """LLVM has the last word: what it says is still on when the rest is turned off."""
    for spelling in spellings(arch):
        target = resolve(spelling)
        config = json.loads(target.tvm_config)
        off = tuple(name.removeprefix("-") for name in config["mattr"])
        on = features(arch, config["mcpu"], off)
        assert not forbidden(on, arch), spelling
        assert {f.name for f in CHECKED[arch] if f.llvm in on} == set(target.isa), spelling
        assert set(off) & set(OFF[arch].split()) == set(forbidden(features(arch, config["mcpu"]), arch)), spelling


@pytest.mark.parametrize("arch", ARCHES)
def test_what_is_turned_off_is_known(arch: str) -> None:
    """A later LLVM's features are off from the start; that one which only steers it is not is for this test to say."""
    found = {name for processor in names(arch) for name in forbidden(features(arch, processor), arch)}
    assert found == set(OFF[arch].split())


def test_a_feature_nobody_has_heard_of_is_turned_off() -> None:
    assert forbidden(["sse2", "avx2", "fast-gather", "avx11.3", "sme9"], "x86_64") == ["avx11.3", "sme9"]
    assert forbidden(["neon", "sve2", "v9.6a", "sve9"], "aarch64") == ["sve9"]


def test_processors_of_32_bits_are_refused() -> None:
    """LLVM ends the process over them."""
    large = spellings("x86_64")
    small = [name for name in names("x86_64") if f"cpu:{name}" not in large]
    assert {"i686", "pentium4"} <= set(small)
    for name in small:
        with pytest.raises(UnsupportedError, match=rf"expected a 64-bit processor LLVM knows, found '{name}'"):
            resolve(f"cpu:{name}")


HASWELL = dataclasses.replace(machine(), arch="x86_64", llvm="haswell", features=frozenset(resolve("cpu:haswell").isa))


@pytest.mark.parametrize(
    ("hidden", "without", "bits"),
    [
        ("f16c", {"f16c"}, 256),
        ("movbe", {"movbe"}, 256),
        ("avx2", {"avx2"}, 128),
        ("avx", {"avx", "avx2", "fma", "f16c"}, 128),
    ],
)
def test_what_a_hypervisor_hides_is_not_used(hidden: str, without: set[str], bits: int) -> None:
    """On the machine itself; code for the model in general is not for this machine."""
    there = dataclasses.replace(HASWELL, features=HASWELL.features - {hidden})
    target = resolve("cpu", there)
    assert target.native
    assert set(target.isa) == HASWELL.features - without
    assert (target.vector_bits, target.hardware) == (bits, there.fingerprint)
    assert resolve(target.spelling, there) == target
    assert not resolve("cpu:broadwell", there).native
    assert resolve("cpu:haswell", HASWELL).isa == resolve("cpu", HASWELL).isa


# ---- what the C runtime asks -------------------------------------------------------------------


def asking(folder: Path, *, compilers: bool = False) -> Path:
    """A program that prints what this CPU has, as kernels ask or, with ``compilers``, as C compilers do."""
    lines = ['#include "cpu.h"', "#include <stdio.h>", "int main(void)", "{"]
    for feature in CHECKED["x86_64"]:
        asked = f"convgen_cpu_tells({feature.word}, 1u << {feature.bit})"
        if feature.state:
            asked += f" && convgen_system_saves({feature.state:#x})"
        if compilers:
            asked = f'__builtin_cpu_supports("{feature.name}")'
        lines.append(f'    if ({asked}) puts("{feature.name}");')
    (folder / "cpu.h").write_text(source("cpu.h"))
    (folder / "ask.c").write_text("\n".join([*lines, "    return 0;", "}", ""]))
    command = ["cc", "-std=c11", "-Wall", "-Wextra", "-Werror", "ask.c", "-o", f"ask-{compilers}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if compilers and done.returncode:
        pytest.skip("this C compiler does not know all features")
    assert done.returncode == 0, done.stderr
    return folder / f"ask-{compilers}"


def told(*command: str | Path) -> set[str]:
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="asks an x86-64 CPU")


@x86_only
def test_the_processor_says_what_linux_says(tmp_path: Path) -> None:
    assert told(asking(tmp_path)) == {f.name for f in CHECKED["x86_64"]} & machine().features


@x86_only
def test_other_processors_say_what_compilers_understand(tmp_path: Path) -> None:
    if not shutil.which("qemu-x86_64"):
        pytest.skip("qemu-x86_64 is not installed")
    ours, theirs = asking(tmp_path), asking(tmp_path, compilers=True)
    answers = {}
    for model in ("qemu64", "Nehalem", "Haswell", "Haswell,-f16c,-movbe", "Haswell,-xsave", "EPYC", "max"):
        answers[model] = told("qemu-x86_64", "-cpu", model, ours)
        assert answers[model] == told("qemu-x86_64", "-cpu", model, theirs), model
    assert {"f16c", "movbe", "avx2"} <= answers["Haswell"]
    assert not {"f16c", "movbe"} & answers["Haswell,-f16c,-movbe"]
    assert not {"avx", "avx2", "fma", "f16c"} & answers["Haswell,-xsave"]  # its system saves no such registers


def test_arm_features_are_the_bits_that_linux_has(tmp_path: Path) -> None:
    compiler = "cc" if platform.machine() == "aarch64" else "aarch64-linux-gnu-gcc"
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    lines = ["#include <sys/auxv.h>", "#include <asm/hwcap.h>"]
    for feature in CHECKED["aarch64"]:
        macro = f"{feature.word.removeprefix('AT_')}_{feature.name.upper()}"
        lines.append(f'_Static_assert({macro} == 1ul << {feature.bit}, "{feature.name}");')
    (tmp_path / "bits.c").write_text("\n".join([*lines, ""]))
    command = [compiler, "-std=c11", "-fsyntax-only", "bits.c"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
