"""
TalkingFlow: talking-face landmarks from speech with a causal, conditional, weighted multi-scale normalizing flow.
The whole method in this one file: sound features, flow, prior, trainer, sampler, live stream. Read it top to bottom.

    python talkingflow.py train                   make synthetic talkers and train on them, minutes on a laptop CPU
    python talkingflow.py sample                  write a self-contained .html player: faces speak a held-out sound
    python talkingflow.py sample --audio me.wav   the same for your own sound
    python talkingflow.py stream < speech.pcm     one JSON line a frame, while the sound arrives

[1] Liang, Zhou, Li, Zhang, Bao: TalkingFlow, talking facial landmark generation with multi-scale normalizing flows
[2] Kingma, Dhariwal: Glow, arXiv 1807.03039          [3] Dinh, Sohl-Dickstein, Bengio: Real NVP, arXiv 1605.08803
[4] van den Oord et al.: PixelCNN decoders (the gate), arXiv 1606.05328

Glossary (the paper's symbol in brackets where it differs)
    B, T       clips in a batch, frames in a clip (25 a second)
    D, M       landmark coordinates a frame (68 points x, y = 136), mel bands a frame
    H, k, d    hidden channels, kernel size and dilation of the ConditionTCN
    L, K       scales, flow steps a scale (k_l)
    x, c       landmarks (B, T, D) in 0..1 coordinates, log-mel spectrogram (B, T, M)
    z^(l)      latent of scale l (B, T, d_l), l = 1 the deepest; lambda_l its variance under the prior
    s, t       log-scale and shift of a coupling; m(c) the prior's mean given the sound
Direction: forward is data -> noise (Eqs. 7-10), inverse is noise -> data. log p(x|c) = log p(z|c) + log|det dz/dx|,
with the determinant of every layer signed: a coupling adds +sum(s). The README lists where this differs from the paper.
"""

import dataclasses
import datetime
import json
import math
import os
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from csrc.gated_conv import kernel_runs, load_kernel
from media.console import CLEAR, Interrupt, UserError, write_atomically
from media.sound import Mel

# ----------------------------------------------------------------------------------------------------------------------
# Config: every number of a run. The comments are the text of --help.


@dataclasses.dataclass
class Config:
    """All numbers of a model and its training. Raises UserError where one is impossible."""

    # the model
    dim: int = (
        136  # D: landmark coordinates a frame, 68 points x, y (not in the paper; the data folder decides)
    )
    cond_dim: int = 40  # M: mel bands a frame (not in the paper; the data folder decides)
    hidden: int = 64  # H: channels of the ConditionTCN (not in the paper; the authors' code has 256)
    kernel_size: int = 2  # k: taps of each causal convolution (not in the paper; the authors' code has 3)
    dilations: tuple = (1, 2, 4, 8)  # of the ConditionTCN's layers (Sec. 2.2)
    num_scales: int = 4  # L (Sec. 3)
    steps_per_scale: int = 2  # K: flow steps a scale (not in the paper; the authors' code has 6)
    lambdas: tuple = (0.25, 0.5, 0.75, 1.0)  # variance of each scale's latent, deepest first (Sec. 3)
    prior: str = "ar2"  # "iid": Eq. 11; "ar2": Eq. 6 taken at its word, an autoregression over time
    prior_mean: bool = True  # centre the ar2 prior on a mean predicted from the sound (not in the paper)
    init: str = "data"  # "data": PCA and Burg start from a batch; "random": Glow's start (the paper)
    lead: int = (
        0  # frames of sound the model hears ahead, a fixed delay (not in the paper; the data folder decides)
    )
    scale_bound: float = 1.0  # |s| of a coupling stays below this (not in the paper)
    dropout: float = (
        0.15  # of the ConditionTCNs, a third for the prior's mean (not in the paper; the folder decides)
    )
    # training
    batch_size: int = 8  # clips a step, over all processes (Sec. 3: 128)
    seq_len: int = 80  # T: frames a training window (not in the paper; the authors' code has 3 s)
    steps: int = 4000  # optimiser steps; 0: as many as `epochs` takes (the data folder decides)
    epochs: int = 0  # passes over the training frames, where steps is 0 (Sec. 3: about 100)
    lr: float = 3e-3  # peak learning rate of Adam (Sec. 3: 1e-4)
    lr_final: float = 0.02  # cosine decay to this share of lr; 1: constant (the paper)
    warmup: int = 50  # steps of linear warm-up (not in the paper)
    weight_decay: float = 0.05  # on the weights of the ConditionTCNs only (not in the paper)
    grad_clip: float = 1.0  # largest gradient norm (not in the paper)
    mean_lr: float = 3.0  # learning rate of the prior's mean, times lr (not in the paper)
    mean_loss: float = (
        0.5  # start weight of the mean's own squared error, 0 after 70 % of training (not in the paper)
    )
    noise: float = (
        0.0022  # dequantisation noise in interocular distances (not in the paper; the data folder decides)
    )
    eval_interval: int = 200  # steps between validations
    seed: int = 0  # of the weights, the batches and the noise

    def __post_init__(self):
        self.dilations, self.lambdas = tuple(self.dilations), tuple(self.lambdas)
        at_least_one = (
            "dim cond_dim hidden kernel_size num_scales steps_per_scale batch_size seq_len eval_interval"
        )
        not_negative = "lead dropout steps epochs warmup weight_decay mean_loss noise seed"
        rules = [(name, getattr(self, name) >= 1, "at least 1") for name in at_least_one.split()]
        rules += [(name, 0 <= getattr(self, name) < math.inf, "0 or more") for name in not_negative.split()]
        above_0 = "lr mean_lr grad_clip scale_bound"
        rules += [(name, 0 < getattr(self, name) < math.inf, "above 0") for name in above_0.split()]
        rules += [
            ("dropout", self.dropout < 1, "below 1"),
            ("lr_final", 0 <= self.lr_final <= 1, "between 0 and 1"),
            ("prior", self.prior in ("ar2", "iid"), "ar2 or iid"),
            ("init", self.init in ("data", "random"), "data or random"),
            (
                "dilations",
                self.dilations and all(isinstance(d, int) and d >= 1 for d in self.dilations),
                "one or more whole numbers, each at least 1",
            ),
            (
                "lambdas",
                len(self.lambdas) == self.num_scales,
                f"one for each of the {self.num_scales} scales",
            ),
            ("lambdas", all(0 < v < math.inf for v in self.lambdas), "above 0"),
            ("dim", self.dim >= 2**self.num_scales, f"at least 2^num_scales = {2**self.num_scales}"),
            ("steps", self.steps or self.epochs, "steps or epochs above 0"),
            ("seed", self.seed < 2**63, "below 2^63"),
        ]
        for name, holds, expected in rules:
            if not holds:
                raise UserError(f"{name}: {getattr(self, name)} vs {expected}. Change --{name}")

    @staticmethod
    def preset(name):
        """`demo` fits a laptop CPU and moves like a person; `paper` is Section 3 to the letter, the authors' code where
        it is silent (steps a scale, hidden, kernel size), and needs a GPU. Mel bands, window, look-ahead, the bounds
        on s and on the gradient and the dequantisation noise are this project's."""
        if name not in ("demo", "paper"):
            raise UserError(f"preset: {name} vs demo or paper. Choose one of the two")
        return (
            Config()
            if name == "demo"
            else Config(
                cond_dim=80,
                hidden=256,
                kernel_size=3,
                steps_per_scale=6,
                prior="iid",
                prior_mean=False,
                init="random",
                dropout=0.0,
                batch_size=128,
                steps=0,
                epochs=100,
                lr=1e-4,
                lr_final=1.0,
                warmup=0,
                weight_decay=0.0,
                mean_loss=0.0,
            )
        )


# ----------------------------------------------------------------------------------------------------------------------
# The sound: a causal log-mel spectrogram, one column a video frame


# ----------------------------------------------------------------------------------------------------------------------
# The fused operator: causal dilated convolution + bias + conditioning + tanh * sigmoid gate (Fig. 1C, Sec. 2.2)


def gated_causal_conv_reference(x, weight, bias, cond, dilation):
    """The definition: tanh(a[:, :H]) * sigmoid(a[:, H:]),  a[:, o, t] = sum_ij weight[o, i, j] x[:, i, t - (k-1-j)
    dilation] + bias[o] + cond[:, o, t], with x = 0 before t = 0: output t sees inputs up to t only.

    x (B, C_in, T), weight (2H, C_in, k), bias (2H,) or None, cond (B, 2H, T) or None -> (B, H, T)
    """
    a = F.conv1d(
        F.pad(x, ((weight.shape[2] - 1) * dilation, 0)), weight, bias, dilation=dilation
    )  # (B, 2H, T)
    tanh, sigmoid = (a if cond is None else a + cond).chunk(2, 1)
    return torch.tanh(tanh) * torch.sigmoid(sigmoid)  # (B, H, T)


def gated_causal_conv(x, weight, bias, cond, dilation):
    """`gated_causal_conv_reference`, by the fused kernel where one runs (same shapes)."""
    if x.is_cuda and kernel_runs():
        return load_kernel()(x, weight, bias, cond, dilation)
    return gated_causal_conv_reference(x, weight, bias, cond, dilation)


# ----------------------------------------------------------------------------------------------------------------------
# ConditionTCN: the network of every coupling (Fig. 1C, Eq. 8)


class ConditionTCN(nn.Module):
    """Causal dilated convolutions, the sound added before each gate: x (B, T, C), c (B, T, M) -> (B, T, out).

    Output t sees x at the last 1 + (k-1) * sum(dilations) frames, and c at those that the layers after the first reach.
    The last layer starts at zero, so that a new coupling is the identity. `memory` carries each layer's last inputs
    from one block of a stream to the next.
    """

    def __init__(self, channels, out_channels, config):
        super().__init__()
        H, k = config.hidden, config.kernel_size
        sizes = [channels] + [H] * (len(config.dilations) - 1)
        self.layers = nn.ModuleList(
            nn.Conv1d(C, 2 * H, k, dilation=d) for C, d in zip(sizes, config.dilations)
        )
        self.cond = nn.Linear(
            config.cond_dim, 2 * H * len(self.layers), bias=False
        )  # all layers' conditioning at once
        self.out = nn.Linear(H, out_channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.dropout, self.precision = config.dropout, torch.float32  # the trainer makes it bfloat16 on a GPU

    def forward(self, x, c, memory=None):
        with torch.autocast(x.device.type, self.precision, enabled=self.precision != torch.float32):
            h = x.transpose(1, 2)  # (B, C, T)
            conds = self.cond(c).transpose(1, 2).chunk(len(self.layers), 1)  # (B, 2H, T) for each layer
            for layer, cond in zip(self.layers, conds):
                past = (layer.kernel_size[0] - 1) * layer.dilation[0]
                if (
                    memory is not None
                ):  # the layer's last inputs stand where the zero padding of a whole sequence would
                    h = torch.cat([memory.get(layer, h.new_zeros(len(h), h.shape[1], past)), h], 2)
                    memory[layer] = h[
                        :, :, h.shape[2] - past :
                    ].clone()  # a view would keep the whole block alive
                    cond = F.pad(cond, (past, 0))  # these outputs are cut off below
                h = gated_causal_conv(h, layer.weight, layer.bias, cond, layer.dilation[0])  # (B, H, T)
                h = F.dropout(h if memory is None else h[:, :, past:], self.dropout, self.training)
            return self.out(h.transpose(1, 2)).to(x.dtype)  # (B, T, out)


# ----------------------------------------------------------------------------------------------------------------------
# One step of the flow (Fig. 1B): ActNorm -> invertible 1x1 convolution -> affine coupling.
# Each works on every frame alike or looks at the past only, so dz/dx is block lower triangular over time: Eq. 1.


class ActNorm(nn.Module):
    """y = (x + bias) * exp(logs) for each coordinate: log-det T * sum(logs) [2]."""

    def __init__(self, dim):
        super().__init__()
        self.bias, self.logs = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        return (x + self.bias) * self.logs.exp(), x.shape[1] * self.logs.sum()

    def inverse(self, y):
        return y * (-self.logs).exp() - self.bias

    def initialize(self, x, variance):
        """Give each coordinate of x (B, T, D) mean 0 and the wanted variance."""
        std, mean = torch.std_mean(x.double(), (0, 1))
        self.bias.copy_(-mean)
        self.logs.copy_((variance**0.5 / std.clamp_min(1e-8)).log())


class InvertibleConv1x1(nn.Module):
    """y_t = W x_t with W = P L U [2]: log-det T * sum(log|diag U|), whatever the signs; starts as a random rotation."""

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("permutation", torch.empty(dim, dim))
        self.register_buffer("sign", torch.empty(dim))
        self.lower, self.upper = nn.Parameter(torch.empty(dim, dim)), nn.Parameter(torch.empty(dim, dim))
        self.log_diagonal = nn.Parameter(torch.empty(dim))
        self.set_matrix(torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))[0])

    @torch.no_grad()
    def set_matrix(self, W):
        """Take W (D, D) apart once; P and the signs stay fixed, the rest is learned."""
        P, lower, upper = torch.linalg.lu(W.double())
        diagonal = upper.diagonal()
        self.permutation.copy_(P), self.sign.copy_(diagonal.sign())
        self.lower.copy_(lower.tril(-1)), self.upper.copy_(upper.triu(1))
        self.log_diagonal.copy_(diagonal.abs().log())

    def matrix(self):
        lower = self.lower.tril(-1) + torch.eye(
            len(self.lower), dtype=self.lower.dtype, device=self.lower.device
        )
        return (
            self.permutation @ lower @ (self.upper.triu(1) + torch.diag(self.sign * self.log_diagonal.exp()))
        )

    def forward(self, x):
        return x @ self.matrix().T, x.shape[1] * self.log_diagonal.sum()

    def inverse(self, y, memory=None):
        inverse = None if memory is None else memory.get(self)
        if inverse is None:  # in float64: float32 inverses are the largest error of the whole inverse flow
            inverse = torch.linalg.inv(self.matrix().double()).to(y.dtype)
            if memory is not None:
                memory[self] = inverse
        return y @ inverse.T


class AffineCoupling(nn.Module):
    """Eqs. 7-9: the first half passes and decides, with the sound, how the second half is scaled and shifted."""

    def __init__(self, dim, config):
        super().__init__()
        self.sizes = [
            dim // 2,
            dim - dim // 2,
        ]  # any dim: an odd one gives its extra coordinate to the second half
        self.bound = config.scale_bound
        self.net = ConditionTCN(self.sizes[0], 2 * self.sizes[1], config)

    def scale_shift(self, xa, c, memory=None):
        s, t = self.net(xa, c, memory).chunk(2, 2)  # Eq. 8
        return self.bound * torch.tanh(
            s / self.bound
        ), t  # an unbounded exp(s) blows up the inverse before the loss

    def forward(self, x, c):
        xa, xb = x.split(self.sizes, 2)  # Eq. 7
        s, t = self.scale_shift(xa, c)
        return torch.cat([xa, s.exp() * xb + t], 2), s.sum((1, 2))  # Eq. 9; the log-det is sum(s), signed

    def inverse(self, y, c, memory=None):
        ya, yb = y.split(self.sizes, 2)
        s, t = self.scale_shift(
            ya, c, memory
        )  # ya is known for all frames at once: sampling is parallel in time
        return torch.cat([ya, (yb - t) * (-s).exp()], 2)


class FlowStep(nn.Module):
    """ActNorm -> 1x1 convolution -> coupling: x (B, T, D), c (B, T, M) -> y (B, T, D), log-det (B,)."""

    def __init__(self, dim, config):
        super().__init__()
        self.actnorm, self.conv, self.coupling = (
            ActNorm(dim),
            InvertibleConv1x1(dim),
            AffineCoupling(dim, config),
        )

    def forward(self, x, c):
        x, logdet_norm = self.actnorm(x)
        x, logdet_conv = self.conv(x)
        x, logdet = self.coupling(x, c)
        return x, logdet + logdet_norm + logdet_conv

    def inverse(self, y, c, memory=None):
        return self.actnorm.inverse(self.conv.inverse(self.coupling.inverse(y, c, memory), memory))


# ----------------------------------------------------------------------------------------------------------------------
# The prior of the latents. `iid` is Eq. 11. `ar2` is Eq. 6 at its word: z_t given z_<t and c.
# Couplings, ActNorms and 1x1 convolutions multiply to a matrix polynomial in the lag whose determinant is constant, so
# with an iid prior the (linearised) model spreads its log-volume evenly over all frequencies: smooth motion here must
# be paid for elsewhere, training does not find how, and the head trembles. A second-order autoregression per latent
# coordinate is the smallest cure, and the likelihood stays exact.


class Prior(nn.Module):
    """Density of the latents z (B, T, D), deepest scale first, with marginal variances lambda_l.

    ar2: r = z - m(c) is stationary, r_t = a1 r_{t-1} + a2 r_{t-2} + e_t for each coordinate by itself, given by its
    partial autocorrelations p1, p2 in (-1, 1): a2 = p2, a1 = p1 (1 - p2), var e = lambda (1 - p1^2)(1 - p2^2).
    """

    def __init__(self, sizes, config):
        super().__init__()
        variance = torch.cat(
            [torch.full((size,), float(value)) for size, value in zip(sizes, config.lambdas)]
        )
        self.register_buffer("variance", variance)  # (D,)
        self.ar2 = config.prior == "ar2"
        if self.ar2:
            self.partial = nn.Parameter(torch.zeros(2, len(variance)))  # atanh of p1, p2
        lighter = dataclasses.replace(
            config, dropout=config.dropout / 3
        )  # more slows the lips, none overfits
        has_mean = self.ar2 and config.prior_mean
        self.mean_net = ConditionTCN(config.cond_dim, len(variance), lighter) if has_mean else None

    def mean(self, c, memory=None):
        """m(c) (B, T, D); 0 without a mean network."""
        return self.mean_net(c, c, memory) if self.mean_net else c.new_zeros(())

    def partials(self):
        return 0.9995 * torch.tanh(
            self.partial
        )  # never quite 1: a constant coordinate keeps a finite density

    def recursion(self):
        """a1, a2 and var e of frame 0, of frame 1 and of all later ones, each (3, D): the first two know less."""
        p1, p2 = self.partials()
        zero, one = torch.zeros_like(p1), torch.ones_like(p1)
        share = torch.stack([one, 1 - p1**2, (1 - p1**2) * (1 - p2**2)])
        return torch.stack([zero, p1, p1 * (1 - p2)]), torch.stack([zero, zero, p2]), self.variance * share

    def log_prob(self, z, mean):
        """log p(z | m(c)) (B,), nats."""
        r, variance = z - mean, self.variance
        if self.ar2:
            frame = torch.arange(r.shape[1], device=r.device).clamp(max=2)
            a1, a2, variance = (v[frame] for v in self.recursion())  # (T, D) each
            before, before2 = (
                F.pad(r, (0, 0, 1, 0))[:, :-1],
                F.pad(r, (0, 0, 2, 0))[:, :-2],
            )  # r_{t-1}, r_{t-2}
            r = r - a1 * before - a2 * before2
        return -0.5 * (r**2 / variance + (2 * math.pi * variance).log()).expand_as(z).sum((1, 2))

    def sample(self, noise, c, memory):
        """Standard normal noise (B, T, D) -> a draw of z; memory carries the last two frames from block to block."""
        if not self.ar2:
            return noise * self.variance.sqrt()
        a1, a2, variance = self.recursion()
        std, zero = variance.sqrt(), torch.zeros_like(noise[:, 0])
        frame, before, before2 = memory.get(self, (0, zero, zero))
        frames = []
        for e in noise.unbind(1):  # the one recursion over time: a few numbers a frame
            i = min(frame, 2)
            before, before2, frame = a1[i] * before + a2[i] * before2 + std[i] * e, before, frame + 1
            frames.append(before)
        memory[self] = frame, before, before2
        return torch.stack(frames, 1) + self.mean(c, memory)

    def initialize(self, z):
        """Burg's estimate of p1, p2 from z (B, T, D): always stable, where Yule-Walker needs clamping."""
        if self.ar2 and z.shape[1] > 2:
            z = z.double()
            ahead, behind = z[:, 1:], z[:, :-1]
            p1 = 2 * (ahead * behind).sum((0, 1)) / (ahead**2 + behind**2).sum((0, 1))
            ahead, behind = (ahead - p1 * behind)[:, 1:], (behind - p1 * ahead)[:, :-1]
            p2 = 2 * (ahead * behind).sum((0, 1)) / (ahead**2 + behind**2).sum((0, 1))
            self.partial.copy_(torch.atanh((torch.stack([p1, p2]) / 0.9995).clamp(-0.9995, 0.9995)))


# ----------------------------------------------------------------------------------------------------------------------
# The weighted multi-scale flow (Fig. 1A, Eqs. 2-6, 10, 11)


class TalkingFlow(nn.Module):
    """An exact density p(x | c) of landmark sequences x (B, T, D) given sound c (B, T, M), any T >= 1, and its sampler.

    After each scale but the deepest the transformed half leaves as that scale's latent (Eq. 10) and the other half goes
    on: 136 -> 68 -> 34 -> 17 coordinates. z_t depends on x and c up to frame t only, and x_t on z and c up to t only.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        dims = [config.dim // 2**i for i in range(config.num_scales)]  # 136, 68, 34, 17
        self.scales = nn.ModuleList(
            nn.ModuleList(FlowStep(dim, config) for _ in range(config.steps_per_scale)) for dim in dims
        )
        self.sizes = [dims[-1]] + [dim - dim // 2 for dim in dims[-2::-1]]  # d_l, deepest first
        self.prior = Prior(self.sizes, config)
        self.register_buffer("cond_mean", torch.zeros(config.cond_dim))
        self.register_buffer("cond_std", torch.ones(config.cond_dim))
        self.register_buffer("initialized", torch.tensor(False))

    def _check(self, x, c):
        D, M = self.config.dim, self.config.cond_dim
        if x.dim() != 3 or c.dim() != 3 or x.shape[:2] != c.shape[:2] or x.shape[2] != D or c.shape[2] != M:
            raise UserError(
                f"shapes: x {tuple(x.shape)}, c {tuple(c.shape)} vs x (B, T, {D}), c (B, T, {M}). Check both"
            )

    def forward(self, x, c):
        """Data -> noise: a list of L latents (B, T, d_l) in the order of lambdas, and log|det dz/dx| (B,) in nats."""
        self._check(x, c)
        c = (c - self.cond_mean) / self.cond_std
        zs, logdet = [], x.new_zeros(len(x))
        for scale in self.scales:
            for step in scale:
                x, step_logdet = step(x, c)
                logdet = logdet + step_logdet
            if scale is not self.scales[-1]:
                x, z = x.tensor_split([x.shape[2] // 2], 2)  # Eq. 10
                zs.insert(0, z)
        return [x] + zs, logdet

    def inverse(self, zs, c, memory=None):
        """Noise -> data, exact: x (B, T, D) with forward(x, c) = zs. `memory`: see `stream`."""
        x, *zs = zs
        self._check(torch.cat([x, *zs], 2), c)
        c = (c - self.cond_mean) / self.cond_std
        for scale in reversed(self.scales):
            if scale is not self.scales[-1]:
                x, zs = torch.cat([x, zs[0]], 2), zs[1:]
            for step in reversed(scale):
                x = step.inverse(x, c, memory)
        return x

    def log_prob(self, x, c):
        """log p(x | c) in nats (B,): Eq. 11 with the signs mended and nothing divided away."""
        zs, logdet = self(x, c)
        return self.prior.log_prob(torch.cat(zs, 2), self.prior_mean(c)) + logdet

    def nll(self, x, c):
        """-log p(x | c) / (T D): nats per coordinate per frame (B,). p is a density, so this may well be negative."""
        return -self.log_prob(x, c) / (x.shape[1] * x.shape[2])

    def prior_mean(self, c):
        """m(c): where the prior expects the latents of this sound, (B, T, D), or a scalar 0."""
        return self.prior.mean((c - self.cond_mean) / self.cond_std)

    def sample(self, c, temperature=1.0, generator=None):
        """One draw of x (B, T, D) for the sound c (B, T, M); temperature 0 gives the flow's central face track."""
        return self.stream(len(c), temperature, generator).push(c)

    def stream(self, batch_size=1, temperature=1.0, generator=None):
        """A sampler that takes the sound block by block: see `Stream`."""
        return Stream(self, batch_size, temperature, generator)

    @torch.no_grad()
    def initialize(self, x, c):
        """The data-dependent start, once, from one large batch: every latent gets its prior's variance lambda_l.

        ActNorm standardises each step's input. With init="data" the first 1x1 convolution becomes the PCA of x, the
        others permutations (a rotation would mix slow and fast components again), and the prior's autocorrelations
        Burg's estimate.
        """
        if self.initialized:
            raise UserError("initialize: a second time vs once. Build a new TalkingFlow")
        self._check(x, c)
        std, mean = torch.std_mean(c.double(), (0, 1))
        self.cond_mean.copy_(mean), self.cond_std.copy_(std.clamp_min(1e-3))
        zs, h, c = [], x, (c - self.cond_mean) / self.cond_std
        for scale, variance in zip(self.scales, reversed(self.config.lambdas)):
            for step in scale:
                step.actnorm.initialize(h, variance)
                h = step.actnorm(h)[0]
                if self.config.init == "data":
                    step.conv.set_matrix(
                        pca(h, variance) if step is self.scales[0][0] else shuffle(h.shape[2])
                    )
                h = step.coupling(step.conv(h)[0], c)[0]
            if scale is not self.scales[-1]:
                h, z = h.tensor_split([h.shape[2] // 2], 2)
                zs.insert(0, z)
        if self.config.init == "data":
            self.prior.initialize(torch.cat([h] + zs, 2))
        self.initialized.fill_(True)


def pca(x, variance):
    """The matrix (D, D) that gives x (B, T, D) uncorrelated coordinates of this variance, smallest component first."""
    values, vectors = torch.linalg.eigh(torch.cov(x.double().flatten(0, 1).T))
    return (variance / values.clamp_min(values[-1] * 1e-8)).sqrt()[:, None] * vectors.T


def shuffle(dim):
    """A permutation (D, D), so that what passed one coupling may be changed by the next."""
    return torch.eye(dim, dtype=torch.float64)[torch.randperm(dim)]


class Stream:
    """Faces while the sound arrives. Each layer keeps its last few inputs, so the past need not be computed again, and
    blocks of any size give the frames of a whole-sequence sample, whose one block is the whole sound."""

    def __init__(self, flow, batch_size, temperature, generator):
        self.flow, self.batch_size, self.temperature, self.generator = (
            flow,
            batch_size,
            temperature,
            generator,
        )
        self.memory = {}  # layer -> its last inputs, prior -> its last two frames, 1x1 convolution -> its inverse

    @torch.no_grad()
    def push(self, c):
        """The next block of sound c (B, n, M) -> its landmarks (B, n, D)."""
        flow, training = self.flow, self.flow.training
        size = self.batch_size, flow.config.dim
        if c.dim() != 3 or c.shape[::2] != (self.batch_size, flow.config.cond_dim):
            raise UserError(
                f"sound block: {tuple(c.shape)} vs ({self.batch_size}, n, {flow.config.cond_dim}). "
                "Check its shape"
            )
        if c.shape[1] == 0:
            return c.new_zeros(size[0], 0, size[1])
        # frame by frame, so that the block sizes do not change the numbers drawn
        noise = [torch.randn(size, generator=self.generator, dtype=c.dtype) for _ in range(c.shape[1])]
        noise = torch.stack(noise, 1).to(c.device)
        flow.eval()  # no dropout in a sampler
        try:
            scaled = (c - flow.cond_mean) / flow.cond_std
            z = flow.prior.sample(noise * self.temperature, scaled, self.memory)
            return flow.inverse(z.split(flow.sizes, 2), c, self.memory)
        finally:
            flow.train(training)


# ----------------------------------------------------------------------------------------------------------------------
# Data: a training folder as prepare_data.py writes it (plain .npy files, memory-mapped, and meta.json)


class Clips:
    """The clips of a training folder, read when asked for: 17 hours or 17 seconds cost the same memory."""

    def __init__(self, folder):
        self.folder = Path(folder)
        path = self.folder / "meta.json"
        if not path.is_file():
            raise UserError(
                f"{self.folder}: no meta.json vs a folder made by prepare_data.py. "
                f"Run: python prepare_data.py SRC --out {self.folder}"
            )
        try:
            self.meta = json.loads(path.read_text())
            self.clips, self.fps = self.meta["clips"], self.meta["fps"]
            self.landmarks, self.mel, self.audio = (
                np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in ("landmarks", "mel", "audio")
            )
            frames = sum(clip["frames"] for clip in self.clips)
        except (OSError, ValueError, KeyError, EOFError, TypeError) as e:
            raise UserError(
                f"{self.folder}: unreadable ({e}) vs a folder made by prepare_data.py. "
                "Prepare it again with --force"
            )
        if self.meta.get("format") != 1 or not len(self.landmarks) == len(self.mel) >= frames:
            found = f"{len(self.landmarks)} frames of landmarks, {len(self.mel)} of sound"
            raise UserError(f"{self.folder}: {found} vs {frames} in meta.json. Prepare it again with --force")
        self.dim, self.cond_dim = self.landmarks.shape[1], self.mel.shape[1]

    def split(self, name):
        return [clip for clip in self.clips if clip["split"] == name]

    def window_length(self, longest):
        """The longest window, up to `longest` frames, that at least 95 % of the training clips can fill."""
        lengths = sorted(clip["frames"] for clip in self.split("train"))
        if not lengths:
            raise UserError(f"{self.folder}: no clip in the training split vs at least 1. Prepare more data")
        return min(longest, lengths[len(lengths) // 20])

    def windows(self, split, T, limit=None):
        """(clip, first frame) of the windows of T frames that tile a split's clips; at most `limit`, evenly chosen."""
        tiles = [(clip, s) for clip in self.split(split) for s in range(0, clip["frames"] - T + 1, T)]
        return (
            tiles
            if limit is None or len(tiles) <= limit
            else [tiles[i * len(tiles) // limit] for i in range(limit)]
        )

    def draw(self, count, T, generator):
        """`count` random training windows; every frame that can start one is as likely as any other."""
        clips = [clip for clip in self.split("train") if clip["frames"] >= T]
        starts = np.cumsum([clip["frames"] - T + 1 for clip in clips])
        picks = torch.randint(int(starts[-1]), (count,), generator=generator).numpy()
        chosen = np.searchsorted(starts, picks, side="right")
        return [(clips[i], int(starts[i] - 1 - pick)) for i, pick in zip(chosen, picks)]

    def batch(self, windows, T, lead=0, noise=0.0, generator=None):
        """Landmarks x (B, T, D) plus noise of `noise` interocular distances, sound c (B, T, M) heard `lead` ahead."""
        x, c = [], []
        for clip, s in windows:
            ahead = np.minimum(
                np.arange(s, s + T) + lead, clip["frames"] - 1
            )  # a clip's last column is repeated
            x.append(self.landmarks[clip["start"] + s : clip["start"] + s + T])
            c.append(self.mel[clip["start"] + ahead])
        x, c = torch.from_numpy(np.stack(x)), torch.from_numpy(np.stack(c))
        if noise:
            x = x + noise * self.meta["interocular"] * torch.randn(x.shape, generator=generator)
        return x, c


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: plain dicts and tensors, written whole or not at all


def read_checkpoint(path):
    """The dict in a checkpoint file. Runs no code from it and refuses a damaged one: torch.load checks no CRC."""
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: {'a folder' if path.is_dir() else 'no such file'} vs a checkpoint. "
            "Train one: python talkingflow.py train"
        )
    try:
        if path.read_bytes()[:40].startswith(b"version https://git-lfs"):
            raise ValueError("a git-lfs pointer, fetch the file itself")
        damaged = zipfile.ZipFile(path).testzip()
        if damaged:
            raise ValueError(f"damaged at {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != 1:
            raise ValueError(f"format {state['format']}")
        return state
    except (
        Exception
    ) as e:  # zipfile, pickle and torch raise a dozen kinds for the same thing: not a checkpoint
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UserError(
            f"{path}: unreadable ({reason}) vs a TalkingFlow checkpoint. Use another one or train again"
        )


def load_checkpoint(path, device="cpu"):
    """A trained flow, ready to sample, and the dict it came from (config, data, step, val_nll)."""
    state = read_checkpoint(path)
    try:
        flow = TalkingFlow(Config(**state["config"]))
        flow.load_state_dict(state["model"])
    except (TypeError, KeyError, RuntimeError) as e:
        raise UserError(
            f"{path}: {str(e).splitlines()[-1].strip()} vs this version's model. Use the code that trained it"
        )
    return flow.eval().to(device), state


def describe(clips):
    """What a checkpoint remembers of its training data, to hear new sounds in the same way and to name its sources."""
    keys = ("mel", "fps", "layout", "normalisation", "interocular", "sources", "fingerprint")
    return {key: clips.meta[key] for key in keys} | {"folder": str(clips.folder.resolve())}


# ----------------------------------------------------------------------------------------------------------------------
# Training


class Objective(nn.Module):
    """What is minimised, in one forward call so that DistributedDataParallel sees all of it."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, x, c, mean_weight):
        """Mean NLL of x (B, T, D) given c (B, T, M), nats per coordinate per frame, and the loss to minimise.

        Under the ar2 prior m(c) is fitted through the filter 1 - a1 q - a2 q^2 (q: one frame earlier), that is on the
        fastest movements only. Its own squared error, added and faded out in training, first teaches it the whole
        mouth; the likelihood then takes back what was too much.
        """
        zs, logdet = self.flow(x, c)
        z, mean, prior = torch.cat(zs, 2), self.flow.prior_mean(c), self.flow.prior
        nll = -(prior.log_prob(z, mean) + logdet).mean() / (x.shape[1] * x.shape[2])
        return nll, nll + mean_weight * ((z.detach() - mean) ** 2 / prior.variance.detach()).mean()


def build_optimizer(flow, config):
    """Adam; decay on the ConditionTCNs' weights only: a rotation or an autocorrelation near 0 is no simpler."""
    groups = {}
    for name, parameter in flow.named_parameters():
        mean, decays = "mean_net" in name, "net." in name and parameter.dim() > 1
        groups.setdefault((mean, decays), []).append(parameter)
    groups = [
        {
            "params": p,
            "scale": config.mean_lr if mean else 1.0,
            "weight_decay": config.weight_decay * decays / (config.mean_lr if mean else 1.0),
        }  # the same decay a step
        for (mean, decays), p in groups.items()
    ]
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def schedule(step, steps, config):
    """Learning rate as a share of the peak: linear warm-up, then cosine to lr_final."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1, step / steps)))
    return min(1, (step + 1) / (config.warmup + 1)) * (config.lr_final + (1 - config.lr_final) * cosine)


@torch.no_grad()
def validate(flow, batches):
    """Mean NLL over fixed batches, dropout off."""
    flow.eval()
    nll = torch.cat([flow.nll(x, c) for x, c in batches]).mean()
    flow.train()
    return float(nll)


def fixed_batches(clips, split, T, config, device, limit=96):
    """Up to `limit` windows of a split with noise that never changes, so that two validations can be compared."""
    generator, windows = torch.Generator().manual_seed(0), clips.windows(split, T, limit)
    blocks = [windows[i : i + 32] for i in range(0, len(windows), 32)]
    return [[v.to(device) for v in clips.batch(b, T, config.lead, config.noise, generator)] for b in blocks]


def start_flow(config, clips, T):
    """A new flow with its data-dependent start, the same in every process."""
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    x, c = clips.batch(clips.draw(400, T, generator), T, config.lead, config.noise, generator)
    for name, values in (("landmarks", x), ("sound", c)):
        if not values.isfinite().all():
            raise UserError(
                f"{clips.folder}: NaN or Inf in the {name} vs finite numbers. Prepare it again with --force"
            )
    still = (x.std((0, 1)) < 1e-6).nonzero().flatten().tolist()
    if still:
        raise UserError(
            f"{clips.folder}: coordinates {still[:8]} never move vs a density of moving points. "
            "Train with --noise 0.0022 or mend the landmarks"
        )
    flow = TalkingFlow(config)
    flow.initialize(x, c)
    return flow


def choose_device(name):
    """auto: this process's GPU where there is one."""
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as e:
        raise UserError(
            f"device: {name} ({str(e).splitlines()[0]}) vs one that torch can use. Try --device cpu"
        )
    return torch.device(name)


class Trainer:
    """One training run. Under torchrun every process takes its share of each batch and rank 0 alone writes.

    config, clips: what to train, on what. out: the run's folder. state: the dict of resume.pt to go on from.
    """

    def __init__(self, config, clips, out, device="auto", state=None):
        self.config, self.clips, self.out, self.device = config, clips, Path(out), choose_device(device)
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if config.batch_size % self.world:
            raise UserError(
                f"batch_size: {config.batch_size} vs a multiple of {self.world} processes. "
                "Change --batch_size"
            )
        self.T = clips.window_length(config.seq_len)
        self.steps = config.steps or math.ceil(
            config.epochs * len(clips.windows("train", self.T)) / config.batch_size
        )
        load_kernel()  # says on stderr which backend runs the networks, and why
        if self.device.type == "cpu" and config.hidden <= 64 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(
                1
            )  # tensors this small gain nothing from more, and lose much on a busy machine
        self.held = {
            split: fixed_batches(clips, split, self.T, config, self.device) for split in ("train", "val")
        }
        if not self.held["val"]:
            raise UserError(
                f"{clips.folder}: no validation window of {self.T} frames vs at least 1. "
                "Prepare more clips or lower --seq_len"
            )
        flow = (TalkingFlow(config) if state else start_flow(config, clips, self.T)).to(self.device)
        self.flow, self.optimizer = flow, build_optimizer(flow, config)
        self.step, self.best, self.skipped = 0, math.inf, 0
        start = state["step"] if state else 0  # a run that goes on with several processes sees new windows
        self.generator = torch.Generator().manual_seed(
            config.seed + 1000003 * (self.rank + 1) + start
        )  # and noise
        torch.manual_seed(config.seed + 1000003 * self.rank + start)  # dropout
        if state:
            self.step, self.best = state["step"], state["best"]
            flow.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.world == 1:
                self.generator.set_state(state["generator"])
                torch.set_rng_state(state["torch_rng"])
        if self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (8, 0):
            # the networks in bfloat16; the flow around them stays float32, so its inverse stays exact
            for net in flow.modules():
                if isinstance(net, ConditionTCN):
                    net.precision = torch.bfloat16
        self.model = Objective(flow)
        if self.world > 1:  # wrapped after the data-dependent start, which is the same in all processes
            torch.distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            self.model = nn.parallel.DistributedDataParallel(self.model)

    def train_step(self):
        """One step of Adam on a fresh batch; a step whose gradient is not finite changes nothing and is named."""
        config, step = self.config, self.step
        share = schedule(step, self.steps, config)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * share * group["scale"]
        windows = self.clips.draw(config.batch_size // self.world, self.T, self.generator)
        x, c = self.clips.batch(windows, self.T, config.lead, config.noise, self.generator)
        fade = max(0.0, 1 - step / (0.7 * self.steps))
        nll, loss = self.model(x.to(self.device), c.to(self.device), config.mean_loss * fade)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.flow.parameters(), config.grad_clip)
        self.step += 1
        if torch.isfinite(norm):
            self.optimizer.step()
            self.skipped = 0
            return
        self.skipped += 1
        names = ", ".join(clip["name"] for clip, _ in windows[:4])
        print(
            f"step {self.step}: gradient not finite (nll {nll.item():.3f}; clips {names}, ...), skipped",
            flush=True,
        )
        if self.skipped == 5:
            raise UserError(
                f"step {self.step}: 5 gradients in a row not finite vs finite ones. "
                f"{self.out / 'checkpoint.pt'} keeps the last good weights; lower --lr or mend these clips"
            )

    def log(self, seconds):
        """Validate, append to log.jsonl, print, keep the best weights and everything that --resume needs."""
        nlls = {f"{split}_nll": validate(self.flow, batches) for split, batches in self.held.items()}
        speed = self.config.batch_size * self.T / seconds  # of a step
        entry = {"step": self.step, **nlls, "frames_per_second": round(speed)}
        left = datetime.timedelta(seconds=round((self.steps - self.step) * seconds))
        print(
            f"{CLEAR}step {self.step:5d}/{self.steps}: train nll {nlls['train_nll']:.4f} "
            f"val nll {nlls['val_nll']:.4f} | {seconds * 1000:.0f} ms a step | {speed:,.0f} frames/s | "
            f"{left} left",
            flush=True,
        )
        with open(self.out / "log.jsonl", "a") as f:
            f.write(json.dumps(entry) + "\n")
        if nlls["val_nll"] < self.best:  # never true for NaN
            self.best = nlls["val_nll"]
            self.save("checkpoint.pt", val_nll=self.best)
        self.save_resume()

    def save(self, name, **more):
        state = {
            "format": 1,
            "config": dataclasses.asdict(self.config),
            "data": describe(self.clips),
            "step": self.step,
            "model": self.flow.state_dict(),
            **more,
        }
        write_atomically(self.out / name, lambda path: torch.save(state, path))

    def save_resume(self):
        self.save(
            "resume.pt",
            best=self.best,
            optimizer=self.optimizer.state_dict(),
            generator=self.generator.get_state(),
            torch_rng=torch.get_rng_state(),
        )

    def stop_asked(self, interrupt):
        """The number of a signal that any process got: all of them stop after the same step."""
        if self.world == 1:
            return interrupt.signal
        flag = torch.tensor(interrupt.signal, device=self.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return int(flag)

    def run(self):
        """Train to the last step or the first signal; returns that signal's number, or 0."""
        clock, done, signalled = time.perf_counter(), self.step, 0
        with Interrupt() as interrupt:
            while self.step < self.steps and not signalled:
                self.train_step()
                signalled = self.step < self.steps and self.stop_asked(interrupt)  # the last one just ends
                seconds = (time.perf_counter() - clock) / (self.step - done)
                due = self.step in (1, self.steps) or self.step % self.config.eval_interval == 0
                if self.rank == 0 and due and not signalled:
                    self.log(seconds)
                    clock, done = time.perf_counter(), self.step
                elif self.rank == 0 and CLEAR and self.step % 10 == 0:
                    print(
                        f"{CLEAR}step {self.step}/{self.steps}  {1 / seconds:.1f} steps/s", end="", flush=True
                    )
            if self.rank == 0 and signalled:
                self.save_resume()
        return signalled


# ----------------------------------------------------------------------------------------------------------------------
# Sampling: sound in, landmarks out


class Talker:
    """K faces that speak one sound, block by block: samples of the sound in, landmarks (K, n, D) out.

    A face hears `lead` frames ahead, so its frames come that much later; `finish` returns the last of them. Each face
    draws its own noise (seed, seed + 1, ...), so the number of faces does not change any of them.
    """

    def __init__(self, flow, data, sample_rate, faces=1, temperature=1.0, seed=0):
        self.mel = Mel(**data["mel"], fps=data["fps"], sample_rate=sample_rate)
        self.lead, self.device = flow.config.lead, flow.cond_mean.device
        self.streams = [
            flow.stream(1, temperature, torch.Generator().manual_seed(seed + i)) for i in range(faces)
        ]
        self.waiting = self.lead  # the first columns are only ever heard ahead
        self.last = np.zeros((0, len(self.mel.bank)), np.float32)

    def speak(self, columns):
        """Log-mel columns (n, M) -> landmarks (K, n', D), n' < n while the look-ahead fills."""
        skip = min(self.waiting, len(columns))
        self.waiting -= skip
        self.last = columns[-1:] if len(columns) else self.last
        c = torch.from_numpy(columns[skip:])[None].to(self.device)
        return np.concatenate([stream.push(c).cpu().numpy() for stream in self.streams])

    def push(self, samples):
        return self.speak(self.mel.push(samples))

    def finish(self):
        """The frames whose look-ahead lies beyond the end of the sound: its last column stands in."""
        missing, self.waiting = (
            self.lead - self.waiting,
            0,
        )  # fewer if the sound is shorter than the look-ahead
        return self.speak(np.repeat(self.last, missing, 0))


# ----------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    """Run a command line -> exit status: the commands are in cli.py."""
    import cli

    return cli.main(argv)


if __name__ == "__main__":
    sys.exit(main())
