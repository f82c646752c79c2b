"""Faces where a user meets them: strangers' voices, quiet microphones, silence. Prints Markdown rows.

    python -m study.faces --checkpoint FILE --data DIR [--split test] [--speaker s4] [--limit 40]

Each clip's sound is heard anew, as 16-bit samples at several gains. Distances are in interocular distances of
the model's training data; quiet frames are the quietest fifth of all.
"""

import argparse

import numpy as np

from media.landmarks import lip_points, mouth_opening, points
from media.sound import Mel

GAINS = (0, 12, -12, -24, -30)


def gap(track, unit):
    """Distance of the inner lips' middles (...,), in interocular distances."""
    p = points(track)
    return np.linalg.norm(p[..., 62, :] - p[..., 66, :], axis=-1) / unit


def correlation(a, b):
    """Mean over clips of the correlation over frames: lists of (T,)."""
    return float(np.mean([np.corrcoef(u, v)[0, 1] for u, v in zip(a, b, strict=True)]))


def hear(clips, chosen, mel, lead, gain=0, before=None):
    """Log-mel columns (T, M) of each clip at a gain in dB, `lead` ahead, after `before` samples."""
    heard = []
    for clip in chosen:
        sound = clips.audio[clip["audio_start"] : clip["audio_start"] + clip["audio_samples"]]
        sound = np.clip(np.round(np.array(sound) * 10 ** (gain / 20)), -32768, 32767)
        sound = np.concatenate([before if before is not None else [], sound])
        columns = mel.columns(sound / np.float32(32768))
        heard.append(columns[np.minimum(np.arange(len(columns)) + lead, len(columns) - 1)])
    return heard


def lip_speed(track, unit):
    """Root mean square change a frame of the lip points about their centre (T - 1,)."""
    return np.sqrt(np.square(np.diff(lip_points(track), axis=0)).sum(-1).mean(-1)) / unit


def rows(flow, data, clips, chosen, seed=0):
    """A list of (what, number) for the chosen clips."""
    import torch

    unit, mel = (
        data["interocular"],
        Mel(**data["mel"], fps=data["fps"], sample_rate=clips.meta["sample_rate"]),
    )
    sigma, lead, noise = flow.config.noise * unit, flow.config.lead, torch.Generator().manual_seed(seed)
    heard = {gain: hear(clips, chosen, mel, lead, gain) for gain in GAINS}
    truth = [np.array(clips.landmarks[clip["start"] : clip["start"] + clip["frames"]]) for clip in chosen]
    truth = [x[: len(c)] for x, c in zip(truth, heard[0], strict=True)]
    openings = [mouth_opening(points(x)) for x in truth]
    unit_of = [np.linalg.norm(points(x)[:, 36] - points(x)[:, 45], axis=-1).mean() for x in truth]

    def speak(columns, temperature=0.0, denoise=False):
        longest = max(len(c) for c in columns)
        batch = np.stack([np.pad(c, ((0, longest - len(c)), (0, 0)), mode="edge") for c in columns])
        stream = flow.stream(len(columns), temperature, noise, sigma if denoise else 0.0)
        tracks = stream.push(torch.from_numpy(batch)).numpy()
        return [x[: len(c)] for x, c in zip(tracks, columns, strict=True)]

    def mouths(tracks):
        return [mouth_opening(points(x))[: len(t)] for x, t in zip(tracks, openings, strict=True)]

    loud = [np.log(np.exp(c).sum(1)) for c in hear(clips, chosen, Mel(fps=data["fps"], level=0), 0)]
    quiet = np.quantile(np.concatenate(loud), 0.2)
    quiet = [e[: len(x)] <= quiet for e, x in zip(loud, truth, strict=True)]
    found = []
    for gain in GAINS:
        r = correlation(mouths(speak(heard[gain])), openings)
        found.append((f"mouth correlation, temperature 0, {gain:+d} dB", r))
    other = heard[0][1:] + heard[0][:1]
    same = [min(len(a), len(b)) for a, b in zip(other, openings, strict=True)]
    wrong = [(m[:n], t[:n]) for m, t, n in zip(mouths(speak(other)), openings, same, strict=True)]
    found += [("with another clip's sound", correlation(*zip(*wrong, strict=True)))]
    energies = [e[: len(t)] for e, t in zip(loud, openings, strict=True)]
    found += [("loudness alone", correlation(energies, openings))]
    draws = {"truth": truth, "sample": speak(heard[0], 1.0), "denoised sample": speak(heard[0], 1.0, True)}
    draws["temperature 0"] = speak(heard[0])
    for name in ("sample", "denoised sample"):
        found += [(f"mouth correlation, one {name}", correlation(mouths(draws[name]), openings))]
    for name, tracks in draws.items():
        units = unit_of if name == "truth" else [unit] * len(tracks)
        shut = [gap(x, u)[: len(q)][q] for x, u, q in zip(tracks, units, quiet, strict=True)]
        speed = [lip_speed(x, u)[: len(q) - 1][q[1:]] for x, u, q in zip(tracks, units, quiet, strict=True)]
        found += [(f"quiet frames, {name}: opening", float(np.concatenate(shut).mean()))]
        speed = float(np.sqrt(np.square(np.concatenate(speed)).mean()))
        found += [(f"quiet frames, {name}: lip speed", speed)]
    rng = np.random.default_rng(seed)
    for name, before in (("digital silence", np.zeros(16000)), ("hiss", np.round(rng.normal(0, 3, 16000)))):
        tracks = speak(hear(clips, chosen, mel, lead, 0, before))
        start = np.stack([x[:20] for x in tracks])
        fastest = max(lip_speed(x, unit).max() for x in start)
        r = correlation(mouths([x[data["fps"] :] for x in tracks]), openings)
        found += [(f"a second of {name} first: opening in it", float(gap(start, unit).mean()))]
        found += [(f"a second of {name} first: fastest lips in it", float(fastest))]
        found += [(f"a second of {name} first: mouth correlation after it", r)]
    error = []
    for x, c in zip(truth, heard[0], strict=True):
        noisy = torch.from_numpy(x)[None] + sigma * torch.randn(1, *x.shape, generator=noise)
        clean = flow.denoise(noisy, torch.from_numpy(c)[None], sigma)[0].numpy()
        error.append(np.square(clean - x).mean())
    return found + [
        ("error of noisy truth, denoised, over the noise", float(np.sqrt(np.mean(error)) / sigma))
    ]


def main():
    from talkingflow import Clips, load_checkpoint

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", default="pretrained/grid-s1.pt")
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="test", help="train, val, test or all [test]")
    parser.add_argument("--speaker", default="", help="only those whose name begins so")
    parser.add_argument("--limit", type=int, default=40, help="at most so many clips [40]")
    args = parser.parse_args()
    (flow, state), clips = load_checkpoint(args.checkpoint), Clips(args.data)
    chosen = [clip for clip in clips.clips if args.split in ("all", clip["split"])]
    chosen = [clip for clip in chosen if clip["speaker"].startswith(args.speaker)][: args.limit]
    print(f"| {len(chosen)} clips of {args.data} {args.split} {args.speaker} | |\n|---|---|")
    for what, number in rows(flow, state["data"], clips, chosen):
        print(f"| {what} | {number:.4f} |")


if __name__ == "__main__":
    main()
