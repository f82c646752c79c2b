"""The 68 iBUG points: their lines, boxes, distances, and where a track of them breaks."""

import numpy as np

from media.console import Skip
from media.talkers import mean_face

# the lines of a face in the 68-point iBUG layout: (first, last, closed)
CURVES = [(0, 16, 0), (17, 21, 0), (22, 26, 0), (27, 30, 0), (31, 35, 0)]  # jaw, brows, nose
CURVES += [(36, 41, 1), (42, 47, 1), (48, 59, 1), (60, 67, 1)]  # eyes, outer and inner lip

LIPS, EYES = slice(48, 68), (36, 45)


def mouth_opening(landmarks):
    """Inner-lip gap over inner-lip width of iBUG landmarks (..., 68, 2) -> (...): our reading of mouth open
    rate."""
    gap = np.linalg.norm(landmarks[..., [61, 62, 63], :] - landmarks[..., [67, 66, 65], :], axis=-1).mean(-1)
    return gap / np.maximum(np.linalg.norm(landmarks[..., 60, :] - landmarks[..., 64, :], axis=-1), 1e-6)


JUMP = 0.1  # interocular distances a frame: no head moves like this ...
CALM = 3.0  # ... while it moves 3 times less just before and after


def interocular(points):
    """Distance of the outer eye corners, (..., 68, 2) -> (...)."""
    return np.linalg.norm(points[..., 36, :] - points[..., 45, :], axis=-1)


# ------------------------------------------------------------------------------------------------------------
# Is it a face, and which way up? Compared with a plain one, moved, turned and scaled to fit, never mirrored


def misfit(face):
    """How badly 68 points (68, 2) fit a plain face (share of its variance: under .03 in recordings, .85 and
    more where the order is another), and the angle in degrees by which they are turned."""
    ours, plain = ((p[:, 0] + 1j * p[:, 1]) for p in (face, mean_face()))
    ours, plain = ours - ours.mean(), plain - plain.mean()
    turn = (ours.conj() * plain).sum() / np.sqrt((abs(ours) ** 2).sum() * (abs(plain) ** 2).sum())
    return 1 - abs(turn) ** 2, -np.degrees(np.angle(turn))


def arrange(points):
    """Any array -> float64 (F, 68, 2), y down, and notes on what had to be rearranged, or Skip with the
    reason.

    Mended: (F, 2, 68); all x before all y; y before x. Told: y up, a face on its side, left and right
    exchanged."""
    shape, notes = points.shape, []
    layouts = ((68, 2), (136,), (2, 68))
    if points.dtype.kind not in "fiu" or points.ndim not in (2, 3) or shape[1:] not in layouts:
        raise Skip("not 68 points", f"shape {shape} {points.dtype} vs (frames, 68, 2)")
    points = np.array(points, float)
    points = points.transpose(0, 2, 1) if shape[1:] == (2, 68) else points.reshape(-1, 68, 2)
    points[~np.isfinite(points).all((1, 2))] = np.nan
    if not np.isfinite(points[:, 0, 0]).any():
        raise Skip("no face found", f"none in {len(points)} frames")
    points[(np.abs(points) > 1e7).any((1, 2))] = np.nan  # no picture is that large
    found = np.isfinite(points[:, 0, 0])
    if not found.any() or np.ptp(points[found].mean(0), axis=0).min() <= 0:
        raise Skip("points coincide", "the face has no extent")

    def fit(p):  # mirrored or not: that is the next question
        face = p[found].mean(0)
        return min(misfit(face)[0], misfit(face * [-1, 1])[0])

    planar = points.reshape(-1, 2, 68).transpose(0, 2, 1)
    if fit(points) > 0.35 > fit(planar):
        points, shape = planar, shape[:1]
        notes.append("landmarks in the order x0..x67 y0..y67: rearranged")
    if fit(points) > 0.35:
        raise Skip("not a face", "68 points, but not where those of a face are: in another order?")
    if is_exchanged(points[found].mean(0)):
        points = points[:, :, ::-1].copy()
        notes.append("y before x: exchanged")
    check_upright(points[found].mean(0))
    if found.sum() > 5 and not np.ptp(points[found], axis=0).any():
        raise Skip("landmarks do not move", f"{found.sum()} equal frames")
    return points, notes


def is_exchanged(face):
    """Whether (68, 2) is a face once x and y change places: an upright one then, and a mirrored one lying
    now."""
    return misfit(face)[0] > misfit(face * [-1, 1])[0] and abs(misfit(face[:, ::-1])[1]) <= 45


def check_upright(face):
    """Raises Skip unless the mouth lies below the eyes (y points down) and the eye of the points 36 to 41 to
    the left."""
    dx, dy = face[48:].mean(0) - face[36:48].mean(0)
    if dy < -abs(dx):
        raise Skip("y points up", "the mouth lies above the eyes: turn it over (y = height - y)")
    if dy <= abs(dx):
        raise Skip(
            "face on its side", "the mouth lies beside the eyes: turn the picture, or x and y are swapped"
        )
    if misfit(face)[0] > misfit(face * [-1, 1])[0]:
        raise Skip(
            "left and right exchanged", "points 36 to 41 lie right of 42 to 47: mirror them (x = width - x)"
        )


def pieces(points, times, step, max_gap):
    """Indices of the found frames, cut at gaps of more than max_gap frames and at jumps: a list of index
    arrays.

    A jump is a cut, a ghost or a flip to another face: the middle point moves more than JUMP interocular
    distances in one frame (of 40 ms or less) and CALM times more than in the ten frames around it, which a
    fast head does not."""
    index = np.flatnonzero(np.isfinite(points[:, 0, 0]))
    if len(index) < 2:
        return [index]
    dt = np.diff(times[index])
    move = np.median(np.linalg.norm(np.diff(points[index], axis=0), axis=-1), axis=-1)
    move /= np.median(interocular(points[index])) * np.maximum(dt / 0.04, 1)
    around = np.lib.stride_tricks.sliding_window_view(np.pad(move, 5, mode="edge"), 11)
    jump = (move > JUMP) & (move > CALM * np.median(around, axis=-1))
    return np.split(index, np.flatnonzero(jump | (dt > (max_gap + 1.5) * step)) + 1)


def face_box(mean):
    """The square around a clip's mean face (68, 2): its corner (2,) and side, 1.5 times the larger extent."""
    side = 1.5 * np.ptp(mean, axis=0).max()
    return (mean.max(0) + mean.min(0)) / 2 - side / 2, side


def points(track):
    """(..., 136) -> (..., 68, 2)."""
    return track.reshape(*track.shape[:-1], 68, 2)


def flat(p):
    """The other way round: (..., n, 2) -> (..., 2n)."""
    return p.reshape(*p.shape[:-2], 2 * p.shape[-2])  # not -1: there may be no frame yet


def lip_points(track):
    """The lip points minus their centroid: (..., 136) -> (..., 20, 2). The head's motion is gone, the opening
    stays."""
    lips = points(track)[..., LIPS, :]
    return lips - lips.mean(-2, keepdims=True)
