"""Faces where a user meets them: strangers' voices, quiet microphones, silence. Prints Markdown rows.

    python tests/faces.py --checkpoint FILE --data DIR [--split test] [--speaker s4] [--limit 40]

Each clip's sound is heard anew, as 16-bit samples at several gains. Distances are in interocular distances of
the model's training data; quiet frames are the quietest fifth of all.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from media.landmarks import interocular, lip_points, mouth_opening, points
from media.sound import Mel


def gap(track, unit):
    """Distance of the inner lips' middles (...,), in interocular distances."""
    p = points(track)
    return np.linalg.norm(p[..., 62, :] - p[..., 66, :], axis=-1) / unit


def mean_correlation(pairs):
    """Mean over clips of the correlation over frames of pairs of (T,)."""
    return np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs])


def hear(clips, chosen, mel, lead, gain=0, before=(), snr=None, narrow=False):
    """Log-mel columns (T, M) of each clip, `lead` ahead: at a gain in dB, after `before` samples, with white
    noise `snr` dB below it, or without anything above 4 kHz."""
    heard, rng = [], np.random.default_rng(0)
    for clip in chosen:
        sound = np.array(clips.audio[clip["audio_start"] :][: clip["audio_samples"]], float)
        if snr is not None:
            sound += rng.normal(0, sound.std() * 10 ** (-snr / 20), len(sound))
        if narrow:
            spectrum = np.fft.rfft(sound)
            spectrum[int(len(spectrum) * 8000 / clips.meta["sample_rate"]) :] = 0
            sound = np.fft.irfft(spectrum, len(sound))
        sound = np.clip(np.round(sound * 10 ** (gain / 20)), -32768, 32767)
        columns = mel.columns(np.concatenate([before, sound]) / np.float32(32768))
        heard.append(columns[np.minimum(np.arange(len(columns)) + lead, len(columns) - 1)])
    return heard


def lip_speed(track, unit):
    """Root mean square change a frame of the lip points about their centre (T - 1,)."""
    return np.sqrt(np.square(np.diff(lip_points(track), axis=0)).sum(-1).mean(-1)) / unit


class Measured:
    """Clips whose recorded faces a flow's faces are held against."""

    def __init__(self, flow, data, clips, chosen, seed=0):
        self.flow, self.unit, self.fps, self.seed = flow, data["interocular"], data["fps"], seed
        self.sigma = flow.config.noise * self.unit
        self.mel = Mel(**data["mel"], fps=self.fps, sample_rate=clips.meta["sample_rate"])
        self.hear = lambda mel=self.mel, **how: hear(clips, chosen, mel, flow.config.lead, **how)
        self.plain = self.hear()
        rows = [slice(clip["start"], clip["start"] + clip["frames"]) for clip in chosen]
        self.truth = [np.array(clips.landmarks[r])[: len(c)] for r, c in zip(rows, self.plain, strict=True)]
        self.openings = [mouth_opening(points(x)) for x in self.truth]
        absolute = Mel(fps=self.fps, sample_rate=clips.meta["sample_rate"], level=0)
        loud = [np.log(np.exp(c).sum(1)) for c in hear(clips, chosen, absolute, 0)]
        self.loud = [e[: len(x)] for e, x in zip(loud, self.truth, strict=True)]

    def speak(self, columns, temperature=0.0, denoise=False):
        import torch

        longest = max(len(c) for c in columns)
        batch = np.stack([np.pad(c, ((0, longest - len(c)), (0, 0)), mode="edge") for c in columns])
        noise = torch.Generator().manual_seed(self.seed)
        stream = self.flow.stream(len(columns), temperature, noise, self.sigma if denoise else 0.0)
        return [
            x[: len(c)] for x, c in zip(stream.push(torch.from_numpy(batch)).numpy(), columns, strict=True)
        ]

    def correlation(self, tracks):
        """Mean over clips of the correlation of the mouth's opening with the recorded one's."""
        pairs = [(mouth_opening(points(x)), t) for x, t in zip(tracks, self.openings, strict=True)]
        return mean_correlation([(a[: len(t)], t[: len(a)]) for a, t in pairs])

    def follows(self):
        """How well the mouth follows the sound, at temperature 0 but for the samples."""
        sounds = {f"{gain:+d} dB": {"gain": gain} for gain in (0, 12, -12, -24, -30)}
        sounds |= {
            "8 kHz": {"narrow": True},
            "noise 10 dB below": {"snr": 10},
            "noise 0 dB below": {"snr": 0},
        }
        for name, how in sounds.items():
            yield f"mouth correlation, {name}", self.correlation(self.speak(self.hear(**how)))
        others = self.plain[1:] + self.plain[:1]
        yield "mouth correlation, another clip's sound", self.correlation(self.speak(others))
        yield (
            "mouth correlation, loudness alone",
            mean_correlation(zip(self.loud, self.openings, strict=True)),
        )
        for name, denoise in (("sample", False), ("denoised sample", True)):
            yield f"mouth correlation, one {name}", self.correlation(self.speak(self.plain, 1.0, denoise))

    def rests(self):
        """Opening and lip speed in the quiet frames."""
        level = np.quantile(np.concatenate(self.loud), 0.2)
        tracks = {"truth": self.truth, "sample": self.speak(self.plain, 1.0)}
        tracks |= {
            "denoised sample": self.speak(self.plain, 1.0, True),
            "temperature 0": self.speak(self.plain),
        }
        for name, faces in tracks.items():
            gaps, speeds = [], []
            for x, e in zip(faces, self.loud, strict=True):
                unit = interocular(points(x)).mean() if name == "truth" else self.unit
                gaps.append(gap(x, unit)[: len(e)][e <= level])
                speeds.append(lip_speed(x, unit)[: len(e) - 1][e[1:] <= level])
            yield f"quiet frames, opening, {name}", np.concatenate(gaps).mean()
            yield f"quiet frames, lip speed, {name}", np.sqrt(np.square(np.concatenate(speeds)).mean())

    def begins(self):
        """What the face does in a second of no voice before the sentence."""
        hiss = np.round(np.random.default_rng(0).normal(0, 3, self.mel.sample_rate))
        for name, before in (("digital silence", 0 * hiss), ("hiss", hiss)):
            tracks = self.speak(self.hear(before=before))
            start = np.stack([x[:20] for x in tracks])
            yield f"a second of {name} first, opening in it", gap(start, self.unit).mean()
            yield (
                f"a second of {name} first, fastest lips in it",
                max(lip_speed(x, self.unit).max() for x in start),
            )
            after = self.correlation([x[self.fps :] for x in tracks])
            yield f"a second of {name} first, mouth correlation after it", after

    def denoises(self):
        import torch

        error, noise = [], torch.Generator().manual_seed(self.seed)
        for x, c in zip(self.truth, self.plain, strict=True):
            noisy = torch.from_numpy(x)[None] + self.sigma * torch.randn(1, *x.shape, generator=noise)
            clean = self.flow.denoise(noisy, torch.from_numpy(c)[None], self.sigma)[0].numpy()
            error.append(np.square(clean - x).mean())
        yield "error of noisy truth, denoised, over the noise", np.sqrt(np.mean(error)) / self.sigma


def main():
    from talkingflow import Clips, load_checkpoint

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", default="pretrained/grid.pt")
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="test", help="train, val, test or all [test]")
    parser.add_argument("--speaker", default="", help="only those whose name begins so")
    parser.add_argument("--limit", type=int, default=40, help="at most so many clips [40]")
    args = parser.parse_args()
    (flow, state), clips = load_checkpoint(args.checkpoint), Clips(args.data)
    chosen = [clip for clip in clips.clips if args.split in ("all", clip["split"])]
    chosen = [clip for clip in chosen if clip["speaker"].startswith(args.speaker)][: args.limit]
    print(f"| {len(chosen)} clips of {args.data} {args.split} {args.speaker} | |\n|---|---|")
    measured = Measured(flow, state["data"], clips, chosen)
    for part in (measured.follows, measured.rests, measured.begins, measured.denoises):
        for what, number in part():
            print(f"| {what} | {number:.4f} |", flush=True)


if __name__ == "__main__":
    main()
