"""Sound in: a causal log-mel spectrogram, one column a video frame, and the readers of sound files."""

import io
import warnings
import wave
from pathlib import Path

import numpy as np

from media.console import UserError

FLOOR = 1e-13  # of mel power: its logarithm is -30, a quiet hiss is at -19


class Mel:
    """Causal log-mel spectrogram: column t sees the samples before (t + 1) / fps seconds and no later one.

    n_mels bands between fmin and fmax (Hz), a Hann window of `window` seconds. Power is divided by the window's squared
    sum and the bands are defined in Hz, so that one sound gives the same numbers at any sample rate: no resampler is
    needed. `level` divides by the whole sound's 95th-percentile frame energy, for voices and microphones never heard in
    training.
    """

    def __init__(
        self, n_mels=40, fmin=0.0, fmax=8000.0, window=0.064, level=False, fps=25, sample_rate=16000
    ):
        import librosa  # takes a second to import: only those who listen pay for it

        if sample_rate < 4000:
            raise UserError(
                f"sample rate: {sample_rate} Hz vs at least 4000. Speech needs the bands above 1 kHz"
            )
        self.fps, self.sample_rate, self.level = fps, sample_rate, level
        self.size = round(window * sample_rate)
        self.hann = np.hanning(self.size + 1)[:-1].astype(np.float32)
        with warnings.catch_warnings():  # a band above half the sample rate is empty and stays at the floor
            warnings.simplefilter("ignore")
            bank = librosa.filters.mel(sr=sample_rate, n_fft=self.size, n_mels=n_mels, fmin=fmin, fmax=fmax)
        self.bank = bank / self.hann.sum() ** 2  # (M, bins)
        # samples kept, the first one's number, columns done
        self.past, self.first, self.frame = np.zeros(0, np.float32), 0, 0

    def _power(self, samples, first, start, stop):
        """Mel power of columns start..stop-1; samples[0] is number `first` of its sound, with zeros before number 0."""
        ends = np.floor(np.arange(start + 1, stop + 1) * self.sample_rate / self.fps).astype(int) - first
        samples = np.concatenate([np.zeros(self.size, np.float32), samples])
        power = [np.zeros((0, len(self.bank)), np.float32)]
        for block in np.array_split(ends, len(ends) // 4096 + 1):
            windows = samples[block[:, None] + np.arange(self.size)]  # (T, window)
            power.append((np.abs(np.fft.rfft(windows * self.hann)) ** 2).astype(np.float32) @ self.bank.T)
        return np.concatenate(power)

    def _frames(self, samples):
        return int(samples * self.fps / self.sample_rate + 1e-9)

    def columns(self, audio):
        """Samples (S,) in -1..1 -> log-mel (T, M) float32, T = floor(S * fps / sample_rate)."""
        audio = np.asarray(audio, np.float32)
        power = self._power(audio, 0, 0, self._frames(len(audio)))
        if self.level and len(power):
            power = power / max(np.percentile(power.mean(1), 95), 1e-12)
        return np.log(np.maximum(power, FLOOR))

    def push(self, samples):
        """The next samples of a sound that arrives piece by piece -> the columns (n, M) they complete."""
        if self.level:
            raise UserError(
                "level: a clip's level vs a sound still arriving. Train on data prepared without --level"
            )
        self.past = np.concatenate([self.past, np.asarray(samples, np.float32)])
        frames = self._frames(self.first + len(self.past))
        power = self._power(self.past, self.first, self.frame, frames)
        keep = max(
            0, int((frames + 1) * self.sample_rate / self.fps) - self.size
        )  # start of the next column's window
        drop = max(0, keep - self.first)
        self.past, self.first, self.frame = self.past[drop:], self.first + drop, frames
        return np.log(np.maximum(power, FLOOR))


def read_sound(path):
    """Yield (mono float32 samples in -1..1, sample rate) of a sound file in blocks, however long it is."""
    import soundfile  # what librosa reads with

    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: {'a folder' if path.is_dir() else 'no such file'} vs a sound or video file. "
            "Check --audio"
        )
    begun = False
    try:
        with soundfile.SoundFile(path) as f:
            for block in f.blocks(20 * f.samplerate, dtype="float32", always_2d=True):
                begun = True
                yield block.mean(1), f.samplerate
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


def wav_bytes(sound, rate):
    """16-bit mono samples as the bytes of a .wav file."""
    with io.BytesIO() as file, wave.open(file, "wb") as f:
        f.setparams((1, 2, rate, len(sound), "NONE", ""))
        f.writeframes(np.asarray(sound, "<i2").tobytes())
        f.close()
        return file.getvalue()


SAMPLE_RATE = 16000  # of the stored sound, Hz
