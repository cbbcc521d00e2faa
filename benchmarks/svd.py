"""How fast Stable Video Diffusion is with vgen beside diffusers' pipeline and a loop of diffusers and peft: ratios.

A random checkpoint of the released shape, made smaller: 14 frames of 128x128, a U-Net of about 100 million numbers.
Both sides have the same weights, picture and seed, and make the same frames; of the adapter both train the same layers,
one clip in a step, from the same cached latents, in bf16.

    python benchmarks/svd.py --page docs/benchmarks.md        # about 20 minutes on two quiet cores
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import train
from speed import HEAD, HERE, VGEN, Row, Took, loops, paired, process, same_frames, tell
from train import CLIPS, WARM, line

from vgen.family import family

START, END = "<!-- svd results -->", "<!-- svd end -->"
SIDE, FRAMES, STEPS, GUIDANCE = 128, 14, 4, (1.0, 2.5)
UNET = {"sample_size": SIDE // 8, "num_frames": FRAMES, "cross_attention_dim": 256}
UNET |= {"block_out_channels": (128, 256, 256, 256), "num_attention_heads": (2, 4, 4, 4)}
VAE = {"block_out_channels": (64, 128, 128, 128), "layers_per_block": 2, "sample_size": SIDE}
CLIP = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
CLIP |= {"image_size": 224, "patch_size": 14, "projection_dim": 256}
SCHEDULER = {  # as released
    "beta_schedule": "scaled_linear",
    "interpolation_type": "linear",
    "prediction_type": "v_prediction",
    "sigma_min": 0.002,
    "sigma_max": 700.0,
    "timestep_spacing": "leading",
    "timestep_type": "continuous",
    "use_karras_sigmas": True,
}


def base(folder: Path) -> None:
    """The checkpoint, in diffusers' layout, with a picture to start from."""
    import torch
    from diffusers import (
        AutoencoderKLTemporalDecoder,
        EulerDiscreteScheduler,
        StableVideoDiffusionPipeline,
        UNetSpatioTemporalConditionModel,
    )
    from PIL import Image
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    from vgen import world
    from vgen.generate import to_frames

    torch.manual_seed(0)
    unet = UNetSpatioTemporalConditionModel(**UNET)
    down = ("DownEncoderBlock2D",) * len(VAE["block_out_channels"])
    StableVideoDiffusionPipeline(
        vae=AutoencoderKLTemporalDecoder(**VAE, down_block_types=down),
        image_encoder=CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP)),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**SCHEDULER),
        feature_extractor=CLIPImageProcessor(),
    ).save_pretrained(folder)
    defaults = {"num_inference_steps": STEPS, "min_guidance_scale": GUIDANCE[0], "max_guidance_scale": GUIDANCE[1]}
    (folder / "vgen.json").write_text(json.dumps({"family": "svd", "defaults": defaults}))
    Image.fromarray(to_frames(world.clip(7, 0, 1, SIDE, SIDE)[0])[0].numpy()).save(folder / "first.png")
    print(f"{sum(p.numel() for p in unet.parameters()) / 1e6:.0f} million parameters", file=sys.stderr)


def tensors(store: Path, folder: Path, path: Path) -> None:
    """The clips of a store as the plain loop takes them."""
    import torch

    from vgen import registry
    from vgen.latents import scale
    from vgen.machine import machine
    from vgen.plugins.svd.told import vector
    from vgen.store import Store

    card = family("svd")
    found = registry.resolve(card, str(folder), accelerator=False)
    model = card.loader()(folder, found.checkpoint, machine("cpu", "fp32"))
    opened = Store.open(store, space=model.space, text_space=model.text_space, mend="")
    clips = []
    for record in opened.records():
        streams, _ = opened.get(record["key"])
        clips.append(
            {
                "latents": scale(model.space, streams["mean"].float()).transpose(0, 1)[None],
                "picture": streams["conditioning"][:1].float(),
                "embedding": streams["embedding"][None, :1].float(),
                "vector": vector(streams["fps"], streams["bucket"], streams["noise"][:1]),
            }
        )
    torch.save(clips, path)


class Lora(train.Bench):
    """The runs of train-lora. `work` holds the checkpoint, and what they read and write."""

    family, script = "svd", "svd_train_lora.py"

    def __init__(self, work: Path, folder: Path, steps: int) -> None:
        self.work, self.steps, self.home, self.count = work, steps, work / "home", 0
        self.folder, self.store = folder, work / "store"
        native = ("--num-frames", FRAMES, "--height", SIDE, "--width", SIDE, "--fps", 8)
        told = ("--checkpoint", folder, "--device", "cpu", "--seed", 1, "-o", self.store)
        process(VGEN, "encode", "svd", f"world:{CLIPS}", *native, *told, home=self.home)
        self.apart(tensors, self.store, folder, work / "latents.pt")

    def rows(self, pairs: int) -> list[str]:
        """The lines of the table."""
        ours, others = [], []
        for i in range(pairs):
            print(f"adapter, pair {i + 1} of {pairs} ...", file=sys.stderr, flush=True)
            sides = [(ours, self.vgen, ()), (others, self.plain, ("--latents", self.work / "latents.pt"))]
            for runs, run, more in sides if i % 2 == 0 else reversed(sides):
                runs.append(run(self.steps, *more))
        step, other = (median(median(run["steps"][WARM:]) for run in runs) for runs in (ours, others))
        faster = median(
            median(b["steps"][WARM:]) / median(a["steps"][WARM:]) for a, b in zip(ours, others, strict=True)
        )
        (wall, their_wall), (mib, their_mib) = (
            [median(run[name] for run in runs) for runs in (ours, others)] for name in ("wall", "mib")
        )
        return [
            line("adapter: steps/s, from cached latents", 1 / step, 1 / other, faster, ">= 1", faster >= 1),
            line("adapter: peak memory, MiB", mib, their_mib, mib / their_mib, "<= 1", mib <= their_mib),
            line(f"adapter: a whole run of {self.steps} steps, s", wall, their_wall, wall / their_wall, "", None),
        ]


def sampling(work: Path, folder: Path, pairs: int) -> Iterator[Row]:
    """Whole processes, then the loop alone, of which both make the same."""
    home, picture = work / "home", folder / "first.png"

    def ours(out: Path) -> Took:
        words = (VGEN, "sample", "svd", picture, "--checkpoint", folder, "--seed", 1, "--device", "cpu")
        return process(*words, "--overwrite", "-o", out, home=home)

    def other(out: Path) -> Took:
        script = HERE / "plain" / "svd_sample.py"
        told = ("--steps", STEPS, "--guidance", *GUIDANCE)
        return process(sys.executable, script, folder, picture, out, *told, home=home)

    ours(work / "a")
    other(work / "b")
    same_frames(work / "a", work / "b")
    print("sample ...", file=sys.stderr, flush=True)
    took = paired(lambda: ours(work / "x.mp4"), lambda: other(work / "y.mp4"), pairs)
    yield Row("sample: the whole process", *took, 1.0)
    yield loops("sample: the loop alone", "svd_loop.py", folder, work, pairs)


def main() -> None:
    """Measure and print."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--pairs", type=int, default=5)
    ask.add_argument("--steps", type=int, default=12, help="of training")
    ask.add_argument("--only", nargs="*", choices=("sample", "lora"), help="one of them")
    ask.add_argument("--page", type=Path, help="put the tables into this page, between its markers, too")
    given = ask.parse_args()
    only, parts = given.only or ("sample", "lora"), []
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        Lora.apart(base, work / "base")
        if "sample" in only:
            rows = [row.line() for row in sampling(work, work / "base", given.pairs)]
            parts.append("\n".join([HEAD, *rows]))
        if "lora" in only:
            head = "| measured | vgen | other | ratio | goal | met |\n| --- | --- | --- | --- | --- | --- |"
            parts.append("\n".join([head, *Lora(work, work / "base", given.steps).rows(given.pairs)]))
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    about = f"{os.cpu_count()} cores, load {load}, {given.pairs} pairs."
    tell("\n\n".join([about, *parts]), given.page, START, END)


if __name__ == "__main__":
    main()
