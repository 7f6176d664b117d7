"""Jobs that follow the original model beside the quantized one: GPTAQ and AutoRound."""

import pytest

from lowbit.errors import RecipeError
from lowbit.pipeline import blocks
from lowbit.pipeline.quantize import quantize


@pytest.mark.parametrize("recipe", ["int4-sym-g32-gptaq", "int4-sym-g32-gptaq-guided", "int4-asym-g32-awq-gptaq", "int3-asym-g32-autoround"])
def test_they_resume_to_the_same_bytes(recipe, model_folder, text_file, tmp_path, assert_same, monkeypatch):
    run = lambda name, **more: quantize(model_folder("llama"), recipe, tmp_path / name, calibration=text_file, n_samples=4, seq_len=32, dtype="float32", **more)
    run("a")
    real, calls = blocks.quantize_group, []

    def stop(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*args)

    learn = blocks.learn_block
    monkeypatch.setattr(blocks, "quantize_group", stop)
    monkeypatch.setattr(blocks, "learn_block", lambda *args: stop_learning(learn, calls, *args))
    with pytest.raises(KeyboardInterrupt):
        run("b")
    monkeypatch.undo()
    run("b", resume=True)
    assert_same(tmp_path / "a", tmp_path / "b")


def stop_learning(learn, calls, *args):
    calls += [1, 1, 1, 1]
    if len(calls) >= 8:
        raise KeyboardInterrupt
    return learn(*args)


def test_gptaq_changes_the_codes_of_later_blocks_only(model_folder, text_file, tmp_path):
    """The inputs of the first block's Q, K and V are the original's: there nothing is to be counted."""
    from lowbit.checkpoints import open_checkpoint

    made = {}
    for recipe in ("int4-sym-g32-gptq", "int4-sym-g32-gptaq"):
        quantize(model_folder("llama"), recipe, tmp_path / recipe, calibration=text_file, n_samples=8, seq_len=64, dtype="float32")
        made[recipe] = open_checkpoint(tmp_path / recipe)
    same = lambda name: (made["int4-sym-g32-gptq"].dense(name) == made["int4-sym-g32-gptaq"].dense(name)).all()
    assert same("model.layers.0.self_attn.q_proj.weight")
    assert not same("model.layers.2.self_attn.q_proj.weight")


def test_experts_are_noted(model_folder, text_file, tmp_path):
    made = quantize(model_folder("mixtral"), "int4-sym-g32-gptaq", tmp_path / "out", calibration=text_file, n_samples=4, seq_len=32, dtype="float32")
    noted = {name for name, record in made.layers.items() if any("error of the inputs was not counted" in note for note in record.get("notes", []))}
    assert noted and all("experts" in name for name in noted)


def test_true_sequential_is_refused(model_folder, text_file, tmp_path):
    (tmp_path / "r.toml").write_text('scheme = "int4-sym-g32-gptaq"\ntrue_sequential = true\n')
    with pytest.raises(RecipeError, match="alpha compares a block with the original one"):
        quantize(model_folder("llama"), tmp_path / "r.toml", tmp_path / "out", calibration=text_file)
