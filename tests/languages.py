"""Whether lips close for p, b, m and open for a in German, which no training heard, as in English. No filmed
German is at hand: a synthesiser speaks both, and knows when it speaks which sound. Prints a table.

    pip install espeakng-loader                 # eSpeak NG, a formant synthesiser, with its voices
    python tests/languages.py [--checkpoint FILE]

By voice, at temperature 0: how often the lips' gap in the middle of an a is larger than in the middle of a p,
b or m, over all pairs (area under the curve, 0.5 by chance); the same for the gap while another sentence is
heard, and for the loudness of the sound; the mean gaps, in distances of the outer eye corners.
"""

import argparse
import ctypes
import itertools
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from faces import gap, loudness

from media.sound import Mel

SENTENCES = {
    "en-us": """
        My father put a large lamp by the map in the park. Bob and Mary pack a big bag of apples.
        The calm market opened before the parade passed. Papa made jam and palm tarts for my mama.
        Stop the car at the bar behind the barn. A hard hammer must not harm the marble.
        Some people dance in the dark after lunch. Place blue at F by nine now please""",
    "de": """
        Mein Vater hat am Abend den Papagei gemalt. Peter packt am Samstag alle Pakete in den Wagen.
        Die Mama backt am Abend Waffeln mit Marmelade. Am Bahnhof warten ab acht Uhr viele Leute.
        Aber der Apfel am Baum war noch nicht reif. Hamburg hat einen Hafen und manche alte Bar.
        Bitte bring mir mal die Lampe aus der Kammer. Paul bat um ein Glas Wasser und etwas Salat""",
}
VOICES = {"a man": "", "another man": "+m3", "a woman": "+f2", "another woman": "+f4"}
CLOSED, OPEN = {"p", "b", "m"}, {"a", "ɑ", "æ", "ɐ", "aɪ", "aʊ"}


class Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h; kind 7 is a phoneme, 0 ends a list."""

    _fields_ = [
        (name, ctypes.c_int) for name in ("kind", "unique", "position", "length", "milliseconds", "sample")
    ]
    _fields_ += [("user", ctypes.c_void_p), ("name", ctypes.c_char * 8)]


class Synthesiser:
    """eSpeak NG by its C interface: sound, and when each of its phonemes begins."""

    def __init__(self):
        import espeakng_loader

        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path().encode()
        phonemes_as_events_in_ipa, to_memory = 3, 2
        self.rate = self.library.espeak_Initialize(to_memory, 0, data, phonemes_as_events_in_ipa)
        self.hearer = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(Event)
        )

    def speak(self, text, voice):
        """float32 samples in -1..1 with half a second of silence after them, [(seconds, phoneme)]."""
        sound, phonemes = [], []

        def hear(samples, count, events):
            if samples and count:
                sound.append(np.ctypeslib.as_array(samples, (count,)).copy())
            while events[0].kind:
                if events[0].kind == 7:
                    phonemes.append((events[0].milliseconds / 1000, events[0].name.decode().strip("ˈˌː")))
                events = ctypes.pointer(events[1])
            return 0

        hearer, text = self.hearer(hear), text.encode()
        assert self.library.espeak_SetVoiceByName(voice.encode()) == 0, voice
        self.library.espeak_SetSynthCallback(hearer)
        utf8 = 1
        self.library.espeak_Synth(text, len(text) + 1, 0, 1, 0, utf8, None, None)
        return np.concatenate([*sound, np.zeros(self.rate // 2)]).astype(np.float32) / 32768, phonemes


def area(tracks, spoken, fps):
    """How often a track (T,) is larger in the middle of an a than of a p, b or m of what is spoken, and its
    means there."""
    found = {"open": [], "closed": []}
    for track, phonemes in zip(tracks, spoken, strict=True):
        for (start, name), (end, _) in itertools.pairwise(phonemes):
            kind = "open" if name in OPEN else "closed" if name in CLOSED else None
            frame = int((start + end) / 2 * fps)
            if kind and frame < len(track):
                found[kind].append(track[frame])
    opened, closed = (np.array(v) for v in found.values())
    return (opened[:, None] > closed).mean(), opened.mean(), closed.mean()


def measure(flow, data, synthesiser, voice):
    """A row of the table."""
    from talkingflow import Talker

    spoken, gaps, loud, fps, rate = [], [], [], data["fps"], synthesiser.rate
    for sentence in SENTENCES[voice.split("+")[0]].split("."):
        sound, phonemes = synthesiser.speak(" ".join(sentence.split()), voice)
        talker = Talker(flow, data, rate, temperature=0.0)
        face = np.concatenate([talker.push(sound), talker.finish()], 1)[0]
        columns = Mel(level=0, fps=fps, sample_rate=rate).columns(sound)
        spoken.append(phonemes), gaps.append(gap(face)), loud.append(loudness(columns))
    (right, opened, closed), others = area(gaps, spoken, fps), gaps[-1:] + gaps[:-1]
    return right, *(area(tracks, spoken, fps)[0] for tracks in (others, loud)), opened, closed


def main():
    from talkingflow import load_checkpoint

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", default=ROOT / "pretrained" / "grid.pt")
    flow, state = load_checkpoint(parser.parse_args().checkpoint)
    synthesiser = Synthesiser()
    print("| | gap | another sentence heard | loudness | gap in a | in p, b, m |\n|---|---|---|---|---|---|")
    for language in SENTENCES:
        for who, variant in VOICES.items():
            row = measure(flow, state["data"], synthesiser, language + variant)
            print(f"| {language}, {who} | {' | '.join(f'{v:.3f}' for v in row)} |", flush=True)


if __name__ == "__main__":
    main()
