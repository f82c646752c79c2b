"""The 68 iBUG points: their lines, boxes, distances, and where a track of them breaks."""

import numpy as np

# the lines of a face in the 68-point iBUG layout: (first, last, closed)
CURVES = [(0, 16, 0), (17, 21, 0), (22, 26, 0), (27, 30, 0), (31, 35, 0)]  # jaw, brows, nose
CURVES += [(36, 41, 1), (42, 47, 1), (48, 59, 1), (60, 67, 1)]  # eyes, outer and inner lip

LIPS, EYES = slice(48, 68), (36, 45)


def mouth_opening(landmarks):
    """Inner-lip gap over inner-lip width of iBUG landmarks (..., 68, 2) -> (...): our reading of mouth open rate."""
    gap = np.linalg.norm(landmarks[..., [61, 62, 63], :] - landmarks[..., [67, 66, 65], :], axis=-1).mean(-1)
    return gap / np.maximum(np.linalg.norm(landmarks[..., 60, :] - landmarks[..., 64, :], axis=-1), 1e-6)


JUMP = 0.1  # interocular distances a frame: no head moves like this ...
CALM = 3.0  # ... while it moves 3 times less just before and after


def interocular(points):
    """Distance of the outer eye corners, (..., 68, 2) -> (...)."""
    return np.linalg.norm(points[..., 36, :] - points[..., 45, :], axis=-1)


def pieces(points, times, step, max_gap):
    """Indices of the found frames, cut at gaps of more than max_gap frames and at jumps: a list of index arrays.

    A jump is a cut, a ghost or a flip to another face: the middle point moves more than JUMP interocular distances in
    one frame (of 40 ms or less) and CALM times more than in the ten frames around it, which a fast head does not."""
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
    return p.reshape(*p.shape[:-2], -1)


def lip_points(track):
    """The lip points minus their centroid: (..., 136) -> (..., 20, 2). The head's motion is gone, the opening stays."""
    lips = points(track)[..., LIPS, :]
    return lips - lips.mean(-2, keepdims=True)
