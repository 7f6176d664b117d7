"""What the README says is there is there."""

from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_bundled_text_is_long_enough_and_disjoint():
    calibration = (ROOT / "lowbit/data/calibration.txt").read_text(encoding="utf-8")
    evaluation = (ROOT / "lowbit/data/evaluation.txt").read_text(encoding="utf-8")
    assert len(calibration.encode()) >= 120_000
    assert len(evaluation.encode()) >= 30_000
    grams = lambda text: {tuple(words[i : i + 12]) for words in [text.split()] for i in range(len(words) - 11)}
    shared = grams(calibration) & grams(evaluation)
    assert not shared, sorted(shared)[:3]
    words = calibration.split()
    assert len(grams(calibration)) > 0.98 * (len(words) - 11), "the text repeats itself"
