"""A Hugging Face checkpoint on disk: its config, its safetensors headers, and the empty model they fill.

Nothing here reads a weight. A checkpoint is data: pickled weights are refused, and a config that names
code of its own is refused unless the caller asks for it.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lynx_trt.errors import CheckpointError, UnsupportedModelError, first_line
from lynx_trt.export.config import check_activation, check_experts, check_rope, refusal
from lynx_trt.export.quantized.methods import Quantization, dequantized, quantization_config
from lynx_trt.export.stored import StoredTensor

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Far above any real header (DeepSeek-V3's shards have 0.2 MB), far below what a corrupt length would allocate.
LARGEST_HEADER = 100 * 2**20


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder that was looked through: its config parses and every shard is whole.

    Of a quantized one, config and tensors are those of the model with its weights dequantized.
    """

    folder: Path
    config: PretrainedConfig
    tensors: dict[str, StoredTensor]
    trust_remote_code: bool = False
    quantization: Quantization | None = None

    @property
    def precision(self) -> Literal["fp16", "bf16"]:
        """That of an artifact, unless another one is asked for: what most of its 16-bit weights are stored in.

        A model trained in bf16 may have activations that fp16 doesn't hold. Of one in fp32 alone it is fp16, the more
        exact of the two.
        """
        plain = [tensor for tensor in self.tensors.values() if type(tensor) is StoredTensor]  # not what is dequantized
        size = {dtype: sum(tensor.nbytes for tensor in plain if tensor.dtype == dtype) for dtype in ("BF16", "F16")}
        return "bf16" if size["BF16"] > size["F16"] else "fp16"


def open_checkpoint(folder: Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """Read the config and the safetensors headers of `folder`.

    Raises:
        CheckpointError: no such folder, no config.json, numbers of experts in it that no model has, a shard missing or
            truncated, pickled weights only, parts of quantized weights that don't fit together.
        UnsupportedModelError: transformers doesn't know the model, it wants to run code of its own, or it is quantized
            by a method that is not known here.
    """
    if not folder.exists():
        raise CheckpointError(f"no such checkpoint: {folder}; give the folder that holds config.json")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, not a checkpoint folder; give the folder that holds config.json")
    config, quantization = _read_config(folder, trust_remote_code)
    tensors: dict[str, StoredTensor] = {}
    for file in _shards(folder):
        tensors.update(_read_header(file))
    _check_index(folder, tensors)
    tensors, quantized = dequantized(tensors, quantization, folder / "config.json")
    return Checkpoint(folder, config, tensors, trust_remote_code, quantized)


def _read_config(folder: Path, trust_remote_code: bool) -> tuple[PretrainedConfig, dict[str, Any] | None]:
    """Transformers' config, as if the model were not quantized, and what it said of that."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no config.json, so it is not a Hugging Face checkpoint")
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read as JSON: {error}") from None
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise CheckpointError(f"{path} has no model_type, so it is not the config of a Hugging Face model")
    from transformers import CONFIG_MAPPING, AutoConfig

    # Models that transformers has by now (DeepSeek-V3) still name the code they once came with; it isn't run.
    if raw.get("auto_map") and not trust_remote_code and raw["model_type"] not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"{path} names code of its own (auto_map) for model_type {raw['model_type']!r}, which transformers doesn't "
            "know; if you trust it, pass --trust-remote-code to run it"
        )
    quantization = quantization_config(raw, path)
    check_experts(raw, path)

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UnsupportedModelError(
            f"transformers can't read {path} (model_type {raw['model_type']!r}): {refusal(error)}"
        ) from None
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config, quantization


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is not a safetensors index: {error!r}") from None
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(f"{index} names {name!r}, which is outside the checkpoint folder")
            if not (folder / name).is_file():
                raise CheckpointError(f"shard {name} is missing from {folder}; {INDEX} lists {len(names)} shards")
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickled = sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickled:
        raise CheckpointError(
            f"{folder} has only pickled weights ({pickled[0]}), which can run code when they are read; "
            "convert them to safetensors with save_pretrained()"
        )
    raise CheckpointError(f"{folder} holds no weights: neither {SINGLE} nor {INDEX}")


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, checked against the file's size (format: 8 bytes length, JSON, data)."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 0 < length <= min(size - 8, LARGEST_HEADER):
            raise CheckpointError(f"{file} is truncated or not a safetensors file: it has {size} bytes")
        try:
            header = json.loads(stream.read(length))
            entries = {key: value for key, value in header.items() if key != "__metadata__"}
            tensors = {
                key: StoredTensor(
                    file,
                    key,
                    value["dtype"],
                    tuple(value["shape"]),
                    value["data_offsets"][1] - value["data_offsets"][0],
                )
                for key, value in entries.items()
            }
            end = max((value["data_offsets"][1] for value in entries.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise CheckpointError(f"{file} is damaged: its safetensors header can't be read") from None
    if 8 + length + end != size:
        raise CheckpointError(
            f"{file} is truncated or damaged: its header asks for {8 + length + end} bytes, the file has {size}; "
            "copy it again"
        )
    return tensors


def _check_index(folder: Path, tensors: dict[str, StoredTensor]) -> None:
    index = folder / INDEX
    if not index.is_file():
        return
    listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    missing = sorted(set(listed) - set(tensors))
    if missing:
        raise CheckpointError(
            f"{len(missing)} tensors that {INDEX} lists are in no shard, first {missing[0]!r}; "
            "copy the checkpoint again"
        )


def auto_class(config: PretrainedConfig) -> Any:
    """Which of transformers' auto classes makes the model: of text, or of text and images or sound.

    The second kind is taken whole: its language model is what runs where it is given tokens alone.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    text, more = AutoModelForCausalLM._model_mapping, AutoModelForMultimodalLM._model_mapping
    return AutoModelForMultimodalLM if type(config) in more and type(config) not in text else AutoModelForCausalLM


def language_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The parameters and stored buffers that text goes through: all, but for those of what sees or hears."""
    parts = (model.get_decoder(), model.get_output_embeddings())
    own = {id(tensor) for part in parts for tensor in part.state_dict(keep_vars=True).values()}
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in own}


def language_parameters(model: PreTrainedModel) -> int:
    """How many parameters text goes through, ties counted once."""
    import torch

    own = {id(tensor): tensor for tensor in language_tensors(model).values()}
    return sum(tensor.numel() for tensor in own.values() if isinstance(tensor, torch.nn.Parameter))


def empty_model(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The model of the config with parameters on the `meta` device and computed buffers for real.

    Buffers that no checkpoint stores (rotary frequencies) are computed by the model's own `_init_weights`,
    as transformers does when it loads a checkpoint.

    Raises:
        CheckpointError: the config names an activation or a `rope_type` that transformers doesn't know.
        UnsupportedModelError: the config is of no causal language model, or transformers can't build it.
    """
    import torch

    check_activation(checkpoint.config, checkpoint.folder / "config.json")

    try:
        with torch.device("meta"):
            model = (
                auto_class(checkpoint.config)
                .from_config(checkpoint.config, dtype=dtype, trust_remote_code=checkpoint.trust_remote_code)
                .eval()
            )
    except (ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        check_rope(checkpoint.config, checkpoint.folder / "config.json")
        kind = checkpoint.config.model_type
        raise UnsupportedModelError(
            f"transformers can't build a causal language model of type {kind!r}: {first_line(error)}"
        ) from None
    _keep_float32(model, dtype)
    for module in model.modules():
        computed = [name for name in module._buffers if name in module._non_persistent_buffers_set]
        for name in computed:
            buffer = module._buffers[name]
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
        if computed:
            with torch.no_grad():
                model._init_weights(module)
    return model


def _keep_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Parameters and buffers that the model wants in float32 whatever the rest is in, as from_pretrained does it."""
    import torch
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    pattern, _, _ = build_glob_alternation(list(plan))
    for prefix, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_floating_point() and pattern.search(f"{prefix}.{name}"):
                    wide = tensor.to(torch.float32)
                    tensors[name] = torch.nn.Parameter(wide) if isinstance(tensor, torch.nn.Parameter) else wide
