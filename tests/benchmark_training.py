"""What training costs: what brings the demo to the optimum soonest, and what larger folders will ask for.

    python tests/benchmark_training.py "" lr=0.006 batch_size=4,steps=1800 ...
    python tests/benchmark_training.py --sizing

Each argument of the first is one training on the synthetic talkers: what it changes in the demo's settings.
The gap, in nats per coordinate per frame, is that of 96 validation windows of 80 frames, of the weights as
they are and of their average, which is what a training keeps. CPU seconds are those of the steps alone, one
thread. The second measures this core's rates and the memory of trainings on folders of several
sizes, and multiplies.
"""

import argparse
import ast
import dataclasses
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from prepare_data import default_folder
from study.metrics import anchors
from talkingflow import Clips, Config, Trainer, fixed_batches, validate

POINTS = 6  # validations a training, at equal distances
FPS, RATE, CLIP = 25, 16000, 75  # frames a second, samples a second, frames a clip of the stand-in folders
HOURS = {0.5: "", 5: "", 17: "the paper's", 100: "", 400: "", 2400: "VoxCeleb2"}
# ms of a step on an H100 (PyTorch 2.11) as one CUDA graph, on random windows (csrc/README.md).
H100_STEP = {"demo": 3.3, "paper": 17.6}
EPOCHS = {"demo": 10, "paper": 100}


# ---- The gap to the optimum against CPU seconds


class Measured(Trainer):
    """A training that validates at POINTS steps; only the steps are on its clock."""

    def measure(self, batches, optimum):
        """-> rows of (step, CPU seconds, gap, gap of the average)."""
        spent, rows = 0.0, []
        while self.step < self.steps:
            clock = time.process_time()
            self.train_step()
            spent += time.process_time() - clock
            if self.step * POINTS % self.steps < POINTS:
                gaps = [validate(flow, batches) - optimum for flow in (self.flow, self.average)]
                rows.append((self.step, spent, *gaps))
        return rows


def curves(changes):
    clips = Clips(default_folder())
    demo = dataclasses.replace(Config(), **clips.meta["defaults"])
    batches = fixed_batches(clips, "val", 80, demo, torch.device("cpu"))
    optimum = anchors(clips, 80, demo.noise, batches)["optimum"]
    for change in changes:
        fields = {n: ast.literal_eval(v) for n, v in (f.split("=") for f in change.split(",") if f)}
        with tempfile.TemporaryDirectory() as folder:
            run = Measured(dataclasses.replace(demo, **fields), clips, folder, "cpu")
            rows = run.measure(batches, optimum)
        print(f"\n{change or 'the demo as it is'}")
        for name, values in zip(("step", "CPU s", "gap", "average's"), zip(*rows)):
            form = {"step": "{:7d}", "CPU s": "{:7.0f}"}.get(name, "{:7.4f}")
            print(f"{name:12}" + "".join(form.format(v) for v in values), flush=True)


# ---- Sizing


def stand_in(folder, hours, mels):
    """A training folder of so many hours in clips of three seconds: the right bytes, random numbers.
    Returns its bytes a frame."""
    folder.mkdir()
    rng, count, samples = np.random.default_rng(0), round(hours * 3600 * FPS / CLIP), CLIP * RATE // FPS
    for name, width, mean, std in (("landmarks", 136, 0.5, 0.1), ("mel", mels, -6, 3)):
        some = rng.normal(mean, std, (2000 * CLIP, width)).astype(np.float32)
        file = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, (count * CLIP, width))
        for start in range(0, len(file), len(some)):
            file[start : start + len(some)] = some[: len(file) - start]
    np.lib.format.open_memmap(folder / "audio.npy", "w+", np.int16, (count * samples,))  # holes: never read
    always = {"speaker": "nobody", "frames": CLIP, "audio_samples": samples, "source": 0, "sha256": "0" * 64}
    always |= {"box": [0, 0, 256], "wh": [256, 256]}
    clips = [
        {"name": f"{i:07d}", "start": i * CLIP, "audio_start": i * samples, "split": "train", **always}
        for i in range(count)
    ]
    clips[-1]["split"] = "val"
    meta = {"format": 1, "fps": FPS, "layout": "ibug68", "normalisation": "face box", "sample_rate": RATE}
    meta |= {"mel": {"n_mels": mels, "fmin": 0.0, "fmax": 8000.0, "window": 0.064, "level": 0.0}}
    meta |= {"defaults": {}, "interocular": 0.2, "sources": [], "fingerprint": "", "clips": clips}
    (folder / "meta.json").write_text(json.dumps(meta))
    return sum(path.stat().st_size for path in folder.iterdir()) / count / CLIP


def resident(kind):
    """MB of this process's memory: RssAnon its own, RssFile mapped files, which the system may take back."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(kind + ":")[1].split()[0]) / 1024


def training(folder, config, steps):
    """In a process of its own: MB of the clips' entries, all MB of its own after the last step's forward pass
    (all activations are kept then), MB of mapped files, CPU ms a step."""
    torch.set_num_threads(1)
    before = resident("RssAnon")
    clips = Clips(folder)
    entries = resident("RssAnon") - before
    config = dataclasses.replace(config, cond_dim=clips.cond_dim)
    with tempfile.TemporaryDirectory() as out:
        trainer, own, times = Trainer(config, clips, out, "cpu"), [], []
        trainer.model.register_forward_hook(lambda *_: own.append(resident("RssAnon")))
        for _ in range(steps):
            clock = time.process_time()
            trainer.train_step()
            times.append(1000 * (time.process_time() - clock))
    return entries, own[-1], resident("RssFile"), statistics.median(times)


def apart(*arguments):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(training, arguments)


def sizing():
    """What is measured here, and what follows from it."""
    demo, paper = Config(noise=0.0022), Config.preset("paper")
    with tempfile.TemporaryDirectory() as place:
        print("a training, clips of 3 s   clips' entries, MB   all of its own   mapped files   CPU ms a step")

        def measured(name, *arguments):
            found = apart(*arguments)
            print(f"{name:22}", *(f"{v:{width}.0f}" for v, width in zip(found, (24, 16, 14, 15))), flush=True)
            return found

        for hours in (0.5, 5, 50):
            folder = Path(place, f"{hours}")
            a_frame = stand_in(folder, hours, 40)
            entries, own, _, step = measured(f"demo, {hours} hours", folder, demo, 10)
        a_clip, base = entries / hours / 1200, own - entries
        wide = stand_in(Path(place, "wide"), 0.5, 80)
        big = {}
        for batch in (8, 16):
            config = dataclasses.replace(paper, batch_size=batch)
            big[batch] = measured(f"paper, {batch} clips a step", Path(place, "wide"), config, 2)
    a_window = (big[16][1] - big[8][1]) / 8
    rates = {"demo": step, "paper": big[16][3] * 8}
    print(
        f"bytes a frame {a_frame:.0f}, with 80 bands {wide:.0f}; KB a clip's entry {1000 * a_clip:.1f};",
        end=" ",
    )
    print(f"MB a window of a paper step {a_window:.0f}")
    print(f"ms a step: demo {rates['demo']:.0f}, paper {rates['paper']:.0f} (8 times that of 16 clips)\n")
    columns = ["hours", "frames", "disk GB", "memory GB"]
    columns += [f"{name}: {what}" for name in EPOCHS for what in ("steps", "CPU h", "H100 h")]
    print("|", " | ".join(columns), "|\n" + "|---" * len(columns) + "|")
    for hours, name in HOURS.items():
        frames = hours * 3600 * FPS
        memory = (base + a_clip * frames / CLIP) / 1000
        cells = [
            f"{hours:,} {name}".strip(),
            f"{frames:,.0f}",
            f"{frames * a_frame / 1e9:.1f}",
            f"{memory:.1f}",
        ]
        for preset, config in (("demo", demo), ("paper", paper)):
            steps = EPOCHS[preset] * frames / config.seq_len / config.batch_size
            times = (steps * ms / 3.6e6 for ms in (rates[preset], H100_STEP[preset]))
            cells += [f"{steps:,.0f}", *(f"{t:,.2f}" if t < 10 else f"{t:,.0f}" for t in times)]
        print("|", " | ".join(cells), "|")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("changes", nargs="*", help="FIELD=VALUE,... of Config, one training each")
    parser.add_argument("--sizing", action="store_true", help="rates, memory and the table of sizes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizing() if args.sizing else curves(args.changes or [""])


if __name__ == "__main__":
    main()
