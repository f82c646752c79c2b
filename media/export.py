"""What `sample` writes: write(path, x (K, T, 68, 2), truth (T, 68, 2) or None, sound int16, rate, info).

A folder of pictures for renderers is written by `write_pictures`."""

import base64
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np

from media.console import UserError
from media.landmarks import CURVES, mouth_opening
from media.sound import wav_bytes


def write_npz(path, x, truth, sound, rate, info):
    """landmarks (K, T, 68, 2) float32 and, by name, everything in info."""
    with open(path, "wb") as f:
        np.savez(f, landmarks=x, **info)


def write_npy(path, x, truth, sound, rate, info):
    """The landmarks (K, T, 68, 2) float32 alone."""
    with open(path, "wb") as f:
        np.save(f, x)


def write_csv(path, x, truth, sound, rate, info):
    """OpenFace's columns, in pixels of the clip's frame, or of a 512-pixel square; face_id is the sample."""
    (x0, y0, side), points = info["box"], range(x.shape[2])
    with open(path, "w") as f:
        names = ["frame", "face_id", "timestamp", "confidence", "success"] + [
            f"{v}_{i}" for v in "xy" for i in points
        ]
        f.write(", ".join(names) + "\n")
        for face, track in enumerate(x):
            for i, frame in enumerate(track):
                pixels = [
                    f"{v:.3f}"
                    for v in (x0 + side * frame[:, 0]).tolist() + (y0 + side * frame[:, 1]).tolist()
                ]
                f.write(
                    ", ".join([str(i + 1), str(face), f"{i / info['fps']:.4f}", "1.0", "1", *pixels]) + "\n"
                )


def frame_pictures(x, truth, size=240):
    """Yield one PIL picture a frame: the truth, where known, and the samples side by side."""
    from PIL import Image, ImageDraw

    size *= 2  # drawn at twice the size, so that the lines come out smooth
    faces = ([truth] if truth is not None else []) + list(x)
    low, high = (
        np.nanmin([np.nanmin(f, (0, 1)) for f in faces], 0),
        np.nanmax([np.nanmax(f, (0, 1)) for f in faces], 0),
    )
    scale = size * 0.88 / (high - low).max()
    origin = size / 2 - scale * (low + high) / 2
    for t in range(x.shape[1]):
        picture = Image.new("RGB", (size * len(faces), size), "#fbfaf7")
        pen = ImageDraw.Draw(picture)
        for i, face in enumerate(faces):
            points = face[t] * scale + origin + [i * size, 0]
            if not np.isfinite(points).all():  # the recording shows no face here
                continue
            for first, last, closed in CURVES:
                curve = [tuple(p) for p in points[[*range(first, last + 1), *[first] * closed]]]
                pen.line(
                    curve, "#b3402a" if first >= 48 else "#22303c" if truth is None or i else "#8a8a8a", 4
                )
        yield picture.reduce(2)


def write_gif(path, x, truth, sound, rate, info):
    """A silent, endless loop."""
    pictures = [picture.quantize(16) for picture in frame_pictures(x, truth)]
    pictures[0].save(
        path, "GIF", save_all=True, append_images=pictures[1:], duration=round(1000 / info["fps"]), loop=0
    )


AAC_RATES = {8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000}


def write_mp4(path, x, truth, sound, rate, info):
    """H.264 picture and AAC sound, by PyAV, which brings its own encoders."""
    try:
        import av
    except ImportError:
        raise UserError(
            "av: not installed vs needed for .mp4. pip install av, or write .html (has sound) or .gif"
        )
    with av.open(str(path), "w", format="mp4") as file:
        fps = Fraction(info["fps"]).limit_denominator(1001)
        pictures = file.add_stream("libx264", rate=fps, options={"crf": "18"})
        pictures.width, pictures.height, pictures.pix_fmt = (
            480 * (len(x) + (truth is not None)),
            480,
            "yuv420p",
        )
        voice = file.add_stream("aac", rate=rate if rate in AAC_RATES else 48000, layout="mono")
        for picture in frame_pictures(x, truth, 480):
            file.mux(pictures.encode(av.VideoFrame.from_image(picture)))
        file.mux(pictures.encode(None))
        samples = av.AudioFrame.from_ndarray(np.asarray(sound, "<i2")[None], format="s16", layout="mono")
        samples.sample_rate = rate
        file.mux(voice.encode(samples))
        file.mux(voice.encode(None))


# of MediaPipe's face pictures, on which ControlNet models were trained: jaw, the person's right and left brow
# (right is left in the picture), right and left eye, outer and inner lip; the nose is left out
COLOURS = {0: (10, 200, 10), 17: (180, 220, 10), 22: (10, 220, 180), 36: (180, 200, 10), 42: (10, 200, 180)}
COLOURS |= {48: (10, 180, 10), 60: (10, 180, 10)}


def landmark_picture(points, colours=None, size=512):
    """Lines of a face (68, 2), its box the picture, on black: white, or by `colours` (first point -> RGB)."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (size, size))
    pen = ImageDraw.Draw(picture)
    for first, last, closed in CURVES:
        colour = (255, 255, 255) if colours is None else colours.get(first)
        if colour:
            index = [*range(first, last + 1), *[first] * closed]
            pen.line([tuple(p) for p in (points[index] * size).tolist()], colour, 2)
    return picture


def write_pictures(folder, x):
    """A folder of frames for renderers that start from landmarks: face1/lines/00000.png, face1/colours/..."""
    try:
        for face, track in enumerate(x):
            for name, colours in (("lines", None), ("colours", COLOURS)):
                frames = folder / f"face{face + 1}" / name
                frames.mkdir(parents=True, exist_ok=True)
                for old in frames.glob("?????.png"):
                    old.unlink()
                for t, points in enumerate(track):
                    landmark_picture(points, colours).save(frames / f"{t:05d}.png")
    except OSError as e:
        raise UserError(f"{folder}: not written ({e}) vs a writable place with room. Choose another --out")


def write_html(path, x, truth, sound, rate, info):
    """One self-contained page: faces, sound and controls; nothing is loaded from anywhere.

    info["tracks"], where there: the samples at other temperatures too, {temperature: (K, T, 68, 2)}.
    info["truth"]: what the truth is called, where it was not recorded."""
    tracks = {float(t): track for t, track in info.get("tracks", {info["temperature"]: x}).items()}
    known = [truth] if truth is not None else []
    faces = np.concatenate([np.stack(known + list(track)) for track in tracks.values()])
    low, high = np.nanmin(faces, (0, 1, 2)), np.nanmax(faces, (0, 1, 2))
    # int16 over a square that holds every face; -32768 where the recording shows none
    scaled = (faces - (low + high) / 2) / (high - low).max() * 60000
    scaled = np.where(np.isfinite(scaled), scaled.clip(-32767, 32767), -32768)
    openings = [
        [None if math.isnan(v) else round(v, 4) for v in track] for track in mouth_opening(faces).tolist()
    ]
    page = {
        "names": [info.get("truth", "recorded face")] * len(known)
        + [f"sample {i + 1}" for i in range(len(x))],
        "temperatures": list(tracks),
        "temperature": info["temperature"],
        "fps": info["fps"],
        "frames": x.shape[1],
        "curves": CURVES,
        "truth": truth is not None,
        "title": info["audio"],
        "points": base64.b64encode(scaled.astype("<i2").tobytes()).decode(),
        "mouth": openings,
        "sound": base64.b64encode(wav_bytes(sound, rate)).decode(),
        "wave": [
            float(np.abs(part, dtype=float).max(initial=0)) / 32768 for part in np.array_split(sound, 600)
        ],
    }
    player = (Path(__file__).resolve().parent.parent / "assets" / "player.html").read_text(encoding="utf-8")
    path.write_text(player.replace("__PAGE__", json.dumps(page).replace("</", "<\\/")), encoding="utf-8")


WRITERS = {".html": write_html, ".npz": write_npz, ".csv": write_csv, ".npy": write_npy, ".gif": write_gif}
WRITERS[".mp4"] = write_mp4
