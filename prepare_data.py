"""Everything a user may have -> one training folder for talkingflow.py.

    python prepare_data.py synthetic --out data/synthetic   invented talkers of a known best likelihood
    python prepare_data.py my/clips  --out data/mine        videos (optional packages: see media/video.py), or
                                                            landmarks with sound: NAME.npz, or NAME.wav with
                                                            NAME.npy or OpenFace NAME.csv; files or folders

What is written (plain files, no pickle; N = frames of all clips end to end, S = sound samples end to end):

    landmarks.npy      float32 (N, 136)  x0 y0 x1 y1 ... of the 68 iBUG points, 0..1 in the clip's face box,
                                         y down
    mel.npy            float32 (N, M)    a causal log-mel column a frame: it has heard the sound before
                                         (t+1)/fps only
    audio.npy          int16   (S,)      16 kHz mono
    articulation.npy   float32 (N, 4)    synthetic only: what the sound says of the lips (open, width, pout,
                                         press)
    meta.json                            clips, splits, boxes (pixels = box[0] + box[2] * x), mel settings,
                                         licences
    report.csv                           what became of every file; journal.jsonl: to go on from

A .npz holds landmarks (frames, 68, 2) in pixels or 0..1, NaN where no face is, and as far as you have them
pts (seconds) or fps, wh (frame size), audio with sr, source, licence, extractor. The sound of landmarks, or
of a video that has none, may be any sound file or video of the same name: NAME.wav, NAME.m4a, NAME.mp4 ...

Reading order: the synthetic talkers; finding the sources; from a take (what was read of a source) to clips;
the whole run; the command line. The folder's writer is media/folder.py, the readers are media/takes.py
(landmark files), media/video.py and media/sound.py.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from media.console import Progress, Skip, UserError, lasting_output, printable, run_command
from media.container import VIDEOS
from media.folder import Entry, FolderWriter, Journal, Leftover, check_folder, new_folder, write_report
from media.landmarks import face_box, pieces
from media.sound import SAMPLE_RATE, SOUNDS, Mel
from media.survey import survey, warnings_about
from media.takes import Source, read_ready
from media.talkers import FPS, SyntheticFace, articulate, say, synthesize
from media.video import EXTRACTORS, find_model, load_extractor, parts_of, read_video

SPLITS = ("train", "val", "test")
# what recorded data asks of a training (Config): the same for any speaker, see results/faces.md
DEFAULTS = {
    "steps": 8000,
    "lead": 2,
    "noise": 0.0022,
    "mean_hidden": 128,
    "mean_loss_final": 0.2,
    "vtlp": 0.35,
    "tilt": 1.5,
    "channel": 0.1,
}


# ------------------------------------------------------------------------------------------------------------
# Synthetic talkers (media/talkers.py). Why invent people at all: the density of their landmarks given the
# sound is known, so the best possible likelihood is known to the last digit, and "how good is the model" has
# an answer in nats.


def synthetic(out, clips=3000, seed=0, n_mels=40, fmin=0.0, fmax=8000.0, level=0.0, force=False, frames=80):
    """Write the folder of synthetic talkers: `clips` for training, at most 128 each for validation and test.

    Deterministic by seed. Returns the last line that the command prints."""
    counts = {"train": clips, "val": min(128, -(-clips // 8)), "test": min(128, -(-clips // 8))}
    mel = {"n_mels": n_mels, "fmin": fmin, "fmax": fmax, "window": 0.064, "level": level}
    hear, talker = Mel(**mel, fps=FPS, sample_rate=SAMPLE_RATE), SyntheticFace()
    new_folder(out, force)
    writer = FolderWriter(out, n_mels, articulators=4)
    made, optimum, widths = [], {}, []
    progress = Progress("synthetic talkers", sum(counts.values()))
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
                parts = {"landmarks": landmarks[i], "mel": hear.columns(sound[i] / 32768), "audio": sound[i]}
                clip = writer.append(
                    parts | {"articulation": articulation[i]},
                    name=f"{split}/{first + i:05d}",
                    speaker="synthetic",
                    box=[0, 0, 256],
                    wh=[256, 256],
                    source=0,
                )
                clip.split, clip.optimal_nll = split, optima[first + i]
                made.append(clip)
            progress(len(made))
        optimum[split] = float(np.mean(optima))
    meta = meta_of(FPS, mel, normalisation="none", skipped={}, optimum=optimum)
    meta["defaults"] = {"lead": 0, "noise": 0.0, "dropout": 0.0, "steps": 900}
    meta["sources"] = [
        {"source": "synthetic talkers", "licence": "none needed: computed", "extractor": "exact"}
    ]
    meta |= {"mean_face": talker.mean.tolist(), "modes": talker.modes.tolist()}
    meta["interocular"] = float(np.median(np.concatenate(widths)))
    writer.close_arrays()
    writer.close(meta, made)
    best = ", ".join(f"{value:.4f} ({split})" for split, value in optimum.items())
    return f"{last_line(made, FPS)}, 0 skipped; the best possible NLL is {best} nats per coordinate"


def meta_of(fps, mel, **more):
    """What meta.json says of every folder."""
    return {"format": 1, "fps": fps, "layout": "ibug68", "mel": mel, "sample_rate": SAMPLE_RATE} | more


def last_line(clips, fps):
    """`N clips, M minutes`."""
    return f"{len(clips)} clips, {sum(clip.frames for clip in clips) / fps / 60:.1f} minutes"


def default_folder(n_mels=40):
    """data/synthetic (data/synthetic-80-mels for 80 mel bands), made on first use."""
    folder = Path("data/synthetic" if n_mels == 40 else f"data/synthetic-{n_mels}-mels")
    if not (folder / "meta.json").is_file() and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"{folder}: not there yet, making it (python prepare_data.py synthetic)", flush=True)
        synthetic(folder, n_mels=n_mels)
    while not (folder / "meta.json").is_file():  # written last: the other processes of torchrun wait for it
        time.sleep(1)
    return folder


# ------------------------------------------------------------------------------------------------------------
# Finding the sources: every file once, by name; nothing is opened yet

LANDMARKS = (".npz", ".npy", ".csv")  # the first that is there counts
# folders that are not people: the one around them is
CONTAINERS = {"video", "videos", "mpg", "mpg_vcd", "mpg_6000", "audio", "wav", "clips", "landmarks"}


def list_files(src, leftovers):
    """Every file of a file or folder, sorted. Links to folders are followed, after the real ones, and no
    folder twice; training folders and hidden files are left alone."""
    src = Path(src)
    if not src.exists():
        raise UserError(f"{src}: no such file or folder vs videos, or landmarks with sound. Check the path")
    if src.is_file():
        return [src]
    found, todo, links, seen, top = [], [src], deque(), {}, Path(os.path.realpath(src))
    while todo or links:
        folder = todo.pop() if todo else links.popleft()
        try:
            identity = os.stat(folder).st_dev, os.stat(folder).st_ino
            entries = [entry for entry in os.scandir(folder) if not is_litter(entry.name)]
        except OSError as e:
            leftovers.append(Leftover(folder, "unreadable folder", e.strerror or ""))
            continue
        # src lies in what this links to
        loop = folder != src and top.is_relative_to(os.path.realpath(folder))
        if loop or identity in seen:
            where = "a loop" if loop else f"the same folder as {seen[identity]}"
            leftovers.append(Leftover(folder, "read already", where, skipped=False))
            continue
        seen[identity] = folder
        if {"meta.json", "landmarks.npy"} <= {entry.name for entry in entries}:
            leftovers.append(Leftover(folder, "a training folder", skipped=False))
            continue
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir():
                (links if entry.is_symlink() else todo).append(folder / entry.name)
            else:
                found.append(folder / entry.name)
    return sorted(found)


def is_litter(name):
    """Whether a file is one that systems leave behind, or hidden."""
    return name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini")


def speaker_of(path):
    """The folder that a file lies in, whatever SRC is: s1/bbaf2n.npz and s1/video/bbaf2n.mpg -> s1."""
    folder = Path(os.path.abspath(path)).parent
    names = [part for part in folder.parts[1:] if part.lower() not in CONTAINERS]
    return names[-1] if names else folder.name


class Neighbours:
    """The files of folders by name, whatever the case of their suffixes: NAME.WAV is beside NAME.npy."""

    def __init__(self):
        self.folders = {}

    def find(self, folder, stem, suffixes):
        """The first of stem + suffix that is there, or None."""
        if folder not in self.folders:
            paths = sorted(folder.iterdir()) if folder.is_dir() else []
            self.folders[folder] = {path.stem + path.suffix.lower(): path for path in reversed(paths)}
        names = self.folders[folder]
        return next(
            (names[stem + s] for s in suffixes if stem + s in names and names[stem + s].is_file()), None
        )

    def sound(self, path, speaker, audio_dir):
        """NAME.wav (or another sound) beside NAME.*, else in --audio-dir/SPEAKER or --audio-dir, else
        NAME.mp4."""
        places = [path.parent] + ([Path(audio_dir) / speaker, Path(audio_dir)] if audio_dir else [])
        sounds = (self.find(place, path.stem, SOUNDS) for place in places)
        videos = [suffix for suffix in VIDEOS if suffix != path.suffix.lower()]
        return next((sound for sound in sounds if sound), None) or self.find(path.parent, path.stem, videos)


def find_sources(args):
    """-> (sources, leftovers): what to read, in the order of names, and every other file."""
    leftovers, sources, rest, neighbours = [], [], [], Neighbours()
    for src in args.sources:
        root = Path(src) if Path(src).is_dir() else Path(src).parent
        for path in list_files(src, leftovers):
            suffix = path.suffix.lower()
            ready = neighbours.find(path.parent, path.stem, LANDMARKS)
            if not path.is_file():
                leftovers.append(Leftover(path, "unreadable file", "a link to nowhere, or no plain file"))
            elif path == ready or (suffix in VIDEOS and not ready):
                speaker = speaker_of(path)
                if args.speakers and speaker not in args.speakers:
                    leftovers.append(Leftover(path, "not in --speakers", speaker, skipped=False))
                    continue
                sound = neighbours.sound(path, speaker, args.audio_dir)
                name = printable(path.relative_to(root).with_suffix("").as_posix())
                sources.append(Source(name, str(path), printable(speaker), str(sound or "")))
            elif Path(src).is_file() and suffix not in SOUNDS:
                kinds = " ".join(LANDMARKS + VIDEOS)
                raise UserError(f"{path}: {suffix or 'no suffix'} vs {kinds}. Give another file")
            else:
                rest.append(path)
    leftovers += unused(rest, sources)
    if not sources:
        raise UserError(nothing_found(args, leftovers))
    tell_apart(sources)
    sources.sort(key=lambda source: source.name)
    beyond = sources[args.limit :] if args.limit else []
    leftovers += [Leftover(Path(source.path), "beyond --limit", skipped=False) for source in beyond]
    return sources[: args.limit], leftovers


def tell_apart(sources):
    """Where the same name is found below two SRCs, the whole path is the name."""
    names = Counter(source.name for source in sources)
    for source in sources:
        if names[source.name] > 1:  # the same name below two SRCs; with its suffix: a.mp4 is not a.mkv
            source.name = printable(os.path.abspath(source.path).lstrip("/"))


def unused(paths, sources):
    """Leftovers for the files that are no source of their own: paths."""
    owner = {source.sound: source.name for source in sources}
    stems = {Path(source.path).stem for source in sources}
    for path in paths:
        if str(path) in owner:
            yield Leftover(path, "", f"sound of {owner[str(path)]}", skipped=False)
        elif path.suffix.lower() in SOUNDS and path.stem not in stems:
            yield Leftover(path, "sound without landmarks")
        elif path.suffix.lower() in SOUNDS + VIDEOS + LANDMARKS:
            yield Leftover(path, "not needed", "another file of this name is read", skipped=False)
        else:
            yield Leftover(path, "not a kind that is read", skipped=False)


def nothing_found(args, leftovers):
    """The text of the error where there is no source."""
    others = any(leftover.reason == "not in --speakers" for leftover in leftovers)
    bad = [leftover for leftover in leftovers if leftover.skipped] or leftovers
    found = f"{len(bad)} unusable files ({bad[0].reason}: {bad[0].path})" if bad else "nothing"
    found = f"none of {', '.join(args.speakers)}" if others else found
    return (
        f"{' '.join(args.sources)}: {found} vs videos, NAME.npz with landmarks and sound, or NAME.wav "
        f"with NAME.npy or NAME.csv. Check the folder" + " and --speakers" * others
    )


def split_long(sources):
    """Give every source its key, and make one source a part of long videos."""
    for source in sources:
        stat = os.stat(source.path)
        for part in parts_of(source.path) if source.is_video() else [source.part]:
            key = f"{printable(os.path.abspath(source.path))} {stat.st_size} {stat.st_mtime_ns} {part[0]:g}"
            yield Source(source.name, source.path, source.speaker, source.sound, part, key)


def check_speakers(wanted, known):
    """Raises UserError where --test-speakers names one that no clip has."""
    missing = [speaker for speaker in wanted if speaker not in known]
    if missing:
        raise UserError(
            f"--test-speakers: {', '.join(missing)} vs {', '.join(known[:20])}. Name some of these"
        )


# ------------------------------------------------------------------------------------------------------------
# From a take to pieces: cut where the face is lost or jumps, one frame rate, face box, the sound of the same
# time


@dataclass
class Settings:
    """What decides how sources become clips; a folder goes on with the same ones only."""

    sources: list
    fps: float
    mel: dict  # of Mel
    max_gap: int = 5  # frames (of `fps`) without a face that are interpolated
    min_seconds: float = 1.0
    smooth: bool = False
    piece: float = 0  # seconds of a clip at most, if not 0
    extractor: str = "mediapipe"
    format: int = 1


@dataclass
class Piece:
    """A clip before it is stored."""

    landmarks: np.ndarray  # (T, 136) float32 in the face box
    mel: np.ndarray  # (T, M) float32
    audio: np.ndarray  # (S,) int16
    box: list
    wh: list
    time: float  # where it begins in its source, s


def cut(take, settings):
    """A Take -> its Pieces, and why others were left out (reason -> count)."""
    points, times = take.points, take.times
    dt = np.diff(times)
    step = float(np.median(dt)) if len(dt) else 1 / settings.fps
    unit = max(step, 1 / settings.fps)  # a fast or irregular camera loses no face between two of our frames
    seconds = times[-1] - times[0] + step
    holes = dt[dt > (settings.max_gap + 1.5) * unit]  # frames without a face that were not even written
    lost = 0 if take.every_frame else (holes / step - 1).sum()
    missing = 1 - np.isfinite(points[:, 0, 0]).sum() / (len(points) + lost)
    if seconds <= 20 and missing > 0.1:  # one utterance: what is damaged in part is not trusted at all
        raise Skip("face missing in more than 10 % of the frames", f"{missing:.0%} of {seconds:.1f} s")
    found, left_out = [], Counter()
    hear = Mel(**settings.mel, fps=settings.fps, sample_rate=SAMPLE_RATE)
    for index in pieces(points, times, unit, settings.max_gap):
        try:
            if len(index) < 0.9 * (index[-1] - index[0] + 1):
                raise Skip("face missing in more than 10 % of the frames")
            found += cut_piece(take, points[index], times[index], step, hear, settings)
        except Skip as e:
            left_out[e.args] += 1
    if not found:
        raise Skip(*left_out.most_common(1)[0][0])
    return found, dict(Counter(reason for reason, *_ in left_out.elements()))


def cut_piece(take, points, times, step, hear, settings):
    """One unbroken stretch: found frames (F, 68, 2) at `times` -> Pieces of at most settings.piece
    seconds."""
    fps, sound, begin = settings.fps, take.sound, take.begin
    if settings.smooth and len(points) > 2:  # [1, 2, 1] / 4: zero-phase
        points = np.concatenate([points[:1], (points[:-2] + 2 * points[1:-1] + points[2:]) / 4, points[-1:]])
    start = times[min(np.searchsorted(times, begin - 1e-3), len(times) - 1)]  # the first frame that has sound
    shown = times[-1] + step - times[0]
    heard = min(times[-1] + step, begin + len(sound) / SAMPLE_RATE) - start
    T = int(heard * fps + 1e-6)
    if heard < shown / 2:
        raise Skip("sound much shorter than the picture", f"{max(heard, 0):.2f} s vs {shown:.2f} s")
    if T < max(1, settings.min_seconds * fps):
        raise Skip("too short", f"{max(T, 0)} frames = {max(heard, 0):.2f} s vs {settings.min_seconds:g} s")
    at = start + np.arange(T) / fps
    flat = points.reshape(len(points), 136)
    track = np.stack([np.interp(at, times, column) for column in flat.T], 1).reshape(T, 68, 2)
    found = []
    for rows in np.array_split(np.arange(T), -(-T // int(settings.piece * fps)) if settings.piece else 1):
        first = max(0, round((at[rows[0]] - begin) * SAMPLE_RATE))
        count = int(np.ceil(len(rows) * SAMPLE_RATE / fps - 1e-6))
        audio = np.round(sound[first : first + count] * 32768).clip(-32768, 32767).astype(np.int16)
        if len(audio) == 0 or audio.std() < 6:  # of 32,768
            continue
        audio = np.pad(audio, (0, count - len(audio)))
        mel = hear.columns(audio / 32768)[: len(rows)]
        corner, side = face_box(track[rows].mean(0))
        boxed = ((track[rows] - corner) / side).reshape(-1, 136).astype(np.float32)
        found.append(Piece(boxed, mel, audio, [*corner.tolist(), float(side)], take.wh, float(at[rows[0]])))
    if not found:
        raise Skip("silence", f"{heard:.2f} s")
    return found


@dataclass
class Reader:
    """What a worker needs to know."""

    settings: Settings
    model: str | None = None
    preview: str = ""  # the folder of contact sheets, or ""
    debug: bool = False

    def __call__(self, source):
        """One source in, its Entry out, with the pieces to store, whatever is wrong with it."""
        entry = Entry(source.key, source.name, printable(source.path), source.speaker)
        try:
            take = self.read(source)
            found = np.isfinite(take.points[:, 0, 0])
            entry.frames, entry.missing, entry.notes = len(found), int((~found).sum()), take.notes
            entry.about = {"source": take.source, "licence": take.licence, "extractor": take.extractor}
            entry.pieces, entry.left_out = cut(take, self.settings)
        except Skip as e:
            entry.reason, entry.detail = e.args[0], printable(e.args[-1])
        except Exception as e:  # no single file may end a run of thirty thousand
            if self.debug:
                raise
            entry.reason, entry.detail = (
                "unexpected error",
                printable(f"{type(e).__name__}: {e}".split("\n")[0]),
            )
        return entry

    def read(self, source):
        """The take of a source."""
        if not source.is_video():
            return read_ready(source, self.settings.fps)
        part = f"@{source.part[0]:g}" if source.part[0] else ""
        preview = Path(self.preview) / f"{source.name}{part}.png" if self.preview else None
        extract = load_extractor(self.settings.extractor, self.model)
        take = read_video(source, extract, self.settings.max_gap, preview)
        take.extractor = f"{self.settings.extractor} -> 68 points"
        return take


# ------------------------------------------------------------------------------------------------------------
# The whole run: sources -> arrays and a journal, so that an interrupted run goes on; then splits, survey,
# meta.json


def worker_start(debug):
    """Of a process that extracts clips: leave Ctrl-C to the parent, and be quiet."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    if not debug:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the extractors' C++ parts log there whatever one does


def read_all(sources, reader, jobs):
    """(source, entry) in the order of the sources. Videos are read by `jobs` processes: a decoder that
    crashes on a damaged file takes one of them along and not the run, and no more than two results a process
    are held in memory."""

    def start(n):
        return ProcessPoolExecutor(n, multiprocessing.get_context("spawn"), worker_start, (reader.debug,))

    if not any(source.is_video() or source.sound.lower().endswith(VIDEOS) for source in sources):
        yield from ((source, reader(source)) for source in sources)
        return
    pool, todo, waiting = start(jobs), iter(sources), deque()
    try:
        while True:
            while len(waiting) < 2 * jobs and (source := next(todo, None)):
                waiting.append((source, pool.submit(reader, source)))
            if not waiting:
                return
            try:
                entry = waiting[0][1].result()
                yield waiting.popleft()[0], entry
            except BrokenProcessPool:  # one of those waiting did it: each alone will tell
                for source, _ in waiting:
                    pool = start(1)
                    try:
                        entry = pool.submit(reader, source).result()
                    except BrokenProcessPool:
                        reason = "the decoder crashed"
                        entry = Entry(source.key, source.name, printable(source.path), source.speaker, reason)
                    yield source, entry
                    pool.shutdown()
                pool = start(jobs)
                waiting.clear()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()


def settings_of(args, count):
    """The Settings that the flags ask for; few sources are long ones and are cut, so that some can be held
    out."""
    mel = {"n_mels": args.n_mels, "fmin": args.fmin, "fmax": args.fmax, "window": 0.064, "level": args.level}
    same = {name: getattr(args, name) for name in ("fps", "max_gap", "min_seconds", "smooth", "extractor")}
    paths = [printable(os.path.abspath(src)) for src in args.sources]
    return Settings(paths, mel=mel, piece=20 if count < 10 else 0, **same)


def prepare(args):
    """Videos, or landmarks with sound -> a training folder. Prints what it is like, returns the last line."""
    check_folder(args.out, args.force, again=(Path(args.out) / "journal.jsonl").is_file())
    sources, leftovers = find_sources(args)
    if args.test_speakers:
        check_speakers(args.test_speakers, sorted({source.speaker for source in sources}))
    settings = settings_of(args, len(sources))
    videos = any(source.is_video() for source in sources)
    reader = Reader(settings, find_model(args.extractor, args.model) if videos else None, debug=args.debug)
    if args.preview and not videos:
        print("note: --preview: no video among the sources, so there is no frame to draw over")
    reader.preview = os.path.join(args.out, "preview") if args.preview else ""
    sources = list(split_long(sources))
    journal = Journal(args.out, settings, args.force)
    writer = FolderWriter(args.out, args.n_mels, rows=journal.rows)
    todo = journal.remember(sources)
    if videos and todo:
        notice = EXTRACTORS[args.extractor][-1]
        print(f"landmarks by {args.extractor} ({notice}). A video's licence is its maker's.")
    progress, seconds = Progress("sources", len(todo)), 0.0
    try:
        for source, entry in read_all(todo, reader, min(args.jobs or os.cpu_count() or 1, max(1, len(todo)))):
            journal.store(entry, writer, first_part=not source.part[0])
            seconds += sum(clip.frames for clip in entry.clips) / args.fps
            progress(progress.done + 1, f" ({seconds / 60:.1f} minutes of clips)")
        return finish(args, settings, [journal.done[source.key] for source in sources], leftovers, writer)
    except BrokenPipeError:
        raise
    except OSError as e:
        raise UserError(
            f"--out: {args.out} cannot be written ({e.strerror}) vs room for more. Free some space and run "
            f"the same command again: it goes on after {len(journal.done)} sources"
        ) from None
    except KeyboardInterrupt:
        done = f"{len(journal.done):,} of {len(sources):,}"
        print(f"\nstopped after {done} sources. The same command goes on from there")
        raise


def assign_splits(clips, test_speakers):
    """Sets clip.split. Whole files are held out (10 % val, 10 % test, ranked by a hash of their names, so the
    order of files does not matter); of fewer than 10 files the last pieces; --test-speakers are the test set
    if given."""
    files = {}
    for clip in clips:
        files.setdefault(clip.path, []).append(clip)
    if len(files) < 10:  # units to hold out: (how late in its file, clips)
        units = [((i + 1) / len(file), [clip]) for file in files.values() for i, clip in enumerate(file)]
    else:
        units = [(0, file) for file in files.values()]
    units.sort(key=lambda unit: (unit[0], hashlib.sha256(unit[1][0].name.encode()).hexdigest()))
    rest = [unit for _, unit in units if unit[0].speaker not in test_speakers]
    n = max(1, round(len(rest) / 10)) if len(rest) >= 3 else 0
    test = [] if test_speakers else rest[len(rest) - n :]
    rest = rest[: len(rest) - len(test)]
    for clip in clips:
        clip.split = "test" if clip.speaker in test_speakers else "train"
    for split, part in (("test", test), ("val", rest[len(rest) - n :])):
        for unit in part:
            for clip in unit:
                clip.split = split


def finish(args, settings, entries, leftovers, writer):
    """Splits, report.csv, the survey and meta.json."""
    out, fps = Path(args.out), args.fps
    reasons = Counter(entry.reason for entry in entries if entry.reason)
    reasons += Counter(leftover.reason for leftover in leftovers if leftover.skipped)
    write_report(out / "report.csv", entries, leftovers, fps)
    skipped = f"{reasons.total()} skipped"
    if reasons:
        skipped += f" ({', '.join(f'{reason}: {n}' for reason, n in reasons.most_common())})"
    clips = [clip for entry in entries for clip in entry.clips]
    writer.close_arrays()
    if not clips:
        give_up(args, entries, skipped, kept=writer.rows()["landmarks"])
    assign_splits(clips, args.test_speakers)
    found = survey(out, fps, settings.mel["fmax"], clips)
    describe(found, clips, entries, moved=args.audio_offset != "0")
    meta = meta_of(fps, settings.mel, normalisation="face box", skipped=dict(reasons))
    relative = {} if settings.mel["level"] else {"channel": 0.0}  # absolute columns: how loud is a voice?
    meta |= {"defaults": DEFAULTS | relative, "interocular": found.interocular}
    meta["audio_offset"] = found.late if args.audio_offset == "auto" else int(args.audio_offset)
    old = out / "meta.json"
    before = json.loads(old.read_text(encoding="utf-8")).get("audio_offset", 0) if old.is_file() else 0
    if meta["audio_offset"] or before:
        clips = realign(out, meta, clips)
        print(f"sound moved by {meta['audio_offset']} frames: {len(clips)} clips are that much shorter")
    about = {}
    for clip in clips:
        clip.source = about.setdefault(json.dumps(clip.source, sort_keys=True), len(about))
    writer.close(meta | {"sources": [json.loads(source) for source in about]}, clips)
    return f"{last_line(clips, fps)}, {skipped}"


def describe(found, clips, entries, moved):
    """Print what a folder is like. found: its Survey; moved: whether the sound is moved already."""
    counts = ", ".join(f"{sum(clip.split == split for clip in clips)} {split}" for split in SPLITS)
    frames, missing = sum(entry.frames for entry in entries), sum(entry.missing for entry in entries)
    print(
        f"{len({clip.speaker for clip in clips})} speakers; {counts} clips; {missing:,} of {frames:,} frames "
        f"without a face; jitter {100 * found.jitter:.2f} % of the interocular distance"
    )
    print(found)
    for warning in warnings_about(found, clips, moved):
        print(f"warning: {warning}")
    noted = [entry for entry in entries if entry.notes]
    if noted:
        print(f"note: {noted[0].name}: {noted[0].notes[0]} ({len(noted)} sources have notes: see report.csv)")


def give_up(args, entries, skipped, kept):
    """No usable clip: leave nothing behind, but for the work of an earlier run, and say why."""
    out = Path(args.out)
    for name in () if kept else ("landmarks.npy", "mel.npy", "audio.npy", "journal.jsonl"):
        (out / name).unlink(missing_ok=True)
    detail = next((f"{printable(Path(e.path).name)}: {e.detail}" for e in entries if e.detail), "")
    raise UserError(
        f"{printable(' '.join(args.sources))}: no usable clip, {skipped} vs at least one. "
        f"{detail} (all of them: {out / 'report.csv'})"
    )


def realign(out, meta, clips):
    """Pair every frame with the sound of meta["audio_offset"] frames later: -> clips, each that many frames
    shorter.

    Only places in the arrays change; the mel is computed anew, so doing it again, or undoing it, needs no
    video."""
    late, fps = meta["audio_offset"], meta["fps"]
    hear = Mel(**meta["mel"], fps=fps, sample_rate=SAMPLE_RATE)
    names = ("landmarks", "mel", "audio")
    landmarks, mel, audio = (np.load(out / f"{name}.npy", mmap_mode="r+") for name in names)
    clips = [clip for clip in clips if clip.frames > abs(late)]
    for clip in clips:
        skip = int(abs(late) * SAMPLE_RATE / fps)
        clip.frames -= abs(late)
        clip.audio_samples -= skip
        if late > 0:
            clip.audio_start += skip
        else:
            clip.start -= late
        rows = slice(clip.start, clip.start + clip.frames)
        sound = audio[clip.audio_start : clip.audio_start + clip.audio_samples]
        mel[rows] = hear.columns(sound / 32768)[: clip.frames]
        clip.sha256 = hashlib.sha256(
            landmarks[rows].tobytes() + mel[rows].tobytes() + sound.tobytes()
        ).hexdigest()
    return clips


# ------------------------------------------------------------------------------------------------------------
# Command line


def parser():
    """The command line."""
    licences = "; ".join(f"{name}: {facts[-1]}" for name, facts in EXTRACTORS.items())
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        allow_abbrev=False,
        epilog=f"Licences: GRID is CC BY 4.0 (name its authors); {licences}",
    )
    add = p.add_argument
    # fmt: off
    add("sources", nargs="+", metavar="SRC",
        help="videos, or landmarks with sound (NAME.npz, or NAME.wav with NAME.npy or an OpenFace NAME.csv), "
             'or folders of them; or the word "synthetic"')
    add("--out", required=True, help="the training folder to write; the same command again goes on")
    add("--force", action="store_true", help="replace a training folder that is already there")
    add("--fps", type=frame_rate, default=25,
        help="frame rate of the folder, and of .npy landmarks beside a sound: these have none [%(default)g]")
    add("--audio-dir", metavar="DIR", help="where NAME.wav or SPEAKER/NAME.wav lies if not beside NAME")
    add("--speakers", type=comma_list, default=[], metavar="A,B",
        help="only these (the speaker of a file is the folder it lies in; of video/, clips/ and the like the "
             "one around it)")
    add("--test-speakers", type=comma_list, default=[], metavar="A,B", help="hold these out as the test set")
    add("--limit", type=int, metavar="N", help="only the first N sources")
    add("--min-seconds", type=float, default=1.0, metavar="S", help="leave out shorter clips [1]")
    add("--max-gap", type=int, default=5, metavar="N",
        help="cut where the face is lost for more than N frames, interpolate shorter gaps [5]")
    add("--smooth", action="store_true", help="smooth the landmarks by [1, 2, 1] / 4 (zero-phase)")
    add("--extractor", choices=EXTRACTORS, default="mediapipe", help="finds landmarks in videos [mediapipe]")
    add("--model", metavar="FILE", help="its model, if not in its usual place")
    add("--jobs", type=int, metavar="N", help="processes that read videos [one a core]")
    add("--preview", action="store_true",
        help="of videos: draw the landmarks found over frames, OUT/preview/NAME.png")
    add("--audio-offset", default="0", metavar="N|auto",
        help="pair each frame with the sound of N frames later, if late; auto: as measured [0]")
    add("--n-mels", type=int, default=40, help="mel bands [%(default)s]")
    add("--fmin", type=float, default=0.0, help="lowest frequency of the mel bands, Hz [0]")
    add("--fmax", type=float, default=8000.0, help="highest frequency of the mel bands, Hz [8000]")
    add("--level", type=float, metavar="X",
        help="hear relative to the loudest so far, forgotten at X nats a frame; 0: absolutely "
             "[0.01; synthetic, one voice at one level: 0]")
    add("--clips", type=int, default=3000, help="synthetic: training clips [%(default)s]")
    add("--seed", type=int, default=0, help="synthetic: another seed, other people [0]")
    add("--debug", action="store_true", help="show the traceback of an error")
    # fmt: on
    p.set_defaults(run=run)
    return p


def frame_rate(text):
    """Frames a second: an int where the text is one, so that meta.json says 25, not 25.0."""
    return int(float(text)) if float(text).is_integer() else float(text)


def comma_list(text):
    """The names between the commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


LIMITS = {
    "n_mels": (1, 256),
    "level": (0, 1),
    "fps": (5, 120),
    "limit": (1, math.inf),
    "min_seconds": (0, 1e6),
    "jobs": (1, 256),
    "max_gap": (0, 1e6),
    "clips": (1, 1e9),
    "seed": (0, math.inf),
}


def check_flags(args):
    """Impossible values of flags, before any work."""
    rules = [(name, low <= getattr(args, name) <= high, f"{low} to {high}")
             for name, (low, high) in LIMITS.items() if getattr(args, name) is not None]  # fmt: skip
    rules += [
        ("fmin", 0 <= args.fmin < args.fmax, "0 or more and below --fmax"),
        ("fmax", args.fmax <= SAMPLE_RATE / 2, f"at most {SAMPLE_RATE // 2}"),
        ("audio_offset", re.fullmatch(r"auto|-?\d+", args.audio_offset), "frames or auto"),
        ("audio_dir", not args.audio_dir or Path(args.audio_dir).is_dir(), "a folder"),
        ("fps", args.sources != ["synthetic"] or args.fps == FPS, f"{FPS} for the synthetic talkers"),
    ]
    for name, fine, wanted in rules:
        if not fine:
            raise UserError(
                f"--{name.replace('_', '-')}: {getattr(args, name)} vs {wanted}. Give another value"
            )


def run(args):
    """What the command does, and its last line; returns the exit status."""
    check_flags(args)
    if args.level is None:
        args.level = 0.0 if args.sources == ["synthetic"] else 0.01
    try:
        if args.sources == ["synthetic"]:
            mel = (args.n_mels, args.fmin, args.fmax, args.level)
            print(synthetic(args.out, args.clips, args.seed, *mel, args.force))
        else:
            print(prepare(args))
    except BrokenPipeError:
        raise
    except OSError as e:
        raise UserError(f"--out: {args.out} cannot be written ({e.strerror}) vs room. Free some space") from e
    return 0


@lasting_output()
def main(argv=None):
    """Run a command line -> exit status."""
    return run_command(parser().parse_args(argv), end="")  # the line may end in a command to copy


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as gentle as Ctrl-C
    sys.exit(main())
