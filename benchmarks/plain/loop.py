"""The sampling loop alone, of vgen or of the pipeline: its seconds and its memory as JSON, its latents as a file.

python plain/loop.py vgen|diffusers FOLDER OUT.pt. Text is embedded and the network warm before the clock starts; memory
is the peak of the process, its imports included, while the loop runs.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

PROMPT = "a teddy bear skating"


def vgen(folder: Path) -> Callable[[int | None], torch.Tensor]:
    """A function that samples in so many steps; all of the checkpoint's when None."""
    from vgen import lean, registry
    from vgen.family import family, resolve
    from vgen.generate import generate
    from vgen.machine import machine

    lean.leave_out()  # as the command does
    card = family("cogvideox")
    found = registry.resolve(card, str(folder), accelerator=False)
    model = card.loader()(folder, found.checkpoint, machine("cpu", "fp32"))

    def sample(steps: int | None) -> torch.Tensor:
        options = card.options("sample")(prompt=PROMPT, seed=1, num_inference_steps=steps)
        latents = generate(model, resolve(card, options, found.checkpoint), lambda *_: None)["latents"]
        return latents * model.space.scaling_factor

    return sample


def diffusers(folder: Path) -> Callable[[int | None], torch.Tensor]:
    """The same with the pipeline, whose text is embedded before."""
    from diffusers import CogVideoXPipeline

    told = json.loads((folder / "vgen.json").read_text())["defaults"]
    pipe = CogVideoXPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    length = pipe.transformer.config.max_text_seq_length
    texts = [
        pipe.encode_prompt(one, do_classifier_free_guidance=False, max_sequence_length=length)[0]
        for one in (PROMPT, "")
    ]
    pipe.text_encoder = None

    def sample(steps: int | None) -> torch.Tensor:
        return pipe(
            prompt_embeds=texts[0],
            negative_prompt_embeds=texts[1],
            num_frames=pipe.transformer.config.sample_frames,
            num_inference_steps=steps or told["num_inference_steps"],
            guidance_scale=told["guidance_scale"],
            max_sequence_length=length,
            generator=torch.Generator().manual_seed(1),
            output_type="latent",
        ).frames.transpose(1, 2)

    return sample


def peak() -> int:
    """The peak of this process's resident memory in KiB, since it was last cleared."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Warm up, measure, print."""
    side, folder, out = sys.argv[1:]
    sample = {"vgen": vgen, "diffusers": diffusers}[side](Path(folder))
    sample(2)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    wall, cpu = time.perf_counter(), time.process_time()
    latents = sample(None)
    told = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "kib": peak()}
    torch.save(latents, out)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
