"""The report of a comparison as one HTML file: headline, table, frontier, each model's layers and recipe, samples, glossary."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from importlib.resources import files

from .. import __version__
from ..evaluation.summary import Estimate, Summary
from ..pipeline.evaluate import Comparison, Row
from . import charts, words
from .glossary import entries
from .markup import Html, join, scroll, tag
from .model import model_section
from .words import DASH, HEAD, agreement, count, interval, percent, significant, size

POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # the browser itself keeps the file from asking the network for anything
LATENCY_NAMES = {
    "prefill_tokens_per_s": ("Prefill", "tokens/s"),
    "decode_tokens_per_s": ("Decode", "tokens/s"),
    "peak_memory_bytes": ("Peak memory", "RssAnon"),
    "peak_rss_bytes": ("Peak memory", "with mapped files"),
    "prefill_ms_per_token_p50": ("Prefill, p50", "ms/token"),
    "prefill_ms_per_token_p95": ("Prefill, p95", "ms/token"),
    "decode_ms_per_token_p50": ("Decode, p50", "ms/token"),
    "decode_ms_per_token_p95": ("Decode, p95", "ms/token"),
    "load_s": ("Loading", "s"),
    "weights_bytes": ("Weights in memory", None),
}
SETTINGS = {"dtype": "computed in", "threads": "threads:", "prefill": "prompt tokens:", "decode": "generated tokens:", "repeats": "repeats:"}


def render(
    comparison: Comparison,
    *,
    title: str,
    sentences: dict[str, str] | None = None,
    notes: Sequence[str] = (),
    latencies: dict[str, dict] | None = None,
) -> str:
    """One self-contained HTML page about a comparison; the same input gives the same bytes.

    sentences: model name -> text that it generated. notes: what the reader must know before the numbers.
    latencies: model name -> what `lowbit bench` measured (prefill_tokens_per_s, decode_tokens_per_s, peak_memory_bytes, ...).
    """
    best = words.best_tradeoff(comparison)
    body = join(
        _header(comparison, best, title, notes),
        _table(comparison, best),
        _frontier(comparison),
        _speed(latencies),
        _models(comparison, best),
        _sentences(sentences),
        _glossary(),
        _footer(comparison),
    )
    return "<!doctype html>\n" + tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("title", title),
            tag("style", Html((files("lowbit") / "report" / "style.css").read_text(encoding="utf-8"))),
        ),
        tag("body", tag("main", body)),
        lang="en",
    )


def _header(comparison: Comparison, best: Row | None, title: str, notes: Sequence[str]) -> Html:
    choice = None
    if best is not None and len(comparison.rows) > 2:
        choice = (
            f"Of {count(len(comparison.rows) - 1, 'model')} this is the best trade-off: the smallest sum of its share of the original’s file "
            "and the share of first choices that changed. You may weigh them differently; the table has them all."
        )
    return tag(
        "header",
        tag("h1", title),
        tag("p", words.headline(comparison, best), class_="lead"),
        _facts(comparison.rows[0], best) if best is not None else None,
        tag("p", choice, class_="small") if choice else None,
        tag("ul", [tag("li", note) for note in notes], class_="notes") if notes else None,
    )


def _facts(original: Row, best: Row) -> Html:
    before, after = original.summaries[HEAD], best.summaries[HEAD]
    facts = [
        ("File", percent(best.size.file_bytes / original.size.file_bytes), f"{size(best.size.file_bytes)} of {size(original.size.file_bytes)}"),
        _fact("Same first choice", after.agreement, agreement),
        _fact("Mean KL divergence", after.kl_mean, significant),
        ("Perplexity", significant(after.perplexity.value, 4), f"original {significant(before.perplexity.value, 4)}"),
    ]
    return tag("dl", [tag("div", tag("dt", name), tag("dd", value, tag("small", detail))) for name, value, detail in facts], class_="facts")


def _fact(name: str, estimate: Estimate | None, show: Callable[[float], str]) -> tuple[str, str, str]:
    return (name, DASH, DASH) if estimate is None else (name, show(estimate.value), interval(estimate, show))


def _table(comparison: Comparison, best: Row | None) -> Html:
    heads = [
        ("Model", None), ("File", None), ("Bits per weight", "whole model"), ("Bits per weight", "linear layers"), ("Perplexity", "full windows"),
        ("Perplexity", "llama.cpp’s halves"), ("KL, mean", "nats"), ("KL, median", "nats"), ("KL, p99", "nats"), ("Same first choice", "top-1"),
    ]  # fmt: skip
    rows = [_row(row, row is comparison.rows[0], row is best) for row in comparison.rows]
    if comparison.noise_floor is not None:
        rows.append(_measured_row("Noise floor", "the original in its own number format, against float32", [DASH] * 3, comparison.noise_floor, class_="floor"))
    return tag(
        "section",
        tag("h2", "What was lost"),
        tag(
            "p",
            f"Every model on the same {count(comparison.windows, 'window')} of {comparison.length:,} tokens of {comparison.text}. "
            "Small print: the 95% confidence interval. KL and first choices are against the original, over full windows.",
            class_="say",
        ),
        scroll("The table of all models", tag("table", _head(heads), tag("tbody", rows))),
        _other_convention(comparison),
    )


def _head(heads: list[tuple[str, str | None]]) -> Html:
    return tag("thead", tag("tr", [tag("th", name, tag("small", detail) if detail else None, scope="col") for name, detail in heads]))


def _row(row: Row, is_original: bool, is_best: bool) -> Html:
    sizes = [size(row.size.file_bytes), f"{row.size.bits_per_weight:.2f}", f"{row.size.linear_bits:.2f}"]
    mark = "the original" if is_original and row.name != "original" else "best trade-off" if is_best else None
    return _measured_row(row.name, mark, sizes, row.summaries, class_="original" if is_original else "best" if is_best else None)


def _measured_row(name: str, mark: str | None, sizes: list[str], summaries: dict[str, Summary], *, class_: str | None) -> Html:
    cells = [tag("td", text) for text in sizes]
    cells += [_estimate(summaries[convention].perplexity if convention in summaries else None, _four) for convention in ("full", "llama.cpp")]
    cells += _divergence(summaries[HEAD])
    return tag("tr", tag("th", name, tag("span", mark, class_="mark") if mark else None, scope="row"), cells, class_=class_)


def _four(value: float) -> str:
    return significant(value, 4)


def _divergence(summary: Summary) -> list[Html]:
    share = partial(agreement, like=None if summary.agreement is None else summary.agreement.value)
    return [*(_estimate(e, significant) for e in (summary.kl_mean, summary.kl_median, summary.kl_p99)), _estimate(summary.agreement, share)]


def _estimate(estimate: Estimate | None, show: Callable[[float], str]) -> Html:
    if estimate is None:
        return tag("td", DASH)
    if math.isnan(estimate.value):
        return tag("td", tag("span", "not a number", class_="scarce"))
    return tag("td", show(estimate.value), tag("small", interval(estimate, show)))


def _other_convention(comparison: Comparison) -> Html | None:
    """KL and agreement over the second halves, folded."""
    rows = [(row.name, row.summaries["llama.cpp"]) for row in comparison.rows[1:] if "llama.cpp" in row.summaries]
    if comparison.noise_floor is not None and "llama.cpp" in comparison.noise_floor:
        rows.append(("Noise floor", comparison.noise_floor["llama.cpp"]))
    if not rows:
        return None
    heads = [("Model", None), ("KL, mean", "nats"), ("KL, median", "nats"), ("KL, p99", "nats"), ("Same first choice", "top-1"), ("Tokens", "scored")]
    body = [tag("tr", tag("th", name, scope="row"), _divergence(summary), tag("td", f"{summary.tokens:,}")) for name, summary in rows]
    table = tag("table", _head(heads), tag("tbody", body))
    summary = tag("summary", "KL and first choices over the second halves of the windows, as llama-perplexity scores")
    return tag("details", summary, scroll("KL over the second halves", table), class_="fold")


def _frontier(comparison: Comparison) -> Html | None:
    points, left_out = [], []
    for row in comparison.rows[1:]:
        kl = row.summaries[HEAD].kl_mean
        if kl is None or not math.isfinite(kl.value):
            left_out.append(row.name)
        else:
            points.append(charts.Point(row.name, row.size.file_bytes, kl.value, kl.low, kl.high))
    if not points:
        return None
    floor = None if comparison.noise_floor is None else comparison.noise_floor[HEAD].kl_mean
    height = floor.value if floor is not None and math.isfinite(floor.value) else 0.0
    original = charts.Point(comparison.rows[0].name, comparison.rows[0].size.file_bytes, height)
    return tag(
        "section",
        tag("h2", "Size against loss"),
        tag(
            "p",
            "Down and left is better. The steps join the models that no other beats in both size and loss. The original stands ",
            "at its noise floor: what its own number format loses against float32." if height > 0 else "on the bottom line: it loses nothing against itself.",
            class_="say",
        ),
        charts.frontier(points, original, width=920, height=440, class_="wide"),
        charts.frontier(points, original, width=360, height=440, class_="narrow"),
        _frontier_legend(points),
        _larger(comparison),
        tag("p", f"Not drawn, because the loss is not a number: {', '.join(left_out)}.", class_="small") if left_out else None,
    )


def _larger(comparison: Comparison) -> Html | None:
    """Names the models that save nothing."""
    original, *others = comparison.rows
    names = [row.name for row in others if row.size.file_bytes >= original.size.file_bytes]
    return tag("p", f"Not smaller than the original, which therefore beats them: {', '.join(names)}.", class_="small") if names else None


def _frontier_legend(points: list[charts.Point]) -> Html:
    beaten = len(charts.pareto(points)) < len(points)
    items = [
        tag("span", tag("span", class_="key round"), "on the frontier"),
        tag("span", tag("span", class_="key ring"), "beaten by another") if beaten else None,
        tag("span", tag("span", class_="key lozenge"), "the original"),
    ]
    return tag("p", items, class_="legend")


def _speed(latencies: dict[str, dict] | None) -> Html | None:
    if not latencies:
        return None
    keys = list(dict.fromkeys(key for found in latencies.values() for key in found))
    settings = [key for key in SETTINGS if len({str(found.get(key)) for found in latencies.values()}) == 1 and key in keys]
    said = ", ".join(f"{SETTINGS[key]} {next(iter(latencies.values()))[key]}" for key in settings)
    shown = sorted((key for key in keys if key not in settings), key=lambda key: (list(LATENCY_NAMES) + keys).index(key))
    heads = [("Model", None), *(LATENCY_NAMES.get(key, (key.replace("_", " "), None)) for key in shown)]
    body = [tag("tr", tag("th", name, scope="row"), [tag("td", _measurement(key, found.get(key))) for key in shown]) for name, found in latencies.items()]
    return tag(
        "section",
        tag("h2", "Speed and memory"),
        tag("p", f"Measured on the machine that made this report, each model in a fresh process{f'; {said}' if said else ''}.", class_="say"),
        scroll("Speed and memory", tag("table", _head(heads), tag("tbody", body))),
    )


def _measurement(key: str, value: object) -> str:
    if value is None:
        return DASH
    if isinstance(value, dict):
        return ", ".join(f"{name} {_measurement(key, part)}" for name, part in value.items())
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return size(value) if key.endswith("_bytes") else significant(value)


def _models(comparison: Comparison, best: Row | None) -> Html | None:
    """A fold per model; the best trade-off's is open."""
    rows = [row for row in comparison.rows[1:] or comparison.rows if row.provenance or len(comparison.rows) > 1]
    if not rows:
        return None
    return tag(
        "section",
        tag("h2", "Where it was lost, and how each file was made"),
        tag("p", "Loss layer by layer, histograms, recipe and provenance of every model. Touch a name to unfold it.", class_="say"),
        [model_section(row, is_open=row is best) for row in rows],
    )


def _sentences(sentences: dict[str, str] | None) -> Html | None:
    if not sentences:
        return None
    samples = [tag("figure", tag("figcaption", tag("b", name)), tag("blockquote", text), class_="sample") for name, text in sentences.items()]
    return tag(
        "section",
        tag("h2", "What they write"),
        tag("p", "One sample says little about a model; it shows at a glance whether one is broken.", class_="say"),
        samples,
    )


def _glossary() -> Html:
    return tag("section", tag("h2", "How to read the numbers"), tag("dl", [[tag("dt", name), tag("dd", text)] for name, text in entries()], class_="glossary"))


def _footer(comparison: Comparison) -> Html:
    return tag("footer", tag("p", f"Made by lowbit {__version__}. Evaluation tokens: {comparison.windows} × {comparison.length}, sha256 {comparison.digest[:16]}…", class_="small"))
