"""Synthetic talkers: a voice, a face that follows it, and the exact likelihood of that face."""

import functools

import numpy as np

from media.sound import SAMPLE_RATE

FPS = 25
BLOCK, HALF = 256, 128  # samples that one filter of the voice serves, 16 ms; its fades


#        name  F1   F2    F3   voice noise noise Hz   open  width  pout press  (the articulators' targets)
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
VOICE = np.array([p[1:7] for p in PHONES], np.float32)  # (14, 6): F1 F2 F3 voice noise noise_hz
TARGETS = np.array([p[7:] for p in PHONES], float)  # (14, 4): open width pout press


def say(clips, frames, rng):
    """Random syllables, consonant (2-3 frames) and vowel (3-6), 12 % pauses, silence at both ends: (B, T)."""
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
    """Phones (B, T) -> float32 sound (B, T * 640), 16 kHz, peak 0.7."""
    return np.stack([utter(row, rng) for row in phones])


def utter(phones, rng):
    """Phones (T,) -> sound (T * 640,).

    A glottal pulse train with a wandering pitch, and noise, through a filter that changes every 16 ms: three
    resonators at the formants for the voice, one for the noise. Short-time Fourier filtering with overlap-add
    needs no loop over samples. All of it is causal: no sample before a phone's first frame depends on the
    phone."""
    import scipy.fft  # float32 stays float32; here, so that a machine without librosa's SciPy can train

    S = len(phones) * SAMPLE_RATE // FPS
    n = S // BLOCK + 1  # filters
    fades_in = (np.arange(n) * BLOCK - HALF).clip(0)  # a filter, before its block
    heard = phones[fades_in * FPS // SAMPLE_RATE]
    since = np.concatenate([heard[:1], heard[:1], heard])  # glide: over three blocks
    glides, which = np.unique(np.stack([since[:-2], since[1:-1], heard]), axis=1, return_inverse=True)
    which = which.ravel()  # one version of NumPy gives it two dimensions
    control = np.float32([0.25, 0.5, 0.25]) @ VOICE[glides.T]  # (N, 6), N a quarter of n
    control[:, :3] *= rng.uniform(0.95, 1.05)  # a longer or shorter throat
    share = control[:, 3] / (control[:, 3] + control[:, 4] + 1e-9)  # of the voice in the sound
    voice, noise = (control[:, 3] * share)[which], control[which, 4]
    pitch = rng.uniform(95, 220) * np.exp(0.03 * np.cumsum(rng.normal(size=n)).clip(-8, 8))
    source = np.zeros(HALF + (n + 1) * BLOCK, np.float32)
    hiss = 12**0.5 * (rng.random((n, BLOCK), np.float32) - np.float32(0.5))
    source[HALF:-BLOCK] = (hiss * noise[:, None]).ravel()
    phase = np.append(0, np.cumsum(pitch * (BLOCK / SAMPLE_RATE)))  # periods by the end of each block
    begin = np.interp(np.arange(1, phase[-1]), phase, np.arange(n + 1) * BLOCK)  # of each pulse, in samples
    sample = np.ceil(begin).astype(int)[:, None] + np.arange(8)  # half a millisecond: little above 4 kHz
    loudness = (10 * np.sqrt(2 / pitch) * voice)[(begin // BLOCK).astype(int).clip(max=n - 1), None]
    source[HALF + sample] += loudness * (1 - np.cos(np.pi / 4 * (sample - begin[:, None])))
    fade = np.hanning(BLOCK + 1)[:-1].astype(np.float32)
    fade = np.pad(fade, (0, HALF)) + np.pad(fade, (HALF, 0))  # these windows add up to one
    segments = np.lib.stride_tricks.sliding_window_view(source, BLOCK + HALF)[::BLOCK][:n] * fade
    spectrum = scipy.fft.rfft(segments, 3 * BLOCK) * response(control, share[:, None])[which]
    filtered = scipy.fft.irfft(spectrum, 3 * BLOCK).reshape(n, 3, BLOCK)
    sound = np.zeros((n + 2, BLOCK), np.float32)
    for k in range(3):  # overlap-add
        sound[k : n + k] += filtered[:, k]
    sound = sound.ravel()[HALF : HALF + S]
    return sound * np.float32(0.7 / max(sound.max(), -sound.min()))


def response(control, share):
    """Filters of voice and noise, mixed by the voice's share (N, 1): control (N, 6) -> complex64 (N, F)."""
    hertz = np.fft.rfftfreq(3 * BLOCK, 1 / SAMPLE_RATE).astype(np.float32)

    def resonance(k, width):  # 1 / response
        f = hertz / control[:, k, None]
        return 1 - f * f + 1j * (f * (np.float32(width) / control[:, k, None]))

    voiced = resonance(0, 80) * resonance(1, 110) * resonance(2, 170) * (1 + (hertz / 500) ** 2)
    return share / voiced + (1 - share) ** 2 * (hertz / 2000) / resonance(5, 1800)


NOISE = 0.0025  # std of the observation noise of every coordinate
COARTICULATION = 0.5  # double pole of the articulators' filter: about 80 ms
TURN, STEEP = 0.25, 3.0  # how far the head turns, in radians; how soon, in standard deviations of the sway
LIGHT = 0.38  # the noise is exp(LIGHT) times NOISE on one side and exp(-LIGHT) times on the other
LIP = 0.006  # twice the distance of lips that would just touch


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
    z -= z.mean()  # the head turns about its own centre
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
        ("tx", np.stack([one, none], 1), 0.95, 0.020),
        ("ty", np.stack([none, one], 1), 0.93, 0.014),
        ("scale", p, 0.95, 0.035),
        ("roll", np.stack([-y, x], 1), 0.93, 0.055),
        ("yaw", np.stack([z, none], 1), 0.95, 0.07),
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


class Bend:
    """Three habits of a face: a smooth invertible map of a frame x (..., D) -> y (..., D), with its Jacobian.

    Looking left or right: u = (x - mean) @ reads, the sway, is left as it is; phi = tanh(u) is seldom far
    from -1 or 1, and y moves by phi along `turn`. Light from one side: the coordinates (x - mean) @ rest,
    orthonormal, grow by exp(light phi). Because reads @ turn = reads @ rest = 0, these two are an affine
    coupling in other axes. Lips that cannot cross: the gap of each pair of points becomes (gap + sqrt(gap^2 +
    lip^2)) / 2, a softplus whose inverse is algebra."""

    def __init__(self, mean, reads, turn, rest, pairs, light, lip):
        assert np.allclose(reads @ turn, 0) and np.allclose(reads @ rest, 0)
        self.mean, self.reads, self.turn, self.rest, self.pairs = mean, reads, turn, rest, pairs
        self.light, self.lip = light, lip

    def side(self, x):
        """phi (...) of x, or of y before its lips: -1 looks left (to smaller x), 1 looks right."""
        return np.tanh((x - self.mean) @ self.reads)

    def forward(self, x):
        phi = self.side(x)[..., None]
        rest = (x - self.mean) @ self.rest
        y = x + phi * self.turn + (rest * np.expm1(self.light * phi)) @ self.rest.T
        upper, lower = self.pairs
        gap = y[..., lower] - y[..., upper]
        return self.open_lips(y, (np.sqrt(gap**2 + self.lip**2) - gap) / 2)

    def inverse(self, y):
        """y -> x and log |det dy/dx| (...)."""
        upper, lower = self.pairs
        gap = y[..., lower] - y[..., upper]
        x = self.open_lips(y, -(self.lip**2) / (4 * gap))
        # crossed lips have density 0
        slope = np.where(gap > 0, 1 / (1 + (self.lip / (2 * gap)) ** 2), np.inf)
        phi = self.side(x)
        rest = (x - self.mean) @ self.rest
        x = x - phi[..., None] * self.turn + (rest * np.expm1(-self.light * phi[..., None])) @ self.rest.T
        return x, np.log(slope).sum(-1) + self.light * phi * self.rest.shape[1]

    def open_lips(self, x, by):
        """Move the points of each pair apart by `by` (..., pairs)."""
        upper, lower = self.pairs
        x = x.copy()
        x[..., upper] -= by / 2
        x[..., lower] += by / 2
        return x


class SyntheticFace:
    """The exact distribution of the synthetic landmarks given the sound.

    x_t = mean + articulation_t @ modes + sum_j u_(j,t) drawing_j + N(0, NOISE^2)     (136 coordinates)
    y_t = bend(x_t)                                                                   (the landmarks)
    where articulation is a fixed causal filter of the phones' targets, and u_j is an AR(2)
    with a double pole (the four articulators' variations, head, brows, lids) or a constant of the clip
    (identity). x is linear and Gaussian given the sound: a Kalman filter follows the state of all u_j and
    their last values exactly. y is neither, and as exact: who sways to one side looks to that side and stands
    in other light, and lips cannot cross. gaussian: without the bend, y = x."""

    def __init__(self, gaussian=False):
        p = mean_face()
        self.mean = (p + [0.5, 0.47]).reshape(136)
        self.modes = articulator_modes(p).reshape(4, 136)
        sources = [("", mode, 0.70, std) for mode, std in zip(self.modes, (0.07, 0.12, 0.10, 0.08))]
        sources += [(name, mode.reshape(136), pole, std) for name, mode, pole, std in other_modes(p)]
        names = [name for name, *_ in sources]
        self.drawings = np.stack([mode for _, mode, _, _ in sources])  # (J, 136)
        self.dynamics = [(pole, std) for *_, pole, std in sources]
        u, singular, _ = np.linalg.svd(self.drawings.T)
        # span (136, r), rest: the others
        self.span, rest = np.split(u, [int((singular > 1e-9 * singular[0]).sum())], axis=1)
        sway, std = names.index("tx"), dict(zip(names, self.dynamics))["tx"][1]
        reads = np.linalg.pinv(self.drawings)[:, sway] * (STEEP / std)  # blind to every drawing but the sway
        pairs = 2 * np.array([[61, 62, 63], [67, 66, 65]]) + 1  # y of the inner lips
        turn = TURN * self.drawings[names.index("yaw")]
        self.yaw = np.linalg.pinv(self.drawings)[:, names.index("yaw")] / TURN
        self.bend = None if gaussian else Bend(self.mean, reads, turn, rest, pairs, LIGHT, LIP)

    def mean_given_sound(self, articulation):
        """Exact E[y | sound]: articulation (..., T, 4) -> (..., T, 136). The head has no side on average."""
        x = self.mean + articulation @ self.modes
        if self.bend is None:
            return x
        upper, lower = self.bend.pairs
        spread = (self.drawings[:, lower] - self.drawings[:, upper]) * [[std] for _, std in self.dynamics]
        spread = np.sqrt((spread**2).sum(0) + 2 * NOISE**2)  # (3,): the gaps are Gaussian before the bend
        nodes, weights = np.polynomial.hermite_e.hermegauss(64)
        gap = (x[..., lower] - x[..., upper])[..., None] + spread[:, None] * nodes  # (..., T, 3, 64)
        by = (np.sqrt(gap**2 + self.bend.lip**2) - gap) / 2 @ (weights / weights.sum())
        return self.bend.open_lips(x, by)

    def turned(self, landmarks):
        """How far heads are turned, (..., 136) -> (...): near -1 to the left (smaller x), near 1 right."""
        return (landmarks - self.mean) @ self.yaw

    def draw(self, articulation, rng):
        """Exact samples of p(y | sound): articulation (B, T, 4) -> (B, T, 136)."""
        B, T, _ = articulation.shape
        pole, std = np.array([(1 if pole is None else pole, std) for pole, std in self.dynamics]).T
        x = self.mean + articulation @ self.modes + std * smooth_noise(rng, B, T, pole) @ self.drawings
        x += NOISE * rng.normal(size=x.shape)
        return x if self.bend is None else self.bend.forward(x)

    def nll(self, landmarks, articulation):
        """Exact -log p(y | sound) of whole clips, nats per coordinate: (B, T, 136), (B, T, 4) -> (B,).

        -log p(x | sound) + log |det dy/dx|; for x a Kalman filter in the span of the drawings (r directions),
        only noise in the other 136 - r."""
        x, articulation = np.asarray(landmarks, np.float64), np.asarray(articulation, np.float64)
        x, logdet = (x, np.zeros(x.shape[:2])) if self.bend is None else self.bend.inverse(x)
        x = x - self.mean - articulation @ self.modes
        B, T, D = x.shape
        w = x @ self.span  # (B, T, r)
        nll = logdet.sum(1) + 0.5 * ((x**2).sum((1, 2)) - (w**2).sum((1, 2))) / NOISE**2
        nll += 0.5 * T * (D - w.shape[2]) * np.log(2 * np.pi * NOISE**2)
        A, H, frames = self.kalman(T)
        m = np.zeros((B, len(A)))
        for t, (whiten, gain, half_logdet) in enumerate(frames):
            m = m @ A.T if t else m
            e = w[:, t] - m @ H.T  # the innovation (B, r)
            nll += 0.5 * ((e @ whiten) ** 2).sum(1) + half_logdet
            m = m + e @ gain
        return nll / (T * D)

    @functools.cache
    def kalman(self, T):
        """A, H, and for each frame what whitens its innovation (r, r), the gain (r, n), half log det(2 pi S).

        The covariances do not depend on the data: one pass over time serves all clips of T frames."""
        A, Q, P, H = self.state_space(self.span)
        frames = []
        for t in range(T):
            P = A @ P @ A.T + Q if t else P
            S = H @ P @ H.T + NOISE**2 * np.eye(len(H))  # covariance of the innovation
            gain = np.linalg.solve(S, H @ P)
            frames.append(
                (np.linalg.cholesky(np.linalg.inv(S)), gain, 0.5 * np.linalg.slogdet(2 * np.pi * S)[1])
            )
            P = P - gain.T @ S @ gain
            P = (P + P.T) / 2
        return A, H, frames

    def state_space(self, u):
        """A, Q, P0 (n, n), H (r, n) of the state that holds every u_(j,t) and u_(j,t-1), seen through u.T."""
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


def smooth_noise(rng, B, T, poles):
    """Stationary AR(2) noises of unit variance with double poles (J,), 1 for a constant: (B, T, J)."""
    lag1 = 2 * poles / (1 + poles**2)
    innovation = np.sqrt((1 - poles**2) ** 3 / (1 + poles**2))
    out = rng.normal(size=(B, T, len(poles))) * innovation
    before = rng.normal(size=(B, len(poles)))
    now = lag1 * before + np.sqrt(1 - lag1**2) * rng.normal(size=(B, len(poles)))
    for t in range(T):
        before, now = now, 2 * poles * now - poles**2 * before + out[:, t]
        out[:, t] = now
    return out


def articulate(phones):
    """Phones (B, T) -> articulation (B, T, 4): the targets through a critically damped causal filter.

    The lips start a frame after the sound: by then it can be told which phone it is."""
    rho, targets = COARTICULATION, TARGETS[np.pad(phones, ((0, 0), (1, 0)), "edge")[:, :-1]]
    out = np.empty_like(targets)
    before = now = targets[:, 0]
    for t in range(targets.shape[1]):
        before, now = now, 2 * rho * now - rho**2 * before + (1 - rho) ** 2 * targets[:, t]
        out[:, t] = now
    return out
