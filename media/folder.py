"""The training folder on disk: arrays that grow at their ends, a journal to go on from, the report, and
meta.json last."""

import csv
import functools
import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from media.console import UserError, printable, write_atomically
from media.sound import Mel

ARRAYS = {"landmarks": np.float32, "mel": np.float32, "audio": np.int16, "articulation": np.float32}


class GrowingArray:
    """One .npy file that grows at its end and is never held in memory.

    numpy pads the header of a .npy so that the first axis may reach 21 digits without moving the data; so
    rows are appended, and the header is written again when the folder is finished. `rows` rows are kept of
    what is there."""

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


@dataclass
class Clip:
    """A clip as meta.json holds it: whose it is, and where its rows and samples lie in the arrays."""

    name: str
    speaker: str
    start: int
    frames: int
    audio_start: int
    audio_samples: int
    sha256: str
    box: list  # pixels = box[:2] + box[2] * landmarks
    wh: list  # size of its picture
    time: float | None = None  # where it begins in its source, s
    source: dict | int | None = (
        None  # source, licence, extractor; in meta.json the place of these in meta["sources"]
    )
    split: str = ""
    optimal_nll: float | None = None  # of synthetic talkers
    path: str = ""  # of its source; not in meta.json

    def facts(self):
        """The dict that meta.json holds."""
        return {k: v for k, v in asdict(self).items() if v is not None and k != "path"}


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

    def append(self, parts, **about):
        """parts: landmarks (T, 136), mel (T, M), audio (S,) and what else the folder has -> the Clip."""
        digest, start = hashlib.sha256(), {}
        for name, array in self.arrays.items():
            start[name] = array.append(parts[name])
            digest.update(np.ascontiguousarray(parts[name], array.dtype).tobytes())
        return Clip(
            start=start["landmarks"],
            frames=len(parts["landmarks"]),
            audio_start=start["audio"],
            audio_samples=len(parts["audio"]),
            sha256=digest.hexdigest(),
            **about,
        )

    def rows(self):
        """How many rows each array has by now."""
        return {name: array.rows for name, array in self.arrays.items()}

    def flush(self):
        for array in self.arrays.values():
            array.file.flush()

    def close_arrays(self):
        for array in self.arrays.values():
            array.close()

    def close(self, meta, clips):
        """meta.json last and in one step: a folder with a meta.json is whole."""
        meta = meta | {"clips": [clip.facts() for clip in clips]}
        meta["fingerprint"] = fingerprint(meta)
        text = json.dumps(meta, separators=(",", ":"), ensure_ascii=False)
        write_atomically(self.out / "meta.json", lambda path: path.write_text(text, encoding="utf-8"))


def fingerprint(meta):
    """sha256 over the clips' own digests (in the order of meta["clips"]) and the mel settings.

    Each clip's digest covers its landmarks, mel, sound (and articulation) bytes, in that order, and was taken
    while the bytes passed by: nothing is read twice, however large the folder."""
    digest = hashlib.sha256(json.dumps([meta["mel"], meta["fps"]], sort_keys=True).encode())
    for clip in meta["clips"]:
        digest.update(f"{clip['name']} {clip['split']} {clip['sha256']}\n".encode())
    return digest.hexdigest()


OURS = {f"{name}.npy" for name in ARRAYS} | {"meta.json", "journal.jsonl", "report.csv", "preview"}


def check_folder(out, force=False, again=False):
    """Whether `out` may be written: absent, empty, ours to replace (force) or to go on with (again)."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file vs a folder. Choose another name")
    found = sorted(p.name for p in out.iterdir() if p.name[0] != ".") if out.exists() else []
    if {"meta.json", "journal.jsonl"} & set(found) and not (force or again):
        raise UserError(
            f"--out: {out} holds a training folder vs a new or empty one. "
            "Use --force to replace it, or another --out"
        )
    foreign = [name for name in found if name not in OURS]
    if foreign and "meta.json" not in found:
        raise UserError(
            f"--out: {out} holds other files ({', '.join(foreign[:3])}) vs a new or empty folder. "
            "Choose another --out"
        )


def new_folder(out, force=False):
    """Make `out` ready for a new folder, rid of the files this program writes."""
    check_folder(out, force)
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        # no folder is whole without the first
        for name in ("meta.json", *sorted(OURS - {"meta.json", "preview"})):
            (Path(out) / name).unlink(missing_ok=True)
    except OSError as e:
        raise UserError(
            f"--out: {out} cannot be written ({e.strerror}) vs a writable folder. Choose another --out"
        ) from None


# ------------------------------------------------------------------------------------------------------------
# What became of the sources


@dataclass
class Leftover:
    """A file that is no source: why, and whether it counts as skipped. A line of report.csv."""

    path: Path
    reason: str
    detail: str = ""
    skipped: bool = True


@dataclass
class Entry:
    """What became of a source: a line of journal.jsonl and of report.csv."""

    key: str
    name: str
    path: str
    speaker: str
    reason: str = ""  # why there is no clip
    detail: str = ""
    left_out: dict = field(default_factory=dict)  # reason -> pieces
    frames: int = 0
    missing: int = 0  # frames without a face
    notes: list = field(default_factory=list)  # on what was mended, or cannot be meant so
    about: dict = field(default_factory=dict)  # source, licence, extractor
    clips: list = field(default_factory=list)
    rows: dict = field(default_factory=dict)  # how far the arrays reached with them
    pieces: list = field(default_factory=list)  # clips that are not stored yet


class Journal:
    """journal.jsonl: the settings, then one line a source once its arrays are written, with the rows they
    reach."""

    def __init__(self, out, settings, force):
        self.path = Path(out) / "journal.jsonl"
        self.done, self.rows, self.seen = {}, {}, {}
        text = self.path.read_bytes() if self.path.is_file() and not force else b""
        if b"\n" not in text:
            new_folder(out, force)
            self.file = open(self.path, "w", encoding="utf-8")  # noqa: SIM115 (stays open until the run ends)
            self.write(asdict(settings))
            return
        whole = text.rpartition(b"\n")[0] + b"\n"  # a kill may have torn the last line
        try:
            first, *entries = [json.loads(line) for line in whole.decode().splitlines()]
            self.compare(first, asdict(settings))
            settings.piece = first["piece"]  # chosen by the number of sources when the folder was begun
            for facts in entries:
                entry = Entry(**facts)
                entry.clips, self.rows = [Clip(**clip) for clip in entry.clips], entry.rows
                if entry.reason != "unexpected error":  # that may have been ours: try it again
                    self.done[entry.key] = entry
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            if isinstance(e, UserError):
                raise
            raise UserError(
                f"{self.path}: damaged, or of another version ({e}). Use --force to begin again"
            ) from None
        os.truncate(self.path, len(whole))
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        if self.done:
            print(f"{out}: {len(self.done):,} sources are done, going on")

    def compare(self, old, new):
        """Refuse to go on with a folder that was begun with other settings."""
        for key in new:
            if key != "piece" and old.get(key) != new[key]:
                raise UserError(
                    f"--out: {self.path.parent} was made with {key} {old.get(key)} vs {new[key]} now. "
                    "Use --force to replace it, or another --out"
                )

    def write(self, facts):
        """A dict as a line."""
        self.file.write(json.dumps(facts, ensure_ascii=False) + "\n")
        self.file.flush()

    def remember(self, sources):
        """-> the sources that are not done. The clips of the others are known again where they turn up twice;
        not so those of files that changed since."""
        done = [self.done[source.key] for source in sources if source.key in self.done]
        self.seen = {clip.sha256: clip.name for entry in done for clip in entry.clips}
        return [source for source in sources if source.key not in self.done]

    def store(self, entry, writer, first_part):
        """Append the pieces of an entry to the arrays, then say so here. One that is there already is left
        out."""
        for piece in entry.pieces:
            parts = {"landmarks": piece.landmarks, "mel": piece.mel, "audio": piece.audio}
            digest = hashlib.sha256(b"".join(a.tobytes() for a in parts.values())).hexdigest()
            if digest in self.seen:
                entry.left_out["duplicate"] = entry.left_out.get("duplicate", 0) + 1
                entry.detail = f"same as {self.seen[digest]}"
                continue
            whole = len(entry.pieces) == 1 and first_part
            name = entry.name if whole else f"{entry.name}@{piece.time:07.2f}"
            self.seen[digest] = name
            about = {"box": piece.box, "wh": piece.wh, "time": piece.time, "source": entry.about}
            entry.clips.append(
                writer.append(parts, name=name, speaker=entry.speaker, path=entry.path, **about)
            )
        if not entry.clips and not entry.reason:
            entry.reason = "duplicate"
        entry.pieces = []
        writer.flush()
        entry.rows = writer.rows()
        self.write({key: value for key, value in asdict(entry).items() if key != "pieces"})
        self.done[entry.key] = entry


def write_report(path, entries, leftovers, fps):
    """report.csv: one line a file."""
    with open(path, "w", newline="", encoding="utf-8") as f:
        table = csv.writer(f)
        table.writerow("source,clips,seconds,frames,missing,reason,detail,pieces left out,notes".split(","))
        for e in entries:
            seconds = sum(clip.frames for clip in e.clips) / fps
            left_out = "; ".join(f"{reason}: {n}" for reason, n in e.left_out.items())
            counts = [len(e.clips), f"{seconds:.2f}", e.frames, e.missing]
            table.writerow([e.path, *counts, e.reason, e.detail, left_out, "; ".join(e.notes)])
        for e in leftovers:
            table.writerow([printable(e.path), 0, "0", 0, 0, e.reason, printable(e.detail), "", ""])


# ------------------------------------------------------------------------------------------------------------
# Opened and checked


class TrainingFolder:
    """The clips of a training folder, read when asked for: 17 hours or 17 seconds cost the same memory.

    landmarks (N, D), mel (N, M) and audio (S,) hold all clips end to end; a clip is a dict of meta.json's
    list."""

    def __init__(self, folder):
        self.folder = Path(folder)
        path = self.folder / "meta.json"
        again = f"Run: python prepare_data.py SRC --out {self.folder}"
        if not path.is_file():
            raise UserError(f"{self.folder}: no meta.json vs a folder made by prepare_data.py. {again}")
        try:
            self.meta = json.loads(path.read_text(encoding="utf-8"))
            self.clips, self.fps = self.meta["clips"], self.meta["fps"]
            self.landmarks, self.mel, self.audio = (
                np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in ("landmarks", "mel", "audio")
            )
            frames = sum(clip["frames"] for clip in self.clips)
        except (OSError, ValueError, KeyError, EOFError, TypeError) as e:
            found = f"unreadable ({e}) vs a folder made by prepare_data.py"
            raise UserError(f"{self.folder}: {found}. {again} --force")
        if self.meta.get("format") != 1 or not len(self.landmarks) == len(self.mel) >= frames:
            found = f"{len(self.landmarks)} frames of landmarks, {len(self.mel)} of sound"
            raise UserError(f"{self.folder}: {found} vs {frames} in meta.json. {again} --force")
        self.dim, self.cond_dim = self.landmarks.shape[1], self.mel.shape[1]
        self.known_starts = {}  # T -> starts(T): every step asks, and clips may be millions

    def split(self, name):
        return [clip for clip in self.clips if clip["split"] == name]

    def starts(self, T):
        """The training clips that hold T frames, and how many windows of T start in them up to each clip's
        end."""
        if T not in self.known_starts:
            clips = [clip for clip in self.split("train") if clip["frames"] >= T]
            self.known_starts[T] = clips, np.cumsum([clip["frames"] - T + 1 for clip in clips])
        return self.known_starts[T]

    def window_length(self, longest):
        """The longest window, up to `longest` frames, that at least 95 % of the training clips can fill."""
        lengths = sorted(clip["frames"] for clip in self.split("train"))
        if not lengths:
            raise UserError(f"{self.folder}: no clip in the training split vs at least 1. Prepare more data")
        return min(longest, lengths[len(lengths) // 20])

    def windows(self, split, T, limit=None):
        """(clip, first frame) of the windows of T frames that tile a split's clips; at most `limit`,
        evenly chosen."""
        tiles = [(clip, s) for clip in self.split(split) for s in range(0, clip["frames"] - T + 1, T)]
        if limit is None or len(tiles) <= limit:
            return tiles
        return [tiles[i * len(tiles) // limit] for i in range(limit)]

    @functools.cached_property
    def hearing(self):
        """What made the folder's log-mel columns."""
        return Mel(**self.meta["mel"], fps=self.fps, sample_rate=self.meta["sample_rate"])

    def overdriven(self, clip, frames, rng):
        """Log-mel columns (T, M) of a clip's `frames` (T,) as a microphone hears them that is up to 15 dB too
        loud and clips. It has heard the 2 seconds before them, from which comes its level."""
        before, rate = max(0, frames[0] - round(2 * self.fps)), self.meta["sample_rate"] / self.fps
        start, stop = int(before * rate), min(int((frames[-1] + 1) * rate) + 1, clip["audio_samples"])
        sound = self.audio[clip["audio_start"] :][start:stop].astype(np.float32) / 32768
        limit = np.abs(sound).max() * 10 ** (-rng.uniform(0, 15) / 20)
        columns = self.hearing.columns(np.clip(sound, -limit, limit))
        return columns[np.minimum(frames - before, len(columns) - 1)]

    def check(self, x, c):
        """Refuses windows x (B, T, D), c (B, T, M) that no density can be fitted to."""
        for name, values in (("landmarks", x), ("sound", c)):
            if not np.isfinite(values).all():
                found = f"NaN or Inf in the {name} vs finite numbers"
                raise UserError(f"{self.folder}: {found}. Prepare it again with --force")
        still = np.flatnonzero(x.std((0, 1)) < 1e-6).tolist()
        if still:
            found = f"coordinates {still[:8]} never move vs a density of moving points"
            raise UserError(f"{self.folder}: {found}. Train with --noise 0.0022 or mend the landmarks")
