"""Every metric against a known answer (an invariance, a closed form), the rows, the commands."""

import copy
import dataclasses
import json
import math
import re
import shutil
import sys

import numpy as np
import pytest
import torch

import evaluate
import prepare_data
import talkingflow
from media import landmarks
from media.landmarks import lip_points, mouth_opening
from media.talkers import SyntheticFace
from study import metrics
from study.metrics import (
    VectorAutoregression,
    auc,
    best_of,
    blink_rate,
    energy_score,
    frechet,
    frechet_of_moments,
    l_mor,
    landmark_distance,
    mean_interocular,
    mouth_correlation,
    pairwise_distance,
    power_spectrum,
    roughness,
    velocity_autocorrelation,
    velocity_distance,
)
from study.rating import QUESTIONS, mean_opinion, ratings_needed
from study.syncnet import SyncNet, sync_offset, sync_score
from study.systems import SYSTEMS, Lu, fit
from talkingflow import Clips

FPS = 25


def faces(N=3, T=40, seed=0):
    """Tracks (N, T, 136) of the synthetic talkers."""
    rng = np.random.default_rng(seed)
    return SyntheticFace().draw(0.3 * rng.normal(size=(N, 1, 4)) + 0.1 * rng.normal(size=(N, T, 4)), rng)


def moved(track, scale=1.0, turn=0.0, shift=(0.0, 0.0)):
    matrix = scale * np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    return (landmarks.points(track) @ matrix.T + np.array(shift)).reshape(track.shape)


def test_the_mouth_metrics_ignore_where_how_large_and_how_turned_either_face_is():
    x, y = faces(seed=1), faces(seed=2)
    other = moved(y, 1.7, 0.4, (3, -2))
    for metric in (l_mor, mouth_correlation):
        assert np.allclose(metric(x, y), metric(x, other), atol=1e-9) and np.allclose(
            metric(x, y), metric(moved(x, 0.2), other), atol=1e-9
        )
    assert np.allclose(l_mor(x, x), 0) and np.allclose(mouth_correlation(x, x), 1)


def test_l_mor_of_a_mouth_that_opens_by_a_tenth_of_its_width_is_a_tenth():
    closed = np.zeros((1, 5, 68, 2))
    closed[..., 60, 0], closed[..., 64, 0] = 0, 2.0
    for i, (upper, lower) in enumerate(((61, 67), (62, 66), (63, 65))):
        closed[..., [upper, lower], 0] = 0.5 * (i + 1)
    opened = closed.copy()
    opened[..., [65, 66, 67], 1] = 0.2
    assert np.allclose(l_mor(opened.reshape(1, 5, 136), closed.reshape(1, 5, 136)), 0.1)


def test_a_still_mouth_has_correlation_zero_and_a_mirrored_one_minus_one():
    x = faces(T=60)
    still = np.repeat(x[:, :1], 60, 1)
    assert np.allclose(mouth_correlation(still, x), 0, atol=1e-6)
    mirrored, gap = x.copy().reshape(*x.shape[:2], 68, 2), mouth_opening(landmarks.points(x))
    width = np.linalg.norm(mirrored[..., 64, :] - mirrored[..., 60, :], axis=-1)
    for upper, lower in ((61, 67), (62, 66), (63, 65)):  # as far open as the truth is closed
        mirrored[..., lower, :] = mirrored[..., upper, :]
        mirrored[..., lower, 1] += (1 - gap) * width
    assert np.allclose(mouth_correlation(landmarks.flat(mirrored), x), -1)


def test_landmark_distance_of_a_face_moved_by_its_eye_distance_is_one_at_any_scale():
    x = np.repeat(faces(T=1), 6, 1)
    y = x + np.tile([1.0, 0.0], 68) * mean_interocular(x)[:, None, None]
    assert np.allclose(landmark_distance(y, x), 1)
    assert np.allclose(landmark_distance(moved(y, 5), moved(x, 5)), 1)


def test_distances_of_lips_do_not_see_the_head():
    x = np.repeat(faces(T=1), 6, 1)
    eye = mean_interocular(x)[:, None, None]
    head = np.cumsum(np.ones((1, 6, 1)), 1) * np.tile([1.0, 0.5], 68) * eye
    assert np.abs(landmark_distance(x + head, x, lip_points)).max() < 1e-6
    assert np.abs(velocity_distance(x + head, x, FPS, lip_points)).max() < 1e-4
    apart = np.zeros(136)
    apart[96::4], apart[98::4] = 0.1, -0.1  # every second lip point to the right, the others to the left
    assert np.allclose(landmark_distance(x + apart * eye, x, lip_points), 0.1)


def test_velocity_distance_is_zero_for_an_offset_and_the_speed_of_a_drift():
    x = faces()
    drift = (
        np.arange(x.shape[1])[None, :, None] * np.tile([0.0, 0.01], 68) * mean_interocular(x)[:, None, None]
    )
    assert np.allclose(velocity_distance(x + 0.3, x, FPS), 0)
    assert np.allclose(velocity_distance(x + drift, x, FPS), 0.01 * FPS)


@pytest.mark.parametrize(
    "spread, expected",
    [(1, 0.5642), (0.5, 2 * math.sqrt(1.25) / math.sqrt(2 * math.pi) - 0.5 / math.sqrt(math.pi))],
)
def test_energy_score_of_gaussian_draws_is_the_closed_form_crps(spread, expected):
    rng = np.random.default_rng(0)
    truth, draws = rng.normal(size=(400, 50, 1)), spread * rng.normal(size=(16, 400, 50, 1))
    assert abs(energy_score(draws, truth).mean() - expected) < 0.01
    assert abs(energy_score(draws[:4], truth).mean() - expected) < 0.02  # fair: K does not shift it


def test_energy_score_prefers_the_true_spread_and_is_the_distance_for_one_draw():
    rng = np.random.default_rng(0)
    truth, noise = rng.normal(size=(400, 20, 3)), rng.normal(size=(16, 400, 20, 3))
    scores = {s: energy_score(s * noise, truth).mean() for s in (0.5, 1, 2)}
    assert scores[1] == min(scores.values())
    assert np.allclose(energy_score(noise[:1], truth), np.linalg.norm(noise[0] - truth, axis=-1).mean(-1))


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_coverage_of_a_calibrated_sampler_is_nominal_with_twenty_draws(share):
    rng = np.random.default_rng(0)
    truth, draws = rng.normal(size=(300, 80)), rng.normal(size=(20, 300, 80))
    assert abs(metrics.coverage(draws, truth, share).mean() - share) < 0.01
    assert (
        metrics.coverage(0.3 * draws, truth, share).mean()
        < share - 0.15
        < share
        < metrics.coverage(3 * draws, truth, share).mean()
    )


def test_diversity_of_gaussian_draws_is_the_closed_form_and_of_equal_draws_zero():
    draws = np.random.default_rng(0).normal(size=(20, 50, 40, 1))
    assert abs(pairwise_distance(draws).mean() - 2 / math.sqrt(math.pi)) < 0.02
    assert pairwise_distance(np.repeat(draws[:1], 3, 0)).max() == 0


def test_best_of_is_the_smallest_distance_of_each_clip():
    assert best_of(np.array([[3.0, 1.0], [2.0, 5.0]])).tolist() == [2.0, 1.0]


def test_frechet_distance_has_its_closed_forms():
    one, rng = np.eye(4), np.random.default_rng(0)
    assert abs(frechet(np.zeros(4), one, np.array([3.0, 0, 4, 0]), one) - 25) < 1e-9
    assert abs(frechet(np.zeros(4), one, np.zeros(4), 9 * one) - 4 * (3 - 1) ** 2) < 1e-9
    A, B = (v @ v.T for v in rng.normal(size=(2, 4, 4)))
    # tr (A B)^(1/2), A and B not commuting
    root = np.sqrt(np.linalg.eigvals(A @ B).astype(complex)).real.sum()
    assert abs(frechet(np.zeros(4), A, np.zeros(4), B) - (np.trace(A + B) - 2 * root)) < 1e-6


def test_frechet_of_moments_is_frechet_of_the_pooled_frames():
    a, b = np.random.default_rng(0).normal(size=(2, 6, 30, 3)) * [[[[1]]], [[[2]]]]
    both = np.concatenate([metrics.moments(a), metrics.moments(b)], 1).mean(0)
    flat = [v.reshape(-1, 3) for v in (a, b)]
    stats = [s for v in flat for s in (v.mean(0), np.cov(v.T, bias=True))]
    assert abs(frechet_of_moments(both) - frechet(*stats)) < 1e-9


def test_roughness_is_zero_for_a_glide_and_the_acceleration_of_a_parabola():
    t = np.arange(20.0)[None, :, None]
    assert roughness(3 + 2 * t).max() < 1e-12 and np.allclose(roughness(0.5 * t**2), 1)


def test_velocity_autocorrelation_is_minus_a_half_for_white_noise_and_near_one_for_a_glide():
    noise = np.random.default_rng(0).normal(size=(50, 400, 2))
    glide = np.sin(np.arange(400) / 40)[None, :, None]
    assert abs(velocity_autocorrelation(noise) + 0.5) < 0.01 and velocity_autocorrelation(glide) > 0.99


def test_three_closings_of_the_eyes_in_three_seconds_are_sixty_blinks_a_minute():
    track = np.repeat(SyntheticFace().mean[None, None], 75, 1)
    p = landmarks.points(track)
    for start in (10, 30, 60):
        for upper, lower in ((37, 41), (38, 40), (43, 47), (44, 46)):
            p[:, start : start + 4, upper] = p[:, start : start + 4, lower]
    assert np.allclose(blink_rate(p.reshape(1, 75, 136), FPS), 60)
    assert np.allclose(blink_rate(moved(p.reshape(1, 75, 136), 3, 0.5), FPS), 60)


def test_lips_that_move_in_silence_have_their_speed_and_opening_there_and_none_elsewhere():
    x = np.repeat(faces(N=2, T=1), 30, 1)
    quiet = np.zeros((2, 30), bool)
    quiet[:, 10:20] = True
    assert np.array_equal(metrics.quiet_frames(np.where(quiet, -9.0, -1.0)[..., None], 1 / 3), quiet)
    moving, eye = x.copy(), mean_interocular(x)[:, None]
    sway = 0.01 * eye * np.cumsum(quiet, 1) * (-1.0) ** np.arange(30)  # the head's: not the lips' speed
    moving += sway[..., None]
    moving[..., 96::4] += np.where(quiet, 0.02 * eye * (np.arange(30) % 2), 0)[..., None]  # every second lip
    change = metrics.lip_change(moving, x)
    within = metrics.average_over(quiet[:, 11:], change[:, 11:]).sum(0)
    assert abs(metrics.root_ratio(within) - 0.02 / 2 / math.sqrt(2)) < 1e-6 and within[1] == 18
    assert change[:, 21:].max() < 1e-12
    opening = mouth_opening(landmarks.points(moving))
    mean = metrics.ratio(metrics.average_over(quiet, opening).sum(0))
    assert abs(mean - opening[:, 10:20].mean()) < 1e-12


def test_the_wrong_sound_is_that_of_another_clip_where_there_is_one():
    names = ["a", "a", "a", "b", "c", "c"]
    other = metrics.another_clip(names)
    assert all(names[i] != name for i, name in zip(other, names, strict=True))
    assert metrics.another_clip(["a", "a"]) in ([1, 0], [-1, 0])
    assert metrics.audio_gain(np.array([-2.0]), np.array([-1.5]), 136) == 68.0


def test_on_synthetic_talkers_mouths_are_compared_with_what_can_be_heard(held):
    mean = SyntheticFace().mean_given_sound(held.articulation())
    assert np.array_equal(held.heard, mean) and held.heard.shape == held.x.shape


def test_the_power_spectrum_of_a_wave_peaks_at_its_frequency():
    assert power_spectrum(np.sin(2 * np.pi * 10 * np.arange(100) / 100)[None, :, None] + 5).argmax() == 10


def test_auc_is_one_half_and_zero_where_it_must_be():
    assert (auc([1, 2], [3, 4]), auc([1, 2], [1, 2]), auc([3, 4], [1, 2])) == (1.0, 0.5, 0.0)


def test_the_bootstrap_interval_of_a_gaussian_mean_is_that_of_the_textbook_and_the_same_every_time():
    values = np.random.default_rng(0).normal(size=400)
    s = metrics.summary(values)
    half = 1.96 * values.std() / 20
    assert abs(s["low"] - (values.mean() - half)) < 0.02 and abs(s["high"] - (values.mean() + half)) < 0.02
    assert s == metrics.summary(values) and abs(s["sd"] - values.std()) < 1e-12
    sums = np.stack([values + 5, np.ones(400)], 1)
    assert abs(metrics.summary(sums, metrics.ratio)["high"] - s["high"] - 5) < 1e-9  # a ratio of sums
    twice = metrics.summary(np.repeat(values, 2), clips=np.repeat(np.arange(len(values)), 2))
    assert np.allclose([*twice.values()], [*s.values()])  # no news


# ------------------------------------------------------------------------------------------------------------
# SyncNet


def small_models(folder, copy, **more):
    """A copy of a training folder that asks for short windows and narrow networks."""
    shutil.copytree(folder, copy)
    meta = json.loads((copy / "meta.json").read_text())
    meta["defaults"] |= {"hidden": 8, "seq_len": 24} | more
    (copy / "meta.json").write_text(json.dumps(meta))
    return copy


@pytest.fixture(scope="module")
def held(talkers):
    return evaluate.Held(Clips(talkers), limit=12)


@pytest.fixture(scope="module")
def net(held, tmp_path_factory):
    return evaluate.train_syncnet(held, tmp_path_factory.mktemp("sync"), 150)


@pytest.mark.slow
def test_syncnet_tells_pairs_from_strangers_and_finds_the_offset_of_late_lips(held, net):
    net, facts = net
    mel = held.sync_sound()
    assert facts["auc"] > 0.95 and sync_offset(net, held.x, mel)[0] == 0
    late = np.concatenate([np.repeat(held.x[:, :1], 4, 1), held.x[:, :-4]], 1)
    assert sync_offset(net, late, mel)[0] == -4  # its sound came four frames earlier
    scores = [sync_score(net, track, mel).mean() for track in (held.x, late, np.roll(held.x, 1, 0))]
    assert scores[0] < 0.4 < scores[1] and scores[0] < 0.4 < scores[2]
    assert np.allclose(
        sync_score(net, moved(held.x, 3, 0, (1, 1)), mel), sync_score(net, held.x, mel), atol=1e-3
    )


def test_a_syncnet_below_nine_tenths_refuses_to_score(held, tmp_path, monkeypatch):
    job = evaluate.Job(str(held.clips.folder), out=tmp_path, clips=4, sync_steps=1)
    monkeypatch.setattr(SyncNet, "check", lambda *_: {"auc": 0.89, "auc_window": 0.7})
    (row,) = evaluate.run_row("late-3", job)
    assert row.label == "ground truth, 3 frames late" and "l_mor" in row.columns
    assert "sync" not in row.columns and "offset" not in row.columns


def test_the_fine_mel_of_a_window_is_that_of_its_own_samples(held):
    clip = held.clips.split("test")[0]
    sound = held.clips.audio[clip["audio_start"] :][: clip["audio_samples"]] / np.float32(32768)
    whole = held.hear.columns(sound)
    fine = held.fine([(clip, 10)], 20, lead=2)[0].numpy()
    assert len(fine) == 4 * 28 and np.array_equal(fine, whole[4 * 4 : 4 * 32])


# ------------------------------------------------------------------------------------------------------------
# Rows


def test_var_recovers_the_process_and_gives_its_exact_likelihood():
    torch.manual_seed(0)
    N, T, A = 400, 30, torch.tensor([[0.8, 0.1], [0.0, 0.5]], dtype=torch.float64)
    x, e = torch.zeros(N, T + 60, 2, dtype=torch.float64), torch.randn(N, T + 60, 2, dtype=torch.float64)
    for t in range(1, T + 60):
        x[:, t] = x[:, t - 1] @ A.T + e[:, t]
    x = x[:, 60:]
    model = VectorAutoregression(x, 1)
    assert (model.models[1][0][:2].T - A).abs().max() < 0.02
    step = torch.distributions.MultivariateNormal(
        torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    )
    first = torch.distributions.MultivariateNormal(x[:, 0].mean(0), torch.cov(x[:, 0].T))
    exact = -(first.log_prob(x[:, 0]) + step.log_prob(x[:, 1:] - x[:, :-1] @ A.T).sum(1)) / (T * 2)
    assert (
        abs(model.nll(x) - exact.numpy()).max() < 0.02
        and abs(model.nll(x).mean() - float(exact.mean())) < 0.002
    )


def test_var_samples_have_the_variance_and_follow_the_sound_of_the_data():
    torch.manual_seed(0)
    s = torch.randn(300, 40, 1)
    x = torch.zeros(300, 40, 3)
    for t in range(40):
        x[:, t] = (0.7 * x[:, t - 1] if t else 0) + torch.tensor([2.0, 0, 0]) * s[:, t] + torch.randn(300, 3)
    model = VectorAutoregression(x, 2, s)
    draw = model.sample(s, torch.Generator().manual_seed(0))
    assert np.allclose(draw.std((0, 1)), x.std((0, 1)).numpy(), rtol=0.05)
    assert np.corrcoef(draw[:, 1:, 0].ravel(), s[:, 1:, 0].flatten())[0, 1] > 0.5
    assert model.nll(x, s).mean() < model.nll(x, s.roll(1, 0)).mean() - 0.3


def test_the_exact_row_is_at_the_optimum_that_the_folder_states(held):
    outcome, mean = evaluate.exact_row(held, None)
    assert np.allclose(outcome.nll, [clip["optimal_nll"] for clip, _ in held.windows], atol=1e-6)
    row = evaluate.score("exact", outcome, held, None)
    columns = row.columns
    assert abs(columns["gap"]["mean"]) < 1e-9 and columns["gain"]["mean"] > 5
    assert 0.9 < columns["jitter_head"]["mean"] < 1.1 and 0.4 < columns["coverage50"]["mean"] < 0.6
    assert row.central["l_mor"]["mean"] < columns["l_mor"]["mean"]  # a draw pays for being honest
    mean = evaluate.score("exact", mean, held, None)
    assert mean.label == "exact sampler, its mean" and mean.columns["mouth_r"]["mean"] > 0.9999


def test_anchor_rows_are_what_they_say(held):
    late = evaluate.shifted(3)(held, None)[0].draws[0]
    assert np.array_equal(late[:, 3:], held.x[:, :-3]) and np.array_equal(late[:, 2], held.x[:, 0])
    assert np.array_equal(evaluate.wrong_clip_row(held, None)[0].draws[0][1], held.x[0])
    assert all(held.names[i] != name for i, name in zip(held.other, held.names, strict=True))
    still, timed = (evaluate.constant_row(over)(held, None)[0].draws[0] for over in ((0, 1), 0))
    assert (
        np.ptp(still, axis=1).max() == 0
        and np.ptp(timed, axis=0).max() == 0
        and np.ptp(timed, axis=1).max() > 0
    )
    noisy = evaluate.noise_row(held, None)[0]
    assert abs((noisy.draws - held.x).std() / mean_interocular(held.x).mean() - 0.01) < 5e-4
    loud, near = (
        metrics.mouth_correlation(row(held, None)[0].draws[0], held.heard).mean()
        for row in (evaluate.loudness_row, evaluate.nearest_row)
    )
    assert loud > 0.5 and near > 0.4


def test_the_truth_is_the_recording_and_only_likelihoods_have_its_noise(noisy):
    recorded = np.stack([noisy.clips.landmarks[c["start"] + s :][: noisy.T] for c, s in noisy.windows])
    assert np.array_equal(noisy.x, recorded)
    added = (noisy.noisy.numpy() - recorded).std() / noisy.clips.meta["interocular"]
    assert abs(added - noisy.noise) < 2e-5
    row = evaluate.score("truth", evaluate.shifted(0)(noisy, None)[0], noisy, None)
    for column, value in (("l_mor", 0), ("lips_velocity", 0), ("jitter_head", 1), ("jitter_mouth", 1)):
        assert abs(row.columns[column]["mean"] - value) < 1e-6, column


def test_without_couplings_the_flow_is_linear_and_its_checkpoint_an_ordinary_one(noisy, tmp_path):
    config = talkingflow.dataclasses.replace(noisy.config, steps=4)
    trainer = talkingflow.Trainer(config, noisy.clips, tmp_path, "cpu")
    before = {name: p.detach().clone() for name, p in trainer.flow.named_parameters()}
    evaluate.freeze_couplings(trainer)
    trainer.run()
    moved = {name for name, p in trainer.flow.named_parameters() if not torch.equal(p, before[name])}
    frozen = {name for name in before if ".coupling." in name}
    assert frozen and not moved & frozen and {"prior.partial", "scales.0.0.conv.upper"} <= moved
    flow, x, c = talkingflow.TalkingFlow(config).eval(), noisy.noisy[:3], noisy.sound(2)[:3]
    flow.load_state_dict(trainer.flow.state_dict())
    assert torch.equal(flow.nll(x, c), trainer.flow.eval().nll(x, c))
    z = torch.cat(flow(torch.cat([x, x[:1] + x[1:2] - x[2:]]), c[[0, 1, 2, 0]])[0], 2)
    assert (z[0] + z[1] - z[2] - z[3]).abs().max() < 1e-3 < z.abs().max()


@pytest.mark.slow
def test_learned_lambdas_move_and_stay_one_number_a_scale(held, tmp_path):
    config = talkingflow.dataclasses.replace(held.config, steps=4, hidden=8)
    trainer = talkingflow.Trainer(config, held.clips, tmp_path, "cpu")
    evaluate.learn_lambdas(trainer)
    for _ in range(4):
        trainer.train_step()
    for part, start in zip(
        trainer.flow.prior.variance.split(trainer.flow.sizes), config.lambdas, strict=True
    ):
        assert part.max() - part.min() < 1e-6 and abs(part[0] - start) > 1e-5
    plain = talkingflow.TalkingFlow(config)
    plain.load_state_dict(trainer.flow.state_dict())  # the checkpoint is an ordinary one


def test_a_baseline_coupling_sees_one_frame_only(held):
    config = talkingflow.dataclasses.replace(held.config, hidden=8, **evaluate.FLOWS["baseline"][1])
    net = talkingflow.ConditionTCN(4, 4, config).eval()
    torch.nn.init.normal_(net.out.weight)
    x, c = torch.randn(1, 12, 4, requires_grad=True), torch.randn(1, 12, held.clips.cond_dim)
    net(x, c)[0, 6].sum().backward()
    assert x.grad[0].abs().sum(1).nonzero().flatten().tolist() == [6]


@pytest.mark.parametrize("name", SYSTEMS)
def test_compared_systems_hear_no_later_than_the_common_look_ahead(held, name):
    torch.manual_seed(0)
    x, c, _ = held.training(20)
    net = SYSTEMS[name][1](held, x, c, 8)
    net.lead = 2
    net.eval()
    x, c = torch.from_numpy(held.x[:2]), held.sound(2)[:2]
    fine = held.fine(held.windows[:2], held.T, 2)
    t, later_c, later = 30, c.clone(), fine.clone()
    later_c[:, t + 1 :], later[:, 4 * (6 + t + 2 + 1) :] = 3.0, 3.0  # c is two frames ahead already
    with torch.no_grad():
        a, b = (
            net.draw(x, *sound, 2, torch.Generator().manual_seed(0))
            for sound in ((c, fine), (later_c, later))
        )
    assert torch.equal(a[:, :, : t + 1], b[:, :, : t + 1]) and not torch.equal(
        a[:, :, t + 1 :], b[:, :, t + 1 :]
    )


def test_compared_systems_train_on_the_sounds_that_the_flows_hear(held, monkeypatch):
    heard, other_sound = [], {"vtlp": 0.3, "tilt": 1.5, "channel": 0.0}
    held = copy.copy(held)
    held.config, held.clips = dataclasses.replace(held.config, **other_sound), copy.copy(held.clips)
    batch = held.clips.batch
    monkeypatch.setattr(held.clips, "batch", lambda *a, **sound: heard.append(sound) or batch(*a, **sound))
    x, c, _ = held.training(20)
    fit(SYSTEMS["eskimez"][1](held, x, c, 64), held, 2, 0)
    assert [sound for sound in heard if sound] == [other_sound] * 2  # validations hear the recording


def test_lu_takes_a_face_apart_and_puts_it_together_and_samples_as_it_trains(held):
    torch.manual_seed(0)
    x, c, _ = held.training(20)
    net = Lu(held, x, c, 8).eval()
    turned = torch.from_numpy(moved(x.mean((0, 1))[None, None].numpy(), 1.2, 0.3, (0.1, 0.2))).float()
    assert (net.mouth(turned) - net.face[net.MOUTH]).abs().max() < 1e-4
    whole = torch.nn.functional.pad(net.face, (0, 1), value=1.0) @ net.pose(turned).view(3, 2)
    assert (whole - landmarks.points(turned)[0, 0]).abs().max() < 1e-4
    past, cond = torch.randn(2, 9, 12), net.cond(net.sound(c[:2, :9]))
    at_once, memory = net.head(past, cond, {})[0], {}
    one_by_one = [net.head(past[:, t : t + 1], cond[:, t : t + 1], memory)[0] for t in range(9)]
    assert (torch.cat(one_by_one, 1) - at_once).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------------------
# The commands


def tables(capsys, *args):
    assert evaluate.main([*map(str, args)]) == 0
    out = capsys.readouterr()
    return out.out, out.err


def without_seconds(text):
    return re.sub(r"Cost on this machine.*?\n\n.*?\n\n", "", text, flags=re.DOTALL)


@pytest.mark.slow  # trains every row
def test_every_row_runs_on_synthetic_talkers_is_cached_and_comes_out_the_same_again(
    talkers, tmp_path, capsys
):
    data = small_models(talkers, tmp_path / "data")
    brief = ["--data", data, "--steps", 2, "--sync-steps", 100, "--clips", 4, "--jobs", 1]
    first, log = tables(capsys, *brief, "--out", tmp_path / "a")
    assert len(re.findall(r"step +2/2: val loss", log)) == len(SYSTEMS)  # as many steps as a flow
    assert len(re.findall(r"step +2/2: train nll", log)) == len(evaluate.FLOWS)
    for name, (_, label, _) in evaluate.ROWS.items():
        assert f"| {label} |" in first or name == "checkpoint", name
    pictures = {p.name for p in (tmp_path / "a").glob("*.png")}
    assert pictures == {"fan.png", "latents.png", "jitter.png", "strips.png"}
    again, log = tables(capsys, *brief, "--out", tmp_path / "a")
    assert again == first and log.count(": from ") == len(evaluate.ROWS) - 1
    command, written = (tmp_path / "a/results.md").read_text().split("\n\n", 1)
    assert written == first and command.strip().startswith("python evaluate.py --data ")
    rows = json.loads((tmp_path / "a/results.json").read_text())["rows"]
    assert abs(rows["full, ar2, no audio"]["columns"]["gain"]["mean"]) < 1e-4
    assert rows["no couplings"]["parameters"] < rows["full, ar2"]["parameters"]
    some = ["--rows", "truth,var2,lu,ar2,checkpoint"]
    some += ["--checkpoint", tmp_path / "a/rows/ar2/checkpoint.pt"]
    a, _ = tables(capsys, *brief, *some, "--out", tmp_path / "a")
    b, _ = tables(capsys, *brief, *some, "--out", tmp_path / "b")
    assert without_seconds(a) == without_seconds(b)
    rows = json.loads((tmp_path / "b/results.json").read_text())["rows"]
    assert rows["checkpoint"]["columns"] == rows["full, ar2"]["columns"]


@pytest.mark.slow  # trains every kind of row
def test_every_kind_of_row_runs_on_real_clips(grid, tmp_path, capsys):
    source = tmp_path / "s1"
    source.mkdir()
    for file in sorted((grid / "s1").glob("*.npz"))[:30]:
        shutil.copy(file, source)
    assert prepare_data.main([str(source), "--out", str(tmp_path / "all"), "--jobs", "1"]) in (0, None)
    capsys.readouterr()
    data = small_models(tmp_path / "all", tmp_path / "data")
    alike = {"eskimez", "ji", "baseline", "tcn", "iid", "ar2-no-mean", "lambda-1", "learned-lambda"}
    names = [name for name in evaluate.ROWS if name not in {"exact", "checkpoint"} | alike]
    brief = ["--steps", 2, "--sync-steps", 60, "--clips", 3, "--jobs", 1, "--rows", ",".join(names)]
    text, _ = tables(capsys, "--data", data, "--out", tmp_path / "out", *brief)
    assert all(f"| {evaluate.ROWS[name][1]} |" in text for name in names)
    assert "look-ahead 2 frames" in text and "nan" not in text


@pytest.fixture(scope="module")
def noisy(talkers, tmp_path_factory):
    """Held-out windows of talkers whose models learn with dequantisation noise, as those of recordings do."""
    folder = small_models(talkers, tmp_path_factory.mktemp("noisy") / "data", noise=0.0022, lead=2)
    return evaluate.Held(Clips(folder))


@pytest.mark.slow  # measures twice
def test_the_figures_that_training_ends_with_are_the_columns_of_the_checkpoint_row(noisy, tmp_path):
    config = talkingflow.dataclasses.replace(noisy.config, steps=3)
    talkingflow.Trainer(config, noisy.clips, tmp_path, "cpu").run()
    flow, _ = talkingflow.load_checkpoint(tmp_path / "checkpoint.pt")
    figures = metrics.measure(flow, noisy.clips)
    job = evaluate.Job(str(noisy.clips.folder), checkpoint=str(tmp_path / "checkpoint.pt"))
    held = job.held()
    whole, _, clean = evaluate.checkpoint_row(held, job)
    row = evaluate.score("checkpoint", whole, held, None)
    assert clean.of == "denoised" and clean.nll is None
    rough, smooth = (metrics.roughness(outcome.draws[0]).mean() for outcome in (whole, clean))
    assert smooth < 0.97 * rough and np.abs(clean.draws - whole.draws).max() < 0.01
    assert figures["clips"] == len(held.x) and held.noise > 0
    for figure, column in (
        ("nll", "nll"),
        ("audio_gain", "gain"),
        ("mouth_correlation", "mouth_r"),
        ("l_mor", "l_mor"),
        ("head_jitter", "jitter_head"),
        ("mouth_jitter", "jitter_mouth"),
        ("velocity_autocorrelation", "velocity"),
    ):
        assert abs(figures[figure] - row.columns[column]["mean"]) < 1e-6, figure
    for figure, column in (("mouth_correlation", "mouth_r"), ("l_mor", "l_mor")):
        assert abs(figures[f"{figure}_temperature0"] - row.central[column]["mean"]) < 1e-6, figure


def test_every_file_that_can_change_a_row_is_in_the_cache_key(tmp_path):
    root = evaluate.Path(evaluate.__file__).parent
    for room in ("media", "study", "csrc", "tests"):
        shutil.copytree(root / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    for file in root.glob("*.py"):
        shutil.copy(file, tmp_path)
    digest = evaluate.code_digest.__wrapped__
    assert digest(tmp_path) == digest(root)
    files = {getattr(module, "__file__", None) for module in [*sys.modules.values()]}
    files = {evaluate.Path(file) for file in files if file}
    loaded = {f.relative_to(root) for f in files if f.parent.parent == root or f.parent == root}
    loaded = {name for name in loaded if name.parts[0] != "tests"}
    kernels = {f.relative_to(root) for f in (root / "csrc").glob("*.c*")}
    free = {evaluate.Path("prepare_data.py"), evaluate.Path("cli.py")}  # clips have a digest of their own
    assert len(loaded) > 12 and kernels
    for name in loaded | kernels | {evaluate.Path("csrc/gated_conv.h")}:
        file, before = tmp_path / name, digest(tmp_path)
        file.write_text(file.read_text() + "\n")
        assert (digest(tmp_path) == before) == (name in free), name
    before = digest(tmp_path)
    (tmp_path / "tests/test_flow.py").write_text("")
    assert digest(tmp_path) == before


def test_wrong_rows_and_missing_folders_are_one_line(tmp_path, talkers, capsys):
    for args, word in (
        ([], "meta.json"),
        (["--rows", "nobody"], "--rows"),
        (["--checkpoint", "none.pt", "--rows", "checkpoint"], "no such"),
    ):
        data = talkers if args else tmp_path
        assert (
            evaluate.main(
                ["--data", str(data), "--out", str(tmp_path / "o"), "--sync-steps", "1", "--jobs", "1", *args]
            )
            == 1
        )
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and word in error


# ------------------------------------------------------------------------------------------------------------
# Ratings


@pytest.fixture(scope="module")
def evaluated(talkers, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    rows = ["--rows", "truth,late-5,mean-face", "--clips", "4", "--sync-steps", "1", "--jobs", "1"]
    assert evaluate.main(["--data", str(talkers), "--out", str(out), *rows]) == 0
    return out


def answers_of(key, rater, score, check=True):
    """What the page would download for a rater whose score of a stimulus is score(label, question)."""
    rows = []
    for trial, (code, about) in enumerate(key["stimuli"].items()):
        for question in QUESTIONS:
            answer = {
                "rater": rater,
                "set": key["set"],
                "trial": trial,
                "kind": "rate",
                "want": "",
                "stimulus": code,
            }
            rows.append(answer | {"question": question, "score": score(about["label"], question)})
    rows += [
        rows[0] | {"trial": 98, "kind": "repeat"},
        rows[0] | {"trial": 99, "kind": "check", "want": 2, "score": 2 if check else 3},
    ]
    return rows


@pytest.mark.slow
def test_the_rating_page_is_one_blind_file(evaluated, capsys):
    assert (
        evaluate.main(
            ["rating-page", "--results", str(evaluated), "--rows", "truth,late-5,mean-face", "--clips", "3"]
        )
        == 0
    )
    page = (evaluated / "rating.html").read_text()
    key = json.loads((evaluated / "rating.key.json").read_text())
    assert len(key["stimuli"]) == 9 and all(code in page for code in key["stimuli"])
    assert not re.search(r"https?://|late-5|mean-face|ground truth|__\w+__", page)
    assert "1:" not in page[page.index('"sounds"') :][:10] and str(evaluated) not in page
    again = ["rating-page", "--results", str(evaluated), "--rows", "truth,late-5,mean-face", "--clips", "3"]
    assert evaluate.main(again) == 0  # the same page
    assert evaluate.main([*again, "--clips", "2"]) == 1  # another would take the key from answers collected
    assert "the key of another page" in capsys.readouterr().err
    (evaluated / "rating.key.json").unlink()


def test_rating_results_give_the_known_means_and_leave_out_who_failed_a_check(evaluated, tmp_path, capsys):
    evaluate.main(["rating-page", "--results", str(evaluated), "--rows", "truth,mean-face"])
    capsys.readouterr()
    key = json.loads((evaluated / "rating.key.json").read_text())

    def fair(label, question):
        return (4 if question == "sync" else 5) if label == "ground truth" else 2

    for rater, score, check in (("a", fair, True), ("b", fair, True), ("liar", lambda *_: 1, False)):
        rows = answers_of(key, rater, score, check)
        (tmp_path / f"{rater}.json").write_text(json.dumps({"answers": rows}))
        (tmp_path / f"{rater}.csv").write_text(
            "\n".join([",".join(rows[0]), *(",".join(f'"{v}"' for v in r.values()) for r in rows)])
        )
    for suffix in ("json", "csv"):
        files = [str(tmp_path / f"{r}.{suffix}") for r in ("a", "b", "liar")]
        assert evaluate.main(["rating-results", *files, "--key", str(evaluated / "rating.key.json")]) == 0
        text = capsys.readouterr().out
        assert (
            "3 raters, 1 left out" in text
            and "| ground truth | 4.00 [4.00, 4.00] | 8 |" in text
            and "| mean face | 2.00" in text
        )
    good, page_key = str(tmp_path / "b.json"), str(evaluated / "rating.key.json")
    for name, text in (
        ("empty", "{}"),
        ("bare", '{"answers": [{"score": 3, "trial": 0}]}'),
        ("text", "hello"),
    ):
        (tmp_path / f"{name}.json").write_text(text)
        assert evaluate.main(["rating-results", str(tmp_path / f"{name}.json"), "--key", page_key]) == 1
        assert "Ask the rater again" in capsys.readouterr().err
    for wrong in (tmp_path / "none.json", tmp_path / "text.json", good):
        assert evaluate.main(["rating-results", good, "--key", str(wrong)]) == 1
        assert "error: --key: " in capsys.readouterr().err


def test_the_interval_of_a_mean_opinion_widens_when_scores_hang_together():
    rng = np.random.default_rng(0)
    alike = {r: [3 + bias] * 20 for r, bias in enumerate(rng.choice([-1, 1], 12))}
    apart = {r: list(rng.choice([2, 4], 20)) for r in range(12)}
    alike, apart = mean_opinion(alike), mean_opinion(apart)
    assert alike["high"] - alike["low"] > 2 * (apart["high"] - apart["low"])


def test_the_paper_would_have_needed_861_ratings_a_system():
    assert abs(ratings_needed(3.5921 - 3.4572, 1.0) - 863) <= 2 and abs(ratings_needed(0.5, 1.0) - 63) <= 1


def test_an_unknown_rating_set_is_refused(evaluated, tmp_path, capsys):
    evaluate.main(["rating-page", "--results", str(evaluated), "--rows", "truth,mean-face"])
    key = json.loads((evaluated / "rating.key.json").read_text())
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"answers": answers_of(key | {"set": "other"}, "x", lambda *_: 3)}))
    assert evaluate.main(["rating-results", str(file), "--key", str(evaluated / "rating.key.json")]) == 1
    assert "Pass that page's key" in capsys.readouterr().err
