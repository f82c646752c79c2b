import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that plain `pytest` finds the modules too
torch.set_num_threads(1)  # small tensors: more threads only wait for each other
THOROUGH = bool(os.environ.get("THOROUGH"))  # what only a change of csrc/ or of a parser can break, in full
terminal = {}  # what `say` prints to


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


def pytest_configure(config):
    terminal.update(config=config, capture=config.pluginmanager.getplugin("capturemanager"))


def pytest_collection_modifyitems(config, items):
    """Without --slow the fast set: what is marked slow is left out, and counted in the last lines."""
    left_out = [] if config.getoption("--slow") else [i for i in items if i.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    terminal["left_out"] = len(left_out)


def pytest_terminal_summary(terminalreporter):
    if terminal.get("left_out"):
        terminalreporter.line(f"{terminal['left_out']} slow tests left out: python -m pytest --slow runs all")


def thinned(values, every):
    """Values of a parameter, of which the fast set takes each `every`-th."""
    return [pytest.param(v, marks=[pytest.mark.slow] if i % every else []) for i, v in enumerate(values)]


def say(text):
    """Tell whoever watches what takes so long, past pytest's capture."""
    with terminal["capture"].global_and_fixture_disabled():
        print(f"\n[{text}]", end=" ", flush=True)


def no_network(event, args):
    """Every test of this process is a proof that nothing here asks another machine for anything."""
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
        host = args[0] if event == "socket.getaddrinfo" else args[1]
        host = host[0] if isinstance(host, tuple) else host
        if host not in (None, "", "localhost", "127.0.0.1", "::1", b"localhost") and "/" not in str(host):
            raise RuntimeError(f"{event}: {args} in a program that works without a network")


sys.addaudithook(no_network)


@pytest.fixture(scope="session")
def grid():
    """Folder of real speech and landmarks (GRID corpus), or a skip."""
    folder = ROOT.parent / "shared" / "data" / "grid"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder


@pytest.fixture(scope="session")
def talkers(tmp_path_factory):
    """A small training folder of synthetic talkers."""
    import prepare_data

    folder = tmp_path_factory.mktemp("data") / "talkers"
    prepare_data.synthetic(folder, clips=60)
    return folder


def scrambled(*shape):
    """Numbers between 0 and 1 that look random and are the same on every machine and in every version: a
    64-bit mix of 0, 1, 2, ..."""
    v = np.arange(1, 1 + np.prod(shape), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        v = (v ^ (v >> np.uint64(shift))) * np.uint64(factor)
    return ((v >> np.uint64(40)) / 2.0**24).reshape(shape)


@pytest.fixture(scope="session")
def waves(tmp_path_factory):
    """A training folder of nothing but sines and scrambled numbers: 24 clips of 96 frames, a slow head, a
    mouth that follows the sound. What is trained on it can be pinned to a literal."""
    clips, T = 24, 96
    folder = tmp_path_factory.mktemp("data") / "waves"
    folder.mkdir()
    u, time = scrambled(clips, 8), np.arange(T) / 25
    slow = np.sin(2 * np.pi * (0.3 + u[:, :4, None]) * time + 7 * u[:, 4:, None])  # (clips, 4, T)
    loud = scrambled(clips, T // 4).repeat(4, 1)  # (clips, T): syllables of 0.16 s
    mouth = 0.5 * loud + 0.5 * np.roll(loud, 1, 1)
    drawings = scrambled(5, 136) - 0.5
    face = 0.3 + 0.4 * scrambled(136)
    x = face + 0.03 * np.einsum("cjt,jd->ctd", np.concatenate([slow, mouth[:, None]], 1), drawings)
    x += 0.002 * (scrambled(clips, T, 136) - 0.5)
    mel = -12 + 6 * loud[:, :, None] * np.linspace(1, 0.2, 40) + scrambled(clips, T, 40)
    np.save(folder / "landmarks.npy", x.reshape(-1, 136).astype(np.float32))
    np.save(folder / "mel.npy", mel.reshape(-1, 40).astype(np.float32))
    np.save(folder / "audio.npy", np.zeros(clips * T * 640, np.int16))
    meta = {"format": 1, "fps": 25, "layout": "ibug68", "normalisation": "face box", "sample_rate": 16000}
    meta |= {"mel": {"n_mels": 40, "fmin": 0.0, "fmax": 8000.0, "window": 0.064, "level": False}}
    meta |= {
        "defaults": {"lead": 0, "noise": 0.0022},
        "interocular": 0.2,
        "sources": [],
        "fingerprint": "waves",
    }
    place = {"frames": T, "audio_samples": T * 640, "box": [0, 0, 256], "wh": [256, 256], "source": 0}
    meta["clips"] = [
        {"name": f"{i:02d}", "split": ("train", "val", "test")[max(0, i - 21)], "speaker": "nobody"}
        | {"start": i * T, "audio_start": i * T * 640, **place}
        for i in range(clips)
    ]
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder
