"""prepare_data.py: what it promises of the folder it writes and of the talkers it invents."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import prepare_data


def prepare(*args, rc=0):
    """Run the command as a user does; returns (stdout, stderr)."""
    run = subprocess.run([sys.executable, ROOT / "prepare_data.py", *map(str, args)], capture_output=True, text=True,
                         check=False)
    assert run.returncode == rc, run.stdout + run.stderr
    return run.stdout, run.stderr


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


def test_kalman_likelihood_equals_a_dense_multivariate_normal():
    talker, rng, T = prepare_data.Talker(), np.random.default_rng(0), 4
    articulation = prepare_data.articulate(prepare_data.say(3, 12, rng))[:, :T]
    x = talker.draw(articulation, rng)
    cov = prepare_data.NOISE ** 2 * np.eye(T * 136)
    lag = np.abs(np.subtract.outer(np.arange(T), np.arange(T)))
    for (pole, std), drawing in zip(talker.dynamics, talker.drawings):
        r = [1.0, 2 * (pole or 1) / (1 + (pole or 1) ** 2)]                     # autocorrelation of the AR(2)
        while len(r) < T:
            r.append(r[-1] if pole is None else 2 * pole * r[-1] - pole ** 2 * r[-2])
        cov += np.kron(std ** 2 * np.array(r)[lag], np.outer(drawing, drawing))
    e = (x - talker.mean_given_sound(articulation)).reshape(3, -1)
    dense = 0.5 * ((e * np.linalg.solve(cov, e.T).T).sum(1) + np.linalg.slogdet(2 * np.pi * cov)[1]) / (T * 136)
    assert np.abs(talker.nll(x, articulation) - dense).max() < 1e-9


def test_exact_sampler_has_the_exact_mean_and_attains_the_optimum():
    talker, rng = prepare_data.Talker(), np.random.default_rng(1)
    articulation = np.repeat(prepare_data.articulate(prepare_data.say(1, 40, rng)), 400, axis=0)
    x = talker.draw(articulation, rng)
    error = (x.mean(0) - talker.mean_given_sound(articulation[0])) / x.std(0) * 20
    assert np.abs(error).max() < 6 and 0.8 < error.std() < 1.25                 # in standard errors
    assert abs(talker.nll(x, articulation).mean() - -4.726) < 0.004             # T=40: the first frame costs .25 / 40


def test_smooth_noise_is_stationary_from_its_first_frame():
    x = prepare_data.smooth_noise(np.random.default_rng(0), 20000, 12, 0.93)
    assert np.abs(x.std(0) - 1).max() < 0.03
    assert np.abs((x[:, 1:] * x[:, :-1]).mean(0) - 2 * 0.93 / (1 + 0.93 ** 2)).max() < 0.03


def test_synthetic_folder_holds_what_its_meta_says(talkers):
    meta, arrays = load(talkers)
    assert arrays["landmarks"].shape == (40 * 80, 136) and arrays["landmarks"].dtype == np.float32
    assert arrays["mel"].shape == (40 * 80, 40) and arrays["audio"].shape == (40 * 51200,)
    assert [sum(c["split"] == s for c in meta["clips"]) for s in ("train", "val", "test")] == [32, 4, 4]
    assert all(abs(meta["optimum"][s] - -4.732) < 0.01 for s in meta["optimum"])
    talker = prepare_data.Talker()
    assert np.allclose(meta["modes"], talker.modes) and np.allclose(meta["mean_face"], talker.mean)
    clip = meta["clips"][-1]
    rows = slice(clip["start"], clip["start"] + clip["frames"])
    nll = talker.nll(arrays["landmarks"][None, rows], arrays["articulation"][None, rows])
    assert abs(nll[0] - clip["optimal_nll"]) < 1e-9
    sound = arrays["audio"][clip["audio_start"]:clip["audio_start"] + clip["audio_samples"]]
    hear = prepare_data.Mel(**meta["mel"], fps=meta["fps"], sample_rate=meta["sample_rate"])
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
    a, b = (prepare_data.speak(p, np.random.default_rng(1)) for p in (phones, changed))
    ratio = (b / a)[0, 1000:20 * 640]                                            # each is scaled to the same peak
    assert np.abs(ratio / ratio[0] - 1).max() < 1e-3
    assert np.array_equal(prepare_data.articulate(phones)[:, :20], prepare_data.articulate(changed)[:, :20])


def test_an_existing_folder_is_kept_unless_forced(talkers):
    before = (talkers / "meta.json").read_bytes()
    _, err = prepare("synthetic", "--out", talkers, "--clips", 8, rc=1)
    assert err.startswith("error: --out:") and err.count("\n") == 1 and "--force" in err
    assert (talkers / "meta.json").read_bytes() == before
