"""Videos made for tests: pictures and sound written through PyAV, and a face whose mouth follows a known
curve."""

from fractions import Fraction

import numpy as np

from media.talkers import articulator_modes, mean_face

RATE = 16000
MEAN, OPENING = mean_face(), articulator_modes(mean_face())[0]
rng = np.random.default_rng(7)
HZ, PHASE, SIZE = rng.uniform(0.7, 4, 12), rng.uniform(0, 6.28, 12), rng.uniform(0.5, 1, 12)


def curve(t):
    """The known curve, 0.05..1 at seconds t: grey of the picture, loudness of the sound, opening of the
    mouth."""
    s = (SIZE * np.sin(2 * np.pi * HZ * np.asarray(t)[..., None] + PHASE)).sum(-1) / 3.2
    return 0.05 + 0.95 / (1 + np.exp(-2 * s))


def tone(seconds, rate=RATE, at=0.0):
    """440 Hz as loud as the curve says, from second `at` on."""
    t = at + np.arange(round(seconds * rate)) / rate
    return (0.5 * curve(t) * np.sin(2 * np.pi * 440 * t)).astype(np.float32)


def face(opening, size=200):
    """A face (..., 68, 2) in pixels whose mouth is open by 0..1."""
    return (MEAN + [0.5, 0.47] + OPENING * np.asarray(opening)[..., None, None]) * size


def grey_pictures(times, size=(96, 96)):
    """Pictures as light as the curve at their times."""
    for light in np.rint(255 * curve(times)).astype(np.uint8):
        yield np.full((size[1], size[0], 3), light, np.uint8)


def by_grey(rgb):
    """Stands in for a face finder: the lightness of the picture is the opening of the mouth."""
    return [face(rgb[8:-8, 8:-8].mean() / 255)]


def write_video(path, pictures, times, sound=None, begin=0.0, fps=25, vcodec="libx264", acodec="aac",
                rate=RATE, layout="mono", gains=(1,), pixel=None, options=None, exact=False):  # fmt: skip
    """Pictures (H, W, 3) shown at `times` (s), float sound at `rate` from `begin` on, times `gains` in each
    channel.

    exact: the times as they are, and not frame numbers at fps, which is all that some containers take."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = list(pictures)
    unit = Fraction(1, 90000) if exact else 1 / Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w") as container:
        if options is None:
            options = {"crf": "12", "preset": "veryfast"} if vcodec == "libx264" else {"b": "4000000"}
        video = container.add_stream(vcodec, rate=Fraction(fps).limit_denominator(1001), options=options)
        video.height, video.width = pictures[0].shape[:2]
        video.pix_fmt = "yuvj420p" if vcodec == "mjpeg" else "yuv420p"
        if exact:
            video.codec_context.time_base = unit
        if pixel:  # width / height
            video.codec_context.sample_aspect_ratio = Fraction(pixel)
        audio = container.add_stream(acodec, rate=rate, layout=layout) if sound is not None else None
        packets = []
        for picture, t in zip(pictures, times):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = round(t / unit), unit
            packets += video.encode(frame)
        packets += video.encode(None)
        if audio:
            packets += encoded(audio, sound, begin, rate, layout, gains)
        for packet in sorted(packets, key=lambda p: float((p.dts or 0) * p.time_base)):
            container.mux(packet)


def encoded(audio, sound, begin, rate, layout, gains):
    """The packets of a sound stream."""
    import av

    samples = np.round(np.clip(sound[:, None] * np.array(gains), -1, 1) * 32767).astype(np.int16)
    packets = []
    for i in range(0, len(samples), 1024):
        block = np.ascontiguousarray(samples[i : i + 1024].reshape(1, -1))
        frame = av.AudioFrame.from_ndarray(block, format="s16", layout=layout)
        frame.sample_rate, frame.pts = rate, i + round(begin * rate)
        frame.time_base = Fraction(1, rate)
        packets += audio.encode(frame)
    return packets + audio.encode(None)


def shift(t, values, span=0.6):
    """Seconds by which values at times t lie late on the curve, and how well they then follow it."""
    shifts = np.arange(-span, span, 0.002)
    seen = curve(t[None] - shifts[:, None])
    seen, values = seen - seen.mean(1, keepdims=True), values - values.mean()
    r = (seen * values).sum(1) / np.sqrt((seen**2).sum(1) * (values**2).sum())
    k = int(np.clip(np.argmax(r), 1, len(r) - 2))
    bend = r[k - 1] - 2 * r[k] + r[k + 1]  # a parabola through the best three: better than 2 ms
    return shifts[k] + 0.002 * (r[k - 1] - r[k + 1]) / (2 * bend), r[k]


def lag(meta, arrays, clip):
    """Milliseconds by which a clip's sound is late against its mouth; how well mouth and sound follow the
    curve."""
    n, fps = clip["frames"], meta["fps"]
    x = arrays["landmarks"][clip["start"] : clip["start"] + n].reshape(n, 68, 2)
    opening = np.linalg.norm(x[:, 62] - x[:, 66], axis=-1)
    sound = arrays["audio"][clip["audio_start"] : clip["audio_start"] + clip["audio_samples"]] / 32768
    width = 320  # samples over which the loudness is taken: whole periods of 440 Hz, nearly
    loud = np.sqrt(np.convolve(sound**2, np.ones(width) / width, "valid"))[::160]
    at = (width / 2 + 160 * np.arange(len(loud))) / RATE
    mouth, r_mouth = shift(clip["time"] + np.arange(n) / fps, opening)
    voice, r_voice = shift(clip["time"] + at, loud)
    return 1000 * (voice - mouth), r_mouth, r_voice
