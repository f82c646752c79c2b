"""The live page: one file that hears a microphone or a sound file and draws faces, the weights inside."""

import base64
import json
from pathlib import Path

import numpy as np

from media.console import UserError
from media.face import at_rest, head_latents
from media.landmarks import CURVES

ROOT = Path(__file__).resolve().parent.parent


def arrays(flow):
    """A flow's weights by name, and what the sliders need: the latents at rest, and which move the head."""
    more = {"rest": at_rest(flow)[1][0, -1], "head": head_latents(flow).to(flow.cond_mean.dtype)}
    return {name: tensor.detach().numpy() for name, tensor in (flow.state_dict() | more).items()}


def pack(tensors):
    """Arrays by name -> [name, shape, first number] of each, and all numbers as float16 in base64.

    A permutation matrix becomes the column of each row's 1."""
    table, numbers, first = [], [], 0
    for name, tensor in tensors.items():
        tensor = tensor.argmax(1) if name.endswith("permutation") else tensor
        largest = np.abs(tensor).max(initial=0)
        if not largest <= 65504:
            raise UserError(f"{name}: values up to {largest:.3g} vs 65504, the largest float16. Train again")
        table.append([name, list(tensor.shape), first])
        numbers.append(tensor.astype("<f2").ravel())
        first += tensor.size
    return table, base64.b64encode(np.concatenate(numbers).tobytes()).decode()


def write_live(path, config, data, tensors, name, clip=None):
    """config, data, tensors, name: a checkpoint's plain values and arrays. clip: a sound to try it with."""
    if config["dim"] != 136:
        raise UserError(
            f"landmarks: {config['dim'] // 2} points vs 68, whose lines are known. Use another model"
        )
    if data["mel"]["level"] is True:
        raise UserError("level: that of a whole clip vs a running one. Prepare the data and train again")
    table, weights = pack(tensors)
    sources = sorted({f"{source['source']} ({source['licence']})" for source in data["sources"]})
    page = {
        "title": f"Weights: {name}, trained on {'; '.join(sources[:3])}{' and others' * (len(sources) > 3)}.",
        "config": config,
        "mel": data["mel"],
        "fps": data["fps"],
        "interocular": data["interocular"],
        "curves": CURVES,
        "tensors": table,
        "weights": weights,
        "clip": clip and {"name": clip.name, "sound": base64.b64encode(clip.read_bytes()).decode()},
    }
    text = (ROOT / "assets" / "live.html").read_text(encoding="utf-8")
    text = text.replace("__SCRIPT__", (ROOT / "media" / "live.js").read_text(encoding="utf-8"))
    path.write_text(text.replace("__PAGE__", json.dumps(page).replace("</", "<\\/")), encoding="utf-8")
