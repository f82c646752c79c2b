"""Ready-made landmarks and their sound: .npz, .npy and OpenFace .csv files."""

import zipfile
from pathlib import Path

import numpy as np

from media.console import UserError
from media.sound import SAMPLE_RATE


class Skip(UserError):
    """A source that cannot be used: Skip(reason, detail). Reasons are counted, details go to the report."""

    def __str__(self):
        return f"{self.args[0]}: {self.args[-1]} vs a talking face with its sound. Try another file"


def read_ready(task, options, load_sound):
    """The take of an .npz, .npy or OpenFace .csv file; raises Skip with the reason where it is unusable. load_sound
    reads the sound file beside it (see media/video.py: that may be a video)."""
    path = Path(task["path"])
    take = {
        "source": task["name"],
        "licence": "not stated",
        "extractor": "not stated",
        "begin": 0.0,
        "wh": None,
    }
    try:
        if path.suffix.lower() == ".npz":
            points, times, sound = read_npz(path, take)
        elif path.suffix.lower() == ".npy":
            points, times, sound = np.load(path, mmap_mode="r", allow_pickle=False), None, None
        else:
            points, times, sound = *read_openface(path, take), None
    except Skip:
        raise
    except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile) as e:
        raise Skip("unreadable landmarks", f"{type(e).__name__}: {e}".split("\n")[0]) from None
    points = check_points(points)
    if sound is None:
        if not task["sound"]:
            raise Skip("landmarks without sound", f"no {path.stem}.wav beside it")
        sound = load_sound(task["sound"])
    if times is None:  # bare points: their rate is taken as --fps, if that can be
        times, seconds = np.arange(len(points)) / options["fps"], len(sound) / SAMPLE_RATE
        if abs(len(points) / options["fps"] - seconds) > max(0.2, 0.02 * seconds):
            raise Skip(
                "length of landmarks and sound differ",
                f"{len(points)} frames at --fps {options['fps']:g} = "
                f"{len(points) / options['fps']:.2f} s vs {seconds:.2f} s: another frame rate?",
            )
    return take | {"points": to_pixels(points, take), "times": np.asarray(times, float), "sound": sound}


def read_npz(path, take):
    """Our own clips: landmarks, and if they are there pts or fps, wh, audio and sr, source, licence, extractor."""
    with np.load(path, allow_pickle=False) as z:
        points, times, sound = z["landmarks"], None, None
        take.update({key: str(z[key]) for key in ("source", "licence", "extractor") if key in z})
        if "wh" in z:
            take["wh"] = [int(v) for v in z["wh"]]
        if "pts" in z:
            times = z["pts"]
        elif "fps" in z:
            if not z["fps"] > 0:
                raise Skip("frame rate", f"fps {z['fps']} vs more than 0")
            times = np.arange(len(points)) / float(z["fps"])
        if "audio" in z:
            sound = z["audio"]
            scale = 32768 if sound.dtype == np.int16 else 1
            sound = clean_sound(sound.astype(np.float32) / scale, int(z["sr"]))
    return points, times, sound


def read_openface(path, take):
    """OpenFace's csv: timestamp, success, x_0..x_67, y_0..y_67 in pixels; of several faces the one seen most often."""
    with open(path, encoding="utf-8", errors="replace") as f:
        names = [name.strip() for name in f.readline().split(",")]
        column = {name: i for i, name in enumerate(names)}
        if not {"timestamp", "x_0", "x_67", "y_67"} <= set(column):
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
    take["extractor"] = "OpenFace"
    return points, table[:, column["timestamp"]]


def check_points(points):
    """Any array -> float64 (F, 68, 2), or the reason why not. y must point down: the mouth below the eyes."""
    shape = points.shape
    if points.dtype.kind not in "fiu" or points.ndim not in (2, 3) or shape[1:] not in ((68, 2), (136,)):
        raise Skip("not 68 points", f"shape {shape} {points.dtype} vs (frames, 68, 2)")
    points = np.array(points, float).reshape(-1, 68, 2)
    points[~np.isfinite(points).all((1, 2))] = np.nan
    found = points[np.isfinite(points[:, 0, 0])]
    if not len(found):
        raise Skip("no face found", f"none in {len(points)} frames")
    mean = found.mean(0)
    dx, dy = mean[48:].mean(0) - mean[36:48].mean(0)
    if np.ptp(mean, axis=0).min() <= 0:
        raise Skip("points coincide", "the face has no extent")
    if dy < -abs(dx):
        raise Skip("y points up", "the mouth lies above the eyes: turn it over (y = height - y)")
    if dy <= abs(dx):
        raise Skip(
            "face on its side", "the mouth lies beside the eyes: turn the picture, or x and y are swapped"
        )
    if len(found) > 5 and not np.ptp(found, axis=0).any():
        raise Skip("landmarks do not move", f"{len(found)} equal frames")
    return points


def to_pixels(points, take):
    """0..1 coordinates times the frame size (square if it is not known); larger ones are pixels already."""
    if np.nanmax(np.abs(points)) > 4:
        take["wh"] = take["wh"] or [int(v) + 1 for v in np.nanmax(points, axis=(0, 1))]
        return points
    take["wh"] = take["wh"] or [1, 1]
    return points * take["wh"]


def clean_sound(sound, rate):
    """Refuse what is no speech, resample to 16 kHz."""
    if not 8000 <= rate <= 192000:
        raise Skip("sample rate", f"{rate} Hz vs 8,000 to 192,000")
    if sound.ndim != 1 or not len(sound):
        raise Skip("empty sound", f"{sound.shape} samples")
    if not np.isfinite(sound).all():
        raise Skip("NaN in the sound", f"first at sample {int(np.argmin(np.isfinite(sound)))}")
    if rate != SAMPLE_RATE:
        import librosa

        sound = librosa.resample(sound, orig_sr=rate, target_sr=SAMPLE_RATE)
    return sound / max(1.0, float(np.abs(sound).max()))  # louder than full scale: scaled, never wrapped
