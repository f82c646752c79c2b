"""Would the checks notice? Each mutant is csrc/gated_conv.cu or hopper.* with one planted fault; its
check must fail.

The checks are runs of kernel_driver.cpp, of the version that the fault's name begins with: `run` compares
with plain loops, and cuda_on_cpu*.h refuse what hardware leaves undefined (a phase that never ends, an
operand that changes while it is read); `asan` does so under AddressSanitizer and
UndefinedBehaviorSanitizer's alignment check; `tsan` looks for races only; `big` runs the last block of
tensors beyond 2^31 elements.
Every tenth is tried, with THOROUGH=1 in the environment all are; what was found is printed:
THOROUGH=1 python -m pytest --slow -s tests/test_kernel_mutants.py
"""

import concurrent.futures
import re
import tempfile
from pathlib import Path

import pytest
from conftest import THOROUGH, say
from test_kernel import CSRC, NO_GXX, compile_driver, run_driver

FLAGS = {
    "run": ["-O0"],
    "asan": ["-O0", "-fsanitize=address,alignment", "-fno-sanitize-recover=all"],
    "tsan": ["-O0", "-fsanitize=thread"],
    "big": ["-O0"],
}
FULL = "barrier_wait(full + stage, "
TILE_READY = "__syncthreads();  // the tile is complete before anyone reads it"
TILE_USED = "__syncthreads();  // everyone has read it before it is overwritten"
ARRIVED = "__syncthreads();    // now everyone's has, and everyone is done with the stage before"
NEXT = "if (chunk + 1 < chunks) load_stage(chunk + 1);"
WAIT = "wait_for_copies();\n __syncthreads();\n if (chunk + 1 < "

MUTANTS = [  # what is planted, which check must find it, text, replacement
    (
        "1: future and past exchanged",
        "run",
        "x + (row - shift_of(n, k)) * n.x_row;",
        "x + (row - (t < k * n.dilation ? t : k * n.dilation)) * n.x_row;",
    ),
    ("1: reads before the first frame", "asan", "if (t < shift_of(n, k)) continue;", ""),
    (
        "1: slices of x read as contiguous",
        "run",
        "x + (row - shift_of(n, k)) * n.x_row;",
        "x + (row - shift_of(n, k)) * n.C;",
    ),
    ("1: slices of cond read as contiguous", "run", "cond[row * n.cond_row + o]", "cond[row * 2 * n.H + o]"),
    ("1: dx looks past the item's end", "asan", "if (t + shift_of(n, k) >= n.T) continue;", ""),
    ("1: gate, derivative of tanh without the square", "run", "(1 - p * p)", "(1 - p)"),
    (
        "1: gate, frames beyond the last are written",
        "asan",
        "if (row >= end) continue;\n *reinterpret_cast<P*>(da",
        "*reinterpret_cast<P*>(da",
    ),
    (
        "1: gate, a run of frames is counted twice",
        "run",
        "blockDim.y * GATE_RUN + threadIdx.y,",
        "blockDim.y * (GATE_RUN - 1) + threadIdx.y,",
    ),
    ("1: gate, 16-byte reads of any H", "asan", "return n.H % V == 0 &&", "return"),
    (
        "1: gate, no barrier before the block's sum",
        "tsan",
        "__syncthreads();\n    for (int j = threadIdx.y * blockDim.x",
        "for (int j = threadIdx.y * blockDim.x",
    ),
    ("1: gate, more threads than a block has", "run", "GATE_THREADS = 256", "GATE_THREADS = 2048"),
    (
        "1: parts, no barrier before the last sum",
        "tsan",
        "__syncthreads();\n    if (tid >= SIZE",
        "if (tid >= SIZE",
    ),
    (
        "1: parts, the last eight are lost",
        "run",
        "part < of.count; part += ROWS",
        "part < of.count - 8; part += ROWS",
    ),
    (
        "1: 32-bit index of an output",
        "big",
        "const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;",
        "const int i = blockIdx.x * blockDim.x + threadIdx.x;",
    ),
    ("2: no barrier between load and use", "tsan", TILE_READY, ""),
    ("2: no barrier between use and the next load", "tsan", TILE_USED, ""),
    ("2: a barrier only half a warp reaches", "run", TILE_READY, "if (tid % 32 < 16) __syncthreads();"),
    ("2: threads return before a barrier", "run", TILE_READY, "if (tid % 32 < 16) return;\n" + TILE_READY),
    (
        "2: two different barriers",
        "run",
        TILE_READY,
        "if (frame) {\n__syncthreads();\n} else {\n__syncthreads();\n}",
    ),
    ("2: more shared memory than a block has", "run", "shared_v2(n, element), stream", "200000, stream"),
    (
        "2: shared memory too small",
        "asan",
        "tile_rows<SIDE>(n)) * STRIDE2 * element",
        "tile_rows<SIDE>(n) - 1) * STRIDE2 * element",
    ),
    (
        "2: more rows of blocks than a grid has",
        "run",
        "(unsigned)ceil_div(n.H, SIDE));",
        "(unsigned)ceil_div(n.H, SIDE) + 65535);",
    ),
    (
        "2: halo one tap too long",
        "run",
        "(n.dilation - TIMES) - (n.K - 1) * n.dilation",
        "(n.dilation - TIMES) - n.K * n.dilation",
    ),
    (
        "2: taps more than a tile apart share rows",
        "run",
        "return n.dilation < TIMES ? n.dilation : TIMES;",
        "return 1;",
    ),
    ("2: dx with unflipped taps", "run", "gs[(frame + (n.K - 1 - k) * step)", "gs[(frame + k * step)"),
    (
        "2: frames before 0 read as they lie",
        "asan",
        "d0 + i < n.C && t >= 0 && t < n.T",
        "d0 + i < n.C && t < n.T",
    ),
    ("2: no end of the input channels", "asan", "d0 + i < n.C && t >= 0 && t < n.T", "t >= 0 && t < n.T"),
    (
        "2: dropped tail of the input channels",
        "run",
        "d0 < n.C; d0 += DEPTH2",
        "d0 + DEPTH2 <= n.C; d0 += DEPTH2",
    ),
    (
        "2: a block of frames writes into the next item",
        "tsan",
        "if (c >= n.H || t >= n.T) return;",
        "if (c >= n.H || t > n.T) return;",
    ),
    (
        "2: dw forgets where an item begins",
        "run",
        "row < rows && (int)(row % n.T) >= shift",
        "row < rows && row >= shift",
    ),
    (
        "3: no barrier between load and use",
        "tsan",
        "__syncthreads();\n        for (int k = 0; k < n.K; ++k)\n            multiply_add(sum, ws",
        "for (int k = 0; k < n.K; ++k)\n            multiply_add(sum, ws",
    ),
    (
        "3: no barrier between use and the next load",
        "tsan",
        "xs + k * step + tt, stride);\n        __syncthreads();",
        "xs + k * step + tt, stride);",
    ),
    ("3: 16-byte reads off 16-byte addresses", "asan", "STRIDE = ROWS + 4;", "STRIDE = ROWS + 3;"),
    (
        "3: weights outside are no numbers",
        "run",
        "STRIDE + r] = inside ? load(w[(o * n.K + k) * n.C + d0 + i]) : A(0);",
        "STRIDE + r] = inside ? load(w[(o * n.K + k) * n.C + d0 + i]) : A(NAN);",
    ),
    ("3: gates taken from the values' rows", "run", "c + r / HALF * n.H", "c"),
    (
        "3: dw, all splits write one place",
        "tsan",
        "(((long long)blockIdx.y * 2 * n.H + o) * n.K + k)",
        "(((long long)0 * 2 * n.H + o) * n.K + k)",
    ),
    (
        "3: dw, the last chunk of a split is lost",
        "run",
        "chunk < run.end; ++chunk) {\n const long long b",
        "chunk < run.end - 1; ++chunk) {\n const long long b",
    ),
    (
        "3: 32-bit index of an input",
        "big",
        "xs[i * stride + r] = inside ? load(x[(b * n.T + t) * n.x_row + d0 + i])",
        "xs[i * stride + r] = inside ? load(x[(int)((unsigned)((b * n.T + t) * n.x_row) + d0 + i)])",
    ),
    (
        "3: parts, dbias's lie on dw's",
        "run",
        "of_dw = of_dbias + dbias_parts(version, n);",
        "of_dw = of_dbias;",
    ),
    (
        "3: dw, the longer splits are no longer",
        "asan",
        "end = first + each + (y < longer);",
        "end = first + each;",
    ),
    ("3: parts, dbias's blocks counted from dw's", "run", "(dw, blockIdx.x - of_dbias)", "(dw, blockIdx.x)"),
    ("4: multiplied before the copies are waited for", "run", "wait_for_copies();  // this thread's", "//"),
    (
        "4: dx, not waited for",
        "run",
        WAIT + "chunks) load_stage(chunk + 1);\n const T* const gs",
        "__syncthreads();\n if (chunk + 1 < chunks) load_stage(chunk + 1);\n const T* const gs",
    ),
    ("4: dw, not waited for", "run", WAIT + "run.end)", "__syncthreads();\n if (chunk + 1 < run.end)"),
    ("4: waited for, but no barrier", "tsan", ARRIVED, ""),
    ("4: dw, no barrier", "tsan", WAIT + "run.end)", "wait_for_copies();\n if (chunk + 1 < run.end)"),
    ("4: a stage is overwritten early", "tsan", ARRIVED + "\n" + NEXT, NEXT + "\n__syncthreads();"),
    (
        "4: both stages in one place",
        "run",
        "T* const xs = stages + chunk % 2 * stage_size;\n T* const ws",
        "T* const xs = stages + chunk % 1 * stage_size;\n T* const ws",
    ),
    ("4: a halo row short", "run", "rows = 16 * M + halo;", "rows = 16 * M + halo - (halo > 0);"),
    (
        "4: pieces copied in order, read swizzled",
        "run",
        "copy_piece(xs + swizzle32(r, piece)",
        "copy_piece(xs + r * 32 + piece * 8",
    ),
    ("4: dx, weights not transposed", "run", "ldmatrix<true>(channels", "ldmatrix<false>(channels"),
    ("4: dw, frames not transposed", "run", "ldmatrix<true>(g[m]", "ldmatrix<false>(g[m]"),
    (
        "4: dw, the blocks of A exchanged",
        "run",
        "gs + swizzle64(t + lane % 8 + lane / 16 * 8",
        "gs + swizzle64(t + lane % 16",
    ),
    ("4: w's rows in their own order", "run", "channel_of(own)", "own"),
    ("4: gates taken from the values' rows", "run", "o = c + i % 2 * n.H", "o = c"),
    (
        "4: frames before 0 read as they lie",
        "asan",
        "t >= 0 && t < n.T ? n.C - d0 : 0, unit_x",
        "t < n.T ? n.C - d0 : 0, unit_x",
    ),
    ("4: a slot after the last tile is computed", "asan", "t0 = b < (unsigned)n.B ? ", "t0 = true ? "),
    ("4: no end of the input channels", "asan", "t < n.T ? n.C - d0 : 0, unit_x", "t < n.T ? 8 : 0, unit_x"),
    ("4: cond of frames beyond the last is read", "asan", "if (cond && frame(m, e) < n.T)", "if (cond)"),
    ("4: the gates start at the values' bias", "asan", "bias + n.H + c, count", "bias + c, count"),
    ("4: tanh's series taken far from 0", "asan", "a * a < 1.0f / 256", "a * a < 4.0f"),
    (
        "4: y written whole where H ends",
        "asan",
        "write8<WIDE>(y + row * n.H + c, out, count)",
        "write8<WIDE>(y + row * n.H + c, out, 8)",
    ),
    ("4: copies wider than rows are aligned", "run", "if (unit == 16) return", "if (unit >= 4) return"),
    (
        "4: odd rows of x half copied",
        "run",
        "if (here) to[j] = from[j];",
        "if (here && j % 2 == 0) to[j] = from[j];",
    ),
    ("4: 16-byte stores of any H", "asan", "const bool wide = n.H % 8 == 0 &&", "const bool wide = true ||"),
    ("4: dx, pairs stored off their alignment", "asan", "if (n.C % 2 == 0) *", "if (true) *"),
    (
        "4: dx looks back",
        "run",
        "gs + swizzle32(slot * rows + shift_of(n, k)",
        "gs + swizzle32(slot * rows + k * n.dilation",
    ),
    (
        "4: gate, the halo not computed",
        "run",
        "if (t < n.T) {\n const long long row",
        "if (t < n.T && r % rows < times) {\n const long long row",
    ),
    ("4: gate, the next tile's frames written too", "tsan", "if (da && r % rows < times)", "if (da)"),
    ("4: gate, written by every column of blocks", "tsan", "blockIdx.y == 0 ? da : nullptr;", "da;"),
    ("4: gate, rows behind 2H are no numbers", "run", "p < SLOTS * rows * tail;", "p < 0;"),
    ("4: gate, the tile as small as two stages", "asan", "merged ? ceil_div(2LL * n.H, DEPTH4) : 2;", "2;"),
    (
        "4: gate, weights on the tile",
        "run",
        "g_stages + (MERGED ? chunks : 2) * g_size",
        "g_stages + 2 * g_size",
    ),
    (
        "4: gate, the tile read as two stages",
        "run",
        "(MERGED ? chunk : chunk % 2) * g_size",
        "chunk % 2 * g_size",
    ),
    ("4: gate, stored in order, read swizzled", "run", "swizzle32(r, o % 32 / 8) + o % 8", "r * 32 + o % 32"),
    ("4: gate, dbias of the first slot only", "run", "r < SLOTS * 16 * M; ++r", "r < 16 * M; ++r"),
    ("4: gate, dbias counts the halo", "run", "r / (16 * M) * rows + r % (16 * M), o)", "r, o)"),
    ("4: gate, dbias of one pair of slots", "run", "runs = (int)pairs_of_slots(n);", "runs = 1;"),
    (
        "4: gate, 32-bit index of a frame",
        "big",
        "const long long row = (r < rows ? first.item : second.item) + t;\n value",
        "const int row = (int)((r < rows ? first.item : second.item) + t);\n value",
    ),
    ("4: dw, all taps the same", "run", "t + tap * n.dilation + lane % 16", "t + lane % 16"),
    ("4: dw, the halo of x left out", "run", "r < rows; r += THREADS / 8", "r < DW_TIMES; r += THREADS / 8"),
    ("4: shared memory too small", "asan", "2LL * n.K * PAIRS4);", "2LL * n.K * PAIRS4 - 8);"),
    ("4: 32-bit index of an input", "big", "x + row * n.x_row + d0", "x + (int)(row * n.x_row + d0)"),
    ("5: a stage read before it has arrived", "run", "barrier_wait(full + stage, parity);", ""),
    ("5: the reader's phase flipped", "run", "barrier_wait(full + stage, parity);", FULL + "parity ^ 1);"),
    ("5: a stage refilled before it is free", "run", "barrier_wait(empty + stage, parity ^ 1);", ""),
    ("5: the producer's phase flipped", "run", "empty + stage, parity ^ 1)", "empty + stage, parity)"),
    ("5: phases never turn", "run", "parity ^= 1;", ""),
    ("5: freed while its products are under way", "run", "wgmma_wait<1>();", "wgmma_wait<2>();"),
    ("5: frees the wrong stage", "run", "barrier_arrive(empty + before);", "barrier_arrive(empty + stage);"),
    ("5: every thread frees a stage", "run", "if (i > 0 && threadIdx.x % 32 == 0)", "if (i > 0)"),
    ("5: half the warps free a stage", "run", "empty + i, PRODUCER / 32)", "empty + i, PRODUCER / 64)"),
    ("5: weights alone are waited for", "run", "ring.refill(W + TILE);", "ring.refill(W);"),
    ("5: dx, a row too many is waited for", "run", "refill(2 * W + TILE);", "refill(2 * W + TILE + ROW);"),
    (
        "5: dw, a box not waited for",
        "run",
        "ring.refill((2 + TAPS) * BOX);",
        "ring.refill((1 + TAPS) * BOX);",
    ),
    ("5: a box of x one row short", "run", "{64, times, items, 1});", "{64, times - 1, items, 1});"),
    ("5: a box of w one row short", "run", "{64, 1, CHANNELS5, 2}", "{64, 1, CHANNELS5 - 1, 2}"),
    (
        "5: a box of one item",
        "run",
        "maps[0], x, n, C, n.x_row, TIMES, ITEMS)",
        "maps[0], x, n, C, n.x_row, TIMES, 1)",
    ),
    ("5: descriptor, stride of one row", "run", "(uint64_t)(ATOM >> 4) << 32", "(uint64_t)(ROW >> 4) << 32"),
    ("5: descriptor, no swizzle", "run", "1ull << 62", "0"),
    ("5: descriptor, taps without their stride", "run", "2 * BOX + t * ROW, BOX)", "2 * BOX + t * ROW, ROW)"),
    ("5: always the same 16 channels of x", "run", "descriptor(in + W + k);", "descriptor(in + W);"),
    ("5: dx, weights not read across", "run", "wgmma<true, false>(", "wgmma<false, false>("),
    (
        "5: dx, the next 16 channels for the next 16 rows",
        "run",
        "group * W + k * 16 * ROW",
        "group * W + k * 32",
    ),
    ("5: dw, x not read across", "run", "wgmma<true, true>(", "wgmma<true, false>("),
    ("5: tiles off their 1024 bytes", "run", "(ATOM - shared_address(shared) % ATOM) % ATOM", "0"),
    ("5: shared memory too small", "asan", "SHARED_BYTES = ATOM + STAGES", "SHARED_BYTES = STAGES"),
    ("5: barriers TMA does not see", "run", "fence_async();  // TMA shall see them", ""),
    (
        "5: barriers others do not see",
        "tsan",
        "__syncthreads();\n    }\n    __device__ void next",
        "}\n__device__ void next",
    ),
    (
        "5: stores TMA does not see",
        "run",
        "fence_async();\n    sync_warpgroup(1 + group);",
        "sync_warpgroup(1 + group);",
    ),
    (
        "5: a tile sent before it is whole",
        "run",
        "fence_async();\n    sync_warpgroup(1 + group);",
        "fence_async();",
    ),
    ("5: one named barrier for two warpgroups", "run", "sync_warpgroup(1 + group);", "sync_warpgroup(1);"),
    ("5: y over a, which has not left", "run", "if (threadIdx.x % 128 == 0) tma_store_wait();", ""),
    (
        "5: y over a, not waited by the others",
        "tsan",
        "sync_warpgroup(1 + group);  // a has left the tile",
        "",
    ),
    (
        "5: ends before y has left",
        "run",
        "tma_store(y, tile, c1, t0, b0, 0);\n            tma_store_wait();",
        "tma_store(y, tile, c1, t0, b0, 0);",
    ),
    ("5: wgmma without its fence", "run", "wgmma_fence();", ""),
    ("5: products in no group", "run", "wgmma_commit();", ""),
    ("5: D read before its products", "run", "wgmma_wait<0>();", ""),
    (
        "5: future and past exchanged",
        "run",
        "ring.load(W, x, d0, t0 - shift_of(n, k)",
        "ring.load(W, x, d0, t0 + shift_of(n, k)",
    ),
    (
        "5: dx looks back",
        "run",
        "ring.load(2 * W, da, o, t0 + shift_of(n, k)",
        "ring.load(2 * W, da, o, t0 - shift_of(n, k)",
    ),
    (
        "5: frames after T are the next item's",
        "asan",
        "{channels, n.T, n.B, 1}",
        "{channels, n.T + 1, n.B, 1}",
    ),
    ("5: values of a written over its gates", "asan", "a, {H, 2, n.T, n.B}", "a, {2 * H, 2, n.T, n.B}"),
    ("5: gates conditioned by the values' numbers", "run", "cond, n.H + c0 + 64 * g", "cond, c0 + 64 * g"),
    (
        "5: warpgroups take each other's cond",
        "run",
        "if (group == 1) ring.next();\n        unsigned char* const tile = ring.filled();  // this",
        "if (group == 0) ring.next();\n        unsigned char* const tile = ring.filled();  // this",
    ),
    (
        "5: D's blocks turned round",
        "run",
        "8 * (j + lane / 16) + lane % 8, 2 * warp + lane / 8 % 2",
        "8 * (j + lane / 8 % 2) + lane % 8, 2 * warp + lane / 16",
    ),
    (
        "5: tiles not swizzled",
        "run",
        "swizzle64(8 * (j + lane / 16) + lane % 8, 2 * warp + lane / 8 % 2)",
        "(8 * (j + lane / 16) + lane % 8) * 64 + (2 * warp + lane / 8 % 2) * 8",
    ),
    (
        "5: dw, the last chunk of a split is lost",
        "run",
        "multiply_each(run.end - run.first,",
        "multiply_each(run.end - run.first - 1,",
    ),
    ("5: dw, taps after the last are written", "run", "|| k >= n.K ||", "||"),
    ("5: no end of the gates' bias", "asan", "bias && channel < n.H ?", "bias ?"),
]


def try_mutant(mutant):
    """What the check said about it, in one line; None: it noticed nothing."""
    name, check, old, new = mutant
    files = {file: (CSRC / file).read_text() for file in ("gated_conv.cu", "hopper.cu", "hopper.h")}
    place = re.compile(re.sub(r"(\\\s)+", r"\\s+", re.escape(old)))  # however it is wrapped
    order = sorted(files, key=lambda file: (file[0] == "h") != (name[0] == "5"))  # version 5 is in hopper.*
    mutated = next((file for file in order if place.search(files[file])), None)
    assert mutated, f"the text to mutate is gone: {old}"
    files[mutated] = place.sub(lambda _: "\n" + new, files[mutated], count=1)
    with tempfile.TemporaryDirectory() as folder:
        for file, text in files.items():
            (Path(folder) / file).write_text(text)
        version = int(name[0])
        program = compile_driver(Path(folder), folder, FLAGS[check], versions=max(version, 3), only=version)
        what = "big" if check == "big" else name[0]
        code, output = run_driver(program, what, tsan=check == "tsan", order="ascending")
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


def run_all(mutants):
    say(f"compiling and running {len(mutants)} mutants of csrc/, 2 s each")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(zip(mutants, pool.map(try_mutant, mutants)))


def print_table(results):
    print(f"\n{'planted':48} {'check':5} found by")
    for (name, check, *_), found in results:
        print(f"{name:48} {check:5} {found or 'NOTHING'}")
    print(f"{sum(bool(found) for _, found in results)} of {len(results)} found")


@pytest.mark.slow  # a build each
@pytest.mark.skipif(NO_GXX is not None, reason=NO_GXX or "")
def test_every_planted_fault_is_found():
    results = run_all(MUTANTS if THOROUGH else MUTANTS[::10])
    print_table(results)
    assert len(MUTANTS) >= 120 and not [m[0] for m, found in results if not found]
