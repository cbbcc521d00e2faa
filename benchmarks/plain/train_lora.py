"""A LoRA of CogVideoX trained with diffusers and peft as their example does it: one loop, from latents or from clips.

python plain/train_lora.py FOLDER --steps N --latents FILE.pt    takes cached latents and text embeddings
python plain/train_lora.py FOLDER --steps N --clips FOLDER       encodes clips and captions in every step
Prints JSON: seconds of each step, of the start, of the save, and the peak of resident memory.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from peft import LoraConfig, get_peft_model_state_dict


def positions(network, latents: torch.Tensor):
    """Rotary positions of latents (B, F, C, H, W), or None for a network with tables of its own."""
    config = network.config
    if not config.use_rotary_positional_embeddings:
        return None
    rows, columns = (n // config.patch_size for n in latents.shape[-2:])
    return get_3d_rotary_pos_embed(
        config.attention_head_dim, ((0, 0), (rows, columns)), (rows, columns), latents.shape[1], device=latents.device
    )


class Clips:
    """Clips and captions that are encoded whenever they are asked for."""

    def __init__(self, folder: Path, clips: Path, frames: int) -> None:
        from transformers import AutoTokenizer, T5EncoderModel

        self.vae = AutoencoderKLCogVideoX.from_pretrained(folder / "vae", torch_dtype=torch.bfloat16)
        self.encoder = T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.bfloat16)
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        self.files, self.frames = sorted(clips.glob("*.mp4")), frames

    @torch.no_grad()
    def get(self, i: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scaled latents (1, F, C, H, W) and text (1, L, D)."""
        import decord

        path = self.files[i % len(self.files)]
        read = decord.VideoReader(str(path))
        pixels = torch.from_numpy(read.get_batch(range(self.frames)).asnumpy()).float().permute(3, 0, 1, 2)[None]
        mean = self.vae.encode((pixels / 127.5 - 1).to(self.vae.dtype)).latent_dist.sample()
        caption = path.with_suffix(".txt").read_text()
        tokens = self.tokenizer(
            caption, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        return (mean * self.vae.config.scaling_factor).transpose(1, 2), self.encoder(tokens)[0]


def main() -> None:
    """Load, train, save, tell."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("folder", type=Path)
    ask.add_argument("--steps", type=int, required=True)
    ask.add_argument("--rank", type=int, default=16)
    ask.add_argument("--latents", type=Path)
    ask.add_argument("--clips", type=Path)
    ask.add_argument("--frames", type=int, default=17)
    ask.add_argument("--out", type=Path, required=True)
    given = ask.parse_args()
    begun = time.perf_counter()
    torch.manual_seed(0)
    network = CogVideoXTransformer3DModel.from_pretrained(given.folder / "transformer", torch_dtype=torch.bfloat16)
    network.requires_grad_(False)
    scheduler = CogVideoXDPMScheduler.from_pretrained(given.folder / "scheduler")
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    network.add_adapter(LoraConfig(r=given.rank, lora_alpha=given.rank, init_lora_weights=True, target_modules=targets))
    trained = [p for p in network.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    cached = torch.load(given.latents) if given.latents else None
    clips = Clips(given.folder, given.clips, given.frames) if given.clips else None
    length = network.config.max_text_seq_length
    network.train()
    seconds, first = [], 0.0
    for step in range(given.steps):
        at = time.perf_counter()
        x, text = cached[step % len(cached)] if cached else clips.get(step, length)
        noise = torch.randn_like(x)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(x),))
        noisy = scheduler.add_noise(x, noise, t)
        with torch.autocast("cpu", torch.bfloat16):
            v = network(
                hidden_states=noisy.to(torch.bfloat16),
                encoder_hidden_states=text.to(torch.bfloat16),
                timestep=t,
                image_rotary_emb=positions(network, x),
                return_dict=False,
            )[0]
        x0 = scheduler.get_velocity(v, noisy, t)
        weight = (1 / (1 - scheduler.alphas_cumprod[t])).view(-1, 1, 1, 1, 1)
        loss = (weight * (x0.float() - x.float()) ** 2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        first = first or time.perf_counter() - begun
        seconds.append(time.perf_counter() - at)
    at = time.perf_counter()
    CogVideoXPipeline.save_lora_weights(given.out, transformer_lora_layers=get_peft_model_state_dict(network))
    told = {"steps": seconds, "first": first, "save": time.perf_counter() - at}
    lines = Path("/proc/self/status").read_text().splitlines()
    told["mib"] = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    print(json.dumps(told))


if __name__ == "__main__":
    main()
