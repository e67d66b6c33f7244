"""What C reads of a model and a batch: the structures of model.h, attention.c, mlp.c, routing.c, forward.c, by member.

Addresses are plain numbers here, so whoever fills a structure keeps the tensors behind it.
"""

import ctypes

_Address, _Size, _Real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class Packed(ctypes.Structure):
    _fields_ = (("at", _Address), ("inner", _Size), ("outer", _Size))


class Mlp(ctypes.Structure):
    _fields_ = (("gate_up", Packed), ("down", Packed))


class Dense(ctypes.Structure):
    _fields_ = (("norm", _Address), ("eps", _Real), ("mlp", Mlp))


class Head(ctypes.Structure):
    _fields_ = (("norm", _Address), ("eps", _Real), ("weight", Packed))


class Moe(ctypes.Structure):
    _fields_ = (
        ("norm", _Address),
        ("bias", _Address),
        ("eps", _Real),
        ("scaling", _Real),
        ("gate", Packed),
        ("shared", Mlp),
        ("top_k", _Size),
        ("is_sigmoid", _Size),
        ("is_normalised", _Size),
        ("num_groups", _Size),
        ("num_kept_groups", _Size),
        ("num_scored", _Size),
    )


class Layer(ctypes.Structure):
    _fields_ = (("attention", _Address), ("cache", _Address), ("dense", _Address), ("moe", _Address))


class Model(ctypes.Structure):
    _fields_ = (
        ("layers", _Address),
        ("num_layers", _Size),
        ("embedding", _Address),
        ("head", _Address),
        ("num_experts", _Size),
        ("has_shared", _Size),
    )


class Heads(ctypes.Structure):
    _fields_ = (
        ("num_heads", _Size),
        ("num_key_heads", _Size),
        ("key_size", _Size),
        ("value_size", _Size),
        ("value_at", _Size),
    )


class Attention(ctypes.Structure):
    _fields_ = (
        ("hidden", _Size),
        ("row_size", _Size),
        ("num_pairs", _Size),
        ("heads", Heads),
        ("query_a", Packed),
        ("query", Packed),
        ("key_value", Packed),
        ("output", Packed),
        ("norm", _Address),
        ("query_a_norm", _Address),
        ("query_norm", _Address),
        ("key_norm", _Address),
        ("key_norm_size", _Size),
        ("eps", _Real),
        ("inner_eps", _Real),
    )


class Batch(ctypes.Structure):
    _fields_ = (
        ("num_tokens", _Size),
        ("num_requests", _Size),
        ("table_width", _Size),
        ("num_logits", _Size),
        ("token", _Address),
        ("position", _Address),
        ("request", _Address),
        ("table", _Address),
        ("logit_index", _Address),
        ("vocab_size", _Size),
        ("num_positions", _Size),
        ("num_blocks", _Size),
        ("block_size", _Size),
        ("turn", _Address),
    )
