"""A model of Qwen3-30B-A3B's shape with random weights, and its decode step: transformers' own code but the experts.

What runs the experts is changed through transformers' own registry of experts' implementations: its own by their names,
`prepared` for what a benchmark has made ready for each layer, `nothing` for no experts at all. Three things differ from
the model as it comes, the same for all contenders:

- The router does the same operations, but writes into tensors that stay where they are, so that launches prepared
  ahead can read them.
- The cache is exactly full in the step that is timed, and attention gets no mask, so that PyTorch takes its flash
  attention for grouped queries; with a mask transformers would repeat keys and values for each query head.
- The step begins by setting the cache's lengths back, so that it can be repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from gpu_common import Options
from gpu_layer import Layer
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from lynx_trt.plugins.specs import ExpertsSpec, SelectSpec

MODEL = "qwen3-30b-a3b"
CONTEXT = 256  # tokens that each sequence has in the cache

# From the model's config.json; a dry run's are as tiny as `specs_of`'s.
_LARGE = {"vocab_size": 151936, "layers": 48, "heads": 32, "kv_heads": 4, "head_dim": 128}
_TINY = {"vocab_size": 160, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16}


@dataclass(frozen=True)
class Place:
    """What a layer's experts are given, at fixed addresses.

    `hidden` [T,H] is for the contender to fill; the router writes `choice` [T,E] float32 (its probabilities), `index`
    [T,K] int64 and `weight` [T,K] float32.
    """

    hidden: Tensor
    choice: Tensor
    index: Tensor
    weight: Tensor


class Router(nn.Module):
    """Softmax, top-k, renormalised: the operations of the model's own router, with its weights, into a place."""

    def __init__(self, gate: nn.Module, experts_per_token: int) -> None:
        super().__init__()
        self.weight = gate.weight
        self.experts_per_token = experts_per_token
        self.place: Place | None = None

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of hidden [T,H]: the logits [T,E], and the weights and the indices of the chosen [T,K]."""
        place = self.place
        assert place is not None
        logits = functional.linear(hidden, self.weight)
        torch.softmax(logits, dim=-1, dtype=torch.float32, out=place.choice)
        torch.topk(place.choice, self.experts_per_token, dim=-1, out=(place.weight, place.index))
        place.weight.div_(place.weight.sum(dim=-1, keepdim=True))
        return logits, place.weight.to(logits.dtype), place.index


def build(spec: ExpertsSpec, chosen: Options) -> Any:
    """The model on its device, filled there."""
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.integrations.moe import ExpertsInterface

    AttentionInterface.register("whole_cache", _whole_cache)
    ExpertsInterface.register("prepared", lambda experts, hidden, _index, _weight: experts.prepared(hidden))
    ExpertsInterface.register("nothing", lambda _experts, hidden, _index, _weight: hidden)
    with torch.device(chosen.device), no_init_weights():
        model = AutoModelForCausalLM.from_config(
            _config(spec, dry=chosen.dry),
            dtype=getattr(torch, chosen.dtype),
            attn_implementation="whole_cache",
            experts_implementation="grouped_mm",
        )
    model.eval().requires_grad_(False)
    generator = torch.Generator(chosen.device).manual_seed(0)
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            weight.fill_(1)
        else:  # activations near 1, and embeddings that tell tokens apart, for an even routing
            weight.normal_(0, 1 if "embed" in name else weight.shape[-1] ** -0.5, generator=generator)
    for block in blocks(model):
        block.gate = Router(block.gate, spec.experts_per_token)
    return model


def _config(spec: ExpertsSpec, *, dry: bool) -> Any:
    from transformers import Qwen3MoeConfig

    sizes = _TINY if dry else _LARGE
    return Qwen3MoeConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=spec.hidden,
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        head_dim=sizes["head_dim"],
        num_experts=spec.experts,
        num_experts_per_tok=spec.experts_per_token,
        moe_intermediate_size=spec.inner,
        norm_topk_prob=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        max_position_embeddings=40960,
    )


def _whole_cache(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: object, **options: Any) -> Any:
    """The attention of transformers on PyTorch's, over all of the cache."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # Named, so that it is the same wherever this is measured: on SM 90 PyTorch may also choose cuDNN's.
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        return sdpa_attention_forward(module, query, key, value, None, **options)


def blocks(model: Any) -> list[Any]:
    """The MoE blocks of the layers, in order."""
    return [layer.mlp for layer in model.model.layers]


def layers_of(model: Any, experts: ExpertsSpec, select: SelectSpec) -> list[Layer]:
    """The experts of each layer as the kernels want them: the model's own tensors, no copies."""
    return [
        Layer(MODEL, experts, select, {"gate_up": each.experts.gate_up_proj.data, "down": each.experts.down_proj.data})
        for each in blocks(model)
    ]


def rest_bytes(model: Any, batch: int) -> int:
    """The bytes of weights that a step reads beside those of experts: of the embedding a row a token."""
    total = sum(each.numel() * each.element_size() for each in model.parameters())
    held = sum(each.numel() * each.element_size() for block in blocks(model) for each in block.experts.parameters())
    table = model.model.embed_tokens.weight
    return int(total - held - (len(table) - batch) * table.shape[1] * table.element_size())


class Decoder:
    """A batch of sequences with a full cache of random keys and values, and the step that decodes a token of each."""

    def __init__(self, model: Any, batch: int) -> None:
        self.model = model
        config, weight = model.config, model.model.embed_tokens.weight
        device = weight.device
        generator = torch.Generator(device).manual_seed(batch)
        self._ids = torch.randint(config.vocab_size, (batch, 1), device=device, generator=generator)
        self._positions = torch.full((batch, 1), CONTEXT, device=device)
        self._lengths = torch.full((config.num_hidden_layers,), CONTEXT, device=device)
        self._cache = self._filled(batch, generator)
        spec = config.num_experts, config.num_experts_per_tok
        self.places = [_place(batch, config.hidden_size, *spec, weight) for _ in blocks(model)]
        for block, place in zip(blocks(model), self.places, strict=True):
            block.gate.place = place

    def _filled(self, batch: int, generator: torch.Generator) -> Any:
        from transformers import StaticCache

        config, weight = self.model.config, self.model.model.embed_tokens.weight
        cache = StaticCache(config=config, max_cache_len=CONTEXT + 1)
        like = torch.empty(
            (batch, config.num_key_value_heads, 1, config.head_dim), dtype=weight.dtype, device=weight.device
        )
        for number, layer in enumerate(cache.layers):
            layer.lazy_initialization(like, like)
            layer.keys.normal_(generator=generator)
            layer.values.normal_(generator=generator)
            layer.cumulative_length = self._lengths[number]
        return cache

    @property
    def cache_bytes(self) -> int:
        """The bytes of keys and values that a step reads."""
        return sum(
            each.numel() * each.element_size() for layer in self._cache.layers for each in (layer.keys, layer.values)
        )

    @torch.no_grad()
    def step(self) -> Tensor:
        """The logits [B,V]."""
        self._lengths.fill_(CONTEXT)
        output = self.model(
            input_ids=self._ids, position_ids=self._positions, past_key_values=self._cache, use_cache=True
        )
        logits: Tensor = output.logits[:, -1]
        return logits


def _place(batch: int, hidden: int, experts: int, experts_per_token: int, weight: Tensor) -> Place:
    device = weight.device
    return Place(
        torch.zeros((batch, hidden), dtype=weight.dtype, device=device),
        torch.zeros((batch, experts), dtype=torch.float32, device=device),
        torch.zeros((batch, experts_per_token), dtype=torch.int64, device=device),
        torch.zeros((batch, experts_per_token), dtype=torch.float32, device=device),
    )
