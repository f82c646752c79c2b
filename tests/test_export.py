"""What `sample` writes for others: the page that plays faces, and the pictures that renderers start from."""

import base64
import json
import re

import numpy as np
import pytest
from browser import Browser
from PIL import Image

from media.export import COLOURS, landmark_picture, write_html, write_pictures
from media.landmarks import CURVES


def faces(count, frames=25, seed=0):
    """Faces (K, T, 68, 2) whose points lie on a grid, each frame a little elsewhere."""
    grid = np.stack(np.meshgrid(np.arange(10), np.arange(7)), -1).reshape(-1, 2)[:68] / 12 + 0.1
    moves = np.random.default_rng(seed).standard_normal((count, frames, 1, 2)) * 0.01
    return (grid + moves).astype(np.float32)


def write_page(path, recorded=None, **more):
    tracks = {temperature: faces(2, seed=i) for i, temperature in enumerate((0.0, 0.5, 1.0))}
    info = {"fps": 25, "audio": "a.wav", "temperature": 1.0, "seed": 0, "tracks": tracks} | more
    sound = (np.sin(np.arange(16000) / 20) * 9000).astype(np.int16)
    write_html(path, tracks[1.0], recorded, sound, 16000, info)
    return tracks


def test_the_page_holds_every_track_and_the_truth_to_a_tenth_of_a_pixel(tmp_path):
    truth = faces(1, seed=9)[0]
    truth[3] = np.nan  # no face found in this frame
    tracks = write_page(tmp_path / "a.html", truth)
    page = json.loads(re.search(r"^const page = (.*);$", (tmp_path / "a.html").read_text(), re.M)[1])
    points = np.frombuffer(base64.b64decode(page["points"]), "<i2").reshape(3, 3, 25, 68, 2).astype(float)
    assert (points[:, 0, 3] == -32768).all() and (points != -32768).sum() == points.size - 3 * 136
    points[points == -32768] = np.nan
    want = np.stack([np.stack([truth, *track]) for track in tracks.values()])
    low, high = np.nanmin(want, (0, 1, 2, 3)), np.nanmax(want, (0, 1, 2, 3))
    got = points / 60000 * (high - low).max() + (low + high) / 2
    assert np.nanmax(np.abs(got - want)) < 1e-4
    assert page["temperatures"] == [0, 0.5, 1] and page["names"] == ["recorded face", "sample 1", "sample 2"]


@pytest.fixture(scope="module")
def browser():
    with Browser("--autoplay-policy=no-user-gesture-required") as browser:
        yield browser


def test_the_page_says_what_is_seen_and_calls_recorded_only_what_was(browser, tmp_path):
    seen = "$('what').textContent + $('legend').innerText + $('ghost').innerText"
    write_page(tmp_path / "none.html")
    browser.open(f"file://{tmp_path}/none.html")
    assert "heard only this sound; here are two of the many faces that could have said it." in browser.run(
        seen
    )
    assert "recorded" not in browser.run("document.body.innerText.replace(/const page.*/s, '')")
    write_page(tmp_path / "video.html", faces(1)[0])
    browser.open(f"file://{tmp_path}/video.html")
    assert browser.run(seen).count("recorded face") == 3
    write_page(tmp_path / "synthetic.html", faces(1)[0], truth="synthetic talker's own face")
    browser.open(f"file://{tmp_path}/synthetic.html")
    assert "recorded" not in browser.run(seen) and browser.run(seen).count("synthetic talker's own face") == 3
    assert browser.complaints() == []


def test_the_page_switches_between_temperatures_and_loops(browser, tmp_path):
    write_page(tmp_path / "a.html")
    browser.open(f"file://{tmp_path}/a.html")
    frame = "new Promise(done => setTimeout(() => done(document.querySelector('canvas').toDataURL()), 200))"
    pictures = [browser.run(frame)]
    for value in ("0", "0.5", "1"):  # the key goes round
        browser.run("dispatchEvent(new KeyboardEvent('keydown', {key: 't'}))")
        assert browser.run("$('temperature').value") == value
        pictures.append(browser.run(frame))
        assert ("without noise it has one answer" in browser.run("$('what').textContent")) == (value == "0")
    assert len(set(pictures[:3])) == 3 and pictures[3] == pictures[0]
    assert browser.run("sound.loop") is False
    browser.run("$('loop').click(); seek(23); toggle()")
    browser.run("new Promise(done => setTimeout(done, 1500))")
    assert browser.run("sound.loop && !sound.paused && !sound.ended")


def test_pictures_hold_white_lines_and_the_colours_that_renderers_know(tmp_path):
    x = faces(2, frames=3)
    write_pictures(tmp_path / "out", x)
    names = sorted(str(path.relative_to(tmp_path / "out")) for path in tmp_path.rglob("*.png"))
    kinds = [
        f"face{face}/{kind}/{t:05d}.png" for face in (1, 2) for kind in ("colours", "lines") for t in range(3)
    ]
    assert names == kinds
    white, colours = (
        np.array(Image.open(tmp_path / f"out/face2/{k}/00001.png")) for k in ("lines", "colours")
    )
    assert white.shape == colours.shape == (512, 512, 3)
    assert {tuple(v) for v in np.unique(white.reshape(-1, 3), axis=0)} == {(0, 0, 0), (255, 255, 255)}
    for first, last, _ in CURVES:
        # on the line: the grid's rows are straight
        at = np.round(x[1, 1, first : last + 1].mean(0) * 512).astype(int)
        near = (slice(at[1] - 2, at[1] + 3), slice(at[0] - 2, at[0] + 3))
        drawn = {tuple(v) for v in colours[near].reshape(-1, 3).tolist()}
        if last - first < 9 and first // 10 == last // 10:
            assert (COLOURS.get(first, (0, 0, 0)) in drawn) and white[near].any()
    write_pictures(tmp_path / "out", x[:1, :2])  # fewer frames: none of the old ones stay
    assert sorted(p.name for p in (tmp_path / "out/face1/lines").iterdir()) == ["00000.png", "00001.png"]


def test_a_picture_is_the_face_box():
    points = np.full((68, 2), 0.5, np.float32)
    points[0], points[16] = (0, 0), (1, 1)  # the jaw's ends reach the corners
    picture = np.array(landmark_picture(points, size=64))
    assert picture[:3, :3].any() and picture[-3:, -3:].any() and not picture[:3, -3:].any()
