"""Expressions over metrics: what they mean, what is refused, and that nothing is ever executed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.monitor.expressions import ALIASES, Expression, ExpressionError, validate_expression
from turnwise.monitor.history import History


def history(window: int = 3, **series: list[float]) -> History:
    """A history with one value a step from step 1; names are aliases."""
    kept = History(window)
    for name, values in series.items():
        for step, value in enumerate(values, start=1):
            kept.step = max(kept.step, step)
            kept.record(step, ALIASES.get(name, name), value)
    return kept


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("running_mean(total_reward) > 1", {"critic/reward/mean"}),
        ("running_mean(feedback_reward) > 1", {"reward/feedback/mean"}),
        ("latest(win_rate) > 1", {"env/win_rate/mean"}),
        ("step_time > 80 and loss < 1 and grad_norm < 1", {"timing/step_s", "actor/loss", "actor/grad_norm"}),
        ('running_mean("val-core/wordle/reward/mean") > 1', {"val-core/wordle/reward/mean"}),
        ("running_mean(`val-core/openai/gsm8k/acc/mean`) > 1", {"val-core/openai/gsm8k/acc/mean"}),
        ("running_mean(val-core/wordle/reward/mean) > 1", {"val-core/wordle/reward/mean"}),
        ("critic/reward/std > 1", {"critic/reward/std"}),
        ("latest(critic.reward.mean) > 1", {"critic/reward/mean"}),
        ("latest(val_core.wordle.reward.mean) > 1", {"val-core/wordle/reward/mean"}),
        ("loss/grad_norm > 1", {"actor/loss", "actor/grad_norm"}),
    ],
)
def test_every_spelling_of_a_metric_leads_to_its_full_name(text: str, names: set[str]) -> None:
    assert Expression(text).names == names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("running_mean(total_reward) > 2.9", True),  # mean of 2, 3, 4 is 3
        ("running_mean(total_reward) > 3", False),
        ("running_mean(total_reward, 2) == 3.5", True),
        ("running_mean(total_reward, window=4) == 2.5", True),
        ("latest(total_reward) == 4 and total_reward == 4", True),
        ("minimum(total_reward) == 1 and maximum(total_reward) == 4", True),
        ("minimum(total_reward, window=2) == 3", True),
        ("total_reward - 1 == 6 / 2 and -total_reward < 0", True),
        ("not total_reward > 4 or loss > 1", True),
        ("step == 4", True),
        ("total_reward / 0 > 1", False),
        ("not total_reward / 0 > 1", False),
    ],
)
def test_a_condition_holds_for_the_numbers_it_should(text: str, expected: bool) -> None:
    assert Expression(text).holds(history(total_reward=[1, 2, 3, 4])) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("loss > 0", False),
        ("not loss > 0", False),
        ("total_reward > 0 or loss > 0", True),
        ("loss > 0 or total_reward > 0", True),
        ("total_reward > 0 and loss > 0", False),
        ("not (total_reward < 0 and loss > 0)", True),
    ],
)
def test_a_metric_without_a_value_is_unknown_not_zero(text: str, expected: bool) -> None:
    assert Expression(text).holds(history(total_reward=[1.0])) is expected


def test_a_running_mean_has_no_value_before_its_window_is_full() -> None:
    condition = Expression("running_mean(total_reward) > 1")
    assert not condition.holds(history(total_reward=[9.0, 9.0]))
    assert condition.holds(history(total_reward=[9.0, 9.0, 9.0]))


def test_a_running_mean_of_a_rare_metric_is_over_the_steps_not_the_values() -> None:
    kept = History(window=10)
    for step in (0, 5, 10, 15):
        kept.step = step
        kept.record(step, "val-core/wordle/reward/mean", float(step))
    assert kept.running_mean("val-core/wordle/reward/mean") == 12.5


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "cannot be read"),
        ("total_reward >", "cannot be read"),
        ("((((" * 200, "cannot be read"),
        ("running_mean(total_reward)", "is a number, not a condition"),
        ("total_reward and loss > 1", "compare it"),
        ("(loss > 1) + 1 > 1", "is a condition where a number belongs"),
        ("mean(loss) > 1", "unknown function `mean`"),
        ("running_meen(loss) > 1", "did you mean `running_mean`"),
        ("running_mean() > 1", "write running_mean(metric)"),
        ("running_mean(loss, span=3) > 1", "write running_mean(metric)"),
        ("running_mean(loss, 0) > 1", "window = 0"),
        ("running_mean(loss, 2.5) > 1", "window = 2.5"),
        ("running_mean(loss + 1) > 1", "is not a metric"),
        ("latest('crit/reward/mean') > 1", "did you mean `critic`"),
        ("1 < loss < 2", "join two by `and`"),
        ("loss in (1, 2)", "compare by"),
        ("loss ** 9999999 > 1", "not allowed"),
        ("[x for x in (1,)] > 1", "not allowed"),
        ("True", "not allowed"),
        ("__import__('os').system('true') > 1", "unknown function"),
        ("().__class__.__bases__ > 1", "no metric begins with"),
        ("x" * 3000, "longer than 2000"),
    ],
)
def test_what_is_no_condition_is_refused_with_a_remedy(text: str, problem: str) -> None:
    assert problem in str(validate_expression(text))
    with pytest.raises(ExpressionError):
        Expression(text)


@settings(deadline=None, max_examples=300)
@given(st.text(max_size=60) | st.text(alphabet="lossrunig_mea()'\"`/.<>=+-*,0123456789 and or not", max_size=60))
def test_any_text_is_a_condition_or_a_problem_but_never_an_exception(text: str) -> None:
    problem = validate_expression(text)
    assert problem is None or problem
    if problem is None:
        assert Expression(text).holds(history(total_reward=[1.0])) in (True, False)


numbers = st.integers(-20, 20).map(lambda n: f"({n})" if n < 0 else str(n))
sums = st.recursive(
    numbers, lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda t: f"({' '.join(t)})"), max_leaves=6
)


@settings(deadline=None)
@given(sums, st.sampled_from([">", ">=", "<", "<=", "==", "!="]), sums)
def test_arithmetic_and_comparisons_agree_with_python(left: str, compare: str, right: str) -> None:
    text = f"{left} {compare} {right}"
    assert Expression(text).holds(History(1)) is eval(text)
