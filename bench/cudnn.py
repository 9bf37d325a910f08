"""cuDNN through PyTorch, as a peer of kernels for GPUs; and the rates that its machine reaches."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from convgen.errors import UnsupportedError
from convgen.measure.gpu import gpu
from convgen.measure.peers import Torch
from convgen.problem.dtypes import distance, widen
from convgen.problem.spec import ConvSpec

#: All copies of a layer's tensors together are larger than the L2 cache by this factor, but they are at most so many.
COLD, COPIES = 2, 1024
#: A way of using cuDNN that is so many times slower than its best one takes no part in the turns.
WORSE_WAY = 1.25
#: Side of the square matrices whose product tells the rate of arithmetic, and bytes copied to tell the bandwidth.
GEMM, COPIED = 8192, 1 << 30

#: A layer's tensors on the device, by name.
Tensors = dict[str, Any]
#: A call of the next copy's layer, and what gives the first copy's output in the layer's shape.
Way = tuple[Callable[[], Any], Callable[[], Any]]


class Cudnn(Torch):
    """cuDNN through PyTorch: both memory formats, and its fused kernels where it has some for the layer."""

    name = "cudnn"

    @classmethod
    def version(cls) -> str | None:
        with contextlib.suppress(ImportError):
            import torch

            version = torch.backends.cudnn.version()
            return f"{version} (PyTorch {torch.__version__})" if version else None
        return None

    def calls(self, spec: ConvSpec, data: dict[str, Any]) -> dict[str, Way]:
        """The ways of running a layer, by name.

        Raises:
            UnsupportedError: PyTorch cannot use this machine's GPU, or has no such layouts.
        """
        import torch

        if not spec.src_blocks.is_plain or spec.dst_layout != spec.layout:
            raise UnsupportedError("takes NCHW or NHWC, and gives what it takes")
        if not torch.cuda.is_available():
            raise UnsupportedError("expected PyTorch with CUDA, found one without a device")
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.benchmark_limit = 0  # all of cuDNN's algorithms, not the first ten
        torch.backends.cudnn.allow_tf32 = spec.accuracy == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = spec.accuracy == "tf32"
        channels_last = {2: torch.channels_last, 3: torch.channels_last_3d}.get(spec.rank)
        ways = {}
        for way, memory_format in (("contiguous", torch.contiguous_format), ("channels last", channels_last)):
            if memory_format is None:
                continue
            copies = self._copies(spec, data, memory_format)
            ways[way] = self._turns(spec, [self._layer(spec, tensors) for tensors in copies])
            if fused := self._fused(spec):
                ways[f"{way}, fused"] = self._turns(spec, [partial(fused, tensors) for tensors in copies])
        return ways

    def _copies(self, spec: ConvSpec, data: dict[str, Any], memory_format: Any) -> list[Tensors]:
        import torch

        dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[spec.dtype]
        order = (0, spec.rank + 1, *range(1, spec.rank + 1)) if spec.layout == "nhwc" else tuple(range(spec.rank + 2))

        def tensor(name: str, array: Any) -> Any:
            on_device = torch.from_numpy(np.ascontiguousarray(widen(array))).to("cuda", dtype)
            if name in ("src", "residual"):
                on_device = on_device.permute(order)
            return on_device.contiguous(memory_format=memory_format) if on_device.dim() > 1 else on_device

        tensors = {name: tensor(name, array) for name, array in data.items()}
        size = sum(spec.bytes.values())
        count = max(1, min(COPIES, -(-COLD * gpu().facts["l2"] // size), gpu().facts["memory"] // 4 // size))
        return [tensors, *({name: array.clone() for name, array in tensors.items()} for _ in range(count - 1))]

    def _layer(self, spec: ConvSpec, tensors: Tensors) -> Callable[[], Any]:
        """The layer as separate calls."""
        convolve = self._convolution(spec, tensors["weights"], tensors.get("bias"))
        activate = self._activation(spec, tensors.get("slope"))
        src, residual = tensors["src"], tensors.get("residual")

        def layer() -> Any:
            dst = convolve(src)
            return activate(dst if residual is None else dst.add_(residual))

        return layer

    def _fused(self, spec: ConvSpec) -> Callable[[Tensors], Any] | None:
        """cuDNN's kernel for a convolution with bias and ReLU, and perhaps a residual; None for other layers."""
        import torch

        symmetric = all(begin == end for begin, end in spec.padding)
        if spec.rank != 2 or spec.transposed or not spec.bias or spec.activation != "relu" or not symmetric:
            return None
        rest = (list(spec.stride), [begin for begin, _ in spec.padding], list(spec.dilation), spec.groups)
        if spec.residual:
            return lambda tensors: torch.cudnn_convolution_add_relu(
                tensors["src"], tensors["weights"], tensors["residual"], 1.0, tensors["bias"], *rest
            )
        return lambda tensors: torch.cudnn_convolution_relu(tensors["src"], tensors["weights"], tensors["bias"], *rest)

    def _turns(self, spec: ConvSpec, layers: Sequence[Callable[[], Any]]) -> Way:
        """A way whose calls take one copy after another. Each output is kept until its copy's turn comes again, so
        that its memory is not used again at once.
        """
        outputs: list[Any] = [None] * len(layers)
        next_copy = 0

        def call() -> None:
            nonlocal next_copy
            outputs[next_copy] = layers[next_copy]()
            next_copy = (next_copy + 1) % len(layers)

        order = (0, *range(2, spec.rank + 2), 1) if spec.layout == "nhwc" else tuple(range(spec.rank + 2))
        return call, lambda: layers[0]().permute(order).float().cpu().numpy()


@contextlib.contextmanager
def cudnn_ways(
    spec: ConvSpec, data: dict[str, Any], expected: Any, bound: Any
) -> Iterator[tuple[dict[str, Callable[[], Any]], str]]:
    """The calls of the best ways of using cuDNN whose output is right, and what was wrong with the others."""
    try:
        import torch
    except ImportError:
        yield {}, "PyTorch is not installed: pip install torch"
        return
    with torch.inference_mode():
        right: dict[str, Callable[[], Any]] = {}
        times: dict[str, float] = {}
        problems = []
        ways: dict[str, Way] = {}
        try:
            ways = Cudnn().calls(spec, data)
        except Exception as error:  # a peer's failures are of its own kinds, and part of the answer
            problems.append(_first_line(error))
        for way, (call, output) in ways.items():
            try:
                difference = distance(output(), widen(expected))
                if (difference <= bound).all():
                    right[way], times[way] = call, statistics.median(gpu().time_calls(call, 0.02, 1e-3))
                else:
                    problems.append(f"{way}: wrong output: its error is {float(np.nanmax(difference)):.3g}")
            except Exception as error:  # one of cuDNN's fused kernels, for a layer that it does not take
                problems.append(f"{way}: {_first_line(error)}")
        best = min(times.values(), default=0.0)
        yield {way: call for way, call in right.items() if times[way] <= WORSE_WAY * best}, "; ".join(problems)
        if torch.cuda.is_available():
            right.clear()
            torch.cuda.empty_cache()  # for kernels that do not allocate through PyTorch


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def rates(mode: str) -> tuple[float | None, float | None]:
    """FLOP/s of a large product of matrices, and bytes per second of a copy; None where PyTorch cannot measure."""
    try:
        import torch

        if not torch.cuda.is_available():
            return None, None
        torch.backends.cuda.matmul.allow_tf32 = mode == "tf32"
        dtype = {"f16": torch.float16, "bf16": torch.bfloat16}.get(mode, torch.float32)
        a, b, product = (torch.randn(GEMM, GEMM, device="cuda", dtype=dtype) for _ in range(3))
        with torch.inference_mode():
            taken = gpu().time_calls(lambda: torch.matmul(a, b, out=product), 0.5, 5e-3)
            source, copy = (torch.empty(COPIED, device="cuda", dtype=torch.uint8) for _ in range(2))
            copied = gpu().time_calls(lambda: copy.copy_(source), 0.2, 5e-3)
        return 2 * GEMM**3 / statistics.median(taken), 2 * COPIED / statistics.median(copied)
    except ImportError:
        return None, None
