"""Reading the world back from pixels: which object, colour, motion, background and camera a clip shows.

Closed form, nothing learnt: a saturated region is the object, its silhouette is compared with all silhouettes of
`vgen.world`, its path is a line fitted to centroid and area, the camera a flow fitted to the background.
What cannot be told is "none": a shape like no object, a colour like no colour, the motion of a single frame.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vgen import world
from vgen.world_draw import BROWN, CREAM

NONE = "none"
SIDE = 64  # every clip is read at this size of its shorter side
CELLS, SPAN = (
    32,
    1.1,
)  # silhouettes are compared on a grid of so many cells, reaching so many times the root of the area
TURNS = 33  # turns of each object that are compared, from 0 to half a turn
SYMMETRY = {
    "ball": 0.0,
    "box": math.pi / 2,
    "triangle": 2 * math.pi / 3,
    "star": 2 * math.pi / 5,
    "teddy bear": 2 * math.pi,
}

SATURATION = 0.15  # max - min of RGB from which on a pixel may belong to the object
AREAS = (0.012, 0.6)  # shares of the frame that an object can cover
PURITY = 0.5  # saturation of the mean colour over the mean saturation: less is a mixture
HUE_REACH = 0.3  # distance in the plane of hues beyond which a colour has no name
IOU_FLOOR = 0.8  # of the silhouette with the nearest object's
COHERENCE_FLOOR = 0.6  # of the silhouette with that of the next frame
BELLY = 0.1  # share of a bear that is pale
ENOUGH = 0.45  # share of the world's own travel, growth or turn that counts as one
HOLLOW = 0.04  # share of an object that a hole must take
HOP = 0.016  # deviation from a straight path that counts as bouncing


@dataclass(frozen=True)
class Reading:
    """What a clip shows, in the words of `vgen.world` or "none", and how well the object is shaped.

    `look` is "plain" or "hollow".

    `iou` is the overlap with the silhouette of the nearest object, `coherence` that between neighbouring frames,
    both mean over frames, 0 to 1, after centring and scaling.
    """

    colour: str
    object: str
    motion: str
    background: str
    camera: str
    iou: float
    coherence: float
    look: str = NONE


@dataclass(frozen=True)
class _Flow:
    """How the background moves over the whole motion: shift (x, y) in frame units, growth as a logarithm."""

    x: float = 0.0
    y: float = 0.0
    zoom: float = 0.0


def read(pixels: Tensor) -> Reading:
    """Read a clip (3, T, H, W) in [-1, 1]."""
    frames = _frames(pixels)
    u = torch.arange(len(frames)) / max(world.FRAMES - 1, len(frames) - 1)
    mask = object_mask(frames)
    grey = frames.mean(1)
    behind = 1 - F.max_pool2d(mask[:, None], 7, 1, 3)[:, 0]
    background = _background(grey, behind)
    flow = _flow(grey, behind, u) if background == "textured" and len(u) > 1 else _Flow()
    camera = _camera(flow) if len(u) > 1 else NONE
    solid = filled(mask)
    area = solid.mean((1, 2))
    if not AREAS[0] < area.min() <= area.max() < AREAS[1]:
        return Reading(NONE, NONE, NONE, background, camera, 0.0, 0.0)
    shapes = silhouettes(solid)
    coherence = _iou(shapes[:-1], shapes[1:]).mean().item() if len(u) > 1 else 1.0
    thing, iou, turn = _object(shapes)
    colour = _colour(frames, mask)
    if colour == NONE or coherence < COHERENCE_FLOOR:
        return Reading(colour, NONE, NONE, background, camera, iou, coherence)
    if iou < IOU_FLOOR or (thing == "teddy bear" and (colour != "brown" or _pale(grey, mask) < BELLY)):
        thing, turn = NONE, torch.zeros(len(u))
    motion = _motion(solid, u, flow if camera != "static" else _Flow(), turn) if len(u) > 1 else NONE
    if (motion, thing, background) == ("moving right", "teddy bear", "ice"):
        motion = "skating"
    look = "hollow" if 1 - mask.sum() / solid.sum() > HOLLOW else "plain"
    return Reading(colour, thing, motion, background, camera, iou, coherence, look)


def score(stated: Mapping[str, str], reading: Reading) -> dict[str, bool]:
    """For each attribute that a caption states, whether the clip shows it."""
    return {name: getattr(reading, name) == word for name, word in stated.items()}


def _frames(pixels: Tensor) -> Tensor:
    """Frames (T, 3, h, w) in [0, 1], the shorter side SIDE, a little blurred against grain."""
    frames = pixels.detach().cpu().float().transpose(0, 1).add(1).div(2).clamp(0, 1)
    scale = SIDE / min(frames.shape[-2:])
    size = [max(SIDE, round(n * scale)) for n in frames.shape[-2:]]
    if size != list(frames.shape[-2:]):
        frames = F.interpolate(frames, size, mode="bilinear", antialias=True, align_corners=False)
    return F.avg_pool2d(F.pad(frames, (1, 1, 1, 1), mode="replicate"), 3, 1)


def object_mask(frames: Tensor) -> Tensor:
    """Where the saturated object is: frames (T, 3, H, W) in [0, 1] to a mask (T, H, W) of 0 and 1.

    The edge lies where half of the object's own saturation is reached.
    """
    saturation = frames.amax(1) - frames.amin(1)
    inside = saturation > SATURATION
    level = saturation[inside].mean().item() if inside.any() else 0.0
    return (saturation > max(SATURATION, 0.5 * level)).float()


def filled(mask: Tensor) -> Tensor:
    """The mask (T, H, W) with its holes closed: what cannot be reached from the frame's border without crossing it."""
    free = 1 - mask
    reached = F.pad(torch.zeros_like(mask)[:, 1:-1, 1:-1], (1, 1, 1, 1), value=1.0) * free
    while True:
        grown = F.max_pool2d(reached[:, None], 3, 1, 1)[:, 0] * free
        if torch.equal(grown, reached):
            return 1 - reached
        reached = grown


def _places(height: int, width: int) -> tuple[Tensor, Tensor]:
    """x (1, W) and y (H, 1) of the pixels in the world's units."""
    unit = min(height, width)
    return ((torch.arange(width) + 0.5 - width / 2) / unit)[None], ((torch.arange(height) + 0.5 - height / 2) / unit)[
        :, None
    ]


def _centre(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centroid x, y and the root of the area of each mask (T, H, W), all (T,), in the world's units."""
    x, y = _places(*mask.shape[1:])
    total = mask.sum((1, 2))
    return (mask * x).sum((1, 2)) / total, (mask * y).sum((1, 2)) / total, total.sqrt() / min(mask.shape[1:])


def silhouettes(mask: Tensor) -> Tensor:
    """Masks (T, H, W), none empty, centred and scaled to one area: (T, CELLS * CELLS) of 0 and 1."""
    height, width = mask.shape[1:]
    unit = min(height, width)
    x, y, side = (v.view(-1, 1, 1) for v in _centre(mask))
    cell = torch.linspace(-SPAN, SPAN, CELLS)
    gx = (x + cell.view(1, 1, -1) * side).expand(-1, CELLS, -1) * (2 * unit / width)
    gy = (y + cell.view(1, -1, 1) * side).expand(-1, -1, CELLS) * (2 * unit / height)
    seen = F.grid_sample(mask[:, None], torch.stack((gx, gy), -1), align_corners=False)
    return (seen > 0.5).float().flatten(1)


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """Overlap over union of silhouettes, pair by pair (N,)."""
    return torch.minimum(a, b).sum(1) / torch.maximum(a, b).sum(1).clamp(min=1)


@cache
def _bank() -> dict[str, tuple[Tensor, Tensor]]:
    """For every object the silhouettes (N, CELLS * CELLS) that it shows, and how far it is turned in each (N,)."""
    u = torch.linspace(0, 1, TURNS)
    bank = {}
    for thing in world.OBJECTS:
        colour = "brown" if thing == "teddy bear" else "red"
        upright = world.Scene(colour, thing, "spinning", "dark", "static", 0.0, 0.0, 0.5, 0.0, 0.0, 0.0)
        shown = [upright, replace(upright, motion="skating")] if thing == "teddy bear" else [upright]
        pixels = torch.cat([world.render(one, TURNS, SIDE, SIDE)[0] for one in shown], 1)
        bank[thing] = (
            silhouettes(filled(object_mask(_frames(pixels)))),
            torch.cat([world.path(one, u)[3] for one in shown]),
        )
    return bank


def _object(shapes: Tensor) -> tuple[str, float, Tensor]:
    """The object whose silhouettes fit best over all frames, how well, and its turn in each frame (T,) in radians."""
    fits = {}
    for thing, (bank, turns) in _bank().items():
        common = shapes @ bank.T
        best = (common / (shapes.sum(1)[:, None] + bank.sum(1) - common)).max(1)
        fits[thing] = best.values.mean().item(), turns[best.indices]
    thing = max(fits, key=lambda name: fits[name][0])
    iou, turn = fits[thing]
    period = SYMMETRY[thing]
    if period == 0:
        return thing, iou, torch.zeros_like(turn)
    steps = (turn.diff() + period / 2).remainder(period) - period / 2
    return thing, iou, torch.cat((turn[:1], turn[:1] + steps.cumsum(0)))


def _hue(rgb: Tensor) -> Tensor:
    """Colour (3,) as a point of the plane of hues, its length the saturation, and a little of its lightness."""
    r, g, b = rgb
    return torch.stack((r - (g + b) / 2, math.sqrt(0.75) * (g - b), 0.3 * rgb.mean()))


def _colour(frames: Tensor, mask: Tensor) -> str:
    """The colour nearest to the mean over the object, or "none" where hues are mixed or have no name."""
    total = mask.sum()
    mean = (frames * mask[:, None]).sum((0, 2, 3)) / total
    own = ((frames.amax(1) - frames.amin(1)) * mask).sum() / total
    if mean.max() - mean.min() < PURITY * own:
        return NONE
    far = {
        name: (_hue(mean) - _hue(torch.tensor(rgb) / 255)).norm().item()
        for name, rgb in {**world.COLOURS, "brown": BROWN}.items()
    }
    name = min(far, key=far.__getitem__)
    return name if far[name] < HUE_REACH else NONE


def _slope(values: Tensor, u: Tensor) -> float:
    """Least-squares change of values (T,) over the whole motion."""
    centred = u - u.mean()
    return ((values * centred).sum() / centred.square().sum()).item()


def _motion(mask: Tensor, u: Tensor, flow: _Flow, turn: Tensor) -> str:
    """The motion in the world, after the camera's has been taken off."""
    x, y, side = _centre(mask)
    zoom = (flow.zoom * (u - 0.5)).exp()
    x, y, grown = x / zoom - flow.x * u, y / zoom - flow.y * u, side.log() - flow.zoom * u
    travel, growth, spin = 0.35, math.log(world.GROWTH), world.SPIN
    across, down, size = _slope(x, u) / travel, _slope(y, u) / travel, _slope(grown, u) / growth
    hops = (y - y.mean() - down * travel * (u - u.mean())).std()
    if hops > max(HOP, 0.1 * abs(down) * travel):
        return "bouncing"
    evidence = {
        "moving left": -across,
        "moving right": across,
        "rising": -down,
        "falling": down,
        "growing": size,
        "shrinking": -size,
        "spinning": abs(_slope(turn, u)) / spin,
    }
    motion = max(evidence, key=evidence.__getitem__)
    return motion if evidence[motion] > ENOUGH else "standing still"


def _pale(grey: Tensor, mask: Tensor) -> float:
    """The share of the object that is nearer to a bear's belly and muzzle than to its fur in lightness."""
    bright = grey > (sum(BROWN) + sum(CREAM)) / 6 / 255
    return ((bright * mask).sum() / mask.sum()).item()


def _background(grey: Tensor, behind: Tensor) -> str:
    """The background (T, H, W), lightness where the object is not."""
    rows = (grey * behind).sum((0, 2)) / behind.sum((0, 2)).clamp(min=1)
    third = len(rows) // 3
    if rows[-third:].mean() - rows[:third].mean() > 0.22:
        return "ice"
    total = behind.sum()
    if total < 0.05 * behind.numel():
        return NONE
    mean = (grey * behind).sum() / total
    smooth = F.avg_pool2d(grey[:, None], 5, 1, 2, count_include_pad=False)[:, 0]
    coarse = ((smooth - mean).square() * behind).sum().div(total).sqrt()
    fine = ((smooth - grey).square() * behind).sum().div(total).sqrt()
    if coarse > 0.045 and coarse > fine:
        return "textured"
    if mean < 0.33:
        return "dark"
    return "light" if mean > 0.67 else NONE


def _flow(grey: Tensor, behind: Tensor, u: Tensor) -> _Flow:
    """Least-squares shift and growth of the background (Lucas and Kanade, 1981, with a zoom)."""
    x, y = _places(*grey.shape[1:])
    soft = F.avg_pool2d(grey[:, None], 5, 1, 2, count_include_pad=False)[:, 0]
    mid = (soft[1:] + soft[:-1]) / 2
    gy, gx = torch.gradient(mid, spacing=1 / min(grey.shape[1:]), dim=(1, 2))
    change = (soft[1:] - soft[:-1]) / (u[1] - u[0])
    weight = (behind[1:] * behind[:-1])[:, 3:-3, 3:-3].flatten()
    terms = torch.stack([v[:, 3:-3, 3:-3].flatten() for v in (gx, gy, gx * x + gy * y)])
    normal = (terms * weight) @ terms.T + 1e-6 * torch.eye(3)
    shift_x, shift_y, zoom = torch.linalg.solve(normal, -(terms * weight) @ change[:, 3:-3, 3:-3].flatten()).tolist()
    return _Flow(shift_x, shift_y, zoom)


def _camera(flow: _Flow) -> str:
    """The camera move that makes the background move so: a camera goes where the background comes from."""
    zoom = flow.zoom / math.log(world.ZOOM)
    evidence = {
        "pan left": flow.x / world.PAN,
        "pan right": -flow.x / world.PAN,
        "tilt up": flow.y / world.PAN,
        "tilt down": -flow.y / world.PAN,
        "zoom in": zoom,
        "zoom out": -zoom,
    }
    camera = max(evidence, key=evidence.__getitem__)
    return camera if evidence[camera] > ENOUGH else "static"
