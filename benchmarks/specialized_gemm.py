"""Experiment: the block-scaled GEMM with a producer warp and three consumer warpgroups, in Gluon."""

import torch
import triton
from nanovllm.ops.triton_utils import wait_for_inputs
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


_load_async = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # Triton 3.6


@gluon.jit
def _position(tile, M, N, WIDTH: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr):
    tiles_m = gl.cdiv(M, 64 * GROUPS)
    tiles_n = gl.cdiv(N, WIDTH)
    start = tile // (GROUP * tiles_n) * GROUP
    height = min(GROUP, tiles_m - start)
    within = tile % (GROUP * tiles_n)
    return (start + within % height) * 64 * GROUPS, within // height * WIDTH


@gluon.jit
def _produce(
    descs, bufs, bars, ptrs, sizes, STAGES: gl.constexpr, GROUPS: gl.constexpr, GATED: gl.constexpr, ADD: gl.constexpr
):
    x_desc, w_desc = descs
    x_bufs, w_bufs = bufs
    full, empty = bars
    M, N, K, x_scale_stride = sizes
    WIDTH: gl.constexpr = 64 if GATED else 128
    second = N if GATED else 64
    blocks = gl.cdiv(K, 128)
    tiles = gl.cdiv(M, 64 * GROUPS) * gl.cdiv(N, WIDTH)
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, n = _position(tile, M, N, WIDTH, 8, GROUPS)
        for block in range(blocks):
            stage = step % STAGES
            phase = step // STAGES & 1
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.expect(bar, (GROUPS * 64 + 128) * 128)
            k = block * 128
            weight = w_bufs.index(stage)
            _load_async(w_desc, [n, k], bar, weight.slice(0, 64))
            _load_async(w_desc, [n + second, k], bar, weight.slice(64, 64))
            for i in gl.static_range(GROUPS):
                _load_async(x_desc, [m + 64 * i, k], bar, x_bufs.index(GROUPS * stage + i))
            step += 1


@gluon.jit
def _store(y, out_ptr, rows, columns, M, N, ADD: gl.constexpr):
    pointers = out_ptr + rows.to(gl.int64)[:, None] * N + columns[None, :]
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    if ADD:
        y += gl.load(pointers, mask=mask, other=0.0).to(gl.float32)
    gl.store(pointers, y.to(out_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def _halves(y):
    return y.reshape([64, 2, 64]).permute([0, 2, 1]).split()


@gluon.jit
def _consume(
    WG: gl.constexpr,
    bufs,
    bars,
    ptrs,
    sizes,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
    GATED: gl.constexpr,
    ADD: gl.constexpr,
):
    x_bufs, w_bufs = bufs
    full, empty = bars
    x_scale_ptr, w_scale_ptr, out_ptr = ptrs
    M, N, K, x_scale_stride = sizes
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    WIDTH: gl.constexpr = 64 if GATED else 128
    blocks = gl.cdiv(K, 128)
    tiles = gl.cdiv(M, 64 * GROUPS) * gl.cdiv(N, WIDTH)
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, n = _position(tile, M, N, WIDTH, 8, GROUPS)
        rows = m + 64 * WG + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
        x_scale_ptrs = x_scale_ptr + gl.minimum(rows, M - 1)
        scales = w_scale_ptr + n // 128 * blocks
        up_scales = w_scale_ptr + (n + N) // 128 * blocks
        zero = gl.zeros([64, 128], gl.float32, layout=layout)
        if GATED:
            gate, up = _halves(zero)
        else:
            y = zero
        x_scale = gl.load(x_scale_ptrs)
        w_scale = gl.load(scales)
        if GATED:
            up_scale = gl.load(up_scales)
        for block in range(blocks):
            stage = step % STAGES
            phase = step // STAGES & 1
            following = min(block + 1, blocks - 1)
            next_x = gl.load(x_scale_ptrs + following * x_scale_stride)
            next_w = gl.load(scales + following)
            if GATED:
                next_up = gl.load(up_scales + following)
            mbarrier.wait(full.index(stage), phase)
            partial = warpgroup_mma(
                x_bufs.index(GROUPS * stage + WG),
                w_bufs.index(stage).permute([1, 0]),
                zero,
                use_acc=False,
                is_async=True,
            )
            partial = warpgroup_mma_wait(0, deps=[partial])
            mbarrier.arrive(empty.index(stage), count=1)
            if GATED:
                first, other = _halves(partial)
                gate += first * gl.convert_layout((x_scale * w_scale)[:, None], first.type.layout, assert_trivial=False)
                up += other * gl.convert_layout((x_scale * up_scale)[:, None], first.type.layout, assert_trivial=False)
                up_scale = next_up
            else:
                y += partial * (x_scale * w_scale)[:, None]
            x_scale = next_x
            w_scale = next_w
            step += 1
        if GATED:
            y = gate / (1 + gl.exp(-gate)) * up
            out_layout: gl.constexpr = y.type.layout
            rows = m + 64 * WG + gl.arange(0, 64, layout=gl.SliceLayout(1, out_layout))
            columns = n + gl.arange(0, 64, layout=gl.SliceLayout(0, out_layout))
            _store(y, out_ptr, rows, columns, M, N, ADD)
        else:
            columns = n + gl.arange(0, 128, layout=gl.SliceLayout(0, layout))
            _store(y, out_ptr, rows, columns, M, N, ADD)


@gluon.jit
def _consume_0(
    descs, bufs, bars, ptrs, sizes, STAGES: gl.constexpr, GROUPS: gl.constexpr, GATED: gl.constexpr, ADD: gl.constexpr
):
    _consume(0, bufs, bars, ptrs, sizes, STAGES, GROUPS, GATED, ADD)


@gluon.jit
def _consume_1(
    descs, bufs, bars, ptrs, sizes, STAGES: gl.constexpr, GROUPS: gl.constexpr, GATED: gl.constexpr, ADD: gl.constexpr
):
    _consume(1, bufs, bars, ptrs, sizes, STAGES, GROUPS, GATED, ADD)


@gluon.jit
def _consume_2(
    descs, bufs, bars, ptrs, sizes, STAGES: gl.constexpr, GROUPS: gl.constexpr, GATED: gl.constexpr, ADD: gl.constexpr
):
    _consume(2, bufs, bars, ptrs, sizes, STAGES, GROUPS, GATED, ADD)


@gluon.jit(do_not_specialize=["M", "x_scale_stride"])
def specialized_kernel(
    x_desc,
    w_desc,
    x_scale_ptr,
    w_scale_ptr,
    out_ptr,
    M,
    N,
    K,
    x_scale_stride,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
    GATED: gl.constexpr,
    ADD: gl.constexpr,
    PDL: gl.constexpr,
):
    x_bufs = gl.allocate_shared_memory(x_desc.dtype, [GROUPS * STAGES, 64, 128], x_desc.layout)
    w_bufs = gl.allocate_shared_memory(w_desc.dtype, [STAGES, 128, 128], w_desc.layout)
    wait_for_inputs(PDL)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    descs = (x_desc, w_desc)
    bufs = (x_bufs, w_bufs)
    bars = (full, empty)
    ptrs = (x_scale_ptr, w_scale_ptr, out_ptr)
    sizes = (M, N, K, x_scale_stride)
    if GROUPS == 3:
        gl.warp_specialize(
            [
                (_consume_0, (descs, bufs, bars, ptrs, sizes, STAGES, GROUPS, GATED, ADD)),
                (_consume_1, (descs, bufs, bars, ptrs, sizes, STAGES, GROUPS, GATED, ADD)),
                (_consume_2, (descs, bufs, bars, ptrs, sizes, STAGES, GROUPS, GATED, ADD)),
                (_produce, (descs, bufs, bars, ptrs, sizes, STAGES, GROUPS, GATED, ADD)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume_0, (descs, bufs, bars, ptrs, sizes, STAGES, GROUPS, GATED, ADD)),
                (_consume_1, (descs, bufs, bars, ptrs, sizes, STAGES, GROUPS, GATED, ADD)),
                (_produce, (descs, bufs, bars, ptrs, sizes, STAGES, GROUPS, GATED, ADD)),
            ],
            [4, 1],
            [208, 24],
        )


def specialized_gemm(x, weight, scale, gated=False, residual=None, dtype=torch.bfloat16, groups=3, programs=132):
    (m, k), n = x.values.shape, len(weight) // (2 if gated else 1)
    out = torch.empty((m, n), dtype=dtype, device=weight.device) if residual is None else residual
    layout = gl.NVMMASharedLayout.get_default_for([64, 128], gl.float8e4nv)
    stages = 5 if groups == 3 else 6
    tiles = triton.cdiv(m, 64 * groups) * triton.cdiv(n, 64 if gated else 128)
    specialized_kernel[(min(tiles, programs),)](
        TensorDescriptor.from_tensor(x.values, [64, 128], layout),
        TensorDescriptor.from_tensor(weight, [64, 128], layout),
        x.scales,
        scale,
        out,
        m,
        n,
        k,
        x.scales.stride(1),
        STAGES=stages,
        GROUPS=groups,
        GATED=gated,
        ADD=residual is not None,
        num_warps=4,
        maxnreg=128 if groups == 3 else 168,
        PDL=True,
        launch_pdl=True,
    )
    return out
