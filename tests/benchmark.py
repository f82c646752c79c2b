"""How fast is it? On a GPU: the layer, a training step, sampling and streaming, as PyTorch runs them and by
every rung of csrc/, timed by replaying CUDA graphs, so that launches do not count. Without a GPU: what the
compiler says of the kernels (registers, spills, instructions). Prints one Markdown table to paste.

    python tests/benchmark.py [--arch 80,90a]
    python tests/benchmark_cpu.py               the CPU part: one core, beside a textbook form of the flow
"""

import argparse
import collections
import functools
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import talkingflow
from csrc.gated_conv import fused_gated_conv, load_kernel

SHAPES = {  # name: B, T, C, H, K, dilation
    "paper": (128, 80, 256, 256, 3, 4),
    "paper, first layer": (128, 80, 68, 256, 3, 1),
    "long clips": (128, 256, 128, 128, 3, 8),
    "demo": (8, 74, 64, 64, 2, 4),
}
# TFLOP/s of float32 products (TF32 where it exists), of 16-bit ones, TB/s: data sheets, SXM, dense.
GPUS = {"V100": (15.7, 125, 0.9), "A100": (156, 312, 2.04), "H100": (495, 989, 3.35), "H200": (495, 989, 4.8)}
RUNGS = {1: "naive", 2: "tile", 3: "registers", 4: "tensor cores", 5: "Hopper", 0: "the one taken"}


# ---- The roofline, and what the compiler says: no GPU needed


def work(B, T, C, H, K, size):
    """(forward FLOP, bytes that must cross DRAM): x, weight, bias, cond read; y, pre-activation written."""
    return 4 * B * T * H * C * K, size * (B * T * C + 2 * H * K * C + 2 * H + B * T * 5 * H)


def floors_us(shape, dtype, peaks):
    """The least microseconds of a layer on a GPU of these peaks, every byte once: forward; and training,
    which is forward, the gate's gradient (a, dy in, da out), dx and dw (da and x or w in) one after the
    other."""
    B, T, C, H, K, _ = shape
    size = dtype.itemsize
    flop, traffic = work(B, T, C, H, K, size)
    product = size * (B * T * (2 * H + C) + 2 * H * K * C)
    kernels = [(flop, traffic), (0, size * 5 * B * T * H), (flop, product), (flop, product)]
    least = [max(flop / peaks[size == 2] / 1e6, moved / peaks[2] / 1e6) for flop, moved in kernels]
    return least[0], sum(least)


def roofline_table():
    print("Floors of a layer, us: forward / training in 16 bits (data-sheet peaks, every byte once)\n")
    print(f"| layer | GFLOP | MB | {' | '.join(GPUS)} |\n|---|---|---|{'---|' * len(GPUS)}")
    for name, shape in SHAPES.items():
        flop, moved = work(*shape[:5], 2)
        floors = (
            "{:.1f} / {:.1f}".format(*floors_us(shape, torch.bfloat16, peaks)) for peaks in GPUS.values()
        )
        print(f"| {name} | {flop / 1e9:.2f} | {moved / 1e6:.1f} | {' | '.join(floors)} |")


def find_tool(name):
    wheels = (found for path in sys.path for found in Path(path or ".").glob(f"nvidia/**/bin/{name}"))
    return shutil.which(name) or next(wheels, None)


def instructions(cubin, disassembler):
    """{kernel: Counter of SASS opcodes}."""
    command = [disassembler, "-c", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    mixes, kernel = {}, None
    for line in text.splitlines():
        opcode = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)", line)
        if found := re.match(r"\s*\.text\.(\w+):", line):
            kernel = mixes.setdefault(found[1], collections.Counter())
        elif kernel is not None and opcode:
            kernel[opcode[1]] += 1
    return mixes


def compile_report(arch):
    """[(kernel, template arguments, registers, stack, spills, instructions)] of csrc/ for one arch."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "k.cubin"
        options = [
            "-O3",
            "-std=c++17",
            f"-gencode=arch=compute_{arch},code=sm_{arch}",
            "-cubin",
            "-Xptxas",
            "-v",
            "-o",
            cubin,
        ]
        command = [nvcc, *options, ROOT / "csrc" / "gated_conv.cu"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        disassembler = find_tool("nvdisasm")
        mixes = instructions(cubin, disassembler) if disassembler else {}
    rows = []
    for block in report.split("Compiling entry function '")[1:]:
        mangled = block.split("'")[0]
        length, rest = re.match(r"_Z(\d+)(\w+)", mangled).groups()  # C++: length, name, I arguments E
        name, arguments = rest[: int(length)], rest[int(length) :].split("EEv")[0]
        stack, spill = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill", block).groups()
        registers = int(re.search(r"Used (\d+) registers", block)[1])
        rows.append((name, arguments, registers, int(stack), int(spill), mixes.get(mangled, {})))
    return rows


def static_table(arch):
    """One row a kernel, of float32 and bfloat16."""
    try:
        rows = compile_report(arch)
    except (OSError, subprocess.CalledProcessError) as error:
        return print(f"\nsm_{arch}: no static table: {getattr(error, 'stderr', None) or error}")
    print(f"\nsm_{arch}\n\n| kernel | of | registers | stack | spilled | instructions |")
    print("|---|---|---|---|---|---|")
    for name, arguments, registers, stack, spill, mix in sorted(rows, key=lambda row: row[:2]):
        kind = {"If": "float32", "I1": "bfloat16"}.get(arguments[:2])
        if kind is None or (name.endswith("_v5") and not arch.endswith("90a")):
            continue  # version 5 is empty elsewhere
        numbers = "".join(f" {v}" for v in re.findall(r"Li(\d+)", arguments))
        top = ", ".join(f"{n} {op}" for op, n in mix.most_common(5)) if mix else "-"
        print(f"| {name}{numbers} | {kind} | {registers} | {stack} | {spill} | {top} |")


# ---- Clocks


def launched_us(function, seconds=0.2):
    """Median microseconds of a call between two events: launches count where they are slower than the work.
    The first calls set up what must not count: compilers, workspaces, a CUDA graph of the product's own."""
    for _ in range(5):
        function()
    times = []
    while len(times) < 3 or (len(times) < 15 and sum(times) < seconds * 1e6):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3)
    return sorted(times)[len(times) // 2]


def replay_us(function, calls=1):
    """The same for one of function(0), ..., function(calls - 1) in a replayed CUDA graph: no launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function(0)  # sets up what must not be captured
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            function(i)
    return launched_us(graph.replay) / calls


def in_turn(bytes_of_one, most=16):
    """How many sets of inputs take turns in a graph: so many that none is still in the second-level cache
    when it comes again ("cold"), or 1 where that takes more than `most`. A layer that small finds its
    inputs "warm" in the flow too."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    sets = 1 + math.ceil(2 * cache / bytes_of_one)
    return sets if sets <= most else 1


# ---- The table: what | forward | of its floor | TFLOP/s | GB/s | training | of its floor


def row(label, *cells):
    cells = [cell if isinstance(cell, str) else f"{cell:.1f}" for cell in cells] + [""] * (6 - len(cells))
    print(f"| {label} | {' | '.join(cells)} |", flush=True)


def ms(us):
    return f"{us / 1e3:.2f} ms"


def attempt(label, measure):
    """A row of what measure() returns; or why there is none (a rung that cannot run this, a compiler that
    is not there, no memory): then the next row."""
    try:
        row(label, *measure())
    except Exception as error:
        row(label, f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}".replace("|", "/")[:90])


def ceilings(device, side=8192, copied=2**30):
    """What this GPU reaches where nothing but arithmetic, memory or a launch is in the way."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source, target = (torch.zeros(copied, dtype=torch.uint8, device=device) for _ in range(2))
    out, one = torch.empty_like(a), torch.zeros(1, device=device)
    attempt("empty kernel", lambda: [replay_us(lambda i: one.zero_(), 100)])

    def product():
        us = replay_us(lambda i: torch.mm(a, b, out=out), 3)
        return us, "", 2 * side**3 / us / 1e6

    def copy():
        us = replay_us(lambda i: target.copy_(source), 3)
        return us, "", "", 2 * copied / us / 1e3

    attempt(f"{side}^3 product, bfloat16", product)
    attempt(f"copy of {copied >> 20} MB", copy)


def conv1d_form(x, weight, bias, cond, dilation):
    """The operator as it used to be, (B, C, T): what cuDNN's convolution makes of it."""
    a = F.conv1d(F.pad(x, ((weight.shape[2] - 1) * dilation, 0)), weight, bias, dilation=dilation) + cond
    tanh, gate = a.chunk(2, 1)
    return torch.tanh(tanh) * torch.sigmoid(gate)


def candidates(name, dtype, kernel):
    """{label: (function, whether it wants (B, C, T))}."""
    product = talkingflow.gated_causal_conv_reference
    found = {"eager, conv1d": (conv1d_form, True), "eager, one product": (product, False)}
    both = name in ("paper", "demo")  # the others: what is worth the time of a borrowed GPU
    if both and dtype.itemsize == 2:
        found["compiled, conv1d"] = (torch.compile(conv1d_form, dynamic=False), True)
    found["compiled, one product"] = (torch.compile(product, dynamic=False), False)
    for version, idea in RUNGS.items() if kernel else ():
        if (version < 4 or dtype.itemsize == 2) and (version not in (1, 2) or both):
            label = f"{version} {idea}" if version else idea
            found[label] = (functools.partial(fused_gated_conv, version=version), False)
    return found


def layer_inputs(shape, dtype, device, channels_first):
    """x, weight, bias, cond as leaves, in the form's own layout."""
    B, T, C, H, K, _ = shape
    x, weight, bias, cond = (
        torch.randn(size, device=device) for size in ((B, T, C), (2 * H, K, C), (2 * H,), (B, T, 2 * H))
    )
    weight = (weight * (C * K) ** -0.5).transpose(1, 2)
    if channels_first:
        x, weight, cond = (
            x.transpose(1, 2).contiguous(),
            weight.contiguous(),
            cond.transpose(1, 2).contiguous(),
        )
    return [v.to(dtype).requires_grad_() for v in (x, weight, bias, cond)]


def layer_rows(name, shape, dtype, device, peaks, kernel):
    """Every form and rung of one layer: forward, and training, which is forward and all gradients."""
    B, T, C, H, K, d = shape
    flop, moved = work(*shape[:5], dtype.itemsize)
    floor, floor_training = floors_us(shape, dtype, peaks)
    turns = in_turn(dtype.itemsize * B * T * (C + 3 * H))
    how = f"{turns} inputs in turn, cold" if turns > 1 else "warm"
    row(f"**{name}, {str(dtype)[6:]}**: B {B}, T {T}, C {C}, H {H}, K {K}, d {d}; {how}")
    row("floor by data sheet", floor, "", flop / floor / 1e6, moved / floor / 1e3, floor_training)

    def measure(function, channels_first):
        sets = [layer_inputs(shape, dtype, device, channels_first) for _ in range(turns)]
        dys = [torch.ones_like(function(*tensors, d)) for tensors in sets]

        def train(i):
            return torch.autograd.grad(function(*sets[i % turns], d), sets[i % turns], dys[i % turns])

        calls = turns if turns > 1 else 30
        one = replay_us(lambda i: function(*sets[i % turns], d), calls)
        both = replay_us(train, calls)
        rates = flop / one / 1e6, moved / one / 1e3
        return one, f"{floor / one:.0%}", *rates, both, f"{floor_training / both:.0%}"

    torch._dynamo.reset()  # or the compiler would make one program for all shapes
    for label, form in candidates(name, dtype, kernel).items():
        attempt(label, functools.partial(measure, *form))


def make_step(preset, precision, device):
    """The trainer's own `update` on random windows, as a function of nothing."""
    config = talkingflow.Config.preset(preset)
    torch.manual_seed(0)
    flow = talkingflow.TalkingFlow(config)
    B, T = config.batch_size, config.seq_len
    x, c = torch.rand(B, T, config.dim), torch.randn(B, T, config.cond_dim)
    flow.initialize(x[:8], c[:8])  # on the CPU
    flow, x, c = flow.to(device), x.to(device), c.to(device)
    for net in flow.modules():
        if isinstance(net, talkingflow.ConditionTCN):
            net.precision = precision
    trainer = types.SimpleNamespace(flow=flow, config=config, model=talkingflow.Objective(flow))
    trainer.optimizer = talkingflow.build_optimizer(flow, config)
    trainer.fade, trainer.skipped = torch.zeros(2, device=device)
    return functools.partial(talkingflow.Trainer.update, trainer, x, c)


def step_rows(preset, device, kernel):
    """A whole training step: PyTorch's operators and the fused ones, launch by launch and as one graph."""
    for precision, choice in ((None, "torch"), (torch.bfloat16, "torch"), (torch.bfloat16, "cuda")):
        if choice == "cuda" and not kernel:
            continue
        os.environ["TALKINGFLOW_KERNEL"] = choice
        label = f"{preset} step, {str(precision)[6:] if precision else 'float32'}"
        label += ", fused" if choice == "cuda" else ", PyTorch"
        step = functools.cache(functools.partial(make_step, preset, precision, device))
        attempt(label, lambda: [ms(launched_us(step()))])
        attempt(label + ", one CUDA graph", lambda: [ms(replay_us(lambda i: step()()))])
        step.cache_clear()
        torch.cuda.empty_cache()


def sample_rows(preset, device, frames=250):
    """Sampling and one streamed frame as a user calls them, launches and all."""
    config = talkingflow.Config.preset(preset)
    flow = talkingflow.TalkingFlow(config).to(device).eval()
    c = torch.randn(64, frames, config.cond_dim, device=device)
    stream = flow.stream()
    for label, call in {
        f"{frames} frames, 1 face": lambda: flow.sample(c[:1]),
        f"{frames} frames, 64 faces": lambda: flow.sample(c),
        "one streamed frame": lambda: stream.push(c[:1, :1]),
    }.items():
        attempt(f"{preset}, {label}", lambda: [ms(launched_us(call))])


# ---- The parts


def static_part(arch):
    print("No GPU is visible: nothing is timed. What the data sheets and the compiler say instead:\n")
    roofline_table()
    for one in arch.split(","):
        static_table(one)


def gpu_part(device="cuda"):
    started = time.monotonic()
    os.environ["TALKINGFLOW_KERNEL"] = "cuda"
    kernel = load_kernel()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    name = torch.cuda.get_device_name()
    peaks = next((peaks for gpu, peaks in GPUS.items() if gpu in name), GPUS["H100"])
    print(f"{name}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}, TF32 allowed. Medians, in us")
    print("unless said; layers by replayed graphs. Training: forward and all gradients. Rates: of forward.\n")
    print("| | forward | of its floor | TFLOP/s | GB/s | training | of its floor |\n" + "|---" * 7 + "|")
    ceilings(device)
    for shape in SHAPES:
        layer_rows(shape, SHAPES[shape], torch.bfloat16, device, peaks, kernel)
    for shape in ("paper", "demo"):
        layer_rows(shape, SHAPES[shape], torch.float32, device, peaks, kernel)
    row("**the flow**: a training step, sampling, streaming")
    for preset in ("demo", "paper"):
        step_rows(preset, device, kernel)
    os.environ["TALKINGFLOW_KERNEL"] = "auto"
    for preset in ("demo", "paper"):
        sample_rows(preset, device)
    print(f"\ntook {time.monotonic() - started:.0f} s", file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="80,90a", help="for the static table, e.g. 75,80,86,89,90a,100,120")
    args = parser.parse_args()
    if torch.cuda.is_available():
        gpu_part()
    else:
        static_part(args.arch)


if __name__ == "__main__":
    main()
