"""The world is a pure function, keeps its promises about held-out scenes, and can be read back from pixels."""

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vgen import clips, world
from vgen.errors import UsageError
from vgen.world_check import NONE, Reading, read, score
from vgen.world_draw import BROWN

SEED = 20_000  # no training recipe uses it
ATTRIBUTES = ("colour", "object", "motion", "background", "camera")


def shown(count: int, seed: int, variety: world.Variety = "plain", **size: int) -> list[tuple[Tensor, world.Scene]]:
    return [
        (pixels, drawn) for pixels, _, _, drawn in (world.clip(seed, i, variety=variety, **size) for i in range(count))
    ]


def right(readings: list[Reading], scenes: list[world.Scene], names: tuple[str, ...] = ATTRIBUTES) -> dict[str, float]:
    """The share of readings that agree with the scenes, for each attribute that a caption can state of them."""
    shares = {}
    for name in names:
        pairs = [(getattr(r, name), getattr(s, name)) for r, s in zip(readings, scenes, strict=True)]
        shares[name] = sum(a == b for a, b in pairs) / len(pairs)
    return shares


def softened(pixels: Tensor, seed: int) -> Tensor:
    """What an autoencoder leaves: a 3x3 box blur and grain of 0.03."""
    grain = 0.03 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed))
    frames = F.pad(pixels.transpose(0, 1), (1, 1, 1, 1), mode="replicate")
    return (F.avg_pool2d(frames, 3, 1).transpose(0, 1) + grain).clamp(-1, 1)


def one(thing: str, motion: str, **changes: object) -> world.Scene:
    colour = "brown" if thing == "teddy bear" else "red"
    plain = world.Scene(colour, thing, motion, "dark", "static", 0.0, 0.0, 0.44, 0.35, 0.25, 0.0)
    return replace(plain, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def train() -> set[tuple[str, str, str]]:
    """Every (colour, object, motion) among 5000 training scenes."""
    return {(s.colour, s.object, s.motion) for s in (world.scene(SEED, i) for i in range(5000))}


# the world


def test_a_clip_is_a_pure_function_of_its_number():
    first = world.clip(3, 7, variety="full")
    world.clip(3, 8)
    torch.manual_seed(1)
    again = world.clip(3, 7, variety="full")
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert first[2:] == again[2:]
    assert len({world.scene(3, i) for i in range(200)}) == 200


def test_scenes_do_not_drift_between_releases():
    """A recipe names clips by their number, so a number must go on meaning the same clip."""
    drawn = [world.scene(0, i) for i in range(4)]
    assert [(s.colour, s.object, s.motion, s.background) for s in drawn] == [
        ("yellow", "triangle", "moving left", "dark"),
        ("yellow", "star", "standing still", "dark"),
        ("blue", "box", "shrinking", "dark"),
        ("red", "box", "growing", "light"),
    ]


def test_held_out_triples_are_never_trained_on(train: set[tuple[str, str, str]]):
    held = {(s.colour, s.object, s.motion) for s in (world.scene(SEED, i, split="held-out") for i in range(500))}
    assert not train & held
    assert held == {t for t in product(world.COLOURS, world.OBJECTS, world.MOTIONS) if world.held_out(*t)}
    assert 0.12 < len(held) / len(train | held) < 0.18
    assert len(train | held) == 4 * 5 * 7 + 8
    full = {(s.colour, s.object, s.motion) for s in (world.scene(SEED, i, variety="full") for i in range(2000))}
    assert not full & held


def test_every_pair_of_attributes_is_trained_on(train: set[tuple[str, str, str]]):
    assert {t[:2] for t in train} == {*product(world.COLOURS, world.OBJECTS[:4]), ("brown", "teddy bear")}
    moves = [m for m in world.PLAIN if m != "skating"]
    assert {t[1:] for t in train} == {*product(world.OBJECTS, moves), ("teddy bear", "skating")}
    assert {(t[0], t[2]) for t in train if t[0] != "brown"} == {*product(world.COLOURS, moves)}


@pytest.mark.parametrize("variety", ["simple", "plain", "full"])
def test_draws_are_balanced(variety: world.Variety):
    scenes = [world.scene(SEED, i, variety=variety) for i in range(2000)]
    for name in ("colour", "object", "motion"):
        assert max(Counter(getattr(s, name) for s in scenes).values()) <= 0.3 * len(scenes), name
    assert 0.1 < sum(s.motion == "skating" for s in scenes) / len(scenes) < 0.15
    assert {s.motion for s in scenes} == set(world.FULL if variety == "full" else world.PLAIN)
    assert {s.camera for s in scenes} == (set(world.CAMERAS) if variety == "full" else {"static"})
    assert all(s.background == "textured" for s in scenes if s.camera != "static")
    assert all((s.background == "ice") == (s.motion == "skating") for s in scenes)


def test_captions_say_what_is_shown_in_few_known_words():
    assert world.caption(one("ball", "moving left")) == "a red ball moving left"
    assert world.caption(one("ball", "moving left"), 1) == "a red ball moving left on a dark background"
    assert world.caption(one("teddy bear", "skating", background="ice")) == "a teddy bear skating"
    assert world.caption(one("star", "rising", camera="pan left")) == "a red star rising, camera pans left"
    known, texts = set(world.words()), Counter[str]()
    for variety, split in product(("simple", "plain", "full"), ("train", "held-out")):
        for prompt in world.prompts(400, SEED, variety=variety, split=split):
            texts[prompt.text] += 1
            parts = prompt.text.replace(",", "").split()
            assert len(parts) <= 14
            assert set(parts) <= known
            assert "brown" not in parts
            assert all(getattr(prompt.scene, name) == word for name, word in prompt.stated.items())
            assert ("colour" in prompt.stated) == (prompt.scene.object != "teddy bear")
            assert ("background" in prompt.stated) == (" on " in f" {prompt.text} ")
            assert ("camera" in prompt.stated) == ("camera" in parts)
    assert texts["a teddy bear skating"] > 10
    told = [("background" in p.stated) for p in world.prompts(1000, SEED, split="train")]
    assert 0.4 < sum(told) / len(told) < 0.6


@pytest.mark.parametrize("variety", ["simple", "plain", "full"])
def test_objects_are_large_stay_inside_and_move_slowly(variety: world.Variety):
    for i in range(120):
        pixels, cover, _, drawn = world.clip(SEED, i, variety=variety)
        assert pixels.shape == (3, 17, 64, 64)
        assert pixels.abs().max() <= 1
        assert 0 <= cover.min() <= cover.max() == 1
        edge = torch.cat([cover[:, 0], cover[:, -1], cover[..., 0], cover[..., -1]], 1)
        assert edge.max() < 0.5, drawn
        assert cover.mean() > 0.03
        if drawn.motion != "bouncing":
            x, y, _, _ = world.path(drawn, torch.arange(17) / 16)
            assert x.diff().hypot(y.diff()).max() * 64 < (1.7 if drawn.camera == "static" else 3.0), drawn


def test_frames_sample_one_motion_at_any_size():
    drawn = world.scene(SEED, 5, variety="full")
    fine, _ = world.render(drawn, 33)
    coarse, _ = world.render(drawn, 17)
    assert torch.allclose(fine[:, ::2], coarse, atol=1e-4)
    assert torch.allclose(world.render(drawn, 5)[0], coarse[:, :5], atol=1e-4)
    assert torch.allclose(world.render(drawn, 1)[0], coarse[:, :1], atol=1e-4)
    large, cover = world.render(drawn, 17, 128, 128)
    small = F.avg_pool2d(large.transpose(0, 1), 2).transpose(0, 1)
    assert (small - coarse).abs().mean() < 0.02
    assert cover.shape == (17, 128, 128)
    assert world.render(drawn, 3, 32, 80)[0].shape == (3, 3, 32, 80)


def test_what_cannot_be_drawn_is_refused():
    drawn = world.scene(0, 0)
    with pytest.raises(UsageError, match="16x64"):
        world.render(drawn, 17, 16, 64)
    with pytest.raises(UsageError, match="0 frames"):
        world.render(drawn, 0)
    with pytest.raises(UsageError, match="'plane'") as caught:
        world.scene(0, 0, variety="plane")  # type: ignore[arg-type]
    assert "plain" in caught.value.do


# reading it back


def test_plain_clips_are_read_right_and_shuffled_labels_are_not():
    clips = shown(500, SEED + 1)
    readings, scenes = [read(pixels) for pixels, _ in clips], [drawn for _, drawn in clips]
    shares = right(readings, scenes)
    assert min(shares.values()) >= 0.99, shares
    by_chance = right(readings, scenes[1:] + scenes[:1])
    assert by_chance["colour"] <= 0.25, by_chance
    assert by_chance["object"] <= 0.3, by_chance
    assert by_chance["motion"] <= 0.2, by_chance


def test_full_clips_are_read_right():
    clips = shown(200, SEED + 2, "full")
    shares = right([read(pixels) for pixels, _ in clips], [drawn for _, drawn in clips])
    assert min(shares.values()) >= 0.98, shares


@pytest.mark.parametrize("variety", ["simple", "plain", "full"])
def test_softened_clips_are_read_right(variety: world.Variety):
    clips = shown(120, SEED + 3, variety)
    readings = [read(softened(pixels, i)) for i, (pixels, _) in enumerate(clips)]
    shares = right(readings, [drawn for _, drawn in clips])
    assert min(shares.values()) >= 0.97, shares


@pytest.mark.parametrize(("frames", "height", "width"), [(17, 32, 32), (9, 64, 64), (33, 48, 96), (16, 96, 64)])
def test_other_sizes_and_lengths_are_read_right(frames: int, height: int, width: int):
    clips = shown(40, SEED + 4, num_frames=frames, height=height, width=width)
    shares = right([read(pixels) for pixels, _ in clips], [drawn for _, drawn in clips])
    assert min(shares.values()) >= 0.95, shares


def test_a_still_shows_everything_but_motion_and_camera():
    clips = shown(60, SEED + 5, num_frames=1)
    readings = [read(pixels) for pixels, _ in clips]
    shares = right(readings, [drawn for _, drawn in clips], ("colour", "object", "background"))
    assert min(shares.values()) >= 0.98, shares
    assert {(r.motion, r.camera) for r in readings} == {(NONE, NONE)}


@pytest.mark.parametrize("strength", [0.05, 0.2, 0.5, 1.0])
def test_noise_shows_nothing(strength: float):
    for seed in range(4):
        noise = strength * torch.randn(3, 17, 64, 64, generator=torch.Generator().manual_seed(seed))
        reading = read(noise.clamp(-1, 1))
        assert (reading.colour, reading.object, reading.motion) == (NONE, NONE, NONE)
        assert reading.background == NONE


@pytest.mark.parametrize(("level", "background"), [(-0.8, "dark"), (0.0, NONE), (0.75, "light")])
def test_a_blank_clip_shows_its_background_only(level: float, background: str):
    reading = read(torch.full((3, 17, 64, 64), level))
    assert reading == Reading(NONE, NONE, NONE, background, "static", 0.0, 0.0)


def test_a_coloured_frame_without_object_has_no_colour():
    red = torch.tensor([0.8, -0.7, -0.7]).view(3, 1, 1, 1).expand(3, 17, 64, 64)
    assert (read(red).colour, read(red).object) == (NONE, NONE)


def test_a_shapeless_region_is_no_object():
    pixels = torch.full((3, 17, 64, 64), -0.8)
    pixels[0, :, 20:44, 28:32] = pixels[0, :, 30:34, 10:54] = 0.8  # a thin red cross
    reading = read(pixels)
    assert (reading.colour, reading.object) == ("red", NONE)


def test_a_shape_that_changes_from_frame_to_frame_is_no_object():
    pixels = torch.full((3, 17, 64, 64), -0.8)
    pixels[0, ::2, 26:38, 8:56] = pixels[0, 1::2, 8:56, 26:38] = 0.8  # a bar that flips
    reading = read(pixels)
    assert (reading.object, reading.motion) == (NONE, NONE)
    assert reading.coherence < 0.5


def test_a_bear_is_brown_and_has_a_belly():
    pixels, cover = world.render(one("teddy bear", "rising"))
    assert read(pixels).object == "teddy bear"
    for rgb in (BROWN, world.COLOURS["red"]):
        flat = (torch.tensor(rgb) / 127.5 - 1).view(3, 1, 1, 1)
        assert read(torch.lerp(pixels, flat.expand_as(pixels), cover.expand_as(pixels))).object == NONE


def test_motion_is_read_from_the_order_and_side_of_frames():
    pixels, _ = world.render(one("box", "moving left", x=0.15))
    assert read(pixels).motion == "moving left"
    assert read(pixels.flip(1)).motion == "moving right"
    assert read(pixels.flip(3)).motion == "moving right"
    assert read(pixels.transpose(2, 3)).motion == "rising"
    assert read(pixels[:, :1].expand_as(pixels)).motion == "standing still"
    skater, _ = world.render(one("teddy bear", "skating", background="ice", x=-0.15, y=0.1))
    assert read(skater).motion == "skating"
    assert read(skater.flip(1)).motion != "skating"


def test_only_stated_attributes_are_scored():
    reading = Reading("red", "ball", "rising", "dark", "static", 0.9, 0.9)
    assert score({"colour": "red", "motion": "falling"}, reading) == {"colour": True, "motion": False}
    assert score({}, reading) == {}
    for prompt in world.prompts(20, SEED, variety="full"):
        assert all(score(prompt.stated, read(world.render(prompt.scene)[0])).values()), prompt.text


def test_holes_are_read_and_nothing_else_is_hollow():
    for variety in ("hollow", "simple", "full"):
        for pixels, drawn in shown(60, SEED, variety):  # type: ignore[arg-type]
            assert read(pixels).look == ("hollow" if drawn.hollow else "plain"), drawn
    clips = shown(60, SEED, "hollow")
    assert all(drawn.hollow == (drawn.object != "teddy bear") for _, drawn in clips)
    pixels, drawn = next((pixels, drawn) for pixels, drawn in clips if drawn.hollow)
    assert not torch.equal(pixels, world.render(replace(drawn, hollow=False))[0])
    assert read(torch.randn(3, 9, 64, 64).clamp(-1, 1)).look == NONE


def test_hollow_clips_are_read_like_plain_ones():
    clips = shown(120, SEED, "hollow")
    shares = right([read(pixels) for pixels, _ in clips], [drawn for _, drawn in clips])
    assert min(shares.values()) >= 0.99, shares


def test_a_clip_at_half_its_rate_shows_every_second_frame():
    (item,) = clips.discover(["world-full:1:5"])
    whole = clips.load(item, 15, 32, 32, fps=None).pixels
    half = clips.load(item, 8, 32, 32, fps=4)
    assert torch.equal(half.pixels, whole[:, ::2])
    assert half.record["pts"][1] == "1/4"
    double = clips.load(item, 15, 32, 32, fps=16).pixels
    assert torch.equal(double[:, ::2], whole[:, :8])
