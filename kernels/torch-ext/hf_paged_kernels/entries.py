"""Which objects stand under which names in a tree of modules, seen by the native library without a walk in Python."""

from __future__ import annotations

import ctypes
import functools
import sysconfig
from collections import OrderedDict
from typing import Any

from torch import nn

from .native_library import LIBRARY, library

# In the order of `Interpreter` in entries.h.
_ENTRY_POINTS = (
    "PyDict_Next",
    "PyDict_GetItemWithError",
    "PyObject_GenericGetDict",
    "PyObject_Type",
    "Py_DecRef",
)
# The dicts of a module that are looked into, beside its `__dict__`; the first leads to the modules below.
_INNER_DICTS = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")
_COUNT, _RECORD, _COMPARE = range(3)


class _Call(ctypes.Structure):
    """As `EntriesCall` in entries.h."""

    _fields_ = (
        ("python", ctypes.c_void_p * len(_ENTRY_POINTS)),
        ("none", ctypes.py_object),
        ("dict_types", ctypes.py_object * 2),
        ("names", ctypes.py_object * len(_INNER_DICTS)),
        ("modules", ctypes.c_void_p),
        ("max_modules", ctypes.c_int64),
        ("kept", ctypes.c_void_p),
        ("max_kept", ctypes.c_int64),
    )


class ModuleEntries:
    """The addresses of all that a model's modules have for attributes, in the `__dict__` of each and in the dicts of
    its submodules, parameters, buffers and forward hooks, with the names, and of the modules' classes.

    Holds none of it. An object that has died may have left its address to another: who asks `same` must know what of it
    can matter, and keep that alive or watch it die. Not for several threads at a time.

    Args:
        model: the root.
        num_modules: how many modules there are, each under every name it has.

    Raises:
        ValueError: if something in the tree is not made as modules are.
    """

    def __init__(self, model: nn.Module, num_modules: int):
        self._look = _entries()
        if self._look is None:
            raise ValueError("there is no native library, or an interpreter without a lock")
        self._modules = (ctypes.c_void_p * num_modules)()
        points = [ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value for name in _ENTRY_POINTS]
        self._call = _Call(
            (ctypes.c_void_p * len(points))(*points),
            None,
            (ctypes.py_object * 2)(dict, OrderedDict),
            (ctypes.py_object * len(_INNER_DICTS))(*_INNER_DICTS),
            ctypes.addressof(self._modules),
            num_modules,
        )
        count = self._through(model, _COUNT)
        self._kept = (ctypes.c_void_p * max(count, 0))()
        self._call.kept, self._call.max_kept = ctypes.addressof(self._kept), max(count, 0)
        if count < 0 or self._through(model, _RECORD) < 0:
            raise ValueError("something in the model is not made as modules are")

    def same(self, model: nn.Module) -> bool:
        """Whether every address is as it was when this was made."""
        return self._through(model, _COMPARE) >= 0

    def _through(self, model: nn.Module, look: int) -> int:
        try:
            return self._look(ctypes.byref(self._call), model, look)
        except AttributeError:  # an object without `__dict__`
            return -1


@functools.cache
def _entries() -> Any:
    """The library's function, called with the interpreter's lock held; `None` without one of the two."""
    if library() is None or sysconfig.get_config_var("Py_GIL_DISABLED"):
        return None
    function = ctypes.PyDLL(str(LIBRARY)).hf_paged_entries
    function.argtypes = (ctypes.POINTER(_Call), ctypes.py_object, ctypes.c_int64)
    function.restype = ctypes.c_int64
    return function
