"""
Figures of a trained TalkingFlow, and the references without which no figure means anything.
"""

import math

import numpy as np
import torch

from talkingflow import mouth_opening

def vector_autoregression(x, held_out, order):
    """NLL, in nats per coordinate per frame, of held_out (N, T, D) under x_t = A_1 x_{t-1} + ... + A_p x_{t-p} + b + e fitted in
    closed form to x (N, T, D), without sound: the line that a flow has to beat. Frame t < p has an order-t model."""
    mean, total = x.mean((0, 1), dtype=torch.float64), 0.0
    T, D = held_out.shape[1:]
    for p in range(order + 1):

        def lagged(block):  # [x_t, x_{t-1}, ..., x_{t-p}, 1] of every frame t >= p
            block = block.double() - mean
            lags = [block[:, p - i : block.shape[1] - i].flatten(0, 1) for i in range(p + 1)]
            return torch.cat(lags + [torch.ones(len(lags[0]), 1, dtype=torch.float64)], 1)

        gram = sum(block.T @ block for block in map(lagged, x.split(64)))
        A = torch.linalg.lstsq(gram[D:, D:], gram[D:, :D], driver="gelsd").solution  # ((p D + 1), D)
        count = len(x) * (x.shape[1] - p)
        residual = gram[:D, :D] - gram[:D, D:] @ A - A.T @ gram[D:, :D] + A.T @ gram[D:, D:] @ A
        chol = torch.linalg.cholesky(residual / count + 1e-12 * torch.eye(D, dtype=torch.float64))
        rows = lagged(held_out[:, : T if p == order else p + 1])
        e = torch.linalg.solve_triangular(chol, (rows[:, :D] - rows[:, D:] @ A).T, upper=False)
        total += 0.5 * (e**2).sum() + len(rows) * (chol.diagonal().log().sum() + D / 2 * math.log(2 * math.pi))
    return float(total / held_out.numel())


def jitter(track):
    """Mean |second difference| over time of tracks (N, T, ...): what the eye sees as trembling."""
    return float(np.abs(np.diff(track, 2, axis=1)).mean())


def velocity_autocorrelation(track):
    """Lag-1 autocorrelation of the velocity of tracks (N, T, n): 0.5 and more for a gliding head, -0.5 for white noise."""
    v = np.diff(track, axis=1)
    v = v - v.mean(1, keepdims=True)
    return float((v[:, 1:] * v[:, :-1]).sum() / (v**2).sum())


@torch.no_grad()
def measure(flow, clips, split="test", limit=128, seed=0):
    """Figures of a trained flow on held-out clips, as a dict; what each means stands beside it in `report`.

    Landmarks are compared at the truth's own dequantisation noise, mouth openings with the clean truth: on the synthetic talkers
    with the exact conditional mean, which is the best that any model can know.
    """
    flow.eval()
    config, device = flow.config, flow.cond_mean.device
    T = clips.window_length(config.seq_len)
    windows = clips.windows(split, T, limit) or clips.windows("val", T, limit)
    generator = torch.Generator().manual_seed(seed)
    x, c = clips.batch(windows, T, config.lead, config.noise, generator)
    clean = clips.batch(windows, T)[0].numpy().reshape(len(x), T, -1, 2)
    nll = lambda c: torch.cat([flow.nll(*(v.to(device) for v in b)) for b in zip(x.split(32), c.split(32))]).cpu()
    figures = {"clips": len(windows), "frames": T, "nll": float(nll(c).mean())}
    figures["audio_gain"] = (float(nll(c.roll(1, 0)).mean()) - figures["nll"]) * x.shape[2]
    truth = mouth_opening(clean)
    if "modes" in clips.meta:
        articulation = np.load(clips.folder / "articulation.npy", mmap_mode="r")
        articulation = np.stack([articulation[clip["start"] + s : clip["start"] + s + T] for clip, s in windows])
        mean = np.array(clips.meta["mean_face"]) + articulation @ np.array(clips.meta["modes"])
        truth = mouth_opening(mean.reshape(clean.shape))
    draw = lambda t: flow.sample(c.to(device), t, generator).cpu().numpy().reshape(clean.shape)
    noisy = x.numpy().reshape(clean.shape)
    for name, sample in (("", draw(1.0)), ("_temperature0", draw(0.0))):
        mouth = mouth_opening(sample)
        figures["mouth_correlation" + name] = float(np.corrcoef(mouth.ravel(), truth.ravel())[0, 1])
        figures["l_mor" + name] = float(np.abs(mouth - mouth_opening(clean)).mean())
        if not name:
            figures["head_jitter"] = jitter(sample.mean(2)) / jitter(noisy.mean(2))
            figures["mouth_jitter"] = jitter(mouth) / jitter(mouth_opening(noisy))
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
        f"  mouth correlation    {f['mouth_correlation']:9.2f}   one sample; {f['mouth_correlation_temperature0']:.2f} at temperature 0"
        + ("  (with the exact conditional mean)" if optimum is not None else ""),
        f"  L_MOR                {f['l_mor']:9.4f}   one sample; {f['l_mor_temperature0']:.4f} at temperature 0",
    ]  # fmt: skip
    return "\n".join(lines)
