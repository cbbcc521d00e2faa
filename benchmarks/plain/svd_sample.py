"""A picture to a clip with diffusers' own pipeline, as its documentation has it.

python plain/svd_sample.py FOLDER PICTURE OUT.mp4|OUT_FOLDER --steps N --guidance LOW HIGH: a folder gets PNGs.
"""

import argparse
import sys
from fractions import Fraction
from pathlib import Path

import torch
from diffusers import StableVideoDiffusionPipeline
from frames import save
from PIL import Image


def main() -> None:
    """Load, sample, write."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("folder")
    ask.add_argument("picture")
    ask.add_argument("out", type=Path)
    ask.add_argument("--steps", type=int, required=True)
    ask.add_argument("--guidance", type=float, nargs=2, required=True)
    given = ask.parse_args()
    pipe = StableVideoDiffusionPipeline.from_pretrained(given.folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    image = Image.open(given.picture).convert("RGB")
    frames = pipe(
        image,
        height=image.height,
        width=image.width,
        num_inference_steps=given.steps,
        min_guidance_scale=given.guidance[0],
        max_guidance_scale=given.guidance[1],
        fps=7,
        generator=torch.Generator().manual_seed(1),
    ).frames[0]
    save(given.out, frames, Fraction(7))


if __name__ == "__main__":
    main()
