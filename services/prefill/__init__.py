"""A prefill worker: computes the KV of prompts with the whole model and hands it to decode ranks."""
