"""Checkpoints: plain dicts and tensors, sealed, read without running any code from the file."""

import contextlib
import hashlib
import io
import zipfile
from pathlib import Path

from media.console import UserError, write_atomically

MARK = b"sha256:"


def seal(body):
    """The end of a sealed file: torch.save's zip ends in a comment of no bytes, which makes room for a digest
    of all bytes before it. A zip checks its members only, and torch.load not even these."""
    comment = MARK + hashlib.sha256(body).hexdigest().encode()
    return len(comment).to_bytes(2, "little") + comment


SEALED = len(seal(b""))


def write_checkpoint(path, state):
    """Write a dict of plain values and tensors, whole or not at all; torch.load can read the file too."""
    import torch  # only those who read or write weights pay for it

    with io.BytesIO() as f:
        torch.save(state, f)
        body = f.getvalue()[:-2]  # without the length of the empty comment
    write_atomically(path, lambda part: part.write_bytes(body + seal(body)))


def unseal(data):
    """Refuse bytes that are not what `write_checkpoint` or torch.save has written, to the last one."""
    if data.startswith(b"version https://git-lfs"):
        raise ValueError("a git-lfs pointer, fetch the file itself")
    if data[-SEALED:] == seal(data[:-SEALED]):
        return
    if data[-22:-18] != b"PK\5\6" or data[-2:] != b"\0\0":  # a zip's last record, with no comment
        raise ValueError("damaged or cut")
    with zipfile.ZipFile(io.BytesIO(data)) as f:  # of torch.save itself
        if sum(member.file_size for member in f.infolist()) > len(data):
            raise ValueError("compressed")
        if damaged := f.testzip():
            raise ValueError(f"damaged at {damaged}")


def read_checkpoint(path):
    """The dict in a checkpoint file. Runs no code from it and refuses a damaged one."""
    import torch

    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {found} vs a checkpoint. Train one: python talkingflow.py train")
    try:
        data = path.read_bytes()
        unseal(data)
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if state["format"] != 1:
            raise ValueError(f"format {state['format']}")
        check_state(state)
        return state
    except Exception as e:  # zipfile, pickle and torch raise a dozen kinds for one thing: not a checkpoint
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        expected = "a TalkingFlow checkpoint. Use another one or train again"
        raise UserError(f"{path}: unreadable ({reason}) vs {expected}")


def check_state(state):
    """Refuse what no training writes, above all sizes that the file itself does not hold: a few bytes can
    claim terabytes. What is left is compared with the model, shape by shape, when it is loaded."""
    config, mel, fps = state["config"], state["data"]["mel"], state["data"]["fps"]
    for name, tensor in (*state["model"].items(), *state.get("average", {}).items()):
        if str(tensor.dtype) not in ("torch.float32", "torch.bool"):
            raise ValueError(f"{name}: {tensor.dtype}")
        if not tensor.is_contiguous() or not tensor.isfinite().all():
            raise ValueError(f"{name}: not finite, or values that are repeated")
    layers = config["num_scales"] * config["steps_per_scale"] * len(config["dilations"])
    reach = config["kernel_size"] * max(config["dilations"]) + config["lead"]
    for name, value, least, most in (
        ("layers", layers, 1, len(state["model"])),
        ("frames heard", reach, 1, 100_000),
        ("fps", fps, 1, 1000),
        ("n_mels", mel["n_mels"], config["cond_dim"], config["cond_dim"]),
        ("window", mel["window"], 0.001, 1),
        ("fmin", mel["fmin"], 0, 1e5),
        ("fmax", mel["fmax"], 1, 1e6),
        ("level", float(mel["level"]), 0, 100),
    ):
        if isinstance(value, bool) or not least <= value <= most:
            raise ValueError(f"{name} {value}")


@contextlib.contextmanager
def fits(path):
    """What Python and torch say of a checkpoint that does not fit the model, as one line."""
    try:
        yield
    except (TypeError, KeyError, ValueError, RuntimeError, OverflowError) as e:
        reason = str(e).splitlines()[-1].strip()
        raise UserError(f"{path}: {reason} vs this version's model. Use the code that trained it")


def describe(clips):
    """What a checkpoint remembers of its training data, to hear new sounds in the same way and to name its
    sources."""
    keys = ("mel", "fps", "layout", "normalisation", "interocular", "sources", "fingerprint")
    return {key: clips.meta[key] for key in keys} | {"folder": str(clips.folder.resolve())}
