"""A layer by cuDNN, through PyTorch, where the machine that measures has it.

An ordinary interpreter does it in a process of its own: PyTorch is where packages are installed.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any, Callable, Dict, List

from . import LOCATION

_PROGRAM = "import sys; sys.path.append(sys.argv[1]); from standalone.cudnn import main; sys.exit(main())"
#: Seconds of calls before the first sample, in which cuDNN's algorithms are tried; samples of each way.
_WARM_UP, _SAMPLES = 0.2, 50
#: Milliseconds of a sample, and calls in it at most.
_SAMPLE, _CALLS = 1.0, 256
#: The copies of tensors exceed the L2 cache so many times; bytes of that where PyTorch does not tell.
_COLD, _L2 = 2, 64 << 20
_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def timed(layer: Dict[str, Any], timeout: float) -> Dict[str, Any]:
    """What cuDNN takes for a layer.

    Args:
        layer: as the manifest has it, under ``convolution``.
        timeout: seconds after which it is given up.

    Returns:
        ``samples``: seconds per call, of each way to lay tensors out; and ``versions``. Or ``missing``: why there is
        nothing.
    """
    command = [sys.executable, "-c", _PROGRAM, LOCATION]
    try:
        done = subprocess.run(command, input=json.dumps(layer).encode(), capture_output=True, timeout=timeout)
        answer: Dict[str, Any] = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return {"missing": f"no answer within {timeout:.0f} s"}
    except ValueError:
        said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        return {"missing": said or f"exit status {done.returncode}"}
    return answer


def main() -> int:
    """Time the layer that standard input describes; the answer, a line of JSON, goes to standard output."""
    layer = json.load(sys.stdin)
    try:
        import torch
    except ImportError as error:
        return _say({"missing": f"PyTorch is not installed ({error})"})
    if not torch.cuda.is_available():
        return _say({"missing": "PyTorch finds no GPU"})
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.benchmark_limit = 0  # all of its algorithms
    torch.backends.cudnn.allow_tf32 = layer["tf32"]
    versions = {"torch": torch.__version__, "cudnn": str(torch.backends.cudnn.version())}
    device = torch.cuda.get_device_properties(0)
    enough = _COLD * getattr(device, "L2_cache_size", _L2)
    samples = {}
    for way in ("contiguous", "channels last"):
        copies = [make_call(torch, layer, way, "cuda")]
        size = sum(tensor.numel() * tensor.element_size() for tensor in copies[0].tensors)
        copies += [make_call(torch, layer, way, "cuda") for _ in range(min(255, enough // max(size, 1)))]
        samples[way] = _samples(torch, copies)
    return _say({"samples": samples, "versions": versions})


def _say(answer: Dict[str, Any]) -> int:
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


class Call:
    """A layer's computation on tensors of its own: ``call()``."""

    def __init__(self, tensors: List[Any], function: Callable[..., Any]) -> None:
        self.tensors, self._function = tensors, function

    def __call__(self) -> Any:
        return self._function(*self.tensors)


def make_call(torch: Any, layer: Dict[str, Any], way: str, device: str) -> Call:
    """A layer on random tensors: ``src weights [bias] [residual]``; of gradients those that they are computed from.

    Args:
        way: how tensors lie, ``contiguous`` or ``channels last``.
    """
    rank, dtype = len(layer["kernel"]), getattr(torch, _DTYPES[layer["dtype"]])
    last = {2: torch.channels_last, 3: torch.channels_last_3d}.get(rank) if way == "channels last" else None

    def tensor(name: str) -> Any:
        made = torch.randn(layer["shapes"][name], device=device).to(dtype)
        return made.contiguous(memory_format=last) if last is not None and made.dim() == rank + 2 else made

    settings = [layer[name] for name in ("stride", "padding", "dilation")]
    direction = layer["direction"]
    if direction != "forward":
        wanted = [direction == "data", direction == "weights", direction == "weights" and layer["bias"]]
        channels = [layer["shapes"]["bias"][0]] if layer["bias"] else None

        def gradient(src: Any, weights: Any, of_dst: Any) -> Any:
            return torch.ops.aten.convolution_backward(
                of_dst, src, weights, channels, *settings, layer["transposed"], layer["output_padding"],
                layer["groups"], wanted,
            )  # fmt: skip

        return Call([tensor("src"), tensor("weights"), tensor("dst")], gradient)
    names = ["src", "weights"] + [name for name in ("bias", "residual") if layer[name]]

    def forward(src: Any, weights: Any, *others: Any) -> Any:
        given = dict(zip(names[2:], others))
        out = torch.ops.aten.convolution(
            src, weights, given.get("bias"), *settings, layer["transposed"], layer["output_padding"], layer["groups"]
        )
        if "residual" in given:
            out = out + given["residual"]
        return torch.relu_(out) if layer["relu"] else out

    return Call([tensor(name) for name in names], forward)


def _samples(torch: Any, copies: List[Call]) -> List[float]:
    """Seconds per call, by the device's clock, each call on the next copy."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    taken, number = 0.0, 0

    def sample(count: int) -> float:
        nonlocal number
        begin.record()
        for _ in range(count):
            copies[number % len(copies)]()
            number += 1
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    while taken < 1e3 * _WARM_UP:
        taken += max(sample(3), 1e-3)
    each = min(sample(3) for _ in range(3)) / 3
    count = max(1, min(_CALLS, math.ceil(_SAMPLE / max(each, 1e-4))))
    return [sample(count) / 1e3 / count for _ in range(_SAMPLES)]
