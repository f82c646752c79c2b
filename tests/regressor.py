"""What of a sound decides the mouth: a causal regressor in place of a flow, whose training takes half a
minute of a core, to choose the numbers of the sound by. Prints one Markdown row.

    python tests/regressor.py --data DIR --others DIR [DIR ...] [--lead 0] [--level 0] [--vtlp 0] ...

A ConditionTCN from the mel to the gap of the lips, by squared error, on the training windows of --data as a
flow hears them. In the row: the correlation over a clip of this gap with the recorded one, mean over 60
validation clips of --data and up to 60 clips of each of --others; the gap in a second of silence before the
first word, in distances of the outer eye corners; means over training seeds, the least and the greatest.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from faces import gap, hear, mean_correlation

from media import sound
from prepare_data import DEFAULTS
from talkingflow import Clips, ConditionTCN, Config, schedule

HISS = np.random.default_rng(0).normal(0, 3, 16000).round()
GAINS = {f"{gain:+d} dB": {"gain": gain} for gain in (0, -24, -30, 12)}
OWN = GAINS | {"8 kHz": {"narrow": True}, "noise 10 dB below": {"snr": 10}}
SILENCES = {"open in digital silence": {"before": 0 * HISS}, "in hiss": {"before": HISS}}


def train(clips, config):
    """A function from log-mel columns (T, M) to the gap of the lips (T,)."""
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)

    def batch(count):
        windows = clips.draw(count, config.seq_len, generator)
        x, c = clips.batch(windows, config.seq_len, config.lead, 0, generator, **sound.heard(config))
        return torch.from_numpy(np.stack([gap(track) for track in x.numpy()])), c

    (y_std, y_mean), (c_std, c_mean) = (torch.std_mean(v, (0, 1)) for v in batch(512))
    network = ConditionTCN(clips.cond_dim, 1, config)
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.99), weight_decay=config.weight_decay)

    def mouth(c):
        c = (c - c_mean) / c_std.clamp_min(1e-3)
        return network(c, c)[..., 0] * y_std + y_mean

    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * schedule(step, config.steps, config)
        y, c = batch(config.batch_size)
        optimizer.zero_grad()
        (F.mse_loss(mouth(c), y) / y_std**2).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.grad_clip)
        optimizer.step()
    network.eval()
    return lambda columns: mouth(torch.from_numpy(columns)[None])[0].detach().numpy()


def judge(mouth, clips, chosen, lead, ways):
    """A number for each of `ways` to hear the clips."""
    truth = [gap(np.array(clips.landmarks[clip["start"] :][: clip["frames"]])) for clip in chosen]
    for how in ways.values():
        gaps = [mouth(columns) for columns in hear(clips, chosen, clips.hearing, lead, **how)]
        if "before" in how:
            yield np.mean([g[:20] for g in gaps])
        else:
            yield mean_correlation([(g[: len(t)], t[: len(g)]) for g, t in zip(gaps, truth, strict=True)])


def hear_anew(clips, level):
    """The folder's sound at another decay of the level."""
    clips.meta["mel"] |= {"level": level}
    whole = [hear(clips, [clip], clips.hearing, 0)[0][: clip["frames"]] for clip in clips.clips]
    clips.mel = np.concatenate(whole)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--others", nargs="*", default=[], help="folders of strangers")
    parser.add_argument("--seeds", type=int, default=3, help="trainings, seeds 0, 1, ... [3]")
    parser.add_argument("--steps", type=int, default=2500, help="[2500]")
    for name, help in (("lead", "frames"), ("vtlp", "log-factor"), ("tilt", "nats"), ("channel", "share")):
        kind = type(DEFAULTS[name])
        parser.add_argument(f"--{name}", type=kind, default=DEFAULTS[name], help=f"{help} [{DEFAULTS[name]}]")
    parser.add_argument("--level", type=float, default=0.01, help="decay of the level, nats a column [0.01]")
    parser.add_argument("--quiet", type=float, default=sound.QUIET, help=f"its start [{sound.QUIET}]")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sound.QUIET = args.quiet
    clips, *others = (Clips(folder) for folder in (args.data, *args.others))
    for folder in (clips, *others):
        hear_anew(folder, args.level)
    config = Config(cond_dim=clips.cond_dim, seq_len=64, steps=args.steps, lr=6e-3, dropout=0.05)
    config, rows = dataclasses.replace(config, lead=args.lead, **sound.heard(args)), []
    for seed in range(args.seeds):
        mouth = train(clips, dataclasses.replace(config, seed=seed))
        row = [*judge(mouth, clips, clips.split("val")[:60], args.lead, OWN | SILENCES)]
        for other in others:
            row += judge(mouth, other, other.clips[:60], args.lead, GAINS)
        rows.append(row)
    names = [*OWN, *SILENCES, *(f"{Path(f).name} {gain}" for f in args.others for gain in GAINS)]
    print(f"| {' '.join(sys.argv[1:])} | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    cells = [f"{np.mean(v):.3f} [{min(v):.3f}, {max(v):.3f}]" for v in zip(*rows, strict=True)]
    print(f"| | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
