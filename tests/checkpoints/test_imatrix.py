"""Importance matrices against llama-imatrix's own files (oracles/imatrix-*.gguf and .dat, see make_imatrix.py), and hostile ones."""

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lowbit.checkpoints.gguf_container import Planned, pack_value, write_file
from lowbit.checkpoints.imatrix import Entry, Imatrix, from_stats, of_model, read_imatrix, write_imatrix
from lowbit.errors import CheckpointError

ORACLES = Path(__file__).parents[1] / "oracles"
LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
Q_PROJ, DOWN = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"
EXPERT = "model.layers.0.block_sparse_moe.experts.{}.w2.weight"


def equal(one: Imatrix, other: Imatrix) -> bool:
    same = one.entries.keys() == other.entries.keys() and replace(one, entries={}) == replace(other, entries={})
    return same and all(torch.equal(entry.sums, other.entries[name].sums) and torch.equal(entry.counts, other.entries[name].counts) for name, entry in one.entries.items())


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_both_forms_say_the_same(name):
    new, old = (read_imatrix(ORACLES / f"imatrix-{name}.{form}") for form in ("gguf", "dat"))
    assert (new.datasets, new.chunks, new.chunk_size) == (("text.txt",), 4, 32) and (old.datasets, old.chunks, old.chunk_size) == (("text.txt",), 4, 0)
    assert new.entries.keys() == old.entries.keys() and len(new.entries) >= 14
    for key, entry in new.entries.items():
        mean = entry.sums / entry.counts[:, None]
        torch.testing.assert_close(mean.flatten(), (old.entries[key].sums / old.entries[key].counts).flatten(), rtol=1e-6, atol=0)
    assert new.entries["blk.0.attn_q.weight"].counts.tolist() == [128.0]


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_written_files_are_read_back_and_the_older_form_has_llama_imatrixs_bytes(tmp_path, name):
    found = read_imatrix(ORACLES / f"imatrix-{name}.gguf")
    write_imatrix(found, tmp_path / "again.gguf")
    assert equal(read_imatrix(tmp_path / "again.gguf"), found)
    write_imatrix(found, tmp_path / "again.dat", old=True)
    assert (tmp_path / "again.dat").read_bytes() == (ORACLES / f"imatrix-{name}.dat").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.dat", "again.gguf"]


def test_an_expert_without_tokens(tmp_path):
    entry = Entry(torch.tensor([[2.0, 4.0], [0.0, 0.0]]), torch.tensor([2.0, 0.0]))
    for form in ("gguf", "dat"):
        write_imatrix(Imatrix({"blk.0.ffn_down_exps.weight": entry}, ("a.txt",), 3, 1), tmp_path / f"m.{form}", old=form == "dat")
    shapes = {EXPERT.format(e): (8, 2) for e in (0, 1)}
    config = {"model_type": "mixtral"}
    new, old = (of_model(read_imatrix(tmp_path / f"m.{form}"), config, shapes) for form in ("gguf", "dat"))
    assert new[EXPERT.format(0)].importance().tolist() == [1.0, 2.0] and new[EXPERT.format(1)].importance() is None
    assert old[EXPERT.format(0)].importance().tolist() == [1.0, 2.0] and old[EXPERT.format(1)].importance().tolist() == [1.0, 1.0]
    back = from_stats(new, config, dict.fromkeys(shapes, 2))["blk.0.ffn_down_exps.weight"]
    assert torch.equal(back.sums, entry.sums) and torch.equal(back.counts, entry.counts)


def test_a_models_weights_take_what_is_theirs():
    found = read_imatrix(ORACLES / "imatrix-llama.gguf")
    stats = of_model(found, LLAMA, {Q_PROJ: (64, 64), DOWN: (64, 96), "model.embed_tokens.weight": (300, 64)})
    assert stats.keys() == {Q_PROJ, DOWN}  # the embedding is not in the file
    assert torch.equal(stats[DOWN].importance(), found.entries["blk.1.ffn_down.weight"].sums[0] / 128) and stats[DOWN].n_tokens == 128
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_down\.weight has 96 values in 1 parts; this model's model\.layers\.1\.mlp\.down_proj\.weight needs 1 of 128"):
        of_model(found, LLAMA, {DOWN: (64, 128)})
    with pytest.raises(CheckpointError, match="holds none of this model's weights; it has blk.0.attn_k.weight, .* another model"):
        of_model(found, LLAMA, {"model.layers.7.mlp.down_proj.weight": (64, 96)})
    with pytest.raises(CheckpointError, match="blk.0.ffn_down_exps.weight has 576 values in 6 parts; .* needs 4 of 96"):
        of_model(read_imatrix(ORACLES / "imatrix-mixtral.gguf"), {"model_type": "mixtral"}, {EXPERT.format(e): (64, 96) for e in range(4)})


# ----------------------------------------------------------------------------------------------------------------- hostile files


def ints(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


def old_entry(name: bytes = b"blk.0.a.weight", values=(1.0, 2.0), calls: int = 1) -> bytes:
    return ints(len(name)) + name + ints(calls, len(values)) + np.array(values, "<f4").tobytes()


OLD = {
    "empty": (b"", "the number of entries of 4 bytes is announced at byte 0"),
    "no entries": (ints(0), "the number of entries is 0 at byte 0; expected at least 1"),
    "negative entries": (ints(-5), "the number of entries is -5"),
    "too many entries": (ints(2**31 - 1) + old_entry(), "the length of a name of 4 bytes is announced"),
    "long name": (ints(1, 2**30), "a name of 1,073,741,824 bytes is announced"),
    "negative name": (ints(1, -4), "the length of a name is -4"),
    "no text": (ints(1, 2) + b"\xff\xfe" + ints(1, 1) + bytes(4), "a name before byte 10 is not UTF-8"),
    "negative calls": (ints(1) + old_entry(calls=-1), "the number of calls is -1"),
    "no values": (ints(1) + old_entry(values=()), "the number of values is 0"),
    "many values": (ints(1, 1) + b"a" + ints(1, 2**30) + bytes(64), "values of 4,294,967,296 bytes is announced"),
    "nan": (ints(1) + old_entry(values=(1.0, float("nan"))), "blk.0.a.weight holds NaN, infinite or negative values"),
    "infinity": (ints(1) + old_entry(values=(float("inf"), 1.0)), "holds NaN, infinite or negative"),
    "negative": (ints(1) + old_entry(values=(-1.0, 1.0)), "holds NaN, infinite or negative"),
    "twice": (ints(2) + old_entry() * 2, "blk.0.a.weight is there twice"),
    "half a tail": (ints(1) + old_entry() + b"\x01", "the number of chunks of 4 bytes is announced"),
    "long dataset": (ints(1) + old_entry() + ints(1, 99), "the name of the text of 99 bytes is announced"),
    "a model": (b"PK\x03\x04" + bytes(100), "the number of entries|the length of a name|the number of values"),
}


@pytest.mark.parametrize("case", OLD)
def test_hostile_files_of_the_older_form_are_refused(tmp_path, case):
    data, message = OLD[case]
    (tmp_path / "bad.dat").write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_imatrix(tmp_path / "bad.dat")
    assert str(tmp_path / "bad.dat") in str(caught.value)


def test_the_tail_of_the_older_form_may_be_missing(tmp_path):
    for tail, chunks, datasets in ((b"", 0, ()), (ints(7), 7, ()), (ints(7, 2) + b"ab", 7, ("ab",))):
        (tmp_path / "m.dat").write_bytes(ints(1) + old_entry() + tail)
        found = read_imatrix(tmp_path / "m.dat")
        assert (found.chunks, found.datasets) == (chunks, datasets) and list(found.entries) == ["blk.0.a.weight"]


def write(path: Path, tensors: dict[str, torch.Tensor], **changes) -> None:
    values = {"general.type": ("string", "imatrix"), "imatrix.datasets": ("string[]", ["t"]), "imatrix.chunk_count": ("u32", 1), "imatrix.chunk_size": ("u32", 4)}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    types = {torch.float32: 0, torch.float16: 1}
    write_file(path, {key: pack_value(*value) for key, value in values.items()}, [Planned(name, types[t.dtype], tuple(t.shape), (lambda t=t: t,)) for name, t in tensors.items()])


GOOD = {"a.weight.in_sum2": torch.ones(2, 6), "a.weight.counts": torch.ones(2, 1)}
NEW = {
    "a model": (GOOD, {"general__type": ("string", "model")}, "is a GGUF of type 'model'; expected an importance matrix"),
    "nothing": ({"a.weight.in_sum": torch.ones(6)}, {}, "holds no importance"),
    "no counts": ({"a.weight.in_sum2": torch.ones(6)}, {}, "a.weight.in_sum2 is there and a.weight.counts is not"),
    "odd counts": ({**GOOD, "a.weight.counts": torch.ones(5)}, {}, "has 12 sums, which its 5 counts do not divide"),
    "half floats": ({**GOOD, "a.weight.in_sum2": torch.ones(2, 6).half()}, {}, "is of ggml type 1; expected float32"),
    "nan": ({**GOOD, "a.weight.in_sum2": torch.full((2, 6), torch.nan)}, {}, "a.weight holds NaN, infinite or negative"),
    "infinite counts": ({**GOOD, "a.weight.counts": torch.tensor([[1.0], [torch.inf]])}, {}, "holds NaN, infinite or negative"),
    "negative counts": ({**GOOD, "a.weight.counts": torch.tensor([[1.0], [-1.0]])}, {}, "holds NaN, infinite or negative"),
    "datasets": (GOOD, {"imatrix__datasets": ("string", "t")}, "datasets, chunk_count or chunk_size is of the wrong kind"),
    "chunks": (GOOD, {"imatrix__chunk_count": ("i32", -3)}, "is of the wrong kind"),
}


@pytest.mark.parametrize("case", NEW)
def test_hostile_ggufs_are_refused(tmp_path, case):
    tensors, changes, message = NEW[case]
    write(tmp_path / "bad.gguf", tensors, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_imatrix(tmp_path / "bad.gguf")


def test_other_tensors_of_a_gguf_are_left_alone(tmp_path):
    write(tmp_path / "m.gguf", {**GOOD, "a.weight.in_sum": torch.full((2, 6), torch.nan), "a.weight.stats": torch.full((12,), torch.nan)})
    assert list(read_imatrix(tmp_path / "m.gguf").entries) == ["a.weight"]


def test_truncated_files_and_missing_ones(tmp_path):
    for form in ("gguf", "dat"):
        data = (ORACLES / f"imatrix-mixtral.{form}").read_bytes()
        for size in range(1, len(data) - 40, len(data) // 60):
            (tmp_path / "bad").write_bytes(data[:size])
            with pytest.raises(CheckpointError):
                read_imatrix(tmp_path / "bad")
    with pytest.raises(CheckpointError, match="No such file"):
        read_imatrix(tmp_path / "absent.dat")
