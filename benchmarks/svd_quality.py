"""How well the demo of Stable Video Diffusion lets pictures move, with counts: on first frames that it never saw.

    python benchmarks/svd_quality.py [--checkpoint demo] [--count 64] [--sheet sheet.png]
    python benchmarks/svd_quality.py --interpolation [--count 64]             # against fading and repeating, in dB
    python benchmarks/svd_quality.py --camera pan-left [--lora FOLDER]        # how many clips turn that way

The pictures are first frames of clips of the drawn world whose combination of colour, object and motion was never
trained. A clip moves where its object travels a twentieth of the frame or changes its area by a fifth.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from torch import Tensor

from vgen import camera, lora, lora_source, motion, registry, world
from vgen.commands.quiet import hush
from vgen.family import family, resolve
from vgen.generate import decode, generate, to_frames
from vgen.machine import machine
from vgen.metrics import psnr
from vgen.world_check import object_mask, read

LOW, HIGH = 10, 200  # motion buckets; the world's fastest clips have about 205
SEED = 5150  # of the scenes; no training uses it


def scenes(count: int, variety: world.Variety, split: world.Split) -> list[world.Scene]:
    """Scenes of the world, of which only the first frame is shown to the model."""
    return [world.scene(SEED, i, variety=variety, split=split) for i in range(count)]


def textured(count: int) -> list[world.Scene]:
    """Scenes over a texture, where a camera can be seen to move."""
    some = (world.scene(SEED, i, variety="full") for i in range(100 * count))
    return [one for one in some if one.background == "textured"][:count]


def picture(scene: world.Scene, size: tuple[int, int], folder: Path) -> Path:
    """The first frame of a scene as a file."""
    path = folder / "first.png"
    Image.fromarray(to_frames(world.render(scene, 1, *size)[0])[0].numpy()).save(path)
    return path


def sampled(model, options, scene: world.Scene, folder: Path, **more) -> Tensor:
    """Frames (T, H, W, 3) of 8 bits of a clip that starts from the first frame of a scene."""
    options.image = picture(scene, (options.height, options.width), folder)
    for name, value in more.items():
        setattr(options, name, value)
    return decode(model, generate(model, options, lambda *_: None))[0]


def pixels(frames: Tensor) -> Tensor:
    """Frames of 8 bits as (3, T, H, W) in [-1, 1]."""
    return frames.permute(3, 0, 1, 2).float() / 127.5 - 1


def moves(frames: Tensor) -> bool:
    """Whether the object of a clip travels, grows or shrinks."""
    mask = object_mask(frames.permute(0, 3, 1, 2).float() / 255)
    area = mask.sum((1, 2)).clamp(min=1)
    rows, columns = torch.arange(mask.shape[1]).float(), torch.arange(mask.shape[2]).float()
    y, x = (mask.sum(2) * rows).sum(1) / area, (mask.sum(1) * columns).sum(1) / area
    far = ((y - y[0]) ** 2 + (x - x[0]) ** 2).sqrt().max() / min(mask.shape[1:])
    return bool(far >= 0.05 or (area.max() / area.min()) >= 1.2)


def motions(model, options, count: int, sheet: Path | None, folder: Path) -> None:
    """Print how many clips keep their object, move, and move more in a high bucket than in a low one.

    Object and motion are those of clips in the bucket that the checkpoint takes when none is named.
    """
    usual = options.motion_bucket_id
    kept, rows = Counter(), []
    majority = Counter()
    for i, scene in enumerate(scenes(count, "plain", "held-out")):
        low, clip, high = (
            sampled(model, options, scene, folder, seed=1000 + i, motion_bucket_id=id) for id in (LOW, usual, HIGH)
        )
        reading = read(pixels(clip))
        scores = [motion.score(list(one.numpy()), options.fps) for one in (low, high)]
        right = {
            "colour": reading.colour == scene.colour,
            "object": reading.object == scene.object,
            "moves": moves(clip),
            "more in the high bucket": scores[1] > scores[0],
        }
        right["colour and object"] = right["colour"] and right["object"]
        kept.update(name for name, ok in right.items() if ok)
        majority[(scene.colour, scene.object)] += 1
        rows += [clip, high]
        wrong = ", ".join(name for name, ok in right.items() if not ok) or "ok"
        print(
            f"{i:3d} {scene.colour:7s} {scene.object:9s} motion {scores[0]:5.2f} {scores[1]:5.2f}  {wrong}", flush=True
        )
    report({name: (kept[name], count) for name in right})
    if sheet:
        save_sheet(rows, sheet)


def interpolation(model, count: int, folder: Path) -> None:
    """Print the mean PSNR of frames made between every fourth frame of moving clips, against fading and repeating."""
    options = resolve(model.card, model.card.options("interpolate")(input="x"), model.checkpoint)
    figures: dict[str, list[float]] = {"svd": [], "linear": [], "duplicate": []}
    moving = [s for s in scenes(4 * count, "plain", "held-out") if s.motion != "standing still"][:count]
    for i, scene in enumerate(moving):
        clip = world.render(scene, 17, 64, 64)[0]
        starts = range(0, 16, 4)
        ends = torch.stack([clip[:, [k, k + 4]] for k in starts])
        truth = torch.stack([clip[:, k + 1 : k + 4] for k in starts])
        with torch.inference_mode():
            made = model.between(ends, options, [1000 + i] * len(starts)).clamp(-1, 1)
        share = torch.tensor([0.25, 0.5, 0.75]).view(1, 1, 3, 1, 1)
        others = {"linear": torch.lerp(ends[:, :, :1], ends[:, :, 1:], share)}
        others["duplicate"] = torch.where(share < 0.5, ends[:, :, :1], ends[:, :, 1:])
        for name, frames in {"svd": made, **others}.items():
            figures[name].append(psnr(frames, truth))
    means = {name: sum(found) / len(found) for name, found in figures.items()}
    best = sum(a > max(b, c) for a, b, c in zip(*figures.values(), strict=True))
    print(json.dumps({"clips": len(moving), "psnr": means, "clips where svd is best": best}))


def cameras(model, options, word: str, count: int, sheet: Path | None, folder: Path) -> None:
    """Print how many clips show that motion of the camera, and how many objects keep their colour."""
    kept, rows = Counter(), []
    for i, scene in enumerate(textured(count)):
        frames = sampled(model, options, scene, folder, seed=2000 + i)
        found = camera.estimate(frames)
        kept.update(
            {word: int(camera.matches(found, word)), "colour": int(read(pixels(frames)).colour == scene.colour)}
        )
        rows.append(frames)
        print(f"{i:3d} {scene.colour:7s} {scene.object:11s} {found}", flush=True)
    report({name: (kept[name], count) for name in (word, "colour")})
    if sheet:
        save_sheet(rows, sheet)


def report(found: dict[str, tuple[int, int]]) -> None:
    """Print shares with their counts."""
    for name, (right, count) in found.items():
        print(f"{name:24s} {right:>4d} of {count:>3d} {right / count:>7.1%}")
    print(json.dumps({name: right / count for name, (right, count) in found.items()}))


def save_sheet(rows: list[Tensor], path: Path) -> None:
    """Clips under each other, two to a row."""
    strips = [torch.cat(list(row), 1) for row in rows]
    strips += [torch.zeros_like(strips[0])] * (len(strips) % 2)
    grid = torch.cat([torch.cat(strips[i : i + 2], 1) for i in range(0, len(strips), 2)], 0)
    Image.fromarray(grid.numpy()).save(path)


def main() -> None:
    """Measure and print."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--checkpoint", default="demo")
    ask.add_argument("--count", type=int)
    ask.add_argument("--steps", type=int)
    ask.add_argument("--guidance", type=float, help="of the last frame")
    ask.add_argument("--threads", type=int)
    ask.add_argument("--interpolation", action="store_true")
    ask.add_argument("--camera", metavar="WORD")
    ask.add_argument("--bucket", type=int, help="motion bucket of clips whose camera is measured")
    ask.add_argument("--lora", action="append", default=[], help="an adapter, PATH[:SCALE]")
    ask.add_argument("--sheet", type=Path, help="write the samples as one PNG")
    given = ask.parse_args()
    hush()
    card = family("svd")
    found = registry.resolve(card, given.checkpoint, accelerator=False)
    model = card.loader()(found.folder, found.checkpoint, machine("cpu", "fp32", threads=given.threads))
    model.card = card
    if given.lora:
        lora.use(card, model, found.folder, [lora_source.locate(one) for one in given.lora])
    told = {"num_inference_steps": given.steps, "max_guidance_scale": given.guidance}
    options = resolve(card, card.options("sample")(image=Path("first.png"), seed=0, **told), found.checkpoint)
    with TemporaryDirectory() as folder:
        if given.interpolation:
            interpolation(model, given.count or 64, Path(folder))
        elif given.camera:
            options.motion_bucket_id = given.bucket or options.motion_bucket_id
            cameras(model, options, given.camera, given.count or 32, given.sheet, Path(folder))
        else:
            motions(model, options, given.count or 64, given.sheet, Path(folder))


if __name__ == "__main__":
    main()
