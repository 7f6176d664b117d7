"""The blocks of a model, quantized one after the other: passes that collect statistics, the algorithm, a pass through the quantized block."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress

import torch
from torch import nn

from ..algorithms import algorithm
from ..errors import FormatError, RecipeError
from ..models import skeleton as sk
from ..models.arch import FUSED
from ..models.linears import Linear
from ..models.rounding import attach
from ..numerics import activations
from ..progress import Advance
from ..scheme import Activation, Rounding
from ..stats import LayerStats
from ..tensor import QuantizedTensor
from ..transforms import of_blocks
from . import guidance, resources
from .calibration import Windows
from .collect import Collector, Current, InputGroup, StopBlock, stages
from .hidden import HiddenStates
from .job import Job
from .layers import pool_unseen, quantize_group, share_scarce
from .learned import learn_block
from .output import dtype_name
from .setup import Setup
from .streaming import Streamer
from .transform import transform_block

log = logging.getLogger(__name__)
_Place = tuple[str, str, int | None, tuple[int, int] | None]  # of a matrix inside a block: module, parameter, expert and rows


def run(setup: Setup, windows: Windows | None, job: Job, peak: resources.PeakMemory) -> None:
    """Quantize every block that is not done yet."""
    if windows is None:
        _run_without_data(setup, job, _first(setup, job), peak)
    else:
        _stream(setup, windows, job, peak, "Quantizing blocks", _BlockWorker.run)


def observe(setup: Setup, windows: Windows, job: Job, peak: resources.PeakMemory) -> None:
    """Collect what setup.needs of every block that is not done yet, and quantize nothing; the sums are kept with the job (see observed)."""
    _stream(setup, windows, job, peak, "Looking at blocks", _BlockWorker.observe)


def observed(setup: Setup, job: Job) -> dict[str, LayerStats]:
    """What observe found, by weight name: n_tokens and sum_sq."""
    found: dict[str, LayerStats] = {}
    for index, linears in enumerate(setup.linears):
        stored = job.tensors(_sums(index))
        found |= {linear.name: LayerStats(int(stored[f"{linear.name}|n_tokens"]), sum_sq=stored.get(f"{linear.name}|sum_sq")) for linear in linears}
    return found


def _first(setup: Setup, job: Job) -> int:
    """The first block that is not done."""
    depth = len(setup.skeleton.blocks)
    first = next((i for i in range(depth) if not job.done(part(i))), depth)
    if first:
        setup.progress.note(f"Going on at block {first + 1} of {depth}." if first < depth else "All blocks are done; writing.")
    return first


def _stream(setup: Setup, windows: Windows, job: Job, peak: resources.PeakMemory, title: str, work: Callable) -> None:
    """Do the work of a _BlockWorker with every block that is not done yet, from hidden states to hidden states."""
    depth, first = len(setup.skeleton.blocks), _first(setup, job)
    if first == depth:
        return
    streamer = Streamer(setup.skeleton, windows.batches(), dtype=setup.dtype, device=setup.device)

    def states(block: int, kind: str = "hidden", *, must_exist: bool = False) -> HiddenStates:
        return HiddenStates(streamer.shapes, streamer.hidden_size, setup.dtype, file=job.hidden_file(block, kind), must_exist=must_exist)

    if "loss" in setup.needs:
        guidance.sweep(streamer, setup.linears, setup.plans, job, seed=setup.recipe.seed, progress=setup.progress)
    source = states(first, must_exist=first > 0)
    streamer.record(source if first == 0 else None)
    reference = states(first, "reference", must_exist=first > 0) if "reference" in setup.needs else None
    if reference is not None and first == 0:
        for number in range(len(reference)):
            reference.write(number, source.read(number, streamer.device))
    worker = _BlockWorker(setup, streamer, peak, job)
    with setup.progress.step(title, depth * worker.steps_per_block) as advance:
        advance(first * worker.steps_per_block)
        for index in range(first, depth):
            goal = states(index + 1)
            original = None if reference is None else states(index + 1, "reference")
            tensors, records = work(worker, index, source, goal if index + 1 < depth else None, reference, original, advance)
            goal.sync()
            if original is not None:
                original.sync()
            job.save(part(index), tensors, records)
            resources.release_memory()
            source, reference = goal, original
            peak.look()
            log.info("block %d of %d done, RssAnon %s", index + 1, depth, resources.human(peak.peak_bytes))


def rewritten(index: int) -> str:
    """The part of a job that holds what transforms changed in a block beside its quantized matrices."""
    return f"rewritten-{index:05d}"


def _sums(index: int) -> str:
    return f"sums-{index:05d}"


def part(index: int) -> str:
    return f"block-{index:05d}"


def _run_without_data(setup: Setup, job: Job, first: int, peak: resources.PeakMemory) -> None:
    """Algorithms that need no statistics: every matrix on its own (those that programs make one layer together), no forward pass."""
    with setup.progress.step("Quantizing blocks", len(setup.linears)) as advance:
        advance(first)
        for index in range(first, len(setup.linears)):
            block = sk.load_module(setup.skeleton, setup.skeleton.block_name(index), torch.float32, setup.device)
            tensors: dict[str, QuantizedTensor] = {}
            records: dict[str, dict] = {}
            for linears in _one_layer(setup.linears[index], setup.importance):
                stats = setup.importance.get(linears[0].name, LayerStats())
                made, record = quantize_group(block, InputGroup(linears, stats), setup.plans, _dtypes(setup, linears))
                for name in record:
                    if (act := setup.plans[name].scheme.act) is not None:
                        record[name]["activation"] = activations.settle(act, None).to_dict()
                tensors |= made
                records |= record
            job.save(part(index), tensors, records)
            resources.release_memory()
            peak.look()
            advance()


def _one_layer(linears: list[Linear], importance: Mapping[str, LayerStats]) -> list[list[Linear]]:
    """The matrices of a block in sets: the parts of what programs make one layer (arch.FUSED) together, if an importance matrix says the same of their inputs."""
    sets: dict[tuple, list[Linear]] = {}
    for linear in linears:
        owner, _, leaf = linear.name.removesuffix(".weight").rpartition(".")
        parts = next((parts for parts in FUSED if leaf in parts), (leaf,))
        known = importance.get(linear.name, LayerStats())
        inputs = None if known.sum_sq is None else known.sum_sq.numpy().tobytes()
        sets.setdefault((owner, parts, linear.expert, known.n_tokens, inputs), []).append(linear)
    return list(sets.values())


def _dtypes(setup: Setup, linears: list[Linear]) -> dict[str, str]:
    return {linear.name: dtype_name(setup.checkpoint, linear.name) for linear in linears}


def _settled(name: str, act: Activation, stats: LayerStats | None) -> Rounding:
    try:
        return activations.settle(act, stats)
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from error


class _BlockWorker:
    """Quantizes one block after the other: passes that collect statistics, the algorithm, a pass through the quantized block."""

    def __init__(self, setup: Setup, streamer: Streamer, peak: resources.PeakMemory, job: Job) -> None:
        self.setup, self.streamer, self.peak, self.job = setup, streamer, peak, job
        self._plans: dict[tuple[_Place, ...], list[list[_Place]]] = {}  # input groups of blocks that look alike
        self.steps_per_block = 2 * len(streamer.batches)

    def run(
        self, index: int, source: HiddenStates, goal: HiddenStates | None, reference: HiddenStates | None, original: HiddenStates | None, advance: Advance
    ) -> tuple[dict[str, QuantizedTensor], dict[str, dict]]:
        """Quantize block index. source, goal: hidden states through the quantized blocks, before and behind it; reference, original: of the original model."""
        setup, streamer = self.setup, self.streamer
        block = streamer.load_block(index)
        if reference is not None and original is not None:
            streamer.run(block, index, reference, original)
        planned = [linear for linear in setup.linears[index] if linear.name in setup.plans]
        learned = [linear for linear in planned if algorithm(setup.plans[linear.name].algorithm).level == "block"]
        linears = [linear for linear in planned if linear not in learned]
        collector = Collector(block, linears)
        groups = self._groups(collector, linears, index, block, source) if linears else []
        if "loss" in setup.needs:
            groups = guidance.weigh(groups, setup.plans, self.job, index, streamer.batches)
        turns = stages(groups) if setup.recipe.true_sequential else [groups] if groups else []
        tensors: dict[str, QuantizedTensor] = {}
        records: dict[str, dict] = {}
        for number, stage in enumerate(turns):
            self._collect(collector, stage, index, block, source, reference, advance if number == 0 else lambda n=1: None, setup.needs)
            notes = share_scarce(stage)
            done = self._transform(block, index, stage, source) if of_blocks(setup.recipe.transforms) else {}
            for group in stage:
                made, record = quantize_group(block, group, setup.plans, _dtypes(setup, group.linears))
                for name in record.keys() & notes.keys():
                    record[name]["notes"] = [*record[name].get("notes", []), notes[name]]
                for name in record.keys() & done.keys():
                    record[name]["transforms"] = done[name]
                tensors |= made
                records |= record
                self.peak.look()
                group.stats.hessian = group.stats.cross = None
                resources.release_memory()
        if not turns:
            advance(len(streamer.batches))
        if learned and original is not None:
            made, record = learn_block(block, index, learned, setup.plans, streamer, source, original, _dtypes(setup, learned), setup.recipe.seed)
            tensors |= made
            records |= record
            self.peak.look()
        if setup.refinement is not None and original is not None:
            plain = [linear for linear in planned if linear.name in tensors]
            better, more = setup.refinement.run(index, block, streamer.load_block(index), plain, tensors, streamer, source, original)
            tensors |= better
            for name in better:
                records[name] |= more
            self.peak.look()
        if roundings := self._roundings(block, index, planned, source, records):
            attach(block, planned, roundings)
            for name, rounding in roundings.items():
                records[name]["activation"] = rounding.to_dict()
        if goal is not None:
            streamer.run(block, index, source, goal, tick=advance)
        else:
            advance(len(streamer.batches))
        return tensors, records

    def observe(self, index: int, source: HiddenStates, goal: HiddenStates | None, reference: None, original: None, advance: Advance) -> tuple[dict, dict]:
        """Collect statistics of block index and pass on its hidden states, as they are; nothing is quantized."""
        block, linears = self.streamer.load_block(index), self.setup.linears[index]
        collector = Collector(block, linears)
        groups = self._groups(collector, linears, index, block, source)
        self._collect(collector, groups, index, block, source, None, advance, self.setup.needs)
        found: dict[str, torch.Tensor] = {}
        for group in groups:
            for linear in group.linears:
                found[f"{linear.name}|n_tokens"] = torch.tensor(group.stats.n_tokens)
                if group.stats.sum_sq is not None:
                    found[f"{linear.name}|sum_sq"] = group.stats.sum_sq.cpu().clone()
        self.job.save_tensors(_sums(index), found)
        if goal is not None:
            self.streamer.run(block, index, source, goal, tick=advance)
        else:
            advance(len(self.streamer.batches))
        return {}, {}

    def _roundings(self, block: nn.Module, index: int, linears: list[Linear], source: HiddenStates, records: dict[str, dict]) -> dict[str, Rounding]:
        """How the inputs of a block's matrices are to be rounded; scales of static ones from a pass through the quantized block. records take what there is to note."""
        acts = {linear.name: act for linear in linears if (act := self.setup.plans[linear.name].scheme.act) is not None}
        wanted = tuple(sorted({need for act in acts.values() for need in activations.needs(act)}))
        stats: dict[str, LayerStats] = {}
        if wanted:
            collector = Collector(block, linears)
            groups = self._groups(collector, linears, index, block, source)
            self._collect(collector, groups, index, block, source, None, lambda n=1: None, wanted)
            for name, note in pool_unseen(groups).items():
                records[name]["notes"] = [*records[name].get("notes", []), note]
            stats = {linear.name: group.stats for group in groups for linear in group.linears}
        return {name: _settled(name, act, stats.get(name)) for name, act in acts.items()}

    def _transform(self, block: nn.Module, index: int, groups: list[InputGroup], source: HiddenStates) -> dict[str, dict]:
        """Apply the recipe's transforms; what they change beside the quantized matrices goes to the job. Returns what was done, by weight name."""
        setup = self.setup
        run = lambda: self.streamer.run_block(block, index, 0, source.read(0, self.streamer.device))
        changed, done = transform_block(block, groups, setup.plans, setup.recipe.transforms, run)
        prefix = setup.skeleton.block_name(index)
        sources = {name: setup.skeleton.sources[f"{prefix}.{name}"].flat() for name in changed}
        for name, names in sources.items():
            kept = [source for source in names if source not in setup.plans]
            if len(names) > 1 and kept:
                raise RecipeError(
                    f"a transform rescales {prefix}.{name}, of which the recipe keeps {kept[0]}: that is stored in parts, which cannot be rescaled as they are. "
                    "Quantize them, or leave the transform out."
                )
        self.job.save_tensors(rewritten(index), {names[0]: changed[name] for name, names in sources.items() if names[0] not in setup.plans})
        return done

    def _collect(self, collector: Collector, stage: list[InputGroup], index: int, block, source: HiddenStates, reference: HiddenStates | None, advance: Advance, needs: tuple[str, ...]) -> None:
        current, start = Current(), 0
        with collector.collect(stage, needs, current):
            for number, batch in enumerate(self.streamer.batches):
                current.mask, current.tokens = batch.mask, slice(start, start + batch.ids.numel())
                start = current.tokens.stop
                if reference is not None and "cross" in self.setup.needs:
                    current.of_original = True
                    with suppress(StopBlock):
                        self.streamer.run_block(block, index, number, reference.read(number, self.streamer.device))
                    current.of_original = False
                with suppress(StopBlock):
                    self.streamer.run_block(block, index, number, source.read(number, self.streamer.device))
                advance(1)

    def _groups(self, collector: Collector, linears: list[Linear], index: int, block, source: HiddenStates) -> list[InputGroup]:
        """Input groups in calling order; found once per kind of block by running it on one micro-batch."""
        shape = tuple((linear.module, linear.parameter, linear.expert, linear.rows) for linear in linears)
        by_place = dict(zip(shape, linears, strict=True))
        if shape not in self._plans:
            found = collector.discover(lambda: self.streamer.run_block(block, index, 0, source.read(0, self.streamer.device)))
            self._plans[shape] = [[(x.module, x.parameter, x.expert, x.rows) for x in group.linears] for group in found]
        return [InputGroup([by_place[place] for place in group]) for group in self._plans[shape]]
