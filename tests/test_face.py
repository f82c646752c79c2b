"""A face worth watching: the level of the sound, denoised faces, head and lips apart, one's own face."""

import hashlib
import sys
from pathlib import Path

import librosa
import numpy as np
import pytest
import regressor
import soundfile
import torch
from faces import at_rest
from languages import Synthesiser, area, measure

import talkingflow
from cli import PRETRAINED
from media.console import UserError
from media.face import draw_on, head_latents, read_face, rest_face, steer, with_eyes_of
from media.landmarks import face_box, lip_points, mouth_opening, points
from media.sound import FLOOR, QUIET, Mel, unlike_speech, vary
from talkingflow import Clips, Config, Talker, TalkingFlow, load_checkpoint

SHIPPED = PRETRAINED.with_name("held-out")


@pytest.fixture(scope="module")
def pretrained():
    flow, state = load_checkpoint(PRETRAINED)
    return flow, state["data"]


def voice(seconds=4, rate=16000, seed=0):
    """Noise in syllables: loud and silent by turns."""
    t = np.arange(seconds * rate) / rate
    noise = np.random.default_rng(seed).standard_normal(len(t))
    return (0.1 * noise * np.clip(np.sin(2 * np.pi * 3 * t), 0.01, 1)).astype(np.float32)


# --- the level


def test_the_level_is_the_recursion_of_its_definition():
    absolute, heard = Mel(level=0).columns(voice()), Mel(level=0.03).columns(voice())
    level = QUIET
    for c, relative in zip(absolute, heard, strict=True):
        level = max(level - 0.03, np.log(np.exp(c.astype(float)).sum()), QUIET)
        assert np.abs(c - level - relative).max() < 1e-5
    assert np.abs(heard - absolute).max() > 1


def test_blocks_and_the_whole_are_bit_equal():
    rng = np.random.default_rng(0)
    for rate, fps, level in ((16000, 25, 0.01), (44100, 25, 0.01), (22050, 29.97, 0.01), (8000, 25, 0)):
        sound = voice(3, rate)
        mel = Mel(fps=fps, sample_rate=rate, level=level)
        whole = mel.columns(sound)
        mel.forget()
        pieces = np.split(sound, np.sort(rng.integers(0, len(sound), 50)))
        assert np.array_equal(np.concatenate([mel.push(piece) for piece in pieces]), whole)


def test_training_leans_the_spectrum_of_each_window_and_nothing_else(waves):
    clips, tilt = Clips(waves), 1.5
    windows = clips.windows("train", 32)[:40]
    (x, c), (same, leaning) = (
        clips.batch(windows, 32, tilt=t, generator=torch.Generator().manual_seed(0)) for t in (0.0, tilt)
    )
    slope = (leaning - c)[:, 0, -1]
    assert torch.equal(x, same) and slope.abs().max() <= tilt and 0.5 < slope.std() / (tilt / 3**0.5) < 1.5
    assert torch.allclose(leaning - c, slope[:, None, None] * torch.linspace(-1, 1, 40), atol=1e-5)


def test_a_quarter_of_the_windows_is_heard_from_vocal_tracts_of_other_lengths():
    """A formant at 1500 Hz: where its peak goes, the whole spectrum goes."""
    hz = librosa.mel_frequencies(122, fmin=0, fmax=8000)[1:-1]
    formant = np.tile(-8 * np.log(hz / 1500) ** 2, (800, 3, 1)).astype(np.float32)
    heard = vary(formant, {"fmin": 0, "fmax": 8000}, np.random.default_rng(0), vtlp=0.35)
    assert np.array_equal(heard[:, 0], heard[:, 2])  # the same voice all along
    moved = np.log(hz[heard[:, 0].argmax(1)] / 1500)
    assert 0.68 < (np.abs(moved) < 0.02).mean() < 0.82
    assert 0.3 < moved.max() < 0.38 and -0.38 < moved.min() < -0.3 and abs(moved.mean()) < 0.03
    other = heard[moved.argmax(), 0]
    assert np.abs(other - -8 * np.log(hz / 1500 / np.exp(moved.max())) ** 2)[20:-20].max() < 0.5


def test_a_share_of_the_windows_is_heard_in_noise_and_one_through_a_telephone():
    columns = np.concatenate([np.full((500, 1, 40), -21.0), np.full((500, 1, 40), 2.0)], 1).astype(np.float32)
    heard = vary(columns, {"fmin": 0, "fmax": 8000}, np.random.default_rng(0), channel=0.2)
    silence, loud = heard.transpose(1, 0, 2)
    noisy, narrow = silence.mean(1) > -20, loud[:, -1] < 1
    assert 0.15 < noisy.mean() < 0.25 and np.array_equal(silence[~noisy], columns[~noisy, 0])
    assert -13.2 < silence[noisy].mean(1).min() and silence[noisy].mean(1).max() < -5.8
    assert 0.25 < silence[noisy].std(1).mean() < 0.35
    assert 0.15 < narrow.mean() < 0.25 and np.abs(loud[~narrow] - 2).max() < 0.01
    empty, hz = loud[narrow] < 1, librosa.mel_frequencies(42, fmin=0, fmax=8000)[1:-1]
    assert (np.diff(empty, axis=1).sum(1) == 1).all()  # from one band on
    first = hz[empty.argmax(1)]
    assert 3400 < first.min() < 4000 and 6500 < first.max() < 8000
    assert -20.1 < loud[narrow][empty].min() and loud[narrow & ~noisy, -1].max() < -11.9


@pytest.mark.parametrize("first", [0, 300])
def test_an_overdriven_window_is_that_of_the_clipped_sound(waves, first):
    """It clips 0 to 15 dB below the peak of the window and the 2 seconds before it."""
    clips = Clips(waves)
    sound = np.round(20000 * np.sin(np.arange(16000 * 20) * 2 * np.pi * 200 / 16000)).astype(np.int16)
    frames, limits = np.arange(first, first + 32) + 2, []
    before = max(0, frames[0] - 50)
    clips.audio = np.concatenate([np.full(640, 32767, np.int16), sound])  # another clip's
    clips.audio[640 : 640 * before] = 32767  # long ago
    clip = {"audio_start": 640, "audio_samples": len(sound)}
    for seed in range(20):
        heard = clips.overdriven(clip, frames, np.random.default_rng(seed))
        limits.append(20000 * 10 ** (-np.random.default_rng(seed).uniform(0, 15) / 20))
        clipped = np.clip(sound[640 * before :], -limits[-1], limits[-1]) / 32768
        assert np.abs(heard - clips.hearing.columns(clipped)[frames - before]).max() < 1e-3
    assert min(limits) < 4500 < 16000 < max(limits)
    end = clips.overdriven(clip, np.array([498, 499, 499]), np.random.default_rng(0))
    assert end.shape == (3, 40) and np.array_equal(end[1], end[2])  # of 500 columns


def test_a_share_of_the_windows_is_overdriven(waves, monkeypatch):
    clips, asked = Clips(waves), []
    monkeypatch.setattr(
        clips, "overdriven", lambda clip, frames, rng: asked.append(frames) or np.full((32, 40), 99.0)
    )
    windows = clips.windows("train", 32)[:4] * 100
    _, c = clips.batch(windows, 32, lead=2, channel=0.2, generator=torch.Generator().manual_seed(0))
    assert 0.15 < len(asked) / 400 < 0.25 and (c[:, 0, 0] > 90).sum() == len(asked)
    assert {int(frames[0]) for frames in asked} == {2, 34, 66}  # `lead` ahead
    asked.clear()
    clips.batch(windows, 32, lead=2, vtlp=0.3, generator=torch.Generator().manual_seed(0))
    assert not asked


def test_gain_is_not_heard_once_the_voice_was():
    heard = {db: Mel().columns(voice() * 10 ** (db / 20)) for db in (-20, 0, 12)}
    for db in (-20, 12):
        assert np.abs(heard[db] - heard[0])[10:].max() < 1e-4


def test_the_level_of_digital_silence_is_finite_and_gives_way_to_the_first_word():
    silence, sound = np.zeros(16000, np.float32), voice()
    heard = Mel().columns(np.concatenate([silence, sound]))
    assert np.allclose(heard[:25], np.log(FLOOR) - QUIET)  # far below any voice, and still
    assert np.abs(heard[26:] - Mel().columns(sound)[1:]).max() < 1e-5  # as if there had been none


def test_level_0_and_old_checkpoints_hear_absolutely():
    sound = voice(1)
    assert np.array_equal(Mel(level=False).columns(sound), Mel(level=0).columns(sound))
    assert np.abs(Mel(level=0).columns(2 * sound) - Mel(level=0).columns(sound) - np.log(4)).max() < 1e-4
    with pytest.raises(UserError, match="whole clip"):
        Mel(level=True)


def test_recordings_are_prepared_with_the_level_and_synthetic_talkers_without(monkeypatch, tmp_path):
    import prepare_data

    asked = []
    monkeypatch.setattr(prepare_data, "prepare", lambda args: asked.append(args.level))
    monkeypatch.setattr(prepare_data, "synthetic", lambda *values: asked.append(values[-2]))
    for source in (str(tmp_path), "synthetic"):
        prepare_data.main([source, "--out", "unused"])
    prepare_data.main(["synthetic", "--out", "unused", "--level", "0.02"])
    assert asked == [0.01, 0, 0.02]
    assert prepare_data.main([str(tmp_path), "--out", "unused", "--level", "-1"]) == 1


# --- without the training noise


def random_flow(dim=16, prior="ar2", seed=0, **config):
    """A flow in float64 whose couplings do something, with any autocorrelations."""
    torch.manual_seed(seed)
    numbers = {"dim": dim, "cond_dim": 3, "hidden": 8, "prior": prior, "steps_per_scale": 1, "dropout": 0}
    flow = TalkingFlow(Config(**numbers | config)).double().eval()
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            if "net." in name or "partial" in name:
                parameter.normal_(0, 0.3)
    return flow


def test_a_gaussian_is_denoised_to_its_posterior_mean():
    """Identity couplings leave a Gaussian: by linear algebra E[clean_t | x_0..x_t] = x_t - sigma^2 (R^-1 x)_t
    with R the covariance of the frames so far."""
    T, D, sigma = 5, 16, 0.3
    flow = random_flow(prior_mean=False)
    with torch.no_grad():
        for step in (step for scale in flow.scales for step in scale):
            step.coupling.net.out.weight.zero_(), step.coupling.net.out.bias.zero_()
            step.actnorm.logs.normal_(0, 0.3)
        c = torch.zeros(1, T, 3, dtype=torch.float64)
        columns = flow.inverse(
            torch.eye(D, dtype=torch.float64)[None].split(flow.sizes, 2), torch.zeros(1, D, 3)
        )
        A = columns[0].T  # x_t = A z_t
    p1, p2 = flow.prior.partials().detach()
    a1, rho = p1 * (1 - p2), [torch.ones_like(p1), p1]
    for _ in range(T):
        rho.append(a1 * rho[-1] + p2 * rho[-2])
    R = [[A @ torch.diag(flow.prior.variance * rho[abs(i - j)]) @ A.T for j in range(T)] for i in range(T)]
    R = torch.cat([torch.cat(row, 1) for row in R])
    x = torch.randn(1, T, D, dtype=torch.float64)
    clean = flow.denoise(x, c, sigma)
    for t in range(T):
        n = (t + 1) * D
        expected = x[0, t] - sigma**2 * torch.linalg.solve(R[:n, :n], x[0, : t + 1].reshape(-1))[-D:]
        assert (clean[0, t] - expected).abs().max() < 1e-9


@pytest.mark.parametrize("prior", ["ar2", "iid"])
def test_each_frame_is_denoised_by_its_own_gradient_given_the_frames_before(prior):
    flow = random_flow(prior=prior)
    x, c = (torch.randn(2, 7, n, dtype=torch.float64) for n in (16, 3))
    clean = flow.denoise(x, c, 0.2)
    for t in range(7):
        part = x[:, : t + 1].clone().requires_grad_()
        (score,) = torch.autograd.grad(flow.log_prob(part, c[:, : t + 1]).sum(), part)
        assert (clean[:, t] - x[:, t] - 0.04 * score[:, t]).abs().max() < 1e-12
    later = x.clone()
    later[:, 4:] += 1
    assert torch.equal(flow.denoise(later, c, 0.2)[:, :4], clean[:, :4])  # causal


def test_a_denoised_stream_equals_the_whole_and_a_plain_one_stays_a_draw():
    flow = random_flow()
    c = torch.randn(2, 9, 3, dtype=torch.float64)

    def stream(sigma):
        return flow.stream(2, generator=torch.Generator().manual_seed(1), sigma=sigma)

    draw, whole, blocks = stream(0).push(c), stream(0.1).push(c), stream(0.1)
    parts = torch.cat([blocks.push(block) for block in c.split([1, 4, 0, 1, 3], 1)], 1)
    assert (parts - whole).abs().max() < 1e-12
    assert (flow.denoise(draw, c, 0.1) - whole).abs().max() < 1e-12 and (draw - whole).abs().max() > 1e-3
    assert torch.equal(flow.sample(c, generator=torch.Generator().manual_seed(1)), draw)
    assert not whole.requires_grad and all(p.grad is None for p in flow.parameters())


def test_the_shipped_weights_are_those_of_the_card_and_name_no_folder(pretrained):
    digest, name = PRETRAINED.with_suffix(".pt.sha256").read_text().split()
    assert name == PRETRAINED.name and hashlib.sha256(PRETRAINED.read_bytes()).hexdigest() == digest
    assert pretrained[1]["folder"] == "" and pretrained[1]["mel"]["level"] == 0.01


def test_noise_on_a_recorded_face_is_halved(pretrained):
    """The shipped sentence: what is left of the noise after denoising is about half of it."""
    (flow, data), sound = pretrained, soundfile.read(SHIPPED.with_suffix(".wav"), dtype="float32")[0]
    recorded = np.load(SHIPPED.with_suffix(".npy"))
    corner, side = face_box(recorded.mean(0))
    x = torch.from_numpy(((recorded - corner) / side).astype(np.float32).reshape(1, -1, 136))
    columns = Mel(**data["mel"], fps=data["fps"]).columns(sound)
    ahead = np.minimum(np.arange(len(columns)) + flow.config.lead, len(columns) - 1)
    c = torch.from_numpy(columns[ahead])[None]
    sigma = flow.config.noise * data["interocular"]
    noisy = x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    left = (flow.denoise(noisy, c, sigma) - x).square().mean().sqrt() / sigma
    assert 0.3 < left < 0.65


# --- head, lips, face


def speaking(pretrained, **how):
    """Two faces that speak four seconds: (2, 100, 136)."""
    flow, data = pretrained
    talker = Talker(flow, data, 16000, faces=2, **how)
    return np.concatenate([talker.push(voice()), talker.finish()], 1)


def head(track):
    return points(track)[..., 27:36, :].mean(-2).std(1).mean()


def lips(track):
    return lip_points(track).std(1).mean()


def eyes(track):
    p = points(track)
    return (p[..., 36:42, :] - p[..., 36:42, :].mean(-2, keepdims=True)).std(1).mean()


def test_head_and_lips_are_stilled_each_by_itself_and_the_eyes_go_on(pretrained):
    plain, still = speaking(pretrained), speaking(pretrained, head=0.0)
    mute, statue = speaking(pretrained, lips=0.0), speaking(pretrained, head=0.0, lips=0.0)
    assert head(still) < 0.6 * head(plain) and 0.8 < lips(still) / lips(plain) < 1.2
    assert lips(mute) < 0.2 * lips(plain) and head(mute) > 0.6 * head(plain)
    assert head(statue) < 0.05 * head(plain) and lips(statue) < 0.05 * lips(plain)
    assert all(0.99 < eyes(track) / eyes(plain) < 1.01 for track in (still, mute, statue))
    wide = speaking(pretrained, lips=1.5)
    assert 1.15 < lips(wide) / lips(plain) < 1.6


def test_at_1_nothing_is_steered(pretrained):
    flow, data = pretrained
    z, c = torch.randn(1, 5, 136), torch.randn(1, 5, 40)
    same_z, same_c = steer(flow)(z, c)
    assert (same_z - z).abs().max() < 1e-5 and (same_c - c).abs().max() < 1e-5
    assert 2 <= head_latents(flow).sum() < 60


def test_the_face_at_rest_has_its_mouth_closed(pretrained):
    assert mouth_opening(rest_face(pretrained[0])) < 0.03


def test_a_face_is_drawn_by_the_displacements_from_rest(pretrained):
    """On its own rest face nothing changes; on one turned and twice as large every motion is turned and
    doubled."""
    flow, _ = pretrained
    rest, plain = rest_face(flow), speaking(pretrained)
    assert np.abs(speaking(pretrained, face=rest) - plain).max() < 1e-5
    turn = 2 * np.array([[0.8, 0.6], [-0.6, 0.8]])
    assert (
        np.abs(points(speaking(pretrained, face=rest @ turn + 3)) - (points(plain) @ turn + 3)).max() < 1e-4
    )
    assert np.allclose(draw_on(plain, rest, rest), plain, atol=1e-6)


def test_blocks_too_short_for_a_frame_are_drawn_on_a_face_too(pretrained):
    flow, data = pretrained
    how = {"face": rest_face(flow), "head": 0.5}
    talker, sound = Talker(flow, data, 16000, **how), voice(1)
    tracks = [talker.push(block) for block in np.split(sound, range(100, 16000, 300))] + [talker.finish()]
    assert tracks[0].shape == (1, 0, 136)
    whole = Talker(flow, data, 16000, **how)
    whole = np.concatenate([whole.push(sound), whole.finish()], 1)
    assert np.abs(np.concatenate(tracks, 1) - whole).max() < 1e-5


def test_the_eyes_of_one_track_on_another_keep_their_place():
    a, b = np.random.default_rng(0).normal(size=(2, 3, 136))
    out = points(with_eyes_of(a, b))
    assert np.allclose(out[:, 36:42].mean(1), points(a)[:, 36:42].mean(1))
    assert np.allclose(np.diff(out[:, 42:48], axis=1), np.diff(points(b)[:, 42:48], axis=1))
    untouched = [*range(36), *range(48, 68)]
    assert np.array_equal(out[:, untouched], points(a)[:, untouched])


def test_a_face_file_gives_the_frames_with_the_most_closed_mouth(pretrained, tmp_path):
    rest = rest_face(pretrained[0]) * 300 + 50
    track = np.repeat(rest[None], 20, 0)
    track[:18, 65:68, 1] += 30  # mouth open
    np.save(tmp_path / "track.npy", track)
    face, box = read_face(tmp_path / "track.npy")
    assert np.allclose(face * box[2] + box[:2], rest, atol=1e-2) and 0 <= face.min() < face.max() <= 1
    np.save(tmp_path / "one.npy", rest)
    assert np.allclose(read_face(tmp_path / "one.npy")[0], face, atol=1e-4)
    np.save(tmp_path / "bad.npy", rest[:50])
    for name in ("bad.npy", "none.npy"):
        with pytest.raises(UserError, match=name):
            read_face(tmp_path / name)


@pytest.mark.slow
def test_without_a_wav_the_shipped_sentence_is_spoken_beside_its_recorded_face(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert talkingflow.main(["sample", "--out", "x.npz", "--num-samples", "1", "--device", "cpu"]) == 0
    with np.load("x.npz") as z:
        said = z["landmarks"]
    assert said.shape == (1, 74, 68, 2) and said.min() > -0.5 and said.max() < 1.5
    assert talkingflow.main(["sample", "--out", "x.html", "--device", "cpu"]) == 0
    assert Path("x.html").stat().st_size > 100_000  # faces, the recorded one and the sound
    assert (
        talkingflow.main(["sample", "--out", "y.npz", "--num-samples", "1", "--checkpoint", str(PRETRAINED)])
        == 0
    )
    with np.load("y.npz") as z:
        assert np.array_equal(z["landmarks"], said)  # named or not, they are the shipped ones


def test_rest_is_measured_alike_in_a_recorded_and_a_drawn_face():
    said = np.load(SHIPPED.with_suffix(".npy")).reshape(-1, 136)  # pixels
    quiet = np.arange(len(said)) % 3 == 0
    assert np.allclose(at_rest([said], [quiet]), at_rest([said / 360], [quiet]), rtol=1e-5)
    wide = np.repeat(np.load(SHIPPED.with_suffix(".npy"))[:1], 2, 0)
    wide[:, 62], wide[:, 66] = wide[:, 36], wide[:, 45]  # open as far as the eyes are apart
    assert np.allclose(at_rest([wide.reshape(-1, 136)], [np.array([True, True])]), (1, 0))


# --- sounds that the model has not heard the like of


def test_what_is_unlike_speech_is_named():
    sound, rng = voice(), np.random.default_rng(1)
    assert unlike_speech(sound, 16000) == []
    assert "clipped" in unlike_speech(np.clip(20 * sound, -1, 1), 16000)[0]
    assert "silence" in unlike_speech(0 * sound, 16000)[0]
    assert "like noise" in unlike_speech(0.1 * rng.standard_normal(64000), 16000)[0]
    spectrum = np.fft.rfft(sound)
    spectrum[len(spectrum) * 34 // 80 :] = 0
    assert "nothing above 3" in unlike_speech(np.fft.irfft(spectrum), 16000)[0]


def test_channels_that_cancel_are_named(tmp_path, capsys):
    from media.sound import read_sound

    for sign in (1, -1):
        soundfile.write(tmp_path / "two.wav", np.stack([voice(), sign * voice()], 1), 16000)
        list(read_sound(tmp_path / "two.wav"))
        assert ("cancel" in capsys.readouterr().err) == (sign < 0)


@pytest.mark.slow
def test_the_regressor_prints_how_the_mouth_follows_the_sound(talkers, monkeypatch, capsys):
    """Of talkers heard absolutely, which a quieter microphone takes from it."""
    how = "--seeds 1 --steps 300 --vtlp 0 --channel 0 --level 0"
    monkeypatch.setattr(sys, "argv", f"regressor.py --data {talkers} --others {talkers} {how}".split())
    regressor.main()
    names, _, row = (line.split("|")[2:-1] for line in capsys.readouterr().out.splitlines())
    found = {name.strip(): float(cell.split()[0]) for name, cell in zip(names, row, strict=True)}
    assert found["+0 dB"] > 0.8 and found["talkers +0 dB"] > 0.8 and found["-24 dB"] < 0.5, found


def test_the_area_is_the_share_of_pairs_in_order():
    phonemes = [(0.0, "m"), (0.1, "a"), (0.2, "t"), (0.3, "b"), (0.4, "aɪ"), (0.5, "")]
    track = np.arange(5.0)  # 10 frames a second: m at 0, a at 1, b at 3, aɪ at 4
    assert area([track], [phonemes], 10) == (3 / 4, 2.5, 1.5)


@pytest.mark.slow
def test_lips_close_for_p_b_and_m_in_a_language_that_no_training_heard(pretrained):
    pytest.importorskip("espeakng_loader", reason="no synthesiser: pip install espeakng-loader")
    right, before, loud, opened, closed = measure(*pretrained, Synthesiser(), "de")
    assert right > 0.8 > 0.6 > before and loud > 0.9 and opened > 1.5 * closed, (
        right,
        before,
        opened,
        closed,
    )
