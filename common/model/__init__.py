"""The model: DeepSeek-V2 and V3 and Qwen3-MoE read from a Hugging Face directory, computed in fp32, batch-invariant.

`config` and what it imports, `tokenizer` and `sampling` do without torch; the rest is tensor work.
"""
