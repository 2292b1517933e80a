# pyright: reportPossiblyUnboundVariable=false
# Names in the kernel are bound under the same compile-time conditions under which they are read.
"""GEMM of FP8 activations and FP8 weights on Hopper, where arithmetic is the limit.

A warp of a program loads operands. Two or three warpgroups compute 64 tokens each of a tile of 128 outputs: the tensor
cores sum 128 inputs, then the warpgroup multiplies this partial sum with its scales and adds it to the total. The
warpgroups wait for operands only, never for each other, so that one keeps the tensor cores busy while another scales.
The warps of a program in Triton's language proceed in step, so this one is written in Gluon.

With SwiGLU, a tile has 64 outputs of gate and the same 64 of up.
"""

import torch

from nanovllm.arithmetic import ceil_div
from nanovllm.ops.fp8.quantize import QuantizedRows
from nanovllm.ops.linear.scales import scale_layout
from nanovllm.ops.triton_utils import (
    HAVE_TRITON,
    GluonDescriptor,
    gl,
    gluon,
    hopper,
    launch_options,
    sm_count,
    wait_for_inputs,
)

GROUP_TILES = 8  # token tiles that programs go through together
MIN_TOKENS = 65

if HAVE_TRITON and hasattr(hopper.tma, "async_load"):
    _load = hopper.tma.async_load
else:
    _load = hopper.tma.async_copy_global_to_shared  # its name in Triton 3.6


@gluon.jit
def _tile_position(tile, M, N, HEIGHT: gl.constexpr, WIDTH: gl.constexpr, TILES: gl.constexpr):
    """Return the first token and the first output of the tile with this number."""
    tiles_m = gl.cdiv(M, HEIGHT)
    tiles_n = gl.cdiv(N, WIDTH)
    start = tile // (TILES * tiles_n) * TILES
    height = min(TILES, tiles_m - start)
    within = tile % (TILES * tiles_n)
    return (start + within % height) * HEIGHT, within // height * WIDTH


@gluon.jit
def _load_operands(
    operands,
    pointers,
    sizes,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
    GATED: gl.constexpr,
    SCALES: gl.constexpr,
    BIAS: gl.constexpr,
    ADD: gl.constexpr,
    TILES: gl.constexpr,
):
    """Load the operands of all tiles of this program, for `_compute`."""
    x_desc, weight_desc, x_buffers, weight_buffers, full, empty = operands
    M, N, K, x_scale_stride = sizes
    HEIGHT: gl.constexpr = 64 * GROUPS
    WIDTH: gl.constexpr = 64 if GATED else 128
    second = N if GATED else 64
    step = 0
    for tile in range(gl.program_id(0), gl.cdiv(M, HEIGHT) * gl.cdiv(N, WIDTH), gl.num_programs(0)):
        m, n = _tile_position(tile, M, N, HEIGHT, WIDTH, TILES)
        for k in range(0, K, 128):
            stage = step % STAGES
            barrier = full.index(stage)
            hopper.mbarrier.wait(empty.index(stage), step // STAGES & 1 ^ 1)
            hopper.mbarrier.expect(barrier, (HEIGHT + 128) * 128)
            weight = weight_buffers.index(stage)
            _load(weight_desc, [n, k], barrier, weight.slice(0, 64))
            _load(weight_desc, [n + second, k], barrier, weight.slice(64, 64))
            for group in gl.static_range(GROUPS):
                _load(x_desc, [m + 64 * group, k], barrier, x_buffers.index(GROUPS * stage + group))
            step += 1


@gluon.jit
def _halves(tile):
    """Return the left and the right half of a tile [64, 128]. Nothing moves between threads."""
    return tile.reshape([64, 2, 64]).permute([0, 2, 1]).split()


@gluon.jit
def _add_scaled(total, partial, scale):
    """Return total + partial * scale, with a scale for each row."""
    scale = gl.convert_layout(scale, gl.SliceLayout(1, total.type.layout))
    return total + partial * scale[:, None]


@gluon.jit
def _finish(tile, row, scale_ptr, bias_ptr, end, SCALES: gl.constexpr, BIAS: gl.constexpr):
    """Apply what there is one of for each row of the weight, from `row` on: scales and bias."""
    rows = row + gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, tile.type.layout))
    if SCALES == "row":
        tile *= gl.load(scale_ptr + rows, mask=rows < end, other=0.0)[None, :]
    if BIAS:
        tile += gl.load(bias_ptr + rows, mask=rows < end, other=0.0).to(gl.float32)[None, :]
    return tile


@gluon.jit
def _compute(
    WARPGROUP: gl.constexpr,
    operands,
    pointers,
    sizes,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
    GATED: gl.constexpr,
    SCALES: gl.constexpr,
    BIAS: gl.constexpr,
    ADD: gl.constexpr,
    TILES: gl.constexpr,
):
    """Compute this warpgroup's 64 tokens of all tiles of this program."""
    x_desc, weight_desc, x_buffers, weight_buffers, full, empty = operands
    x_scale_ptr, scale_ptr, bias_ptr, out_ptr = pointers
    M, N, K, x_scale_stride = sizes
    HEIGHT: gl.constexpr = 64 * GROUPS
    WIDTH: gl.constexpr = 64 if GATED else 128
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    blocks = gl.cdiv(K, 128)
    zeros = gl.zeros([64, 128], gl.float32, layout=layout)
    step = 0
    for tile in range(gl.program_id(0), gl.cdiv(M, HEIGHT) * gl.cdiv(N, WIDTH), gl.num_programs(0)):
        m, n = _tile_position(tile, M, N, HEIGHT, WIDTH, TILES)
        m += 64 * WARPGROUP
        tokens = m + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
        x_scale_ptrs = x_scale_ptr + gl.minimum(tokens, M - 1)
        scale_ptrs = scale_ptr + n // 128 * blocks
        up_scale_ptrs = scale_ptr + (N + n) // 128 * blocks
        if GATED:
            y, up = _halves(zeros)
        else:
            y = zeros
        for block in range(blocks):
            stage = step % STAGES
            x_scale = gl.load(x_scale_ptrs + block * x_scale_stride)  # arrives while the tensor cores compute
            weight_scale = 1.0
            up_weight_scale = 1.0
            if SCALES == "block":
                weight_scale = gl.load(scale_ptrs + block)
                if GATED:
                    up_weight_scale = gl.load(up_scale_ptrs + block)
            hopper.mbarrier.wait(full.index(stage), step // STAGES & 1)
            x = x_buffers.index(GROUPS * stage + WARPGROUP)
            weight = weight_buffers.index(stage).permute([1, 0])
            partial = hopper.warpgroup_mma(x, weight, zeros, use_acc=False, is_async=True)
            partial = hopper.warpgroup_mma_wait(0, deps=[partial])
            hopper.mbarrier.arrive(empty.index(stage), count=1)
            if GATED:
                partial, up_partial = _halves(partial)
                up = _add_scaled(up, up_partial, x_scale * up_weight_scale)
            y = _add_scaled(y, partial, x_scale * weight_scale)
            step += 1
        if GATED:
            y = _finish(y, n, scale_ptr, bias_ptr, N, SCALES, BIAS)
            up = _finish(up, n + N, scale_ptr, bias_ptr, 2 * N, SCALES, BIAS)
            y = y / (1 + gl.exp(-y)) * up
        else:
            y = _finish(y, n, scale_ptr, bias_ptr, N, SCALES, BIAS)
        rows = m + gl.arange(0, 64, layout=gl.SliceLayout(1, y.type.layout))
        columns = n + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, y.type.layout))
        out_ptrs = out_ptr + rows.to(gl.int64)[:, None] * N + columns[None, :]
        mask = (rows < M)[:, None] & (columns < N)[None, :]
        if ADD:
            y += gl.load(out_ptrs, mask=mask, other=0.0).to(gl.float32)
        gl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)


# Partitions of warps have no other way to know their number.
@gluon.jit
def _group_0(
    operands,
    pointers,
    sizes,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
    GATED: gl.constexpr,
    SCALES: gl.constexpr,
    BIAS: gl.constexpr,
    ADD: gl.constexpr,
    TILES: gl.constexpr,
):
    _compute(0, operands, pointers, sizes, STAGES, GROUPS, GATED, SCALES, BIAS, ADD, TILES)


@gluon.jit
def _group_1(
    operands,
    pointers,
    sizes,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
    GATED: gl.constexpr,
    SCALES: gl.constexpr,
    BIAS: gl.constexpr,
    ADD: gl.constexpr,
    TILES: gl.constexpr,
):
    _compute(1, operands, pointers, sizes, STAGES, GROUPS, GATED, SCALES, BIAS, ADD, TILES)


@gluon.jit
def _group_2(
    operands,
    pointers,
    sizes,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
    GATED: gl.constexpr,
    SCALES: gl.constexpr,
    BIAS: gl.constexpr,
    ADD: gl.constexpr,
    TILES: gl.constexpr,
):
    _compute(2, operands, pointers, sizes, STAGES, GROUPS, GATED, SCALES, BIAS, ADD, TILES)


@gluon.jit(do_not_specialize=["M", "x_scale_stride"])
def _specialized_gemm_kernel(
    x_desc,
    weight_desc,
    x_scale_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    x_scale_stride,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
    GATED: gl.constexpr,
    SCALES: gl.constexpr,
    BIAS: gl.constexpr,
    ADD: gl.constexpr,
    TILES: gl.constexpr,
    PDL: gl.constexpr,
):
    x_buffers = gl.allocate_shared_memory(x_desc.dtype, [GROUPS * STAGES, 64, 128], x_desc.layout)
    weight_buffers = gl.allocate_shared_memory(weight_desc.dtype, [STAGES, 128, 128], weight_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        hopper.mbarrier.init(full.index(stage), count=1)
        hopper.mbarrier.init(empty.index(stage), count=GROUPS)
    operands = (x_desc, weight_desc, x_buffers, weight_buffers, full, empty)
    pointers = (x_scale_ptr, scale_ptr, bias_ptr, out_ptr)
    sizes = (M, N, K, x_scale_stride)
    wait_for_inputs(PDL)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_group_0, (operands, pointers, sizes, STAGES, GROUPS, GATED, SCALES, BIAS, ADD, TILES)),
                (_group_1, (operands, pointers, sizes, STAGES, GROUPS, GATED, SCALES, BIAS, ADD, TILES)),
                (_load_operands, (operands, pointers, sizes, STAGES, GROUPS, GATED, SCALES, BIAS, ADD, TILES)),
            ],
            [4, 1],
            [232, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_group_0, (operands, pointers, sizes, STAGES, GROUPS, GATED, SCALES, BIAS, ADD, TILES)),
                (_group_1, (operands, pointers, sizes, STAGES, GROUPS, GATED, SCALES, BIAS, ADD, TILES)),
                (_group_2, (operands, pointers, sizes, STAGES, GROUPS, GATED, SCALES, BIAS, ADD, TILES)),
                (_load_operands, (operands, pointers, sizes, STAGES, GROUPS, GATED, SCALES, BIAS, ADD, TILES)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


def num_groups(num_tokens: int) -> int:
    """Return the number of warpgroups that compute, of 64 tokens each: the one that wastes less, or else three."""
    return 2 if ceil_div(num_tokens, 128) * 128 < ceil_div(num_tokens, 192) * 192 else 3


def specialized_gemm_gluon(
    x: QuantizedRows,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    groups: int | None = None,
) -> torch.Tensor:
    """Compute `scaled_gemm_triton` on Hopper.

    Args:
        scale: for blocks or for rows, see `scale_layout`.
        groups: 2 or 3 warpgroups that compute; `num_groups` if None.
    """
    (m, k), n = x.values.shape, len(weight) // (2 if gated else 1)
    out = torch.empty((m, n), dtype=dtype, device=weight.device) if residual is None else residual
    groups = groups or num_groups(m)
    layout = gl.NVMMASharedLayout.get_default_for([64, 128], gl.float8e4nv)
    num_tiles = ceil_div(m, 64 * groups) * ceil_div(n, 64 if gated else 128)
    _specialized_gemm_kernel[(min(num_tiles, sm_count(weight.device)),)](
        GluonDescriptor.from_tensor(x.values, [64, 128], layout),
        GluonDescriptor.from_tensor(weight, [64, 128], layout),
        x.scales,
        scale,
        out if bias is None else bias,
        out,
        m,
        n,
        k,
        x.scales.stride(1),
        STAGES=6 if groups == 2 else 5,
        GROUPS=groups,
        GATED=gated,
        SCALES=scale_layout(weight, scale),
        BIAS=bias is not None,
        ADD=residual is not None,
        TILES=GROUP_TILES,
        num_warps=4,
        maxnreg=168 if groups == 2 else 128,
        **launch_options(weight.device),
    )
    return out
