"""vLLM's names of options and arguments: those that have another name here, and those that are not here.

Code that was written for vLLM may give one of the second kind if its value changes nothing. Other values are refused,
so that nothing is accepted and ignored.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

from nanovllm.checks import is_list, length, shown

T = TypeVar("T")

# ruff: noqa: SIM905  (long lists of names are plainer as text)

RENAMED = {"block_size": "kvcache_block_size", "num_gpu_blocks_override": "num_kvcache_blocks"}

_UNSET = """
    allowed_media_domains chat_template code_revision collect_detailed_traces cpu_distributed_timeout_seconds
    cudagraph_capture_sizes custom_histogram_buckets data_parallel_address data_parallel_rank data_parallel_rpc_port
    data_parallel_size_local data_parallel_start_rank default_mm_loras device_ids disable_hybrid_kv_cache_manager
    disable_nccl_for_dp_synchronization distributed_timeout_seconds ec_transfer_config elastic_ep_max_dp_size
    enable_batch_sharded_sampling enable_bf16x3_router_gemm enable_flashinfer_autotune gdn_prefill_backend
    hf_config_path io_processor_plugin kda_decode_backend kda_prefill_backend kv_cache_memory_bytes kv_events_config
    kv_offloading_size kv_transfer_config log_config_file log_level logits_processors lora_target_modules
    mamba_block_size mamba_ssu_algorithm max_cpu_loras max_cudagraph_capture_size max_lora_cls_labels
    max_num_active_seqs max_num_queued_reqs max_num_queued_tokens max_num_scheduled_tokens max_parallel_loading_workers
    mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_path
    numa_bind_cpus numa_bind_nodes otlp_traces_endpoint override_attention_dtype override_pooler_config pooler_config
    prefix_match_unit reasoning_parser_plugin rope_scaling rope_theta scheduler_cls served_model_name
    show_hidden_metrics_for_version spec_method spec_model spec_tokens tokenizer_revision video_pruning_rate
    weight_transfer_config
""".split()
_OFF = """
    aggregate_engine_logging allow_deprecated_quantization calculate_kv_scales cudagraph_metrics
    data_parallel_external_lb data_parallel_hybrid_lb data_parallel_multi_port_external_lb dcp_q_replicate
    disable_async_output_proc disable_chunked_mm_input disable_custom_all_reduce disable_sliding_window
    enable_cumem_allocator enable_dbo enable_elastic_ep enable_ep_weight_filter enable_eplb enable_expert_parallel
    enable_fault_tolerance enable_hc_sp enable_layerwise_nvtx_tracing enable_log_requests
    enable_logging_iteration_details enable_lora enable_mamba_cache_stochastic_rounding
    enable_mamba_shared_prefix_checkpoint enable_mfu_metrics enable_mixed_moe_lora_format enable_mm_embeds
    enable_mm_processor_stats enable_moe_shared_loras enable_nccl_comm_suspend enable_prompt_embeds
    enable_return_routed_experts enable_shm_tensor_arena enable_tower_connector_lora enable_trace_replay
    fail_on_environ_validation fully_sharded_loras interleave_mm_strings jit_monitor_verbose kv_cache_metrics
    kv_sharing_fast_prefill language_model_only long_prefill_token_threshold_adaptive mm_encoder_only monokernel
    numa_bind ray_workers_use_nsight return_sampling_mask skip_mm_profiling sleep_mode_offload_cudagraph
    specialize_active_lora tokens_only trust_remote_code use_fp64_gumbel use_replayssm
""".split()
# Dicts, lists and texts.
_EMPTY = """
    additional_config allowed_local_media_path attention_config aux_output_config compilation_config cpu_offload_params
    diffusion_config ec_manager_config engram_config eplb_config fault_tolerance_config hf_overrides ir_op_priority
    kernel_config kv_cache_dtype_skip_layers limit_mm_per_prompt logging_config logits_processor_pattern mamba_config
    media_io_kwargs mm_processor_kwargs model_class_overrides model_loader_extra_config model_weights offload_params
    override_generation_config profiler_config quantization_config reasoning_config reasoning_parser
    sleep_preserve_parameter_names speculative_config structured_outputs_config watchdog_config watermark_config
    worker_extension_cls
""".split()
_ONE = """
    cp_kv_cache_interleave_size data_parallel_size dcp_kv_cache_interleave_size decode_context_parallel_size
    max_long_partial_prefills max_loras max_num_partial_prefills nnodes num_scheduler_steps pipeline_parallel_size
    prefill_context_parallel_size prefill_schedule_interval renderer_num_workers stream_interval
""".split()

# The values of each option that change nothing, besides None.
NEUTRAL: dict[str, tuple] = {
    **dict.fromkeys(_UNSET, ()),
    **dict.fromkeys(_OFF, (False,)),
    **dict.fromkeys(_EMPTY, ({}, [], set(), "")),
    **dict.fromkeys(_ONE, (1,)),
    # The engine always works like this.
    "disable_cascade_attn": (True, False),
    "disable_log_stats": (True, False),
    "disable_log_requests": (True,),
    "enable_chunked_prefill": (True,),
    "enable_sleep_mode": (True, False),
    "use_tqdm_on_load": (True,),
    "use_v2_block_manager": (True,),
    "scheduler_reserve_full_isl": (True,),
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
    "dp_sync_interval": (1, 16),
    "expert_placement_strategy": ("linear",),
    "guided_decoding_backend": ("auto", "guidance"),
    "hf_token": (True,),
    "ignore_patterns": ([], ["original/**/*"], ""),
    "jit_monitor_mode": ("warn",),
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
    "mm_device_do_normalize": (True,),
    "mm_encoder_fp8_scale_save_margin": (1.5,),
    "mm_encoder_tp_mode": ("weights",),
    "mm_hasher_algorithm": ("blake3",),
    "mm_ipc_gpu_memory_gb": (0,),
    "mm_processor_cache_gb": (4,),
    "mm_processor_cache_type": ("lru",),
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
    "prefix_cache_retention_interval": (0,),
    "prefix_caching_hash_algo": ("sha256",),
    "pt_load_map_location": ("cpu",),
    "replayssm_buffer_len": (16,),
    "runner": ("auto", "generate"),
    "safetensors_load_strategy": ("lazy",),
    "safetensors_prefetch_block_size": (16 << 20,),
    "safetensors_prefetch_num_threads": (8,),
    "scheduling_policy": ("fcfs",),
    "shutdown_timeout": (0,),
    "sleep_mode_backend": ("cumem",),
    "sparse_indexer_topk_backend": ("auto",),
    "swa_bounded_replay": (True,),
    "swap_space": (0, 4),
    "task": ("auto", "generate"),
    "tokenizer_mode": ("auto", "hf"),
    "ubatch_size": (0,),
    "video_pruning_method": ("evs",),
    "watermark": (0.0,),
    "worker_cls": ("auto",),
}
# The same for the arguments of SamplingParams.
NEUTRAL_SAMPLING: dict[str, tuple] = {
    "best_of": (),
    "early_stopping": (False,),
    "extra_args": ({},),
    "flat_logprobs": (False,),
    "guided_decoding": (),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "logprob_token_ids": ([],),
    "output_text_buffer_length": (0,),
    "prompt_logprob_start": (0,),
    "prompt_logprob_token_ids": ([],),
    "repetition_detection": (),
    "routed_experts_prompt_start": (0,),
    "skip_clone": (True, False),
    "skip_reading_prefix_cache": (False,),
    "stream_interval": (1,),
    "thinking_token_budget": (-1,),
    "trace_decode_token_ids": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "watermarking": (False,),
}
# The same for the arguments of StructuredOutputsParams.
NEUTRAL_STRUCTURED: dict[str, tuple] = {"disable_fallback": (True, False)}
# The same for the arguments of `generate` and `chat`, and for the keys of prompts.
NEUTRAL_CALL: dict[str, tuple] = {
    "lora_request": (),
    "mm_processor_kwargs": ({},),
    "priority": (0,),
    "tokenization_kwargs": ({},),
}
NEUTRAL_CHAT: dict[str, tuple] = {"chat_template_content_format": ("auto",)}
# The further arguments of `AsyncLLM.generate`.
NEUTRAL_ASYNC: dict[str, tuple] = {
    **NEUTRAL_CALL,
    "data_parallel_rank": (0,),
    "kv_hints": (),
    "prompt_text": (),
    "reasoning_ended": (),
    "reasoning_parser_kwargs": ({},),
    "session_id": (),
    "trace_headers": ({},),
}
NEUTRAL_PROMPT: dict[str, tuple] = {
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "multi_modal_data": ({},),
    "multi_modal_uuids": ({},),
    "prompt_embeds": (),
    "prompt_is_token_ids": (),
    "prompt_token_offsets": (),
    "token_type_ids": (),
    "type": ("text", "token"),
}

# Hints in errors: what to use instead.
_INSTEAD = {
    "best_of": "ask for n samples and choose by cumulative_logprob",
    "chat_template": "give chat_template to chat",
    "chat_template_content_format": "the form that the template reads is found out",
    "flat_logprobs": "logprobs are made when they are read",
    "guided_decoding": "use structured_outputs",
    "logits_processors": "use logit_bias, allowed_token_ids, bad_words or structured_outputs",
    "lora_request": "merge the adapter and call update_weights",
    "tokenization_kwargs": "give token ids",
    "truncate_prompt_tokens": "give token ids",
    "async_scheduling": "overlap=0 finishes each step before the next",
    "enable_lora": "merge the adapter and call update_weights",
    "hf_token": "set HF_TOKEN",
    "override_generation_config": "give SamplingParams",
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
            check_neutral(name, value, NEUTRAL[name], _INSTEAD.get(name))
        elif value is not None:
            own_name = RENAMED.get(name, name)
            if own_name in own:
                names = " and ".join(key for key in options if RENAMED.get(key, key) == own_name)
                raise ValueError(f"{names} are the same option; give one of them")
            own[own_name] = value
    return own


def check_neutral(name: str, value: Any, neutral: tuple, instead: str | None = None) -> None:
    """Raise ValueError unless the value of an argument of vLLM that is not here is None or one of `neutral`.

    Args:
        instead: what to use instead.
    """
    if value is None or any(type(value) is type(other) and value == other for other in neutral):
        return
    # Numbers of another type, and subclasses such as enumerations.
    if isinstance(value, str | int | float) and not isinstance(value, bool) and value in neutral:
        return
    right = " or ".join(map(repr, (None, *neutral)))
    hint = f"; {instead}" if instead else ""
    raise ValueError(f"{name} is an option of vLLM and must be {right} here, got {shown(value)}{hint}")


def drop_neutral(arguments: Mapping[str, Any], neutral: Mapping[str, tuple]) -> dict[str, Any]:
    """Return arguments without those that `neutral` names. Refuse the values of these that would act in vLLM."""
    for name in arguments.keys() & neutral.keys():
        check_neutral(name, arguments[name], neutral[name], _INSTEAD.get(name))
    return {name: value for name, value in arguments.items() if name not in neutral}


def check_call(arguments: Mapping[str, Any], neutral: Mapping[str, tuple], num_prompts: int = 1) -> None:
    """Refuse arguments of a call that would act in vLLM. Each may be one for all prompts, or a list."""
    for name, value in arguments.items():
        if name not in neutral:
            raise TypeError(f"there is no argument {name:.100}")
        if is_list(value) and length(value) != num_prompts:
            raise ValueError(f"{name} has {length(value)} entries for {num_prompts} prompts")
        for entry in value if is_list(value) else [value]:
            drop_neutral({name: entry}, neutral)


def accept_neutral(neutral: Mapping[str, tuple]) -> Callable[[type[T]], type[T]]:
    """Return a decorator of a dataclass whose constructor then takes the arguments `neutral` too, without effect."""

    def decorate(cls: type[T]) -> type[T]:
        init: Callable = cls.__init__

        @wraps(init)
        def checked(self: T, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **drop_neutral(kwargs, neutral))

        cls.__init__ = checked  # pyright: ignore[reportAttributeAccessIssue]
        return cls

    return decorate
