"""Judges the learner's answers in tutorial.ipynb, with a hint for each likely mistake, and runs
csrc/gated_conv.cu on a CPU. Solutions stand folded in the notebook; wrong answers, which must fail here,
in test_tutorial.py."""

import ctypes
import functools
import hashlib
import inspect
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

CSRC = Path(__file__).resolve().parent.parent / "csrc"


class ToDo(Exception):
    """The learner has not answered yet."""


class Wrong(Exception):
    """The answer is wrong; the message is the hint."""


def grade(number, names):
    """Judge answer `number`, a function or value among `names` -> (whether it is right, what to say)."""
    name, test = PUZZLES[number - 1]
    try:
        if names.get(name, ...) is ...:
            raise ToDo
        test(names[name])
    except ToDo:
        return False, f"puzzle {number}: still to do"
    except Wrong as hint:
        return False, f"puzzle {number}: not yet. {hint}"
    except Exception as error:  # whatever the learner's code does
        return False, f"puzzle {number}: {name} stops with {type(error).__name__}: {error}"
    return True, f"puzzle {number}: right"


def given(*values):
    """The values, as arrays of numbers; ToDo if one of them is still `...` or nothing was returned."""
    if any(value is None or value is ... for value in values):
        raise ToDo
    numbers = [value if torch.is_tensor(value) else torch.as_tensor(np.asarray(value)) for value in values]
    arrays = [number.detach().double() for number in numbers]
    return arrays if len(arrays) > 1 else arrays[0]


def expect(holds, hint):
    if not holds:
        raise Wrong(hint)


def same(found, wanted):
    return found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-9)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------
# The flow


def judge_logdets(answer):
    logs, W, s = random(6), random(6, 6, seed=1), random(2, 5, 3, seed=2)
    returned = answer(logs, W, s)
    given(*(returned if isinstance(returned, tuple) else (returned,)))
    expect(isinstance(returned, tuple) and len(returned) == 3, "Return three things.")
    norm, conv, coupling = given(*returned)
    expect(not same(norm, logs.sum()), "ActNorm: its diagonal stands in the Jacobian once a frame.")
    expect(
        same(norm, 5 * logs.sum()), "ActNorm: each of the T frames is scaled by the same D numbers exp(logs)."
    )
    one = torch.linalg.slogdet(W)[1]
    expect(not same(conv, one), "1x1 convolution: W, too, stands on the diagonal once a frame.")
    expect(not torch.isnan(conv), "1x1 convolution: a determinant may be negative, but volume has no sign.")
    expect(
        same(conv, 5 * one),
        "1x1 convolution: T times the logarithm of the volume that W makes of a unit cube.",
    )
    expect(
        coupling.shape == (2,),
        "Coupling: one number a clip. Sum over frames and coordinates, not over the batch.",
    )
    expect(
        not same(coupling, s.abs().sum((1, 2))),
        "Coupling: the sign of s counts. What shrinks has a negative one.",
    )
    expect(same(coupling, s.sum((1, 2))), "Coupling: the diagonal holds exp(s), whose logarithm is s.")


def judge_late(answer):
    x = random(2, 7, 3)
    y = given(answer(x, 2))
    expect(y.shape == x.shape, "The result has as many frames as x: what leaves at the end is cut off.")
    expect(
        not same(y, x.roll(2, 1)), "The first frames must be zeros. Here the last frames come round again."
    )
    expect(not same(y[:, :-2], x[:, 2:]), "That shows the future: frame t must be the earlier frame t - n.")
    wanted = torch.zeros_like(x)
    wanted[:, 2:] = x[:, :-2]
    expect(same(y, wanted), "Frame t is x's frame t - n, and 0 where t < n.")
    expect(same(given(answer(x, 0)), x), "n = 0 must give x itself. (A slice that ends at -0 is empty.)")


def judge_scale_density(answer):
    z, variance = random(2, 5, 3), 0.25
    found = given(answer(z, variance))
    expect(found.shape == (2,), "One number a clip: sum over frames and coordinates.")
    normal = torch.distributions.Normal
    expect(
        not same(found, normal(0, 0.25).log_prob(z).sum((1, 2))),
        "lambda is the variance, not its square root.",
    )
    lost = -0.5 * (z**2 / variance).sum((1, 2))
    expect(not same(found, lost), "The constants do not drop out: lambda stands in them.")
    expect(
        same(found, normal(0, 0.5).log_prob(z).sum((1, 2))), "-1/2 (z^2 / lambda + log(2 pi lambda)), summed."
    )


def judge_ar2(answer):
    p1, p2, variance = 0.8, -0.5, 0.75
    returned = answer(p1, p2, variance)
    given(*(returned if isinstance(returned, tuple) else (returned,)))
    expect(isinstance(returned, tuple) and len(returned) == 3, "Return a1, a2 and v.")
    a1, a2, v = given(*returned)
    expect(abs(a2 - p2) < 1e-9, "a2: r_{t-2} appears only in p2 (r_{t-2} - p1 r_{t-1}).")
    expect(
        abs(a1 - p1 * (1 - p2)) < 1e-9,
        "a1: collect both terms with r_{t-1} in p1 r_{t-1} + p2 (r_{t-2} - p1 r_{t-1}).",
    )
    expect(
        abs(v - variance * (1 - p1**2)) > 1e-9,
        "v: that is the error of predicting from r_{t-1} alone; p2 helps too.",
    )
    expect(
        abs(v - variance * (1 - p1**2) * (1 - p2**2)) < 1e-9,
        "v: each p leaves the share 1 - p^2 of what was there.",
    )


def judge_denoise(answer):
    y, deviation, score = random(4, 3), 0.5, lambda y: -y / 2.0
    found = given(answer(y, deviation, score))
    expect(
        not same(found, y - 0.25 * score(y)), "The score points to where data are denser. Go there, not away."
    )
    expect(
        not same(found, y + 0.5 * score(y)), "Check the units: the score is one over a length, y is a length."
    )
    expect(same(found, y + 0.25 * score(y)), "y plus the noise's variance times the score at y.")


# ------------------------------------------------------------------------------------------------------------
# The kernel


def judge_halo_load(answer):
    x, frames, k, d = np.arange(1.0, 41).reshape(20, 2), 4, 3, 2
    for t0 in (0, 8):
        tile = answer(x, t0, frames, k, d)
        given(tile)
        tile = np.asarray(tile, float)
        expect(tile.shape == (8, 2), f"The tile has frames + (k - 1) d = 8 rows, not {tile.shape[:1]}.")
        wanted = np.stack([x[t] if t >= 0 else np.zeros(2) for t in range(t0 - 4, t0 + 4)])
        ahead = x[t0 : t0 + 8]
        expect(not np.array_equal(tile, ahead), "That halo lies after the tile. The taps look back.")
        first = tile[:4] if t0 == 0 else None
        expect(
            first is None or not first.any(),
            "Before the clip begins there is nothing: zeros. (x[-1] is its end!)",
        )
        expect(np.array_equal(tile, wanted), "Row r of the tile is frame t0 - (k - 1) d + r.")


class Tile:
    """Shared memory that remembers which slice a number belongs to: one of another slice reads as NaN."""

    def __init__(self, size):
        self.values, self.slices = np.full(size, np.nan), np.full(size, -1)

    def write(self, where, value, part):
        self.values[where], self.slices[where] = value, part

    def read(self, where, part):
        return self.values[where] if self.slices[where] == part else np.nan


def run_threads(threads):
    """Run generators as a block of threads: each to its next `yield`, the barrier, then all from there on."""
    threads = list(threads)
    while threads:
        threads = [thread for thread in threads if next(thread, "done") != "done"]


def sliced_sum(answer, count=6, slices=3):
    """`count` threads add up slices of numbers through one tile, as the learner's `answer` says."""
    numbers, tile, sums = (
        np.arange(1.0, 1 + count * slices).reshape(slices, count),
        Tile(count),
        np.zeros(count),
    )

    def thread(n):
        def load(part):
            tile.write(n, numbers[part, n], part)

        def multiply(part):
            sums[n] += sum(tile.read(where, part) for where in range(count))

        return answer(load, multiply, slices)

    threads = [thread(n) for n in range(count)]
    waits = sum(1 for _ in answer(lambda part: None, lambda part: None, slices))
    run_threads(threads)
    return sums, numbers.sum(), waits


def judge_sliced_thread(answer):
    if not inspect.isgeneratorfunction(answer):  # no `yield` yet
        raise ToDo
    sums, wanted, waits = sliced_sum(answer)
    lost = f"{np.isnan(sums).mean():.0%} of the sums are NaN"
    expect(
        np.array_equal(sums, np.full(6, wanted)) or np.isnan(sums).any(),
        "Every slice is loaded, then multiplied.",
    )
    if np.isnan(sums).any():
        raise Wrong(
            f"{lost}. One wait: the tile is complete. The other: everyone has read it. Which is missing?"
        )
    expect(waits <= 6, f"Right, but each thread waits {waits} times; 2 a slice are enough.")


def ways(addresses, width=4):
    """How many rounds one access takes: byte addresses of the lanes, `width` bytes each, 32 banks of 4 bytes.

    Lanes that want the same 4 bytes share a round; different ones on the same bank wait for each other."""
    words = {(a + b) // 4 for a in addresses for b in range(0, width, 4)}
    banks = np.bincount([word % 32 for word in words], minlength=32)
    return int(banks.max())


def judge_swizzle(answer):
    given(answer(0, 0))
    for row in range(16):
        places = [int(answer(row, piece)) for piece in range(4)]
        expect(
            sorted(places) == [0, 1, 2, 3], f"Row {row} must hold its 4 pieces in 4 places, not in {places}."
        )
    rounds = max(
        ways([row * 64 + 16 * int(answer(row, piece)) for row in range(first, first + 8)], 16)
        for first in (0, 8)
        for piece in range(4)
    )
    expect(
        rounds == 1,
        f"Eight rows take {rounds} rounds. Rows r and r + 2 begin at the same bank: they must differ.",
    )


def judge_dx(answer):
    k, d, T, C, H = 3, 2, 9, 4, 5
    x, w, da = random(T, C), random(2 * H, k, C, seed=1), random(T, 2 * H, seed=2)
    late = lambda v, n: torch.cat([v.new_zeros(n, v.shape[1]), v[: len(v) - n]])
    early = lambda v, n: torch.cat([v[n:], v.new_zeros(n, v.shape[1])])
    x.requires_grad_()
    a = sum(late(x, (k - 1 - j) * d) @ w[:, j].T for j in range(k))
    (wanted,) = torch.autograd.grad(a, x, da)
    arrays = [v.detach().numpy() for v in (da, w)]
    returned = answer(*arrays, d)
    dx = given(returned)
    expect(dx.shape == (T, C), f"dx has the shape of x, {(T, C)}, not {tuple(dx.shape)}.")
    back = sum(late(da, (k - 1 - j) * d) @ w[:, j] for j in range(k))
    expect(not same(dx, back), "That looks back. Frame t is answerable for itself and for frames after it.")
    unflipped = sum(early(da, j * d) @ w[:, j] for j in range(k))
    expect(not same(dx, unflipped), "The last tap, j = k - 1, is the present: its shift is 0.")
    expect(
        same(dx, wanted), "Sum over taps j: da, (k-1-j) d frames later and 0 after the end, times w[:, j]."
    )


def judge_valid_numbers(answer):
    T, C = 5, 12
    given(answer(0, 0, T, C))
    for t, c, wanted, hint in (
        (0, 0, 8, "Of a frame of the clip all 8 numbers are copied."),
        (4, 0, 8, "Of the last frame, T - 1, all 8 numbers are copied."),
        (-1, 0, 0, "Before the first frame nothing is copied: all zeros. That is the causal padding."),
        (5, 0, 0, "Frame T lies after the end: in memory the next clip stands there."),
        (2, 8, 4, "The last piece of a row holds only C - c numbers; behind them stands the next frame."),
        (2, 16, 0, "A piece that begins behind the row's end has no numbers, not a negative count of them."),
    ):
        found = int(answer(t, c, T, C))
        expect(found == wanted, f"t = {t}, c = {c}, T = {T}, C = {C}: {found} of 8. {hint}")


# ------------------------------------------------------------------------------------------------------------
# csrc/gated_conv.cu on a CPU

TAP = "xs[(frame + k * step) * STRIDE2 + i]"  # of forward_v2: what puzzle 11 takes out
DOUBLE = "CASE(1,double)"  # compiled alone in half the time


class Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in "B T C H K dilation".split()]
    _fields_ += [(name, ctypes.c_longlong) for name in ("x_row", "cond_row")]


def cuda_text():
    return (CSRC / "gated_conv.cu").read_text(encoding="utf-8")


def kernel_text(text, name):
    """The lines of one kernel."""
    place = text.index(f" {name}(Layer")
    return text[text.rindex("template", 0, place) : text.index("\n}\n", place) + 2]


@functools.cache
def build(text, types="CASE(1,double) CASE(3,__nv_bfloat16)"):
    """Compile CUDA source as C++ (cuda_on_cpu.h) -> the library, or None without a compiler. Once."""
    if not shutil.which("c++"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = (
            Path(folder, "kernel.cpp"),
            Path(folder, f"{hashlib.sha256(text.encode()).hexdigest()}.so"),
        )
        source.write_text(text, encoding="utf-8")
        flags = ["-O0", "-shared", "-fPIC", "-std=c++17", "-w", "-DCUDA_ON_CPU", f"-I{CSRC}"]
        flags.append(f"-DGATED_CONV_DTYPES(CASE)={types}")
        done = subprocess.run(["c++", *flags, source, "-o", library], capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error:" in line]
            raise Wrong(
                f"The compiler says: {errors[0].split('error:')[1].strip() if errors else done.stderr[-200:]}"
            )
        library = ctypes.CDLL(str(library))
    library.gated_conv_forward.restype = ctypes.c_char_p
    return library


def run_cuda(library, version, x, w, bias, cond, d):
    """One layer by a version of the kernel: x (T, C), w (2H, k, C), bias (2H,), cond (T, 2H) -> y (T, H), or
    None where that version cannot run. Versions 1 to 3 in float64, the tensor cores' in bfloat16."""
    code, dtype = (1, torch.float64) if version < 4 else (3, torch.bfloat16)
    x, w, bias, cond = (torch.as_tensor(v).to(dtype).contiguous() for v in (x, w, bias, cond))
    (T, C), (rows, k, _) = x.shape, w.shape
    layer, y = Layer(1, T, C, rows // 2, k, d, C, rows), x.new_zeros(T, rows // 2)
    if library.gated_conv_version(code, version, ctypes.byref(layer)) != version:
        return None
    pointers = [ctypes.c_void_p(v.data_ptr()) for v in (x, w, bias, cond, y)]
    problem = library.gated_conv_forward(code, version, ctypes.byref(layer), *pointers, None, None)
    assert not problem, problem
    return y.double().numpy()


def without_barrier(text, kernel, number):
    """The source with barrier `number` (from 0) of a kernel taken out."""
    start = text.index(f" {kernel}(Layer")
    places = [found.start() for found in re.finditer(r"__syncthreads\(\);", text) if found.start() > start]
    return text[: places[number]] + text[places[number] + len("__syncthreads();") :]


def layer_by_formula(x, w, bias, cond, d):
    """The definition, in NumPy."""
    k = w.shape[1]
    padded = np.pad(x, (((k - 1) * d, 0), (0, 0)))
    a = bias + cond + sum(padded[j * d : j * d + len(x)] @ w[:, j].T for j in range(k))
    value, gate = np.split(a, 2, 1)
    return np.tanh(value) / (1 + np.exp(-gate))


def judge_tap_row(answer):
    text = cuda_text()
    assert TAP in text, "forward_v2 has changed"
    expect(isinstance(answer, str), "A piece of C in quotation marks.")
    library = build(text.replace(TAP, f"xs[({answer}) * STRIDE2 + i]"), DOUBLE)
    expect(library, "There is no C++ compiler here, so the real kernel cannot run.")
    rng = np.random.default_rng(0)
    for k, d in ((3, 2), (2, 1)):
        arrays = [rng.normal(size=shape) for shape in ((40, 5), (8, k, 5), (8,), (40, 8))]
        error = np.abs(run_cuda(library, 2, *arrays, d) - layer_by_formula(*arrays, d)).max()
        expect(
            error < 1e-9,
            f"It compiles; k = {k}, d = {d}: wrong by {error:.1f}. Row 0 is (K - 1) step frames early.",
        )


PUZZLES = [
    ("logdets", judge_logdets),
    ("late", judge_late),
    ("scale_density", judge_scale_density),
    ("ar2", judge_ar2),
    ("denoise", judge_denoise),
    ("halo_load", judge_halo_load),
    ("sliced_thread", judge_sliced_thread),
    ("dx_by_hand", judge_dx),
    ("swizzle", judge_swizzle),
    ("valid_numbers", judge_valid_numbers),
    ("tap_row", judge_tap_row),
]
