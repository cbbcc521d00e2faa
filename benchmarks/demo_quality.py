"""How well a checkpoint of the drawn world follows its prompts: every figure with its counts and the majority rate.

    python benchmarks/demo_quality.py [--family cogvideox] [--checkpoint demo] [--count 96]
    python benchmarks/demo_quality.py --count 32 --look hollow [--lora FOLDER]    # how many objects are hollow

Prompts are held out: their combinations of colour, object and motion were never trained. An attribute is scored only
where the prompt states it, and motion and camera not of a single frame. "majority" is what always answering with the
most frequent word would score.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch

from vgen import lora, lora_source, registry, world
from vgen.commands.quiet import hush
from vgen.family import family, resolve
from vgen.generate import decode, generate
from vgen.machine import machine
from vgen.metrics import psnr
from vgen.world_check import read, score

Scores = dict[str, list[bool]]
MOVING = ("motion", "camera")


def reconstruction(model, size: tuple[int, int, int], count: int) -> tuple[list[float], Scores, dict[str, Counter]]:
    """PSNR of each true clip after the autoencoder, and whether the checker still reads it right."""
    figures, scores, words = [], defaultdict(list), defaultdict(Counter)
    for i in range(count):
        pixels, _, _, scene = world.clip(424242, i, *size)
        with torch.inference_mode():
            back = model.decode({"latents": model.encode(pixels[None])["mean"]})[0].float().cpu()
        figures.append(psnr(back, pixels))
        stated = shown({"colour": scene.colour, "object": scene.object, "motion": scene.motion}, size[0])
        add(scores, words, stated, score(stated, read(back.clamp(-1, 1))))
    return figures, scores, words


def sampled(
    model, options, prompts: Iterable[world.Prompt], sheets: Path | None, look: dict[str, str]
) -> tuple[Scores, dict[str, Counter]]:
    """Whether the checker reads in each sample what its prompt states, and the `look` that all should have."""
    scores, words = defaultdict(list), defaultdict(Counter)
    rows = []
    for i, prompt in enumerate(prompts):
        options.prompt, options.seed = prompt.text, 1000 + i
        frames = decode(model, generate(model, options, lambda *_: None))[0]
        reading = read(frames.permute(3, 0, 1, 2).float() / 127.5 - 1)
        stated = {**shown(prompt.stated, len(frames)), **look}
        right = score(stated, reading)
        add(scores, words, stated, right)
        rows.append(frames[:: max(1, len(frames) // 5)])
        wrong = ", ".join(f"{k}: {stated[k]} -> {getattr(reading, k)}" for k, ok in right.items() if not ok)
        print(f"{i:3d} {prompt.text:52s} {wrong or 'ok'}", flush=True)
    if sheets:
        save_sheet(rows, sheets)
    return scores, words


def shown(stated: dict[str, str], num_frames: int) -> dict[str, str]:
    """The attributes that so many frames can show."""
    return {name: word for name, word in stated.items() if num_frames > 1 or name not in MOVING}


def add(scores: Scores, words: dict[str, Counter], stated: dict[str, str], right: dict[str, bool]) -> None:
    """Count one clip."""
    for name, ok in right.items():
        scores[name].append(ok)
        words[name][stated[name]] += 1
    scores["all stated"].append(all(right.values()))
    words["all stated"][tuple(sorted(stated.items()))] += 1


def save_sheet(rows: list[torch.Tensor], path: Path) -> None:
    """Clips under each other, a few frames of each, four clips to a row."""
    from PIL import Image

    strips = [torch.cat(list(row), 1) for row in rows]
    strips += [torch.zeros_like(strips[0])] * (-len(strips) % 4)
    grid = torch.cat([torch.cat(strips[i : i + 4], 1) for i in range(0, len(strips), 4)], 0)
    Image.fromarray(grid.numpy()).save(path)


def table(title: str, scores: Scores, words: dict[str, Counter]) -> dict[str, float]:
    """Print a table and return its shares."""
    print(f"\n{title}\n{'':12s} {'right':>12s} {'share':>7s} {'majority':>9s}")
    shares = {}
    for name, right in scores.items():
        most = max(words[name].values()) / len(right)
        shares[name] = sum(right) / len(right)
        print(f"{name:12s} {sum(right):>5d} of {len(right):>3d} {shares[name]:>6.1%} {most:>9.1%}")
    return shares


def main() -> None:
    """Measure and print."""
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--family", default="cogvideox")
    ask.add_argument("--checkpoint", default="demo")
    ask.add_argument("--count", type=int, default=96)
    ask.add_argument("--reconstructions", type=int, default=96)
    ask.add_argument("--steps", type=int)
    ask.add_argument("--guidance", type=float)
    ask.add_argument("--threads", type=int)
    ask.add_argument("--lora", action="append", default=[], help="an adapter, PATH[:SCALE]")
    ask.add_argument("--look", choices=("plain", "hollow"), help="also score the look of the object")
    ask.add_argument("--sheet", type=Path, help="write the samples as one PNG")
    given = ask.parse_args()
    hush()
    card = family(given.family)
    found = registry.resolve(card, given.checkpoint, accelerator=False)
    model = card.loader()(found.folder, found.checkpoint, machine("cpu", "fp32", threads=given.threads))
    if given.lora:
        lora.use(card, model, found.folder, [lora_source.locate(one) for one in given.lora])
    options = card.options("sample")(prompt="a red ball", seed=0)
    options.num_inference_steps, options.guidance_scale = given.steps, given.guidance
    options = resolve(card, options, found.checkpoint)
    size = (options.num_frames, options.height, options.width)
    figures, scores, words = (
        reconstruction(model, size, given.reconstructions) if given.reconstructions else ([], {}, {})
    )
    if figures:
        print(f"autoencoder: {sum(figures) / len(figures):.2f} dB mean, {min(figures):.2f} dB worst of {len(figures)}")
        table("checker on reconstructions", scores, words)
    shares = {}
    if given.count:
        look = {"look": given.look} if given.look else {}
        scored = sampled(model, options, world.prompts(given.count), given.sheet, look)
        shares = table("samples of held-out prompts", *scored)
    print(json.dumps({"psnr": sum(figures) / max(1, len(figures)), **shares}))


if __name__ == "__main__":
    main()
