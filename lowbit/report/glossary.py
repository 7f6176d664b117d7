"""How to read the numbers: the words of the report, explained."""

from __future__ import annotations

from .words import VERDICTS, percent


def entries() -> list[tuple[str, str]]:
    """(word, explanation) in the order of the page."""
    verdicts = "; ".join(f"from {percent(least)} kept, {text}" for least, text in VERDICTS if least)
    return [
        (
            "File, bits per weight",
            "The bytes of all files that hold weights. Bits per weight are the bytes of all tensors times 8 over all parameters, tied ones counted "
            "once. An embedding that was not quantized weighs in here, so the bits of the linear layers stand beside it.",
        ),
        (
            "Perplexity",
            "How surprised the model is by the text: 17 means as unsure as between 17 equally likely tokens. Lower is better. The papers of GPTQ and "
            "AWQ score full windows; llama-perplexity scores the second half of each, where there is more context. Compare only numbers of one "
            "convention, on the same text and window length.",
        ),
        (
            "KL divergence",
            "How far the probabilities for the next token moved away from the original’s, in nats; 0 is no change. It sees every change, also those "
            "that leave the perplexity alone, so it is the best single number of what was lost. The median is the usual token; one token in a "
            "hundred is worse than p99.",
        ),
        (
            "Same first choice",
            "How often the model and the original rank the same token first, which is what greedy decoding takes. The headline’s words follow it: "
            f"{verdicts}; below that, {VERDICTS[-1][1]}. A mean KL at or below the noise floor is no loss.",
        ),
        (
            "95% confidence interval",
            "From resampling the windows of text (bootstrap): how much a number may move with other text of this kind. Two models whose intervals "
            "overlap can still differ reliably, because both saw the same text. A dash: one window alone gives no interval.",
        ),
        (
            "Noise floor",
            "The original computed in its own number format against itself in float32. A loss of this size is rounding in the arithmetic, not "
            "quantization.",
        ),
        (
            "Relative error of a layer",
            "The length of the change over the length of the original: of what the matrix puts out for the calibration text (output), or of its "
            "weights. Plain rounding is the same number format without a clever algorithm.",
        ),
    ]
