"""Networks that classify images: with the layers of their papers, of which torchvision's are the usual statement."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from .blocks import ConvNorm, Residual, SqueezeExcite, classifier, inverted_residual, rounded

# ---- ResNet, RegNet -------------------------------------------------------------------------------


def _basic(inner: int, outer: int, stride: int) -> nn.Module:
    shortcut = ConvNorm(inner, outer, 1, stride, act=None) if stride > 1 or inner != outer else None
    body = nn.Sequential(ConvNorm(inner, outer, 3, stride), ConvNorm(outer, outer, 3, act=None))
    return Residual(body, shortcut, nn.ReLU())


def _bottleneck(inner: int, outer: int, stride: int, width: int, groups: int = 1) -> nn.Module:
    shortcut = ConvNorm(inner, outer, 1, stride, act=None) if stride > 1 or inner != outer else None
    body = nn.Sequential(
        ConvNorm(inner, width), ConvNorm(width, width, 3, stride, groups), ConvNorm(width, outer, act=None)
    )
    return Residual(body, shortcut, nn.ReLU())


def _resnet_stem() -> list[nn.Module]:
    return [ConvNorm(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]


def resnet18_trunk() -> list[nn.Module]:
    """All but what classifies: two layers, and two blocks of 64, 128, 256 and 512 channels each."""
    layers, inner = _resnet_stem(), 64
    for stage, width in enumerate((64, 128, 256, 512)):
        for block in range(2):
            layers.append(_basic(inner, width, 2 if stage and not block else 1))
            inner = width
    return layers


def resnet18() -> nn.Module:
    return nn.Sequential(*resnet18_trunk(), classifier(512))


def resnet50() -> nn.Module:
    layers, inner = _resnet_stem(), 64
    for stage, (width, depth) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(depth):
            layers.append(_bottleneck(inner, 4 * width, 2 if stage and not block else 1, width))
            inner = 4 * width
    return nn.Sequential(*layers, classifier(inner))


def regnet_x_800mf() -> nn.Module:
    layers: list[nn.Module] = [ConvNorm(3, 32, 3, 2)]
    inner = 32
    for width, depth in ((64, 1), (128, 3), (288, 7), (672, 5)):
        for block in range(depth):
            layers.append(_bottleneck(inner, width, 1 if block else 2, width, width // 16))
            inner = width
    return nn.Sequential(*layers, classifier(inner))


# ---- MobileNet, EfficientNet ----------------------------------------------------------------------


def mobilenet_v1() -> nn.Module:
    layers: list[nn.Module] = [ConvNorm(3, 32, 3, 2)]
    inner = 32
    for outer, depth, first in ((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 2)):
        for block in range(depth):
            layers += [ConvNorm(inner, inner, 3, 1 if block else first, inner), ConvNorm(inner, outer)]
            inner = outer
    return nn.Sequential(*layers, classifier(inner))


def mobilenet_v2() -> nn.Module:
    layers: list[nn.Module] = [ConvNorm(3, 32, 3, 2, act=nn.ReLU6)]
    inner = 32
    for factor, outer, depth, first in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for block in range(depth):
            layers.append(inverted_residual(inner, outer, factor * inner, 3, 1 if block else first, nn.ReLU6))
            inner = outer
    return nn.Sequential(*layers, ConvNorm(inner, 1280, act=nn.ReLU6), classifier(1280))


#: Kernel, width, output channels, squeeze, activation, stride.
_MOBILENET_V3 = (
    (3, 16, 16, False, nn.ReLU, 1),
    (3, 64, 24, False, nn.ReLU, 2),
    (3, 72, 24, False, nn.ReLU, 1),
    (5, 72, 40, True, nn.ReLU, 2),
    (5, 120, 40, True, nn.ReLU, 1),
    (5, 120, 40, True, nn.ReLU, 1),
    (3, 240, 80, False, nn.Hardswish, 2),
    (3, 200, 80, False, nn.Hardswish, 1),
    (3, 184, 80, False, nn.Hardswish, 1),
    (3, 184, 80, False, nn.Hardswish, 1),
    (3, 480, 112, True, nn.Hardswish, 1),
    (3, 672, 112, True, nn.Hardswish, 1),
    (5, 672, 160, True, nn.Hardswish, 2),
    (5, 960, 160, True, nn.Hardswish, 1),
    (5, 960, 160, True, nn.Hardswish, 1),
)


def mobilenet_v3_large() -> nn.Module:
    layers: list[nn.Module] = [ConvNorm(3, 16, 3, 2, act=nn.Hardswish)]
    inner = 16
    for kernel, wide, outer, squeezes, act, stride in _MOBILENET_V3:
        squeeze = SqueezeExcite(wide, rounded(wide / 4), nn.ReLU, nn.Hardsigmoid) if squeezes else None
        layers.append(inverted_residual(inner, outer, wide, kernel, stride, act, squeeze))
        inner = outer
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(960, 1280), nn.Hardswish(), nn.Linear(1280, 1000)]
    return nn.Sequential(*layers, ConvNorm(inner, 960, act=nn.Hardswish), *head)


def efficientnet_b0() -> nn.Module:
    layers: list[nn.Module] = [ConvNorm(3, 32, 3, 2, act=nn.SiLU)]
    inner = 32
    for factor, outer, depth, kernel, first in (
        (1, 16, 1, 3, 1),
        (6, 24, 2, 3, 2),
        (6, 40, 2, 5, 2),
        (6, 80, 3, 3, 2),
        (6, 112, 3, 5, 1),
        (6, 192, 4, 5, 2),
        (6, 320, 1, 3, 1),
    ):
        for block in range(depth):
            wide = factor * inner
            squeeze = SqueezeExcite(wide, max(1, inner // 4), nn.SiLU, nn.Sigmoid)
            layers.append(inverted_residual(inner, outer, wide, kernel, 1 if block else first, nn.SiLU, squeeze))
            inner = outer
    return nn.Sequential(*layers, ConvNorm(inner, 1280, act=nn.SiLU), classifier(1280))


# ---- DenseNet, ShuffleNet, SqueezeNet, ConvNeXt -----------------------------------------------------


class _Beside(nn.Module):
    """The input and what the body makes of it, or the bodies' outputs, as channels of one tensor."""

    def __init__(self, *bodies: nn.Module) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(bodies)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([body(x) for body in self.bodies], 1)


def _norm_first(inner: int, outer: int, kernel: int = 1) -> list[nn.Module]:
    return [nn.BatchNorm2d(inner), nn.ReLU(), nn.Conv2d(inner, outer, kernel, padding=kernel // 2, bias=False)]


def densenet121(growth: int = 32) -> nn.Module:
    layers, inner = _resnet_stem(), 64
    for stage, depth in enumerate((6, 12, 24, 16)):
        if stage:
            layers += [*_norm_first(inner, inner // 2), nn.AvgPool2d(2)]
            inner //= 2
        for _ in range(depth):
            body = nn.Sequential(*_norm_first(inner, 4 * growth), *_norm_first(4 * growth, growth, 3))
            layers.append(_Beside(nn.Identity(), body))
            inner += growth
    return nn.Sequential(*layers, nn.BatchNorm2d(inner), nn.ReLU(), classifier(inner))


class _Shuffle(nn.Module):
    """ShuffleNet V2's unit: one half of the channels passes by (of a strided unit, both branches take all), and the
    halves' channels alternate in the end.
    """

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        half, taken = outer // 2, inner if stride > 1 else inner // 2
        self.is_split = stride == 1
        self.aside: nn.Module = nn.Identity()
        if stride > 1:
            self.aside = nn.Sequential(ConvNorm(inner, inner, 3, stride, inner, act=None), ConvNorm(inner, half))
        depthwise = ConvNorm(half, half, 3, stride, half, act=None)
        self.body = nn.Sequential(ConvNorm(taken, half), depthwise, ConvNorm(half, half))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1) if self.is_split else (x, x)
        both = torch.stack([self.aside(left), self.body(right)], 2)
        return both.flatten(1, 2)


def shufflenet_v2() -> nn.Module:
    layers: list[nn.Module] = [ConvNorm(3, 24, 3, 2), nn.MaxPool2d(3, 2, 1)]
    inner = 24
    for width, depth in ((116, 4), (232, 8), (464, 4)):
        for block in range(depth):
            layers.append(_Shuffle(inner, width, 1 if block else 2))
            inner = width
    return nn.Sequential(*layers, ConvNorm(inner, 1024), classifier(1024))


def squeezenet1_1() -> nn.Module:
    def convolution(inner: int, outer: int, kernel: int = 1, stride: int = 1, padding: int = 0) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inner, outer, kernel, stride, padding), nn.ReLU())

    layers: list[nn.Module] = [convolution(3, 64, 3, 2)]
    inner = 64
    for stage in ((16, 64), (16, 64)), ((32, 128), (32, 128)), ((48, 192), (48, 192), (64, 256), (64, 256)):
        layers.append(nn.MaxPool2d(3, 2, ceil_mode=True))
        for squeezed, expanded in stage:
            both = _Beside(convolution(squeezed, expanded), convolution(squeezed, expanded, 3, padding=1))
            layers += [convolution(inner, squeezed), both]
            inner = 2 * expanded
    return nn.Sequential(*layers, convolution(inner, 1000), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class _ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of an image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _LastAxis(nn.Module):
    """Layers that take channels as the last axis, on an image."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        image: Tensor = self.layers(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return image


def convnext_tiny() -> nn.Module:
    norm = partial(_ChannelNorm, eps=1e-6)
    layers: list[nn.Module] = [nn.Conv2d(3, 96, 4, 4), norm(96)]
    inner = 96
    for width, depth in ((96, 3), (192, 3), (384, 9), (768, 3)):
        if width != inner:
            layers += [norm(inner), nn.Conv2d(inner, width, 2, 2)]
            inner = width
        for _ in range(depth):
            mixed = _LastAxis(
                nn.LayerNorm(width, eps=1e-6), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
            )
            layers.append(Residual(nn.Sequential(nn.Conv2d(width, width, 7, padding=3, groups=width), mixed)))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), norm(inner), nn.Flatten(), nn.Linear(inner, 1000))
