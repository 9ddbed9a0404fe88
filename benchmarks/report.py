"""One page that shows what a run did: its curves, and what GRPO pushed up and down, token by token.

    python grpo_lora.py --log_tokens_steps 10 ...            # the demo does so by itself
    python benchmarks/report.py RUN_FOLDER [--updates 10 50] # writes RUN_FOLDER/report.html

The page needs no network and has no script in it. ValueError, in one line, for a folder that holds no run.
"""

import argparse
import dataclasses
import html
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import grpo_lora  # noqa: E402

CURVES = (  # the first is what counts; those that a run lacks are left out
    "reward eval_reward", "eval_accuracy eval_think_rate", "completions/mean_length eval_completions/mean_length", "entropy",
    "grad_norm", "loss", "kl", "clip_ratio/region_mean", "frac_reward_zero_std completions/clipped_ratio",
    "learning_rate", grpo_lora.GAP,
)  # fmt: skip
COLOURS = ("#2563a8", "#c2571a")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.2em; margin-top: 2em } code { background: #f3f3f3; padding: .1em .3em }
svg { width: 320px; margin: 0 .8em .8em 0 } svg text { font: 11px system-ui, sans-serif; fill: #555 }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; vertical-align: top; padding: .25em .6em }
tr + tr { border-top: 1px solid #e4e4e4 }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; width: 1% }
.text { font: 13px ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate }
.text span { border-radius: 2px }
.clipped { outline: 1.5px dashed #777; outline-offset: -1px } .masked { opacity: .35; text-decoration: line-through }
summary { cursor: pointer; font-weight: 600; margin-top: .8em } .note { color: #555 }
"""


def text(value: Any) -> str:
    """Model text, as HTML that cannot do anything: markup is escaped, control and direction characters are made visible."""
    return html.escape(grpo_lora.printable(str(value)))


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's file; a torn last one, of a run that goes on or was killed, is left out."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}: is its folder one of a run?") from None
    rows = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is empty, or torn
        try:
            rows.append(json.loads(line))
            rows[-1]["step"] = int(rows[-1]["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    return rows


def settings_of(folder: Path) -> tuple[str, grpo_lora.GRPOConfig | None]:
    """The command line of a run, and its settings: from it or from a checkpoint; None where there is neither."""
    if (folder / "settings.args").exists():
        command = (folder / "settings.args").read_text(encoding="utf-8", errors="replace").strip()
        return f"python grpo_lora.py {command}", grpo_lora.parse([f"@{folder}/settings.args"])[2]
    for state in sorted(folder.glob("checkpoint-*/state.json")):
        run = json.loads(state.read_text(encoding="utf-8"))["run"]
        names = {f.name for f in dataclasses.fields(grpo_lora.GRPOConfig)}
        return "from Python", grpo_lora.GRPOConfig(**{key: value for key, value in run.items() if key in names})
    return "from Python; settings unknown, so no token is marked as clipped", None


def curve(rows: list[dict[str, Any]], names: list[str]) -> str:
    """Some metrics against updates, as SVG; '' if the run has none of them."""
    lines = {name: [(row["step"], row[name]) for row in rows if row.get(name) is not None] for name in names}
    lines = {name: points[:: len(points) // 500 + 1] for name, points in lines.items() if points}
    if not lines:
        return ""
    xs, ys = zip(*itertools.chain(*lines.values()), strict=True)
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    x_of = lambda x: 45 + 265 * (x - left) / ((right - left) or 1)
    y_of = lambda y: 140 - 100 * (y - low) / ((high - low) or 1)
    parts = ['<path d="M45 35V140H310" fill="none" stroke="#bbb"/>']
    parts += [f'<text x="40" y="{y_of(y) + 4:.0f}" text-anchor="end">{y:.2g}</text>' for y in {low, high}]
    parts += [f'<text x="{x_of(x):.0f}" y="156" text-anchor="middle">{x}</text>' for x in {left, right}]
    for i, ((name, points), colour) in enumerate(zip(lines.items(), COLOURS, strict=False)):
        places = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        dots = "".join(
            f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="2.5"/>' for x, y in points if len(points) < 20
        )
        parts.append(
            f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="1.6"/><g fill="{colour}">{dots}</g>'
        )
        parts.append(f'<text x="45" y="{12 + 14 * i}" style="fill: {colour}">{text(name)}</text>')
    return f'<svg viewBox="0 0 320 162" role="img" aria-label="{text(", ".join(lines))}">{"".join(parts)}</svg>'


def changes(sample: dict[str, Any]) -> list[float]:
    """Log-prob of each token after the update minus that when it was sampled; 0 where one is not finite."""
    if "logps_after" not in sample:
        return []
    pairs = zip(sample["logps_sampled"], sample["logps_after"], strict=True)
    return [0.0 if before is None or after is None else after - before for before, after in pairs]


def clipped(sample: dict[str, Any], args: grpo_lora.GRPOConfig | None) -> list[bool]:
    """Which tokens the update has brought to the bound on their ratio, here against the sampler's log-probs."""
    A, logs = sample.get("advantage") or 0.0, changes(sample)
    if args is None or args.loss_type in ("sapo", "vespo"):  # which bend and do not clip
        return [False] * len(logs)
    if args.importance_sampling_level == "sequence":
        logs = [sum(logs) / max(len(logs), 1)] * len(logs)
    ratios = [math.exp(min(x, 80.0)) for x in logs]
    if args.loss_type == "cispo":
        return [ratio > (args.epsilon_high or math.inf) for ratio in ratios]
    delta = args.delta or math.inf
    high = min(1 + (args.epsilon if args.epsilon_high is None else args.epsilon_high), delta)
    return [ratio > high if A > 0 else A < 0 and not 1 - args.epsilon <= ratio <= delta for ratio in ratios]


def completion(sample: dict[str, Any], strongest: float, args: grpo_lora.GRPOConfig | None) -> str:
    """A completion, each token coloured by advantage × (log-prob after - log-prob when sampled)."""
    if "logps_after" not in sample:
        return text(sample["completion"])
    A, spans = sample.get("advantage") or 0.0, []
    columns = (sample[name] for name in ("tokens", "logps_sampled", "logps_after", "trained"))
    for token, before, after, trained, change, at_bound in zip(
        *columns, changes(sample), clipped(sample, args), strict=True
    ):
        effect = A * change
        colour = (
            f"rgba({'34, 139, 84' if effect > 0 else '214, 69, 65'}, {0.65 * min(1.0, abs(effect) / strongest):.2f})"
        )
        marks = " ".join(name for name, on in (("clipped", at_bound and trained), ("masked", not trained)) if on)
        about = "not finite"
        if before is not None and after is not None:
            about = (
                f"p {math.exp(before):.3g} → {math.exp(after):.3g}, log-prob {change:+.3g}, × advantage {effect:+.3g}"
            )
        about += "" if trained else ", not in the policy term"
        shown = text(token).replace("\n", "⏎\n") or "∅"
        spans.append(f'<span class="{marks}" style="background: {colour}" title="{about}">{shown}</span>')
    return "".join(spans)


def prompt_of(sample: dict[str, Any]) -> str:
    prompt = sample["prompt"]
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def update(samples: list[dict[str, Any]], args: grpo_lora.GRPOConfig | None, opened: bool) -> str:
    """The groups of one update, best completions first."""
    effects = sorted(abs((s.get("advantage") or 0.0) * change) for s in samples for change in changes(s))
    strongest = (effects[int(0.98 * (len(effects) - 1))] if effects else 0.0) or 1.0
    parts = [f"<details{' open' if opened else ''}><summary>update {samples[0]['step']}</summary>"]
    parts.append(f'<p class="note">full colour at ±{strongest:.2g}</p>')
    for _, group in itertools.groupby(samples, key=lambda sample: sample.get("group")):
        rows = sorted(group, key=lambda sample: -(sample.get("advantage") or 0.0))
        names = [name for name in rows[0] if name.startswith("rewards/")]
        heads = "".join(f'<th class="n">{text(name.removeprefix("rewards/"))}</th>' for name in names)
        parts.append(f'<p class="text">{text(prompt_of(rows[0]))}</p>')
        parts.append(f'<table><tr><th class="n">advantage</th>{heads}<th>completion</th></tr>')
        for row in rows:
            scores = "".join(f'<td class="n">{"-" if row[n] is None else format(row[n], ".3g")}</td>' for n in names)
            advantage = f'<td class="n">{row.get("advantage") or 0.0:+.2f}</td>'
            parts.append(f'<tr>{advantage}{scores}<td class="text">{completion(row, strongest, args)}</td></tr>')
        parts.append("</table>")
    return "".join([*parts, "</details>"])


def report(folder: Path, chosen: list[int] | None = None) -> str:
    """The page, as HTML."""
    metrics, samples = rows_of(folder / "metrics.jsonl"), rows_of(folder / "completions.jsonl")
    command, args = settings_of(folder)
    steps = sorted({s["step"] for s in samples if "logps_after" in s})
    shown = sorted({steps[i * (len(steps) - 1) // 4] for i in range(5)}) if steps else []  # first, last, three between
    missing = sorted(set(chosen or ()) - set(steps))
    if missing:
        raise ValueError(
            f"update {missing[0]}: its tokens were not recorded; there are those of {', '.join(map(str, steps))}"
        )
    parts = [f"<h1>{text(folder.resolve().name)}</h1><p><code>{text(command)}</code></p>"]
    warnings = [(row["step"], warning) for row in metrics for warning in row.get("warnings", ())]
    parts += [f"<p><b>warning</b>, update {step}: {text(warning)}</p>" for step, warning in warnings]
    parts += ["<h2>Curves</h2>", *(curve(metrics, names.split()) for names in CURVES)]
    parts.append(
        '<h2>What was pushed up and down</h2><p class="note">Completions of one prompt, with their rewards and their advantage '
        "in the group. Each token is coloured by advantage × (log-prob after the update - log-prob when it was sampled): "
        '<span style="background: rgba(34, 139, 84, .5)">green</span> moved the way its completion\'s advantage asks, '
        '<span style="background: rgba(214, 69, 65, .5)">red</span> the other way, pushed by what other completions taught. '
        '<span class="clipped">Dashed</span>: at the bound on its ratio. '
        '<span class="masked">Struck out</span>: not in the policy term. '
        "Point at a token for its numbers.</p>"
    )
    trained = [s for s in samples if s.get("split") != "eval"]
    for i, step in enumerate(chosen or shown):
        parts.append(update([s for s in trained if s["step"] == step], args, opened=i == 0))
    if not (chosen or shown):
        parts.append('<p class="note">This run did not record its tokens (--log_tokens_steps).</p>')
    held_out = [s for s in samples if s.get("split") == "eval"]
    if held_out:
        parts.append("<h2>Held-out problems</h2><table><tr><th>problem</th><th>first</th><th>last</th></tr>")
        first, last = ([s for s in held_out if s["step"] == at] for at in (held_out[0]["step"], held_out[-1]["step"]))
        for a, b in zip(first, last, strict=False):
            cells = "".join(
                f'<td class="text">{text(x)}</td>' for x in (prompt_of(a), a["completion"], b["completion"])
            )
            parts.append(f"<tr>{cells}</tr>")
        parts.append("</table>")
    head = f'<meta charset="utf-8"><title>{text(folder.resolve().name)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--updates", type=int, nargs="*", help="which ones; None: five of those whose tokens were recorded"
    )
    options = parser.parse_args()
    try:
        page = report(options.folder, options.updates)
        (options.folder / "report.html").write_text(page, encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(options.folder / "report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
