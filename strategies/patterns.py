"""Regular expressions whose time is bounded, for patterns that a client sends.

Python's `re` backtracks: a pattern such as `(a+)+b` takes time exponential in the text, and nothing can interrupt it. Here a
pattern is compiled to a program whose threads advance through the text together (Thompson, "Regular expression search
algorithm", 1968; with captures as in Pike's `sam`), so a search takes at most len(text) x len(program) steps.

Syntax and meaning are those of `re`, without back references, look-around, possessive quantifiers and named groups: characters,
`.`, classes, `\\d \\w \\s \\b` and their negations, groups, `(?:...)`, `|`, `* + ? {m} {m,} {m,n}` and their lazy forms, `^`,
`$`, and the flags `(?i)` and `(?s)` at the beginning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

MAX_PROGRAM = 2000  # instructions; counted repetitions are written out
MAX_REPEAT = 200
MAX_DEPTH = 50  # of groups within groups

Predicate = Callable[[str], bool]
Node = Callable[["_Program"], object]  # appends its instructions


@dataclass
class _Program:
    """Instructions: (op, argument, second argument)."""

    code: list[tuple[str, object, int]] = field(default_factory=list)

    def add(self, op: str, argument: object = None, second: int = 0) -> int:
        if len(self.code) >= MAX_PROGRAM:
            raise ValueError(f"the pattern is too large: more than {MAX_PROGRAM} instructions")
        self.code.append((op, argument, second))
        return len(self.code) - 1


@dataclass(frozen=True)
class Pattern:
    """A compiled pattern.

    Attributes:
        code: instructions.
        num_groups: groups with captures, without group 0.
    """

    code: tuple[tuple[str, object, int], ...]
    num_groups: int

    def last_match(self, text: str, *, max_steps: int) -> list[str | None] | None:
        """Return the groups (0 is the whole) of the last of the matches that `re.finditer` would find; None if there is none.

        Raises:
            TimeoutError: the search took more than `max_steps` steps.
        """
        found, start, steps = None, 0, max_steps
        while start <= len(text):
            match, steps = self._search(text, start, steps)
            if match is None:
                break
            found = match
            start = match[1] if match[1] > match[0] else match[1] + 1
        if found is None:
            return None
        spans = zip(found[::2], found[1::2], strict=True)
        return [text[begin:end] if begin >= 0 and end >= 0 else None for begin, end in spans]

    def _search(self, text: str, start: int, steps: int) -> tuple[tuple[int, ...] | None, int]:
        """Return the first match from `start` on, as begins and ends of groups, and the steps that are left."""
        empty = (-1,) * (2 * self.num_groups + 2)
        threads: list[tuple[int, tuple[int, ...]]] = []
        match = None
        for position in range(start, len(text) + 1):
            char = text[position] if position < len(text) else ""
            seen: set[int] = set()
            ready: list[tuple[int, tuple[int, ...]]] = []
            waiting = threads if match is not None else [*threads, (0, empty)]
            for pc, saved in waiting:
                steps -= self._follow(pc, saved, text, position, seen, ready)
            if steps < 0:
                raise TimeoutError("the pattern takes too many steps")
            threads = []
            for pc, saved in ready:
                op, predicate, _ = self.code[pc]
                if op == "match":
                    match = saved
                    break  # threads behind this one have a lower priority
                if char and predicate(char):  # type: ignore[operator]
                    threads.append((pc + 1, saved))
            if not threads and match is not None:
                break
        return match, steps

    def _follow(
        self,
        pc: int,
        saved: tuple[int, ...],
        text: str,
        position: int,
        seen: set[int],
        ready: list[tuple[int, tuple[int, ...]]],
    ) -> int:
        """Append the threads that read a character or have matched, in order of priority; return the steps it took."""
        stack = [(pc, saved)]
        steps = 0
        while stack:
            pc, saved = stack.pop()
            steps += 1
            if pc in seen:
                continue
            seen.add(pc)
            op, argument, second = self.code[pc]
            if op == "split":
                stack += [(second, saved), (argument, saved)]  # type: ignore[list-item]
            elif op == "jump":
                stack.append((argument, saved))  # type: ignore[arg-type]
            elif op == "save":
                slot = argument
                assert isinstance(slot, int)
                stack.append((pc + 1, (*saved[:slot], position, *saved[slot + 1 :])))
            elif op == "assert":
                if argument(text, position):  # type: ignore[operator]
                    stack.append((pc + 1, saved))
            else:
                ready.append((pc, saved))
        return steps


def compile_pattern(pattern: str) -> Pattern:
    """Return the compiled pattern.

    Raises:
        ValueError: says where the pattern is wrong or uses what is not supported.
    """
    parser = _Parser(pattern)
    root = parser.parse()
    program = _Program()
    program.add("save", 0)
    root(program)
    program.add("save", 1)
    program.add("match")
    return Pattern(tuple(program.code), parser.num_groups)


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"


def _at_boundary(text: str, position: int) -> bool:
    before = position > 0 and _is_word(text[position - 1])
    after = position < len(text) and _is_word(text[position])
    return before != after


CLASSES: dict[str, Predicate] = {"d": str.isdecimal, "w": _is_word, "s": str.isspace}
CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "0": "\0"}


class _Parser:
    """Parser by recursive descent."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.position, self.num_groups, self.depth = pattern, 0, 0, 0
        self.ignore_case = self.dot_all = False

    def fail(self, problem: str) -> ValueError:
        return ValueError(f"{problem} at position {self.position} of {self.pattern!r:.200}")

    @property
    def next(self) -> str:
        return self.pattern[self.position : self.position + 1]

    def take(self, token: str) -> bool:
        found = self.pattern.startswith(token, self.position)
        self.position += len(token) if found else 0
        return found

    def char(self) -> str:
        if not self.next:
            raise self.fail("the pattern ends too early")
        self.position += 1
        return self.pattern[self.position - 1]

    def parse(self) -> Node:
        while self.pattern.startswith(("(?i)", "(?s)", "(?is)", "(?si)"), self.position):
            flags = self.pattern[self.position : self.pattern.index(")", self.position) + 1]
            self.ignore_case |= "i" in flags
            self.dot_all |= "s" in flags
            self.position += len(flags)
        node = self.alternatives()
        if self.next:
            raise self.fail("unbalanced ')'")
        return node

    def alternatives(self) -> Node:
        options = [self.sequence()]
        while self.take("|"):
            options.append(self.sequence())
        return options[0] if len(options) == 1 else _alternatives(options)

    def sequence(self) -> Node:
        nodes = []
        while self.next and self.next not in "|)":
            nodes.append(self.repeated())
        return _sequence(nodes)

    def repeated(self) -> Node:
        node = self.atom()
        bounds = self.bounds()
        if bounds is None:
            return node
        least, most = bounds
        lazy = self.take("?")
        if self.next == "+" or self.next == "*" or self.bounds() is not None:
            raise self.fail("multiple repeat")
        return _repeat(node, least, most, lazy)

    def bounds(self) -> tuple[int, int | None] | None:
        """Return the numbers of a quantifier, or None if none comes."""
        simple: tuple[tuple[str, int, int | None], ...] = (("*", 0, None), ("+", 1, None), ("?", 0, 1))
        for sign, least, most in simple:
            if self.take(sign):
                return least, most
        end = self.pattern.find("}", self.position)
        if self.next != "{" or end < 0:
            return None
        low, comma, high = self.pattern[self.position + 1 : end].partition(",")
        if not (low.isdecimal() or (comma and not low)) or not (high.isdecimal() or not high) or not (low or high):
            return None  # a brace that stands for itself, as in `re`
        self.position = end + 1
        numbers = int(low or 0), (int(high) if high else None if comma else int(low))
        if max(numbers[0], numbers[1] or 0) > MAX_REPEAT:
            raise self.fail(f"a repetition of more than {MAX_REPEAT}")
        if numbers[1] is not None and numbers[1] < numbers[0]:
            raise self.fail("a repetition whose maximum is less than its minimum")
        return numbers

    def atom(self) -> Node:
        char = self.char()
        if char == "(":
            return self.group()
        if char == "[":
            return _reads(self.char_class())
        if char == ".":
            return _reads((lambda char: True) if self.dot_all else (lambda char: char != "\n"))
        if char == "^":
            return _asserts(lambda text, position: position == 0)
        if char == "$":
            return _asserts(lambda text, position: text[position:] in ("", "\n"))
        if char in "*+?":
            raise self.fail("nothing to repeat")
        if char != "\\":
            return _reads(self.equals(char))
        if self.take("b"):
            return _asserts(_at_boundary)
        if self.take("B"):
            return _asserts(lambda text, position: not _at_boundary(text, position))
        return _reads(self.escape()[0])

    def group(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.fail(f"more than {MAX_DEPTH} groups within each other")
        number = None
        if not self.take("?:"):
            if self.next == "?":
                raise self.fail("'(?' begins look-around, a named group or a flag, which are not supported,")
            self.num_groups += 1
            number = self.num_groups
        node = self.alternatives()
        if not self.take(")"):
            raise self.fail("missing ')'")
        self.depth -= 1
        return node if number is None else _capture(node, number)

    def equals(self, wanted: str) -> Predicate:
        if self.ignore_case:
            folded = wanted.lower()
            return lambda char: char.lower() == folded
        return lambda char: char == wanted

    def escape(self) -> tuple[Predicate, str]:
        """Return what an escape matches, and the character if it is one."""
        char = self.char()
        if char.lower() in CLASSES:
            inside = CLASSES[char.lower()]
            return (inside if char.islower() else lambda char: not inside(char)), ""
        if char in CONTROLS:
            return self.equals(CONTROLS[char]), CONTROLS[char]
        if char.isascii() and char.isalnum():
            raise self.fail(f"the escape '\\{char}' is not supported")
        return self.equals(char), char

    def char_class(self) -> Predicate:
        negated = self.take("^")
        parts: list[Predicate] = []
        first = True
        while first or self.next != "]":
            first = False
            char = self.char()
            predicate, low = self.escape() if char == "\\" else (self.equals(char), char)
            if low and self.next == "-" and self.pattern[self.position + 1 : self.position + 2] not in ("", "]"):
                self.position += 1
                high = self.char()
                high = self.escape()[1] if high == "\\" else high
                if not high or high < low:
                    raise self.fail("a bad range of characters")
                predicate = self.between(low, high)
            parts.append(predicate)
        self.position += 1
        return lambda char: any(part(char) for part in parts) != negated

    def between(self, low: str, high: str) -> Predicate:
        if self.ignore_case:
            return lambda char: any(low <= case <= high for case in (char, char.lower(), char.upper()))
        return lambda char: low <= char <= high


def _reads(predicate: Predicate) -> Node:
    return lambda program: program.add("read", predicate)


def _asserts(condition: Callable[[str, int], bool]) -> Node:
    return lambda program: program.add("assert", condition)


def _sequence(nodes: list[Node]) -> Node:
    def emit(program: _Program) -> None:
        for node in nodes:
            node(program)

    return emit


def _alternatives(options: list[Node]) -> Node:
    def emit(program: _Program) -> None:
        jumps = []
        for option in options[:-1]:
            split = program.add("split")
            option(program)
            jumps.append(program.add("jump"))
            program.code[split] = ("split", split + 1, len(program.code))
        options[-1](program)
        for jump in jumps:
            program.code[jump] = ("jump", len(program.code), 0)

    return emit


def _capture(node: Node, number: int) -> Node:
    def emit(program: _Program) -> None:
        program.add("save", 2 * number)
        node(program)
        program.add("save", 2 * number + 1)

    return emit


def _repeat(node: Node, least: int, most: int | None, lazy: bool) -> Node:
    def emit(program: _Program) -> None:
        def set_split(split: int, body: int, after: int) -> None:
            program.code[split] = ("split", after, body) if lazy else ("split", body, after)

        for _ in range(least):
            node(program)
        if most is None:
            split = program.add("split")
            node(program)
            program.add("jump", split)
            set_split(split, split + 1, len(program.code))
            return
        splits = []
        for _ in range(most - least):
            splits.append(program.add("split"))
            node(program)
        for split in splits:
            set_split(split, split + 1, len(program.code))

    return emit
