"""Benchmarks of nanovllm and of other engines; `bench.py` is their command line.

- options: checks of the flags
- workloads: the requests
- engines: nanovllm, vLLM and transformers behind one interface
- limits: the least time that the hardware needs for the steps that ran
- run: runs workloads on engines
- perplexity: what quantized weights change; a command of its own
- start: the time from a new process to its first token
- trace: a Chrome trace of some steps
- report: tables, plots and JSON
"""
