"""The live page in a real browser: its sound, faces and gradient are Python's, it keeps up, it explains."""

import base64
import copy
import functools
import http.server
import json
import re
import threading
import wave

import numpy as np
import pytest
import torch
from browser import Browser
from conftest import thinned

import cli
import talkingflow
from media.landmarks import mouth_opening
from media.live import arrays, write_live
from media.sound import Mel, wav_bytes
from talkingflow import Config, Talker, TalkingFlow, load_checkpoint

CHECKPOINT = cli.PRETRAINED
FLOATS = (
    "const floats = text => new Float32Array(Uint8Array.from(atob(text), ch => ch.charCodeAt(0)).buffer);"
)


def as_text(array):
    return base64.b64encode(np.ascontiguousarray(array, "<f4").tobytes()).decode()


def voice(seconds, rate, seed=0):
    """Something like speech: syllables of harmonics, hisses, pauses."""
    rng, t = np.random.default_rng(seed), np.arange(int(seconds * rate)) / rate
    pitch = 2 * np.pi * np.cumsum(110 + 30 * np.sin(2 * np.pi * 0.3 * t)) / rate
    syllables = np.clip(np.sin(2 * np.pi * 3.1 * t) + 0.4 * np.sin(2 * np.pi * 0.7 * t), 0, None)
    tones = sum(np.sin(k * pitch) / k * (0.6 + 0.4 * np.sin(2 * np.pi * 1.3 * t + k)) for k in range(1, 20))
    hiss = rng.standard_normal(len(t)) * np.clip(np.sin(2 * np.pi * 1.7 * t), 0, None) ** 4
    return (0.1 * syllables * tones + 0.02 * hiss).astype(np.float32)


def halved(flow):
    """The flow with its weights rounded to float16, as a page has them."""
    for tensor in flow.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.half().float())
    return flow


@pytest.fixture(scope="module")
def flows():
    """prior -> a flow and its data's settings: the pretrained one, and an iid one with three taps."""
    flow, state = load_checkpoint(CHECKPOINT)
    torch.manual_seed(0)
    config = Config(
        prior="iid", prior_mean=False, kernel_size=3, hidden=24, init="random", dilations=(1, 3), lead=1
    )
    iid, generator = TalkingFlow(config).eval(), torch.Generator().manual_seed(1)
    face = flow.sample(flow.cond_mean.repeat(1, 400, 1), generator=generator)
    iid.initialize(face, torch.randn(1, 400, 40, generator=generator) * 3 - 15)
    for name, parameter in iid.named_parameters():  # couplings that do something
        if ".out." in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return {"ar2": (halved(flow), state["data"]), "iid": (halved(iid), state["data"])}


@pytest.fixture(scope="module")
def pages(flows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for prior, (flow, data) in flows.items():
        write_live(folder / f"{prior}.html", vars(flow.config), data, arrays(flow), prior)
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    wav = tmp_path_factory.mktemp("microphone") / "voice.wav"
    with wave.open(str(wav), "wb") as f:
        f.setparams((1, 2, 48000, 0, "NONE", ""))
        f.writeframes((voice(10, 48000) * 32767).astype("<i2").tobytes())
    flags = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    flags += ["--host-resolver-rules=MAP insecure.test 127.0.0.1"]
    with Browser(*flags, f"--use-file-for-fake-audio-capture={wav}") as browser:
        yield browser


def open_page(browser, pages, prior="ar2"):
    browser.open(f"file://{pages}/{prior}.html")
    browser.run(FLOATS)
    return browser


@pytest.mark.parametrize("level", [0, 0.02])
@pytest.mark.parametrize("rate", thinned([48000, 11025, 44100, 16001, 8000, 16000, 96000], every=2))
def test_the_page_hears_the_mel_of_python(browser, pages, flows, rate, level):
    mel, sound = flows["ar2"][1]["mel"] | {"level": level}, voice(2, rate)
    want = Mel(**mel, fps=25, sample_rate=rate).columns(sound)
    open_page(browser, pages)
    got = browser.run(f"""(() => {{
        const mel = new Mel({json.dumps(mel)}, 25, {rate}), sound = floats("{as_text(sound)}"), columns = [];
        for (let i = 0; i < sound.length; i += 777) columns.push(...mel.push(sound.subarray(i, i + 777)));
        return columns.map(column => [...column]);
    }})()""")
    got = np.array(got)
    # NumPy's transform is float32 where its input is: what lies 80 dB below the loudest is its rounding
    heard = want > want.max() - 18
    assert got.shape == want.shape and np.abs(got - want)[heard].max() < 1e-3


def speak(browser, sound, rate, noise, **controls):
    """The page's faces (T, B, D) for a sound, given the noise (T, B, D) and the sliders."""
    script = f"""(() => {{
        const sound = floats("{as_text(sound)}"), noise = floats("{as_text(noise)}"), out = [];
        const talker = new Talker(page, unpack(page), {rate}, {noise.shape[1]});
        let used = 0;
        const draw = size => noise.subarray(used, used += size);
        for (let i = 0; i < sound.length; i += 1000)
          out.push(...talker.push(sound.subarray(i, i + 1000), draw, {json.dumps(controls)}));
        return out.map(x => [...x]);
    }})()"""
    return np.array(browser.run(script)).reshape(-1, *noise.shape[1:])


def seeded_noise(frames, faces):
    """What `flow.stream` draws for faces of seeds 0, 1, ...: (T, B, D)."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(faces)]
    return np.stack([torch.randn(frames, 144, generator=g)[:, :136] for g in generators], 1)  # in sixteens


@pytest.mark.parametrize("denoise", thinned([True, False], every=2))
@pytest.mark.parametrize("prior", ["ar2", "iid"])
def test_the_page_draws_the_faces_of_the_stream(browser, pages, flows, prior, denoise):
    flow, data = flows[prior]
    sound = voice(20, 16000)
    want = Talker(flow, data, 16000, faces=2, denoise=denoise).push(sound).transpose(1, 0, 2)
    open_page(browser, pages, prior)
    got = speak(browser, sound, 16000, seeded_noise(500, 2), denoise=denoise)
    assert got.shape == want.shape == (500 - flow.config.lead, 2, 136)
    assert np.abs(want - want.mean(0)).max() > 0.05 * data["interocular"]  # the faces move
    assert np.abs(got - want).max() < 1e-3 * data["interocular"]


@pytest.mark.parametrize("head, lips", [(1.3, 0.4), pytest.param(0.0, 1.0, marks=pytest.mark.slow)])
def test_the_sliders_steer_as_the_flags_do(browser, pages, flows, head, lips):
    flow, data = flows["ar2"]
    sound, how = voice(4, 44100), {"denoise": True, "head": head, "lips": lips}
    want = Talker(flow, data, 44100, faces=2, **how).push(sound).transpose(1, 0, 2)
    open_page(browser, pages)
    got = speak(browser, sound, 44100, seeded_noise(100, 2), **how)
    assert np.abs(got - want).max() < 1e-3 * data["interocular"]
    assert np.abs(got - speak(browser, sound, 44100, seeded_noise(100, 2))).max() > 0.05 * data["interocular"]


@pytest.mark.parametrize("prior", ["ar2", "iid"])
def test_denoising_follows_the_gradient_of_the_density(browser, pages, flows, prior):
    """Tweedie's step: x_t + sigma^2 d log p(x_t | x_<t, c) / dx_t. What came before does not depend on x_t,
    so the gradient is that of the whole log p(x_1..t | c), here by autograd in float64."""
    flow, data = flows[prior]
    sound, noise, lead = voice(3, 16000), seeded_noise(75, 2), flow.config.lead
    columns = Mel(**data["mel"], fps=25, sample_rate=16000).columns(sound)[lead:]
    open_page(browser, pages, prior)
    # (2, T, 136)
    x = torch.from_numpy(speak(browser, sound, 16000, noise, denoise=False)).transpose(0, 1).requires_grad_()
    denoised = speak(browser, sound, 16000, noise, denoise=True).transpose(1, 0, 2)
    c = torch.from_numpy(columns).double().expand(2, -1, -1)
    sigma = flow.config.noise * data["interocular"]
    exact = copy.deepcopy(flow).double()
    for t in (0, 1, 2, 3, 10, 30, 70):
        [gradient] = torch.autograd.grad(exact.log_prob(x[:, : t + 1], c[:, : t + 1]).sum(), x)
        step = (sigma**2 * gradient[:, t]).numpy()
        moved = denoised[:, t] - x[:, t].detach().numpy()
        assert np.abs(moved - step).max() < 1e-4 * np.abs(step).max(), t
        assert np.sqrt((step**2).mean()) > 0.1 * sigma


def openings(browser, seconds):
    """Mouth openings of the first face, sampled as the page draws."""
    script = f"""new Promise(done => {{
        const track = [], timer = setInterval(() => track.push([...shown.subarray(0, 136)]), 40);
        setTimeout(() => {{ clearInterval(timer); done(track); }}, {1000 * seconds});
    }})"""
    return mouth_opening(np.array(browser.run(script)).reshape(-1, 68, 2))


def press(browser, button):
    """Press a button, wait, and read the page's sentence."""
    browser.run(f"$('{button}').click()")
    browser.run("new Promise(done => setTimeout(done, 1500))")
    return browser.run("$('notice').textContent")


@pytest.fixture(scope="module")
def server(pages):
    """The pages by http, as `python -m http.server` gives them: the port."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=pages)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.parametrize("served", thinned([False, True], every=2))
def test_a_microphone_moves_the_lips(browser, pages, server, served):
    if served:
        browser.open(f"http://localhost:{server}/ar2.html")
    else:
        open_page(browser, pages)
    still = openings(browser, 0.5)
    browser.run("$('temperature').value = 0")
    assert press(browser, "listen") == "Speak."
    moving = openings(browser, 4)
    assert np.ptp(still) == 0 and np.ptp(moving) > 0.1
    assert browser.run("+$('meter').getAttribute('aria-valuenow')") > -45
    assert re.search(r"and [\d.]+ ms to compute it: \d+ ms", browser.run("$('delay').textContent"))
    browser.run("dispatchEvent(new KeyboardEvent('keydown', {key: 's'}))")
    assert browser.run("$('notice').textContent") == "Stopped." and browser.run("context") is None
    assert browser.complaints() == []


def test_a_dropped_file_is_heard_and_seen_to_its_end(browser, pages):
    open_page(browser, pages)
    sound = base64.b64encode(wav_bytes((voice(2, 44100) * 32767).astype(np.int16), 44100)).decode()
    still = browser.run("[...shown]")
    browser.run(f"""(() => {{
        const bytes = Uint8Array.from(atob("{sound}"), ch => ch.charCodeAt(0)), data = new DataTransfer();
        data.items.add(new File([bytes], "me.wav"));
        dispatchEvent(new DragEvent("drop", {{dataTransfer: data}}));
    }})()""")
    browser.run("new Promise(done => setTimeout(done, 800))")
    assert browser.run("$('notice').textContent") == "me.wav: 2.0 s"
    assert np.abs(np.subtract(browser.run("[...shown]"), still)).max() > 0.01
    browser.run("new Promise(done => setTimeout(done, 2500))")
    assert browser.run("$('notice').textContent") == "me.wav has ended."
    browser.run("play(new ArrayBuffer(9), 'me.txt')")
    assert "me.txt is not a sound" in browser.run("$('notice').textContent")


REFUSE = "navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('', '%s') }"


@pytest.mark.parametrize(
    "trouble, sentence",
    [
        (REFUSE % "NotAllowedError", "refused"),
        (REFUSE % "NotFoundError", "Plug one in"),
        (REFUSE % "NotReadableError", "held by"),
        ("navigator.mediaDevices.getUserMedia = undefined", "gives no microphone"),
        ("window.AudioWorkletNode = undefined", "no AudioWorklet"),
    ],
)
def test_what_keeps_the_microphone_away_is_one_sentence(browser, pages, trouble, sentence):
    open_page(browser, pages).run(f"{trouble}; 0")
    assert sentence in press(browser, "listen") and browser.run("$('notice').className") == "wrong"
    assert browser.run("$('stop').disabled") and browser.complaints() == []


def test_an_insecure_page_says_what_a_secure_one_is(browser, server):
    browser.open(f"http://insecure.test:{server}/ar2.html")
    assert "http://localhost" in press(browser, "listen")


def test_frozen_noise_leaves_what_the_voice_decides(browser, pages):
    """With frozen noise the latents keep their distance from their mean: in a steady sound nothing moves."""
    open_page(browser, pages)
    spread = browser.run("""(() => {
        const talker = new Talker(page, unpack(page), 16000, 1), second = new Float32Array(16000).fill(0.01);
        talker.push(second, size => Float64Array.from({length: size}, gaussian), {denoise: false});
        const last = [...talker.stream.flow.prior.before];
        const frames = [];  // the networks together see 136 frames back
        for (let i = 0; i < 6; i++) frames.push(...talker.push(second, () => null, {denoise: false}));
        const kept = talker.stream.flow.prior.before.every((r, i) => r === last[i]);
        return [kept, Math.max(...frames.at(-1).map((v, i) => Math.abs(v - frames.at(-2)[i])))];
    })()""")
    assert spread[0] and spread[1] < 1e-12  # of the face's width


@pytest.mark.slow  # half a minute
def test_five_minutes_do_not_grow(browser, pages):
    open_page(browser, pages)
    browser.run("""var feed = new Talker(page, weights, 16000, 1);
        var hiss = Float64Array.from({length: 16000}, Math.random);
        var noise = size => Float64Array.from({length: size}, gaussian);
        var minute = () => { for (let second = 0; second < 60; second++) feed.push(hiss, noise); }""")
    sizes = []
    for _ in range(5):
        browser.run("minute()")
        browser.call("HeapProfiler.collectGarbage")
        usage = browser.call("Runtime.getHeapUsage")
        sizes.append(usage["usedSize"] + usage.get("backingStorageSize", 0))
    assert browser.run("feed.mel.frame") == 7500
    assert max(sizes[1:]) < sizes[0] + 100_000, sizes  # a kept frame would be 8 MB


def test_three_faces_take_less_than_half_of_a_frame(browser, pages):
    """In CPU time: 6 ms on a quiet core, 9 where neighbours slow it; a frame lasts 40, so that a core half as
    fast keeps up."""
    open_page(browser, pages)
    browser.run("""var stream = new Stream(page, weights, 3), c = new Float64Array(40).fill(-15);
        var frames = n => { while (n--) stream.push(c, Float64Array.from({length: 408}, gaussian)); };""")

    def cpu_ms():
        begun = browser.cpu_seconds()
        browser.run("frames(100); 0")
        return 10 * (browser.cpu_seconds() - begun)

    assert min(cpu_ms() for _ in range(5)) < 20


def test_reduced_motion_begins_with_a_still_head(browser, pages):
    heads = []
    for wish in ("reduce", "no-preference"):
        feature = {"name": "prefers-reduced-motion", "value": wish}
        browser.call("Emulation.setEmulatedMedia", features=[feature])
        heads.append(open_page(browser, pages).run("$('head').value"))
    assert heads == ["0", "1"]


@pytest.mark.slow
def test_the_command_writes_one_self_contained_page(browser, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert talkingflow.main(["live"]) == 0 and "live.html: 2." in capsys.readouterr().out
    page = (tmp_path / "live.html").read_text()
    assert (
        "__" not in re.sub(r'"weights": "[^"]*"', "", page) and "src=" not in page and "@import" not in page
    )
    assert not re.search(r"https?://(?!localhost)", page)
    assert talkingflow.main(["live"]) == 1 and "exists already" in capsys.readouterr().err
    assert talkingflow.main(["live", "--force"]) == 0
    browser.open(f"file://{tmp_path}/live.html")
    assert press(browser, "clip") == "held-out.wav: 3.0 s" and browser.complaints() == []  # the shipped sound
