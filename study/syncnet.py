"""Landmark SyncNet [2], "modified" in [1] without saying how. Ours: five frames of the 20 lip points (minus
their centroid, over the clip's interocular distance: the opening stays) against 0.2 s of log-mel at 100
columns a second; two perceptrons to 64 numbers on the unit sphere; Euclidean distance d, loss d^2 for pairs
and max(0, 1 - d)^2 for non-pairs. That margin puts truth near 0.2 and strangers near 1.2, the scale of the
paper's table. It learns real pairs of the training split only."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from media.landmarks import flat, lip_points
from study.metrics import auc, mean_interocular


class SyncNet(nn.Module):
    """Two towers that put lips and sound on one sphere, near each other where they belong together (see
    above)."""

    FRAMES, COLUMNS, BANDS = 5, 20, 40  # five frames, four columns each

    def __init__(self):
        super().__init__()
        self.towers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(size, 256),
                nn.ReLU(),
                nn.Dropout(0.2),
                nn.Linear(256, 256),
                nn.ReLU(),
                nn.Dropout(0.2),
                nn.Linear(256, 64),
            )
            for size in (self.FRAMES * 40, self.COLUMNS * self.BANDS)
        )
        self.register_buffer("lip_scale", torch.zeros(2, 40))  # mean, standard deviation
        self.register_buffer("mel_scale", torch.zeros(2, self.BANDS))

    def embed_lips(self, lips):
        """(..., 5, 40) -> unit vectors (..., 64)."""
        return F.normalize(
            self.towers[0](((lips - self.lip_scale[0]) / self.lip_scale[1]).flatten(-2)), dim=-1
        )

    def embed_sound(self, mel):
        """(..., 20, 40) -> unit vectors (..., 64)."""
        return F.normalize(
            self.towers[1](((mel - self.mel_scale[0]) / self.mel_scale[1]).flatten(-2)), dim=-1
        )

    def fit(self, lips, mel, steps, seed=0, batch=128):
        """lips (N, T, 40), mel (N, 4T, 40) of real pairs. Non-pairs, as many as pairs: the same clip 5 to 50
        frames off, or another."""
        generator = torch.Generator().manual_seed(seed)
        self.lip_scale[:], self.mel_scale[:] = (
            torch.stack([v.mean((0, 1)), v.std((0, 1)) + 1e-6]) for v in (lips, mel)
        )
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.05)
        N, T = lips.shape[:2]

        def draw(low, high):
            return torch.randint(low, high, (batch,), generator=generator)

        def take(v, clip, first, count):
            return v[clip[:, None], first[:, None] + torch.arange(count)]

        self.train()
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
            clip, t = draw(0, N), draw(0, T - 4)
            far = t + draw(5, 51) * (2 * draw(0, 2) - 1)
            same = (far >= 0) & (far < T - 4) & (draw(0, 2) == 1)
            other, other_t = (
                torch.where(same, clip, (clip + draw(1, N)) % N),
                torch.where(same, far, draw(0, T - 4)),
            )
            v = self.embed_lips(take(lips, clip, t, 5))
            near = (v - self.embed_sound(take(mel, clip, 4 * t, 20))).norm(dim=-1)
            wrong = (v - self.embed_sound(take(mel, other, 4 * other_t, 20))).norm(dim=-1)
            loss = (near**2).mean() + ((1 - wrong).clamp_min(0) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return self.eval()

    @torch.no_grad()
    def distances(self, lips, mel, shift=0):
        """Distance of lips (N, T, 40) at t to sound (N, 4T, 40) at t + shift -> (N, T - 4 - |shift|)."""
        v = self.embed_lips(lips.unfold(1, 5, 1).transpose(2, 3))  # (N, T - 4, 64)
        a = self.embed_sound(mel.unfold(1, 20, 4).transpose(2, 3))
        n = v.shape[1] - abs(shift)
        return (v[:, max(0, -shift) :][:, :n] - a[:, max(0, shift) :][:, :n]).norm(dim=-1)

    def check(self, lips, mel):
        """AUC of held-out real pairs against another clip's sound: by clip (what the score is) and by
        five-frame window."""
        near, wrong = self.distances(lips, mel).numpy(), self.distances(lips, mel.roll(1, 0)).numpy()
        return {
            "auc": auc(near.mean(1), wrong.mean(1)),
            "auc_window": auc(near.ravel()[::7], wrong.ravel()[::7]),
        }


def lip_shapes(track):
    """What SyncNet sees of tracks (N, T, 136) -> float32 tensor (N, T, 40)."""
    lips = flat(lip_points(track)) / np.maximum(mean_interocular(track), 1e-6)[:, None, None]
    return torch.from_numpy(lips.astype(np.float32))


def sync_score(net, track, mel):
    """SyncNet score (N,): mean distance over the frames of a clip, at no offset."""
    return net.distances(lip_shapes(track), mel).mean(1).numpy()


def sync_offset(net, track, mel, reach=15):
    """(offset, confidence): argmin and median - min, over -15 to 15, of the mean distance of lips at t to
    sound at t + offset, as in [2]. Lips two frames late have -2, the truth must have 0."""
    reach = min(reach, track.shape[1] - 6)
    lips = lip_shapes(track)
    curve = [float(net.distances(lips, mel, shift).mean()) for shift in range(-reach, reach + 1)]
    return int(np.argmin(curve)) - reach, float(np.median(curve) - min(curve))
