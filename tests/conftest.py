import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that plain `pytest` finds the modules too
torch.set_num_threads(1)  # small tensors: more threads only wait for each other


@pytest.fixture(scope="session")
def grid():
    """Folder of real speech and landmarks (GRID corpus), or a skip."""
    folder = ROOT.parent / "shared" / "data" / "grid"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder


@pytest.fixture(scope="session")
def talkers(tmp_path_factory):
    """A small training folder of synthetic talkers."""
    import prepare_data

    folder = tmp_path_factory.mktemp("data") / "talkers"
    prepare_data.synthetic(folder, clips=120)
    return folder
