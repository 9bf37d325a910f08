"""LeNet trained on generated digits, with PyTorch's convolutions and with convgen's: the same losses, within rounding.

python examples/train_lenet.py [--steps N] [--plot losses.svg]

Nothing is downloaded: a digit is drawn from seven segments, moved about and covered with noise.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import convgen.torch

#: The segments of each digit: top, middle, bottom, then upper left and right, lower left and right.
SEGMENTS = (
    "1011111",
    "0000101",
    "1111010",
    "1110101",
    "0101101",
    "1111000",
    "1111011",
    "1000101",
    "1111111",
    "1111101",
)
BATCH, SIZE = 64, 28


def digits(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """So many images ``[count, 1, 28, 28]`` and their digits."""
    labels = torch.randint(10, (count,), generator=generator)
    images = 0.3 * torch.randn(count, 1, SIZE, SIZE, generator=generator)
    places = torch.randint(0, 10, (count, 2), generator=generator)
    boxes = ((0, 2, 0, 10), (8, 10, 0, 10), (16, 18, 0, 10), (0, 9, 0, 2), (0, 9, 8, 10), (9, 18, 0, 2), (9, 18, 8, 10))
    for image, label, (y, x) in zip(images, labels, places.tolist(), strict=True):
        for lit, (top, end, left, right) in zip(SEGMENTS[int(label)], boxes, strict=True):
            image[0, y + top : y + end, x + left : x + right] += int(lit)
    return images, labels


def lenet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def train(model: nn.Module, steps: int) -> list[float]:
    """The loss of every step."""
    images_of_all, labels_of_all = digits(1024, torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
    losses = []
    for step in range(steps):
        chosen = torch.arange(step * BATCH, (step + 1) * BATCH) % len(images_of_all)
        images, labels = images_of_all[chosen], labels_of_all[chosen]
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def plot(curves: dict[str, list[float]], path: Path) -> None:
    """The curves as a picture, an SVG."""
    largest = max(max(losses) for losses in curves.values())
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="-20 -20 660 360" font-family="sans-serif" font-size="14">'
    ]
    for row, (color, dash, (name, losses)) in enumerate(
        zip(("#888", "#c30"), ("", "6 4"), curves.items(), strict=True)
    ):
        step = 620 / max(1, len(losses) - 1)
        points = " ".join(f"{i * step:.1f},{300 - 300 * loss / largest:.1f}" for i, loss in enumerate(losses))
        lines.append(
            f'<polyline fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dash}" points="{points}"/>'
        )
        lines.append(f'<text x="500" y="{20 + 20 * row}" fill="{color}">{name}</text>')
    lines.append(f'<text x="0" y="325">loss, from 0 to {largest:.2f}, over {len(losses)} steps</text></svg>')
    path.write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    theirs = lenet()
    ours = copy.deepcopy(theirs)
    print("replaced:", ", ".join(convgen.torch.replace(ours)))
    curves = {}
    for name, model in (("PyTorch", theirs), ("convgen", ours)):
        start = time.perf_counter()
        curves[name] = train(model, arguments.steps)
        print(f"{name}: loss {curves[name][0]:.4f} to {curves[name][-1]:.4f} in {time.perf_counter() - start:.1f} s")
    apart = max(abs(a - b) for a, b in zip(*curves.values(), strict=True))
    print(f"largest difference of the losses: {apart:.1e}")
    if arguments.plot:
        plot(curves, arguments.plot)


if __name__ == "__main__":
    main()
