"""Reads a pickle as data: nothing that it names is imported or called."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Collection
from io import BytesIO
from pickletools import opcodes
from typing import Any, ClassVar

INSTRUCTIONS = {
    *("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"),
    *("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT"),
    *("SETITEM", "SETITEMS", "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD"),
}
"""The instructions of a pickle that make plain data and objects."""

NAMES = {ord(opcode.code): opcode.name for opcode in opcodes}
"""Names of all instructions, by code."""


class PlainPickleError(ValueError):
    """Raised for a file that is no pickle, or holds something unexpected. The message is one line."""


class Made:
    """Stands for an object of a pickle. A subclass of it stands for a class or another global, such as ``torch.float32``.

    Attributes:
        maker: dotted name of the class or function that would make the object.
        arguments: of its call.
        state: what the object would get afterwards.
    """

    maker: ClassVar[str]
    arguments: tuple[object, ...]
    state: Any

    def __new__(cls, *arguments: object) -> Made:
        made = super().__new__(cls)
        made.arguments, made.state = arguments, None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


def load(content: bytes, known: Collection[str]) -> object:
    """Reads a pickle of protocol 2 or later.

    Args:
        content: the whole pickle.
        known: dotted names of the globals that it may use.

    Returns:
        None, bools, ints, strings, tuples, lists and dicts; and in the place of all else a :class:`Made` or a subclass of it.

    Raises:
        PlainPickleError: the pickle is damaged, uses another global, or holds something else.
    """
    try:
        return _Unpickler(BytesIO(content), known).load()
    except PlainPickleError:
        raise
    except Exception as error:  # a damaged pickle makes the unpickler raise almost any
        raise PlainPickleError(f"it is no complete pickle ({type(error).__name__})") from error


class PlainDict(dict[object, object]):
    """A dict whose keys are strings and :class:`Made`: to hash a tuple of tuples may exhaust the stack."""

    def __setitem__(self, key: object, value: object) -> None:
        if not isinstance(key, str | Made):
            raise PlainPickleError(f"a key of it is a {type(key).__name__}")
        super().__setitem__(key, value)


class _Instructions(dict[int, Callable[[Any], None]]):
    """The unpickler's method of each instruction, by its code."""

    def __missing__(self, code: int) -> Callable[[Any], None]:
        raise PlainPickleError(f"it has the instruction {NAMES.get(code, code)}, which has no place in it")


class _Unpickler(pickle._Unpickler):  # in Python: the one in C reserves as much memory as the pickle asks for
    dispatch = _Instructions(
        {code: method for code, method in pickle._Unpickler.dispatch.items() if NAMES[code] in INSTRUCTIONS}
    )
    dispatch[pickle.EMPTY_DICT[0]] = lambda self: self.append(PlainDict())

    def __init__(self, file: BytesIO, known: Collection[str]) -> None:
        super().__init__(file)
        self._known = known

    def find_class(self, module: str, name: str) -> type[Made]:
        dotted = f"{module}.{name}"
        if dotted not in self._known:
            raise PlainPickleError(f"it names {dotted[:100]!r}, which has no place in it")
        return type(dotted, (Made,), {"maker": dotted})
