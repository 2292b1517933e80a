"""vLLM's names of engine options: those that have another name here, and those that are not here.

Code that was written for vLLM may give an option of the second kind if its value changes nothing. Other values are
refused, so that no option is accepted and ignored.
"""

from collections.abc import Mapping
from typing import Any

from nanovllm.checks import shown

# ruff: noqa: SIM905  (long lists of names are plainer as text)

RENAMED = {"block_size": "kvcache_block_size", "num_gpu_blocks_override": "num_kvcache_blocks"}

_UNSET = """
    allowed_media_domains code_revision collect_detailed_traces cpu_distributed_timeout_seconds
    cudagraph_capture_sizes data_parallel_address data_parallel_rank data_parallel_rpc_port data_parallel_size_local
    data_parallel_start_rank default_mm_loras device_ids disable_hybrid_kv_cache_manager
    disable_nccl_for_dp_synchronization distributed_timeout_seconds ec_transfer_config enable_batch_sharded_sampling
    enable_bf16x3_router_gemm enable_flashinfer_autotune gdn_prefill_backend hf_config_path io_processor_plugin
    kda_prefill_backend kv_cache_memory_bytes kv_events_config kv_offloading_size kv_transfer_config logits_processors
    lora_target_modules mamba_block_size mamba_ssu_algorithm max_cpu_loras max_cudagraph_capture_size
    max_num_queued_reqs max_num_queued_tokens max_num_scheduled_tokens max_parallel_loading_workers
    mm_device_do_normalize mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_path
    mm_encoder_fp8_scale_save_margin mm_encoder_fp8_scale_save_path mm_hasher_algorithm mm_ipc_gpu_memory_gb
    mm_processor_cache_type numa_bind_cpus numa_bind_nodes otlp_traces_endpoint override_pooler_config pooler_config
    prefix_cache_retention_interval prefix_match_unit quantization reasoning_parser_plugin rope_scaling rope_theta
    scheduler_cls served_model_name show_hidden_metrics_for_version spec_method spec_model spec_tokens
    tokenizer_revision video_pruning_method video_pruning_rate weight_transfer_config
""".split()
_OFF = """
    aggregate_engine_logging allow_deprecated_quantization calculate_kv_scales cudagraph_metrics
    data_parallel_external_lb data_parallel_hybrid_lb data_parallel_multi_port_external_lb dcp_q_replicate
    disable_async_output_proc disable_cascade_attn disable_chunked_mm_input disable_custom_all_reduce
    disable_sliding_window enable_cumem_allocator enable_dbo enable_elastic_ep enable_ep_weight_filter enable_eplb
    enable_expert_parallel enable_fault_tolerance enable_layerwise_nvtx_tracing enable_log_requests
    enable_logging_iteration_details enable_lora enable_mamba_cache_stochastic_rounding enable_mfu_metrics
    enable_mixed_moe_lora_format enable_mm_embeds enable_mm_processor_stats enable_moe_shared_loras
    enable_nccl_comm_suspend enable_prompt_embeds enable_return_routed_experts enable_tower_connector_lora
    enable_trace_replay fail_on_environ_validation fully_sharded_loras interleave_mm_strings jit_monitor_verbose
    kv_cache_metrics kv_sharing_fast_prefill language_model_only mm_encoder_only numa_bind ray_workers_use_nsight
    skip_mm_profiling specialize_active_lora tokens_only trust_remote_code use_fp64_gumbel use_replayssm
""".split()
# Dicts, lists and texts.
_EMPTY = """
    additional_config allowed_local_media_path attention_config compilation_config cpu_offload_params diffusion_config
    ec_manager_config eplb_config fault_tolerance_config hf_overrides ignore_patterns kernel_config
    kv_cache_dtype_skip_layers limit_mm_per_prompt logits_processor_pattern mamba_config media_io_kwargs
    mm_processor_kwargs model_class_overrides model_loader_extra_config model_weights offload_params
    override_generation_config profiler_config quantization_config reasoning_config reasoning_parser
    speculative_config structured_outputs_config worker_extension_cls
""".split()
_ONE = """
    cp_kv_cache_interleave_size data_parallel_size dcp_kv_cache_interleave_size decode_context_parallel_size
    dp_sync_interval max_loras nnodes num_scheduler_steps pipeline_parallel_size prefill_context_parallel_size
    prefill_schedule_interval renderer_num_workers stream_interval
""".split()

# The values of each option that change nothing, besides None.
NEUTRAL: dict[str, tuple] = {
    **dict.fromkeys(_UNSET, ()),
    **dict.fromkeys(_OFF, (False,)),
    **dict.fromkeys(_EMPTY, ({}, [], set(), "")),
    **dict.fromkeys(_ONE, (1,)),
    # What they ask for is always so.
    "disable_log_stats": (True, False),
    "disable_log_requests": (True,),
    "enable_chunked_prefill": (True,),
    "enable_sleep_mode": (True, False),
    "use_tqdm_on_load": (True,),
    "use_v2_block_manager": (True,),
    "scheduler_reserve_full_isl": (True, False),
    # vLLM's defaults.
    "all2all_backend": ("allgather_reducescatter",),
    "async_scheduling": (True,),
    "config_format": ("auto", "hf"),
    "convert": ("auto", "none"),
    "cpu_offload_gb": (0,),
    "data_parallel_backend": ("mp",),
    "dbo_decode_token_threshold": (32,),
    "dbo_prefill_token_threshold": (512,),
    "dcp_comm_backend": ("ag_rs",),
    "expert_placement_strategy": ("linear",),
    "generation_config": ("auto",),
    "guided_decoding_backend": ("auto", "guidance"),
    "hf_token": (True,),
    "jit_monitor_mode": ("warn",),
    "kv_cache_dtype": ("auto",),
    "kv_cache_metrics_sample": (0.01,),
    "kv_offloading_backend": ("native",),
    "linear_backend": ("auto",),
    "long_prefill_token_threshold": (0,),
    "lora_dtype": ("auto",),
    "mamba_backend": ("triton",),
    "mamba_cache_dtype": ("auto",),
    "mamba_cache_mode": ("none",),
    "mamba_cache_philox_rounds": (0,),
    "mamba_ssm_cache_dtype": ("auto",),
    "master_addr": ("127.0.0.1",),
    "master_port": (29501,),
    "max_lora_rank": (16,),
    "max_seq_len_to_capture": (8192,),
    "mm_encoder_tp_mode": ("weights",),
    "mm_processor_cache_gb": (4,),
    "mm_processor_device": ("auto",),
    "mm_shm_cache_max_object_size_mb": (128,),
    "mm_tensor_ipc": ("direct_rpc",),
    "model_impl": ("auto", "vllm"),
    "moe_backend": ("auto",),
    "node_rank": (0,),
    "offload_backend": ("auto",),
    "offload_group_size": (0,),
    "offload_num_in_group": (1,),
    "offload_prefetch_step": (1,),
    "optimization_level": (2,),
    "per_request_spec_decode_metrics": ("none",),
    "performance_mode": ("balanced",),
    "prefix_caching_hash_algo": ("sha256",),
    "pt_load_map_location": ("cpu",),
    "replayssm_buffer_len": (16,),
    "runner": ("auto", "generate"),
    "safetensors_load_strategy": ("lazy",),
    "scheduling_policy": ("fcfs",),
    "shutdown_timeout": (0,),
    "swap_space": (0, 4),
    "task": ("auto", "generate"),
    "tokenizer_mode": ("auto", "hf"),
    "ubatch_size": (0,),
    "watermark": (0.0,),
    "worker_cls": ("auto",),
}
# What to use instead.
_INSTEAD = {
    "async_scheduling": "overlap=0 finishes each step before the next",
    "enable_lora": "merge the adapter and call update_weights",
    "generation_config": "give SamplingParams",
    "hf_token": "set HF_TOKEN",
    "override_generation_config": "give SamplingParams",
    "quantization": "a .gguf file is read as it is",
    "trust_remote_code": "code of a model's folder is never run",
    "worker_extension_cls": "start_weight_update, load_weights and finish_weight_update reach all ranks",
}


def translate(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return engine options by their names here, without those of `NEUTRAL`.

    Raises:
        ValueError: an option is not here and its value is not neutral, or an option is given under two names.
    """
    own: dict[str, Any] = {}
    for name, value in options.items():
        if name in NEUTRAL:
            _check_neutral(name, value)
        elif value is not None:
            own_name = RENAMED.get(name, name)
            if own_name in own:
                names = " and ".join(key for key in options if RENAMED.get(key, key) == own_name)
                raise ValueError(f"{names} are the same option; give one of them")
            own[own_name] = value
    return own


def _check_neutral(name: str, value: Any) -> None:
    neutral = NEUTRAL[name]
    if value is None or any(type(value) is type(other) and value == other for other in neutral):
        return
    # Numbers of another type, and subclasses such as enumerations.
    if isinstance(value, str | int | float) and not isinstance(value, bool) and value in neutral:
        return
    right = " or ".join(map(repr, (None, *neutral)))
    instead = f"; {_INSTEAD[name]}" if name in _INSTEAD else ""
    raise ValueError(f"{name} is an option of vLLM and must be {right} here, got {shown(value)}{instead}")
