"""Which tiles and how many warps a kernel runs with: frozen dataclasses, picked by pure functions.

What a GPU has measured is in `launch_table.py`, by layer and tokens: `python -m lynx_trt.plugins.tune` writes it. For
everything else the estimates below stand, each with its reason: by the tokens per expert, in power-of-two buckets,
because that decides whether weights are read or multiplied most of the time.

Nothing here needs a GPU or the compiler.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from lynx_trt.experts import FORMATS, ExpertsForm
from lynx_trt.plugins.specs import BYTES

# Shared memory that one program may use, in bytes, by SM (CUDA C++ Programming Guide, table of compute capabilities).
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}

SMS = tuple(SHARED_MEMORY)

# In the tables of measured launches: SM, E, K, H, I and what the weights are in, below it by tokens; SM, E, K, tokens.
ExpertsKey = tuple[int, int, int, int, int, str]
SelectKey = tuple[int, int, int, int]

# Programs of a persistent launch: an upper bound over all GPUs, which bounds the scratch memory of their descriptors.
MOST_PROGRAMS = 1024


@dataclass(frozen=True)
class MatmulLaunch:
    """Tiles of one matmul: block_t pairs x block_n rows (of gate_up: inner values) x block_d of the summed dimension.

    swap: the rows are the matmul's M. descriptors: weights through tensor descriptors; copied: the pairs too (of down
    in prefill). per_multiprocessor: programs of a persistent launch (0: one program an item); flatten: they load for
    the next item before they are done with one. split: programs that share a tile's sum (of down in decode).
    programmatic: start while the launch before still runs, where the SM can; prefetch: have so much of the summed
    dimension brought to L2 meanwhile (of down in decode).
    """

    block_t: int
    block_n: int
    block_d: int
    warps: int
    stages: int
    swap: bool = False
    descriptors: bool = False
    per_multiprocessor: int = 0
    split: int = 1
    programmatic: bool = True
    copied: bool = False
    flatten: bool = False
    prefetch: int = 0


@dataclass(frozen=True)
class ExpertsLaunch:
    """How LynxExperts runs: the decode kernels or the prefill ones, and their tiles.

    microseconds: what the tuner measured for a layer; None: an estimate, for the reason given.
    """

    prefill: bool
    gate_up: MatmulLaunch
    down: MatmulLaunch
    reason: str
    microseconds: float | None = None


@dataclass(frozen=True)
class SelectLaunch:
    """How LynxSelect runs: in one launch of some `programs`, a cluster if they are several, or (0) in a launch a step.

    tokens: of a program; block_t: of those, how many at a time in registers. warps: of a program, or of what has the
    kept set; narrow: of a block's other launches.
    """

    programs: int
    block_t: int
    warps: int
    tokens: int
    reason: str
    microseconds: float | None = None
    narrow: int = 4


_FORM = ExpertsForm()


def power_of_two(number: int) -> int:
    """The least power of two from `number`."""
    return 1 << max(number - 1, 0).bit_length()


def tokens_bucket(tokens: int, experts: int, experts_per_token: int) -> int:
    """Tokens per expert, were they spread evenly, as a power of two from 1."""
    return power_of_two(-(-tokens * experts_per_token // experts))


def experts_launch(
    tokens: int,
    experts: int,
    experts_per_token: int,
    hidden: int,
    inner: int,
    dtype: str,
    sm: int,
    *,
    form: ExpertsForm = _FORM,
) -> ExpertsLaunch:
    """The launch for a batch of up to `tokens` tokens (a power of two): measured, else an estimate.

    More tokens than any measured of a layer take the launch of the most. The types of 2 bytes share their measurements.
    """
    layer = sm, experts, experts_per_token, hidden, inner, form.weights
    measured = _experts_table().get(layer, {}) if BYTES[dtype] == 2 else {}
    if measured and (launch := measured.get(min(tokens, max(measured)))):
        return launch
    bucket = tokens_bucket(tokens, experts, experts_per_token)
    return experts_estimate(bucket, hidden, inner, dtype, sm, form=form)


def select_launch(tokens: int, experts: int, experts_per_token: int, sm: int) -> SelectLaunch:
    """The launch for a batch of up to `tokens` tokens (a power of two): measured, else an estimate."""
    measured = _select_table().get((sm, experts, experts_per_token, tokens))
    return measured or select_estimate(tokens, experts, experts_per_token)


@cache
def _experts_table() -> dict[ExpertsKey, dict[int, ExpertsLaunch]]:
    from lynx_trt.plugins.launch_table import EXPERTS

    return EXPERTS


@cache
def _select_table() -> dict[SelectKey, SelectLaunch]:
    from lynx_trt.plugins.launch_table import SELECT

    return SELECT


# From this many tokens per expert on an expert's tiles are made for arithmetic. H200: 790 TFLOP/s over 4.3 TB/s is 184
# operations a byte, or 184 tokens an expert with 2-byte weights; tiles of 64 tokens read the weights once up to 64.
PREFILL_BUCKET = 64


# Up to this many tokens the experts' outputs are kept in float32 until they are summed. It costs under 5% of the
# traffic of a decode batch; of a prefill it would be a third. No more tokens an expert than that come with it.
FLOAT32_TOKENS = 512


def experts_estimate(
    bucket: int, hidden: int, inner: int, dtype: str, sm: int, *, form: ExpertsForm = _FORM
) -> ExpertsLaunch:
    """A launch by reasoning, for what no GPU has measured."""
    if dtype == "float32":
        return _float32_launch(bucket)
    if form.quantized:
        return _quantized_estimate(bucket, dtype, sm, form.weights)
    if bucket < PREFILL_BUCKET:
        return _decode_estimate(bucket, hidden, inner, dtype, sm)
    return _prefill_estimate(bucket, hidden, inner, dtype, sm, interleaved=form.interleaved)


def _quantized_estimate(bucket: int, dtype: str, sm: int, weights: str) -> ExpertsLaunch:
    """Of weights that become numbers on their way. MXFP4's rows are whole 16 bytes, so a tile may reach past them."""
    if bucket < PREFILL_BUCKET:
        # The activations are the left operand, in which the assembler's code for SM 90 has a seventh fewer instructions
        # than with the weights there. All warps arrange all of them for the matrix units, so that two warps of a tile
        # have a tenth fewer instructions a weight than four (at 16 pairs 3.2 and 3.5 of int4, 4.0 and 4.4 of MXFP4, 4.3
        # and 5.1 of FP8), and a third fewer at 32, where deeper tiles of so few warps take all registers.
        pairs = 16 if bucket <= 8 else 32
        launch = MatmulLaunch(pairs, 64, 128, warps=2, stages=5)
        if pairs == 32:
            launch = replace(launch, warps=4, stages=4) if weights == "fp8" else replace(launch, block_d=64)
        reason = f"decode: {weights} with few instructions a weight, and 16 kB in flight a program"
    else:
        # Hopper takes a left operand from registers, where the weights come to be; the others take both. With 128 pairs
        # MXFP4's gate_up spills 72 bytes on SM 120, and FP8's down 1004 on SM 100.
        small = sm == 120 or (sm == 100 and weights == "fp8")
        block_t = min(bucket, 64 if small else 128)
        launch = MatmulLaunch(
            block_t, 128, 64, warps=8, stages=3, swap=sm == 90, per_multiprocessor=1 if block_t == 128 else 2
        )
        reason = f"prefill: {block_t} x 128 tiles, {weights} becomes numbers in registers"
    gate_up = replace(launch, block_n=launch.block_n // 2)
    gate_up = fit(gate_up, dtype, sm, rows_a_value=2, weights=weights)
    down = fit(launch, dtype, sm, rows_a_value=1, weights=weights)
    return ExpertsLaunch(bucket >= PREFILL_BUCKET, gate_up, down, reason)


def _decode_estimate(bucket: int, hidden: int, inner: int, dtype: str, sm: int) -> ExpertsLaunch:
    if sm == 90:
        # What an H200 chose for nearly all batches of four models: the weights as M of its matrix instructions, and
        # tiles no larger than most experts' pairs. A second tile of an expert finds the weights in L2.
        launch = MatmulLaunch(16 if bucket <= 8 else 32, 64, 128, warps=4, stages=3, swap=True)
        reason = "decode: as the measured models on an H200"
        return _decode_launch(launch, hidden, inner, dtype, sm, reason)
    # Twice the mean and more in one tile, so that few experts overflow it; the plan cuts this to the batch.
    block_t = min(16 * bucket, 64)
    # A tile of 64 rows x 128 is 16 kB, 3 of them in flight are 48 kB a program and 2 or more programs a multiprocessor
    # are resident: HBM at 4.8 TB/s and 800 ns needs 29 kB in flight a multiprocessor. Larger tiles would leave a longer
    # tail: Qwen3-30B at batch 16 has 80 active experts x 24 tiles, 15 a multiprocessor.
    # On SM 80 64 pairs at a depth of 128 spill 120 bytes (Qwen3-30B at 64 tokens); at 64 they take 198 registers.
    deep = bucket <= 4 and not (sm == 80 and block_t == 64)
    launch = MatmulLaunch(block_t, 64, 128 if deep else 64, warps=4, stages=4)
    return _decode_launch(launch, hidden, inner, dtype, sm, "decode: 64 rows a program, 3 tiles of 16 kB in flight")


def _decode_launch(launch: MatmulLaunch, hidden: int, inner: int, dtype: str, sm: int, reason: str) -> ExpertsLaunch:
    """Both matmuls with the same tiles, gate_up's being half of gate and half of up."""
    gate_up = replace(launch, block_n=32, block_d=_depth(hidden, launch.block_d))
    down = replace(launch, block_d=_depth(inner, launch.block_d))
    return ExpertsLaunch(False, fit(gate_up, dtype, sm, rows_a_value=2), fit(down, dtype, sm, rows_a_value=1), reason)


def _prefill_estimate(bucket: int, hidden: int, inner: int, dtype: str, sm: int, *, interleaved: bool) -> ExpertsLaunch:
    block_t = min(bucket, 128)
    # Hopper's matrix instruction is fed best by 128 x 256 tiles (2 groups of warps of 64 x 256); Blackwell's wants 128
    # rows too. The others hold 128 x 128 in their registers. With 64 pairs the weights' arrival still counts: two
    # programs a multiprocessor hide it.
    large = sm in (90, 100) and block_t == 128
    launch = MatmulLaunch(
        block_t,
        256 if large else 128,
        64 if sm >= 90 else 32,
        warps=8 if block_t == 128 else 4,
        stages=4 if sm == 90 else 3,  # as measured on an H200
        descriptors=sm >= 90,
        # On SM 120 the assembler spills at a depth of 32, and 64 leaves no room for a second program of 128 pairs.
        per_multiprocessor=1 if sm >= 90 and block_t == 128 else 2,
    )
    gate_up = replace(launch, block_n=launch.block_n // 2, block_d=_depth(hidden, launch.block_d))
    down = replace(launch, block_d=_depth(inner, launch.block_d))
    if sm == 100 and bucket <= FLOAT32_TOKENS:
        # Here down may write float32, and a tile of 128 x 256 of it, 128 values a thread, spills 356 bytes (Mixtral at
        # 512 tokens); 128 x 128 takes 170 registers. At 64 pairs 4 warps spill 4 bytes (gpt-oss), 8 take 109 registers.
        down = replace(down, block_n=128, warps=8)
    if sm == 100 and interleaved and block_t == 128:
        # Gate and up that lie in turns are taken apart in registers: 128 x 256 of them spill 68 bytes with triton 3.7.1
        # (gpt-oss from 4096 tokens on), 128 x 128 take 194 registers.
        gate_up = replace(gate_up, block_n=64)
    if sm == 120 and block_t == 64:
        gate_up = replace(gate_up, warps=8)  # 4 spill 4 bytes (Mixtral at 256 tokens)
    if launch.descriptors:
        # The copy engine wants rows of whole 16 bytes.
        gate_up = replace(gate_up, descriptors=hidden % 8 == 0 and inner % 8 == 0)
        down = replace(down, descriptors=gate_up.descriptors)
    reason = f"prefill: {block_t} x {launch.block_n} tiles feed the matrix units"
    return ExpertsLaunch(True, fit(gate_up, dtype, sm, rows_a_value=2), fit(down, dtype, sm, rows_a_value=1), reason)


def _float32_launch(bucket: int) -> ExpertsLaunch:
    block_t = 16 if bucket < PREFILL_BUCKET else 32
    launch = MatmulLaunch(block_t, 32, 32, warps=4, stages=2)
    prefill = bucket >= PREFILL_BUCKET
    launch = replace(launch, per_multiprocessor=4 if prefill else 0)
    return ExpertsLaunch(
        prefill, replace(launch, block_n=16), launch, "float32 is for tests: small tiles, exact arithmetic"
    )


def _depth(size: int, wanted: int) -> int:
    """The largest power of two up to `wanted`, and from 32, that divides the summed dimension; else `wanted`.

    A tile that reaches past the dimension has to be masked, which splits the wide loads of transposed weights.
    """
    return next((depth for depth in (wanted, wanted // 2, wanted // 4) if depth >= 32 and size % depth == 0), wanted)


def shared_bytes(launch: MatmulLaunch, dtype: str, sm: int, *, rows_a_value: int, weights: str = "float") -> int:
    """At most what the tiles in flight take of a program's shared memory; rows_a_value is 2 for gate_up, 1 for down."""
    # The matrix instructions of SM 90 and 100 read shared memory while the next tile arrives; the others' operands
    # are in registers by then. At least 32 pairs, so that two batches which differ in that alone can share a kernel.
    stages = launch.stages if sm in (90, 100) else launch.stages - 1
    rows, pairs = rows_a_value * launch.block_n, launch.block_d * max(launch.block_t, 32) * BYTES[dtype]
    if weights == "float":
        return stages * (pairs + launch.block_d * rows * BYTES[dtype])
    # Beside what is in flight, the tile that is made of it, where the matrix instructions read it there.
    made = launch.block_d * rows * BYTES[dtype] if sm in (90, 100) and launch.block_t >= 64 else 0
    return stages * (pairs + launch.block_d * rows // FORMATS[weights].per_byte) + made


def fit(launch: MatmulLaunch, dtype: str, sm: int, *, rows_a_value: int, weights: str = "float") -> MatmulLaunch:
    """The same with fewer tiles in flight (but 3 stages), then shallower ones, until they fit an SM's shared memory.

    Decode kernels live by several programs a multiprocessor: they get half of it.
    """
    room = SHARED_MEMORY[sm] if launch.per_multiprocessor == 1 else SHARED_MEMORY[sm] // 2
    while shared_bytes(launch, dtype, sm, rows_a_value=rows_a_value, weights=weights) > room:
        if launch.stages > 3 or launch.block_d <= 32:
            launch = replace(launch, stages=launch.stages - 1)
        else:
            launch = replace(launch, block_d=launch.block_d // 2)
    return launch


# Values of rows of E that one program of LynxSelect holds at most: 8 a thread of 8 warps.
ROW_VALUES = 2048
# The same of a block's program, which 4 warps hold.
TILE_VALUES = 1024
# Rows that one program holds at least: on an H200 a row that all its warps share takes longer than four that do not.
FEWEST_ROWS = 4
# Rows of a table that are added at a time.
TABLE_ROWS = 32
# Programs of a cluster that every GPU which has clusters can run, and the first SM that has them.
CLUSTER_PROGRAMS, CLUSTER_SM = 8, 90
# Tokens of such a program at most: a bit each of an int64.
CLUSTER_TOKENS = 64
# Up to this many blocks each program of the next launch adds up their tables, instead of one more launch doing it.
BLOCKS_HERE = 64
# Tokens of a block of the selection whose table is bits of an int32.
MASK_BITS = 32


def select_estimate(tokens: int, experts: int, experts_per_token: int) -> SelectLaunch:
    """A launch by reasoning, for what no GPU has measured, from what was seen on an H200.

    Time is that of dependent instructions and exchanges between warps, not of data: the fewest tokens a program and
    few warps are best. At E = 128 and K = 8 one program takes 6 us for up to 4 tokens, 8 for 8 and 11 for 16.
    """
    row = row_of(experts)
    if tokens * row <= ROW_VALUES:
        reason = "one program: fewer launches than blocks"
        block_t = max(tokens, FEWEST_ROWS)
        return SelectLaunch(1, block_t, _row_warps(block_t, row), block_t, reason)
    fewest = fewest_tokens(experts, experts_per_token)
    # Small blocks, as many as are added up at once; those of up to MASK_BITS tokens need the fewest launches.
    small = min(max(TILE_VALUES // 2 // row, 8), MASK_BITS)
    block = max(fewest, small, min(power_of_two(-(-tokens // TABLE_ROWS)), MASK_BITS))
    if tokens > block * BLOCKS_HERE:
        block = max(fewest, 64)
    block_t = min(block, max(TILE_VALUES // row, 1))
    reason = "blocks: tokens in parallel on many multiprocessors"
    narrow = 8 if row > 256 else 4  # 4 warps add up tables of 512 experts (Kimi K2) with 1.4 kB of spills
    return SelectLaunch(0, block_t, 8 if block * row > TILE_VALUES else 4, block, reason, narrow=narrow)


def row_of(experts: int) -> int:
    """A row of E as the kernels hold it; 2 is the fewest bins that their histogram has."""
    return max(power_of_two(experts), 2)


def fewest_tokens(experts: int, experts_per_token: int) -> int:
    """The fewest tokens of a block, whose table has E entries: then all tables are within 4 (T K + E)."""
    return power_of_two(-(-experts // (4 * experts_per_token)))


def _row_warps(block_t: int, row: int) -> int:
    """8 values a thread, in 4 or 8 warps."""
    return min(max(block_t * row // 256, 4), 8)
