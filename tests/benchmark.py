"""How fast are the kernels? On a GPU: every version against eager and compiled PyTorch, with GB/s and FLOP/s beside
the roofline. Without one: what the compiler says (registers, spills, shared memory, occupancy, instructions).

    python tests/benchmark.py [--dtype float32|bfloat16] [--arch 80,90]
"""

import argparse
import collections
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import talkingflow
from csrc import gated_conv
from csrc.gated_conv import load_kernel

#          name               B    C_in  H    T    K  d
SHAPES = [
    ("demo layer", 32, 64, 64, 64, 2, 4),
    ("paper, first layer", 128, 68, 256, 64, 3, 1),
    ("paper layer", 128, 256, 256, 64, 3, 4),
]
SHAPES += [("long clips", 128, 128, 128, 256, 3, 8), ("one live frame", 1, 256, 256, 17, 3, 8)]
# Peak TFLOP/s of float32 and of dense 16-bit tensor cores, and TB/s: NVIDIA's data sheets, SXM.
GPUS = {"V100": (15.7, 125, 0.9), "A100": (19.5, 312, 2.04), "H100": (66.9, 989, 3.35)}
# threads, blocks and KB of shared memory an SM holds (CUDA programming guide, table of compute capabilities)
SM = {
    "75": (1024, 16, 64),
    "80": (2048, 32, 164),
    "86": (1536, 16, 100),
    "89": (1536, 24, 100),
    "90": (2048, 32, 228),
}
SM |= {"100": (2048, 32, 228), "120": (1536, 24, 100)}


def work(B, C, H, T, K, size):
    """(forward FLOP, bytes that must cross DRAM): x, weight, bias, cond read; y and the pre-activation written."""
    return 4 * B * H * T * C * K, size * (B * C * T + 2 * H * C * K + 2 * H + B * T * (2 * H + H + 2 * H))


def roofline_table():
    print("Roofline of one forward layer (a model: data-sheet peaks, every byte once)\n")
    print(
        f"{'layer':20} {'GFLOP':>6} {'MB':>6} {'FLOP/B':>6}  "
        + "  ".join(f"{g + ' fp32 / 16-bit':>18}" for g in GPUS)
        + "  us"
    )
    for name, B, C, H, T, K, _ in SHAPES:
        flop, size4 = work(B, C, H, T, K, 4)
        size2 = work(B, C, H, T, K, 2)[1]
        times = [
            f"{max(flop / f32 / 1e6, size4 / tb / 1e6):8.1f} / {max(flop / f16 / 1e6, size2 / tb / 1e6):7.1f}"
            for f32, f16, tb in GPUS.values()
        ]
        print(
            f"{name:20} {flop / 1e9:6.2f} {size4 / 1e6:6.1f} {flop / size4:6.0f}  "
            + "  ".join(f"{t:>18}" for t in times)
        )


def find_tool(name):
    wheels = (found for path in sys.path for found in Path(path or ".").glob(f"nvidia/**/bin/{name}"))
    return shutil.which(name) or next(wheels, None)


def instructions(cubin, disassembler):
    """{kernel: Counter of SASS opcodes}."""
    text = subprocess.run([disassembler, "-c", cubin], capture_output=True, text=True, check=False).stdout
    mixes, kernel = {}, None
    for line in text.splitlines():
        if found := re.match(r"\s*\.text\.(\w+):", line):
            kernel = mixes.setdefault(found[1], collections.Counter())
        elif kernel is not None and (
            found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)", line)
        ):
            kernel[found[1]] += 1
    return mixes


def static_table(arch, dtype):
    """What nvcc makes of the kernels of one dtype: one row a kernel."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    letter = {"float32": "f", "bfloat16": "13__nv_bfloat16"}[dtype]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "k.cubin"
        command = [
            nvcc,
            "-O3",
            "-std=c++17",
            f"-arch=sm_{arch}",
            "-cubin",
            "-Xptxas",
            "-v",
            "-o",
            cubin,
            ROOT / "csrc" / "gated_conv.cu",
        ]
        try:
            report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        except (OSError, subprocess.CalledProcessError) as error:
            return print(f"\nsm_{arch}: no static table: {getattr(error, 'stderr', None) or error}")
        disassembler = find_tool("nvdisasm")
        mixes = instructions(cubin, disassembler) if disassembler else {}
    print(
        f"\nStatic, {dtype} on sm_{arch} (K = 3, d = 4); warps: of those an SM can hold"
        + ("" if mixes else "; no nvdisasm: no instructions")
    )
    print(
        f"{'kernel':20} {'registers':>9} {'stack':>5} {'spills':>6} {'shared':>6} {'warps':>5}  instructions"
    )
    for block in report.split("Compiling entry function '")[1:]:
        mangled = block.split("'")[0]
        length, rest = re.match(
            r"_Z(\d+)(\w+)", mangled
        ).groups()  # C++ names: length, name, I template arguments E
        name, arguments = rest[: int(length)], rest[int(length) :]
        if not arguments.startswith(f"I{letter}") and not (name.endswith("v3") and dtype == "bfloat16"):
            continue
        if part := re.search(r"Lb([01])E", arguments):
            name += (" dx", " forward")[int(part[1])]
        stack, spill = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill", block).groups()
        registers = int(re.search(r"Used (\d+) registers", block)[1])
        threads = 256 if name == "gate_backward" else 128
        shared = {
            "conv_v2": 4 * (3 * 8 * 68 + 8 * 72),
            "dw_v2": 4 * 2 * 16 * 68,
            "dbias_v2": 16,
            "conv_v3": 80 * (3 * 64 + 72),
            "dw_v3": 80 * 128,
        }.get(name.split()[0], 0)
        most, blocks, kilobytes = SM.get(arch, SM["80"])
        per_warp = (
            -(-registers * 32 // 256) * 256
        )  # registers come in units of 256 a warp; CUDA keeps 1 KB a block
        resident = min(
            65536 // (per_warp * threads // 32), most // threads, blocks, kilobytes * 1024 // (shared + 1024)
        )
        top = ", ".join(f"{n} {op}" for op, n in mixes.get(mangled, {}).most_common(6)) if mixes else ""
        print(
            f"{name:20} {registers:9} {stack:>5} {spill:>6} {shared:6} {resident * threads / most:5.0%}  {top}"
        )


def time_ms(function, flush, repeats=30):
    """Median milliseconds between two events on the stream, the L2 cache emptied before each run."""
    times = []
    for i in range(repeats + 5):
        flush.zero_()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        stop.record()
        stop.synchronize()
        if i >= 5:
            times.append(start.elapsed_time(stop))
    return sorted(times)[repeats // 2]


def measure(function, tensors, dilation, flush):
    """Milliseconds of forward, and of forward and backward."""

    def forward():
        return function(*tensors, dilation)

    def both():
        torch.autograd.grad(forward().sum(), tensors)

    both()  # compiles, where something is to be compiled
    return time_ms(forward, flush), time_ms(both, flush)


def time_on_gpu(dtype):
    properties = torch.cuda.get_device_properties(0)
    print(
        f"\n{properties.name}, {properties.multi_processor_count} SMs, torch {torch.__version__}, {dtype};"
        " median of 30, cold L2"
    )
    tf32 = torch.backends.cudnn.allow_tf32
    print(
        f"cudnn.allow_tf32 is {tf32}: eager float32 convolutions "
        + ("round to TF32 and use tensor cores" if tf32 else "use no tensor cores")
    )
    kernel = load_kernel()
    compiled = torch.compile(talkingflow.gated_causal_conv_reference)
    flush = torch.empty(64 << 20, dtype=torch.float32, device="cuda")
    for name, B, C, H, T, K, d in SHAPES:
        shapes = ((B, C, T), 1), ((2 * H, C, K), (C * K) ** -0.5), ((2 * H,), 1), ((B, 2 * H, T), 1)
        tensors = [
            (torch.randn(s, device="cuda") * scale).to(getattr(torch, dtype)).requires_grad_()
            for s, scale in shapes
        ]
        flop, size = work(B, C, H, T, K, tensors[0].element_size())
        print(
            f"\n{name}: B {B}, C {C}, H {H}, T {T}, K {K}, d {d}\n"
            f"{'':12} {'forward us':>10} {'GB/s':>7} {'TFLOP/s':>8} {'fwd + bwd us':>13}"
        )
        candidates = {"eager": (0, talkingflow.gated_causal_conv_reference), "compile": (0, compiled)}
        candidates |= {
            f"version {v}": (v, kernel) for v in (1, 2, 3) if kernel and (v < 3 or dtype == "bfloat16")
        }
        for label, (version, function) in candidates.items():
            gated_conv.KERNEL_VERSION = version
            try:
                one, two = measure(function, tensors, d, flush)
            except RuntimeError as error:
                print(f"{label:12} {str(error).splitlines()[0][:90]}")
                continue
            print(
                f"{label:12} {one * 1e3:10.1f} {size / one / 1e6:7.0f} {flop / one / 1e9:8.2f} {two * 1e3:13.1f}"
            )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--arch", default="80,90", help="for the static table, e.g. 75,80,86,89,90,100,120")
    args = parser.parse_args()
    roofline_table()
    if torch.cuda.is_available():
        time_on_gpu(args.dtype)
    else:
        print("\nNo GPU is visible: nothing is timed. What the compiler says instead:")
        for arch in args.arch.split(","):
            static_table(arch, args.dtype)


if __name__ == "__main__":
    main()
