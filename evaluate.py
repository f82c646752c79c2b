"""
The whole experiment on any prepared data: the paper's Tables 1 and 2, its ablation, the rows without which no number
means anything, and the listening test.

    python evaluate.py                        the synthetic talkers and the newest run; trains the other rows
    python evaluate.py --data data/grid-s1    any folder made by prepare_data.py
    python evaluate.py rating-page            a blind listening test as one .html file
    python evaluate.py rating-results FILES   mean opinion scores of the answers it collected

Markdown goes to stdout, progress to stderr; results.json, figures and a cached file a row to --out: a stopped run goes
on. Reading order: metrics, SyncNet, held-out clips, anchors, flows, compared systems, tables, figures, ratings.

One rule for "truth": the held-out landmarks with the dequantisation noise the models are trained on (drawn once, by
--seed; none on the synthetic talkers). A row is one or more tracks (K, N, T, D) for N held-out windows. "1 draw" is the
first of them, "mean" the track that averages the draws frame by frame, "T=0" the flow's central track. These are not
the same thing: a perfect sampler is sqrt(2) further from the truth than the conditional mean it is centred on.

[1] Liang et al.: TalkingFlow (the paper)      [2] Chung, Zisserman: Out of time: automated lip sync in the wild, 2016
[3] Eskimez et al.: Generating talking face landmarks, arXiv 1803.09803; eeskimez/Talking-Face-Landmarks
[4] Chen et al.: Hierarchical cross-modal talking face generation (ATNet), arXiv 1905.03820; lelechen63/ATVGnet
[5] Ji et al.: Audio-driven emotional video portraits (EVP), arXiv 2104.07452; jixinya/EVP
[6] Lu, Chai, Cao: Live Speech Portraits, ACM TOG 40(6), 2021; YuanxunLu/LiveSpeechPortraits
[7] Gneiting, Raftery: Strictly proper scoring rules, prediction, and estimation, JASA 102, 2007
[8] Soukupova, Cech: Real-time eye blink detection using facial landmarks, CVWW 2016
[9] Yuan, Kitani: DLow: diversifying latent flows for diverse human motion prediction, ECCV 2020
[10] Heusel et al.: GANs trained by a two time-scale update rule converge to a local Nash equilibrium, NeurIPS 2017
"""

import argparse
import base64
import concurrent.futures
import contextlib
import copy
import csv
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import prepare_data
import talkingflow
from media import console
from media.console import UserError
from media.landmarks import CURVES, EYES, flat, lip_points, mouth_opening, points
from media.sound import Mel, wav_bytes
from media.talkers import SyntheticFace
from talkingflow import Config

# ----------------------------------------------------------------------------------------------------------------------
# Metrics. Tracks are (..., T, D) or (..., T, 68, 2), D = 136: x0 y0 x1 y1 ... of the 68 iBUG points. A metric of clips
# returns one number a clip, (N,), so that `summary` can say how sure its mean is.



def mean_interocular(track):
    """Mean distance between the outer eye corners of tracks (N, T, 136) -> (N,): the unit of every distance here."""
    p = points(track)
    return np.linalg.norm(p[..., EYES[0], :] - p[..., EYES[1], :], axis=-1).mean(-1)


def l_mor(track, truth):
    """L_MOR (N,): mean |MOR - MOR of the truth| over frames, MOR = inner-lip gap / width. [1, Sec. 3.1] names it, its
    source was not available: the definition is the usual one. Invariant to shift, turn and scale of either face."""
    return np.abs(mouth_opening(points(track)) - mouth_opening(points(truth))).mean(-1)


def mouth_correlation(track, truth):
    """Pearson correlation over frames of the two mouth openings (N,); 0 for a mouth that does not move. It ignores a
    person's resting mouth and range, so it can be read on strangers, where L_MOR cannot."""
    a, b = (mouth_opening(points(v)) for v in (track, truth))
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    return (a * b).sum(-1) / np.maximum(np.sqrt((a**2).sum(-1) * (b**2).sum(-1)), 1e-9)


def landmark_distance(track, truth, part=points):
    """LMD (N,): mean distance of corresponding points, over frames and points, in interocular distances, of the face
    (part=points) or of the lips about their own centre (part=lip_points), as [4] has it; [4] sums over the points of
    re-detected images, M-LD and F-LD of [5] are means."""
    gap = np.linalg.norm(part(track) - part(truth), axis=-1)
    return gap.mean((-2, -1)) / mean_interocular(truth)


def velocity_distance(track, truth, fps, part=points):
    """LVD (N,): mean distance of corresponding points' velocities, in interocular distances a second (M-LVD, F-LVD of
    [5]), of the face or, part=lip_points, of the lips about their own centre."""
    gap = np.linalg.norm(np.diff(part(track) - part(truth), axis=-3), axis=-1)
    return gap.mean((-2, -1)) * fps / mean_interocular(truth)


def energy_score(draws, truth):
    """Fair energy score [7]: E|X - y| - E|X - X'| / 2 of draws (K, N, T, n) against truth (N, T, n), a norm over n in
    every frame, mean over frames -> (N,). The multivariate CRPS: least for the true distribution; for one draw it is
    the distance itself. Fair: the second mean leaves out a draw's distance to itself, so K does not change the
    expectation."""
    K = len(draws)
    near = np.mean([np.linalg.norm(x - truth, axis=-1).mean(-1) for x in draws], 0)
    return near if K == 1 else near - pairwise_distance(draws) / 2


def pairwise_distance(draws):
    """Diversity: mean distance, a norm over the last axis, between two of K draws (K, N, T, n) of the same sound ->
    (N,), the average pairwise distance of [9] taken frame by frame."""
    pairs = [np.linalg.norm(draws[i] - draws[j], axis=-1).mean(-1) for i in range(len(draws)) for j in range(i)]
    return np.mean(pairs, 0)


def coverage(draws, truth, share):
    """Share of frames in which truth (N, T) lies in the central interval of `share` of the draws (K, N, T) -> (N,). A
    calibrated forecast covers `share` [7, Sec. 6.2], for finite K too if the ends are read at rank p (K + 1) (K >= 19
    for 90 %)."""
    low, high = np.quantile(draws, [(1 - share) / 2, (1 + share) / 2], axis=0, method="weibull")
    return ((truth >= low) & (truth <= high)).mean(-1)


def best_of(distances):
    """Distance of the best of K draws (K, N) -> (N,), as the average displacement error of [9]. Any spread lowers it,
    plain noise too: read it beside the noise row."""
    return distances.min(0)


def frechet(mean1, cov1, mean2, cov2):
    """Frechet distance of two Gaussians [10, Eq. 6]: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). Clips drawn with
    replacement raise it, so its bootstrap interval lies too high: results.json has it, the table does not."""
    values, vectors = np.linalg.eigh(cov1)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root).clip(0)).sum()
    return max(0.0, float(((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross))


def motion_features(track, truth, components=8):
    """Features for `frechet` (N, T - 1, 2 components): principal components of the truth's frames and their velocities,
    each in units of the truth's own standard deviation."""
    flat = truth.reshape(-1, truth.shape[-1])
    _, _, axes = np.linalg.svd(flat[:: max(1, len(flat) // 4000)] - flat.mean(0), full_matrices=False)

    def features(x):
        code = (x - flat.mean(0)) @ axes[:components].T
        return np.concatenate([code[:, 1:], np.diff(code, axis=1)], -1)

    return features(track) / features(truth).std((0, 1))


def moments(features):
    """Sums that give mean and covariance of features (N, T, n) of any set of clips: (N, n + n^2)."""
    outer = np.einsum("nti,ntj->nij", features, features) / features.shape[1]
    return np.concatenate([features.mean(1), outer.reshape(len(features), -1)], 1)


def frechet_of_moments(both):
    """`frechet` from the averaged moments of two sets, one behind the other."""
    first, second = np.split(both, 2)
    n = int((math.sqrt(1 + 4 * len(first)) - 1) / 2)
    covs = [v[n:].reshape(n, n) - np.outer(v[:n], v[:n]) for v in (first, second)]
    return frechet(first[:n], covs[0], second[:n], covs[1])


def roughness(track):
    """Mean |second difference| over time of tracks (N, T, ...) -> (N,): what the eye sees as trembling (ours). A row's
    jitter ratio is its roughness over the truth's, for the head (centroid of all points) and the mouth opening."""
    return np.abs(np.diff(track, 2, axis=1)).mean(tuple(range(1, track.ndim)))


def velocity_products(track):
    """Lag-1 product and square of the velocity of tracks (N, T, n) -> (N, 2): their ratio is the velocity
    autocorrelation (ours), 0.5 and more for a gliding head, -0.5 for white noise."""
    v = np.diff(track, axis=1)
    v = v - v.mean(1, keepdims=True)
    return np.stack([(v[:, 1:] * v[:, :-1]).sum((1, 2)), (v**2).sum((1, 2))], 1)


def ratio(sums):
    """A numerator over a denominator, both summed over clips."""
    return float(sums[0] / max(sums[1], 1e-30))


def velocity_autocorrelation(track):
    """Lag-1 autocorrelation of the velocity of all tracks (N, T, n) together."""
    return ratio(velocity_products(track).sum(0))


def blink_rate(track, fps):
    """Blinks a minute (N,): how often the eye aspect ratio [8] of both eyes falls below 80 % of its median over the
    clip."""
    p = points(track)

    def apart(*pairs):
        return sum(np.linalg.norm(p[..., a, :] - p[..., b, :], axis=-1) for a, b in pairs)

    height, width = apart((37, 41), (38, 40), (43, 47), (44, 46)), apart((36, 39), (42, 45))
    aspect = height / (2 * np.maximum(width, 1e-6))  # (N, T)
    closed = aspect < 0.8 * np.median(aspect, -1, keepdims=True)
    return (closed[..., 1:] & ~closed[..., :-1]).sum(-1) * 60 * fps / aspect.shape[-1]


def power_spectrum(track):
    """Mean power of tracks (N, T, n) at each frequency of the time axis (T // 2 + 1,), clip means removed, Hann
    window."""
    v = (track - track.mean(1, keepdims=True)) * np.hanning(track.shape[1])[:, None]
    return (np.abs(np.fft.rfft(v, axis=1)) ** 2).mean((0, 2))


def auc(low, high):
    """Probability that a number of `low` is below one of `high`, ties half."""
    low, high = np.asarray(low)[:, None], np.asarray(high)[None]
    return float((low < high).mean() + 0.5 * (low == high).mean())


def summary(values, statistic=None, draws=1000, seed=0, clips=None):
    """Mean over windows, standard deviation over clips, and the 95 % interval of the mean when clips are drawn with
    replacement: windows of one clip, named in `clips` (N,), go together.

    values (N,), or (N, q) with a statistic of their mean (q,), such as a ratio of two sums -> {"mean", "sd", "low",
    "high"}."""
    values = np.asarray(values, np.float64)
    alone = clips is None or len(set(clips)) == 1  # of one clip only its windows can be drawn
    clip = np.arange(len(values)) if alone else np.unique(clips, return_inverse=True)[1]
    sizes = np.bincount(clip)
    sums = np.stack([values[clip == g].sum(0) for g in range(len(sizes))])
    counts = np.random.default_rng(seed).multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), draws)
    means = ((counts @ sums).T / (counts @ sizes)).T
    mean, each = values.mean(0), (sums.T / sizes).T
    if statistic is not None:
        mean, means, each = statistic(mean), [statistic(v) for v in means], [statistic(v) for v in each]
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": float(mean), "sd": float(np.std(each)), "low": float(low), "high": float(high)}


# ----------------------------------------------------------------------------------------------------------------------
# Landmark SyncNet [2], "modified" in [1] without saying how. Ours: five frames of the 20 lip points (minus their
# centroid, over the clip's interocular distance: the opening stays) against 0.2 s of log-mel at 100 columns a second;
# two perceptrons to 64 numbers on the unit sphere; Euclidean distance d, loss d^2 for pairs and max(0, 1 - d)^2 for
# non-pairs. That margin puts truth near 0.2 and strangers near 1.2, the scale of the paper's table. It learns real
# pairs of the training split only.


class SyncNet(nn.Module):
    """Two towers that put lips and sound on one sphere, near each other where they belong together (see above)."""

    FRAMES, COLUMNS, BANDS = 5, 20, 40  # five frames, four columns each

    def __init__(self):
        super().__init__()
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(size, 256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 256), nn.ReLU(),
                          nn.Dropout(0.2), nn.Linear(256, 64))
            for size in (self.FRAMES * 40, self.COLUMNS * self.BANDS)
        )
        self.register_buffer("lip_scale", torch.zeros(2, 40))  # mean, standard deviation
        self.register_buffer("mel_scale", torch.zeros(2, self.BANDS))

    def embed_lips(self, lips):
        """(..., 5, 40) -> unit vectors (..., 64)."""
        return F.normalize(self.towers[0](((lips - self.lip_scale[0]) / self.lip_scale[1]).flatten(-2)), dim=-1)

    def embed_sound(self, mel):
        """(..., 20, 40) -> unit vectors (..., 64)."""
        return F.normalize(self.towers[1](((mel - self.mel_scale[0]) / self.mel_scale[1]).flatten(-2)), dim=-1)

    def fit(self, lips, mel, steps, seed=0, batch=128):
        """lips (N, T, 40), mel (N, 4T, 40) of real pairs. Non-pairs, as many as pairs: the same clip 5 to 50 frames
        off, or another."""
        generator = torch.Generator().manual_seed(seed)
        self.lip_scale[:], self.mel_scale[:] = (torch.stack([v.mean((0, 1)), v.std((0, 1)) + 1e-6])
                                                for v in (lips, mel))
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.05)
        N, T = lips.shape[:2]

        def draw(low, high):
            return torch.randint(low, high, (batch,), generator=generator)

        def take(v, clip, first, count):
            return v[clip[:, None], first[:, None] + torch.arange(count)]

        self.train()
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
            clip, t = draw(0, N), draw(0, T - 4)
            far = t + draw(5, 51) * (2 * draw(0, 2) - 1)
            same = (far >= 0) & (far < T - 4) & (draw(0, 2) == 1)
            other, other_t = torch.where(same, clip, (clip + draw(1, N)) % N), torch.where(same, far, draw(0, T - 4))
            v = self.embed_lips(take(lips, clip, t, 5))
            near = (v - self.embed_sound(take(mel, clip, 4 * t, 20))).norm(dim=-1)
            wrong = (v - self.embed_sound(take(mel, other, 4 * other_t, 20))).norm(dim=-1)
            loss = (near**2).mean() + ((1 - wrong).clamp_min(0) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return self.eval()

    @torch.no_grad()
    def distances(self, lips, mel, shift=0):
        """Distance of lips (N, T, 40) at t to sound (N, 4T, 40) at t + shift -> (N, T - 4 - |shift|)."""
        v = self.embed_lips(lips.unfold(1, 5, 1).transpose(2, 3))  # (N, T - 4, 64)
        a = self.embed_sound(mel.unfold(1, 20, 4).transpose(2, 3))
        n = v.shape[1] - abs(shift)
        return (v[:, max(0, -shift) :][:, :n] - a[:, max(0, shift) :][:, :n]).norm(dim=-1)

    def check(self, lips, mel):
        """AUC of held-out real pairs against another clip's sound: by clip (what the score is) and by five-frame
        window."""
        near, wrong = self.distances(lips, mel).numpy(), self.distances(lips, mel.roll(1, 0)).numpy()
        return {"auc": auc(near.mean(1), wrong.mean(1)), "auc_window": auc(near.ravel()[::7], wrong.ravel()[::7])}


def lip_shapes(track):
    """What SyncNet sees of tracks (N, T, 136) -> float32 tensor (N, T, 40)."""
    lips = flat(lip_points(track)) / np.maximum(mean_interocular(track), 1e-6)[:, None, None]
    return torch.from_numpy(lips.astype(np.float32))


def sync_score(net, track, mel):
    """SyncNet score (N,): mean distance over the frames of a clip, at no offset."""
    return net.distances(lip_shapes(track), mel).mean(1).numpy()


def sync_offset(net, track, mel, reach=15):
    """(offset, confidence): argmin and median - min, over -15 to 15, of the mean distance of lips at t to sound at
    t + offset, as in [2]. Lips two frames late have -2, the truth must have 0."""
    reach = min(reach, track.shape[1] - 6)
    lips = lip_shapes(track)
    curve = [float(net.distances(lips, mel, shift).mean()) for shift in range(-reach, reach + 1)]
    return int(np.argmin(curve)) - reach, float(np.median(curve) - min(curve))


# ----------------------------------------------------------------------------------------------------------------------
# Held-out clips


class Held:
    """The windows that every row is scored on, and what a row may learn from: the training split of `clips`.

    x (N, T, D): truth. sound(lead): log-mel (N, T, M), the same look-ahead for every row. fine: log-mel at four columns
    a frame, computed here from the samples, for the SyncNet and the systems that want MFCC."""

    def __init__(self, clips, limit=64, seed=0, draws=20):
        self.clips, self.seed, self.draws, self.fps = clips, seed, draws, clips.fps
        self.config = dataclasses.replace(
            Config(), **{"dim": clips.dim, "cond_dim": clips.cond_dim} | clips.meta.get("defaults", {}), seed=seed)
        self.T, self.lead, self.noise = clips.window_length(self.config.seq_len), self.config.lead, self.config.noise
        self.split = "test" if clips.windows("test", self.T) else "val"
        self.windows = clips.windows(self.split, self.T, limit)
        if len(self.windows) < 2:
            raise UserError(f"{clips.folder}: {len(self.windows)} held-out windows of {self.T} frames vs at least 2. "
                            "Prepare more clips")
        self.hear = Mel(SyncNet.BANDS, window=0.025, fps=4 * self.fps,
                                    sample_rate=clips.meta["sample_rate"])
        self.columns = {}
        self.x = clips.batch(self.windows, self.T, 0, self.noise, torch.Generator().manual_seed(seed))[0].numpy()
        self.speakers = [clip["speaker"] for clip, _ in self.windows]
        self.names, N = [clip["name"] for clip, _ in self.windows], len(self.windows)
        self.other = [next((j % N for j in range(i - 1, i - N, -1) if self.names[j] != name), i - 1)
                      for i, name in enumerate(self.names)]  # for each window, one of another clip
        self.strangers = not set(self.speakers) & {clip["speaker"] for clip in clips.split("train")}
        self.device = talkingflow.choose_device("auto")

    def sound(self, lead):
        """Log-mel (N, T, M) of the windows, heard `lead` frames ahead."""
        return self.clips.batch(self.windows, self.T, lead)[1]

    def fine(self, windows, T, lead=0):
        """Log-mel (n, 4 (T + 6 + lead), 40) from six frames before each window to `lead` after it; a clip's ends are
        repeated."""
        rows = []
        for clip, s in windows:
            if clip["name"] not in self.columns:
                sound = self.clips.audio[clip["audio_start"] : clip["audio_start"] + clip["audio_samples"]]
                self.columns[clip["name"]] = self.hear.columns(sound / np.float32(32768))
            mel = self.columns[clip["name"]]
            rows.append(mel[np.arange(4 * (s - 6), 4 * (s + T + lead)).clip(0, len(mel) - 1)])
        return torch.from_numpy(np.stack(rows))

    def sync_sound(self):
        """Log-mel (N, 4T, 40) of the windows alone, for the SyncNet."""
        return self.fine(self.windows, self.T)[:, 24:]

    def training(self, limit, T=None):
        """x (n, T, D) and c (n, T, M) of up to `limit` training windows, and the windows."""
        T = T or self.T
        windows = self.clips.windows("train", T, limit)
        x, c = self.clips.batch(windows, T, self.lead, self.noise, torch.Generator().manual_seed(self.seed + 1))
        return x, c, windows

    def articulation(self):
        """Of the synthetic talkers: what the sound says of the face, (N, T, 4)."""
        rows = np.load(self.clips.folder / "articulation.npy", mmap_mode="r")
        return np.stack([rows[clip["start"] + s : clip["start"] + s + self.T] for clip, s in self.windows])


@dataclasses.dataclass
class Outcome:
    """What a row hands in to be scored: draws (K, N, T, D), and where it has them its central track (N, T, D), its NLL
    -log p(x | c) / (T D) [1, Eq. 11] with the clip's own and with another clip's sound (N,), their difference times D
    being the audio gain (ours), its parameters and seconds, its latents' deviations."""

    draws: np.ndarray
    central: np.ndarray = None
    nll: np.ndarray = None
    nll_wrong: np.ndarray = None
    train_seconds: float = None
    sample_seconds: float = None
    parameters: int = None
    latents: dict = None


# ----------------------------------------------------------------------------------------------------------------------
# Anchor rows: what a number means when nothing, little or everything is known


class VectorAutoregression:
    """x_t = A_1 x_{t-1} + ... + A_p x_{t-p} + B s_t + b + e, fitted in closed form to x (N, T, D) and features s (N, T,
    S) of the sound, or None: the line that a flow has to beat. Frame t < p has an order-t model. Only B is held back by
    `ridge`: the landmarks' small directions are differences of nearly equal coordinates, and any ridge on A costs more
    than it saves."""

    def __init__(self, x, order, s=None, ridge=1e-2):
        self.mean, self.models, D = x.mean((0, 1), dtype=torch.float64), [], x.shape[2]
        for p in range(order + 1):
            blocks = zip(x.split(64), s.split(64) if s is not None else [None] * len(x), strict=False)
            gram = sum(rows.T @ rows for rows in (self.rows(*block, p).flatten(0, 1) for block in blocks))
            count, sound = gram[-1, -1].clone(), slice((p + 1) * D, len(gram) - 1)
            gram[sound, sound] += ridge * torch.diag(gram[sound, sound].diagonal())
            A = torch.linalg.lstsq(gram[D:, D:], gram[D:, :D], driver="gelsd").solution  # (p D + S + 1, D)
            residual = gram[:D, :D] - gram[:D, D:] @ A - A.T @ gram[D:, :D] + A.T @ gram[D:, D:] @ A
            self.models.append((A, torch.linalg.cholesky(residual / count + 1e-12 * torch.eye(D, dtype=torch.float64))))

    def rows(self, x, s, p):
        """[x_t, x_{t-1}, ..., x_{t-p}, s_t, 1] of every frame t >= p: (N, T - p, ...)."""
        x, T = x.double() - self.mean, x.shape[1]
        lags = [x[:, p - i : T - i] for i in range(p + 1)]
        return torch.cat(lags + ([s[:, p:].double()] if s is not None else []) + [torch.ones_like(x[:, p:, :1])], 2)

    def nll(self, x, s=None):
        """Nats per coordinate (N,) of x (N, T, D)."""
        N, T, D = x.shape
        total = torch.zeros(N, dtype=torch.float64)
        for p, (A, chol) in enumerate(self.models):
            end = T if p == len(self.models) - 1 else p + 1
            rows = self.rows(x[:, :end], None if s is None else s[:, :end], p)
            e = torch.linalg.solve_triangular(chol, (rows[..., :D] - rows[..., D:] @ A).flatten(0, 1).T, upper=False)
            total += 0.5 * (e**2).sum(0).view(N, -1).sum(1)
            total += rows.shape[1] * (chol.diagonal().log().sum() + D / 2 * math.log(2 * math.pi))
        return (total / (T * D)).numpy()

    def sample(self, s, generator, temperature=1.0):
        """A draw (N, T, D) for sound features (N, T, S)."""
        x = s.new_zeros(*s.shape[:2], len(self.mean), dtype=torch.float64) + self.mean
        for t in range(s.shape[1]):
            p = min(t, len(self.models) - 1)
            A, chol = self.models[p]
            noise = torch.randn(len(s), len(self.mean), dtype=torch.float64, generator=generator)
            rows = self.rows(x[:, t - p : t + 1], s[:, t - p : t + 1], p)[:, 0]
            x[:, t] = self.mean + rows[:, len(self.mean) :] @ A + temperature * noise @ chol.T
        return x.float().numpy()


def vector_autoregression(x, held_out, order):
    """Mean NLL, in nats per coordinate per frame, of held_out (N, T, D) under a VAR without sound fitted to x (N, T,
    D)."""
    return float(VectorAutoregression(x, order).nll(held_out).mean())


class SoundFeatures:
    """The last seven mel columns (N, T, M), as ten principal components each -> (N, T, 70): small enough for closed
    forms."""

    def __init__(self, c, components=10):
        self.mean = c.mean((0, 1))
        values, vectors = torch.linalg.eigh(torch.cov((c - self.mean).flatten(0, 1).T))
        self.axes = vectors[:, -components:] / values[-components:].clamp_min(1e-6).sqrt()

    def __call__(self, c, lags=7):
        code = (c - self.mean) @ self.axes
        return torch.cat([F.pad(code, (0, 0, i, 0), value=0.0)[:, : c.shape[1]] for i in range(lags)], 2)


def shifted(frames):
    """The truth, `frames` frames late: what a row loses by bad timing alone."""
    def row(held, job):
        x = held.x
        return {"": Outcome(np.concatenate([np.repeat(x[:, :1], frames, 1), x[:, : x.shape[1] - frames]], 1)[None])}

    return row


def wrong_clip_row(held, job):
    """A perfect face that speaks another clip's sound. Where clips share a sentence frame, as GRID's do, it is not at
    chance."""
    return {"": Outcome(held.x[held.other][None])}


def constant_row(over):
    """The training mean over the axes `over` of (N, T, D): the mean face, or the time-mean track, without sound."""
    def row(held, job):
        x = held.training(1000)[0].numpy()
        return {"": Outcome(np.broadcast_to(x.mean(over, keepdims=True), held.x.shape)[None].copy())}

    return row


def loudness_row(held, job):
    """The face that least squares gives from one number a frame, the log energy between 500 and 4000 Hz, and its last
    six values."""
    mel = held.clips.meta["mel"]
    import librosa

    centres = librosa.mel_frequencies(mel["n_mels"] + 2, fmin=mel["fmin"], fmax=mel["fmax"])[1:-1]
    bands = torch.from_numpy((centres > 500) & (centres < 4000))

    def features(c):
        loud = c[..., bands].logsumexp(-1, keepdim=True)
        lags = [torch.cat([loud[:, :1].expand(-1, i, -1), loud[:, : c.shape[1] - i]], 1) for i in range(7)]
        return torch.cat([*lags, torch.ones_like(loud)], 2).double()

    x, c, _ = held.training(1000)
    weights = torch.linalg.lstsq(features(c).flatten(0, 1), x.double().flatten(0, 1)).solution
    return {"": Outcome((features(held.sound(held.lead)) @ weights).float().numpy()[None])}


def noise_row(held, job):
    """The truth plus white noise of 1 % of the interocular distance: all that a shaking tracker adds."""
    noise = np.random.default_rng(held.seed).normal(size=(held.draws, *held.x.shape))
    noise *= 0.01 * mean_interocular(held.x)[:, None, None]
    return {"": Outcome((held.x + noise).astype(np.float32), held.x)}


def nearest_row(held, job):
    """Each frame shows the training frame whose sound (last seven columns) is nearest."""
    x, c, _ = held.training(500)
    feature = SoundFeatures(c)
    bank, faces = feature(c).flatten(0, 1), x.flatten(0, 1)
    near = [torch.cdist(block, bank).argmin(1) for block in feature(held.sound(held.lead)).flatten(0, 1).split(512)]
    return {"": Outcome(faces[torch.cat(near)].view(held.x.shape).numpy()[None])}


def var_row(order):
    """A vector autoregression of this order with sound: the linear line that a deep model must beat."""
    def row(held, job):
        clock = time.perf_counter()
        x, c, _ = held.training(2000)
        feature, truth = SoundFeatures(c), torch.from_numpy(held.x)
        model, s = VectorAutoregression(x, order, feature(c)), feature(held.sound(held.lead))
        trained, generator = time.perf_counter(), torch.Generator().manual_seed(held.seed)
        draws = np.stack([model.sample(s, generator) for _ in range(held.draws)])
        return {"": Outcome(draws, model.sample(s, generator, 0.0), model.nll(truth, s),
                            model.nll(truth, s[held.other]), trained - clock, time.perf_counter() - trained,
                            sum(A.numel() + chol.tril().count_nonzero().item() for A, chol in model.models))}

    return row


def exact_row(held, job):
    """The synthetic talkers' own distribution: its mean given the sound, and draws from it, with its exact
    likelihood."""

    talker, sound = SyntheticFace(), held.articulation()
    mean = talker.mean_given_sound(sound).astype(np.float32)
    rng = np.random.default_rng(held.seed)
    draws = np.stack([talker.draw(sound, rng) for _ in range(held.draws)]).astype(np.float32)
    sampler = Outcome(draws, mean, talker.nll(held.x, sound), talker.nll(held.x, sound[held.other]))
    return {"": sampler, ", its mean": Outcome(mean[None])}


# ----------------------------------------------------------------------------------------------------------------------
# Flow rows: Configs that differ in one thing each, trained alike (steps, batch, seed, dropout, weight decay, lead, data
# start)

FLOWS = {  # name: (label, changes). One scale has one lambda, and as many steps as make up about the same parameters
    "baseline": ("Baseline: one scale, frame-wise nets, iid",
                 {"num_scales": 1, "lambdas": (1.0,), "steps_per_scale": 8, "kernel_size": 1, "dilations": (1,) * 4,
                  "prior": "iid"}),
    "tcn": ("+ ConditionTCN: one scale, iid", {"num_scales": 1, "lambdas": (1.0,), "steps_per_scale": 6,
                                               "prior": "iid"}),
    "iid": ("full, iid prior (the paper's)", {"prior": "iid"}),
    "ar2-no-mean": ("full, ar2 without mean from sound", {"prior_mean": False}),
    "ar2": ("full, ar2", {}),
    "lambda-1": ("full, ar2, all lambda = 1", {"lambdas": (1.0,) * 4}),
    "no-audio": ("full, ar2, no audio", {}),
    "learned-lambda": ("full, ar2, learned lambda", {}),
}


def silenced(clips):
    """The same clips with a sound of zeros, for the row without audio."""
    clips = copy.copy(clips)
    clips.mel = np.broadcast_to(np.float32(0), clips.mel.shape)
    return clips


def learn_lambdas(trainer):
    """Make the prior's variances parameters, one a scale: equal starts and averaged gradients stay equal under Adam."""
    prior, sizes = trainer.flow.prior, trainer.flow.sizes
    variance = nn.Parameter(prior.variance.clone())
    variance.register_hook(lambda g: torch.cat([part.mean().expand(len(part)) for part in g.split(sizes)]))
    del prior.variance
    prior.variance = variance
    trainer.optimizer = talkingflow.build_optimizer(trainer.flow, trainer.config)


def flow_row(name):
    """A TalkingFlow trained with the changes FLOWS[name], sampled at temperature 1 and 0."""
    def row(held, job):
        out, clips = job["out"] / "rows" / name, silenced(held.clips) if name == "no-audio" else held.clips
        config = dataclasses.replace(held.config, **FLOWS[name][1], steps=job["steps"],
                                     eval_interval=max(1, job["steps"] // 4))
        done = {"config": repr(config), "data": clips.meta["fingerprint"], "code": code_digest()}
        finished = json.loads((out / "done.json").read_text()) if (out / "done.json").is_file() else {}
        if finished.get("of") != done:  # trained weights outlive a change of --clips or --draws
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            trainer = talkingflow.Trainer(config, clips, out, held.device)
            if name == "learned-lambda":
                learn_lambdas(trainer)
            clock = time.perf_counter()
            if trainer.run():
                raise KeyboardInterrupt
            finished = {"of": done, "seconds": time.perf_counter() - clock}
            (out / "done.json").write_text(json.dumps(finished))
        flow, _ = talkingflow.load_checkpoint(out / "checkpoint.pt", held.device)
        return score_flow(flow, held, finished["seconds"], with_central=name in ("ar2", "iid"), deaf=name == "no-audio")

    return row


def checkpoint_row(held, job):
    """The trained run that was asked for, or the newest one: more steps than the rows above, so not a part of the
    ablation."""
    flow, state = talkingflow.load_checkpoint(job["checkpoint"], held.device)
    wanted = {key: held.clips.meta[key] for key in ("mel", "fps", "normalisation")}
    found = {key: state["data"][key] for key in wanted}
    if found != wanted or flow.config.dim != held.clips.dim:
        raise UserError(f"{job['checkpoint']}: {found} vs {wanted} in {held.clips.folder}. "
                        "Evaluate it on data prepared as its own, or pass another --checkpoint")
    if state["data"]["fingerprint"] != held.clips.meta["fingerprint"]:
        print(f"{job['checkpoint']} was trained on another folder: if it saw any of these clips, its row is too good")
    return score_flow(flow, held, None, with_central=True)


@torch.no_grad()
def nll_of(flow, x, c):
    """NLL (N,) of clips x (N, T, D) given c (N, T, M), 32 at a time on the flow's device."""
    device = flow.cond_mean.device
    blocks = zip(x.split(32), c.split(32), strict=True)
    return torch.cat([flow.nll(x.to(device), c.to(device)).cpu() for x, c in blocks])


@torch.no_grad()
def score_flow(flow, held, seconds, with_central, deaf=False):
    """Outcomes of a trained flow: its draws and, `with_central`, the temperature-0 track as a row of its own."""
    device, truth = held.device, torch.from_numpy(held.x)
    sound = held.sound(flow.config.lead) * (0.0 if deaf else 1.0)

    def nll(c):
        return nll_of(flow, truth, c).numpy()

    generator, clock = torch.Generator().manual_seed(held.seed), time.perf_counter()
    draws = np.stack([flow.sample(sound.to(device), 1.0, generator).cpu().numpy() for _ in range(held.draws)])
    spent = time.perf_counter() - clock
    central = flow.sample(sound.to(device), 0.0, generator).cpu().numpy()
    zs, _ = flow(truth.to(device), sound.to(device))
    residual = (torch.cat(zs, 2) - flow.prior_mean(sound.to(device))).cpu()
    stds = [residual[..., part].std().item() for part in torch.arange(flow.config.dim).split(flow.sizes)]
    lambdas = [part.mean().item() for part in flow.prior.variance.cpu().split(flow.sizes)]
    whole = Outcome(draws, central, nll(sound), nll(sound[held.other]), seconds, spent,
                    sum(p.numel() for p in flow.parameters()), {"std": stds, "lambda": lambdas})
    return {"": whole} | ({", temperature 0": Outcome(central[None])} if with_central else {})


# ----------------------------------------------------------------------------------------------------------------------
# The four compared systems, from their papers and released code, in our words and on our features. What differs from a
# release is said in DEVIATIONS, which is printed under the table. A system is made from training clips x (N, T, D), c
# (N, T, M); of a batch, with `fine` as Held.fine gives it, loss(x, c, fine) is a scalar, draw(x, c, fine, draws,
# generator) a track (K, N, T, D): one for a regressor.

SMALL = 8  # the releases' widths over this on a CPU, their LSTMs' over 2, Lu's head's over 4; 1 with --release-sizes

DEVIATIONS = {name: " ".join(text.split()) for name, text in {
    "all": """Tracks are this project's: face box, head motion kept, identity kept; every system hears the same
        look-ahead as the flows instead of its own delay; Adam at 1e-3 with a cosine, best of 8 validations, as many
        steps as the flows (8 windows each, Chen and Ji 16 times 16 frames as released) instead of days at the release's
        rate with batches of 128 (Eskimez) and 32 (Lu); Adam's usual betas; gradients clipped at 1; Keras', He's or
        Glorot's start; widths are the release's over {size} (where that is not 1: LSTMs over 2, Lu's head over 4).
        Test-time edits of the releases (mouth amplification, smoothing) are left out""",
    "eskimez": """our mel bands and window in place of 64 bands of 40 ms; no alignment by the eyes and no identity
        removal; no delayed target; what each layer reads is standardised, and the last one starts at the mean face""",
    "chen": """MFCC of our 40-band mel by DCT; the 28-column patch ends with the look-ahead; 20 components in place of
        6, because these faces keep their head motion, which takes the first ones; the example is the window's own first
        true frame, so this row is told the person's face""",
    "ji": """68 points and 20 components in place of 106 and 16; no emotion labels exist here: the emotion branch learns
        with the rest and its code is whatever lowers the loss; without labels and aligned sentence pairs there is no
        classifier and no cross-reconstruction to pre-train on; the example is the mean face, as released""",
    "lu": """two mel columns in place of the frozen APC features and their projection; lips and chin in the plane of the
        mean face in place of 25 points in 3-D; the head is the plane's affine map (6 numbers and 6 velocities) in place
        of 3-D pose, its least sigma of 0.03 in standard deviations of that pose; windows of the flows' length in place
        of 240 frames; sampled with sigma times 0.3, as released, without the smoothing that follows there""",
}.items()}


class SigmoidLSTM(nn.Module):
    """Keras' LSTM(activation="sigmoid", dropout=.2, recurrent_dropout=.2) with Keras' start, as [3] stacks it:
    x (B, T, C) -> (B, T, H) in 0..1. What it reads is standardised once (`begin`), or outputs near 0.3 that differ by
    0.01 would send gradients of 1e-10 down four such layers, below Adam's epsilon."""

    def __init__(self, inputs, H, dropout=0.2):
        super().__init__()
        self.inputs, self.recurrent, self.dropout = nn.Linear(inputs, 4 * H), nn.Linear(H, 4 * H, bias=False), dropout
        nn.init.xavier_uniform_(self.inputs.weight)
        nn.init.orthogonal_(self.recurrent.weight)
        self.inputs.bias.data = torch.tensor([0.0, 1.0, 0.0, 0.0]).repeat_interleave(H)  # forget gates start open
        self.register_buffer("scale", torch.tensor([[0.0], [1.0]]).repeat(1, inputs))  # mean, standard deviation

    def begin(self, x):
        """Measure what this layer reads, x (B, T, C); its outputs, for the next one."""
        late = x[:, x.shape[1] // 4 :]  # past the start-up from the zero state
        self.scale = torch.stack([late.mean((0, 1)), late.std((0, 1)).clamp_min(1e-3)])
        return self.eval()(x)

    def forward(self, x):
        x = (x - self.scale[0]) / self.scale[1]

        def drop(*size):  # one mask for all frames
            return F.dropout(x.new_ones(size), self.dropout, self.training)

        cell = h = x.new_zeros(len(x), self.recurrent.in_features)
        mask, out = drop(*h.shape), []
        for frame in self.inputs(x * drop(len(x), 1, x.shape[2])).unbind(1):
            i, f, o, new = (frame + self.recurrent(h * mask)).sigmoid().chunk(4, 1)
            cell = f * cell + i * new
            h = o * cell.sigmoid()
            out.append(h)
        return torch.stack(out, 1)


class Eskimez(nn.Module):
    """[3]: deltas of log-mel and three past frames -> four sigmoid LSTMs, the last of which is the face; mean squared
    error."""

    T, count = None, 8  # frames and windows a step

    def __init__(self, held, x, c, size):
        super().__init__()
        H, M, D = 256 // min(size, 2), c.shape[2], x.shape[2]
        self.layers = nn.Sequential(SigmoidLSTM(8 * M, H), SigmoidLSTM(H, H), SigmoidLSTM(H, H), SigmoidLSTM(H, D))
        self.register_buffer("unit", x.var((0, 1)).mean())  # for a loss of order 1
        last = self.layers[3]
        with torch.no_grad():  # near the mean face: gates at sigmoid(1) rest the cell at 1.99, outputs reach 0.88
            last.inputs.weight *= 0.1
            last.recurrent.weight *= 0.1
            last.inputs.bias.fill_(1)
            last.inputs.bias[2 * D : 3 * D] = (x.mean((0, 1)) / 0.88).clamp(0.02, 0.98).logit()
            h = self.hear(c[:64])
            for layer in self.layers:
                h = layer.begin(h)
        self.train()

    def hear(self, c):
        """First and second differences of log-mel c (B, T, M), of this frame and three past ones -> (B, T, 8 M)."""
        def past(v, i):
            return torch.cat([v[:, :1].expand(-1, i, -1), v[:, : v.shape[1] - i]], 1)

        delta = c - past(c, 1)
        both = torch.cat([delta, delta - past(delta, 1)], 2)
        return torch.cat([past(both, i) for i in range(4)], 2)

    def forward(self, c):
        return self.layers(self.hear(c))

    def loss(self, x, c, fine):
        return F.mse_loss(self(c), x) / self.unit

    def draw(self, x, c, fine, draws, generator):
        return self(c)[None]


class PCA(nn.Module):
    """The first principal components of x (N, T, D), scaled so that the largest code has variance 1."""

    def __init__(self, x, components):
        super().__init__()
        self.register_buffer("mean", x.mean((0, 1)))
        frames = (x - self.mean).flatten(0, 1)
        frames = frames[:: max(1, len(frames) // 20000)]
        _, singular, axes = torch.linalg.svd(frames, full_matrices=False)
        self.register_buffer("axes", axes[:components])
        self.unit = float(singular[0] / len(frames) ** 0.5)  # so that codes are of order 1

    def encode(self, x):
        return (x - self.mean) @ self.axes.T / self.unit

    def decode(self, code):
        return self.mean + self.unit * code @ self.axes


def convolutions(*layers):
    """("pool", size, stride) or (in, out) of a 3x3 convolution with batch norm and ReLU; channels last: a fifth
    faster."""
    parts = []
    for layer in layers:
        if layer[0] == "pool":
            parts.append(nn.MaxPool2d(*layer[1:]))
        else:
            parts += [nn.Conv2d(*layer, 3, padding=1, bias=False), nn.BatchNorm2d(layer[1]), nn.ReLU()]
    return nn.Sequential(*parts, nn.Flatten()).to(memory_format=torch.channels_last)


def perceptron(*sizes):
    """Linear layers of these sizes, each followed by a ReLU; He's start: PyTorch's own loses most of the signal."""
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))


def three_lstms(inputs, H):
    """Three LSTMs, as [4] to [6] stack them, with Glorot's start: through PyTorch's own 1 % of a movement gets out."""
    net = nn.LSTM(inputs, H, 3, batch_first=True)
    for name, weight in net.named_parameters():
        for gate in weight.data.chunk(4) if weight.dim() == 2 else ():
            (nn.init.orthogonal_ if "_hh_" in name else nn.init.xavier_uniform_)(gate)
    return net


class Chen(nn.Module):
    """[4] ATNet: MFCC patches (28, 12) -> convolutions -> 256; an example face's PCA code -> 512; three LSTMs -> PCA
    codes."""

    T, count, EMOTION = 17, 16, 0  # the frame before the clip and 16 frames; numbers of an emotion code

    def __init__(self, held, x, c, size, components=20):
        super().__init__()
        w, self.lead, self.pca = 64 // size, held.lead, PCA(x, components)
        k = torch.arange(1, 13)[:, None] * (torch.arange(SyncNet.BANDS) + 0.5) * math.pi / SyncNet.BANDS
        self.register_buffer("dct", (2 / SyncNet.BANDS) ** 0.5 * k.cos())  # cepstra 1..12, c0 dropped
        self.sound = nn.Sequential(
            convolutions((1, w), (w, 2 * w), ("pool", 3, (1, 2)), (2 * w, 4 * w), (4 * w, 4 * w), (4 * w, 8 * w),
                         ("pool", 3, (2, 2))),
            perceptron(192 * w, 32 * w, 256))
        self.example = perceptron(components, 256, 512)
        H = 256 // min(size, 2)
        self.lstm = three_lstms(768 + self.EMOTION, H)
        self.out = nn.Linear(H, components)

    def patches(self, fine):
        """(B, 4 (T + 6 + lead), 40) -> MFCC of the 28 columns up to the end of frame t + lead: (B T, 1, 28, 12)."""
        mfcc = (fine[:, 4 * self.lead :] @ self.dct.T).unfold(1, 28, 4).transpose(2, 3)
        return mfcc.flatten(0, 1)[:, None]

    def features(self, patches):
        return self.sound(patches)

    def forward(self, fine, example):
        B, T = len(fine), fine.shape[1] // 4 - 6 - self.lead
        h = self.features(self.patches(fine)).view(B, T, -1)
        h = torch.cat([self.example(example)[:, None].expand(-1, T, -1), h], 2)
        return self.out(self.lstm(h)[0])

    def loss(self, x, c, fine):
        return F.mse_loss(self(fine[:, 4:], self.pca.encode(x[:, 0])), self.pca.encode(x[:, 1:]))

    def draw(self, x, c, fine, draws, generator):
        return self.pca.decode(self(fine, self.pca.encode(x[:, 0])))[None]


class Ji(Chen):
    """[5] EVP's audio-to-landmark network: ATNet's sound encoder beside an emotion encoder of the same patches (12, 28)
    -> 128; it predicts the difference from the mean face, and its loss counts landmarks ten times beside the codes."""

    EMOTION = 128

    def __init__(self, held, x, c, size):
        super().__init__(held, x, c, size)
        w = 64 // size
        self.emotion = nn.Sequential(
            convolutions((1, w), ("pool", (1, 3), (1, 2)), (w, 2 * w), (2 * w, 4 * w), ("pool", (12, 1)),
                         (4 * w, 8 * w), ("pool", (1, 2))),
            perceptron(48 * w, 32 * w, self.EMOTION))

    def features(self, patches):
        return torch.cat([self.sound(patches), self.emotion(patches.transpose(2, 3))], 1)

    def loss(self, x, c, fine):
        code = self(fine[:, 4:], torch.zeros_like(self.pca.encode(x[:, 0])))
        unit = self.pca.unit
        return F.mse_loss(code, self.pca.encode(x[:, 1:])) + 10 * F.mse_loss(self.pca.decode(code) / unit,
                                                                             x[:, 1:] / unit)

    def draw(self, x, c, fine, draws, generator):
        return self.pca.decode(self(fine, torch.zeros_like(self.pca.encode(x[:, 0]))))[None]


class Lu(nn.Module):
    """[6] Live Speech Portraits: an LSTM moves the mouth; a WaveNet that sees its own past draws the head's motion, a
    Gaussian with diagonal covariance over 6 pose numbers and their velocities, given the sound."""

    T, count, MOUTH, STILL = None, 8, [*range(4, 13), *range(48, 68)], slice(17, 48)

    def __init__(self, held, x, c, size):
        super().__init__()
        H, M, C, wide = 512 // size, 2 * c.shape[2], 128 // min(size, 4), 256 // min(size, 2)
        self.register_buffer("face", points(x.mean((0, 1))))  # (68, 2)
        self.register_buffer("solve", torch.linalg.pinv(F.pad(self.face[self.STILL], (0, 1), value=1.0)))  # (3, 31)
        pose = self.pose(x)
        self.register_buffer("pose_scale", torch.stack([pose.mean((0, 1)), pose.std((0, 1)) + 1e-6]))
        self.register_buffer("sound_scale", torch.stack([c.mean((0, 1)), c.std((0, 1)) + 1e-6]).repeat(1, 2))
        self.register_buffer("mouth_scale", (self.mouth(x) - self.face[self.MOUTH]).flatten(2).std((0, 1)) + 1e-6)
        self.down = nn.Sequential(nn.Linear(M, H), nn.BatchNorm1d(H), nn.LeakyReLU(0.2), nn.Linear(H, H))
        self.lstm = three_lstms(H, wide)
        self.up = nn.Sequential(nn.Linear(wide, H), nn.BatchNorm1d(H), nn.LeakyReLU(0.2), nn.Linear(H, H),
                                nn.BatchNorm1d(H), nn.LeakyReLU(0.2), nn.Linear(H, 2 * len(self.MOUTH)))
        self.start = nn.Sequential(nn.Conv1d(12, C, 1), nn.LeakyReLU(0.2), nn.Conv1d(C, C, 1), nn.LeakyReLU(0.2))
        self.dilated = nn.ModuleList(nn.Conv1d(C, 2 * C, 2, dilation=2**i) for i in [*range(7)] * 2)
        self.cond, self.residual = nn.Linear(M, 14 * 2 * C), nn.ModuleList(nn.Conv1d(C, C, 1) for _ in range(14))
        self.skip = nn.ModuleList(nn.Conv1d(C, 2 * C, 1) for _ in range(14))
        self.end = nn.Sequential(nn.ReLU(), nn.Conv1d(2 * C, 2 * C, 1), nn.ReLU(), nn.Conv1d(2 * C, 24, 1))

    def pose(self, x):
        """The affine map (..., 6) that takes the mean face's brows, nose and eyes nearest to a frame's."""
        return (self.solve @ points(x)[..., self.STILL, :]).flatten(-2)

    def mouth(self, x):
        """Lips and chin seen in the mean face's frame (..., 29, 2)."""
        pose = self.pose(x).unflatten(-1, (3, 2))
        return (points(x)[..., self.MOUTH, :] - pose[..., 2:, :]) @ torch.linalg.inv(pose[..., :2, :])

    def sound(self, c):
        before = torch.cat([c[:, :1], c[:, :-1]], 1)
        return (torch.cat([before, c], 2) - self.sound_scale[0]) / self.sound_scale[1]

    def move_mouth(self, s):
        """(B, T, 2M) -> (B, T, 58), in standard deviations of the mouth."""
        h = self.down(s.flatten(0, 1)).unflatten(0, s.shape[:2])
        return self.up(self.lstm(h)[0].flatten(0, 1)).unflatten(0, s.shape[:2])

    def head(self, past, cond, memory):
        """past (B, n, 12): the frame before each; cond (B, n, 28 C). Mean and log sigma (B, n, 12); memory: each
        layer's inputs."""
        h, skips = self.start(F.dropout1d(past.transpose(1, 2), 0.5, self.training)), 0
        layers = zip(self.dilated, self.residual, self.skip, cond.transpose(1, 2).chunk(14, 1), strict=True)
        for dilated, residual, skip, sound in layers:
            d = dilated.dilation[0]
            window = torch.cat([memory.get(dilated, h.new_zeros(*h.shape[:2], d)), h], 2)
            memory[dilated] = window[:, :, -d:]
            tanh, sigmoid = (dilated(window) + sound).chunk(2, 1)
            gated = tanh.tanh() * sigmoid.sigmoid()
            h, skips = h + residual(gated), skips + skip(gated)
        mean, log_sigma = self.end(skips).transpose(1, 2).chunk(2, 2)
        return mean, log_sigma.clamp(math.log(0.03), 3)  # the release's floor

    def motion(self, x):
        """Pose and velocity (B, T, 12) in standard deviations of the pose."""
        pose = (self.pose(x) - self.pose_scale[0]) / self.pose_scale[1]
        return torch.cat([pose, F.pad(pose[:, 1:] - pose[:, :-1], (0, 0, 1, 0))], 2)

    def loss(self, x, c, fine):
        s, motion = self.sound(c), self.motion(x)
        mean, log_sigma = self.head(F.pad(motion[:, :-1], (0, 0, 1, 0)), self.cond(s), {})
        nll = (0.5 * ((motion - mean) / log_sigma.exp()) ** 2 + log_sigma).mean()
        target = (self.mouth(x) - self.face[self.MOUTH]).flatten(2) / self.mouth_scale
        return nll + F.mse_loss(self.move_mouth(s), target)

    def draw(self, x, c, fine, draws, generator, sigma=0.3):
        s = self.sound(c)
        lips = self.face[self.MOUTH] + (self.move_mouth(s) * self.mouth_scale).unflatten(2, (-1, 2))
        still = self.face.expand(*c.shape[:2], 68, 2).clone()
        still[:, :, self.MOUTH] = lips
        cond, memory, frames = self.cond(s).repeat(draws, 1, 1), {}, []
        past = cond.new_zeros(len(cond), 1, 12)
        for t in range(c.shape[1]):
            mean, log_sigma = self.head(past, cond[:, t : t + 1], memory)
            past = mean + sigma * log_sigma.exp() * torch.randn(mean.shape, generator=generator).to(mean.device)
            frames.append(past[:, 0, :6])
        pose = torch.stack(frames, 1) * self.pose_scale[1] + self.pose_scale[0]  # (K B, T, 6)
        face = F.pad(still, (0, 1), value=1.0).repeat(draws, 1, 1, 1) @ pose.unflatten(2, (3, 2))
        return face.flatten(2).unflatten(0, (draws, -1))


SYSTEMS = {"eskimez": ("Eskimez et al. [3]", Eskimez), "chen": ("Chen et al., ATNet [4], told the first frame", Chen),
           "ji": ("Ji et al., EVP [5]", Ji),
           "lu": ("Lu et al., Live Speech Portraits [6]", Lu)}


def columns_for(net, held, windows, T):
    """The sound at four columns a frame, for the systems that want MFCC; the others hear c."""
    return held.fine(windows, T, held.lead).to(held.device) if isinstance(net, Chen) else None


def fit(net, held, steps, seed):
    """Adam on random training windows, cosine from 1e-3; the weights that did best of 8 validations are kept."""
    clips, T = held.clips, net.T or held.T
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)

    def loss(windows, generator):
        x, c = clips.batch(windows, T, held.lead, held.noise, generator)
        return net.loss(x.to(held.device), c.to(held.device), columns_for(net, held, windows, T))

    best, kept, fixed = math.inf, None, clips.windows("val", T, 32)
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / (steps + 1)))
        optimizer.zero_grad()
        loss(clips.draw(net.count, T, generator), generator).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if step % max(1, steps // 8) == 0 or step == steps:
            net.eval()
            with torch.no_grad():
                now = float(loss(fixed, torch.Generator().manual_seed(0)))  # the same noise each time
            net.train()
            if now < best:
                best, kept = now, {key: value.clone() for key, value in net.state_dict().items()}
            print(f"step {step:5d}/{steps}: val loss {now:.5f}", flush=True)
    if not kept:
        raise UserError(f"{type(net).__name__}: no finite validation loss vs at least one. Mend the data")
    net.load_state_dict(kept)
    return net.eval()


def system_row(name):
    """A compared system, trained for as many steps as a flow; Lu et al.'s random head is drawn at sigma 0 too."""
    def row(held, job):
        torch.manual_seed(held.seed)
        x, c, _ = held.training(500)
        net = SYSTEMS[name][1](held, x, c, job["size"]).to(held.device)
        clock = time.perf_counter()
        fit(net, held, job["steps"], held.seed)
        trained, generator = time.perf_counter(), torch.Generator().manual_seed(held.seed)
        given = [torch.from_numpy(held.x).to(held.device), held.sound(held.lead).to(held.device),
                 columns_for(net, held, held.windows, held.T)]
        with torch.no_grad():
            draws = net.draw(*given, held.draws, generator).cpu().numpy()
            spent = time.perf_counter() - trained
            central = net.draw(*given, 1, generator, 0.0)[0].cpu().numpy() if name == "lu" else None
        return {"": Outcome(draws, central, None, None, trained - clock, spent,
                            sum(p.numel() for p in net.parameters()))}

    return row


# ----------------------------------------------------------------------------------------------------------------------
# Every row, and how one is scored, cached and printed

ROWS = {  # name: (group, label, function(held, job) -> {suffix of the label: Outcome})
    "truth": ("Anchors", "ground truth", shifted(0)),
    "late-1": ("Anchors", "ground truth, 1 frame late", shifted(1)),
    "late-3": ("Anchors", "ground truth, 3 frames late", shifted(3)),
    "late-5": ("Anchors", "ground truth, 5 frames late", shifted(5)),
    "wrong-clip": ("Anchors", "another clip's sound", wrong_clip_row),
    "mean-face": ("Anchors", "mean face", constant_row((0, 1))),
    "time-mean": ("Anchors", "time-mean track, no sound", constant_row(0)),
    "loudness": ("Anchors", "loudness alone", loudness_row),
    "noise": ("Anchors", "ground truth + 1 % noise", noise_row),
    "nearest": ("Anchors", "nearest-audio retrieval", nearest_row),
    "var2": ("Anchors", "VAR(2) with sound", var_row(2)),
    "var3": ("Anchors", "VAR(3) with sound", var_row(3)),
    "exact": ("Anchors", "exact sampler", exact_row),
    **{name: ("Compared systems", label, system_row(name)) for name, (label, _) in SYSTEMS.items()},
    **{name: ("Ablation", label, flow_row(name)) for name, (label, _) in FLOWS.items()},
    "checkpoint": ("Checkpoint", "checkpoint", checkpoint_row),
}


def score(outcome, held, net):
    """All columns of one row: {column: summary} and what the figures and the rating page need."""
    x, fps, over = held.x, held.fps, functools.partial(summary, clips=held.names)
    io, first, many = mean_interocular(x), outcome.draws[0], len(outcome.draws) >= 16
    unit, mouths = io[:, None, None], mouth_opening(points(outcome.draws))
    columns, mouth = {}, mouth_opening(points(x))
    if outcome.nll is not None:
        columns |= {"nll": over(outcome.nll), "gain": over((outcome.nll_wrong - outcome.nll) * x.shape[2])}
        if "modes" in held.clips.meta:
            columns["gap"] = over(outcome.nll - optimum(held))
    tracks = {"": first} | ({"_mean": outcome.draws.mean(0)} if many else {})
    tracks |= {"_central": outcome.central} if outcome.central is not None else {}
    for name, track in tracks.items():
        if net is not None:
            columns["sync" + name] = over(sync_score(net, track, held.sync_sound()))
        columns["l_mor" + name] = over(l_mor(track, x))
        columns["mouth_r" + name] = over(mouth_correlation(track, x))
        columns["lips" + name] = over(landmark_distance(track, x, lip_points))
    columns["face"] = over(landmark_distance(first, x))
    columns["lips_velocity"] = over(velocity_distance(first, x, fps, lip_points))
    columns["face_velocity"] = over(velocity_distance(first, x, fps))
    columns["energy"] = over(energy_score(outcome.draws, x) / io / 68**0.5)
    if many:
        columns["coverage50"] = over(coverage(mouths, mouth, 0.5))
        columns["coverage90"] = over(coverage(mouths, mouth, 0.9))
        columns["spread"] = over(pairwise_distance(outcome.draws) / io / 68**0.5)
        columns["spread_lips"] = over(pairwise_distance(flat(lip_points(outcome.draws))) / io / 20**0.5)
        columns["best"] = over(best_of(np.stack([landmark_distance(v, x, lip_points) for v in outcome.draws])))
    both = np.concatenate([moments(motion_features(v, x)) for v in (first, x)], 1)
    columns["frechet"] = over(both, frechet_of_moments, draws=200)
    head, true_head = points(first).mean(2), points(x).mean(2)
    columns["jitter_head"] = over(np.stack([roughness(head), roughness(true_head)], 1), ratio)
    columns["jitter_mouth"] = over(np.stack([roughness(mouths[0]), roughness(mouth)], 1), ratio)
    columns["velocity"] = over(velocity_products(head), ratio)
    columns["blinks"] = over(blink_rate(first, fps))
    row = {"columns": columns, "train_seconds": outcome.train_seconds, "parameters": outcome.parameters,
           "latents": outcome.latents, "draws": len(outcome.draws),
           "sample_seconds": outcome.sample_seconds and outcome.sample_seconds * fps / mouths.size,
           "spectrum": power_spectrum(head / unit).tolist(), "mouths": mouths[:20, :8].round(4).tolist()}
    if held.strangers:
        groups = [[i for i, name in enumerate(held.speakers) if name == speaker]
                  for speaker in sorted(set(held.speakers))]
        row["mouth_r_by_speaker"] = float(np.mean([mouth_correlation(first[g], x[g]).mean() for g in groups]))
    if net is not None:
        row["offset"], row["confidence"] = sync_offset(net, first, held.sync_sound())
    return row


def optimum(held):
    """Exact NLL of each window of the synthetic talkers (N,)."""
    if all(clip["frames"] == held.T for clip, _ in held.windows):
        return np.array([clip["optimal_nll"] for clip, _ in held.windows])

    return SyntheticFace().nll(held.x, held.articulation())


def truth_spread(held):
    """The truth's own diversity: distance between different clips, face and lips, in the unit of the `spread`
    columns."""
    io = mean_interocular(held.x).mean()
    tracks = np.stack([np.roll(held.x, i, 0) for i in range(min(8, len(held.x)))])
    lips = pairwise_distance(flat(lip_points(tracks))).mean() / io / 20**0.5
    return float(pairwise_distance(tracks).mean() / io / 68**0.5), float(lips)


def train_syncnet(held, out, steps):
    """The SyncNet of this data, cached in out/syncnet.pt, and its check on held-out truth; None where it may not
    score."""
    torch.manual_seed(held.seed)
    path, net = out / "syncnet.pt", SyncNet()
    key = [held.clips.meta["fingerprint"], held.seed, steps, held.T, code_digest()]
    state = torch.load(path, weights_only=True) if path.is_file() else {}
    if state.get("key") == key:
        net.load_state_dict(state["model"])
    else:
        x, _, windows = held.training(600)
        net.fit(lip_shapes(x.numpy()), held.fine(windows, held.T)[:, 24:], steps, held.seed)
        console.write_atomically(path, lambda p: torch.save({"key": key, "model": net.state_dict()}, p))
    return net.eval(), net.check(lip_shapes(held.x), held.sync_sound())


@functools.cache
def code_digest():
    """Of this file and talkingflow.py: rows of other code are not taken from the cache."""
    return hashlib.sha256(b"".join(Path(f).read_bytes() for f in (__file__, talkingflow.__file__))).hexdigest()


def run_row(name, job):
    """Make, score and cache one row; {label: row}. Runs in a process of its own where there are several."""
    torch.set_num_threads(1)  # small tensors: a second thread only waits for the first
    path = job["out"] / "rows" / f"{name}.json"
    held = Held(talkingflow.Clips(job["data"]), job["clips"], job["seed"], job["draws"])
    key = {k: str(job[k]) for k in ("steps", "clips", "seed", "draws", "size", "sync_steps")}
    key |= {"data": held.clips.meta["fingerprint"], "code": code_digest()}
    if name == "checkpoint":
        key["checkpoint"] = hashlib.sha256(Path(job["checkpoint"]).read_bytes()).hexdigest()
    if path.is_file():
        cached = json.loads(path.read_text())
        if cached["key"] == key:
            print(f"{name}: from {path}", file=sys.stderr, flush=True)
            return cached["rows"]
    clock = time.perf_counter()
    net, facts = train_syncnet(held, job["out"], job["sync_steps"])
    print(f"{name} ...", file=sys.stderr, flush=True)
    with contextlib.redirect_stdout(sys.stderr):
        outcomes = ROWS[name][2](held, job)
    rows = {}
    for suffix, outcome in outcomes.items():
        if not np.isfinite(outcome.draws).all():
            raise UserError(f"{name}: NaN or Inf in its tracks vs landmarks. Train it longer (--steps)")
        rows[ROWS[name][1] + suffix] = score(outcome, held, net if facts["auc"] >= 0.9 else None)
        if not suffix:
            path.parent.mkdir(parents=True, exist_ok=True)
            shown = outcome.draws[:3, :8].astype(np.float32)  # by the figures and the rating page
            np.save(path.with_suffix(".npy"), shown)
    console.write_atomically(path, lambda p: p.write_text(json.dumps({"key": key, "rows": rows})))
    print(f"{name}: {time.perf_counter() - clock:.0f} s", file=sys.stderr, flush=True)
    return rows


def run_rows(names, job, jobs):
    """{label: row} of all rows, in the order of ROWS, `jobs` at a time."""
    if jobs == 1:
        found = [run_row(name, job) for name in names]
    else:
        slow_first = sorted(names, key=lambda name: (name not in SYSTEMS, name not in FLOWS))
        with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            futures = {name: pool.submit(run_row, name, job) for name in slow_first}
            try:
                found = [futures[name].result() for name in names]
            except BaseException:  # Ctrl-C or a row that cannot be: the rows that wait are not started
                pool.shutdown(cancel_futures=True)
                raise
    return {label: row | {"group": ROWS[name][0], "name": name}
            for name, rows in zip(names, found, strict=True) for label, row in rows.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Tables

TABLES = [  # title, [(heading, column, digits, what follows the mean: "sd", "interval" or "")]
    ("The paper's columns, one draw: mean ± standard deviation over clips [95 % interval of the mean]",
     [("NLL", "nll", 4, "interval"), ("gap", "gap", 4, ""), ("audio gain", "gain", 2, "interval"),
      ("SyncNet ↓", "sync", 3, "both"), ("offset", "offset", 0, ""), ("L_MOR ↓", "l_mor", 4, "both"),
      ("mouth r", "mouth_r", 2, "interval")]),
    ("One draw, the mean of the draws, temperature 0: three different questions",
     [(f"{heading} {kind}", column + suffix, digits, "") for heading, column, digits in
      (("SyncNet", "sync", 3), ("L_MOR", "l_mor", 4), ("mouth r", "mouth_r", 2), ("lips", "lips", 4))
      for kind, suffix in (("1", ""), ("mean", "_mean"), ("T=0", "_central"))]),
    ("Distances in interocular distances (velocities a second), one draw; lips about their own centre; energy score "
     "of the face and best lips of all draws",
     [("lips", "lips", 4, "interval"), ("face", "face", 4, "interval"), ("lips velocity", "lips_velocity", 3, ""),
      ("face velocity", "face_velocity", 3, ""), ("energy score", "energy", 4, "interval"),
      ("best lips", "best", 4, "")]),
    ("Distribution and motion: 1 is the truth's own for jitter; coverage should be .50 and .90",
     [("coverage 50", "coverage50", 2, ""), ("coverage 90", "coverage90", 2, ""), ("diversity face", "spread", 4, ""),
      ("lips", "spread_lips", 4, ""), ("Fréchet", "frechet", 2, ""), ("head jitter", "jitter_head", 2, "interval"),
      ("mouth jitter", "jitter_mouth", 2, "interval"), ("velocity autocorr.", "velocity", 2, ""),
      ("blinks/min", "blinks", 1, "")]),
]

PAPER = """
Quoted from the paper, other data (Table 1: Obama addresses; Table 2: GRID): not to be compared digit by digit with ours

| row | MOS | SyncNet | L_MOR | GRID SyncNet | GRID L_MOR |
|---|---|---|---|---|---|
| Eskimez et al. | 3.3184 | .8752 ± .3388 | .0852 | .5879 ± .2185 | .0774 |
| Chen et al. | 3.2275 | 1.1430 ± .5814 | .1798 | .5361 ± .2429 | .0747 |
| Ji et al. | 2.8377 | 1.3112 ± .4850 | .0891 | 1.1486 ± .1962 | .1847 |
| Lu et al. | 3.4572 | .6308 ± .2314 | .0857 | .9761 ± .2404 | .1548 |
| Baseline | | 1.0183 ± .2793 | .1021 | | |
| + ConditionTCN | | .3940 ± .2754 | .0916 | | |
| full | 3.5921 | .2978 ± .1586 | .0441 | .3591 ± .1302 | .0918 |
| ground truth | 3.9605 | .1785 ± .1046 | 0 | .1876 ± .1212 | 0 |

Doubts. The row labels of Table 1 are lost in the text we have and are put back by order. L_MOR of Chen and Ji may be
swapped: the text has Ji's mouths all open, and Table 2 gives Ji the large value. Not given: frame rate, number of
points, mel settings, depth and width, split, what 0..1 is relative to, how many samples stand behind a score of a
random model, whether ± is over clips or frames, how many raters. One random draw is scored against one recording,
which costs a perfect sampler sqrt(2); a constant mean mouth already has .055 to .110 on tracks of this kind. Eskimez
and Chen were trained on GRID, the full model on Obama. That the Baseline does better than Chen and Ji holds for
SyncNet, not for L_MOR: .1021 against Ji's .0891. A lead of 3.5921 over 3.4572 in MOS needs about 861 ratings a system
to be told from chance, if ratings have a standard deviation of 1."""


def cell(row, column, digits, follow):
    """One column of a row as text, a dash where the row has no such figure."""
    if column == "offset":
        return f"{row['offset']:+d}" if "offset" in row else "–"
    if column not in row["columns"]:
        return "–"
    f = row["columns"][column]
    text = f"{f['mean']:.{digits}f}" + (f" ± {f['sd']:.{digits}f}" if follow == "both" else "")
    return text + (f" [{f['low']:.{digits}f}, {f['high']:.{digits}f}]" if follow in ("interval", "both") else "")


def markdown(results):
    """The tables of results.json's dict."""
    f, rows = results["facts"], results["rows"]
    sync = f"AUC {f['auc']:.3f} by clip, {f['auc_window']:.3f} by five frames, on held-out truth"
    sync += "" if f["auc"] >= 0.9 else ": below .9, so it refuses to score here"
    face, lips = f["truth_spread"]
    lines = [f"""## {f["data"]}: {f["windows"]} windows of {f["frames"]} held-out frames

{f["train_clips"]} training clips, the {f["split"]} split is scored; seed {f["seed"]};
{f["steps"]} steps a trained row, {f["batch"]} clips a step of a flow; look-ahead {f["lead"]} frames;
{f["draws"]} draws a sound.
NLL in nats per coordinate per frame; audio gain in nats a frame lost with another clip's sound; SyncNet: {sync}.
The truth's own diversity, between clips: face {face:.4f}, lips {lips:.4f}.
Intervals are over clips, not over training seeds. A regressor's track is its conditional mean, a flow's one draw, which
pays about sqrt(2) in every distance: compare regressors with the columns `mean` and `T=0`."""]
    if f["split"] == "val":
        lines.append("These windows also chose the best weights: every trained row is optimistic.")
    if f["strangers"]:
        lines.append("""The held-out speakers are strangers: read mouth r (resting mouth and range do not count)
beside `another clip's sound` (chance) and `loudness alone`; L_MOR and distances carry the unknown resting face.
Mean over speakers of mouth r, one draw: """ + ", ".join(
            f"{label} {row['mouth_r_by_speaker']:.2f}" for label, row in rows.items()) + ".")
    for title, columns in TABLES:
        columns = [c for c in columns if c[1] == "offset" or any(c[1] in row["columns"] for row in rows.values())]
        lines += ["", title, "", "| row | " + " | ".join(heading for heading, *_ in columns) + " |"]
        lines.append("|---" * (len(columns) + 1) + "|")
        group = None
        for label, row in rows.items():
            if row["group"] != group:
                group = row["group"]
                lines.append(f"| **{group}** |" + " |" * len(columns))
            lines.append(f"| {label} | " + " | ".join(cell(row, *c[1:]) for c in columns) + " |")
    lines += ["", "Cost on this machine: seconds to train, to sample one second of one face (all clips at once)", "",
              "| row | parameters | train | sample |", "|---|---|---|---|"]

    def number(value, form):
        return format(value, form) if value is not None else "–"

    lines += [f"| {label} | {row['parameters']:,} | {number(row['train_seconds'], '.0f')} | "
              f"{number(row['sample_seconds'], '.4f')} |"
              for label, row in rows.items() if row["parameters"]]
    used = {row["name"] for row in rows.values()} & set(SYSTEMS)
    if used:
        lines += ["", "Where the compared systems differ from their releases:"]
        lines += [f"- {SYSTEMS[name][0] if name in SYSTEMS else 'all'}: {text.format(size=f['size'])}"
                  for name, text in DEVIATIONS.items() if name in used | {"all"}]
    return "\n".join(lines) + "\n" + PAPER


# ----------------------------------------------------------------------------------------------------------------------
# Figures, a question each. Colours are Okabe and Ito's, told apart by the colour-blind

INK, BLUE, ORANGE, GREEN = "#222222", "#0072B2", "#D55E00", "#009E73"


def figure(path, width, height, draw, rows=1, columns=1):
    """Write draw(axes (rows, columns)) to path as PNG, width x height inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    canvas, axes = plt.subplots(rows, columns, figsize=(width, height), dpi=110, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    draw(axes)
    canvas.tight_layout()
    console.write_atomically(path, lambda p: canvas.savefig(p, format="png", bbox_inches="tight"))
    plt.close(canvas)


def plot_losses(out, figures):
    """loss.png of a run: train and validation NLL over the steps, and the lines they must be seen against."""
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()][1:]  # step 1 sets no scale

    def draw(axes):
        ax = axes[0, 0]
        for split, colour in (("train", BLUE), ("val", ORANGE)):
            ax.plot([e["step"] for e in entries], [e[f"{split}_nll"] for e in entries], label=split, color=colour)
        for name, style in (("var2", ":"), ("var3", "--"), ("optimum", "-")):
            if name in figures:
                ax.axhline(figures[name], color=INK, ls=style, lw=1, label=name.replace("var", "VAR "))
        ax.set(xlabel="step", ylabel="NLL, nats per coordinate per frame")
        ax.legend(frameon=False)

    figure(out / "loss.png", 7, 4, draw)


def draw_fan(axes, row, truth, fps, label):
    """Does the mouth follow the sound, and does the model know how surely? 20 samples' openings, their 5-95 % band, the
    truth."""
    for clip, ax in enumerate(axes[:, 0]):
        mouths = np.array(row["mouths"])[:, clip]
        seconds = np.arange(mouths.shape[1]) / fps
        ax.fill_between(seconds, *np.quantile(mouths, [0.05, 0.95], axis=0, method="weibull"), color=BLUE, alpha=0.18,
                        lw=0, label="5–95 %")
        ax.plot(seconds, mouths.T, color=BLUE, alpha=0.35, lw=0.6, label="_")
        ax.plot(seconds, truth[clip], color=ORANGE, lw=1.8, label="truth")
        ax.set(ylabel="mouth opening", ylim=(0, None), xlim=(0, seconds[-1]))
    axes[0, 0].set_title(f"{len(mouths)} samples of {label}", loc="left", fontsize=10)
    axes[0, 0].legend(frameon=False, ncols=2, loc="upper right")
    axes[-1, 0].set_xlabel("seconds")


def draw_latents(axes, rows):
    """Has training given each scale the deviation that its prior asks for?"""
    ax = axes[0, 0]
    for i, (label, row) in enumerate(rows.items()):
        scales = np.arange(1, len(row["latents"]["std"]) + 1) + 0.12 * (i - (len(rows) - 1) / 2)
        ax.plot(scales, row["latents"]["std"], "osD^vP*X"[i % 8], color=(BLUE, ORANGE, GREEN, "#CC79A7")[i % 4], ms=7,
                label=label)
        for x, value in zip(scales, row["latents"]["lambda"], strict=True):
            ax.plot([x - 0.05, x + 0.05], [value**0.5] * 2, color=INK, lw=2)
    ax.plot([], [], color=INK, lw=2, label="√lambda of that row")
    ax.set(xlabel="scale, deepest first", ylabel="std of z − m(c) on held-out clips", xticks=range(1, 5),
           ylim=(0, None))
    ax.legend(frameon=False, fontsize=8, loc="lower right")


def draw_spectrum(axes, rows, fps):
    """Who trembles? Power of the head's position at each frequency."""
    ax = axes[0, 0]
    for (label, row), (colour, style) in zip(rows.items(), ((INK, "-"), (ORANGE, "--"), (BLUE, "-."), (GREEN, ":")),
                                             strict=False):
        power = np.array(row["spectrum"])
        ax.semilogy(np.arange(len(power)) * fps / 2 / (len(power) - 1), power, style, color=colour, lw=1.8, label=label)
    ax.set(xlabel="frequency, Hz", ylabel="power of the head's position", xlim=(0, fps / 2))
    ax.legend(frameon=False)


def draw_strips(axes, tracks, frames, fps):
    """Do the faces look like faces? One clip, every few frames, a strip a row (the paper's Fig. 2)."""
    faces = [points(track) for track in tracks.values()]
    low, high = np.min([f.min((0, 1)) for f in faces], 0), np.max([f.max((0, 1)) for f in faces], 0)
    for ax, label, face in zip(axes[:, 0], tracks, faces, strict=True):
        for i, t in enumerate(frames):
            for first, last, closed in CURVES:
                line = face[t, [*range(first, last + 1), *[first] * closed]] + [i * (high - low)[0] * 1.15, 0]
                ax.plot(*line.T, color=ORANGE if first >= 48 else INK, lw=1.1, clip_on=False)
        ax.set(xlim=(low[0], high[0] + (len(frames) - 1) * (high - low)[0] * 1.15), ylim=(high[1], low[1]),
               aspect="equal", xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    axes[0, 0].set_title("every row hears the same sound; frames at " + ", ".join(f"{t / fps:.2f}" for t in frames)
                         + " s", fontsize=9, loc="left")


def draw_figures(out, rows, held):
    """The figures that the rows at hand allow; the list of files."""
    by_name = {}
    for label, row in rows.items():
        by_name.setdefault(row["name"], (label, row))
    made, flows = [], [n for n in ("checkpoint", "ar2", "iid") if n in by_name]
    if flows:
        label, row = by_name[flows[0]]
        truth = mouth_opening(points(held.x[:3]))
        figure(out / "fan.png", 8, 6, lambda axes: draw_fan(axes, row, truth, held.fps, label),
               rows=min(3, len(held.x)))
        scales = {lab: r for n, (lab, r) in by_name.items() if n in ("iid", "ar2", "learned-lambda", "checkpoint")
                  and len(r["latents"]["std"]) > 1}
        figure(out / "latents.png", 7, 4, lambda axes: draw_latents(axes, scales))
        made += ["fan.png", "latents.png"]
    compared = {by_name[n][0]: by_name[n][1] for n in ("truth", "iid", "ar2", "checkpoint") if n in by_name}
    if len(compared) > 1:
        figure(out / "jitter.png", 7, 4, lambda axes: draw_spectrum(axes, compared, held.fps))
        made.append("jitter.png")
    strips = {by_name[n][0]: np.load(out / "rows" / f"{n}.npy")[0, 0]
              for n in ("truth", *SYSTEMS, "iid", "ar2", "checkpoint") if n in by_name}
    if strips:
        mouth = mouth_opening(points(held.x[0]))
        middle = int(np.argmax(mouth[4:-4])) + 4  # around the widest mouth, two frames apart
        frames = [t for t in range(middle - 8, middle + 9, 2) if 0 <= t < held.T]
        figure(out / "strips.png", 10, 0.95 * len(strips) + 0.4,
               lambda axes: draw_strips(axes, strips, frames, held.fps), rows=len(strips))
        made.append("strips.png")
    return made


# ----------------------------------------------------------------------------------------------------------------------
# What `talkingflow.py train` prints at its end: the few figures that say whether a run is any good


@torch.no_grad()
def measure(flow, clips, split="test", limit=128, seed=0):
    """Figures of a trained flow on held-out clips, as a dict; what each means stands beside it in `report`.

    Landmarks are compared at the truth's own dequantisation noise, mouth openings with the clean truth: on the
    synthetic talkers with the exact conditional mean, which is the best that any model can know. """
    flow.eval()
    config, device = flow.config, flow.cond_mean.device
    T = clips.window_length(config.seq_len)
    windows = clips.windows(split, T, limit) or clips.windows("val", T, limit)
    generator = torch.Generator().manual_seed(seed)
    x, c = clips.batch(windows, T, config.lead, config.noise, generator)
    clean = points(clips.batch(windows, T)[0].numpy())
    figures = {"clips": len(windows), "frames": T, "nll": float(nll_of(flow, x, c).mean())}
    figures["audio_gain"] = (float(nll_of(flow, x, c.roll(1, 0)).mean()) - figures["nll"]) * x.shape[2]
    truth = mouth_opening(clean)
    if "modes" in clips.meta:
        articulation = np.load(clips.folder / "articulation.npy", mmap_mode="r")
        articulation = np.stack([articulation[clip["start"] + s : clip["start"] + s + T] for clip, s in windows])
        truth = mouth_opening(points(np.array(clips.meta["mean_face"]) + articulation @ np.array(clips.meta["modes"])))

    def draw(t):
        return points(flow.sample(c.to(device), t, generator).cpu().numpy())

    noisy = points(x.numpy())

    def jitter(sample, real):
        return float(roughness(sample).mean() / roughness(real).mean())

    for name, sample in (("", draw(1.0)), ("_temperature0", draw(0.0))):
        mouth = mouth_opening(sample)
        figures["mouth_correlation" + name] = float(np.corrcoef(mouth.ravel(), truth.ravel())[0, 1])
        figures["l_mor" + name] = float(np.abs(mouth - mouth_opening(clean)).mean())
        if not name:
            figures["head_jitter"] = jitter(sample.mean(2), noisy.mean(2))
            figures["mouth_jitter"] = jitter(mouth, mouth_opening(noisy))
            figures["velocity_autocorrelation"] = velocity_autocorrelation(sample.mean(2))
            figures["velocity_autocorrelation_truth"] = velocity_autocorrelation(noisy.mean(2))
    for order in (2, 3):
        fit = clips.batch(clips.windows("train", T, 3000), T, 0, config.noise, generator)[0]
        figures[f"var{order}"] = vector_autoregression(fit, x, order)
    if "optimum" in clips.meta and T == max(clip["frames"] for clip in clips.clips):
        figures["optimum"] = float(np.mean([clip["optimal_nll"] for clip, _ in windows]))
    return figures


def report(figures):
    """The figures of `measure` as lines of text."""
    f, optimum = figures, figures.get("optimum")
    gap = (lambda nll: f"   gap to the optimum {nll - optimum:.4f}") if optimum is not None else (lambda nll: "")
    lines = [
        f"held-out figures ({f['clips']} windows of {f['frames']} frames; NLL in nats per coordinate per frame)",
        f"  flow                 {f['nll']:9.4f}{gap(f['nll'])}",
        *(f"  VAR({p}), no sound     {f[f'var{p}']:9.4f}{gap(f[f'var{p}'])}" for p in (2, 3)),
        *([f"  optimum              {optimum:9.4f}   exact, by Kalman filter"] if optimum is not None else []),
        f"  audio gain           {f['audio_gain']:9.2f}   nats a frame lost with another clip's sound",
        f"  head jitter          {f['head_jitter']:9.2f}   of the data's (mouth {f['mouth_jitter']:.2f})",
        f"  head velocity autoc. {f['velocity_autocorrelation']:9.2f}   data {f['velocity_autocorrelation_truth']:.2f}",
        f"  mouth correlation    {f['mouth_correlation']:9.2f}   one sample; {f['mouth_correlation_temperature0']:.2f} "
        "at temperature 0" + ("  (with the exact conditional mean)" if optimum is not None else ""),
        f"  L_MOR                {f['l_mor']:9.4f}   one sample; {f['l_mor_temperature0']:.4f} at temperature 0",
    ]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# Ratings: a blind listening test as one page, and what its answers say

RATED = ("truth", "wrong-clip", "eskimez", "chen", "ji", "lu", "iid", "ar2")
QUESTIONS = {"sync": "Do the lips move with the speech?", "natural": "Does the whole face move naturally?"}
SCALE = ("bad", "poor", "fair", "good", "excellent")  # the paper's


def rating_page(args):
    """`python evaluate.py rating-page`: the page, and beside it the key that says which id is which system and clip.

    The page shows ids only. Every rater gets practice, all stimuli in an order of their own, two attention checks, one
    repeat."""
    folder = Path(args.results) if args.results else newest_evaluation()
    if not (folder / "results.json").is_file():
        raise UserError(f"{folder}: no results.json vs a finished evaluation. Run: python evaluate.py --out {folder}")
    results = json.loads((folder / "results.json").read_text())
    facts = results["facts"]
    held = Held(talkingflow.Clips(facts["folder"]), facts["windows"], facts["seed"])
    if held.clips.meta["fingerprint"] != facts["fingerprint"]:
        raise UserError(f"{facts['folder']}: other clips vs those evaluated in {folder}. Evaluate again")
    have = {row["name"] for row in results["rows"].values()}
    names = [name for name in args.rows.split(",") if name in have and (folder / "rows" / f"{name}.npy").is_file()]
    if len(names) < 2:
        raise UserError(f"{folder}: {len(names)} of the systems {args.rows} vs at least 2. "
                        "Evaluate them first, or change --rows")
    sounds, stimuli, key = [], [], {}
    for number, (clip, s) in enumerate(held.windows[: args.clips]):
        rate = held.clips.meta["sample_rate"]
        first, last = (int(t * rate / held.fps) for t in (s, s + held.T))
        sound = held.clips.audio[clip["audio_start"] + first : clip["audio_start"] + min(clip["audio_samples"], last)]
        sounds.append(base64.b64encode(wav_bytes(sound, rate)).decode())
        for name in names:
            face = points(np.load(folder / "rows" / f"{name}.npy")[0, number])
            face = (face - face.mean((0, 1))) / (np.ptp(face.reshape(-1, 2), 0).max() * 1.08) * 60000
            code = hashlib.sha256(f"{args.seed} {name} {clip['name']} {s}".encode()).hexdigest()[:12]
            key[code] = {"row": name, "label": ROWS[name][1], "clip": clip["name"]}
            stimuli.append({"id": code, "sound": number, "frames": held.T,
                            "points": base64.b64encode(face.clip(-32767, 32767).astype("<i2").tobytes()).decode()})
    stimuli.sort(key=lambda stimulus: stimulus["id"])
    name = hashlib.sha256("".join(v["id"] + v["points"] for v in stimuli).encode()).hexdigest()[:12]
    page = {"set": name, "fps": held.fps, "curves": CURVES, "sounds": sounds, "stimuli": stimuli,
            "checks": [2, 4], "questions": list(QUESTIONS.items()), "labels": SCALE}
    assets, out = Path(__file__).parent / "assets", Path(args.out or folder / "rating.html")
    style = re.search(r"<style>(.*?)</style>", (assets / "player.html").read_text(), re.DOTALL)[1]  # one look for all
    script = json.dumps(page).replace("</", "<\\/")
    text = (assets / "rating.html").read_text().replace("__STYLE__", style).replace("__PAGE__", script)
    console.write_atomically(out, lambda p: p.write_text(text))
    secret, answers = out.with_suffix(".key.json"), json.dumps({"set": name, "stimuli": key}, indent=1)
    console.write_atomically(secret, lambda p: p.write_text(answers))
    print(f"{out}: {len(stimuli)} stimuli ({len(names)} systems, {len(sounds)} clips), "
          f"{out.stat().st_size / 1e6:.1f} MB, for the raters\n{secret}: which is which, not for the raters")
    return 0


def newest_evaluation():
    """The folder of the evaluation that finished last."""
    found = sorted(Path("runs").glob("evaluation-*/results.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError("runs/: no evaluation-*/results.json vs a finished evaluation. Run: python evaluate.py")
    return found[-1].parent


def read_answers(path):
    """The answers in a rater's JSON or CSV file, a list of dicts; scores are checked."""
    path = Path(path)
    try:
        text = path.read_text("utf-8-sig")  # spreadsheets put a mark in front
        rows = json.loads(text)["answers"] if path.suffix == ".json" else list(csv.DictReader(text.splitlines()))
        rows = [{key: row[key] for key in ("rater", "set", "kind", "want", "stimulus", "question")}
                | {key: int(row[key]) for key in ("score", "trial")} for row in rows]
        wrong = next((row["score"] for row in rows if row["score"] not in range(1, 6)), None)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: unreadable ({type(e).__name__}: {e}) vs a file that the rating page downloads. "
                        "Ask the rater again") from None
    if wrong is not None:
        raise UserError(f"{path}: a score of {wrong} vs 1 to 5. Ask the rater again")
    return rows


def reliable(answers):
    """Whether one rater's answers count, by a rule fixed in advance: every attention check right, no repeat more than 2
    off."""
    checks = [str(a["score"]) == str(a["want"]) for a in answers if a["kind"] == "check"]
    first = {(a["stimulus"], a["question"]): a["score"] for a in answers if a["kind"] == "rate"}
    steady = (abs(a["score"] - first.get((a["stimulus"], a["question"]), a["score"])) <= 2 for a in answers
              if a["kind"] == "repeat")
    return bool(checks) and all(checks) and all(steady)


def mean_opinion(ratings, draws=2000, seed=0):
    """{rater: [scores]} of one system -> mean over all scores and the 95 % interval when raters, not scores, are drawn
    with replacement: scores of one rater are not independent."""
    sums = np.array([[sum(scores), len(scores)] for scores in ratings.values()], float)
    counts = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), draws) @ sums
    low, high = np.quantile(counts[:, 0] / counts[:, 1], [0.025, 0.975])
    return {"mean": float(sums[:, 0].sum() / sums[:, 1].sum()), "low": float(low), "high": float(high),
            "count": int(sums[:, 1].sum())}


def ratings_needed(difference, sd):
    """Independent ratings a system to see a difference of means at 5 % with 80 % power: 2 (1.960 + 0.842)^2 (sd /
    difference)^2."""
    return math.ceil(2 * (1.95996 + 0.84162) ** 2 * (sd / difference) ** 2) if difference else math.inf


def rating_results(args):
    """`python evaluate.py rating-results FILES --key KEY`: mean opinion scores as Markdown."""
    try:
        path = Path(args.key or newest_evaluation() / "rating.key.json")
        key = json.loads(path.read_text())
        page, labels = key["set"], {code: stimulus["label"] for code, stimulus in key["stimuli"].items()}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"--key: {path} unreadable ({type(e).__name__}: {e}) vs the .key.json written beside the "
                        "page. Give that file") from None
    by_rater = {}
    for file in args.files:
        for answer in read_answers(file):
            if answer["set"] != page or answer["stimulus"] not in labels:
                raise UserError(f"{file}: answers to page {answer['set']} vs {page} of {path}. "
                                "Pass that page's key with --key")
            answers, place = by_rater.setdefault(answer["rater"], {}), (answer["trial"], answer["question"])
            old = answers.setdefault(place, answer)  # a file given twice counts once
            if old["score"] != answer["score"]:
                raise UserError(f"{file}: rater {answer['rater']} answered differently in another file vs one name a "
                                "person. Rename one of the two")
    raters = {name: list(answers.values()) for name, answers in by_rater.items()}
    kept = {name: answers for name, answers in raters.items() if reliable(answers)}
    print(f"{len(raters)} raters, {len(raters) - len(kept)} left out: no or a wrong attention check, or a repeat more "
          "than 2 off")
    if not kept:
        raise UserError("ratings: no reliable rater vs at least 1. Collect more")
    for question, text in QUESTIONS.items():
        systems, scores = {}, {}
        for name, answers in kept.items():
            for a in answers:
                if a["kind"] == "rate" and a["question"] == question:
                    systems.setdefault(labels[a["stimulus"]], {}).setdefault(name, []).append(a["score"])
        found = {label: mean_opinion(ratings, seed=args.seed) for label, ratings in systems.items()}
        order = sorted(found, key=lambda label: -found[label]["mean"])
        scores = {label: np.concatenate([*systems[label].values()]) for label in order}
        print(f"\n{text}\n\n| system | mean opinion [95 % over raters] | ratings | more ratings a system to tell it "
              "from the next |\n|---|---|---|---|")
        for label, after in zip(order, [*order[1:], None], strict=True):
            f, more = found[label], "–"
            if after:
                sd = math.sqrt((scores[label].var() + scores[after].var()) / 2)
                needed = ratings_needed(f["mean"] - found[after]["mean"], sd)
                have = min(f["count"], found[after]["count"])
                more = "cannot be told" if needed == math.inf else str(max(0, needed - have))
            sure = f"[{f['low']:.2f}, {f['high']:.2f}]" if len(systems[label]) > 1 else "[one rater]"
            print(f"| {label} | {f['mean']:.2f} {sure} | {f['count']} | {more} |")
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def newest_checkpoint(clips):
    """checkpoint.pt of the newest run under runs/ that was trained on these clips, or None."""
    for path in console.newest("checkpoint.pt"):
        with contextlib.suppress(UserError):  # a damaged run is no reason to stop
            if talkingflow.read_checkpoint(path)["data"]["fingerprint"] == clips.meta["fingerprint"]:
                return path
    return None


def tables(args):
    """`python evaluate.py`: every row, the tables on stdout, results.json and figures in --out."""
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the tables
        folder = args.data or prepare_data.default_folder()
    out = Path(args.out or Path("runs") / f"evaluation-{Path(folder).name}")
    held = Held(talkingflow.Clips(folder), args.clips, args.seed, args.draws)
    checkpoint = args.checkpoint or newest_checkpoint(held.clips)
    if checkpoint:
        talkingflow.read_checkpoint(checkpoint)  # or a clear refusal, before an hour of other rows
    absent = {"checkpoint": not checkpoint, "exact": "modes" not in held.clips.meta}
    names = [name for name in ROWS if not absent.get(name)] if args.rows == "all" else args.rows.split(",")
    for name in names:
        if name not in ROWS or absent.get(name):
            raise UserError(f"rows: {name} vs {', '.join(n for n in ROWS if not absent.get(n))}. Change --rows")
    if absent["checkpoint"]:
        print("no checkpoint of this data under runs/, and none given: the table is without that row", file=sys.stderr)
    size = 1 if args.release_sizes else SMALL
    job = {"data": str(folder), "out": out, "clips": args.clips, "seed": args.seed, "draws": args.draws,
           "steps": args.steps, "sync_steps": args.sync_steps, "size": size,
           "checkpoint": checkpoint and str(checkpoint)}
    print(f"SyncNet, then {len(names)} rows, {args.jobs} at a time, into {out}", file=sys.stderr)
    _, facts = train_syncnet(held, out, args.sync_steps)
    rows = run_rows(names, job, args.jobs)
    facts |= {"data": held.clips.folder.name, "folder": str(held.clips.folder.resolve()), "windows": len(held.x),
              "frames": held.T, "split": held.split, "train_clips": len(held.clips.split("train")),
              "seed": args.seed, "steps": args.steps, "batch": held.config.batch_size, "lead": held.lead,
              "draws": args.draws, "size": size,
              "truth_spread": truth_spread(held), "strangers": held.strangers, "speakers": sorted(set(held.speakers)),
              "fingerprint": held.clips.meta["fingerprint"], "checkpoint": checkpoint and str(checkpoint)}
    results = {"facts": facts, "rows": rows}
    console.write_atomically(out / "results.json", lambda p: p.write_text(json.dumps(results)))
    print(markdown(results))
    print(f"{out}: results.json, {', '.join(draw_figures(out, rows, held))}", file=sys.stderr)
    return 0


def build_parser():
    """The command line: the tables, or one of the two rating commands."""
    count = console.bounded
    parser = argparse.ArgumentParser(description=__doc__.split("[1]")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--data", help="folder made by prepare_data.py [data/synthetic, made on first use]")
    parser.add_argument("--checkpoint",
                        help="a run's checkpoint.pt for the last row [of the newest run on this data]")
    parser.add_argument("--out", help="folder of results.json, figures and cached rows [runs/evaluation-DATA]")
    parser.add_argument("--rows", default="all", help=f"some of {','.join(ROWS)} [all]")
    parser.add_argument("--steps", type=count(int, 1), default=400, help="optimiser steps of each trained row [400]")
    parser.add_argument("--sync-steps", type=count(int, 1), default=1500, help="of the SyncNet [1500]")
    parser.add_argument("--clips", type=count(int, 2), default=64, help="held-out windows at most [64]")
    parser.add_argument("--draws", type=count(int, 19), default=20,
                        help="samples a sound, at least 19 for a 90 %% interval [20]")
    parser.add_argument("--seed", type=count(int, 0, 2**31), default=0,
                        help="of weights, batches, draws and the truth's noise [0]")
    parser.add_argument("--jobs", type=count(int, 1, 64), default=1 if torch.cuda.is_available()
                        else min(2, os.cpu_count() or 1),
                        help="rows at a time, a thread each [2 on a CPU, 1 with a GPU]")
    parser.add_argument("--release-sizes", action="store_true",
                        help="compared systems as wide as their releases; needs a GPU")
    parser.set_defaults(run=tables)
    commands = parser.add_subparsers(metavar="rating-page | rating-results")
    p = commands.add_parser("rating-page", help="write a listening test",
                            description="Write a blind, randomised listening test as one page, and its key.")
    p.add_argument("--results", help="folder that `python evaluate.py` has written [the newest runs/evaluation-*]")
    p.add_argument("--rows", default=",".join(RATED), help="systems to rate, where they are there [%(default)s]")
    p.add_argument("--clips", type=count(int, 1, 8), default=6, help="clips of each system [6]")
    p.add_argument("--seed", type=count(int, 0, 2**31), default=0, help="of ids and order [0]")
    p.add_argument("--out",
                   help="the page [rating.html beside results.json]; its key is OUT.key.json: keep it from the raters")
    p.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    p.set_defaults(run=rating_page)
    p = commands.add_parser("rating-results", help="score its answers",
                            description="Mean opinion scores of the answers that raters downloaded (JSON or CSV).")
    p.add_argument("files", nargs="+", help="answers-*.json or answers-*.csv")
    p.add_argument("--key", help="the page's .key.json [rating.key.json of the newest runs/evaluation-*]")
    p.add_argument("--seed", type=count(int, 0, 2**31), default=0, help="of the bootstrap [0]")
    p.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    p.set_defaults(run=rating_results)
    return parser


def main(argv=None):
    """Run a command line -> exit status."""
    status = console.run_command(build_parser().parse_args(argv))
    if status == 130:
        print("stopped; the finished rows are kept, the same command goes on", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.modules["evaluate"] = sys.modules["__main__"]
    sys.exit(main())
