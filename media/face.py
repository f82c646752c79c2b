"""Head and lips apart, and the person's own face: what is done to a flow's faces on their way out."""

import sys
from pathlib import Path

import numpy as np

from media.console import Skip, UserError
from media.landmarks import EYES, arrange, face_box, flat, mouth_opening, points
from media.takes import read_npy, read_npz, read_openface, to_pixels

BOTH_EYES = slice(36, 42), slice(42, 48)


def at_rest(flow, frames=40):
    """A quiet sound (1, frames, M), one standard deviation below the mean in every band, and the latents
    expected with it (1, frames, D): a mouth that is closed, and no data is needed to find it."""
    c = (flow.cond_mean - flow.cond_std).expand(1, frames, -1)
    return c, flow.prior_mean(c) + c.new_zeros(1, frames, flow.config.dim)


def rest_face(flow):
    """The face (68, 2) that a flow shows at rest."""
    import torch

    with torch.no_grad():
        c, z = at_rest(flow)
        return points(flow.inverse(z.split(flow.sizes, 2), c)[0, -1].cpu().numpy())


def head_latents(flow):
    """Which latents (D,) turn and shift the head more than they move the lips. Each by itself is moved by
    half its standard deviation; the nose shows the head, the lips about their centre the lips."""
    import torch

    frames, D = 17, flow.config.dim
    c = flow.cond_mean.expand(D + 1, frames, -1)
    z = flow.prior_mean(c) + c.new_zeros(D + 1, frames, D)
    z[1:] += torch.diag(flow.prior.variance.sqrt() / 2)[:, None]
    x = points(flow.inverse(z.split(flow.sizes, 2), c)[:, -1])
    moved = x[1:] - x[:1]  # (D, 68, 2)
    nose, lips = moved[:, 27:36], moved[:, 48:] - moved[:, 48:].mean(1, keepdim=True)
    nose, lips = (v.square().sum((1, 2)) for v in (nose, lips))
    return nose / nose.sum() > lips / lips.sum()


def steer(flow, head=1.0, lips=1.0):
    """A function of latents (B, T, D) and sound (B, T, M) that scales their motion about rest, the head's by
    `head`, all else by `lips`: 0 still, 1 as trained. Given to a stream, so every innovation is scaled. The
    couplings, which move the lips too, hear a sound that is nearer to rest."""
    import torch

    with torch.no_grad():
        c_rest, z_rest = (v[:, -1:] for v in at_rest(flow))
        gain = torch.where(head_latents(flow), head, lips)
    return lambda z, c: (z_rest + gain * (z - z_rest), c_rest + min(lips, 1.0) * (c - c_rest))


def with_eyes_of(track, lively):
    """The faces of a track (..., 136) with the eyes of another: latents that blink move lips and head too."""
    out, lively = points(track).copy(), points(lively)
    for eye in BOTH_EYES:
        out[..., eye, :] = lively[..., eye, :]
        out[..., eye, :] += (points(track) - lively)[..., eye, :].mean(-2, keepdims=True)
    return flat(out)


def draw_on(track, rest, face):
    """A track (..., 136) of the model's face on another: its displacements from the model's face at rest
    (68, 2), turned and scaled as the other's eyes lie, from the other face (68, 2) at rest."""
    ours, theirs = (f[EYES[1]] - f[EYES[0]] for f in (rest, face))
    turn = complex(*theirs) / complex(*ours)
    turn = np.array([[turn.real, turn.imag], [-turn.imag, turn.real]])  # row vectors: v @ turn
    return flat(face + (points(track) - rest) @ turn).astype(track.dtype)


class Look:
    """How a flow's faces are shown: their head's and lips' motion (0 still, 1 as trained), and on which face
    (68, 2), if not on the flow's own. `steered`: what each of its arguments is steered by (see `Stream`)."""

    def __init__(self, flow, head=1.0, lips=1.0, face=None):
        self.steered = [steer(flow, head, lips), None] if (head, lips) != (1, 1) else [None]
        self.face, self.rest = face, rest_face(flow) if face is not None else None

    def __call__(self, track, lively=None):
        """The track (..., 136) to show, given the same faces as trained, for their eyes."""
        track = track if lively is None else with_eyes_of(track, lively)
        return track if self.face is None else draw_on(track, self.rest, self.face)


def read_face(path):
    """A face at rest from landmarks (.npz, .npy, OpenFace .csv) or a picture: (68, 2) in its own face box,
    and the box [x, y, side] in pixels. Of a track, the frames whose mouth is most closed."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file vs landmarks or a picture of a face. Check --face")
    try:
        face = landmarks_of(path)
    except Skip as e:
        reason, detail = e.args[0], e.args[-1]
        raise UserError(f"{path}: {reason} ({detail}) vs a face with a closed mouth. Give another") from None
    except (OSError, ValueError, KeyError, EOFError) as e:
        reason = str(e).split("\n")[0] or type(e).__name__
        raise UserError(
            f"{path}: unreadable ({reason}) vs .npz, .npy, .csv or a picture. Check --face"
        ) from None
    face = face[np.isfinite(face[:, 0, 0])]
    opening = mouth_opening(face)
    face = face[opening <= np.quantile(opening, 0.1)].mean(0)
    if mouth_opening(face) > 0.15:
        found = f"{mouth_opening(face):.2f} of its width"
        print(
            f"note: {path.name} has its mouth open ({found}), and so it stays. A closed one is better",
            file=sys.stderr,
        )
    corner, side = face_box(face)
    return ((face - corner) / side).astype(np.float32), [*corner.tolist(), float(side)]


def landmarks_of(path):
    """A file's faces (F, 68, 2) in pixels."""
    readers = {".npz": read_npz, ".npy": read_npy, ".csv": read_openface}
    if path.suffix.lower() not in readers:
        from PIL import Image, ImageOps

        from media.video import find_model, load_extractor, quiet

        model = find_model("mediapipe", None)
        with quiet(), Image.open(path) as picture:
            found = load_extractor("mediapipe", model)(
                np.array(ImageOps.exif_transpose(picture).convert("RGB"))
            )
        if len(found) != 1:
            raise Skip("picture", f"{len(found)} faces")
        return np.array(found, float)
    track = readers[path.suffix.lower()](path)
    found = np.asarray(track.points)
    found = found[None] if found.ndim == 2 and found.shape == (68, 2) else found
    return to_pixels(arrange(found)[0], track.about.get("wh"), 1.0)[0]
