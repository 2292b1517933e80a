"""Operations on the GPU, one folder each: Triton kernels, the host functions that launch them, and plain torch.

    attention/   paged decode and prefill attention, shared prefixes, RoPE fused with decode
    gdn/         Gated DeltaNet: the convolution, its recurrence for prompts and for decode rows, the gated norm
    state/       the rows of a step in layers with recurrent state, and copies of slots
    linear/      GEMV and GEMM for small batches, SwiGLU, and which one runs
    fp8/         FP8 weights: quantized activations, linear layers, experts
    moe/         mixtures of experts: router, grouped GEMM for many tokens, GEMV for a few
    norm_rope/   RMSNorm; RoPE with norm and cache write
    sampling/    sampling, its parameters on the device, log-probabilities
    inputs/      the inputs of a step, token embedding
    comm/        all-reduce and all-to-all through memory that ranks map from each other

`reference.py` in a folder holds the plain torch function of each kernel, `<name>_torch`. Tests compare the two at odd
shapes. Where a CPU has no better way, `<name>` runs the reference on a CPU and `<name>_triton` on a GPU.

Files do not import each other in circles, but folders may: norm_rope writes to the caches of attention, and the
grouped GEMM of moe reads tokens that fp8 has quantized. Nothing here imports the engine, the layers or `distributed`.

**Shapes** in docstrings: T tokens, B sequences (one query token each in decode), H query heads, K KV heads,
Dh head_dim, V vocabulary. A *split* is a part of one sequence's context, or of K in a GEMM, with a program of its own.

**Types.** Modules import `triton` and `tl` from `triton_utils`, where a type checker sees them as Any: it checks host
functions, and kernels only as Python. A file whose kernels bind names under compile-time conditions says so in its
first line.
"""
