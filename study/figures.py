"""Figures, a question each. Colours are Okabe and Ito's, told apart by the colour-blind."""

import json

import numpy as np

from media import console
from media.landmarks import CURVES, mouth_opening, points
from study.systems import SYSTEMS

INK, BLUE, ORANGE, GREEN = "#222222", "#0072B2", "#D55E00", "#009E73"


def figure(path, width, height, draw, rows=1, columns=1):
    """Write draw(axes (rows, columns)) to path as PNG, width x height inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    canvas, axes = plt.subplots(rows, columns, figsize=(width, height), dpi=110, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    draw(axes)
    canvas.tight_layout()
    console.write_atomically(path, lambda p: canvas.savefig(p, format="png", bbox_inches="tight"))
    plt.close(canvas)


def plot_losses(out, found):
    """loss.png of a run: train and validation NLL over the steps, and what the validation NLL must be seen
    against (`metrics.anchors`)."""
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]

    def draw(axes):
        ax = axes[0, 0]
        for split, colour in (("train", BLUE), ("val", ORANGE)):
            ax.plot(
                [e["step"] for e in entries], [e[f"{split}_nll"] for e in entries], label=split, color=colour
            )
        for name, style in (("VAR(3)", "--"), ("optimum", "-")):
            if name in found:
                ax.axhline(found[name], color=INK, ls=style, lw=1, label=f"{name} of the val clips")
        ax.set(xlabel="step", ylabel="NLL, nats per coordinate per frame")
        ax.legend(frameon=False)

    figure(out / "loss.png", 7, 4, draw)


def draw_fan(axes, row, truth, fps, label):
    """Does the mouth follow the sound, and does the model know how surely? 20 samples' openings, their 5-95 %
    band, the truth."""
    for clip, ax in enumerate(axes[:, 0]):
        mouths = np.array(row.mouths)[:, clip]
        seconds = np.arange(mouths.shape[1]) / fps
        ax.fill_between(
            seconds,
            *np.quantile(mouths, [0.05, 0.95], axis=0, method="weibull"),
            color=BLUE,
            alpha=0.18,
            lw=0,
            label="5–95 %",
        )
        ax.plot(seconds, mouths.T, color=BLUE, alpha=0.35, lw=0.6, label="_")
        ax.plot(seconds, truth[clip], color=ORANGE, lw=1.8, label="truth")
        ax.set(ylabel="mouth opening", ylim=(0, None), xlim=(0, seconds[-1]))
    axes[0, 0].set_title(f"{len(mouths)} samples of {label}", loc="left", fontsize=10)
    axes[0, 0].legend(frameon=False, ncols=2, loc="upper right")
    axes[-1, 0].set_xlabel("seconds")


def draw_latents(axes, rows):
    """Has training given each scale the deviation that its prior asks for?"""
    ax = axes[0, 0]
    for i, (label, row) in enumerate(rows.items()):
        scales = np.arange(1, len(row.latents["std"]) + 1) + 0.12 * (i - (len(rows) - 1) / 2)
        ax.plot(
            scales,
            row.latents["std"],
            "osD^vP*X"[i % 8],
            color=(BLUE, ORANGE, GREEN, "#CC79A7")[i % 4],
            ms=7,
            label=label,
        )
        for x, value in zip(scales, row.latents["lambda"], strict=True):
            ax.plot([x - 0.05, x + 0.05], [value**0.5] * 2, color=INK, lw=2)
    ax.plot([], [], color=INK, lw=2, label="√lambda of that row")
    ax.set(
        xlabel="scale, deepest first",
        ylabel="std of z − m(c) on held-out clips",
        xticks=range(1, 5),
        ylim=(0, None),
    )
    ax.legend(frameon=False, fontsize=8, loc="lower right")


def draw_spectrum(axes, rows, fps):
    """Who trembles? Power of the head's position at each frequency."""
    ax = axes[0, 0]
    for (label, row), (colour, style) in zip(
        rows.items(), ((INK, "-"), (ORANGE, "--"), (BLUE, "-."), (GREEN, ":")), strict=False
    ):
        power = np.array(row.spectrum)
        ax.semilogy(
            np.arange(len(power)) * fps / 2 / (len(power) - 1),
            power,
            style,
            color=colour,
            lw=1.8,
            label=label,
        )
    ax.set(xlabel="frequency, Hz", ylabel="power of the head's position", xlim=(0, fps / 2))
    ax.legend(frameon=False)


def draw_strips(axes, tracks, frames, fps):
    """Do the faces look like faces? One clip, every few frames, a strip a row (the paper's Fig. 2)."""
    faces = [points(track) for track in tracks.values()]
    low, high = np.min([f.min((0, 1)) for f in faces], 0), np.max([f.max((0, 1)) for f in faces], 0)
    for ax, label, face in zip(axes[:, 0], tracks, faces, strict=True):
        for i, t in enumerate(frames):
            for first, last, closed in CURVES:
                line = face[t, [*range(first, last + 1), *[first] * closed]] + [i * (high - low)[0] * 1.15, 0]
                ax.plot(*line.T, color=ORANGE if first >= 48 else INK, lw=1.1, clip_on=False)
        ax.set(
            xlim=(low[0], high[0] + (len(frames) - 1) * (high - low)[0] * 1.15),
            ylim=(high[1], low[1]),
            aspect="equal",
            xticks=[],
            yticks=[],
        )
        ax.spines[:].set_visible(False)
        ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    axes[0, 0].set_title(
        "every row hears the same sound; frames at " + ", ".join(f"{t / fps:.2f}" for t in frames) + " s",
        fontsize=9,
        loc="left",
    )


def draw_figures(out, rows, held):
    """The figures that the Rows at hand allow, in folder out; the list of files."""
    by_name, made = {}, []
    for row in rows:
        by_name.setdefault(row.name, row)  # of a row with two tracks, the first

    def have(*names):
        return {by_name[name].label: by_name[name] for name in names if name in by_name}

    def write(name, width, height, draw, panels=1):
        figure(out / name, width, height, draw, rows=panels)
        made.append(name)

    flows = have("checkpoint", "ar2", "iid")
    if flows:
        label, row = next(iter(flows.items()))
        truth = mouth_opening(points(held.x[:3]))
        write("fan.png", 8, 6, lambda axes: draw_fan(axes, row, truth, held.fps, label), len(truth))
        scales = have("iid", "ar2", "learned-lambda", "checkpoint")
        scales = {label: row for label, row in scales.items() if len(row.latents["std"]) > 1}
        write("latents.png", 7, 4, lambda axes: draw_latents(axes, scales))
    compared = have("truth", "iid", "ar2", "checkpoint")
    if len(compared) > 1:
        write("jitter.png", 7, 4, lambda axes: draw_spectrum(axes, compared, held.fps))
    strips = have("truth", *SYSTEMS, "iid", "ar2", "checkpoint")
    strips = {label: np.load(out / "rows" / f"{row.name}.npy")[0, 0] for label, row in strips.items()}
    if strips:
        mouth = mouth_opening(points(held.x[0]))
        middle = int(np.argmax(mouth[4:-4])) + 4  # around the widest mouth, two frames apart
        frames = [t for t in range(middle - 8, middle + 9, 2) if 0 <= t < held.T]
        height = 0.95 * len(strips) + 0.4
        write("strips.png", 10, height, lambda axes: draw_strips(axes, strips, frames, held.fps), len(strips))
    return made
