"""The commands of talkingflow.py: train, sample, stream, live. Folders, flags and files; the method is in
talkingflow.py. What needs torch is imported inside the commands: a usage line should not wait for it."""

import argparse
import ast
import dataclasses
import functools
import hashlib
import json
import os
import re
import sys
from pathlib import Path

import numpy as np

from media.console import (
    CLEAR,
    UserError,
    bounded,
    free_name,
    lasting_output,
    newest,
    run_command,
    write_atomically,
)
from media.container import VIDEOS
from media.export import WRITERS, write_pictures
from media.face import read_face
from media.landmarks import face_box
from media.live import arrays, write_live
from media.sound import SAMPLE_RATE, open_pcm, read_sound, unlike_speech
from media.video import truth_of_video
from prepare_data import default_folder

METHOD = Path(__file__).resolve().parent / "talkingflow.py"


@lasting_output()
def train(args):
    """`python talkingflow.py train`: prepare, train, measure on held-out clips; returns the exit status."""
    from study.metrics import anchors, beside
    from talkingflow import Trainer

    config, clips, out, state = resumed_run(args) if args.resume else new_run(args)
    trainer = Trainer(config, clips, out, args.device, state)
    if trainer.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        if not state:
            (out / "log.jsonl").write_text("")
        size, count = sum(p.numel() for p in trainer.flow.parameters()), len(clips.split("train"))
        print(f"{out}: {size:,} parameters, {count} training clips, windows of {trainer.T} frames, ", end="")
        print(f"{trainer.steps} steps of {config.batch_size} on {trainer.device}", flush=True)
        found = anchors(clips, trainer.T, config.noise, trainer.held["val"])
        trainer.beside = functools.partial(beside, found)
    signalled = trainer.run()
    if trainer.rank == 0 and signalled:
        again = f"python talkingflow.py train --resume --out {out}"
        print(f"{CLEAR}stopped after step {trainer.step}, saved. To go on: {again}")
    elif trainer.rank == 0:
        measure_run(out, clips, trainer.device, found)
    trainer.processes.leave()
    return 128 + signalled if signalled else 0


def new_run(args):
    """-> config, clips, the run's folder, None. What cannot be is refused before any data is made."""
    from talkingflow import Clips, Config

    preset = dataclasses.replace(Config.preset(args.preset), **args.config)
    clips = Clips(args.data or default_folder(preset.cond_dim))
    number = 1 + max([int(p.name[:3]) for p in Path("runs").glob("[0-9][0-9][0-9]-*")], default=0)
    out = Path(args.out or f"runs/{number:03d}-{args.preset}-{clips.folder.name}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not args.force:
        raise UserError(
            f"{out}: exists already vs a new folder. Choose another --out, --resume it, or --force"
        )
    return configure(args, clips), clips, out, None


def resumed_run(args):
    """-> config, clips, the run's folder, the dict of its resume.pt."""
    from talkingflow import Clips, Config, read_checkpoint

    found = [Path(args.out, "resume.pt")] if args.out else newest("resume.pt")
    if not found:
        raise UserError("runs/: no resume.pt vs a run to go on with. Run: python talkingflow.py train")
    out, state = found[0].parent, read_checkpoint(found[0])
    clips, config = Clips(args.data or state["data"]["folder"]), Config(**state["config"])
    for name, value in args.config.items():
        may_change = name in ("steps", "eval_interval", "recompute", "compile")
        if not may_change and (old := getattr(config, name)) != value:
            raise UserError(f"{name}: {value} vs {old} in {out}. Leave it out, or start a new run")
    config = dataclasses.replace(config, **args.config)
    if clips.meta["fingerprint"] != state["data"]["fingerprint"]:
        raise UserError(f"{clips.folder}: other data vs what {out} was trained on. Start a new run")
    if state["step"] >= config.steps > 0:
        raise UserError(f"steps: {config.steps} vs {state['step']} already done. Pass a larger --steps")
    return config, clips, out, state


def measure_run(out, clips, device, found):
    """What the best weights reach on held-out clips: figures.json, loss.png, and a few lines."""
    from study.figures import plot_losses
    from study.metrics import measure, report
    from talkingflow import load_checkpoint

    figures = measure(load_checkpoint(out / "checkpoint.pt", device)[0], clips)
    write_atomically(out / "figures.json", lambda path: path.write_text(json.dumps(figures, indent=1)))
    print(report(figures))
    plot_losses(out, found)
    which = "" if Path(out).parent == Path("runs") else f" --checkpoint {out}/checkpoint.pt"
    print(f"{out}/checkpoint.pt, log.jsonl, loss.png. Next: python talkingflow.py sample{which}")


def configure(args, clips):
    """The preset, then what the data asks for, then the flags."""
    from talkingflow import Config

    # what prepare_data.py has written there: look-ahead, noise, other voices; dropout and steps of talkers
    asked = clips.meta["defaults"]
    wanted = {name: asked[name] for name in asked if args.preset == "demo" or name in ("lead", "noise")}
    wanted |= {"dim": clips.dim, "cond_dim": clips.cond_dim} | (
        {"steps": 0} if "epochs" in args.config else {}
    )
    for name in ("dim", "cond_dim"):
        if args.config.get(name, wanted[name]) != wanted[name]:
            raise UserError(
                f"{name}: {args.config[name]} vs {wanted[name]} in {clips.folder}. "
                "Leave the flag out, or prepare the data with other settings"
            )
    return dataclasses.replace(Config.preset(args.preset), **(wanted | args.config))


def hear_video(path, fps):
    """A video's sound as one block of `read_sound`, its landmarks (T, 68, 2), NaN where no face is, and
    their box."""
    try:
        video = truth_of_video(path, fps)
        for note in video["notes"]:
            print(f"note: {path}: {note}", file=sys.stderr)
        return [(video["sound"], SAMPLE_RATE)], video["landmarks"], video["box"]
    except UserError as e:  # no extractor, no face: the sound is enough to speak
        print(f"note: no recorded face beside the samples ({e})", file=sys.stderr)
        return read_sound(path), None, None


def manner(args):
    """How the faces are to speak: keywords of Talker, and the box of --face."""
    face, box = read_face(args.face) if args.face else (None, None)
    head = 0.0 if args.still else args.head
    how = {"denoise": args.denoise, "head": head, "lips": args.lips, "face": face}
    return how | {"temperature": args.temperature, "seed": args.seed}, box


def speak_sound(name, blocks, data, talkers):
    """Landmarks (K, T, D) of each talker for a sound that comes in blocks (see `read_sound`), its samples
    (int16), their rate. talkers: a function of that rate."""
    speakers, parts, sound, rate = None, [], [], None
    for block, rate in blocks:
        if not np.isfinite(block).all():
            raise UserError(f"{name}: NaN or Inf among the samples vs finite sound. Export it again")
        speakers = speakers or talkers(rate)
        sound.append((np.clip(block, -1, 1) * 32767).astype(np.int16))
        parts.append([talker.push(block) for talker in speakers])
    sound = np.concatenate(sound) if sound else np.zeros(0, np.int16)
    if not len(sound) or len(sound) * data["fps"] < rate:
        raise UserError(
            f"{name}: {len(sound)} samples vs at least one frame of {1000 / data['fps']:.0f} ms. "
            "Use a longer sound"
        )
    remarks = unlike_speech(sound / np.float32(32768), rate, data["mel"]["fmax"])
    if remarks:
        print(f"note: {name}: {', '.join(remarks)}. The model has heard no such sound", file=sys.stderr)
    parts.append([talker.finish() for talker in speakers])
    return [np.concatenate(track, 1) for track in zip(*parts)], sound, rate


def held_out(data, name):
    """A clip of the training folder: the named one, or the first of the test split (or of the validation
    split)."""
    from talkingflow import Clips

    if not (Path(data["folder"]) / "meta.json").is_file():
        raise UserError(
            "training clips: not on this machine vs a held-out one to speak. Pass --audio, or train here"
        )
    clips = Clips(data["folder"])
    if clips.meta["mel"] != data["mel"]:
        raise UserError(
            f"{clips.folder}: mel {clips.meta['mel']} vs {data['mel']} in the checkpoint. "
            "Prepare the data again as it was"
        )
    choices = clips.split("test") or clips.split("val")
    if name:
        choices = [clip for clip in clips.clips if clip["name"] == name]
    if not choices:
        raise UserError(
            f"{clips.folder}: no clip {name or 'held out'} vs {len(clips.clips)} clips. "
            "See names in meta.json, or pass --audio"
        )
    clip = choices[0]
    rows = slice(clip["start"], clip["start"] + clip["frames"])
    sound = clips.audio[clip["audio_start"] : clip["audio_start"] + clip["audio_samples"]]
    return clip, clips.landmarks[rows], clips.mel[rows], np.array(sound), clips.meta["sample_rate"]


WEIGHTS = "pretrained/grid.pt"  # see the card beside them
PRETRAINED = METHOD.parent / WEIGHTS


def find_checkpoint(args):
    """--checkpoint (a file or a run's folder), the newest run's, or the one that comes with this project."""
    found = Path(args.checkpoint) if args.checkpoint else next(iter(newest("checkpoint.pt")), PRETRAINED)
    found = found / "checkpoint.pt" if found.is_dir() else found
    return PRETRAINED if found.resolve() == PRETRAINED else found


def open_flow(checkpoint, args):
    """The flow of a checkpoint on --device, ready to speak, and the dict that it came from."""
    from csrc.device import few_threads
    from talkingflow import choose_device, load_checkpoint

    device = choose_device(args.device)
    flow, state = load_checkpoint(checkpoint, device)
    few_threads(device, flow.config.hidden)
    return flow, state


def invented(data):
    """Whether all that a model has seen are synthetic talkers."""
    return all(source["extractor"] == "exact" for source in data["sources"])


def warn_of_talkers(args, checkpoint, data):
    """A note where the newest run knows invented talkers only, and a real voice is to be heard."""
    if not args.checkpoint and invented(data):
        known = f"note: {checkpoint}, the newest run, knows synthetic talkers only"
        print(f"{known}; for a real voice pass --checkpoint {WEIGHTS}", file=sys.stderr)


def sample_name(args, checkpoint):
    """Where the samples go: a file with a suffix of WRITERS, or a folder of pictures, whose name has none."""
    folder = Path() if checkpoint == PRETRAINED else checkpoint.parent
    out = Path(args.out) if args.out else free_name(folder / "sample.html")
    pictures = bool(args.out) and args.out.endswith(("/", os.sep))
    if pictures and out.suffix in WRITERS:
        raise UserError(f"{args.out}: a folder vs a file. Leave the / out, or the {out.suffix}")
    if not pictures and out.suffix not in WRITERS:
        suffixes = f"{', '.join(WRITERS)}, or a / at the end: a folder of pictures"
        raise UserError(f"{out}: suffix {out.suffix or 'missing'} vs {suffixes}. Change --out")
    if out.exists() and not args.force and not (pictures and out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: exists already vs a new file. Choose another --out, or --force")
    return out


def sane(tracks, checkpoint):
    """Tracks of faces, or an error where they are none."""
    largest = np.abs(np.stack(tracks) - 0.5).max()
    if not largest <= 3:  # NaN too
        found = f"{checkpoint}: landmarks up to {largest:.3g} face widths away vs a face"
        raise UserError(f"{found}. Train longer, or lower --temperature")
    return tracks


def utterance(args, checkpoint, data, talkers):
    """What is spoken: each talker's track (K, T, D), then a dict of what is known: name, sound, rate, and the
    truth (T, 68, 2) or None, its label and its box."""
    known = {"truth": None, "label": "recorded face", "box": None}
    audio = args.audio
    if checkpoint == PRETRAINED and not args.audio and not args.clip:
        audio = str(PRETRAINED.with_name("held-out.wav"))
        recorded = np.load(PRETRAINED.with_name("held-out.npy"))  # pixels
        corner, side = face_box(recorded.mean(0))
        known |= {"truth": ((recorded - corner) / side).astype(np.float32)}
        known |= {"box": [*corner.tolist(), float(side)]}
    if audio:
        blocks = read_sound(audio)
        if audio.lower().endswith(VIDEOS) and Path(audio).is_file():
            blocks, known["truth"], known["box"] = hear_video(audio, data["fps"])
        tracks, sound, rate = speak_sound(audio, blocks, data, talkers)
        return tracks, known | {"name": Path(audio).name, "sound": sound, "rate": rate}
    clip, truth, mel, sound, rate = held_out(data, args.clip)
    if invented(data):
        known["label"] = "synthetic talker's own face"
    tracks = [np.concatenate([t.speak(np.array(mel)), t.finish()], 1) for t in talkers(rate)]
    known |= {"name": clip["name"], "sound": sound, "rate": rate, "box": clip["box"]}
    return tracks, known | {"truth": truth.reshape(-1, 68, 2)}


def sample(args):
    """`python talkingflow.py sample`: landmarks for a sound, written in the format of --out's suffix."""
    from talkingflow import Talker

    checkpoint = find_checkpoint(args)
    flow, state = open_flow(checkpoint, args)
    data, faces = state["data"], args.num_samples
    out = sample_name(args, checkpoint)
    if args.audio:
        warn_of_talkers(args, checkpoint, data)
    how, their_box = manner(args)
    temperatures = [args.temperature]
    if out.suffix == ".html":  # the page can switch between them
        temperatures += sorted({0.0, 0.5, 1.0} - {args.temperature})

    def talkers(rate):
        return [Talker(flow, data, rate, faces, **how | {"temperature": value}) for value in temperatures]

    tracks, known = utterance(args, checkpoint, data, talkers)
    tracks = [track.reshape(faces, -1, 68, 2).astype(np.float32) for track in sane(tracks, checkpoint)]
    info = {
        "fps": data["fps"],
        "layout": data["layout"],
        "seed": args.seed,
        "temperature": args.temperature,
        "checkpoint": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        "audio": known["name"],
        "box": their_box or known["box"] or [0.0, 0.0, 512.0],
    }
    if out.suffix == ".html":
        info |= {"truth": known["label"], "tracks": dict(sorted(zip(temperatures, tracks)))}
    if out.suffix in WRITERS:
        rest = known["truth"], known["sound"], known["rate"], info
        write_atomically(out, lambda path: WRITERS[out.suffix](path, tracks[0], *rest))
    else:
        write_pictures(out, tracks[0])
    frames, name = tracks[0].shape[1], known["name"]
    seconds = f"{frames} frames ({frames / data['fps']:.2f} s)"
    weights = min(str(checkpoint), os.path.relpath(checkpoint), key=len)
    print(f"{out}: {faces} sample{'s' * (faces > 1)} of {seconds} for {name}, by {weights}")
    return 0


def stream(args):
    """`python talkingflow.py stream`: raw 16-bit mono PCM on stdin -> a JSON line a frame on stdout, live."""
    from talkingflow import Talker

    checkpoint = find_checkpoint(args)
    flow, state = open_flow(checkpoint, args)
    warn_of_talkers(args, checkpoint, state["data"])
    rate, rest = open_pcm(sys.stdin.buffer)
    if rate not in (None, args.rate):
        print(f"note: standard input: a wav file of {rate} Hz, taken instead of {args.rate}", file=sys.stderr)
    talker = Talker(flow, state["data"], rate or args.rate, **manner(args)[0])
    frame, piece = 0, b"begin"
    while piece:
        piece = sys.stdin.buffer.read1(1 << 16)
        rest += piece
        whole = len(rest) // 2 * 2  # a pipe may cut a sample in two
        samples, rest = np.frombuffer(rest[:whole], "<i2") / np.float32(32768), rest[whole:]
        x = talker.push(samples) if piece else talker.finish()
        for points in x[0].reshape(-1, 68, 2).astype(np.float64).round(5).tolist():  # float32 has no 0.12345
            seconds = round(frame / state["data"]["fps"], 4)
            print(json.dumps({"frame": frame, "time": seconds, "landmarks": points}), flush=True)
            frame += 1
    if not frame:
        raise UserError(
            f"standard input: under one frame of sound vs raw 16-bit mono PCM at {args.rate} Hz. Pipe in more"
        )
    return 0


def live(args):
    """`python talkingflow.py live`: the model as one page, which hears and draws in the browser."""
    from talkingflow import load_checkpoint

    checkpoint, out = find_checkpoint(args), Path(args.out)
    flow, state = load_checkpoint(checkpoint)
    if out.suffix != ".html":
        raise UserError(f"{out}: suffix {out.suffix or 'missing'} vs .html. Change --out")
    if out.exists() and not args.force:
        raise UserError(f"{out}: exists already vs a new file. Choose another --out, or --force")
    warn_of_talkers(args, checkpoint, state["data"])
    clip = next(PRETRAINED.parent.glob("*.wav"), None)  # the sound that comes with this project
    page = state["config"], state["data"], arrays(flow), checkpoint.name, clip
    write_atomically(out, lambda path: write_live(path, *page))
    size = f"{out.stat().st_size / 1e6:.1f} MB"
    print(f"{out}: {size}, all in one file, by {checkpoint}. Open it in a browser and speak")
    return 0


def add_config_flags(parser):
    """A flag for every field of Config, read from its lines `name: kind = default  # help`."""
    kinds = {"int": int, "float": float, "str": str, "bool": truth_value, "tuple": numbers}
    group = parser.add_argument_group("the numbers of a run (default: the preset's)")
    fields = METHOD.read_text(encoding="utf-8").partition("class Config:")[2].partition("def ")[0]
    for name, kind, default, text in re.findall(r"^    (\w+): (\w+) = (.*?)  # (.*)$", fields, re.M):
        shown = str(ast.literal_eval(default)).strip("()").replace(", ", ",")
        flags = sorted({f"--{name}", f"--{name.replace('_', '-')}"}, reverse=True)
        text = f"{text} [demo: {shown}]".replace("%", "%%")
        options = {"dest": f"config.{name}", "type": kinds[kind], "metavar": kind}
        group.add_argument(*flags, help=text, default=argparse.SUPPRESS, **options)


def numbers(text):
    """'1,2,0.5' -> (1, 2, 0.5)."""
    return tuple(float(v) if "." in v else int(v) for v in text.split(","))


def truth_value(text):
    """'true' or '1' -> True, 'false' or '0' -> False."""
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text} is neither true nor false")
    return text.lower() in ("true", "1")


DEVICE = {"default": "auto", "help": "auto, cpu, cuda or cuda:N [auto]"}


def shared_flags():
    """-> (flags of every command, flags of the commands that speak), as parents of their parsers."""
    shared, voice = (argparse.ArgumentParser(add_help=False) for _ in range(2))
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")
    voice.add_argument("--device", **DEVICE)
    voice.add_argument("--checkpoint", help=f"a run or its checkpoint.pt [the newest run, else {WEIGHTS}]")
    flag, scale = voice.add_argument, {"type": bounded(float, 0, 3), "default": 1.0, "metavar": "S"}
    temperature = {"type": bounded(float, 0, 10), "default": 1.0}
    flag("--temperature", help="of the noise, 0 to 10; 0: the central track [1]", **temperature)
    flag("--head", help="motion of the head: 0 still, 1 as trained, up to 3 [1]", **scale)
    flag("--lips", help="motion of the lips: 0 still, 1 as trained, up to 3 [1]", **scale)
    flag("--still", action="store_true", help="the same as --head 0")
    flag("--face", metavar="FILE", help="draw on this face: .npz, .npy, .csv or a picture")
    switch = {"action": argparse.BooleanOptionalAction, "default": True}
    flag("--denoise", help="leave out the training noise; --no-denoise: draws of the density [on]", **switch)
    return shared, voice


def train_flags(flag):
    """What and where to train; the numbers of a run come from `add_config_flags`."""
    flag("--data", help="folder made by prepare_data.py [data/synthetic, made on first use]")
    flag("--preset", choices=("demo", "paper"), default="demo", help="all numbers at once [demo]")
    flag("--out", help="the run's folder [runs/NNN-PRESET-DATA]")
    flag("--resume", action="store_true", help="go on with the run in --out [the newest one]")
    flag("--force", action="store_true", help="overwrite the run in --out")
    flag("--device", **DEVICE)


def sample_flags(flag):
    """What to speak, and what to write."""
    count, seed = bounded(int, 1, 64), bounded(int, 0, 2**62)
    flag("--audio", help="wav, flac, mp3, or a video whose sound is used [a held-out clip]")
    flag("--clip", help="name of a clip in the training folder [the first held-out one]")
    flag("--num-samples", type=count, default=3, help="faces, 1 to 64, each with its own noise [3]")
    flag("--seed", type=seed, default=0, help="of the first face; the next ones count up [0]")
    pictures = "a name that ends in /: a folder of landmark pictures for renderers"
    formats = f"file; the suffix is the format: {' '.join(WRITERS)}; {pictures}"
    flag("--out", help=f"{formats} [sample.html beside the run's checkpoint, or here]")
    flag("--force", action="store_true", help="overwrite --out")


def stream_flags(flag):
    """How to hear the standard input."""
    rate, seed = bounded(int, 4000, 384000), bounded(int, 0, 2**62)
    flag("--rate", type=rate, default=16000, help="sample rate of the PCM, Hz [16000]")
    flag("--seed", type=seed, default=0, help="of the noise [0]")


def live_flags(flag):
    """What the page is made of."""
    flag("--checkpoint", help=f"a run or its checkpoint.pt [the newest run, else {WEIGHTS}]")
    flag("--out", default="live.html", help="the page [live.html]")
    flag("--force", action="store_true", help="overwrite --out")


def build_parser():
    """The command line: train, sample, stream and live."""
    about = ast.get_docstring(ast.parse(METHOD.read_text(encoding="utf-8"))).split("[1]")[0]
    parser = argparse.ArgumentParser(description=about)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | sample | stream | live")
    shared, voice = shared_flags()
    pcm = "Raw 16-bit mono PCM on stdin -> a JSON line a frame on stdout, as it arrives."
    page = "Write one self-contained page: microphone or sound file -> faces, in the browser."
    for run, flags, parents, text, more in (
        (train, train_flags, [shared], "train a flow", "Train a flow on a prepared folder."),
        (
            sample,
            sample_flags,
            [shared, voice],
            "make faces speak a sound",
            "Landmarks for a sound or a clip.",
        ),
        (stream, stream_flags, [shared, voice], "speak live", pcm),
        (live, live_flags, [shared], "write a page that hears a microphone", page),
    ):
        command = commands.add_parser(run.__name__, parents=parents, help=text, description=more)
        flags(command.add_argument)
        command.set_defaults(run=run)
        if run is train:
            add_config_flags(command)
    return parser


def main(argv=None):
    """Run a command line -> exit status."""
    args = build_parser().parse_args(argv)
    args.config = {key[7:]: value for key, value in vars(args).items() if key.startswith("config.")}
    return run_command(args)
