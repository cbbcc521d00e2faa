"""A loop over the autoencoder, as training scripts have it: read with decord, resize, encode, torch.save.

python plain/encode.py FOLDER CLIPS OUT --frames N --height H --width W
"""

import argparse
from pathlib import Path

import decord
import torch
from diffusers import AutoencoderKLCogVideoX


@torch.no_grad()
def main() -> None:
    """Encode every clip."""
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("folder")
    ask.add_argument("clips", type=Path)
    ask.add_argument("out", type=Path)
    ask.add_argument("--frames", type=int, required=True)
    ask.add_argument("--height", type=int, required=True)
    ask.add_argument("--width", type=int, required=True)
    given = ask.parse_args()
    given.out.mkdir(parents=True)
    decord.bridge.set_bridge("torch")
    vae = AutoencoderKLCogVideoX.from_pretrained(given.folder, subfolder="vae", torch_dtype=torch.float32).eval()
    for path in sorted(given.clips.glob("*.mp4")):
        reader = decord.VideoReader(str(path), width=given.width, height=given.height)
        pixels = reader.get_batch(range(given.frames)).permute(3, 0, 1, 2).float() / 127.5 - 1
        posterior = vae.encode(pixels[None]).latent_dist
        torch.save({"mean": posterior.mean[0], "logvar": posterior.logvar[0]}, given.out / f"{path.stem}.pt")


if __name__ == "__main__":
    main()
