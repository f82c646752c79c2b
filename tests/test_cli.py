"""Every command as a user runs it: a short run, its files, going on, stopping, and bad input."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import thinned

import prepare_data
import talkingflow
from media import console
from media.console import UserError
from media.landmarks import mouth_opening
from media.sound import Mel
from media.talkers import SyntheticFace
from talkingflow import Clips, Config, Talker, TalkingFlow, Trainer, load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
ENV = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
SMALL = "--hidden 16 --steps_per_scale 1 --seq_len 40 --eval_interval 10".split()


def run(folder, *args, main=talkingflow.main):
    """The command line in this process: what it returns and prints; a process of its own where needed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(arg) for arg in args])
        except SystemExit as e:  # argparse
            status = e.code
    return subprocess.CompletedProcess(args, status, out.getvalue(), err.getvalue())


def stream(folder, pcm, *args):
    """The stream command fed with bytes."""
    stdin, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(pcm))
    try:
        return run(folder, "stream", *args)
    finally:
        sys.stdin = stdin


def write_wav(path, seconds=1.0, rate=16000, channels=1, amplitude=0.2, seed=0):
    samples = (
        amplitude
        * np.random.default_rng(seed).standard_normal((int(seconds * rate), channels)).clip(-3, 3)
        / 3
    )
    with wave.open(str(path), "wb") as f:
        f.setparams((channels, 2, rate, 0, "NONE", ""))
        f.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


@pytest.fixture(scope="module")
def trained(talkers, tmp_path_factory):
    """A folder with one short run, as the command line leaves it."""
    folder = tmp_path_factory.mktemp("user")
    done = run(folder, "train", "--data", talkers, "--steps", 20, *SMALL)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def fails(done, *words):
    """The command ended with one clear line and no traceback."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert lines and lines[-1].startswith("error: ") and "Traceback" not in done.stderr
    for word in words:
        assert word in lines[-1], lines[-1]


# --- train


def test_training_leaves_the_promised_files_and_prints_the_references(trained):
    folder, printed = trained
    out = folder / "runs" / "001-demo-talkers"
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert {"model", "config", "data", "step", "val_nll"} <= set(state)
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries] == [1, 10, 20]
    assert all({"step", "train_nll", "val_nll", "frames_per_second"} == set(e) for e in entries)
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert "VAR(2)" in printed and "audio gain" in printed and "left" in printed
    assert not list(out.glob(".*"))  # no temporary file stays


def test_sampling_takes_one_thread_of_a_busy_machine(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(2)
    try:
        assert torch.get_num_threads() == 2
        assert run(tmp_path, "sample", "--out", "a.npy").returncode == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)


@pytest.mark.slow
def test_a_reference_that_too_few_clips_would_make_up_is_left_out(tmp_path):
    """A VAR(3) that 10 clips are fitted by is worse than nothing by any number of nats."""
    prepare_data.synthetic(tmp_path / "few", clips=10)
    tiny = ["--steps", "1", "--hidden", "8", "--steps_per_scale", "1"]
    printed = run(tmp_path, "train", "--data", "few", "--out", "here", *tiny).stdout
    assert "gap to the optimum" in printed and "VAR(" not in printed
    figures = json.loads((tmp_path / "here" / "figures.json").read_text())
    assert "optimum" in figures and not [name for name in figures if name.startswith("var")]


@pytest.mark.slow  # a process that imports PyTorch
def test_importing_builds_and_prints_nothing(tmp_path):
    command = [sys.executable, "-c", "import talkingflow"]
    done = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_validating_more_often_does_not_change_the_weights(talkers, tmp_path):
    weights = []
    for interval in (1, 100):
        config = Config(steps=2, hidden=8, steps_per_scale=1, eval_interval=interval)
        trainer = Trainer(config, Clips(talkers), tmp_path, "cpu")
        trainer.run()
        both = (*trainer.flow.parameters(), *trainer.average.parameters())
        weights.append(torch.cat([p.flatten() for p in both]))
    assert torch.equal(*weights)


def test_the_average_of_growing_weights_lags_an_eleventh_behind(talkers, tmp_path):
    """a_m = m / (m + 10) a_{m-1} + 10 / (m + 10) w_m, m tens of steps: for w_m = m it is 10 / 11 m."""
    trainer = Trainer(Config(steps=900, hidden=8, steps_per_scale=1), Clips(talkers), tmp_path, "cpu")
    weight, mean = trainer.flow.scales[0][0].actnorm.bias, trainer.average.scales[0][0].actnorm.bias
    mean.data.zero_()
    for trainer.step in range(10, 901, 10):
        weight.data.fill_(trainer.step)
        trainer.take_average()
        assert (mean - 10 / 11 * trainer.step).abs().max() < 1e-3 * trainer.step
    trainer.log(1.0)
    kept = load_checkpoint(tmp_path / "checkpoint.pt")[0]
    assert torch.equal(kept.scales[0][0].actnorm.bias, mean)


SIGNALS = [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]


@pytest.mark.parametrize("number, status", SIGNALS)
def test_a_signal_saves_and_says_how_to_go_on(talkers, tmp_path, number, status):
    def interrupt():  # once a step is logged
        while not (tmp_path / "run" / "resume.pt").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    timer = threading.Thread(target=interrupt)
    timer.start()
    done = run(tmp_path, "train", "--data", talkers, "--steps", 100000, "--out", "run", *SMALL)
    timer.join()
    assert done.returncode == status, done.stderr
    assert "python talkingflow.py train --resume --out run" in done.stdout
    step = torch.load(tmp_path / "run" / "resume.pt", weights_only=True)["step"]
    assert step < 1000
    more = ("--steps", step + 10, "--recompute", "true")  # how it is computed may change
    done = run(tmp_path, "train", "--resume", "--out", "run", *more)
    assert done.returncode == 0 and f"step {step + 10:5d}/{step + 10}" in done.stdout, done.stderr


def test_a_gradient_that_is_not_finite_changes_nothing_and_names_the_step(talkers, tmp_path, capsys):
    trainer = Trainer(Config(steps=50, hidden=8, steps_per_scale=1), Clips(talkers), tmp_path, "cpu")
    trainer.train_step()
    before = [p.detach().clone() for p in trainer.flow.parameters()]
    batch = trainer.clips.batch
    trainer.clips.batch = lambda *args, **how: tuple(v * float("nan") for v in batch(*args, **how))
    trainer.train_step()
    assert "step 2: gradient not finite" in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.flow.parameters()))
    with pytest.raises(UserError, match="5 gradients in a row"):
        for _ in range(5):
            trainer.train_step()


@pytest.mark.slow
def test_initialisation_does_not_depend_on_the_process(talkers, monkeypatch):
    flows = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        flows.append(
            Trainer(
                Config(steps=1, hidden=8, steps_per_scale=1), Clips(talkers), "unused", "cpu"
            ).flow.state_dict()
        )
    assert all(torch.equal(value, flows[1][name]) for name, value in flows[0].items())


# --- sample


@pytest.mark.parametrize("suffix", [".html", ".npz", ".csv", ".npy", ".gif"])
def test_sample_writes_every_format(trained, suffix, tmp_path):
    folder, _ = trained
    out = tmp_path / f"face{suffix}"
    done = run(folder, "sample", "--num-samples", 2, "--seed", 7, "--out", out)
    assert done.returncode == 0, done.stderr
    if suffix == ".npz":
        f = np.load(out)
        assert f["landmarks"].shape == (2, 80, 68, 2) and f["landmarks"].dtype == np.float32
        assert (int(f["fps"]), str(f["layout"]), int(f["seed"]), float(f["temperature"])) == (
            25,
            "ibug68",
            7,
            1.0,
        )
        assert len(str(f["checkpoint"])) == 64 and str(f["audio"])
    if suffix == ".npy":
        assert np.load(out).shape == (2, 80, 68, 2)
    if suffix == ".csv":
        lines = out.read_text().splitlines()
        assert len(lines) == 1 + 2 * 80
        assert lines[0].startswith("frame, face_id, timestamp, confidence, success, x_0, x_1")
    if suffix == ".html":
        page = out.read_text()
        # nothing comes from outside
        assert "http" not in page and "src=" not in page and "@import" not in page
    if suffix == ".gif":
        assert out.read_bytes()[:6] == b"GIF89a"


@pytest.mark.slow  # draws 1,280 pictures
def test_a_name_that_ends_in_a_slash_is_a_folder_of_pictures(trained, tmp_path):
    folder, _ = trained
    flags = ["--num-samples", 2, "--out", f"{tmp_path}/pictures/"]
    done = run(folder, "sample", *flags)
    assert done.returncode == 0 and "2 samples of 80 frames" in done.stdout, done.stderr
    for face in ("face1", "face2"):
        for kind in ("lines", "colours"):
            names = sorted(path.name for path in (tmp_path / "pictures" / face / kind).iterdir())
            assert names == [f"{t:05d}.png" for t in range(80)]
    fails(run(folder, "sample", *flags), "exists already")
    assert run(folder, "sample", *flags, "--force").returncode == 0


def test_weights_of_talkers_are_named_where_a_real_voice_is_to_be_heard(trained, tmp_path):
    folder, printed = trained
    assert printed.endswith("Next: python talkingflow.py sample\n")
    weights = Path("runs") / "001-demo-talkers" / "checkpoint.pt"
    note = f"note: {weights}, the newest run, knows synthetic talkers only; for a real voice pass"
    wav = write_wav(tmp_path / "me.wav")
    heard = run(folder, "sample", "--audio", wav, "--num-samples", 1, "--out", tmp_path / "a.npy")
    assert note in heard.stderr and heard.stdout.endswith(f" for me.wav, by {weights}\n")
    assert note in stream(folder, bytes(4000)).stderr
    chosen = ["--checkpoint", weights, "--num-samples", 1]
    heard = run(folder, "sample", "--audio", wav, *chosen, "--out", tmp_path / "b.npy")
    assert heard.returncode == 0 and "talkers only" not in heard.stderr
    assert "talkers only" not in run(folder, "sample", "--out", tmp_path / "c.npy").stderr
    fails(run(folder, "live", "--out", tmp_path / "live.txt"), "suffix .txt vs .html")


def test_the_page_of_synthetic_talkers_calls_nothing_recorded(trained, tmp_path):
    folder, _ = trained
    assert run(folder, "sample", "--temperature", 0.7, "--out", tmp_path / "a.html").returncode == 0
    page = json.loads(re.search(r"^const page = (.*);$", (tmp_path / "a.html").read_text(), re.M)[1])
    assert page["temperatures"] == [0, 0.5, 0.7, 1] and page["temperature"] == 0.7
    assert page["names"] == ["synthetic talker's own face", "sample 1", "sample 2", "sample 3"]


def test_sample_without_names_takes_the_newest_run_and_never_overwrites(trained):
    folder, _ = trained
    assert run(folder, "sample").returncode == run(folder, "sample").returncode == 0
    assert sorted(p.name for p in folder.glob("runs/*/sample*")) == ["sample-2.html", "sample.html"]


def test_without_a_run_the_pretrained_weights_speak(tmp_path):
    write_wav(tmp_path / "a.wav", 1.0)
    done = run(tmp_path, "sample", "--audio", "a.wav")
    assert done.returncode == 0 and (tmp_path / "sample.html").is_file(), done.stderr
    assert run(tmp_path, "sample").returncode == 0  # the sentence that comes with them


def test_a_sample_does_not_depend_on_how_many_are_drawn(trained, tmp_path):
    folder, _ = trained
    for faces in (1, 3):
        assert (
            run(folder, "sample", "--num-samples", faces, "--out", tmp_path / f"{faces}.npy").returncode == 0
        )
    one, three = np.load(tmp_path / "1.npy"), np.load(tmp_path / "3.npy")
    assert np.array_equal(one[0], three[0]) and not np.array_equal(three[0], three[1])


@pytest.mark.parametrize("rate, channels", [(16000, 1), (8000, 1), (44100, 2), (48000, 1)])
def test_sample_takes_any_rate_and_stereo(trained, tmp_path, rate, channels):
    folder, _ = trained
    wav = write_wav(tmp_path / "a.wav", 1.5, rate, channels)
    done = run(folder, "sample", "--audio", wav, "--out", tmp_path / "x.npz", "--num-samples", 1)
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "x.npz")["landmarks"].shape == (1, 37, 68, 2)
    assert ("nothing above 4000 Hz" in done.stderr) == (rate == 8000)


def test_silence_and_a_long_sound_are_fine(trained, tmp_path):
    folder, _ = trained
    for name, seconds, amplitude in (("silence", 1.0, 0.0), ("long", 90.0, 0.2)):
        wav = write_wav(tmp_path / f"{name}.wav", seconds, amplitude=amplitude)
        done = run(folder, "sample", "--audio", wav, "--out", tmp_path / f"{name}.npy", "--num-samples", 1)
        assert done.returncode == 0, done.stderr
        x = np.load(tmp_path / f"{name}.npy")
        assert x.shape[1] == seconds * 25 and np.isfinite(x).all()


def test_blocks_of_sound_give_the_faces_of_the_whole_sound():
    torch.manual_seed(0)
    flow = TalkingFlow(Config(hidden=8, lead=2)).eval()
    data = {"mel": {"n_mels": 40}, "fps": 25}
    sound = np.random.default_rng(0).standard_normal(16000 * 2).astype(np.float32) * 0.1
    whole = Talker(flow, data, 16000, faces=2, seed=1)
    x = np.concatenate([whole.push(sound), whole.finish()], 1)
    for size in (100, 641, 5000):
        talker = Talker(flow, data, 16000, faces=2, seed=1)
        parts = [talker.push(sound[i : i + size]) for i in range(0, len(sound), size)]
        assert np.abs(np.concatenate([*parts, talker.finish()], 1) - x).max() < 1e-5
    assert x.shape == (2, 50, 136)
    assert whole.push(np.zeros(0, np.float32)).shape == (2, 0, 136)


def test_mel_of_an_arriving_sound_equals_the_whole_sound_at_any_rate():
    rng = np.random.default_rng(0)
    for rate, fps in ((16000, 25), (44100, 25), (16000, 30), (22050, 29.97)):
        sound = rng.standard_normal(rate).astype(np.float32) * 0.1
        whole = Mel(fps=fps, sample_rate=rate).columns(sound)
        assert len(whole) == int(fps)
        mel = Mel(fps=fps, sample_rate=rate)
        pieces = np.split(sound, np.sort(rng.integers(0, rate, 40)))
        assert np.abs(np.concatenate([mel.push(piece) for piece in pieces]) - whole).max() < 1e-4


def test_mel_is_causal():
    sound = np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    before = Mel().columns(sound)
    sound[11 * 640 :] = 0
    after = Mel().columns(sound)
    assert np.array_equal(before[:11], after[:11]) and not np.array_equal(before[11], after[11])


def test_mel_hears_the_same_at_every_sample_rate():
    """A tone and its level do not depend on the rate: the bands are in Hz, so no resampler is needed."""
    columns = []
    for rate in (16000, 44100, 48000):
        time_axis = np.arange(rate) / rate
        columns.append(Mel(sample_rate=rate).columns(0.3 * np.sin(2 * np.pi * 440 * time_axis))[5:])
    loudest = columns[0].mean(0) > columns[0].max() - 3
    for other in columns[1:]:
        assert np.abs(other - columns[0])[:, loudest].max() < 0.05


# --- stream


def test_stream_prints_a_line_a_frame_equal_to_sample(trained, tmp_path):
    folder, _ = trained
    wav = write_wav(tmp_path / "a.wav", 2.0)
    with wave.open(str(wav)) as f:
        pcm = f.readframes(f.getnframes())
    done = stream(folder, pcm, "--seed", 3)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) < 3000  # five digits a number, not a float32's seventeen
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["frame"] for line in lines] == list(range(50)) and lines[1]["time"] == 0.04
    flags = ["--seed", 3, "--num-samples", 1, "--out", tmp_path / "x.npy"]
    assert run(folder, "sample", "--audio", wav, *flags).returncode == 0
    assert (
        np.abs(np.array([line["landmarks"] for line in lines]) - np.load(tmp_path / "x.npy")[0]).max() < 2e-5
    )


@pytest.mark.slow  # a process that speaks in real time
def test_stream_speaks_while_the_sound_arrives(trained):
    folder, _ = trained
    command = [sys.executable, str(ROOT / "talkingflow.py"), "stream"]
    process = subprocess.Popen(command, cwd=folder, env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdin.write(b"\0" * 2 * 16000)
    process.stdin.flush()  # the pipe stays open: the first frames must come all the same
    assert json.loads(process.stdout.readline())["frame"] == 0
    process.stdin.close()
    assert len(process.stdout.read().splitlines()) == 24 and process.wait(60) == 0


# --- bad input


def test_unknown_flags_and_impossible_values_exit_2(trained):
    folder, _ = trained
    for args in (["train", "--stepz", 3], ["sample", "--temperature", "-1"], ["sample", "--num-samples", 0],
                 ["sample", "--temperature", "nan"], ["train", "--hidden", "many"],
                 ["train", "--prior_mean", "maybe"], ["stream", "--rate", 5], []):  # fmt: skip
        done = run(folder, *args)
        assert done.returncode == 2 and "Traceback" not in done.stderr, args


@pytest.mark.parametrize("flags, word", [
    (["--hidden", 0], "hidden: 0"), (["--lr", "nan"], "lr: nan"), (["--lambdas", "1,2"], "lambdas"),
    (["--num_scales", 0], "num_scales"),
    (["--prior", "arma"], "prior: arma"), (["--dropout", 1], "dropout"), (["--dim", 100], "dim: 100 vs 136"),
    (["--seq_len", 9000, "--batch_size", 0], "batch_size"), (["--cond_dim", 80], "cond_dim: 80 vs 40"),
    (["--device", "cuda:7"], "device"),
    (["--steps", 0], "steps"), (["--resume", "--out", "nowhere"], "resume.pt"),
])  # fmt: skip
def test_bad_training_flags_end_in_one_line(talkers, tmp_path, flags, word):
    fails(run(tmp_path, "train", "--data", talkers, *flags), word)
    assert not (tmp_path / "runs").exists()


def test_bad_data_folders_end_in_one_line(talkers, tmp_path):
    fails(run(tmp_path, "train", "--data", tmp_path / "nothing"), "no meta.json")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "meta.json").write_text("{}")
    fails(run(tmp_path, "train", "--data", broken), "unreadable")
    for name in ("landmarks", "mel", "audio"):
        (broken / f"{name}.npy").write_bytes((talkers / f"{name}.npy").read_bytes())
    meta = json.loads((talkers / "meta.json").read_text())
    (broken / "meta.json").write_text(json.dumps(meta | {"format": 9}))
    fails(run(tmp_path, "train", "--data", broken), "--force")
    (broken / "meta.json").write_text(json.dumps(meta))
    landmarks = np.load(talkers / "landmarks.npy")
    np.save(broken / "landmarks.npy", np.where(np.arange(136) == 5, np.float32(np.nan), landmarks))
    fails(run(tmp_path, "train", "--data", broken), "NaN or Inf in the landmarks")
    np.save(broken / "landmarks.npy", np.where(np.arange(136) == 5, np.float32(0.5), landmarks))
    fails(run(tmp_path, "train", "--data", broken), "coordinates [5] never move")


def test_a_run_is_never_overwritten_unasked(trained, talkers):
    folder, _ = trained
    out = next((folder / "runs").iterdir())
    before = (out / "checkpoint.pt").read_bytes()
    fails(run(folder, "train", "--data", talkers, "--out", out), "exists already")
    fails(run(folder, "train", "--resume", "--out", out, "--hidden", 99), "hidden: 99 vs 16")
    fails(run(folder, "train", "--resume", "--out", out), "steps: 20 vs 20 already done")
    assert (out / "checkpoint.pt").read_bytes() == before


def test_damaged_checkpoints_are_refused(trained, tmp_path):
    folder, _ = trained
    good = next((folder / "runs").glob("*/checkpoint.pt")).read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    damaged = {
        "flipped": bytes(flipped),
        "half": good[: len(good) // 2],
        "empty": b"",
        "text": b"hello",
        "lfs": lfs,
    }
    for name, content in damaged.items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(content)
        fails(run(folder, "sample", "--checkpoint", path), name, "vs a TalkingFlow checkpoint")
    fails(run(folder, "sample", "--checkpoint", tmp_path), f"{tmp_path}/checkpoint.pt: no such file")
    done = run(folder, "sample", "--checkpoint", "runs/001-demo-talkers", "--out", tmp_path / "run.npy")
    assert done.returncode == 0 and "by runs/001-demo-talkers/checkpoint.pt" in done.stdout, done.stderr
    fails(run(folder, "sample", "--checkpoint", tmp_path / "none.pt"), "no such file")
    fails(run(tmp_path, "train", "--resume"), "no resume.pt")


def test_a_checkpoint_runs_no_code(trained, tmp_path):
    class Canary:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"format": 1, "model": Canary()}, tmp_path / "evil.pt")
    fails(run(trained[0], "sample", "--checkpoint", tmp_path / "evil.pt"), "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_other_sizes_or_other_sound_is_refused(trained, talkers, tmp_path):
    folder, _ = trained
    state = torch.load(next((folder / "runs").glob("*/checkpoint.pt")), weights_only=True)
    state["config"]["hidden"] = 24
    torch.save(state, tmp_path / "sizes.pt")
    fails(run(folder, "sample", "--checkpoint", tmp_path / "sizes.pt"), "size mismatch")
    state["config"]["hidden"] = 16
    state["data"]["mel"]["n_mels"] = 80
    torch.save(state, tmp_path / "mel.pt")
    fails(run(folder, "sample", "--checkpoint", tmp_path / "mel.pt"), "n_mels 80")


def test_bad_sounds_and_outputs_end_in_one_line_and_leave_nothing(trained, tmp_path):
    folder, _ = trained
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("hello")
    write_wav(tmp_path / "none.wav", 0)
    write_wav(tmp_path / "short.wav", 0.03)
    good = write_wav(tmp_path / "good.wav", 1)
    out = tmp_path / "out"
    for name, word in (("empty", "unreadable"), ("text", "unreadable"), ("none", "0 samples"),
                       ("short", "480 samples"), ("missing", "no such file")):  # fmt: skip
        fails(run(folder, "sample", "--audio", tmp_path / f"{name}.wav", "--out", f"{out}.npz"), word)
    fails(run(folder, "sample", "--audio", tmp_path, "--out", f"{out}.npz"), "a folder")
    fails(
        run(folder, "sample", "--audio", good, "--out", f"{out}.bvh"),
        ".bvh vs .html, .npz, .csv, .npy, .gif, .mp4",
    )
    fails(run(folder, "sample", "--audio", good, "--out", out), "suffix missing")
    fails(run(folder, "sample", "--audio", good, "--out", f"{out}.npz/"), "Leave the / out")
    fails(run(folder, "sample", "--clip", "nobody", "--out", f"{out}.npz"), "no clip nobody")
    assert not list(tmp_path.glob("out*"))
    (tmp_path / "out.npz").write_text("mine")
    fails(run(folder, "sample", "--audio", good, "--out", f"{out}.npz"), "exists already")
    assert (tmp_path / "out.npz").read_text() == "mine"
    assert run(folder, "sample", "--audio", good, "--out", f"{out}.npz", "--force").returncode == 0
    fails(stream(folder, b""), "standard input")


def test_a_video_without_its_decoder_says_what_to_install(trained, tmp_path, monkeypatch):
    (tmp_path / "talk.mp4").write_bytes(b"\0" * 100)
    monkeypatch.setitem(sys.modules, "av", None)
    fails(
        run(trained[0], "sample", "--audio", tmp_path / "talk.mp4", "--out", tmp_path / "x.npz"),
        "pip install av",
    )


def test_mp4_without_its_encoder_says_what_to_install(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    fails(run(trained[0], "sample", "--out", tmp_path / "a.mp4"), "pip install av")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rate", thinned([18000, 16000, 44100], every=3))
def test_mp4_has_the_pictures_and_the_sound_of_the_sample(tmp_path, rate):
    av = pytest.importorskip("av")
    from media.export import write_mp4

    x = SyntheticFace().draw(np.zeros((2, 50, 4)), np.random.default_rng(0)).reshape(2, 50, 68, 2)
    tone = (8000 * np.sin(2 * np.pi * 200 * np.arange(2 * rate) / rate)).astype(np.int16)
    write_mp4(tmp_path / "a.mp4", x, None, tone, rate, {"fps": 25})
    with av.open(str(tmp_path / "a.mp4")) as file:
        pictures = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    with av.open(str(tmp_path / "a.mp4")) as file:
        heard = np.concatenate([frame.to_ndarray()[0] for frame in file.decode(audio=0)])
        seconds = len(heard) / file.streams.audio[0].rate
    assert len(pictures) == 50 and pictures[0].shape == (480, 960, 3) and np.ptp(pictures[0]) > 150
    assert abs(seconds - 2) < 0.15 and 0.2 < np.abs(heard).max() < 0.3


def test_a_full_disk_keeps_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_text("old")

    def full(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        console.write_atomically(path, full)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


# --- real speech


@pytest.mark.slow
def test_real_speech_is_prepared_trained_and_sampled(grid, tmp_path):
    """The road of a user with GRID: a few hundred steps, then a mouth that follows the sound."""
    done = run(tmp_path, grid, "--out", "data/grid", main=prepare_data.main)
    assert done.returncode == 0, done.stderr
    assert "611 clips" in done.stdout.splitlines()[-1]
    done = run(tmp_path, "train", "--data", "data/grid", "--steps", 300, "--eval_interval", 100)
    assert done.returncode == 0, done.stderr
    run_folder = next((tmp_path / "runs").iterdir())
    figures = json.loads((run_folder / "figures.json").read_text())
    assert figures["nll"] < figures["var3"] - 0.005, figures
    assert 0.8 < figures["head_jitter"] < 1.4, figures
    assert figures["mouth_correlation_temperature0"] > 0.6, figures
    assert run(tmp_path, "sample", "--out", "x.npz").returncode == 0
    faces = np.load(tmp_path / "x.npz")["landmarks"]
    assert faces.shape[2:] == (68, 2) and 0 < mouth_opening(faces).std() < 1
