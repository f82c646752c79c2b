"""What is printed of an experiment: scored rows, the columns they have, the tables they make."""

import dataclasses

from study.systems import DEVIATIONS, PAPER, SYSTEMS


@dataclasses.dataclass
class Facts:
    """What the tables are of."""

    data: str
    folder: str
    fingerprint: str
    split: str
    windows: int
    frames: int
    train_clips: int
    lead: int
    batch: int
    seed: int
    steps: int
    draws: int
    size: int
    checkpoint: str
    auc: float
    auc_window: float
    truth_spread: tuple
    strangers: bool


@dataclasses.dataclass
class Row:
    """A scored outcome. columns, mean, central: {column: summary} of its first draw and of all draws
    together, of the draws' mean, of its central track. The rest is for the cost table, the figures and the
    rating page."""

    name: str
    group: str
    label: str
    columns: dict
    mean: dict
    central: dict
    draws: int
    parameters: int
    train_seconds: float
    sample_seconds: float  # for one second of one face
    latents: dict
    spectrum: list
    mouths: list
    mouth_r_by_speaker: float


COLUMNS = {  # name: (heading, format of the mean, what follows it: "±" a deviation, "[]" an interval)
    "nll": ("NLL", ".4f", "[]"),
    "gap": ("gap", ".4f", ""),
    "gain": ("audio gain", ".2f", "[]"),
    "sync": ("SyncNet ↓", ".3f", "±[]"),
    "offset": ("offset", "+.0f", ""),
    "l_mor": ("L_MOR ↓", ".4f", "±[]"),
    "mouth_r": ("mouth r", ".2f", "[]"),
    "lips": ("lips", ".4f", "[]"),
    "face": ("face", ".4f", "[]"),
    "lips_velocity": ("lips velocity", ".3f", ""),
    "face_velocity": ("face velocity", ".3f", ""),
    "energy": ("energy score", ".4f", "[]"),
    "best": ("best lips", ".4f", ""),
    "coverage50": ("coverage 50", ".2f", ""),
    "coverage90": ("coverage 90", ".2f", ""),
    "spread": ("diversity face", ".4f", ""),
    "spread_lips": ("diversity lips", ".4f", ""),
    "frechet": ("Fréchet", ".2f", ""),
    "jitter_head": ("head jitter", ".2f", "[]"),
    "jitter_mouth": ("mouth jitter", ".2f", "[]"),
    "velocity": ("velocity autocorr.", ".2f", ""),
    "blinks": ("blinks/min", ".1f", ""),
    "quiet_opening": ("opening, quiet", ".3f", "[]"),
    "other_opening": ("opening, else", ".3f", ""),
    "quiet_speed": ("lip speed, quiet", ".4f", "[]"),
    "other_speed": ("lip speed, else", ".4f", ""),
}
ONE = {"": "columns"}  # the tracks of a Row that a table shows, by what follows the heading
THREE = {" 1": "columns", " mean": "mean", " T=0": "central"}
TABLES = [  # title, columns, tracks
    (
        "The paper's columns, one draw: mean ± standard deviation over clips [95 % interval of the mean]",
        "nll gap gain sync offset l_mor mouth_r",
        ONE,
    ),
    (
        "One draw, the mean of the draws, temperature 0: three different questions",
        "sync l_mor mouth_r lips",
        THREE,
    ),
    (
        "Distances in interocular distances (velocities a second), one draw; lips about their own centre; "
        "energy score of the face and best lips of all draws",
        "lips face lips_velocity face_velocity energy best",
        ONE,
    ),
    (
        "Distribution and motion: coverage, of the mouth opening with the training noise, should be .50 and "
        ".90; jitter 1",
        "coverage50 coverage90 spread spread_lips frechet jitter_head jitter_mouth velocity blinks",
        ONE,
    ),
    (
        "In silence (the quietest fifth of all frames) and else, one draw: mouth opening; lip speed, the "
        "root mean square change a frame of the lips' coordinates, in interocular distances",
        "quiet_opening other_opening quiet_speed other_speed",
        ONE,
    ),
]


def cell(row, column, track, brief):
    """One column of a Row's track as text, a dash where it has no such figure; brief: the mean alone."""
    found, (_, form, follow) = getattr(row, track).get(column), COLUMNS[column]
    if found is None:
        return "–"
    text = f"{found['mean']:{form}}"
    if "±" in follow and not brief:
        text += f" ± {found['sd']:{form}}"
    if "[]" in follow and not brief:
        text += f" [{found['low']:{form}}, {found['high']:{form}}]"
    return text


def table(title, columns, tracks, rows):
    """One of TABLES, of the columns that any row has, as a list of lines."""
    columns = [name for name in columns.split() if any(name in row.columns for row in rows)]
    shown = [(name, track, kind) for name in columns for kind, track in tracks.items()]
    headings = [COLUMNS[name][0] + kind for name, _, kind in shown]
    lines = ["", title, "", "| row | " + " | ".join(headings) + " |", "|---" * (len(shown) + 1) + "|"]
    for row, before in zip(rows, [None, *rows]):
        if before is None or before.group != row.group:
            lines.append(f"| **{row.group}** |" + " |" * len(shown))
        cells = [cell(row, name, track, tracks is THREE) for name, track, _ in shown]
        lines.append(f"| {row.label} | " + " | ".join(cells) + " |")
    return lines


def opening(f, rows):
    """What stands above the tables: Facts f."""
    sync = f"AUC {f.auc:.3f} by clip, {f.auc_window:.3f} by five frames, on held-out truth"
    sync += "" if f.auc >= 0.9 else ": below .9, so it refuses to score here"
    face, lips = f.truth_spread
    text = f"""## {f.data}: {f.windows} windows of {f.frames} held-out frames

{f.train_clips} training clips, the {f.split} split is scored; seed {f.seed};
{f.steps} steps a trained row, {f.batch} clips a step of a flow; look-ahead {f.lead} frames;
{f.draws} draws a sound.
Truth is the recording, for NLL and coverage with the training noise; NLL in nats per coordinate per frame;
audio gain in nats a frame lost with another clip's sound; mouth r within a clip, mean over clips, with the
truth (on the synthetic talkers with the exact mean given the sound); SyncNet: {sync}.
The truth's own diversity, between clips: face {face:.4f}, lips {lips:.4f}.
Intervals are over clips, not over training seeds. A regressor's track is its conditional mean, a flow's one
draw, which pays about sqrt(2) in every distance: compare regressors with the columns `mean` and `T=0`."""
    if f.split == "val":
        text += "\nThese windows also chose the best weights: every trained row is optimistic."
    if f.strangers:
        each = ", ".join(f"{row.label} {row.mouth_r_by_speaker:.2f}" for row in rows)
        text += f"""
The held-out speakers are strangers: read mouth r (resting mouth and range do not count) beside `another
clip's sound` (chance) and `loudness alone`; L_MOR and distances carry the unknown resting face.
Mean over speakers of mouth r, one draw: {each}."""
    return text


def cost(rows):
    """What training and sampling took."""
    lines = [
        "",
        "Cost on this machine: seconds to train, to sample one second of one face (all clips at once)",
        "",
        "| row | parameters | train | sample |",
        "|---|---|---|---|",
    ]
    for row in rows:
        if row.parameters:
            train = "–" if row.train_seconds is None else f"{row.train_seconds:.0f}"
            lines.append(f"| {row.label} | {row.parameters:,} | {train} | {row.sample_seconds:.4f} |")
    return lines


def deviations(rows, size):
    """Where the compared systems among the rows, `size` times narrower, are not what was released."""
    used = {row.name for row in rows} & set(SYSTEMS)
    if not used:
        return []
    labels = {"all": "all"} | {name: label for name, (label, _) in SYSTEMS.items() if name in used}
    lines = [f"- {label}: {DEVIATIONS[name].format(size=size)}" for name, label in labels.items()]
    return ["", "Where the compared systems differ from their releases:", *lines]


def markdown(facts, rows):
    """Everything that `python evaluate.py` prints."""
    lines = [opening(facts, rows)]
    for title, columns, tracks in TABLES:
        lines += table(title, columns, tracks, rows)
    return "\n".join(lines + cost(rows) + deviations(rows, facts.size)) + "\n" + PAPER
