"""Sound in: a causal log-mel spectrogram, one column a video frame, and the readers of sound files."""

import io
import sys
import warnings
import wave
from pathlib import Path

import numpy as np

from media.console import UserError

FLOOR = 1e-13  # of mel power: its logarithm is -30, a quiet hiss is at -19
QUIET = (
    -17.0
)  # the level before anything was heard: that of a voice 40 dB quieter than one close to a microphone


class Mel:
    """Causal log-mel spectrogram: column t sees the samples before (t + 1) / fps seconds and no later one.

    n_mels bands between fmin and fmax (Hz), a Hann window of `window` seconds. Power is divided by the
    window's squared sum and the bands are defined in Hz, so that one sound gives the same numbers at any
    sample rate: no resampler is needed. Heard relative to a running level: column t is c_t - L_t with
        L_t = max(L_{t-1} - level, E_t, QUIET),   E_t the logarithm of column t's summed power,
    the loudest so far, forgotten at `level` nats a column. So a quiet microphone sounds like a loud one,
    without look-ahead, and digital silence before the first word is far below any voice. level = 0: c_t.
    """

    def __init__(self, n_mels=40, fmin=0.0, fmax=8000.0, window=0.064, level=0.01, fps=25, sample_rate=16000):
        import librosa  # takes a second to import: only those who listen pay for it

        if sample_rate < 4000:
            raise UserError(
                f"sample rate: {sample_rate} Hz vs at least 4000. Speech needs the bands above 1 kHz"
            )
        if level is True:  # of a whole clip, which no stream can know
            raise UserError("level: that of a whole clip vs a running one. Prepare the data and train again")
        self.fps, self.sample_rate, self.level = fps, sample_rate, level
        self.size = round(window * sample_rate)
        self.hann = np.hanning(self.size + 1)[:-1].astype(np.float32)
        with warnings.catch_warnings():  # a band above half the sample rate is empty and stays at the floor
            warnings.simplefilter("ignore")
            bank = librosa.filters.mel(sr=sample_rate, n_fft=self.size, n_mels=n_mels, fmin=fmin, fmax=fmax)
        self.bank = bank / self.hann.sum() ** 2  # (M, bins)
        self.forget()

    def forget(self):
        """Before the first sample: nothing kept, the first one's number, no column done, the quiet level."""
        self.past, self.first, self.frame, self.loudest = np.zeros(0, np.float32), 0, 0, QUIET

    def _power(self, samples, first, start, stop):
        """Mel power of columns start..stop-1; samples[0] is number `first` of its sound, zeros come before
        number 0."""
        ends = np.floor(np.arange(start + 1, stop + 1) * self.sample_rate / self.fps).astype(int) - first
        samples = np.concatenate([np.zeros(self.size, np.float32), samples])
        power = [np.zeros((0, len(self.bank)), np.float32)]
        for block in np.array_split(ends, len(ends) // 1024 + 1):
            spectra = np.fft.rfft(samples[block[:, None] + np.arange(self.size)] * self.hann)  # (T, bins)
            squares = (np.abs(spectra) ** 2).astype(np.float32)
            # not by BLAS, whose sums round by how many columns it is given: blocks must equal the whole
            power.append(np.einsum("tb,mb->tm", squares, self.bank, optimize=False))
        return np.concatenate(power)

    def _log(self, power):
        """Mel power (n, M) of the next columns -> their logarithms, less the level that runs along."""
        power = np.maximum(power, FLOOR)
        columns = np.log(power)
        if self.level:
            levels = []
            for loudness in np.log(power.sum(1)).tolist():
                self.loudest = max(self.loudest - self.level, loudness, QUIET)
                levels.append(self.loudest)
            columns -= np.array(levels, np.float32)[:, None]
        return columns

    def _frames(self, samples):
        return int(samples * self.fps / self.sample_rate + 1e-9)

    def columns(self, audio):
        """A whole sound (S,) in -1..1 -> log-mel (T, M) float32, T = floor(S * fps / sample_rate)."""
        self.forget()
        return self.push(audio)

    def push(self, samples):
        """The next samples of a sound that arrives piece by piece -> the columns (n, M) they complete."""
        self.past = np.concatenate([self.past, np.asarray(samples, np.float32)])
        frames = self._frames(self.first + len(self.past))
        power = self._power(self.past, self.first, self.frame, frames)
        keep = max(
            0, int((frames + 1) * self.sample_rate / self.fps) - self.size
        )  # start of the next column's window
        drop = max(0, keep - self.first)
        self.past, self.first, self.frame = self.past[drop:], self.first + drop, frames
        return self._log(power)


def read_sound(path):
    """Yield (mono float32 samples in -1..1, sample rate) of a sound file in blocks, however long it is."""
    import soundfile  # what librosa reads with

    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: {'a folder' if path.is_dir() else 'no such file'} vs a sound or video file. "
            "Check --audio"
        )
    begun, alone, mixed = False, 0.0, 0.0
    try:
        with soundfile.SoundFile(path) as f:
            for block in f.blocks(20 * f.samplerate, dtype="float32", always_2d=True):
                begun, mono = True, block.mean(1)
                alone, mixed = alone + np.square(block).mean(1).sum(), mixed + np.square(mono).sum()
                yield mono, f.samplerate
        if mixed < 0.05 * alone:
            print(f"note: {path}: its channels cancel each other. Give one of them", file=sys.stderr)
    except soundfile.LibsndfileError as e:
        if begun:
            raise UserError(f"{path}: breaks off ({e}) vs a whole file. Export it again")
        import librosa

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield librosa.load(path, sr=None, mono=True)
        except Exception as e:  # audioread has many backends, and most of them fail without a text
            raise UserError(
                f"{path}: unreadable ({e or type(e).__name__}) vs wav, flac or mp3. "
                f"Convert it: ffmpeg -i {path} out.wav"
            )


def unlike_speech(sound, rate, fmax=8000.0):
    """What in a sound (S,), -1..1, lies outside of what a model of clean speech up to fmax Hz has heard: a
    list of phrases."""
    size = rate // 10
    frames = sound[: len(sound) // size * size].reshape(-1, size)
    energy = np.log(np.square(frames).mean(1) + 1e-12)
    if len(frames) < 5 or energy.max() < np.log(1e-7):
        return [] if len(frames) < 5 else ["nothing but silence"]
    found = []
    full = np.mean(np.abs(sound) > 0.995)
    if full > 1e-3:
        found.append(f"clipped ({full:.1%} of its samples at full scale)")
    loud = frames[energy >= np.quantile(energy, 0.8)] * np.hanning(size)
    power = np.square(np.abs(np.fft.rfft(loud))).mean(0)
    top = np.flatnonzero(power > 1e-6 * power.max())[-1] * rate / size
    if top < 0.7 * fmax:
        found.append(f"nothing above {top:.0f} Hz")
    heard = energy[energy > np.log(1e-9)]
    if np.subtract(*np.quantile(heard, [0.9, 0.1])) < 2.0:
        found.append("hardly a pause in it, like noise")
    return found


def wav_bytes(sound, rate):
    """16-bit mono samples as the bytes of a .wav file."""
    with io.BytesIO() as file, wave.open(file, "wb") as f:
        f.setparams((1, 2, rate, len(sound), "NONE", ""))
        f.writeframes(np.asarray(sound, "<i2").tobytes())
        f.close()
        return file.getvalue()


SAMPLE_RATE = 16000  # of the stored sound, Hz
