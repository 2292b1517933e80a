"""Triton's interpreter accepts code that its compiler rejects, so every kernel is also compiled for an H100.

This needs no GPU.
"""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from nanovllm.ops import triton_utils
from nanovllm.ops.triton_utils import HAVE_TRITON, compile_without_launch, triton

pytestmark = pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed")

SCRIPT = """
import importlib
import pkgutil
import threading
from types import SimpleNamespace
import torch
from tests.kernels.compile_for_hopper import compiled, triton
from nanovllm.ops.attention import decode_attention as decode, prefill_attention as prefill
from nanovllm.ops.triton_utils import compile_in_parallel, compile_without_launch
from nanovllm.ops.attention import decode_plan, paged_cache, rope_decode, shared_prefix
from nanovllm.ops.comm import collectives, overlapped_all_reduce, peer_memory
from nanovllm.ops.fp8 import experts as fp8_experts, linear as fp8_linear
from nanovllm.ops.gdn import gated_delta_net, inputs as gdn_inputs, plan as gdn_plan, prompt as gdn_prompt
from nanovllm.ops.inputs import embedding, step_inputs, step_rows
from nanovllm.ops.linear import gemm, gemv, sigmoid_mul, silu_mul, swiglu
from nanovllm.ops.moe import alignment, expert_gemv, experts, router
from nanovllm.ops.moe.dispatch import FP8_TILINGS, TILINGS
from nanovllm.ops.norm_rope import qk_transform, rms_norm, rope_store
from nanovllm.ops.sampling import sampling, state as sampling_state
from nanovllm.ops.state import copy_slots, rows as state_rows

def call_all():
    bf16, i32, i64 = (dict(dtype=getattr(torch, name)) for name in ("bfloat16", "int32", "int64"))
    x, weight = torch.zeros(4, 256, **bf16), torch.zeros(256, **bf16)
    for residual in (None, x):
        for norm in (weight, weight.float()):
            rms_norm.rms_norm_triton(x, norm, 1e-6, residual)
    embedding.embedding_triton(torch.zeros(4, **i64), x)
    silu_mul.silu_mul_triton(x)
    sigmoid_mul.sigmoid_mul_triton(x[:, :128].contiguous(), x[:, 128:])
    wide = torch.zeros(512, 256, **bf16)
    for options in (dict(norm=(weight, 1e-6), gated=True), dict(bias=weight, residual=torch.zeros(4, 512, **bf16))):
        gemv.gemv_triton(x, wide, **options)
    swiglu.swiglu_triton(x, wide)
    for rows, gated in ((5, True), (64, False)):
        gemm.gemm_triton(torch.zeros(rows, 256, **bf16), wide, gated=gated)
    deep, residual = torch.zeros(8, 2048, **bf16), torch.zeros(8, 512, **bf16)
    counters = torch.zeros(gemm.MAX_TILES, **i32)
    gemm.gemm_triton(deep, torch.zeros(512, 2048, **bf16), residual[0], residual=residual, counters=counters)
    for tokens in (1, 300, 2000):
        ids, routing = router.route_triton(torch.zeros(tokens, 16, **bf16), 4, True, torch.bfloat16)
        gate_up, down = torch.zeros(16, 256, 256, **bf16), torch.zeros(16, 256, 128, **bf16)
        operands = torch.zeros(tokens, 256, **bf16), gate_up, down, ids, routing
        shared = operands[0], operands[0][:, :1]
        for residual in (None, operands[0]):
            experts.experts_gemv_triton(*operands, (weight, 1e-6), residual, shared)
            for tiling in TILINGS[::2]:
                experts.experts_gemm_triton(*operands, residual, shared, tiling)
    fp8, many = dict(dtype=torch.float8_e4m3fn), torch.zeros(300, 2048, **bf16)
    ids, routing = torch.zeros(300, 4, **i32), torch.zeros(300, 4, **bf16)
    for kind, scales in enumerate(((2, 16), (256, 16), (256, 1))):  # for blocks, parts of rows, and rows
        matrix, scales = torch.zeros(256, 2048, **fp8), torch.zeros(scales)
        for gated in (False, True)[: 1 if kind else 2]:
            gemv.gemv_triton(many[:4], matrix, norm=(many[0], 1e-6), gated=gated, scale=scales)
            for tokens in (2, 300)[: 1 if kind else 2]:
                fp8_linear.linear_fp8(many[:tokens], matrix, scales, norm=(many[0], 1e-6), gated=gated)
        fp8_linear.linear_add_fp8(many[:70], matrix, scales, many[0, :256], many[:70, :256].contiguous(), counters)
        gate_up = torch.zeros(4, 256, 2048, **fp8), scales.expand(4, -1, -1).contiguous()
        down = torch.zeros(4, 2048, 128, **fp8), torch.zeros(4, 2048 if kind else 16, 1)
        for tiling in FP8_TILINGS[:1] if kind else FP8_TILINGS[::3]:
            fp8_experts.expert_pairs_fp8(many, gate_up, down, ids, routing, norm=(many[0], 1e-6), tiling=tiling)
        hidden = expert_gemv.gate_up_gemv_triton(many[:4], gate_up[0], ids[:4], scale=gate_up[1])
        expert_gemv.down_gemv_triton(hidden, down[0], ids[:4], routing[:4], scale=down[1])
    slots, lens, tables = torch.zeros(4, **i32), torch.ones(4, **i32), torch.zeros(5, 8, **i32)
    state = sampling_state.SamplingState(sampling_state.default_params(5), 5000, torch.device("cpu"))
    for rows in (step_rows.StepRows(slots), step_rows.StepRows.split(torch.zeros(100, **i32), 4, 20)):
        step_inputs.step_inputs_triton(rows, torch.zeros(5, **i64), torch.zeros(5, **i32), tables, 64, 4, state)
    peers = peer_memory.PeerMemory(0, [peer_memory.new_peer_memory(2, torch.device("cpu"))] * 2)
    norms = (None, (weight, 1e-6), (weight.float(), 1e-6))
    for dtype, norm in (*((torch.bfloat16, norm) for norm in norms), (torch.float32, None)):
        for residual in (None, torch.zeros(4, 256, dtype=dtype)):
            collectives.all_reduce_triton(torch.zeros(4, 256, dtype=dtype), peers, norm, residual)
    for rank in range(2):
        peers.rank = rank
        gemv.gemv_triton(x, wide, residual=torch.zeros(4, 512, **bf16), peers=peers)
    collectives.all_to_all_triton(x, peers)
    inbox = torch.zeros(overlapped_all_reduce.inbox_words(1 << 24), **i32)
    overlapped = overlapped_all_reduce.OverlappedAllReduce(inbox, 0, peers.host_stop, peers.device_stop)
    for norm in norms:
        overlapped.finish(torch.zeros(300, 256, **bf16), norm)
    progress = torch.zeros(5, **i64), torch.zeros(5, **i32), 4
    for advances in (None, progress):
        tokens = sampling.sample_triton(torch.zeros(4, 5000, **bf16), slots, lens, state, advances)
    sampling.advance_slots_triton(tokens, slots, lens, *progress)
    rows = paged_cache.PagedRows(tables, slots, lens)
    plan = decode_plan.plan_decode_triton(lens, 8, decode_plan.default_split_policy(4, 8, 132))
    kinds = [(4, 128, "bfloat16", False), (4, 128, "bfloat16", True)]  # these are compiled with all options
    kinds += [(4, 256, "bfloat16", False), (3, 64, "bfloat16", False), (1, 96, "float32", False)]
    for group, head_dim, dtype, fp8 in kinds:
        kind, has_all = dict(dtype=getattr(torch, dtype)), (group, head_dim) == (4, 128)
        q, cache = torch.zeros(4, 8 * group, head_dim, **kind), torch.zeros(9, 64, 8, head_dim, **kind)
        scales = None
        if fp8:
            cache, scales = cache.to(torch.float8_e4m3fn), torch.zeros(9, 8, 64, 2, dtype=torch.float16)
        kv, windowed = (paged_cache.PagedKV(cache, cache, window, scales) for window in (0, 100))
        qkv, table = torch.zeros(4, 8 * (group + 2) * head_dim, **kind), torch.zeros(99, head_dim)
        norm = torch.zeros(head_dim, **kind)
        variants = [((norm, norm), 16, kv)]
        if has_all:  # norms, splits, cache
            variants = [((norm, norm), 1, kv), ((norm.float(), norm.float()), 16, windowed), ((None, None), 16, kv)]
        for norms, splits, caches in variants[: 2 if fp8 else 3]:
            query_scale = table[:, 0] if norms[0] is None else None
            transform = qk_transform.QKTransform(8 * group, table, *norms, 1e-6, query_scale)
            rope_store.qk_norm_rope_store_triton(qkv, transform, lens.long(), lens.long(), kv)
            config = rope_decode.default_rope_decode_config(4, 8, head_dim, kind["dtype"].itemsize, 132)
            config = config._replace(num_splits=splits)
            rope_decode.rope_decode_triton(qkv, transform, caches, rows, 0.1, config=config)
        shared = shared_prefix.SharedPrefixPlan(torch.zeros(4, 2, **i32), torch.zeros(1, 4, **i32))
        prefix = shared_prefix.shared_attention_triton(q, kv, rows, 0.1, shared, plan.num_splits)
        decode.decode_attention_triton(q, kv, rows, 0.1, plan=plan, prefix=prefix)
        few, many = (decode_plan.default_decode_config(n, 8, head_dim, cache.itemsize, 132) for n in (4, 400))
        if fp8:
            few = many = None
        if group != 3:
            decode.decode_attention_triton(q, kv, rows, 0.1, plan=plan._replace(config=few))
        if group == 4:
            decode.decode_attention_triton(q, windowed, rows, 0.1, plan=plan._replace(config=many))
        prefill.prefill_attention_triton(q, windowed if has_all else kv, rows[:1], tables[0, :2], 0.1)
        if has_all:  # with heads of 256 these tiles have too few registers
            small = prefill.PrefillConfig(128, 64, 8, 2, 128, True)
            prefill.prefill_attention_triton(q, kv, rows[:1], tables[0, :2], 0.1, config=small)
    for k_heads, heads, dim, dtype in ((2, 4, 128, "bfloat16"), (1, 3, 16, "float32")):
        kind, channels = dict(dtype=getattr(torch, dtype)), (2 * k_heads + heads) * dim
        tokens = torch.zeros(200, channels + heads * (dim + 2), **kind).split([channels, heads * dim, heads, heads], 1)
        gates, norm = torch.zeros(heads), torch.zeros(dim, **kind)
        weights = gdn_inputs.GdnWeights(torch.zeros(channels, 4, **kind), gates, gates, norm, 1e-6)
        tokens = gdn_inputs.GdnInputs(*tokens)
        pools = gdn_inputs.GdnState(torch.zeros(5, heads, dim, dim), torch.zeros(5, 4, channels, **kind))
        cu_seqlens = torch.zeros(5, **i32)
        rows = state_rows.StateRows(slots, lens, cu_seqlens, gdn_plan.prompt_plan_triton(cu_seqlens, 200, 2))
        gated_delta_net.gated_delta_net_triton(tokens, weights, pools, rows)
        config = gdn_prompt.GdnPromptConfig(slices=2)
        gdn_prompt.gdn_prompt_triton(tokens, weights, pools, rows, torch.zeros(200, heads * dim, **kind), config)
        copy_slots.copy_slots_triton(pools.conv[None], slots[:2], slots[2:])
        few = gdn_inputs.GdnInputs(*(x[:4] for x in tokens))
        gated_delta_net.gated_delta_net_triton(few, weights, pools, state_rows.StateRows(slots, lens))

loaders = []  # threads that loaded a kernel, which needs its launcher
driver = triton.runtime.driver.active
driver.launcher_cls = lambda src, metadata: src
driver.utils = SimpleNamespace(
    get_device_properties=lambda device: {"max_shared_mem": 232448},
    load_binary=lambda *args: loaders.append(threading.current_thread()) or (1, 1, 0, 0, 1024),
    unload_module=lambda module: None,
)
with compile_in_parallel(), compile_without_launch():
    call_all()
import nanovllm.ops
modules = [importlib.import_module(info.name) for info in pkgutil.walk_packages(nanovllm.ops.__path__, "nanovllm.ops.")]
defined = {name for module in modules for name, value in vars(module).items() if isinstance(value, triton.JITFunction)}
names = {name for name, _ in compiled}
assert names == {name for name in defined if name.endswith("_kernel")}, names
kernels = {future.kernel for _, future in compiled}
assert all(kernel.asm["cubin"] for kernel in kernels)
fp8_decode = {future.kernel.asm["ptx"] for name, future in compiled if name == "_decode_kernel"}
fp8_decode = [ptx for ptx in fp8_decode if "e4m3" in ptx]
loops = [max(ptx.split("$L__BB"), key=lambda block: block.count("mma.sync")) for ptx in fp8_decode]
moves = [(loop.count("shfl.sync"), loop.count("st.shared")) for loop in loops]
assert moves and all(shuffles <= 16 and stores <= 8 for shuffles, stores in moves), moves  # see fp8_decode.py
adds = {future.kernel for name, future in compiled if name == "_add_kernel"}
assert adds and not any("atom" in kernel.asm["ptx"] for kernel in adds)  # atomic adds of 0 must compile to loads
assert len(loaders) == len(kernels) and threading.main_thread() not in loaders
"""


def test_every_kernel_compiles_for_an_h100():
    environment = dict(os.environ, TRITON_INTERPRET="0", TRITON_DISABLE_LINE_INFO="1")  # line numbers take time
    result = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize(("kernel", "message"), [("decode", "no CUDA GPU"), ("other", "got 'other'")])
def test_tune_names_a_missing_gpu_and_an_unknown_kernel(kernel, message):
    command = [sys.executable, "-m", "benchmarks.tune", kernel]
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="")
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and message in result.stderr


def test_a_kernel_keeps_its_launcher_while_other_threads_load_theirs(monkeypatch):
    """Triton 3.6 has one module name for all launchers, so Python may write two of them into one module."""
    shared, one_at_a_time = SimpleNamespace(), threading.Lock()

    def load(name, path):
        assert one_at_a_time.acquire(blocking=False), "two threads load a launcher at once"
        shared.launch = path
        time.sleep(0.001)  # other threads run
        one_at_a_time.release()
        return shared

    monkeypatch.setattr(triton.runtime.build, "_load_module_from_path", load)
    monkeypatch.setattr(triton_utils, "TRITON_VERSION", (3, 6))
    triton_utils._load_launchers_one_by_one.__wrapped__()
    paths = [str(i) for i in range(64)]
    with ThreadPoolExecutor(16) as threads:
        loaded = list(threads.map(lambda path: triton.runtime.build._load_module_from_path("launcher", path), paths))
    assert [module.launch for module in loaded] == paths


def test_kernels_of_other_threads_launch_while_one_thread_only_compiles(monkeypatch):
    """Starting an engine must not stop the kernels of another engine in another thread."""
    calls = []
    monkeypatch.setattr(triton.JITFunction, "run", lambda self, warmup: calls.append(warmup))
    with ThreadPoolExecutor(1) as other, compile_without_launch():
        for submit in (lambda call: call(), lambda call: other.submit(call).result()):
            submit(lambda: triton.JITFunction.run(None, warmup=False))
        assert other.submit(torch.empty, 2, memory_format=torch.contiguous_format).result().shape == (2,)
    triton.JITFunction.run(None, warmup=False)
    assert calls == [True, False, False]
