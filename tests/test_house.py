"""The house: what imports what, what loads torch, how large each room is."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = [*ROOT.glob("*.py"), *(f for room in ("media", "study", "csrc") for f in (ROOT / room).glob("*.py"))]
FLOORS = {"media": 0, "prepare_data": 1, "csrc": 1, "study": 1, "talkingflow": 2, "evaluate": 3, "cli": 3}


def imports(tree):
    """Names of the modules imported anywhere in a file, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_but_for_the_door_to_the_commands(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imports(ast.parse(path.read_text())):
        other = name.split(".")[0]
        if other in FLOORS and other != room:
            door = (room, other) == ("talkingflow", "cli")
            assert door or FLOORS[other] < FLOORS[room], f"{room} imports {other}"


def test_no_torch_is_loaded_by_what_makes_data_and_pages():
    names = ["prepare_data", "cli", *sorted(f"media.{f.stem}" for f in (ROOT / "media").glob("[a-z]*.py"))]
    code = f"import sys\nfor name in {names}: __import__(name), 'torch' in sys.modules and sys.exit(name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_contract_is_importable_from_the_method_file():
    import talkingflow

    names = (
        "Config TalkingFlow gated_causal_conv gated_causal_conv_reference load_kernel Clips Trainer Mel main"
    )
    assert all(hasattr(talkingflow, name) for name in names.split())


@pytest.mark.parametrize(
    "name, most", [("talkingflow.py", 880), ("prepare_data.py", 800), ("evaluate.py", 780)]
)
def test_no_room_outgrows_its_size(name, most):
    assert len((ROOT / name).read_text().splitlines()) <= most


def test_the_method_file_stays_within_8000_tokens():
    kinds = tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING
    text = io.StringIO((ROOT / "talkingflow.py").read_text())
    assert sum(token.type in kinds for token in tokenize.generate_tokens(text.readline)) <= 8000


def branches(function):
    """Cyclomatic number: one, and one for every place where the way divides."""
    divides = (
        ast.If,
        ast.For,
        ast.While,
        ast.With,
        ast.ExceptHandler,
        ast.comprehension,
        ast.IfExp,
        ast.Assert,
    )
    count = sum(isinstance(node, divides) for node in ast.walk(function))
    return (
        1 + count + sum(len(node.values) - 1 for node in ast.walk(function) if isinstance(node, ast.BoolOp))
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_function_fits_on_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, (
                f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
            )
            assert branches(node) <= 18, f"{node.name}: cyclomatic number {branches(node)}"


def test_the_readme_is_short_and_names_only_files_that_exist():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.encode()) < 15000
    for link in set(re.findall(r"\]\(([^)#]+)\)", readme)):
        assert link.startswith("http") or (ROOT / link).exists(), link
