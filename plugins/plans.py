"""The plans of each op: LynxSelect, LynxExperts, LynxCausalConv, LynxLinearAttention, and the draw of the next tokens.

Pure functions of a spec, an SM and a number of tokens; `plan.py` says what a plan is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from lynx_trt.experts import FORMATS, values_an_element
from lynx_trt.plugins.launch import (
    BLOCKS_HERE,
    FLOAT32_TOKENS,
    MASK_BITS,
    MOST_PROGRAMS,
    SMS,
    TABLE_ROWS,
    ExpertsLaunch,
    MatmulLaunch,
    SelectLaunch,
    experts_launch,
    fewest_tokens,
    power_of_two,
    row_of,
    select_launch,
)
from lynx_trt.plugins.plan import MODULES, SCRATCH_BYTES, Grid, Kernel, Plan, Region, Step
from lynx_trt.plugins.specs import (
    BYTES,
    POINTERS,
    CausalConvSpec,
    DrawSpec,
    ExpertsSpec,
    LinearAttentionSpec,
    MoeSpec,
    SelectSpec,
    Spec,
    Value,
)

# Up to this many slots one program makes the dispatch metadata: each 128 of them are about a microsecond of its time.
DISPATCH_SLOTS = 512
# Warps that add up many blocks' votes in one program: with 4 its rows spill.
KEEP_WARPS = 8
# The likeliest tokens of each block of logits, and those of a row, among which a nucleus is looked for.
DRAW_LEADING, DRAW_NUCLEUS = 32, 256
# Up to so many tokens of a sequence go one after the other: a chunk takes as long, and another launch.
FEW_TOKENS = 4
# From this SM on a launch may start before the one before it has ended.
PROGRAMMATIC_SM = 90
# Bytes that are brought to L2 at a time.
LINE = 128


def plans(spec: Spec, sm: int, max_tokens: int) -> tuple[Plan[Kernel], ...]:
    """An op's plans on an SM, by rising `max_tokens`, the last of which is at least the one given.

    Where sequences have states, these are tokens of a sequence.
    """
    make: Callable[[int], Plan[Kernel]]
    if isinstance(spec, SelectSpec):
        make = lambda tokens: select_plan(spec, sm, tokens)  # noqa: E731
    elif isinstance(spec, DrawSpec):
        make = lambda tokens: draw_plan(spec, tokens)  # noqa: E731
    elif isinstance(spec, CausalConvSpec):
        make = lambda tokens: causal_conv_plan(spec, tokens)  # noqa: E731
    elif isinstance(spec, LinearAttentionSpec):
        make = lambda tokens: linear_attention_plan(spec, tokens)  # noqa: E731
    else:
        make = lambda tokens: experts_plan(spec, sm, tokens)  # noqa: E731
    result: list[Plan[Kernel]] = []
    tokens = 1
    while True:
        plan = make(tokens)
        if result and (result[-1].steps, result[-1].regions) == (plan.steps, plan.regions):
            result.pop()
        result.append(plan)
        if tokens >= max_tokens:
            return tuple(result)
        tokens *= 2


def workspace_bytes(spec: Spec, max_tokens: int) -> int:
    """The workspace that an op needs for up to `max_tokens` tokens, whatever the SM.

    LynxSelect: at most about 20 (4 T K + 5 E) bytes, of tables with an entry for each expert and block of tokens.
    LynxExperts: T K (I b + H c + 8) bytes, b those of an element and c too, but 4 up to FLOAT32_TOKENS tokens, and
    tables as above.
    """
    return max(plan.most_workspace(max_tokens) for sm in SMS for plan in plans(spec, sm, max_tokens))


def select_plan(spec: SelectSpec, sm: int, tokens: int, launch: SelectLaunch | None = None) -> Plan[Kernel]:
    """LynxSelect for up to `tokens` tokens, a power of two; the launch of the table unless one is given."""
    launch = launch or select_launch(tokens, spec.experts, spec.experts_per_token, sm)
    if launch.programs > 1:  # the cluster takes all tokens, however few a program was to have
        launch = replace(launch, tokens=max(launch.tokens, tokens // launch.programs))
    make = _select_in_cluster if launch.programs > 1 else _select_in_one if launch.programs else _select_in_blocks
    steps = make(spec, launch, sm, tokens)
    regions = [] if spec.dispatch_taken else [_dispatch_region(spec)]
    if launch.programs > 1:
        sizes = {"voting": 4, "votes": 8 * spec.experts, "table": 4 * spec.experts}
        if launch.tokens > launch.block_t:
            sizes["tiles"] = 4 * spec.experts * (launch.tokens // launch.block_t)
        regions += [Region(name, fixed=size * launch.programs) for name, size in sizes.items()]
    elif not launch.programs:
        regions += [
            Region("voting", per=4, tokens=launch.tokens),
            Region("votes", per=8 * spec.experts, tokens=launch.tokens),
            Region("kept", fixed=4 * spec.experts),
            *_table_regions(spec, launch.tokens),
        ]
    return Plan(tokens, _after_others(steps), tuple(regions))


_SELECT_INPUTS = {
    "choice": "*fp32",
    "combine": "*fp32",
    "topk_index": "*i64",
    "topk_weight": "*fp32",
    "budget": "*i32",
    "floor": "*fp32",
    "token_mask": "*u8",
}
_SELECT_OUTPUTS = {"index": "*i64", "weight": "*fp32", "active": "*i32", "dispatch": "*i32"}


def _select_in_one(spec: SelectSpec, launch: SelectLaunch, sm: int, tokens: int) -> list[Step[Kernel]]:
    constants = {
        **_vote_constants(spec),
        **_choice_constants(spec),
        **_waits(sm),
        "BLOCK_T": max(launch.block_t, tokens),
    }
    return [_step("select_kernel", Grid(fixed=1), {**_SELECT_INPUTS, **_SELECT_OUTPUTS}, constants, launch.warps)]


def _select_in_cluster(spec: SelectSpec, launch: SelectLaunch, sm: int, tokens: int) -> list[Step[Kernel]]:
    tables = {"voting": "*i32", "votes": "*fp64", "table": "*i32", "tiles": "*i32"}
    constants = {
        **_vote_constants(spec),
        **_choice_constants(spec),
        **_waits(sm),
        **_short(spec, tokens),
        "BLOCK_T": launch.block_t,
        "TOKENS": launch.tokens,
        "PROGRAMS": launch.programs,
    }
    buffers = {**_SELECT_INPUTS, **tables, **_SELECT_OUTPUTS}
    names = {} if launch.tokens > launch.block_t else {"tiles": "null"}
    step = _step("select_cluster_kernel", Grid(fixed=launch.programs), buffers, constants, launch.warps, names=names)
    return [replace(step, cluster=True)]


def _select_in_blocks(spec: SelectSpec, launch: SelectLaunch, sm: int, tokens: int) -> list[Step[Kernel]]:
    grid = Grid(times=1, over=launch.tokens)
    number = -(-tokens // launch.tokens)
    few = number <= BLOCKS_HERE and launch.tokens <= MASK_BITS
    blocks = {"BLOCK_T": launch.block_t, "TOKENS": launch.tokens}
    sizes: dict[str, Value] = {"E": spec.experts, "BLOCK_E": row_of(spec.experts), **_waits(sm)}
    rows = {"ROWS": min(max(power_of_two(number), 2), TABLE_ROWS)}
    most = {"BLOCKS": number if few else 0}
    tables = {"votes": "*fp64", "voting": "*i32"}
    steps = []
    if spec.vote == "affinity":
        constants = {**sizes, "K": spec.experts_per_token, **blocks}
        buffers = {**_SELECT_INPUTS, "voting": "*i32"}
        steps.append(_step("select_voting_kernel", grid, buffers, constants, launch.narrow))
    buffers = {**_SELECT_INPUTS, "voting": "*i32", "votes": "*fp64"}
    constants = {**_vote_constants(spec), **blocks, **_waits(sm)}
    steps.append(_step("select_votes_kernel", grid, buffers, constants, launch.narrow))
    if not few:
        constants = {**sizes, **rows, "TOKENS": launch.tokens}
        buffers = {"budget": "*i32", "floor": "*fp32", **tables, "kept": "*i32"}
        steps.append(_step("select_keep_kernel", Grid(fixed=1), buffers, constants, KEEP_WARPS))
    buffers = {**_SELECT_INPUTS, **tables, "kept": "*i32", "index": "*i64", "weight": "*fp32", "table": "*i32"}
    constants = {**sizes, **rows, **most, **_choice_constants(spec), **blocks, "KEEP_HERE": few}
    steps.append(_step("select_choice_kernel", grid, buffers, constants, launch.warps))
    if not few:
        return steps + _dispatch_ends(spec, tokens, launch.tokens, few=False, sm=sm, pairs=spec.dispatch_taken)
    buffers = {"index": "*i64", "table": "*i32", "dispatch": "*i32", "active": "*i32"}
    constants = {**sizes, **rows, **most, "K": spec.experts_per_token, "BLOCK_K": power_of_two(spec.experts_per_token)}
    constants |= {"TOKENS": launch.tokens, "PAIRS": spec.dispatch_taken, **_short(spec, tokens)}
    if not spec.dispatch_taken:
        grid = Grid(fixed=1)
    return [*steps, _step("select_place_kernel", grid, buffers, constants, launch.narrow)]


def _after_others(steps: list[Step[Kernel]]) -> tuple[Step[Kernel], ...]:
    """The same launches, of which the first begins when everything before it has ended.

    Before it are kernels of TensorRT's, which since SM 90 may themselves begin early. A launch that waits for the one
    before it alone would rely on that one having waited too.
    """
    return (replace(steps[0], programmatic=False), *steps[1:])


def _waits(sm: int) -> dict[str, Value]:
    return {"PROGRAMMATIC": sm >= PROGRAMMATIC_SM}


def _short(spec: MoeSpec, tokens: int) -> dict[str, Value]:
    """Whether running sums of pairs and of experts fit an int32 together."""
    return {"SHORT": tokens * spec.experts_per_token < 1 << 16}


def _vote_constants(spec: SelectSpec) -> dict[str, Value]:
    return {
        "E": spec.experts,
        "K": spec.experts_per_token,
        "VOTE": spec.vote,
        "GUARANTEE": spec.guarantee,
        "SENSITIVITY": spec.sensitivity,
        "POWER": spec.power,
        "ALPHA": spec.alpha,
        "BETA": spec.beta,
        "BLOCK_E": row_of(spec.experts),
    }


def _choice_constants(spec: SelectSpec) -> dict[str, Value]:
    return {
        "K": spec.experts_per_token,
        "REMAP": spec.remap,
        "RENORMALIZE": spec.renormalize,
        "SCALE": spec.scale,
        "BLOCK_K": power_of_two(spec.experts_per_token),
    }


def _dispatch_region(spec: MoeSpec) -> Region:
    return Region("dispatch", fixed=4 * (2 * spec.experts + 2), per=4 * spec.experts_per_token)


def _table_regions(spec: MoeSpec, block: int) -> list[Region]:
    return [Region(name, per=4 * spec.experts, tokens=block) for name in ("table", "begins")]


def _dispatch_ends(spec: MoeSpec, tokens: int, block: int, *, few: bool, sm: int, pairs: bool) -> list[Step[Kernel]]:
    """From the table of counts of each block to the metadata, `active` and (if wanted) the pairs."""
    sizes = {
        "E": spec.experts,
        "K": spec.experts_per_token,
        "BLOCK_E": row_of(spec.experts),
        "SLOTS": block * spec.experts_per_token,
        **_short(spec, tokens),
        **_waits(sm),
    }
    steps = []
    if not (few and pairs):
        buffers = {"table": "*i32", "begins": "*i32", "dispatch": "*i32", "active": "*i32"}
        steps.append(_step("dispatch_scan_kernel", Grid(fixed=1), buffers, {**sizes, "ROWS": TABLE_ROWS}, 8))
    if pairs:
        buffers = {"index": "*i64", "table": "*i32", "dispatch": "*i32", "active": "*i32"}
        constants = {**sizes, "SCAN_HERE": few, "ROWS": TABLE_ROWS}
        names = {} if few else {"table": "begins"}
        grid = Grid(times=1, over=block)
        steps.append(_step("dispatch_place_kernel", grid, buffers, constants, 8, names=names))
    return steps


def _dispatch_steps(spec: ExpertsSpec, sm: int, tokens: int) -> tuple[list[Step[Kernel]], list[Region]]:
    """The metadata from `index`, for a node that is not given it."""
    regions = [_dispatch_region(spec), Region("active", fixed=4)]
    sizes = {"E": spec.experts, "K": spec.experts_per_token, "BLOCK_E": row_of(spec.experts), **_waits(sm)}
    if tokens * spec.experts_per_token <= DISPATCH_SLOTS:
        buffers = {"index": "*i64", "dispatch": "*i32", "active": "*i32"}
        constants = {**sizes, "BLOCK": DISPATCH_SLOTS, **_short(spec, tokens)}
        return [_step("dispatch_kernel", Grid(fixed=1), buffers, constants, 8)], regions
    block = max(fewest_tokens(spec.experts, spec.experts_per_token), 16 if tokens <= 1024 else 64)
    few = -(-tokens // block) <= BLOCKS_HERE
    constants = {**sizes, "SLOTS": block * spec.experts_per_token, "BLOCK": 256}
    buffers = {"index": "*i64", "table": "*i32"}
    count = _step("dispatch_count_kernel", Grid(times=1, over=block), buffers, constants, 4)
    regions += _table_regions(spec, block)
    return [count, *_dispatch_ends(spec, tokens, block, few=few, sm=sm, pairs=True)], regions


def experts_plan(spec: ExpertsSpec, sm: int, tokens: int, launch: ExpertsLaunch | None = None) -> Plan[Kernel]:
    """LynxExperts for up to `tokens` tokens, a power of two; the launch of the table unless one is given."""
    if launch is None:
        layer = spec.experts, spec.experts_per_token, spec.hidden, spec.inner
        launch = experts_launch(tokens, *layer, spec.dtype, sm, form=spec.form)
    steps, regions = ([], []) if spec.dispatch_given else _dispatch_steps(spec, sm, tokens)
    partial = "*fp32" if tokens <= FLOAT32_TOKENS else POINTERS[spec.dtype]
    steps += [
        _gate_up_step(spec, launch, sm, tokens),
        _down_step(spec, launch, sm, tokens, partial),
        _combine_step(spec, launch, sm, partial),
    ]
    pairs = spec.experts_per_token
    summands = pairs * launch.down.split
    regions += [
        Region("where", per=4 * pairs),
        Region("inner", per=pairs * spec.inner * BYTES[spec.dtype]),
        Region("partial", per=summands * spec.hidden * (4 if partial == "*fp32" else BYTES[spec.dtype])),
    ]
    if launch.gate_up.descriptors or launch.down.descriptors:
        regions.append(Region("scratch", fixed=SCRATCH_BYTES * MOST_PROGRAMS))
    # What hands the metadata over is LynxSelect, whose last launch is most often the one before the first here.
    return Plan(tokens, tuple(steps) if spec.dispatch_given else _after_others(steps), tuple(regions))


def _gate_up_step(spec: ExpertsSpec, launch: ExpertsLaunch, sm: int, tokens: int) -> Step[Kernel]:
    form, value = spec.form, POINTERS[spec.dtype]
    bias = "gate_up_bias" if spec.bias else "null"
    buffers = {"hidden": value, **_weights(spec, "gate_up"), "gate_up_bias": value, "dispatch": "*i32", "inner": value}
    buffers |= {"where": "*i32"}
    constants: dict[str, Value] = {
        **_matmul_constants(spec, launch, launch.gate_up, sm, tokens),
        "ACTIVATION": form.activation,
        "GATED": form.gated,
        "INTERLEAVED": form.interleaved,
        "ALPHA": float(form.alpha),
        "LIMIT": float(form.limit),
        "UP_OFFSET": float(form.up_offset),
        "BLOCK_I": launch.gate_up.block_n,
        "BLOCK_H": launch.gate_up.block_d,
    }
    grid = _matmul_grid(spec, launch, launch.gate_up, tokens, spec.inner)
    function = "gate_up_prefill_kernel" if launch.prefill else "gate_up_decode_kernel"
    tiles, names = launch.gate_up, {"gate_up_bias": bias, **_no_scale(spec, "gate_up")}
    how = tiles.warps, tiles.stages, names
    return _step(function, grid, buffers, constants, *how, programmatic=tiles.programmatic)


def _down_step(spec: ExpertsSpec, launch: ExpertsLaunch, sm: int, tokens: int, partial: str) -> Step[Kernel]:
    value = POINTERS[spec.dtype]
    bias = "down_bias" if spec.bias else "null"
    buffers = {
        "inner": value,
        **_weights(spec, "down"),
        "down_bias": value,
        "dispatch": "*i32",
        "partial": partial,
    }
    constants: dict[str, Value] = {
        **_matmul_constants(spec, launch, launch.down, sm, tokens),
        "BLOCK_H": launch.down.block_n,
        "BLOCK_I": launch.down.block_d,
    }
    if launch.prefill:
        constants["COPIED"] = launch.down.copied
    else:
        constants |= {"SPLIT": launch.down.split, "PREFETCH": _prefetch(spec, launch.down, sm)}
    grid = _matmul_grid(spec, launch, launch.down, tokens, spec.hidden)
    function = "down_prefill_kernel" if launch.prefill else "down_decode_kernel"
    tiles, names = launch.down, {"down_bias": bias, **_no_scale(spec, "down")}
    how = tiles.warps, tiles.stages, names
    return _step(function, grid, buffers, constants, *how, programmatic=tiles.programmatic)


def _prefetch(spec: ExpertsSpec, matmul: MatmulLaunch, sm: int) -> int:
    """What down brings to L2 ahead: nothing where it doesn't start early, or of rows that are no lines of 16 bytes."""
    width = spec.hidden if spec.form.transposed else spec.inner
    row = width // values_an_element(spec.form.weights) * (1 if spec.form.quantized else BYTES[spec.dtype])
    early = matmul.programmatic and sm >= PROGRAMMATIC_SM
    return matmul.prefetch if early and row >= LINE and row % 16 == 0 else 0


def _weights(spec: ExpertsSpec, name: str) -> dict[str, str]:
    """A matrix and its scales as parameters; weights that are not quantized have none."""
    if not spec.form.quantized:
        return {name: POINTERS[spec.dtype], f"{name}_scale": "*i8"}
    scale = FORMATS[spec.form.weights].scale_type
    return {name: "*i8", f"{name}_scale": "*i8" if scale == "int8" else POINTERS.get(scale, POINTERS[spec.dtype])}


def _no_scale(spec: ExpertsSpec, name: str) -> dict[str, str]:
    return {} if spec.form.quantized else {f"{name}_scale": "null"}


def _combine_step(spec: ExpertsSpec, launch: ExpertsLaunch, sm: int, partial: str) -> Step[Kernel]:
    slots = power_of_two(spec.experts_per_token)
    # Of a decode batch one warp has 16 bytes a thread of each slot, all of them on their way at a time; of a prefill
    # there are so many programs that fewer larger ones are better.
    warps = 1 if partial == "*fp32" else 4
    block = min(power_of_two(spec.hidden), 128 * warps, 2048 * warps // slots)
    constants: dict[str, Value] = {"E": spec.experts, "K": spec.experts_per_token, "H": spec.hidden}
    constants |= {"BLOCK_K": slots, "BLOCK_H": block, "SPLIT": launch.down.split, **_waits(sm)}
    buffers = {"partial": partial, "where": "*i32", "index": "*i64", "weight": "*fp32", "output": POINTERS[spec.dtype]}
    return _step("combine_kernel", Grid(per=-(-spec.hidden // block), times=1), buffers, constants, warps)


def _block_t(matmul: MatmulLaunch, tokens: int) -> int:
    """No larger than the batch, in which an expert has at most a pair a token; 16 is what the matrix units take."""
    return min(matmul.block_t, max(power_of_two(tokens), 16))


def _matmul_constants(
    spec: ExpertsSpec, launch: ExpertsLaunch, matmul: MatmulLaunch, sm: int, tokens: int
) -> dict[str, Value]:
    constants: dict[str, Value] = {
        "E": spec.experts,
        "K": spec.experts_per_token,
        "H": spec.hidden,
        "I": spec.inner,
        "TRANSPOSED": spec.form.transposed,
        "WEIGHTS": spec.form.weights,
        "HAS_BIAS": spec.bias,
        # Only float32 operands have a choice: exact products, or ones rounded to 10 bits.
        "PRECISION": "ieee" if spec.dtype == "float32" else "tf32",
        "BLOCK_E": row_of(spec.experts),
        "BLOCK_T": _block_t(matmul, tokens),
        "SWAP": matmul.swap,
        **_waits(sm),
    }
    if launch.prefill:
        return {**constants, "GROUP": 8, "DESCRIPTORS": matmul.descriptors, "FLATTEN": matmul.flatten}
    return {**constants, "ONE_TILE": tokens <= _block_t(matmul, tokens)}


def _matmul_grid(spec: ExpertsSpec, launch: ExpertsLaunch, matmul: MatmulLaunch, tokens: int, rows: int) -> Grid:
    """Tiles of rows x (active experts + full tiles of pairs): at least the items there are, however they fall."""
    block_t = _block_t(matmul, tokens)
    one_tile = not launch.prefill and tokens <= block_t
    return Grid(
        per=-(-rows // matmul.block_n) * matmul.split,
        cap=spec.experts,
        slots=spec.experts_per_token,
        times=0 if one_tile else spec.experts_per_token,
        over=block_t,
        per_multiprocessor=matmul.per_multiprocessor if launch.prefill else 0,
    )


def draw_plan(spec: DrawSpec, tokens: int, block: int | None = None) -> Plan[Kernel]:
    """The draw of the next tokens of up to `tokens` rows, in blocks of `block` logits (None: as below).

    Nothing of it is measured: 2048 makes enough blocks for every multiprocessor, and few enough for one program.
    """
    if block is None:
        most = 2048 if spec.vocabulary <= 1 << 18 else 8192
        block = min(max(power_of_two(spec.vocabulary) // 16, DRAW_LEADING), most)
    blocks = -(-spec.vocabulary // block)
    constants: dict[str, Value] = {
        "V": spec.vocabulary,
        "BLOCK": block,
        "BLOCKS": blocks,
        "LEADING": DRAW_LEADING if spec.nucleus else 0,
    }
    tables = {"best": "*i64", "mass": "*fp64", "leading": "*i64"}
    names = {} if spec.nucleus else {"leading": "null"}
    rows = {"top_p": "*fp64", "top_k": "*i32"}
    buffers = {"logits": "*fp32", "scale": "*fp32", **rows, **tables}
    first = _step("draw_blocks_kernel", Grid(times=blocks), buffers, constants, 8 if block > 2048 else 4, names=names)
    buffers = {"logits": "*fp32", "scale": "*fp32", **rows, "uniform": "*fp64", **tables, "token": "*i32"}
    # Two at least: the compiler has no arrays of one.
    slots = power_of_two(blocks * DRAW_LEADING)
    rooms = {"BLOCK_B": max(power_of_two(blocks), 2), "SLOTS": slots, "NUCLEUS": min(slots, DRAW_NUCLEUS)}
    second = _step("draw_kernel", Grid(times=1), buffers, {**constants, **rooms}, 8, names=names)
    regions = [Region("best", per=8 * blocks), Region("mass", per=8 * blocks)]
    if spec.nucleus:
        regions.append(Region("leading", per=8 * blocks * DRAW_LEADING))
    return Plan(tokens, (first, second), tuple(regions))


def causal_conv_plan(spec: CausalConvSpec, tokens: int) -> Plan[Kernel]:
    """LynxCausalConv for up to `tokens` tokens of a sequence.

    Nothing of it is measured. A decode batch wants a value a thread; in a prefill, where the programs of a sequence are
    few and long, they are to be more, and each to have much on its way at a time.
    """
    value = POINTERS[spec.dtype]
    buffers = {"values": value, "weight": value, "past_state": value}
    buffers |= {"lengths": "*i64", "bias": value, "output": value, "present_state": value}
    most, rows = (128, 8) if tokens <= FEW_TOKENS else (64, 32)
    block = min(max(power_of_two(spec.channels), 16), most)
    constants: dict[str, Value] = {"C": spec.channels, "W": spec.width, "ACTIVATION": spec.activation}
    constants |= {
        "HAS_BIAS": spec.bias,
        "BLOCK_C": block,
        "BLOCK_S": rows,
        "ROWS": max(power_of_two(spec.width - 1), 2),
    }
    grid = Grid(per=-(-spec.channels // block), sequences=1)
    names = {} if spec.bias else {"bias": "null"}
    return Plan(tokens, (_step("causal_conv_kernel", grid, buffers, constants, 4, names=names),), ())


def linear_attention_plan(spec: LinearAttentionSpec, tokens: int, *, chunks: bool | None = None) -> Plan[Kernel]:
    """LynxLinearAttention for up to `tokens` tokens of a sequence, in chunks or token after token (None: as below).

    Nothing of it is measured. By the machine code on SM 90 (benchmarks/kernel_cycles.py, which leaves out what the
    matrix units wait for) a program takes 233 cycles a token in chunks and 1638 token after token (qwen3-next), 152 and
    619 (nemotron-h), for twice the values, and 255 for four times as many with a decay of each key (kimi-linear).

    Token after token, a thread has 32 values of a state; eight columns at least are what a row's read is whole with,
    and where one warp has all their rows, no sum has to go through shared memory.
    """
    if chunks is None:
        chunks = tokens > FEW_TOKENS
    # Of more keys a warp would have half its registers full of the state alone.
    if chunks and spec.dtype != "float32" and spec.keys <= 128:
        return _linear_attention_in_chunks(spec, tokens)
    value = POINTERS[spec.dtype]
    buffers = {"query": value, "key": value, "value": value, "decay": "*fp32", "beta": "*fp32", "past_state": "*fp32"}
    buffers |= {"lengths": "*i64", "output": value, "present_state": "*fp32"}
    rows = max(power_of_two(spec.keys), 16)
    columns = max(1024 // rows, 8)
    constants: dict[str, Value] = {"N": spec.value_heads, "G": spec.key_heads, "D": spec.keys, "M": spec.values}
    constants |= {"PER_KEY": spec.per_key, "DELTA": spec.update_rule == "gated_delta"}
    constants |= {"SCALE": spec.scale, "EPSILON": spec.epsilon, "BLOCK_D": rows, "BLOCK_M": columns}
    grid = Grid(per=spec.value_heads * -(-spec.values // columns), sequences=1)
    step = _step("linear_attention_kernel", grid, buffers, constants, max(rows * columns // 1024, 1))
    return Plan(tokens, (step,), ())


def _linear_attention_in_chunks(spec: LinearAttentionSpec, tokens: int) -> Plan[Kernel]:
    """For a prefill. A program is a warp with 16 columns of the state, the fewest that the matrix units take.

    So there are most programs, and none has to wait for another warp. Chunks of 32 would want more registers than there
    are, and slabs of more than 16 keys too. Where each key decays by itself two warps share what they read, which is
    more, in slabs of 32: one register spills on SM 90, 17 on SM 120, for three quarters of the time that slabs of 16
    take by the machine code, which spill less.
    """
    value, delta = POINTERS[spec.dtype], spec.update_rule == "gated_delta"
    rows, warps, chunk = max(power_of_two(spec.keys), 16), 2 if spec.per_key else 1, 16
    columns = 16 * warps
    sizes: dict[str, Value] = {"N": spec.value_heads, "G": spec.key_heads, "D": spec.keys, "DELTA": delta}
    sizes |= {"BLOCK_D": rows, "CHUNK": chunk}
    made = {"factors": "*fp32", "scores": "*fp32", "inverse": "*fp32"}
    names = {} if delta else {"inverse": "null"}
    buffers = {"query": value, "key": value, "decay": "*fp32", "beta": "*fp32", "lengths": "*i64", **made}
    # Of the sequences' last chunks, which may not be full, there are B more at most.
    grid = Grid(per=spec.value_heads, times=1, over=chunk, sequences=1)
    first = "linear_attention_key_chunks_kernel" if spec.per_key else "linear_attention_chunks_kernel"
    buffers |= {"decayed": "*bf16", "wholes": "*fp32"} if spec.per_key else {}
    constants = {**sizes, "SCALE": spec.scale, "EPSILON": spec.epsilon, "SLAB": min(rows, 64)}
    steps = [_step(first, grid, buffers, constants, 4 if spec.per_key else 1, 1, names)]
    buffers = {"query": value, "key": value, "value": value, "past_state": "*fp32", "lengths": "*i64", **made}
    buffers |= {"decayed": "*bf16", "wholes": "*fp32", "output": value, "present_state": "*fp32"}
    names |= {} if spec.per_key else {"decayed": "null", "wholes": "null"}
    constants = {**sizes, "M": spec.values, "PER_KEY": spec.per_key, "BLOCK_M": columns, "SLAB": min(rows, 16 * warps)}
    grid = Grid(per=spec.value_heads * -(-spec.values // columns), sequences=1)
    # Two stages: the next chunk's queries and keys are on their way while this one's are used.
    steps.append(_step("linear_attention_prefill_kernel", grid, buffers, constants, warps, 2, names))
    regions = [Region("factors", per=16 * spec.value_heads), Region("scores", per=4 * spec.value_heads * chunk)]
    if delta:
        regions.append(Region("inverse", per=4 * spec.value_heads * chunk))
    if spec.per_key:
        table = spec.value_heads * spec.keys
        regions += [Region("decayed", per=3 * 6 * table), Region("wholes", per=4 * table)]
    return Plan(tokens, tuple(steps), tuple(regions))


def _step(
    function: str,
    grid: Grid,
    buffers: Mapping[str, str],
    constants: Mapping[str, Value],
    warps: int,
    stages: int = 3,
    names: Mapping[str, str] | None = None,
    *,
    programmatic: bool = True,
) -> Step[Kernel]:
    """A launch whose parameters are `buffers` (name to type) in the kernel's order, then T and B where it takes them.

    `names` gives the argument of a parameter that has another name. It is programmatic if its kernel can be.
    """
    parameters = dict(buffers)
    if MODULES[function].startswith(("select", "dispatch", "draw")):
        parameters["T"] = "i32"
    if grid.sequences:
        parameters |= {"T": "i32", "B": "i32"}
    kernel = Kernel(function, tuple(parameters.items()), tuple(sorted(constants.items())), warps, stages)
    arguments = tuple((names or {}).get(name, name) for name in parameters)
    return Step(kernel, grid, arguments, programmatic and kernel.waits)
