"""What a setting costs and saves: metrics of decode steps against the unrestricted model, each with its interval.

The unrestricted model runs once over the text; kept of it are the vectors before the output embedding and the experts
that each token used. A setting then costs one forward, from the first layer that it changes. Per-token numbers live
only until they are summarised, and no more than a fixed number of settings is in the air: memory grows with the text,
not with the settings.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from lynx_trt.budgets import Restriction
from lynx_trt.calibration.cost import CostModel
from lynx_trt.calibration.intervals import Array, Bootstrap, Interval
from lynx_trt.calibration.model import Outcome, Probed, Setting, Shape
from lynx_trt.calibration.text import Sequences
from lynx_trt.errors import CheckpointError
from lynx_trt.machine import cores
from lynx_trt.selection import PRESETS

# Tokens of one forward, at least one batch; 8192 x 4 experts x 160 numbers still fit a server's cache.
CHUNK_TOKENS = 8192
# Logits in the air at a time: 2**21 numbers are 8 MB, and stay in the cache.
LOGITS_AT_A_TIME = 2**21
SETTINGS_AT_A_TIME = 32
MAX_WORKERS = 8
# Decode steps whose experts are summarised together as one unit of the bootstrap (see `Measurement.active`).
STEPS_A_BLOCK = 32


@dataclass(frozen=True)
class Measurement:
    """One setting on one part of the text. Times are in seconds, KL in nats a token, sizes in bytes.

    Experts belong to a batch and not to a sequence, so their intervals redraw blocks of consecutive steps.
    """

    batch: int
    setting: Setting
    kl: Interval
    kl_p99: Interval
    agreement: Interval
    nats_a_token: Interval
    bits_a_byte: Interval
    perplexity: Interval
    perplexity_increase: Interval  # 0.01 is 1%
    active: Interval  # experts a layer, mean over layers and steps
    active_p99: float
    active_by_layer: list[float]
    active_max_by_layer: list[int]  # of all steps
    expert_bytes_a_token: Interval
    step_seconds: Interval
    # Of each sequence, for comparisons on the same draws and for the bound on new text.
    kl_by_sequence: list[float]
    nats_added_by_sequence: list[float]
    agreement_by_sequence: list[float]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Measurement:
        """From what `to_dict` and JSON made of one."""
        setting = Setting.from_dict(values)
        rest = {name: values[name] for name in values.keys() - setting.to_dict().keys()}
        intervals = {name: Interval(*values[name]) for name, kind in cls.__annotations__.items() if kind == "Interval"}
        return cls(**{**rest, **intervals, "setting": setting})

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the numbers, and `selection`, `budgets` and `floors` beside them."""
        values = {**self.setting.to_dict(), **asdict(self)}
        del values["setting"]
        return values


@dataclass
class Tokens:
    """Per-token numbers of one setting: float32 [n,D] each, `agrees` bool; `active` int16 [N, n/B, D]."""

    kl: Array
    nats: Array
    agrees: Array
    active: Array

    @classmethod
    def empty(cls, sequences: int, steps: int, layers: int, batch: int) -> Tokens:
        """Not yet filled."""
        kl, nats = (np.zeros((sequences, steps), np.float32) for _ in range(2))
        return cls(
            kl, nats, np.zeros((sequences, steps), bool), np.zeros((layers, sequences // batch, steps), np.int16)
        )


@dataclass
class _Reference:
    """The unrestricted model over one part of the text: hidden [n,D,H], experts int16 [n,D,K] by layer, nats [n,D]."""

    hidden: torch.Tensor
    index: list[torch.Tensor]
    nats: Array


class Meter:
    """Measures settings of one model on one part of a text."""

    def __init__(
        self,
        probed: Probed,
        sequences: Sequences,
        *,
        prompt: int,
        cost: CostModel,
        seed: int = 0,
        threads: int | None = None,
    ) -> None:
        """Nothing runs yet.

        Args:
            probed: the model.
            sequences: the text, [n,L] tokens; the last one is only predicted, never fed.
            prompt: tokens of prefill, which use all experts.
            cost: what experts cost in time.
            seed: of the bootstrap.
            threads: CPU threads (default: all cores that this process may use).
        """
        self.probed = probed
        self.prompt = prompt
        self.cost = cost
        self._seed = seed
        self._ids = torch.from_numpy(sequences.ids)
        self._nbytes = sequences.nbytes[:, prompt + 1 :].sum(1)
        self._reference: _Reference | None = None
        self._threads = threads or cores()

    @property
    def sequences(self) -> int:
        """How many there are."""
        return len(self._ids)

    @property
    def steps(self) -> int:
        """D: decode steps of each sequence whose prediction can be checked."""
        return int(self._ids.shape[1]) - 1 - self.prompt

    def measure(
        self,
        settings: Sequence[Setting],
        batch: int,
        *,
        on_progress: Callable[[float], None] | None = None,
    ) -> list[Measurement]:
        """Measure each setting with B = `batch`; sequences beyond a multiple of it are left out."""
        results: list[Measurement] = []
        for start in range(0, len(settings), SETTINGS_AT_A_TIME):
            some = settings[start : start + SETTINGS_AT_A_TIME]

            def progress(done: float, start: int = start, count: int = len(some)) -> None:
                if on_progress:
                    on_progress((start + done * count) / len(settings))

            for setting, tokens in zip(some, self.tokens(some, batch, on_progress=progress), strict=True):
                results.append(self._summary(setting, tokens, batch))
        return results

    def tokens(
        self, settings: Sequence[Setting], batch: int, *, on_progress: Callable[[float], None] | None = None
    ) -> list[Tokens]:
        """Per-token numbers of each setting; all of them are in memory at once."""
        reference = self.reference()
        count = self.sequences - self.sequences % batch
        assert count, "fewer sequences than a batch"
        results = [Tokens.empty(count, self.steps, len(self.probed.layers), batch) for _ in settings]
        chunks = list(_chunks(count, int(self._ids.shape[1]), batch))
        tasks = [(rows, numbers) for rows in chunks for numbers in self._slices(settings, len(chunks))]

        def work(task: tuple[slice, list[int]]) -> None:
            rows, numbers = task
            for number, outcome in self._outcomes(rows, [settings[i] for i in numbers], Shape(batch, self.prompt)):
                self._fill(results[numbers[number]], rows, outcome, reference, batch)

        self._in_parallel(work, tasks, on_progress)
        return results

    def reference(self) -> _Reference:
        """The unrestricted model's run, made at the first call.

        Raises:
            CheckpointError: what the model gives is not finite.
        """
        if self._reference is None:
            self._reference = self._run_reference()
        return self._reference

    def regrouped(self, order: Array) -> Meter:
        """The same sequences in another order, so that others decode together; the unrestricted run stays."""
        reference, rows = self.reference(), torch.from_numpy(order)
        other = copy.copy(self)
        other._ids, other._nbytes = self._ids[rows], self._nbytes[order]
        hidden = reference.hidden[rows.to(reference.hidden.device)]
        other._reference = _Reference(hidden, [index[rows] for index in reference.index], reference.nats[order])
        return other

    def natural(self, batch: int) -> Array:
        """Experts active in the unrestricted model, int16 [N, n/B, D]."""
        count = self.sequences - self.sequences % batch
        reference = self.reference()
        return np.stack(
            [
                count_active(index[:count], batch, experts)
                for index, experts in zip(reference.index, self.probed.experts, strict=True)
            ]
        )

    def uses(self, batch: int, setting: Setting | None) -> list[list[float]]:
        """How uneven a batch is: tokens at the r-th busiest expert of each layer, mean over steps [N][E]."""
        reference = self.reference()
        if setting is None:
            count = self.sequences - self.sequences % batch
            index = {layer: rows[:count] for layer, rows in enumerate(reference.index)}
        else:
            rows = next(_chunks(self.sequences - self.sequences % batch, int(self._ids.shape[1]), batch))
            index = self.probed.run(self._inputs(rows), Shape(batch, self.prompt), setting).index
        return [_busiest(index[layer].cpu(), batch, experts) for layer, experts in enumerate(self.probed.experts)]

    def unrestricted(self) -> Setting:
        """The setting that changes nothing."""
        return Setting(PRESETS["off"], Restriction(self.probed.experts))

    def _run_reference(self) -> _Reference:
        n, probed = self.sequences, self.probed
        chunks = list(_chunks(n, int(self._ids.shape[1]), 1))
        outcomes: dict[int, Outcome] = {}
        nats = np.zeros((n, self.steps), np.float32)

        def work(rows: slice) -> None:
            outcome = probed.run(self._inputs(rows), Shape(1, self.prompt), None)
            nats[rows] = self._token_numbers(outcome.hidden, None, rows)[1]
            outcome.hidden = outcome.hidden.clone()  # a view would hold the prompt's part as well
            outcomes[rows.start] = outcome

        self._in_parallel(work, chunks, None)
        if not np.isfinite(nats).all():
            raise CheckpointError(
                f"the model gives {int((~np.isfinite(nats)).sum())} of {nats.size} tokens no finite probability, with "
                "all experts; its weights are damaged, or too large for the artifact's precision (build it with bf16)"
            )
        ordered = [outcomes[rows.start] for rows in chunks]
        hidden = torch.cat([outcome.hidden for outcome in ordered])
        index = [torch.cat([outcome.index[layer].cpu() for outcome in ordered]) for layer in range(len(probed.layers))]
        return _Reference(hidden, index, nats)

    def _slices(self, settings: Sequence[Setting], chunks: int) -> list[list[int]]:
        """Numbers of the settings that one task takes: enough tasks for all workers, and few reference runs."""
        size = max(1, min(16, math.ceil(len(settings) * chunks / (2 * self._workers))))
        return [list(range(start, min(start + size, len(settings)))) for start in range(0, len(settings), size)]

    def _outcomes(self, rows: slice, settings: list[Setting], shape: Shape) -> Iterator[tuple[int, Outcome]]:
        """Run each setting over some of the text, from the first layer that it changes where that saves work."""
        probed, ids = self.probed, self._inputs(rows)
        starts = [probed.first_restricted(setting) for setting in settings]
        known: list[Any] = []
        if sum(starts) > len(probed.decoder_layers):
            known = probed.run(ids, shape, None, keep_inputs=True).inputs
        for number, (setting, start) in enumerate(zip(settings, starts, strict=True)):
            skipped = min(start, len(probed.decoder_layers) - 1) if known else 0
            yield (
                number,
                probed.run(ids, shape, setting, skipped=skipped, known=known[skipped - 1] if skipped else None),
            )

    def _fill(self, tokens: Tokens, rows: slice, outcome: Outcome, reference: _Reference, batch: int) -> None:
        kl, nats, agrees = self._token_numbers(outcome.hidden, reference.hidden[rows], rows)
        tokens.kl[rows], tokens.nats[rows], tokens.agrees[rows] = kl, nats, agrees
        batches = slice(rows.start // batch, rows.stop // batch)
        for layer, experts in enumerate(self.probed.experts):
            index = outcome.index.get(layer)
            index = reference.index[layer][rows] if index is None else index
            tokens.active[layer, batches] = count_active(index, batch, experts)

    @torch.inference_mode()
    def _token_numbers(
        self, hidden: torch.Tensor, reference: torch.Tensor | None, rows: slice
    ) -> tuple[Array, Array, Array]:
        """KL to the reference, -log p of the next token, agreement in the likeliest one; [n,D] each, from [n,D,H]."""
        targets = self._ids[rows, self.prompt + 1 :].reshape(-1).to(hidden.device)
        shape, flat = hidden.shape[:2], hidden.flatten(0, 1)
        flat_reference = None if reference is None else reference.flatten(0, 1)
        kl, nats = torch.zeros(len(flat)), torch.zeros(len(flat))
        agrees = torch.ones(len(flat), dtype=torch.bool)
        vocabulary = int(self.probed.model.config.get_text_config().vocab_size)
        size = max(1, LOGITS_AT_A_TIME // vocabulary)
        for start in range(0, len(flat), size):
            part = slice(start, start + size)
            logits = self.probed.logits(flat[part])
            total = logits.logsumexp(-1)
            nats[part] = (total - logits.gather(1, targets[part, None]).squeeze(1)).cpu()
            if flat_reference is not None:
                wanted = self.probed.logits(flat_reference[part])
                wanted_total = wanted.logsumexp(-1)
                agrees[part] = (wanted.argmax(-1) == logits.argmax(-1)).cpu()
                difference = wanted - logits
                probability = wanted.sub_(wanted_total[:, None]).exp_()
                divergence = (probability * difference).sum(-1) + total - wanted_total
                kl[part] = divergence.clamp(min=0.0).cpu()  # rounding can make a zero negative
        return kl.view(shape).numpy(), nats.view(shape).numpy(), agrees.view(shape).numpy()

    def _inputs(self, rows: slice) -> torch.Tensor:
        return self._ids[rows, :-1].to(self.probed.device)

    @property
    def _workers(self) -> int:
        return 1 if self.probed.device.type != "cpu" else min(self._threads, MAX_WORKERS)

    def _in_parallel(
        self, work: Callable[[Any], None], tasks: Sequence[Any], on_progress: Callable[[float], None] | None
    ) -> None:
        """On the CPU a thread for each task: the operations are too small to be shared well between threads."""
        each = max(1, self._threads // self._workers)
        pool = ThreadPoolExecutor(self._workers, initializer=torch.set_num_threads, initargs=(each,))
        try:
            for done, _ in enumerate(pool.map(work, tasks), 1):
                if on_progress:
                    on_progress(done / len(tasks))
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C, only what is running is waited for

    def _summary(self, setting: Setting, tokens: Tokens, batch: int) -> Measurement:
        reference = self.reference()
        n, steps = tokens.kl.shape
        draws = Bootstrap(n, self._seed)
        nats, base = tokens.nats.astype(np.float64).mean(1), reference.nats[:n].astype(np.float64).mean(1)
        kl, agrees = tokens.kl.astype(np.float64).mean(1), tokens.agrees.mean(1)
        nats_mean, added = draws.mean(nats), draws.mean(nats - base)
        active = _by_block(tokens.active)  # [N, blocks]
        active_draws = Bootstrap(active.shape[1], self._seed)
        bytes_read = np.array([self.cost.bytes_of_experts(column) for column in active.T])
        seconds = np.array([self.cost.step_seconds(column) for column in active.T])
        return Measurement(
            batch=batch,
            setting=setting,
            kl=draws.mean(kl),
            kl_p99=draws.upper_quantile(tokens.kl, 0.99),
            agreement=draws.mean(agrees),
            nats_a_token=nats_mean,
            bits_a_byte=draws.ratio(nats * steps / math.log(2), self._nbytes[:n].astype(np.float64)),
            perplexity=Interval(*(math.exp(value) for value in nats_mean)),
            perplexity_increase=Interval(*(math.expm1(value) for value in added)),
            active=active_draws.mean(active.mean(0)),
            active_p99=float(np.percentile(tokens.active, 99)),
            active_by_layer=[float(value) for value in active.mean(1)],
            active_max_by_layer=[int(value) for value in tokens.active.max((1, 2))],
            expert_bytes_a_token=Interval(*(value / batch for value in active_draws.mean(bytes_read))),
            step_seconds=active_draws.mean(seconds),
            kl_by_sequence=kl.tolist(),
            nats_added_by_sequence=(nats - base).tolist(),
            agreement_by_sequence=agrees.tolist(),
        )


def _chunks(count: int, length: int, batch: int) -> Iterator[slice]:
    """Whole batches, about CHUNK_TOKENS tokens at a time."""
    size = batch * max(1, CHUNK_TOKENS // (batch * length))
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def count_active(index: torch.Tensor, batch: int, experts: int) -> Array:
    """Distinct experts of each decode step: index int16 [c*B,D,K] (-1: empty) -> int16 [c,D]."""
    groups = _by_step(index, batch, experts)
    used = torch.zeros(*groups.shape[:2], experts + 1, dtype=torch.bool, device=index.device)
    used.scatter_(2, groups, True)
    counts: Array = used[..., :-1].sum(-1, dtype=torch.int16).cpu().numpy()
    return counts


def _busiest(index: torch.Tensor, batch: int, experts: int) -> list[float]:
    """Tokens at the r-th busiest expert of a decode step, mean over steps: index [c*B,D,K] -> [E]."""
    groups = _by_step(index, batch, experts).flatten(0, 1)
    counts = torch.zeros(len(groups), experts + 1)
    counts.scatter_add_(1, groups, torch.ones(groups.shape))
    ranked = counts[:, :-1].sort(dim=1, descending=True).values
    return [float(value) for value in ranked.mean(0)]


def _by_step(index: torch.Tensor, batch: int, experts: int) -> torch.Tensor:
    """Experts that each decode step uses, int64 [c,D,B*K]; empty slots (-1) become E, one more than there is."""
    sequences, steps, width = index.shape
    groups = index.view(sequences // batch, batch, steps, width).transpose(1, 2).flatten(2).long()
    return torch.where(groups < 0, experts, groups)


def _by_block(active: Array) -> Array:
    """Mean active experts of each block of consecutive steps of one batch: [N,c,D] -> [N, c * blocks]."""
    layers, batches, steps = active.shape
    blocks = max(1, steps // STEPS_A_BLOCK)
    edges = np.linspace(0, steps, blocks + 1).astype(int)[:-1]
    sums = np.add.reduceat(active.astype(np.float64), edges, axis=2)
    sizes = np.diff([*edges, steps])
    means: Array = (sums / sizes).reshape(layers, batches * blocks)
    return means
