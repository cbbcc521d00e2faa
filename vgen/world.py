"""The world: short captioned clips of coloured objects and a teddy bear, drawn from formulas.

It is what the demo checkpoints are trained on and what they are measured with (`vgen.world_check` reads the
attributes back from pixels). Everything is a pure function of its arguments: same seed and index, same bits.

Lengths are in units of the shorter side of the frame, with the origin at its centre, x to the right and y down.
Time u runs from 0 to 1 over the motion. Up to 17 frames, a frame lasts 1/16, so that fewer show the beginning;
more frames show the same motion in finer steps.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from vgen.errors import UsageError, did_you_mean
from vgen.world_draw import BROWN, RGB, backdrop, ellipse, paint

Variety = Literal["simple", "hollow", "plain", "full"]
Split = Literal["train", "held-out"]
COLOURS: dict[str, RGB] = {
    "red": (222, 40, 44),
    "green": (44, 178, 70),
    "blue": (44, 92, 232),
    "yellow": (248, 208, 40),
    "purple": (168, 56, 200),
}
OBJECTS = ("ball", "box", "triangle", "star", "teddy bear")
PLAIN = ("standing still", "moving left", "moving right", "rising", "falling", "growing", "shrinking", "skating")
FULL = (*PLAIN, "bouncing", "spinning")  # the motions of each variety
MOTIONS = FULL
BACKGROUNDS = ("dark", "light", "ice", "textured")
CAMERAS = ("static", "pan left", "pan right", "tilt up", "tilt down", "zoom in", "zoom out")

FRAMES = 17  # that show the whole motion at its natural speed
GROWTH = 1.7  # how many times larger a growing object becomes
ZOOM = 1.35  # how many times larger a zoom makes everything
PAN = 0.22  # how far the camera travels
SPIN = math.pi  # how far a spinning object turns
SWAY = 0.2  # how far a skating bear leans to either side, in radians
SWAYS = 1.5  # how often it does so
REACH = 1.28  # the farthest point of any object, with a margin, in units of half its size

DIRECTIONS = {"moving left": (-1, 0), "moving right": (1, 0), "rising": (0, -1), "falling": (0, 1), "skating": (1, 0)}
PATHS = {"pan left": (-1, 0), "pan right": (1, 0), "tilt up": (0, -1), "tilt down": (0, 1)}
TEMPLATES = (
    "a {thing} {motion}",
    "a {thing} {motion} {place}",
    "the {thing} is {motion}",
    "the {thing} is {motion} {place}",
    "there is a {thing} {motion}",
    "{place} a {thing} is {motion}",
)
TEMPLATE_DRAWS = (0, 0, 1, 1, 2, 3, 4, 5)  # the two plain forms are the commonest


@dataclass(frozen=True)
class Scene:
    """What a clip shows. `x`, `y` are the object's place at u = 0 with the camera at rest; see `path`."""

    colour: str
    object: str
    motion: str
    background: str
    camera: str
    x: float
    y: float
    size: float  # diameter, at u = 0.5 for one that grows or shrinks
    travel: float  # how far it moves, or hops
    phase: float  # 0 to 1: of the sway, the hop and the texture
    tone: float  # -1 to 1: how light the background is among its kind
    hollow: bool = False  # never the teddy bear


@dataclass(frozen=True)
class Prompt:
    """A caption, the attributes that it states, and a scene it is true of."""

    text: str
    stated: dict[str, str]
    scene: Scene


def held_out(colour: str, object: str, motion: str) -> bool:
    """Whether no training clip shows this triple: for each colour and object, one motion of seven.

    Every pair of two attributes stays in the training clips. The bear, which has one colour, holds nothing out.
    """
    if object == "teddy bear" or motion not in PLAIN or motion == "skating":
        return False
    place = list(COLOURS).index(colour) + 2 * OBJECTS.index(object)
    return PLAIN.index(motion) == place % (len(PLAIN) - 1)


def _pick(rng: random.Random, options: list[str] | tuple[str, ...]) -> str:
    return options[int(rng.random() * len(options))]


def _triple(rng: random.Random, variety: Variety, split: Split) -> tuple[str, str, str]:
    """Colour, object and motion: one clip in eight skates, and about one in four shows the bear."""
    motions = [m for m in (FULL if variety == "full" else PLAIN) if m != "skating"]
    if split == "held-out":
        colour, thing = _pick(rng, tuple(COLOURS)), _pick(rng, OBJECTS[:4])
        return colour, thing, next(m for m in motions if held_out(colour, thing, m))
    if rng.random() < 1 / 8:
        return "brown", "teddy bear", "skating"
    motion = _pick(rng, motions)
    if rng.random() < 1 / 8:
        return "brown", "teddy bear", motion
    thing = _pick(rng, [o for o in OBJECTS[:4] if not (o == "ball" and motion == "spinning")])  # unseen on a ball
    return _pick(rng, [c for c in COLOURS if not held_out(c, thing, motion)]), thing, motion


def _stage(rng: random.Random, motion: str, variety: Variety) -> tuple[str, str]:
    """Background and camera. The camera moves only over a texture, where that can be seen."""
    if motion == "skating":
        return "ice", "static"
    if variety != "full" or rng.random() < 0.4:
        return _pick(rng, ("dark", "light")), "static"
    return "textured", _pick(rng, CAMERAS)


def scene(seed: int, index: int, *, variety: Variety = "plain", split: Split = "train") -> Scene:
    """The scene of that number. Pure; `split` says on which side of `held_out` its triple lies.

    Raises UsageError for an unknown variety or split.
    """
    for word, known in ((variety, get_args(Variety)), (split, get_args(Split))):
        if word not in known:
            raise UsageError(f"The world has no '{word}'.", did_you_mean(word, known))
    rng = random.Random(f"scene/{seed}/{index}/{variety}/{split}")
    colour, thing, motion = _triple(rng, variety, split)
    background, camera = _stage(rng, motion, variety)
    still = camera == "static"
    size = rng.uniform(0.38, 0.5) if still else rng.uniform(0.36, 0.4)
    travel = rng.uniform(0.3, 0.4) if still else rng.uniform(0.22, 0.26)
    if motion == "bouncing":
        travel *= 0.4
    elif motion == "skating":
        size = rng.uniform(0.46, 0.54)
    elif motion in ("growing", "shrinking"):
        size *= 0.88
    phase, tone = rng.random(), rng.uniform(-1, 1)
    simple = variety in ("simple", "hollow")
    if simple:
        size, travel, phase = 0.5 * (0.88 if motion in ("growing", "shrinking") else 1.0), 0.375, 0.0
    hollow = variety == "hollow" and thing != "teddy bear"
    draft = Scene(colour, thing, motion, background, camera, 0.0, 0.0, size, travel, phase, tone, hollow)
    x, y = _room(draft, rng.random(), rng.random(), 1 / 8 if simple else 0.0)
    return replace(draft, x=x, y=y)


def _room(draft: Scene, across: float, down: float, grid: float) -> tuple[float, float]:
    """A start from which the whole way stays inside the frame; `across` and `down`, 0 to 1, choose among them.

    With a `grid` the way is the middle one, or lies so far beside it where there is room.
    """
    u = torch.linspace(0, 1, 17)
    x, y, size, _ = path(draft, u)
    zoom, _, _ = camera_path(draft.camera, u)
    free = (0.5 - size / 2 * REACH).clamp(min=0)
    aside = 1 if DIRECTIONS.get(draft.motion, (0, 1))[1] == 0 else 0
    spots = []
    for axis, (way, chosen) in enumerate(((x, across), (y, down))):
        low, high = ((-free - way) / zoom).max().item(), ((free - way) / zoom).min().item()
        middle = (low + high) / 2
        spot = middle + (int(chosen * 3) - 1) * grid * (axis == aside) if grid else low + chosen * (high - low)
        spots.append(spot if low <= spot <= high else middle)
    if draft.motion == "skating":
        spots[1] = 0.1 if grid else 0.06 + 0.08 * down  # feet on the ice
    return spots[0], spots[1]


def camera_path(camera: str, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zoom (a factor) and the place (x, y) of a camera over time `u` (T,), all (T,)."""
    sense = {"zoom in": 1.0, "zoom out": -1.0}.get(camera, 0.0)
    dx, dy = PATHS.get(camera, (0, 0))
    return ZOOM ** (sense * (u - 0.5)), dx * PAN * u, dy * PAN * u


def path(scene: Scene, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where the object is in the frame over time `u` (T,): x, y, size and its turn in radians, all (T,)."""
    dx, dy = DIRECTIONS.get(scene.motion, (0, 0))
    x, y = scene.x + dx * scene.travel * u, scene.y + dy * scene.travel * u
    size, turn = torch.full_like(u, scene.size), torch.zeros_like(u)
    if scene.motion in ("growing", "shrinking"):
        size = size * GROWTH ** ((u - 0.5) * (1 if scene.motion == "growing" else -1))
    elif scene.motion == "bouncing":
        y = y - scene.travel * (math.pi * (1.5 * u + scene.phase)).sin().abs()
    elif scene.motion == "spinning":
        turn = SPIN * u
    elif scene.motion == "skating":
        turn = SWAY * _stride(scene, u)
    zoom, at_x, at_y = camera_path(scene.camera, u)
    return (x - at_x) * zoom, (y - at_y) * zoom, size * zoom, turn


def _stride(scene: Scene, u: Tensor) -> Tensor:
    """The stride of a skater, -1 (weight on its left) to 1."""
    return (2 * math.pi * (SWAYS * u + scene.phase)).sin()


def render(
    scene: Scene, num_frames: int = FRAMES, height: int = 64, width: int = 64, *, pace: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Draw a scene: pixels (3, T, H, W) in [-1, 1] and how much the object covers them (T, H, W) in [0, 1].

    At another `pace` a frame lasts that many times as long, as far as the whole motion allows.

    Raises UsageError for less than one frame or 32 pixels.
    """
    if num_frames < 1 or min(height, width) < 32:
        raise UsageError(
            f"The world cannot be drawn as {num_frames} frames of {height}x{width}.",
            "It takes at least one frame and 32 pixels a side.",
        )
    unit = min(height, width)
    u = torch.arange(num_frames) / max((FRAMES - 1) / pace, num_frames - 1)
    px = ((torch.arange(width) + 0.5 - width / 2) / unit).view(1, 1, width)
    py = ((torch.arange(height) + 0.5 - height / 2) / unit).view(1, height, 1)
    at_x, at_y, size, turn = (v.view(-1, 1, 1) for v in path(scene, u))
    half, cos, sin = size / 2, turn.cos(), turn.sin()
    dx, dy = (px - at_x) / half, (py - at_y) / half
    stride = _stride(scene, u).view(-1, 1, 1) if scene.motion == "skating" else None
    own = COLOURS.get(scene.colour, BROWN)
    across, down = dx * cos + dy * sin, dy * cos - dx * sin
    front, cover = paint(scene.object, own, across, down, half * unit, stride=stride, hollow=scene.hollow)
    if scene.camera != "static":
        zoom, cam_x, cam_y = (v.view(-1, 1, 1) for v in camera_path(scene.camera, u))
        px, py = px / zoom + cam_x, py / zoom + cam_y
    back = backdrop(scene.background, px + 0 * py, py + 0 * px, unit, phase=scene.phase, tone=scene.tone)
    if scene.background == "ice":
        back = back * (1 - 0.3 * (0.5 - 5 * ellipse(dx, dy, 0.0, 1.14, 0.7, 0.12)).clamp(0, 1))  # its shadow
    pixels = torch.lerp(back.expand_as(front), front, cover.expand_as(front))
    return pixels.clamp(0, 1) * 2 - 1, cover


def _place(background: str) -> str:
    return "on ice" if background == "ice" else f"on a {background} background"


def caption(scene: Scene, template: int = 0) -> str:
    """What a clip shows, in at most 14 lower-case words; TEMPLATES[template] says how.

    A camera that moves is always stated; one that does not, the colour of the bear and holes never are.
    """
    thing = scene.object if scene.object == "teddy bear" else f"{scene.colour} {scene.object}"
    text = TEMPLATES[template].format(thing=thing, motion=scene.motion, place=_place(scene.background))
    if scene.camera == "static":
        return text
    verb, way = scene.camera.split()
    return f"{text}, camera {verb}s {way}"


def stated(scene: Scene, template: int = 0) -> dict[str, str]:
    """The attributes that `caption` states, by name."""
    told = {"object": scene.object, "motion": scene.motion}
    if scene.object != "teddy bear":
        told["colour"] = scene.colour
    if "{place}" in TEMPLATES[template]:
        told["background"] = scene.background
    if scene.camera != "static":
        told["camera"] = scene.camera
    return told


def _template(seed: int, index: int) -> int:
    return TEMPLATE_DRAWS[int(random.Random(f"caption/{seed}/{index}").random() * len(TEMPLATE_DRAWS))]


def clip(
    seed: int,
    index: int,
    num_frames: int = FRAMES,
    height: int = 64,
    width: int = 64,
    *,
    variety: Variety = "plain",
    split: Split = "train",
    pace: float = 1.0,
) -> tuple[Tensor, Tensor, str, Scene]:
    """The clip of that number: pixels and cover as of `render`, its caption, its scene."""
    drawn = scene(seed, index, variety=variety, split=split)
    return *render(drawn, num_frames, height, width, pace=pace), caption(drawn, _template(seed, index)), drawn


def prompts(count: int, seed: int = 0, *, variety: Variety = "plain", split: Split = "held-out") -> list[Prompt]:
    """The first `count` prompts of that seed."""
    made = []
    for index in range(count):
        drawn, template = scene(seed, index, variety=variety, split=split), _template(seed, index)
        made.append(Prompt(caption(drawn, template), stated(drawn, template), drawn))
    return made


def words() -> tuple[str, ...]:
    """Every word that a caption can contain, sorted."""
    cameras = [f"camera {verb}s {way}" for verb, way in (c.split() for c in CAMERAS[1:])]
    frames = [t.format(thing="", motion="", place="") for t in TEMPLATES]
    texts = [*frames, *COLOURS, *OBJECTS, *MOTIONS, *(_place(b) for b in BACKGROUNDS), *cameras]
    return tuple(sorted({word for text in texts for word in text.split()}))
