"""An HTTP server for OpenAI's and Anthropic's clients, and a chat page. Nothing else in the package imports it."""
