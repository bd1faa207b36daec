"""One region under the probe: is it a block, of which form, and how does its router weigh?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from lynx_trt.experts import ExpertsForm
from lynx_trt.export.ops import OPSET
from lynx_trt.export.patterns.block import RefusedError
from lynx_trt.export.regions.closure import Region, extract
from lynx_trt.export.regions.constants import Constants
from lynx_trt.export.regions.fit import (
    TOLERANCES,
    ExpertWeights,
    Fitted,
    RuleFit,
    coefficients,
    fit_form,
    fit_rule,
    predict,
)
from lynx_trt.export.regions.linears import Linears, Roles
from lynx_trt.export.regions.operands import Tracer
from lynx_trt.export.regions.probe import Array, Observed, Prober, Sizes, scalars
from lynx_trt.export.relayout import View

# Full-size probes of up to this many elements of weights, where a smaller one can't be made.
_AFFORDABLE = 1 << 25


@dataclass(frozen=True)
class Anchor:
    """A router's choice: the node, what it ranks [..,E], K, the chosen index [..,K], and whether the largest win."""

    node: ir.Node
    scores: ir.Value
    count: int
    index: ir.Value
    largest: bool


@dataclass(frozen=True)
class Understood:
    """What a region turned out to be; its values are named as in `Region.model`, so it serves all regions alike."""

    form: ExpertsForm
    swapped: bool
    output: str
    output_rank: int
    shape_of: str | None
    weight: str | None
    rule: RuleFit | None
    order: tuple[int, ...]


class Study:
    """A region, its experts and its router; `run` understands it or refuses."""

    def __init__(
        self,
        constants: Constants,
        anchor: Anchor,
        logits: ir.Value,
        hidden: ir.Value,
        roles: Roles,
        nodes: list[ir.Node],
        shapes: set[ir.Value],
        chain: list[ir.Value],
    ) -> None:
        """Measure the experts.

        Raises:
            RefusedError: the experts' sizes don't fit each other or the router.
        """
        self._constants, self._anchor, self._logits, self._hidden = constants, anchor, logits, hidden
        self._roles, self._nodes, self._shapes, self._chain = roles, nodes, shapes, chain
        self._ranks = [3, 2] if hidden.shape is None else [len(hidden.shape)]
        self._sizes = self._measure()
        self._later = self._after_choice()

    def _measure(self) -> Sizes:
        """H, I, E as the stored weights have them."""
        roles = self._roles
        rows, width = roles.matrices(roles.first[0])[0].shape
        out, inner = roles.matrices(roles.second)[0].shape
        shapes = {view.shape for linears in roles.first for view in roles.matrices(linears)}
        if len(shapes) != 1 or len({view.shape for view in roles.matrices(roles.second)}) != 1:
            raise RefusedError("its experts' weights are not all of one shape")
        counts = {len(roles.matrices(linears)) for linears in (*roles.first, roles.second)}
        if len(counts) != 1:
            raise RefusedError(f"its layers have different numbers of experts: {sorted(counts)}")
        fused = len(roles.first) == 1 and rows != inner
        if len(roles.first) > 2 or out != width or rows != inner * (2 if fused else 1):
            raise RefusedError(
                f"its experts' weights are {len(roles.first)} times [{rows},{width}] and [{out},{inner}], which is no "
                "gate and up and down projection"
            )
        (experts,) = counts
        self._check_router(experts, width)
        return Sizes(width, inner, rows, experts, self._anchor.count)

    def _check_router(self, experts: int, width: int) -> None:
        scores = self._anchor.scores.shape
        last = scores[-1] if scores is not None and len(scores) else None
        if isinstance(last, int) and last != experts:
            traced = " (a loop over the experts that one example happened to use was traced)" if experts < last else ""
            raise RefusedError(f"its router ranks {last} experts, and the graph has {experts} of them{traced}")
        if not 1 <= self._anchor.count <= experts:
            raise RefusedError(f"its router chooses {self._anchor.count} of {experts} experts")
        if self._anchor.count >= width:
            raise RefusedError(f"with {self._anchor.count} experts a token and H = {width} they can't be told apart")

    def run(self, known: dict[str, Understood]) -> tuple[Region, Understood]:
        """Extract and understand the region; one that is like a region in `known` is understood without a run.

        Raises:
            RefusedError: it is no block.
        """
        smaller = self._sizes.smaller()
        region = self._extract(smaller)
        key = self._key(region)
        if key in known:
            return region, known[key]
        try:
            understood = self._probe(region, smaller)
        except RefusedError:
            if not smaller or self._sizes.elements > _AFFORDABLE:
                raise
            region = self._extract({})
            understood = self._probe(region, {})
        known[key] = understood
        return region, understood

    def _key(self, region: Region) -> str:
        """What makes two studies the same: the region, its router's place in it, and the shapes it is fed with."""
        anchor = self._anchor
        router = [region.names.get(value, "") for value in (anchor.scores, anchor.index)]
        shapes = [value.shape for value in (self._hidden, self._logits, *region.shapes_of.values())]
        return f"{region.digest} {router} {anchor.count} {anchor.largest} {shapes}"

    def _extract(self, smaller: dict[int, int]) -> Region:
        views = [view for linears in (*self._roles.first, self._roles.second) for view in self._roles.matrices(linears)]
        learned = {id(view.tensor) for view in views}
        given = [self._hidden, self._logits]
        return extract(
            self._nodes, given, self._shapes, self._chain, OPSET, lambda size: smaller.get(size, size), learned
        )

    def _probe(self, region: Region, smaller: dict[int, int]) -> Understood:
        """Run the region and fit what it gave; where the rank of its input isn't recorded, both are tried."""
        for rank in self._ranks[:-1]:
            try:
                return _Probe(self, region, smaller, rank).understand()
            except RefusedError:
                continue
        return _Probe(self, region, smaller, self._ranks[-1]).understand()

    def _after_choice(self) -> set[ir.Value]:
        """Values that depend on the router's choice."""
        later = set(self._anchor.node.outputs)
        for node in self._nodes:
            if any(value in later for value in node.inputs):
                later |= set(node.outputs)
        return later


class _Probe:
    """A study's region at the probe's sizes."""

    def __init__(self, study: Study, region: Region, smaller: dict[int, int], rank: int) -> None:
        self._study, self._region, self._smaller = study, region, smaller
        self._anchor, self._sizes = study._anchor, study._sizes
        self._prober = Prober(region, study._hidden, study._logits, study._sizes, smaller, rank)
        self._rank = rank
        self._scalars = scalars(region)
        self._tolerance = self._rounding()
        self._width = smaller.get(self._sizes.hidden, self._sizes.hidden)

    def _rounding(self) -> float:
        """By the type in which the region's constants were rounded."""
        study = self._study
        views = study._roles.matrices(study._roles.second)
        kinds = {views[0].tensor.dtype.name, getattr(study._hidden.dtype, "name", "FLOAT")}
        return max(TOLERANCES.get(kind, TOLERANCES["FLOAT"]) for kind in kinds)

    def understand(self) -> Understood:
        """Fit on tokens that use every expert, then check on tokens that use few.

        Raises:
            RefusedError: it is no block.
        """
        hidden, logits = self._prober.all_experts()
        observed = self._prober.observe(hidden, logits)
        weights = self._weights()
        index = self._index(observed, logits)
        if self._separate() and len(np.unique(index)) < self._sizes.experts:
            raise RefusedError("its router can't be brought to use every expert, so they can't be told apart")
        found = self._fit(weights, hidden, index, observed)
        if found is None and self._separate():
            order = self._order(index, hidden, logits)
            found = None if order is None else self._fit(weights.reordered(order), hidden, index, observed, order)
        if found is None:
            raise RefusedError(
                "what it computes is not the weighted sum of its experts, or they have an activation that the "
                "ops don't know"
            )
        self._check_with_few(weights.reordered(found.order), found)
        return found

    def _fit(
        self,
        weights: ExpertWeights,
        hidden: Array,
        index: Array,
        observed: Observed,
        order: tuple[int, ...] | None = None,
    ) -> Understood | None:
        for output in self._study._chain:
            name = self._region.names[output]
            array, raw = observed.get(name, self._width), observed.raw(name)
            if array is None or raw is None or len(array) != len(hidden):
                continue
            shape_of = self._shaped_like(raw)
            if raw.ndim not in (2, self._rank) and shape_of is None:
                continue
            fitted = fit_form(weights, hidden, index, array, self._scalars, self._tolerance)
            if fitted is not None:
                return self._finish(fitted, index, observed, name, raw.ndim, shape_of, order)
        return None

    def _finish(
        self,
        fitted: Fitted,
        index: Array,
        observed: Observed,
        name: str,
        rank: int,
        shape_of: str | None,
        order: tuple[int, ...] | None,
    ) -> Understood:
        """Find the weights among the region's values, and the rule that they follow."""
        tolerance = self._as_exact_as(fitted.error)
        weight = self._find_weight(observed, fitted.weight, tolerance)
        rule = fit_rule(fitted.weight, index, self._sources(observed), self._scalars, tolerance)
        if weight is None and rule is None:
            raise RefusedError("how its router weighs the experts is no known rule, and no value of the graph holds it")
        natural = tuple(range(self._sizes.experts))
        return Understood(fitted.form, fitted.swapped, name, rank, shape_of, weight, rule, order or natural)

    def _shaped_like(self, output: Array) -> str | None:
        """A value that the region takes its shape from, where the output has more axes than the hidden states."""
        if output.ndim <= self._rank:
            return None
        shapes = self._region.shapes_of.items()
        return next((name for name, value in shapes if self._prober.shape(value) == output.shape), None)

    def _as_exact_as(self, error: float) -> float:
        """How far weights may be off that were told with this error.

        Not the type's whole tolerance: a sigmoid is within 3% of 1 for many a score.
        """
        return min(self._tolerance, max(TOLERANCES["FLOAT"], 10 * error))

    def _find_weight(self, observed: Observed, weight: Array, tolerance: float) -> str | None:
        """The earliest value that holds the weights [..,K] that the experts are summed with."""
        told = ~np.isnan(weight).any(axis=1)
        for name in self._names():
            array = observed.get(name, weight.shape[1])
            if array is None or array.dtype.kind != "f" or len(array) != len(weight):
                continue
            if np.allclose(array[told], weight[told], rtol=tolerance, atol=1e-3 * tolerance):
                return name
        return None

    def _sources(self, observed: Observed) -> list[tuple[str, Array]]:
        """Values [..,E] from the logits on, in order, that don't depend on the choice itself."""
        later = {self._region.names[value] for value in self._study._later if value in self._region.names}
        sources = []
        for name in [self._region.names[self._study._logits], *self._names()]:
            array = observed.get(name, self._sizes.experts)
            if array is not None and array.dtype.kind == "f" and name not in later:
                sources.append((name, array))
        return sources

    def _names(self) -> list[str]:
        values = (output for node in self._study._nodes for output in node.outputs)
        return [self._region.names[value] for value in values if value in self._region.names]

    def _index(self, observed: Observed, logits: Array) -> Array:
        """The router's choice [N,K]."""
        anchor = self._anchor
        name = self._region.names.get(anchor.index)
        index = None if name is None else observed.get(name, anchor.count)
        if name is not None and index is None and anchor.count == 1:  # ArgMax may leave the last axis out
            raw = observed.raw(name)
            index = None if raw is None or raw.size != self._prober.tokens else _flat(observed, name)
        if index is None:
            scores = observed.get(self._region.names.get(anchor.scores, ""), self._sizes.experts)
            scores = logits if scores is None and anchor.scores is self._study._logits else scores
            if scores is None:
                raise RefusedError("its router's choice has not as many rows as its experts are given")
            index = np.argsort(-scores if anchor.largest else scores, axis=1, kind="stable")[:, : anchor.count]
        return index.astype(np.int64)

    def _weights(self) -> ExpertWeights:
        """The experts' matrices in this probe."""
        region = self._region
        arrays = {id(value.const_value): self._prober.weights[name] for name, value in region.weights.items()}
        filled = {constant.name: constant for constant in region.model.graph.initializer}
        for value, name in region.names.items():
            if name in filled:
                arrays[id(value.const_value)] = np.asarray(onnx.numpy_helper.to_array(filled[name]))
        roles = self._scaled_roles()
        first_biases = [roles.biases(group) for group in roles.first]
        second_bias = roles.biases(roles.second)
        given = [bias for bias in first_biases if bias is not None]
        if len(given) not in (0, len(first_biases)):
            raise RefusedError("only one of its gate and up projections has a bias")
        return ExpertWeights(
            tuple(_stacked(roles.matrices(group), arrays) for group in roles.first),
            _stacked(roles.matrices(roles.second), arrays),
            tuple(_stacked(bias, arrays) for bias in given) or None,
            None if second_bias is None else _stacked(second_bias, arrays),
        )

    def _scaled_roles(self) -> Roles:
        """The study's roles, their weights traced at the probe's sizes."""
        scaled = Tracer(self._study._constants, lambda size: self._smaller.get(size, size))
        linears = {linear.node: linear for linear in Linears(scaled).find(self._study._nodes)}
        roles = self._study._roles
        try:
            return Roles(
                tuple(tuple(linears[linear.node] for linear in group) for group in roles.first),
                tuple(linears[linear.node] for linear in roles.second),
            )
        except KeyError:
            raise RefusedError("its weights can't be followed at other sizes") from None

    def _separate(self) -> bool:
        """Whether each expert's weights are tensors of their own, so that their order had to be guessed."""
        return len({id(view.tensor) for view in self._study._roles.matrices(self._study._roles.second)}) > 1

    def _order(self, index: Array, hidden: Array, logits: Array) -> tuple[int, ...] | None:
        """Which weights are expert 0's, 1's, ...: told by whose tokens change when only theirs are let through."""
        roles = self._scaled_roles()
        views = roles.matrices(roles.second)
        experts = self._sizes.experts
        chosen = np.zeros((len(index), experts), bool)
        np.put_along_axis(chosen, index, True, axis=1)
        used = np.zeros((len(index), experts), bool)
        kept = dict(self._prober.weights)
        names = {id(value.const_value): name for name, value in self._region.weights.items()}
        silenced = [*views, *(roles.biases(roles.second) or [])]
        for start in range(0, experts, self._width):
            part = range(start, min(start + self._width, experts))
            for view in silenced:
                name = names[id(getattr(view.tensor, "tensor", view.tensor))]
                self._prober.weights[name] = np.zeros_like(kept[name])
            for row, expert in enumerate(part):
                name = names[id(getattr(views[expert].tensor, "tensor", views[expert].tensor))]
                _writable(views[expert], self._prober.weights[name])[row] = 1.0
            observed = self._prober.observe(hidden, logits)
            output = next(
                (o for v in reversed(self._study._chain) if (o := self._output(observed, v)) is not None), None
            )
            if output is None:
                break
            used[:, part.start : part.stop] = np.abs(output[:, : len(part)]) > 1e-9
        self._prober.weights.update(kept)
        return _matching(chosen, used)

    def _output(self, observed: Observed, value: ir.Value) -> Array | None:
        return observed.get(self._region.names[value], self._width)

    def _check_with_few(self, weights: ExpertWeights, found: Understood) -> None:
        """Most experts without a token: a loop that was traced over one example's experts fails here.

        Raises:
            RefusedError: the region gives something else than the block would.
        """
        hidden, logits = self._prober.few_experts()
        try:
            observed = self._prober.observe(hidden, logits)
            index = self._index(observed, logits)
            output = observed.get(found.output, self._width)
        except RefusedError as refusal:
            raise RefusedError(f"it fails where some experts have no token: {refusal}") from None
        fitted = None
        if output is not None:
            fitted = coefficients(weights, found.form, found.swapped, hidden, index, output, self._tolerance)
        if fitted is None:
            raise RefusedError("it gives something else where some experts have no token")
        used = fitted.weight
        told = ~np.isnan(used).any(axis=1)
        expected = None
        if found.weight is not None:
            expected = observed.get(found.weight, self._anchor.count)
        elif found.rule is not None:
            expected = predict(found.rule, index, dict(self._sources(observed)))
        tolerance = self._as_exact_as(fitted.error)
        if expected is None or not np.allclose(expected[told], used[told], rtol=10 * tolerance, atol=tolerance):
            raise RefusedError("its router weighs otherwise where some experts have no token")


def _matching(chosen: Array, used: Array) -> tuple[int, ...] | None:
    """Which column of `used` is each column of `chosen` [N,E]; None if that is not told.

    Weights are an expert's only if all tokens that they were used for chose it. Not the other way round: activations
    such as relu may give nothing for a token.
    """
    wrong = (~chosen).astype(np.int64).T @ used
    overlap = np.where(wrong == 0, chosen.astype(np.int64).T @ used, -1)
    order = overlap.argmax(axis=1)
    best = overlap.max(axis=1)
    told = (overlap == best[:, None]).sum(axis=1) == 1
    whole = sorted(order.tolist()) == list(range(len(order)))
    return tuple(order.tolist()) if whole and told.all() and (best > 0).all() else None


def _flat(observed: Observed, name: str) -> Array:
    raws = [results[name].reshape(-1, 1) for results in observed.runs]
    return np.concatenate(raws)


def _stacked(views: list[View], arrays: dict[int, Array]) -> Array:
    """Views into a probe's arrays, one below the other."""
    return np.stack([_writable(view, arrays[id(getattr(view.tensor, "tensor", view.tensor))]) for view in views])


def _writable(view: View, array: Array) -> Array:
    """A view into the array that stands for its tensor."""
    flat = array.reshape(-1)
    strides = tuple(stride * flat.itemsize for stride in view.strides)
    return np.lib.stride_tricks.as_strided(flat[view.offset :], view.shape, strides)
