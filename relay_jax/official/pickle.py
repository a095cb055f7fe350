"""An interpreter of pickles in which nothing can happen.

It knows the opcodes that Python's pickler writes for plain data
and a list of names handed to it. Every other name and opcode is
refused. It imports nothing and calls nothing that a file brings
along; objects become `Record`s, which only hold what the file
says. Time and memory are in proportion to the file: nothing
recurses, claimed lengths are compared with what is there before
anything is allocated, bytes are views. (`pickle.Unpickler` with
a `find_class` is not enough: huge memo indices, claimed lengths
and nested tuples as dictionary keys exhaust memory or the C
stack before any Python code is asked.)
"""

import pickle
import pickletools
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from relay_jax.errors import UserError

MAX_STEPS = 2_000_000  # opcodes of a file, ten times what the largest official one has
MAX_TEXT = 1 << 24  # bytes of one text


@dataclass(frozen=True, eq=False)
class Name:
    """A global on the list.

    call: what REDUCE on it does; is_class: NEWOBJ makes a Record;
    tag: for the caller.
    """

    name: str
    call: Callable[["Machine", tuple], object] | None = None
    is_class: bool = False
    tag: str = ""


@dataclass(eq=False, repr=False)
class Record:
    """Stands for an object of the file: the name of its class and its state."""

    class_name: str
    state: Any = None


class Budget:
    """Steps left for a file, the pickles within it included."""

    steps = MAX_STEPS


def show(value: object) -> str:
    """Something from a file for a message: one short line, whatever it is."""
    if isinstance(value, tuple) and len(value) <= 8 and all(type(item) is int for item in value):
        text = repr(value)
    elif isinstance(value, (str, int, float, type(None))):
        text = repr(value[:80] if isinstance(value, str) else value)
    else:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."


def no_storage(_: object) -> object:
    """For streams in which no persistent id may occur. Raises UserError."""
    raise UserError("it has a persistent id where none belongs")


class Machine:
    """Interprets the pickles that follow each other in `data`.

    names: the list, by 'module.name'; persistent: what stands
    for a persistent id. The stack holds None, bool, int, float,
    str, memoryview (bytes), list (sets too), tuple, dict,
    Record, Name and what `call` and `persistent` return. Every
    method raises UserError.
    """

    def __init__(
        self,
        data: memoryview,
        names: Mapping[str, Name],
        persistent: Callable[[object], object] = no_storage,
        budget: Budget | None = None,
    ) -> None:
        self.data, self.names, self.persistent, self.at = data, names, persistent, 0
        self.budget = budget or Budget()
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        """The object of the next pickle."""
        self.stack, self.marks, self.memo = [], [], {}
        while (code := self.take(1)[0]) != pickle.STOP[0]:
            # Few bytes can ask for many steps: without a limit a
            # file could keep us busy for hours.
            self.budget.steps -= 1
            if self.budget.steps < 0:
                raise UserError("it has far more objects than any official file")
            step = _STEPS.get(code)
            if step is None:
                raise UserError(
                    f"pickle opcode {_OPCODE_NAMES.get(code, hex(code))} is not on the list"
                )
            step(self)
        return self.pop()

    # Reading

    def take(self, count: int) -> memoryview:
        """The next bytes, not copied."""
        if count < 0 or count > len(self.data) - self.at:
            raise UserError("it is truncated or damaged (it ends inside an object)")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> int:
        """The next number, in the notation of `struct`."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, form: str) -> str:
        """A text after its length in bytes, which has this form."""
        length = self.number(form)
        if length > MAX_TEXT:
            raise UserError(f"a text of {length} bytes is longer than any in an official file")
        return str(self.take(length), "utf-8", "surrogatepass")

    def line(self) -> str:
        """Up to the next end of line."""
        # Only so far: looking for the end of a line in a file
        # without any would read all of it.
        end = bytes(self.data[self.at : self.at + 256]).find(b"\n")
        if end < 0:
            raise UserError("it is truncated or damaged (a name has no end)")
        return str(self.take(end + 1)[:-1], "utf-8")

    def integer(self, form: str) -> int:
        """An integer after its length in bytes, which has this form."""
        # Integers of any length are harmless to read, but not to
        # print or to multiply.
        length = self.number(form)
        if not 0 <= length <= 32:
            raise UserError(f"an integer of {length} bytes is longer than any in an official file")
        return int.from_bytes(self.take(length), "little", signed=True)

    # Stack and memo

    def pop(self) -> Any:
        """The uppermost value above the last mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise UserError("it is damaged (an operand is missing)")
        return self.stack.pop()

    def pop_tuple(self, count: int) -> tuple:
        """The uppermost values, in the order in which they were pushed."""
        return tuple(self.pop() for _ in range(count))[::-1]

    def pop_mark(self) -> list:
        """All values above the last mark, and the mark."""
        if not self.marks:
            raise UserError("it is damaged (a mark is missing)")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def top(self) -> Any:
        """The uppermost value, which stays."""
        value = self.pop()
        self.stack.append(value)
        return value

    def put(self, index: int) -> None:
        """Remembers the uppermost value."""
        # A dict, not a list: an index says nothing about how many
        # objects there are.
        self.memo[index] = self.top()

    def get(self, index: int) -> object:
        """What `put` has remembered."""
        if index not in self.memo:
            raise UserError(f"it is damaged (object {index} is used before it exists)")
        return self.memo[index]

    # Containers and objects

    def extend(self, items: list) -> None:
        """Appends to the uppermost value, a list."""
        target = self.top()
        if type(target) is not list:
            raise UserError(f"it appends to {show(target)}, which is not a list")
        target.extend(items)

    def set_items(self, items: Sequence[Any]) -> None:
        """Key, value, key, value ... into the uppermost value, a dict."""
        target = self.top()
        if type(target) is not dict or len(items) % 2:
            raise UserError(
                f"it sets items of {show(target)}, which is not a dict, or has a key without value"
            )
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing a tuple recurses in C: a deep one would
            # overflow the stack.
            if not isinstance(key, (str, int, float, type(None))):
                raise UserError(f"a key {show(key)} is neither text nor number")
            target[key] = value

    def find(self, module: object, name: object) -> Name:
        """The entry of the list for a global that the file asks for."""
        if type(module) is not str or type(name) is not str:
            raise UserError("it asks for a name that is not text")
        entry = self.names.get(f"{module[:128]}.{name[:128]}")
        if entry is None:
            label = show(f"{module[:80]}.{name[:80]}")
            raise UserError(f"it asks for {label}, which is not on the list of allowed names")
        return entry

    def reduce(self) -> object:
        """Calls what the list has for a function."""
        function, args = self.pop_tuple(2)
        if not isinstance(function, Name) or function.call is None or type(args) is not tuple:
            label = function.name if isinstance(function, Name) else function
            raise UserError(f"it calls {show(label)}, which is not a function on the list")
        return function.call(self, args)

    def new_object(self) -> Record:
        """A Record in place of an object of a class on the list."""
        cls, args = self.pop_tuple(2)
        if not isinstance(cls, Name) or not cls.is_class or args != ():
            label = cls.name if isinstance(cls, Name) else cls
            raise UserError(
                f"it makes an object of {show(label)}, which is not a class on the list"
            )
        return Record(cls.name.rpartition(".")[2])

    def build(self) -> None:
        """Gives a Record its state."""
        state, target = self.pop(), self.top()
        if type(target) is dict and type(state) is dict and list(state) == ["_metadata"]:
            return  # of a torch state dict: versions of its modules
        if not isinstance(target, Record) or target.state is not None:
            raise UserError(f"it sets the state of {show(target)}, which has none")
        target.state = state


def _push(value: Callable[[Machine], object]) -> Callable[[Machine], None]:
    return lambda m: m.stack.append(value(m))


_VALUES: dict[bytes, Callable[[Machine], object]] = {
    pickle.NONE: lambda m: None,
    pickle.NEWTRUE: lambda m: True,
    pickle.NEWFALSE: lambda m: False,
    pickle.BININT: lambda m: m.number("<i"),
    pickle.BININT1: lambda m: m.number("<B"),
    pickle.BININT2: lambda m: m.number("<H"),
    pickle.BINFLOAT: lambda m: m.number(">d"),
    pickle.LONG1: lambda m: m.integer("<B"),
    pickle.LONG4: lambda m: m.integer("<i"),
    pickle.SHORT_BINUNICODE: lambda m: m.text("<B"),
    pickle.BINUNICODE: lambda m: m.text("<I"),
    pickle.BINUNICODE8: lambda m: m.text("<Q"),
    pickle.SHORT_BINBYTES: lambda m: m.take(m.number("<B")),
    pickle.BINBYTES: lambda m: m.take(m.number("<I")),
    pickle.BINBYTES8: lambda m: m.take(m.number("<Q")),
    pickle.BYTEARRAY8: lambda m: m.take(m.number("<Q")),
    pickle.EMPTY_LIST: lambda m: [],
    pickle.EMPTY_SET: lambda m: [],
    pickle.EMPTY_DICT: lambda m: {},
    pickle.EMPTY_TUPLE: lambda m: (),
    pickle.TUPLE1: lambda m: m.pop_tuple(1),
    pickle.TUPLE2: lambda m: m.pop_tuple(2),
    pickle.TUPLE3: lambda m: m.pop_tuple(3),
    pickle.TUPLE: lambda m: tuple(m.pop_mark()),
    pickle.BINGET: lambda m: m.get(m.number("<B")),
    pickle.LONG_BINGET: lambda m: m.get(m.number("<I")),
    pickle.GLOBAL: lambda m: m.find(m.line(), m.line()),
    pickle.STACK_GLOBAL: lambda m: m.find(*m.pop_tuple(2)),
    pickle.REDUCE: Machine.reduce,
    pickle.NEWOBJ: Machine.new_object,
    pickle.BINPERSID: lambda m: m.persistent(m.pop()),
}
_ACTIONS: dict[bytes, Callable[[Machine], object]] = {
    pickle.PROTO: lambda m: m.take(1),
    pickle.FRAME: lambda m: m.take(8),
    pickle.MARK: lambda m: m.marks.append(len(m.stack)),
    pickle.MEMOIZE: lambda m: m.put(len(m.memo)),
    pickle.BINPUT: lambda m: m.put(m.number("<B")),
    pickle.LONG_BINPUT: lambda m: m.put(m.number("<I")),
    pickle.APPEND: lambda m: m.extend([m.pop()]),
    pickle.APPENDS: lambda m: m.extend(m.pop_mark()),
    pickle.ADDITEMS: lambda m: m.extend(m.pop_mark()),
    pickle.SETITEM: lambda m: m.set_items(m.pop_tuple(2)),
    pickle.SETITEMS: lambda m: m.set_items(m.pop_mark()),
    pickle.BUILD: Machine.build,
}
_STEPS = {code[0]: _push(value) for code, value in _VALUES.items()} | {
    code[0]: act for code, act in _ACTIONS.items()
}
_OPCODE_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
