"""The dial: from the quality that a request asks for to what each MoE layer may load."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lynx_trt.artifact import Manifest
from lynx_trt.budgets import Restriction
from lynx_trt.errors import GenerationError, UsageError
from lynx_trt.selection import Selection

QUALITIES = ("max", "balanced", "fast")
FASTER = 4.0  # times its floors: the quality `fast`
LONGEST = 32  # characters of a quality that are looked at, and quoted in a message


@dataclass(frozen=True)
class Dial:
    """The restriction of every quality of one artifact.

    `max` is all experts; `balanced` the artifact's own budgets and floors, calibrated ones where there are; `fast`
    four times these floors (an expert then needs twice the weight), and in layers without one half of the budget; a
    fraction from 0 to 1 is that share of each layer's experts, without floors. An artifact built with the preset `off`
    has no dial: everything is `max`.
    """

    experts: tuple[int, ...]
    own: Restriction
    least: int  # budget below which tokens would lose their whole MoE block
    fixed: bool

    @classmethod
    def of(cls, manifest: Manifest) -> Dial:
        """The dial of an artifact."""
        layers, chosen = manifest.model.moe_layers, manifest.selection
        selection = Selection(**chosen.parameters)  # type: ignore[arg-type]
        guaranteed = min(selection.guaranteed(layer.experts_per_token) for layer in layers)
        return cls(
            experts=tuple(layer.experts for layer in layers),
            own=chosen.restriction,
            least=0 if guaranteed else 1,
            fixed=chosen.preset == "off",
        )

    def restriction(self, quality: str) -> Restriction:
        """The restriction for a quality as a request or an operator writes it.

        Raises:
            GenerationError: it is none of the names, and no fraction either.
        """
        name = quality.strip()
        if name not in QUALITIES:
            share = self._fraction(name)
            budgets = self.experts if self.fixed else self._at_least(share * count for count in self.experts)
            return Restriction(budgets)
        if name == "max" or self.fixed:
            return Restriction(self.experts)
        if name == "balanced":
            return self.own
        pairs = zip(self.own.budgets, self.own.floors, strict=True)
        budgets = self._at_least(budget if floor else budget / 2 for budget, floor in pairs)
        return Restriction(budgets, tuple(FASTER * floor for floor in self.own.floors))

    def check_default(self, quality: str) -> None:
        """Refuse what an operator can't mean as the quality of requests that ask for none.

        Raises:
            UsageError: it is no quality, or one that an artifact without a dial can't have.
        """
        self.check_quality(quality)
        if self.fixed and quality.strip() not in ("max", "balanced"):
            raise UsageError(
                f"the quality {quality!r} means nothing for an artifact built with --preset off, which uses all "
                "experts; leave it out, or build with another preset"
            )

    def check_quality(self, quality: str) -> None:
        """Refuse what is no quality.

        Raises:
            UsageError: as `restriction` raises for a request.
        """
        try:
            self.restriction(quality)
        except GenerationError as error:
            raise UsageError(str(error)) from None

    def share(self, restriction: Restriction) -> float:
        """Its budgets as a fraction of all experts, mean over the layers."""
        pairs = zip(restriction.budgets, self.experts, strict=True)
        return sum(budget / count for budget, count in pairs) / len(self.experts)

    def _at_least(self, budgets: Iterable[float]) -> tuple[int, ...]:
        return tuple(max(self.least, math.ceil(budget)) for budget in budgets)

    @staticmethod
    def _fraction(text: str) -> float:
        try:
            value = float(text) if len(text) <= LONGEST else math.nan
        except ValueError:
            value = math.nan
        if not 0 <= value <= 1:  # NaN is not either
            raise GenerationError(
                f"the quality is {text[:LONGEST]!r}; it must be {', '.join(QUALITIES)} or a fraction of the experts "
                "from 0 to 1, such as 0.5"
            )
        return value
