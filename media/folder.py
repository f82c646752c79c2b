"""A training folder as prepare_data.py writes it (plain .npy files, memory-mapped, and meta.json), opened
and checked."""

import json
from pathlib import Path

import numpy as np

from media.console import UserError


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

    def split(self, name):
        return [clip for clip in self.clips if clip["split"] == name]

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
