"""What --head and --lips still: prints how far each part of a sampled face moves, as a Markdown table.

    python tests/controls.py --data DIR [--checkpoint FILE] [--limit 12]

Root mean square over test clips of a part's standard deviation over time, in distances of the outer eye
corners: nose and outline where they are, lips and eyes about their own centres; and the correlation over a
clip of the mouth's opening with that of the face that nothing steers.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from faces import mean_correlation

from media.landmarks import interocular, mouth_opening, points

PARTS = {"nose": slice(27, 36), "outline": slice(0, 17), "lips": slice(48, 68), "eyes": slice(36, 48)}
STEERED = [(1, 1), (0, 1), (0.5, 1), (1, 0), (1, 0.5), (1, 1.5), (0, 0)]  # head, lips


def spread(track, part):
    """Standard deviation over time of a part of the points (T, 68, 2) of a face."""
    p = track[:, PARTS[part]] / interocular(track).mean()
    if part in ("lips", "eyes"):
        p = p - p.mean(1, keepdims=True)
    return np.sqrt(p.var(0).sum(-1).mean())


def main():
    from talkingflow import Clips, Talker, load_checkpoint

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--checkpoint", default=ROOT / "pretrained" / "grid.pt")
    parser.add_argument("--limit", type=int, default=12, help="clips [12]")
    args = parser.parse_args()
    (flow, state), clips, plain = load_checkpoint(args.checkpoint), Clips(args.data), None
    print(f"| --head, --lips | {' | '.join(PARTS)} | mouth r |\n|{'---|' * (len(PARTS) + 2)}")
    for head, lips in STEERED:
        tracks = []
        for clip in clips.split("test")[: args.limit]:
            sound = clips.audio[clip["audio_start"] :][: clip["audio_samples"]] / np.float32(32768)
            rate = clips.meta["sample_rate"]
            talker = Talker(flow, state["data"], rate, denoise=True, head=head, lips=lips)
            tracks.append(points(np.concatenate([talker.push(sound), talker.finish()], 1)[0]))
        moves = [np.sqrt(np.mean([spread(t, part) ** 2 for t in tracks])) for part in PARTS]
        openings = [mouth_opening(t) for t in tracks]
        plain = plain or openings
        follows = f"{mean_correlation(zip(openings, plain, strict=True)):.3f}" if lips else ""
        print(f"| {head}, {lips} | {' | '.join(f'{v:.4f}' for v in moves)} | {follows} |", flush=True)


if __name__ == "__main__":
    main()
