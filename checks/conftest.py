"""What several files of checks need: a model folder, data, and one thread."""

import json
from pathlib import Path

import pytest

# adapters of libraries that need not be installed, and what makes a process lack some of them
collect_ignore = ["field", "field.py", "plain"]

# --------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    # here, as a process that only hands out tests needs nothing of it
    from test_training import TOKENIZER, tiny_model

    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    from test_training import ROWS

    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path
