"""The tutorial still holds: every cell runs, in order and without Jupyter; what is committed is a clean run
of it; its solutions are right, and answers that are wrong are found out.

python tests/test_tutorial.py      runs the cells in this process and stops where one fails, with its line
"""

import json
import linecache
import os
import re
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import puzzles
import pytest
import torch
from conftest import say

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "tutorial.ipynb"
CLAIMS = 18
CPU_SECONDS = 150  # of all processes it starts; about half of it is used


def cells():
    """(name, source, cell) of every cell, named by its place in the file."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [
        (f"tutorial.ipynb[cell {i}]", "".join(cell["source"]), cell)
        for i, cell in enumerate(notebook["cells"])
    ]


def folded(kind):
    """The programs folded under a summary that begins with `kind`, as (summary, program)."""
    text = "\n".join(source for _, source, cell in cells() if cell["cell_type"] == "markdown")
    folds = re.findall(r"<details><summary>(.*?)</summary>(.*?)</details>", text, re.S)
    return [
        (name, "\n".join(re.findall(r"```python\n(.*?)```", fold, re.S)))
        for name, fold in folds
        if name.startswith(kind)
    ]


def execute():
    """Runs the code cells, then the folded answers, in one namespace; a failure is quoted with cell and line
    (linecache knows them)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.show = lambda: plt.close("all")  # nobody watches
    space = {"__name__": "__main__"}
    programs = [(name, source) for name, source, cell in cells() if cell["cell_type"] == "code"]
    for name, source in programs + [
        (f"tutorial.ipynb[{name}]", program) for name, program in folded("Answer")
    ]:
        linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
        try:
            exec(compile(source, name, "exec"), space)
        except Exception:
            traceback.print_exc()  # the interpreter's own report would not ask linecache
            sys.exit(1)
    print(f"{len(space['claims'])} claims hold")


@pytest.mark.slow  # a minute
def test_every_cell_and_every_folded_answer_runs_in_order(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    before = sum(os.times()[2:4])
    say("running every cell of tutorial.ipynb: a minute")
    # a process of its own: what it compiles and registers stays out of the other tests
    command = [sys.executable, __file__]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, f"{run.stdout[-1000:]}\n{run.stderr[-3000:]}"
    assert f"{CLAIMS} claims hold" in run.stdout
    assert run.stdout.count("still to do") == len(puzzles.PUZZLES)  # an unsolved puzzle stops nothing
    assert sum(os.times()[2:4]) - before < CPU_SECONDS


@pytest.mark.slow  # a process that imports PyTorch
def test_a_failing_cell_is_quoted_with_its_line(tmp_path):
    code = {"cell_type": "code", "source": ["x = 1\n", "assert x == 2, 'so'"]}
    broken = {"cells": [{"cell_type": "markdown", "source": ["text"]}, code]}
    (tmp_path / "broken.ipynb").write_text(json.dumps(broken))
    command = "import test_tutorial as t; t.NOTEBOOK = t.Path('broken.ipynb'); t.execute()"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    run = subprocess.run(
        [sys.executable, "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert 'File "tutorial.ipynb[cell 1]", line 2' in run.stderr and "assert x == 2, 'so'" in run.stderr


def test_committed_outputs_are_those_of_one_clean_run():
    code = [(name, cell) for name, _, cell in cells() if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for _, cell in code] == list(range(1, len(code) + 1))
    printed = ""
    for name, cell in code:
        for output in cell["outputs"]:
            assert output["output_type"] in ("stream", "display_data"), f"{name}: {output['output_type']}"
            assert output.get("name") != "stderr", f"{name}: {''.join(output['text'])}"
            printed += "".join(output.get("text", []))
    assert "Warning" not in printed and "Traceback" not in printed
    numbers = [int(line.split(":")[0][6:]) for line in printed.splitlines() if line.startswith("claim ")]
    assert numbers == list(range(1, CLAIMS + 1))


def test_every_figure_is_a_png_described_in_words():
    figures = 0
    for name, source, cell in cells():
        drawn = sum("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
        described = [line for line in source.splitlines() if line.startswith("# alt: ")]
        assert len(described) == drawn == source.count("plt.show()"), f"{name}: {drawn} figures"
        figures += drawn
    assert figures >= 15


def test_the_notebook_is_small_and_asks_for_nothing_but_python():
    assert NOTEBOOK.stat().st_size < 1_000_000
    for name, source, cell in cells():
        if cell["cell_type"] == "code":
            assert len(source.splitlines()) <= 40, f"{name}: {len(source.splitlines())} lines"
            for line in source.splitlines():
                assert not line.lstrip().startswith(("!", "%")), f"{name}: {line}"
                assert len(line) <= 120, f"{name}: {line}"


# ------------------------------------------------------------------------------------------------------------
# Puzzles

compiler = pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler for the CUDA source")


def answered(program):
    """The names that a learner's program defines, after the notebook's imports."""
    space = {"np": np, "torch": torch, "math": __import__("math")}
    exec(program, space)
    return space


def test_every_puzzle_is_asked_and_solved_once_in_order():
    asked = [
        int(number)
        for _, source, cell in cells()
        if cell["cell_type"] == "code"
        for number in re.findall(r"^check\((\d+)\)$", source, re.M)
    ]
    solved = [int(name.split()[1]) for name, _ in folded("Solution")]
    assert asked == solved == list(range(1, len(puzzles.PUZZLES) + 1))


@pytest.mark.parametrize("number", range(1, len(puzzles.PUZZLES) + 1))
def test_the_folded_solution_is_right_and_the_empty_answer_is_still_to_do(number):
    if puzzles.PUZZLES[number - 1][0] == "tap_row" and not shutil.which("c++"):
        pytest.skip("no C++ compiler for the CUDA source")
    right, message = puzzles.grade(number, answered(folded(f"Solution {number}")[0][1]))
    assert right, message
    (empty,) = (source for _, source, _ in cells() if f"\ncheck({number})" in source)
    for names in ({}, answered(empty.split(f"\ncheck({number})")[0])):
        assert puzzles.grade(number, names) == (False, f"puzzle {number}: still to do")


LOGDETS = "def logdets(logs, W, s):\n    T = s.shape[1]\n    return {}"
LATE = "def late(x, n):\n    return {}"
SCALE = "def scale_density(z, v):\n    return {}"
AR2 = "def ar2(p1, p2, v):\n    return {}"
DENOISE = "def denoise(y, deviation, score):\n    return {}"
HALO = "def halo_load(x, t0, frames, k, d):\n    halo = (k - 1) * d\n    return {}"
SLICED = "def sliced_thread(load, multiply, slices):\n    for part in range(slices):\n{}"
DX = "def dx_by_hand(da, w, d):\n    k, T = w.shape[1], len(da)\n    return sum({} for j in range(k))"
SWIZZLE = "def swizzle(row, piece):\n    return {}"
VALID = "def valid_numbers(t, c, T, C):\n    return {}"
WRONG = [  # puzzle, answer, a word of the hint
    (1, LOGDETS.format("logs.sum(), T * torch.linalg.slogdet(W)[1], s.sum((1, 2))"), "once a frame"),
    (
        1,
        LOGDETS.format("T * logs.exp().sum(), T * torch.linalg.slogdet(W)[1], s.sum((1, 2))"),
        "same D numbers",
    ),
    (1, LOGDETS.format("T * logs.sum(), torch.linalg.slogdet(W)[1], s.sum((1, 2))"), "W, too"),
    (1, LOGDETS.format("T * logs.sum(), T * (-torch.linalg.det(W).abs()).log(), s.sum((1, 2))"), "no sign"),
    (1, LOGDETS.format("T * logs.sum(), T * W.diagonal().abs().log().sum(), s.sum((1, 2))"), "unit cube"),
    (1, LOGDETS.format("T * logs.sum(), T * torch.linalg.slogdet(W)[1], s.sum()"), "one number a clip"),
    (1, LOGDETS.format("T * logs.sum(), T * torch.linalg.slogdet(W)[1], s.abs().sum((1, 2))"), "sign of s"),
    (
        1,
        LOGDETS.format("T * logs.sum(), T * torch.linalg.slogdet(W)[1], s.exp().sum((1, 2))"),
        "logarithm is s",
    ),
    (1, LOGDETS.format("T * logs.sum()"), "three things"),
    (1, LOGDETS.format("undefined"), "NameError"),
    (2, LATE.format("x.roll(n, 1)"), "come round again"),
    (2, LATE.format("torch.cat([x[:, n:], x[:, :n] * 0], 1)"), "future"),
    (2, LATE.format("torch.nn.functional.pad(x, (0, 0, n, 0))"), "as many frames"),
    (2, LATE.format("torch.cat([x[:, :1].expand(-1, n, -1), x[:, : x.shape[1] - n]], 1)"), "0 where t < n"),
    (2, LATE.format("torch.cat([0 * x[:, :n], x[:, :-n]], 1)"), "n = 0"),
    (3, SCALE.format("torch.distributions.Normal(0, v).log_prob(z).sum((1, 2))"), "not its square root"),
    (3, SCALE.format("torch.distributions.Normal(0, v**0.5).log_prob(z).mean((1, 2))"), "summed"),
    (3, SCALE.format("-0.5 * (z**2 / v).sum((1, 2))"), "constants"),
    (3, SCALE.format("torch.distributions.Normal(0, v**0.5).log_prob(z).sum()"), "One number a clip"),
    (4, AR2.format("p1, p2, v * (1 - p1**2) * (1 - p2**2)"), "a1"),
    (4, AR2.format("p1 * (1 - p2), -p2, v * (1 - p1**2) * (1 - p2**2)"), "a2"),
    (4, AR2.format("p1 * (1 - p2), p2, v * (1 - p1**2)"), "p2 helps too"),
    (4, AR2.format("p1 * (1 - p2), p2, v * (1 - p1**2 - p2**2)"), "share"),
    (4, AR2.format("p1 * (1 - p2), p2"), "a1, a2 and v"),
    (5, DENOISE.format("y - deviation**2 * score(y)"), "not away"),
    (5, DENOISE.format("y + deviation * score(y)"), "units"),
    (5, DENOISE.format("score(y)"), "variance times the score"),
    (6, HALO.format("x[t0 : t0 + frames]"), "rows"),
    (6, HALO.format("x[t0 : t0 + frames + halo]"), "after the tile"),
    (6, HALO.format("x[np.arange(t0 - halo, t0 + frames)]"), "zeros"),
    (6, HALO.format("x[np.arange(t0 - halo, t0 + frames).clip(0)]"), "zeros"),
    (6, HALO.format("np.pad(x, ((halo, 0), (0, 0)))[max(0, t0 - 1) :][: frames + halo]"), "frame t0"),
    (7, SLICED.format("        load(part)\n        yield\n        multiply(part)"), "Which is missing"),
    (7, SLICED.format("        load(part)\n        multiply(part)\n        yield"), "Which is missing"),
    (7, SLICED.format("        yield\n        load(part)\n        multiply(part)"), "Which is missing"),
    (7, SLICED.format("        load(part)\n    yield\n    multiply(part)"), "then multiplied"),
    (
        7,
        SLICED.format(
            "        load(part)\n        yield\n        multiply(part)\n        yield\n        yield"
        ),
        "enough",
    ),
    (7, SLICED.format("        load(part)\n        yield\n        yield"), "then multiplied"),
    (
        8,
        DX.format("np.pad(da[: T - (k - 1 - j) * d], (((k - 1 - j) * d, 0), (0, 0))) @ w[:, j]"),
        "looks back",
    ),
    (8, DX.format("np.pad(da[j * d :], ((0, j * d), (0, 0))) @ w[:, j]"), "the present"),
    (8, DX.format("np.roll(da, -(k - 1 - j) * d, 0) @ w[:, j]"), "0 after the end"),
    (8, DX.format("da @ da.T @ da"), "shape of x"),
    (9, SWIZZLE.format("piece"), "rounds"),
    (9, SWIZZLE.format("piece ^ (row & 3)"), "2 rounds"),
    (9, SWIZZLE.format("piece ^ (row & 7)"), "4 places"),
    (9, SWIZZLE.format("(row >> 1) & 3"), "4 pieces"),
    (10, VALID.format("8"), "Before the first frame"),
    (10, VALID.format("8 if t >= 0 else 0"), "after the end"),
    (10, VALID.format("8 if 0 <= t < T else 0"), "the next frame"),
    (10, VALID.format("min(8, C - c) if 0 <= t < T else 0"), "negative count"),
    (10, VALID.format("min(8, max(0, C - c)) if 0 <= t < T - 1 else 0"), "last frame"),
]


@pytest.mark.parametrize(("number", "program", "hint"), WRONG)
def test_a_wrong_answer_gets_its_hint(number, program, hint):
    right, message = puzzles.grade(number, answered(program))
    assert not right and hint in message, message


@compiler
@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ('"frame - k * step"', "wrong by"),
        ('"tap"', "compiler says"),
        pytest.param('"frame"', "wrong by", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_line_in_the_real_kernel_gets_its_hint(row, hint):
    right, message = puzzles.grade(11, answered(f"tap_row = {row}"))
    assert not right and hint in message, message


@pytest.mark.slow  # three builds
@compiler
def test_the_runner_of_the_real_kernel_notices_a_missing_barrier():
    text, rng = puzzles.cuda_text(), np.random.default_rng(0)
    layer = [rng.normal(size=shape) for shape in ((40, 20), (24, 3, 20), (24,), (40, 24))]
    right = puzzles.layer_by_formula(*layer, 2)
    assert np.allclose(puzzles.run_cuda(puzzles.build(text, puzzles.DOUBLE), 2, *layer, 2), right, atol=1e-12)
    for number in (0, 1):
        broken = puzzles.build(puzzles.without_barrier(text, "forward_v2", number), puzzles.DOUBLE)
        assert not np.allclose(puzzles.run_cuda(broken, 2, *layer, 2), right, atol=1e-3)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    execute()
