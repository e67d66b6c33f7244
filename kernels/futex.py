"""Sleeping until another process has stored a word: Linux futexes on shared memory (futex(2)).

Waiting costs no processor time and ends when the store's author says so, so ranks that share a core hand it on at
once. Nothing rests on it: a wake that is lost, or never sent (a GPU rank cannot), costs the timeout of one wait.
"""

import ctypes

_SYS_FUTEX = 202  # x86-64, which heap_window requires
_WAIT, _WAKE = 0, 1  # shared: waiter and waker are different processes, and map the word at different addresses
_LOW_HALF = 0xFFFFFFFF


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def _syscall(library: ctypes.CDLL) -> "ctypes._NamedFuncPointer":
    function = library.syscall
    function.restype = ctypes.c_long
    function.argtypes = (
        ctypes.c_long,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_uint32,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int,
    )
    return function


# Waiting lets other threads of this process run; a wake is too short for that.
_wait_call = _syscall(ctypes.CDLL(None))
_wake_call = _syscall(ctypes.PyDLL(None))


def wait(address: int, word: int, timeout_s: float) -> None:
    """Sleeps while the 64-bit word at ``address`` is ``word``, until it is rung for or the time is over, or for no
    reason.

    Only the lower half is compared with memory: two words that differ above it look alike, and a change from one to
    the other just before the sleep is noticed at the timeout.
    """
    time_left = _Timespec(int(timeout_s), int(timeout_s % 1 * 1e9))
    _wait_call(_SYS_FUTEX, address, _WAIT, word & _LOW_HALF, ctypes.addressof(time_left), None, 0)


def wake(address: int) -> None:
    """Ends the waits of all who sleep on the word at ``address``."""
    _wake_call(_SYS_FUTEX, address, _WAKE, 0x7FFFFFFF, None, None, 0)
