"""Networks that find, segment and sound: like YOLO, FCN, U-Net and HiFi-GAN, with their kinds of layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .blocks import ConvNorm, Residual
from .classifiers import resnet18_trunk

# ---- detectors ------------------------------------------------------------------------------------


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


class _Halves(nn.Module):
    """One half of the channels goes through bottlenecks one after another; beside both halves what each gives."""

    def __init__(self, inner: int, outer: int, depth: int, residual: bool = True) -> None:
        super().__init__()
        half = outer // 2
        self.into, self.out = _conv(inner, outer), _conv((2 + depth) * half, outer)
        bodies = [nn.Sequential(_conv(half, half, 3), _conv(half, half, 3)) for _ in range(depth)]
        self.bodies = nn.ModuleList(Residual(body) if residual else body for body in bodies)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.into(x).chunk(2, 1))
        for body in self.bodies:
            parts.append(body(parts[-1]))
        merged: Tensor = self.out(torch.cat(parts, 1))
        return merged


def _branch(inner: int, width: int, outputs: int) -> nn.Module:
    return nn.Sequential(_conv(inner, width, 3), _conv(width, width, 3), nn.Conv2d(width, outputs, 1))


class _Boxes(nn.Module):
    """Boxes of what was found and how likely it is of each class, of all levels: a side's distance is the mean of whole
    numbers of pixels, which a softmax weights.
    """

    def __init__(self, channels: tuple[int, ...], strides: tuple[int, ...], classes: int, distances: int = 16) -> None:
        super().__init__()
        self.strides, self.distances = strides, distances
        self.sides = nn.ModuleList(_branch(inner, 4 * distances, 4 * distances) for inner in channels)
        self.classes = nn.ModuleList(_branch(inner, max(channels[0], classes), classes) for inner in channels)
        self.register_buffer("numbers", torch.arange(float(distances)).reshape(1, distances, 1, 1))

    def forward(self, levels: tuple[Tensor, ...]) -> Tensor:
        sides = torch.cat([branch(x).flatten(2) for branch, x in zip(self.sides, levels, strict=True)], 2)
        scores = torch.cat([branch(x).flatten(2) for branch, x in zip(self.classes, levels, strict=True)], 2)
        shares = sides.reshape(len(sides), 4, self.distances, -1).transpose(1, 2).softmax(1)
        before, after = functional.conv2d(shares, self.numbers).squeeze(1).chunk(2, 1)
        centres, strides = self._places(levels)
        first, last = centres - before, centres + after
        boxes = torch.cat([(first + last) / 2, last - first], 1) * strides
        return torch.cat([boxes, scores.sigmoid()], 1)

    def _places(self, levels: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The middle of every pixel of every level, in its pixels, and how many of the image's each of these is."""
        centres, strides = [], []
        for x, stride in zip(levels, self.strides, strict=True):
            height, width = (torch.arange(size, dtype=x.dtype) + 0.5 for size in x.shape[2:])
            rows, columns = torch.meshgrid(height, width, indexing="ij")
            centres.append(torch.stack([columns.flatten(), rows.flatten()]))
            strides.append(torch.full_like(rows.flatten(), stride).unsqueeze(0))
        return torch.cat(centres, 1), torch.cat(strides, 1)


class _LaterDetector(nn.Module):
    """Backbone and neck as of the other, of other blocks, and a head whose branches for boxes and classes are apart."""

    def __init__(self, width: int, depths: tuple[int, int, int, int], classes: int) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(_conv(3, w, 3, 2), _conv(w, 2 * w, 3, 2), _Halves(2 * w, 2 * w, depths[0]))
        self.small = nn.Sequential(_conv(2 * w, 4 * w, 3, 2), _Halves(4 * w, 4 * w, depths[1]))
        self.middle = nn.Sequential(_conv(4 * w, 8 * w, 3, 2), _Halves(8 * w, 8 * w, depths[2]))
        large = [_conv(8 * w, 16 * w, 3, 2), _Halves(16 * w, 16 * w, depths[3]), _PooledPyramid(16 * w)]
        self.large, self.up = nn.Sequential(*large), nn.Upsample(scale_factor=2.0)
        self.down_middle = _Halves(24 * w, 8 * w, 1, residual=False)
        self.down_small = _Halves(12 * w, 4 * w, 1, residual=False)
        self.from_small, self.up_middle = _conv(4 * w, 4 * w, 3, 2), _Halves(12 * w, 8 * w, 1, residual=False)
        self.from_middle, self.up_large = _conv(8 * w, 8 * w, 3, 2), _Halves(24 * w, 16 * w, 1, residual=False)
        self.head = _Boxes((4 * w, 8 * w, 16 * w), (8, 16, 32), classes)

    def forward(self, x: Tensor) -> Tensor:
        small = self.small(self.stem(x))
        middle = self.middle(small)
        large = self.large(middle)
        inner = self.down_middle(torch.cat([self.up(large), middle], 1))
        small = self.down_small(torch.cat([self.up(inner), small], 1))
        middle = self.up_middle(torch.cat([self.from_small(small), inner], 1))
        large = self.up_large(torch.cat([self.from_middle(middle), large], 1))
        found: Tensor = self.head((small, middle, large))
        return found


def detector_v8() -> nn.Module:
    """Of the size of YOLOv8n."""
    return _LaterDetector(16, (1, 2, 2, 1), 80)


# ---- FCN ------------------------------------------------------------------------------------------


class _Fcn(nn.Module):
    """Classes of every pixel, from three levels of a trunk: the coarser ones' are made finer by transposed convolutions
    and added, the sum is interpolated.
    """

    def __init__(self, trunk: list[nn.Module], classes: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Sequential(*trunk[a:b]) for a, b in ((0, 6), (6, 8), (8, 10)))
        self.scores = nn.ModuleList(nn.Conv2d(channels, classes, 1) for channels in (128, 256, 512))
        self.finer = nn.ModuleList(nn.ConvTranspose2d(classes, classes, 4, 2, 1, bias=False) for _ in range(2))
        self.up = nn.Upsample(scale_factor=8.0, mode="bilinear")

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for level, score in zip(self.levels, self.scores, strict=True):
            x = level(x)
            found.append(score(x))
        classes = found.pop()
        for finer in self.finer:
            classes = finer(classes) + found.pop()
        pixels: Tensor = self.up(classes)
        return pixels


def fcn_resnet18() -> nn.Module:
    """FCN-8s with the trunk of ResNet-18."""
    return _Fcn(resnet18_trunk(), 21)


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
