"""Prefill: prompts in, KV out. Emits no token."""
