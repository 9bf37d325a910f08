"""Modules of PyTorch that several tests compile."""

from __future__ import annotations

from torch import Tensor, nn


class Halves(nn.Module):
    """Two convolutions, and between them what no network takes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.second(self.first(x).cumsum(1).relu())
        return made
