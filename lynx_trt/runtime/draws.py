"""Drawing the next tokens on the GPU, from where an engine leaves its logits.

The kernels are compiled at build time for the GPUs of the engine, and lie beside it in the artifact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lynx_trt.artifact import DRAWS, Artifact
from lynx_trt.errors import ArtifactError
from lynx_trt.plugins.blob import Kernels, lookup
from lynx_trt.plugins.launcher import Launch, launches_of
from lynx_trt.plugins.plan import find_plan
from lynx_trt.plugins.specs import DrawSpec
from lynx_trt.runtime.backend import NOT_WANTED, Array, Draws
from lynx_trt.runtime.buffers import Buffers
from lynx_trt.runtime.sampling import draw

if TYPE_CHECKING:
    from lynx_trt.runtime.cuda import Gpu

# As draw_kernel.BEYOND: a token that is to be drawn here.
BEYOND = -3


class DeviceDraws:
    """Launches the draws of one artifact on one GPU, on rows of one set of buffers."""

    def __init__(self, artifact: Artifact, gpu: Gpu, buffers: Buffers, rows: int) -> None:
        """For steps of up to `rows` rows.

        Raises:
            ArtifactError: the kernels are missing, damaged, or for other GPUs.
        """
        path = artifact.path(DRAWS)
        try:
            kernels = Kernels.from_bytes(path.read_bytes())
        except OSError as error:
            raise ArtifactError(
                f"{path}, the kernels that draw tokens, can't be read ({error.strerror}): build the artifact again"
            ) from None
        self._gpu, self._buffers = gpu, buffers
        self._device = gpu.driver.device()
        vocabulary = artifact.manifest.model.vocabulary
        options = [lookup(kernels, self._device.sm, DrawSpec(vocabulary, nucleus).key) for nucleus in (False, True)]
        self._plans = [find_plan(plans, rows) for plans in options]
        size = max(plan.workspace_bytes(rows) for plan in self._plans)
        self._workspace = gpu.allocate(size, "the draws of tokens")
        self._launches: dict[tuple[bool, int], list[Launch]] = {}

    def queue(self, draws: Draws, rows: int) -> None:
        """Queue the draws of a step that was queued before, from its logits."""
        nucleus = bool(((draws.temperature > 0) & ((draws.top_p < 1) | (draws.top_k > 0)) & draws.wanted).any())
        if (nucleus, rows) not in self._launches:
            plan = self._plans[nucleus]
            offsets = {name: self._workspace + offset for name, offset in plan.offsets(rows).items()}
            addresses = {**self._buffers.addresses, **offsets}
            self._launches[nucleus, rows] = launches_of(plan, rows, self._device, self._gpu.driver, addresses)
        for launch in self._launches[nucleus, rows]:
            self._gpu.driver.launch(launch, self._gpu.stream)

    def finish(self, tokens: Array, draws: Draws) -> Array:
        """The tokens i64 [B] of a step, from what the GPU drew; what it could not is drawn here."""
        found = np.where(draws.wanted, tokens, NOT_WANTED).astype(np.int64)
        for row in {*np.flatnonzero(found == BEYOND).tolist(), *draws.on_host.tolist()}:
            found[row] = draw(self._buffers.logits_of(row), draws.row(row))[0]
        return found
