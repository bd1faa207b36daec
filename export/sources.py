"""What a parameter is made of: the checkpoint's tensors, and transformers' rule that puts them together."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lynx_trt.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lynx_trt.export.stored import StoredTensor

    Read = Callable[[StoredTensor], torch.Tensor]


@dataclass
class Source:
    """Stored tensors of one parameter by source pattern, and transformers' converter (None: one tensor, as it is)."""

    converter: Any
    stored: dict[str, list[StoredTensor]] = field(default_factory=dict)

    def tensors(self) -> list[StoredTensor]:
        """All of them."""
        return [tensor for tensors in self.stored.values() for tensor in tensors]

    def experts(self) -> int:
        """Of how many experts it is made that are stored one by one and stay apart in the parameter; 0: it is not."""
        from transformers.core_model_loading import Concatenate

        numbers = {len(tensors) for tensors in self.stored.values()}
        if self.converter is None or len(numbers) > 1:
            return 0
        stacks = all(_stacks(pattern, self.converter) for pattern in self.stored)
        apart = all(isinstance(each, Concatenate) and each.dim > 0 for each in self.converter.operations[1:])
        return numbers.pop() if stacks and apart else 0

    def rows_of_experts(self) -> tuple[int, int, int] | None:
        """The parameter's shape [E,R,C] where an expert's rows are rows of stored tensors, one below the other.

        What holds for single rows, such as their scales, can then be put together as the values are. None if it is made
        in another way.
        """
        tensors = self.tensors()
        if self.converter is None:
            shape = tensors[0].shape
            return (shape[0], shape[1], shape[2]) if len(shape) == 3 else None
        experts, firsts = self.experts(), [each[0] for each in self.stored.values()]
        below = all(operation.dim == 1 for operation in self.converter.operations[1:])
        matrices = all(len(tensor.shape) == 2 for tensor in tensors)
        if not experts or not below or not matrices or len({tensor.shape[1] for tensor in tensors}) > 1:
            return None
        return experts, sum(first.shape[0] for first in firsts), firsts[0].shape[1]

    def turned_while_read(self, name: str, wanted: tuple[int, ...]) -> Source:
        """Without the converter, where all it does is to turn the matrices of one tensor for parameter `name`.

        Such a parameter, of all experts of a layer (Qwen3-VL), can then be read in pieces and kept in FP8.
        """
        from transformers.core_model_loading import Transpose

        operations = self.converter.operations if self.converter else []
        tensors = self.tensors()
        if len(operations) != 1 or len(tensors) != 1 or not isinstance(operations[0], Transpose) or len(wanted) != 3:
            return self
        if operations[0].check_dims and tensors[0].shape == wanted:
            return Source(None, {name: tensors})
        turned = tensors[0].turn() if {operations[0].dim0 % 3, operations[0].dim1 % 3} == {1, 2} else None
        return Source(None, {name: [turned]}) if turned and turned.shape == wanted else self

    def part(self, first: int, last: int) -> Source:
        """Of the experts first..last-1 alone."""
        return Source(self.converter, {pattern: tensors[first:last] for pattern, tensors in self.stored.items()})

    def merged(self, name: str, target: str, read: Read, model: PreTrainedModel) -> torch.Tensor:
        """What `read` gives of each stored tensor, put together.

        Args:
            name: of the parameter.
            target: the first parameter that the converter makes, under whose name it knows them.
            read: a stored tensor's values, or others that lie alike.
            model: whose parameter it is.

        Raises:
            CheckpointError: shapes that can't be put together.
        """
        if self.converter is None:
            return read(self.stored[name][0])
        converter = copy.deepcopy(self.converter)
        for pattern, stored in self.stored.items():
            converter.collected_tensors[pattern] = _collected(pattern, stored, converter, read)
        try:
            value = converter.convert(target, model=model, config=model.config)[name]
        except RuntimeError:  # torch's, of shapes that can't be put together
            shapes = "; ".join(f"{stored[0].key} {list(stored[0].shape)}" for stored in self.stored.values())
            wanted = list(model.state_dict(keep_vars=True)[name].shape)
            raise CheckpointError(
                f"{name} {wanted} can't be made of what is stored ({shapes}); convert or copy the checkpoint again"
            ) from None
        tensor: torch.Tensor = value[0] if isinstance(value, list) else value
        return tensor


def disagrees(name: str, stored: object, wanted: object) -> str:
    """What to say of a parameter that the checkpoint has in another shape than the model."""
    return f"{name} is stored as {stored}, but config.json says {wanted}; they don't belong together"


def _stacks(pattern: str, converter: Any) -> bool:
    """Whether the converter begins with stacking the stored tensors of a pattern along a new first dimension."""
    from transformers.core_model_loading import MergeModulelist

    first = converter.operations[0]
    return "*" in pattern and isinstance(first, MergeModulelist) and first.dim == 0


def _collected(
    pattern: str, stored: list[StoredTensor], converter: Any, read: Read
) -> list[torch.Tensor] | torch.Tensor:
    """What the converter is given of one pattern: where it stacks them first, the stored tensors stacked.

    It takes that for the stack it would have made. Of quantized experts a list is memory of its own, a whole layer's.
    """
    import torch

    if not _stacks(pattern, converter):
        return [read(item) for item in stored]
    first = read(stored[0])
    stacked = torch.empty((len(stored), *first.shape), dtype=first.dtype)
    stacked[0] = first
    for place, item in zip(stacked[1:], stored[1:], strict=True):
        place.copy_(read(item))
    return stacked
