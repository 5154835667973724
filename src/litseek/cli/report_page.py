"""One self-contained HTML page about a run folder: what each stage did, in pictures and a table of receipts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from litseek.cli import report_figures as figures
from litseek.cli.report_runs import STAGES, StageRun

LOSS = ("loss/main", "loss")
REWARD = ("rollout/reward",)
ACCURACY = "eval/accuracy"
BITS = "val/bits_per_byte"
COMPRESSORS = {"gzip -9": "val/gzip_bits_per_byte", "xz -9e": "val/xz_bits_per_byte"}
TUNED = STAGES[3:]
ARMS = ("old frequencies", "yarn untrained", "yarn trained")


@dataclass
class Section:
    """One card of the page. `figures` are inline SVG, `table` is (header, rows)."""

    title: str
    text: str
    figures: list[Markup] = field(default_factory=list)
    table: tuple[list[str], list[list[str]]] | None = None
    samples: list[dict[str, str]] = field(default_factory=list)
    side_by_side: bool = False


def render(title: str, runs: Sequence[StageRun]) -> str:
    sections = [section for make in SECTIONS if (section := make(runs)) is not None]
    environment = Environment(
        loader=PackageLoader("litseek.cli", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("report.html").render(
        title=title, facts=facts(runs), lineage=[card(run, i) for i, run in enumerate(runs)],
        missing=missing(runs), sections=sections,
    )  # fmt: skip


def facts(runs: Sequence[StageRun]) -> list[tuple[str, str]]:
    """The line under the title: totals over the stages that have receipts."""
    receipts = [run.receipt for run in runs if run.receipt]
    rows = [
        ("tokens trained on", quantity(sum(r.get("tokens") or 0 for r in receipts))),
        ("training time", duration(sum(wall(r) or 0 for r in receipts))),
    ]
    rows += [("device", text) for text in unique(device(r) for r in receipts)[:1]]
    rows += [("commit", ", ".join(short(c) for c in unique(r.get("commit") for r in receipts)))]
    return [(name, value) for name, value in rows if value]


def missing(runs: Sequence[StageRun]) -> str:
    """A sentence on what the page cannot show, empty when all is there."""
    labels = {name: StageRun(name, runs[0].folder).label for name in STAGES}
    names = {run.name for run in runs}
    absent = [label for name, label in labels.items() if name not in names]
    open_ones = [run.label for run in runs if not run.receipt]
    notes = []
    if absent and names & set(STAGES):
        notes.append(f"Not in this run folder: {', '.join(absent)}.")
    if open_ones:
        notes.append(f"Not finished, so without a receipt: {', '.join(open_ones)}.")
    return " ".join(notes)


def card(run: StageRun, index: int) -> dict[str, str]:
    """A stage in the lineage: its key number, and what to compare it with."""
    value, unit, note = "…", "unfinished", ""
    results = run.results
    if ACCURACY in results and (run.name in TUNED or BITS not in results):
        value, unit = f"{100 * results[ACCURACY]:.1f} %", "of held-out problems"
        if (before := results.get(f"{ACCURACY}_before")) is not None:
            note = f"before: {100 * before:.1f} %"
    elif BITS in results:
        value, unit = f"{results[BITS]:.3f}", "bits per byte"
        if COMPRESSORS["gzip -9"] in results:
            note = f"gzip -9: {results[COMPRESSORS['gzip -9']]:.3f}"
    elif run.receipt:
        value, unit = "done", "no key number in its receipt"
    work = [quantity(run.receipt["tokens"]) + " tokens"] if run.receipt.get("tokens") else []
    work += [duration(seconds)] if (seconds := wall(run.receipt)) else []
    return {"label": run.label, "value": value, "unit": unit, "note": note, "work": " · ".join(work),
            "colour": figures.colour(run.name, index)}  # fmt: skip


def bits_section(runs: Sequence[StageRun]) -> Section | None:
    rows = []
    for run in runs:
        if BITS in run.results and run.name not in TUNED:  # a tuned stage is scored on answers only
            others = {name: run.results[key] for name, key in COMPRESSORS.items() if key in run.results}
            rows.append((run.name, run.label, float(run.results[BITS]), others))
    if not rows:
        return None
    sizes = unique(run.results.get("val/bytes") for run in runs if run.name not in TUNED)
    size = f" ({', '.join(quantity(n) for n in sizes)} bytes)" if sizes else ""
    text = (
        f"Held-out text{size}, never trained on. The bars are the model's cross-entropy in bits per byte of text, the marks are "
        "what the compressors need for the same bytes. Each stage is measured at its own context length."
    )
    return Section("Bits per byte", text, [picture(figures.bits_per_byte(rows), "Bits per byte by stage")])


def loss_section(runs: Sequence[StageRun]) -> Section | None:
    shown = [run for run in runs if run.name != "grpo" and run.column(*LOSS) is not None]
    if not shown:
        return None
    text = "Training loss over the tokens of each stage: every step faintly, a running average on top."
    return Section("Training loss", text, [picture(figures.loss_curves(shown, LOSS), "Training loss by stage")])


def position_section(runs: Sequence[StageRun]) -> Section | None:
    rows, table, unit = [], [], "nats a token"
    for run in runs:
        if not run.by_position:
            continue
        positions, arms, old = position_curves(run.by_position)
        if arms:
            unit = run.by_position.get("unit", unit)
            rows.append((run, positions, arms, old))
            table.append(position_row(run, arms))
    if not rows:
        return None
    text = (
        "The same held-out windows at the new length, read by three models: the parent with its old rotary frequencies, the "
        "parent with YaRN's frequencies before any training, and the stage's result. The first step is what the change "
        "of frequencies gives, the second what training at the new length gives; below zero is better. On the right the "
        "loss of the old frequencies is taken off, and with it the text's own ups and downs."
    )
    if any(row[1] == row[2] for row in table):
        text += " Where both are equal the parent had the new frequencies already: the report sets YaRN's factor once, for 128K."
    in_bits = all(f"{BITS}_untrained" in run.results for run, *_ in rows)
    header = ["bits per byte" if in_bits else f"mean {unit}", *ARMS, "from the frequencies", "from training"]
    figure = picture(figures.by_position(rows, unit), "Loss by position before and after YaRN")
    return Section("Loss by position, before and after YaRN", text, [figure], (header, table))


def position_curves(data: dict[str, Any]) -> tuple[np.ndarray, dict[str, np.ndarray], float | None]:
    """(positions, arm -> loss, old length) of loss_by_position.json."""
    given = data.get("arms", {name: data[name] for name in ARMS if name in data})
    arms = {name: np.array(given[name], dtype=np.float64) for name in [*ARMS, *given] if name in given}
    length = max((len(values) for values in arms.values()), default=0)
    positions = np.array(data.get("positions") or np.arange(length), dtype=np.float64)
    return positions, arms, data.get("old_length")


def position_row(run: StageRun, arms: dict[str, np.ndarray]) -> list[str]:
    """The three arms' bits per byte from the receipt, or where it has none the mean of their curves; then the two steps."""
    keys = dict(zip(ARMS, (f"{BITS}_before", f"{BITS}_untrained", BITS), strict=True))
    if keys[ARMS[1]] in run.results:
        means = {arm: float(run.results[key]) for arm, key in keys.items() if key in run.results}
    else:
        means = {name: float(np.nanmean(values)) for name, values in arms.items()}

    def gain(before: str, after: str) -> str:
        if before not in means or after not in means:
            return "–"
        change = round(means[after] - means[before], 3)
        return f"{change:+.3f}" if change else "0"

    cells = [f"{means[name]:.3f}" if name in means else "–" for name in ARMS]
    return [run.label, *cells, gain(ARMS[0], ARMS[1]), gain(ARMS[1], ARMS[2])]


def load_section(runs: Sequence[StageRun]) -> Section | None:
    drawn = [run for run in runs if run.routing]
    if not drawn:
        return None
    pictures = [picture(figures.expert_load(drawn[0].routing), f"Expert load, {drawn[0].label}")]
    pictures.append(picture(figures.imbalance(drawn), "Busiest expert by stage"))
    text = (
        f"How evenly the routers spread tokens over the experts, from the counts of whole batches. The maps show "
        f"the stage {drawn[0].label}: white is an even share, red an expert with twice its share or more, blue a starved "
        "one. Below, the busiest expert of each layer, stage by stage."
    )
    return Section("Expert load", text, pictures)


def skill_section(runs: Sequence[StageRun]) -> Section | None:
    rows: list[tuple[str, str, float, float | None]] = []
    for run in runs:
        if ACCURACY not in run.results:
            continue
        before = run.results.get(f"{ACCURACY}_before")
        if before is not None and not rows:
            rows.append(("before", f"before\n{run.label}", float(before), half_width(float(before), run)))
        value = float(run.results[ACCURACY])
        rows.append((run.name, run.label, value, half_width(value, run)))
    pictures = [picture(figures.accuracy(rows), "Accuracy along the lineage")] if rows else []
    for run in runs:
        if run.column(*REWARD) is not None:
            pictures.append(picture(figures.reward(run, REWARD, (ACCURACY,)), f"Reward, {run.label}"))
    if not pictures:
        return None
    counts = unique(run.results.get("eval/problems") for run in runs)
    on = f" on {counts[0]:g} held-out problems" if counts else " on held-out problems"
    text = f"Accuracy{on}, sampled at temperature 1, none of them in any training set"
    text += "; whiskers are the 95% interval of the sample." if counts else "."
    return Section("Arithmetic: accuracy and reward", text, pictures, side_by_side=True)


def half_width(share: float, run: StageRun) -> float | None:
    """Half of the normal 95% interval of a share measured on n problems."""
    problems = run.results.get("eval/problems")
    return 1.96 * math.sqrt(max(share * (1 - share), 1e-9) / problems) if problems else None


def sample_section(runs: Sequence[StageRun], most: int = 3) -> Section | None:
    """Of each stage, what was written at its end; of the first stage that was judged before it, that too."""
    rows: list[dict[str, str]] = []
    for run in runs:
        steps = [int(sample.get("step", 0)) for sample in run.samples]
        if not steps:
            continue
        first_step = min(steps)
        if not rows and first_step < max(steps):
            rows += [sample_row(f"before {run.label}", s) for s in run.samples if s.get("step", 0) == first_step][:2]
        last = [s for s, step in zip(run.samples, steps, strict=True) if step == max(steps)]
        unlike = list(
            {str(s.get("prompt")): s for s in last}.values()
        )  # judged twice at its end, a problem counts once
        rows += [sample_row(run.label, sample) for sample in unlike[:most]]
    if not rows:
        return None
    return Section("Samples", "What each stage answers, sampled at temperature 1; the prompt is grey.", samples=rows)


def sample_row(stage: str, sample: dict[str, Any]) -> dict[str, str]:
    verdict = first(sample, "correct", "reward")
    word = "" if verdict is None else "right" if float(verdict) >= 0.99 else "wrong"
    text = first(sample, "completion", "text") or ""
    return {"stage": stage, "prompt": str(sample.get("prompt", "")), "text": f" {text}", "verdict": word}


def receipt_section(runs: Sequence[StageRun]) -> Section | None:
    rows = []
    for run in runs:
        receipt = run.receipt
        if not receipt:
            continue
        rows.append([
            run.label, quantity(receipt.get("tokens")), duration(wall(receipt)), speed(receipt),
            short(receipt.get("config")), short(receipt.get("parent")),
            short(receipt.get("commit")), versions(receipt),
        ])  # fmt: skip
    if not rows:
        return None
    header = ["stage", "tokens", "wall time", "tokens/s", "config", "parent", "commit", "versions"]
    return Section("Receipts", "One per finished stage, from its receipt.json.", table=(header, rows))


SECTIONS = (bits_section, loss_section, position_section, load_section, skill_section, sample_section, receipt_section)


def picture(figure: Any, label: str) -> Markup:
    return Markup(figures.svg(figure, label))  # our own drawing: text in it is escaped by matplotlib


def first(row: dict[str, Any], *names: str) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(v for v in values if v is not None and v != ""))


def wall(receipt: dict[str, Any]) -> float | None:
    return receipt.get("wall_s")


def device(receipt: dict[str, Any]) -> str | None:
    return receipt.get("device")


def speed(receipt: dict[str, Any]) -> str:
    seconds, tokens = wall(receipt), receipt.get("tokens")
    return quantity(tokens / seconds) if seconds and tokens else "–"


def versions(receipt: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in (receipt.get("versions") or {}).items())


def short(value: Any) -> str:
    """The first ten characters of a hash; the mark of a changed tree stays."""
    head, plus, mark = str(value or "–").partition("+")
    return head[:10] + plus + mark


def quantity(value: float | None) -> str:
    """1234567 -> 1.23M."""
    if value is None:
        return "–"
    for size, mark in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g}{mark}"
    return f"{value:.3g}"


def duration(seconds: float | None) -> str:
    if not seconds:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
