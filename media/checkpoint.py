"""Checkpoints: plain dicts and tensors, read without running any code from the file."""

import zipfile
from pathlib import Path

from media.console import UserError


def read_checkpoint(path):
    """The dict in a checkpoint file. Runs no code from it and refuses a damaged one: torch.load checks no
    CRC."""
    import torch  # only those who read weights pay for it

    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {found} vs a checkpoint. Train one: python talkingflow.py train")
    try:
        if path.read_bytes()[:40].startswith(b"version https://git-lfs"):
            raise ValueError("a git-lfs pointer, fetch the file itself")
        damaged = zipfile.ZipFile(path).testzip()
        if damaged:
            raise ValueError(f"damaged at {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != 1:
            raise ValueError(f"format {state['format']}")
        return state
    except (
        Exception
    ) as e:  # zipfile, pickle and torch raise a dozen kinds for the same thing: not a checkpoint
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UserError(
            f"{path}: unreadable ({reason}) vs a TalkingFlow checkpoint. Use another one or train again"
        )


def describe(clips):
    """What a checkpoint remembers of its training data, to hear new sounds in the same way and to name its
    sources."""
    keys = ("mel", "fps", "layout", "normalisation", "interocular", "sources", "fingerprint")
    return {key: clips.meta[key] for key in keys} | {"folder": str(clips.folder.resolve())}
