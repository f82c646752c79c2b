"""Faces where a user meets them: strangers' voices, quiet microphones, silence. Prints Markdown rows.

    python tests/faces.py --checkpoint FILE [FILE ...] --data DIR [--split test] [--speaker s4] [--limit 40]

Of several checkpoints (training seeds) the mean, the least and the greatest number. Each clip's sound is
heard anew, as 16-bit samples at several gains. Distances are in those of the outer eye corners of the face
itself, recorded or sampled. A frame is quiet where the sound between 300 and 4000 Hz is more than 25 dB below
the clip's loud level (its 95th percentile): the rule of speech detectors.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from media.landmarks import interocular, lip_points, mouth_opening, points
from media.sound import Mel


def gap(track):
    """Distance of the inner lips' middles over the frames (T,) of a track (T, 136)."""
    p = points(track)
    return np.linalg.norm(p[:, 62] - p[:, 66], axis=-1) / interocular(p).mean()


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


def lip_speed(track):
    """Root mean square change of the lip points about their centre since the last frame (T,); frame 0 has
    none."""
    change = np.diff(lip_points(track), axis=0, prepend=lip_points(track)[:1])
    return np.sqrt(np.square(change).sum(-1).mean(-1)) / interocular(points(track)).mean()


def at_rest(tracks, quiet):
    """Mean opening and root mean square lip speed of tracks (T, 136) in their quiet frames (T,)."""
    openings = [gap(x)[: len(q)][q] for x, q in zip(tracks, quiet, strict=True)]
    speeds = [lip_speed(x)[: len(q)][q & (np.arange(len(q)) > 0)] for x, q in zip(tracks, quiet, strict=True)]
    return np.concatenate(openings).mean(), np.sqrt(np.square(np.concatenate(speeds)).mean())


def loudness(columns):
    """Logarithm (T,) of the summed power of absolute log-mel columns (T, M)."""
    return np.log(np.exp(columns).sum(1))


class Measured:
    """Clips whose recorded faces a flow's faces are held against."""

    def __init__(self, flow, data, clips, chosen, seed=0):
        self.flow, self.clips, self.seed, rate = flow, clips, seed, clips.meta["sample_rate"]
        self.fps, self.sigma = data["fps"], flow.config.noise * data["interocular"]
        self.mel = Mel(**data["mel"], fps=self.fps, sample_rate=rate)
        self.hear = lambda mel=self.mel, lead=flow.config.lead, **how: hear(clips, chosen, mel, lead, **how)
        self.plain = self.hear()
        rows = [slice(clip["start"], clip["start"] + clip["frames"]) for clip in chosen]
        self.truth = [np.array(clips.landmarks[r])[: len(c)] for r, c in zip(rows, self.plain, strict=True)]
        self.openings = [mouth_opening(points(x)) for x in self.truth]
        wide, voice = (
            [loudness(c)[: len(x)] for c, x in zip(self.hear(mel, 0), self.truth, strict=True)]
            for mel in (
                Mel(fps=self.fps, sample_rate=rate, level=0),
                Mel(fps=self.fps, sample_rate=rate, level=0, fmin=300, fmax=4000),
            )
        )
        self.loud, fifth = wide, np.quantile(np.concatenate(wide), 0.2)
        self.quiet = {
            "quiet frames": [e < np.quantile(e, 0.95) - 2.5 * np.log(10) for e in voice],
            "the quietest fifth": [e <= fifth for e in wide],
        }

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
        tracks = {"truth": self.truth, "sample": self.speak(self.plain, 1.0)}
        tracks |= {
            "denoised sample": self.speak(self.plain, 1.0, True),
            "temperature 0": self.speak(self.plain),
        }
        for where, quiet in self.quiet.items():
            yield f"{where}, share", np.concatenate(quiet).mean()
            for i, what in enumerate(("opening", "lip speed")):
                for name, faces in tracks.items():
                    yield f"{where}, {what}, {name}", at_rest(faces, quiet)[i]

    def moves(self):
        """Head and lips, as drawn and denoised, against the recorded ones."""
        from study.metrics import head, jitter, l_mor, velocity_autocorrelation

        T = min(len(x) for x in self.truth)
        truth = np.stack([x[:T] for x in self.truth])
        yield "velocity autocorrelation of the head, truth", velocity_autocorrelation(head(truth))
        ways = {"sample": (1.0, False), "denoised sample": (1.0, True), "temperature 0": (0.0, False)}
        for name, (temperature, denoise) in ways.items():
            track = np.stack([x[:T] for x in self.speak(self.plain, temperature, denoise)])
            yield f"L_MOR, {name}", l_mor(track, truth).mean()
            if temperature:
                yield f"head jitter, {name}", jitter(head(track), head(truth))
                yield f"velocity autocorrelation of the head, {name}", velocity_autocorrelation(head(track))

    def begins(self):
        """What the face does in a second of no voice before the sentence."""
        hiss = np.round(np.random.default_rng(0).normal(0, 3, self.mel.sample_rate))
        for name, before in (("digital silence", 0 * hiss), ("hiss", hiss)):
            tracks = self.speak(self.hear(before=before))
            yield f"a second of {name} first, opening in it", np.mean([gap(x)[:20] for x in tracks])
            yield (
                f"a second of {name} first, fastest lips in it",
                max(lip_speed(x)[:20].max() for x in tracks),
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


def figures(path, args):
    """{what: number} of one checkpoint."""
    from study.metrics import measure
    from talkingflow import Clips, load_checkpoint

    (flow, state), clips = load_checkpoint(path), Clips(args.data)
    chosen = [clip for clip in clips.clips if args.split in ("all", clip["split"])]
    chosen = [clip for clip in chosen if clip["speaker"].startswith(args.speaker)][: args.limit]
    measured = Measured(flow, state["data"], clips, chosen)
    found = {"clips": len(chosen)}
    for part in (measured.follows, measured.rests, measured.moves, measured.begins, measured.denoises):
        found |= part()
    if state["data"]["fingerprint"] == clips.meta["fingerprint"] and not args.speaker:  # densities too
        m = measure(flow, clips, args.split, args.limit)
        found |= {"NLL": m["nll"], "NLL less that of VAR(3)": m["nll"] - m["var3"]}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", nargs="+", default=["pretrained/grid.pt"])
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="test", help="train, val, test or all [test]")
    parser.add_argument("--speaker", default="", help="only those whose name begins so")
    parser.add_argument("--limit", type=int, default=40, help="at most so many clips [40]")
    args = parser.parse_args()
    each = [figures(path, args) for path in args.checkpoint]
    print(f"| {' '.join(args.checkpoint)} on {args.data} {args.split} {args.speaker} | |\n|---|---|")
    for what in each[0]:
        numbers = [found[what] for found in each]
        spread = f" [{min(numbers):.4f}, {max(numbers):.4f}]" if len(each) > 1 else ""
        print(f"| {what} | {np.mean(numbers):.4f}{spread} |")


if __name__ == "__main__":
    main()
