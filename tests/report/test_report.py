"""The report: whole, safe, deterministic, small; every number of the comparison is where a reader looks for it."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lowbit.evaluation.summary import Estimate, Summary
from lowbit.pipeline.evaluate import Comparison, Row, Size
from lowbit.report import charts, records, render, words

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
VOID = {"meta", "br"}


def estimate(value, spread=0.05):
    return Estimate(value, value * (1 - spread), value * (1 + spread))


def summaries(perplexity, kl=None, agreement=None, spread=0.05):
    def one(convention, factor):
        if kl is None:
            return Summary(convention, 4088, estimate(perplexity * factor, spread))
        e = [estimate(kl * f, spread) for f in (1, 0.4, 9)]
        return Summary(convention, 4088, estimate(perplexity * factor, spread), *e, Estimate(agreement, agreement - 0.01, min(1.0, agreement + 0.01)))

    return {"full": one("full", 1), "llama.cpp": one("llama.cpp", 0.9)}


def record(block, kind, *, scale=1.0, plain=True, tokens=8192):
    error = scale * 1e-3 * (1 + block + 3 * kind)
    bell = [int(4000 * math.exp(-(((i - 19.5) / 8) ** 2))) for i in range(40)]
    made = {
        "scheme": "int4-sym-g64", "algorithm": "gptq", "shape": [576, 576], "bits_per_weight": 4.25, "weight_error": 0.02,
        "tokens": tokens, "output_error": error, "histograms": {"limit": 0.4, "weight": bell, "error": bell[::-1]},
    }  # fmt: skip
    return made | ({"rtn_output_error": 4 * error} if plain else {})


def provenance(depth=30, name="int4-sym-g64-gptq", **options):
    layers = {f"model.layers.{b}.{kind}.weight": record(b, k, **options) for b in range(depth) for k, kind in enumerate(KINDS)}
    scheme = {"format": "int", "bits": 4, "block": [1, 64], "symmetric": True, "range": "half", "scale_dtype": "bfloat16", "nested": None, "outliers": None, "act": None}
    return {
        "lowbit": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0",
        "model": {"architecture": "LlamaForCausalLM", "parameters": 134515008, "fingerprint": "0123456789abcdef", "format": "safetensors"},
        "recipe": {
            "name": name, "scheme": scheme, "algorithm": "gptq", "options": {"damp": 0.01}, "rules": [{"match": "*.down_proj", "scheme": None, "algorithm": None, "options": {}}],
            "transforms": [], "calibration": {"source": "default", "n_samples": 16, "seq_len": 512, "pad": False}, "true_sequential": False, "kv_cache": None,
            "target": "compressed-tensors", "seed": 7,
        },
        "calibration": {"windows": 16, "length": 512, "tokens": 8192, "found": 31000, "sha256": "ab" * 32},
        "compute_dtype": "bfloat16", "notes": ["Group size not given: int4-sym-g64."], "layers": layers,
    }  # fmt: skip


def row(name, megabytes, perplexity, kl=None, agreement=None, made=None, spread=0.05):
    size = Size(int(megabytes * 1e6), int(megabytes * 1e6), 134515008, megabytes * 8e6 / 134515008, 4.25)
    return Row(name, Path("/secret/place") / name, size, summaries(perplexity, kl, agreement, spread), made or {})


def comparison(rows=None, floor=True):
    rows = rows or [
        row("SmolLM2", 269, 17.1),
        row("int8-rtn", 162.6, 17.12, 0.0009, 0.983, provenance()),
        row("int4-rtn", 113.3, 22.9, 0.418, 0.741, provenance(name="int4-sym-g64-rtn", plain=False)),
        row("int4-gptq", 113.3, 19.6, 0.205, 0.821, provenance()),
        row("int3-gptq", 99.9, 31.2, 0.71, 0.655, provenance(scale=5)),
        row("int4-gptq.gguf", 116.8, 19.3, 0.193, 0.829, provenance()),
    ]
    return Comparison(rows, summaries(17.1, 0.00012, 0.995) if floor else None, "bundled evaluation text", 8, 512, "cd" * 32)


class Page(HTMLParser):
    """Checks that tags close in order; keeps tags, attributes and visible text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))

    def count(self, tag, **attrs):
        return sum(t == tag and all(a.get(k.rstrip("_")) == v for k, v in attrs.items()) for t, a, _ in self.tags)


def test_a_whole_page():
    page = Page(render(comparison(), title="SmolLM2, quantized", sentences={"int4-gptq": "Once upon a time"}, notes=["This model is itself a dequantized 4-bit file."],
                       latencies={"int4-gptq": {"prefill_tokens_per_s": 512.3, "decode_tokens_per_s": 41.2, "peak_memory_bytes": 412e6, "threads": 2}}))  # fmt: skip
    for expected in (
        "SmolLM2, quantized", "dequantized 4-bit file", "Noise floor", "95% confidence", "113 MB", "19.60", "18.62–20.58", "82.1%", "81.1%–83.1%",
        "0.205", "0.195–0.215", "Once upon a time", "Prefill tokens/s", "512", "412 MB", "threads: 2", "int4-sym-g64, range half, scales in bfloat16", "*.down_proj: kept as it is",
        "8,192 tokens in 16 windows of 512 (the text held 31,000)", "Seed 7", "torch 2.13.0", "Group size not given", "damp 0.01",
        "8 windows of 512 tokens of bundled evaluation text",
    ):  # fmt: skip
        assert expected in page.text, expected


def test_every_model_has_its_row():
    made = comparison()
    text = render(made, title="t")
    body = text[text.index("<tbody>") : text.index("</tbody>")]
    assert body.count("<tr") == len(made.rows) + 1
    for found in made.rows:
        assert f">{found.name}<" in body and words.significant(found.summaries["full"].perplexity.value, 4) in body
    assert body.count("the original<") == 1 and body.count("best trade-off") == 1


def test_the_headline_says_what_was_lost():
    made = comparison()
    best = words.best_tradeoff(made)
    assert best.name == "int4-gptq"  # 113.3 / 269 + 1 - 0.821 = 0.600; int8 0.621, gguf 0.605, int3 0.716
    assert words.headline(made, best) == (
        "int4-gptq is 2.4 times smaller than the original, with a noticeable loss: its first choice for the next token differs in 18 of 100 places, "
        "and perplexity rises from 17.1 to 19.6 (+15%)."
    )


@pytest.mark.parametrize(("share", "said"), [(0, "never differs"), (0.18, "18 of 100"), (0.0041, "4 of 1,000"), (0.00002, "2 of 100,000")])
def test_the_headline_counts_in_whole_places(share, said):
    made = comparison([row("a", 100, 10.0), row("b", 50, 10.0, 0.01, 1 - share)], floor=False)
    assert said in words.headline(made, made.rows[1]) and "stays at 10.0" in words.headline(made, made.rows[1])


def test_a_loss_below_the_noise_floor_is_called_none():
    made = comparison([row("a", 100, 10.0), row("b", 50, 10.0, 0.0001, 0.995)])
    assert "no loss beyond the rounding" in words.headline(made, made.rows[1])


def test_nothing_comes_from_a_network_and_no_path_leaks():
    text = render(comparison(), title="t", sentences={"a": "b"})
    page = Page(text)
    for tag, attrs, _ in page.tags:
        assert not {"src", "href", "srcset", "xlink:href", "action", "onload"} & attrs.keys(), (tag, attrs)
        assert tag not in ("script", "link", "img", "iframe", "object")
    assert "url(" not in text and "@import" not in text and "http:" not in text and "https:" not in text and "/secret" not in text
    assert page.count("meta", name="viewport") == 1
    assert "prefers-color-scheme: dark" in text


def test_every_string_is_escaped():
    evil = "<script>alert('x')</script>\"&"
    made = provenance(2, name=evil)
    made["notes"] = [evil]
    made["model"]["architecture"] = evil
    made["recipe"]["calibration"]["source"] = evil
    made["layers"] = {f"model.layers.0.{evil}.weight": {**record(0, 0), "notes": [evil], "scheme": evil}}
    made[evil] = evil
    rows = [row(evil, 269, 17.1), row(evil + "2", 113, 19.6, 0.2, 0.8, made), row(evil + "3", 113, 19.6, math.nan, math.nan, made)]
    text = render(Comparison(rows, None, evil, 1, 2, evil), title=evil, sentences={evil: evil}, notes=[evil], latencies={evil: {evil: evil}})
    page = Page(text)
    assert page.count("script") == 0 and "<script" not in text
    assert evil in "".join(page.words)


def test_charts_have_one_bar_per_layer_and_a_title():
    made = comparison()
    page = Page(render(made, title="t"))
    layers = sum(len(r.provenance.get("layers", {})) for r in made.rows)
    assert page.count("rect") == layers == 5 * 210
    assert page.count("circle") == 2 * 5  # the frontier is drawn for wide and for narrow screens
    for i, (tag, attrs, _) in enumerate(page.tags):
        if tag == "svg":
            assert attrs["role"] == "img" and page.tags[i + 1][0] == "title"


def test_bar_heights_are_the_errors():
    """A bar of half the scale is half as high as one of the whole; plain rounding's line lies at its value."""
    drawing = charts.layer_bars("t", [records.Bar(0, 0.1, 0.2, None), records.Bar(1, 0.2, None, None), records.Bar(2, None, None, None)], 0.2)
    heights = [float(h) for h in re.findall(r'<rect[^>]* height="([\d.]+)"', drawing)]
    assert heights == [42.0, 84.0, 0.0]
    assert "block 0: 10%, plain rounding 20%" in drawing and "block 2: not measured" in drawing


def test_the_same_input_gives_the_same_bytes():
    assert render(comparison(), title="t") == render(comparison(), title="t")


def test_six_models_of_210_layers_stay_below_500_kb():
    rows = [row("original", 269, 17.1), *(row(f"a-model-with-a-rather-long-name-{i}", 90 + 10 * i, 20.0 - i, 0.5 / 2**i, 0.7 + 0.04 * i, provenance()) for i in range(6))]
    size = len(render(comparison(rows), title="t", notes=["n"] * 5).encode())
    assert 50_000 < size < 500_000


def test_one_window_leaves_a_dash_instead_of_an_interval():
    text = render(comparison([row("a", 269, 17.1, spread=math.nan), row("b", 113, 19.6, 0.2, 0.8, spread=math.nan)], floor=False), title="t")
    assert not re.search(r"\bnan\b", Page(text).text, re.IGNORECASE) and ">0.200<small>–</small>" in text


def test_no_provenance_and_no_layers():
    made = provenance(1)
    del made["layers"]
    text = Page(render(comparison([row("a", 269, 17.1), row("b", 113, 19.6, 0.2, 0.8), row("c", 113, 19.6, 0.2, 0.8, made)]), title="t")).text
    assert "carries no record" in text and "8,192 tokens in 16 windows" in text


def test_evaluation_of_one_model_alone():
    page = Page(render(comparison([row("a", 269, 17.1)], floor=False), title="t"))
    assert "a has a perplexity of 17.10 on bundled evaluation text" in page.text and page.count("svg") == 0


def test_a_model_whose_numbers_are_not_numbers():
    page = Page(render(comparison([row("a", 269, 17.1), row("b", 113, math.nan, math.nan, math.nan)]), title="t"))
    assert "not a number" in page.text and "None of the models gives usable numbers" in page.text
    page = Page(render(comparison([row("a", 269, 17.1), row("b", 113, math.nan, math.nan, math.nan), row("c", 113, 19.0, 0.2, 0.8)]), title="t"))
    assert "Not drawn, because the loss is not a number: b." in page.text and "c is 2.4 times smaller" in page.text


def test_no_data_shows_the_error_of_the_weights():
    made = provenance(3, plain=False)
    made["calibration"] = None
    for found in made["layers"].values():
        del found["output_error"], found["tokens"]
    page = Page(render(comparison([row("a", 269, 17.1), row("b", 113, 19.6, 0.2, 0.8, made)]), title="t"))
    assert "weights (no data was used)" in page.text and "none; this recipe needs no data" in page.text and "14%" in page.text  # sqrt(0.02)
    assert page.count("rect") == 21


def test_notes_are_listed_with_their_layers():
    made = provenance(4)
    for block in (0, 1, 3):
        made["layers"][f"model.layers.{block}.mlp.down_proj.weight"]["notes"] = ["damping raised from 0.01 to 0.1 to factorize the Hessian"]
    found = records.notes(records.read(made))
    assert found == [("damping raised from 0.01 to 0.1 to factorize the Hessian", "down_proj of blocks 0–1, 3")]
    text = Page(render(comparison([row("a", 269, 17.1), row("b", 113, 19.6, 0.2, 0.8, made)]), title="t")).text
    assert "damping raised from 0.01 to 0.1 to factorize the Hessian down_proj of blocks 0–1, 3" in text


def mixture():
    """2 blocks of 4 experts; expert 3 of block 0 saw 10 tokens, expert 2 of block 1 none."""
    made = provenance(1)
    made["layers"] = {"model.layers.0.self_attn.q_proj.weight": record(0, 0)}
    for block in range(2):
        for expert in range(4):
            seen = {(0, 3): 10, (1, 2): 0}.get((block, expert), 4000 + expert)
            for kind in ("gate_proj", "down_proj"):
                found = record(block, expert, tokens=seen)
                if seen < 576:
                    found["notes"] = [f"this expert saw {seen} tokens of 9000, fewer than its 576 inputs: the statistics of all experts of the layer were mixed in"]
                    if not seen:
                        del found["tokens"]
                made["layers"][f"model.layers.{block}.mlp.experts.{expert}.{kind}.weight"] = found
    return made


def test_experts():
    layers = records.read(mixture())
    table = records.expert_tokens(layers)
    assert table[0] == {0: (4000, False), 1: (4001, False), 2: (4002, False), 3: (10, True)} and table[1][2] == (0, True)
    assert records.notes(layers) == [
        ("this expert saw 0–10 tokens of 9000, fewer than its 576 inputs: the statistics of all experts of the layer were mixed in", "block 0: expert 3; block 1: expert 2")
    ]
    page = Page(render(comparison([row("a", 269, 17.1), row("b", 113, 19.6, 0.2, 0.8, mixture())]), title="t"))
    assert "2 of 8 experts saw fewer tokens" in page.text and page.count("td", class_="scarce") == 2
    assert page.count("rect") == 1 + 2 * 2  # one bar for all experts of a block
    assert "worst expert" in page.text


def test_names_of_many_architectures():
    def kinds(*names):
        return [(layer.kind, layer.block, layer.expert) for layer in records.read({"layers": {name: {} for name in names}})]

    assert kinds("transformer.h.3.attn.c_proj.weight", "transformer.h.3.mlp.c_proj.weight", "transformer.h.3.mlp.c_fc.weight") == [
        ("attn.c_proj", 3, None), ("mlp.c_proj", 3, None), ("c_fc", 3, None)]  # fmt: skip
    assert kinds("model.layers.0.block_sparse_moe.experts.5.w1.weight", "model.embed_tokens.weight", "lm_head.weight") == [
        ("w1", 0, 5), ("embed_tokens", None, None), ("lm_head", None, None)]  # fmt: skip
    assert kinds("model.layers.2.mlp.experts.5.up_proj.weight", "model.layers.2.mlp.shared_expert.up_proj.weight") == [
        ("experts.up_proj", 2, 5), ("shared_expert.up_proj", 2, None)]  # fmt: skip


def test_kinds_stand_in_calling_order_however_the_provenance_is_sorted():
    made = provenance(2)
    made["layers"] = dict(sorted(made["layers"].items()))
    assert [p.kind for p in records.panels(records.read(made))] == [k.split(".")[1] for k in KINDS]
    assert [[b.block for b in p.bars] for p in records.panels(records.read(provenance(12)))] == [list(range(12))] * 7


def test_models_that_save_nothing_are_named():
    page = Page(render(comparison([row("a", 98, 17.1), row("b", 170, 17.2, 0.002, 0.976), row("c", 92, 19.0, 0.2, 0.8)]), title="t"))
    assert "Not smaller than the original, which therefore beats them: b." in page.text


def test_histograms_of_a_kind_are_added_up():
    made = records.histograms(records.read(provenance(3)))
    one = record(0, 0)["histograms"]
    assert [h.kind for h in made] == [k.split(".")[1] for k in KINDS]
    assert made[0].weight == [3 * n for n in one["weight"]] and made[0].error == [3 * n for n in one["error"]]


def test_the_frontier_keeps_what_no_other_beats():
    points = [charts.Point(n, s, k) for n, s, k in (("a", 100, 0.5), ("b", 120, 0.2), ("c", 120, 0.3), ("d", 130, 0.25), ("e", 200, 0.001))]
    assert [p.label for p in charts.pareto(points)] == ["a", "b", "e"]


@pytest.mark.parametrize("width", [920, 360])
def test_labels_do_not_overlap_each_other_or_leave_the_plot(width):
    """Eight models within a few percent of each other's size and loss."""
    points = [charts.Point(f"int4-sym-g{2**i}-gptq", 113_000_000 + 300_000 * i, 0.2 + 0.004 * i, 0.19 + 0.004 * i, 0.21 + 0.004 * i) for i in range(8)]
    drawing = charts.frontier(points, charts.Point("original", 269_000_000, 0.0001), width=width, height=420, class_="wide")
    boxes = []
    for x, y, anchor, text in re.findall(r'<text x="([\d.-]+)" y="([\d.-]+)" class="label ?(\w*)">([^<]*)<', drawing):
        length = len(text) * charts.CHARACTER
        left = float(x) - (length if anchor == "end" else length / 2 if anchor == "mid" else 0)
        boxes.append(charts.Box(left, float(y) - 11, left + length, float(y) + 3))
    assert len(boxes) == 9 and all(b.left >= 0 and b.right <= width for b in boxes)
    assert sum(a.overlap(b) for i, a in enumerate(boxes) for b in boxes[:i]) == 0


@pytest.mark.parametrize("kl", [0.0, -1e-9, 1e-12, 40.0])
def test_the_frontier_of_strange_losses(kl):
    points = [charts.Point("a", 10, kl), charts.Point("b", 10, 0.1)]
    assert "nan" not in charts.frontier(points, charts.Point("o", 10, 0.0), width=360, height=300, class_="wide")


def test_intervals():
    assert words.interval(Estimate(2e-5, 1.76e-5, 2.21e-5), words.significant) == "(1.76–2.21)×10⁻⁵"
    assert words.interval(Estimate(1e-4, 8.32e-5, 1.23e-4), words.significant) == "8.32×10⁻⁵–0.000123"
    assert words.interval(Estimate(0.2, 0.15, 0.25), words.significant) == "0.150–0.250"
    assert words.interval(Estimate(0.2, math.nan, math.nan), words.significant) == "–"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.2213, "0.221"), (17.1, "17.1"), (1234.5, "1,234"), (0.000123, "0.000123"), (8.13e-6, "8.13×10⁻⁶"), (3.2e8, "3.20×10⁸"), (0, "0"),
     (math.nan, "–"), (math.inf, "∞"), (-0.5, "-0.500")],
)  # fmt: skip
def test_numbers(value, text):
    assert words.significant(value) == text
