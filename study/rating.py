"""The listening test: a blind page of clips, and the mean opinion scores of its answers."""

import argparse
import base64
import csv
import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np

from media import console
from media.console import UserError
from media.landmarks import CURVES, points
from media.sound import wav_bytes

RATED = ("truth", "wrong-clip", "eskimez", "chen", "ji", "lu", "iid", "ar2")
QUESTIONS = {"sync": "Do the lips move with the speech?", "natural": "Does the whole face move naturally?"}
SCALE = ("bad", "poor", "fair", "good", "excellent")  # the paper's


def rating_page(args, open_windows, labels):
    """`python evaluate.py rating-page`: the page, and beside it the key that says which id is which system
    and clip.

    The page shows ids only. Every rater gets practice, all stimuli in an order of their own, two attention
    checks, one repeat. open_windows(folder, count, seed) gives the evaluated windows again, labels {row: what
    the key calls it}."""
    folder = Path(args.results) if args.results else newest_evaluation()
    held, have = evaluated(folder, open_windows)
    names = [name for name in args.rows.split(",") if name in have]
    if len(names) < 2:
        raise UserError(
            f"{folder}: {len(names)} of the systems {args.rows} vs at least 2. "
            "Evaluate them first, or change --rows"
        )
    sounds, stimuli, key = [], [], {}
    for number, (clip, s) in enumerate(held.windows[: args.clips]):
        sounds.append(encoded(wav_bytes(window_sound(held, clip, s), held.clips.meta["sample_rate"])))
        for name in names:
            code = hashlib.sha256(f"{args.seed} {name} {clip['name']} {s}".encode()).hexdigest()[:12]
            key[code] = {"row": name, "label": labels[name], "clip": clip["name"]}
            face = points(np.load(folder / "rows" / f"{name}.npy")[0, number])
            shape = {"id": code, "sound": number, "frames": held.T, "points": encoded(whole_numbers(face))}
            stimuli.append(shape)
    stimuli.sort(key=lambda stimulus: stimulus["id"])
    digest = hashlib.sha256("".join(v["id"] + v["points"] for v in stimuli).encode()).hexdigest()[:12]
    page = {"set": digest, "fps": held.fps, "curves": CURVES, "sounds": sounds, "stimuli": stimuli}
    page |= {"checks": [2, 4], "questions": list(QUESTIONS.items()), "labels": SCALE}
    out, text = Path(args.out or folder / "rating.html"), filled(page)
    secret, answers = out.with_suffix(".key.json"), json.dumps({"set": digest, "stimuli": key}, indent=1)
    if secret.exists() and read_key(secret)[0] != digest:
        raise UserError(
            f"{secret}: the key of another page, which its answers need, vs a new file. Choose another --out"
        )
    console.write_atomically(out, lambda p: p.write_text(text))
    console.write_atomically(secret, lambda p: p.write_text(answers))
    print(
        f"{out}: {len(stimuli)} stimuli ({len(names)} systems, {len(sounds)} clips), "
        f"{out.stat().st_size / 1e6:.1f} MB, for the raters\n{secret}: which is which, not for the raters"
    )
    return 0


def evaluated(folder, open_windows):
    """The windows that a finished evaluation scored, and the names of the rows whose tracks it kept."""
    path = folder / "results.json"
    if not path.is_file():
        raise UserError(
            f"{folder}: no results.json vs a finished evaluation. Run: python evaluate.py --out {folder}"
        )
    results = json.loads(path.read_text())
    facts = results["facts"]
    held = open_windows(facts["folder"], facts["windows"], facts["seed"])
    if held.clips.meta["fingerprint"] != facts["fingerprint"]:
        raise UserError(f"{facts['folder']}: other clips vs those evaluated in {folder}. Evaluate again")
    names = {row["name"] for row in results["rows"].values()}
    return held, {name for name in names if (folder / "rows" / f"{name}.npy").is_file()}


def window_sound(held, clip, s):
    """The samples (int16) of the window that begins at frame s of a clip."""
    first, last = (int(t * held.clips.meta["sample_rate"] / held.fps) for t in (s, s + held.T))
    return held.clips.audio[clip["audio_start"] :][: clip["audio_samples"]][first:last]


def whole_numbers(face):
    """A face track (T, 68, 2), centred and scaled to fill the page, as 16-bit numbers."""
    face = (face - face.mean((0, 1))) / (np.ptp(face.reshape(-1, 2), 0).max() * 1.08) * 60000
    return face.clip(-32767, 32767).astype("<i2").tobytes()


def encoded(data):
    """Bytes as base64 text."""
    return base64.b64encode(data).decode()


def filled(page):
    """The page's HTML, in the player's style: one look for all."""
    assets = Path(__file__).resolve().parent.parent / "assets"
    style = re.search(r"<style>(.*?)</style>", (assets / "player.html").read_text(), re.DOTALL)[1]
    script = json.dumps(page).replace("</", "<\\/")
    return (assets / "rating.html").read_text().replace("__STYLE__", style).replace("__PAGE__", script)


def newest_evaluation():
    """The folder of the evaluation that finished last: no other command writes results.json."""
    found = console.newest("results.json")
    if not found:
        raise UserError("runs/: no results.json vs a finished evaluation. Run: python evaluate.py")
    return found[0].parent


def read_answers(path):
    """The answers in a rater's JSON or CSV file, a list of dicts; scores are checked."""
    path = Path(path)
    try:
        text = path.read_text("utf-8-sig")  # spreadsheets put a mark in front
        rows = (
            json.loads(text)["answers"] if path.suffix == ".json" else list(csv.DictReader(text.splitlines()))
        )
        rows = [
            {key: row[key] for key in ("rater", "set", "kind", "want", "stimulus", "question")}
            | {key: int(row[key]) for key in ("score", "trial")}
            for row in rows
        ]
        wrong = next((row["score"] for row in rows if row["score"] not in range(1, 6)), None)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{path}: unreadable ({type(e).__name__}: {e}) vs a file that the rating page downloads. "
            "Ask the rater again"
        ) from None
    if wrong is not None:
        raise UserError(f"{path}: a score of {wrong} vs 1 to 5. Ask the rater again")
    return rows


def reliable(answers):
    """Whether one rater's answers count, by a rule fixed in advance: every attention check right, no repeat
    more than 2 off."""
    checks = [str(a["score"]) == str(a["want"]) for a in answers if a["kind"] == "check"]
    first = {(a["stimulus"], a["question"]): a["score"] for a in answers if a["kind"] == "rate"}
    steady = (
        abs(a["score"] - first.get((a["stimulus"], a["question"]), a["score"])) <= 2
        for a in answers
        if a["kind"] == "repeat"
    )
    return bool(checks) and all(checks) and all(steady)


def mean_opinion(ratings, draws=2000, seed=0):
    """{rater: [scores]} of one system -> mean over all scores and the 95 % interval when raters, not scores,
    are drawn with replacement: scores of one rater are not independent."""
    sums = np.array([[sum(scores), len(scores)] for scores in ratings.values()], float)
    counts = (
        np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), draws) @ sums
    )
    low, high = np.quantile(counts[:, 0] / counts[:, 1], [0.025, 0.975])
    return {
        "mean": float(sums[:, 0].sum() / sums[:, 1].sum()),
        "low": float(low),
        "high": float(high),
        "count": int(sums[:, 1].sum()),
    }


def ratings_needed(difference, sd):
    """Independent ratings a system to see a difference of means at 5 % with 80 % power: 2 (1.960 + 0.842)^2
    (sd / difference)^2."""
    return math.ceil(2 * (1.95996 + 0.84162) ** 2 * (sd / difference) ** 2) if difference else math.inf


def read_key(path):
    """The id of the page that a .key.json belongs to, and {stimulus: label}."""
    path = Path(path or newest_evaluation() / "rating.key.json")
    try:
        key = json.loads(path.read_text())
        return key["set"], {code: stimulus["label"] for code, stimulus in key["stimuli"].items()}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"--key: {path} unreadable ({type(e).__name__}: {e}) vs the .key.json written beside the page. "
            "Give that file"
        ) from None


def gather(files, page, labels):
    """{rater: [answers]} of all files; the same answer in two files counts once."""
    raters = {}
    for file in files:
        for answer in read_answers(file):
            if answer["set"] != page or answer["stimulus"] not in labels:
                raise UserError(
                    f"{file}: answers to page {answer['set']} vs {page} of the key. Pass that page's key "
                    "with --key"
                )
            answers, place = raters.setdefault(answer["rater"], {}), (answer["trial"], answer["question"])
            if answers.setdefault(place, answer)["score"] != answer["score"]:
                raise UserError(
                    f"{file}: rater {answer['rater']} answered differently in another file vs one name a "
                    "person. Rename one of the two"
                )
    return {name: list(answers.values()) for name, answers in raters.items()}


def still_needed(ratings, after, found, found_after):
    """How many more ratings of two systems, {rater: [scores]} each, would tell their means apart, as text."""
    first, second = (np.concatenate([*v.values()]) for v in (ratings, after))
    sd = math.sqrt((first.var() + second.var()) / 2)
    needed = ratings_needed(found["mean"] - found_after["mean"], sd)
    have = min(found["count"], found_after["count"])
    return "cannot be told" if needed == math.inf else str(max(0, needed - have))


def opinion_table(systems, seed):
    """{label: {rater: [scores]}} of one question as Markdown, the best system first."""
    found = {label: mean_opinion(ratings, seed=seed) for label, ratings in systems.items()}
    order = sorted(found, key=lambda label: -found[label]["mean"])
    heading = "more ratings a system to tell it from the next"
    lines = [f"| system | mean opinion [95 % over raters] | ratings | {heading} |", "|---|---|---|---|"]
    for label, after in zip(order, [*order[1:], None], strict=True):
        f, more = found[label], "–"
        if after:
            more = still_needed(systems[label], systems[after], f, found[after])
        sure = f"[{f['low']:.2f}, {f['high']:.2f}]" if len(systems[label]) > 1 else "[one rater]"
        lines.append(f"| {label} | {f['mean']:.2f} {sure} | {f['count']} | {more} |")
    return "\n".join(lines)


def rating_results(args):
    """`python evaluate.py rating-results FILES --key KEY`: mean opinion scores as Markdown."""
    page, labels = read_key(args.key)
    raters = gather(args.files, page, labels)
    kept = {name: answers for name, answers in raters.items() if reliable(answers)}
    print(
        f"{len(raters)} raters, {len(raters) - len(kept)} left out: no or a wrong attention check, or a "
        "repeat more than 2 off"
    )
    if not kept:
        raise UserError("ratings: no reliable rater vs at least 1. Collect more")
    for question, text in QUESTIONS.items():
        systems = {}
        for name, answers in kept.items():
            for a in answers:
                if a["kind"] == "rate" and a["question"] == question:
                    systems.setdefault(labels[a["stimulus"]], {}).setdefault(name, []).append(a["score"])
        print(f"\n{text}\n\n{opinion_table(systems, args.seed)}")
    return 0


def add_commands(parser, open_windows, labels):
    """Add the two commands to evaluate.py's parser; open_windows, labels: see `rating_page`."""
    count, commands = console.bounded, parser.add_subparsers(metavar="rating-page | rating-results")
    page = "Write a blind, randomised listening test as one page, and its key."
    p = commands.add_parser("rating-page", help="write a listening test", description=page)
    add = p.add_argument
    add("--results", help="folder that `python evaluate.py` has written [of the newest evaluation in runs/]")
    add("--rows", default=",".join(RATED), help="systems to rate, where they are there [%(default)s]")
    add("--clips", type=count(int, 1, 8), default=6, help="clips of each system [6]")
    add("--seed", type=count(int, 0, 2**31), default=0, help="of ids and order [0]")
    add(
        "--out",
        help="the page [rating.html beside results.json]; keep its key, OUT.key.json, from the raters",
    )
    add("--debug", action="store_true", help=argparse.SUPPRESS)
    p.set_defaults(run=lambda args: rating_page(args, open_windows, labels))
    scores = "Mean opinion scores of the answers that raters downloaded (JSON or CSV)."
    p = commands.add_parser("rating-results", help="score its answers", description=scores)
    add = p.add_argument
    add("files", nargs="+", help="answers-*.json or answers-*.csv")
    add("--key", help="the page's .key.json [rating.key.json of the newest evaluation in runs/]")
    add("--seed", type=count(int, 0, 2**31), default=0, help="of the bootstrap [0]")
    add("--debug", action="store_true", help=argparse.SUPPRESS)
    p.set_defaults(run=rating_results)
