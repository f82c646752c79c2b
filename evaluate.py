"""The whole experiment on any prepared data: the paper's Tables 1 and 2, its ablation, the rows without
which no number means anything, and the listening test.

    python evaluate.py                        the synthetic talkers and the newest run; trains the other rows
    python evaluate.py --data data/grid-s1    any folder made by prepare_data.py
    python evaluate.py rating-page            a blind listening test as one .html file
    python evaluate.py rating-results FILES   mean opinion scores of the answers it collected

Markdown goes to stdout and to results.md in --out, progress to stderr; results.json, figures and a cached
file a row go to --out too: a stopped run goes on. Reading order: held-out clips, anchors, flows, compared
systems, scoring; the tables are in study/tables.py.

One rule for "truth": the held-out recording itself. Likelihood and coverage, which ask about the density, are
of it plus the dequantisation noise that models are trained on, drawn once, by --seed (none on the synthetic
talkers). The figures that a training run ends with (measure in study/metrics.py) are the same columns, by the
same functions, of the same windows.

A row is one or more tracks (K, N, T, D) for N held-out windows. "1" is the first of them, "mean" the track
that averages the draws frame by frame, "T=0" the flow's central track. These are not the same thing: a
perfect sampler is sqrt(2) further from the truth than the conditional mean it is centred on. Numbers in
brackets: study/__init__.py."""

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
import shlex
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
from study import metrics, rating
from study.figures import draw_figures
from study.metrics import VectorAutoregression, mean_interocular, nll_of, ratio
from study.syncnet import SyncNet, lip_shapes, sync_offset, sync_score
from study.systems import SHRINK, SYSTEMS, columns_for, fit
from study.tables import Facts, Row, markdown
from talkingflow import Config

# ------------------------------------------------------------------------------------------------------------
# Held-out clips


class Held:
    """The windows that every row is scored on, and what a row may learn from: the training split of `clips`.

    x (N, T, D): the recording, which is the truth. noisy: x plus the training noise, for densities. heard:
    the track that mouths are correlated with. sound(lead): log-mel (N, T, M), the same look-ahead for every
    row. fine: log-mel at four columns a frame, computed here from the samples, for the SyncNet and the
    systems that want MFCC."""

    def __init__(self, clips, limit=64, seed=0, draws=20):
        self.clips, self.seed, self.draws, self.fps = clips, seed, draws, clips.fps
        asked = {"dim": clips.dim, "cond_dim": clips.cond_dim} | clips.meta.get("defaults", {})
        self.config = dataclasses.replace(Config(), **asked, seed=seed)
        self.T = clips.window_length(self.config.seq_len)
        self.lead, self.noise = self.config.lead, self.config.noise
        self.split = "test" if clips.windows("test", self.T) else "val"
        self.windows = clips.windows(self.split, self.T, limit)
        if len(self.windows) < 2:
            raise UserError(
                f"{clips.folder}: {len(self.windows)} held-out windows of {self.T} frames vs at least 2. "
                "Prepare more clips"
            )
        self.hear = Mel(
            SyncNet.BANDS, window=0.025, level=0, fps=4 * self.fps, sample_rate=clips.meta["sample_rate"]
        )
        self.columns = {}
        generator = torch.Generator().manual_seed(seed)
        self.noisy, sound = clips.batch(self.windows, self.T, 0, self.noise, generator)
        self.x = clips.batch(self.windows, self.T)[0].numpy()
        self.heard = metrics.heard_mouth(clips, self.windows, self.x)
        self.quiet = metrics.quiet_frames(sound.numpy())
        self.names = [clip["name"] for clip, _ in self.windows]
        self.speakers = [clip["speaker"] for clip, _ in self.windows]
        self.other = metrics.another_clip(self.names)
        self.strangers = not set(self.speakers) & {clip["speaker"] for clip in clips.split("train")}
        self.device = talkingflow.choose_device("auto")

    def sound(self, lead):
        """Log-mel (N, T, M) of the windows, heard `lead` frames ahead."""
        return self.clips.batch(self.windows, self.T, lead)[1]

    def fine(self, windows, T, lead=0):
        """Log-mel (n, 4 (T + 6 + lead), 40) from six frames before each window to `lead` after it; a clip's
        ends are repeated."""
        rows = []
        for clip, s in windows:
            if clip["name"] not in self.columns:
                sound = self.clips.audio[clip["audio_start"] :][: clip["audio_samples"]]
                self.columns[clip["name"]] = self.hear.columns(sound / np.float32(32768))
            mel = self.columns[clip["name"]]
            rows.append(mel[np.arange(4 * (s - 6), 4 * (s + T + lead)).clip(0, len(mel) - 1)])
        return torch.from_numpy(np.stack(rows))

    def sync_sound(self):
        """Log-mel (N, 4T, 40) of the windows alone, for the SyncNet."""
        return self.fine(self.windows, self.T)[:, 24:]

    def training(self, limit):
        """x (n, T, D) and c (n, T, M) of up to `limit` training windows, with noise, and the windows."""
        windows = self.clips.windows("train", self.T, limit)
        generator = torch.Generator().manual_seed(self.seed + 1)
        return *self.clips.batch(windows, self.T, self.lead, self.noise, generator), windows

    def articulation(self):
        """Of the synthetic talkers: what the sound says of the face, (N, T, 4)."""
        return metrics.articulation(self.clips, self.windows, self.T)

    def summary(self, values, statistic=None, draws=1000):
        """`metrics.summary`, windows of one clip together."""
        return metrics.summary(values, statistic, draws, clips=self.names)


@dataclasses.dataclass(frozen=True)
class Job:
    """What was asked for, as every process is told."""

    data: str
    clips: int = 64
    seed: int = 0
    out: Path = None
    draws: int = 20
    steps: int = 400
    sync_steps: int = 1500
    size: int = SHRINK
    checkpoint: str = None

    def held(self):
        return Held(talkingflow.Clips(self.data), self.clips, self.seed, self.draws)


@dataclasses.dataclass
class Outcome:
    """What a row hands in to be scored: draws (K, N, T, D), and where it has them its central track (N, T,
    D), its NLL -log p(x | c) / (T D) [1, Eq. 11] with the clip's own and with another clip's sound (N,), its
    trained parameters and seconds, its latents' deviations. `of`: which of the row's outcomes this is, where
    it has two."""

    draws: np.ndarray
    central: np.ndarray = None
    nll: np.ndarray = None
    nll_wrong: np.ndarray = None
    train_seconds: float = None
    sample_seconds: float = None
    parameters: int = None
    latents: dict = None
    of: str = ""


# ------------------------------------------------------------------------------------------------------------
# Anchor rows: what a number means when nothing, little or everything is known. row(held, job) -> [Outcome,
# ...]


class SoundFeatures:
    """The last seven mel columns (N, T, M), as ten principal components each -> (N, T, 70): small enough for
    closed forms."""

    def __init__(self, c, components=10):
        self.mean = c.mean((0, 1))
        values, vectors = torch.linalg.eigh(torch.cov((c - self.mean).flatten(0, 1).T))
        self.axes = vectors[:, -components:] / values[-components:].clamp_min(1e-6).sqrt()

    def __call__(self, c, lags=7):
        code = (c - self.mean) @ self.axes
        return torch.cat([F.pad(code, (0, 0, i, 0), value=0.0)[:, : c.shape[1]] for i in range(lags)], 2)


def late(x, frames):
    """Tracks x (N, T, ...) `frames` frames late, their first frame repeated."""
    return x[:, np.maximum(np.arange(x.shape[1]) - frames, 0)]


def shifted(frames):
    """The truth, `frames` frames late: what a row loses by bad timing alone."""
    return lambda held, job: [Outcome(late(held.x, frames)[None])]


def wrong_clip_row(held, job):
    """A perfect face that speaks another clip's sound. Where clips share a sentence frame, as GRID's do, it
    is not at chance."""
    return [Outcome(held.x[held.other][None])]


def constant_row(over):
    """The training mean over the axes `over` of (N, T, D): the mean face, or the time-mean track, without
    sound."""

    def row(held, job):
        x = held.training(1000)[0].numpy()
        return [Outcome(np.broadcast_to(x.mean(over, keepdims=True), held.x.shape)[None].copy())]

    return row


def loudness_row(held, job):
    """The face that least squares gives from one number a frame, the log energy between 500 and 4000 Hz, and
    its last six values."""
    import librosa

    mel = held.clips.meta["mel"]
    centres = librosa.mel_frequencies(mel["n_mels"] + 2, fmin=mel["fmin"], fmax=mel["fmax"])[1:-1]
    bands = torch.from_numpy((centres > 500) & (centres < 4000))

    def features(c):
        loud = c[..., bands].logsumexp(-1, keepdim=True)
        return torch.cat([*(late(loud, i) for i in range(7)), torch.ones_like(loud)], 2).double()

    x, c, _ = held.training(1000)
    weights = torch.linalg.lstsq(features(c).flatten(0, 1), x.double().flatten(0, 1)).solution
    return [Outcome((features(held.sound(held.lead)) @ weights).float().numpy()[None])]


def noise_row(held, job):
    """The truth plus white noise of 1 % of the interocular distance: all that a shaking tracker adds."""
    noise = np.random.default_rng(held.seed).normal(size=(held.draws, *held.x.shape))
    noise *= 0.01 * mean_interocular(held.x)[:, None, None]
    return [Outcome((held.x + noise).astype(np.float32), held.x)]


def nearest_row(held, job):
    """Each frame shows the training frame whose sound (last seven columns) is nearest."""
    x, c, _ = held.training(500)
    feature = SoundFeatures(c)
    bank, faces = feature(c).flatten(0, 1), x.flatten(0, 1)
    asked = feature(held.sound(held.lead)).flatten(0, 1).split(512)
    near = torch.cat([torch.cdist(block, bank).argmin(1) for block in asked])
    return [Outcome(faces[near].view(held.x.shape).numpy()[None])]


def var_row(order):
    """A vector autoregression of this order with sound: the linear line that a deep model must beat."""

    def row(held, job):
        clock = time.perf_counter()
        x, c, _ = held.training(2000)
        feature = SoundFeatures(c)
        model, s = VectorAutoregression(x, order, feature(c)), feature(held.sound(held.lead))
        trained, generator = time.perf_counter(), torch.Generator().manual_seed(held.seed)
        draws = np.stack([model.sample(s, generator) for _ in range(held.draws)])
        spent = time.perf_counter() - trained
        central = model.sample(s, generator, 0.0)
        nll, nll_wrong = model.nll(held.noisy, s), model.nll(held.noisy, s[held.other])
        size = sum(A.numel() + chol.tril().count_nonzero().item() for A, chol in model.models)
        return [Outcome(draws, central, nll, nll_wrong, trained - clock, spent, size)]

    return row


def exact_row(held, job):
    """The synthetic talkers' own distribution: its mean given the sound, and draws from it, with its exact
    likelihood."""
    talker, sound = SyntheticFace(), held.articulation()
    mean = talker.mean_given_sound(sound).astype(np.float32)
    rng = np.random.default_rng(held.seed)
    draws = np.stack([talker.draw(sound, rng) for _ in range(held.draws)]).astype(np.float32)
    nll, nll_wrong = talker.nll(held.x, sound), talker.nll(held.x, sound[held.other])
    return [Outcome(draws, mean, nll, nll_wrong), Outcome(mean[None], of="its mean")]


# ------------------------------------------------------------------------------------------------------------
# Flow rows: Configs that differ in one thing each, trained alike (steps, batch, seed, dropout, weight decay,
# lead, data start)


def freeze_couplings(trainer):
    """Leave every coupling the identity that it starts as. What learns is ActNorm, the 1x1 matrices and the
    prior: a linear model of x, so the full flow's lead over it is what couplings, and their networks, are
    worth."""
    for coupling in (step.coupling for scale in trainer.flow.scales for step in scale):
        coupling.requires_grad_(False)
        width = coupling.net.out.out_features
        # the zeros that its last layer starts with, without the work of the layers before
        coupling.net.forward = lambda x, *_, width=width: x.new_zeros(*x.shape[:2], width)


def learn_lambdas(trainer):
    """Make the prior's variances parameters, one a scale: equal starts and averaged gradients stay equal
    under Adam."""
    prior, sizes = trainer.flow.prior, trainer.flow.sizes
    variance = nn.Parameter(prior.variance.clone())
    variance.register_hook(lambda g: torch.cat([part.mean().expand(len(part)) for part in g.split(sizes)]))
    del prior.variance
    prior.variance = variance
    trainer.average = copy.deepcopy(trainer.flow)
    trainer.optimizer = talkingflow.build_optimizer(trainer.flow, trainer.config)


# One scale has one lambda, and as many steps as make up about the same parameters
ONE_SCALE = {"num_scales": 1, "lambdas": (1.0,), "prior": "iid"}
FRAME_WISE = {"kernel_size": 1, "dilations": (1,) * 4}
FLOWS = {  # name: (label, changes of the Config, change of the trainer)
    "baseline": (
        "Baseline: one scale, frame-wise nets, iid",
        ONE_SCALE | FRAME_WISE | {"steps_per_scale": 8},
        None,
    ),
    "tcn": ("+ ConditionTCN: one scale, iid", ONE_SCALE | {"steps_per_scale": 6}, None),
    "iid": ("full, iid prior (the paper's)", {"prior": "iid"}, None),
    "ar2-no-mean": ("full, ar2 without mean from sound", {"prior_mean": False}, None),
    "no-couplings": ("no couplings", {}, freeze_couplings),
    "ar2": ("full, ar2", {}, None),
    "lambda-1": ("full, ar2, all lambda = 1", {"lambdas": (1.0,) * 4}, None),
    "no-audio": ("full, ar2, no audio", {"vtlp": 0.0, "tilt": 0.0, "channel": 0.0}, None),
    "learned-lambda": ("full, ar2, learned lambda", {}, learn_lambdas),
}


def silenced(clips):
    """The same clips with a sound of zeros, for the row without audio."""
    clips = copy.copy(clips)
    clips.mel = np.broadcast_to(np.float32(0), clips.mel.shape)
    return clips


def flow_row(name):
    """A TalkingFlow trained with the changes FLOWS[name], sampled at temperature 1 and 0."""
    _, changes, alter = FLOWS[name]

    def row(held, job):
        out, clips = job.out / "rows" / name, silenced(held.clips) if name == "no-audio" else held.clips
        steps = {"steps": job.steps, "eval_interval": max(1, job.steps // 4)}
        config = dataclasses.replace(held.config, **changes, **steps)
        wanted = {"config": repr(config), "data": clips.meta["fingerprint"], "code": code_digest()}
        path = out / "done.json"
        done = json.loads(path.read_text()) if path.is_file() else {}
        if done.get("of") != wanted:  # trained weights outlive a change of --clips or --draws
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            trainer = talkingflow.Trainer(config, clips, out, held.device)
            if alter:
                alter(trainer)
            clock = time.perf_counter()
            if trainer.run():
                raise KeyboardInterrupt
            size = sum(p.numel() for p in trainer.flow.parameters() if p.requires_grad)
            done = {"of": wanted, "seconds": time.perf_counter() - clock, "parameters": size}
            path.write_text(json.dumps(done))
        flow, _ = talkingflow.load_checkpoint(out / "checkpoint.pt", held.device)
        whole = score_flow(flow, held, deaf=name == "no-audio")
        whole.train_seconds, whole.parameters = done["seconds"], done["parameters"]
        return companions(flow, held, whole) if name in ("ar2", "iid") else [whole]

    return row


def checkpoint_row(held, job):
    """The trained run that was asked for, or the newest one: more steps than the rows above, so not a part of
    the ablation."""
    flow, state = talkingflow.load_checkpoint(job.checkpoint, held.device)
    wanted = {key: held.clips.meta[key] for key in ("mel", "fps", "normalisation")}
    found = {key: state["data"][key] for key in wanted}
    if found != wanted or flow.config.dim != held.clips.dim:
        raise UserError(
            f"{job.checkpoint}: {found} vs {wanted} in {held.clips.folder}. "
            "Evaluate it on data prepared as its own, or pass another --checkpoint"
        )
    if state["data"]["fingerprint"] != held.clips.meta["fingerprint"]:
        print(f"{job.checkpoint} was trained on another folder: a clip of these that it saw is no test of it")
    return companions(flow, held, score_flow(flow, held))


def companions(flow, held, whole):
    """A flow's Outcome, its temperature-0 track as one of its own, and its draws without the training noise,
    which are no draws of the density any more, so they have no likelihood."""
    outcomes = [whole, Outcome(whole.central[None], of="temperature 0")]
    sigma = flow.config.noise * held.clips.meta["interocular"]
    if sigma:
        sound = held.sound(flow.config.lead).to(held.device)
        draws = (torch.from_numpy(draw).to(held.device) for draw in whole.draws)
        clean = np.stack([flow.denoise(draw, sound, sigma).cpu().numpy() for draw in draws])
        outcomes.append(Outcome(clean, of="denoised"))
    return outcomes


@torch.no_grad()
def score_flow(flow, held, deaf=False):
    """The Outcome of a trained flow."""
    device, config = held.device, flow.config
    sound = held.sound(config.lead) * (0.0 if deaf else 1.0)
    nll, nll_wrong = nll_of(flow, held.noisy, sound), nll_of(flow, held.noisy, sound[held.other])
    sound = sound.to(device)
    generator, clock = torch.Generator().manual_seed(held.seed), time.perf_counter()
    draws = np.stack([flow.sample(sound, 1.0, generator).cpu().numpy() for _ in range(held.draws)])
    spent = time.perf_counter() - clock
    central = flow.sample(sound, 0.0, generator).cpu().numpy()
    zs, _ = flow(held.noisy.to(device), sound)
    residual = (torch.cat(zs, 2) - flow.prior_mean(sound)).cpu()
    scales = torch.arange(config.dim).split(flow.sizes)
    latents = {
        "std": [residual[..., part].std().item() for part in scales],
        "lambda": [flow.prior.variance.cpu()[part].mean().item() for part in scales],
    }
    size = sum(p.numel() for p in flow.parameters())
    return Outcome(draws, central, nll, nll_wrong, None, spent, size, latents)


# ------------------------------------------------------------------------------------------------------------
# The four compared systems


def system_row(name):
    """A compared system, trained for as many steps as a flow; Lu et al.'s random head is drawn at sigma 0
    too."""

    def row(held, job):
        torch.manual_seed(held.seed)
        x, c, _ = held.training(500)
        net = SYSTEMS[name][1](held, x, c, job.size).to(held.device)
        clock = time.perf_counter()
        fit(net, held, job.steps, held.seed)
        trained, generator = time.perf_counter(), torch.Generator().manual_seed(held.seed)
        x, c = (v.to(held.device) for v in (torch.from_numpy(held.x), held.sound(held.lead)))
        given = x, c, columns_for(net, held, held.windows, held.T)
        with torch.no_grad():
            draws = net.draw(*given, held.draws, generator).cpu().numpy()
            spent = time.perf_counter() - trained
            central = net.draw(*given, 1, generator, 0.0)[0].cpu().numpy() if name == "lu" else None
        size = sum(p.numel() for p in net.parameters())
        return [Outcome(draws, central, None, None, trained - clock, spent, size)]

    return row


# ------------------------------------------------------------------------------------------------------------
# Every row, and how one is scored and cached

ROWS = {  # name: (group, label, function(held, job) -> [Outcome, ...])
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
    **{name: ("Ablation", label, flow_row(name)) for name, (label, *_) in FLOWS.items()},
    "checkpoint": ("Checkpoint", "checkpoint", checkpoint_row),
}


def score(name, outcome, held, net):
    """The Row of one of a row's outcomes; net: the SyncNet, or None where it may not score."""
    group, label, _ = ROWS[name]
    first, central = outcome.draws[0], outcome.central
    many = len(outcome.draws) >= 16
    mouths = mouth_opening(points(outcome.draws))
    columns = likelihood_columns(outcome, held) | track_columns(first, held, net)
    columns |= motion_columns(first, held) | ensemble_columns(outcome.draws, held, many)
    if net is not None:
        columns["offset"] = {"mean": sync_offset(net, first, held.sync_sound())[0]}
    r = metrics.mouth_correlation(first, held.heard)
    people = [np.array(held.speakers) == speaker for speaker in sorted(set(held.speakers))]
    seconds = outcome.sample_seconds and outcome.sample_seconds * held.fps / mouths.size
    return Row(
        name,
        group,
        f"{label}, {outcome.of}" if outcome.of else label,
        columns,
        track_columns(outcome.draws.mean(0), held, net) if many else {},
        track_columns(central, held, net) if central is not None else {},
        len(outcome.draws),
        outcome.parameters,
        outcome.train_seconds,
        seconds,
        outcome.latents,
        metrics.power_spectrum(metrics.head(first) / mean_interocular(held.x)[:, None, None]).tolist(),
        mouths[:20, :8].round(4).tolist(),
        float(np.mean([r[own].mean() for own in people])),
    )


def likelihood_columns(outcome, held):
    """Columns of rows that are densities."""
    if outcome.nll is None:
        return {}
    gain = metrics.audio_gain(outcome.nll, outcome.nll_wrong, held.x.shape[2])
    gap = {"gap": held.summary(outcome.nll - optimum(held))} if "modes" in held.clips.meta else {}
    return {"nll": held.summary(outcome.nll), "gain": held.summary(gain)} | gap


def track_columns(track, held, net):
    """Columns that a draw, the mean of draws and a central track (N, T, D) all have: how far from the
    truth?"""
    values = {
        "l_mor": metrics.l_mor(track, held.x),
        "mouth_r": metrics.mouth_correlation(track, held.heard),
        "lips": metrics.landmark_distance(track, held.x, lip_points),
    }
    if net is not None:
        values["sync"] = sync_score(net, track, held.sync_sound())
    return {column: held.summary(value) for column, value in values.items()}


def motion_columns(track, held):
    """Columns of one draw (N, T, D): does it move like the truth, and does it rest in silence?"""
    x, fps, mouth = held.x, held.fps, mouth_opening(points(track))
    head, true_head = metrics.head(track), metrics.head(x)
    rough = [(head, true_head), (mouth, mouth_opening(points(x)))]
    rough = [np.stack([metrics.roughness(v) for v in pair], 1) for pair in rough]
    both = np.concatenate([metrics.moments(metrics.motion_features(v, x)) for v in (track, x)], 1)
    change, quiet = metrics.lip_change(track, x)[:, 1:], held.quiet[:, 1:]
    return {
        "face": held.summary(metrics.landmark_distance(track, x)),
        "lips_velocity": held.summary(metrics.velocity_distance(track, x, fps, lip_points)),
        "face_velocity": held.summary(metrics.velocity_distance(track, x, fps)),
        "frechet": held.summary(both, metrics.frechet_of_moments, draws=200),
        "jitter_head": held.summary(rough[0], ratio),
        "jitter_mouth": held.summary(rough[1], ratio),
        "velocity": held.summary(metrics.velocity_products(head), ratio),
        "blinks": held.summary(metrics.blink_rate(track, fps)),
        "quiet_opening": held.summary(metrics.average_over(held.quiet, mouth), ratio),
        "quiet_speed": held.summary(metrics.average_over(quiet, change), metrics.root_ratio),
        "other_opening": held.summary(metrics.average_over(~held.quiet, mouth), ratio),
        "other_speed": held.summary(metrics.average_over(~quiet, change), metrics.root_ratio),
    }


def ensemble_columns(draws, held, many):
    """Columns of all draws (K, N, T, D): is the truth one of them? Some need many."""
    x, io = held.x, mean_interocular(held.x)
    columns = {"energy": held.summary(metrics.energy_score(draws, x) / io / 68**0.5)}
    if not many:
        return columns
    mouths, mouth = mouth_opening(points(draws)), mouth_opening(points(held.noisy.numpy()))
    lips = flat(lip_points(draws))
    best = metrics.best_of(np.stack([metrics.landmark_distance(v, x, lip_points) for v in draws]))
    return columns | {
        "coverage50": held.summary(metrics.coverage(mouths, mouth, 0.5)),
        "coverage90": held.summary(metrics.coverage(mouths, mouth, 0.9)),
        "spread": held.summary(metrics.pairwise_distance(draws) / io / 68**0.5),
        "spread_lips": held.summary(metrics.pairwise_distance(lips) / io / 20**0.5),
        "best": held.summary(best),
    }


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
    lips = metrics.pairwise_distance(flat(lip_points(tracks))).mean() / io / 20**0.5
    return float(metrics.pairwise_distance(tracks).mean() / io / 68**0.5), float(lips)


def train_syncnet(held, out, steps):
    """The SyncNet of this data, cached in out/syncnet.pt, and its check on held-out truth."""
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
def code_digest(root=Path(__file__).resolve().parent):
    """Of every file whose change can change a row: a cached row of other code is made anew. Clips and
    checkpoints have digests of their own, so neither prepare_data.py nor cli.py can."""
    files = [root / "evaluate.py", root / "talkingflow.py"]
    for room, kinds in (("media", "py"), ("study", "py"), ("csrc", "py cpp cu h")):
        files += sorted(f for kind in kinds.split() for f in (root / room).glob(f"*.{kind}"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def run_row(name, job):
    """Make, score and cache one row: a list of Rows. Runs in a process of its own where there are several."""
    torch.set_num_threads(1)  # small tensors: a second thread only waits for the first
    path, held = job.out / "rows" / f"{name}.json", job.held()
    key = {k: str(v) for k, v in vars(job).items() if k not in ("data", "out", "checkpoint")}
    key |= {"data": held.clips.meta["fingerprint"], "code": code_digest()}
    if name == "checkpoint":
        key["checkpoint"] = hashlib.sha256(Path(job.checkpoint).read_bytes()).hexdigest()
    cached = json.loads(path.read_text()) if path.is_file() else {}
    if cached.get("key") == key:
        print(f"{name}: from {path}", file=sys.stderr, flush=True)
        return [Row(**row) for row in cached["rows"]]
    clock = time.perf_counter()
    net, facts = train_syncnet(held, job.out, job.sync_steps)
    print(f"{name} ...", file=sys.stderr, flush=True)
    with contextlib.redirect_stdout(sys.stderr):
        outcomes = ROWS[name][2](held, job)
    if not all(np.isfinite(outcome.draws).all() for outcome in outcomes):
        raise UserError(f"{name}: NaN or Inf in its tracks vs landmarks. Train it longer (--steps)")
    rows = [score(name, outcome, held, net if facts["auc"] >= 0.9 else None) for outcome in outcomes]
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path.with_suffix(".npy"), outcomes[0].draws[:3, :8].astype(np.float32))  # to be shown
    text = json.dumps({"key": key, "rows": [vars(row) for row in rows]})
    console.write_atomically(path, lambda p: p.write_text(text))
    print(f"{name}: {time.perf_counter() - clock:.0f} s", file=sys.stderr, flush=True)
    return rows


def run_rows(names, job, jobs):
    """All Rows, in the order of names, `jobs` at a time."""
    if jobs == 1:
        return [row for name in names for row in run_row(name, job)]
    slow_first = sorted(names, key=lambda name: (name not in SYSTEMS, name not in FLOWS))
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = {name: pool.submit(run_row, name, job) for name in slow_first}
        try:
            return [row for name in names for row in futures[name].result()]
        except BaseException:  # Ctrl-C or a row that cannot be: the rows that wait are not started
            pool.shutdown(cancel_futures=True)
            raise


# ------------------------------------------------------------------------------------------------------------
# Command line


def facts_of(held, job, check):
    """The Facts of these windows, this job and this check of the SyncNet."""
    clips = held.clips
    return Facts(
        data=clips.folder.name,
        folder=str(clips.folder.resolve()),
        fingerprint=clips.meta["fingerprint"],
        split=held.split,
        windows=len(held.x),
        frames=held.T,
        train_clips=len(clips.split("train")),
        lead=held.lead,
        batch=held.config.batch_size,
        **{name: getattr(job, name) for name in ("seed", "steps", "draws", "size", "checkpoint")},
        **check,
        truth_spread=truth_spread(held),
        strangers=held.strangers,
    )


def newest_checkpoint(clips):
    """checkpoint.pt of the newest run under runs/ that was trained on these clips, or None."""
    for path in console.newest("checkpoint.pt"):
        with contextlib.suppress(UserError):  # a damaged run is no reason to stop
            if talkingflow.read_checkpoint(path)["data"]["fingerprint"] == clips.meta["fingerprint"]:
                return path
    return None


def chosen(rows, possible):
    """The names asked for by --rows."""
    names = possible if rows == "all" else rows.split(",")
    for name in names:
        if name not in possible:
            raise UserError(f"rows: {name} vs {', '.join(possible)}. Change --rows")
    return names


def tables(args):
    """`python evaluate.py`: every row, the tables on stdout and in --out, with results.json and figures."""
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the tables
        folder = args.data or prepare_data.default_folder()
    clips, out = talkingflow.Clips(folder), Path(args.out or Path("runs") / f"evaluation-{Path(folder).name}")
    checkpoint = args.checkpoint or newest_checkpoint(clips)
    if checkpoint:
        talkingflow.read_checkpoint(checkpoint)  # or a clear refusal, before an hour of other rows
    else:
        print("no checkpoint of this data under runs/, none given: the table is without it", file=sys.stderr)
    absent = {"checkpoint": not checkpoint, "exact": "modes" not in clips.meta}
    names = chosen(args.rows, [name for name in ROWS if not absent.get(name)])
    options = {key: getattr(args, key) for key in ("clips", "seed", "draws", "steps", "sync_steps")}
    size = 1 if args.release_sizes else SHRINK
    job = Job(str(folder), out=out, **options, size=size, checkpoint=checkpoint and str(checkpoint))
    held = job.held()
    print(f"SyncNet, then {len(names)} rows, {args.jobs} at a time, into {out}", file=sys.stderr)
    facts = facts_of(held, job, train_syncnet(held, out, job.sync_steps)[1])
    rows = run_rows(names, job, args.jobs)
    results = {"facts": vars(facts), "rows": {row.label: vars(row) for row in rows}}
    console.write_atomically(out / "results.json", lambda p: p.write_text(json.dumps(results)))
    text = markdown(facts, rows)
    command = f"    {shlex.join(['python', 'evaluate.py', *args.command])}\n\n"
    console.write_atomically(out / "results.md", lambda p: p.write_text(command + text + "\n", "utf-8"))
    print(text)
    figures = ", ".join(draw_figures(out, rows, held))
    print(f"{out}: results.md, results.json, {figures}", file=sys.stderr)
    return 0


def build_parser():
    """The command line: the tables, or one of the two rating commands."""
    count = console.bounded
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--debug", action="store_true", help="show the traceback of an error")
    add("--data", help="folder made by prepare_data.py [data/synthetic, made on first use]")
    add("--checkpoint", help="a run's checkpoint.pt for the last row [of the newest run on this data]")
    add("--out", help="folder of results, figures and cached rows [runs/evaluation-DATA]")
    add("--rows", default="all", help=f"some of {','.join(ROWS)} [all]")
    add("--steps", type=count(int, 1), default=400, help="optimiser steps of each trained row [400]")
    add("--sync-steps", type=count(int, 1), default=1500, help="of the SyncNet [1500]")
    add("--clips", type=count(int, 2), default=64, help="held-out windows at most [64]")
    draws = "samples a sound, at least 19 for a 90 %% interval [20]"
    add("--draws", type=count(int, 19), default=20, help=draws)
    seed = "of weights, batches, draws and the likelihood's noise [0]"
    add("--seed", type=count(int, 0, 2**31), default=0, help=seed)
    jobs = 1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1)
    at_a_time = "rows at a time, a thread each [2 on a CPU, 1 with a GPU]"
    add("--jobs", type=count(int, 1, 64), default=jobs, help=at_a_time)
    wide = "compared systems as wide as their releases; needs a GPU"
    add("--release-sizes", action="store_true", help=wide)
    parser.set_defaults(run=tables)
    labels = {name: label for name, (_, label, _) in ROWS.items()}
    rating.add_commands(parser, lambda *facts: Job(*facts).held(), labels)
    return parser


def main(argv=None):
    """Run a command line -> exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    args.command = argv
    status = console.run_command(args)
    if status == 130:
        print("stopped; the finished rows are kept, the same command goes on", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
