"""The learned variance of a denoising step, trained by the variational bound (arXiv:2102.09672), as DiT does it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vgen.diffusion import Discrete


def bound(process: Discrete, x0: Tensor, x: Tensor, t: Tensor, noise: Tensor, share: Tensor) -> Tensor:
    """The bound of one step in bits for each number, a scalar: how far the network's step is from the true one.

    `x` is x0 with noise at the whole times t (B,); `noise` is what the network says of it, without gradients; `share`,
    -1 to 1, says where the step's log-variance lies between the true step's and the process's. Of the last step it is
    the negative log-likelihood of the data.
    """
    abar = process.abar.to(torch.promote_types(x.dtype, torch.float32)).to(x.device)
    before = torch.cat([torch.ones_like(abar[:1]), abar[:-1]])
    beta = 1 - abar / before
    true = beta * (1 - before) / (1 - abar)
    low = torch.cat([true[1:2], true[1:]]).log()  # the last step has no variance: that of the one before stands for it
    places = t.long().to(x.device)

    def at(values: Tensor) -> Tensor:
        return values[places].view(-1, *[1] * (x.ndim - 1))

    own = (x - (1 - at(abar)).sqrt() * noise) / at(abar).sqrt()
    ahead, back = before.sqrt() * beta / (1 - abar), (1 - before) * (abar / before).sqrt() / (1 - abar)
    high, low = at(beta.log()), at(low)
    log_variance = (share + 1) / 2 * (high - low) + low
    miss = at(ahead) * (x0 - own)
    apart = 0.5 * (log_variance - low - 1 + torch.exp(low - log_variance) + miss**2 * torch.exp(-log_variance))
    mean = at(ahead) * own + at(back) * x
    last = 0.5 * (math.log(2 * math.pi) + log_variance + (x0 - mean) ** 2 * torch.exp(-log_variance))
    return torch.where(at(torch.arange(len(abar), device=x.device)) == 0, last, apart).mean() / math.log(2)
