"""What a finished training folder is like: do the mouths follow the sound, how still are the landmarks, what
is odd."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from media.landmarks import interocular
from media.sound import SAMPLE_RATE

# frames by which the sound is taken as late; from 6 on a voice's syllables fit the mouth's next ones as well
LAGS = range(-3, 4)


@dataclass
class Survey:
    """Measured on at most 1,000 clips of a folder."""

    interocular: float  # distance of the eyes' centres in the training clips (none: in all), face boxes
    jitter: (
        float  # median distance of a point from the middle of its neighbours in time, interocular distances
    )
    correlation: np.ndarray  # (7,) of mouth opening with the loudness at each of LAGS
    chance: float  # the same with another clip's sound
    moved: np.ndarray  # (136,) whether a coordinate changes at all
    dull: int  # clips without sound in the highest band
    frames: int

    @property
    def late(self):
        """Frames by which the sound is late."""
        r = self.correlation
        return LAGS[int(np.nanargmax(r))] if np.isfinite(r).any() else 0

    def __str__(self):
        own = " ".join(f"{r:.2f}" for r in self.correlation)
        other = "" if np.isnan(self.chance) else f" (with another clip's sound {self.chance:.2f})"
        return f"mouth opening against loudness, sound taken as late by -3..3 frames: {own}{other}"


def survey(out, fps, fmax, clips):
    """Measure the arrays of the folder `out`; fmax: the highest frequency of its mel, Hz."""
    names = ("landmarks", "audio")
    landmarks, audio = (np.load(Path(out) / f"{name}.npy", mmap_mode="r") for name in names)
    widths, jitter, own, other, moved, dull, energy = [], [], [], [], np.zeros(136, bool), 0, None
    chosen = clips[:: -(-len(clips) // 1000)]
    training = any(clip.split == "train" for clip in chosen)
    for clip in chosen:
        rows = slice(clip.start, clip.start + clip.frames)
        x = np.array(landmarks[rows]).reshape(-1, 68, 2)
        sound = audio[clip.audio_start : clip.audio_start + clip.audio_samples].astype(np.float32) / 32768
        moved |= (x != x[0]).reshape(-1, 136).any(0)
        dull += share_above(0.85 * fmax, sound) < 1e-6  # of speech 1e-4 and more, of rounding 1e-9
        width = np.median(interocular(x))
        if clip.split == "train" or not training:
            eyes = x[:, 36:42].mean(1) - x[:, 42:48].mean(1)  # their centres, not the outer corners
            widths.append(np.median(np.linalg.norm(eyes, axis=-1)))
        if len(x) > 2:
            jitter.append(np.median(np.linalg.norm(x[1:-1] - (x[:-2] + x[2:]) / 2, axis=-1)) / width)
        before, energy = energy, loudness(sound, len(x), fps)
        opening = np.linalg.norm(x[:, 62] - x[:, 66], axis=-1) / width
        own.append([lagged(opening, energy, lag) for lag in LAGS])
        other.append(np.nan if before is None else lagged(opening, before, 0))
    return Survey(
        interocular=float(np.median(widths)),
        jitter=float(np.median(jitter or [np.nan])),
        correlation=np.nanmean(np.array(own), axis=0)
        if np.isfinite(own).any()
        else np.full(len(LAGS), np.nan),
        chance=float(np.nanmean(other)) if np.isfinite(other).any() else np.nan,
        moved=moved,
        dull=int(dull),
        frames=sum(clip.frames for clip in clips),
    )


def share_above(hertz, sound):
    """The share of a sound's power above a frequency."""
    power = np.square(np.abs(np.fft.rfft(sound)))
    return power[round(hertz / SAMPLE_RATE * len(sound)) :].sum() / max(power.sum(), 1e-12)


def loudness(sound, T, fps):
    """Log energy of each frame's own sound, (T,)."""
    edges = np.minimum((np.arange(T + 1) * SAMPLE_RATE / fps).astype(int), len(sound))
    total = np.concatenate([[0], np.cumsum(sound.astype(float) ** 2)])[edges]
    return np.log(np.diff(total) / np.maximum(np.diff(edges), 1) + 1e-8)


def lagged(opening, energy, lag):
    """Correlation of opening at t with the energy at t + lag; NaN when there is nothing to correlate."""
    n = min(len(opening), len(energy))
    t = np.arange(max(0, -lag), n - max(0, lag))
    if len(t) < 10 or not np.ptp(opening[t]) or not np.ptp(energy[t + lag]):
        return np.nan
    return float(np.corrcoef(opening[t], energy[t + lag])[0, 1])


def warnings_about(found, clips, moved):
    """What the user of a folder should know of before training. found: its Survey; moved: whether the sound
    is moved already."""
    long_enough = found.frames >= 500  # a sentence or two can do anything
    if long_enough and np.nanmax(found.correlation, initial=-1) < max(
        0.15, np.nan_to_num(found.chance) + 0.03
    ):
        yield "the mouths do not follow this sound: is it the right sound for these faces?"
    elif long_enough and abs(found.late) >= 2:
        more = " or more" * (found.late in (LAGS[0], LAGS[-1]))
        yield (
            f"the sound seems {abs(found.late)} frames {'late' if found.late > 0 else 'early'}{more}"
            + f". The same command with --audio-offset {found.late} moves it, without reading anything again"
            * (not moved)
        )
    if found.dull:
        yield (
            f"{found.dull} clips have no sound in the highest band (8 kHz recordings, telephone?): "
            "a model hears the difference. Prepare with an --fmax below half of the lowest sample rate"
        )
    if not found.moved.all():
        first = int((~found.moved).argmax())
        yield f"{(~found.moved).sum()} coordinates never change, the first is {'xy'[first % 2]}_{first // 2}"
    if not all(any(clip.split == split for clip in clips) for split in ("train", "val")):
        rest = sum(clip.split != "test" for clip in clips)
        beside = " beside the test set" * (rest < len(clips))
        yield f"{rest} clips{beside} are too few to hold some out: training needs 3 or more"
