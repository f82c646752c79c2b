"""Ready-made landmarks and their sound: .npz, .npy and OpenFace .csv files -> a Take."""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from media.console import Skip
from media.container import VIDEOS, WHOLE, picture_times
from media.landmarks import arrange, interocular
from media.sound import CUT, SAMPLE_RATE, clean_sound, load_sound

RATES = (10, 12, 12.5, 15, 20, 23.976, 24, 25, 29.97, 30, 48, 50, 59.94, 60, 100, 119.88, 120)  # of cameras


@dataclass
class Source:
    """One thing to read: a video or a landmark file, with the sound file beside it (or ""), and where it
    comes from."""

    name: str  # unique: its place below SRC, without the suffix
    path: str
    speaker: str = ""
    sound: str = ""
    part: tuple = WHOLE  # seconds (start, stop) of a long video
    key: str = ""  # file, size, date, part: what the journal knows it by

    def is_video(self):
        return self.path.lower().endswith(VIDEOS)


@dataclass
class Take:
    """What was read from a source: a face over time and its sound."""

    points: np.ndarray  # (F, 68, 2) in square pixels, NaN where no face is
    times: np.ndarray  # (F,) seconds
    sound: np.ndarray  # (S,) float32 at 16 kHz
    begin: float = 0.0  # the second at which the sound begins
    wh: list | None = None  # size of the picture
    source: str = ""
    licence: str = "not stated"
    extractor: str = "not stated"
    every_frame: bool = False  # times holds every picture there is: where none is, no face was lost
    notes: list = field(default_factory=list)


@dataclass
class Track:
    """Landmarks as a file holds them."""

    points: np.ndarray
    times: np.ndarray | None = None
    of_file: bool = False  # the times are those of the video file, not counted from its first picture
    sound: np.ndarray | None = None
    about: dict = field(default_factory=dict)  # source, licence, extractor, wh


def read_ready(source, fps):
    """The take of an .npz, .npy or OpenFace .csv file; raises Skip with the reason where it is unusable. Bare
    points have `fps` frames a second, unless a video beside them tells."""
    path = Path(source.path)
    read = {".npz": read_npz, ".npy": read_npy}.get(path.suffix.lower(), read_openface)
    try:
        track = read(path)
        points = np.asarray(track.points)
    except Skip:
        raise
    except Exception as e:  # numpy and zipfile raise a dozen kinds where a file is damaged, and all mean that
        raise Skip("unreadable landmarks", f"{type(e).__name__}: {e}".split("\n")[0][:200]) from None
    points, notes = arrange(points)
    times, wh, pixel, begin = track.times, track.about.pop("wh", None), 1.0, 0.0
    if source.sound.lower().endswith(VIDEOS):
        times, size, pixel = on_the_clock_of(source.sound, track)
        # of that size no more: converted
        pixel, wh = (pixel, wh or size) if wh in (None, size) else (1.0, wh)
    if track.sound is not None:
        sound = track.sound
    elif source.sound:
        sound, begin, more = load_sound(source.sound)
        notes += more
    else:
        raise Skip("landmarks without sound", f"no {path.stem}.wav beside it")
    if times is None:
        cut = next((f"{Path(source.sound).name}: {note}" for note in notes if note.startswith(CUT + ":")), "")
        check_length(len(points), begin + len(sound) / SAMPLE_RATE, fps, cut)
        times = np.arange(len(points)) / fps
    times = check_times(times, len(points))
    points, wh = to_pixels(points, wh, pixel)
    return Take(points, times, sound, begin, wh, **({"source": source.name} | track.about), notes=notes)


@contextlib.contextmanager
def numbers_only():
    """Arrays of Python objects, which only pickle could load, are refused in words of ours."""
    try:
        yield
    except ValueError as e:
        if "Python objects in dtype" in str(e) or "Object arrays" in str(e):  # numpy has no class for it
            detail = "Python objects inside. Save numbers (frames, 68, 2), NaN where no face is"
            raise Skip("unreadable landmarks", detail) from None
        raise


def read_npy(path):
    """Bare points."""
    with numbers_only():
        return Track(np.load(path, mmap_mode="r", allow_pickle=False))


def read_npz(path):
    """Our own clips: landmarks, and if they are there pts or fps, wh, audio and sr, source, licence,
    extractor."""
    with numbers_only(), np.load(path, allow_pickle=False) as z:
        track = Track(z["landmarks"])
        track.about = {key: str(z[key]) for key in ("source", "licence", "extractor") if key in z}
        if "wh" in z:
            track.about["wh"] = [int(v) for v in z["wh"].reshape(2)]
            if min(track.about["wh"]) < 1:
                raise Skip("frame size", f"wh {track.about['wh']} vs two positive numbers")
        if "pts" in z:
            track.times, track.of_file = z["pts"].astype(float), True
        elif "fps" in z:
            fps = float(z["fps"])
            if not 0 < fps < 1e6:
                raise Skip("frame rate", f"fps {fps} vs more than 0")
            track.times = np.arange(len(track.points)) / fps
        if "audio" in z:
            sound = z["audio"]
            scale = -float(np.iinfo(sound.dtype).min) if sound.dtype.kind == "i" else 1
            track.sound = clean_sound(sound.astype(np.float32) / scale, int(z["sr"]))
    return track


def read_openface(path):
    """OpenFace's csv: timestamp, success, x_0..x_67, y_0..y_67 in pixels; of several faces the one seen most
    often."""
    with open(path, encoding="utf-8", errors="replace") as f:
        column = {name.strip(): i for i, name in enumerate(f.readline().split(","))}
        needed = ["timestamp", *(f"{axis}_{i}" for axis in "xy" for i in range(68))]
        if not set(needed) <= set(column):
            raise Skip(
                "unreadable landmarks", "no columns timestamp, x_0..x_67, y_0..y_67: not an OpenFace csv"
            )
        table = np.loadtxt(f, delimiter=",", ndmin=2)
    if "face_id" in column and len(table):
        ids, counts = np.unique(table[:, column["face_id"]], return_counts=True)
        table = table[table[:, column["face_id"]] == ids[counts.argmax()]]
    points = np.stack([table[:, [column[f"{axis}_{i}"] for i in range(68)]] for axis in "xy"], -1)
    if "success" in column:
        points[table[:, column["success"]] < 0.5] = np.nan
    return Track(points, table[:, column["timestamp"]], about={"extractor": "OpenFace"})


def on_the_clock_of(video, track):
    """Times of landmarks made from a video, as its sound counts them, its size and the shape of its pixels.

    As many landmarks as pictures: one each, whatever was thought of the frame rate. Else times counted from
    the first picture begin where it is shown; those of the file itself (`pts`) may be counted from there,
    too, or be right."""
    shown, size, pixel = picture_times(video)
    if shown is None or not len(shown):
        return track.times, None, 1.0
    if len(shown) == len(track.points):
        return shown, size, pixel
    if track.times is None:
        raise Skip("number of landmarks", f"{len(track.points)} for a video of {len(shown)} pictures")
    half = np.median(np.diff(shown)) / 2 if len(shown) > 1 else 0.02
    first = track.times[0] if len(track.times) else 0.0
    counted_from_there = not track.of_file or (abs(first) < half < abs(first - shown[0]))
    return track.times + shown[0] * counted_from_there, size, pixel


def check_length(frames, seconds, fps, cut):
    """Bare points have no times: do frames at fps last as long as their sound? Another rate shows in the
    length. cut: the note of a sound file that was cut off, or ""."""
    off = abs(frames / fps - seconds)
    fits = [rate for rate in RATES if abs(frames / rate - seconds) < min(off, 1 / rate)]
    fits.sort(key=lambda rate: abs(frames / rate - seconds))
    # less than a frame, or 1 %, at most 0.2 s until that is 0.05 %
    allowed = max(0.95 / fps, min(0.2, 0.01 * seconds), 0.0005 * seconds)
    end = frames / fps  # 29.97 is not 30, once it makes more than 10 ms
    close = [rate for rate in fits if abs(rate / fps - 1) < 0.01 and abs(frames / rate - end) > 0.01]
    if off > allowed or close:
        other = f"{(close or fits)[0]:g} frames a second would fit" if fits else "another frame rate?"
        raise Skip(
            "length of landmarks and sound differ",
            f"{frames} frames at --fps {fps:g} = {frames / fps:.2f} s vs {seconds:.2f} s: {cut or other}",
        )


def check_times(times, frames):
    """Frame times as float64 (F,): one a frame, increasing, in seconds."""
    times = np.asarray(times, float)
    if times.shape != (frames,) or not np.isfinite(times).all() or (np.diff(times) <= 0).any():
        raise Skip("frame times", f"{times.size} times for {frames} frames, or not increasing")
    if len(times) > 1 and np.median(np.diff(times)) > 0.5:
        raise Skip(
            "frame times", f"{np.median(np.diff(times)):g} s from frame to frame: are they in seconds?"
        )
    return times


def to_pixels(points, wh, pixel):
    """Points (F, 68, 2) in square pixels and the size of the picture: 0..1 coordinates times `wh`, squares if
    that is not known; pixels that are `pixel` times as wide as high are made square."""
    if np.nanmax(np.abs(points)) > 4:
        wh = wh or [max(int(v), 0) + 1 for v in np.nanmax(points, axis=(0, 1))]
    elif wh:
        points = points * wh
    else:
        wh = [1, 1]
        eyes, mouth = points[:, 36:48].mean(1), points[:, 48:].mean(1)
        shape = np.nanmedian(interocular(points)) / np.nanmedian(np.linalg.norm(eyes - mouth, axis=-1))
        if not 0.9 < shape < 1.7:
            raise Skip(
                "face not in proportion",
                f"eyes {shape:.2f} times as far apart as above the mouth: 0..1 of a picture "
                "that is not square? Put its size into the .npz as wh",
            )
    if pixel != 1:
        points, wh = points * [pixel, 1], [round(wh[0] * pixel), wh[1]]
    return points, wh
