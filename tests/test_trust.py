"""What may happen to a run and its files, and what must not: numbers that drift, damaged and hostile
checkpoints, kills, full disks, closed pipes, machines without a home, a terminal or a network."""

import contextlib
import copy
import importlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, say, scrambled, thinned
from test_cli import ENV, SMALL, fails, run

import prepare_data
import talkingflow
from media import console
from media.checkpoint import read_checkpoint, write_checkpoint
from media.console import UserError
from talkingflow import Clips, Config, Talker, TalkingFlow, Trainer, load_checkpoint

TRAIN = [sys.executable, str(ROOT / "talkingflow.py"), "train"]


# --- Numbers that drift


def losses_of(trainer, steps):
    losses = []
    hook = trainer.model.register_forward_hook(lambda module, args, out: losses.append(out[0].item()))
    for _ in range(steps):
        trainer.train_step()
    hook.remove()
    return losses


def test_the_first_ten_losses_of_the_demo_are_these_and_resuming_gives_the_same_tail(waves, tmp_path):
    """Literals: any change of the model, its start, the batches, the noise or Adam shows here first. What
    was saved half way goes on to the last bit."""
    config = Config(noise=0.0022)
    whole = Trainer(config, Clips(waves), tmp_path, "cpu")
    losses = losses_of(whole, 5)
    whole.save_resume()
    losses += losses_of(whole, 5)
    assert losses == pytest.approx(LOSSES, abs=1e-4), losses
    rest = Trainer(config, Clips(waves), tmp_path, "cpu", read_checkpoint(tmp_path / "resume.pt"))
    assert losses_of(rest, 5) == losses[5:]
    for one, other in ((whole.flow, rest.flow), (whole.average, rest.average)):
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name


LOSSES = [-5.74943, -5.74974, -5.74148, -5.74533, -5.73964, -5.74633, -5.74191, -5.74567, -5.74233,
          -5.73761]  # fmt: skip


# --- Damaged and hostile checkpoints


def tiny():
    """The smallest flow with all its parts, and the dict that a run would save."""
    torch.manual_seed(0)
    config = Config(
        dim=4, cond_dim=2, hidden=2, num_scales=1, steps_per_scale=1, lambdas=(1.0,), dilations=(1,)
    )
    mel = {"n_mels": 2, "fmin": 0.0, "fmax": 8000.0, "window": 0.064, "level": False}
    data = {"mel": mel, "fps": 25, "layout": "ibug68", "normalisation": "none", "interocular": 0.2}
    data |= {"sources": [], "fingerprint": "0", "folder": "nowhere"}
    state = {"format": 1, "config": vars(config).copy(), "data": data, "step": 3, "val_nll": 0.5}
    return state | {"model": TalkingFlow(config).state_dict()}


def damages(good, count, rng):
    """(what, bytes): every byte changed once, then `count` random damages of every kind."""
    for place in range(len(good)):
        yield (
            f"byte {place} changed",
            good[:place] + bytes([good[place] ^ rng.randrange(1, 256)]) + good[place + 1 :],
        )
    for i in range(count):
        a, b = sorted(rng.randrange(len(good)) for _ in range(2))
        some = rng.randbytes(rng.randrange(1, 200))
        yield from [
            (f"cut at {a}", good[:a]),
            (f"begun at {a + 1}", good[a + 1:]),
            (f"{a} to {b} left out", good[:a] + good[b + 1:]),
            (f"{a} to {b} zero", good[:a] + bytes(b + 1 - a) + good[b + 1:]),
            (f"{a} to {b} twice", good[:b] + good[a:]),
            (f"{len(some)} bytes more at {a}", good[:a] + some + good[a:]),
            (f"{len(some)} others at {a}", good[:a] + some + good[a + len(some):]),
            (f"{len(some)} more at the end", good + some),
        ][i % 8:][:1]  # fmt: skip


@pytest.mark.parametrize("share", [0.05, pytest.param(1, marks=pytest.mark.slow)])
def test_ten_thousand_damages_of_a_checkpoint_are_all_refused(tmp_path, share):
    """Without --slow 500 of them."""
    path, rng, refused = tmp_path / "checkpoint.pt", random.Random(0), 0
    write_checkpoint(path, tiny())
    good = path.read_bytes()
    assert load_checkpoint(path)
    for what, bad in damages(good, max(1000, 10_500 - len(good)), rng):
        if bad != good and rng.random() < share:
            path.write_bytes(bad)
            with pytest.raises(UserError, match="unreadable"):
                load_checkpoint(path)
                pytest.fail(what)
            refused += 1
    print(refused, "damages refused")
    assert refused >= 10_000 * share * 0.9, refused


def test_a_damaged_file_of_plain_torch_save_is_refused_or_says_the_same(tmp_path):
    """Such a file has no digest: what its checksums do not cover may change, its numbers may not."""
    path, state, refused, same = tmp_path / "checkpoint.pt", tiny(), 0, 0
    torch.save(state, path)
    good = path.read_bytes()
    for what, bad in damages(good, 200, random.Random(1)):
        if what.startswith("byte") and not what.split()[1].endswith("73"):  # one in a hundred
            continue
        path.write_bytes(bad)
        try:
            read = load_checkpoint(path)[1]
        except UserError:
            refused += 1
            continue
        same += 1
        assert read["config"] == state["config"] and read["data"] == state["data"], what
        assert all(torch.equal(read["model"][name], value) for name, value in state["model"].items()), what
    assert refused > same > 0, (refused, same)


HOSTILE = [0, -1, 2**40, 2**70, 1e300, float("nan"), float("inf"), "x", None, True, [], {}, (10**6,) * 3]


def leaves(tree, path=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield path + (key,)
            yield from leaves(value, path + (key,))
        else:
            yield path + (key,)


def changed(state, path, value):
    state = copy.deepcopy(state)
    *parents, last = path
    inner = state
    for key in parents:
        inner = inner[key]
    if value is KeyError:
        del inner[last]
    else:
        inner[last] = value
    return state


def hostile_tensors(tensor):
    huge = torch.zeros(1).expand(10**6, 10**6)  # four bytes that claim four terabytes
    yield from (huge, tensor.double(), tensor[None], tensor.flatten()[:0], tensor.to(torch.complex64))
    yield from (tensor * float("nan"), tensor.to_sparse(), "x", torch.zeros(1).expand(tensor.shape or (1, 1)))


@pytest.mark.slow
def test_every_value_of_a_checkpoint_may_be_hostile(tmp_path):
    """Sealed files, one value each replaced or left out. Either the file is refused in one line, or the
    face that it describes speaks; nothing else is raised, no memory is taken."""
    path, state, tried, refused = tmp_path / "checkpoint.pt", tiny(), 0, 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for place in leaves(state):
        bad = [KeyError, *HOSTILE]
        if place[0] == "model" and len(place) > 1:
            bad = [KeyError, *hostile_tensors(state["model"][place[1]])]
        for value in bad:
            write_checkpoint(path, changed(state, place, value))
            tried += 1
            try:
                flow, read = load_checkpoint(path)
                talker = Talker(flow, read["data"], 16000)
                x = np.concatenate([talker.push(np.zeros(1280, np.float32)), talker.finish()], 1)
                assert x.shape[2] == 4, (place, value)
            except UserError:
                refused += 1
            except Exception as e:
                raise AssertionError(f"{place} = {value!r}") from e
    print(tried, "hostile files,", refused, "refused")
    assert tried > 600 and refused > 0.6 * tried, (refused, tried)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_other_files_are_refused_in_one_line(waves, tmp_path):
    """A best checkpoint renamed to resume.pt, a compressed one, one that needs code."""
    write_checkpoint(tmp_path / "resume.pt", tiny())
    with pytest.raises(UserError, match="resume.pt: "):
        Trainer(Config(hidden=8), Clips(waves), tmp_path, "cpu", read_checkpoint(tmp_path / "resume.pt"))
    import zipfile

    torch.save(tiny(), tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "small.pt", "w", 8) as small,
    ):
        for name in plain.namelist():
            small.writestr(name, plain.read(name) + bytes(100_000))
    with pytest.raises(UserError, match="compressed"):
        load_checkpoint(tmp_path / "small.pt")


# --- Kills and full disks


@pytest.mark.slow  # starts fifty processes
def test_fifty_kills_at_random_moments_of_saving_leave_a_whole_file(tmp_path):
    """kill -9 while a process does nothing but save; what is there is always the last or the last but one."""
    path, rng, state, seen = tmp_path / "checkpoint.pt", random.Random(0), tiny(), []
    state["model"]["padding"] = torch.zeros(100_000)
    write_checkpoint(path, state | {"step": -1})
    for i in range(50):
        read_end, write_end = os.pipe()
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                for step in range(10**6):
                    write_checkpoint(path, state | {"step": 1000 * i + step})
                    os.write(write_end, b".")
            os._exit(1)
        os.close(write_end)
        os.read(read_end, 1)  # the first save is done
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        saved = 1 + len(os.read(read_end, 10**6))
        os.close(read_end)
        step = read_checkpoint(path)["step"] - 1000 * i
        assert saved - 1 <= step <= saved, (i, saved, step)
        seen.append(step)
    left = [p.name for p in tmp_path.iterdir() if p != path]
    assert all(name.startswith(".checkpoint.pt.") for name in left) and len(set(seen)) > 1, (left, seen)
    print(f"{len(left)} of 50 kills came while a file was half written")
    assert left


@contextlib.contextmanager
def full_disk(size):
    """No file may grow beyond `size` bytes: the same errors as on a full disk, for anyone, anywhere."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.slow  # starts processes
def test_a_disk_that_fills_up_ends_training_in_one_line_and_keeps_what_was_saved(waves, tmp_path):
    done = run(tmp_path, "train", "--data", waves, "--out", "run", "--steps", 10, *SMALL)
    assert done.returncode == 0, done.stderr
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.pt")}
    for size in (20_000, 0):  # too little for a checkpoint, nothing at all
        with full_disk(size):
            fails(run(tmp_path, "train", "--resume", "--out", "run", "--steps", 20), "File too large")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.pt")}
    assert not list((tmp_path / "run").glob(".*"))
    done = run(tmp_path, "train", "--resume", "--out", "run", "--steps", 20)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".npz", ".csv", ".npy", ".html", ".gif"])
def test_a_disk_too_small_for_a_sample_leaves_nothing_of_it(spoken, tmp_path, suffix):
    wav = sound(tmp_path)
    with full_disk(10_000):
        done = run(tmp_path, "sample", "--checkpoint", spoken, "--audio", wav, "--out", f"x{suffix}")
    fails(done, "not written")
    assert not list(tmp_path.glob("*x*"))


# --- Output that ends


@pytest.fixture(scope="module")
def spoken(waves, tmp_path_factory):
    """The checkpoint of a short run."""
    folder = tmp_path_factory.mktemp("run")
    done = run(folder, "train", "--data", waves, "--out", "run", "--steps", 10, *SMALL)
    assert done.returncode == 0, done.stderr
    return folder / "run" / "checkpoint.pt"


def sound(folder, seconds=1.0):
    with wave.open(str(folder / "sound.wav"), "wb") as f:
        f.setparams((1, 2, 16000, 0, "NONE", ""))
        f.writeframes((8000 * (scrambled(int(16000 * seconds)) - 0.5)).astype("<i2").tobytes())
    return folder / "sound.wav"


def landmark_files(folder, count=3):
    """Files that prepare_data.py takes: a mean face that moves, and a sound, as .npz."""
    from media.talkers import SyntheticFace

    folder.mkdir()
    for i in range(count):
        t = np.arange(60)[:, None]
        face = 200 * np.asarray(SyntheticFace().mean).reshape(-1, 68, 2)[0] + 100
        points = face + 3 * np.sin(t / 9 + i + np.arange(136) / 40).reshape(-1, 68, 2)
        audio = (8000 * (scrambled(60 * 640) - 0.5)).astype(np.int16)
        np.savez(folder / f"{i}.npz", landmarks=points, fps=25, audio=audio, sr=16000, wh=[400, 400])
    return folder


def closed_pipe():
    """A stdout whose reader has gone."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    return os.fdopen(write_end, "w")


def full_device():
    return open("/dev/full", "w")


@pytest.mark.parametrize("broken", thinned([closed_pipe, full_device], every=2))
def test_output_that_nobody_reads_does_not_end_the_work(waves, tmp_path, monkeypatch, broken):
    """`train | head -1`, `prepare_data.py ... | head -1`, `> /dev/full`: the pipe ends, nothing else."""
    monkeypatch.chdir(tmp_path)
    landmark_files(tmp_path / "src")
    for main, *args in (
        (talkingflow.main, "train", "--data", waves, "--out", "run", "--steps", 12, *SMALL),
        (prepare_data.main, "src", "--out", "prepared"),
        (prepare_data.main, "synthetic", "--clips", 8, "--out", "talkers"),
    ):
        with broken() as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            assert main([str(arg) for arg in args]) == 0
    assert load_checkpoint("run/checkpoint.pt")[1]["step"] >= 1
    assert read_checkpoint("run/resume.pt")["step"] == 12
    assert len(Clips("prepared").clips) == 3 and len(Clips("talkers").clips) == 10


def test_a_stream_ends_with_its_reader(spoken, monkeypatch):
    """There nothing is saved and the sound may never end."""
    read = staticmethod(lambda n=1: bytes(n))
    stdin = type("Endless", (), {"buffer": type("", (), {"read": read, "read1": read})})
    monkeypatch.setattr(sys, "stdin", stdin)
    with closed_pipe() as out, contextlib.redirect_stdout(out):
        assert talkingflow.main(["stream", "--checkpoint", str(spoken)]) == 0


@pytest.mark.slow
def test_a_program_without_stdout_and_stderr_trains_and_samples(waves, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    spec = importlib.util.spec_from_file_location("console", console.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))  # as it is imported there
    flags = ["--data", str(waves), "--out", "run", "--steps", "2", *SMALL]
    assert talkingflow.main(["train", *flags]) == 0
    assert talkingflow.main(["sample", "--checkpoint", "run/checkpoint.pt", "--out", "x.npz"]) == 0
    assert prepare_data.main(["synthetic", "--clips", "8", "--out", "talkers"]) == 0
    assert Path("x.npz").is_file()


@pytest.mark.slow
def test_training_works_in_a_thread_and_leaves_the_signals_alone(waves, tmp_path):
    handlers, results = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)], []
    out = str(tmp_path / "run")
    args = ["train", "--data", str(waves), "--out", out, "--steps", "3", *SMALL]
    thread = threading.Thread(target=lambda: results.append(talkingflow.main(args)))
    thread.start()
    thread.join(120)
    assert results == [0] and load_checkpoint(f"{out}/checkpoint.pt")
    assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.slow
def test_a_real_pipe_to_head_ends_alone(waves, tmp_path):
    train = " ".join([*TRAIN, "--data", str(waves), "--out", "run", "--steps", "12", *SMALL])
    command = ["bash", "-c", f"{train} 2>&1 | head -1; echo ${{PIPESTATUS[0]}}"]
    done = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "0" and done.stderr == "", (done.stdout, done.stderr)
    assert read_checkpoint(tmp_path / "run" / "resume.pt")["step"] == 12


# --- Machines


@pytest.mark.slow
def test_a_linked_script_works_without_a_home_and_with_read_only_packages(waves, tmp_path):
    """~/bin/tf.py -> talkingflow.py, no writable HOME, no writable cache of any package."""
    (tmp_path / "tf.py").symlink_to(ROOT / "talkingflow.py")
    sound(tmp_path)
    packages = sysconfig.get_path("purelib")
    readonly = f"mount --bind {packages} {packages} && mount -o remount,bind,ro {packages} && "
    readonly += f"! touch {packages}/written 2> /dev/null && "
    unshare = ["unshare", "-m", "sh", "-c"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*unshare, readonly + "true"], capture_output=True).returncode
    ):
        pytest.skip("no unshare, or no right to make packages read-only")
    env = {k: v for k, v in ENV.items() if k not in ("PYTHONPATH", "NUMBA_CACHE_DIR", "MPLCONFIGDIR")}
    env |= {"HOME": "/proc/none", "PYTHONDONTWRITEBYTECODE": "1"}
    for args in (
        ["sample", "--audio", "sound.wav", "--out", "pretrained.npz", "--num-samples", "1"],
        ["train", "--data", str(waves), "--out", "run", "--steps", "2", *SMALL],
    ):
        command = readonly + " ".join([sys.executable, "tf.py", *args])
        done = subprocess.run([*unshare, command], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "pretrained.npz").is_file() and (tmp_path / "run" / "checkpoint.pt").is_file()


@pytest.mark.slow
def test_ipython_runs_the_script_and_then_imports_it(spoken, tmp_path):
    pytest.importorskip("IPython")
    sound(tmp_path)
    flags = ["sample", "--checkpoint", str(spoken), "--audio", "sound.wav", "--num-samples", "1", "--out"]
    code = f"""
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.run_cell("%run {ROOT}/talkingflow.py {" ".join(flags)} a.npy", silent=True).raise_error()
shell.run_cell('''import sys; sys.path.insert(0, {str(ROOT)!r})
import talkingflow
assert talkingflow.main({[*flags, "b.npy"]!r}) == 0''', silent=True).raise_error()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))


@pytest.mark.slow
def test_every_command_works_in_an_empty_network_namespace(waves, tmp_path):
    """One process, cut off from every network by the kernel: prepare, train, sample, stream, evaluate."""
    unshare = next((c for c in (["unshare", "-n"], ["unshare", "-r", "-n"]) if shutil.which("unshare") and
                    not subprocess.run([*c, "true"], capture_output=True).returncode), None)  # fmt: skip
    if not unshare:
        pytest.skip("no unshare, or no right to make a network namespace")
    landmark_files(tmp_path / "src", 12)
    sound(tmp_path)
    code = f"""
import io, sys, socket
import evaluate, prepare_data, talkingflow
try:
    socket.create_connection(("192.0.2.1", 80), 1)
    sys.exit("there is a network")
except OSError as e:
    assert "unreachable" in str(e), e
small = {SMALL!r}
for main, line in (
    (prepare_data.main, "src --out prepared"), (prepare_data.main, "synthetic --clips 40 --out talkers"),
    (talkingflow.main, "train --data talkers --out run --steps 3 " + " ".join(small)),
    (talkingflow.main, "sample --checkpoint run/checkpoint.pt --audio sound.wav --out x.html"),
    (talkingflow.main, "stream --checkpoint run/checkpoint.pt"),
    (evaluate.main, "--data talkers --checkpoint run/checkpoint.pt --out ev --rows truth,mean-face,"
                    "checkpoint --clips 4 --sync-steps 2 --draws 20"),
):
    sys.stdin = io.TextIOWrapper(io.BytesIO(bytes(64000)))
    status = main(line.split())
    assert status == 0, (line, status)
"""
    done = subprocess.run([*unshare, sys.executable, "-c", code], cwd=tmp_path, env=ENV, capture_output=True,
                          text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "http" not in (tmp_path / "x.html").read_text()


def test_the_guard_of_these_tests_knows_a_network():
    """tests/conftest.py refuses every connection to another machine, in all tests of this process."""
    import socket

    with pytest.raises(RuntimeError, match="works without a network"):
        socket.create_connection(("192.0.2.1", 80), 1)
    with pytest.raises(RuntimeError, match="works without a network"):
        socket.getaddrinfo("example.org", 80)


# --- A long sound


@pytest.mark.slow
def test_twenty_minutes_of_sound_are_streamed_and_sampled_in_bounded_memory(spoken, tmp_path, monkeypatch):
    """Memory may grow by what is asked for (the landmarks and the sound, in a sample), nothing else."""
    say("twenty minutes of sound, twice")
    minute = (8000 * (scrambled(16000 * 60) - 0.5)).astype("<i2").tobytes()
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MB
    pieces, heard = [minute] * 20, {"frames": 0, "after": {}}

    class Out(io.StringIO):
        def write(self, text):
            heard["frames"] += text.count('"frame"')
            if heard["frames"] in (1500, 30000):
                heard["after"][heard["frames"]] = peak()

    stdin = type("Stdin", (), {"buffer": io.BufferedReader(Pieces(pieces))})
    monkeypatch.setattr(sys, "stdin", stdin)
    with contextlib.redirect_stdout(Out()):
        assert talkingflow.main(["stream", "--checkpoint", str(spoken)]) == 0
    assert heard["frames"] == 30000
    assert heard["after"][30000] - heard["after"][1500] < 20, heard
    with wave.open(str(tmp_path / "long.wav"), "wb") as f:
        f.setparams((1, 2, 16000, 0, "NONE", ""))
        f.writeframes(minute * 20)
    before = peak()
    flags = ["--num-samples", "1", "--out", str(tmp_path / "long.npy")]
    assert (
        talkingflow.main(
            ["sample", "--checkpoint", str(spoken), "--audio", str(tmp_path / "long.wav"), *flags]
        )
        == 0
    )
    x = np.load(tmp_path / "long.npy", mmap_mode="r")
    assert x.shape == (1, 30000, 68, 2) and np.isfinite(x).all()
    assert peak() - before < 4 * (x.nbytes + len(minute) * 20) / 2**20, peak() - before


class Pieces(io.RawIOBase):
    def __init__(self, pieces):
        self.rest = memoryview(b"".join(pieces[:1])), len(pieces)

    def readable(self):
        return True

    def readinto(self, place):
        piece, left = self.rest
        n = min(len(place), len(piece))
        place[:n] = piece[:n]
        whole = piece.obj
        piece = piece[n:]
        if not piece and left > 1:
            piece, left = memoryview(whole), left - 1
        self.rest = piece, left
        return n


# --- Several processes


def torchrun(*args):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            str(ROOT / "talkingflow.py"), "train", "--device", "cpu", *map(str, args)]  # fmt: skip


@pytest.mark.slow
def test_two_processes_do_what_one_does_to_a_millionth(waves, tmp_path):
    """torchrun with gloo: the same batches, half each; one log, one checkpoint; equal weights after 10
    steps."""
    flags = ["--data", waves, "--steps", 10, "--dropout", 0, "--noise", 0.0022, *SMALL]
    done = subprocess.run(torchrun(*flags, "--out", "two"), cwd=tmp_path, env=ENV, text=True,
                          capture_output=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert run(tmp_path, "train", *flags, "--out", "one").returncode == 0
    logs = [[json.loads(line) for line in open(tmp_path / name / "log.jsonl")] for name in ("one", "two")]
    assert [entry["step"] for entry in logs[1]] == [1, 10]
    for one, two in zip(*logs):
        assert two["train_nll"] == pytest.approx(one["train_nll"], abs=1e-6)
        assert two["val_nll"] == pytest.approx(one["val_nll"], abs=1e-6)
    one, two = (read_checkpoint(tmp_path / name / "resume.pt") for name in ("one", "two"))
    assert torch.equal(one["generator"], two["generator"])
    for name, value in one["model"].items():
        # Adam divides a gradient by its own size, so rounding of the halves' sum shows: up to 1.2e-6 was seen
        assert torch.allclose(value.double(), two["model"][name].double(), rtol=1e-6, atol=3e-6), name


@pytest.mark.slow
def test_when_one_of_two_processes_is_killed_the_other_ends_and_one_goes_on(waves, tmp_path):
    flags = ["--data", waves, "--steps", 100000, "--out", "run", *SMALL]
    process = subprocess.Popen(torchrun(*flags), cwd=tmp_path, env=ENV, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    for line in process.stdout:
        if line.startswith("step    10"):
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children}
    victim = next(int(pid) for pid, env in ranks.items() if b"RANK=1" in env)
    os.kill(victim, signal.SIGKILL)
    begin = time.monotonic()
    process.communicate(timeout=120)
    assert process.returncode != 0 and time.monotonic() - begin < 100
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    step = read_checkpoint(tmp_path / "run" / "resume.pt")["step"]
    assert step >= 10 and load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    done = run(tmp_path, "train", "--resume", "--out", "run", "--steps", step + 3)
    assert done.returncode == 0 and f"step {step + 3:5d}/{step + 3}" in done.stdout, done.stderr
