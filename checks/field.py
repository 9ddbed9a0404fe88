"""The kit on the GRPO functions of other libraries. Writes checks/FIELD.md.

    pip install --no-deps -r checks/field/requirements.txt
    python checks/field.py

checks/field/ has an adapter for each. A library's one file is loaded alone (checks/alone.py), so
that nothing else of it is needed. What cannot be loaded is listed as that.
"""

import importlib.metadata
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

MARKS = {"pass": "✓", "FAIL": "**FAIL**", "differs by definition": "differs", "warning": "warns"}
MARKS |= {"not defined": "·"}


def run(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The statements about an adapter, or why there are none."""
    command = [sys.executable, "-m", "checks.conformance", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    if done.returncode == 2 or not done.stdout:
        return [], (done.stderr.strip().splitlines() or ["no output"])[-1]
    return json.loads(done.stdout), ""


def version(path: Path) -> str:
    """The library's name and version, from the adapter's line `# library: NAME`."""
    line = next(li for li in path.read_text().splitlines() if li.startswith("# library: "))
    name = line.removeprefix("# library: ").split()[0]
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{name} (not installed)"


def notes(path: Path) -> list[str]:
    """What a reader made of the FAILs: the adapter's lines `# note: ...`."""
    lines = path.read_text().splitlines()
    return [line.removeprefix("# note: ") for line in lines if line.startswith("# note: ")]


def main() -> None:
    paths = sorted((HERE / "field").glob("*.py"))
    found = {path: run(path) for path in paths}
    rows: dict[tuple[str, str], dict[Path, str]] = {}
    for path, (statements, _) in found.items():
        for s in statements:
            if s["what"] != "all of it":
                rows.setdefault((s["about"], s["what"]), {})[path] = MARKS[s["status"]]
    names = [path.stem for path in paths]
    text = ["# The field", ""]
    text += [
        "Made by `python checks/field.py`, " + time.strftime("%d %B %Y") + ". The columns are",
        "",
    ]
    text += [f"- **{path.stem}**: {version(path)}" for path in paths]
    text += [
        "", "✓ holds. *differs*: another definition than ours, which is no fault. *warns*: not robust.",
        "· cannot be asked. A FAIL is described below. Where we know of no report we say so: an",
        "*apparent defect, not found reported* is what it looks like from here, and no more.", "",
        "| function | statement | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|",
    ]  # fmt: skip
    for (about, what), marks in rows.items():
        cells = " | ".join(marks.get(path, "·") for path in paths)
        text.append(f"| {about} | {what} | {cells} |")
    text += ["", "## What each is, and each FAIL", ""]
    for path, (statements, problem) in found.items():
        text += [f"### {path.stem} ({version(path)})", ""]
        text += [f"Not loaded: {problem}", ""] if problem else []
        for s in statements:
            if s["kind"] == "definition" and s["details"]:
                text.append(f"- {s['about']}, {s['what']}: {s['details'][0]}")
            if s["status"] == "FAIL" and s["kind"] != "definition":
                shown = "; ".join(s["details"]).replace("|", "\\|")
                text.append(f"- **FAIL** {s['about']}, {s['what']}: `{shown[:700]}`")
        text += ["", *notes(path), ""]
    (HERE / "FIELD.md").write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
