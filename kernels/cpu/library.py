"""Loads the compiled CPU kernels, and gives their functions types.

A wrapper declares a C function once and calls it with addresses and numbers:

    @cache
    def _add_up() -> KernelFunction:
        return kernel_function("regrow_add_up", POINTER, SIZE, SIZE, POINTER)

A call costs about a microsecond whatever it computes, most of it for turning arguments into C's; so kernels do much in
one call. Nothing here checks addresses: wrappers check shapes, bounds and strides, once for each batch.
"""

import ctypes
from collections.abc import Callable
from functools import cache

from kernels.cpu.artifacts import LEVELS, library_path, sources_digest

POINTER = ctypes.c_void_p  # takes an int: tensor.data_ptr(), or array.ctypes.data
SIZE = ctypes.c_int64
FLOAT = ctypes.c_float

KernelFunction = Callable[..., None]
CountingFunction = Callable[..., int]
_Type = type[ctypes.c_void_p] | type[ctypes.c_int64] | type[ctypes.c_float]

_COMMAND = "run `python -m kernels.cpu.build` (it needs a C compiler)"


class KernelsNotBuilt(ValueError):
    """One line that names the command to run."""


def kernel_function(name: str, *argument_types: _Type, is_brief: bool = False) -> KernelFunction:
    """The C function of this name, without result. Raises KernelsNotBuilt.

    Other threads of Python run meanwhile, unless it ``is_brief``: what takes a microsecond must not wait for them to
    finish.
    """
    function = getattr(_brief_library() if is_brief else _library(), name)
    function.argtypes, function.restype = argument_types, None
    bound: KernelFunction = function
    return bound


def counting_function(name: str, *argument_types: _Type) -> CountingFunction:
    """The same for a function that answers with an int64_t."""
    function = getattr(_library(), name)
    function.argtypes, function.restype = argument_types, SIZE
    bound: CountingFunction = function
    return bound


@cache
def _library() -> ctypes.CDLL:
    """The best one that this processor can run."""
    base = open_level("base")
    for level in LEVELS:
        if base.regrow_has_level(level.encode()):
            return open_level(level)
    return base


@cache
def _brief_library() -> ctypes.PyDLL:
    return ctypes.PyDLL(_library()._name)


def open_level(level: str) -> ctypes.CDLL:
    """The library of one instruction set; the caller knows that the processor has it."""
    path = library_path(level)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        what = f"cannot be loaded: {error}" if path.exists() else "are not built"
        raise KernelsNotBuilt(f"the compiled CPU kernels {what}; {_COMMAND}") from None
    library.regrow_sources.restype = ctypes.c_char_p
    if library.regrow_sources() != sources_digest().encode():
        raise KernelsNotBuilt(f"the compiled CPU kernels are older than their sources; {_COMMAND}")
    return library
