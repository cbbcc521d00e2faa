"""Text to a clip with diffusers' own pipeline, as its documentation has it; PyAV writes the file.

python plain/sample.py FOLDER PROMPT OUT.mp4|OUT_FOLDER --steps N --guidance X --fps X: a folder gets PNGs, to compare.
"""

import argparse
import sys
from fractions import Fraction
from pathlib import Path

import av
import torch
from diffusers import CogVideoXPipeline


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
    if given.out.suffix == ".mp4":
        write(given.out, frames, Fraction(given.fps))
        return
    given.out.mkdir()
    for i, frame in enumerate(frames):
        frame.save(given.out / f"frame_{i:05d}.png")


def write(path: Path, frames: list, fps: Fraction) -> None:
    """PIL images to H.264."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "18"})
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


if __name__ == "__main__":
    main()
