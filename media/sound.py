"""Sound in: a causal log-mel spectrogram, one column a video frame, and the readers of sound files."""

import atexit
import contextlib
import importlib.util
import io
import mmap
import os
import re
import shutil
import struct
import sys
import tempfile
import warnings
import wave
from pathlib import Path

import numpy as np

from media.console import Skip, UserError
from media.container import VIDEOS, WHOLE, decoded_sound, open_container

SAMPLE_RATE = 16000  # of the stored sound, Hz
FLOOR = 1e-13  # of mel power: its logarithm is -30, a quiet hiss is at -19
# the level before anything was heard: that of a voice 57 dB quieter than one close to a microphone
QUIET = -21.0


class Mel:
    """Causal log-mel spectrogram: column t sees the samples before (t + 1) / fps seconds and no later one.

    n_mels bands between fmin and fmax (Hz), a Hann window of `window` seconds. Power is divided by the
    window's squared sum and the bands are defined in Hz, so that one sound gives the same numbers at any
    sample rate: no resampler is needed. Heard relative to a running level: column t is c_t - L_t with
        L_t = max(L_{t-1} - level, E_t, QUIET),   E_t the logarithm of column t's summed power,
    the loudest so far, forgotten at `level` nats a column. So a quiet microphone sounds like a loud one,
    without look-ahead; digital silence before the first word is like faint hiss. level = 0: c_t.
    """

    def __init__(self, n_mels=40, fmin=0.0, fmax=8000.0, window=0.064, level=0.01, fps=25, sample_rate=16000):
        librosa = import_librosa()  # takes a second to import: only those who listen pay for it

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
        # from the start of the next column's window on
        keep = max(0, int((frames + 1) * self.sample_rate / self.fps) - self.size)
        drop = max(0, keep - self.first)
        self.past, self.first, self.frame = self.past[drop:], self.first + drop, frames
        return self._log(power)


def vary(columns, mel, rng, vtlp=0.0, tilt=0.0, channel=0.0):
    """Windows (B, T, M) of log-mel columns as other voices, rooms and microphones might have given them, each
    window by chance (rng): a quarter of them by a vocal tract up to exp(+-vtlp) times as long (vocal tract
    length perturbation, Jaitly and Hinton 2013); a share `channel` as by a telephone, with nothing above 3.4
    to 7.5 kHz, and such a share in white noise 0 to 25 dB below the voice (by `Clips.batch` such a share is
    clipped already); all with a spectrum that leans by up to +-tilt nats at its ends. mel: the settings of
    `Mel`, which gave these columns relative to its running level."""
    B, _, M = columns.shape
    hz = import_librosa().mel_frequencies(M + 2, fmin=mel["fmin"], fmax=mel["fmax"])[1:-1]

    def some(share, low, high):  # which windows (n,), and a number for each (n, 1, 1)
        chosen = np.flatnonzero(rng.random(B) < share)
        return chosen, rng.uniform(low, high, (len(chosen), 1, 1))

    columns = columns.copy()
    if vtlp:
        other, stretch = some(0.25, -vtlp, vtlp)
        places = [np.interp(hz * factor, hz, np.arange(M)) for factor in np.exp(stretch).ravel()]
        places = np.reshape(places, (-1, 1, M))
        below = np.minimum(places.astype(int), M - 2)
        lower, upper = (np.take_along_axis(columns[other], band, 2) for band in (below, below + 1))
        columns[other] = lower + (places - below) * (upper - lower)
    if channel:
        narrow, highest = some(channel, 3400, 7500)
        empty = rng.uniform(-20, -12, (len(narrow), 1, 1))
        columns[narrow] = np.where(hz > highest, np.minimum(columns[narrow], empty), columns[narrow])
        # the bands of a voice's loud frames sum to about 0, and white noise is alike in all 40 of them
        noisy, level = some(channel, -13, -6)
        columns[noisy] = np.logaddexp(columns[noisy], rng.normal(level, 0.3, columns[noisy].shape))
    lean = tilt * rng.uniform(-1, 1, (B, 1, 1)) * np.linspace(-1, 1, M)
    return (columns + lean).astype(np.float32)


def heard(config):
    """How training hears its sound, by a Config: what it asks of `vary`."""
    return {name: getattr(config, name) for name in ("vtlp", "tilt", "channel")}


def import_librosa():
    """librosa. Its compiled functions are kept beside it or in the user's cache; where neither can be written
    (packages installed by another user, no home), in a temporary folder."""
    try:
        import librosa.filters
    except RuntimeError:
        import numba

        os.environ["NUMBA_CACHE_DIR"] = numba.config.CACHE_DIR = folder = tempfile.mkdtemp(prefix="numba-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        import librosa.filters
    return librosa


# ------------------------------------------------------------------------------------------------------------
# Reading: one reader for prepare and sample. A file is decoded twice: for its levels, then for its sound

SOUNDS = tuple(
    ".wav .flac .ogg .mp3 .m4a .aac .opus .aiff .aif .aifc .caf .w64 .au .wma .oga .mka .weba .amr".split()
)
BARE = (".raw", ".pcm", ".s16", ".sln")  # samples and nothing else
BLOCK = 1 << 18  # samples decoded at a time
STREAMED = 0x7FFF0000  # a wav that names more bytes than this was written to a pipe: nobody knew its length
CUT = "cut off"  # how the note of a wav begins that ends before its header says


class Recording:
    """The sound of any file as mono float32 blocks in -1..1: `rate`, `begin` (seconds), `notes`, and
    iteration.

    Channels are averaged, unless that loses more than half of the loudest one (they cancel each other, or all
    but one are empty): then the loudest is taken; of five and more the third, where film sound has its
    dialogue, if anything is to be heard there. Samples in the units of integers, or louder than full scale,
    are scaled; an offset is taken off."""

    def __init__(self, path, part=WHOLE):
        self.path, self.notes, self.contained = Path(path), [], False
        self.decoded = self.choose(part)
        self.rate, self.begin, self.levels = None, 0.0, None
        for time, block, rate in self.decoded():
            if self.levels is None:
                self.rate, self.begin, self.levels = rate, time, Levels(block.shape[1])
                if not 4000 <= rate <= 768000:
                    raise Skip("sample rate", f"{rate} Hz vs 4,000 to 768,000")
            self.levels.add(block)
        if self.levels is None:
            raise Skip("empty sound", "0 samples")
        self.weights, self.offset = self.levels.mix(self.notes)

    def __iter__(self):
        for _, block, _ in self.decoded():
            yield block @ self.weights - self.offset

    def choose(self, part):
        """What decodes this file: a function that yields (seconds, (n, C) float32, rate)."""
        import soundfile  # what librosa reads with

        path, suffix = self.path, self.path.suffix.lower()
        if suffix in VIDEOS or part != WHOLE:
            self.contained = True
            return lambda: decoded_sound(path, part)
        joined, why = is_joined(path), "several mp3 files in one."
        if not joined:
            try:
                with MendedWav(path) as file, soundfile.SoundFile(file):
                    self.notes += file.notes
                    return lambda: plain_sound(path)
            except (soundfile.LibsndfileError, OSError, RuntimeError) as e:
                why = str(e).split(": ")[-1]
                if "No 'data' chunk" in why:
                    why = "it ends before its samples begin: cut off?"
        if suffix in BARE:
            raise Skip(
                "raw samples",
                f"{path.name} has no header that says its rate. Give it one: "
                f"ffmpeg -f s16le -ar 16000 -ac 1 -i {path.name} out.wav",
            )
        if importlib.util.find_spec("av"):
            with contextlib.suppress(Skip), open_container(path) as container:
                if container.streams.audio:
                    self.contained = True
                    return lambda: decoded_sound(path, part)
        elif joined:
            self.notes.append("several mp3 files in one, only the first is heard: pip install av")
            return lambda: plain_sound(path)
        if not path.stat().st_size:
            why = "zero bytes"
        elif not importlib.util.find_spec("av"):
            why += " For what is not wav, flac, ogg, mp3: pip install av"
        raise Skip("unreadable sound", f"{path.name}: {why}")


class Levels:
    """What there is in the channels of a sound: (C,) sums, (C, C) products, peak, samples cut off at full
    scale."""

    def __init__(self, channels):
        self.count, self.peak, self.cut = 0, 0.0, 0
        self.sum, self.middle = np.zeros(channels), np.zeros(channels)
        self.products = np.zeros((channels, channels))

    def add(self, block):
        """block (n, C)."""
        if not np.isfinite(block).all():
            first = int(np.argmin(np.isfinite(block).all(1)))
            raise Skip(
                "NaN in the sound", f"NaN or Inf among the samples, first at sample {self.count + first}"
            )
        self.count += len(block)
        size, block64 = np.abs(block), block.astype(float)
        self.peak = max(self.peak, float(size.max(initial=0)))
        self.sum += block64.sum(0)
        self.middle += len(block) * np.median(block64, axis=0)
        self.products += block64.T @ block64
        top = size >= 0.99 * max(self.peak, 0.02)  # a run of equal samples up there has been cut off
        self.cut += int((top[1:] & (block[1:] == block[:-1])).sum())

    def mix(self, notes):
        """-> weights (C,) and an offset: mono = block @ weights - offset. What cannot be meant so goes to
        notes."""
        channels = len(self.sum)
        mean = self.sum / self.count
        cov = self.products / self.count - np.outer(mean, mean)
        power, loudest = np.diag(cov), int(np.argmax(np.diag(cov)))
        weights = np.full(channels, 1 / channels)
        if channels >= 5 and power[2] > 0.01 * power[loudest]:
            weights = np.eye(channels)[2]
        elif weights @ cov @ weights < 0.3 * power[loudest]:
            if channels == 2 and cov[0, 1] < -0.5 * np.sqrt(power[0] * power[1]):
                notes.append("the two channels cancel each other: only the louder one is heard")
            weights = np.eye(channels)[loudest]
        scale = max(1.0, self.peak)
        if self.peak > 100:  # float samples that were never divided
            scale = next((2.0**bits for bits in (15, 23, 31) if self.peak <= 2.0**bits), self.peak)
            notes.append(
                f"samples up to {self.peak:,.0f} instead of 1: taken as whole numbers up to {scale:,.0f}"
            )
        elif self.peak > 1.5:
            notes.append(f"samples up to {self.peak:.1f} instead of 1: made quieter")
        weights = (weights / scale).astype(np.float32)
        offset = float(self.middle / self.count @ weights)  # the median: pulses of a voice have a mean, too
        if abs(offset) > 0.05:
            notes.append(f"a constant {offset:.2f} in all samples: taken off")
        return weights, np.float32(offset if abs(offset) > 0.01 else 0)

    def doubts(self, weights):
        """What cannot be meant so, though nothing can be done about it."""
        if self.cut > 0.002 * self.count * len(weights):
            yield f"{self.cut / self.count / len(weights):.1%} of the samples cut off at full scale"
        mean = self.sum / self.count
        power = weights @ (self.products / self.count - np.outer(mean, mean)) @ weights
        if power < 0.0002**2:
            yield f"hardly a sound ({10 * np.log10(max(power, 1e-18)):.0f} dB of full scale)"


def plain_sound(path):
    """Yield (0, float32 (n, C), rate) of a sound file that libsndfile knows."""
    import soundfile

    begun = False
    try:
        with MendedWav(path) as file, soundfile.SoundFile(file) as f:
            for block in f.blocks(max(1, BLOCK // f.channels), dtype="float32", always_2d=True):
                yield 0.0, block, f.samplerate
                begun = True
    except (soundfile.LibsndfileError, RuntimeError) as e:
        how = "breaks off" if begun else "cannot be decoded"
        raise Skip("unreadable sound", f"{path.name}: {how} ({str(e).split(': ')[-1]})") from None


class MendedWav(io.FileIO):
    """A file; but of a wav that was never closed, or whose header names too small a size, as if it said `to
    the end`."""

    def __init__(self, path):
        super().__init__(path)
        self.name, self.notes = "", []  # soundfile goes by the content, not by the suffix
        self.at = self.find_data_size()

    def find_data_size(self):
        """The place of the 4 bytes that hold the size of the samples, if that is wrong; else None."""
        end = self.seek(0, os.SEEK_END)
        self.seek(0)
        head = self.read(12)
        at = 12 if head[:4] == b"RIFF" and head[8:] == b"WAVE" else end
        while at + 8 <= end:
            self.seek(at)
            name, size = struct.unpack("<4sI", self.read(8))
            after = at + 8 + size + size % 2
            if name == b"fmt " and size >= 16 and at + 24 <= end:
                kind, channels, rate, bytes_a_second, step, bits = struct.unpack("<HHIIHH", self.read(16))
                if kind == 1 and (step != channels * -(-bits // 8) or bytes_a_second != rate * step):
                    self.notes.append(
                        f"its header contradicts itself ({channels} channels of {bits} bits at {rate} Hz, "
                        f"but {step} bytes a step, {bytes_a_second} a second)"
                    )
            if name == b"data":
                there = end - at - 8
                if there < size < STREAMED:
                    self.notes.append(f"{CUT}: {there:,} of the {size:,} bytes of its sound are there")
                self.seek(after)
                following = self.read(8)  # another chunk, or samples?
                self.seek(0)
                fits = re.match(rb"[\x20-\x7e]{4}", following) and (
                    len(following) < 8 or after + 8 + struct.unpack("<I", following[4:])[0] <= end + 1
                )
                return None if len(following) < 4 or fits else at + 4
            at = after
        self.seek(0)
        return None

    def readinto(self, buffer):
        start = self.tell()
        n = super().readinto(buffer)
        if self.at is not None and start < self.at + 4 and start + n > self.at:
            for i in range(max(start, self.at), min(start + n, self.at + 4)):
                memoryview(buffer).cast("B")[i - start] = 0xFF
        return n


def is_joined(path):
    """Whether an mp3 file holds the beginning of another: libsndfile ends where the first one's header
    says."""
    with open(path, "rb") as f:
        head = f.read(3)
        if head != b"ID3" and not (head[:1] == b"\xff" and head[1:2] >= b"\xe0"):
            return False
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    with data:
        tags = [tag for tag in (b"Xing", b"Info") if 0 <= data.find(tag, 0, 1 << 20)]
        return any(data.find(tag, data.find(tag) + 4000) >= 0 for tag in tags)


def read_sound(path):
    """Yield (mono float32 samples in -1..1, sample rate) of a sound file in blocks, however long it is."""
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: {'a folder' if path.is_dir() else 'no such file'} vs a sound or video file. "
            "Check --audio"
        )
    try:
        recording = Recording(path)
        for note in recording.notes:
            print(f"note: {path.name}: {note}", file=sys.stderr)
        yield from ((block, recording.rate) for block in recording)
    except Skip as e:
        raise UserError(
            f"{path}: {e.args[0]} ({e.args[-1]}) vs a sound or video file. Export it as wav"
        ) from None


def load_sound(path, part=WHOLE):
    """Any sound or video file -> float32 (S,) mono at 16 kHz, the second at which it begins, notes."""
    recording = Recording(path, part)
    if recording.contained and 8000 <= recording.rate <= 192000:
        sound, rate = resample_contained(recording), SAMPLE_RATE
    else:
        sound, rate = np.concatenate(list(recording)), recording.rate
    doubts = recording.levels.doubts(recording.weights)
    return clean_sound(sound, rate), recording.begin, [*recording.notes, *doubts]


def resample_contained(recording):
    """What PyAV decoded it resamples too: 16 bits, 16 kHz."""
    import av

    resampler, parts = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE), []
    for block in recording:
        whole = np.floor(block * 32768 + 0.5).clip(-32768, 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(whole[None], format="s16", layout="mono")
        frame.sample_rate = recording.rate
        parts += resampler.resample(frame)
    parts += resampler.resample(None)
    return np.concatenate([part.to_ndarray()[0] for part in parts]).astype(np.float32) / 32768


def clean_sound(sound, rate):
    """Refuse what is no speech, resample to 16 kHz."""
    if not 8000 <= rate <= 192000:
        raise Skip("sample rate", f"{rate} Hz vs 8,000 to 192,000")
    if sound.ndim != 1 or not len(sound):
        raise Skip("empty sound", f"{sound.shape} samples")
    if not np.isfinite(sound).all():
        raise Skip("NaN in the sound", f"first at sample {int(np.argmin(np.isfinite(sound)))}")
    if rate != SAMPLE_RATE:
        sound = import_librosa().resample(sound, orig_sr=rate, target_sr=SAMPLE_RATE)
    return sound / max(1.0, float(np.abs(sound).max()))  # louder than full scale: scaled, never wrapped


def open_pcm(stream):
    """Raw 16-bit mono samples that arrive -> (their rate or None, the first bytes of them). A wav's header is
    read and taken off; another kind of file is refused."""
    head = stream.read(12)
    if (
        head[:4] in (b"fLaC", b"OggS", b"caff", b"FORM", b".snd")
        or head[:3] == b"ID3"
        or head[4:8] == b"ftyp"
    ):
        raise UserError("standard input: a sound file vs raw 16-bit mono PCM. Use sample --audio FILE")
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        return None, head
    rate = channels = bits = 0
    while len(chunk := stream.read(8)) == 8 and chunk[:4] != b"data":
        body = stream.read(min(struct.unpack("<I", chunk[4:])[0], 1 << 20))
        if chunk[:4] == b"fmt " and len(body) >= 16:
            channels, rate, bits = struct.unpack("<2xHI6xH", body[:16])
    if chunk[:4] != b"data":
        raise UserError(
            "standard input: a wav that ends within its header vs 16-bit mono PCM. Export it again"
        )
    if channels != 1 or bits != 16 or not 4000 <= rate <= 384000:
        raise UserError(
            f"standard input: a wav of {channels} channels of {bits} bits at {rate} Hz vs 16-bit mono PCM. "
            "Use sample --audio FILE"
        )
    return rate, b""


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
    if np.subtract(*np.quantile(heard, [0.9, 0.1])) < 3.0:
        found.append("hardly a pause in it, like noise")
    return found


def wav_bytes(sound, rate):
    """16-bit mono samples as the bytes of a .wav file."""
    with io.BytesIO() as file, wave.open(file, "wb") as f:
        f.setparams((1, 2, rate, len(sound), "NONE", ""))
        f.writeframes(np.asarray(sound, "<i2").tobytes())
        f.close()
        return file.getvalue()
