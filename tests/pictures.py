"""Drawings of tutorial.ipynb that teach by being looked at, not by their code."""

import matplotlib.pyplot as plt
import numpy as np

from media.landmarks import CURVES

BLACK, BLUE, RED, GREY = "#222222", "#0072B2", "#D55E00", "#999999"  # safe for colour-blind readers
SKY, PEACH, LEAF = "#DCEBF5", "#F7E3D4", "#E8F2E4"
STYLE = {
    "figure.dpi": 80,
    "savefig.dpi": 80,
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def draw_face(axes, coordinates, colour=BLACK, alpha=1.0):
    """One face (136,), its lips in red."""
    points = np.asarray(coordinates).reshape(68, 2)
    for first, last, closed in CURVES:
        curve = points[[*range(first, last + 1), *[first] * closed]]
        axes.plot(*curve.T, color=RED if first >= 48 else colour, linewidth=1.3, alpha=alpha)
    axes.set(xlim=(0.12, 0.88), ylim=(0.95, 0.17), aspect="equal")
    axes.axis("off")


def box(axes, x, y, width, height, text, colour):
    axes.add_patch(plt.Rectangle((x, y), width, height, facecolor=colour, edgecolor=BLACK, linewidth=1.2))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9.5)


def arrow(axes, *points, colour=BLACK):
    """A line through the points that ends in an arrow."""
    axes.plot(*zip(*points), color=colour, linewidth=1.1)
    head = {"arrowstyle": "->", "color": colour, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", points[-1], points[-2], arrowprops=head)


def draw_model():
    """Scales, prior, one step and its network; the numbers in brackets are the tutorial's sections."""
    axes = plt.subplots(figsize=(8.4, 5.2))[1]
    box(
        axes,
        0.9,
        7.4,
        7.0,
        0.55,
        "prior: independent noise, or AR(2) around m(c), the voice's guess  (7, 9)",
        PEACH,
    )
    axes.text(0.0, 5.2, "x, the\nface", ha="center", va="center", fontsize=11)
    for i, (size, variance) in enumerate(zip((136, 68, 34, 17), (1, 0.75, 0.5, 0.25))):
        left, high = 0.9 + 1.85 * i, 0.35 + 1.1 * size / 136
        box(axes, left, 5.2 - high / 2, 1.05, high, f"K steps\n{size}", SKY)
        arrow(axes, (left - 0.8 if i else left - 0.5, 5.2), (left, 5.2))
        arrow(axes, (left + 1.05, 5.2), (left + 1.4, 5.2), (left + 1.4, 6.35))
        out = 17 if i == 3 else size - size // 2
        axes.text(left + 1.4, 6.42, f"$z^{{({4 - i})}}$: {out}\nλ = {variance}", ha="center", fontsize=10)
        axes.text(left + 0.5, 5.3 + high / 2, f"scale {4 - i}", ha="center", fontsize=9.5, color="#666666")
    axes.text(-0.3, 4.1, "one step:", fontsize=11)
    for i, (text, width) in enumerate((("ActNorm\n(5)", 1.1), ("1x1 conv\n(5)", 1.1), ("split in two", 1.2))):
        box(axes, 0.2 + 1.6 * i, 3.2, width, 0.7, text, SKY)
        arrow(axes, (-0.3 + 1.6 * i, 3.55), (0.2 + 1.6 * i, 3.55))
    box(axes, 6.5, 3.2, 1.6, 0.7, "$e^s x^b + t$\n(3, 5)", SKY)
    arrow(axes, (4.6, 3.7), (6.5, 3.7))
    axes.text(5.5, 3.78, "$x^b$", ha="center")
    arrow(axes, (8.1, 3.55), (8.6, 3.55))
    for i, dilation in enumerate((1, 2, 4, 8)):
        box(axes, 3.0 + 0.85 * i, 1.7, 0.72, 0.65, f"conv\nd = {dilation}", LEAF)
        axes.plot([3.72 + 0.85 * i, 3.85 + 0.85 * i], [2.02, 2.02], color=BLACK, linewidth=1.1)
        arrow(axes, (3.36 + 0.85 * i, 1.0), (3.36 + 0.85 * i, 1.7), colour=RED)
    arrow(axes, (4.0, 3.2), (4.0, 2.75), (2.6, 2.75), (2.6, 2.02), (3.0, 2.02))
    arrow(axes, (6.4, 2.02), (7.3, 2.02), (7.3, 3.2))
    axes.text(2.7, 2.45, "$x^a$", fontsize=11)
    axes.text(7.4, 2.5, "s, t", fontsize=11)
    axes.text(-0.3, 1.9, "ConditionTCN (6);\nits kernel (11)", fontsize=10)
    axes.plot([2.4, 5.91], [1.0, 1.0], color=RED)
    axes.text(2.3, 1.0, "c, the voice", ha="right", va="center", color=RED)
    axes.set(xlim=(-0.5, 8.7), ylim=(0.75, 8.1))
    axes.axis("off")


def draw_dilations(dilations=(8, 4, 2, 1)):
    """What the last output of four layers with two taps each can see."""
    axes = plt.subplots(figsize=(6.4, 2.6))[1]
    seen, height = {17}, 4
    for dilation in dilations:
        for frame in seen:
            for source in (frame, frame - dilation):
                axes.plot([frame, source], [height, height - 1], color=BLUE, linewidth=1)
        axes.plot(range(18), [height] * 18, "o", color="#DDDDDD", markersize=5, zorder=2)
        axes.plot(sorted(seen), [height] * len(seen), "o", color=BLUE, markersize=6, zorder=3)
        seen, height = {source for frame in seen for source in (frame, frame - dilation)}, height - 1
    axes.plot(range(18), [0] * 18, "o", color="#DDDDDD", markersize=5, zorder=2)
    axes.plot(sorted(seen), [0] * len(seen), "o", color=RED, markersize=6, zorder=3)
    axes.set_xticks((2, 17), ["t − 15", "t"])
    axes.set_yticks(range(5), ["input", *(f"d = {d}" for d in reversed(dilations))])


def draw_blocks(J):
    """A Jacobian (T, D, T, D) in blocks of D, zeros left white."""
    T, D = J.shape[:2]
    figure, axes = plt.subplots(figsize=(4.3, 3.8))
    square = J.reshape(T * D, T * D).abs()
    size = np.ma.masked_where(square == 0, square.clamp_min(1e-6).log10())
    picture = axes.imshow(size, cmap="cividis", vmin=-4, vmax=1)
    for edge in range(D, T * D, D):
        axes.axhline(edge - 0.5, color=GREY, linewidth=0.6)
        axes.axvline(edge - 0.5, color=GREY, linewidth=0.6)
    middles = np.arange((D - 1) / 2, T * D, D)
    axes.set(xticks=middles, yticks=middles, xticklabels=range(T), yticklabels=range(T))
    axes.set(xlabel="frame of x", ylabel="frame of z", title="∂z/∂x: the future is empty")
    figure.colorbar(picture, label="log10 |∂z/∂x|", shrink=0.8)


def draw_fragments(*grids, lane=5):
    """(title, shape, places of a lane) of matrices: each number in the colour of the lane that holds it."""
    figure, row = plt.subplots(
        1, len(grids), figsize=(7.4, 3.2), width_ratios=[shape[1] for _, shape, _ in grids]
    )
    for axes, (title, shape, places) in zip(row, grids):
        owner = np.zeros(shape)
        for n in range(32):
            for place in places(n):
                owner[place] = n
        axes.imshow(owner, cmap="cividis")
        for i, j in places(lane):
            corner = (j - 0.5, i - 0.5)
            axes.add_patch(plt.Rectangle(corner, 1, 1, fill=False, edgecolor=RED, linewidth=2))
        axes.set(xticks=[], yticks=[])
        axes.set_title(title, fontsize=10)


def draw_banks(rounds, panels, chosen):
    """Rounds of an access against its stride, the banks its lanes hit: panels of (stride, a lane's word)."""
    figure, (axes, *row) = plt.subplots(1, 3, figsize=(8.4, 2.6), width_ratios=[1.5, 1, 1])
    axes.bar(list(rounds), rounds.values(), color=[BLUE if stride == chosen else GREY for stride in rounds])
    axes.set(xlabel="stride, words", ylabel="rounds", yticks=(1, 2, 4, 8), title=f"the .cu takes {chosen}")
    for axes, (stride, word) in zip(row, panels):
        hits = np.zeros((8, 32))
        for lane in range(32):
            hits[lane % 8, word(lane) % 32] = 1 + lane // 8
        axes.imshow(hits, cmap="Blues", aspect="auto")
        axes.set(title=f"stride {stride}", xlabel="bank", ylabel="depth", xticks=(0, 8, 16, 24), yticks=[])
