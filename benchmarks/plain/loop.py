"""The sampling loop alone, of vgen and of the pipeline; text is embedded and the network warm before a clock starts.

python plain/loop.py vgen|diffusers FOLDER OUT.pt gives the peak memory of a process with one of them, its imports
included, and writes the latents; python plain/loop.py pairs FOLDER N gives the seconds of both, in turn in one process.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

PROMPT = "a teddy bear skating"
Sample = Callable[[int | None], torch.Tensor]  # samples in so many steps; in all of the checkpoint's when None
Side = Callable[[Path], Sample]


def vgen(folder: Path) -> Sample:
    """The sampler of the family."""
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


def diffusers(folder: Path) -> Sample:
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


def alone(side: Side, folder: Path, out: str) -> dict[str, int]:
    """One of the two in a process of its own."""
    sample = side(folder)
    sample(2)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    torch.save(sample(None), out)
    return {"kib": peak()}


def in_turn(sides: Mapping[str, Side], folder: Path, pairs: int) -> list[dict[str, tuple[float, float]]]:
    """Wall and CPU seconds of both, the one or the other first."""
    both = {name: sides[name](folder) for name in ("diffusers", "vgen")}
    told = []
    for i in range(-1, pairs):
        seconds = {}
        for name in sorted(both, reverse=i % 2 == 0):
            wall, cpu = time.perf_counter(), time.process_time()
            both[name](None if i >= 0 else 2)
            seconds[name] = time.perf_counter() - wall, time.process_time() - cpu
        told.append(seconds)
    return told[1:]


def main(sides: Mapping[str, Side]) -> None:
    """Measure, print JSON."""
    what, folder, last = sys.argv[1:]
    told = in_turn(sides, Path(folder), int(last)) if what == "pairs" else alone(sides[what], Path(folder), last)
    print(json.dumps(told))


if __name__ == "__main__":
    main({"vgen": vgen, "diffusers": diffusers})
