"""The part of the report about one model: loss per layer, histograms, experts, recipe, provenance, notes."""

from __future__ import annotations

from ..errors import CheckpointError, LowbitError
from ..pipeline.evaluate import Row
from ..scheme import Scheme
from . import charts, records
from .markup import Html, join, scroll, tag
from .words import DASH, count, percent, significant

MANY_NOTES = 4
VERSIONS = ("lowbit", "torch", "transformers")


def model_section(row: Row, *, is_open: bool) -> Html:
    """A fold with everything that the provenance of a model says; CheckpointError for one that lowbit did not write."""
    try:
        return _model_section(row, is_open=is_open)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, LowbitError) as error:
        raise CheckpointError(f"{row.path}: its provenance is not what lowbit writes ({type(error).__name__}: {error}).") from error


def _model_section(row: Row, *, is_open: bool) -> Html:
    layers = records.read(row.provenance)
    described = row.provenance.get("recipe", {}).get("name", "") if row.provenance else "no record of how it was made"
    return tag(
        "details",
        tag("summary", row.name, tag("small", described if described != row.name else "")),
        _training(row.provenance.get("training")),
        _losses(layers) if layers else None,
        _histograms(layers),
        _experts(layers),
        _provenance(row.provenance, layers) if row.provenance else _unknown(),
        class_="model",
        open=True if is_open else None,
    )


def _training(training: dict | None) -> Html | None:
    """The held-out KL over the steps of quantization-aware training."""
    points = [(int(step), float(kl)) for step, kl in (training or {}).get("curve") or []]
    if not points:
        return None
    (_, first), (best_step, best) = points[0], min(points, key=lambda point: point[1])
    what, axis = ("Cross-entropy", "loss") if (training or {}).get("metric") == "loss" else ("Mean KL divergence to the original", "KL")
    words = f"{what} on windows of the data that were not trained on: {significant(first)} at step {points[0][0]:,}, {significant(best)} at step {best_step:,}, which was kept."
    return join(tag("h3", "Training"), tag("p", words, class_="say"), tag("figure", charts.curve(f"Held-out {axis} over the steps of training", f"held-out {axis}, nats", points)))


def _unknown() -> Html:
    return tag("p", "This file carries no record of its layers or of how it was made: it was not written by lowbit.", class_="say")


def _losses(layers: list[records.Layer]) -> Html | None:
    panels = records.panels(layers)
    if not any(panel.error is not None for panel in panels):
        return None
    tops = {m: _top([p for p in panels if p.measure == m]) for m in ("output", "weight")}
    compared = any(panel.plain is not None for panel in panels)
    return join(
        tag("h3", "Loss per layer"),
        tag("p", _loss_words(panels, layers), class_="say"),
        tag("p", tag("span", tag("span", class_="key"), "as quantized"), tag("span", tag("span", class_="key plain"), "plain rounding") if compared else None, class_="legend"),
        tag("div", [_panel(panel, tops[panel.measure]) for panel in panels], class_="panels"),
        _matrix(panels, compared),
    )


def _top(panels: list[records.Panel]) -> float:
    return 1.04 * max((v for panel in panels for bar in panel.bars for v in (bar.error, bar.plain) if v is not None), default=0.0) or 1.0


def _loss_words(panels: list[records.Panel], layers: list[records.Layer]) -> str:
    measures = {panel.measure for panel in panels}
    what = "outputs on the calibration text" if measures == {"output"} else "weights (no data was used)" if measures == {"weight"} else "outputs (weights, where no data was used)"
    mixture = " A bar is the rms over all experts of a block." if any(layer.expert is not None for layer in layers) else ""
    bars = [(bar.error, f"{panel.kind} of block {bar.block} ({percent(bar.error)})") for panel in panels for bar in panel.bars if bar.error is not None]
    worst = ", ".join(text for _, text in sorted(bars, key=lambda entry: -entry[0])[:3])
    return f"Relative error of each matrix’s {what}, block by block; all panels have one scale.{mixture} The largest: {worst}."


def _panel(panel: records.Panel, top: float) -> Html:
    plain = "" if panel.plain is None else f", plain rounding {percent(panel.plain)}"
    measure = "" if panel.measure == "output" else " (weights)"
    found = DASH if panel.error is None else percent(panel.error)
    title = f"{panel.kind}: relative error per block{measure}; {found} over all blocks{plain}"
    return tag("figure", tag("figcaption", tag("b", panel.kind), f" {found}{plain}{measure}"), charts.layer_bars(title, panel.bars, top))


def _matrix(panels: list[records.Panel], compared: bool) -> Html:
    """All the bars as numbers: a row per block, a column per kind."""
    by_kind = [{bar.block: bar for bar in panel.bars} for panel in panels]
    blocks = sorted({block for bars in by_kind for block in bars})
    head = tag("tr", tag("th", "Block", scope="col"), [tag("th", panel.kind, scope="col") for panel in panels])
    body = [tag("tr", tag("th", str(block), scope="row"), [_cell(bars.get(block)) for bars in by_kind]) for block in blocks]
    region = scroll("Relative error of every layer", tag("table", tag("thead", head), tag("tbody", body), class_="matrix"))
    return tag("details", tag("summary", "The same in numbers" + (": as quantized, then plain rounding" if compared else "")), region, class_="fold")


def _cell(bar: records.Bar | None) -> Html:
    if bar is None or bar.error is None:
        return tag("td", DASH)
    return tag("td", percent(bar.error), None if bar.plain is None else [" ", tag("i", percent(bar.plain))])


def _histograms(layers: list[records.Layer]) -> Html | None:
    found = records.histograms(layers)
    if not found:
        return None
    figures = []
    for h in found:
        error = "" if h.weight_error is None else f" weights off by {percent(h.weight_error)}"
        figures.append(
            tag(
                "figure",
                tag("figcaption", tag("b", h.kind), error),
                tag(
                    "div",
                    charts.histogram(f"{h.kind}: histogram of weights, within 4 standard deviations", h.weight, "4σ", "weights"),
                    charts.histogram(f"{h.kind}: histogram of errors, within 1 standard deviation of the weights", h.error, "1σ", "errors"),
                    class_="pair",
                ),
            )
        )
    return join(
        tag("h3", "Weights and errors"),
        tag(
            "p",
            "How many weights of each kind have which value, and how many are wrong by how much, added up over all blocks. "
            "σ is the standard deviation of a matrix’s weights; errors are drawn four times wider.",
            class_="say",
        ),
        tag("p", tag("span", tag("span", class_="key"), "weights"), tag("span", tag("span", class_="key errors"), "errors"), class_="legend"),
        tag("div", figures, class_="panels"),
    )


def _experts(layers: list[records.Layer]) -> Html | None:
    table = records.expert_tokens(layers)
    if not table:
        return None
    experts = sorted({expert for row in table.values() for expert in row})
    head = tag("tr", tag("th", "Block", scope="col"), [tag("th", str(expert), scope="col") for expert in experts])
    body = [tag("tr", tag("th", str(block), scope="row"), [_tokens(table[block].get(expert)) for expert in experts]) for block in sorted(table)]
    scarce = sum(low for row in table.values() for _, low in row.values())
    total = sum(len(row) for row in table.values())
    return join(
        tag("h3", "Tokens per expert"),
        tag(
            "p",
            f"Calibration tokens that the router sent to each expert. {scarce:,} of {count(total, 'expert')} saw fewer tokens than a matrix of theirs has inputs"
            + (" (marked); the notes below say what was done with them." if scarce else "."),
            class_="say",
        ),
        scroll("Tokens per expert", tag("table", tag("thead", head), tag("tbody", body), class_="matrix")),
    )


def _tokens(found: tuple[int, bool] | None) -> Html:
    if found is None:
        return tag("td", DASH)
    return tag("td", f"{found[0]:,}", class_="scarce" if found[1] else None)


def _provenance(provenance: dict, layers: list[records.Layer]) -> Html:
    return join(
        tag("h3", "Recipe"),
        _list(_recipe(provenance.get("recipe") or {})),
        tag("h3", "Provenance"),
        _list(_origin(provenance, layers)),
        tag("h3", "Notes and fallbacks"),
        _notes(provenance.get("notes") or [], records.notes(layers)),
    )


def _list(pairs: list[tuple[str, str | None]]) -> Html:
    return tag("dl", [[tag("dt", name), tag("dd", text)] for name, text in pairs if text], class_="list")


def _recipe(recipe: dict) -> list[tuple[str, str | None]]:
    calibration = recipe.get("calibration") or {}
    asked = f"{calibration['n_samples']:,} × {calibration['seq_len']:,} tokens of {calibration['source']}{', padded' if calibration.get('pad') else ''}" if calibration else None
    return [
        ("Name", recipe.get("name")),
        ("Number format", _scheme(recipe.get("scheme"))),
        ("Algorithm", recipe.get("algorithm")),
        ("Options", _plain(recipe.get("options"))),
        ("Rules", "; ".join(_rule(rule) for rule in recipe.get("rules") or [])),
        ("Transforms", _plain(recipe.get("transforms"))),
        ("Order", "true-sequential: what feeds on what in turn" if recipe.get("true_sequential") else None),
        ("KV cache", _plain(recipe.get("kv_cache"))),
        ("Calibration, as asked", asked),
        ("Target", recipe.get("target")),
        ("Seed", _plain(recipe.get("seed"))),
    ]


def _scheme(scheme: dict | None) -> str | None:
    """int4-sym-g64, range half, scales in float16."""
    if not scheme:
        return None
    known = Scheme.from_dict(scheme)
    if known.format != "int":
        return known.name
    return f"{known.name}{f', range {known.range}' if known.symmetric else ''}, scales in {known.scale_dtype}"


def _rule(rule: dict) -> str:
    how = [_scheme(rule.get("scheme")) or "kept as it is", rule.get("algorithm"), _plain(rule.get("options"))]
    return f"{rule.get('match')}: {', '.join(part for part in how if part)}"


def _plain(value: object) -> str | None:
    """Any value of JSON as words."""
    if value is None or value == {} or value == []:
        return None
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_plain(part)}" for key, part in value.items() if part is not None)
    if isinstance(value, (list, tuple)):
        return ", ".join(str(_plain(part)) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _origin(provenance: dict, layers: list[records.Layer]) -> list[tuple[str, str | None]]:
    model, data = provenance.get("model") or {}, provenance.get("calibration")
    parameters = f", {model['parameters'] / 1e6:,.0f} million parameters" if "parameters" in model else ""
    used = "none; this recipe needs no data"
    if data:
        used = f"{data['tokens']:,} tokens in {count(data['windows'], 'window')} of {data['length']:,} (the text held {data['found']:,}), sha256 {data['sha256'][:16]}…"
    known = {*VERSIONS, "model", "recipe", "calibration", "compute_dtype", "notes", "layers"}
    training = {key: value for key, value in (provenance.get("training") or {}).items() if key != "curve"}
    return [
        ("Model", f"{model.get('architecture', 'unknown')}{parameters}, read from {model.get('format', 'unknown')}"),
        ("Fingerprint", model.get("fingerprint")),
        ("Layers", _schemes(layers)),
        ("Calibration, as used", used),
        ("Computed in", provenance.get("compute_dtype")),
        ("Versions", ", ".join(f"{name} {provenance[name]}" for name in VERSIONS if name in provenance)),
        ("Training", _plain(training)),
        *((key.replace("_", " "), _plain(provenance[key])) for key in sorted(provenance.keys() - known - {"training"})),
    ]


def _schemes(layers: list[records.Layer]) -> str:
    """210 int4-sym-g64 by gptq (4.25 bits); 1 q8_0 by rtn (8.50 bits), of which embed_tokens."""
    groups: dict[tuple[str, str], list[records.Layer]] = {}
    for layer in layers:
        groups.setdefault((layer.record["scheme"], layer.record["algorithm"]), []).append(layer)
    return "; ".join(_scheme_words(scheme, algorithm, members) for (scheme, algorithm), members in groups.items())


def _scheme_words(scheme: str, algorithm: str, members: list[records.Layer]) -> str:
    bits = [layer.record["bits_per_weight"] for layer in members]
    span = "–".join(dict.fromkeys((significant(min(bits)), significant(max(bits)))))
    outside = [layer.kind for layer in members if layer.block is None]
    return f"{len(members):,} {scheme} by {algorithm} ({span} bits)" + (f", of which {', '.join(outside)}" if outside else "")


def _notes(general: list[str], found: list[tuple[str, str]]) -> Html:
    items = [tag("li", note) for note in general] + [tag("li", text, " ", tag("span", where)) for text, where in found]
    if not items:
        return tag("p", "Nothing: every layer was quantized as the recipe says.", class_="say")
    listed = tag("ul", items, class_="plainlist")
    if len(items) <= MANY_NOTES:
        return listed
    return tag("details", tag("summary", f"{count(len(items), 'note')}"), listed, class_="fold")
