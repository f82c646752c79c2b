"""Would the checks notice? Each mutant is csrc/gated_conv.cu with one planted fault; the check beside it must fail.

The checks are runs of kernel_driver.cpp: `run` compares with plain loops in four thread orders, under AddressSanitizer
and the alignment check of UndefinedBehaviorSanitizer; `tsan` looks for races only; `big` runs the last block of tensors
beyond 2^31 elements. The table of what was found is printed: python -m pytest -s tests/test_kernel_mutants.py
"""

import concurrent.futures
import re
import tempfile
from pathlib import Path

import pytest
from test_kernel import CSRC, NO_GXX, compile_driver, run_driver

FLAGS = {
    "run": ["-O0", "-fsanitize=address,alignment", "-fno-sanitize-recover=all"],
    "tsan": ["-O0", "-fsanitize=thread"],
    "big": [],
}
TILE_READY = "__syncthreads();  // the tile is complete before anyone reads it"
TILE_USED = "__syncthreads();  // everyone has read it before it is overwritten"
V3_END = """    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int r"""

MUTANTS = [  # what is planted, which check must find it, text, replacement
    ("v2: no barrier between load and use", "tsan", TILE_READY, ""),
    ("v2: no barrier between use and the next load", "tsan", TILE_USED, ""),
    ("dw: no barrier between load and use", "tsan",
     "        __syncthreads();\n#pragma unroll\n        for (int j = 0; j < DW_DEPTH",
     "#pragma unroll\n        for (int j = 0; j < DW_DEPTH"),
    ("dw: no barrier between use and the next load", "tsan",
     "        __syncthreads();\n    }\n#pragma unroll\n    for (int r = 0; r < 8",
     "    }\n#pragma unroll\n    for (int r = 0; r < 8"),
    ("dbias: no barrier before the last sum", "tsan",
     "    __syncthreads();\n    if (threadIdx.x == 0)", "    if (threadIdx.x == 0)"),
    ("dw: all splits write one place", "tsan",
     "(((long long)blockIdx.y * n.K + tile.k) * 2", "(((long long)0 * n.K + tile.k) * 2"),
    ("v2, v3: a block of times writes into the next", "tsan",
     "if (t >= n.T) return;\n    if (FORWARD)", "if (t > n.T) return;\n    if (FORWARD)"),
    ("v2: a barrier only half a warp reaches", "run", TILE_READY, "if (lane < 16) __syncthreads();"),
    ("v2: threads return before a barrier", "run", TILE_READY, "if (lane < 16) return;\n" + TILE_READY),
    ("v2: more shared memory than a block has", "run", "shared_v2(n, sizeof(Sum<T>)), stream", "50000, stream"),
    ("v2: more rows of blocks than a grid has", "run",
     "(unsigned)ceil_div(n.H, HALF));", "(unsigned)ceil_div(n.H, HALF) + 65535);"),
    ("gate: more threads than a block has", "run",
     "ceil_div(plane, 256))), dim3(256)", "ceil_div(plane, 256))), dim3(2048)"),
    ("v2: two different barriers", "run", TILE_READY, "if (warp) {\n__syncthreads();\n} else {\n__syncthreads();\n}"),
    ("dbias: a shuffle without all lanes", "run",
     "    for (int distance = 16;", "    if (lane < 16) for (int distance = 16;"),
    ("dbias: shuffles fold half a warp", "run", "distance = 16;", "distance = 8;"),
    ("v1: future and past exchanged", "run",
     "const int from = t - (n.K - 1 - k) * n.dilation;", "const int from = t - k * n.dilation;"),
    ("v1: reads before the first frame", "run", "from >= 0 ? load(x[", "from >= -1 ? load(x["),
    ("v2: halo one tap too long", "run", "(FORWARD ? (n.K - 1) * n.dilation : 0)", "(FORWARD ? n.K * n.dilation : 0)"),
    ("v2: taps more than a tile apart share columns", "run",
     "return n.dilation < TIMES ? n.dilation : TIMES;", "return n.dilation;"),
    ("v2: dx with unflipped taps", "run", "(FORWARD ? k : n.K - 1 - k) * DEPTH", "k * DEPTH"),
    ("v2: frames before 0 read as they lie", "run", "d0 + i < depth && t >= 0 && t < n.T", "d0 + i < depth && t < n.T"),
    ("v2: frames after the last read as they lie", "run",
     "d0 + i < depth && t >= 0 && t < n.T", "d0 + i < depth && t >= 0"),
    ("v2: dropped tail of the input channels", "run",
     "for (int d0 = 0; d0 < depth; d0", "for (int d0 = 0; d0 + DEPTH <= depth; d0"),
    ("v2: no end of the input channels", "run",
     "const bool inside = d0 + i < depth && t >= 0", "const bool inside = t >= 0"),
    ("v2: weights outside are left unset", "run",
     "STRIDE + r] = inside ? load(taps[k]) : A(0);", "STRIDE + r] = inside ? load(taps[k]) : ws[0];"),
    ("v2, v3: no channel guard at the store", "run", "if (low < 0) return;", ""),
    ("v2: gates taken from the values' rows", "run",
     "high(FORWARD ? n.H + low : low + HALF)", "high(FORWARD ? low : low + HALF)"),
    ("v2, v3: conditioning ignored", "run", "    if (cond) sum += load", "    if (false) sum += load"),
    ("v2: slices of x read as contiguous", "run",
     "(FORWARD ? n.x_batch : 2LL * n.H * n.T)", "(FORWARD ? (long long)n.C * n.T : 2LL * n.H * n.T)"),
    ("v2: 16-byte reads off 16-byte addresses", "run", "STRIDE = ROWS + 4;", "STRIDE = ROWS + 3;"),
    ("v2: shared memory too small", "run",
     "DEPTH * tile_columns(n)) * element", "DEPTH * tile_columns(n) - 8) * element"),
    ("gate: derivative of tanh without the square", "run", "(1 - p * p)", "(1 - p)"),
    ("dw: the last chunk of a split is lost", "run",
     "q < chunks * (blockIdx.y + 1) / splits;", "q < chunks * (blockIdx.y + 1) / splits - 1;"),
    ("dw: frames after the last read as they lie", "run",
     "ci < n.C && t < n.T && t >= shift", "ci < n.C && t >= shift"),
    ("dw: partial sums in another order of axes", "run", "i % plane * n.K + i / plane", "i"),
    ("v3: no barrier between load and use", "tsan",
     "        __syncthreads();\n        for (int k = 0;", "        for (int k = 0;"),
    ("v3: no barrier between use and the next load", "tsan",
     "        __syncthreads();\n" + V3_END, V3_END),
    ("v3: rows off 16-byte boundaries", "run", "STRIDE3 = DEPTH3 + 8;", "STRIDE3 = DEPTH3 + 2;"),
    ("v3: halves of B exchanged", "run",
     "lane % 8 + lane / 16 * 8) * STRIDE3 + depth + lane / 8 % 2 * 8",
     "lane % 8 + lane / 8 % 2 * 8) * STRIDE3 + depth + lane / 16 * 8"),
    ("v3: the second of a pair of channels unguarded", "run", "inside && d0 + i + 1 < depth", "inside"),
    ("v3: dw, frames after the last read as they lie", "run", "o < 2 * n.H && t < n.T ? dh[", "o < 2 * n.H ? dh["),
    ("v1: 32-bit index of an output", "big",
     "    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;\n    if (i >= (long long)n.B * n.H",
     "    const int i = blockIdx.x * blockDim.x + threadIdx.x;\n    if (i >= (long long)n.B * n.H"),
    ("v2: 32-bit index of an input", "big",
     "load(in_b[(long long)(d0 + i) * n.T + t])", "load(in_b[(int)((unsigned)(d0 + i) * n.T + t)])"),
]  # fmt: skip


def try_mutant(mutant):
    """What the check said about it, in one line; None: it noticed nothing."""
    name, check, old, new = mutant
    source = (CSRC / "gated_conv.cu").read_text()
    place = re.compile(re.sub(r"(\\\s)+", r"\\s+", re.escape(old)))  # however it is wrapped
    assert place.search(source), f"the text to mutate is gone: {old}"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "gated_conv.cu").write_text(place.sub(lambda _: "\n" + new, source, count=1))
        program = compile_driver(Path(folder), source=folder, flags=FLAGS[check], version_3="v3" in name)
        args, order = (["big"] if check == "big" else []), ("ascending" if check == "tsan" else None)
        code, output = run_driver(program, *args, tsan=check == "tsan", order=order)
    if code == 0:
        return None
    patterns = (
        "runtime error: .*",
        r"ERROR: AddressSanitizer: [\w-]+",
        "ThreadSanitizer: data race",
        "cuda_on_cpu: .*",
        ".*expected.*",
    )
    found = next((m[0] for p in patterns if (m := re.search(p, output))), f"exit code {code}")
    return found.replace("ERROR: ", "").replace("runtime error", "UBSan")[:70]


def run_all():
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(zip(MUTANTS, pool.map(try_mutant, MUTANTS)))


def print_table(results):
    print(f"\n{'planted':48} {'check':5} found by")
    for (name, check, *_), found in results:
        print(f"{name:48} {check:5} {found or 'NOTHING'}")
    print(f"{sum(bool(found) for _, found in results)} of {len(results)} found")


@pytest.mark.skipif(NO_GXX is not None, reason=NO_GXX or "")
def test_every_planted_fault_is_found():
    results = run_all()
    print_table(results)
    assert len(results) >= 15 and not [m[0] for m, found in results if not found]
