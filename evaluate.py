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
import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
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
from media.landmarks import flat, lip_points, mouth_opening, points
from media.sound import Mel
from media.talkers import SyntheticFace
from study.figures import draw_figures
from study.metrics import (
    VectorAutoregression,
    best_of,
    blink_rate,
    coverage,
    energy_score,
    frechet_of_moments,
    l_mor,
    landmark_distance,
    mean_interocular,
    moments,
    motion_features,
    mouth_correlation,
    nll_of,
    pairwise_distance,
    power_spectrum,
    ratio,
    roughness,
    summary,
    velocity_distance,
    velocity_products,
)
from study.rating import RATED, rating_page, rating_results
from study.syncnet import SyncNet, lip_shapes, sync_offset, sync_score
from study.systems import DEVIATIONS, SHRINK, SYSTEMS, columns_for, fit
from talkingflow import Config

# ----------------------------------------------------------------------------------------------------------------------
# Held-out clips


class Held:
    """The windows that every row is scored on, and what a row may learn from: the training split of `clips`.

    x (N, T, D): truth. sound(lead): log-mel (N, T, M), the same look-ahead for every row. fine: log-mel at four columns
    a frame, computed here from the samples, for the SyncNet and the systems that want MFCC."""

    def __init__(self, clips, limit=64, seed=0, draws=20):
        self.clips, self.seed, self.draws, self.fps = clips, seed, draws, clips.fps
        self.config = dataclasses.replace(
            Config(),
            **{"dim": clips.dim, "cond_dim": clips.cond_dim} | clips.meta.get("defaults", {}),
            seed=seed,
        )
        self.T, self.lead, self.noise = (
            clips.window_length(self.config.seq_len),
            self.config.lead,
            self.config.noise,
        )
        self.split = "test" if clips.windows("test", self.T) else "val"
        self.windows = clips.windows(self.split, self.T, limit)
        if len(self.windows) < 2:
            raise UserError(
                f"{clips.folder}: {len(self.windows)} held-out windows of {self.T} frames vs at least 2. "
                "Prepare more clips"
            )
        self.hear = Mel(SyncNet.BANDS, window=0.025, level=0, fps=4 * self.fps, sample_rate=clips.meta["sample_rate"])
        self.columns = {}
        self.x = clips.batch(self.windows, self.T, 0, self.noise, torch.Generator().manual_seed(seed))[
            0
        ].numpy()
        self.speakers = [clip["speaker"] for clip, _ in self.windows]
        self.names, N = [clip["name"] for clip, _ in self.windows], len(self.windows)
        self.other = [
            next((j % N for j in range(i - 1, i - N, -1) if self.names[j] != name), i - 1)
            for i, name in enumerate(self.names)
        ]  # for each window, one of another clip
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
        x, c = self.clips.batch(
            windows, T, self.lead, self.noise, torch.Generator().manual_seed(self.seed + 1)
        )
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
        return {
            "": Outcome(
                np.concatenate([np.repeat(x[:, :1], frames, 1), x[:, : x.shape[1] - frames]], 1)[None]
            )
        }

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
    near = [
        torch.cdist(block, bank).argmin(1)
        for block in feature(held.sound(held.lead)).flatten(0, 1).split(512)
    ]
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
        return {
            "": Outcome(
                draws,
                model.sample(s, generator, 0.0),
                model.nll(truth, s),
                model.nll(truth, s[held.other]),
                trained - clock,
                time.perf_counter() - trained,
                sum(A.numel() + chol.tril().count_nonzero().item() for A, chol in model.models),
            )
        }

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
    "baseline": (
        "Baseline: one scale, frame-wise nets, iid",
        {
            "num_scales": 1,
            "lambdas": (1.0,),
            "steps_per_scale": 8,
            "kernel_size": 1,
            "dilations": (1,) * 4,
            "prior": "iid",
        },
    ),
    "tcn": (
        "+ ConditionTCN: one scale, iid",
        {"num_scales": 1, "lambdas": (1.0,), "steps_per_scale": 6, "prior": "iid"},
    ),
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
        config = dataclasses.replace(
            held.config, **FLOWS[name][1], steps=job["steps"], eval_interval=max(1, job["steps"] // 4)
        )
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
        return score_flow(
            flow, held, finished["seconds"], with_central=name in ("ar2", "iid"), deaf=name == "no-audio"
        )

    return row


def checkpoint_row(held, job):
    """The trained run that was asked for, or the newest one: more steps than the rows above, so not a part of the
    ablation."""
    flow, state = talkingflow.load_checkpoint(job["checkpoint"], held.device)
    wanted = {key: held.clips.meta[key] for key in ("mel", "fps", "normalisation")}
    found = {key: state["data"][key] for key in wanted}
    if found != wanted or flow.config.dim != held.clips.dim:
        raise UserError(
            f"{job['checkpoint']}: {found} vs {wanted} in {held.clips.folder}. "
            "Evaluate it on data prepared as its own, or pass another --checkpoint"
        )
    if state["data"]["fingerprint"] != held.clips.meta["fingerprint"]:
        print(
            f"{job['checkpoint']} was trained on another folder: if it saw any of these clips, its row is too good"
        )
    return score_flow(flow, held, None, with_central=True)


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
    whole = Outcome(
        draws,
        central,
        nll(sound),
        nll(sound[held.other]),
        seconds,
        spent,
        sum(p.numel() for p in flow.parameters()),
        {"std": stds, "lambda": lambdas},
    )
    return {"": whole} | ({", temperature 0": Outcome(central[None])} if with_central else {})


# ----------------------------------------------------------------------------------------------------------------------
# The four compared systems


def system_row(name):
    """A compared system, trained for as many steps as a flow; Lu et al.'s random head is drawn at sigma 0 too."""

    def row(held, job):
        torch.manual_seed(held.seed)
        x, c, _ = held.training(500)
        net = SYSTEMS[name][1](held, x, c, job["size"]).to(held.device)
        clock = time.perf_counter()
        fit(net, held, job["steps"], held.seed)
        trained, generator = time.perf_counter(), torch.Generator().manual_seed(held.seed)
        given = [
            torch.from_numpy(held.x).to(held.device),
            held.sound(held.lead).to(held.device),
            columns_for(net, held, held.windows, held.T),
        ]
        with torch.no_grad():
            draws = net.draw(*given, held.draws, generator).cpu().numpy()
            spent = time.perf_counter() - trained
            central = net.draw(*given, 1, generator, 0.0)[0].cpu().numpy() if name == "lu" else None
        return {
            "": Outcome(
                draws, central, None, None, trained - clock, spent, sum(p.numel() for p in net.parameters())
            )
        }

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
        columns["best"] = over(
            best_of(np.stack([landmark_distance(v, x, lip_points) for v in outcome.draws]))
        )
    both = np.concatenate([moments(motion_features(v, x)) for v in (first, x)], 1)
    columns["frechet"] = over(both, frechet_of_moments, draws=200)
    head, true_head = points(first).mean(2), points(x).mean(2)
    columns["jitter_head"] = over(np.stack([roughness(head), roughness(true_head)], 1), ratio)
    columns["jitter_mouth"] = over(np.stack([roughness(mouths[0]), roughness(mouth)], 1), ratio)
    columns["velocity"] = over(velocity_products(head), ratio)
    columns["blinks"] = over(blink_rate(first, fps))
    row = {
        "columns": columns,
        "train_seconds": outcome.train_seconds,
        "parameters": outcome.parameters,
        "latents": outcome.latents,
        "draws": len(outcome.draws),
        "sample_seconds": outcome.sample_seconds and outcome.sample_seconds * fps / mouths.size,
        "spectrum": power_spectrum(head / unit).tolist(),
        "mouths": mouths[:20, :8].round(4).tolist(),
    }
    if held.strangers:
        groups = [
            [i for i, name in enumerate(held.speakers) if name == speaker]
            for speaker in sorted(set(held.speakers))
        ]
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
    """Of every file whose change can change a row: a cached row of other code is made anew."""
    root = Path(__file__).resolve().parent
    rooms = ("*.py", "media/*.py", "study/*.py", "csrc/gated_conv.*")
    return hashlib.sha256(
        b"".join(f.read_bytes() for room in rooms for f in sorted(root.glob(room)))
    ).hexdigest()


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
    return {
        label: row | {"group": ROWS[name][0], "name": name}
        for name, rows in zip(names, found, strict=True)
        for label, row in rows.items()
    }


# ----------------------------------------------------------------------------------------------------------------------
# Tables

TABLES = [  # title, [(heading, column, digits, what follows the mean: "sd", "interval" or "")]
    (
        "The paper's columns, one draw: mean ± standard deviation over clips [95 % interval of the mean]",
        [
            ("NLL", "nll", 4, "interval"),
            ("gap", "gap", 4, ""),
            ("audio gain", "gain", 2, "interval"),
            ("SyncNet ↓", "sync", 3, "both"),
            ("offset", "offset", 0, ""),
            ("L_MOR ↓", "l_mor", 4, "both"),
            ("mouth r", "mouth_r", 2, "interval"),
        ],
    ),
    (
        "One draw, the mean of the draws, temperature 0: three different questions",
        [
            (f"{heading} {kind}", column + suffix, digits, "")
            for heading, column, digits in (
                ("SyncNet", "sync", 3),
                ("L_MOR", "l_mor", 4),
                ("mouth r", "mouth_r", 2),
                ("lips", "lips", 4),
            )
            for kind, suffix in (("1", ""), ("mean", "_mean"), ("T=0", "_central"))
        ],
    ),
    (
        "Distances in interocular distances (velocities a second), one draw; lips about their own centre; energy score "
        "of the face and best lips of all draws",
        [
            ("lips", "lips", 4, "interval"),
            ("face", "face", 4, "interval"),
            ("lips velocity", "lips_velocity", 3, ""),
            ("face velocity", "face_velocity", 3, ""),
            ("energy score", "energy", 4, "interval"),
            ("best lips", "best", 4, ""),
        ],
    ),
    (
        "Distribution and motion: 1 is the truth's own for jitter; coverage should be .50 and .90",
        [
            ("coverage 50", "coverage50", 2, ""),
            ("coverage 90", "coverage90", 2, ""),
            ("diversity face", "spread", 4, ""),
            ("lips", "spread_lips", 4, ""),
            ("Fréchet", "frechet", 2, ""),
            ("head jitter", "jitter_head", 2, "interval"),
            ("mouth jitter", "jitter_mouth", 2, "interval"),
            ("velocity autocorr.", "velocity", 2, ""),
            ("blinks/min", "blinks", 1, ""),
        ],
    ),
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
    return text + (
        f" [{f['low']:.{digits}f}, {f['high']:.{digits}f}]" if follow in ("interval", "both") else ""
    )


def markdown(results):
    """The tables of results.json's dict."""
    f, rows = results["facts"], results["rows"]
    sync = f"AUC {f['auc']:.3f} by clip, {f['auc_window']:.3f} by five frames, on held-out truth"
    sync += "" if f["auc"] >= 0.9 else ": below .9, so it refuses to score here"
    face, lips = f["truth_spread"]
    lines = [
        f"""## {f["data"]}: {f["windows"]} windows of {f["frames"]} held-out frames

{f["train_clips"]} training clips, the {f["split"]} split is scored; seed {f["seed"]};
{f["steps"]} steps a trained row, {f["batch"]} clips a step of a flow; look-ahead {f["lead"]} frames;
{f["draws"]} draws a sound.
NLL in nats per coordinate per frame; audio gain in nats a frame lost with another clip's sound; SyncNet: {sync}.
The truth's own diversity, between clips: face {face:.4f}, lips {lips:.4f}.
Intervals are over clips, not over training seeds. A regressor's track is its conditional mean, a flow's one draw, which
pays about sqrt(2) in every distance: compare regressors with the columns `mean` and `T=0`."""
    ]
    if f["split"] == "val":
        lines.append("These windows also chose the best weights: every trained row is optimistic.")
    if f["strangers"]:
        lines.append(
            """The held-out speakers are strangers: read mouth r (resting mouth and range do not count)
beside `another clip's sound` (chance) and `loudness alone`; L_MOR and distances carry the unknown resting face.
Mean over speakers of mouth r, one draw: """
            + ", ".join(f"{label} {row['mouth_r_by_speaker']:.2f}" for label, row in rows.items())
            + "."
        )
    for title, columns in TABLES:
        columns = [
            c for c in columns if c[1] == "offset" or any(c[1] in row["columns"] for row in rows.values())
        ]
        lines += ["", title, "", "| row | " + " | ".join(heading for heading, *_ in columns) + " |"]
        lines.append("|---" * (len(columns) + 1) + "|")
        group = None
        for label, row in rows.items():
            if row["group"] != group:
                group = row["group"]
                lines.append(f"| **{group}** |" + " |" * len(columns))
            lines.append(f"| {label} | " + " | ".join(cell(row, *c[1:]) for c in columns) + " |")
    lines += [
        "",
        "Cost on this machine: seconds to train, to sample one second of one face (all clips at once)",
        "",
        "| row | parameters | train | sample |",
        "|---|---|---|---|",
    ]

    def number(value, form):
        return format(value, form) if value is not None else "–"

    lines += [
        f"| {label} | {row['parameters']:,} | {number(row['train_seconds'], '.0f')} | "
        f"{number(row['sample_seconds'], '.4f')} |"
        for label, row in rows.items()
        if row["parameters"]
    ]
    used = {row["name"] for row in rows.values()} & set(SYSTEMS)
    if used:
        lines += ["", "Where the compared systems differ from their releases:"]
        lines += [
            f"- {SYSTEMS[name][0] if name in SYSTEMS else 'all'}: {text.format(size=f['size'])}"
            for name, text in DEVIATIONS.items()
            if name in used | {"all"}
        ]
    return "\n".join(lines) + "\n" + PAPER


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
            raise UserError(
                f"rows: {name} vs {', '.join(n for n in ROWS if not absent.get(n))}. Change --rows"
            )
    if absent["checkpoint"]:
        print(
            "no checkpoint of this data under runs/, and none given: the table is without that row",
            file=sys.stderr,
        )
    size = 1 if args.release_sizes else SHRINK
    job = {
        "data": str(folder),
        "out": out,
        "clips": args.clips,
        "seed": args.seed,
        "draws": args.draws,
        "steps": args.steps,
        "sync_steps": args.sync_steps,
        "size": size,
        "checkpoint": checkpoint and str(checkpoint),
    }
    print(f"SyncNet, then {len(names)} rows, {args.jobs} at a time, into {out}", file=sys.stderr)
    _, facts = train_syncnet(held, out, args.sync_steps)
    rows = run_rows(names, job, args.jobs)
    facts |= {
        "data": held.clips.folder.name,
        "folder": str(held.clips.folder.resolve()),
        "windows": len(held.x),
        "frames": held.T,
        "split": held.split,
        "train_clips": len(held.clips.split("train")),
        "seed": args.seed,
        "steps": args.steps,
        "batch": held.config.batch_size,
        "lead": held.lead,
        "draws": args.draws,
        "size": size,
        "truth_spread": truth_spread(held),
        "strangers": held.strangers,
        "speakers": sorted(set(held.speakers)),
        "fingerprint": held.clips.meta["fingerprint"],
        "checkpoint": checkpoint and str(checkpoint),
    }
    results = {"facts": facts, "rows": rows}
    console.write_atomically(out / "results.json", lambda p: p.write_text(json.dumps(results)))
    print(markdown(results))
    print(f"{out}: results.json, {', '.join(draw_figures(out, rows, held))}", file=sys.stderr)
    return 0


def build_parser():
    """The command line: the tables, or one of the two rating commands."""
    count = console.bounded
    parser = argparse.ArgumentParser(
        description=__doc__.split("[1]")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--data", help="folder made by prepare_data.py [data/synthetic, made on first use]")
    parser.add_argument(
        "--checkpoint", help="a run's checkpoint.pt for the last row [of the newest run on this data]"
    )
    parser.add_argument(
        "--out", help="folder of results.json, figures and cached rows [runs/evaluation-DATA]"
    )
    parser.add_argument("--rows", default="all", help=f"some of {','.join(ROWS)} [all]")
    parser.add_argument(
        "--steps", type=count(int, 1), default=400, help="optimiser steps of each trained row [400]"
    )
    parser.add_argument("--sync-steps", type=count(int, 1), default=1500, help="of the SyncNet [1500]")
    parser.add_argument("--clips", type=count(int, 2), default=64, help="held-out windows at most [64]")
    parser.add_argument(
        "--draws",
        type=count(int, 19),
        default=20,
        help="samples a sound, at least 19 for a 90 %% interval [20]",
    )
    parser.add_argument(
        "--seed",
        type=count(int, 0, 2**31),
        default=0,
        help="of weights, batches, draws and the truth's noise [0]",
    )
    parser.add_argument(
        "--jobs",
        type=count(int, 1, 64),
        default=1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1),
        help="rows at a time, a thread each [2 on a CPU, 1 with a GPU]",
    )
    parser.add_argument(
        "--release-sizes", action="store_true", help="compared systems as wide as their releases; needs a GPU"
    )
    parser.set_defaults(run=tables)
    commands = parser.add_subparsers(metavar="rating-page | rating-results")
    p = commands.add_parser(
        "rating-page",
        help="write a listening test",
        description="Write a blind, randomised listening test as one page, and its key.",
    )
    p.add_argument(
        "--results", help="folder that `python evaluate.py` has written [the newest runs/evaluation-*]"
    )
    p.add_argument(
        "--rows", default=",".join(RATED), help="systems to rate, where they are there [%(default)s]"
    )
    p.add_argument("--clips", type=count(int, 1, 8), default=6, help="clips of each system [6]")
    p.add_argument("--seed", type=count(int, 0, 2**31), default=0, help="of ids and order [0]")
    p.add_argument(
        "--out",
        help="the page [rating.html beside results.json]; its key is OUT.key.json: keep it from the raters",
    )
    p.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    p.set_defaults(run=lambda args: rating_page(args, Held, {name: row[1] for name, row in ROWS.items()}))
    p = commands.add_parser(
        "rating-results",
        help="score its answers",
        description="Mean opinion scores of the answers that raters downloaded (JSON or CSV).",
    )
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
    sys.exit(main())
