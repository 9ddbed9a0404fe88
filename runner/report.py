"""report.html: what a run did. Its curves, and what GRPO pushed up and down, token by token.

    python -m runner.report RUN_FOLDER [--updates 10 50]     # a run that ends well has one

The page needs no network and has no script in it.
"""

import argparse
import dataclasses
import html
import itertools
import json
import math
import sys
import unicodedata
from pathlib import Path
from typing import Any

import torch

from grpo_lora import SAMPLER_GAP, GRPOConfig, GRPOTrainer, completion_mask, evaluating

CURVES = [  # the first is what counts; those that a run lacks are left out
    ["reward", "eval_reward"],
    ["eval_accuracy", "eval_think_rate"],
    ["completions/mean_length", "eval_completions/mean_length"],
    ["entropy"],
    ["grad_norm"],
    ["loss"],
    ["kl"],
    ["clip_ratio/region_mean"],
    ["frac_reward_zero_std", "completions/clipped_ratio"],
    ["learning_rate"],
    [SAMPLER_GAP],
]
COLOURS = ("#2563a8", "#c2571a")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto;
       padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.2em; margin-top: 2em }
code { background: #f3f3f3; padding: .1em .3em }
svg { width: 320px; margin: 0 .8em .8em 0 }
svg text { font: 11px system-ui, sans-serif; fill: #555 }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; vertical-align: top; padding: .25em .6em }
tr + tr { border-top: 1px solid #e4e4e4 }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; width: 1% }
.text { font: 13px ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
        unicode-bidi: isolate }
.text span { border-radius: 2px }
.clipped { outline: 1.5px dashed #777; outline-offset: -1px }
.masked { opacity: .35; text-decoration: line-through }
summary { cursor: pointer; font-weight: 600; margin-top: .8em } .note { color: #555 }
"""
LEGEND = """<h2>What was pushed up and down</h2>
<p class="note">Completions of one prompt, with their rewards and their advantage in the group. Each
token is coloured by advantage × (log-prob after the update - log-prob when it was sampled):
<span style="background: rgba(34, 139, 84, .5)">green</span> moved the way its completion's
advantage asks, <span style="background: rgba(214, 69, 65, .5)">red</span> the other way, pushed by
what other completions taught. <span class="clipped">Dashed</span>: at the bound on its ratio.
<span class="masked">Struck out</span>: not in the policy term. Point at a token for its
numbers.</p>"""

# ------------------------------------------------------------------------------------ token traces


class TokenTraces:
    """A callback: every `every` updates, records what the update did to each token of the samples
    shown: its log-prob when it was sampled and now, and whether its surrogate counted."""

    def __init__(self, every: int | None, num_completions_to_log: int = 8) -> None:
        self.every, self.shown = every, num_completions_to_log

    def __call__(self, trainer: GRPOTrainer, metrics: dict[str, Any]) -> None:
        if trainer.step and trainer.due(self.every):
            # of this process's first rows, which on the first process are the first of all
            changes = token_changes(trainer, self.shown)[: self.shown]
            pairs = zip(trainer.samples, changes, strict=False)
            trainer.samples[: len(changes)] = [sample | change for sample, change in pairs]


def token_changes(trainer: GRPOTrainer, count: int) -> list[dict[str, Any]]:
    """What the last update did to the tokens of its first groups, for at least `count` rows."""
    rollout, micro_batches = trainer.last_batch
    G, trained = rollout.num_generations, rollout.completion_mask.clone()
    for batch in micro_batches:
        if batch.uncertain is not None:
            for p, kept in zip(batch.prompts, batch.uncertain.split(G), strict=True):
                trained[p * G : (p + 1) * G, : kept.shape[1]] &= kept
    # all that was written, also where mask_truncated_completions took it out of the loss
    mask = completion_mask(rollout.completion_ids, trainer.eos_token_ids)
    written = dataclasses.replace(rollout, completion_mask=mask)
    rows = []
    for p in range(min(-(-count // G), len(rollout.prompt_ids))):
        shown = written.select([p])
        with torch.no_grad(), evaluating(trainer.model):
            logps, _ = trainer.logps(shown)
        for i, n in enumerate(shown.completion_mask.sum(dim=1).tolist()):
            row = {"tokens": token_texts(trainer.tokenizer, shown.completion_ids[i, :n].tolist())}
            row |= {"logps_sampled": shown.logps[i, :n].tolist()}
            row |= {"logps_after": logps[i, :n].tolist()}
            rows.append(row | {"trained": trained[p * G + i, :n].tolist()})
    return rows


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each token. Some tokenizers drop a space at the start of a text: so each is read
    after the one before it."""
    texts = [tokenizer.decode(ids[:1])] if ids else []
    for i in range(1, len(ids)):
        first, both = tokenizer.decode(ids[i - 1 : i]), tokenizer.decode(ids[i - 1 : i + 1])
        follows = both.startswith(first)
        texts.append(both.removeprefix(first) if follows else tokenizer.decode(ids[i : i + 1]))
    return texts


# ------------------------------------------------------------------------------------ a run's files


def printable(text: str) -> str:
    """Model text for the terminal or a page: control and direction characters, which could rewrite
    the screen, are made visible."""
    hidden = lambda c: c not in "\n\t" and unicodedata.category(c)[0] == "C"
    return "".join(repr(c)[1:-1] if hidden(c) else c for c in text)


def text(value: Any) -> str:
    """Model text as HTML that cannot do anything: markup is escaped."""
    return html.escape(printable(str(value)))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's file. A torn last one, of a run that goes on or was killed, is left out.

    Raises ValueError, in one line, for a file that is none of a run.
    """
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


def settings_of(folder: Path) -> GRPOConfig | None:
    """A run's settings, from its command line or a checkpoint; None where there is neither."""
    if (folder / "settings.args").exists():
        from runner.cli import parse

        return parse([f"@{folder}/settings.args"])[2]
    for state in sorted(folder.glob("checkpoint-*/state.json")):
        run = json.loads(state.read_text(encoding="utf-8"))["run"]
        names = {f.name for f in dataclasses.fields(GRPOConfig)}
        return GRPOConfig(**{key: value for key, value in run.items() if key in names})
    return None


# ----------------------------------------------------------------------------------------- the page


def thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most some 500 points: of each stretch the first, lowest, highest and last."""
    size = -(-len(points) // 125)
    stretches = (points[i : i + size] for i in range(0, len(points), size))
    height = lambda point: point[1]
    kept = ({s[0], min(s, key=height), max(s, key=height), s[-1]} for s in stretches)
    return [point for some in kept for point in sorted(some)] if size > 4 else points


def curve(rows: list[dict[str, Any]], names: list[str]) -> str:
    """Some metrics against updates, as SVG; '' if the run has none of them."""
    lines = {
        name: [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        for name in names
    }
    lines = {name: thinned(points) for name, points in lines.items() if points}
    if not lines:
        return ""
    xs, ys = zip(*itertools.chain(*lines.values()), strict=True)
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    x_of = lambda x: 60 + 250 * (x - left) / ((right - left) or 1)
    y_of = lambda y: 140 - 100 * (y - low) / ((high - low) or 1)
    parts = ['<path d="M60 35V140H310" fill="none" stroke="#bbb"/>']
    for y in {low, high}:
        label = f"{y:.0f}" if 99.5 <= abs(y) < 1e6 else f"{y:.2g}"
        parts.append(f'<text x="55" y="{y_of(y) + 4:.0f}" text-anchor="end">{label}</text>')
    # the outermost labels grow inwards, so that long ones are not cut off
    for x, anchor in {left: "start", right: "end"}.items():
        parts.append(f'<text x="{x_of(x):.0f}" y="156" text-anchor="{anchor}">{x}</text>')
    for i, ((name, points), colour) in enumerate(zip(lines.items(), COLOURS, strict=False)):
        places = [f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points]
        path = f'points="{" ".join(places)}" fill="none" stroke="{colour}" stroke-width="1.6"'
        parts.append(f"<polyline {path}/>")
        for x, y in points if len(points) < 20 else ():
            circle = f'cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="2.5" fill="{colour}"'
            parts.append(f"<circle {circle}/>")
        title = f'x="60" y="{12 + 14 * i}" style="fill: {colour}"'
        parts.append(f"<text {title}>{text(name)}</text>")
    label = text(", ".join(lines))
    return f'<svg viewBox="0 0 320 162" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def changes(sample: dict[str, Any]) -> list[float]:
    """Log-prob of each token after the update minus that when it was sampled; 0 if not finite."""
    if "logps_after" not in sample:
        return []
    pairs = zip(sample["logps_sampled"], sample["logps_after"], strict=True)
    return [0.0 if before is None or after is None else after - before for before, after in pairs]


def clipped(sample: dict[str, Any], args: GRPOConfig | None) -> list[bool]:
    """Which tokens the update has brought to the bound on their ratio, against the sampler's."""
    A, logs = sample.get("advantage") or 0.0, changes(sample)
    # these bend and do not clip, or bound something else than the ratio of a token
    if args is None or args.loss_type in ("sapo", "vespo", "opmd", "dppo", "gmpo"):
        return [False] * len(logs)
    if args.importance_sampling_level == "sequence":
        logs = [sum(logs) / max(len(logs), 1)] * len(logs)
    ratios = [math.exp(min(x, 80.0)) for x in logs]
    if args.loss_type == "cispo":
        return [ratio > (args.epsilon_high or math.inf) for ratio in ratios]
    delta = args.delta or math.inf
    high = min(1 + (args.epsilon if args.epsilon_high is None else args.epsilon_high), delta)
    if A > 0:
        return [ratio > high for ratio in ratios]
    return [A < 0 and not 1 - args.epsilon <= ratio <= delta for ratio in ratios]


def number(value: Any) -> str:
    """A reward; - for None; and as text what a reward function has logged under such a name."""
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else text(value)


def completion(sample: dict[str, Any], strongest: float, args: GRPOConfig | None) -> str:
    """A completion, each token coloured by advantage × (log-prob after - when it was sampled)."""
    if "logps_after" not in sample:
        return text(sample["completion"])
    A, spans = sample.get("advantage") or 0.0, []
    at_bounds, moves = clipped(sample, args), changes(sample)
    columns = (sample[name] for name in ("tokens", "logps_sampled", "logps_after", "trained"))
    for i, (token, before, after, trained) in enumerate(zip(*columns, strict=True)):
        effect = A * moves[i]
        hue, depth = ("34, 139, 84" if effect > 0 else "214, 69, 65"), abs(effect) / strongest
        style = f"background: rgba({hue}, {0.65 * min(1.0, depth):.2f})"
        marks = ["clipped"] if at_bounds[i] and trained else [] if trained else ["masked"]
        about = "not finite"
        if before is not None and after is not None:
            about = f"p {math.exp(before):.3g} → {math.exp(after):.3g}, log-prob {moves[i]:+.3g}"
            about += f", × advantage {effect:+.3g}"
        about += "" if trained else ", not in the policy term"
        shown = text(token).replace("\n", "⏎\n") or "∅"
        attributes = f'class="{" ".join(marks)}" style="{style}" title="{about}"'
        spans.append(f"<span {attributes}>{shown}</span>")
    return "".join(spans)


def prompt_of(sample: dict[str, Any]) -> str:
    prompt = sample["prompt"]
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def update(samples: list[dict[str, Any]], args: GRPOConfig | None, opened: bool) -> str:
    """The groups of one update, best completions first."""
    pairs = [(s.get("advantage") or 0.0, change) for s in samples for change in changes(s)]
    effects = sorted(abs(A * change) for A, change in pairs)
    strongest = (effects[int(0.98 * (len(effects) - 1))] if effects else 0.0) or 1.0
    parts = [f"<details{' open' if opened else ''}><summary>update {samples[0]['step']}</summary>"]
    parts.append(f'<p class="note">full colour at ±{strongest:.2g}</p>')
    for _, group in itertools.groupby(samples, key=lambda sample: sample.get("group")):
        rows = sorted(group, key=lambda sample: -(sample.get("advantage") or 0.0))
        names = [name for name in rows[0] if name.startswith("rewards/")]
        heads = [f'<th class="n">{text(name.removeprefix("rewards/"))}</th>' for name in names]
        parts.append(f'<p class="text">{text(prompt_of(rows[0]))}</p><table>')
        parts.append(f'<tr><th class="n">advantage</th>{"".join(heads)}<th>completion</th></tr>')
        for row in rows:
            numbers = [f"{row.get('advantage') or 0.0:+.2f}"]
            numbers += [number(row[name]) for name in names]
            cells = "".join(f'<td class="n">{number}</td>' for number in numbers)
            shown = completion(row, strongest, args)
            parts.append(f'<tr>{cells}<td class="text">{shown}</td></tr>')
        parts.append("</table>")
    return "".join([*parts, "</details>"])


def report(folder: Path, args: GRPOConfig | None = None, chosen: list[int] | None = None) -> str:
    """The page, as HTML. args: the run's settings; None: as its folder tells them. chosen: the
    updates to show token by token; None: five of those whose tokens were recorded.

    Raises ValueError, in one line, for a folder that holds no run.
    """
    metrics = read_lines(folder / "metrics.jsonl")
    samples = read_lines(folder / "completions.jsonl")
    args, command = args or settings_of(folder), "from Python"
    if args is None:
        command += "; settings unknown, so no token is marked as clipped"
    if (folder / "settings.args").exists():
        command = f"python grpo_lora.py @{folder}/settings.args"
    steps = sorted({s["step"] for s in samples if "logps_after" in s})
    shown = sorted({steps[i * (len(steps) - 1) // 4] for i in range(5)}) if steps else []
    missing = sorted(set(chosen or ()) - set(steps))
    if missing:
        there = ", ".join(map(str, steps))
        raise ValueError(f"update {missing[0]}: its tokens were not recorded; there are {there}")
    parts = [f"<h1>{text(folder.resolve().name)}</h1><p><code>{text(command)}</code></p>"]
    for row in metrics:
        said = row.get("warnings")  # or a number of this name, if a reward function logs one
        for warning in said if isinstance(said, list) else ():
            parts.append(f"<p><b>warning</b>, update {row['step']}: {text(warning)}</p>")
    parts += ["<h2>Curves</h2>", *(curve(metrics, names) for names in CURVES), LEGEND]
    trained = [s for s in samples if s.get("split") != "eval"]
    for i, step in enumerate(chosen or shown):
        parts.append(update([s for s in trained if s["step"] == step], args, opened=i == 0))
    if not (chosen or shown):
        parts.append('<p class="note">This run did not record its tokens (--log_tokens_steps).</p>')
    held_out = [s for s in samples if s.get("split") == "eval"]
    if held_out:
        heads = "".join(f"<th>{head}</th>" for head in ("problem", "first", "last"))
        parts.append(f"<h2>Held-out problems</h2><table><tr>{heads}</tr>")
        ends = (held_out[0]["step"], held_out[-1]["step"])
        first, last = ([s for s in held_out if s["step"] == end] for end in ends)
        for a, b in zip(first, last, strict=False):
            texts = (prompt_of(a), a["completion"], b["completion"])
            cells = "".join(f'<td class="text">{text(x)}</td>' for x in texts)
            parts.append(f"<tr>{cells}</tr>")
        parts.append("</table>")
    title = text(folder.resolve().name)
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    body = "".join(parts)
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def write_report(
    folder: Path, args: GRPOConfig | None = None, chosen: list[int] | None = None
) -> Path:
    """Write a run's report.html."""
    path = folder / "report.html"
    path.write_text(report(folder, args, chosen), encoding="utf-8")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("folder", type=Path)
    which = "which ones; None: five of those whose tokens were recorded"
    parser.add_argument("--updates", type=int, nargs="*", help=which)
    options = parser.parse_args()
    try:
        print(write_report(options.folder, chosen=options.updates))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
