"""The value of a piece of arithmetic that a model wrote, found without running any of it.

Numbers, + - * / // % **, signs and brackets; nothing else gets past the first line that reads it: no names, no calls.
Values are exact fractions, so 0.1 + 0.2 is 3/10. Length, depth and size of all numbers are bounded, so that what is
evaluated is done in well under a millisecond, or refused.
"""

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

MAX_LENGTH = 200  # characters
MAX_DEPTH = 50  # brackets and operators within one another
MAX_BITS = 512  # of numerator and of denominator, of every number on the way

_ALLOWED = re.compile(r"[0-9.+\-*/%() \t]+")
_AS_WRITTEN = str.maketrans({"×": "*", "⋅": "*", "÷": "/", "−": "-"})
_BINARY: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b), ast.Mod: operator.mod, ast.Pow: lambda a, b: _power(a, b),
}  # fmt: skip
_UNARY: dict[type, Callable[[Fraction], Fraction]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def evaluate(text: str) -> Fraction:
    """The value of an expression, by Python's rules of precedence: `evaluate("3*(4+5)") == 27`.

    The signs × ⋅ ÷ − stand for * * / -. A power takes a whole exponent, which may be negative.

    Raises:
        ValueError: if text is no such expression, divides by 0, or is too long, too deep, or makes too large a number.
    """
    body, source = _parsed(text)
    return _value(body, source, MAX_DEPTH)


def numbers_of(text: str) -> list[Fraction]:
    """The numbers an expression is made of, without their signs, in the order of writing; repeated as they are.

    Raises:
        ValueError: if text is no expression of numbers, as `evaluate`; its value is not asked for.
    """
    body, source = _parsed(text)
    found = [node for node in ast.walk(body) if isinstance(node, ast.Constant)]
    return [_value(node, source, 1) for node in sorted(found, key=lambda node: node.col_offset)]


def _parsed(text: str) -> tuple[ast.expr, str]:
    """The tree of an expression, and the text that its places count in."""
    if len(text) > MAX_LENGTH:
        raise ValueError(f"expression of {len(text)} characters, {text[:40]!r} ...: at most {MAX_LENGTH} are read")
    written = text.translate(_AS_WRITTEN).strip()
    if not _ALLOWED.fullmatch(written):
        raise ValueError(f"expression ({text!r}) must be made of digits, + - * / // % ** . and brackets alone")
    try:
        return ast.parse(written, mode="eval").body, written
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"expression ({text!r}) is not arithmetic: {error}") from error


def _value(node: ast.expr, source: str, depth: int) -> Fraction:
    """The value of a part; by a list of what is allowed, so that what is not thought of here is refused."""
    if depth == 0:
        raise ValueError(f"expression is more than {MAX_DEPTH} operations deep")
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return _bounded(
            Fraction(source[node.col_offset : node.end_col_offset])
        )  # as written, not the float nearest to it
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand, source, depth - 1))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left, source, depth - 1), _value(node.right, source, depth - 1)
        try:
            return _bounded(_BINARY[type(node.op)](left, right))
        except ZeroDivisionError as error:
            raise ValueError("expression divides by 0") from error
    raise ValueError(f"expression holds {type(node).__name__}: only numbers and + - * / // % ** are arithmetic")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ValueError(f"expression holds the exponent {exponent}: only whole ones are read")
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if base not in (-1, 0, 1) and abs(exponent) * (size - 1) > MAX_BITS:  # asked first: 9**9**9 would not end
        raise ValueError(f"expression holds a power of more than {MAX_BITS} bits")
    return Fraction(base ** int(exponent))


def _bounded(number: Fraction) -> Fraction:
    if max(number.numerator.bit_length(), number.denominator.bit_length()) > MAX_BITS:
        raise ValueError(f"expression makes a number of more than {MAX_BITS} bits")
    return number
