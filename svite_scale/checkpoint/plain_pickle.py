"""A pickle read as data: what it names is looked up in a list of known names, and never imported or called."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pickletools import genops
from typing import Any


class PlainPickleError(ValueError):
    """A text is no pickle, or has something in it that isn't expected; the message is one line."""


@dataclass(eq=False)
class Made:
    """What a pickle says of an object.

    Attributes:
        maker: dotted name of what would be called.
        arguments: of the call.
        state: what the object would be given afterwards.
    """

    maker: str
    arguments: tuple[object, ...]
    state: object = None


@dataclass(frozen=True)
class Name:
    """Something that a pickle names, such as ``torch.float32``.

    Attributes:
        dotted: module and name.
    """

    dotted: str


def load(content: bytes, known: Collection[str]) -> object:
    """Reads a pickle of protocol 2 or later.

    Args:
        content: all of the pickle.
        known: dotted names that it may use.

    Returns:
        None, bools, ints, strings, tuples, lists, dicts by string or :class:`Made`; and for the rest :class:`Name` and
        :class:`Made`.

    Raises:
        PlainPickleError: it is damaged, uses another name, or holds something else.
    """
    try:
        return _run(content, known)
    except PlainPickleError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, MemoryError, RecursionError) as error:
        raise PlainPickleError(f"it is no whole pickle ({type(error).__name__})") from error


def _run(content: bytes, known: Collection[str]) -> object:
    """A pickle is a program for a machine with one stack; these are the instructions that make plain data."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def name(module: object, attribute: object) -> Name:
        dotted = f"{module}.{attribute}"
        if dotted not in known:
            raise PlainPickleError(f"it names {dotted[:100]!r}, which has no place in it")
        return Name(dotted)

    def popped(count: int) -> tuple[Any, ...]:
        if count > len(stack):
            raise IndexError("the stack ends")
        taken = tuple(stack[len(stack) - count :])
        del stack[len(stack) - count :]
        return taken

    def since_mark() -> tuple[Any, ...]:
        return popped(len(stack) - marks.pop())

    def set_items(items: tuple[Any, ...]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Nothing else is hashed, for the hash of a tuple may go as deep as the file is long.
            if not isinstance(key, str | Made):
                raise PlainPickleError(f"a key of it is a {type(key).__name__}")
            stack[-1][key] = value

    for opcode, argument, _ in genops(content):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "SHORT_BINUNICODE" | "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(popped(int(opcode.name[-1])))
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(since_mark())
            case "APPEND":
                stack[-2].append(stack.pop())
            case "APPENDS":
                items = since_mark()
                stack[-1].extend(items)
            case "SETITEM":
                set_items(popped(2))
            case "SETITEMS":
                set_items(since_mark())
            case "GLOBAL":
                stack.append(name(*str(argument).split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(name(*popped(2)))
            case "REDUCE" | "NEWOBJ":
                maker, arguments = popped(2)
                stack.append(Made(maker.dotted, tuple(arguments)))
            case "BUILD":
                (state,) = popped(1)
                stack[-1].state = state
            case "STOP":
                (result,) = stack
                return result
            case other:
                raise PlainPickleError(f"it has the instruction {other}, which has no place in it")
    raise PlainPickleError("it ends too early")
