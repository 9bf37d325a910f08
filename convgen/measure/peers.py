"""The libraries convgen is measured against, each used as its users would for speed.

Constant weights, converted beforehand; the same data; the same number of threads; output allocated
once where the library takes one. A peer is timed only after its output agrees with ONNX Runtime's.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ..check.data import Arrays
from ..errors import UnsupportedError, meant
from ..problem.dtypes import numpy_dtype, widen
from ..problem.spec import ConvSpec

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Entrant:
    """One way to run a layer.

    ``run`` runs it and nothing else; ``output`` is what it computed last, of ``spec.dst_shape``.
    ``context`` is entered around all runs of a turn. ``way`` tells a library's several ways apart.
    ``turn``, where given, takes a whole turn and returns its seconds per call: of what a clock around ``run`` does
    not show, such as a part of it.
    """

    way: str
    run: Callable[[], Any]
    output: Callable[[], npt.NDArray[Any]]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    turn: Callable[[], float] | None = None


class Peer(ABC):
    """A library that runs convolutions.

    None but ONNX Runtime is asked for tensors in blocks of channels: they have such inside, but do not take them.
    ONNX Runtime runs the model that says what the layer means, rearranging included.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    #: By bits of a vector, the environment that keeps the library to such vectors; it is read at the first use.
    restrictions: ClassVar[Mapping[int, Mapping[str, str]]] = {}

    @classmethod
    def restrict(cls, bits: int) -> None:
        """Keep the library to vectors of so many bits, for the rest of this process.

        Raises:
            UnsupportedError: it cannot be restricted, or was in use before.
        """
        if bits not in cls.restrictions:
            raise UnsupportedError(f"cannot be restricted to vectors of {bits} bits")
        wanted = cls.restrictions[bits]
        if cls.is_settled() and any(os.environ.get(name) != value for name, value in wanted.items()):
            raise UnsupportedError(SETTLED)
        os.environ.update(wanted)

    @classmethod
    def is_settled(cls) -> bool:
        """Whether the environment may have been read."""
        return cls.package in sys.modules

    @classmethod
    def version(cls) -> str | None:
        """The installed version; None where it is not installed."""
        try:
            return importlib.metadata.version(cls.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    @abstractmethod
    def entrants(self, spec: ConvSpec, data: Arrays, threads: int) -> list[Entrant]:
        """The ways to run the layer on ``data``; the fastest of them counts.

        Raises:
            Exception: of the library's own kinds, where it cannot run this layer.
        """


SETTLED = "was in use before it could be restricted to narrower vectors"
#: oneDNN, which PyTorch and OpenVINO bring, by bits of a vector.
ONEDNN = {256: {"ONEDNN_MAX_CPU_ISA": "AVX2"}, 128: {"ONEDNN_MAX_CPU_ISA": "SSE41"}}


class OnnxRuntime(Peer):
    """ONNX Runtime: a session with full graph optimisation, inputs and output bound. A layer of integers runs as the
    formula that defines it, and between DequantizeLinear and QuantizeLinear, which becomes its own operator.

    It takes the widest vectors there are, and nothing restricts it.
    """

    name, package = "onnxruntime", "onnxruntime"

    def entrants(self, spec: ConvSpec, data: Arrays, threads: int) -> list[Entrant]:
        from ..check.reference import OrtReference
        from .quantised_peers import qdq_model

        ways: dict[str, Callable[[], Any]] = {"": lambda: None}
        if spec.is_quantised:
            ways["QDQ"] = lambda: qdq_model(spec, data, transposed=True)
        found, refused = list[Entrant](), list[Exception]()
        for way, model in ways.items():
            try:
                prepared = OrtReference(spec, **data, threads=threads, model=model())
            except Exception as error:  # of the library's own kinds; there is none that all are of
                refused.append(error)
                continue
            found.append(Entrant(way, prepared, partial(getattr, prepared, "output")))
        if not found:
            raise refused[0]
        return found


class Torch(Peer):
    """PyTorch in inference mode, on oneDNN: contiguous tensors and, where there is one, the
    channels-last format that its documentation recommends. The activation overwrites the
    convolution's output.
    """

    name, package = "torch", "torch"
    restrictions: ClassVar = {
        256: {**ONEDNN[256], "ATEN_CPU_CAPABILITY": "avx2", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"},
        128: {**ONEDNN[128], "ATEN_CPU_CAPABILITY": "default"},
    }

    @classmethod
    def restrict(cls, bits: int) -> None:
        super().restrict(bits)
        import torch

        # Its first use settles what it says that it is capable of.
        if torch.backends.cpu.get_cpu_capability().lower() != cls.restrictions[bits]["ATEN_CPU_CAPABILITY"]:
            raise UnsupportedError(SETTLED)

    @classmethod
    def is_settled(cls) -> bool:
        return False  # TVM loads it, without using it

    def entrants(self, spec: ConvSpec, data: Arrays, threads: int) -> list[Entrant]:
        import torch

        if not spec.src_blocks.is_plain or spec.dst_layout != spec.layout:
            raise UnsupportedError("takes NCHW or NHWC, and gives what it takes")
        if spec.mirrored:
            raise UnsupportedError("takes no mirrored weights")
        if spec.direction != "forward" and any(begin != end for begin, end in spec.padding):
            raise UnsupportedError("has no gradient with padding that differs at both ends")
        torch.set_num_threads(threads)
        last = {2: torch.channels_last, 3: torch.channels_last_3d}.get(spec.rank)
        formats = [("channels last", last)] if last else []
        if spec.layout == "nchw" or not last:
            formats.insert(0, ("contiguous", torch.contiguous_format))
        if spec.is_quantised:
            return self._quantised(spec, data, formats)
        return [self._entrant(spec, data, label, form) for label, form in formats]

    def _quantised(self, spec: ConvSpec, data: Arrays, formats: Sequence[tuple[str, Any]]) -> list[Entrant]:
        """Each memory format with each of its engines that takes the layer."""
        import torch

        from .quantised_peers import ENGINES, torch_layer

        found = list[Entrant]()
        refused: list[Exception] = [UnsupportedError(f"has neither of its engines here, {' and '.join(ENGINES)}")]
        engines = [name for name in ENGINES if name in torch.backends.quantized.supported_engines]
        if os.environ.get("ATEN_CPU_CAPABILITY") == self.restrictions[128]["ATEN_CPU_CAPABILITY"]:
            engines.remove("fbgemm")  # its vectors have 256 bits at least
        for engine in engines:
            for label, form in formats:
                try:
                    run, output = torch_layer(spec, data, form, engine)
                except RuntimeError as error:  # an engine's own limits
                    refused.append(error)
                    continue
                found.append(Entrant(f"{label}, {engine}", run, partial(_contiguous, output)))
        if not found:
            raise refused[-1]
        return found

    def _entrant(self, spec: ConvSpec, data: Arrays, way: str, form: Any) -> Entrant:
        # An NHWC array is a channels-last tensor as it lies in memory.
        order = (0, spec.rank + 1, *range(1, spec.rank + 1)) if spec.layout == "nhwc" else tuple(range(spec.rank + 2))
        back = tuple(int(axis) for axis in np.argsort(order))

        def tensor(name: str) -> Any:
            array = data.get(name)
            if array is None:
                return None
            shared = _tensor(array)
            if name in ("src", "residual"):
                shared = shared.permute(order)
            return shared.contiguous(memory_format=form) if shared.dim() > 1 else shared

        context = partial(_inference, "bf16" if spec.accuracy == "bf16" else "ieee")
        if spec.direction != "forward":
            run_backward, made = self._gradient(spec, data, order, form)
            return Entrant(way, run_backward, lambda: _stored_gradients(spec, made(), back), context)
        src, residual = tensor("src"), tensor("residual")
        convolve = self._convolution(spec, tensor("weights"), tensor("bias"))
        activate = self._activation(spec, tensor("slope"))
        result: list[Any] = [None]

        def run() -> None:
            dst = convolve(src)
            if residual is not None:
                dst.add_(residual)
            result[0] = activate(dst)

        def output() -> npt.NDArray[Any]:
            return np.ascontiguousarray(widen(result[0].permute(back).float().numpy()))

        return Entrant(way, run, output, context)

    def _gradient(
        self, spec: ConvSpec, data: Arrays, order: Sequence[int], form: Any
    ) -> tuple[Callable[[], None], Callable[[], list[Any]]]:
        """What autograd calls; and what it gave last, of the gradients of src, weights and bias that are wanted."""
        import torch

        def image(name: str) -> Any:
            return _tensor(data[name]).permute(*order).contiguous(memory_format=form)

        def unread(shape: Sequence[int], like: Any) -> Any:  # of what the gradient is asked of, sizes alone matter
            return torch.empty(*shape, dtype=like.dtype).contiguous(memory_format=form)

        wanted = [spec.direction == "data", spec.direction == "weights", spec.direction == "weights" and spec.bias]
        if spec.direction == "data":
            gradient, weights = image("src"), _tensor(data["weights"]).contiguous(memory_format=form)
            src = unread((spec.n, spec.ic, *spec.in_spatial), gradient)
        else:
            gradient, src = image("residual"), image("src")
            weights = unread(spec.weights_shape, gradient)
        padding = [begin for begin, _ in spec.padding]
        options = (spec.stride, padding, spec.dilation, spec.transposed, spec.output_padding, spec.groups, wanted)
        result: list[Any] = [None]

        def run() -> None:
            result[0] = torch.ops.aten.convolution_backward(gradient, src, weights, [spec.oc], *options)

        return run, lambda: [tensor for tensor in result[0] if tensor is not None]

    def _convolution(self, spec: ConvSpec, weights: Any, bias: Any) -> Callable[[Any], Any]:
        import torch

        functional = torch.nn.functional
        even = [min(pair) for pair in spec.padding]
        rest = [(begin - p, end - p) for (begin, end), p in zip(spec.padding, even, strict=True)]
        if not spec.transposed:
            conv = getattr(functional, f"conv{spec.rank}d")
            args = (weights, bias, spec.stride, even, spec.dilation, spec.groups)
            if not any(map(any, rest)):
                return lambda src: conv(src, *args)
            pad = [amount for pair in reversed(rest) for amount in pair]
            return lambda src: conv(functional.pad(src, pad), *args)
        transposed = getattr(functional, f"conv_transpose{spec.rank}d")
        options = (weights, bias, spec.stride, even, spec.output_padding, spec.groups, spec.dilation)
        if not any(map(any, rest)):
            return lambda src: transposed(src, *options)
        crop = (slice(None), slice(None), *(slice(begin, -end or None) for begin, end in rest))
        return lambda src: transposed(src, *options)[crop].contiguous()

    def _activation(self, spec: ConvSpec, slope: Any) -> Callable[[Any], Any]:
        import torch

        functional = torch.nn.functional
        name, p = spec.activation_op.name, spec.activation_op.params
        bounds = [None if np.isinf(value) else value for value in p]
        table: dict[str, Callable[[Any], Any]] = {
            "none": lambda y: y,
            "relu": torch.relu_,
            "leaky_relu": lambda y: functional.leaky_relu_(y, p[0]),
            "prelu": lambda y: functional.prelu(y, slope),
            "clip": lambda y: y if bounds == [None, None] else y.clamp_(*bounds),
            "sigmoid": torch.sigmoid_,
            "tanh": torch.tanh_,
            "silu": lambda y: functional.silu(y, inplace=True),
            "mish": lambda y: functional.mish(y, inplace=True),
            "hardswish": lambda y: functional.hardswish(y, inplace=True),
            "hardsigmoid": lambda y: y.mul_(p[0]).add_(p[1]).clamp_(0, 1),
            "elu": lambda y: functional.elu_(y, p[0]),
            "gelu": functional.gelu,
            "gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"),
        }
        if name not in table:
            raise UnsupportedError(f"activation: expected one torch is asked for, found {name}")
        return table[name]


def _contiguous(output: Callable[[], Any]) -> npt.NDArray[Any]:
    return np.ascontiguousarray(output().numpy())


def _stored_gradients(spec: ConvSpec, made: list[Any], back: Sequence[int]) -> F32:
    """PyTorch's gradients as dst."""
    if spec.direction == "data":
        return np.ascontiguousarray(made[0].permute(*back).float().numpy())
    parts = [np.ascontiguousarray(tensor.float().numpy()) for tensor in made]
    return np.concatenate([part.reshape(-1) for part in parts]) if spec.bias else parts[0]


def _tensor(array: npt.NDArray[Any]) -> Any:
    """An array of f32 or bf16 as a tensor, which shares its memory."""
    import torch

    if array.dtype == np.float32:
        return torch.from_numpy(array)
    if array.dtype != numpy_dtype("bf16"):
        raise UnsupportedError(f"is asked for f32, bf16 and integers only, not {array.dtype}")
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


@contextmanager
def _inference(products: str) -> Iterator[None]:
    """Inference mode, in which convolutions of f32 multiply in f32 (``ieee``) or in bf16."""
    import torch

    convolutions = torch.backends.mkldnn.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = products
    try:
        with torch.inference_mode():
            yield
    finally:
        convolutions.fp32_precision = before


class OpenVino(Peer):
    """OpenVINO: the layer's ONNX model compiled for latency, tensors shared. Products are of f32, or of bf16 where the
    layer's accuracy admits them or its tensors are of it; a layer of integers stands between DequantizeLinear and
    QuantizeLinear.
    """

    name, package = "openvino", "openvino"
    restrictions: ClassVar = ONEDNN

    def entrants(self, spec: ConvSpec, data: Arrays, threads: int) -> list[Entrant]:
        import openvino

        if not spec.src_blocks.is_plain or not spec.dst_blocks.is_plain:
            raise UnsupportedError("takes NCHW and NHWC only")

        from ..check.onnx_model import onnx_model
        from .quantised_peers import qdq_model

        if spec.dtype not in ("f32", "i8"):
            raise UnsupportedError(f"takes tensors of f32 and of integers only, not {spec.dtype}")
        parameters = {name: data[name] for name in spec.parameters}
        model = qdq_model(spec, data) if spec.is_quantised else onnx_model(spec, **parameters)
        options = {
            "INFERENCE_PRECISION_HINT": "bf16" if spec.accuracy == "bf16" else "f32",
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        core = openvino.Core()
        request = core.compile_model(core.read_model(model.SerializeToString()), "CPU", options).create_infer_request()
        output = np.empty(spec.dst_shape, numpy_dtype(spec.dst_dtype))
        inputs = {name: data[name] for name in ("src", "residual") if name in data}
        for name, array in inputs.items():
            request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
        request.set_tensor("dst", openvino.Tensor(output, shared_memory=True))

        def run(_memory: object = inputs) -> None:
            request.infer(share_outputs=True)

        return [Entrant("", run, lambda: output)]


class Ncnn(Peer):
    """ncnn: a network of the layer and what follows it, in f32 with all its algorithms (Winograd's among them).

    It takes an image at a time. Tensors are given and taken as they are outside a network: the layout that it
    prefers between layers is made and unmade, as with the others.
    """

    name, package = "ncnn", "ncnn"
    #: Its layer's name by rank: plain and grouped; it has no grouped 1-D one other than depthwise.
    _LAYERS: ClassVar = {
        1: ("Convolution1D", "ConvolutionDepthWise1D"),
        2: ("Convolution", "ConvolutionDepthWise"),
        3: ("Convolution3D", "ConvolutionDepthWise3D"),
    }
    #: Numbers of its layers' parameters along an axis, the last one first: taps, dilation, stride, and padding before
    #: and after; output padding of transposed ones.
    _TAPS, _DILATION, _STRIDE = (1, 11, 21), (2, 12, 22), (3, 13, 23)
    _BEGIN, _END, _OUTPUT = (4, 14, 24), (15, 16, 17), (18, 19, 20)
    _BIAS, _WEIGHTS, _GROUPS = 5, 6, 7

    def entrants(self, spec: ConvSpec, data: Arrays, threads: int) -> list[Entrant]:
        import ncnn

        if (spec.layout, spec.dst_layout) != ("nchw", "nchw"):
            raise UnsupportedError("takes NCHW only")
        if spec.direction != "forward" or spec.mirrored:
            raise UnsupportedError("has no gradients, and no mirrored weights")
        if spec.dtype != "f32":
            raise UnsupportedError(f"takes tensors of f32 only, not {spec.dtype}")
        text, parameters = self._network(spec, data)
        net = f32_net(threads)
        if net.load_param_mem(text):
            raise UnsupportedError("has no such layer")
        net.load_model_mem(parameters)
        inputs = [name for name in ("src", "residual") if name in data]
        images = [{name: ncnn.Mat(data[name][i]) for name in inputs} for i in range(spec.n)]
        results: list[Any] = [None] * spec.n

        def run(_memory: object = (data, parameters)) -> None:
            for i, mats in enumerate(images):
                extractor = net.create_extractor()
                for name, mat in mats.items():
                    extractor.input(name, mat)
                status, results[i] = extractor.extract("dst")
                if status:
                    raise UnsupportedError(f"failed with status {status}")

        return [Entrant("", run, lambda: np.stack([np.array(result) for result in results]).reshape(spec.dst_shape))]

    def _network(self, spec: ConvSpec, data: Arrays) -> tuple[str, bytes]:
        """The network as its two files."""
        blob = "sums"
        lines = [f"Input {name} 0 1 {name}" for name in ("src", "residual") if name in data]
        lines.append(f"{self._layer(spec)} conv 1 1 src sums {self._parameters(spec)}")
        if spec.residual:
            lines.append("BinaryOp add 2 1 sums residual added 0=0")
            blob = "added"
        kind, _, parameters = self._activation(spec).partition(" ")
        lines.append(f"{kind} act 1 1 {blob} dst {parameters}")
        weights = data["weights"]
        if spec.transposed:  # [g][ic/g][oc/g][taps] -> [g][oc/g][ic/g][taps]
            weights = weights.reshape(spec.groups, -1, *weights.shape[1:]).swapaxes(1, 2)
        arrays = [np.zeros(1, np.uint32), np.ascontiguousarray(weights)]  # 0: f32
        arrays += [data[name] for name in ("bias", "slope") if name in data]
        head = ["7767517", f"{len(lines)} {len(lines)}"]  # a magic number; as many layers as tensors
        return "\n".join([*head, *lines, ""]), b"".join(array.tobytes() for array in arrays)

    def _layer(self, spec: ConvSpec) -> str:
        name = self._LAYERS[spec.rank][spec.groups > 1]
        return name.replace("Convolution", "Deconvolution") if spec.transposed else name

    def _parameters(self, spec: ConvSpec) -> str:
        values: dict[int, int] = {
            0: spec.oc,
            self._BIAS: int(spec.bias),
            self._WEIGHTS: int(np.prod(spec.weights_shape)),
        }
        if spec.groups > 1:
            values[self._GROUPS] = spec.groups
        for place, axis in enumerate(reversed(range(spec.rank))):
            begin, end = spec.padding[axis]
            values |= {
                self._TAPS[place]: spec.kernel[axis],
                self._DILATION[place]: spec.dilation[axis],
                self._STRIDE[place]: spec.stride[axis],
                self._BEGIN[place]: begin,
                self._END[place]: end,
            }
            if spec.transposed:
                values[self._OUTPUT[place]] = spec.output_padding[axis]
        return " ".join(f"{key}={value}" for key, value in values.items())

    def _activation(self, spec: ConvSpec) -> str:
        """A layer of it, with its parameters."""
        op = spec.activation_op
        p = [max(-3.4e38, min(3.4e38, value)) for value in op.params]
        table = {
            "none": "Noop",
            "relu": "ReLU",
            "leaky_relu": f"ReLU 0={p[0]!r}" if p else "",
            "prelu": f"PReLU 0={spec.oc}",
            "clip": f"Clip 0={p[0]!r} 1={p[1]!r}" if len(p) > 1 else "",
            "sigmoid": "Sigmoid",
            "tanh": "TanH",
            "silu": "Swish",
            "mish": "Mish",
            "hardswish": f"HardSwish 0={1 / 6!r} 1=0.5",
            "hardsigmoid": f"HardSigmoid 0={p[0]!r} 1={p[1]!r}" if len(p) > 1 else "",
            "elu": f"ELU 0={p[0]!r}" if p else "",
            "gelu": "GELU",
            "gelu_tanh": "GELU 0=1",
        }
        if op.name not in table:
            raise UnsupportedError(f"activation: expected one ncnn has, found {op.name}")
        return table[op.name]


def f32_net(threads: int) -> Any:
    """An empty network of ncnn that will compute in f32 on the CPU."""
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = threads
    for option in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage", "vulkan_compute"):
        setattr(net.opt, f"use_{option}", False)
    return net


PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in (OnnxRuntime, Torch, OpenVino, Ncnn)}


def find_peer(name: str) -> type[Peer]:
    """The peer of that name.

    Raises:
        UnsupportedError: there is none.
    """
    if name not in PEERS:
        raise UnsupportedError(f"peers: expected some of {', '.join(PEERS)}, found {name!r}{meant(name, PEERS)}")
    return PEERS[name]
