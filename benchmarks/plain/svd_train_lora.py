"""A LoRA on the temporal attention of Stable Video Diffusion, trained with diffusers and peft: one loop, from latents.

python plain/svd_train_lora.py FOLDER --steps N --latents FILE.pt --out FOLDER
FILE.pt is a list of clips: latents (1, T, C, H, W), picture (1, C, H, W), embedding (1, 1, D), vector (1, 3).
Prints JSON: seconds of each step, of the start, of the save, and the peak of resident memory.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import UNetSpatioTemporalConditionModel
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file

TARGETS = r".*temporal_transformer_blocks\.\d+\.attn1\.to_(q|k|v|out\.0)"
P_MEAN, P_STD, DROPOUT = 1.0, 1.6, 0.15


def loss_of(network, clip: dict[str, torch.Tensor]) -> torch.Tensor:
    """EDM's loss on one clip: log-normal noise, the network's v to x0, weighted by (1 + sigma^2) / sigma^2."""
    x0 = clip["latents"]
    sigma = torch.exp(P_MEAN + P_STD * torch.randn(len(x0), 1, 1, 1, 1))
    noisy = x0 + sigma * torch.randn_like(x0)
    keep = (torch.rand(()) >= DROPOUT).float()
    picture = (keep * clip["picture"])[:, None].expand(-1, x0.shape[1], -1, -1, -1)
    scale = (sigma**2 + 1).sqrt()
    with torch.autocast("cpu", torch.bfloat16):
        v = network(
            torch.cat([noisy / scale, picture], 2).to(torch.bfloat16),
            0.25 * sigma.log().flatten(),
            encoder_hidden_states=(keep * clip["embedding"]).to(torch.bfloat16),
            added_time_ids=clip["vector"],
            return_dict=False,
        )[0].float()
    denoised = noisy / (sigma**2 + 1) - v * sigma / scale
    return ((1 + sigma**2) / sigma**2 * (denoised - x0) ** 2).mean()


def main() -> None:
    """Load, train, save, tell."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("folder", type=Path)
    ask.add_argument("--steps", type=int, required=True)
    ask.add_argument("--rank", type=int, default=16)
    ask.add_argument("--latents", type=Path, required=True)
    ask.add_argument("--out", type=Path, required=True)
    given = ask.parse_args()
    begun = time.perf_counter()
    torch.manual_seed(0)
    network = UNetSpatioTemporalConditionModel.from_pretrained(given.folder / "unet", torch_dtype=torch.bfloat16)
    network.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=given.rank, lora_alpha=given.rank, target_modules=TARGETS), network)
    trained = [p for p in network.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    clips = torch.load(given.latents)
    network.train()
    seconds, first = [], 0.0
    for step in range(given.steps):
        at = time.perf_counter()
        loss = loss_of(network, clips[step % len(clips)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        first = first or time.perf_counter() - begun
        seconds.append(time.perf_counter() - at)
    at = time.perf_counter()
    given.out.mkdir()
    save_file(get_peft_model_state_dict(network), given.out / "adapter.safetensors")
    told = {"steps": seconds, "first": first, "save": time.perf_counter() - at}
    lines = Path("/proc/self/status").read_text().splitlines()
    told["mib"] = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    print(json.dumps(told))


if __name__ == "__main__":
    main()
