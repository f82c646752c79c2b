"""Whatever goes in, sound and lips in the finished folder agree to 10 ms, or the source is refused with the
true reason.

Pictures and sound follow one known curve; a stand-in for the face finder turns grey into mouth opening; the
lag between the two is measured in what prepare_data.py writes."""

import contextlib
import importlib.util
import io
import json

import films
import numpy as np
import pytest
from conftest import thinned

import prepare_data

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("av"), reason="not installed: av")
SECONDS = 4


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """Grey is mouth opening, and everything runs in this process."""
    monkeypatch.setattr(prepare_data, "load_extractor", lambda *_: films.by_grey)
    monkeypatch.setattr(prepare_data, "find_model", lambda *_: "")
    monkeypatch.setattr(
        prepare_data, "read_all", lambda sources, reader, jobs: ((s, reader(s)) for s in sources)
    )


def prepare(folder, *flags):
    """-> what was printed, and meta and arrays, if anything was written."""
    said, out = io.StringIO(), folder.parent / "out"
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        prepare_data.main([str(folder), "--out", str(out), "--force", *map(str, flags)])
    if not (out / "meta.json").is_file():
        return said.getvalue(), None, None
    meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
    return said.getvalue(), meta, {path.stem: np.load(path) for path in out.glob("*.npy")}


def film(path, seconds=SECONDS, fps=25, late_picture=0.0, late_sound=0.0, times=None, rate=48000, **how):
    """A video of the curve: every picture and sample that of its own time."""
    if times is None:
        times = late_picture + np.arange(int((seconds - late_picture) * fps)) / fps
    size = how.pop("size", (96, 96))
    sound = films.tone(seconds - late_sound, rate, late_sound)
    how.setdefault("layout", "stereo")
    how.setdefault("gains", (1, 1))
    exact = how.pop("exact", bool(late_picture) or fps not in (10, 25, 30, 50, 60))
    films.write_video(
        path, films.grey_pictures(times, size), times, sound, late_sound, fps, rate=rate, exact=exact, **how
    )
    return times


def check_sync(said, meta, arrays, rough=0.98, frames=(SECONDS - 0.5) * 25):
    """Every clip in sync to 10 ms, true to the curve, and none of it left out."""
    assert meta, said
    assert sum(clip["frames"] for clip in meta["clips"]) >= frames, said
    for clip in meta["clips"]:
        late, r_mouth, r_voice = films.lag(meta, arrays, clip)
        assert abs(late) <= 10 and r_mouth > rough and r_voice > 0.98, (late, r_mouth, r_voice)


VP8 = {"vcodec": "libvpx", "options": {"deadline": "realtime", "cpu-used": "8", "b": "2000000"}}
FILMS = {
    "mp4 H.264 AAC": ("a.mp4", {}),
    "mkv H.264 Opus": ("a.mkv", {"acodec": "libopus"}),
    "webm VP8 Opus": ("a.webm", VP8 | {"acodec": "libopus"}),
    "mov H.264 PCM": ("a.mov", {"acodec": "pcm_s16le"}),
    "ts H.264 mp2": ("a.ts", {"acodec": "mp2"}),
    "m2ts H.264 AC-3": ("a.m2ts", {"acodec": "ac3"}),
    "mpg MPEG-2 mp2": ("a.mpg", {"vcodec": "mpeg2video", "acodec": "mp2"}),
    "flv H.264 AAC": ("a.flv", {"rate": 44100}),
    "3gp": ("a.3gp", {"rate": 16000, "layout": "mono", "gains": (1,)}),
    "H.265": (
        "a.mkv",
        {"vcodec": "libx265", "options": {"x265-params": "log-level=none", "preset": "ultrafast"}},
    ),
    "AVI H.264 with B-frames, mp3": ("a.avi", {"acodec": "libmp3lame"}),
    "AVI H.264 without B-frames, mp3": (
        "a.avi",
        {"acodec": "libmp3lame", "options": {"crf": "12", "bf": "0"}},
    ),
    "AVI MPEG-4 with B-frames, AC-3": (
        "a.avi",
        {"vcodec": "mpeg4", "acodec": "ac3", "options": {"bf": "2", "b": "4000000"}},
    ),
    "AVI MJPEG, PCM": ("a.avi", {"vcodec": "mjpeg", "acodec": "pcm_s16le", "options": {"q": "2"}}),
    "AVI MPEG-4, mp2": ("a.avi", {"vcodec": "mpeg4", "acodec": "mp2"}),
    "5.1 channels": ("a.mkv", {"acodec": "ac3", "layout": "5.1", "gains": (0, 0, 1, 0, 0, 0)}),
    "antiphase": ("a.mkv", {"acodec": "pcm_s16le", "gains": (1, -1)}),
    "left only": ("a.mp4", {"gains": (1, 0)}),
    "23.976 a second": ("a.mp4", {"fps": 23.976}),
    "29.97 a second": ("a.mkv", {"fps": 29.97}),
    "60 a second": ("a.mp4", {"fps": 60}),
    "10 a second": ("a.mp4", {"fps": 10}),
    "8 kHz": ("a.mkv", {"rate": 8000, "acodec": "pcm_s16le"}),
    "11.025 kHz": ("a.mkv", {"rate": 11025, "acodec": "pcm_s16le"}),
    "96 kHz": ("a.mkv", {"rate": 96000, "acodec": "pcm_s16le"}),
    "sound late, mp4": ("a.mp4", {"late_sound": 0.4}),
    "sound late, mkv": ("a.mkv", {"late_sound": 0.4}),
    "sound late, ts": ("a.ts", {"late_sound": 0.4, "acodec": "mp2"}),
    "picture late, mp4": ("a.mp4", {"late_picture": 0.3}),
    "picture late, mkv": ("a.mkv", {"late_picture": 0.3}),
    "pixels 64:45": ("a.mp4", {"pixel": "64/45"}),
}


@pytest.mark.parametrize("name", thinned(FILMS, 5))
def test_sound_and_lips_of_a_video_agree_to_10_ms(tmp_path, name):
    file, how = FILMS[name]
    film(tmp_path / "in" / file, **how)
    said, meta, arrays = prepare(tmp_path / "in")
    assert "0 skipped" in said, said
    check_sync(said, meta, arrays, rough=0.96 if how.get("fps") == 10 else 0.98)  # ten a second: interpolated


RATES = {  # intervals between pictures, s, each as likely as it is often here
    "phone 30 and 24": [1 / 30] * 3 + [1 / 24],
    "webcam, every tenth 100 ms": [1 / 30] * 9 + [1 / 10],
    "call 30, 15 and 10": [1 / 30] * 3 + [1 / 15, 1 / 10],
    "screen, 60 and some 200 ms": [1 / 60] * 19 + [1 / 5],
}


@pytest.mark.parametrize("name", thinned(RATES, 5))
def test_a_variable_frame_rate_is_in_sync_and_no_face_is_missing(tmp_path, name):
    intervals = np.random.default_rng(3).choice(RATES[name], 1000)
    times = np.cumsum(np.r_[0, intervals])
    film(tmp_path / "in/a.mkv", times=times[times < SECONDS], exact=True)
    said, meta, arrays = prepare(tmp_path / "in")
    assert "0 of" in said and "0 skipped" in said, said
    check_sync(said, meta, arrays, rough=0.85)  # 100 ms of a fast mouth are interpolated


def openface(path, times):
    """A csv as OpenFace writes it: its times are counted from the first picture."""
    columns = ["frame", "face_id", "timestamp", "confidence", "success"]
    columns += [f"{axis}_{i}" for axis in "xy" for i in range(68)]
    faces = films.face(films.curve(times))
    rows = [[i, 0, t, 1, 1, *p[:, 0], *p[:, 1]] for i, (t, p) in enumerate(zip(times - times[0], faces))]
    np.savetxt(path, rows, "%.4f", delimiter=", ", header=", ".join(columns), comments="")


def ready(kind, path, times, fps):
    """Landmarks of the curve at the times of a video's pictures, as a user may have them."""
    faces = films.face(films.curve(times))
    if kind == "csv":
        openface(path.with_suffix(".csv"), times)
    elif kind == "npz of the file's times":
        np.savez(path.with_suffix(".npz"), landmarks=faces, pts=times)
    elif kind == "npz counted from the first picture":
        np.savez(path.with_suffix(".npz"), landmarks=faces, pts=times - times[0])
    elif kind == "npz of some pictures":
        np.savez(path.with_suffix(".npz"), landmarks=faces[5:-5], pts=times[5:-5])
    elif kind == "npz with a rate":
        np.savez(path.with_suffix(".npz"), landmarks=faces, fps=fps)
    else:
        np.save(path.with_suffix(".npy"), faces)


@pytest.mark.parametrize(
    "kind",
    thinned(["csv", "npz of the file's times", "npz counted from the first picture", "npz of some pictures",
             "npz with a rate", "npy"], 3),
)  # fmt: skip
@pytest.mark.parametrize("how", thinned([{"late_sound": 0.4}, {"late_picture": 0.3}, {"fps": 30}], 3))
def test_ready_landmarks_keep_the_clock_of_the_video_beside_them(tmp_path, kind, how):
    times = film(tmp_path / "in/a.mkv", **how)
    ready(kind, tmp_path / "in/a", times, how.get("fps", 25))
    said, meta, arrays = prepare(tmp_path / "in")
    assert "0 skipped" in said, said
    check_sync(said, meta, arrays, frames=(SECONDS - 1) * 25)


@pytest.mark.parametrize("suffix", [".m4a", ".mka", ".opus", ".flac", ".mp3"])
def test_a_sound_file_beside_landmarks_is_in_sync_whatever_its_kind(tmp_path, suffix):
    times = np.arange(SECONDS * 25) / 25
    (tmp_path / "in").mkdir()
    np.savez(tmp_path / "in/a.npz", landmarks=films.face(films.curve(times)), pts=times)
    sound, path = films.tone(SECONDS, 48000), tmp_path / f"in/a{suffix}"
    if suffix in (".flac", ".mp3"):
        import soundfile

        soundfile.write(path, sound, 48000)
    else:
        import av

        with av.open(
            str(path), "w", format={".m4a": "mp4", ".mka": "matroska", ".opus": "ogg"}[suffix]
        ) as container:
            stream = container.add_stream("aac" if suffix == ".m4a" else "libopus", rate=48000, layout="mono")
            for packet in films.encoded(stream, sound, 0.0, 48000, "mono", (1,)):
                container.mux(packet)
    check_sync(*prepare(tmp_path / "in"))


@pytest.mark.parametrize("seconds", [1.0, 1.16, 2, 4, 4.9, 8])
@pytest.mark.parametrize("fps", [23.976, 24, 26, 29.97, 30, 50])
def test_bare_landmarks_of_another_rate_are_refused_with_the_reason(tmp_path, fps, seconds):
    import soundfile

    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in/a.npy", films.face(films.curve(np.arange(int(seconds * fps)) / fps)))
    soundfile.write(tmp_path / "in/a.wav", films.tone(seconds), 16000)
    said, meta, arrays = prepare(tmp_path / "in")
    assert not meta and "length of landmarks and sound differ" in said, said
    if fps in (24, 29.97, 30, 50) and seconds in (2, 4, 8):
        assert f"{fps:g} frames a second would fit" in said, said


@pytest.mark.parametrize(
    "frames, seconds, fps",
    [(75, 2.978, 25), (75, 3.0, 25), (100, 4.03, 25), (90, 3.02, 30)]
    + [pytest.param(*v, marks=pytest.mark.slow) for v in ((900, 30.0, 30), (1500, 60.15, 25))],
)
def test_bare_landmarks_of_the_right_rate_are_taken_with_a_little_more_or_less_sound(
    tmp_path, frames, seconds, fps
):
    import soundfile

    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in/a.npy", films.face(films.curve(np.arange(frames) / fps)))
    soundfile.write(tmp_path / "in/a.wav", films.tone(seconds), 16000)
    check_sync(*prepare(tmp_path / "in", "--fps", fps), frames=0.95 * frames)


def test_sound_that_is_lost_in_the_middle_leaves_silence_of_its_length(tmp_path):
    import av

    film(tmp_path / "whole.mkv", acodec="pcm_s16le", options={"crf": "12", "bf": "0"})
    (tmp_path / "in").mkdir()
    with av.open(str(tmp_path / "whole.mkv")) as source, av.open(str(tmp_path / "in/a.mkv"), "w") as copy:
        streams = {stream.index: copy.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            at = float(packet.pts * packet.time_base) if packet.pts is not None else None
            if packet.dts is None or (packet.stream.type == "audio" and 1.5 < at < 1.7):
                continue
            packet.stream = streams[packet.stream.index]
            copy.mux(packet)
    said, meta, arrays = prepare(tmp_path / "in")
    begin = round(meta["clips"][0]["time"] * 16000)
    heard, whole = arrays["audio"], np.round(films.tone(SECONDS) * 32767)[begin:]
    after, hole = (
        slice(2 * 16000 - begin, len(whole)),
        slice(int(1.6 * 16000) - begin, int(1.65 * 16000) - begin),
    )
    heard_after, whole_after = heard[after][100:-100], whole[after][: len(heard[after])]
    # 1 ms: the file's clock
    shifts = [whole_after[100 + k : 100 + k + len(heard_after)] for k in range(-16, 17)]
    assert max(np.corrcoef(heard_after, shifted)[0, 1] for shifted in shifts) > 0.99, said
    assert not heard[hole].any()


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    def narrow(rgb):
        return [films.by_grey(rgb)[0] * [45 / 64, 1]]

    film(tmp_path / "in/a.mp4", pixel="64/45")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_data, "load_extractor", lambda *_: narrow)
        said, meta, arrays = prepare(tmp_path / "in")
    x = arrays["landmarks"].reshape(-1, 68, 2).mean(0)
    true = films.face(films.curve(np.arange(SECONDS * 25) / 25)).mean(0)
    shape = np.ptp(x, axis=0)[0] / np.ptp(x, axis=0)[1]
    assert abs(shape - np.ptp(true, axis=0)[0] / np.ptp(true, axis=0)[1]) < 0.01, said
    assert meta["clips"][0]["wh"] == [137, 96]


def test_times_that_are_no_seconds_are_refused(tmp_path):
    times = np.arange(SECONDS * 25) / 25
    (tmp_path / "in").mkdir()
    faces, sound = films.face(films.curve(times)), films.tone(SECONDS)
    np.savez(tmp_path / "in/a.npz", landmarks=faces, pts=times * 1000, audio=sound, sr=16000)
    said, meta, _ = prepare(tmp_path / "in")
    assert not meta and "are they in seconds" in said, said
