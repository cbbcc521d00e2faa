"""CMD against ModelScope's text-to-video U-Net, random weights, in one run: the time of network calls, and of a clip.

    python benchmarks/cmd.py                     # one call of each network on this machine, at a size that fits
    python benchmarks/cmd.py --clip --batch 4    # the loops of 50 steps at 512x1024x16, with memory; wants a GPU

CMD's call is one of the content model and one of the motion model, which is what a step of a clip takes. The
paper's figures, of an A100: 3.13 s against 35.1 s a clip (11.2 times), 8.57 against 21.3 GB at batch 4.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet3DConditionModel

from vgen.cost import counted
from vgen.plugins.cmd.factored import FactoredAutoencoder
from vgen.plugins.cmd.transformer import MotionTransformer

CONTENT = {  # Stable Diffusion 2.1
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SCOPE = {"cross_attention_dim": 1024, "attention_head_dim": 64}
SMALL = {"block_out_channels": (160, 320, 640, 640)}  # of both U-Nets on the CPU: half as wide


def networks(device: torch.device, dtype: torch.dtype, small: bool) -> dict[str, Any]:
    """The networks of both, with random weights."""
    narrow = SMALL if small else {}
    heads = {"attention_head_dim": 32} if small else {}
    motion = {"width": 576, "heads": 8, "depth": 14} if small else {}
    made = {
        "content": UNet2DConditionModel(**{**CONTENT, **narrow, **heads}),
        "motion": MotionTransformer(**motion),
        "autoencoder": FactoredAutoencoder(),
        "modelscope": UNet3DConditionModel(**{**SCOPE, **narrow, **heads}),
    }
    return {name: network.to(device, dtype).eval() for name, network in made.items()}


def calls(
    nets: dict[str, Any], batch: int, height: int, width: int, like: torch.Tensor
) -> dict[str, Callable[[], Any]]:
    """One call of each, for latents of 16 frames of height x width."""

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, device=like.device, dtype=like.dtype)

    t, text, content = noise().abs() * 500, noise(77, 1024), noise(4, height, width)
    clip, motion = noise(4, 16, height, width), noise(8, 16, (height + width) // 2)
    streams = content[:, :, None], noise(8, 16, height // 2, 1), noise(8, 16, 1, width // 2)
    return {
        "content": lambda: nets["content"](content, t, text),
        "motion": lambda: nets["motion"](motion, t, content, text.mean(1)),
        "autoencoder": lambda: nets["autoencoder"].decoder(*streams),
        "modelscope": lambda: nets["modelscope"](clip, t, text),
    }


def seconds(run: Callable[[], Any], times: int, device: torch.device) -> float:
    """Wall time of so many calls, after one that does not count."""
    run()
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronise()
    started = time.perf_counter()
    for _ in range(times):
        run()
    synchronise()
    return time.perf_counter() - started


def memory(device: torch.device, nets: list[Any], run: Callable[[], Any]) -> float:
    """The most memory in GB that a call takes, its networks' weights included; 0 without a GPU."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    run()
    weights = sum(p.numel() * p.element_size() for net in nets for p in net.parameters())
    return (torch.cuda.max_memory_allocated() - base + weights) / 1e9


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clip", action="store_true", help="50 steps at 512x1024x16, not one call at 128x128x16")
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    nets = networks(device, dtype, small=device.type == "cpu")
    size = (64, 128) if options.clip else (16, 16)
    run, steps = (
        calls(nets, options.batch, *size, torch.empty(0, device=device, dtype=dtype)),
        50 if options.clip else 1,
    )
    took = {name: seconds(one, steps if name != "autoencoder" else 1, device) for name, one in run.items()}
    used = {name: memory(device, [nets[name]], one) for name, one in run.items()}
    for name, one in run.items():
        count = counted(one, nets[name])
        print(f"{name:12} {took[name]:8.2f} s  {count.plain / 1e12:7.4f} TMACs a call  {used[name]:6.2f} GB")
    ours = took["content"] + took["motion"] + (took["autoencoder"] if options.clip else 0)
    print(
        f"ModelScope / CMD, {'clips' if options.clip else 'one call'}: {took['modelscope'] / ours:.1f} times the time"
    )


if __name__ == "__main__":
    main()
