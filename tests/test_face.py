"""A face worth watching: the level of the sound, denoised faces, head and lips apart, the person's own face."""

import numpy as np
import pytest

from media.console import UserError
from media.sound import FLOOR, QUIET, Mel


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
