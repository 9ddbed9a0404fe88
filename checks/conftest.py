"""What several files of checks need: a model folder, data, and one thread."""

import json
from pathlib import Path

import pytest

from test_training import ROWS, TOKENIZER, tiny_model

collect_ignore = ["field", "field.py"]  # adapters of libraries that need not be installed

# --------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path
