"""Expressions over metrics, such as `running_mean(total_reward) > 1.5 and latest(entropy) > 0.1`.

Parsed with `ast` and compiled from a whitelist of nodes into closures: nothing of the text is ever executed. A metric
without a value makes what depends on it unknown (Kleene logic); a condition holds only when it is known to be true.
"""

import ast
import difflib
import operator
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

from turnwise.monitor.history import History

AREAS = (
    "actor", "canary", "critic", "engine", "env", "groups", "mismatch", "monitor", "noise", "num_turns", "perf", "prompt_length",
    "queue", "response_length", "reward", "rollouts", "staleness", "stop_reason", "throughput", "timing", "val-aux", "val-core",
)  # fmt: skip
ALIASES = {
    "total_reward": "critic/reward/mean",
    "step_time": "timing/step_s",
    "loss": "actor/loss",
    "grad_norm": "actor/grad_norm",
    "entropy": "actor/entropy",
    "kl": "actor/kl",
    "learning": "monitor/learning/state",
    "response_length": "response_length/mean",
    "num_turns": "num_turns/mean",
}
MAX_LENGTH = 2000  # characters; far beyond any condition, and short enough that the parser cannot exhaust the stack
_SEGMENT = r"[A-Za-z_][\w.:]*(?:-[A-Za-z_]\w*)*"
_NAMES = re.compile(rf"\"[^\"]*\"|'[^']*'|`([^`]*)`|((?<![\w/.])(?:{'|'.join(AREAS)})(?:/{_SEGMENT})+)")

Value = float | bool | None
_ARITHMETIC: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


def _extreme(pick: Callable[[list[float]], float]) -> Callable[[History, str, int | None], Value]:
    def function(history: History, name: str, window: int | None) -> Value:
        values = history.values(name, window)
        return pick(values) if values else None

    return function


FUNCTIONS: dict[str, Callable[[History, str, int | None], Value]] = {
    "running_mean": lambda history, name, window: history.running_mean(name, window),
    "latest": lambda history, name, window: history.latest(name),
    "minimum": _extreme(min),
    "maximum": _extreme(max),
}


class ExpressionError(ValueError):
    """The text is not an expression over metrics; the message says what is wrong and what would be right."""


@dataclass(frozen=True)
class Term:
    """A compiled node: what it yields, and how."""

    kind: Literal["number", "truth"]
    value: Callable[[History], Value]


class Expression:
    """A condition over metrics.

    Raises:
        ExpressionError: the text is not one.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.names: set[str] = set()  # full names of the metrics it reads
        term = self._compile(_parse(text))
        if term.kind != "truth":
            raise ExpressionError("it is a number, not a condition; compare it, as in `... > 1.5`")
        self._value = term.value

    def holds(self, history: History) -> bool:
        """True when the condition is known to be true."""
        return self._value(history) is True

    def _compile(self, node: ast.expr) -> Term:
        match node:
            case ast.BoolOp():
                return _bool_op(node.op, [self._truth(value) for value in node.values])
            case ast.UnaryOp(op=ast.Not()):
                operand = self._truth(node.operand)
                return Term("truth", lambda history: None if (value := operand.value(history)) is None else not value)
            case ast.UnaryOp(op=ast.USub()):
                operand = self._number(node.operand)
                return Term("number", lambda history: None if (value := operand.value(history)) is None else -value)
            case ast.Compare():
                return self._compare(node)
            case ast.BinOp() if type(node.op) in _ARITHMETIC:
                return _arithmetic(_ARITHMETIC[type(node.op)], self._number(node.left), self._number(node.right))
            case ast.Call():
                return self._call(node)
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return Term("number", lambda history: number)
            case ast.Name(id="step"):
                return Term("number", lambda history: history.step)
            case ast.Name() | ast.Attribute() | ast.Constant(value=str()):
                name = self._metric(node)
                return Term("number", lambda history: history.latest(name))
            case _:
                raise ExpressionError(
                    f"`{ast.unparse(node)}` is not allowed; use metrics, numbers, + - * /, comparisons, and/or/not"
                )

    def _number(self, node: ast.expr) -> Term:
        term = self._compile(node)
        if term.kind != "number":
            raise ExpressionError(f"`{ast.unparse(node)}` is a condition where a number belongs")
        return term

    def _truth(self, node: ast.expr) -> Term:
        term = self._compile(node)
        if term.kind != "truth":
            raise ExpressionError(f"`{ast.unparse(node)}` is a number where a condition belongs; compare it, as in `... > 1.5`")
        return term

    def _compare(self, node: ast.Compare) -> Term:
        if len(node.ops) > 1:
            raise ExpressionError(f"`{ast.unparse(node)}` chains comparisons; join two by `and`")
        compare = _COMPARISONS.get(type(node.ops[0]))
        if compare is None:
            raise ExpressionError(f"`{ast.unparse(node)}`: compare by > >= < <= == or !=")
        left, right = self._number(node.left), self._number(node.comparators[0])
        return Term("truth", _both(compare, left, right))

    def _call(self, node: ast.Call) -> Term:
        name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
        function = FUNCTIONS.get(name)
        if function is None:
            raise ExpressionError(f"unknown function `{name}`; there are {', '.join(FUNCTIONS)}{_did_you_mean(name, FUNCTIONS)}")
        given = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "window")]
        if not node.args or len(given) > 2 or len(given) != len(node.args) + len(node.keywords):
            raise ExpressionError(f"`{ast.unparse(node)}`: write {name}(metric) or {name}(metric, window=20)")
        metric, window = self._metric(given[0]), _window(given[1]) if len(given) == 2 else None
        return Term("number", lambda history: function(history, metric, window))

    def _metric(self, node: ast.expr) -> str:
        name = _metric_name(node)
        self.names.add(name)
        return name


def validate_expression(text: str) -> str | None:
    """What is wrong with a condition, or None: for rules that are checked before anything starts."""
    try:
        Expression(text)
    except ExpressionError as error:
        return str(error)
    return None


def _parse(text: str) -> ast.expr:
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"it is longer than {MAX_LENGTH} characters")
    quoted = _NAMES.sub(lambda found: repr(found[1] or found[2]) if found[1] or found[2] else found[0], text)
    try:
        return ast.parse(quoted.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ExpressionError(f"it cannot be read ({reason}); write for example `running_mean(total_reward) > 1.5`") from error


def _metric_name(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str() as name):
            pass
        case ast.Name(id=name):
            pass
        case ast.Attribute():
            name = ast.unparse(node).replace(".", "/").replace("val_", "val-", 1)
        case _:
            raise ExpressionError(
                f"`{ast.unparse(node)}` is not a metric; name one, such as total_reward or `critic/reward/mean`"
            )
    return _full_name(name)


def _full_name(name: str) -> str:
    if "/" in name:
        area = name.split("/", 1)[0]
        if area not in AREAS:
            raise ExpressionError(f"no metric begins with `{area}/`; there are {', '.join(AREAS)}{_did_you_mean(area, AREAS)}")
        return name
    if name in ALIASES:
        return ALIASES[name]
    component = name.removesuffix("_reward")
    return f"reward/{component}/mean" if component != name else f"env/{name}/mean"


def _window(node: ast.expr) -> int:
    match node:
        case ast.Constant(value=int() as window) if window >= 1 and not isinstance(window, bool):
            return window
        case _:
            raise ExpressionError(f"window = {ast.unparse(node)} is not a whole number of steps, 1 or more")


def _both(function: Callable[[float, float], Value], left: Term, right: Term) -> Callable[[History], Value]:
    def value(history: History) -> Value:
        first, second = left.value(history), right.value(history)
        return None if first is None or second is None else function(first, second)

    return value


def _arithmetic(function: Callable[[float, float], float], left: Term, right: Term) -> Term:
    def guarded(first: float, second: float) -> Value:
        try:
            return function(first, second)
        except (ZeroDivisionError, OverflowError):
            return None  # unknown, as a metric without a value

    return Term("number", _both(guarded, left, right))


def _bool_op(op: ast.boolop, terms: list[Term]) -> Term:
    decisive = isinstance(op, ast.Or)  # one True settles an `or`, one False an `and`, whatever is unknown beside it

    def value(history: History) -> Value:
        values = [term.value(history) for term in terms]
        if decisive in values:
            return decisive
        return None if None in values else not decisive

    return Term("truth", value)


def _did_you_mean(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean `{close[0]}`?" if close else ""
