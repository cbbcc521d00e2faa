"""The sampling loop alone of Stable Video Diffusion, of vgen and of the pipeline: see loop.py, whose words it takes.

The picture is PICTURE in the checkpoint's folder; both sides embed and encode it in each call, as the pipeline does.
"""

import json
from pathlib import Path

import torch
from loop import Sample, main
from PIL import Image

PICTURE = "first.png"


def vgen(folder: Path) -> Sample:
    """The sampler of the family."""
    from vgen import lean, registry
    from vgen.family import family, resolve
    from vgen.generate import generate
    from vgen.machine import machine

    lean.leave_out()  # as the command does
    card = family("svd")
    found = registry.resolve(card, str(folder), accelerator=False)
    model = card.loader()(folder, found.checkpoint, machine("cpu", "fp32"))

    def sample(steps: int | None) -> torch.Tensor:
        options = card.options("sample")(image=folder / PICTURE, seed=1, num_inference_steps=steps)
        latents = generate(model, resolve(card, options, found.checkpoint), lambda *_: None)["latents"]
        return latents * model.space.scaling_factor

    return sample


def diffusers(folder: Path) -> Sample:
    """The same with the pipeline."""
    from diffusers import StableVideoDiffusionPipeline

    told = json.loads((folder / "vgen.json").read_text())["defaults"]
    pipe = StableVideoDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    image = Image.open(folder / PICTURE).convert("RGB")

    def sample(steps: int | None) -> torch.Tensor:
        return pipe(
            image,
            height=image.height,
            width=image.width,
            num_inference_steps=steps or told["num_inference_steps"],
            min_guidance_scale=told["min_guidance_scale"],
            max_guidance_scale=told["max_guidance_scale"],
            fps=7,
            generator=torch.Generator().manual_seed(1),
            output_type="latent",
        ).frames.transpose(1, 2)

    return sample


if __name__ == "__main__":
    main({"vgen": vgen, "diffusers": diffusers})
