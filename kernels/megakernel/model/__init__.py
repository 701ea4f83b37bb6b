"""Model formats: from a GGUF file or a Hugging Face folder to shape, weights and tokenizer."""
