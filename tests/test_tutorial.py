"""The tutorial still holds: every cell runs, in order and without Jupyter, and what is committed is a clean run of it.

python tests/test_tutorial.py      runs the cells in this process and stops where one fails, with its line
"""

import json
import linecache
import os
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "tutorial.ipynb"
CPU_SECONDS = 150  # of all processes it starts; about a third of it is used


def cells():
    """(name, source, cell) of every cell, named by its place in the file."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [
        (f"tutorial.ipynb[cell {i}]", "".join(cell["source"]), cell)
        for i, cell in enumerate(notebook["cells"])
    ]


def execute():
    """Runs the code cells in one namespace; a failure is quoted with cell and line (linecache knows them)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.show = lambda: plt.close("all")  # nobody watches
    space = {"__name__": "__main__"}
    for name, source, cell in cells():
        if cell["cell_type"] == "code":
            linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
            try:
                exec(compile(source, name, "exec"), space)
            except Exception:
                traceback.print_exc()  # the interpreter's own report would not ask linecache
                sys.exit(1)
    print(f"{len(space['checks'])} checks hold")


def test_every_cell_runs_in_order(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    before = sum(
        os.times()[2:4]
    )  # a process of its own: what it compiles and registers stays out of the other tests
    run = subprocess.run([sys.executable, __file__], cwd=tmp_path, env=environment, capture_output=True, text=True,
                         timeout=1800)  # fmt: skip
    assert run.returncode == 0, f"{run.stdout[-1000:]}\n{run.stderr[-3000:]}"
    assert "15 checks hold" in run.stdout
    assert sum(os.times()[2:4]) - before < CPU_SECONDS


def test_a_failing_cell_is_quoted_with_its_line(tmp_path):
    code = {"cell_type": "code", "source": ["x = 1\n", "assert x == 2, 'so'"]}
    broken = {"cells": [{"cell_type": "markdown", "source": ["text"]}, code]}
    (tmp_path / "broken.ipynb").write_text(json.dumps(broken))
    command = "import test_tutorial as t; t.NOTEBOOK = t.Path('broken.ipynb'); t.execute()"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
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
    numbers = [int(line.split(":")[0][6:]) for line in printed.splitlines() if line.startswith("check ")]
    assert numbers == list(range(1, 16))


def test_every_figure_is_a_png_described_in_words():
    figures = 0
    for name, source, cell in cells():
        drawn = sum("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
        described = [line for line in source.splitlines() if line.startswith("# alt: ")]
        assert len(described) == drawn == source.count("plt.show()"), f"{name}: {drawn} figures"
        figures += drawn
    assert figures >= 10


def test_the_notebook_is_small_and_asks_for_nothing_but_python():
    assert NOTEBOOK.stat().st_size < 1_000_000
    for name, source, cell in cells():
        if cell["cell_type"] == "code":
            assert len(source.splitlines()) <= 50, f"{name}: {len(source.splitlines())} lines"
            for line in source.splitlines():
                assert not line.lstrip().startswith(("!", "%")), f"{name}: {line}"
                assert len(line) <= 120, f"{name}: {line}"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    execute()
