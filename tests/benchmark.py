"""How fast is it? On a GPU: the layer, a training step, sampling and streaming, as PyTorch runs them and by
every rung of csrc/, timed by replaying CUDA graphs, so that launches do not count. Without a GPU: what the
compiler says of the kernels (registers, spills, instructions). Prints Markdown tables to paste.

    python tests/benchmark.py [--arch 80,90]
    python tests/benchmark_cpu.py               the CPU part: one core, beside a textbook form of the flow
"""

import argparse
import collections
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
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
    "one streamed frame": (1, 17, 256, 256, 3, 8),
}
# TFLOP/s of float32 products (TF32 where it exists), of 16-bit ones, TB/s: data sheets, SXM, dense.
GPUS = {"V100": (15.7, 125, 0.9), "A100": (156, 312, 2.04), "H100": (495, 989, 3.35), "H200": (495, 989, 4.8)}


# ---- The roofline, and what the compiler says: no GPU needed


def work(B, T, C, H, K, size):
    """(forward FLOP, bytes that must cross DRAM): x, weight, bias, cond read; y, pre-activation written."""
    return 4 * B * T * H * C * K, size * (B * T * C + 2 * H * K * C + 2 * H + B * T * 5 * H)


def floor_us(shape, dtype, peaks):
    """The least microseconds of a forward layer on a GPU of these peaks."""
    size = torch.finfo(dtype).bits // 8
    flop, traffic = work(*shape[:5], size)
    return max(flop / peaks[size == 2] / 1e6, traffic / peaks[2] / 1e6)


def roofline_table():
    print("Floors of one forward layer, us (data-sheet peaks, every byte once): float32 / 16-bit\n")
    print(f"| layer | GFLOP | MB 16-bit | {' | '.join(GPUS)} |\n|---|---|---|{'---|' * len(GPUS)}")
    for name, shape in SHAPES.items():
        flop, size = work(*shape[:5], 2)
        floors = (
            f"{floor_us(shape, torch.float32, g):.1f} / {floor_us(shape, torch.bfloat16, g):.1f}"
            for g in GPUS.values()
        )
        print(f"| {name} | {flop / 1e9:.2f} | {size / 1e6:.1f} | {' | '.join(floors)} |")


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
        options = ["-O3", "-std=c++17", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", "-o", cubin]
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
        if kind is None:
            continue
        numbers = "".join(f" {v}" for v in re.findall(r"Li(\d+)", arguments))
        top = ", ".join(f"{n} {op}" for op, n in mix.most_common(5)) if mix else "-"
        print(f"| {name}{numbers} | {kind} | {registers} | {stack} | {spill} | {top} |")


# ---- Clocks: microseconds of one call


def replay_us(function, calls=10, repeats=15):
    """Median over replays of a CUDA graph of `calls` calls: what the GPU takes, without launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()  # sets up what must not be captured: compilers, workspaces
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return launched_us(graph.replay, repeats) / calls


def launched_us(function, repeats=15):
    """Median between two events around one call: launches count where they are slower than the work."""
    times = []
    for _ in range(repeats + 3):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3)
    return sorted(times[3:])[repeats // 2]


# ---- The layer


def conv1d_form(x, weight, bias, cond, dilation):
    """The operator as it used to be, (B, C, T): what cuDNN's convolution makes of it."""
    a = F.conv1d(F.pad(x, ((weight.shape[2] - 1) * dilation, 0)), weight, bias, dilation=dilation) + cond
    tanh, gate = a.chunk(2, 1)
    return torch.tanh(tanh) * torch.sigmoid(gate)


def candidates(dtype, fused):
    """{name: (function, whether it wants (B, C, T))}. fused(version): that rung, or None."""
    product = talkingflow.gated_causal_conv_reference
    found = {"eager, conv1d": (conv1d_form, True), "eager, one product": (product, False)}
    if torch.cuda.is_available():
        found["compiled, conv1d"] = (torch.compile(conv1d_form), True)
        found["compiled, one product"] = (torch.compile(product), False)
    rungs = {1: "naive", 2: "tile", 3: "registers"} | ({4: "tensor cores"} if dtype.itemsize == 2 else {})
    return found | {f"{v} {name}": (fused(v), False) for v, name in rungs.items() if fused}


def layer_inputs(shape, dtype, device, channels_first):
    """x, weight, bias, cond as leaves, in the form's own layout."""
    B, T, C, H, K, _ = shape
    made = [torch.randn(size) for size in ((B, T, C), (2 * H, K, C), (2 * H,), (B, T, 2 * H))]
    made[1] = (made[1] * (C * K) ** -0.5).transpose(1, 2)
    if channels_first:
        made = [
            made[0].transpose(1, 2).contiguous(),
            made[1].contiguous(),
            made[2],
            made[3].transpose(1, 2).contiguous(),
        ]
    return [v.to(device, dtype).requires_grad_() for v in made]


def layer_times(function, tensors, dilation, clock):
    """Microseconds of forward, and of forward and backward with all gradients."""
    dy = torch.ones_like(function(*tensors, dilation))
    forward = functools.partial(function, *tensors, dilation)
    return clock(forward), clock(lambda: torch.autograd.grad(forward(), tensors, dy))


def layer_table(shapes, dtype, device, clock, peaks, fused):
    """One table a shape: times, what they make of the machine, and the share of the forward floor."""
    for name, shape in shapes.items():
        flop, traffic = work(*shape[:5], dtype.itemsize)
        floor = floor_us(shape, dtype, peaks)
        B, T, C, H, K, d = shape
        print(f"\n{name}, {str(dtype)[6:]}: B {B}, T {T}, C {C}, H {H}, K {K}, d {d}; floor {floor:.1f} us\n")
        print("| | forward us | of the floor | TFLOP/s | GB/s | training us |\n|---|---|---|---|---|---|")
        for label, (function, channels_first) in candidates(dtype, fused).items():
            tensors = layer_inputs(shape, dtype, device, channels_first)
            try:
                one, both = layer_times(function, tensors, d, clock)
            except RuntimeError as error:  # a rung that cannot run this, a compiler that is not there
                print(f"| {label} | {str(error).splitlines()[0][:80]} |")
                continue
            rates = f"{flop / one / 1e6:.1f} | {traffic / one / 1e3:.0f}"
            print(f"| {label} | {one:.1f} | {floor / one:.0%} | {rates} | {both:.1f} |", flush=True)


# ---- The flow


def make_step(preset, precision, device):
    """The trainer's own `update` on random windows: (function, x, c)."""
    config = talkingflow.Config.preset(preset)
    torch.manual_seed(0)
    flow = talkingflow.TalkingFlow(config)
    B, T = config.batch_size, config.seq_len
    x, c = torch.rand(B, T, config.dim), torch.randn(B, T, config.cond_dim)
    flow.initialize(x, c)
    flow, x, c = flow.to(device), x.to(device), c.to(device)
    for net in flow.modules():
        if isinstance(net, talkingflow.ConditionTCN):
            net.precision = precision
    trainer = types.SimpleNamespace(flow=flow, config=config, model=talkingflow.Objective(flow))
    trainer.optimizer = talkingflow.build_optimizer(flow, config)
    trainer.fade, trainer.skipped = torch.zeros(2, device=device)
    return functools.partial(talkingflow.Trainer.update, trainer), x, c


def step_table(presets, device, clock, kernel):
    """A whole training step, captured as one graph: PyTorch's operators, and with the fused ones."""
    print("\n| training step, ms | float32 | bfloat16 networks | bfloat16, fused |\n|---|---|---|---|")
    for preset in presets:
        cells = []
        for precision, choice in ((None, "torch"), (torch.bfloat16, "torch"), (torch.bfloat16, "cuda")):
            if choice == "cuda" and not kernel:
                cells.append("-")
                continue
            os.environ["TALKINGFLOW_KERNEL"] = choice
            function, x, c = make_step(preset, precision, device)
            cells.append(f"{clock(lambda: function(x, c)) / 1e3:.2f}")
        print(f"| {preset} | {' | '.join(cells)} |", flush=True)


def sample_table(presets, device, clock, frames=250):
    """Sampling 250 frames and one streamed frame as a user calls them, launches and all."""
    print(f"\n| ms | {frames} frames, 1 face | 64 faces | one streamed frame |\n|---|---|---|---|")
    for preset in presets:
        config = talkingflow.Config.preset(preset)
        flow = talkingflow.TalkingFlow(config).to(device).eval()
        c = torch.randn(64, frames, config.cond_dim, device=device)
        stream = flow.stream()
        with torch.no_grad():
            times = [clock(lambda n=n: flow.sample(c[:n])) for n in (1, 64)]
            times.append(clock(lambda: stream.push(c[:1, :1])))
        print(f"| {preset} | {' | '.join(f'{t / 1e3:.2f}' for t in times)} |", flush=True)


# ---- The parts


def static_part(arch):
    roofline_table()
    for one in arch.split(","):
        static_table(one)


def gpu_part():
    os.environ["TALKINGFLOW_KERNEL"] = "cuda"
    kernel = load_kernel()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    name = torch.cuda.get_device_name()
    peaks = next((peaks for gpu, peaks in GPUS.items() if gpu in name), GPUS["H100"])
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}; medians of replayed graphs, TF32")

    def fused(version):
        return functools.partial(fused_gated_conv, version=version)

    for dtype in (torch.bfloat16, torch.float32):
        shapes = SHAPES if dtype == torch.bfloat16 else {k: SHAPES[k] for k in ("paper", "demo")}
        layer_table(shapes, dtype, "cuda", replay_us, peaks, fused if kernel else None)
    step_table(("demo", "paper"), "cuda", functools.partial(replay_us, calls=1), kernel)
    os.environ["TALKINGFLOW_KERNEL"] = "auto"
    sample_table(("demo", "paper"), "cuda", launched_us)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="80,90", help="for the static table, e.g. 75,80,86,89,90,100,120")
    args = parser.parse_args()
    if torch.cuda.is_available():
        gpu_part()
    else:
        print("No GPU is visible: nothing is timed. What the data sheets and the compiler say instead:\n")
        static_part(args.arch)


if __name__ == "__main__":
    main()
