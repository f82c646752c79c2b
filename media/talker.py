"""Sound in, faces out: a mel, a stream of a flow for each face, and the look of what comes out."""

import numpy as np

from media.face import Look
from media.sound import Mel


class Talker:
    """K faces that speak one sound, block by block: samples of the sound in, landmarks (K, n, D) out.

    A face hears `lead` frames ahead, so its frames come that much later; `finish` returns the last of
    them. Each face draws its own noise (seed, seed + 1, ...), so the number of faces does not change any
    of them. denoise: without the training noise. look: head, lips and face of media.face.Look.
    """

    def __init__(self, flow, data, sample_rate, faces=1, temperature=1.0, seed=0, denoise=False, **look):
        import torch  # not before a face is to speak: media/ loads no torch

        self.mel = Mel(**data["mel"], fps=data["fps"], sample_rate=sample_rate)
        self.lead, self.device, self.look = flow.config.lead, flow.cond_mean.device, Look(flow, **look)
        sigma = flow.config.noise * data["interocular"] if denoise else 0.0

        def stream(face, steer):
            return flow.stream(1, temperature, torch.Generator().manual_seed(seed + face), sigma, steer)

        self.streams = [[stream(face, steer) for face in range(faces)] for steer in self.look.steered]
        self.tensor, self.waiting = torch.from_numpy, self.lead  # the first columns are only ever heard ahead
        self.last = np.zeros((0, len(self.mel.bank)), np.float32)

    def speak(self, columns):
        """Log-mel columns (n, M) -> landmarks (K, n', D), n' < n while the look-ahead fills."""
        skip = min(self.waiting, len(columns))
        self.waiting -= skip
        self.last = columns[-1:] if len(columns) else self.last
        c = self.tensor(columns[skip:])[None].to(self.device)
        tracks = [np.concatenate([s.push(c).cpu().numpy() for s in streams]) for streams in self.streams]
        return self.look(*tracks)

    def push(self, samples):
        return self.speak(self.mel.push(samples))

    def finish(self):
        """The frames whose look-ahead lies beyond the end of the sound: its last column stands in."""
        missing, self.waiting = self.lead - self.waiting, 0  # fewer if the sound is shorter than that
        return self.speak(np.repeat(self.last, missing, 0))
