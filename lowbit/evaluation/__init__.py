"""The one protocol for quality: perplexity, KL divergence and agreement of any ids -> logits, with intervals. Knows no pipeline."""
