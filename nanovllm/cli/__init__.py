"""The command `nanovllm`: serve a model, chat with it, measure a server."""
