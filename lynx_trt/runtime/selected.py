"""The selection as few small nodes, for a router that is softmax and top-k: which experts each token may use.

It is `lynx_trt.selection.select` up to the kept set; what comes after, each token's K best among the kept experts and
their weights, `com.microsoft.MoE` does itself. Where the function body of LynxSelect has some 96 nodes and an If, this
has 20, of a third of a microsecond each; for a step of one token 7. What makes them few:

- TopK gives a token's experts by falling choice, so the guaranteed ones are its first columns.
- A NaN or +inf in a row of logits makes all of its log-softmax NaN, as does -inf in all of it: a row that doesn't count
  is all NaN, and Shrink, for which NaN is not above 0, makes its votes 0. The op skips such a row too.
- A guaranteed expert has its vote times 1e300, which is infinite as float32.
- No vote is above 1, but for rounding, so a floor above that is as good as 2, and nothing times it is infinite.
- One token's votes fall as its experts do, so each place in its TopK has a share to exceed, known before the step.

Votes are summed in float64 and ranked as float32, as in the reference, and ties go to the lower expert. A share may
differ from the reference's by a rounding of float32, as the model's weights themselves from one backend to another.
Where two experts tie for a token's last place, their logits being equal bit for bit, the op takes the higher index and
the reference the lower, as without any selection; what they weigh is the same. An expert whose logit is -inf is never
used, where the reference may fill a slot with it, of weight 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import TensorProto, numpy_helper

from lynx_trt.runtime.moe_layer import Layer, NoFitError

KEPT_ANYWAY = 1e300
# The smallest float32 above 0, to this power and times KEPT_ANYWAY, is still infinite as float32.
LARGEST_POWER = 5.0


def masked_log_probabilities(layer: Layer, logits: str) -> str:
    """[T,E] of the router's logits: logarithms of its softmax, -inf where a token may not use an expert.

    All of a row that doesn't count is NaN or -inf.

    Raises:
        NoFitError: the votes, or where budgets and floors come from, are none of those that are known here.
    """
    return _Batch(layer, logits).masked()


def masked_log_probabilities_of_one(layer: Layer, logits: str) -> str:
    """The same [1,E] for a step of a single token: no expert is kept but its own, and those by its weights alone.

    Raises:
        NoFitError: as above; a token's own weights don't decide.
    """
    return _Token(layer, logits).masked()


class _Routed:
    """A layer's router: the logarithms [T,E] of its softmax, and of each token's K best these [T,K] and the experts."""

    def __init__(self, layer: Layer, logits: str) -> None:
        self.layer, self.edit, self.rule = layer, layer.edit, layer.rule
        self.vote = layer.rule["vote"].decode()
        self.routed = self.edit.add("LogSoftmax", [self._without_padding(logits)], axis=1)
        self.best, self.own = self.edit.add_many("TopK", [self.routed, self.edit.integers([layer.k])], 2, axis=1)

    def _without_padding(self, logits: str) -> str:
        mask = self.layer.select.input[6]
        add = self.edit.add

        def build() -> str:
            row = add("Where", [mask, self.edit.scalar(0), self.edit.scalar(-np.inf)])
            return add("Unsqueeze", [row, self.edit.integers([1])])

        return add("Add", [logits, self.edit.once(f"padding {mask}", build)])

    def _only_own(self, kept: str) -> str:
        """[T,E] of what is kept, bool [T,K], of a token's own experts."""
        left = self.edit.add("Where", [kept, self.best, self.edit.scalar(-np.inf)])
        return self.edit.add("ScatterElements", [self._table(np.float32(-np.inf)), self.own, left], axis=1)

    def _table(self, value: np.floating[Any]) -> str:
        """[T,E] of one value, for all layers of E experts."""
        add = self.edit.add

        def build() -> str:
            shape = add("Shape", [self.routed])
            return add("ConstantOfShape", [shape], value=numpy_helper.from_array(np.array([value])))

        return self.edit.once(f"table {self.layer.e} {value!r}", build)

    def _of_all(self, place: int) -> tuple[str, int, int]:
        """The numbers [N] that an input of LynxSelect is picked from, N, and which of them is this layer's."""
        pick = self.edit.producer(self.layer.select.input[place])
        picked = pick is not None and pick.op_type == "Gather" and self.edit.is_constant(pick.input[1])
        shape = self.edit.known_shape(pick.input[0]) if pick is not None and picked else []
        if pick is None or len(shape) != 1 or not shape[0]:
            raise NoFitError("its budget and floor are no elements of the model's")
        return pick.input[0], shape[0], int(self.edit.value(pick.input[1]))

    def _element(self, place: int, prepare: Callable[[str], str]) -> str:
        """Row of this layer in what is prepared once of the numbers [N] that an input of LynxSelect is picked from."""
        source, count, number = self._of_all(place)

        def split() -> list[str]:
            return self.edit.add_many("Split", [prepare(source)], count, axis=0, num_outputs=count)

        return self.edit.once(f"rows of {source} {self.layer.e}", split)[number]


class _Batch(_Routed):
    def __init__(self, layer: Layer, logits: str) -> None:
        super().__init__(layer, logits)
        if self.vote == "weight" and self.rule["power"] > LARGEST_POWER:
            raise NoFitError(f"votes to the power {self.rule['power']:g} leave float64")
        add = self.edit.add
        self.shares = self._shares_of(self.best)
        total = add("Round", [add("ReduceSum", [self.shares], keepdims=0)])  # a row's may be 1.0000001
        self.voting = add("Cast", [total], to=TensorProto.FLOAT)

    def masked(self) -> str:
        kept = self._kept()
        if self.rule["remap"]:
            return self.edit.add("Where", [kept, self.routed, self.edit.scalar(-np.inf)])
        return self._only_own(self.edit.add("Gather", [kept, self.own]))

    def _kept(self) -> str:
        """Bool [E]."""
        add = self.edit.add
        votes = add("Cast", [self._votes()], to=TensorProto.FLOAT)
        room, floor = self._element(4, self._rooms), self._element(5, self._floors)
        enough = add("Mul", [floor, self.voting])
        # The first `room` keep their votes. Of the others only infinite ones stay above 0.
        best_votes, best = self.edit.add_many("TopK", [votes, room], 2, axis=0)
        others = add("Sub", [votes, self.edit.scalar(float(np.finfo(np.float32).max))])
        return add("Greater", [add("ScatterElements", [others, best, best_votes], axis=0), enough])

    def _votes(self) -> str:
        """Float64 [E], above all of float32 for what is kept whatever the budget."""
        add, first = self.edit.add, self.edit.integers([0])
        factor = self._factor()
        if self.vote == "score":
            scores = self._shares_of(self.routed)
            if factor:
                forced = add("Mul", [self.shares, factor])
                scores = add("ScatterElements", [scores, self.own, forced], axis=1, reduction="add")
            return add("ReduceSum", [scores, first], keepdims=0)
        vote = {"count": self._count, "weight": self._weight, "affinity": self._affinity}[self.vote]()
        vote = add("Mul", [vote, factor]) if factor else vote
        ballots = add("ScatterElements", [self._table(np.float64(0)), self.own, vote], axis=1)
        return add("ReduceSum", [ballots, first], keepdims=0)

    def _count(self) -> str:
        return self.edit.add("Ceil", [self.shares])

    def _weight(self) -> str:
        power = float(self.rule["power"])
        if power == 1:
            return self.shares
        if power == 2:
            return self.edit.add("Mul", [self.shares, self.shares])
        return self.edit.add("Pow", [self.shares, self.edit.constant(np.array(power))])

    def _affinity(self) -> str:
        """Votes n ** bin, bin = clamp(floor(alpha * (ln(combine) - ln(best))), -beta, 0)."""
        add = self.edit.add
        below = add("Sub", [self.best, add("ReduceMax", [self.best, self.edit.integers([1])], keepdims=1)])
        level = add("Mul", [below, self.edit.scalar(float(self.rule["alpha"]))])
        bins = add("Max", [add("Floor", [level]), self.edit.scalar(-float(self.rule["beta"]))])
        voting, bins = (add("Cast", [value], to=TensorProto.DOUBLE) for value in (self.voting, self._or_zero(bins)))
        return add("Mul", [add("Pow", [voting, bins]), self._count()])

    def _factor(self) -> str:
        """What a token's votes are multiplied by, [1,K] or [T,K]; empty if nothing is kept whatever the budget."""
        columns = np.full((1, self.layer.k), 0.0 if self.vote == "score" else 1.0)
        columns[:, : self.rule["guarantee"]] = KEPT_ANYWAY
        tau, k = float(self.rule["sensitivity"]), self.layer.k
        if not tau:
            return self.edit.constant(columns) if self.rule["guarantee"] else ""
        # confidence (K m - 1) / (K - 1) < tau, by m, the largest share.
        largest = self.edit.add("ReduceMax", [self.shares, self.edit.integers([1])], keepdims=1)
        sensitive = self.edit.add("Less", [largest, self.edit.constant(np.array((tau * (k - 1) + 1) / k))])
        forced, columns_name = self.edit.constant(np.array(KEPT_ANYWAY)), self.edit.constant(columns)
        return self.edit.add("Where", [sensitive, forced, columns_name])

    def _rooms(self, budgets: str) -> str:
        experts = self.edit.integers(self.layer.e)
        return self.edit.add("Min", [self.edit.add("Cast", [budgets], to=TensorProto.INT64), experts])

    def _floors(self, floors: str) -> str:
        return self.edit.add("Min", [floors, self.edit.scalar(2)])

    def _shares_of(self, logarithms: str) -> str:
        """Float64 [T,.] that sum to 1 in a row, 0 in one that doesn't count."""
        shares = self._or_zero(self.edit.add("Softmax", [logarithms], axis=1))
        return self.edit.add("Cast", [shares], to=TensorProto.DOUBLE)

    def _or_zero(self, values: str) -> str:
        """Float32 values, NaN as 0."""
        return self.edit.add("Shrink", [values], lambd=0.0, bias=0.0)


class _Token(_Routed):
    def masked(self) -> str:
        if self.vote != "weight" or self.rule["sensitivity"]:
            raise NoFitError("which experts a single token keeps hangs on more than their own weights")
        shares = self.edit.add("Softmax", [self.best], axis=1)  # a row that doesn't count: NaN, and above nothing
        return self._only_own(self.edit.add("Greater", [shares, self._element(5, self._bounds)]))

    def _table(self, value: np.floating[Any]) -> str:
        return self.edit.constant(np.full((1, self.layer.e), value))

    def _bounds(self, floors: str) -> str:
        """[N,K]: what the share of a token's expert in this place has to exceed, for all layers."""
        add, k = self.edit.add, self.layer.k
        budgets, _, _ = self._of_all(4)
        power = self.edit.scalar(1 / float(self.rule["power"]))
        column = self.edit.integers([1])
        bounds = add("Unsqueeze", [add("Pow", [floors, power]), column])
        places = np.arange(k, dtype=np.int32)[None]
        within = add("Less", [self.edit.constant(places), add("Unsqueeze", [budgets, column])])
        bounds = add("Where", [within, bounds, self.edit.scalar(2)])
        return add("Where", [self.edit.constant(places < self.rule["guarantee"]), self.edit.scalar(-1), bounds])
