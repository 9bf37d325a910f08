"""What one instruction adds to a lane's sum: the product of two numbers, or of two or four pairs of them.

Its operands are words of 32 bits: one f32, two bf16 or 16-bit integers, or four bytes, which are neighbours along the
reduction. Sources: Intel, "Intel Architecture Instruction Set Extensions" (VPDPBUSD, VPMADDWD, VDPBF16PS); Arm,
"Arm Architecture Reference Manual" (SDOT).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..deferred import tirx, tvm
from ..hardware.target import Target
from ..lowering.compute import ACCUMULATOR, INTEGER, STORAGE, Expr, narrow, of_lanes, widen
from ..problem.spec import ConvSpec
from .model import core_of

#: Bits of a word.
WORD = 32
#: The upper bit of a byte: with it turned, one is 128 more or less.
_HALF = -128
#: What adds the products of two vectors of pairs of bf16, and what rounds a vector to bf16: as functions of integers,
#: as TVM would turn bf16 into f32 on its way to the instruction.
_PAIRS_OF_BF16 = """
define <16 x float> @convgen_add_pairs_512(<16 x float> %sums, <16 x i32> %a, <16 x i32> %b) alwaysinline {
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %sums, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}
define <16 x i16> @convgen_to_bf16_512(<16 x float> %values) alwaysinline {
  %rounded = call <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float> %values)
  %r = bitcast <16 x bfloat> %rounded to <16 x i16>
  ret <16 x i16> %r
}
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
declare <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float>)
"""


@dataclass(frozen=True)
class Operation:
    """How sums are added to.

    Attributes:
        instruction: its name; ``multiply`` where there is none for several products.
        depth: products that a lane adds at once.
        operand: TVM's type of a number of src in a task's copy.
        sums: TVM's type of the sums.
        offset: what is added to a number of src there.
        biased: whether src's zero point, and the offset, are in the operands: sums begin at less than 0 by what these
            add. Else the zero point is taken off first.
        packs: whether vectors of 32-bit integers can be packed as bytes (:mod:`convgen.cpu.narrowing`).
        permutes: whether bytes of vectors can be permuted.
        helper: LLVM IR that its code needs.
    """

    instruction: str = "multiply"
    depth: int = 1
    operand: str = ACCUMULATOR
    sums: str = ACCUMULATOR
    offset: int = 0
    biased: bool = False
    packs: bool = False
    permutes: bool = False
    helper: str = ""

    @property
    def converts(self) -> bool:
        """Whether src becomes something else than f32: words of numbers, channels innermost."""
        return self.operand != ACCUMULATOR

    @property
    def word(self) -> str:
        """TVM's type of a word."""
        return INTEGER if self.converts else ACCUMULATOR

    @property
    def bytes(self) -> int:
        """Of a number in a task's copy."""
        return WORD // 8 // self.depth

    @property
    def instructions(self) -> int:
        """Vector instructions for a vector of words."""
        return 2 if self.instruction == "vpmaddwd" else 1

    @property
    def unit(self) -> str:
        """What of a core it keeps busy (:class:`~convgen.cpu.model.Work`)."""
        return {"vpdpbusd": "quads", "vpdpwssd": "quads", "sdot": "quads", "vdpbf16ps": "pairs"}.get(
            self.instruction, "fmas"
        )

    def reads(self, spec: ConvSpec) -> bool:
        """Whether src can be read where it lies."""
        if not self.converts:
            return True
        plain = STORAGE[spec.src_dtype] in (self.operand, f"u{self.operand}") and not self.offset
        return plain and (self.biased or not spec.src_zero)

    def number(self, value: Expr, dtype: str, zero: Expr | None, lanes: int) -> Expr:
        """A stored number of src as an operand."""
        if self.operand == STORAGE["bf16"]:
            if dtype == "bf16":
                return value
            return self.narrowed(widen(value, dtype, lanes), "bf16", lanes)
        value = value.astype(of_lanes(self.operand, lanes))
        if self.offset and self.depth == 2:
            return value + tirx.const(self.offset, of_lanes(self.operand, lanes))
        if self.offset:
            return value ^ tirx.const(_HALF, of_lanes(self.operand, lanes))
        if zero is None or self.biased:
            return value
        zero = zero.astype(self.operand)
        return value - (zero if lanes == 1 else tirx.Broadcast(zero, lanes))

    def narrowed(self, value: Expr, dtype: str, lanes: int) -> Expr:
        """f32 as it is stored: as bf16 by the instruction that makes operands, too."""
        if dtype == "bf16" and lanes == 16 and self.operand == STORAGE["bf16"]:
            return tirx.call_extern(of_lanes(self.operand, lanes), "convgen_to_bf16_512", value)
        return narrow(value, dtype, lanes)

    def nothing(self, zero: Expr | None) -> Expr:
        """What stands for 0 of src: its zero point, an i32 where there is one."""
        if not self.biased:
            return tirx.const(0, self.operand)
        if zero is None:
            return tirx.const(self.offset if self.depth == 2 or not self.offset else _HALF, self.operand)
        return (zero + tirx.const(self.offset, INTEGER)).astype(self.operand)

    def weight(self, value: Expr) -> Expr:
        """A weight, f32 or i32, as an operand."""
        return narrow(value, "bf16") if self.operand == STORAGE["bf16"] else value.astype(self.operand)

    def joined(self, numbers: Sequence[Expr], lanes: int) -> Expr:
        """Operands as words: the first one in the lowest bits."""
        if self.depth == 1:
            return numbers[0].astype(of_lanes(self.word, lanes))
        bits, total = WORD // self.depth, tirx.const(0, of_lanes(INTEGER, lanes))
        for i, number in enumerate(numbers):
            part = number.astype(of_lanes(INTEGER, lanes))
            if i < self.depth - 1:
                part = part & tirx.const(2**bits - 1, of_lanes(INTEGER, lanes))
            total = total | (part << tirx.const(i * bits, of_lanes(INTEGER, lanes)))
        return total

    def add(self, sums: Expr, factor: Expr, words: Expr, lanes: int) -> Expr:
        """Sums and the products of words: of a pixel, the same in all lanes, and of weights."""
        if self.instruction == "multiply":
            return sums + words * factor
        if self.instruction == "vdpbf16ps":
            # The number of a pixel comes last: the instruction itself then loads it into all lanes.
            return tirx.call_extern(of_lanes(ACCUMULATOR, lanes), "convgen_add_pairs_512", sums, words, factor)
        name = _NAMES[self.instruction][lanes]
        numbers = of_lanes(self.operand, lanes * self.depth)
        a, b = (tirx.reinterpret(numbers, vector) for vector in (factor, words))
        if self.instruction == "vpmaddwd":
            return sums + tirx.call_llvm_pure_intrin(of_lanes(INTEGER, lanes), name, a, b)
        return tirx.call_llvm_pure_intrin(of_lanes(INTEGER, lanes), name, sums, a, b)

    def with_helper(self, statement: Expr) -> Expr:
        """A statement beside which its helper is."""
        if not self.helper:
            return statement
        helper = tvm.ir.expr.StringImm(self.helper)
        return tirx.AttrStmt(tirx.const(0, "int32"), "pragma_import_llvm", helper, statement)


#: LLVM's names of instructions, by lanes; without AVX512 too.
_NAMES = {
    "vpdpbusd": {8: "llvm.x86.avx512.vpdpbusd.256", 16: "llvm.x86.avx512.vpdpbusd.512"},
    "vpdpwssd": {16: "llvm.x86.avx512.vpdpwssd.512"},
    "vpmaddwd": {4: "llvm.x86.sse2.pmadd.wd", 8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"},
    "sdot": {4: "llvm.aarch64.neon.sdot.v4i32.v16i8"},
}  # fmt: skip

#: A product of two f32 and their sum with a third; two products of bf16 and theirs (AVX512-BF16).
MULTIPLY = Operation()
PAIRS = Operation("vdpbf16ps", 2, STORAGE["bf16"], ACCUMULATOR, helper=_PAIRS_OF_BF16)


@lru_cache(maxsize=64)
def _pays(target: Target) -> bool:
    """Whether pairs of bf16 are faster than f32: Intel's vectors do a quarter as many as FMAs."""
    core = core_of(target)
    return 2 * core.pairs > core.fmas


@lru_cache(maxsize=1024)
def operation_of(spec: ConvSpec, target: Target) -> Operation:
    """The one that does most products at once and is exact for integers; for bf16, of f32 where pairs do not fit.

    ``vpdpbusd`` multiplies unsigned bytes by signed ones: 128 is added to src of i8. ``sdot`` multiplies signed ones:
    128 is taken off src of u8.
    """
    isa, lanes = set(target.isa), target.lanes
    if spec.is_quantised:
        bytes_too = "avx512vnni" in isa if lanes == 16 else "avxvnni" in isa or {"avx512vnni", "avx512vl"} <= isa
        signed = spec.weights_dtype == "i8" and not spec.weights_zero
        packs, permutes = (lanes == 16 and feature in isa for feature in ("avx512bw", "avx512vbmi"))
        if bytes_too and signed and not spec.transposed:
            offset = 128 if spec.src_dtype == "i8" else 0
            return Operation("vpdpbusd", 4, "int8", INTEGER, offset, biased=True, packs=packs, permutes=permutes)
        if "sse3" in isa and (lanes < 16 or "avx512bw" in isa):
            return Operation("vpmaddwd", 2, "int16", INTEGER, packs=packs, permutes=permutes)
        if "asimddp" in isa and signed and not spec.transposed:
            return Operation("sdot", 4, "int8", INTEGER, -128 if spec.src_dtype == "u8" else 0, biased=True)
        if "asimddp" in isa and signed and spec.src_dtype == "i8" and not spec.src_zero:
            return Operation("sdot", 4, "int8", INTEGER)
        return Operation("multiply", 1, INTEGER, INTEGER)
    is_pairs = spec.layout == "nchw" or spec.ic // spec.groups % 2 == 0
    if "bf16" in (spec.dtype, spec.accuracy) and "avx512bf16" in isa and lanes == 16 and is_pairs and _pays(target):
        return PAIRS
    return MULTIPLY
