"""Metrics. Tracks are (..., T, D) or (..., T, 68, 2), D = 136: x0 y0 x1 y1 ... of the 68 iBUG points. A
metric of clips returns one number a clip, (N,), so that `summary` can say how sure its mean is.

One rule for "truth", here and in evaluate.py: the recording itself. Only what asks about the density,
likelihood and coverage, is of the recording plus the dequantisation noise that models are trained on: a
density of exact pixels would grow without bound. Everywhere else the noise of a sample counts against it."""

import math

import numpy as np
import torch

from media.landmarks import EYES, lip_points, mouth_opening, points
from media.talkers import SyntheticFace


def mean_interocular(track):
    """Mean distance between the outer eye corners of tracks (N, T, 136) -> (N,): the unit of every distance
    here. (The training noise counts in distances of the eyes' centres, media/survey.py.)"""
    p = points(track)
    return np.linalg.norm(p[..., EYES[0], :] - p[..., EYES[1], :], axis=-1).mean(-1)


def l_mor(track, truth):
    """L_MOR (N,): mean |MOR - MOR of the truth| over frames, MOR = inner-lip gap / width. [1, Sec. 3.1] names
    it, its source was not available: the definition is the usual one. Invariant to shift, turn and scale of
    either face."""
    return np.abs(mouth_opening(points(track)) - mouth_opening(points(truth))).mean(-1)


def mouth_correlation(track, truth):
    """Pearson correlation over a clip's frames of the two mouth openings (N,); 0 for a mouth that does not
    move. It ignores a person's resting mouth and range, so it can be read on strangers, where L_MOR
    cannot."""
    a, b = (mouth_opening(points(v)) for v in (track, truth))
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    return (a * b).sum(-1) / np.maximum(np.sqrt((a**2).sum(-1) * (b**2).sum(-1)), 1e-9)


def articulation(clips, windows, T):
    """Of the synthetic talkers: what the sound says of the face in each window, (N, T, 4)."""
    rows = np.load(clips.folder / "articulation.npy", mmap_mode="r")
    return np.stack([rows[clip["start"] + s : clip["start"] + s + T] for clip, s in windows])


def heard_mouth(clips, windows, truth):
    """The track (N, T, D) that `mouth_correlation` is taken with: the recording `truth`, or on the synthetic
    talkers the exact mean given the sound, all of it that can be heard. There the recording itself does not
    have 1."""
    if "modes" not in clips.meta:
        return truth
    return SyntheticFace().mean_given_sound(articulation(clips, windows, truth.shape[1]))


def another_clip(names):
    """For each window, whose clips these are, the index of a window of another clip: that has the wrong
    sound."""
    N = len(names)
    return [
        next((j for j in ((i - k) % N for k in range(1, N)) if names[j] != name), i - 1)
        for i, name in enumerate(names)
    ]


def audio_gain(nll, nll_wrong, D):
    """Nats a frame (N,) that D coordinates' likelihood loses with the sound of `another_clip` (ours)."""
    return (nll_wrong - nll) * D


def landmark_distance(track, truth, part=points):
    """LMD (N,): mean distance of corresponding points, over frames and points, in interocular distances, of
    the face (part=points) or of the lips about their own centre (part=lip_points), as [4] has it; [4] sums
    over the points of re-detected images, M-LD and F-LD of [5] are means."""
    gap = np.linalg.norm(part(track) - part(truth), axis=-1)
    return gap.mean((-2, -1)) / mean_interocular(truth)


def velocity_distance(track, truth, fps, part=points):
    """LVD (N,): mean distance of corresponding points' velocities, in interocular distances a second (M-LVD,
    F-LVD of [5]), of the face or, part=lip_points, of the lips about their own centre."""
    gap = np.linalg.norm(np.diff(part(track) - part(truth), axis=-3), axis=-1)
    return gap.mean((-2, -1)) * fps / mean_interocular(truth)


def energy_score(draws, truth):
    """Fair energy score [7]: E|X - y| - E|X - X'| / 2 of draws (K, N, T, n) against truth (N, T, n), a norm
    over n in every frame, mean over frames -> (N,). The multivariate CRPS: least for the true distribution;
    for one draw it is the distance itself. Fair: the second mean leaves out a draw's distance to itself, so K
    does not change the expectation."""
    K = len(draws)
    near = np.mean([np.linalg.norm(x - truth, axis=-1).mean(-1) for x in draws], 0)
    return near if K == 1 else near - pairwise_distance(draws) / 2


def pairwise_distance(draws):
    """Diversity: mean distance, a norm over the last axis, between two of K draws (K, N, T, n) of the same
    sound -> (N,), the average pairwise distance of [9] taken frame by frame."""
    pairs = [
        np.linalg.norm(draws[i] - draws[j], axis=-1).mean(-1) for i in range(len(draws)) for j in range(i)
    ]
    return np.mean(pairs, 0)


def coverage(draws, truth, share):
    """Share of frames in which truth (N, T) lies in the central interval of `share` of the draws (K, N, T) ->
    (N,). A calibrated forecast covers `share` [7, Sec. 6.2], for finite K too if the ends are read at rank p
    (K + 1) (K >= 19 for 90 %)."""
    low, high = np.quantile(draws, [(1 - share) / 2, (1 + share) / 2], axis=0, method="weibull")
    return ((truth >= low) & (truth <= high)).mean(-1)


def best_of(distances):
    """Distance of the best of K draws (K, N) -> (N,), as the average displacement error of [9]. Any spread
    lowers it, plain noise too: read it beside the noise row."""
    return distances.min(0)


def frechet(mean1, cov1, mean2, cov2):
    """Frechet distance of two Gaussians [10, Eq. 6]: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). Clips drawn
    with replacement raise it, so its bootstrap interval lies too high: results.json has it, the table does
    not."""
    values, vectors = np.linalg.eigh(cov1)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root).clip(0)).sum()
    return max(0.0, float(((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross))


def motion_features(track, truth, components=8):
    """Features for `frechet` (N, T - 1, 2 components): principal components of the truth's frames and their
    velocities, each in units of the truth's own standard deviation."""
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
    """Mean |second difference| over time of tracks (N, T, ...) -> (N,): what the eye sees as trembling
    (ours). A row's jitter ratio is its roughness over the truth's, for the head (centroid of all points) and
    the mouth opening."""
    return np.abs(np.diff(track, 2, axis=1)).mean(tuple(range(1, track.ndim)))


def head(track):
    """The centroid of all points (..., T, 2)."""
    return points(track).mean(-2)


def quiet_frames(sound, share=0.2):
    """Which frames (N, T) of log-mel (N, T, M) are among this share of the quietest of all."""
    level = sound.mean(2)
    return level <= np.quantile(level, share)


def average_over(frames, values):
    """Sums over chosen frames (N, T) of values (N, T), and the frames' number (N, 2): their `ratio` is the
    mean."""
    return np.stack([(values * frames).sum(1), frames.sum(1)], 1)


def lip_change(track, truth):
    """Squared change since the last frame of the lips about their own centre, mean over their coordinates (N,
    T), in squared interocular distances; its mean's root is the lip speed (ours). Frame 0 has none."""
    change = np.diff(lip_points(track), axis=1, prepend=lip_points(track)[:, :1])
    return (change**2).mean((2, 3)) / mean_interocular(truth)[:, None] ** 2


def velocity_products(track):
    """Lag-1 product and square of the velocity of tracks (N, T, n) -> (N, 2): their ratio is the velocity
    autocorrelation (ours), 0.5 and more for a gliding head, -0.5 for white noise."""
    v = np.diff(track, axis=1)
    v = v - v.mean(1, keepdims=True)
    return np.stack([(v[:, 1:] * v[:, :-1]).sum((1, 2)), (v**2).sum((1, 2))], 1)


def ratio(sums):
    """A numerator over a denominator, both summed over clips."""
    return float(sums[0] / max(sums[1], 1e-30))


def root_ratio(sums):
    """The root of `ratio`."""
    return math.sqrt(ratio(sums))


def velocity_autocorrelation(track):
    """Lag-1 autocorrelation of the velocity of all tracks (N, T, n) together."""
    return ratio(velocity_products(track).sum(0))


def blink_rate(track, fps):
    """Blinks a minute (N,): how often the eye aspect ratio [8] of both eyes falls below 80 % of its median
    over the clip."""
    p = points(track)

    def apart(*pairs):
        return sum(np.linalg.norm(p[..., a, :] - p[..., b, :], axis=-1) for a, b in pairs)

    height, width = apart((37, 41), (38, 40), (43, 47), (44, 46)), apart((36, 39), (42, 45))
    aspect = height / (2 * np.maximum(width, 1e-6))  # (N, T)
    closed = aspect < 0.8 * np.median(aspect, -1, keepdims=True)
    return (closed[..., 1:] & ~closed[..., :-1]).sum(-1) * 60 * fps / aspect.shape[-1]


def power_spectrum(track):
    """Mean power of tracks (N, T, n) at each frequency of the time axis (T // 2 + 1,), clip means removed,
    Hann window."""
    v = (track - track.mean(1, keepdims=True)) * np.hanning(track.shape[1])[:, None]
    return (np.abs(np.fft.rfft(v, axis=1)) ** 2).mean((0, 2))


def auc(low, high):
    """Probability that a number of `low` is below one of `high`, ties half."""
    low, high = np.asarray(low)[:, None], np.asarray(high)[None]
    return float((low < high).mean() + 0.5 * (low == high).mean())


def summary(values, statistic=None, draws=1000, seed=0, clips=None):
    """Mean over windows, standard deviation over clips, and the 95 % interval of the mean when clips are
    drawn with replacement: windows of one clip, named in `clips` (N,), go together.

    values (N,), or (N, q) with a statistic of their mean (q,), such as a ratio of two sums -> {"mean", "sd",
    "low", "high"}."""
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


class VectorAutoregression:
    """x_t = A_1 x_{t-1} + ... + A_p x_{t-p} + B s_t + b + e, fitted in closed form to x (N, T, D) and
    features s (N, T, S) of the sound, or None: the line that a flow has to beat. Frame t < p has an order-t
    model. Only B is held back by `ridge`: the landmarks' small directions are differences of nearly equal
    coordinates, and any ridge on A costs more than it saves."""

    @staticmethod
    def determined(x, order):
        """Whether x (N, T, D) has four frames for each of p D + 1 coefficients. From 7 clips of 3 seconds,
        1.2 frames each, VAR(3) is 700,000 nats a coordinate off; from 24, 4.2 frames each, 0.3."""
        N, T, D = x.shape
        return N * (T - order) >= 4 * (order * D + 1)

    def __init__(self, x, order, s=None, ridge=1e-2):
        self.mean, self.models, D = x.mean((0, 1), dtype=torch.float64), [], x.shape[2]
        for p in range(order + 1):
            blocks = zip(x.split(64), s.split(64) if s is not None else [None] * len(x), strict=False)
            gram = sum(rows.T @ rows for rows in (self.rows(*block, p).flatten(0, 1) for block in blocks))
            count, sound = gram[-1, -1].clone(), slice((p + 1) * D, len(gram) - 1)
            gram[sound, sound] += ridge * torch.diag(gram[sound, sound].diagonal())
            A = torch.linalg.lstsq(gram[D:, D:], gram[D:, :D], driver="gelsd").solution  # (p D + S + 1, D)
            residual = gram[:D, :D] - gram[:D, D:] @ A - A.T @ gram[D:, :D] + A.T @ gram[D:, D:] @ A
            self.models.append(
                (A, torch.linalg.cholesky(residual / count + 1e-12 * torch.eye(D, dtype=torch.float64)))
            )

    def rows(self, x, s, p):
        """[x_t, x_{t-1}, ..., x_{t-p}, s_t, 1] of every frame t >= p: (N, T - p, ...)."""
        x, T = x.double() - self.mean, x.shape[1]
        lags = [x[:, p - i : T - i] for i in range(p + 1)]
        return torch.cat(
            lags + ([s[:, p:].double()] if s is not None else []) + [torch.ones_like(x[:, p:, :1])], 2
        )

    def nll(self, x, s=None):
        """Nats per coordinate (N,) of x (N, T, D)."""
        N, T, D = x.shape
        total = torch.zeros(N, dtype=torch.float64)
        for p, (A, chol) in enumerate(self.models):
            end = T if p == len(self.models) - 1 else p + 1
            rows = self.rows(x[:, :end], None if s is None else s[:, :end], p)
            e = torch.linalg.solve_triangular(
                chol, (rows[..., :D] - rows[..., D:] @ A).flatten(0, 1).T, upper=False
            )
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


@torch.no_grad()
def nll_of(flow, x, c):
    """NLL (N,) of clips x (N, T, D) given c (N, T, M), 32 at a time on the flow's device."""
    device = flow.cond_mean.device
    blocks = zip(x.split(32), c.split(32), strict=True)
    return torch.cat([flow.nll(x.to(device), c.to(device)).cpu() for x, c in blocks]).numpy()


@torch.no_grad()
def measure(flow, clips, split="test", limit=64, seed=0):
    """Figures of a trained flow on held-out clips, as a dict, as evaluate.py's row of its checkpoint has
    them: means over clips, landmarks against the recording, likelihoods of recording and noise, mouths
    against `heard_mouth`."""
    config, device, flow = flow.config, flow.cond_mean.device, flow.eval()
    T = clips.window_length(config.seq_len)
    windows = clips.windows(split, T, limit) or clips.windows("val", T, limit)
    noisy, c = clips.batch(windows, T, config.lead, config.noise, torch.Generator().manual_seed(seed))
    x = clips.batch(windows, T)[0].numpy()
    heard = heard_mouth(clips, windows, x)
    other = another_clip([clip["name"] for clip, _ in windows])
    nll, nll_wrong = nll_of(flow, noisy, c), nll_of(flow, noisy, c[other])
    figures = {"clips": len(windows), "frames": T, "nll": float(nll.mean())}
    figures["audio_gain"] = float(audio_gain(nll, nll_wrong, x.shape[2]).mean())
    generator = torch.Generator().manual_seed(seed)
    draw, central = (flow.sample(c.to(device), t, generator).cpu().numpy() for t in (1.0, 0.0))
    for name, track in (("", draw), ("_temperature0", central)):
        figures["mouth_correlation" + name] = float(mouth_correlation(track, heard).mean())
        figures["l_mor" + name] = float(l_mor(track, x).mean())
    figures["head_jitter"] = jitter(head(draw), head(x))
    figures["mouth_jitter"] = jitter(mouth_opening(points(draw)), mouth_opening(points(x)))
    figures["velocity_autocorrelation"] = velocity_autocorrelation(head(draw))
    figures["velocity_autocorrelation_truth"] = velocity_autocorrelation(head(x))
    if "modes" in clips.meta:  # of the synthetic talkers
        figures["sides"], figures["sides_truth"] = sides(draw), sides(x)
    generator = torch.Generator().manual_seed(seed + 1)
    training = clips.batch(clips.windows("train", T, 3000), T, 0, config.noise, generator)[0]
    for order in (2, 3):
        if VectorAutoregression.determined(training, order):
            figures[f"var{order}"] = float(VectorAutoregression(training, order).nll(noisy).mean())
    if "optimum" in clips.meta and T == max(clip["frames"] for clip in clips.clips):
        figures["optimum"] = float(np.mean([clip["optimal_nll"] for clip, _ in windows]))
    return figures


def anchors(clips, T, noise, batches):
    """What a validation NLL must be seen against: VAR(3) without sound, {"VAR(3)": nll}, where there are
    clips enough to fit it, and on synthetic talkers the "optimum". batches: Trainer.held["val"]."""
    generator = torch.Generator().manual_seed(1)
    training = clips.batch(clips.windows("train", T, 1000), T, 0, noise, generator)[0]
    held, found = torch.cat([x.cpu() for x, _ in batches]), {}
    if VectorAutoregression.determined(training, 3):
        found["VAR(3)"] = float(VectorAutoregression(training, 3).nll(held).mean())
    if "optimum" in clips.meta and T == max(clip["frames"] for clip in clips.clips):
        windows = clips.windows("val", T, len(held))
        found["optimum"] = float(np.mean([clip["optimal_nll"] for clip, _ in windows]))
    return found


def beside(found, nll):
    """A validation NLL beside its `anchors`, for a line of the log."""
    optimum, var3 = found.get("optimum"), found.get("VAR(3)")
    if optimum is None:
        return "" if var3 is None else f" ({nll - var3:+.4f} to VAR(3))"
    also = "" if var3 is None else f" (VAR(3) {var3 - optimum:.4f})"
    return f" gap to the optimum {nll - optimum:.4f}{also}"


def jitter(track, truth):
    """Roughness of tracks (N, T, ...) over the truth's."""
    return ratio(np.stack([roughness(track), roughness(truth)], 1).sum(0))


def sides(track):
    """Shares of the frames (N, T, 136) in which synthetic talkers look left, ahead and right."""
    turned = SyntheticFace().turned(track)
    return [float(share.mean()) for share in (turned < -0.5, np.abs(turned) <= 0.5, turned > 0.5)]


def report(figures):
    """The figures of `measure` as lines of text."""
    f, optimum = figures, figures.get("optimum")

    def nll(label, value):
        gap = "" if optimum is None else f"   gap to the optimum {value - optimum:.4f}"
        return f"  {label:20} {value:9.4f}{gap}"

    def two(label, name, digits, note=""):
        at_0 = f"{f[name + '_temperature0']:.{digits}f} at temperature 0"
        return f"  {label:20} {f[name]:9.{digits}f}   one sample; {at_0}{note}"

    exact = "  (with the exact mean given the sound)" if optimum is not None else ""
    lines = [
        f"held-out figures ({f['clips']} windows of {f['frames']} frames, means over clips; NLL in nats per "
        "coordinate per frame,",
        "of the recording plus the training noise; the rest against the recording itself)",
        nll("flow", f["nll"]),
        *(nll(f"VAR({p}), no sound", f[f"var{p}"]) for p in (2, 3) if f"var{p}" in f),
        *(
            [f"  {'optimum':20} {optimum:9.4f}   exact: Kalman filter, change of variables"]
            if optimum is not None
            else []
        ),
        f"  {'audio gain':20} {f['audio_gain']:9.2f}   nats a frame lost with another clip's sound",
        f"  {'head jitter':20} {f['head_jitter']:9.2f}   of the recording's (mouth {f['mouth_jitter']:.2f})",
        f"  {'head velocity autoc.':20} {f['velocity_autocorrelation']:9.2f}   "
        f"the recording's {f['velocity_autocorrelation_truth']:.2f}",
        two("mouth correlation", "mouth_correlation", 2, exact),
        two("L_MOR", "l_mor", 4),
    ]
    if "sides" in f:
        draw, truth = (" ".join(f"{share:.2f}" for share in f[name]) for name in ("sides", "sides_truth"))
        lines.append(f"  {'left, ahead, right':20} {draw}   of one sample's frames; the recording's {truth}")
    return "\n".join(lines)
