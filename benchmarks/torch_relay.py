"""A relay stage in PyTorch: training step and sampler, the plain way, as the baseline of
benchmarks.pytorch.

The equations are those of relay_jax.diffusion (arXiv 2309.03350, 2206.00364) for a process with
`patch`, and plain EDM for one without. Images are [b, c, h, w].
"""

import copy
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.torch_unet import TorchUNet
from relay_jax.stage import Stage


class TorchStage:
    """Network, Adam, moving average and the two processes of a stage. device: 'cpu' or 'cuda'."""

    def __init__(
        self, stage: Stage, params: dict, device: str, half: bool, channels_last: bool
    ) -> None:
        net: Any = stage.network
        self.stage, self.device, self.half = stage, device, half
        self.model = TorchUNet(
            resolution=net.resolution,
            channels=net.channels,
            multipliers=net.multipliers,
            blocks=net.blocks,
            attention=net.attention,
            head_width=net.head_width,
            num_classes=net.num_classes,
            num_augment=net.num_augment,
            dropout=net.dropout,
        )
        self.model.load_flax(params)
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.model = self.model.to(device, memory_format=self.format)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=stage.train.learning_rate, fused=True
        )
        self.relay: Any = stage.process if stage.starts_from_images else None
        self.call = self.model
        if self.relay:
            p = self.relay.patch
            k, i = np.arange(p)[:, None], np.arange(p)[None]
            dct = np.sqrt(np.where(k == 0, 1, 2) / p) * np.cos(np.pi * k * (2 * i + 1) / (2 * p))
            self.dct = torch.tensor(dct, dtype=torch.float32, device=device)
            self.frequency = torch.arange(p, device=device) * (math.pi / p)

    def denoise(
        self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None
    ) -> torch.Tensor:
        """EDM preconditioning. sigma: [b]."""
        s, sd = sigma[:, None, None, None], self.stage.process.sigma_data
        total = s**2 + sd**2
        inputs = (x * total.rsqrt()).contiguous(memory_format=self.format)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.half):
            raw = self.call(inputs, sigma.log() / 4, labels)
        return sd**2 / total * x + s * sd * total.rsqrt() * raw.float()

    def blur(self, x: torch.Tensor, blur_sigma: torch.Tensor) -> torch.Tensor:
        """Attenuates the DCT of every patch. blur_sigma: [b]."""
        assert self.relay
        (b, c, h, w), p, least = x.shape, self.relay.patch, self.relay.min_scale
        decay = torch.exp(-0.5 * (blur_sigma[:, None] * self.frequency) ** 2)
        matrix = self.dct.T @ (decay[:, :, None] * self.dct)  # [b, p, p]
        patches = x.reshape(b, c, h // p, p, w // p, p)
        blurred = torch.einsum("bij,bcyjxk,blk->bcyixl", matrix, patches, matrix)
        return least * x + (1 - least) * blurred.reshape(b, c, h, w)

    def noise(self, shape: torch.Size) -> torch.Tensor:
        white = torch.randn(shape, device=self.device)
        if not self.relay:
            return white
        p = self.relay.patch
        wide = F.pad(torch.randn(shape, device=self.device), (p - 1, 0, p - 1, 0), mode="circular")
        return white + self.relay.block_noise_scale * p * F.avg_pool2d(wide, p, stride=1)

    def loss(self, images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        process, count = self.stage.process, len(images)
        noisy = images
        if self.relay:
            floor = 0.5 * math.erfc(
                -(math.log(self.relay.sigma_floor) - process.P_mean) / process.P_std / math.sqrt(2)
            )
            u = torch.rand(count, device=self.device).clamp_min(self.relay.cdf_max * floor)
            sigma = torch.exp(
                process.P_mean + process.P_std * torch.special.ndtri(self.relay.cdf_max * u)
            )
            noisy = self.blur(images, self.relay.blur_sigma_max * torch.sin(math.pi / 2 * u) ** 2)
        else:
            sigma = torch.exp(
                process.P_mean + process.P_std * torch.randn(count, device=self.device)
            )
        weight = ((sigma**2 + process.sigma_data**2) / (sigma * process.sigma_data) ** 2).clamp_max(
            process.weight_max
        )
        denoised = self.denoise(
            noisy + sigma[:, None, None, None] * self.noise(images.shape), sigma, labels
        )
        return (weight[:, None, None, None] * (denoised - images) ** 2).mean()

    def train_step(self, images: torch.Tensor, labels: torch.Tensor | None) -> float:
        """images: uint8."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(images.float() / 127.5 - 1, labels)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.model.parameters()), 0.01
            )
        return float(loss.detach())

    @torch.inference_mode()
    def sample(self, start: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """The stochastic Heun sampler from latents, or from the up-sampled images of the stage
        before."""
        self.model.eval()
        sampler: Any = self.stage.sampler
        sigmas, fresh = sampler.levels(), sampler.fresh_noise
        blurs = self.stage.sample_process.blur_sigma_at(sigmas)
        assert not sampler.s_churn
        ones = torch.ones(len(start), device=self.device)
        x = start + sigmas[0] * self.noise(start.shape) if self.relay else start * sigmas[0]

        def update(x: torch.Tensor, denoised: torch.Tensor, i: int) -> torch.Tensor:
            keep = math.sqrt(1 - fresh**2) * sigmas[i + 1] / sigmas[i]
            now = self.blur(denoised, blurs[i] * ones) if self.relay else denoised
            later = self.blur(denoised, blurs[i + 1] * ones) if self.relay else denoised
            moved = keep * (x - now) + later
            return moved + fresh * sigmas[i + 1] * self.noise(x.shape) if fresh else moved

        for i in range(len(sigmas) - 1):
            denoised = self.denoise(x, sigmas[i] * ones.float(), labels)
            predicted = update(x, denoised, i)
            if sigmas[i + 1] > 0:
                again = self.denoise(predicted, sigmas[i + 1] * ones.float(), labels)
                slope = (predicted - again) / sigmas[i + 1]
                denoised = (denoised + x - sigmas[i] * slope) / 2
                predicted = update(x, denoised, i)
            x = predicted
        return x
