"""How a model starts in a process of its own: the memory that it takes there, and the seconds to its first result."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from convgen.measure.network_model import NetworkModel

#: What the process runs. Libraries are imported before.
_PROGRAM = """
import sys, json, time, numpy as np
{imports}

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))

given = json.loads(sys.argv[1])
inputs = {{name: np.ones(shape, dtype) for name, (shape, dtype) in given["inputs"].items()}}
before, started = status("VmRSS"), time.perf_counter()
{load}
loaded = time.perf_counter()
{run}
first = time.perf_counter()
for _ in range(2):
    {run}
print(json.dumps({{"memory": status("VmHWM") - before, "load": loaded - started, "first": first - loaded}}))
"""
_SESSION = """
options = ort.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = given["threads"], 3
if given["library"]:
    options.register_custom_ops_library(given["library"])
session = ort.InferenceSession(given["path"], options, providers=["CPUExecutionProvider"])
"""


@dataclass(frozen=True)
class Way:
    """How a model is loaded and run: Python's text, which finds the path and what else there is in ``given``."""

    imports: str
    load: str
    run: str


#: What ``convgen.load`` gives of an exported network, its library's C functions alone, and a session of ONNX Runtime.
LOADED = Way(
    "import convgen.network.load", "network = convgen.load(given['path'], given['threads'])", "network(inputs)"
)
OPENED = Way(
    "from convgen.network.library import NetworkLibrary",
    "network = NetworkLibrary(*given['files'], given['threads'])",
    "network(inputs)",
)
SESSION = Way("import onnxruntime as ort", _SESSION, "session.run(None, inputs)")


@dataclass(frozen=True)
class Start:
    """What a process took.

    Attributes:
        memory: bytes added from before the model is loaded to the most while it ran.
        load: seconds until it could run.
        first: those of its first run.
    """

    memory: int
    load: float
    first: float

    @property
    def seconds(self) -> float:
        """Until the first result."""
        return self.load + self.first

    def to_dict(self) -> dict[str, float]:
        """As JSON can say it."""
        return asdict(self)


def start(way: Way, path: Path, model: NetworkModel, threads: int = 1, library: Path | None = None) -> Start:
    """Load and run a model.

    Args:
        path: the folder of an exported network, or the ONNX file.
        model: whose inputs it has.
        library: of custom operators, for a session.
    """
    inputs = {name: (array.shape, str(array.dtype)) for name, array in model.inputs.items()}
    given = {"path": str(path), "threads": threads, "inputs": inputs, "library": str(library) if library else ""}
    if path.is_dir():
        (weights,) = path.glob("*.weights")
        given["files"] = [str(path / f"lib{weights.stem}.so"), weights.stem, str(weights)]
    text = _PROGRAM.format(**asdict(way))
    command = [sys.executable, "-c", text, json.dumps(given)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    return Start(**json.loads(done.stdout))
