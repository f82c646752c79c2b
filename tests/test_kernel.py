"""The fused operator of csrc/: every claim that a machine can check, with a GPU or without.

Without a GPU the same gated_conv.cu runs thread by thread on the CPU (cuda_on_cpu.h): the backend "emulated".
The oracle is gated_causal_conv_reference in float64. Errors are max |got - wanted| / max |wanted| per tensor.
"""

import concurrent.futures
import contextlib
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import types
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import THOROUGH, say, thinned

import talkingflow
from csrc import device, gated_conv
from csrc.device import Captured, network_precision
from csrc.gated_conv import find_toolkit, fused_gated_conv, kernel_runs, load_kernel, register_kernel
from media import console
from talkingflow import gated_causal_conv_reference as reference

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
TESTS = ROOT / "tests"
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-13, torch.float16: 5e-3, torch.bfloat16: 4e-2}
RUNS = [(v, t) for v in (1, 2, 3) for t in TOLERANCE]
RUNS += [(v, t) for v in (4, 5) for t in (torch.float16, torch.bfloat16)]
EMULATED = [
    "-O1",
    "-DCUDA_ON_CPU",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DFULL_BLOCKS=4",
    "-DDW_BLOCKS=8",
    f"-include{TESTS / 'quick_switch.h'}",
]
NO_GXX = None if shutil.which("g++") else "no C++ compiler (g++) to compile the kernels for the CPU"
NO_GPU = None if torch.cuda.is_available() else "no GPU is visible"
SANITIZED = 5 if THOROUGH else 3  # rungs; emulated tensor cores take a minute more
HEADERS = tempfile.TemporaryDirectory()  # goes with the process
needs_gxx = pytest.mark.skipif(NO_GXX is not None, reason=NO_GXX or "")
needs_gpu = pytest.mark.skipif(NO_GPU is not None, reason=NO_GPU or "")


def toolkit():
    """Folder of a CUDA toolkit, or a skip."""
    if torch.version.cuda:
        try:
            return find_toolkit()
        except RuntimeError as error:
            pytest.skip(str(error))
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).exists():
        pytest.skip("no nvcc")
    return Path(nvcc).parent.parent


@functools.cache
def compiled_headers(*flags):
    """Folder of what all drivers of these flags include first, compiled once."""
    folder = Path(tempfile.mkdtemp(dir=HEADERS.name))
    (folder / "all.h").write_text(
        '#include <string>\n#include <type_traits>\n#include "quick_switch.h"\n#include "cuda_on_cpu.h"\n'
    )
    places = [f"-I{CSRC}", f"-I{TESTS}"]
    command = ["g++", *flags, *places, "-x", "c++-header", "-o", folder / "all.h.gch", folder / "all.h"]
    subprocess.run(command, capture_output=True, check=False)  # without it g++ reads the text
    return folder


def compile_driver(folder, source=CSRC, flags=(), versions=5, only=0):
    """kernel_driver.cpp as a program in `folder`: the kernels of `source`/gated_conv.cu against loops; of
    version `only` alone, if given."""
    program = folder / "kernel_driver"
    flags = ["-std=c++17", "-O1", "-w", *flags]
    dtypes = "CASE(0,float)" * (only < 4) + "CASE(3,__nv_bfloat16)" * (versions > 3)  # quicker
    defines = [f"-DGATED_CONV_DTYPES(CASE)={dtypes}", f"-DVERSIONS={versions}", f"-DONLY={only}"]
    places = ["-include", compiled_headers(*flags) / "all.h", f"-I{source}", f"-I{CSRC}", f"-I{TESTS}"]
    command = ["g++", *flags, *defines, *places, "-o", program, "-x", "c++", TESTS / "kernel_driver.cpp"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


def run_driver(program, *args, tsan=False, order=None):
    """(exit code, all it printed). TSan wants address randomisation off (setarch -R) on recent kernels."""
    command = ["setarch", "-R", program] if tsan and shutil.which("setarch") else [program]
    env = os.environ | ({"CUDA_ON_CPU_ORDER": order} if order else {})
    env["UBSAN_OPTIONS"], env["TSAN_OPTIONS"] = "print_stacktrace=0", "halt_on_error=1"
    done = subprocess.run(
        [*command, *args], env=env, capture_output=True, text=True, errors="replace", timeout=600, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="session")
def on_cpus(request):
    """What any CPU can prove is left to CPUs: a GPU, perhaps borrowed, is not kept waiting for it."""
    if not NO_GPU and not request.config.getoption("--slow"):
        pytest.skip("a GPU is here to run the kernels themselves; --slow checks its model, too")


@pytest.fixture(scope="session")
def driver(on_cpus, tmp_path_factory):
    """kernel_driver.cpp without a sanitizer."""
    return compile_driver(tmp_path_factory.mktemp("driver"), flags=["-O0"])


@pytest.fixture(scope="session")
def emulated(on_cpus, tmp_path_factory):
    """The operator on csrc/gated_conv.cu run by the CPU; built once a test run (8 s)."""
    if NO_GXX:
        pytest.skip(NO_GXX)
    from torch.utils import cpp_extension

    say("compiling csrc/ for the CPU: 8 s")
    cpp_extension.load(
        "talkingflow_cpu",
        [str(CSRC / "gated_conv.cpp")],
        extra_cflags=EMULATED,
        is_python_module=False,
        build_directory=str(tmp_path_factory.mktemp("emulated")),
    )
    register_kernel("talkingflow_cpu")
    return functools.partial(fused_gated_conv, library="talkingflow_cpu")


class Backend:
    def __init__(self, device, library, kernel):
        self.device, self.library, self.kernel = device, getattr(torch.ops, library), kernel

    def version(self, number):
        if number == 5 and self.device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("not a Hopper GPU")
        return functools.partial(self.kernel, version=number)


@pytest.fixture(params=["emulated", "cuda"])
def backend(request, monkeypatch):
    """The operator on the CPU, and on the GPU where there is one: the same tests."""
    if request.param == "emulated":
        return Backend("cpu", "talkingflow_cpu", request.getfixturevalue("emulated"))
    if NO_GPU:
        pytest.skip(NO_GPU)
    kernel = load_kernel()
    if kernel is None:
        pytest.skip("the kernel could not be built; the warning says why")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("a GPU without the tensor cores of version 4")
    return Backend("cuda", "talkingflow", kernel)


def inputs(B, C, H, T, K, bias=True, cond=True, dtype=torch.float64, device="cpu", seed=0):
    """x, weight, bias, cond of O(1) pre-activations, as leaves; weight lies (2H, K, C), as in the flow."""
    g = torch.Generator().manual_seed(seed)
    shapes = (B, T, C), (2 * H, K, C), (2 * H,) if bias else None, (B, T, 2 * H) if cond else None
    scales = 1, max(C * K, 1) ** -0.5, 0.5, 1
    made = [
        None if s is None else torch.randn(s, generator=g, dtype=torch.float64) * scale
        for s, scale in zip(shapes, scales)
    ]
    made[1] = made[1].transpose(1, 2)
    return [v if v is None else v.to(device, dtype).requires_grad_() for v in made]


def gradients(function, tensors, dilation, dy):
    """y and the gradients of all given tensors."""
    y = function(*tensors, dilation)
    return [y, *torch.autograd.grad(y, [v for v in tensors if v is not None], dy)]


def assert_close(got, wanted, tolerance, name=""):
    """Largest difference against the largest value wanted."""
    assert got.shape == wanted.shape, f"{name}: {tuple(got.shape)} vs {tuple(wanted.shape)}"
    if wanted.numel():
        got, wanted = got.detach().double().cpu(), wanted.detach().double().cpu()
        error = (got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)
        assert error <= tolerance, f"{name}: error {error:.2e} vs {tolerance:.0e}"


def compare(kernel, tensors, dilation, tolerance, name, dy=None):
    """Output and all gradients against the float64 reference on the very numbers the kernel got."""
    y = reference(*[v if v is None else v.detach().double() for v in tensors], dilation)
    dy = (
        torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        if dy is None
        else dy
    )
    dy = dy.to(tensors[0])
    exact = [v if v is None else v.detach().double().requires_grad_() for v in tensors]
    names = ["y"] + [f"d{n}" for n, v in zip(("x", "weight", "bias", "cond"), tensors) if v is not None]
    got, wanted = gradients(kernel, tensors, dilation, dy), gradients(reference, exact, dilation, dy.double())
    for n, a, b in zip(names, got, wanted):
        assert_close(a, b, tolerance, f"{n} of {name}")


# ---- Equivalence


def grid_of_shapes():
    """Every T with every K; the other sizes turn at their own pace, so that all pairs of neighbours meet."""
    turn = [
        itertools.cycle(v)
        for v in ((1, 3, 2), (5, 8, 33, 1, 9), (3, 17, 1, 33), (1, 2, 8, 4, 64, 100, 3), (True, False, True))
    ]
    for T, K in itertools.product((1, 2, 7, 8, 9, 31, 33, 64, 129), (1, 2, 3, 5)):
        B, C, H, d, bias = (next(v) for v in turn)
        yield B, C, H, T, K, d, bias, (T + K) % 3 > 0
    yield 2, 65, 65, 130, 3, 66, True, True  # two tiles in every direction, taps more than a tile apart
    yield 70, 3, 2, 40, 5, 3, True, True  # several chunks in each of dw's splits
    yield 0, 5, 3, 7, 2, 2, True, True


def hopper_shapes():
    """For version 5: channels in multiples of 8, fewer and more than a tile's 64 and 128; odd batches; tiles
    of 64 and 80 frames, full and not; taps further apart than T."""
    turn = [
        itertools.cycle(v)
        for v in ((1, 3, 2), (8, 72, 24, 64, 136), (64, 136, 8, 128, 72, 256, 96), (1, 2, 8, 4, 64, 100, 3))
    ]
    for i, (T, K) in enumerate(itertools.product((1, 2, 33, 64, 74, 80, 129), (1, 2, 3, 5))):
        B, C, H, d = (next(v) for v in turn)
        yield B, C, H, T, K, d, i % 3 > 0, i % 5 > 0
    yield 9, 72, 72, 81, 3, 2, True, True  # several chunks in each of dw's splits
    yield 1, 8, 8, 700, 3, 200, True, True  # nine tiles of one item, taps in other tiles


HOPPER = (5, torch.bfloat16)  # emulated, the slowest
FAST = [(1, torch.float32), (2, torch.float32), (3, torch.float32), (3, torch.float64), (4, torch.bfloat16)]


def over(runs, slow=()):
    """A test for each version and dtype of `runs`, some of them slow."""
    cases = [
        pytest.param(v, t, id=f"v{v}-{str(t)[6:]}", marks=[pytest.mark.slow] if (v, t) in slow else [])
        for v, t in runs
    ]
    return pytest.mark.parametrize("number, dtype", cases)


versions = over(RUNS)


@over(RUNS, slow=set(RUNS) - set(FAST))
def test_output_and_all_gradients_equal_the_float64_reference(backend, number, dtype, pytestconfig):
    """All shapes with --slow, else every third and the last two."""
    shapes = list(hopper_shapes() if number == 5 else grid_of_shapes())
    if not pytestconfig.getoption("--slow"):
        shapes = shapes[::3] + shapes[-2:]
    for i, (B, C, H, T, K, d, bias, cond) in enumerate(shapes):
        half, last = dtype == torch.float16, i >= len(shapes) - 2
        if number == 5 and backend.device == "cpu" and ((i // 4 + i) % 3 != half and (half or not last)):
            continue  # emulated, it is slow: a third of the shapes in each of the two types
        if number == 4 and (128 * (2 * (16 + (K - 1) * d) + 128 * K) > 99 * 1024 or B > 3):
            continue  # the tiles do not fit in shared memory: version 3 takes these (or too slow to emulate)
        tensors = inputs(B, C, H, T, K, bias, cond, dtype, backend.device)
        compare(backend.version(number), tensors, d, TOLERANCE[dtype], f"B{B} C{C} H{H} T{T} K{K} d{d}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensor_cores_take_rows_of_any_alignment(backend, dtype):
    """Rows aligned to 2, 4, 8, 16 bytes: other copies; H a multiple of 8 or not: other stores; 1-4 taps."""
    for C, H, K, T in ((16, 8, 3, 90), (68, 16, 3, 20), (34, 12, 2, 81), (17, 64, 1, 33), (24, 72, 4, 17)):
        for extra in (0, 8):  # x and cond as slices
            x, w, b, c = inputs(2, C + extra, H + extra, T, K, dtype=dtype, device=backend.device)
            with torch.no_grad():
                tensors = [x[..., extra:], w[: 2 * H, :C], b[: 2 * H], c[..., : 2 * H]]
            tensors = [v.requires_grad_() for v in tensors]
            compare(
                backend.version(4),
                tensors,
                4,
                TOLERANCE[dtype],
                f"C{C} H{H} K{K} T{T} slices of {extra} more",
            )


def test_hopper_takes_slices_and_leaves_the_rest_to_the_tensor_cores(backend):
    """x and cond as slices on 16 bytes; what TMA cannot describe is refused or goes to version 4."""
    wide = inputs(2, 88, 72, 70, 2, dtype=torch.bfloat16, device=backend.device)
    slices = [wide[0][..., 16:], wide[1][: 2 * 64, 16:], wide[2][: 2 * 64], wide[3][..., 16:]]
    slices = [v.detach().requires_grad_() for v in slices]
    compare(backend.version(5), slices, 3, TOLERANCE[torch.bfloat16], "slices")
    op = backend.library.gated_conv
    x, w, b, c = (v.detach() for v in slices)
    for name, case in {
        "C": (x[..., :68], w[:, :68], b, c),
        "a slice of x": (wide[0].detach()[..., 4:76], w, b, c),
        "a slice of cond": (x, w, b, wide[3].detach()[..., 4:132]),
        "H": (x, w[:120], b[:120], c[..., :120]),
        "float32": tuple(v.float() for v in (x, w, b, c)),
    }.items():
        with pytest.raises(RuntimeError, match="version 5 cannot run this"):
            op(*case, 3, True, 5)
        y = reference(*(v.double() for v in case), 3)
        assert_close(op(*case, 3, True, 0)[0], y, TOLERANCE[torch.bfloat16], name)


@pytest.mark.slow  # compiles
@needs_gxx
def test_the_rung_for_hopper_is_taken_where_it_fills_the_gpu(on_cpus, tmp_path):
    """gated_conv_version for bfloat16, with the real threshold of 48 blocks; the emulator is a Hopper."""
    shapes = {  # B, T, C, H, aligned: the version
        (128, 80, 256, 256, 1): 5,
        (128, 256, 128, 128, 1): 5,
        (128, 80, 72, 256, 1): 5,
        (128, 80, 68, 256, 1): 4,  # rows of 136 bytes
        (128, 80, 256, 260, 1): 4,
        (128, 80, 256, 256, 0): 4,  # a tensor that does not begin on 16 bytes
        (8, 74, 64, 64, 1): 4,  # 4 blocks
        (128, 17, 256, 256, 1): 4,  # three quarters of a tile beyond T
        (4096, 80, 64, 40, 1): 4,  # two thirds of the channels beyond H
    }
    lines = [f"print({{{B}, {T}, {C}, {H}, 3, 1, {C}, {2 * H}, {on}}});" for B, T, C, H, on in shapes]
    (tmp_path / "choose.cpp").write_text(
        '#include "gated_conv.cu"\n'
        'void print(Layer n) { printf("%d ", gated_conv_version(3, 0, &n)); }\n'
        f"int main() {{ {' '.join(lines)} }}"
    )
    command = ["g++", "-std=c++17", "-w", f"-I{CSRC}", "-o", tmp_path / "choose", tmp_path / "choose.cpp"]
    subprocess.run(command, check=True)
    printed = subprocess.run([tmp_path / "choose"], capture_output=True, text=True, check=True).stdout
    assert dict(zip(shapes, map(int, printed.split()))) == shapes


@versions
def test_no_frames_or_no_input_channels(backend, number, dtype):
    kernel = backend.version(number % 5)  # TMA describes no tensor without elements: 0 chooses another than 5
    x, w, b, c = inputs(3, 8, 8, 0, 2, dtype=dtype, device=backend.device)  # T = 0
    y, *grads = gradients(kernel, [x, w, b, c], 2, x.new_empty(3, 0, 8))
    assert y.shape == (3, 0, 8)
    assert all(v.shape == g.shape and not g.any() for v, g in zip((x, w, b, c), grads))
    x, w, b, c = inputs(3, 0, 2, 7, 2, dtype=dtype, device=backend.device)  # C = 0: the gate of bias + cond
    a = b.double() + c.double()
    assert_close(kernel(x, w, b, c, 2), a[..., :2].tanh() * a[..., 2:].sigmoid(), TOLERANCE[dtype])


@pytest.mark.parametrize("bias, cond", list(itertools.product((True, False), repeat=2)))
def test_gradcheck(backend, bias, cond):
    tensors = inputs(2, 3, 2, 5, 2, bias, cond, device=backend.device)
    given = [v for v in tensors if v is not None]

    def call(*values):
        values = iter(values)
        return backend.kernel(*[None if v is None else next(values) for v in tensors], 2)

    assert torch.autograd.gradcheck(call, given)


def test_saturated_gates_keep_their_gradient_in_bfloat16(backend):
    """At a = 4 the eager path in bfloat16 has rounded tanh to 1, its gradient to 0; truly it is 1.34e-3."""
    tensors = inputs(1, 1, 1, 4, 1, bias=False, dtype=torch.bfloat16, device=backend.device)
    with torch.no_grad():
        tensors[1].zero_(), tensors[3].fill_(4)
    compare(backend.kernel, tensors, 1, 5e-3, "a = 4", dy=torch.ones(1, 4, 1))


def test_strided_expanded_and_misaligned_inputs(backend):
    for dtype, tolerance in TOLERANCE.items():
        x, w, b, c = inputs(3, 6, 5, 11, 3, dtype=dtype, device=backend.device)
        long = torch.randn(3, 23, 12, device=backend.device, dtype=dtype)
        shifted = torch.cat([x.detach().flatten()[:1], x.detach().flatten()])[1:].view_as(x)
        cases = {
            "x transposed": (x.detach().transpose(1, 2).contiguous().transpose(1, 2), w, b, c),
            "x a slice of channels": (long[:, :11, 2:8].contiguous().repeat(1, 1, 2)[..., 6:], w, b, c),
            "x a slice of time": (long[:, 3:14, :6], w, b, c),
            "x every other channel": (long[:, :11, ::2], w, b, c),
            "x expanded": (x.detach()[:1].expand(3, 11, 6), w, b, c),
            "x one element off alignment": (shifted, w, b, c),
            "weight as the contract has it": (x, w.detach().contiguous(), b, c),
            "weight permuted": (x, w.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0), b, c),
            "bias strided": (x, w, torch.randn(20, device=backend.device, dtype=dtype)[::2], c),
            "cond a slice of channels": (x, w, b, long.new_ones(3, 11, 30).cumsum(2)[..., 10:20] / 30),
            "cond the same at all times": (x, w, b, c.detach()[:, :1].expand(3, 11, 10)),
        }
        for name, case in cases.items():
            tensors = [
                v.detach().as_strided(v.shape, v.stride(), v.storage_offset()).requires_grad_() for v in case
            ]
            assert [v.stride() for v in tensors] == [v.stride() for v in case]
            compare(backend.kernel, tensors, 2, tolerance, name)
        ones = torch.ones((), dtype=dtype, device=backend.device).expand(3, 11, 5)
        compare(backend.kernel, [x, w, b, c], 2, tolerance, "dy expanded", dy=ones)
        split = torch.randn(3, 11, 10, dtype=dtype, device=backend.device)[..., 5:]
        compare(backend.kernel, [x, w, b, c], 2, tolerance, "dy a slice", dy=split)


def test_on_hopper_rows_are_filled_up_to_whole_pieces(emulated, monkeypatch):
    """C = 17, 34 and 68 reach the fifth rung as 24, 40 and 72; outputs and gradients are those of C."""
    taken = []
    monkeypatch.setattr(gated_conv, "capability", lambda device: 9)
    whole_pieces = gated_conv.whole_pieces
    monkeypatch.setattr(
        gated_conv, "whole_pieces", lambda *both: taken.append(whole_pieces(*both)) or taken[-1]
    )
    for C in (17, 34, 68, 16):
        tensors = inputs(3, C, 16, 33, 3, dtype=torch.bfloat16)
        compare(emulated, tensors, 2, TOLERANCE[torch.bfloat16], f"C{C}")
    assert [(x.shape[2], w.shape) for x, w in taken] == [(C, (32, C, 3)) for C in (24, 40, 72)]
    assert all(w.stride() == (3 * C, 1, C) for (_, w), C in zip(taken, (24, 40, 72)))


def test_weights_of_the_flow_are_read_as_they_lie(backend):
    """The (2H, K, C) parameter's transposed view costs no copy; its gradient comes back in the same order."""
    x, w, b, c = inputs(2, 5, 3, 9, 2, dtype=torch.float32, device=backend.device)
    dweight = torch.autograd.grad(backend.kernel(x, w, b, c, 2).sum(), w)[0]
    assert dweight.stride() == w.stride() == (10, 1, 5)


def test_nan_and_inf_stay_where_they_are(backend):
    for (number, dtype), bad in itertools.product(
        (
            (1, torch.float32),
            (2, torch.float32),
            (3, torch.float32),
            (4, torch.bfloat16),
            (5, torch.bfloat16),
        ),
        (float("nan"), float("inf"), -float("inf")),
    ):
        C, H = (9, 5) if number < 5 else (16, 8)
        x, w, b, c = inputs(2, C, H, 40, 3, dtype=dtype, device=backend.device)
        with torch.no_grad():
            x[1, 20, 8], w[3] = bad, 0  # 0 * inf is nan, as in the reference
            c[0, 7, 2] = bad
        dy = torch.ones(2, 40, H, device=backend.device, dtype=dtype)
        exact = [v.detach().float().requires_grad_() for v in (x, w, b, c)]
        for got, wanted in zip(
            gradients(backend.version(number), [x, w, b, c], 4, dy),
            gradients(reference, exact, 4, dy.float()),
        ):
            assert torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got.isinf(), wanted.isinf())
            assert_close(got.nan_to_num(0, 0, 0), wanted.nan_to_num(0, 0, 0), TOLERANCE[dtype])


@over(RUNS, slow=[(5, torch.float16)])
def test_no_output_sees_the_future_bit_for_bit(backend, number, dtype):
    kernel = backend.version(number)
    x, w, b, c = inputs(1, *(9, 5) if number < 5 else (16, 8), 140, 3, dtype=dtype, device=backend.device)
    y = kernel(x, w, b, c, 4)
    for t in (1, 64, 81):
        other = x.detach().clone()
        other[:, t:] = float("nan")
        assert torch.equal(kernel(other, w, b, c, 4)[:, :t], y[:, :t]), t


@over([*FAST, HOPPER], slow=[HOPPER])  # storage has no part in the order
def test_repeated_runs_and_thread_orders_give_the_same_bits(backend, monkeypatch, number, dtype):
    orders = ["ascending", "descending", "shuffle:1"] if backend.device == "cpu" else ["gpu"] * 20
    C, H = (9, 34) if number < 5 else (16, 136)
    tensors = inputs(3, C, H, 70, 3, dtype=dtype, device=backend.device)
    dy = torch.randn(3, 70, H, generator=torch.Generator().manual_seed(1)).to(tensors[0])
    results = []
    for order in orders:
        monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
        results.append(gradients(backend.version(number), tensors, 4, dy))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


# ---- PyTorch's contracts


OPCHECKS = [(torch.float32, True, 2), (torch.bfloat16, True, 2), (torch.float64, False, 2)]
OPCHECKS += [(torch.float32, True, 0)]  # dtype, save, B


@pytest.mark.slow
@pytest.mark.parametrize("case", OPCHECKS)
def test_opcheck(backend, case):
    dtype, save, B = case
    x, w, b, c = inputs(B, 5, 3, 7, 2, dtype=dtype, device=backend.device)
    if not save:  # without the saved pre-activation there is no gradient
        x, w, b, c = (v.detach() for v in (x, w, b, c))
    torch.library.opcheck(backend.library.gated_conv.default, (x, w, b, c, 2, save, 0))
    torch.library.opcheck(backend.library.gated_conv.default, (x, w, None, None, 2, save, 0))
    dy, a = torch.ones(B, 7, 3).to(x), torch.ones(B, 7, 6).to(x)
    torch.library.opcheck(backend.library.gated_conv_backward.default, (dy, a, x.detach(), w.detach(), 2, 0))


@pytest.mark.parametrize("compiler", thinned(["aot_eager", "inductor"], every=2))
def test_compiles_without_graph_breaks(backend, compiler):
    torch._dynamo.reset()
    scale = 1 if compiler == "inductor" else 2  # nothing but the operator: inductor has no C++ to compile
    layer = torch.compile(
        lambda x, w, b, c: backend.kernel(x * scale if scale != 1 else x, w, b, c, 2),
        fullgraph=True,
        backend=compiler,
    )
    for T in (9, 13, 17):  # the second shape makes T dynamic
        x, w, b, c = inputs(2, 5, 3, T, 2, dtype=torch.float32, device=backend.device)
        y, wanted = layer(x, w, b, c), reference(x * scale, w, b, c, 2)
        assert_close(y, wanted, 5e-6)
        for got, exact in zip(
            torch.autograd.grad(y.sum(), (x, w, b, c)), torch.autograd.grad(wanted.sum(), (x, w, b, c))
        ):
            assert_close(got, exact, 5e-6)


def test_the_choice_of_backend_compiles_without_graph_breaks(emulated, monkeypatch):
    """gated_causal_conv asks load_kernel while torch.compile traces. A CPU tensor passes for a GPU's."""
    source = "".join(open(talkingflow.__file__).read().partition("def gated_causal_conv(")[1:]).split(
        "\n\n\n"
    )[0]
    assert "x.is_cuda" in source

    def fused(*tensors_and_dilation):
        return fused_gated_conv(*tensors_and_dilation, library="talkingflow_cpu")

    scope = vars(talkingflow) | {"fused_gated_conv": fused}
    exec(source.replace("x.is_cuda", "x.is_cpu"), scope)  # noqa: S102
    monkeypatch.setattr(gated_conv, "load_kernel", lambda: emulated)
    monkeypatch.setattr(gated_conv, "FASTER", {(torch.bfloat16, 0): "as if on a Hopper"})
    float32, bfloat16 = (inputs(2, 5, 3, 9, 2, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    cases = ("cuda", float32, True), ("auto", float32, False), ("auto", bfloat16, True)  # this one with C = 8
    for choice, (x, w, b, c), fused in cases:
        monkeypatch.setenv("TALKINGFLOW_KERNEL", choice)
        torch._dynamo.reset()
        call = torch.compile(
            lambda x: scope["gated_causal_conv"](x, w, b, c, 2), fullgraph=True, backend="aot_eager"
        )
        assert_close(call(x), reference(x, w, b, c, 2), TOLERANCE[x.dtype])
        graph = str(torch._dynamo.explain(scope["gated_causal_conv"])(x, w, b, c, 2).ops_per_graph)
        assert ("talkingflow_cpu" in graph) == fused


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    device = torch.device("cuda", 0)


@pytest.mark.parametrize("major, able", [(9, True), (8, False), (10, False), (7, False)])
def test_the_operator_is_taken_where_it_is_faster(monkeypatch, major, able):
    """16-bit floats where a GPU said so; TALKINGFLOW_KERNEL=cuda takes everything."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, 0))
    monkeypatch.setattr(gated_conv, "load_kernel", lambda: fused_gated_conv)
    weight = torch.zeros(2, 1, 3)
    for dtype in TOLERANCE:
        x = torch.zeros(1, dtype=dtype).as_subclass(OnGpu)
        monkeypatch.delenv("TALKINGFLOW_KERNEL", raising=False)
        assert kernel_runs(x, weight, 8) == (able and dtype in (torch.float16, torch.bfloat16))
        assert not kernel_runs(x, weight, 400)  # rung 3 would run
        monkeypatch.setenv("TALKINGFLOW_KERNEL", "cuda")
        assert kernel_runs(x, weight, 400)
        monkeypatch.setattr(gated_conv, "load_kernel", lambda: None)
        assert not kernel_runs(x, weight, 8)
        monkeypatch.setattr(gated_conv, "load_kernel", lambda: fused_gated_conv)


def test_the_dispatcher_knows_which_layers_the_tensor_cores_can_run(emulated):
    for K, dilation in itertools.product((1, 2, 3, 4, 5, 6), (1, 2, 15, 16, 61, 62, 188, 189, 376, 377)):
        x, w, _, _ = inputs(1, 1, 1, 1, K, dtype=torch.bfloat16)
        try:
            emulated(x, w, None, None, dilation, version=4)
            ran = True
        except RuntimeError as error:
            assert "version 4 cannot run this" in str(error)
            ran = False
        assert ran == gated_conv.tensor_cores_fit(w, dilation), (K, dilation)


@pytest.mark.parametrize(
    "asked, hidden, major, wanted",
    [("auto", 256, 9, True), ("auto", 128, 8, True), ("auto", 64, 9, True), ("auto", 64, 8, False)]
    + [("auto", 256, 7, False), ("bfloat16", 64, 7, True), ("float32", 256, 9, False)]
    + [("auto", 256, None, False)],
)
def test_auto_precision_is_the_faster_one(monkeypatch, asked, hidden, major, wanted):
    monkeypatch.setattr(device, "load_kernel", lambda: fused_gated_conv if major == 9 else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, 0))
    on = torch.device("cuda" if major else "cpu")
    assert network_precision(asked, hidden, on) == (torch.bfloat16 if wanted else None)


def test_autocast_takes_its_dtype_and_gradients_stay_float32(backend):
    x, w, b, c = inputs(2, 5, 3, 9, 2, dtype=torch.float32, device=backend.device)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(backend.device, dtype):
            y = backend.kernel(x, w, b, c, 2)
        assert y.dtype == dtype
        grads = torch.autograd.grad(y.float().sum(), (x, w, b, c))
        assert all(g.dtype == torch.float32 for g in grads)
        assert_close(y, reference(x, w, b, c, 2), TOLERANCE[dtype])
        with torch.autocast(backend.device, dtype):
            # as conv1d does
            assert backend.kernel(*(v.double() for v in (x, w, b, c)), 2).dtype == torch.float64


def test_nothing_is_saved_without_a_gradient(backend):
    x, w, b, c = inputs(2, 5, 3, 9, 2, dtype=torch.float32, device=backend.device)
    y, a = backend.library.gated_conv(x, w, b, c, 2, False, 0)
    assert a.numel() == 0 and torch.equal(y, backend.library.gated_conv(x, w, b, c, 2, True, 0)[0])
    with pytest.raises(RuntimeError, match="kept only when save is true"):
        torch.autograd.grad(y.sum(), x)


def test_second_derivatives_are_refused(backend):
    x, w, b, c = inputs(2, 5, 3, 9, 2, device=backend.device)
    first = torch.autograd.grad(backend.kernel(x, w, b, c, 2).sum(), x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(first.sum(), w)


WRONG = {  # what is wrong: (how the right arguments are changed, what the message must say)
    "weight": (lambda x, w, b, c: (x, w[:, :4], b, c), "weight has shape (6, 4, 2) vs expected (6, 5, 2)"),
    "bias": (lambda x, w, b, c: (x, w, b[:5], c), "bias has shape (5) vs expected (6)"),
    "cond": (lambda x, w, b, c: (x, w, b, c[:, :8]), "cond has shape (2, 8, 6) vs expected (2, 9, 6)"),
    "dtype": (lambda x, w, b, c: (x, w, b, c.double()), "cond and x differ in dtype; cast them"),
    "rows": (
        lambda x, w, b, c: (x, w[:5], b, c),
        "weight has 5 rows vs an even number expected (values, then gates)",
    ),
    "axes": (lambda x, w, b, c: (x[0], w, b, c), "x must be (B, T, C) and weight (2H, C, K)"),
    "numbers": (lambda *v: tuple(t.long() for t in v), "x must be float32, float64, float16 or bfloat16"),
}
WRONG_NUMBERS = {  # dilation and version: what the message must say
    (0, 0): "kernel size must be 1 to 1024, dilation at least 1",
    (2, 7): "version 7 cannot run this: 1 takes everything",
    (2, 4): "version 4 cannot run this: 1 takes everything",  # float32
    (2, 5): "version 5 cannot run this: 1 takes everything",
    ((1 << 30) + 1, 1): "frames or (kernel size - 1) * dilation exceed 2^29",
    (1 << 32, 1): "a size of 4294967296 is over 2^31 - 1",
}


def test_wrong_arguments_are_named(backend):
    right = [v.detach() for v in inputs(2, 5, 3, 9, 2, dtype=torch.float32, device=backend.device)]

    def message(tensors, dilation=2, version=0):
        with pytest.raises(RuntimeError) as caught:
            backend.library.gated_conv(*tensors, dilation, True, version)
        return str(caught.value)

    for change, wanted in WRONG.values():
        assert "gated_conv: " + wanted in message(change(*right))
    for (dilation, version), wanted in WRONG_NUMBERS.items():
        assert "gated_conv: " + wanted in message(right, dilation, version)


@pytest.mark.slow  # a process that imports PyTorch
@needs_gxx
def test_messages_are_whole_where_libstdcxx_is_linked_statically(emulated, tmp_path):
    """There a number in a C++ stream ends the process; in the autograd thread as in the main one."""
    compiled = next(Path(path) for path in torch.ops.loaded_libraries if "talkingflow_cpu" in path)
    library = tmp_path / "talkingflow_cpu.so"
    places = [compiled.parent / "gated_conv.o", f"-L{Path(torch.__file__).parent}/lib"]
    libraries = ["-lc10", "-ltorch_cpu", "-ltorch", "-static-libstdc++"]
    subprocess.run(["g++", "-shared", "-o", library, *places, *libraries], check=True)
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch
from csrc.gated_conv import register_kernel
from test_kernel import WRONG, WRONG_NUMBERS, inputs
torch.ops.load_library({str(library)!r})
register_kernel("talkingflow_cpu")
op = torch.ops.talkingflow_cpu.gated_conv
right = inputs(2, 5, 3, 9, 2, dtype=torch.float32)
with torch.no_grad():
    calls = [(*change(*right), 2, True, 0) for change, _ in WRONG.values()]
    calls += [(*right, dilation, True, version) for dilation, version in WRONG_NUMBERS]
    for arguments in calls:
        try: op(*arguments)
        except RuntimeError as error: print("main:", error, flush=True)
loss = op(*right, 2, False, 0)[0].sum()  # nothing was kept for backward
def refused():
    try: loss.backward()
    except RuntimeError as error: print("autograd:", error, flush=True)
refused()
import threading
thread = threading.Thread(target=refused); thread.start(); thread.join()
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    linked = subprocess.run(["ldd", library], capture_output=True, text=True, check=True).stdout
    assert "libstdc++" not in linked  # so the test tests something
    for wanted in [w for _, w in WRONG.values()] + list(WRONG_NUMBERS.values()):
        assert "main: gated_conv: " + wanted in run.stdout, (wanted, run.stdout)
    kept = "gated_conv: a (kept only when save is true) has shape (0, 9, 6) vs expected (2, 9, 6)"
    assert run.stdout.count("autograd: " + kept) == 2


@needs_gxx
def test_no_number_passes_through_a_stream(emulated):
    """Nor in what PyTorch's headers compile into the extension: no stream is so much as mentioned."""
    library = next(path for path in torch.ops.loaded_libraries if "talkingflow_cpu" in path)
    symbols = subprocess.run(["nm", "-DC", library], capture_output=True, text=True, check=True).stdout
    assert "std::runtime_error" in symbols
    assert not re.findall(r".*(?:std::ostream|basic_\w*stream).*", symbols)


def test_a_tile_too_large_for_shared_memory_falls_back_to_version_1(backend):
    x, w, b, c = inputs(1, 3, 2, 50, 24, device=backend.device)  # 24 taps in float64
    compare(backend.kernel, [x, w, b, c], 3, 1e-13, "K = 24")
    for number in (2, 3):
        with pytest.raises(RuntimeError, match=f"version {number} cannot run this"):
            backend.library.gated_conv(x, w, b, c, 70, True, number)


# ---- In the model


def test_training_and_sampling_are_equal_through_either_backend(backend, monkeypatch):
    """float32: the losses of 8 training steps within 2e-5 nats, samples within 2e-4 of the landmarks'."""

    def train_and_sample(function):
        monkeypatch.setattr(talkingflow, "gated_causal_conv", function)
        torch.manual_seed(0)
        fields = {
            "dim": 16,
            "cond_dim": 5,
            "hidden": 12,
            "kernel_size": 3,
            "steps_per_scale": 1,
            "dropout": 0.0,
        }
        flow = talkingflow.TalkingFlow(talkingflow.Config(**fields))
        x, c = torch.rand(4, 20, 16), torch.randn(4, 20, 5)
        flow, x, c = flow.to(backend.device), x.to(backend.device), c.to(backend.device)
        flow.initialize(x, c)
        optimizer, losses = torch.optim.Adam(flow.parameters(), 1e-3), []
        for _ in range(8):
            loss = flow.nll(x, c).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        with torch.no_grad():
            zs, _ = flow(x, c)
            return losses, flow.inverse(zs, c)

    losses, x = train_and_sample(backend.kernel)
    wanted_losses, wanted_x = train_and_sample(reference)
    assert losses[0] != losses[-1] and losses == pytest.approx(wanted_losses, abs=2e-5)
    assert (x - wanted_x).abs().max() < 2e-4


def test_a_cpu_never_asks_for_the_kernel(monkeypatch):
    monkeypatch.setattr(talkingflow, "kernel_runs", lambda *_: pytest.fail("asked"))
    tensors = inputs(2, 5, 3, 9, 2)
    assert torch.equal(talkingflow.gated_causal_conv(*tensors, 2), reference(*tensors, 2))


# ---- The loader: whatever fails is one warning and the PyTorch path


def test_hopper_is_compiled_for_under_its_own_name(monkeypatch):
    """sm_90a, which alone has wgmma; its PTX would run nowhere else, so newer GPUs get that of 8.0."""
    for wanted, built in {
        "9.0": "9.0a",
        "8.0;9.0": "8.0;9.0a",
        "8.6 9.0 12.0+PTX": "8.6 9.0a 12.0+PTX",
        "8.6;9.0+PTX": "8.6;8.0+PTX;9.0a",
        "9.0a": "9.0a",
        "8.0": "8.0",
    }.items():
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
        assert gated_conv.architectures() == built


def load(monkeypatch, choice=None, **env):
    """load_kernel as a new process would run it: (kernel, warnings)."""
    load_kernel.cache_clear()
    monkeypatch.delenv("TALKINGFLOW_KERNEL", raising=False)
    for name, value in {"TALKINGFLOW_KERNEL": choice, **env}.items():
        if value is not None:
            monkeypatch.setenv(name, str(value))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kernel = load_kernel()
        assert load_kernel() is kernel  # and it asks once
    load_kernel.cache_clear()
    return kernel, [str(w.message) for w in caught if "kernel:" in str(w.message)]


@pytest.mark.slow  # a process that imports PyTorch
def test_import_builds_nothing_and_prints_nothing():
    code = (
        "import sys, talkingflow, csrc.gated_conv as g\n"
        "assert 'torch.utils.cpp_extension' not in sys.modules\n"
        "assert g.load_kernel.cache_info().currsize == 0"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "kernel" not in run.stdout + run.stderr, run.stderr


def test_the_choice_is_said_in_one_line(monkeypatch, capsys):
    assert load(monkeypatch, "torch") == (None, [])
    assert capsys.readouterr().err == "kernel: PyTorch (TALKINGFLOW_KERNEL=torch)\n"
    if NO_GPU:
        assert load(monkeypatch) == (None, [])
        assert re.fullmatch(
            r"kernel: PyTorch \((no GPU is visible|this PyTorch has no CUDA)\)\n", capsys.readouterr().err
        )
    with pytest.raises(console.UserError, match="TALKINGFLOW_KERNEL: gpu vs auto, cuda or torch"):
        load(monkeypatch, "gpu")


def fail_to_build(monkeypatch, tmp_path, **env):
    """The loader, asked to build where something is wrong: it must return None and warn once."""
    kernel, said = load(monkeypatch, "cuda", **{"TORCH_EXTENSIONS_DIR": tmp_path / "cache", **env})
    assert kernel is None and len(said) == 1, said
    return said[0]


@pytest.mark.skipif(
    torch.version.cuda is None, reason="this PyTorch has no CUDA: the loader stops before it builds"
)
class TestLoaderOfACudaBuild:
    def test_no_toolkit(self, monkeypatch, tmp_path):
        monkeypatch.setattr(
            gated_conv, "find_toolkit", lambda: (_ for _ in ()).throw(RuntimeError("no CUDA toolkit"))
        )
        assert "no CUDA toolkit" in fail_to_build(monkeypatch, tmp_path)

    @pytest.mark.slow
    def test_no_compiler(self, monkeypatch, tmp_path):
        toolkit()
        monkeypatch.setattr(gated_conv, "CSRC", tmp_path / "csrc")
        shutil.copytree(CSRC, tmp_path / "csrc")
        (tmp_path / "csrc" / "gated_conv.cu").write_text("")  # nvcc is not what fails here
        assert "kernel: PyTorch" in fail_to_build(monkeypatch, tmp_path, CXX="/nowhere/g++")

    def test_no_ninja(self, monkeypatch, tmp_path):
        toolkit()
        from torch.utils import cpp_extension

        monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: False)
        assert "inja" in fail_to_build(monkeypatch, tmp_path)

    def test_a_cache_that_cannot_be_written(self, monkeypatch, tmp_path):
        toolkit()
        (tmp_path / "file").touch()  # a folder cannot be made below a file, whoever runs this
        assert "ot a directory" in fail_to_build(
            monkeypatch, tmp_path, TORCH_EXTENSIONS_DIR=tmp_path / "file"
        )

    def test_a_failing_build_quotes_the_compiler_and_is_remembered(self, monkeypatch, tmp_path):
        toolkit()
        monkeypatch.setattr(gated_conv, "CSRC", tmp_path / "csrc")
        shutil.copytree(CSRC, tmp_path / "csrc")
        for name in ("gated_conv.cpp", "gated_conv.cu"):
            (tmp_path / "csrc" / name).write_text("#error planted")
        said = fail_to_build(monkeypatch, tmp_path)
        assert "planted" in said and "to try again, delete" in said
        compile_sources = gated_conv.compile_sources
        monkeypatch.setattr(gated_conv, "compile_sources", lambda *_: pytest.fail("compiled again"))
        assert fail_to_build(monkeypatch, tmp_path) == said  # the same reason, at once

        monkeypatch.setattr(gated_conv, "compile_sources", compile_sources)
        (tmp_path / "csrc" / "gated_conv.cu").write_text("#error planted elsewhere")
        (tmp_path / "csrc" / "gated_conv.cpp").write_text("#error planted elsewhere")
        assert "planted elsewhere" in fail_to_build(monkeypatch, tmp_path)  # other sources
        records = (tmp_path / "cache").rglob("*.failed")
        record = next(path for path in records if "elsewhere" in path.read_text())
        record.unlink()
        assert (
            "planted" in fail_to_build(monkeypatch, tmp_path)
            and len(list(record.parent.glob("*.failed"))) == 2
        )
        assert not [p for p in record.parent.iterdir() if p.is_dir()]  # nothing half-built is left

    def test_a_wrong_cuda_home_is_passed_over(self, monkeypatch, tmp_path):
        found = toolkit()
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        assert find_toolkit().samefile(found)

    def test_a_toolkit_of_pip_wheels_is_found(self, monkeypatch, tmp_path):
        home = tmp_path / "nvidia" / f"cu{torch.version.cuda.split('.')[0]}"
        for name in ("bin/nvcc", "lib/libcudart.so.13"):
            (home / name).parent.mkdir(parents=True)
            (home / name).touch()
        monkeypatch.setattr(
            Path,
            "glob",
            lambda self, *a: [] if str(self) == "/usr/local" else list(self.rglob("libcudart.so*")),
        )
        monkeypatch.setattr(gated_conv.shutil, "which", lambda name: None)
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        for name in ("CUDA_HOME", "CUDA_PATH"):
            monkeypatch.delenv(name, raising=False)
        if not Path("/usr/local/cuda/bin/nvcc").exists():
            assert find_toolkit() == home

    @pytest.mark.slow  # nvcc
    def test_builds_loads_and_registers_for_cuda(self, on_cpus, tmp_path):
        """The real thing in a new process (with THOROUGH in two at once), in a cache whose path has a space,
        beside what a killed build left; then once more from the cache (60 s)."""
        toolkit()
        cache = tmp_path / "my cache" / "talkingflow"
        (cache / "tmpkilled").mkdir(parents=True)
        (cache / "lock").touch()
        code = (
            "import torch; from csrc.gated_conv import load_kernel; assert load_kernel() is not None\n"
            "for op in ('gated_conv', 'gated_conv_backward'):\n"
            "    for key in ('CUDA', 'Meta', 'AutogradCUDA', 'AutocastCUDA')[: 1 if 'back' in op else 4]:\n"
            "        has = torch._C._dispatch_has_computed_kernel_for_dispatch_key\n"
            "        assert has('talkingflow::' + op, key), (op, key)\n"
            "print('ok')"
        )
        env = os.environ | {
            "TALKINGFLOW_KERNEL": "cuda",
            "TORCH_EXTENSIONS_DIR": str(cache.parent),
            "TORCH_CUDA_ARCH_LIST": "8.0",
            "NVCC_APPEND_FLAGS": "-Xptxas -O0",  # quicker
        }

        def build(_):
            command = [sys.executable, "-c", code]
            return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)

        say("compiling csrc/ with nvcc: a minute")
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            runs = [*pool.map(build, range(2 if THOROUGH else 1)), build(2)]
        for run in runs:
            assert run.returncode == 0 and run.stdout == "ok\n", run.stderr
            assert run.stderr.count("kernel: csrc/gated_conv.cu") == 1
        assert "compiling" in runs[0].stderr and "compiling" not in runs[-1].stderr


# ---- The kernels as compiled code


@pytest.mark.slow  # a build of all kernels, run thread by thread
@needs_gxx
def test_address_and_undefined_behaviour_sanitizers_are_clean(on_cpus, tmp_path):
    say("compiling csrc/ with AddressSanitizer")
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program = compile_driver(tmp_path, flags=flags, versions=SANITIZED)
    code, output = run_driver(program, order="shuffle:1")
    assert code == 0 and "all right\n" in output and "ERROR" not in output, output[-3000:]
    code, output = run_driver(program, "past")  # a known fault: the sanitizer was awake
    assert code and "AddressSanitizer: heap-buffer-overflow" in output


@pytest.mark.slow  # the same again
@needs_gxx
def test_thread_sanitizer_is_clean(on_cpus, tmp_path):
    """Each CUDA thread is a TSan fiber; only __syncthreads() and the end of a launch order their accesses."""
    say("compiling csrc/ with ThreadSanitizer")
    program = compile_driver(tmp_path, flags=["-fsanitize=thread"], versions=SANITIZED)
    code, output = run_driver(program, tsan=True, order="ascending")
    assert code == 0 and output == "all right\n", output[-3000:]
    code, output = run_driver(program, "race", tsan=True)  # a known fault
    assert code and "ThreadSanitizer: data race" in output


@pytest.mark.slow  # runs the tensor cores' kernels
@needs_gxx
def test_a_layer_is_few_launches(driver):
    """Of the demo's layer, and of one with C = 256. Forward 1; backward: gate, dx, dw, one sum of all parts.
    Version 4 of the demo's layer: no gate."""
    _, output = run_driver(driver, "launches")
    apart = [f"version {version}: 1 + 4 1 + 4" for version in (1, 2, 3)]
    assert output.splitlines() == [*apart, "version 4: 1 + 3 1 + 4", "version 5: 1 + 4 1 + 4"]


@pytest.mark.slow  # compiles
@needs_gxx
def test_more_than_2_to_the_31_elements(driver):
    code, output = run_driver(driver, "big")
    if code == 2:
        pytest.skip(output.strip())
    assert code == 0 and output == "all right\n", output


def test_launches_use_the_stream_and_are_checked():
    text = (CSRC / "gated_conv.cu").read_text() + (CSRC / "hopper.cu").read_text()
    source = "\n".join(line.split("//")[0] for line in text.splitlines())
    # the LAUNCH macro, which passes the stream and returns cudaGetLastError's message
    assert source.count("<<<") == 1
    assert "(cudaStream_t)(stream)>>>" in source and "cudaGetLastError()" in source
    assert not re.search(r"cudaMalloc|cudaFree|Synchronize\(|cudaMemcpy|printf|asm volatile\(\"bar", source)


ARCHITECTURES = ("75", "80", "90a", "120")  # 86 and 89 run what is made for 80; 90 is always 90a
KERNELS = 90  # in gated_conv.cu and hopper.cu, each for its dtypes, tiles and widths


def resources(report):
    """What ptxas -v says: {(kernel, architecture): [stack, spill stores, spill loads (bytes), registers]}."""
    found, name = {}, None
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for 'sm_(\d+a?)", line):
            name = match.groups()
        if match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            found[name] = [int(v) for v in match.groups()]
        if match := re.search(r"Used (\d+) registers", line):
            found[name].append(int(match[1]))
    return found


# What a thread may use: four blocks of 128 threads on an SM leave 128 registers each, two leave 255.
WIDE = re.compile(r"v[45]|Id")  # tensor cores, float64


def too_much(kernel, used):
    """Any stack or spill, or more registers than the blocks that shall share an SM have."""
    return used[:3] != [0, 0, 0] or used[3] > (255 if WIDE.search(kernel[0]) else 128)


@pytest.mark.slow  # each architecture takes nvcc 20 s
def test_nvcc_compiles_for_every_architecture_without_spills(on_cpus, tmp_path):
    """0 bytes of stack and of spills in every kernel, for every architecture; without THOROUGH for one."""
    nvcc = toolkit() / "bin" / "nvcc"
    say("compiling csrc/gated_conv.cu with nvcc: up to two minutes")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    asked = ARCHITECTURES if THOROUGH else ("90a",)
    wanted = [a for a in asked if f"compute_{a.rstrip('a')}" in known]
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in wanted]
    options = ["-O3", "-std=c++17", "-t", "2", "-Xptxas", "-v", "-fatbin", "-o", tmp_path / "k.fatbin"]
    command = [nvcc, *options, *codes, CSRC / "gated_conv.cu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = resources(done.stderr)
    assert {a for _, a in report} == set(wanted) and len(report) == KERNELS * len(wanted)
    assert "(C75" not in done.stderr  # wgmma in its own time, registers moved as asked
    assert not {k: v for k, v in report.items() if too_much(k, v)}
    if set(wanted) < set(asked):
        pytest.skip(f"clean for {wanted}; this nvcc does not know {set(asked) - set(wanted)}")


@pytest.mark.slow  # nvcc
def test_a_v100_can_run_it_too(on_cpus, tmp_path):
    """CUDA 13 has no sm_70: its PTX for sm_75, named sm_70, goes through the assembler of CUDA 12."""
    found = [path for folder in sys.path if (path := Path(folder, "nvidia/cuda_nvcc/bin/ptxas")).exists()]
    if not found:
        pytest.skip("no ptxas of CUDA 12: pip install --no-deps nvidia-cuda-nvcc-cu12==12.9.86")
    command = [
        toolkit() / "bin" / "nvcc",
        "-O3",
        "-std=c++17",
        "-arch=compute_75",
        "--ptx",
        "-o",
        tmp_path / "k.ptx",
    ]
    subprocess.run([*command, CSRC / "gated_conv.cu"], check=True)
    text = (tmp_path / "k.ptx").read_text()
    text = re.sub(r"(?m)^\.target sm_75", ".target sm_70", re.sub(r"(?m)^\.version .*", ".version 8.8", text))
    (tmp_path / "k.ptx").write_text(text)
    command = [found[0], "-v", "-arch=sm_70", "-o", tmp_path / "k.cubin", tmp_path / "k.ptx"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = resources(done.stderr)
    assert done.returncode == 0 and len(report) == KERNELS, done.stderr
    assert not {k: v for k, v in report.items() if too_much(k, v)}


# ---- Only on a GPU


@needs_gpu
def test_runs_on_the_current_stream_and_device():
    kernel = load_kernel()
    x, w, b, c = inputs(
        8, 64, 64, 128, 3, dtype=torch.float32, device=f"cuda:{torch.cuda.device_count() - 1}"
    )
    stream = torch.cuda.Stream(x.device)
    stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the default stream would run ahead of this
        later = x * 2
        y = kernel(later, w, b, c, 2)
    stream.synchronize()
    assert_close(y, reference(x * 2, w, b, c, 2), 1e-5)


@needs_gpu
def test_is_captured_by_a_cuda_graph():
    kernel = load_kernel()
    x, w, b, c = (v.detach() for v in inputs(8, 64, 64, 128, 3, dtype=torch.float32, device="cuda"))
    kernel(x, w, b, c, 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernel(x, w, b, c, 2)
    x.mul_(2)
    graph.replay()
    assert_close(y, reference(x, w, b, c, 2), 1e-5)


@needs_gpu
def test_what_auto_chooses_compiles_without_graph_breaks(monkeypatch):
    """C = 68: on Hopper the rows are filled up inside the compiled program, too."""
    monkeypatch.delenv("TALKINGFLOW_KERNEL", raising=False)
    torch._dynamo.reset()
    compiled = torch.compile(talkingflow.gated_causal_conv, fullgraph=True)
    tensors = inputs(4, 68, 64, 40, 3, dtype=torch.bfloat16, device="cuda")
    compare(compiled, tensors, 2, TOLERANCE[torch.bfloat16], "compiled")


@needs_gpu
def test_a_captured_step_trains_as_the_eager_one_does(waves, tmp_path, monkeypatch):
    """200 steps without dropout: the same losses, to rounding. `waves` is the folder, clips and all."""

    def losses(name, capture):
        monkeypatch.setattr(talkingflow, "Captured", capture)
        config = talkingflow.Config(
            hidden=16, init="random", dropout=0.0, noise=0.0022, lr=3e-4, steps=200, eval_interval=20
        )
        (tmp_path / name).mkdir()
        trainer = talkingflow.Trainer(config, talkingflow.Clips(waves), tmp_path / name, "cuda")
        assert trainer.run() == 0
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        return trainer, [json.loads(line)["train_nll"] for line in lines]

    trainer, captured = losses("captured", Captured)
    _, eager = losses("eager", lambda function, device: function)
    assert trainer.advance.graph is not None
    assert captured[-1] < captured[0] - 0.1 and captured == pytest.approx(eager, abs=1e-4)


@needs_gpu
def test_a_run_resumed_on_a_gpu_draws_what_it_would_have_drawn(waves, tmp_path):
    """Windows and noise, and dropout inside the captured step: the generators end where they would have."""
    config = talkingflow.Config(hidden=16, steps_per_scale=1, noise=0.0022, lr=3e-4, steps=40)

    def run(name, stop, state=None):
        (tmp_path / name).mkdir(exist_ok=True)
        trainer = talkingflow.Trainer(config, talkingflow.Clips(waves), tmp_path / name, "cuda", state)
        while trainer.step < stop:
            trainer.train_step()
        trainer.log(1.0)
        return trainer, torch.load(tmp_path / name / "resume.pt")

    _, half = run("resumed", 20)
    (resumed, again), (whole, state) = run("resumed", 40, half), run("whole", 40)
    assert resumed.advance.graph is not None
    assert torch.equal(again["torch_rng"], state["torch_rng"])
    assert torch.equal(again["generator"], state["generator"])
    assert not torch.equal(half["torch_rng"], state["torch_rng"])
    for name, weight in whole.flow.state_dict().items():
        assert_close(resumed.flow.state_dict()[name].float(), weight.float(), 1e-3, name)


@needs_gpu
def test_a_captured_step_drops_out_anew_each_time_and_can_be_repeated():
    def calls():
        torch.manual_seed(3)
        step = Captured(lambda x: F.dropout(x, 0.5), "cuda")
        results = [step(torch.ones(64, device="cuda")) for _ in range(8)]
        assert step.graph is not None
        return torch.stack(results)

    first, second = calls(), calls()
    assert len(first.unique(dim=0)) == 8 and torch.equal(first, second)


@needs_gpu
@pytest.mark.parametrize("sigma", [0.0, 0.002])
def test_a_stream_of_captured_frames_is_the_whole_sequence(sigma):
    """And the flow on a GPU is the flow on a CPU: the same noise, drawn on the CPU, the same faces."""
    torch.manual_seed(0)
    flow = talkingflow.TalkingFlow(talkingflow.Config(hidden=16, steps_per_scale=1)).eval()
    flow.initialize(torch.rand(4, 60, 136), torch.randn(4, 60, 40))
    c = torch.randn(2, 30, 40)

    def faces(flow, c, blocks):
        stream = flow.stream(2, generator=torch.Generator().manual_seed(1), sigma=sigma)
        x = torch.cat([stream.push(block) for block in c.split(blocks, 1)], 1)
        assert 1 not in blocks or not x.is_cuda or stream.draw_frame.graph is not None
        return x.cpu()

    wanted = faces(flow, c, [30])
    flow, c = flow.to("cuda"), c.to("cuda")
    for blocks in ([30], [1] * 30, [1] * 6 + [5] + [1] * 7 + [12]):
        assert (faces(flow, c, blocks) - wanted).abs().max() < 1e-4 * wanted.abs().max()


FAULTY = """
#include <cstdio>
__global__ void faulty(int what, float* in, float* out) {
    __shared__ float s[64];
    s[threadIdx.x] = in[threadIdx.x];                    // 2: nobody wrote it
    if (what != 1) __syncthreads();                      // 1: a race
    if (what == 3 && threadIdx.x < 40) __syncthreads();  // 3: a barrier that others never reach
    out[threadIdx.x + (what == 0)] = s[63 - threadIdx.x];  // 0: one too far
}
int main(int, char** arguments) {
    const int what = arguments[1][0] - '0';
    float *in, *out;
    cudaMalloc(&in, 256), cudaMalloc(&out, 256);
    if (what != 2) cudaMemset(in, 0, 256);
    faulty<<<1, 64>>>(what, in, out);
    return cudaDeviceSynchronize() != cudaSuccess;
}
"""


TOOLS = ["memcheck", "racecheck", "initcheck", "synccheck"]


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory):
    """{tool: (its run over the kernels, its run over a known fault)}, all at once: each takes its time."""
    if not shutil.which("compute-sanitizer"):
        pytest.skip("no compute-sanitizer on PATH")
    assert load_kernel() is not None  # built here, not four times at once
    code = (
        "import sys, torch; from csrc.gated_conv import load_kernel; k = load_kernel()\n"
        "cases = [(1, 12), (2, 12), (3, 12), (4, 12), (4, 136), (5, 16)]\n"  # 136: the gate in its own pass
        # initcheck does not see what TMA writes, and takes all of it for unwritten
        "hopper = torch.cuda.get_device_capability() == (9, 0) and sys.argv[1] != 'initcheck'\n"
        "for version, C in cases if hopper else cases[:-1]:\n"
        "    dtype = torch.bfloat16 if version > 3 else torch.float32\n"
        "    H = 136 if version == 5 else 33\n"
        "    x, w = (torch.randn(s, device='cuda', dtype=dtype) for s in ((3, 90, C), (2 * H, C, 3)))\n"
        "    k(x.requires_grad_(), w.requires_grad_(), None, None, 2, version).sum().backward()\n"
        "torch.cuda.synchronize()"
    )
    faulty = tmp_path_factory.mktemp("faulty") / "faulty"
    faulty.with_suffix(".cu").write_text(FAULTY)
    nvcc = toolkit() / "bin" / "nvcc"
    subprocess.run([nvcc, "-arch=native", "-o", faulty, faulty.with_suffix(".cu")], check=True)
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TALKINGFLOW_KERNEL": "cuda"}

    def run(tool):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        programs = [sys.executable, "-c", code, tool], [faulty, str(TOOLS.index(tool))]
        options = dict(cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        return [subprocess.run([*command, *program], **options) for program in programs]

    with concurrent.futures.ThreadPoolExecutor(len(TOOLS)) as pool:
        return dict(zip(TOOLS, pool.map(run, TOOLS)))


@needs_gpu
@pytest.mark.parametrize("tool", TOOLS)
def test_compute_sanitizer_is_clean(tool, sanitized):
    kernels, faulty = sanitized[tool]
    clean = r"SUMMARY: 0 (errors|hazards)"
    assert kernels.returncode == 0 and re.search(clean, kernels.stdout), kernels.stdout[-3000:]
    # it was awake
    assert faulty.returncode != 0 and not re.search(clean, faulty.stdout), faulty.stdout[-3000:]


def test_the_reference_is_the_sum_and_the_padded_convolution():
    """The oracle itself, so that kernel and oracle cannot be wrong together."""
    x, w, b, c = (v.detach() for v in inputs(2, 3, 2, 6, 2))
    taps = torch.stack([F.pad(x, (0, 0, 3, 0))[:, :-3], x], 3)
    a = b + c + torch.einsum("oik,btik->bto", w, taps)
    assert_close(reference(x, w, b, c, 3), torch.tanh(a[..., :2]) * torch.sigmoid(a[..., 2:]), 1e-14)
    a = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), w, b, dilation=3).transpose(1, 2) + c
    assert_close(reference(x, w, b, c, 3), torch.tanh(a[..., :2]) * torch.sigmoid(a[..., 2:]), 1e-14)


@pytest.mark.slow  # a process that imports PyTorch
def test_a_bare_machine_can_run_these_tests_and_the_benchmark():
    """With PyTorch, nvcc, numpy, ninja and pytest, but neither librosa nor soundfile."""
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "for name in 'librosa soundfile matplotlib scipy sklearn av mediapipe PIL soxr cv2'.split():\n"
        "    sys.modules[name] = None\n"
        "import pytest, benchmark\n"
        "sys.exit(pytest.main(['-q', '--collect-only', '-p', 'no:cacheprovider', 'tests/test_kernel.py']))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "tests/test_kernel.py" in run.stdout, run.stdout + run.stderr


class Recorder:
    """A torch.cuda.CUDAGraph, Stream or Event of a machine without a GPU: a graph calls nothing when it is
    replayed, and between two events pass 0.3 ms."""

    replays = 0

    def __init__(self, **options):
        pass

    def replay(self):
        Recorder.replays += 1

    def elapsed_time(self, other):
        return 0.3

    record = synchronize = wait_stream = lambda self, *_: None


@pytest.fixture
def pretended_gpu(monkeypatch):
    """As much of torch.cuda as benchmark.py uses; the compiler gives back what it gets."""
    Recorder.replays = 0
    for name in ("CUDAGraph", "Stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, Recorder)
    for name in ("graph", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Recorder)
    # what Adam would ask the driver
    for name in ("_cuda_graph_capture_health_check", "_accelerator_graph_capture_health_check"):
        monkeypatch.setattr(torch.optim.Optimizer, name, lambda _: None, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    properties = types.SimpleNamespace(L2_cache_size=5000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)


def test_floors_are_counted_from_flops_and_bytes():
    import benchmark

    peaks, shape = benchmark.GPUS["H100"], benchmark.SHAPES["paper"]
    flop = 2 * 2 * 128 * 80 * 256 * 256 * 3  # a multiply and an add each
    assert benchmark.work(*shape[:5], 2)[0] == flop
    forward, training = benchmark.floors_us(shape, torch.bfloat16, peaks)
    assert forward == pytest.approx(32.2e6 / 3.35e6, rel=0.01)  # bound by memory
    gate = 5 * 128 * 80 * 256 * 2 / 3.35e6
    assert training == pytest.approx(forward + gate + 2 * flop / 989e6, rel=1e-6)  # dx and dw by arithmetic


def test_a_replayed_graph_takes_its_inputs_in_turn(pretended_gpu):
    import benchmark

    called = []
    assert benchmark.replay_us(called.append, calls=3) == pytest.approx(300 / 3)
    assert called == [0, 0, 0] + [0, 1, 2]  # to set up; recorded
    assert Recorder.replays == 5 + 15  # to warm up; timed
    assert [benchmark.in_turn(size) for size in (10_000, 9_999, 1000, 667, 666)] == [2, 3, 11, 16, 1]


@pytest.fixture
def tf32_as_before():  # monkeypatch cannot put back what these modules compute when asked for
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    yield
    for backend, allowed in zip(backends, before):
        backend.allow_tf32 = allowed


@pytest.mark.slow  # every rung, emulated
@pytest.mark.usefixtures("tf32_as_before")
def test_the_benchmark_of_a_gpu_runs_to_its_last_line(pretended_gpu, emulated, monkeypatch, capsys):
    """Every row on small shapes, on the CPU: what is left to fail on a GPU is the GPU."""
    import benchmark

    small = talkingflow.Config(dim=16, cond_dim=5, hidden=8, steps_per_scale=1, batch_size=2, seq_len=9)
    monkeypatch.setattr(talkingflow.Config, "preset", staticmethod(lambda name: small))
    monkeypatch.setattr(benchmark, "fused_gated_conv", emulated)
    monkeypatch.setattr(benchmark, "load_kernel", lambda: emulated)
    monkeypatch.setattr(benchmark, "ceilings", functools.partial(benchmark.ceilings, side=32, copied=2**20))
    shapes = {"paper": (2, 20, 8, 8, 3, 4), "first": (2, 9, 4, 8, 2, 1), "demo": (1, 7, 8, 8, 2, 4)}
    shapes["late taps"] = (1, 5, 4, 8, 40, 9)  # the tensor cores' tiles do not fit
    monkeypatch.setattr(benchmark, "SHAPES", shapes)
    monkeypatch.setenv("TALKINGFLOW_KERNEL", "torch")  # and back after the test
    monkeypatch.setattr(sys, "argv", ["benchmark.py"])
    monkeypatch.setattr(benchmark, "gpu_part", functools.partial(benchmark.gpu_part, "cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(benchmark, "os", types.SimpleNamespace(environ=os.environ))
        benchmark.main()
    said = capsys.readouterr()
    assert re.search(r"^took \d+ s$", said.err, re.M)
    title, table = said.out.split("\n\n")
    assert title.startswith("NVIDIA H100 80GB HBM3, PyTorch ")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert all(len(cells) == 7 for cells in rows)
    failed = [cells for cells in rows if "Error" in cells[1]]
    assert all("version" in cells[1] for cells in failed), failed
    late = ["3 registers", "4 tensor cores", "5 Hopper"]  # of the late taps
    assert [cells[0] for cells in failed] == ["5 Hopper", *late]  # first: its rows are 8 bytes
    layer = ["eager, conv1d", "eager, one product", "compiled, conv1d", "compiled, one product"]
    layer += ["1 naive", "2 tile", "3 registers", "4 tensor cores", "5 Hopper", "the one taken"]
    names = [cells[0] for cells in rows]
    start = names.index("**paper, bfloat16**: B 2, T 20, C 8, H 8, K 3, d 4; 5 inputs in turn, cold")
    assert names[start + 1 : start + 12] == ["floor by data sheet", *layer]
    assert rows[start + 2][1] == "60.0" and rows[start + 2][5] == "60.0"  # 300 us for five
    ends = ["step, float32, PyTorch", "step, bfloat16, PyTorch", "step, bfloat16, fused"]
    steps = [f"{p} {end}{how}" for p in ("demo", "paper") for end in ends for how in ("", ", one CUDA graph")]
    calls = ["250 frames, 1 face", "250 frames, 64 faces", "one streamed frame"]
    assert names[-19:] == [names[-19], *steps, *(f"{p}, {call}" for p in ("demo", "paper") for call in calls)]
    assert {cells[1] for cells in rows[-18:]} == {"0.30 ms"}


def test_a_benchmark_without_a_gpu_prints_floors(monkeypatch, capsys):
    import benchmark

    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--arch", "80"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = [("forward_v4", "I13__nv_bfloat16Li5E", 200, 0, 0, {}), ("dx_v1", "IfE", 30, 0, 0, {})]
    monkeypatch.setattr(benchmark, "compile_report", lambda arch: report)
    benchmark.main()
    printed = capsys.readouterr().out
    assert "| paper | 8.05 | 32.2 |" in printed
    assert (
        "| forward_v4 5 | bfloat16 | 200 | 0 | 0 | - |" in printed and "| dx_v1 | float32 | 30 |" in printed
    )
