"""The four compared systems, from their papers and released code, in our words and on our features. What
differs from a release is said in DEVIATIONS, which is printed under the table. A system is made from training
clips x (N, T, D), c (N, T, M); of a batch, with `fine` as Held.fine gives it, loss(x, c, fine) is a scalar,
draw(x, c, fine, draws, generator) a track (K, N, T, D): one for a regressor."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

from media.console import UserError
from media.landmarks import points
from media.sound import heard
from study.syncnet import SyncNet

# On a CPU: the releases' widths over this, their LSTMs' over 2, Lu's head's over 4; 1 with --release-sizes
SHRINK = 8
DEVIATIONS = {
    name: " ".join(text.split())
    for name, text in {
        "all": """Tracks are this project's: face box, head motion kept, identity kept; every system hears
        the same look-ahead as the flows instead of its own delay; Adam at 1e-3 with a cosine, best of 8
        validations, as many steps as the flows (8 windows each, Chen and Ji 16 times 16 frames as released)
        instead of days at the release's rate with batches of 128 (Eskimez) and 32 (Lu); the flows' other
        voices, rooms and microphones in training; Adam's usual betas; gradients clipped at 1; Keras', He's
        or Glorot's start; widths are the release's over {size} (where that is not 1: LSTMs over 2, Lu's
        head over 4). Test-time edits of the releases (mouth amplification, smoothing) are left out""",
        "eskimez": """our mel bands and window in place of 64 bands of 40 ms; no alignment by the eyes and no
        identity removal; no delayed target; what each layer reads is standardised, and the last one starts at
        the mean face""",
        "chen": """MFCC of our 40-band mel by DCT, of the sound as recorded, the one system that hears no
        other voices, rooms and microphones in training; the 28-column patch ends with the look-ahead; 20
        components in place of 6, because these faces keep their head motion, which takes the first ones;
        the example is the window's own first true frame, so this row is told the person's face""",
        "ji": """68 points and 20 components in place of 106 and 16; no emotion labels exist here: the emotion
        branch learns with the rest and its code is whatever lowers the loss; without labels and aligned
        sentence pairs there is no classifier and no cross-reconstruction to pre-train on; the example is the
        mean face, as released""",
        "lu": """two mel columns in place of the frozen APC features and their projection; lips and chin in
        the plane of the mean face in place of 25 points in 3-D; the head is the plane's affine map (6 numbers
        and 6 velocities) in place of 3-D pose, its least sigma of 0.03 in standard deviations of that pose;
        windows of the flows' length in place of 240 frames; sampled with sigma times 0.3, as released,
        without the smoothing that follows there""",
    }.items()
}

PAPER = """
Quoted from the paper, other data (Table 1: Obama addresses; Table 2: GRID): not to be compared digit by digit
with ours

| row | MOS | SyncNet | L_MOR | GRID SyncNet | GRID L_MOR |
|---|---|---|---|---|---|
| Eskimez et al. | 3.3184 | .8752 ± .3388 | .0852 | .5879 ± .2185 | .0774 |
| Chen et al. | 3.2275 | 1.1430 ± .5814 | .1798 | .5361 ± .2429 | .0747 |
| Ji et al. | 2.8377 | 1.3112 ± .4850 | .0891 | 1.1486 ± .1962 | .1847 |
| Lu et al. | 3.4572 | .6308 ± .2314 | .0857 | .9761 ± .2404 | .1548 |
| Baseline | | 1.0183 ± .2793 | .1021 | | |
| + ConditionTCN | | .3940 ± .2754 | .0916 | | |
| full | 3.5921 | .2978 ± .1586 | .0441 | .3591 ± .1302 | .0918 |
| ground truth | 3.9605 | .1785 ± .1046 | 0 | .1876 ± .1212 | 0 |

Doubts. The row labels of Table 1 are lost in the text we have and are put back by order. L_MOR of Chen and Ji
may be swapped: the text has Ji's mouths all open, and Table 2 gives Ji the large value. Not given: frame
rate, number of points, mel settings, depth and width, split, what 0..1 is relative to, how many samples stand
behind a score of a random model, whether ± is over clips or frames, how many raters. One random draw is
scored against one recording, which costs a perfect sampler sqrt(2); a constant mean mouth already has .055 to
.110 on tracks of this kind. Eskimez and Chen were trained on GRID, the full model on Obama. That the Baseline
does better than Chen and Ji holds for SyncNet, not for L_MOR: .1021 against Ji's .0891. A lead of 3.5921 over
3.4572 in MOS needs about 861 ratings a system to be told from chance, if their sd is 1."""


class SigmoidLSTM(nn.Module):
    """Keras' LSTM(activation="sigmoid", dropout=.2, recurrent_dropout=.2) with Keras' start, as [3] stacks
    it: x (B, T, C) -> (B, T, H) in 0..1. What it reads is standardised once (`begin`), or outputs near 0.3
    that differ by 0.01 would send gradients of 1e-10 down four such layers, below Adam's epsilon."""

    def __init__(self, inputs, H, dropout=0.2):
        super().__init__()
        self.inputs, self.recurrent, self.dropout = (
            nn.Linear(inputs, 4 * H),
            nn.Linear(H, 4 * H, bias=False),
            dropout,
        )
        nn.init.xavier_uniform_(self.inputs.weight)
        nn.init.orthogonal_(self.recurrent.weight)
        # forget gates start open
        self.inputs.bias.data = torch.tensor([0.0, 1.0, 0.0, 0.0]).repeat_interleave(H)
        # mean, standard deviation
        self.register_buffer("scale", torch.tensor([[0.0], [1.0]]).repeat(1, inputs))

    def begin(self, x):
        """Measure what this layer reads, x (B, T, C); its outputs, for the next one."""
        late = x[:, x.shape[1] // 4 :]  # past the start-up from the zero state
        self.scale = torch.stack([late.mean((0, 1)), late.std((0, 1)).clamp_min(1e-3)])
        return self.eval()(x)

    def forward(self, x):
        x = (x - self.scale[0]) / self.scale[1]

        def drop(*size):  # one mask for all frames
            return F.dropout(x.new_ones(size), self.dropout, self.training)

        cell = h = x.new_zeros(len(x), self.recurrent.in_features)
        mask, out = drop(*h.shape), []
        for frame in self.inputs(x * drop(len(x), 1, x.shape[2])).unbind(1):
            i, f, o, new = (frame + self.recurrent(h * mask)).sigmoid().chunk(4, 1)
            cell = f * cell + i * new
            h = o * cell.sigmoid()
            out.append(h)
        return torch.stack(out, 1)


class Eskimez(nn.Module):
    """[3]: deltas of log-mel and three past frames -> four sigmoid LSTMs, the last of which is the face; mean
    squared error."""

    T, count = None, 8  # frames and windows a step

    def __init__(self, held, x, c, size):
        super().__init__()
        H, M, D = 256 // min(size, 2), c.shape[2], x.shape[2]
        self.layers = nn.Sequential(
            SigmoidLSTM(8 * M, H), SigmoidLSTM(H, H), SigmoidLSTM(H, H), SigmoidLSTM(H, D)
        )
        self.register_buffer("unit", x.var((0, 1)).mean())  # for a loss of order 1
        last = self.layers[3]
        # near the mean face: gates at sigmoid(1) rest the cell at 1.99, outputs reach 0.88
        with torch.no_grad():
            last.inputs.weight *= 0.1
            last.recurrent.weight *= 0.1
            last.inputs.bias.fill_(1)
            last.inputs.bias[2 * D : 3 * D] = (x.mean((0, 1)) / 0.88).clamp(0.02, 0.98).logit()
            h = self.hear(c[:64])
            for layer in self.layers:
                h = layer.begin(h)
        self.train()

    def hear(self, c):
        """First and second differences of log-mel c (B, T, M), of this frame and three past ones -> (B, T, 8
        M)."""

        def past(v, i):
            return torch.cat([v[:, :1].expand(-1, i, -1), v[:, : v.shape[1] - i]], 1)

        delta = c - past(c, 1)
        both = torch.cat([delta, delta - past(delta, 1)], 2)
        return torch.cat([past(both, i) for i in range(4)], 2)

    def forward(self, c):
        return self.layers(self.hear(c))

    def loss(self, x, c, fine):
        return F.mse_loss(self(c), x) / self.unit

    def draw(self, x, c, fine, draws, generator):
        return self(c)[None]


class PCA(nn.Module):
    """The first principal components of x (N, T, D), scaled so that the largest code has variance 1."""

    def __init__(self, x, components):
        super().__init__()
        self.register_buffer("mean", x.mean((0, 1)))
        frames = (x - self.mean).flatten(0, 1)
        frames = frames[:: max(1, len(frames) // 20000)]
        _, singular, axes = torch.linalg.svd(frames, full_matrices=False)
        self.register_buffer("axes", axes[:components])
        self.unit = float(singular[0] / len(frames) ** 0.5)  # so that codes are of order 1

    def encode(self, x):
        return (x - self.mean) @ self.axes.T / self.unit

    def decode(self, code):
        return self.mean + self.unit * code @ self.axes


def convolutions(*layers):
    """("pool", size, stride) or (in, out) of a 3x3 convolution with batch norm and ReLU; channels last: a
    fifth faster."""
    parts = []
    for layer in layers:
        if layer[0] == "pool":
            parts.append(nn.MaxPool2d(*layer[1:]))
        else:
            parts += [nn.Conv2d(*layer, 3, padding=1, bias=False), nn.BatchNorm2d(layer[1]), nn.ReLU()]
    return nn.Sequential(*parts, nn.Flatten()).to(memory_format=torch.channels_last)


def perceptron(*sizes):
    """Linear layers of these sizes, each followed by a ReLU; He's start: PyTorch's own loses most of the
    signal."""
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))


def three_lstms(inputs, H):
    """Three LSTMs, as [4] to [6] stack them, with Glorot's start: through PyTorch's own 1 % of a movement
    gets out."""
    net = nn.LSTM(inputs, H, 3, batch_first=True)
    for name, weight in net.named_parameters():
        for gate in weight.data.chunk(4) if weight.dim() == 2 else ():
            (nn.init.orthogonal_ if "_hh_" in name else nn.init.xavier_uniform_)(gate)
    return net


class Chen(nn.Module):
    """[4] ATNet: MFCC patches (28, 12) -> convolutions -> 256; an example face's PCA code -> 512; three LSTMs
    -> PCA codes."""

    T, count, EMOTION = 17, 16, 0  # the frame before the clip and 16 frames; numbers of an emotion code

    def __init__(self, held, x, c, size, components=20):
        super().__init__()
        w, self.lead, self.pca = 64 // size, held.lead, PCA(x, components)
        k = torch.arange(1, 13)[:, None] * (torch.arange(SyncNet.BANDS) + 0.5) * math.pi / SyncNet.BANDS
        self.register_buffer("dct", (2 / SyncNet.BANDS) ** 0.5 * k.cos())  # cepstra 1..12, c0 dropped
        self.sound = nn.Sequential(
            convolutions(
                (1, w),
                (w, 2 * w),
                ("pool", 3, (1, 2)),
                (2 * w, 4 * w),
                (4 * w, 4 * w),
                (4 * w, 8 * w),
                ("pool", 3, (2, 2)),
            ),
            perceptron(192 * w, 32 * w, 256),
        )
        self.example = perceptron(components, 256, 512)
        H = 256 // min(size, 2)
        self.lstm = three_lstms(768 + self.EMOTION, H)
        self.out = nn.Linear(H, components)

    def patches(self, fine):
        """(B, 4 (T + 6 + lead), 40) -> MFCC of the 28 columns up to the end of frame t + lead: (B T, 1, 28,
        12)."""
        mfcc = (fine[:, 4 * self.lead :] @ self.dct.T).unfold(1, 28, 4).transpose(2, 3)
        return mfcc.flatten(0, 1)[:, None]

    def features(self, patches):
        return self.sound(patches)

    def forward(self, fine, example):
        B, T = len(fine), fine.shape[1] // 4 - 6 - self.lead
        h = self.features(self.patches(fine)).view(B, T, -1)
        h = torch.cat([self.example(example)[:, None].expand(-1, T, -1), h], 2)
        return self.out(self.lstm(h)[0])

    def loss(self, x, c, fine):
        return F.mse_loss(self(fine[:, 4:], self.pca.encode(x[:, 0])), self.pca.encode(x[:, 1:]))

    def draw(self, x, c, fine, draws, generator):
        return self.pca.decode(self(fine, self.pca.encode(x[:, 0])))[None]


class Ji(Chen):
    """[5] EVP's audio-to-landmark network: ATNet's sound encoder beside an emotion encoder of the same
    patches (12, 28) -> 128; it predicts the difference from the mean face, and its loss counts landmarks ten
    times beside the codes."""

    EMOTION = 128

    def __init__(self, held, x, c, size):
        super().__init__(held, x, c, size)
        w = 64 // size
        self.emotion = nn.Sequential(
            convolutions(
                (1, w),
                ("pool", (1, 3), (1, 2)),
                (w, 2 * w),
                (2 * w, 4 * w),
                ("pool", (12, 1)),
                (4 * w, 8 * w),
                ("pool", (1, 2)),
            ),
            perceptron(48 * w, 32 * w, self.EMOTION),
        )

    def features(self, patches):
        return torch.cat([self.sound(patches), self.emotion(patches.transpose(2, 3))], 1)

    def loss(self, x, c, fine):
        code = self(fine[:, 4:], torch.zeros_like(self.pca.encode(x[:, 0])))
        unit = self.pca.unit
        return F.mse_loss(code, self.pca.encode(x[:, 1:])) + 10 * F.mse_loss(
            self.pca.decode(code) / unit, x[:, 1:] / unit
        )

    def draw(self, x, c, fine, draws, generator):
        return self.pca.decode(self(fine, torch.zeros_like(self.pca.encode(x[:, 0]))))[None]


class Lu(nn.Module):
    """[6] Live Speech Portraits: an LSTM moves the mouth; a WaveNet that sees its own past draws the head's
    motion, a Gaussian with diagonal covariance over 6 pose numbers and their velocities, given the sound."""

    T, count, MOUTH, STILL = None, 8, [*range(4, 13), *range(48, 68)], slice(17, 48)

    def __init__(self, held, x, c, size):
        super().__init__()
        H, M, C, wide = 512 // size, 2 * c.shape[2], 128 // min(size, 4), 256 // min(size, 2)
        self.register_buffer("face", points(x.mean((0, 1))))  # (68, 2)
        # solve (3, 31)
        self.register_buffer("solve", torch.linalg.pinv(F.pad(self.face[self.STILL], (0, 1), value=1.0)))
        pose = self.pose(x)
        self.register_buffer("pose_scale", torch.stack([pose.mean((0, 1)), pose.std((0, 1)) + 1e-6]))
        self.register_buffer("sound_scale", torch.stack([c.mean((0, 1)), c.std((0, 1)) + 1e-6]).repeat(1, 2))
        self.register_buffer(
            "mouth_scale", (self.mouth(x) - self.face[self.MOUTH]).flatten(2).std((0, 1)) + 1e-6
        )
        self.down = nn.Sequential(nn.Linear(M, H), nn.BatchNorm1d(H), nn.LeakyReLU(0.2), nn.Linear(H, H))
        self.lstm = three_lstms(H, wide)
        self.up = nn.Sequential(
            nn.Linear(wide, H),
            nn.BatchNorm1d(H),
            nn.LeakyReLU(0.2),
            nn.Linear(H, H),
            nn.BatchNorm1d(H),
            nn.LeakyReLU(0.2),
            nn.Linear(H, 2 * len(self.MOUTH)),
        )
        self.start = nn.Sequential(
            nn.Conv1d(12, C, 1), nn.LeakyReLU(0.2), nn.Conv1d(C, C, 1), nn.LeakyReLU(0.2)
        )
        self.dilated = nn.ModuleList(nn.Conv1d(C, 2 * C, 2, dilation=2**i) for i in [*range(7)] * 2)
        self.cond, self.residual = (
            nn.Linear(M, 14 * 2 * C),
            nn.ModuleList(nn.Conv1d(C, C, 1) for _ in range(14)),
        )
        self.skip = nn.ModuleList(nn.Conv1d(C, 2 * C, 1) for _ in range(14))
        self.end = nn.Sequential(nn.ReLU(), nn.Conv1d(2 * C, 2 * C, 1), nn.ReLU(), nn.Conv1d(2 * C, 24, 1))

    def pose(self, x):
        """The affine map (..., 6) that takes the mean face's brows, nose and eyes nearest to a frame's."""
        return (self.solve @ points(x)[..., self.STILL, :]).flatten(-2)

    def mouth(self, x):
        """Lips and chin seen in the mean face's frame (..., 29, 2)."""
        pose = self.pose(x).unflatten(-1, (3, 2))
        return (points(x)[..., self.MOUTH, :] - pose[..., 2:, :]) @ torch.linalg.inv(pose[..., :2, :])

    def sound(self, c):
        before = torch.cat([c[:, :1], c[:, :-1]], 1)
        return (torch.cat([before, c], 2) - self.sound_scale[0]) / self.sound_scale[1]

    def move_mouth(self, s):
        """(B, T, 2M) -> (B, T, 58), in standard deviations of the mouth."""
        h = self.down(s.flatten(0, 1)).unflatten(0, s.shape[:2])
        return self.up(self.lstm(h)[0].flatten(0, 1)).unflatten(0, s.shape[:2])

    def head(self, past, cond, memory):
        """past (B, n, 12): the frame before each; cond (B, n, 28 C). Mean and log sigma (B, n, 12); memory:
        each layer's inputs."""
        h, skips = self.start(F.dropout1d(past.transpose(1, 2), 0.5, self.training)), 0
        layers = zip(self.dilated, self.residual, self.skip, cond.transpose(1, 2).chunk(14, 1), strict=True)
        for dilated, residual, skip, sound in layers:
            d = dilated.dilation[0]
            window = torch.cat([memory.get(dilated, h.new_zeros(*h.shape[:2], d)), h], 2)
            memory[dilated] = window[:, :, -d:]
            tanh, sigmoid = (dilated(window) + sound).chunk(2, 1)
            gated = tanh.tanh() * sigmoid.sigmoid()
            h, skips = h + residual(gated), skips + skip(gated)
        mean, log_sigma = self.end(skips).transpose(1, 2).chunk(2, 2)
        return mean, log_sigma.clamp(math.log(0.03), 3)  # the release's floor

    def motion(self, x):
        """Pose and velocity (B, T, 12) in standard deviations of the pose."""
        pose = (self.pose(x) - self.pose_scale[0]) / self.pose_scale[1]
        return torch.cat([pose, F.pad(pose[:, 1:] - pose[:, :-1], (0, 0, 1, 0))], 2)

    def loss(self, x, c, fine):
        s, motion = self.sound(c), self.motion(x)
        mean, log_sigma = self.head(F.pad(motion[:, :-1], (0, 0, 1, 0)), self.cond(s), {})
        nll = (0.5 * ((motion - mean) / log_sigma.exp()) ** 2 + log_sigma).mean()
        target = (self.mouth(x) - self.face[self.MOUTH]).flatten(2) / self.mouth_scale
        return nll + F.mse_loss(self.move_mouth(s), target)

    def draw(self, x, c, fine, draws, generator, sigma=0.3):
        s = self.sound(c)
        lips = self.face[self.MOUTH] + (self.move_mouth(s) * self.mouth_scale).unflatten(2, (-1, 2))
        still = self.face.expand(*c.shape[:2], 68, 2).clone()
        still[:, :, self.MOUTH] = lips
        cond, memory, frames = self.cond(s).repeat(draws, 1, 1), {}, []
        past = cond.new_zeros(len(cond), 1, 12)
        for t in range(c.shape[1]):
            mean, log_sigma = self.head(past, cond[:, t : t + 1], memory)
            past = mean + sigma * log_sigma.exp() * torch.randn(mean.shape, generator=generator).to(
                mean.device
            )
            frames.append(past[:, 0, :6])
        pose = torch.stack(frames, 1) * self.pose_scale[1] + self.pose_scale[0]  # (K B, T, 6)
        face = F.pad(still, (0, 1), value=1.0).repeat(draws, 1, 1, 1) @ pose.unflatten(2, (3, 2))
        return face.flatten(2).unflatten(0, (draws, -1))


SYSTEMS = {
    "eskimez": ("Eskimez et al. [3]", Eskimez),
    "chen": ("Chen et al., ATNet [4], told the first frame", Chen),
    "ji": ("Ji et al., EVP [5]", Ji),
    "lu": ("Lu et al., Live Speech Portraits [6]", Lu),
}


def columns_for(net, held, windows, T):
    """The sound at four columns a frame, for the systems that want MFCC; the others hear c."""
    return held.fine(windows, T, held.lead).to(held.device) if isinstance(net, Chen) else None


def fit(net, held, steps, seed):
    """Adam on random training windows, whose sound varies as it does for the flows, cosine from 1e-3; the
    weights that did best of 8 validations are kept."""
    clips, T = held.clips, net.T or held.T
    other = heard(held.config)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)

    def loss(windows, generator, **other):
        x, c = clips.batch(windows, T, held.lead, held.noise, generator, **other)
        return net.loss(x.to(held.device), c.to(held.device), columns_for(net, held, windows, T))

    best, kept, fixed = math.inf, None, clips.windows("val", T, 32)
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / (steps + 1)))
        optimizer.zero_grad()
        loss(clips.draw(net.count, T, generator), generator, **other).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if step % max(1, steps // 8) == 0 or step == steps:
            net.eval()
            with torch.no_grad():
                now = float(loss(fixed, torch.Generator().manual_seed(0)))  # the same noise each time
            net.train()
            if now < best:
                best, kept = now, {key: value.clone() for key, value in net.state_dict().items()}
            print(f"step {step:5d}/{steps}: val loss {now:.5f}", flush=True)
    if not kept:
        raise UserError(f"{type(net).__name__}: no finite validation loss vs at least one. Mend the data")
    net.load_state_dict(kept)
    return net.eval()
