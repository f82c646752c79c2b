"""
TalkingFlow: talking-face landmarks from speech with a causal, conditional, weighted multi-scale normalizing flow.
The whole method in this one file: sound features, flow, prior, trainer, sampler, live stream. Read it top to bottom.

    python talkingflow.py train                   makes its own synthetic talkers and trains on them, minutes on a laptop CPU
    python talkingflow.py sample                  writes a self-contained .html player: sampled faces speak a held-out sound
    python talkingflow.py sample --audio me.wav   the same for your own sound
    python talkingflow.py stream < speech.pcm     one JSON line a frame, while the sound arrives

[1] Liang, Zhou, Li, Zhang, Bao: TalkingFlow: talking facial landmark generation with multi-scale normalizing flow networks
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
Direction: forward is data -> noise (Eqs. 7-10), inverse is noise -> data. log p(x|c) = log p(z|c) + log|det dz/dx|, with
the determinant of every layer signed: a coupling adds +sum(s). The README lists where this differs from the paper.
"""

import argparse
import base64
import dataclasses
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


class UserError(ValueError):
    """Something the user can mend. The command line prints it as one line, `error: <what>: <found> vs <expected>. <fix>`."""


# ----------------------------------------------------------------------------------------------------------------------
# Config: every number of a run. The comments are the text of --help.


@dataclass
class Config:
    # the model
    dim: int = 136  # D: landmark coordinates a frame, 68 points x, y (not in the paper; the data folder decides)
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
    lead: int = 0  # frames of sound the model hears ahead, a fixed delay (not in the paper; the data folder decides)
    scale_bound: float = 2.0  # |s| of a coupling stays below this (not in the paper)
    dropout: float = 0.1  # in the ConditionTCNs (not in the paper)
    # training
    batch_size: int = 8  # clips a step, over all processes (Sec. 3: 128)
    seq_len: int = 80  # T: frames a training window (not in the paper; the authors' code has 3 s)
    steps: int = 2400  # optimiser steps; 0: as many as `epochs` takes
    epochs: int = 0  # passes over the training frames, where steps is 0 (Sec. 3: about 100)
    lr: float = 3e-3  # peak learning rate of Adam (Sec. 3: 1e-4)
    lr_final: float = 0.02  # cosine decay to this share of lr; 1: constant (the paper)
    warmup: int = 50  # steps of linear warm-up (not in the paper)
    weight_decay: float = 0.05  # on the weights of the ConditionTCNs only (not in the paper)
    grad_clip: float = 1.0  # largest gradient norm (not in the paper)
    mean_lr: float = 3.0  # learning rate of the prior's mean, times lr (not in the paper)
    mean_loss: float = 0.5  # start weight of the mean's own squared error, 0 after 70 % of training (not in the paper)
    noise: float = 0.0022  # dequantisation noise in interocular distances (not in the paper; the data folder decides)
    eval_interval: int = 200  # steps between validations
    seed: int = 0  # of the weights, the batches and the noise

    def __post_init__(self):
        self.dilations, self.lambdas = tuple(self.dilations), tuple(self.lambdas)
        at_least_one = ("dim", "cond_dim", "hidden", "kernel_size", "num_scales", "steps_per_scale", "batch_size", "seq_len",
                        "eval_interval")  # fmt: skip
        not_negative = ("lead", "dropout", "steps", "epochs", "warmup", "weight_decay", "mean_lr", "mean_loss", "noise", "seed")
        rules = [(name, getattr(self, name) >= 1, "at least 1") for name in at_least_one]
        rules += [(name, 0 <= getattr(self, name) < math.inf, "0 or more") for name in not_negative]
        rules += [(name, 0 < getattr(self, name) < math.inf, "above 0") for name in ("lr", "grad_clip", "scale_bound")]
        rules += [
            ("dropout", self.dropout < 1, "below 1"),
            ("lr_final", 0 <= self.lr_final <= 1, "between 0 and 1"),
            ("prior", self.prior in ("ar2", "iid"), "ar2 or iid"),
            ("init", self.init in ("data", "random"), "data or random"),
            ("dilations", len(self.dilations) >= 1 and min(self.dilations) >= 1, "one or more, each at least 1"),
            ("lambdas", len(self.lambdas) == self.num_scales, f"one for each of the {self.num_scales} scales"),
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
        """`demo` fits a laptop CPU and moves like a person; `paper` is Section 3 to the letter, the authors' code where it is
        silent (steps a scale, hidden, kernel size), and needs a GPU."""
        if name not in ("demo", "paper"):
            raise UserError(f"preset: {name} vs demo or paper. Choose one of the two")
        return Config() if name == "demo" else Config(
            cond_dim=80, hidden=256, kernel_size=3, steps_per_scale=6, prior="iid", prior_mean=False, init="random",
            scale_bound=1.0, dropout=0.0, batch_size=128, steps=0, epochs=100, lr=1e-4, lr_final=1.0, warmup=0,
            weight_decay=0.0, mean_loss=0.0)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# The sound: a causal log-mel spectrogram, one column a video frame


class Mel:
    """Causal log-mel spectrogram: column t sees the samples before (t + 1) / fps seconds and no later one.

    n_mels bands between fmin and fmax (Hz), a Hann window of `window` seconds. Power is divided by the window's squared sum
    and the bands are defined in Hz, so that one sound gives the same numbers at any sample rate: no resampler is needed.
    `level` divides by the whole sound's 95th-percentile frame energy, for voices and microphones never heard in training.
    """

    def __init__(self, n_mels=40, fmin=0.0, fmax=8000.0, window=0.064, level=False, fps=25, sample_rate=16000):
        import librosa  # takes a second to import: only those who listen pay for it

        if sample_rate < 4000:
            raise UserError(f"sample rate: {sample_rate} Hz vs at least 4000. Speech needs the bands above 1 kHz")
        self.fps, self.sample_rate, self.level = fps, sample_rate, level
        self.size = round(window * sample_rate)
        self.hann = np.hanning(self.size + 1)[:-1].astype(np.float32)
        with warnings.catch_warnings():  # a band above half the sample rate is empty and stays at the floor
            warnings.simplefilter("ignore")
            bank = librosa.filters.mel(sr=sample_rate, n_fft=self.size, n_mels=n_mels, fmin=fmin, fmax=fmax)
        self.bank = bank / self.hann.sum() ** 2  # (M, bins)
        self.past, self.frame, self.first = np.zeros(0, np.float32), 0, 0  # samples kept, columns done, index of past[0]

    def _power(self, samples, first, start, stop):
        """Mel power of columns start..stop-1 of a sound whose sample number `first` is samples[0]; zeros before sample 0."""
        ends = np.arange(start + 1, stop + 1) * self.sample_rate // self.fps - first  # exact at any frame rate
        samples = np.concatenate([np.zeros(self.size, np.float32), samples])
        power = [np.zeros((0, len(self.bank)), np.float32)]
        for block in np.array_split(ends, len(ends) // 4096 + 1):
            windows = samples[block[:, None] + np.arange(self.size)]  # (T, window)
            power.append((np.abs(np.fft.rfft(windows * self.hann)) ** 2).astype(np.float32) @ self.bank.T)
        return np.concatenate(power)

    def columns(self, audio):
        """Samples (S,) in -1..1 -> log-mel (T, M) float32, T = floor(S * fps / sample_rate)."""
        audio = np.asarray(audio, np.float32)
        power = self._power(audio, 0, 0, len(audio) * self.fps // self.sample_rate)
        if self.level and len(power):
            power = power / max(np.percentile(power.mean(1), 95), 1e-12)
        return np.log(np.maximum(power, 1e-10))

    def push(self, samples):
        """The next samples of a sound that arrives piece by piece -> the columns (n, M) they complete."""
        if self.level:
            raise UserError("level: a clip's level vs a sound still arriving. Train on data prepared without --level")
        self.past = np.concatenate([self.past, np.asarray(samples, np.float32)])
        frames = (self.first + len(self.past)) * self.fps // self.sample_rate
        power = self._power(self.past, self.first, self.frame, frames)
        keep = max(0, (frames + 1) * self.sample_rate // self.fps - self.size)  # where the next column's window starts
        drop = max(0, keep - self.first)
        self.past, self.first, self.frame = self.past[drop:], self.first + drop, frames
        return np.log(np.maximum(power, 1e-10))


# ----------------------------------------------------------------------------------------------------------------------
# The fused operator: causal dilated convolution + bias + conditioning + tanh * sigmoid gate (Fig. 1C, Sec. 2.2)


def gated_causal_conv_reference(x, weight, bias, cond, dilation):
    """The definition: tanh(a[:, :H]) * sigmoid(a[:, H:]),  a[:, o, t] = sum_ij weight[o, i, j] x[:, i, t - (k-1-j) dilation]
    + bias[o] + cond[:, o, t], with x = 0 before t = 0: output t sees inputs up to t only.

    x (B, C_in, T), weight (2H, C_in, k), bias (2H,) or None, cond (B, 2H, T) or None -> (B, H, T)
    """
    a = F.conv1d(F.pad(x, ((weight.shape[2] - 1) * dilation, 0)), weight, bias, dilation=dilation)  # (B, 2H, T)
    tanh, sigmoid = (a if cond is None else a + cond).chunk(2, 1)
    return torch.tanh(tanh) * torch.sigmoid(sigmoid)  # (B, H, T)


def load_kernel():
    """The fused CUDA operator of csrc/, or None where there is none: then the reference runs."""
    return None


def gated_causal_conv(x, weight, bias, cond, dilation):
    """`gated_causal_conv_reference`, by the fused kernel where one runs (same shapes)."""
    return gated_causal_conv_reference(x, weight, bias, cond, dilation)


# ----------------------------------------------------------------------------------------------------------------------
# ConditionTCN: the network of every coupling (Fig. 1C, Eq. 8)


class ConditionTCN(nn.Module):
    """Causal dilated convolutions, the sound added before each gate: x (B, T, C), c (B, T, M) -> (B, T, out).

    Output t sees x and c at 1 + (k-1) * sum(dilations) frames, t the latest. The last layer starts at zero, so that a new
    coupling is the identity. `memory` carries each layer's last inputs from one block of a stream to the next.
    """

    def __init__(self, channels, out_channels, config):
        super().__init__()
        H, k = config.hidden, config.kernel_size
        sizes = [channels] + [H] * (len(config.dilations) - 1)
        self.layers = nn.ModuleList(nn.Conv1d(C, 2 * H, k, dilation=d) for C, d in zip(sizes, config.dilations))
        self.cond = nn.Conv1d(config.cond_dim, 2 * H * len(self.layers), 1, bias=False)  # all layers' conditioning at once
        self.out = nn.Conv1d(H, out_channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.dropout, self.precision = config.dropout, torch.float32

    def forward(self, x, c, memory=None):
        with torch.autocast(x.device.type, self.precision, enabled=self.precision != torch.float32):
            h, conds = x.transpose(1, 2), self.cond(c.transpose(1, 2)).chunk(len(self.layers), 1)  # (B, C, T), (B, 2H, T)
            for layer, cond in zip(self.layers, conds):
                past = (layer.kernel_size[0] - 1) * layer.dilation[0]
                if memory is not None:  # the layer's last inputs stand where the zero padding of a whole sequence would
                    h = torch.cat([memory.get(layer, h.new_zeros(len(h), h.shape[1], past)), h], 2)
                    memory[layer] = h[:, :, h.shape[2] - past :].clone()
                    cond = F.pad(cond, (past, 0))
                h = gated_causal_conv(h, layer.weight, layer.bias, cond, layer.dilation[0])  # (B, H, T)
                h = F.dropout(h if memory is None else h[:, :, past:], self.dropout, self.training)
            return self.out(h).transpose(1, 2).to(x.dtype)  # (B, T, out)


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
        for name in ("permutation", "sign"):
            self.register_buffer(name, torch.empty(0))
        self.set_matrix(torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))[0])

    def set_matrix(self, W):
        """Take W (D, D) apart once; P and the signs stay fixed, the rest is learned."""
        P, lower, upper = torch.linalg.lu(W.double())
        diagonal = upper.diagonal()
        dtype = self.lower.dtype if hasattr(self, "lower") else torch.get_default_dtype()
        self.permutation, self.sign = P.to(dtype), diagonal.sign().to(dtype)
        self.lower, self.upper = nn.Parameter(lower.tril(-1).to(dtype)), nn.Parameter(upper.triu(1).to(dtype))
        self.log_diagonal = nn.Parameter(diagonal.abs().log().to(dtype))

    def matrix(self):
        lower = self.lower.tril(-1) + torch.eye(len(self.lower), dtype=self.lower.dtype, device=self.lower.device)
        return self.permutation @ lower @ (self.upper.triu(1) + torch.diag(self.sign * self.log_diagonal.exp()))

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
        self.sizes = [dim // 2, dim - dim // 2]  # any dim: an odd one gives its extra coordinate to the second half
        self.bound = config.scale_bound
        self.net = ConditionTCN(self.sizes[0], 2 * self.sizes[1], config)

    def scale_shift(self, xa, c, memory=None):
        s, t = self.net(xa, c, memory).chunk(2, 2)  # Eq. 8
        return self.bound * torch.tanh(s / self.bound), t  # an unbounded exp(s) blows up the inverse before the loss

    def forward(self, x, c):
        xa, xb = x.split(self.sizes, 2)  # Eq. 7
        s, t = self.scale_shift(xa, c)
        return torch.cat([xa, s.exp() * xb + t], 2), s.sum((1, 2))  # Eq. 9; the log-det is sum(s), signed

    def inverse(self, y, c, memory=None):
        ya, yb = y.split(self.sizes, 2)
        s, t = self.scale_shift(ya, c, memory)  # ya is known for all frames at once: sampling is parallel in time
        return torch.cat([ya, (yb - t) * (-s).exp()], 2)


class FlowStep(nn.Module):
    """ActNorm -> 1x1 convolution -> coupling: x (B, T, D), c (B, T, M) -> y (B, T, D), log-det (B,)."""

    def __init__(self, dim, config):
        super().__init__()
        self.actnorm, self.conv, self.coupling = ActNorm(dim), InvertibleConv1x1(dim), AffineCoupling(dim, config)

    def forward(self, x, c):
        x, logdet_norm = self.actnorm(x)
        x, logdet_conv = self.conv(x)
        x, logdet = self.coupling(x, c)
        return x, logdet + logdet_norm + logdet_conv

    def inverse(self, y, c, memory=None):
        return self.actnorm.inverse(self.conv.inverse(self.coupling.inverse(y, c, memory), memory))


# ----------------------------------------------------------------------------------------------------------------------
# The prior of the latents. `iid` is Eq. 11. `ar2` is Eq. 6 at its word: z_t given z_<t and c.
# Couplings, ActNorms and 1x1 convolutions multiply to a matrix polynomial in the lag whose determinant is constant, so with an
# iid prior the (linearised) model spreads its log-volume evenly over all frequencies and smooth motion is out of reach: the
# head trembles. A second-order autoregression per latent coordinate is the smallest cure, and the likelihood stays exact.


class Prior(nn.Module):
    """Density of the latents z (B, T, D), deepest scale first, with marginal variances lambda_l.

    ar2: r = z - m(c) is stationary, r_t = a1 r_{t-1} + a2 r_{t-2} + e_t for each coordinate by itself, given by its partial
    autocorrelations p1, p2 in (-1, 1): a2 = p2, a1 = p1 (1 - p2), var e = lambda (1 - p1^2)(1 - p2^2).
    """

    def __init__(self, sizes, config):
        super().__init__()
        variance = torch.cat([torch.full((size,), float(value)) for size, value in zip(sizes, config.lambdas)])
        self.register_buffer("variance", variance)  # (D,)
        self.ar2 = config.prior == "ar2"
        if self.ar2:
            self.partial = nn.Parameter(torch.zeros(2, len(variance)))  # atanh of p1, p2
        self.mean_net = ConditionTCN(config.cond_dim, len(variance), config) if self.ar2 and config.prior_mean else None

    def mean(self, c, memory=None):
        """m(c) (B, T, D); 0 without a mean network."""
        return self.mean_net(c, c, memory) if self.mean_net else c.new_zeros(())

    def partials(self):
        return 0.9995 * torch.tanh(self.partial)  # never quite 1: a constant coordinate keeps a finite density

    def log_prob(self, z, mean):
        """log p(z | m(c)) (B,), nats."""
        r, variance = z - mean, self.variance
        if self.ar2:
            p1, p2 = self.partials()
            before, before2 = F.pad(r, (0, 0, 1, 0))[:, :-1], F.pad(r, (0, 0, 2, 0))[:, :-2]  # r_{t-1}, r_{t-2}; 0 before t = 0
            first, second = torch.zeros_like(p1), torch.ones_like(p1)
            T = r.shape[1]
            a1 = torch.stack([first, p1] + [p1 * (1 - p2)] * (T - 2))[:T]  # (T, D): the first two frames know less
            a2 = torch.stack([first, first] + [p2] * (T - 2))[:T]
            variance = variance * torch.stack([second, 1 - p1**2] + [(1 - p1**2) * (1 - p2**2)] * (T - 2))[:T]
            r = r - a1 * before - a2 * before2
        return -0.5 * (r**2 / variance + (2 * math.pi * variance).log()).expand_as(z).sum((1, 2))

    def sample(self, noise, c, memory):
        """Standard normal noise (B, T, D) -> a draw of z; memory carries the last two frames from block to block."""
        if not self.ar2:
            return noise * self.variance.sqrt()
        p1, p2 = self.partials()
        a1, a2 = p1 * (1 - p2), p2
        stds = [self.variance, self.variance * (1 - p1**2), self.variance * (1 - p1**2) * (1 - p2**2)]
        zero = torch.zeros_like(noise[:, 0])
        frame, before, before2 = memory.get(self, (0, zero, zero))
        frames = []
        for e in noise.unbind(1):  # the one recursion over time: a few numbers a frame
            mean = (p1 if frame == 1 else a1) * before + a2 * before2
            before, before2, frame = mean + stds[min(frame, 2)].sqrt() * e, before, frame + 1
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
    """An exact density p(x | c) of landmark sequences given sound, and a sampler of it. x (B, T, D), c (B, T, M), any T >= 1.

    After each scale but the deepest the transformed half leaves as that scale's latent (Eq. 10) and the other half goes on:
    136 -> 68 -> 34 -> 17 coordinates. z_t depends on x and c up to frame t only, and x_t on z and c up to t only.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        dims = [config.dim]
        for _ in range(config.num_scales - 1):
            dims.append(dims[-1] // 2)
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
            raise UserError(f"shapes: x {tuple(x.shape)}, c {tuple(c.shape)} vs x (B, T, {D}), c (B, T, {M}). Check both")

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
                x, z = x.split([x.shape[2] // 2, x.shape[2] - x.shape[2] // 2], 2)  # Eq. 10
                zs.insert(0, z)
        return [x] + zs, logdet

    def inverse(self, zs, c, memory=None):
        """Noise -> data, exact: x (B, T, D) with forward(x, c) = zs. `memory`: see `stream`."""
        c = (c - self.cond_mean) / self.cond_std
        x, *zs = zs
        self._check(torch.cat([x, *zs], 2), c)
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
        """-log p(x | c) / (T D): nats per coordinate per frame (B,). -log p is a density's, so it may well be negative."""
        return -self.log_prob(x, c) / (x.shape[1] * x.shape[2])

    def prior_mean(self, c, memory=None):
        """m(c): where the prior expects the latents of this sound, (B, T, D), or a scalar 0."""
        return self.prior.mean((c - self.cond_mean) / self.cond_std, memory)

    def sample(self, c, temperature=1.0, generator=None):
        """One draw of x (B, T, D) for the sound c (B, T, M); temperature 0 gives the flow's central face track."""
        return self.stream(len(c), temperature, generator).push(c)

    def stream(self, batch_size=1, temperature=1.0, generator=None):
        """A sampler that takes the sound block by block: see `Stream`."""
        return Stream(self, batch_size, temperature, generator)

    @torch.no_grad()
    def initialize(self, x, c):
        """The data-dependent start, once, from one large batch: every latent gets its prior's variance lambda_l.

        ActNorm standardises each step's input. With init="data" the first 1x1 convolution becomes the PCA of x, the others
        permutations (a rotation would mix slow and fast components again), and the prior's autocorrelations Burg's estimate.
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
                    step.conv.set_matrix(pca(h, variance) if step is self.scales[0][0] else interleave(h.shape[2]))
                h = step.coupling(step.conv(h)[0], c)[0]
            if scale is not self.scales[-1]:
                h, z = h.split([h.shape[2] // 2, h.shape[2] - h.shape[2] // 2], 2)
                zs.insert(0, z)
        self.prior.initialize(torch.cat([h] + zs, 2))
        self.initialized.fill_(True)


def pca(x, variance):
    """The matrix (D, D) that gives x (B, T, D) uncorrelated coordinates of this variance, smallest principal component first."""
    values, vectors = torch.linalg.eigh(torch.cov(x.double().flatten(0, 1).T))
    return (variance / values.clamp_min(values[-1] * 1e-8)).sqrt()[:, None] * vectors.T


def interleave(dim):
    """The permutation (D, D) whose first half takes every second coordinate: what passed one coupling is changed by the next."""
    return torch.eye(dim, dtype=torch.float64)[torch.cat([torch.arange(1, dim, 2), torch.arange(0, dim, 2)])]


class Stream:
    """Faces while the sound arrives. Each layer keeps its last few inputs, so nothing of the past is computed again, and
    blocks of any size give the frames of a whole-sequence sample (whose one block is the whole sound: see `sample`)."""

    def __init__(self, flow, batch_size, temperature, generator):
        self.flow, self.batch_size, self.temperature, self.generator = flow, batch_size, temperature, generator
        self.memory = {}  # layer -> its last inputs, prior -> its last two frames, 1x1 convolution -> its inverse

    @torch.no_grad()
    def push(self, c):
        """The next block of sound c (B, n, M) -> its landmarks (B, n, D)."""
        flow, training = self.flow, self.flow.training
        size = self.batch_size, flow.config.dim
        if c.dim() != 3 or len(c) != self.batch_size:
            raise UserError(f"sound block: {tuple(c.shape)} vs ({self.batch_size}, n, {flow.config.cond_dim}). Check its shape")
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


def mouth_opening(landmarks):
    """Inner-lip gap over inner-lip width of iBUG landmarks (..., 68, 2) -> (...): the paper's mouth open rate, as we read it."""
    gap = np.linalg.norm(landmarks[..., [61, 62, 63], :] - landmarks[..., [67, 66, 65], :], axis=-1).mean(-1)
    return gap / np.maximum(np.linalg.norm(landmarks[..., 60, :] - landmarks[..., 64, :], axis=-1), 1e-6)
