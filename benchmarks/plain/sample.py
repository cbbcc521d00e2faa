"""Text to a clip with diffusers' own pipeline, as its documentation has it.

python plain/sample.py FOLDER PROMPT OUT.mp4|OUT_FOLDER --steps N --guidance X --fps X: a folder gets PNGs, to compare.
"""

import argparse
import sys
from fractions import Fraction
from pathlib import Path

import torch
from diffusers import CogVideoXPipeline
from frames import save


def main() -> None:
    """Load, sample, write."""
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("folder")
    ask.add_argument("prompt")
    ask.add_argument("out", type=Path)
    ask.add_argument("--steps", type=int, required=True)
    ask.add_argument("--guidance", type=float, required=True)
    ask.add_argument("--fps", type=float, required=True)
    ask.add_argument("--length", type=int, required=True, help="tokens of text")
    given = ask.parse_args()
    pipe = CogVideoXPipeline.from_pretrained(given.folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    frames = pipe(
        given.prompt,
        num_frames=pipe.transformer.config.sample_frames,
        num_inference_steps=given.steps,
        guidance_scale=given.guidance,
        max_sequence_length=given.length,
        generator=torch.Generator().manual_seed(1),
    ).frames[0]
    save(given.out, frames, Fraction(given.fps))


if __name__ == "__main__":
    main()
