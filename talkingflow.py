"""TalkingFlow: talking-face landmarks from speech with a causal, conditional, weighted multi-scale
normalizing flow. The whole method, to read top to bottom: the flow, its prior, the trainer, the sampler.

    python talkingflow.py train                   make synthetic talkers and train on them, minutes on a CPU
    python talkingflow.py sample                  write a self-contained .html player: faces speak a sound
    python talkingflow.py sample --audio me.wav   the same for your own sound
    python talkingflow.py stream < speech.pcm     one JSON line a frame, while the sound arrives
    python talkingflow.py live                    the same as one page, microphone to faces in a browser

[1] Liang et al.: TalkingFlow: Talking facial landmark generation with multi-scale normalizing flow network
[2] Kingma, Dhariwal: Glow, arXiv 1807.03039     [3] Dinh, Sohl-Dickstein, Bengio: Real NVP, arXiv 1605.08803
[4] van den Oord et al.: PixelCNN decoders (the gate), arXiv 1606.05328

Glossary (the paper's symbol in brackets where it differs)
    B, T       clips in a batch, frames in a clip (25 a second)
    D, M       landmark coordinates a frame (68 points x, y = 136), mel bands a frame
    H, k, d    hidden channels, kernel size and dilation of the ConditionTCN
    L, K       scales, flow steps a scale (k_l)
    x, c       landmarks (B, T, D) in 0..1 coordinates, log-mel spectrogram (B, T, M)
    z^(l)      latent of scale l (B, T, d_l), l = 1 the deepest; lambda_l its variance under the prior
    s, t       log-scale and shift of a coupling; m(c) the prior's mean given the sound
Direction: forward is data -> noise (Eqs. 7-10), inverse is noise -> data.
log p(x|c) = log p(z|c) + log|det dz/dx|, the determinant of every layer signed: a coupling adds +sum(s).
The README lists where this differs from the paper. Not in this file: sound, landmarks and files (media/),
metrics (study/), CUDA kernels (csrc/), commands (cli.py), experiments (evaluate.py).
"""

import sys


def main(argv=None):
    """Run a command line, `train`, `sample`, `stream` or `live` (cli.py) -> exit status."""
    import cli

    return cli.main(argv)


if __name__ == "__main__":  # up here, so that --help need not wait for torch
    sys.exit(main())

import contextlib
import copy
import dataclasses
import datetime
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from csrc.device import Captured, Processes, choose_device, dropout, few_threads, fused, network_precision
from csrc.gated_conv import fused_gated_conv, kernel_runs, load_kernel
from csrc.one_frame import OneFrame
from csrc.recursion import by_doubling
from media.checkpoint import describe, fits, read_checkpoint, write_checkpoint
from media.console import CLEAR, Interrupt, UserError
from media.folder import TrainingFolder
from media.limits import check_config
from media.sound import Mel, heard, vary  # noqa: F401 (Mel and Talker: this file's contract)
from media.talker import Talker  # noqa: F401

# ------------------------------------------------------------------------------------------------------------
# Config: every number of a run. The comments are the text of --help.


@dataclasses.dataclass
class Config:
    """All numbers of a model and its training. Raises UserError where one is impossible."""

    # the model
    dim: int = 136  # D: landmark coordinates a frame, 68 points x, y (not in the paper; the data decides)
    cond_dim: int = 40  # M: mel bands a frame (not in the paper; the data decides)
    hidden: int = 64  # H: channels of the ConditionTCN (not in the paper; the authors' code has 256)
    kernel_size: int = 2  # k: taps of each causal convolution (not in the paper; the authors' code has 3)
    dilations: tuple = (1, 2, 4, 8)  # of the ConditionTCN's layers (Sec. 2.2)
    num_scales: int = 4  # L (Sec. 3)
    steps_per_scale: int = 2  # K: flow steps a scale (not in the paper; the authors' code has 6)
    lambdas: tuple = (0.25, 0.5, 0.75, 1.0)  # variance of each scale's latent, deepest first (Sec. 3)
    prior: str = "ar2"  # "iid": Eq. 11; "ar2": Eq. 6 taken at its word, an autoregression over time
    prior_mean: bool = True  # centre the ar2 prior on a mean predicted from the sound (not in the paper)
    mean_hidden: int = 0  # hidden channels of that mean's network, 0: as many as H (ours; the data decides)
    init: str = "data"  # "data": PCA and Burg start from a batch; "random": Glow's start (the paper)
    lead: int = 0  # frames of sound heard ahead, a fixed delay (not in the paper; the data decides)
    scale_bound: float = 1.0  # |s| of a coupling stays below this (not in the paper)
    dropout: float = 0.15  # of the ConditionTCNs, a third for the prior's mean (ours; the data decides)
    # training
    batch_size: int = 8  # clips a step, over all processes (Sec. 3: 128)
    seq_len: int = 80  # T: frames a training window (not in the paper; the authors' code has 3 s)
    steps: int = 4000  # optimiser steps; 0: as many as `epochs` takes (the data decides)
    epochs: int = 0  # passes over the training frames, where steps is 0 (Sec. 3: about 100)
    lr: float = 3e-3  # peak learning rate of Adam (Sec. 3: 1e-4)
    lr_final: float = 0.02  # cosine decay to this share of lr; 1: constant (the paper)
    warmup: int = 50  # steps of linear warm-up (not in the paper)
    weight_decay: float = 0.05  # on the weights of the ConditionTCNs only (not in the paper)
    grad_clip: float = 1.0  # largest gradient norm (not in the paper)
    mean_lr: float = 3.0  # learning rate of the prior's mean, times lr (not in the paper)
    mean_loss: float = 0.5  # start weight of the mean's own squared error, falls for 70 % of training (ours)
    mean_loss_final: float = 0.0  # share of mean_loss that stays to the end (ours; the data decides)
    noise: float = 0.0022  # dequantisation noise in interocular distances (ours; the data decides)
    vtlp: float = 0.0  # other voices in training, by up to exp(+-vtlp) (media.sound.vary; the data decides)
    tilt: float = 0.0  # slope of the sound's spectrum in training, up to +-, nats (ours; the data decides)
    channel: float = 0.0  # share of windows in noise, by telephone, clipped, each (ours; the data decides)
    precision: str = "auto"  # of the ConditionTCNs in training: float32, bfloat16; auto: the faster one
    recompute: bool = False  # compute the ConditionTCNs again in the backward pass instead of storing them
    compile: bool = False  # fuse a step by torch.compile: 1.2 to 1.7 times as fast on a CPU after a minute
    eval_interval: int = 200  # steps between validations
    seed: int = 0  # of the weights, the batches and the noise

    def __post_init__(self):
        self.dilations, self.lambdas = tuple(self.dilations), tuple(self.lambdas)
        check_config(self)

    @staticmethod
    def preset(name):
        """`demo` fits a laptop CPU and moves like a person; `paper` is Section 3 to the letter, the authors'
        code where it is silent (steps a scale, hidden, kernel size), and needs a GPU. Mel bands, window,
        look-ahead, bounds, dequantisation noise and the average of the weights are this project's."""
        paper = dict(cond_dim=80, hidden=256, kernel_size=3, steps_per_scale=6, dropout=0.0)
        paper |= dict(prior="iid", prior_mean=False, init="random", mean_loss=0.0, weight_decay=0.0)
        paper |= dict(batch_size=128, steps=0, epochs=100, lr=1e-4, lr_final=1.0, warmup=0)
        if name not in ("demo", "paper"):
            raise UserError(f"preset: {name} vs demo or paper. Choose one of the two")
        return Config(**(paper if name == "paper" else {}))


# ------------------------------------------------------------------------------------------------------------
# The operator: causal dilated convolution + bias + conditioning, then the gate (Fig. 1C, Sec. 2.2)


def gated_causal_conv_reference(x, weight, bias, cond, dilation):
    """The definition: y[t] = tanh(a[t, :H]) * sigmoid(a[t, H:]),
    a[t, o] = sum_ij weight[o, i, j] x[t - (k-1-j) dilation, i] + bias[o] + cond[t, o],
    with x = 0 before t = 0: y[t] sees inputs up to t only.

    x (B, T, C), weight (2H, C, k), bias (2H,) or None, cond (B, T, 2H) or None -> (B, T, H)
    """
    _, _, k = weight.shape
    matrix = weight.transpose(1, 2).flatten(1)  # (2H, kC)
    return gated_conv(F.pad(x, (0, 0, (k - 1) * dilation, 0)), matrix, bias, cond, k, dilation)


def gated_conv(x, matrix, bias, cond, k, dilation):
    """The same with the (k-1) dilation frames before the first output in front of x: one product over the
    taps, faster than conv1d on CPUs, and what torch.compile fuses best on GPUs. matrix (2H, kC)."""
    T = x.shape[1] - (k - 1) * dilation
    taps = torch.cat([x[:, j * dilation : j * dilation + T] for j in range(k)], 2)
    a = F.linear(taps, matrix, bias)  # (B, T, kC), the oldest tap first -> (B, T, 2H)
    tanh, sigmoid = (a if cond is None else a + cond).chunk(2, 2)
    if torch.is_grad_enabled():
        return torch.tanh(tanh) * torch.sigmoid(sigmoid)  # (B, T, H) [4]
    return tanh.tanh_().mul_(sigmoid.sigmoid_())  # in place: up to 1.5 times as fast on a CPU


def gated_causal_conv(x, weight, bias, cond, dilation):
    """`gated_causal_conv_reference`, by the fused kernel of csrc/ where it is faster (same shapes)."""
    if x.is_cuda and kernel_runs(x, weight, dilation):
        return fused_gated_conv(x, weight, bias, cond, dilation)
    return gated_causal_conv_reference(x, weight, bias, cond, dilation)


# ------------------------------------------------------------------------------------------------------------
# ConditionTCN: the network of every coupling (Fig. 1C, Eq. 8)


class GatedCausalConv(nn.Module):
    """One layer: x (B, T, C), cond (B, T, 2H) -> (B, T, H).

    In a stream, `past` holds the layer's last (k-1) d inputs: they stand where the zeros before a whole
    sequence would, so no frame is computed twice. A gradient ends there, and at a block's own earlier
    frames too: it reaches y[t] through x[t] alone."""

    def __init__(self, channels, hidden, kernel_size, dilation):
        super().__init__()
        bound = (channels * kernel_size) ** -0.5  # as nn.Conv1d starts
        # stored as (2H, k, C): the operator's (2H, C, k) and the matrix of its product are both views of it
        self.weight = nn.Parameter(torch.empty(2 * hidden, kernel_size, channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(2 * hidden).uniform_(-bound, bound))
        self.dilation, self.past = dilation, None

    def remember(self, batch_size):
        _, k, C = self.weight.shape
        self.past = self.weight.new_zeros(batch_size, (k - 1) * self.dilation, C)

    def forward(self, x, cond):
        if self.past is None:
            return gated_causal_conv(x, self.weight.transpose(1, 2), self.bias, cond, self.dilation)
        if x.requires_grad:  # TalkingFlow.denoise: adds 0, whose gradient is that of the last tap
            cond = cond + F.linear(x - x.detach(), self.weight[:, -1])
        x = torch.cat([self.past, x.detach()], 1)
        self.past.copy_(x[:, x.shape[1] - self.past.shape[1] :])
        return gated_conv(x, self.weight.flatten(1), self.bias, cond, self.weight.shape[1], self.dilation)


class ConditionTCN(nn.Module):
    """Causal dilated convolutions, the sound added before each gate: x (B, T, C), c (B, T, M) -> (B, T, out).

    Output t sees x at the last 1 + (k-1) sum(dilations) frames, and c at those that the layers after the
    first reach. The last layer starts at zero, so that a new coupling is the identity.
    """

    def __init__(self, channels, out_channels, config):
        super().__init__()
        H, k, dilations = config.hidden, config.kernel_size, config.dilations
        sizes = [channels] + [H] * (len(dilations) - 1)
        self.layers = nn.ModuleList(GatedCausalConv(C, H, k, d) for C, d in zip(sizes, dilations))
        self.cond = nn.Linear(config.cond_dim, 2 * H * len(dilations), bias=False)  # for all layers at once
        self.out = nn.Linear(H, out_channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.dropout, self.recompute, self.precision = config.dropout, config.recompute, None

    def forward(self, x, c):
        """The network, in bfloat16 or computed again in the backward pass where that is asked."""
        with torch.autocast(x.device.type, self.precision) if self.precision else contextlib.nullcontext():
            if self.recompute and self.training:
                return checkpoint(self.network, x, c, use_reentrant=False).to(x.dtype)
            return self.network(x, c).to(x.dtype)

    def network(self, x, c):
        h, conds = x, self.cond(c).chunk(len(self.layers), 2)  # (B, T, 2H) for each layer
        for layer, cond in zip(self.layers, conds):
            h = layer(h, cond)  # (B, T, H)
            if self.training:
                h = dropout(h, self.dropout)
        return self.out(h)  # (B, T, out)


# ------------------------------------------------------------------------------------------------------------
# One step of the flow (Fig. 1B): ActNorm -> invertible 1x1 convolution -> affine coupling. Each works on
# every frame alike or looks at the past only, so dz/dx is block lower triangular over time: Eq. 1.


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
    """y_t = W x_t with W = P L U [2]: log-det T * sum(log|diag U|), whatever the signs. Starts as a random
    rotation. `inverted` holds W^-1 in a stream, whose weights stay as they are."""

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("permutation", torch.empty(dim, dim))
        self.register_buffer("sign", torch.empty(dim))
        self.lower, self.upper = nn.Parameter(torch.empty(dim, dim)), nn.Parameter(torch.empty(dim, dim))
        self.log_diagonal = nn.Parameter(torch.empty(dim))
        self.set_matrix(torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))[0])
        self.inverted = None

    @torch.no_grad()
    def set_matrix(self, W):
        """Take W (D, D) apart once; P and the signs stay fixed, the rest is learned."""
        P, lower, upper = torch.linalg.lu(W.double())
        diagonal = upper.diagonal()
        self.permutation.copy_(P), self.sign.copy_(diagonal.sign())
        self.lower.copy_(lower.tril(-1)), self.upper.copy_(upper.triu(1))
        self.log_diagonal.copy_(diagonal.abs().log())

    def matrix(self):
        """W (D, D)."""
        upper = self.upper.triu(1) + torch.diag(self.sign * self.log_diagonal.exp())
        return self.permutation @ self.lower.tril(-1).fill_diagonal_(1) @ upper

    def forward(self, x):
        return x @ self.matrix().T, x.shape[1] * self.log_diagonal.sum()

    def inverse(self, y):
        return y @ (inverted(self.matrix()) if self.inverted is None else self.inverted).T


def inverted(matrix):  # in float64: float32 inverses are the largest error of the whole inverse flow
    return torch.linalg.inv(matrix.double()).to(matrix.dtype)


class AffineCoupling(nn.Module):
    """Eqs. 7-9: the first half passes and decides, with the sound, the second half's scale and shift."""

    def __init__(self, dim, config):
        super().__init__()
        self.sizes = [dim // 2, dim - dim // 2]  # an odd dim gives its extra coordinate to the second half
        self.bound = config.scale_bound
        self.net = ConditionTCN(self.sizes[0], 2 * self.sizes[1], config)

    def scale_shift(self, xa, c):
        s, t = self.net(xa, c).chunk(2, 2)  # Eq. 8
        return self.bound * torch.tanh(s / self.bound), t  # unbounded, exp(s) blows up the inverse first

    def forward(self, x, c):
        xa, xb = x.split(self.sizes, 2)  # Eq. 7
        s, t = self.scale_shift(xa, c)
        return torch.cat([xa, s.exp() * xb + t], 2), s.sum((1, 2))  # Eq. 9; the log-det is sum(s), signed

    def inverse(self, y, c):
        ya, yb = y.split(self.sizes, 2)
        s, t = self.scale_shift(ya, c)  # ya is known for all frames at once: sampling is parallel in time
        return torch.cat([ya, (yb - t) * (-s).exp()], 2)


class FlowStep(nn.Module):
    """ActNorm -> 1x1 convolution -> coupling: x (B, T, D), c (B, T, M) -> y (B, T, D), log-det (B,)."""

    def __init__(self, dim, config):
        super().__init__()
        self.actnorm, self.conv = ActNorm(dim), InvertibleConv1x1(dim)
        self.coupling = AffineCoupling(dim, config)

    def forward(self, x, c):
        x, logdet_norm = self.actnorm(x)
        x, logdet_conv = self.conv(x)
        x, logdet = self.coupling(x, c)
        return x, logdet + logdet_norm + logdet_conv

    def inverse(self, y, c):
        return self.actnorm.inverse(self.conv.inverse(self.coupling.inverse(y, c)))


# ------------------------------------------------------------------------------------------------------------
# The prior of the latents. `iid` is Eq. 11. `ar2` is Eq. 6 at its word: z_t given z_<t and c. Couplings,
# ActNorms and 1x1 convolutions multiply to a matrix polynomial in the lag whose determinant is constant, so
# with an iid prior the (linearised) model spreads its log-volume evenly over all frequencies: smooth motion
# here must be paid for elsewhere, training does not find how, and the head trembles. A second-order
# autoregression per latent coordinate is the smallest cure, and the likelihood stays exact.


class Prior(nn.Module):
    """Density of the latents z (B, T, D), deepest scale first, with marginal variances lambda_l.

    ar2: r = z - m(c) is stationary, each coordinate by itself; p1, p2 are its partial autocorrelations:
        r_0 = e_0                                   var e_0 = lambda
        r_1 = p1 r_0 + e_1                          var e_1 = lambda (1 - p1^2)
        r_t = p1 (1 - p2) r_{t-1} + p2 r_{t-2} + e_t    var e_t = lambda (1 - p1^2)(1 - p2^2)
    In a stream, `past` holds the number of frames so far and the last two of them."""

    def __init__(self, sizes, config):
        super().__init__()
        variances = [torch.full((size,), float(value)) for size, value in zip(sizes, config.lambdas)]
        self.register_buffer("variance", torch.cat(variances))  # (D,)
        self.ar2 = config.prior == "ar2"
        if self.ar2:
            self.partial = nn.Parameter(torch.zeros(2, config.dim))  # atanh of p1, p2
        has_mean, hidden = self.ar2 and config.prior_mean, config.mean_hidden or config.hidden
        lighter = dataclasses.replace(config, hidden=hidden, dropout=config.dropout / 3)  # 0 overfits
        self.mean_net = ConditionTCN(config.cond_dim, config.dim, lighter) if has_mean else None
        self.past = None

    def nothing(self, batch_size):
        return 0, *self.variance.new_zeros(2, batch_size, len(self.variance))

    def remember(self, batch_size, frame=0, last=None):
        """Before a stream's first frame; later, the frames so far and the last ones, in the same places, so
        that a captured step may go on with them."""
        self.past = [frame, *self.past[1:]] if self.past else list(self.nothing(batch_size))
        if last is not None:
            before, before2 = self.past[1:]
            before2.copy_(last[:, -2] if last.shape[1] > 1 else before)
            before.copy_(last[:, -1])

    def mean(self, c):
        """m(c) (B, T, D); 0 without a mean network."""
        return self.mean_net(c, c) if self.mean_net else c.new_zeros(())

    def partials(self):
        return 0.9995 * torch.tanh(self.partial)  # never 1: a constant coordinate keeps a finite density

    def innovation_variance(self, first, T):
        """var e of the frames first .. first + T - 1, (T, D)."""
        p1, p2 = self.partials()
        share = torch.stack([torch.ones_like(p1), 1 - p1**2, (1 - p1**2) * (1 - p2**2)])  # frames 0, 1, later
        return self.variance * torch.cat([share[:2], share[2:].expand(T, -1)])[min(first, 2) :][:T]

    def log_prob(self, z, mean):
        """log p(z | m(c)) (B,), nats; in a stream, given the frames before, where gradients end."""
        e, variance = z - mean, self.variance
        if self.ar2:
            frame, before, before2 = self.past or self.nothing(len(z))
            r, T, (p1, p2) = e, e.shape[1], self.partials()
            known = torch.cat([before2[:, None], before[:, None], r.detach() if self.past else r], 1)
            e = r - p1 * (1 - p2) * known[:, 1:-1] - p2 * known[:, :-2]
            if frame <= 1 < frame + T:  # r_1 = p1 r_0 + e_1 = a1 r_0 + (p1 p2 r_0 + e_1)
                e[:, 1 - frame] -= p1 * p2 * known[:, 2 - frame]
            variance = self.innovation_variance(frame, T)
            if self.past:
                self.remember(len(z), frame + T, r.detach())
        return -0.5 * (e**2 / variance + (2 * math.pi * variance).log()).expand_as(z).sum((1, 2))

    def sample(self, noise):
        """Standard normal noise (B, T, D) -> a draw of r; a stream goes on where it ended."""
        if not self.ar2:
            return noise * self.variance.sqrt()
        frame, before, before2 = self.past or self.nothing(len(noise))
        T, (p1, p2) = noise.shape[1], self.partials()
        e = noise * self.innovation_variance(frame, T).sqrt()
        if frame <= 1 < frame + T:  # r_1 = p1 r_0 + e_1 = a1 r_0 + (p1 p2 r_0 + e_1): one rule for all frames
            e[:, 1 - frame] += p1 * p2 * (before if frame else e[:, 0])
        recur = frame_by_frame if e.device.type == "cpu" else by_doubling
        r = recur(e, p1 * (1 - p2), p2, before, before2)
        if self.past:
            self.remember(len(r), frame + T, r)
        return r

    def initialize(self, z):
        """Burg's estimate of p1, p2 from z (B, T, D): always stable, where Yule-Walker needs clamping."""
        if not self.ar2 or z.shape[1] < 3:
            return
        z = z.double()
        ahead, behind = z[:, 1:], z[:, :-1]  # prediction errors forwards and backwards, order 0
        p1 = 2 * (ahead * behind).sum((0, 1)) / (ahead**2 + behind**2).sum((0, 1))
        ahead, behind = (ahead - p1 * behind)[:, 1:], (behind - p1 * ahead)[:, :-1]  # order 1
        p2 = 2 * (ahead * behind).sum((0, 1)) / (ahead**2 + behind**2).sum((0, 1))
        partials = torch.stack([p1, p2]) / 0.9995
        self.partial.copy_(torch.atanh(partials.clamp(-0.9995, 0.9995)))


def frame_by_frame(e, a1, a2, before, before2):
    """r_t = a1 r_{t-1} + a2 r_{t-2} + e_t over the frames of e (B, T, D), frame by frame: the same bits
    however a sound is cut into blocks."""
    r = []
    for e_t in e.unbind(1):
        before, before2 = torch.addcmul(torch.addcmul(e_t, a2, before2), a1, before), before
        r.append(before)
    return torch.stack(r, 1)


# ------------------------------------------------------------------------------------------------------------
# The weighted multi-scale flow (Fig. 1A, Eqs. 2-6, 10, 11)


class TalkingFlow(nn.Module):
    """An exact density p(x | c) of landmarks x (B, T, D) given sound c (B, T, M), any T >= 1, and its
    sampler.

    After each scale but the deepest the transformed half leaves as that scale's latent (Eq. 10), the other
    goes on: 136 -> 68 -> 34 -> 17 coordinates. z_t depends on x and c up to frame t only, x_t on z and c
    up to t."""

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

    def standardize(self, x, c):
        """c as the networks hear it, (B, T, M); and the one place where shapes are checked."""
        D, M = self.config.dim, self.config.cond_dim
        fits = x.dim() == c.dim() == 3 and x.shape[:2] == c.shape[:2] and (x.shape[2], c.shape[2]) == (D, M)
        assert fits, f"x {tuple(x.shape)}, c {tuple(c.shape)} vs x (B, T, {D}), c (B, T, {M})"
        return (c - self.cond_mean) / self.cond_std

    def forward(self, x, c):
        """Data -> noise: L latents (B, T, d_l) in the order of lambdas, and log|det dz/dx| (B,) in nats."""
        c = self.standardize(x, c)
        zs, logdet = [], x.new_zeros(len(x))
        for scale in self.scales:
            for step in scale:
                x, step_logdet = step(x, c)
                logdet = logdet + step_logdet
            if scale is not self.scales[-1]:
                x, z = x.tensor_split([x.shape[2] // 2], 2)  # Eq. 10
                zs.insert(0, z)
        return [x] + zs, logdet

    def inverse(self, zs, c):
        """Noise -> data, exact: x (B, T, D) with forward(x, c) = zs."""
        c = self.standardize(torch.cat(zs, 2), c)
        x, *zs = zs
        for scale in reversed(self.scales):
            if scale is not self.scales[-1]:
                x, zs = torch.cat([x, zs[0]], 2), zs[1:]
            for step in reversed(scale):
                x = step.inverse(x, c)
        return x

    def log_prob(self, x, c):
        """log p(x | c) in nats (B,): Eq. 11 with the signs mended and nothing divided away."""
        zs, logdet = self(x, c)
        return self.prior.log_prob(torch.cat(zs, 2), self.prior_mean(c)) + logdet

    def nll(self, x, c):
        """-log p(x | c) / (T D), nats per coordinate per frame (B,), often negative: p is a density."""
        return -self.log_prob(x, c) / (x.shape[1] * x.shape[2])

    def prior_mean(self, c):
        """m(c): where the prior expects the latents of this sound, (B, T, D), or a scalar 0."""
        return self.prior.mean((c - self.cond_mean) / self.cond_std)

    def sample(self, c, temperature=1.0, generator=None):
        """One draw of x (B, T, D) for the sound c (B, T, M); temperature 0 gives the central face track."""
        return self.stream(len(c), temperature, generator).push(c)

    def stream(self, batch_size=1, temperature=1.0, generator=None, sigma=0.0, steer=None):
        """A sampler that takes the sound block by block: see `Stream`."""
        return Stream(self, batch_size, temperature, generator, sigma, steer)

    @torch.no_grad()
    def remembering(self, batch_size):
        """A copy for a stream. It shares the weights, and its layers remember the past for the next block:
        the convolutions and the prior their `past`, the 1x1 convolutions their inverted matrices."""
        flow = twin(self).eval()  # no dropout in a sampler
        for module in flow.modules():
            if hasattr(module, "remember"):
                module.remember(batch_size)
        for scale in flow.scales:  # all of a size at once: a GPU takes as long for one
            matrices = inverted(torch.stack([step.conv.matrix() for step in scale]))
            for step, matrix in zip(scale, matrices):
                step.conv.inverted = matrix
        return flow

    def denoise(self, x, c, sigma):
        """The mean of the landmarks under x (B, T, D), which carry Gaussian noise of standard deviation
        sigma, given x up to each frame: x_t + sigma^2 d log p(x_t | x_<t, c) / dx_t (Tweedie). What is
        remembered passes no gradient, so the sum over the frames gives each its own in one backward."""
        flow = self if self.prior.past else self.remembering(len(x))
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (score,) = torch.autograd.grad(flow.log_prob(x, c).sum(), x)
        return x.detach() + sigma**2 * score

    @torch.no_grad()
    def initialize(self, x, c):
        """The data-dependent start, once, from one large batch: every latent gets its prior's variance.

        ActNorm standardises each step's input. With init="data" the first 1x1 convolution becomes the PCA of
        x, the others permutations (a rotation would mix slow and fast components again), and the prior's
        autocorrelations Burg's estimate."""
        assert not self.initialized, "initialize once: build a new TalkingFlow to start again"
        std, mean = torch.std_mean(c.double(), (0, 1))
        self.cond_mean.copy_(mean), self.cond_std.copy_(std.clamp_min(1e-3))
        zs, h, c = [], x, self.standardize(x, c)
        for scale, variance in zip(self.scales, reversed(self.config.lambdas)):
            for step in scale:
                step.actnorm.initialize(h, variance)
                h = step.actnorm(h)[0]
                if self.config.init == "data":
                    first = step is self.scales[0][0]
                    step.conv.set_matrix(pca(h, variance) if first else shuffle(h.shape[2]))
                h = step.coupling(step.conv(h)[0], c)[0]
            if scale is not self.scales[-1]:
                h, z = h.tensor_split([h.shape[2] // 2], 2)
                zs.insert(0, z)
        if self.config.init == "data":
            self.prior.initialize(torch.cat([h] + zs, 2))
        self.initialized.fill_(True)


def pca(x, variance):
    """The matrix (D, D) that makes x (B, T, D) uncorrelated with this variance, smallest component first."""
    values, vectors = torch.linalg.eigh(torch.cov(x.double().flatten(0, 1).T))
    return (variance / values.clamp_min(values[-1] * 1e-8)).sqrt()[:, None] * vectors.T


def shuffle(dim):
    """A permutation (D, D), so that what passed one coupling may be changed by the next."""
    return torch.eye(dim, dtype=torch.float64)[torch.randperm(dim)]


def twin(module):
    """A copy of a module and its parts that shares their weights, and nothing that they remember."""
    other = copy.copy(module)
    other._modules = {name: part and twin(part) for name, part in module._modules.items()}
    return other


class Stream:
    """Faces while the sound arrives: blocks of any size give the frames of a whole-sequence sample, which
    is itself a stream of one block. All that it remembers is in its own copies of the flow: see
    `TalkingFlow.remembering`. sigma > 0 takes the training noise out of the faces: they are no draws of the
    density then. steer: a function (z, c) -> (z, c) of what the flow is given, as in media.face."""

    def __init__(self, flow, batch_size, temperature, generator, sigma=0.0, steer=None):
        self.batch_size, self.temperature, self.generator = batch_size, temperature, generator
        self.flow, self.sigma, self.steer = flow.remembering(batch_size), sigma, steer
        self.denoiser = flow.remembering(batch_size) if sigma else None
        self.frames = OneFrame(self.flow)
        device = flow.cond_mean.device
        self.draw_frame = Captured(self.draw, device) if device.type == "cuda" else self.draw

    @torch.no_grad()
    def push(self, c):
        """The next block of sound c (B, n, M) -> its landmarks (B, n, D)."""
        B, n, D = self.batch_size, c.shape[1], self.flow.config.dim
        assert c.dim() == 3 and len(c) == B, f"sound {tuple(c.shape)} vs ({B}, n, M)"
        if n == 0:
            return c.new_zeros(B, 0, D)
        # on a CPU torch.randn fills 16 numbers at a time: whole sixteens a frame give any block size the same
        device = self.generator.device if self.generator else c.device
        noise = torch.randn(n, -(-B * D // 16) * 16, generator=self.generator, dtype=c.dtype, device=device)
        noise = noise[:, : B * D].reshape(n, B, D).transpose(0, 1).to(c.device)
        return (self.draw_frame if n == 1 else self.draw)(noise, c)

    def draw(self, noise, c):
        """Standard normal noise (B, n, D), sound c (B, n, M) -> landmarks (B, n, D)."""
        flow = self.frames.take() if c.shape[1] == 1 and not c.is_cuda else self.frames.give()
        z = flow.prior.sample(noise * self.temperature) + flow.prior_mean(c)
        if self.steer:
            z, c = self.steer(z, c)
        x = flow.inverse(z.split(flow.sizes, 2), c)
        return self.denoiser.denoise(x, c, self.sigma) if self.sigma else x


# ------------------------------------------------------------------------------------------------------------
# Batches: windows of the clips that prepare_data.py has written


class Clips(TrainingFolder):
    """The clips of a folder and the batches drawn from them."""

    def draw(self, count, T, generator):
        """`count` random training windows; every frame that can start one is as likely as any other."""
        clips, ends = self.starts(T)  # all starts in a row, clip after clip
        picks = torch.randint(int(ends[-1]), (count,), generator=generator).numpy()
        chosen = np.searchsorted(ends, picks, side="right")
        return [(clips[i], int(ends[i] - 1 - pick)) for i, pick in zip(chosen, picks)]  # counted from the end

    def batch(self, windows, T, lead=0, noise=0.0, generator=None, channel=0.0, **voice):
        """x (B, T, D) plus `noise` (interocular distances), c (B, T, M) `lead` frames ahead: see `vary`."""
        x, c = [], []
        if other := channel or any(voice.values()):
            rng = np.random.default_rng(int(torch.randint(1 << 62, (), generator=generator)))
        for clip, s in windows:
            ahead = np.minimum(np.arange(s, s + T) + lead, clip["frames"] - 1)  # the last column is repeated
            x.append(self.landmarks[clip["start"] + s : clip["start"] + s + T])
            clipped = channel and rng.random() < channel
            c.append(self.overdriven(clip, ahead, rng) if clipped else self.mel[clip["start"] + ahead])
        x, c = torch.from_numpy(np.stack(x)), np.stack(c)
        if noise:
            x = x + noise * self.meta["interocular"] * torch.randn(x.shape, generator=generator)
        return x, torch.from_numpy(vary(c, self.meta["mel"], rng, channel=channel, **voice) if other else c)


# ------------------------------------------------------------------------------------------------------------
# Training


class Objective(nn.Module):
    """What is minimised, in one forward call so that DistributedDataParallel sees all of it."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, x, c, mean_weight):
        """Mean NLL of x (B, T, D) given c (B, T, M), nats per coordinate per frame, and the loss to minimise.

        Under the ar2 prior m(c) is fitted through the filter 1 - a1 q - a2 q^2 (q: one frame earlier),
        that is on the fastest movements only. Its own squared error, added at first and less and less,
        teaches it the whole mouth; the likelihood then takes back what was too much.
        """
        zs, logdet = self.flow(x, c)
        z, mean, prior = torch.cat(zs, 2), self.flow.prior_mean(c), self.flow.prior
        nll = -(prior.log_prob(z, mean) + logdet).mean() / (x.shape[1] * x.shape[2])
        return nll, nll + mean_weight * ((z.detach() - mean) ** 2 / prior.variance.detach()).mean()


def build_optimizer(flow, config):
    """Adam; decay on the networks' weights only: a rotation or an autocorrelation near 0 is no simpler."""
    device, groups = flow.cond_mean.device, {}
    for name, parameter in flow.named_parameters():
        scale = config.mean_lr if "mean_net" in name else 1.0
        decays = "net." in name and parameter.dim() > 1
        decay = config.weight_decay * decays / scale  # the same a step
        groups.setdefault((scale, decay), []).append(parameter)
    groups = [{"params": p, "scale": scale, "weight_decay": decay} for (scale, decay), p in groups.items()]
    for group in groups:
        group["lr"] = torch.zeros((), device=device)  # a tensor, so that a captured step can be given another
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True, capturable=device.type == "cuda")


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
    """Up to `limit` windows of a split with noise that never changes, so that validations can be compared."""
    generator, windows = torch.Generator().manual_seed(0), clips.windows(split, T, limit)
    blocks = [windows[i : i + 32] for i in range(0, len(windows), 32)]
    return [[v.to(device) for v in clips.batch(b, T, config.lead, config.noise, generator)] for b in blocks]


def start_flow(config, clips, T):
    """A new flow with its data-dependent start, the same in every process."""
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    x, c = clips.batch(clips.draw(400, T, generator), T, config.lead, config.noise, generator)
    clips.check(x.numpy(), c.numpy())
    flow = TalkingFlow(config)
    flow.initialize(x, c)
    return flow


class Trainer:
    """One training run. Under torchrun every process takes its share of each batch and rank 0 alone writes.

    config, clips: what to train, on what. out: the run's folder. state: the dict of resume.pt to go on from.
    """

    def __init__(self, config, clips, out, device="auto", state=None):
        self.config, self.clips, self.out, self.device = config, clips, Path(out), choose_device(device)
        self.processes = Processes(self.device, config.batch_size)
        self.rank, self.world = self.processes.rank, self.processes.world
        self.T = clips.window_length(config.seq_len)
        windows = len(clips.windows("train", self.T))
        self.steps = config.steps or math.ceil(config.epochs * windows / config.batch_size)
        self.held = {s: fixed_batches(clips, s, self.T, config, self.device) for s in ("train", "val")}
        if not self.held["val"]:
            found = f"no validation window of {self.T} frames vs at least 1"
            raise UserError(f"{clips.folder}: {found}. Prepare more clips or lower --seq_len")
        load_kernel()  # says on stderr which backend runs the networks, and why
        few_threads(self.device, config.hidden)
        self.flow = (TalkingFlow(config) if state else start_flow(config, clips, self.T)).to(self.device)
        self.average = copy.deepcopy(self.flow)  # see `take_average`
        self.optimizer = build_optimizer(self.flow, config)
        self.step, self.best, self.beside = 0, math.inf, lambda nll: ""
        self.fade, self.skipped = torch.zeros(2, device=self.device)  # see `update`
        self.generator = torch.Generator().manual_seed(config.seed + 1000003)  # the same in all processes
        torch.manual_seed(config.seed + 1000003 * self.rank + (state["step"] if state else 0))  # of dropout
        if state:
            with fits(self.out / "resume.pt"):
                self.restore(state)
        for net in self.flow.modules():  # not the flow around them: its inverse stays exact in float32
            if isinstance(net, ConditionTCN):
                net.precision = network_precision(config.precision, config.hidden, self.device)
        objective = fused(Objective(self.flow)) if config.compile else Objective(self.flow)
        self.model = self.processes.join(objective)  # after the start, which is the same in all
        graph = self.device.type == "cuda" and self.world == 1
        self.advance = Captured(self.update, self.device) if graph else self.update

    def train_step(self):
        """One step of Adam on a fresh batch."""
        config, share = self.config, schedule(self.step, self.steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"].fill_(config.lr * share * group["scale"])
        self.fade.fill_(config.mean_loss * max(config.mean_loss_final, 1 - self.step / (0.7 * self.steps)))
        windows = self.clips.draw(config.batch_size, self.T, self.generator)
        x, c = self.clips.batch(windows, self.T, config.lead, config.noise, self.generator, **heard(config))
        x, c = (v[self.rank :: self.world] for v in (x, c))  # so that N processes do what one would
        if self.device.type == "cuda":  # from pinned memory, so that the copy need not wait for the last step
            x, c = (v.pin_memory().to(self.device, non_blocking=True) for v in (x, c))
        self.advance(x, c)
        self.step += 1
        if self.step % 10 == 0 or self.step in (1, self.steps):
            self.take_average()
        if self.device.type == "cpu" or self.due():  # to look makes a GPU wait
            self.look(windows)

    def update(self, x, c):
        """Forward, backward, clip, Adam. Nothing here waits for the device: it can be captured as it is."""
        nll, loss = self.model(x, c, self.fade)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.flow.parameters(), self.config.grad_clip)
        self.optimizer.found_inf = bad = 1 - norm.isfinite().float()  # at 1 Adam changes nothing
        self.optimizer.step()
        self.skipped.copy_((self.skipped + 1) * bad)  # steps in a row

    @torch.no_grad()
    def take_average(self):
        """The weights' mean over about the last tenth of the steps so far. It is validated and kept: what
        Adam's steps add to the weights by chance goes out of it long before the learning rate falls."""
        for mean, weight in zip(self.average.parameters(), self.flow.parameters()):
            mean.lerp_(weight, 100 / (self.step + 100))

    def look(self, windows):
        """A gradient that is not finite has changed nothing; it is named, five in a row end the run."""
        if not self.skipped:
            return
        names = ", ".join(clip["name"] for clip, _ in windows[:4])
        print(f"step {self.step}: gradient not finite (clips {names}, ...), skipped", flush=True)
        if self.skipped >= 5:
            kept = f"{self.out / 'checkpoint.pt'} keeps the last good weights; lower --lr or mend these clips"
            raise UserError(f"step {self.step}: 5 gradients in a row not finite vs finite ones. {kept}")

    def due(self):
        """Whether to validate and to save after this step."""
        return self.step in (1, self.steps) or self.step % self.config.eval_interval == 0

    def run(self):
        """Train to the last step or the first signal; returns that signal's number, or 0."""
        clock, done = time.perf_counter(), self.step
        with Interrupt() as interrupt:
            while self.step < self.steps:
                self.train_step()
                if self.step < self.steps and (signalled := self.processes.largest(interrupt.signal)):
                    if self.rank == 0:
                        self.save_resume()
                    return signalled
                seconds = (time.perf_counter() - clock) / (self.step - done)  # a step
                if self.rank == 0 and self.due():
                    self.log(seconds)
                    clock, done = time.perf_counter(), self.step
                elif self.rank == 0 and CLEAR and self.step % 10 == 0:
                    steps = f"{CLEAR}step {self.step}/{self.steps}  {1 / seconds:.1f} steps/s"
                    print(steps, end="", flush=True)
        return 0

    def log(self, seconds):
        """Validate, append to log.jsonl, print, keep the best weights and everything that --resume needs."""
        train, val = (validate(self.average, self.held[split]) for split in ("train", "val"))
        speed = round(self.config.batch_size * self.T / seconds)
        entry = {"step": self.step, "train_nll": train, "val_nll": val, "frames_per_second": speed}
        left = datetime.timedelta(seconds=round((self.steps - self.step) * seconds))
        line = f"step {self.step:5d}/{self.steps}: train nll {train:.4f} val nll {val:.4f}{self.beside(val)}"
        print(f"{CLEAR}{line} | {seconds * 1000:.0f} ms a step | {left} left", flush=True)
        with open(self.out / "log.jsonl", "a") as f:
            f.write(json.dumps(entry) + "\n")
        if val < self.best:  # never true for NaN
            self.best = val
            self.save("checkpoint.pt", self.average, val_nll=self.best)
        self.save_resume()

    def save(self, name, flow, **more):
        state = {"format": 1, "config": dataclasses.asdict(self.config), "data": describe(self.clips)}
        state |= {"step": self.step, "model": flow.state_dict(), **more}
        write_checkpoint(self.out / name, state)

    def save_resume(self):
        rng = (torch.cuda if self.device.type == "cuda" else torch).get_rng_state()
        more = {"best": self.best, "average": self.average.state_dict(), "torch_rng": rng}
        more |= {"optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state()}
        self.save("resume.pt", self.flow, **more)

    def restore(self, state):
        """Go on with the same windows and noise as if nothing had happened; alone, with the same dropout."""
        self.step, self.best = state["step"], state["best"]
        self.flow.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, rate in zip(self.optimizer.param_groups, rates):  # the file's lie on the CPU
            group["lr"] = rate
        self.generator.set_state(state["generator"])
        if self.world == 1:
            (torch.cuda if self.device.type == "cuda" else torch).set_rng_state(state["torch_rng"])


def load_checkpoint(path, device="cpu"):
    """A trained flow, ready to sample, and the dict it came from (config, data, step, val_nll)."""
    state = read_checkpoint(path)
    with fits(path), torch.device("meta"):  # sizes only, until they are compared
        flow = TalkingFlow(Config(**state["config"]))
        flow.load_state_dict(state["model"], assign=True)
    return flow.eval().to(device), state
