"""What the world is drawn of: outlines of its objects, the teddy bear's layers, backgrounds.

Objects have a frame of their own, of radius about 1, with the origin at the centre, x to the right and y down.
"""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor

RGB = tuple[int, int, int]

BROWN: RGB = (150, 92, 48)  # the teddy bear, and nothing else
CREAM, INK, STEEL = (238, 208, 160), (38, 26, 22), (70, 74, 86)
HORIZON = -0.04  # where the ice begins
HOLE = 0.37  # radius of the hole in a hollow object


def _rgb(colour: RGB) -> Tensor:
    return torch.tensor(colour, dtype=torch.float32).view(3, 1, 1, 1) / 255


def ellipse(x: Tensor, y: Tensor, cx: float | Tensor, cy: float | Tensor, rx: float, ry: float) -> Tensor:
    """Signed distance to an ellipse, negative inside; exact only for circles, near enough at the edge."""
    return (((x - cx) / rx).square() + ((y - cy) / ry).square()).sqrt().sub(1).mul(min(rx, ry))


def _union(*shapes: Tensor) -> Tensor:
    return reduce(torch.minimum, shapes)


def _star(x: Tensor, y: Tensor, outer: float = 1.18, inner: float = 0.6) -> Tensor:
    """Signed distance to the edges of a five-pointed star, folded into one half of one point."""
    step = math.pi / 5
    angle = ((torch.atan2(x, -y) + step).remainder(2 * step) - step).abs()
    far = x.hypot(y)
    ex, ey = inner * math.cos(step) - outer, inner * math.sin(step)
    length = math.hypot(ex, ey)
    return ((far * angle.cos() - outer) * ey - far * angle.sin() * ex) / length


def _outline(thing: str, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance to an object of radius about 1 at the origin, upright."""
    if thing == "ball":
        return x.hypot(y) - 1
    if thing == "box":
        return torch.maximum(x.abs(), y.abs()) - 0.86
    if thing == "triangle":
        return torch.maximum(y, math.sqrt(0.75) * x.abs() - 0.5 * y) - 0.6
    return _star(x, y)


def _bear(x: Tensor, y: Tensor, stride: Tensor | None) -> list[tuple[Tensor, RGB]]:
    """The layers of the teddy bear from the back to the front: signed distance and colour.

    `stride` (T, 1, 1) moves its legs and puts skates under them; None lets it stand.
    """
    side = x.abs()
    layers: list[tuple[Tensor, RGB]] = []
    if stride is None:
        legs = ellipse(side, y, 0.34, 0.86, 0.27, 0.25)
        soles = ellipse(side, y, 0.36, 0.9, 0.13, 0.12)
    else:
        left, right = stride.clamp(min=0), (-stride).clamp(min=0)
        feet = ((-0.3 - 0.22 * left, 0.84 - 0.1 * left), (0.3 + 0.22 * right, 0.84 - 0.1 * right))
        legs = _union(*(ellipse(x, y, fx, fy, 0.24, 0.24) for fx, fy in feet))
        blades = _union(*(torch.maximum((x - fx - 0.05).abs() - 0.25, (y - fy - 0.27).abs() - 0.05) for fx, fy in feet))
        layers.append((blades, STEEL))
        soles = torch.full_like(x, 9.0)
    ears = ellipse(side, y, 0.5, -0.84, 0.25, 0.25)
    head = ellipse(x, y, 0.0, -0.44, 0.68, 0.56)
    body = ellipse(x, y, 0.0, 0.4, 0.54, 0.56)
    arms = ellipse(side, y, 0.6, 0.3, 0.2, 0.27)
    layers.append((_union(ears, head, body, arms, legs), BROWN))
    belly, muzzle = ellipse(x, y, 0.0, 0.44, 0.33, 0.36), ellipse(x, y, 0.0, -0.24, 0.32, 0.23)
    inner = ellipse(side, y, 0.5, -0.84, 0.13, 0.13)
    layers.append((_union(belly, muzzle, inner, soles), CREAM))
    eyes, nose = ellipse(side, y, 0.27, -0.52, 0.09, 0.1), ellipse(x, y, 0.0, -0.33, 0.13, 0.09)
    layers.append((_union(eyes, nose), INK))
    return layers


def paint(
    thing: str, own: RGB, x: Tensor, y: Tensor, sharp: Tensor, *, stride: Tensor | None = None, hollow: bool = False
) -> tuple[Tensor, Tensor]:
    """Colour (3, T, H, W) of an object in its own frame, and how much each pixel is covered (T, H, W).

    `own` is its colour, `sharp` (T, 1, 1) how many pixels half its size takes: edges are one pixel soft.
    """
    layers = _bear(x, y, stride) if thing == "teddy bear" else [(_outline(thing, x, y), own)]
    colour, cover = _rgb(layers[0][1]), (0.5 - layers[0][0] * sharp).clamp(0, 1)
    if hollow:
        cover = torch.minimum(cover, (0.5 + (x.hypot(y) - HOLE) * sharp).clamp(0, 1))
    for distance, rgb in layers[1:]:
        alpha = (0.5 - distance * sharp).clamp(0, 1)
        colour = torch.lerp(colour.expand(3, *x.shape), _rgb(rgb).expand(3, *x.shape), alpha.expand(3, *x.shape))
        cover = torch.maximum(cover, alpha)
    shade = 1 - 0.13 * (x + y).clamp(-1, 1)
    gleam = 0.5 if thing == "ball" else 0.22
    spot = gleam * (-((x + 0.36).square() + (y + 0.42).square()) / 0.1).exp()
    return torch.lerp((colour * shade).clamp(0, 1), torch.ones(()), spot), cover


def backdrop(kind: str, x: Tensor, y: Tensor, unit: int, *, phase: float, tone: float) -> Tensor:
    """Colour of a background (3, 1 or T, H, W) at places (T or 1, H, W) of the world; phase 0 to 1, tone -1 to 1."""
    if kind == "textured":
        grain = torch.zeros_like(x)
        for k in range(3):
            angle = math.pi * (phase + k / 3 + 0.05 * tone)
            wave = 2 * math.pi * (1.3 + 0.7 * ((k + phase * 3) % 3))
            grain = grain + (wave * (x * math.cos(angle) + y * math.sin(angle)) + 40 * phase * (k + 1)).sin()
        return _rgb((128, 132, 140)) + 0.07 * grain + 0.03 * tone
    if kind == "ice":
        floor = (0.5 + (y - HORIZON) * unit).clamp(0, 1)
        air = _rgb((92, 102, 118)) + 0.03 * tone - 0.12 * (y + 0.5)
        ice = _rgb((196, 212, 224)) + 0.02 * tone + 0.1 * y
        return torch.lerp(air, ice, floor.expand_as(ice))
    base = _rgb((30, 32, 40)) if kind == "dark" else _rgb((218, 221, 228))
    return base + 0.035 * tone + 0.05 * y.clamp(-0.5, 0.5)
