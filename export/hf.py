"""A Hugging Face causal language model as one lynx ONNX graph, for prefill and decode alike.

Inputs, with B sequences of S tokens in this step, L rows of cache, N MoE layers:

    input_ids [B,S] i64        token ids, each row right-padded
    past_lengths [B] i64       tokens of each sequence that the cache already holds
    lengths [B] i64            tokens of each row that are real in this step (0: the whole row is padding)
    budgets [N] i32            experts each MoE layer may load in a decode step (S = 1); prefill uses all
    floors [N] f32             votes for each voting token that an expert needs there (0: any vote will do)
    past_key_values.I.key, .value [B,h,L,d]; .latent [B,1,L,d] alone where layer I attends to its latents; fewer rows,
        as a ring, where it has a sliding window (`attention.py`)
        .index [B,1,L,d] beside them where an indexer chooses what it attends to, unless that is all L rows
    past_states.I.conv [B,W-1,C], .recurrent [B,n,D,M] f32: where layer I keeps a state in their place (`states.py`);
        zeros before a sequence's first token

Outputs: logits [B,V] of each row's last real token, active_experts [N] i32, and the caches as
present_key_values.I.key, .value or .latent, written at past_lengths, and present_states.I.conv and .recurrent.

The weights are not needed to trace: the model is traced with fake tensors, and the graph's initializers are
filled from the checkpoint afterwards, in a stream (`finish`).
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DummyLayer,
    DynamicIndexedLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from lynx_trt.errors import ExportError, UnsupportedModelError, first_line
from lynx_trt.export import attention, moe, ops, states
from lynx_trt.export.checkpoint import Checkpoint, empty_model, language_parameters
from lynx_trt.export.kept import keep_experts
from lynx_trt.export.longrope import use_traceable_longrope
from lynx_trt.export.native import native_rotary, use_native_norms
from lynx_trt.export.weights import CheckpointWeights
from lynx_trt.selection import Selection

if TYPE_CHECKING:
    import onnx_ir as ir

    from lynx_trt.export.quantized.methods import Quantization

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Steps of up to this many tokens a sequence are decode steps, to which the budgets apply.
DECODE_MAX_LENGTH = 1
# Rows of a cache come in whole groups of so many: with heads of 16 values or more, each sequence's cache then begins at
# a multiple of 256 bytes, which TensorRT asks of what it is given.
ROWS_TOGETHER = 8
# Types of layers, as configs name them, whose mask is a rule over positions, and of those that have no attention.
ATTENTION = ("full_attention", "sliding_attention", "chunked_attention", "attention", "indexed_attention")
WITHOUT_CACHE = ("mlp", "moe")
_INPUTS = ("input_ids", "past_lengths", "lengths", "budgets", "floors")
PREFIX = "model."  # of parameter names: the traced module holds the model as its attribute `model`


@dataclass(frozen=True)
class Chunk:
    """Tokens of a sequence in a prefill step: padded to `least`, and `most` at most."""

    least: int
    most: int


@dataclass(frozen=True)
class CacheShape:
    """One of a layer's caches; `name` is what its input has behind `past_` and its output behind `present_`."""

    name: str
    heads: int
    size: int
    window: int = 0  # rows of the past that a token attends to, itself among them; 0: all
    rows: int = 0  # L, or those of a ring; 0: not known yet
    ring: int = 0  # its size; 0: none

    def zeros(self, batch: int, dtype: torch.dtype) -> torch.Tensor:
        """An empty one."""
        return torch.zeros(batch, self.heads, self.rows, self.size, dtype=dtype)

    def sized(self, rows: int, chunk: Chunk | None) -> CacheShape:
        """With `rows` rows; or with a ring for such steps, if that takes half of them or less."""
        if self.window and chunk:
            ring = -(-(self.window - 1 + chunk.most) // chunk.most) * chunk.most
            if 2 * ring <= rows:
                # Behind it there is room for the padding of a step that is shorter than any may be, and for a sink.
                return replace(self, rows=_whole(ring + max(chunk.least, 2)), ring=ring)
        return replace(self, rows=rows)


@dataclass(frozen=True)
class StateShape:
    """One of a layer's states: its name as that of a cache, and what each sequence has of it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def zeros(self, batch: int, _dtype: torch.dtype) -> torch.Tensor:
        """An empty one."""
        return torch.zeros(batch, *self.shape, dtype=self.dtype)

    def sized(self, _rows: int, _chunk: Chunk | None) -> StateShape:
        """It has no rows."""
        return self


@dataclass
class Source:
    """A checkpoint's model, looked through and ready to be traced: nothing of its weights is loaded."""

    model: PreTrainedModel
    weights: CheckpointWeights
    layers: list[moe.MoeLayer]
    caches: list[list[CacheShape | StateShape]]  # of each layer
    precision: str
    fake: FakeTensorMode
    quantization: Quantization | None  # of the checkpoint, and how much of it is kept
    parameters: int  # of the language model, also of what is kept
    left_out: int  # parameters of what a model has beside its language model, for images and sound


@dataclass
class Exported:
    """A traced graph whose large initializers still have no data."""

    graph: ir.Model
    source: Source
    cache_rows: int  # L; the usable length, and a row where attention sinks have one, to whole ROWS_TOGETHER
    chunk: int  # what no prefill step may cross a multiple of; 0: any may be


class _StepModule(nn.Module):
    """The model's forward with our inputs and outputs; every registered hook and interface meets here."""

    def __init__(self, source: Source, selection: Selection) -> None:
        super().__init__()
        self.model = model = source.model
        self.layers = source.layers
        self.caches = source.caches
        self.selection = selection
        self._last: torch.Tensor | None = None
        model.get_output_embeddings().register_forward_pre_hook(self._keep_last_token)

    def _keep_last_token(self, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Only the last real token of each row goes through the vocabulary: [B,S,H] -> [B,1,H]."""
        hidden = arguments[0]
        assert self._last is not None
        index = self._last[:, None, None].expand(-1, 1, hidden.shape[-1])
        return (torch.gather(hidden, 1, index), *arguments[1:])

    def forward(
        self,
        input_ids: torch.Tensor,
        past_lengths: torch.Tensor,
        lengths: torch.Tensor,
        budgets: torch.Tensor,
        floors: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        length = input_ids.shape[1]
        offsets = torch.arange(length)
        positions = past_lengths[:, None] + offsets
        self._last = torch.clamp(lengths - 1, min=0)
        is_decode = torch.full((), length, dtype=torch.int64) <= DECODE_MAX_LENGTH
        all_experts = torch.tensor([layer.experts for layer in self.layers], dtype=torch.int32)
        moe_step = moe.MoeStep(
            selection=self.selection,
            budgets=torch.where(is_decode, budgets, all_experts),
            floors=torch.where(is_decode, floors, torch.zeros_like(floors)),
            token_mask=(offsets < lengths[:, None]).reshape(-1),
            active={},
        )
        rest = iter(past)
        cache = states.StepCache(layers=[_layer(shapes, list(islice(rest, len(shapes)))) for shapes in self.caches])
        rings = {
            shape.rows: shape.ring
            for shapes in self.caches
            for shape in shapes
            if isinstance(shape, CacheShape) and shape.ring
        }
        step = attention.Step(positions, past_lengths, past_lengths + length, lengths, rings)
        with attention.tracing(step), moe.tracing(moe_step):
            output = self.model(input_ids=input_ids, position_ids=positions, past_key_values=cache, use_cache=True)
        missing = [layer.name for layer in self.layers if layer.position not in moe_step.active]
        if missing:
            raise ExportError(f"MoE blocks that the model's forward never reached: {', '.join(missing)}")
        for position, layer in enumerate(cache.layers):
            if getattr(layer, "is_indexed", False) and position not in step.choosing:
                raise UnsupportedModelError(f"layer {position} chooses what it attends to in a way not known here")
        active = torch.stack([moe_step.active[layer.position] for layer in self.layers])
        return output.logits[:, 0].float(), active, [tensor for layer in cache.layers for tensor in _kept(layer)]


def read_source(checkpoint: Checkpoint, precision: str, *, dequantize: bool = False) -> Source:
    """Everything that can be known and refused before the long work of tracing.

    Args:
        checkpoint: an opened checkpoint.
        precision: fp32, fp16 or bf16: the dtype of weights, activations and cache.
        dequantize: all weights, also experts that can stay in MXFP4, NVFP4, FP8 or int4 (`kept.py`).

    Raises:
        CheckpointError: the weights are not those of the config, or a scale of such experts is no number.
        UnsupportedModelError: the model is none that this version can rewrite; the reason is named.
    """
    attention.register()
    moe.register()
    model = empty_model(checkpoint, DTYPES[precision])
    model.config.use_cache = True
    weights = CheckpointWeights(checkpoint, model)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    _use_fake_parameters(model, fake)
    with _quiet():
        layers = moe.find_layers(model)
        use_traceable_longrope(model)
        caches = _cache_shapes(model, fake)
        for layer in attention.keep_latents(model):
            index = [cache for cache in caches[layer] if _is_index(cache)]
            both = (cache for cache in caches[layer] if isinstance(cache, CacheShape) and not _is_index(cache))
            size = sum(cache.size for cache in both)
            caches[layer] = [CacheShape(f"key_values.{layer}.latent", 1, size), *index]
    quantization, parameters = checkpoint.quantization, language_parameters(model)
    left_out = model.num_parameters() - parameters
    if quantization and not dequantize:
        quantization = keep_experts(model, layers, weights, quantization, precision, fake)
    return Source(model, weights, layers, caches, precision, fake, quantization, parameters, left_out)


def trace(source: Source, *, max_length: int, selection: Selection, chunk: Chunk) -> Exported:
    """Trace the model into a graph without weights. The source is used up: its modules are rewritten.

    Args:
        source: what `read_source` gave.
        max_length: tokens a sequence may have, prompt and output together.
        chunk: tokens of a sequence in a prefill step, which rings are sized for.
        selection: parameters of every LynxSelect.

    Raises:
        UnsupportedModelError: torch can't export the model.
        ExportError: fewer blocks were rewritten than the model has.
    """
    model = source.model
    cache_rows = _whole(max_length + (1 if _has_sinks(model) else 0))
    if cache_rows <= (getattr(model.config.get_text_config(), "index_topk", None) or 0):
        # An indexer that may choose all rows changes nothing; its keys need no cache, and its nodes have no use.
        source.caches = [[cache for cache in layer if not _is_index(cache)] for layer in source.caches]
    windows = {cache.window for layer in source.caches for cache in layer if isinstance(cache, CacheShape)} - {0}
    # A mask is known to be a ring's by its number of rows, so there is one size of rings.
    wide = None if len(windows) > 1 else chunk
    source.caches = [[cache.sized(cache_rows, wide) for cache in layer] for layer in source.caches]
    has_rings = any(isinstance(cache, CacheShape) and cache.ring for layer in source.caches for cache in layer)
    use_native_norms(model)
    model.set_attn_implementation(attention.NAME)
    model.set_experts_implementation(moe.NAME)
    module = _StepModule(source, selection).eval()
    with _quiet():
        graph = _export(module, source, cache_rows)
    _check_count(graph, source.layers)
    return Exported(graph, source, cache_rows, chunk.most if has_rings else 0)


def _whole(rows: int) -> int:
    """So many rows or a few more."""
    return -(-rows // ROWS_TOGETHER) * ROWS_TOGETHER


def _use_fake_parameters(model: PreTrainedModel, fake: FakeTensorMode) -> None:
    """Meta parameters and stored buffers become fake CPU tensors; ties stay ties. Computed buffers stay real."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    with fake:
                        empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=False)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type == "meta":
                with fake:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _is_index(cache: CacheShape | StateShape) -> bool:
    """Whether it is of an indexer's keys."""
    return cache.name.endswith(".index")


def _layer(shapes: list[CacheShape | StateShape], tensors: list[torch.Tensor]) -> Any:
    """A layer of the cache over the graph's inputs."""
    if not shapes:
        return DummyLayer()
    if isinstance(shapes[0], StateShape):
        return states.StateLayer(
            **{shape.name.split(".")[-1]: each for shape, each in zip(shapes, tensors, strict=True)}
        )
    index = tensors.pop() if _is_index(shapes[-1]) else None
    return attention.CacheLayer(*tensors, index=index, ring=shapes[0].ring)


def _kept(layer: Any) -> list[torch.Tensor]:
    """What goes from a layer of the cache to the graph's outputs."""
    if isinstance(layer, states.StateLayer):
        return list(layer.caches().values())
    return layer.caches() if isinstance(layer, attention.CacheLayer) else []


def _cache_shapes(model: PreTrainedModel, fake: FakeTensorMode) -> list[list[CacheShape | StateShape]]:
    """What each layer caches, seen in a forward of two tokens.

    Raises:
        UnsupportedModelError: the model can't run so, or a layer keeps something else than keys and values.
    """
    from transformers.exporters import exporter_onnx  # noqa: F401  (importing it fills the patch registry)
    from transformers.exporters.utils import apply_patches

    model.set_attn_implementation("eager")
    model.set_experts_implementation("batched_mm")
    _refuse_layer_types(model)
    layers = DynamicCache(config=model.config).layers
    cache = states.StepCache([states.StateLayer() if type(each) is LinearAttentionLayer else each for each in layers])
    try:
        with states.known_functions(model), fake, torch.no_grad(), apply_patches("dynamo"), apply_patches("onnx"):
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64), past_key_values=cache, use_cache=True)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{type(model).__name__} is not supported: {error}") from error
    except Exception as error:
        raise UnsupportedModelError(f"{type(model).__name__} can't be traced: {first_line(error)}") from error
    shapes = [_shapes(layer, position, model) for position, layer in enumerate(cache.layers)]
    if len(shapes) != model.config.get_text_config().num_hidden_layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has {model.config.get_text_config().num_hidden_layers} layers "
            f"but caches something in {len(shapes)}"
        )
    return shapes


def _shapes(layer: Any, position: int, model: PreTrainedModel) -> list[CacheShape | StateShape]:
    """Of what a layer of the cache has kept in a forward."""
    if isinstance(layer, states.StateLayer):
        kept = layer.caches()
        if not kept:
            raise UnsupportedModelError(
                f"layer {position} of {type(model).__name__} keeps nothing from token to token, which its type says"
            )
        return [StateShape(f"states.{position}.{n}", tuple(t.shape[1:]), t.dtype) for n, t in kept.items()]
    if isinstance(layer, DummyLayer):
        return []
    tensors = (getattr(layer, "keys", None), getattr(layer, "values", None))
    indexer = layer.indexer_keys if type(layer) is DynamicIndexedLayer else None
    others = (v for n, v in vars(layer).items() if n not in ("keys", "values", "indexer_keys"))
    extra = any(isinstance(value, torch.Tensor) and value.dim() > 1 for value in others)
    keys, values = tensors
    if keys is None or values is None or keys.dim() != 4 or values.dim() != 4 or extra:
        raise UnsupportedModelError(
            f"layer {position} of {type(model).__name__} keeps a {type(layer).__name__}, "
            "not keys and values: caches of keys and values beside a state are not supported"
        )
    parts = {"key": keys, "value": values}
    if indexer is not None:
        parts["index"] = indexer[:, None]
    window = layer.sliding_window if type(layer) is DynamicSlidingWindowLayer else 0
    return [CacheShape(f"key_values.{position}.{n}", t.shape[1], t.shape[3], window) for n, t in parts.items()]


def _refuse_layer_types(model: PreTrainedModel) -> None:
    """Models that have other layers than are known here say so in their config; it makes the better message."""
    types = getattr(model.config.get_text_config(), "layer_types", None) or []
    known = (*ATTENTION, *states.KINDS, *WITHOUT_CACHE)
    other = [kind for kind in types if kind not in known]
    if other:
        raise UnsupportedModelError(
            f"{type(model).__name__} has {len(other)} layers of type {other[0]!r}, which is not supported (these are: "
            f"{', '.join(known)})"
        )


def _has_sinks(model: PreTrainedModel) -> bool:
    return any(isinstance(getattr(module, "sinks", None), torch.Tensor) for module in model.modules())


def _export(module: _StepModule, source: Source, cache_rows: int) -> ir.Model:
    from transformers.exporters import exporter_onnx
    from transformers.exporters.utils import apply_patches

    caches, fake, dtype = source.caches, source.fake, DTYPES[source.precision]
    batch, length = 2, 3
    batch_dim = torch.export.Dim("batch", min=1, max=4096)
    length_dim = torch.export.Dim("sequence", min=1, max=cache_rows)
    with fake:
        past = [cache.zeros(batch, dtype) for layer in caches for cache in layer]
        arguments = (
            torch.zeros(batch, length, dtype=torch.int64),
            torch.zeros(batch, dtype=torch.int64),
            torch.ones(batch, dtype=torch.int64),
            torch.ones(len(module.layers), dtype=torch.int32),
            torch.zeros(len(module.layers), dtype=torch.float32),
            past,
        )
    dynamic: tuple[Any, ...] = (
        {0: batch_dim, 1: length_dim},
        {0: batch_dim},
        {0: batch_dim},
        {},
        {},
        [{0: batch_dim}] * len(past),
    )
    names = [cache.name for layer in caches for cache in layer]
    try:
        # The rotary probe computes real numbers, so it stands before the fake mode.
        functions = native_rotary(module.model), states.known_functions(module.model)
        with functions[0], functions[1], fake, torch.no_grad(), apply_patches("dynamo"), apply_patches("onnx"):
            program = torch.onnx.export(
                module,
                arguments,
                dynamo=True,
                opset_version=ops.OPSET,
                optimize=False,
                verbose=False,
                custom_translation_table=exporter_onnx._ONNX_TRANSLATION_TABLE,
                dynamic_shapes=dynamic,
                input_names=[*_INPUTS, *(f"past_{name}" for name in names)],
                output_names=["logits", "active_experts", *(f"present_{name}" for name in names)],
            )
    except ExportError:
        raise
    except Exception as error:
        raise UnsupportedModelError(f"{type(module.model).__name__} can't be exported: {_root_cause(error)}") from error
    assert program is not None
    return program.model


def _check_count(graph: ir.Model, layers: list[moe.MoeLayer]) -> None:
    """As many of each op as the model has MoE blocks, or the build stops here."""
    for op in (ops.SELECT, ops.EXPERTS):
        count = sum(node.domain == ops.DOMAIN and node.op_type == op for node in graph.graph)
        if count != len(layers):
            names = ", ".join(layer.name for layer in layers)
            raise ExportError(f"the graph has {count} {op} nodes, the model {len(layers)} MoE blocks: {names}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch's exporter talks on stdout, through warnings and through loggers; none of it is for a user of ours."""
    import io

    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # all: what torch can't trace it tells several of its loggers, at length
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def is_fake(value: ir.Value) -> bool:
    """Whether an initializer still has no data."""
    raw = getattr(value.const_value, "raw", None)
    return isinstance(raw, FakeTensor)
