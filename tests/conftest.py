from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tiny import save_tiny, tiny_text

settings.register_profile("untimed", deadline=None)  # how long an example takes is no property
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(tiny_text())
    return file
