"""Arrays in every form that frameworks hand over: strides, addresses, DLPack's types, and what comes back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from naive import convolve, link_naive, operands

from convgen.api import build
from convgen.errors import KernelError
from convgen.kernel.dlpack import view
from convgen.kernel.library import Library
from convgen.problem.spec import ConvSpec

SPEC = ConvSpec.parse("conv2d n2 ic3 oc5 i6x7 k3x2 p1 residual prelu")
#: Ways in which an array of at least two axes can lie; each has the same elements.
LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "Fortran": np.asfortranarray,
    "permuted": lambda x: np.ascontiguousarray(np.moveaxis(x, 0, -1)).transpose(x.ndim - 1, *range(x.ndim - 1)),
    "channels last": lambda x: np.ascontiguousarray(np.moveaxis(x, 1, -1)).transpose(
        0, x.ndim - 1, *range(1, x.ndim - 1)
    ),
    "every second": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "backwards": lambda x: np.ascontiguousarray(x[::-1, :, ::-1])[::-1, :, ::-1],
    "unaligned": lambda x: np.frombuffer(b"-" + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape),
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("arrays")


@pytest.fixture(scope="module")
def library(folder: Path) -> Library:
    return Library(link_naive(SPEC, folder)[1], SPEC, SPEC.name, 1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_arrays_may_lie_in_any_way(library: Library, name: str) -> None:
    given, lay = operands(SPEC), LAYOUTS[name]
    expected = convolve(SPEC, given)
    layer = library.bind(lay(given["weights"]), np.repeat(given["bias"], 3)[::3], given["slope"][::-1].copy()[::-1])
    np.testing.assert_array_equal(layer(lay(given["src"]), residual=lay(given["residual"])), expected)


def test_an_array_that_is_broadcast_is_read(library: Library) -> None:
    given = operands(SPEC)
    for name in ("src", "weights", "bias"):
        given[name] = np.broadcast_to(given[name].flat[0], given[name].shape)
    layer = library.bind(given["weights"], given["bias"], given["slope"])
    np.testing.assert_array_equal(layer(given["src"], residual=given["residual"]), convolve(SPEC, given))


def test_a_run_that_is_prepared_reads_its_arrays_where_they_are(library: Library) -> None:
    given = operands(SPEC)
    packed = library.pack(given["weights"], given["bias"], given["slope"])
    dst = np.empty(SPEC.dst_shape, np.float32)
    with pytest.raises(KernelError, match="src: expected a C-contiguous array, found strides"):
        library.prepare(np.asfortranarray(given["src"]), packed, dst, given["residual"])


def test_another_byte_order_is_refused_by_name(library: Library) -> None:
    given = operands(SPEC)
    with pytest.raises(KernelError, match="weights: expected dtype float32 in native byte order, found >f4"):
        library.bind(given["weights"].astype(">f4"), given["bias"], given["slope"])


# ---- PyTorch -----------------------------------------------------------------------------------


def tensors(spec: ConvSpec, dtype: Any) -> dict[str, Any]:
    torch = pytest.importorskip("torch")
    return {name: torch.from_numpy(array.astype(np.float32)).to(dtype) for name, array in operands(spec).items()}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tensors_of_pytorch_in_and_out(folder: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    short = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype]
    spec = ConvSpec.parse(f"conv2d n1 ic4 oc6 i8x8 k3 {short}")
    layer = Library(link_naive(spec, folder)[1], spec, spec.name, 1)
    given = tensors(spec, getattr(torch, dtype))
    expected = torch.nn.functional.conv2d(*(given[name].double() for name in ("src", "weights", "bias")))
    weights = given["weights"].to(memory_format=torch.channels_last).requires_grad_()
    bound = layer.bind(torch.nn.Parameter(weights), torch.nn.Parameter(given["bias"]))
    for src in (given["src"], given["src"].to(memory_format=torch.channels_last)):
        found = bound(src)
        assert type(found) is torch.Tensor
        assert found.dtype == src.dtype
        assert torch.equal(found.double(), expected)  # small integers: exact
    out = torch.zeros(spec.dst_shape, dtype=given["src"].dtype)
    assert bound(given["src"], out=out) is out
    assert torch.equal(out.double(), expected)


@pytest.mark.parametrize("tokens", ["i8", "i8 src_u8", "i8 src_u8 weights_u8", "i8 dst_i32 nobias", "i8 dst_u8"])
def test_tensors_of_integers_of_pytorch(tokens: str) -> None:
    """int8, uint8 and int32 go in and come out as they are stored: whole numbers, so that PyTorch's are the same."""
    torch = pytest.importorskip("torch")
    spec = ConvSpec.parse(f"conv2d n1 ic4 oc6 i8x8 k3 {tokens}")
    layer = build(spec, threads=1, records=False)
    kinds = {"i8": torch.int8, "u8": torch.uint8, "i32": torch.int32, "f32": torch.float32}
    shapes = {"src": spec.src_shape, "weights": spec.weights_shape, "bias": (spec.oc,), "scale": (spec.oc,)}
    generator = torch.Generator().manual_seed(0)
    given = {
        name: torch.randint(0, 3, shapes[name], generator=generator).to(kinds[dtype])
        for name, dtype in spec.dtypes.items()
        if name in shapes
    }
    if "scale" in given:
        given["scale"].fill_(0.25)
    operands = [given[name].double() for name in ("src", "weights", "bias") if name in given]
    sums = torch.nn.functional.conv2d(*operands)
    limits = {"i8": (-128, 127), "u8": (0, 255)}.get(spec.dtypes["dst"])
    expected = torch.round(sums * 0.25).clamp(*limits) if limits else sums
    src = given.pop("src")
    bound = layer.bind(**given)
    found = bound(src)
    assert type(found) is torch.Tensor
    assert found.dtype == kinds[spec.dtypes["dst"]]
    assert torch.equal(found.double(), expected)
    out = torch.zeros(spec.dst_shape, dtype=found.dtype)
    assert bound(src, out=out) is out
    assert torch.equal(out, found)
    with pytest.raises(KernelError, match=r"expected dtype u?int8 in native byte order, found float32"):
        bound(src.float())


def test_a_tensor_of_a_class_of_ones_own_comes_back_as_a_tensor(library: Library) -> None:
    torch = pytest.importorskip("torch")
    given = operands(SPEC)
    layer = library.bind(given["weights"], given["bias"], given["slope"])

    named: Any = type("Named", (torch.Tensor,), {})
    src = torch.from_numpy(given["src"].copy()).as_subclass(named)
    found = layer(src, residual=torch.from_numpy(given["residual"].copy()))
    assert isinstance(found, torch.Tensor)
    np.testing.assert_array_equal(np.asarray(found), convolve(SPEC, given))


def test_tensors_that_cannot_be_read_are_refused_by_name(library: Library) -> None:
    torch = pytest.importorskip("torch")
    given = {name: torch.from_numpy(np.array(array)) for name, array in operands(SPEC).items()}
    bias, slope = given["bias"], given["slope"]
    refused = {
        r"weights: expected an array in CPU memory|weights: .*meta": given["weights"].to("meta"),
        r"weights: expected an array NumPy can share, found Tensor": given["weights"].to_sparse(),
        r"weights: expected dtype float32 in native byte order, found complex64": given["weights"].to(torch.complex64),
        r"weights: expected dtype float32 in native byte order, found float64": given["weights"].double(),
        r"weights: expected dtype float32 in native byte order, found bfloat16": given["weights"].bfloat16(),
    }
    for message, weights in refused.items():
        with pytest.raises(KernelError, match=message):
            library.bind(weights, bias, slope)
    layer = library.bind(given["weights"], bias, slope)
    with pytest.raises(KernelError, match=r"x: .* gradient"):
        layer(given["src"].requires_grad_(), residual=given["residual"])


def test_the_sign_that_a_view_has_is_applied_or_refused(library: Library) -> None:
    """Memory of tensors with PyTorch's negative bit has the opposite of their values, which DLPack does not say."""
    torch = pytest.importorskip("torch")
    given = operands(SPEC)
    expected = convolve(SPEC, given)
    turned = {name: torch._neg_view(torch.from_numpy(-array)) for name, array in given.items()}
    assert all(tensor.is_neg() for tensor in turned.values())
    layer = library.bind(turned["weights"], turned["bias"], turned["slope"])
    found = layer(turned["src"], residual=turned["residual"])
    np.testing.assert_array_equal(found, expected)
    imaginary = torch.complex(torch.zeros(SPEC.src_shape), torch.from_numpy(-given["src"])).conj().imag
    np.testing.assert_array_equal(layer(imaginary, residual=given["residual"]), expected)
    out, refused = torch._neg_view(torch.zeros(SPEC.dst_shape)), r": expected a tensor whose values are in its memory"
    with pytest.raises(KernelError, match=f"out{refused}, .* neg bit|dst{refused}, .* neg bit"):
        layer(given["src"], residual=given["residual"], out=out)
    with pytest.raises(KernelError, match=f"src{refused}"):  # is read at every run, where it is
        library.prepare(turned["src"], layer.packed, out, given["residual"])
    with pytest.raises(KernelError, match=r"weights: expected dtype float32 .*complex64"):
        library.bind(turned["weights"].to(torch.complex64).conj(), given["bias"], given["slope"])
    with pytest.raises(KernelError, match=r"x: .* found one with PyTorch's conj bit; resolve_conj\(\)"):
        view("x", torch.zeros(1, dtype=torch.complex64).conj(), 0, 0)


def test_what_numpy_calls_bfloat16_is_pytorch_s(folder: Path) -> None:
    """Special values keep their bits on the way in and out: a 1×1 layer with a weight of one."""
    torch = pytest.importorskip("torch")
    spec = ConvSpec.parse("conv2d n1 ic1 oc1 i1x6 k1 nobias bf16")
    layer = Library(link_naive(spec, folder)[1], spec, spec.name, 1).bind(np.ones((1, 1, 1, 1), ml_dtypes.bfloat16))
    values = torch.tensor([1.0, -0.0, float("inf"), 3.3895e38, 2.0**-126, 0.1], dtype=torch.bfloat16)
    found = layer(values.reshape(1, 1, 1, 6))
    assert torch.equal(found.reshape(-1).view(torch.int16)[2:], values.view(torch.int16)[2:])
    assert found.dtype == torch.bfloat16
