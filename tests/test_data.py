"""prepare_data.py: what it promises of the folder it writes and of the talkers it invents."""

import contextlib
import csv
import functools
import importlib.util
import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from conftest import THOROUGH

import prepare_data
from media import console
from media import folder as folder_module
from media import sound as sound_module
from media.landmarks import pieces
from media.sound import Mel
from media.takes import Source, Take, read_ready
from media.talkers import NOISE, Bend, SyntheticFace, articulate, say, smooth_noise, synthesize


def prepare(*args, rc=0):
    """Run the command line in this process; returns (stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert prepare_data.main([str(arg) for arg in args]) == rc, out.getvalue() + err.getvalue()
    return out.getvalue(), err.getvalue()


def load(folder):
    meta = json.loads((folder / "meta.json").read_text())
    arrays = {p.stem: np.load(p, mmap_mode="r", allow_pickle=False) for p in folder.glob("*.npy")}
    return meta, arrays


@pytest.fixture(scope="module")
def talkers(tmp_path_factory):
    out = tmp_path_factory.mktemp("synthetic") / "data"
    prepare_data.synthetic(out, clips=32, seed=3)
    return out


# --- synthetic talkers


def dense_log_density(talker, x, articulation):
    """log p of frames before the bend x (B, T, 136), by one multivariate normal over all T frames: (B,)."""
    T = x.shape[1]
    cov = NOISE**2 * np.eye(T * 136)
    lag = np.abs(np.subtract.outer(np.arange(T), np.arange(T)))
    for (pole, std), drawing in zip(talker.dynamics, talker.drawings):
        r = [1.0, 2 * (pole or 1) / (1 + (pole or 1) ** 2)]  # autocorrelation of the AR(2)
        while len(r) < T:
            r.append(r[-1] if pole is None else 2 * pole * r[-1] - pole**2 * r[-2])
        cov += np.kron(std**2 * np.array(r)[lag], np.outer(drawing, drawing))
    e = (x - talker.mean - articulation @ talker.modes).reshape(len(x), -1)
    return -0.5 * ((e * np.linalg.solve(cov, e.T).T).sum(1) + np.linalg.slogdet(2 * np.pi * cov)[1])


def test_kalman_likelihood_equals_a_dense_multivariate_normal():
    talker, rng, T = SyntheticFace(gaussian=True), np.random.default_rng(0), 4
    articulation = articulate(say(3, 12, rng))[:, :T]
    x = talker.draw(articulation, rng)
    dense = -dense_log_density(talker, x, articulation) / (T * 136)
    assert np.abs(talker.nll(x, articulation) - dense).max() < 1e-9


def test_likelihood_of_the_landmarks_equals_a_dense_normal_and_a_jacobian_by_complex_steps():
    talker, rng, T = SyntheticFace(), np.random.default_rng(0), 3
    articulation = articulate(say(4, 12, rng))[:, -T:]
    y = talker.draw(articulation, rng)
    x = talker.bend.inverse(y)[0]
    assert np.abs(talker.bend.forward(x) - y).max() < 1e-12
    step = 1e-30  # of an analytic function: exact, nothing is subtracted
    jacobian = talker.bend.forward(x[..., None, :] + 1j * step * np.eye(136)).imag / step  # (B, T, 136, 136)
    density = dense_log_density(talker, x, articulation) - np.linalg.slogdet(jacobian)[1].sum(1)
    assert np.abs(talker.nll(y, articulation) + density / (T * 136)).max() < 1e-9
    assert np.ptp(np.linalg.slogdet(jacobian)[1]) > 10  # and the bend matters


def test_bent_densities_integrate_to_one():
    def density(bend, y, std):
        x, logdet = bend.inverse(y)
        return np.exp(-0.5 * (x**2 / std**2 + np.log(2 * np.pi * std**2)).sum(-1) - logdet)

    axes = [np.linspace(-6, 6, 97), np.linspace(-4, 4, 97), np.linspace(-5, 5, 97)]
    y = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    e, none = np.eye(3), np.zeros((2, 0), int)
    bend = Bend(np.zeros(3), 2 * e[0], 1.5 * e[1], e[:, 2:], none, 0.6, 0.1)
    cell = np.prod([axis[1] - axis[0] for axis in axes])
    assert abs(density(bend, y, np.array([1, 0.4, 0.5])).sum() * cell - 1) < 1e-6
    gap, middle = np.linspace(0, 6, 2000)[1:], np.linspace(-5, 5, 400)  # no density below 0
    y = middle[:, None, None] + gap[:, None] * [-0.5, 0.5]
    bend = Bend(np.zeros(2), np.zeros(2), np.zeros(2), np.zeros((2, 0)), [[0], [1]], 0.0, 0.5)
    cell = (gap[1] - gap[0]) * (middle[1] - middle[0])
    assert abs(density(bend, y, np.array([0.7, 0.7])).sum() * cell - 1) < 1e-6


def test_exact_sampler_has_the_exact_mean_and_attains_the_optimum():
    talker, rng = SyntheticFace(), np.random.default_rng(1)
    articulation = np.repeat(articulate(say(1, 40, rng)), 400, axis=0)
    y = talker.draw(articulation, rng)
    error = (y.mean(0) - talker.mean_given_sound(articulation[0])) / y.std(0) * 20
    assert np.abs(error).max() < 6 and 0.7 < error.std() < 1.3  # in standard errors
    logdet = talker.bend.inverse(y)[1]
    nll = talker.nll(y, articulation) - logdet.mean(1) / 136  # of x, whose entropy is known
    entropy = sum(half_logdet for *_, half_logdet in talker.kalman(40)[2]) + 40 * 136 / 2
    entropy += 40 * talker.bend.rest.shape[1] * np.log(2 * np.pi * NOISE**2) / 2
    assert abs(nll.mean() - entropy / (40 * 136)) < 4 * nll.std() / 20


def test_talkers_look_left_or_right_and_their_lips_do_not_cross():
    rng = np.random.default_rng(2)
    articulation = articulate(say(60, 80, rng))
    talker, gaussian = SyntheticFace(), SyntheticFace(gaussian=True)
    upper, lower = talker.bend.pairs
    y, x = talker.draw(articulation, rng), gaussian.draw(articulation, rng)
    assert (y[..., lower] - y[..., upper]).min() > 0 > (x[..., lower] - x[..., upper]).min()
    left, middle, right = np.histogram(talker.turned(y), [-9, -0.5, 0.5, 9])[0] / (60 * 80)
    assert min(left, right) > 1.5 * middle  # two modes: as wide as the middle, and each fuller
    left, middle, right = np.histogram(talker.turned(x), [-9, -0.5, 0.5, 9])[0] / (60 * 80)
    assert middle > 1.5 * max(left, right)
    y[0, 0, lower[0]] = y[0, 0, upper[0]] - 0.001  # crossed: impossible
    nll = talker.nll(y, articulation)
    assert nll[0] == np.inf and np.isfinite(nll[1:]).all()


def test_smooth_noise_is_stationary_from_its_first_frame():
    x = smooth_noise(np.random.default_rng(0), 20000, 12, np.array([0.93, 1]))
    assert np.abs(x.std(0) - 1).max() < 0.03
    lag1 = (x[:, 1:] * x[:, :-1]).mean(0)
    assert np.abs(lag1 - [2 * 0.93 / (1 + 0.93**2), 1]).max() < 0.03
    assert np.ptp(x[..., 1], axis=1).max() < 1e-12  # a pole of 1 is a constant


def test_synthetic_folder_holds_what_its_meta_says(talkers):
    meta, arrays = load(talkers)
    assert arrays["landmarks"].shape == (40 * 80, 136) and arrays["landmarks"].dtype == np.float32
    assert arrays["mel"].shape == (40 * 80, 40) and arrays["audio"].shape == (40 * 51200,)
    assert [sum(c["split"] == s for c in meta["clips"]) for s in ("train", "val", "test")] == [32, 4, 4]
    assert all(abs(meta["optimum"][s] - -4.51) < 0.2 for s in meta["optimum"])  # which side, which light
    talker = SyntheticFace()
    assert np.allclose(meta["modes"], talker.modes) and np.allclose(meta["mean_face"], talker.mean)
    clip = meta["clips"][-1]
    rows = slice(clip["start"], clip["start"] + clip["frames"])
    nll = talker.nll(arrays["landmarks"][None, rows], arrays["articulation"][None, rows])
    assert abs(nll[0] - clip["optimal_nll"]) < 1e-9
    sound = arrays["audio"][clip["audio_start"] : clip["audio_start"] + clip["audio_samples"]]
    hear = Mel(**meta["mel"], fps=meta["fps"], sample_rate=meta["sample_rate"])
    assert np.array_equal(hear.columns(sound / 32768), arrays["mel"][rows])


def test_synthetic_is_deterministic_by_seed(talkers, tmp_path):
    prepare_data.synthetic(tmp_path / "same", clips=32, seed=3)
    prepare_data.synthetic(tmp_path / "other", clips=32, seed=4)
    (meta, a), (same, b), (other, _) = load(talkers), load(tmp_path / "same"), load(tmp_path / "other")
    assert meta == same and meta["fingerprint"] != other["fingerprint"]
    assert all(np.array_equal(a[name], b[name]) for name in a)


def test_the_sound_of_a_frame_tells_nothing_of_later_phones():
    phones = np.full((1, 40), 1)
    changed = phones.copy()
    changed[:, 20:] = 3
    a, b = (synthesize(p, np.random.default_rng(1)) for p in (phones, changed))
    ratio = (b / a)[0, 1000 : 20 * 640]  # each is scaled to the same peak
    assert np.abs(ratio / ratio[0] - 1).max() < 1e-3
    assert np.array_equal(articulate(phones)[:, :21], articulate(changed)[:, :21])


def test_an_existing_folder_is_kept_unless_forced(talkers):
    before = (talkers / "meta.json").read_bytes()
    _, err = prepare("synthetic", "--out", talkers, "--clips", 8, rc=1)
    assert err.startswith("error: --out:") and err.count("\n") == 1 and "--force" in err
    assert (talkers / "meta.json").read_bytes() == before


# --- ready-made landmarks


@functools.lru_cache
def speech(seconds=3.0, seed=0, fps=25):
    """A synthetic talker as a file would hold it: points (F, 68, 2) in pixels, times (F,), int16 sound."""
    rng = np.random.default_rng(seed)
    phones = say(1, int(seconds * 25), rng)
    points = SyntheticFace().draw(articulate(phones), rng)[0].reshape(-1, 68, 2) * 200 + 100
    sound = np.round(synthesize(phones, rng)[0] * 32767).astype(np.int16)
    times = np.arange(int(seconds * fps)) / fps
    at = np.arange(len(points)) / 25
    points = np.stack([np.interp(times, at, column) for column in points.reshape(-1, 136).T], 1).reshape(
        -1, 68, 2
    )
    return points, times, sound


def write_clip(path, seed=0, **changes):
    points, times, sound = speech(seed=seed)
    arrays = {
        "landmarks": points.astype(np.float32),
        "pts": times,
        "wh": np.array([400, 400]),
        "audio": sound,
        "sr": 16000,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{k: v for k, v in (arrays | changes).items() if v is not None})


def write_wav(path, sound, rate=16000):
    import soundfile

    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, sound, rate)


def write_openface(path, points, times):
    columns = ["frame", " face_id", " timestamp", " confidence", " success"]
    columns += [f" {axis}_{i}" for axis in "xy" for i in range(68)]
    rows = [[i + 1, 0, t, 0.98, 1, *p[:, 0], *p[:, 1]] for i, (t, p) in enumerate(zip(times, points))]
    np.savetxt(path, rows, "%.4f", delimiter=", ", header=",".join(columns), comments="")


def reason_of(folder, tmp_path, **kwargs):
    """Prepare one bad source beside three good ones: the reason it was skipped for."""
    for i in range(3):
        write_clip(folder / f"good{i}.npz", seed=i + 10)
    args = prepare_data.parser().parse_args([str(folder), "--out", str(tmp_path / "out")])
    last = prepare_data.prepare(args)
    assert last.startswith("3 clips") and "1 skipped" in last, last
    return last.split("(")[-1]


def test_openface_csv_bare_npy_and_npz_give_the_same_clip(tmp_path):
    points, times, sound = speech()
    for kind in ("npz", "npy", "csv"):
        (tmp_path / kind).mkdir()
        write_wav(tmp_path / kind / "a.wav", sound)
    np.savez(tmp_path / "npz/a.npz", landmarks=points, pts=times)
    np.save(tmp_path / "npy/a.npy", points.reshape(-1, 136))
    write_openface(tmp_path / "csv/a.csv", points, times)
    result = {}
    for kind in ("npz", "npy", "csv"):
        prepare_data.main([str(tmp_path / kind), "--out", str(tmp_path / f"{kind}.out")])
        meta, arrays = load(tmp_path / f"{kind}.out")
        result[kind] = np.array(arrays["landmarks"]), np.array(arrays["audio"]), meta["clips"][0]
    for kind in ("npy", "csv"):
        assert np.abs(result[kind][0] - result["npz"][0]).max() < 1e-5
        assert np.array_equal(result[kind][1], result["npz"][1])
    assert result["npz"][2]["frames"] == 75 and result["npz"][2]["audio_samples"] == 48000


def test_clip_box_maps_landmarks_back_to_pixels_of_a_frame_that_is_not_square(tmp_path):
    points = speech()[0]
    wh = np.array([640, 360])
    write_clip(tmp_path / "in/a.npz", landmarks=points / wh, wh=wh)
    prepare_data.main([str(tmp_path / "in"), "--out", str(tmp_path / "out")])
    meta, arrays = load(tmp_path / "out")
    clip = meta["clips"][0]
    x = arrays["landmarks"].reshape(-1, 68, 2)
    assert np.abs(x * clip["box"][2] + clip["box"][:2] - points).max() < 1e-3 and clip["wh"] == [640, 360]
    extent = np.ptp(x.mean(0), axis=0)
    assert (
        abs(extent.max() - 1 / 1.5) < 1e-6
        and np.abs((x.mean(0).max(0) + x.mean(0).min(0)) / 2 - 0.5).max() < 1e-6
    )


@pytest.mark.parametrize("fps", [11.94, 24, 29.97, 60])
def test_landmarks_are_resampled_through_their_frame_times(tmp_path, fps):
    points, times, _ = speech(6, fps=fps)
    jitter = np.random.default_rng(0).uniform(-0.3, 0.3, len(times)) / fps  # variable frame rate
    times = np.sort(times + jitter - jitter[0])
    ramp = points[:1] + times[:, None, None] * [3.0, 2.0]  # a motion that is linear in time
    sound = speech(6)[2]
    write_clip(tmp_path / "in/a.npz", landmarks=ramp, pts=times, audio=sound)
    prepare_data.main([str(tmp_path / "in"), "--out", str(tmp_path / "out")])
    meta, arrays = load(tmp_path / "out")
    clip = meta["clips"][0]
    x = arrays["landmarks"].reshape(-1, 68, 2) * clip["box"][2] + clip["box"][:2]
    t = clip["time"] + np.arange(len(x)) / 25
    inside = t <= times[-1]
    assert inside.sum() >= 145 and np.abs(x - ramp[0] - t[:, None, None] * [3.0, 2.0])[inside].max() < 1e-3
    assert np.array_equal(arrays["audio"], sound[round(clip["time"] * 16000) :][: clip["audio_samples"]])


def test_a_variable_frame_rate_is_not_taken_for_missing_faces(tmp_path):
    points, times, sound = speech(6, fps=60)
    keep = np.cumsum([0] + [2, 2, 4, 2, 2, 2, 4, 4] * 14)  # 33 and 67 ms, 24 frames a second
    write_clip(tmp_path / "in/a.npz", landmarks=points[keep], pts=times[keep], audio=sound)
    write_clip(
        tmp_path / "in/b.npz",
        landmarks=np.delete(points[keep], range(30, 50), 0),
        audio=sound,
        pts=np.delete(times[keep], range(30, 50)),
    )  # a sixth of the frames is missing
    out, _ = prepare(tmp_path / "in", "--out", tmp_path / "out")
    assert out.strip().endswith(
        "\n1 clips, 0.1 minutes, 1 skipped (face missing in more than 10 % of the frames: 1)"
    )
    assert load(tmp_path / "out")[0]["clips"][0]["frames"] >= 128


def test_clips_are_cut_at_gaps_and_jumps_but_not_at_a_fast_head():
    points, times, sound = speech(30)
    points = points.copy()
    points[100:120] = np.nan  # a gap
    points[300:303] = np.nan  # a short one: interpolated
    points[500:] += 60  # a cut
    # .3 interocular a frame, for 8 frames
    fast = np.clip(np.arange(750) - 600, 0, 8)[:, None, None] * [25.0, 0]
    found = pieces(points + fast, times, 0.04, 5)
    assert [(i[0], i[-1]) for i in found] == [(0, 99), (120, 499), (500, 749)]
    take = Take(points, times, sound / 32768, wh=[900, 900])
    cut, left_out = prepare_data.cut(take, SETTINGS)
    assert [round(piece.time, 2) for piece in cut] == [0, 4.8, 20] and not left_out
    assert [len(piece.landmarks) for piece in cut] == [100, 380, 250]
    assert np.isfinite(cut[1].landmarks).all()


def test_sound_that_starts_late_is_aligned_to_the_frames():
    points, times, sound = speech(4)
    take = Take(points, times + 0.033, sound[8000:] / 32768, begin=0.5, wh=[900, 900])
    piece = prepare_data.cut(take, SETTINGS)[0][0]
    assert abs(piece.time - 0.513) < 1e-9  # the first frame that has sound
    assert np.array_equal(piece.audio, sound[round(0.513 * 16000) :][: len(piece.audio)])


SETTINGS = prepare_data.Settings([], fps=25, mel={"n_mels": 8})
BAD = {
    "not 68 points": {"landmarks": np.zeros((75, 106, 2))},
    "no face found": {"landmarks": np.full((75, 68, 2), np.nan)},
    "points coincide": {"landmarks": np.ones((75, 68, 2))},
    "y points up": {"landmarks": 1 - speech(seed=5)[0] / 400},
    "landmarks do not move": {"landmarks": np.repeat(speech()[0][:1], 75, 0)},
    "face missing in more than 10 % of the frames": {
        "landmarks": np.where(np.arange(75)[:, None, None] < 12, np.nan, speech()[0])
    },
    "frame times": {"pts": np.zeros(75)},
    "frame rate": {"pts": None, "fps": 0.0},
    "silence": {"audio": np.zeros(48000, np.int16)},
    "empty sound": {"audio": np.zeros(0, np.int16)},
    "sample rate": {"sr": 100},
    "NaN in the sound": {"audio": np.full(48000, np.nan, np.float32)},
    "sound much shorter than the picture": {"audio": speech()[2][:16000]},
    "too short": {"landmarks": speech()[0][:1], "pts": np.zeros(1)},
    "unreadable landmarks": {"landmarks": np.array([{}], object)},
    "landmarks without sound": {"audio": None},
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_clip_is_skipped_and_counted_by_its_reason(tmp_path, reason):
    write_clip(tmp_path / "in/bad.npz", **BAD[reason])
    assert reason_of(tmp_path / "in", tmp_path) == f"{reason}: 1)"
    report = (tmp_path / "out/report.csv").read_text()
    assert "bad.npz,0,0.00" in report and reason in report


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("bad.npz", b"", "unreadable landmarks"),
        ("bad.npz", b"version https://git-lfs", "unreadable landmarks"),
        ("bad.npy", b"\x93NUMPY\x01\x00", "unreadable landmarks"),
        ("bad.csv", b"a,b\n1,2\n", "unreadable landmarks"),
        ("bad.wav", b"RIFF", "sound without landmarks"),
    ],
)
def test_a_broken_file_is_skipped_and_counted(tmp_path, name, content, reason):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    assert reason_of(tmp_path / "in", tmp_path) == f"{reason}: 1)"


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_arrays_of_objects_are_refused_in_plain_words(tmp_path, suffix):
    faces = np.array([speech()[0][0], None], object)
    np.save(tmp_path / "a.npy", faces)
    np.savez(tmp_path / "a.npz", landmarks=faces, fps=25)
    with pytest.raises(console.Skip, match="^unreadable landmarks: Python objects inside. Save numbers "):
        read_ready(Source("a", str(tmp_path / f"a{suffix}")), 25)


def test_a_broken_wav_and_a_wrong_frame_rate_are_named(tmp_path):
    points, _, sound = speech()
    for name, data in (("zero", b""), ("text", b"hello"), ("short", None)):
        (tmp_path / "in").mkdir(exist_ok=True)
        np.save(tmp_path / f"in/{name}.npy", points[:30] if data is None else points)
        (tmp_path / f"in/{name}.wav").write_bytes(data or b"")
    write_wav(tmp_path / "in/short.wav", sound)
    _, err = prepare(tmp_path / "in", "--out", tmp_path / "out", rc=1)
    assert err.startswith("error: ") and err.count("\n") == 1
    assert "unreadable sound: 2" in err and "length of landmarks and sound differ: 1" in err


def test_stereo_and_8_khz_and_too_loud_sound_is_taken(tmp_path):
    import librosa

    points, _, sound = speech()
    (tmp_path / "in").mkdir()
    low = librosa.resample(sound.astype(np.float32) / 32768, orig_sr=16000, target_sr=8000)
    for name, s, rate in (
        ("stereo", np.stack([sound, sound], 1), 16000),
        ("low", low, 8000),
        ("plain", sound, 16000),
    ):
        # else one would be a duplicate
        np.save(tmp_path / f"in/{name}.npy", points * [1, 1 + len(name) / 100])
        write_wav(tmp_path / f"in/{name}.wav", s, rate)
    write_clip(tmp_path / "in/loud.npz", audio=sound.astype(np.float32) * 5 / 32768, seed=3)
    out, _ = prepare(tmp_path / "in", "--out", tmp_path / "out")
    assert "warning: 1 clips have no sound in the highest band" in out
    meta, arrays = load(tmp_path / "out")
    clips = {
        c["name"]: arrays["audio"][c["audio_start"] :][: c["audio_samples"]].astype(float)
        for c in meta["clips"]
    }
    assert np.abs(clips["stereo"] - clips["plain"]).max() <= 1
    assert np.corrcoef(clips["low"], clips["plain"])[0, 1] > 0.9 and np.abs(clips["loud"]).max() > 32000


def test_a_preview_of_landmarks_without_pictures_is_told_to_be_none(tmp_path):
    write_clip(tmp_path / "in/a.npz")
    out, _ = prepare(tmp_path / "in", "--out", tmp_path / "out", "--preview")
    assert out.startswith("note: --preview: no video among the sources") and "0 skipped" in out
    assert "--preview" not in prepare(tmp_path / "in", "--out", tmp_path / "out")[0]


def test_splits_hold_out_whole_sources_and_do_not_depend_on_their_order(tmp_path):
    for i in range(12):
        write_clip(tmp_path / f"in/s{i % 3}/clip{i}.npz", seed=i)
    write_clip(tmp_path / "in/s0/copy.npz", seed=0)
    last = prepare_data.prepare(
        prepare_data.parser().parse_args([str(tmp_path / "in"), "--out", str(tmp_path / "a")])
    )
    assert last.startswith("12 clips") and "(duplicate: 1)" in last
    split = {c["name"]: c["split"] for c in load(tmp_path / "a")[0]["clips"]}
    assert sorted(split.values()) == ["test"] + ["train"] * 10 + ["val"]
    srcs = [str(tmp_path / f"in/s{i}") for i in (2, 1, 0)]
    prepare_data.main([*srcs, "--out", str(tmp_path / "b")])
    assert len(load(tmp_path / "b")[0]["clips"]) == 12
    prepare_data.main([str(tmp_path / "in"), "--out", str(tmp_path / "c"), "--test-speakers", "s1"])
    meta = load(tmp_path / "c")[0]
    assert {c["speaker"] for c in meta["clips"] if c["split"] == "test"} == {"s1"}
    assert {c["speaker"] for c in meta["clips"] if c["split"] != "test"} == {"s0", "s2"}
    _, err = prepare(tmp_path / "in", "--out", tmp_path / "d", "--test-speakers", "s9", rc=1)
    assert err == "error: --test-speakers: s9 vs s0, s1, s2. Name some of these\n"


def test_a_speaker_is_the_folder_that_the_files_lie_in(tmp_path, monkeypatch):
    def speakers(*args):
        out = tmp_path / "out"
        said.append(prepare(*args, "--out", out, "--force")[0])
        return {clip["name"]: clip["speaker"] for clip in load(out)[0]["clips"]}

    for i, name in enumerate(["my_clips/a", "my_clips/b", "my_clips/c_001", "grid/s1/a", "grid/s26/clips/b"]):
        write_clip(tmp_path / f"{name}.npz", seed=i)
    said, flat = [], dict.fromkeys(["a", "b", "c_001"], "my_clips")
    assert speakers(tmp_path / "my_clips", "--test-speakers", "my_clips") == flat
    assert "warning: 0 clips beside the test set are too few to hold some out" in said[0]
    assert 0.1 < load(tmp_path / "out")[0]["interocular"] < 1  # of no training clip: of all
    assert speakers(*(tmp_path / f"my_clips/{name}.npz" for name in flat)) == flat
    assert speakers(tmp_path / "grid") == {"s1/a": "s1", "s26/clips/b": "s26"}
    assert speakers(tmp_path / "grid/s1", tmp_path / "grid/s26/clips") == {"a": "s1", "b": "s26"}
    monkeypatch.chdir(tmp_path / "my_clips")
    assert speakers(".") == flat


def test_one_long_recording_is_cut_and_its_last_pieces_are_held_out(tmp_path):
    points, times, sound = speech(130)
    write_clip(tmp_path / "in/talk.npz", landmarks=points, pts=times, audio=sound)
    prepare_data.main([str(tmp_path / "in"), "--out", str(tmp_path / "out")])
    clips = load(tmp_path / "out")[0]["clips"]
    assert [c["split"] for c in clips] == ["train"] * 5 + ["val", "test"] and max(
        c["frames"] for c in clips
    ) <= 500
    assert sum(c["frames"] for c in clips) == 130 * 25 and clips[1]["name"] == "talk@0018.60"


def test_an_interrupted_run_goes_on_and_redoes_nothing(tmp_path, monkeypatch):
    for i in range(6):
        write_clip(tmp_path / f"in/clip{i}.npz", seed=i)
    whole, parted, done = tmp_path / "whole", tmp_path / "parted", []
    prepare_data.main([str(tmp_path / "in"), "--out", str(whole)])
    read = prepare_data.read_ready

    def stopping(source, fps):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(source.name)
        return read(source, fps)

    monkeypatch.setattr(prepare_data, "read_ready", stopping)
    assert prepare_data.main([str(tmp_path / "in"), "--out", str(parted)]) == 130
    with open(parted / "mel.npy", "ab") as f:  # what a kill in the middle of a write leaves
        f.write(b"torn")
    with open(parted / "journal.jsonl", "a") as f:
        f.write('{"key": "to')
    monkeypatch.setattr(
        prepare_data, "read_ready", lambda source, fps: done.append(source.name) or read(source, fps)
    )
    assert prepare_data.main([str(tmp_path / "in"), "--out", str(parted)]) == 0
    assert done == [f"clip{i}" for i in range(6)]
    for name in ("landmarks.npy", "mel.npy", "audio.npy"):
        assert (whole / name).read_bytes() == (parted / name).read_bytes()
    assert load(whole)[0] == load(parted)[0]
    assert prepare_data.main([str(tmp_path / "in"), "--out", str(parted)]) == 0 and len(done) == 6
    _, err = prepare(tmp_path / "in", "--out", parted, "--n-mels", 20, rc=1)
    assert "--force" in err and load(parted)[0] == load(whole)[0]


def test_a_full_disk_is_told_in_one_line_and_the_run_goes_on_later(tmp_path, monkeypatch):
    for i in range(4):
        write_clip(tmp_path / f"in/clip{i}.npz", seed=i)
    append, calls = folder_module.GrowingArray.append, []

    def full(self, a):
        calls.append(1)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        return append(self, a)

    monkeypatch.setattr(folder_module.GrowingArray, "append", full)
    args = prepare_data.parser().parse_args([str(tmp_path / "in"), "--out", str(tmp_path / "out")])
    with pytest.raises(console.UserError, match="No space left.*goes on after 1 sources"):
        prepare_data.prepare(args)
    assert prepare_data.prepare(args).startswith("4 clips")


def test_synthetic_talkers_do_not_replace_an_unfinished_folder(tmp_path, monkeypatch):
    write_clip(tmp_path / "in/clip.npz")
    monkeypatch.setattr(prepare_data, "finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert prepare_data.main([str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 130
    before = (tmp_path / "out/journal.jsonl").read_bytes()
    _, err = prepare("synthetic", "--clips", 4, "--out", tmp_path / "out", rc=1)
    assert "--force" in err and (tmp_path / "out/journal.jsonl").read_bytes() == before


def test_a_full_disk_is_one_line_for_the_synthetic_talkers_too(tmp_path, monkeypatch):
    def full(self, a):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_module.GrowingArray, "append", full)
    _, err = prepare("synthetic", "--clips", 4, "--out", tmp_path / "out", rc=1)
    assert err.startswith("error: --out: ") and "No space left" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "args, error",
    [
        (["nowhere"], "error: nowhere: no such file or folder"),
        (["{empty}"], "nothing vs videos, NAME.npz"),
        (["synthetic", "--n-mels", "0"], "error: --n-mels: 0 vs 1 to 256"),
        (["synthetic", "--fmin", "9000"], "--fmin: 9000"),
        (["synthetic", "--clips", "-1"], "--clips: -1 vs"),
        (["synthetic", "--fps", "30"], "--fps: 30 vs 25"),
        (["{file}"], "vs .npz .npy .csv .mpg"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_clear_line(tmp_path, args, error):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("hello")
    args = [a.format(empty=tmp_path / "empty", file=tmp_path / "file.txt") for a in args]
    _, err = prepare(*args, "--out", tmp_path / "out", rc=1)
    assert (
        error in err
        and err.startswith("error: ")
        and err.count("\n") == 1
        and not (tmp_path / "out").exists()
    )


def test_an_unknown_flag_exits_2(tmp_path):
    run = subprocess.run(
        [sys.executable, ROOT / "prepare_data.py", "synthetic", "--out", tmp_path, "--n-mel", "20"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2 and "--n-mel" in run.stderr and not run.stdout


def test_force_keeps_files_that_are_not_ours(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.txt").write_text("meow")
    _, err = prepare("synthetic", "--clips", 4, "--out", tmp_path / "photos", "--force", rc=1)
    assert "other files (cat.txt)" in err and (tmp_path / "photos/cat.txt").read_text() == "meow"


def test_wrong_sound_is_warned_about(tmp_path, capsys):
    for i in range(8):
        points, times, _ = speech(8, seed=i)
        points = points[np.minimum(np.arange(200) + 2, 199)]  # the talkers' mouths follow by two frames
        write_clip(tmp_path / f"in/clip{i}.npz", landmarks=points, pts=times, audio=speech(8, seed=i + 50)[2])
        write_clip(tmp_path / f"right/clip{i}.npz", landmarks=points, pts=times, audio=speech(8, seed=i)[2])
    prepare_data.main([str(tmp_path / "in"), "--out", str(tmp_path / "a")])
    assert "do not follow this sound" in capsys.readouterr().out
    prepare_data.main([str(tmp_path / "right"), "--out", str(tmp_path / "b")])
    assert "warning" not in capsys.readouterr().out


def test_files_that_were_only_touched_are_read_again_and_nothing_is_lost(tmp_path):
    for i in range(4):
        write_clip(tmp_path / f"in/clip{i}.npz", seed=i)
    for _ in range(2):
        assert prepare(tmp_path / "in", "--out", tmp_path / "out")[0].splitlines()[-1].startswith("4 clips")
        for path in (tmp_path / "in").iterdir():
            os.utime(path, (1, 1))
    assert len(load(tmp_path / "out")[0]["clips"]) == 4


def test_late_sound_is_measured_and_moved_on_request(tmp_path):
    for i in range(6):
        points, times, sound = speech(8, seed=i)
        points = points[np.minimum(np.arange(200) + 2, 199)]  # the talkers' mouths follow by two frames
        late = np.concatenate([np.zeros(4 * 640, np.int16), sound])[: len(sound)]
        write_clip(tmp_path / f"in/clip{i}.npz", landmarks=points, pts=times, audio=late)
        write_clip(tmp_path / f"right/clip{i}.npz", landmarks=points, pts=times, audio=sound)
    out, _ = prepare(tmp_path / "in", "--out", tmp_path / "late")
    assert "the sound seems 3 frames late or more. The same command with --audio-offset 3 moves it" in out
    out, _ = prepare(tmp_path / "in", "--out", tmp_path / "late", "--audio-offset", "auto")
    assert "the sound seems 3 frames late or more\nsound moved by 3 frames" in out
    prepare(tmp_path / "in", "--out", tmp_path / "late")
    right = (
        load(tmp_path / "right.out")[1]
        if prepare(tmp_path / "right", "--out", tmp_path / "right.out")
        else None
    )
    before = load(tmp_path / "late")[0]
    for _ in range(2):  # once more changes nothing
        prepare(tmp_path / "in", "--out", tmp_path / "late", "--audio-offset", 4)
        meta, arrays = load(tmp_path / "late")
        for i, clip in enumerate(meta["clips"]):
            assert clip["frames"] == 196
            assert np.array_equal(
                arrays["audio"][clip["audio_start"] :][: clip["audio_samples"]],
                right["audio"][i * 128000 :][: 196 * 640],
            )
            assert np.allclose(arrays["mel"][clip["start"] :][:196], right["mel"][i * 200 :][:196])
    prepare(tmp_path / "in", "--out", tmp_path / "late", "--audio-offset", -2)
    clip = load(tmp_path / "late")[0]["clips"][0]
    assert (clip["start"], clip["frames"], clip["audio_start"], clip["audio_samples"]) == (
        2,
        198,
        0,
        198 * 640,
    )
    prepare(tmp_path / "in", "--out", tmp_path / "late")
    assert load(tmp_path / "late")[0] == before


# --- real clips (the tests above need none)

GRID = ROOT.parent / "shared/data/grid"


@pytest.mark.skipif(not GRID.is_dir(), reason="no ../shared/data/grid")
def test_grid_clips_are_kept_and_dropped_as_measured(tmp_path):
    (tmp_path / "in/s1").mkdir(parents=True)
    (tmp_path / "in/s26").mkdir()
    damaged = ["s1_bbizzn", "s1_brwg8p", "s1_pbio7a"]
    files = [GRID / "s1" / f"{name}.npz" for name in [*damaged, "s1_srbb4n"]]
    files += sorted((GRID / "s1").glob("*.npz"))[:40] + sorted((GRID / "s26").glob("*.npz"))
    for path in set(files):
        (tmp_path / "in" / path.parent.name / path.name).symlink_to(path)
    out, _ = prepare(tmp_path / "in", "--out", tmp_path / "out", "--test-speakers", "s26")
    last = out.strip().split("\n")[-1]
    assert last.endswith("3 skipped (face missing in more than 10 % of the frames: 3)")
    meta, arrays = load(tmp_path / "out")
    assert {c["frames"] for c in meta["clips"]} == {74} and not {f"s1/{name}" for name in damaged} & {
        c["name"] for c in meta["clips"]
    }
    assert sum(c["split"] == "test" for c in meta["clips"]) == 11
    defaults = {"steps": 8000, "lead": 2, "noise": 0.0022, "mean_hidden": 128, "mean_loss_final": 0.2}
    assert meta["defaults"] == defaults | {"vtlp": 0.35, "tilt": 1.5, "channel": 0.1}
    clip = next(c for c in meta["clips"] if c["name"] == "s1/s1_bbaf2n")
    with np.load(GRID / "s1/s1_bbaf2n.npz") as z:
        x = arrays["landmarks"][clip["start"] :][:74].reshape(74, 68, 2) * clip["box"][2] + clip["box"][:2]
        assert np.abs(x - z["landmarks"][:74] * z["wh"]).max() < 1e-3
        assert np.array_equal(arrays["audio"][clip["audio_start"] :][:47360], z["audio"][:47360])
    assert "CC BY 4.0" in meta["sources"][clip["source"]]["licence"]


# --- geometry: recognised and mended, or refused


def boxed(folder):
    meta, arrays = load(folder)
    return arrays["landmarks"][:75]


@pytest.mark.parametrize(
    "name",
    [
        "x first",
        "frames of rows",
        "y before x",
        "y before x, x first",
        "float16",
        "0..1",
        "3-D list of pixels",
    ],
)
def test_other_orders_of_the_same_landmarks_give_the_same_clip(tmp_path, name):
    points, _, sound = speech(seed=7)
    forms = {
        "x first": points.transpose(0, 2, 1).reshape(-1, 136),
        "frames of rows": points.transpose(0, 2, 1),
        "y before x": points[:, :, ::-1],
        "y before x, x first": points[:, :, ::-1].transpose(0, 2, 1).reshape(-1, 136),
        "float16": points.astype(np.float16),
        "0..1": points / 400,
        "3-D list of pixels": np.round(points).astype(np.int32),
    }
    for folder, p in (("right", points), ("other", forms[name])):
        write_wav(tmp_path / folder / "a.wav", sound)
        np.save(tmp_path / folder / "a.npy", p)
        prepare(tmp_path / folder, "--out", tmp_path / f"{folder}.out")
    # pixels rounded
    assert np.abs(boxed(tmp_path / "other.out") - boxed(tmp_path / "right.out")).max() < 0.004


@pytest.mark.parametrize(
    "reason, change",
    [
        ("left and right exchanged", lambda p: p * [-1, 1] + [400, 0]),
        ("y points up", lambda p: p * [1, -1] + [0, 400]),
        ("face on its side", lambda p: p[:, :, ::-1] * [-1, 1] + [400, 0]),
        ("not a face", lambda p: p[:, np.random.default_rng(0).permutation(68)]),
        ("not a face", lambda p: p[:, ::-1]),
        ("face not in proportion", lambda p: p / [1280, 720]),
        ("face not in proportion", lambda p: p / [720, 1280]),
        ("not 68 points", lambda p: np.concatenate([p, p[:, :30]], 1)),
        ("frame size", None),
    ],
)
def test_a_face_that_is_none_is_refused_with_the_reason(tmp_path, reason, change):
    points = speech(seed=5)[0]
    new = {"landmarks": change(points), "wh": None} if change else {"wh": np.array([0, 400])}
    write_clip(tmp_path / "in/bad.npz", seed=5, **new)
    assert reason_of(tmp_path / "in", tmp_path) == f"{reason}: 1)"


# --- sound: one reader for prepare and sample


def hear(path):
    """What `sample` hears: samples, rate, what it notes."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        blocks = list(sound_module.read_sound(path))
    return np.concatenate([block for block, _ in blocks]), blocks[0][1], said.getvalue()


def voice(seconds=2):
    return speech(seconds, seed=1)[2].astype(np.float32) / 32768


CHANNELS = {  # columns of samples, a word of the note or ""
    "mono": (lambda s: s[:, None], ""),
    "stereo": (lambda s: np.stack([s, s], 1), ""),
    "left only": (lambda s: np.stack([s, 0 * s], 1), ""),
    "antiphase": (lambda s: np.stack([s, -s], 1), "cancel"),
    "nearly antiphase": (lambda s: np.stack([s, -0.9 * s], 1), "cancel"),
    "centre of 5.1": (lambda s: np.eye(6, dtype=np.float32)[2] * s[:, None], ""),
    "centre of five, music around": (lambda s: np.stack([hum(s), hum(s), s, hum(s), hum(s)], 1), ""),
    "one of eight": (lambda s: np.eye(8, dtype=np.float32)[5] * s[:, None], ""),
}


def hum(s):
    return 0.2 * np.sin(np.arange(len(s)) * 0.3).astype(np.float32)


@pytest.mark.parametrize("name", CHANNELS)
def test_the_channel_that_speaks_is_heard_at_its_level(tmp_path, name):
    form, note = CHANNELS[name]
    write_wav(tmp_path / "a.wav", form(voice()))
    sound, rate, said = hear(tmp_path / "a.wav")
    assert np.abs(sound - voice()).max() < 2e-4 and rate == 16000
    assert (note in said and said.startswith("note: a.wav: ")) if note else not said, said
    prepared, begin, _ = sound_module.load_sound(tmp_path / "a.wav")
    assert np.array_equal(prepared, sound) and begin == 0


@pytest.mark.parametrize(
    "name, change, note, back",
    [
        ("16-bit units", lambda s: s * 32767, "whole numbers", lambda s: s * 32768 / 32767),
        ("24-bit units", lambda s: s * 2**23, "whole numbers", lambda s: s),
        ("32-bit units", lambda s: s * 2.0**31, "whole numbers", lambda s: s),
        ("ten times too loud", lambda s: s * 10, "made quieter", lambda s: s * np.abs(voice()).max()),
        ("offset", lambda s: s * 0.5 + 0.3, "constant 0.30", lambda s: s / 0.5),
        ("offset below", lambda s: s * 0.5 - 0.2, "constant -0.20", lambda s: s / 0.5),
    ],
)
def test_samples_in_other_units_are_heard_as_meant_and_noted(tmp_path, name, change, note, back):
    import soundfile

    soundfile.write(tmp_path / "a.wav", change(voice()), 16000, subtype="FLOAT")
    sound, _, said = hear(tmp_path / "a.wav")
    assert note in said and np.abs(back(sound) - voice()).max() < 0.01, said


@pytest.mark.parametrize(
    "name, samples, note",
    [
        ("clipped", np.clip(voice() * 8, -1, 1), "cut off"),
        ("clipped low", 0.4 * np.clip(voice() * 8, -1, 1), "cut off"),
        ("silent", 0 * voice(), "hardly a sound"),
        ("inaudible", 1e-5 * voice(), "hardly a sound"),
    ],
)
def test_sound_that_cannot_be_what_was_meant_is_noted(tmp_path, name, samples, note):
    import soundfile

    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    assert any(note in line for line in sound_module.load_sound(tmp_path / "a.wav")[2])


def test_real_voices_and_synthetic_ones_raise_no_note(tmp_path):
    for seed in range(10):
        write_wav(tmp_path / "a.wav", speech(2, seed=seed)[2])
        assert not hear(tmp_path / "a.wav")[2] and not sound_module.load_sound(tmp_path / "a.wav")[2]


@pytest.mark.parametrize(
    "name, at, value",
    [
        ("never closed", 40, 0),
        ("streamed", 40, 0xFFFFFFFF),
        ("too small", 40, 1000),
        ("too large", 40, 10**9),
    ],
)
def test_a_wav_whose_header_lies_about_its_size_is_heard_whole(tmp_path, name, at, value):
    write_wav(tmp_path / "a.wav", voice())
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[at : at + 4] = value.to_bytes(4, "little")
    data[4:8] = (0).to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(data)
    assert np.abs(hear(tmp_path / "a.wav")[0] - voice()).max() < 1e-4


def test_a_wav_that_was_cut_off_is_noted_and_named_as_the_reason(tmp_path):
    points, _, sound = speech()
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in/a.npy", points)
    write_wav(tmp_path / "in/a.wav", sound)
    assert not hear(tmp_path / "in/a.wav")[2]
    data = (tmp_path / "in/a.wav").read_bytes()
    (tmp_path / "in/a.wav").write_bytes(data[: 44 + 40000])
    note = "a.wav: cut off: 40,000 of the 96,000 bytes of its sound are there"
    heard, _, said = hear(tmp_path / "in/a.wav")
    assert said == f"note: {note}\n" and np.array_equal(heard, sound[:20000].astype(np.float32) / 32768)
    _, err = prepare(tmp_path / "in", "--out", tmp_path / "out", rc=1)
    assert f"75 frames at --fps 25 = 3.00 s vs 1.25 s: {note} " in err and "rate" not in err, err
    for size in (0, 0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000):  # a recorder's that was killed, those of pipes
        (tmp_path / "in/a.wav").write_bytes(data[:40] + size.to_bytes(4, "little") + data[44:])
        assert not hear(tmp_path / "in/a.wav")[2]


def test_a_wav_with_chunks_after_its_samples_is_not_heard_beyond_them(tmp_path):
    write_wav(tmp_path / "a.wav", voice())
    with open(tmp_path / "a.wav", "ab") as f:
        f.write(b"LIST\x04\x00\x00\x00INFO")
    assert len(hear(tmp_path / "a.wav")[0]) == len(voice())


@pytest.mark.parametrize("length", [12, 20, 24, 30, 36])
def test_a_wav_cut_within_its_header_is_one_clear_sentence(tmp_path, length):
    write_wav(tmp_path / "a.wav", voice())
    head = (tmp_path / "a.wav").read_bytes()[:length]
    (tmp_path / "a.wav").write_bytes(head)
    with pytest.raises(console.UserError, match="a.wav: unreadable sound .* vs a sound or video file. ") as e:
        hear(tmp_path / "a.wav")
    assert "ends before its samples begin" in str(e.value) or length == 20  # libsndfile: malformed
    with pytest.raises(console.UserError, match="^standard input: a wav that ends within its header vs "):
        sound_module.open_pcm(io.BytesIO(head))


def test_a_header_that_contradicts_itself_is_noted(tmp_path):
    write_wav(tmp_path / "a.wav", voice())
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[22] = 2  # channels
    (tmp_path / "a.wav").write_bytes(data)
    assert "contradicts itself" in hear(tmp_path / "a.wav")[2]


@pytest.mark.skipif(not importlib.util.find_spec("av"), reason="not installed: av")
def test_an_mp3_made_of_two_is_heard_whole(tmp_path):
    import soundfile

    soundfile.write(tmp_path / "one.mp3", voice(), 16000)
    (tmp_path / "a.mp3").write_bytes((tmp_path / "one.mp3").read_bytes() * 2)
    sound, rate, said = hear(tmp_path / "a.mp3")
    assert 2 * len(voice()) <= len(sound) < 2 * len(voice()) + 4000 and rate == 16000 and not said


@pytest.mark.parametrize(
    "name, word",
    [("a.raw", "-f s16le"), ("a.pcm", "-f s16le"), ("a.wav", "unreadable"), ("e.m4a", "zero bytes")],
)
def test_bytes_that_are_no_sound_are_one_clear_sentence(tmp_path, name, word):
    noise = (
        b"" if name[0] == "e" else np.random.default_rng(0).integers(-99, 99, 9999).astype("<i2").tobytes()
    )
    (tmp_path / name).write_bytes(noise)
    with pytest.raises(console.UserError, match=word) as e:
        hear(tmp_path / name)
    assert "\n" not in str(e.value) and name in str(e.value)


def test_what_needs_a_decoder_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "memo.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(100))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "av" else find(name))
    with pytest.raises(console.UserError, match="pip install av"):
        hear(tmp_path / "memo.m4a")


@pytest.mark.slow
def test_a_long_sound_is_heard_in_bounded_memory(tmp_path):
    import resource

    import soundfile

    with soundfile.SoundFile(tmp_path / "a.wav", "w", 16000, 2) as f:
        for _ in range(600):  # ten minutes of stereo: 77 MB as float32
            f.write(np.zeros((16000, 2), np.float32) + 0.001 * np.arange(2))
    code = (
        "import resource, sys; from media.sound import read_sound; import numpy, soundfile;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "n = sum(len(block) for block, _ in read_sound(sys.argv[1]));"
        "print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.wav")], cwd=ROOT, capture_output=True, text=True
    )
    samples, kilobytes = map(int, done.stdout.split())
    assert samples == 600 * 16000 and kilobytes < 40000 and resource, done.stderr


@pytest.mark.parametrize("header", [44, 68])
def test_the_header_of_a_wav_is_taken_off_a_stream(header):
    samples = np.arange(-50, 50).astype("<i2").tobytes()
    extra = b"LIST" + (header - 52).to_bytes(4, "little") + bytes(header - 52) if header > 44 else b""
    head = console_wav(48000, 1, 16, extra, len(samples))
    stream = io.BytesIO(head + samples)
    assert sound_module.open_pcm(stream) == (48000, b"") and stream.read() == samples
    stream = io.BytesIO(samples)
    rate, first = sound_module.open_pcm(stream)
    assert rate is None and first + stream.read() == samples
    for other in (
        console_wav(48000, 2, 16, b"", 4),
        console_wav(48000, 1, 24, b"", 4),
        b"fLaC" + bytes(9),
        b"ID3" + bytes(9),
    ):
        with pytest.raises(console.UserError, match="^standard input: "):
            sound_module.open_pcm(io.BytesIO(other + samples))


def console_wav(rate, channels, bits, extra, size):
    step = channels * bits // 8
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, channels, rate, rate * step, step, bits)
    return (
        b"RIFF"
        + struct.pack("<I", 36 + len(extra) + size)
        + b"WAVE"
        + form
        + extra
        + struct.pack("<4sI", b"data", size)
    )


# --- names and folders


def report_of(out):
    with open(out / "report.csv", newline="", encoding="utf-8") as f:
        return {Path(row["source"]).name: row for row in csv.DictReader(f)}


def write_pair(folder, stem, seed, landmarks=".npy", sound=".wav"):
    points, _, s = speech(seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / (stem + landmarks), "wb") as f:
        np.save(f, points)
    write_wav(folder / "temporary.wav", s)
    os.rename(folder / "temporary.wav", folder / (stem + sound))


def test_endings_in_capitals_are_the_same_kinds(tmp_path):
    for i, kinds in enumerate([(".npy", ".wav"), (".NPY", ".wav"), (".npy", ".WAV"), (".Npy", ".Wav")]):
        write_pair(tmp_path / "in", f"clip{i}", i, *kinds)
    out, _ = prepare(tmp_path / "in", "--out", tmp_path / "out")
    assert out.strip().endswith("4 clips, 0.2 minutes, 0 skipped"), out


def test_names_of_any_bytes_are_read_and_reported(tmp_path):
    names = [
        os.fsdecode(b"caf\xe9"),
        "10:30",
        "-dash",
        "new\nline",
        " space ",
        "per%cent",
        "Ünï 你好 🙂",
        "a.b.c",
    ]
    for i, name in enumerate(names):
        write_pair(tmp_path / "in", name, i)
    for _ in range(2):  # and the same command again
        out, _ = prepare(tmp_path / "in", "--out", tmp_path / "out")
        assert out.strip().endswith(f"{len(names)} clips, 0.4 minutes, 0 skipped"), out
    meta, _ = load(tmp_path / "out")
    assert {clip["name"] for clip in meta["clips"]} == {"caf\\xe9", *names[1:]}
    assert "caf\\xe9.npy" in report_of(tmp_path / "out")


def test_links_to_folders_are_followed_once_and_loops_are_found(tmp_path):
    for i in range(3):
        write_pair(tmp_path / f"elsewhere/s{i}", f"clip{i}", i)
    (tmp_path / "in/s9").mkdir(parents=True)
    write_pair(tmp_path / "in/s9", "own", 9)
    for i in range(3):
        (tmp_path / f"in/s{i}").symlink_to(tmp_path / f"elsewhere/s{i}")
    (tmp_path / "in/again").symlink_to(tmp_path / "elsewhere/s0")
    (tmp_path / "in/a_loop").symlink_to("..")
    (tmp_path / "in/s9/loop").symlink_to(tmp_path / "in")
    out, _ = prepare(tmp_path / "in", "--out", tmp_path / "out")
    assert out.strip().endswith("4 clips, 0.2 minutes, 0 skipped"), out
    report = report_of(tmp_path / "out")
    assert [report[name]["reason"] for name in ("s0", "loop", "a_loop")] == ["read already"] * 3
    assert {clip["speaker"] for clip in load(tmp_path / "out")[0]["clips"]} <= {"again", "s1", "s2", "s9"}


def test_every_file_has_a_line_in_the_report(tmp_path):
    for i in range(3):
        write_pair(tmp_path / "in", f"clip{i}", i)
    write_wav(tmp_path / "in/alone.wav", speech()[2])
    (tmp_path / "in/notes.txt").write_text("hello")
    (tmp_path / "in/clip0.align").write_text("hello")
    (tmp_path / "in/nowhere.npz").symlink_to(tmp_path / "nowhere")
    (tmp_path / "in/.hidden").write_text("hello")
    out, _ = prepare(tmp_path / "in", "--out", tmp_path / "out")
    assert "2 skipped" in out.strip().splitlines()[-1], out
    report = report_of(tmp_path / "out")
    assert set(report) == {path.name for path in (tmp_path / "in").iterdir()} - {".hidden"}
    assert report["clip1.wav"]["detail"] == "sound of clip1" and not report["clip1.wav"]["reason"]
    assert report["alone.wav"]["reason"] == "sound without landmarks"
    assert report["notes.txt"]["reason"] == "not a kind that is read"


@pytest.mark.slow  # starts processes
def test_a_locale_that_is_not_utf_8_changes_nothing(tmp_path):
    for i, name in enumerate(("Ünï", "b", "c")):
        write_pair(tmp_path / "in", name, i)
    env = dict(os.environ, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    command = [
        sys.executable,
        str(ROOT / "prepare_data.py"),
        str(tmp_path / "in"),
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0 and done.stdout.strip().endswith("3 clips, 0.1 minutes, 0 skipped"), done
    prepare(tmp_path / "in", "--out", tmp_path / "here")
    assert (tmp_path / "out/meta.json").read_bytes() == (tmp_path / "here/meta.json").read_bytes()


# --- machines


def test_preparing_and_its_rooms_load_no_torch():
    code = "import sys, prepare_data, media.export; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.slow  # starts processes
def test_librosa_loads_where_neither_its_folder_nor_a_home_can_be_written(monkeypatch):
    """numba keeps what it compiles beside the package or in the user's cache: a container may have
    neither."""
    code = (
        "import numba.core.caching as c; from media.sound import Mel;"
        "places = c.CacheImpl._locator_classes;"
        "c.CacheImpl._locator_classes = [p for p in places if 'UserProvided' in p.__name__];"
        "print(Mel().columns([0.0] * 16000).shape)"
    )
    env = {key: value for key, value in os.environ.items() if key != "NUMBA_CACHE_DIR"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "(25, 40)", done.stderr


# --- whatever the bytes


def damaged(data, rng):
    """A copy of a file that was cut, overwritten, repeated or spliced."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        at, n = int(rng.integers(0, len(data))), int(rng.integers(1, 9))
        kind = rng.integers(0, 5)
        if kind == 0:
            data[at : at + n] = rng.bytes(n)
        elif kind == 1:
            data[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 2:
            del data[at : at + int(rng.integers(1, 400))]
        elif kind == 3:
            data[at:at] = data[at : at + n]
        else:
            data[at : at + n] = rng.choice([b"-1", b"nan", b"9" * n, b"\xff" * n, b"\0" * n, b"(", b"e999"])
        if len(data) < 8:
            break
    return bytes(data)


def survive(folder, count, seed):
    """Read `count` damaged landmark files and sounds: how many were taken, how many refused."""
    points, times, sound = speech(1.2)
    good = folder / "good"
    good.mkdir()
    np.savez_compressed(good / "a.npz", landmarks=points.astype(np.float32), fps=25, audio=sound, sr=16000)
    np.savez(
        good / "b.npz", landmarks=points.astype(np.float32), pts=times, wh=[400, 400], audio=sound, sr=16000
    )
    np.save(good / "c.npy", points.astype(np.float32))
    write_openface(good / "d.csv", points, times)
    write_wav(good / "e.wav", sound)
    originals = {path.suffix + path.stem: path.read_bytes() for path in sorted(good.iterdir())}
    rng, counts = np.random.default_rng(seed), {"taken": 0, "refused": 0}
    for i in range(count):
        key = list(originals)[i % len(originals)]
        suffix = key[:-1]
        path = folder / f"x{suffix}"
        path.write_bytes(damaged(originals[key], rng))
        try:
            if suffix == ".wav":
                source = Source("x", str(good / "c.npy"), sound=str(path))
            else:
                source = Source("x", str(path), sound=str(good / "e.wav"))
            prepare_data.cut(read_ready(source, 25), SETTINGS)
            counts["taken"] += 1
        except console.Skip:  # ours; anything else fails the test
            counts["refused"] += 1
    return counts


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_read_or_refused_and_raise_nothing_else(tmp_path):
    counts = survive(tmp_path, 400, seed=0)
    assert sum(counts.values()) == 400 and min(counts.values()) > 40, counts


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_many_damaged_files_are_read_or_refused_and_raise_nothing_else(tmp_path):
    """FUZZ=100000 python -m pytest --slow -k many_damaged: some minutes more."""
    count = int(os.environ.get("FUZZ", 4000 if THOROUGH else 1000))
    assert sum(survive(tmp_path, count, seed=1).values()) == count
