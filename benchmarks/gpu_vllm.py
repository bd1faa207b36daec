"""The fused MoE kernel of vLLM as a peer, from the file that its wheel has; nothing of it is kept here.

    unzip -j vllm-*.whl '*/fused_moe/fused_moe.py' '*/fused_moe/configs/*NVIDIA_H*.json' -d FOLDER

The kernel and the function that chooses its tiles are cut out of the file and run by themselves, since vLLM as a whole
needs more than a benchmark has. Tiles are those of its tuned files where FOLDER has the one for this GPU and layer.
What vLLM does in compiled code before the kernels (sorting tokens into blocks; 20 us and more by its own benchmarks) is
done ahead and not timed: the peer is shown faster than it is.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from gpu_layer import Batch, Layer, Run
from gpu_timing import AbsentError
from torch import Tensor

from lynx_trt.plugins.twins import activate_twin

WANTED = ("write_zeros_to_output", "fused_moe_kernel", "get_default_config")
# What the pieces find around them in vLLM.
HEADER = """\
from types import SimpleNamespace
from typing import Any
import torch
import triton
import triton.language as tl
envs = SimpleNamespace(VLLM_BATCH_INVARIANT=False)
current_platform = SimpleNamespace(is_rocm=lambda: False)
"""


def fused_moe(layer: Layer, batches: Sequence[Batch], folder: Path | None) -> Run:
    """Two launches of the kernel, the activation between and the sum after them."""
    source = folder or installed()
    if source is None:
        raise AbsentError("vLLM is not installed, and --vllm names no folder with its fused_moe.py")
    if any(bool((batch.index < 0).any()) for batch in batches):
        raise AbsentError("vLLM takes no empty slots, and a token has fewer than K experts here")
    module = load(source)
    calls = [prepare(layer, batch, module, source) for batch in batches]
    return lambda: [call() for call in calls]


def installed() -> Path | None:
    """The folder of an installed vLLM, without importing it."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "model_executor" / "layers" / "fused_moe"


@functools.cache
def load(folder: Path) -> ModuleType:
    """The wanted functions of fused_moe.py, as a module. Raises AbsentError: it is not there, or not as expected."""
    path = folder / "fused_moe.py"
    if not path.is_file():
        raise AbsentError(f"{folder} has no fused_moe.py")
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    pieces = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name in WANTED:
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            pieces[node.name] = "".join(lines[first - 1 : node.end_lineno])
    if missing := [name for name in WANTED if name not in pieces]:
        raise AbsentError(f"{path} has no {', '.join(missing)}")
    # The compiler reads a kernel's source from its file.
    with tempfile.NamedTemporaryFile("w", prefix="vllm_", suffix=".py", delete=False) as file:
        file.write("\n\n".join([HEADER, *pieces.values()]))
    spec = importlib.util.spec_from_file_location("vllm_fused_moe", file.name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def tiles(layer: Layer, tokens: int, module: ModuleType, folder: Path) -> dict[str, int]:
    """Its tuned tiles of the nearest batch, else its default ones."""
    spec = layer.experts
    device = torch.cuda.get_device_name().replace(" ", "_") if torch.cuda.is_available() else "none"
    name = f"E={spec.experts},N={spec.inner},device_name={device}.json"
    for path in (folder / name, folder / "configs" / name):
        if path.is_file():
            tuned = {int(key): value for key, value in json.loads(path.read_text()).items() if key.isdigit()}
            return dict(tuned[min(tuned, key=lambda batch: abs(batch - tokens))])
    rows = spec.inner * (2 if spec.form.gated else 1)
    return dict(module.get_default_config(tokens, spec.experts, rows, spec.hidden, spec.experts_per_token, None))


def prepare(layer: Layer, batch: Batch, module: ModuleType, folder: Path) -> Any:
    """One batch's call."""
    spec, weights = layer.experts, layer.weights
    tokens, width = batch.index.shape
    chosen = tiles(layer, tokens, module, folder)
    blocks = align(batch.index, spec.experts, chosen["BLOCK_SIZE_M"])
    matrices = [weights[name].mT if spec.form.transposed else weights[name] for name in ("gate_up", "down")]
    rows = matrices[0].shape[1]
    first = torch.empty((tokens, width, rows), dtype=batch.hidden.dtype, device=batch.hidden.device)
    second = torch.empty((tokens, width, spec.hidden), dtype=batch.hidden.dtype, device=batch.hidden.device)
    weight = batch.weight.contiguous()

    def call() -> Tensor:
        launch(module, batch.hidden, matrices[0], first, weights.get("gate_up_bias"), None, blocks, width, chosen)
        inner = activate_twin(spec.form, first.view(-1, rows))
        launch(module, inner, matrices[1], second, weights.get("down_bias"), weight, blocks, 1, chosen)
        return second.sum(dim=1)

    return call


def align(index: Tensor, experts: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs by expert, each expert's padded to whole blocks with a number past the last pair; the blocks' experts."""
    flat = index.reshape(-1)
    most = flat.numel() + experts * (block - 1)
    if flat.numel() < experts:
        most = min(most, flat.numel() * block)
    ids = torch.full((most,), flat.numel(), dtype=torch.int32, device=index.device)
    owners = torch.full((-(-most // block),), -1, dtype=torch.int32, device=index.device)
    end = 0
    for expert in torch.unique(flat).tolist():
        pairs = (flat == expert).nonzero().reshape(-1)
        whole = -(-len(pairs) // block) * block
        ids[end : end + len(pairs)] = pairs.int()
        owners[end // block : (end + whole) // block] = expert
        end += whole
    return ids, owners, torch.tensor([end], dtype=torch.int32, device=index.device)


def launch(
    module: ModuleType,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    blocks: tuple[Tensor, Tensor, Tensor],
    top_k: int,
    chosen: dict[str, int],
) -> None:
    """Launch by the names of the parameters, which differ from version to version. Raises AbsentError: unknown ones."""
    import triton
    import triton.language as tl

    ids, owners, count = blocks
    pairs = len(a) * top_k
    reach = min(len(ids), pairs * chosen["BLOCK_SIZE_M"]) if len(a) < chosen["BLOCK_SIZE_M"] else len(ids)
    kind = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[a.dtype]
    known: dict[str, Any] = {
        **{"a_ptr": a, "b_ptr": b, "c_ptr": c, "b_bias_ptr": bias, "topk_weights_ptr": weight},
        **{"sorted_token_ids_ptr": ids, "expert_ids_ptr": owners, "num_tokens_post_padded_ptr": count},
        **{"N": b.shape[1], "K": b.shape[2], "EM": reach, "num_valid_tokens": pairs},
        **{"stride_am": a.stride(0), "stride_ak": a.stride(1)},
        **{"stride_be": b.stride(0), "stride_bk": b.stride(2), "stride_bn": b.stride(1)},
        **{"stride_cm": c.stride(1), "stride_cn": c.stride(2)},
        **{"stride_bbe": 0 if bias is None else bias.stride(0), "stride_bbn": 0 if bias is None else bias.stride(1)},
        **dict.fromkeys(("a_scale_ptr", "b_scale_ptr")),
        **dict.fromkeys(("stride_asm", "stride_ask", "stride_bse", "stride_bsk", "stride_bsn"), 0),
        **dict.fromkeys(("group_n", "group_k"), 0),
        **dict.fromkeys(("use_fp8_w8a8", "use_int8_w8a8", "use_int8_w8a16", "per_channel_quant"), False),
        **dict.fromkeys(("naive_block_assignment", "SWAP_AB", "USE_TD"), False),
        **{"MUL_ROUTED_WEIGHT": weight is not None, "top_k": top_k, "compute_type": kind},
        **{"HAS_BIAS": bias is not None, "SPLIT_K": 1, **chosen},
    }
    names = module.fused_moe_kernel.arg_names
    if unknown := [name for name in names if name not in known]:
        raise AbsentError(f"this vLLM's kernel takes {', '.join(unknown)}, which this benchmark doesn't know")
    if bias is not None and "HAS_BIAS" not in names:
        raise AbsentError("this vLLM's kernel knows no biases")
    options = {name: chosen[name] for name in ("num_warps", "num_stages") if name in chosen}
    programs = triton.cdiv(reach, chosen["BLOCK_SIZE_M"]) * triton.cdiv(b.shape[1], chosen["BLOCK_SIZE_N"])
    module.fused_moe_kernel[(programs,)](**{name: known[name] for name in names}, **options)
