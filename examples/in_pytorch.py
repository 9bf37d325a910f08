"""convgen in PyTorch: as a backend of torch.compile, and for exported programs.

python examples/in_pytorch.py
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

import convgen


class Model(nn.Module):
    """A small network; ``cumsum`` stands for what convgen does not take."""

    def __init__(self, unusual: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.body = nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 10)
        self.unusual = unusual

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        x = torch.relu(self.body(x) + x)
        if self.unusual:
            x = x.cumsum(1)
        return {"scores": self.head(x.mean((2, 3))), "features": x}


def main() -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("convgen.bridges.torch").setLevel(logging.INFO)  # names what stays with PyTorch

    x = torch.randn(1, 3, 64, 64)
    for model in (Model().eval(), Model(unusual=True).eval()):
        fast = torch.compile(model, backend="convgen")
        with torch.no_grad():
            wanted, found = model(x), fast(x)
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4)
        print(f"scores {list(found['scores'].shape)} are PyTorch's")

    program = convgen.compile(torch.export.export(Model().eval(), (x,)))
    print(f"exported: {len(program.networks)} network, {len(program.outside)} nodes outside")


if __name__ == "__main__":
    main()
