"""Networks that find, segment and sound: like YOLO, U-Net and HiFi-GAN, with their kinds of layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .blocks import ConvNorm, Residual

# ---- a detector -----------------------------------------------------------------------------------


def _conv(inner: int, outer: int, kernel: int = 1, stride: int = 1) -> nn.Module:
    return ConvNorm(inner, outer, kernel, stride, act=nn.SiLU)


class _Csp(nn.Module):
    """Half of the channels goes through bottlenecks, the other half by."""

    def __init__(self, inner: int, outer: int, depth: int, residual: bool = True) -> None:
        super().__init__()
        half = outer // 2
        self.left, self.right, self.out = _conv(inner, half), _conv(inner, half), _conv(outer, outer)
        bodies = [nn.Sequential(_conv(half, half), _conv(half, half, 3)) for _ in range(depth)]
        self.body = nn.Sequential(*(Residual(body) if residual else body for body in bodies))

    def forward(self, x: Tensor) -> Tensor:
        merged: Tensor = self.out(torch.cat([self.body(self.left(x)), self.right(x)], 1))
        return merged


class _PooledPyramid(nn.Module):
    """Maxima over growing windows beside the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner, self.out = _conv(channels, channels // 2), _conv(2 * channels, channels)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        levels = [self.inner(x)]
        for _ in range(3):
            levels.append(self.pool(levels[-1]))
        merged: Tensor = self.out(torch.cat(levels, 1))
        return merged


class _Detector(nn.Module):
    """Backbone with three outputs, a neck down and up again, and a 1×1 head on each level."""

    def __init__(self, width: int, depths: tuple[int, int, int, int], outputs: int) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(_conv(3, w, 3, 2), _conv(w, 2 * w, 3, 2), _Csp(2 * w, 2 * w, depths[0]))
        self.small = nn.Sequential(_conv(2 * w, 4 * w, 3, 2), _Csp(4 * w, 4 * w, depths[1]))
        self.middle = nn.Sequential(_conv(4 * w, 8 * w, 3, 2), _Csp(8 * w, 8 * w, depths[2]))
        self.large = nn.Sequential(_conv(8 * w, 16 * w, 3, 2), _Csp(16 * w, 16 * w, depths[3]), _PooledPyramid(16 * w))
        self.to_middle, self.to_small = _conv(16 * w, 8 * w), _conv(8 * w, 4 * w)
        self.up = nn.Upsample(scale_factor=2.0)
        self.down_middle = _Csp(16 * w, 8 * w, 1, residual=False)
        self.down_small = _Csp(8 * w, 4 * w, 1, residual=False)
        self.from_small, self.up_middle = _conv(4 * w, 4 * w, 3, 2), _Csp(8 * w, 8 * w, 1, residual=False)
        self.from_middle, self.up_large = _conv(8 * w, 8 * w, 3, 2), _Csp(16 * w, 16 * w, 1, residual=False)
        self.heads = nn.ModuleList(nn.Conv2d(channels * w, outputs, 1) for channels in (4, 8, 16))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        small = self.small(self.stem(x))
        middle = self.middle(small)
        top = self.to_middle(self.large(middle))
        inner = self.to_small(self.down_middle(torch.cat([self.up(top), middle], 1)))
        small = self.down_small(torch.cat([self.up(inner), small], 1))
        middle = self.up_middle(torch.cat([self.from_small(small), inner], 1))
        large = self.up_large(torch.cat([self.from_middle(middle), top], 1))
        return tuple(head(level) for head, level in zip(self.heads, (small, middle, large), strict=True))


def detector() -> nn.Module:
    """Of the size of YOLOv5s."""
    return _Detector(32, (1, 2, 3, 1), 255)


# ---- U-Net ----------------------------------------------------------------------------------------


def _twice(inner: int, outer: int) -> nn.Module:
    return nn.Sequential(ConvNorm(inner, outer, 3), ConvNorm(outer, outer, 3))


class _Unet(nn.Module):
    def __init__(self, width: int, levels: int, classes: int) -> None:
        super().__init__()
        widths = [width << level for level in range(levels)]
        self.down = nn.ModuleList(_twice(inner, outer) for inner, outer in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in widths[-2::-1])
        self.merge = nn.ModuleList(_twice(2 * w, w) for w in widths[-2::-1])
        self.pool, self.head = nn.MaxPool2d(2), nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skipped: list[Tensor] = []
        for level, down in enumerate(self.down):
            x = down(self.pool(x) if level else x)
            skipped.append(x)
        skipped.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([up(x), skipped.pop()], 1))
        classes: Tensor = self.head(x)
        return classes


def unet() -> nn.Module:
    return _Unet(32, 5, 21)


# ---- a vocoder ------------------------------------------------------------------------------------


class _Dilated(nn.Module):
    """Residual pairs of a dilated and a plain convolution."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()

        def pair(dilation: int) -> nn.Module:
            padding = dilation * (kernel - 1) // 2
            return nn.Sequential(
                nn.LeakyReLU(0.1),
                nn.Conv1d(channels, channels, kernel, padding=padding, dilation=dilation),
                nn.LeakyReLU(0.1),
                nn.Conv1d(channels, channels, kernel, padding=(kernel - 1) // 2),
            )

        self.pairs = nn.Sequential(*(Residual(pair(dilation)) for dilation in (1, 3, 5)))

    def forward(self, x: Tensor) -> Tensor:
        sums: Tensor = self.pairs(x)
        return sums


class _Mean(nn.Module):
    """The mean of what several bodies make of the input."""

    def __init__(self, *bodies: nn.Module) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(bodies)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([body(x) for body in self.bodies]).mean(0)


def vocoder() -> nn.Module:
    """Of the size of HiFi-GAN V2: a mel spectrogram of 80 bands to 256 samples a frame."""
    channels = 128
    layers: list[nn.Module] = [nn.Conv1d(80, channels, 7, padding=3)]
    for stride, kernel in ((8, 16), (8, 16), (2, 4), (2, 4)):
        up = nn.ConvTranspose1d(channels, channels // 2, kernel, stride, (kernel - stride) // 2)
        channels //= 2
        layers += [nn.LeakyReLU(0.1), up, _Mean(*(_Dilated(channels, kernel) for kernel in (3, 7, 11)))]
    return nn.Sequential(*layers, nn.LeakyReLU(0.01), nn.Conv1d(channels, 1, 7, padding=3), nn.Tanh())
