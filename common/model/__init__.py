"""The model: DeepSeek-V3 architecture read from a Hugging Face directory, computed in fp32 with batch-invariant bits.

`config`, `tokenizer` and `sampling` do not import torch; `checkpoint`, `experts`, `attention` and `model` do.
"""
