"""Synthetic talkers: a voice, a face that follows it, and the exact likelihood of that face."""

import numpy as np

from media.sound import SAMPLE_RATE

FPS = 25
HOP = 128  # samples between two segments of the voice: 8 ms


#        name  F1   F2    F3   voice noise noise Hz   open  width  pout press     (targets of the four articulators)
PHONES = [
    ("sil", 500, 1500, 2500, 0.00, 0.003, 3000, 0.05, 0.00, 0.00, 0.25),
    ("aa", 740, 1150, 2500, 1.00, 0.000, 3000, 1.00, 0.05, 0.00, 0.00),
    ("ae", 680, 1720, 2450, 1.00, 0.000, 3000, 0.75, 0.55, 0.00, 0.00),
    ("iy", 290, 2250, 2950, 0.80, 0.000, 3000, 0.22, 1.00, 0.00, 0.00),
    ("uw", 310, 880, 2300, 0.80, 0.000, 3000, 0.18, -0.70, 1.00, 0.00),
    ("ow", 480, 900, 2450, 0.95, 0.000, 3000, 0.55, -0.55, 0.75, 0.00),
    ("eh", 550, 1800, 2500, 0.95, 0.000, 3000, 0.55, 0.40, 0.00, 0.00),
    ("m", 260, 1050, 2200, 0.40, 0.000, 3000, 0.00, 0.00, 0.05, 0.80),
    ("b", 220, 800, 2100, 0.30, 0.010, 1200, 0.00, 0.00, 0.05, 1.00),
    ("f", 350, 1300, 2400, 0.00, 0.040, 6500, 0.10, 0.20, 0.00, 0.55),
    ("s", 350, 1700, 2600, 0.00, 0.100, 5800, 0.12, 0.55, 0.00, 0.00),
    ("sh", 350, 1700, 2500, 0.00, 0.220, 2900, 0.20, -0.45, 0.80, 0.00),
    ("n", 280, 1550, 2600, 0.42, 0.000, 3000, 0.22, 0.15, 0.00, 0.00),
    ("l", 360, 1150, 2750, 0.60, 0.000, 3000, 0.38, 0.10, 0.00, 0.00),
]


VOWELS = np.arange(1, 7)
CONSONANTS = np.arange(7, 14)
VOICE = np.array([p[1:7] for p in PHONES], float)  # (14, 6): F1 F2 F3 voice noise noise_hz
TARGETS = np.array([p[7:] for p in PHONES], float)  # (14, 4): open width pout press


def say(clips, frames, rng):
    """Random syllables: consonant (2-3 frames) + vowel (3-6), 12 % pauses, silence first and last -> (B, T) phones."""
    phones = np.zeros((clips, frames), int)
    for row in phones:
        t = rng.integers(3, 7)
        while t < frames - 4:
            if rng.random() < 0.12:
                t += rng.integers(5, 13)
                continue
            for kind, length in ((CONSONANTS, rng.integers(2, 4)), (VOWELS, rng.integers(3, 7))):
                row[t : t + length] = rng.choice(kind)
                t += length
        row[frames - 4 :] = 0
    return phones


def synthesize(phones, rng):
    """Phones (B, T) -> float32 sound (B, T * 640), 16 kHz, peak 0.7.

    A glottal pulse train with a wandering pitch, and noise, through a filter that changes every 16 ms: three resonators
    at the formants for the voice, one for the noise. Short-time Fourier filtering with overlap-add needs no loop over
    samples. All of it is causal: no sample before a phone's first frame depends on the phone."""
    B, T = phones.shape
    S = T * SAMPLE_RATE // FPS
    n = S // (2 * HOP) + 1  # filters a clip, each for two segments
    at = ((2 * np.arange(n) - 1) * HOP * FPS // SAMPLE_RATE).clip(
        0, T - 1
    )  # a segment begins one hop before it
    control = VOICE[phones[:, at]].astype(np.float32)  # (B, n, 6)
    for _ in range(2):  # glide: mean with the one before
        control[:, 1:] = (control[:, 1:] + control[:, :-1]) / 2
    control[..., :3] *= rng.uniform(0.95, 1.05, (B, 1, 1))  # longer and shorter throats
    pitch = rng.uniform(95, 220, (B, 1)) * np.exp(0.03 * np.cumsum(rng.normal(size=(B, n)), 1).clip(-8, 8))
    share = control[..., 3] / (control[..., 3] + control[..., 4] + 1e-9)  # of the voice in the sound
    pitch, voice, noise = (
        np.repeat(c, 2 * HOP, axis=1)[:, :S] for c in (pitch, control[..., 3] * share, control[..., 4])
    )
    since = np.cumsum(pitch / SAMPLE_RATE, 1) % 1 * SAMPLE_RATE / pitch  # samples since the last pulse began
    pulses = (1 - np.cos(np.pi / 4 * since.clip(max=8))) * np.sqrt(
        2 / pitch
    )  # half a millisecond: little above 4 kHz
    source = 10 * pulses * voice + rng.standard_normal((B, S), np.float32) * noise
    source = np.pad(source.astype(np.float32), ((0, 0), (HOP, 3 * HOP)))
    f = np.fft.rfftfreq(4 * HOP, 1 / SAMPLE_RATE).astype(np.float32)  # (F,)

    def resonance(k, width):  # 1 / response, (B, n, F)
        return 1 - (f / control[..., k, None]) ** 2 + 1j * (width * f / control[..., k, None] ** 2)

    voiced = resonance(0, 80) * resonance(1, 110) * resonance(2, 170) * (1 + (f / 500) ** 2)
    spectrum = share[..., None] / voiced + (1 - share)[..., None] ** 2 * (f / 2000) / resonance(5, 1800)
    window = np.hanning(2 * HOP + 1)[:-1].astype(np.float32)
    segments = (
        np.lib.stride_tricks.sliding_window_view(source, 2 * HOP, axis=1)[:, ::HOP][:, : 2 * n] * window
    )
    segments = np.fft.rfft(segments, 4 * HOP).reshape(B, n, 2, -1) * spectrum[:, :, None]
    filtered = np.fft.irfft(segments, 4 * HOP).reshape(B, 2 * n, 4 * HOP)
    sound = np.zeros((B, (2 * n + 3) * HOP), np.float32)
    for k in range(4):  # overlap-add
        sound[:, k * HOP : (2 * n + k) * HOP] += filtered[:, :, k * HOP : (k + 1) * HOP].reshape(B, -1)
    sound = sound[:, HOP : HOP + S]
    return 0.7 * sound / np.abs(sound).max(axis=1, keepdims=True)


NOISE = 0.002  # std of the observation noise of every coordinate
COARTICULATION = 0.45  # double pole of the articulators' filter: about 50 ms


def mean_face():
    """The 68 iBUG points of a neutral face, (68, 2), centred at 0, y down, 0.62 high."""
    p = np.zeros((68, 2))
    a = np.linspace(0, np.pi, 17)
    p[0:17] = np.stack(
        [-0.275 * np.cos(a) * (1 - 0.16 * np.sin(a) ** 4), -0.07 + 0.41 * np.sin(a) ** 1.15], 1
    )
    b = np.linspace(0, 1, 5)
    brow = np.stack([-0.225 + 0.165 * b, -0.175 - 0.045 * np.sin(np.pi * (0.25 + 0.6 * b))], 1)
    p[17:22], p[22:27] = brow, brow[::-1] * [-1, 1]
    p[27:31] = np.stack([np.zeros(4), np.linspace(-0.095, 0.045, 4)], 1)
    p[31:36] = [[-0.052, 0.082], [-0.026, 0.092], [0, 0.098], [0.026, 0.092], [0.052, 0.082]]
    eye = np.array(
        [[-0.053, 0.004], [-0.022, -0.02], [0.02, -0.02], [0.05, 0.006], [0.02, 0.016], [-0.022, 0.016]]
    )
    p[36:42] = eye + [-0.118, -0.095]
    p[42:48] = (eye * [-1, 1])[[3, 2, 1, 0, 5, 4]] + [0.118, -0.095]
    p[48:60] = [
        [-0.100, 0.183],
        [-0.064, 0.161],
        [-0.026, 0.149],
        [0, 0.155],
        [0.026, 0.149],
        [0.064, 0.161],
        [0.100, 0.183],
        [0.066, 0.206],
        [0.030, 0.219],
        [0, 0.222],
        [-0.030, 0.219],
        [-0.066, 0.206],
    ]
    p[60:68] = [
        [-0.086, 0.183],
        [-0.036, 0.176],
        [0, 0.178],
        [0.036, 0.176],
        [0.086, 0.183],
        [0.036, 0.188],
        [0, 0.189],
        [-0.036, 0.188],
    ]
    return p


def articulator_modes(p):
    """How one unit of open, width, pout, press moves the points: (4, 68, 2)."""
    m = np.zeros((4, 68, 2))
    upper, lower, inner_up, inner_low = [49, 50, 51, 52, 53], [55, 56, 57, 58, 59], [61, 62, 63], [65, 66, 67]
    lips, centre = np.arange(48, 68), p[48:68].mean(0)
    jaw = np.exp(-(((np.arange(17) - 8) / 4.0) ** 2))
    m[0, 0:17, 1] = 0.062 * jaw  # open: jaw and lower lip fall
    m[0, lower, 1], m[0, inner_low, 1] = 0.072, 0.076
    m[0, [55, 59], 1] = 0.050
    m[0, upper, 1], m[0, inner_up, 1] = -0.008, -0.008
    m[0, [48, 54, 60, 64], 1] = 0.028
    m[0, lips, 0] = -0.08 * p[lips, 0]
    m[1, lips, 0] = 0.20 * p[lips, 0]  # width: the corners go out and up
    m[1, [48, 54, 60, 64], 1] = -0.010
    m[1, [3, 4, 12, 13], 0] = [-0.006, -0.006, 0.006, 0.006]
    m[2, lips, 0] = -0.30 * (p[lips, 0] - centre[0])  # pout: narrow, thick, forward
    m[2, upper, 1], m[2, lower, 1] = -0.012, 0.014
    m[2, 31:36, 1] = -0.003
    m[3, upper, 1], m[3, lower, 1] = 0.008, -0.012  # press: the lips roll in
    m[3, inner_up, 1], m[3, inner_low, 1] = 0.0045, -0.0045
    m[3, 6:11, 1] = -0.005
    return m


def other_modes(p):
    """What moves without the sound: (name, drawing (68, 2), double pole or None for constant, std)."""
    x, y = p[:, 0], p[:, 1]
    z = 0.16 - 1.9 * x**2 - 0.5 * (y - 0.03) ** 2  # depth: the nose is nearest
    z[27:36] += [0.02, 0.05, 0.08, 0.11, 0.05, 0.06, 0.07, 0.06, 0.05]
    one, none = np.ones(68), np.zeros(68)
    brow, lids, cheek = np.zeros((68, 2)), np.zeros((68, 2)), np.zeros((68, 2))
    brow[17:27, 1] = -np.array([0.7, 0.9, 1, 1, 0.9, 0.9, 1, 1, 0.9, 0.7])
    lids[[37, 38, 43, 44], 1], lids[[40, 41, 46, 47], 1] = 1, -0.3
    jaw = np.sin(np.linspace(0, np.pi, 17))
    cheek[0:17, 0] = np.sign(x[0:17]) * jaw * np.abs(np.cos(np.linspace(0, np.pi, 17)))
    chin, eyes, nose, mouth, brows = (np.zeros((68, 2)) for _ in range(5))
    chin[0:17, 1] = jaw**3
    eyes[17:22, 0], eyes[36:42, 0], eyes[22:27, 0], eyes[42:48, 0] = -1, -1, 1, 1
    nose[27:36, 1] = np.linspace(0, 1, 4).tolist() + [1] * 5
    mouth[48:68] = (p[48:68] - p[48:68].mean(0)) * [10, 4]
    brows[17:27, 1] = 1
    return [
        ("tx", np.stack([one, none], 1), 0.93, 0.020),
        ("ty", np.stack([none, one], 1), 0.93, 0.014),
        ("scale", p, 0.95, 0.035),
        ("roll", np.stack([-y, x], 1), 0.93, 0.055),
        ("yaw", np.stack([z, none], 1), 0.95, 0.10),
        ("pitch", np.stack([none, z], 1), 0.95, 0.08),
        ("brow", brow, 0.85, 0.007),
        ("lids", lids, 0.80, 0.004),
        ("cheek", cheek, None, 0.016),
        ("chin", chin, None, 0.014),
        ("eyes", eyes, None, 0.007),
        ("nose", nose, None, 0.008),
        ("mouth", mouth, None, 0.010),
        ("brows", brows, None, 0.008),
    ]


class SyntheticFace:
    """The exact distribution of the synthetic landmarks given the sound.

    x_t = mean + articulation_t @ modes + sum_j u_(j,t) drawing_j + N(0, NOISE^2)                     (136 coordinates)
    where articulation is a fixed causal filter of the phones' targets, and u_j is an AR(2) with a double pole (the four
    articulators' variations, head, brows, lids) or a constant of the clip (identity). Linear and Gaussian: the state
    of all u_j and their last values is followed exactly by a Kalman filter."""

    def __init__(self):
        p = mean_face()
        self.mean = (p + [0.5, 0.47]).reshape(136)
        self.modes = articulator_modes(p).reshape(4, 136)
        sources = [(mode, 0.70, std) for mode, std in zip(self.modes, (0.07, 0.12, 0.10, 0.08))]
        sources += [(mode.reshape(136), pole, std) for _, mode, pole, std in other_modes(p)]
        self.drawings = np.stack([mode for mode, _, _ in sources])  # (J, 136)
        self.dynamics = [(pole, std) for _, pole, std in sources]

    def mean_given_sound(self, articulation):
        """Exact E[x | sound]: articulation (..., T, 4) -> (..., T, 136)."""
        return self.mean + articulation @ self.modes

    def draw(self, articulation, rng):
        """Exact samples of p(x | sound): articulation (B, T, 4) -> (B, T, 136)."""
        B, T, _ = articulation.shape
        values = np.empty((B, T, len(self.dynamics)))
        for j, (pole, std) in enumerate(self.dynamics):
            values[:, :, j] = std * smooth_noise(rng, B, T, pole)
        return (
            self.mean_given_sound(articulation)
            + values @ self.drawings
            + NOISE * rng.normal(size=(B, T, 136))
        )

    def nll(self, landmarks, articulation):
        """Exact -log p(x | sound) of whole clips, nats per coordinate: (B, T, 136), (B, T, 4) -> (B,).

        In the span of the drawings (r directions) a Kalman filter; in the other 136 - r directions only noise. The
        filter's covariances do not depend on the data: one pass over time serves all clips."""
        y = np.asarray(landmarks, np.float64) - self.mean_given_sound(np.asarray(articulation, np.float64))
        B, T, D = y.shape
        u, singular, _ = np.linalg.svd(self.drawings.T, full_matrices=False)
        u = u[:, singular > 1e-9 * singular[0]]  # (136, r)
        w = y @ u  # (B, T, r)
        r = u.shape[1]
        nll = 0.5 * ((y**2).sum((1, 2)) - (w**2).sum((1, 2))) / NOISE**2
        nll += 0.5 * T * (D - r) * np.log(2 * np.pi * NOISE**2)
        A, Q, P, H = self.state_space(u)
        m = np.zeros((B, len(A)))
        for t in range(T):
            if t:
                m, P = m @ A.T, A @ P @ A.T + Q
            S = H @ P @ H.T + NOISE**2 * np.eye(r)  # covariance of the innovation
            e = w[:, t] - m @ H.T  # (B, r)
            gain = np.linalg.solve(S, H @ P)  # (r, n)
            nll += 0.5 * ((e * np.linalg.solve(S, e.T).T).sum(1) + np.linalg.slogdet(2 * np.pi * S)[1])
            m, P = m + e @ gain, P - gain.T @ S @ gain
            P = (P + P.T) / 2
        return nll / (T * D)

    def state_space(self, u):
        """A, Q, P0 (n, n) and H (r, n) of the state that holds every u_(j,t) and u_(j,t-1), seen through u.T."""
        n = sum(1 if pole is None else 2 for pole, _ in self.dynamics)
        A, Q, P, H = np.zeros((n, n)), np.zeros((n, n)), np.zeros((n, n)), np.zeros((u.shape[1], n))
        i = 0
        for (pole, std), drawing in zip(self.dynamics, self.drawings):
            H[:, i] = u.T @ drawing
            if pole is None:
                A[i, i], P[i, i] = 1, std**2
                i += 1
                continue
            A[i, i : i + 2], A[i + 1, i] = (2 * pole, -(pole**2)), 1
            Q[i, i] = std**2 * (1 - pole**2) ** 3 / (1 + pole**2)
            lag1 = 2 * pole / (1 + pole**2)
            P[i : i + 2, i : i + 2] = std**2 * np.array([[1, lag1], [lag1, 1]])
            i += 2
        return A, Q, P, H


def smooth_noise(rng, B, T, pole):
    """Stationary AR(2) noise of unit variance with a double pole (None: constant in time): (B, T)."""
    if pole is None:
        return np.repeat(rng.normal(size=(B, 1)), T, axis=1)
    e = rng.normal(size=(B, T)) * np.sqrt((1 - pole**2) ** 3 / (1 + pole**2))
    out = np.empty((B, T))
    lag1 = 2 * pole / (1 + pole**2)
    before = rng.normal(size=B)
    now = lag1 * before + np.sqrt(1 - lag1**2) * rng.normal(size=B)
    for t in range(T):
        before, now = now, 2 * pole * now - pole**2 * before + e[:, t]
        out[:, t] = now
    return out


def articulate(phones):
    """Phones (B, T) -> articulation (B, T, 4): the targets through a critically damped causal filter."""
    targets, rho = TARGETS[phones], COARTICULATION
    out = np.empty_like(targets)
    before = now = targets[:, 0]
    for t in range(targets.shape[1]):
        before, now = now, 2 * rho * now - rho**2 * before + (1 - rho) ** 2 * targets[:, t]
        out[:, t] = now
    return out
