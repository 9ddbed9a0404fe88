"""With this folder on its PYTHONPATH a process lacks the libraries that a user need not have.
transformers would import them, which takes longer than a short run."""

import sys

for name in ("peft", "trl", "accelerate", "bitsandbytes", "torchao"):
    sys.modules[name] = None  # type: ignore[assignment]
