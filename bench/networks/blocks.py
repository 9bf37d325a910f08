"""Parts that several networks share."""

from __future__ import annotations

from torch import Tensor, nn


class ConvNorm(nn.Sequential):
    """Convolution, batch normalisation, and an activation where one is given."""

    def __init__(
        self,
        inner: int,
        outer: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        act: type[nn.Module] | None = nn.ReLU,
    ) -> None:
        super().__init__(
            nn.Conv2d(inner, outer, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outer),
            *([act()] if act else []),
        )


class Residual(nn.Module):
    """``act(shortcut(x) + body(x))``; the shortcut is a projection where shapes change."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None, act: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.shortcut, self.act = body, shortcut or nn.Identity(), act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.act(self.body(x) + self.shortcut(x))
        return added


class SqueezeExcite(nn.Module):
    """Scales channels by what a small network makes of their means."""

    def __init__(self, channels: int, squeezed: int, act: type[nn.Module], gate: type[nn.Module]) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, 1),
            act(),
            nn.Conv2d(squeezed, channels, 1),
            gate(),
        )

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = x * self.gate(x)
        return scaled


def inverted_residual(
    inner: int,
    outer: int,
    wide: int,
    kernel: int,
    stride: int,
    act: type[nn.Module],
    squeeze: SqueezeExcite | None = None,
) -> nn.Module:
    """The block of MobileNets and EfficientNet: 1×1 to ``wide`` channels, depthwise, and 1×1 back."""
    layers: list[nn.Module] = []
    if wide != inner:
        layers.append(ConvNorm(inner, wide, act=act))
    layers.append(ConvNorm(wide, wide, kernel, stride, groups=wide, act=act))
    if squeeze is not None:
        layers.append(squeeze)
    layers.append(ConvNorm(wide, outer, act=None))
    body = nn.Sequential(*layers)
    return Residual(body) if stride == 1 and inner == outer else body


def classifier(channels: int, classes: int = 1000) -> nn.Sequential:
    """Means of the channels, and a linear layer."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def rounded(channels: float) -> int:
    """The multiple of 8 that MobileNets take: not below 90 % of what was asked for."""
    near = max(8, int(channels + 4) // 8 * 8)
    return near + 8 if near < 0.9 * channels else near
