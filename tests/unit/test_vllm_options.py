"""vLLM's options and arguments: each acts, or is refused unless it changes nothing."""

import dataclasses
import enum

import numpy as np
import pytest
import torch

from nanovllm import LLM, RequestOutputKind, SamplingParams, StructuredOutputsParams
from nanovllm.checkpoints.default_model import default_model
from nanovllm.checkpoints.model_source import open_model_of
from nanovllm.config import Config
from nanovllm.vllm_options import NEUTRAL, NEUTRAL_SAMPLING, NEUTRAL_STRUCTURED, RENAMED
from tests.helpers import engine, greedy, tokens
from tests.models.tiny import save_tiny

# The arguments of LLM, EngineArgs and AsyncEngineArgs in vLLM 0.26 to 0.33, and older ones that clients still give.
VLLM_NAMES = """
    additional_config aggregate_engine_logging all2all_backend allow_deprecated_quantization allowed_local_media_path
    allowed_media_domains async_scheduling attention_backend attention_config aux_output_config block_size
    calculate_kv_scales chat_template code_revision collect_detailed_traces compilation_config config_format convert
    cp_kv_cache_interleave_size cpu_distributed_timeout_seconds cpu_offload_gb cpu_offload_params
    cudagraph_capture_sizes cudagraph_metrics custom_histogram_buckets data_parallel_address data_parallel_backend
    data_parallel_external_lb data_parallel_hybrid_lb data_parallel_multi_port_external_lb data_parallel_rank
    data_parallel_rpc_port data_parallel_size data_parallel_size_local data_parallel_start_rank
    dbo_decode_token_threshold dbo_prefill_token_threshold dcp_comm_backend dcp_kv_cache_interleave_size dcp_q_replicate
    decode_context_parallel_size default_mm_loras device_ids diffusion_config disable_async_output_proc
    disable_cascade_attn disable_chunked_mm_input disable_custom_all_reduce disable_hybrid_kv_cache_manager
    disable_log_requests disable_log_stats disable_nccl_for_dp_synchronization disable_sliding_window
    distributed_executor_backend distributed_timeout_seconds download_dir dp_sync_interval dtype ec_manager_config
    ec_transfer_config elastic_ep_max_dp_size enable_batch_sharded_sampling enable_bf16x3_router_gemm
    enable_chunked_prefill enable_cumem_allocator enable_dbo enable_elastic_ep enable_ep_weight_filter enable_eplb
    enable_expert_parallel enable_fault_tolerance enable_flashinfer_autotune enable_hc_sp enable_layerwise_nvtx_tracing
    enable_log_requests enable_logging_iteration_details enable_lora enable_mamba_cache_stochastic_rounding
    enable_mamba_shared_prefix_checkpoint enable_mfu_metrics enable_mixed_moe_lora_format enable_mm_embeds
    enable_mm_processor_stats enable_moe_shared_loras enable_nccl_comm_suspend enable_prefix_caching
    enable_prompt_embeds enable_return_routed_experts enable_shm_tensor_arena enable_sleep_mode
    enable_tower_connector_lora enable_trace_replay enforce_eager engram_config eplb_config expert_placement_strategy
    fail_on_environ_validation fault_tolerance_config fully_sharded_loras gdn_prefill_backend generation_config
    gpu_memory_utilization guided_decoding_backend hf_config_path hf_overrides hf_token ignore_patterns
    interleave_mm_strings io_processor_plugin ir_op_priority jit_monitor_mode jit_monitor_verbose kda_decode_backend
    kda_prefill_backend kernel_config kv_cache_dtype kv_cache_dtype_skip_layers kv_cache_memory_bytes kv_cache_metrics
    kv_cache_metrics_sample kv_events_config kv_offloading_backend kv_offloading_size kv_sharing_fast_prefill
    kv_transfer_config language_model_only limit_mm_per_prompt linear_backend load_format log_config_file log_level
    logging_config logits_processor_pattern logits_processors logprobs_mode long_prefill_token_threshold
    long_prefill_token_threshold_adaptive lora_dtype lora_target_modules mamba_backend mamba_block_size
    mamba_cache_dtype mamba_cache_mode mamba_cache_philox_rounds mamba_config mamba_ssm_cache_dtype mamba_ssu_algorithm
    master_addr master_port max_cpu_loras max_cudagraph_capture_size max_logprobs max_long_partial_prefills
    max_lora_cls_labels max_lora_rank max_loras max_model_len max_num_active_seqs max_num_batched_tokens
    max_num_partial_prefills max_num_queued_reqs max_num_queued_tokens max_num_scheduled_tokens max_num_seqs
    max_parallel_loading_workers max_seq_len_to_capture media_io_kwargs mm_device_do_normalize mm_encoder_attn_backend
    mm_encoder_attn_dtype mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_margin mm_encoder_fp8_scale_save_path
    mm_encoder_only mm_encoder_tp_mode mm_hasher_algorithm mm_ipc_gpu_memory_gb mm_processor_cache_gb
    mm_processor_cache_type mm_processor_device mm_processor_kwargs mm_shm_cache_max_object_size_mb mm_tensor_ipc model
    model_class_overrides model_impl model_loader_extra_config model_weights moe_backend monokernel nnodes node_rank
    num_gpu_blocks_override num_scheduler_steps numa_bind numa_bind_cpus numa_bind_nodes offload_backend
    offload_group_size offload_num_in_group offload_params offload_prefetch_step optimization_level otlp_traces_endpoint
    override_attention_dtype override_generation_config override_pooler_config per_request_spec_decode_metrics
    performance_mode pipeline_parallel_size pooler_config prefill_context_parallel_size prefill_schedule_interval
    prefix_cache_retention_interval prefix_caching_hash_algo prefix_match_unit profiler_config pt_load_map_location
    quantization quantization_config ray_workers_use_nsight reasoning_config reasoning_parser reasoning_parser_plugin
    renderer_num_workers replayssm_buffer_len return_sampling_mask revision rope_scaling rope_theta runner
    safetensors_load_strategy safetensors_prefetch_block_size safetensors_prefetch_num_threads scheduler_cls
    scheduler_reserve_full_isl scheduling_policy seed served_model_name show_hidden_metrics_for_version shutdown_timeout
    skip_mm_profiling skip_tokenizer_init sleep_mode_backend sleep_mode_offload_cudagraph sleep_preserve_parameter_names
    sparse_indexer_topk_backend spec_method spec_model spec_tokens specialize_active_lora speculative_config
    stream_interval structured_outputs_config swa_bounded_replay swap_space task tensor_parallel_size tokenizer
    tokenizer_mode tokenizer_revision tokens_only trust_remote_code ubatch_size use_fp64_gumbel use_replayssm
    use_tqdm_on_load use_v2_block_manager video_pruning_method video_pruning_rate watchdog_config watermark
    watermark_config weight_transfer_config worker_cls worker_extension_cls
""".split()  # noqa: SIM905
# The arguments of vLLM's SamplingParams, newer and older ones included, and values that act there.
SAMPLING_VALUES = {
    "allowed_token_ids": [5],
    "bad_words": ["a"],
    "best_of": 2,
    "detokenize": False,
    "early_stopping": True,
    "extra_args": {"a": 1},
    "flat_logprobs": True,
    "frequency_penalty": 0.5,
    "guided_decoding": object(),
    "ignore_eos": True,
    "include_stop_str_in_output": True,
    "length_penalty": 2.0,
    "logit_bias": {5: 1.0},
    "logits_processors": [print],
    "logprob_token_ids": [5],
    "logprobs": 1,
    "max_tokens": 5,
    "min_p": 0.1,
    "min_tokens": 1,
    "n": 2,
    "output_kind": RequestOutputKind.CUMULATIVE,
    "output_text_buffer_length": 4,
    "presence_penalty": 0.5,
    "prompt_logprob_start": 3,
    "prompt_logprob_token_ids": [5],
    "prompt_logprobs": 1,
    "repetition_detection": object(),
    "repetition_penalty": 1.5,
    "routed_experts_prompt_start": 1,
    "seed": 1,
    "skip_reading_prefix_cache": True,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "stop": ["a"],
    "stop_token_ids": [5],
    "stream_interval": 4,
    "structured_outputs": StructuredOutputsParams(regex="a"),
    "temperature": 0.5,
    "thinking_token_budget": 10,
    "top_k": 5,
    "top_p": 0.5,
    "trace_decode_token_ids": [5],
    "truncate_prompt_tokens": 5,
    "use_beam_search": True,
    "watermarking": True,
}
STRUCTURED_VALUES = {
    "json": "{}",
    "regex": "a",
    "choice": ["a"],
    "grammar": "start: /a/",
    "json_object": True,
    "structural_tag": "{}",
    "disable_any_whitespace": True,
    "disable_additional_properties": True,
    "whitespace_pattern": " ",
}


@pytest.mark.parametrize("name", [*SAMPLING_VALUES, "skip_clone"])
def test_each_sampling_parameter_of_vllm_acts_or_is_refused_unless_neutral(name):
    """Both values of skip_clone do what they ask for."""
    for neutral in NEUTRAL_SAMPLING.get(name, ()):
        assert SamplingParams(**{name: neutral}) == SamplingParams()
    if name in NEUTRAL_SAMPLING:
        assert SamplingParams(**{name: None}) == SamplingParams()
        if name in SAMPLING_VALUES:
            with pytest.raises(ValueError, match=f"^{name} is an option of vLLM and must be None"):
                SamplingParams(**{name: SAMPLING_VALUES[name]})
    else:
        assert SamplingParams(**{name: SAMPLING_VALUES[name]}) != SamplingParams()
        assert SamplingParams.from_optional(**{name: SAMPLING_VALUES[name]}) != SamplingParams()
        assert SamplingParams.from_optional(**{name: None}) in (SamplingParams(), SamplingParams(max_tokens=None))


def test_every_parameter_is_one_of_vllm_or_of_nanovllm_alone():
    names = {field.name for field in dataclasses.fields(SamplingParams)} | NEUTRAL_SAMPLING.keys()
    assert names == {*SAMPLING_VALUES, "skip_clone", "logprobs_mode", "cache_salt"}
    names = {field.name for field in dataclasses.fields(StructuredOutputsParams)} | NEUTRAL_STRUCTURED.keys()
    assert names == {*STRUCTURED_VALUES, "disable_fallback"}


def test_unknown_parameters_are_refused_by_name():
    for make in (SamplingParams, SamplingParams.from_optional, StructuredOutputsParams):
        with pytest.raises(TypeError, match="temperatur"):
            make(temperatur=1.0)


@pytest.mark.parametrize("name", STRUCTURED_VALUES)
def test_each_option_of_structured_outputs_is_kept_or_refused(name):
    value = STRUCTURED_VALUES[name]
    form = {} if name in ("json", "regex", "choice", "grammar", "json_object", "structural_tag") else {"json": "{}"}
    params = StructuredOutputsParams(**form, **{name: value}, disable_fallback=False)
    assert getattr(params, name) == (tuple(value) if name == "choice" else value)
    if form:
        for other in (dict(regex="a"), dict(choice=["a"]), dict(grammar="a")):
            with pytest.raises(ValueError, match=f"structured_outputs.{name} needs one of json"):
                StructuredOutputsParams(**other, **{name: value})
    else:
        other = {"json": "{}"} if name == "regex" else {"regex": "a"}
        with pytest.raises(ValueError, match="exactly one of"):
            StructuredOutputsParams(**other, **{name: value})


def test_structured_outputs_need_a_form_and_no_contradiction():
    for wrong in (dict(), dict(json_object=False), dict(disable_any_whitespace=True)):
        with pytest.raises(ValueError, match="exactly one of"):
            StructuredOutputsParams(**wrong)
    with pytest.raises(ValueError, match="whitespace_pattern"):
        StructuredOutputsParams(json="{}", whitespace_pattern=" ", disable_any_whitespace=True)
    for name in ("json_object", "disable_any_whitespace", "disable_additional_properties"):
        with pytest.raises(TypeError, match=f"structured_outputs.{name} must be a bool"):
            StructuredOutputsParams(json="{}", **{name: 1})
    # vLLM's default of an option, spelled out, asks nothing of a form without JSON.
    assert StructuredOutputsParams(regex="a", disable_any_whitespace=False, json_object=False).regex == "a"


def test_other_values_of_sampling_parameters_mean_what_they_mean_in_vllm():
    default = SamplingParams()
    assert SamplingParams(top_k=-1) == SamplingParams(seed=-1) == SamplingParams(top_k=np.int64(-1)) == default
    assert SamplingParams(logprobs=True, prompt_logprobs=True) == SamplingParams(logprobs=1, prompt_logprobs=1)
    assert SamplingParams(temperature=1e-9).temperature == 1e-3 and SamplingParams(temperature=0).temperature == 0
    assert SamplingParams(max_tokens=None, min_tokens=100).max_tokens is None
    assert SamplingParams(max_tokens=8).clone() == SamplingParams(max_tokens=8)


def test_from_optional_takes_none_as_default_and_ids_as_text():
    made = SamplingParams.from_optional(temperature=None, n=None, top_p=0.5, stop=None, logit_bias={"5": 1, 6: 2})
    assert made == SamplingParams(top_p=0.5, logit_bias={5: 1.0, 6: 2.0})
    assert SamplingParams.from_optional(max_tokens=None).max_tokens is None
    wrong_ids = ({"x": 1}, TypeError), ({"-5": 1}, TypeError), ({"05": 1}, TypeError), ({"\uff15": 1}, TypeError)
    for bias, error in (*wrong_ids, ({"5": 101}, ValueError), ({"5": 1, 5: 2}, ValueError)):
        with pytest.raises(error, match="logit_bias"):
            SamplingParams.from_optional(logit_bias=bias)


FIELDS = [field.name for field in dataclasses.fields(Config)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), "qwen2")


def test_each_option_of_vllm_acts_or_is_refused_unless_neutral():
    default = Config()
    assert not set(NEUTRAL) & {*FIELDS, *RENAMED} and set(RENAMED.values()) <= set(FIELDS)
    assert {*NEUTRAL, *RENAMED} <= set(VLLM_NAMES)
    for name in VLLM_NAMES:
        assert Config.from_options({name: None}) == default, name
        if name in NEUTRAL:
            for value in NEUTRAL[name]:
                assert Config.from_options({name: value}) == default, (name, value)
            for value in ("a value", 12345, object(), np.zeros(2), ["a value"]):
                with pytest.raises(ValueError, match=f"{name} is an option of vLLM and must be None") as caught:
                    Config.from_options({name: value})
                assert len(str(caught.value)) < 400
        else:
            # It acts: a wrong value is refused, and the tests of the engine show what a right one does.
            assert name in FIELDS or name in RENAMED, name
            with pytest.raises((TypeError, ValueError)):
                Config.from_options({name: object()})


def test_an_option_off_and_an_option_of_1_are_not_mistaken_for_each_other():
    class Level(enum.IntEnum):
        O2 = 2
        O3 = 3

    for name, value in [("enable_lora", True), ("pipeline_parallel_size", True), ("pipeline_parallel_size", 2)]:
        with pytest.raises(ValueError, match=name):
            Config.from_options({name: value})
    assert Config.from_options({"cpu_offload_gb": 0.0, "optimization_level": Level.O2}) == Config()
    with pytest.raises(ValueError, match="optimization_level"):
        Config.from_options({"optimization_level": Level.O3})


def test_none_is_the_default_of_every_option():
    assert Config.from_options(dict.fromkeys(FIELDS)) == Config() == Config(**dict.fromkeys(FIELDS))


def test_options_with_other_names_act():
    config = Config.from_options({"block_size": 32, "num_gpu_blocks_override": 77})
    assert (config.kvcache_block_size, config.num_kvcache_blocks) == (32, 77)
    with pytest.raises(ValueError, match="block_size and kvcache_block_size are the same option"):
        Config.from_options({"block_size": 32, "kvcache_block_size": 32})
    assert Config.from_options({"block_size": None, "kvcache_block_size": 32}).kvcache_block_size == 32
    assert Config(dtype="half").dtype == Config(dtype=torch.float16).dtype == "float16"
    assert Config(dtype="float").dtype == "float32"


@pytest.mark.parametrize(("has_gpu", "num_seqs", "budget"), [(True, 512, 16384), (False, 256, 512)])
def test_an_unset_limit_follows_the_other_one(monkeypatch, has_gpu, num_seqs, budget):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)

    def limits(**options):
        config = Config(**options)
        return config.max_num_seqs, config.max_num_batched_tokens

    assert limits() == (num_seqs, budget)
    assert limits(device="cpu") == (256, 512)
    assert limits(max_num_batched_tokens=100) == (100, 100)
    assert limits(max_num_batched_tokens=4096) == (num_seqs, 4096)
    assert limits(max_num_seqs=20000) == (20000, 40000)  # at least half of the budget is for prompts
    assert limits(max_num_seqs=8) == (8, budget)
    with pytest.raises(ValueError, match=r"max_num_batched_tokens \(100\) must be at least max_num_seqs \(101\)"):
        limits(max_num_seqs=101, max_num_batched_tokens=100)


def test_one_process_cannot_be_several_ranks():
    with pytest.raises(ValueError, match="'uni' is one rank, but tensor_parallel_size=2"):
        Config(distributed_executor_backend="uni", tensor_parallel_size=2)


def test_the_arguments_that_trl_gives_make_an_engine(model):
    llm = LLM(
        model=str(model),
        tensor_parallel_size=1,
        gpu_memory_utilization=0.3,
        max_model_len=None,
        max_num_seqs=None,
        enable_sleep_mode=True,
        model_impl="auto",
        distributed_executor_backend="external_launcher",
        seed=0,
        max_num_batched_tokens=64,
        logprobs_mode="processed_logprobs",
        quantization=None,
        device="cpu",
        num_gpu_blocks_override=100,
    )
    with llm:
        assert llm.config.max_num_seqs == 64 and llm.llm_engine.scheduler.block_manager.num_blocks == 100
        assert llm.llm_engine.model_config.max_model_len == llm.max_model_len == 512
        metrics = {metric.name: metric.value for metric in llm.get_metrics()}
        assert metrics["vllm:generation_tokens"] == 0
        tokens(llm, [[1, 2]], greedy(3))
        metrics = {metric.name: metric.value for metric in llm.get_metrics()}
        assert (metrics["vllm:prompt_tokens"], metrics["vllm:generation_tokens"]) == (2, 3)
        llm.shutdown()
        with pytest.raises(RuntimeError, match="closed"):
            llm.generate([[1]])


def test_the_mode_of_logprobs_is_the_engines_unless_the_request_has_one(model):
    def logprob(llm, **options):
        params = SamplingParams(temperature=0.5, seed=1, max_tokens=1, logprobs=0, **options)
        (token,) = llm.generate([[1, 2]], params, use_tqdm=False)[0].outputs[0].logprobs[0].values()
        return token.logprob

    with engine(model) as llm:
        raw, processed = (logprob(llm, logprobs_mode=mode) for mode in ("raw_logprobs", "processed_logprobs"))
        assert logprob(llm) == raw != processed
    with engine(model, logprobs_mode="processed_logprobs") as llm:
        assert logprob(llm) == processed and logprob(llm, logprobs_mode="raw_logprobs") == raw


def test_more_logprobs_than_the_engine_allows_are_refused(model):
    with engine(model, max_logprobs=3) as llm:
        assert llm.generate([[1, 2]], SamplingParams(max_tokens=1, logprobs=3), use_tqdm=False)
        for name in ("logprobs", "prompt_logprobs"):
            with pytest.raises(ValueError, match=f"{name} must be at most max_logprobs=3, got 4"):
                llm.generate([[1, 2]], SamplingParams(max_tokens=1, **{name: 4}), use_tqdm=False)


def test_revision_and_folder_of_a_download_reach_the_hub(model, monkeypatch, tmp_path):
    calls = []

    def snapshot_download(name, **options):
        calls.append((name, options["revision"], options["cache_dir"]))
        return str(model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with engine("someone/model", revision="v2", download_dir=str(tmp_path)) as llm:
        assert tokens(llm, [[1, 2]], greedy(3))
    assert calls == [("someone/model", "v2", tmp_path)]
    for name, options in [(model, {}), ("qwen3-0.6b", {"load_format": "dummy"})]:
        with pytest.raises(ValueError, match="revision must be None for a local model, got 'v2'"):
            open_model_of(Config(model=name, revision="v2", **options))


def test_tokenizer_of_another_folder_replaces_the_models(model, tmp_path):
    default = default_model()
    with pytest.raises(ValueError, match=r"is not a folder or \.gguf file with a tokenizer"):
        open_model_of(Config(model=model, tokenizer=model))
    with pytest.raises(ValueError, match=r"tokenizer '.*missing' is not a folder or \.gguf file on this machine"):
        open_model_of(Config(model=model, tokenizer=tmp_path / "missing"))
    source = open_model_of(Config(model=model, tokenizer=default))
    assert source.tokenizer().decode(source.tokenizer().encode("Hello")) == "Hello"
    source.tokenizer().save_pretrained(tmp_path)
    with engine(model, tokenizer=tmp_path) as llm:
        assert llm.get_tokenizer() is llm.tokenizer
        assert llm.tokenizer.encode("Hello") == source.tokenizer().encode("Hello")
