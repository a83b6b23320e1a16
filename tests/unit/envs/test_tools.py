"""Tools from typed methods: schemas, validation, what is refused when a class is defined."""

from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field
from typing_extensions import TypedDict

from turnwise.envs.tools import ToolError, ToolMethod, tool, tool_methods


class Span(TypedDict):
    start: int
    end: int


class Shelf:
    """Tools without an environment: `tool_methods` reads any class."""

    @tool
    def search(self, query: str, k: int = 5, order: Literal["best", "newest"] = "best") -> str:
        """Find pages,
        by their words.

        Only the first paragraph is for the policy.

        Args:
            query: words that
                the page contains
            k: how many
            order (str): which come first

        Returns:
            Something that is not a parameter: nor is this.
        """
        return f"{query} {k} {order}"

    @tool(name="cut-out")
    def cut(self, pages: list[int], share: float | None = None, whole: bool = False, span: Span | None = None) -> str:
        """Cut pages out.
        Args:

            pages: which
        """
        return f"{pages} {share} {whole} {span}"

    def no_tool(self, anything: object) -> str:
        raise AssertionError(anything)

    @tool
    def rate(self, stars: Annotated[int, Field(ge=1, le=5)]) -> str:
        """Rate."""
        return str(stars)


METHODS = tool_methods(Shelf)
SEARCH, CUT, RATE = METHODS.values()


def test_tools_come_in_the_order_of_definition_with_schema_and_texts() -> None:
    assert list(METHODS) == ["search", "cut-out", "rate"]
    assert SEARCH.tool.description == "Find pages, by their words."
    assert SEARCH.tool.parameters == {
        "type": "object",
        "properties": {
            "query": {"type": "string", "description": "words that the page contains"},
            "k": {"type": "integer", "description": "how many", "default": 5},
            "order": {"type": "string", "enum": ["best", "newest"], "description": "which come first", "default": "best"},
        },
        "required": ["query"],
    }


def test_what_may_be_null_is_offered_as_what_may_be_left_out() -> None:
    properties = CUT.tool.parameters["properties"]
    assert properties["share"] == {"type": "number"}
    assert properties["whole"] == {"type": "boolean", "default": False}
    assert properties["pages"] == {"type": "array", "items": {"type": "integer"}, "description": "which"}
    assert CUT.tool.description == "Cut pages out."
    assert CUT.tool.parameters["required"] == ["pages"]
    definition = CUT.tool.parameters["$defs"]["Span"]
    assert definition["required"] == ["start", "end"]
    assert RATE.tool.parameters["properties"]["stars"] == {"type": "integer", "minimum": 1, "maximum": 5}


@pytest.mark.parametrize(
    ("method", "given_", "read"),
    [
        (SEARCH, {"query": "fjords"}, {"query": "fjords"}),
        (SEARCH, {"query": 1942, "k": "3"}, {"query": "1942", "k": 3}),
        (SEARCH, {"query": "[1]", "k": 3.0}, {"query": "[1]", "k": 3}),
        (SEARCH, {"query": "x", "k": None, "order": None}, {"query": "x", "k": 5, "order": "best"}),
        (CUT, {"pages": [1, "2"]}, {"pages": [1, 2]}),
        (CUT, {"pages": "[1, 2]"}, {"pages": [1, 2]}),
        (CUT, {"pages": 3}, {"pages": [3]}),
        (CUT, {"pages": "3"}, {"pages": [3]}),
        (CUT, {"pages": [], "share": "0.5", "whole": "true"}, {"pages": [], "share": 0.5, "whole": True}),
        (
            CUT,
            {"pages": [], "share": "null", "span": '{"start": 1, "end": 2}'},
            {"pages": [], "share": None, "span": {"start": 1, "end": 2}},
        ),
    ],
)
def test_arguments_are_read_as_models_mean_them(method: ToolMethod, given_: dict[str, Any], read: dict[str, Any]) -> None:
    assert method.arguments(given_) == read


@pytest.mark.parametrize(
    ("method", "given_", "words"),
    [
        (SEARCH, {}, "query is missing."),
        (SEARCH, {"query": ["a"]}, "query = ['a']: Input should be a valid string."),
        (SEARCH, {"query": "x", "oder": 3}, "search has no argument 'oder'; it takes query, k, order. Did you mean 'order'?"),
        (
            SEARCH,
            {"query": "x", "k": "many"},
            "k = 'many': Input should be a valid integer, unable to parse string as an integer.",
        ),
        (SEARCH, {"query": "x", "k": 2.5}, "k = 2.5: Input should be a valid integer, got a number with a fractional part."),
        (SEARCH, {"query": "x", "order": "oldest"}, "order = 'oldest': Input should be 'best' or 'newest'."),
        (SEARCH, {"query": None}, "query = None: Input should be a valid string."),
        (SEARCH, {"k": True, "nonsense": 1}, "search has no argument 'nonsense'; it takes query, k, order. query is missing."),
        (CUT, {"pages": [1, "a"]}, "pages = [1, 'a']: 1: Input should be a valid integer, unable to parse string as an integer."),
        (CUT, {"pages": [], "share": "nan"}, "share = 'nan': Input should be a finite number."),
        (CUT, {"pages": [], "span": {"start": 1}}, "span = {'start': 1}: end: Field required."),
        (RATE, {"stars": 6}, "stars = 6: Input should be less than or equal to 5."),
    ],
)
def test_wrong_arguments_are_refused_in_words(method: ToolMethod, given_: dict[str, Any], words: str) -> None:
    with pytest.raises(ToolError) as refused:
        method.arguments(given_)
    assert str(refused.value) == words


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(["query", "k", "order", "pages", "share", "whole", "span", "stars"]) | st.text(max_size=8)


@given(arguments=st.dictionaries(NAMES, JSON, max_size=5), method=st.sampled_from([SEARCH, CUT, RATE]))
@settings(deadline=None)
def test_any_arguments_either_fit_the_signature_or_are_refused_in_words(arguments: dict[str, Any], method: ToolMethod) -> None:
    try:
        read = method.arguments(arguments)
    except ToolError as error:
        words = str(error)
    else:
        words = getattr(Shelf(), method.attribute)(**read)
    assert 0 < len(words) < 2000


def test_an_example_shows_the_arguments_that_must_be_there() -> None:
    assert SEARCH.example() == '{"name": "search", "arguments": {"query": "..."}}'
    assert CUT.example() == '{"name": "cut-out", "arguments": {"pages": []}}'


def test_subclasses_add_replace_and_leave_out_tools() -> None:
    class More(Shelf):
        rate = None  # type: ignore[assignment]

        @tool
        def search(self, query: str) -> str:
            """Find a page."""
            return query

        @tool
        def close(self) -> str:
            """Close the shelf."""
            return ""

    found = tool_methods(More)
    assert list(found) == ["search", "cut-out", "close"]
    assert found["search"].tool.description == "Find a page."
    assert found["close"].tool.parameters == {"type": "object", "properties": {}, "required": []}


def no_docstring(self: object, query: str) -> str:
    return query


def no_annotation(self: object, query) -> str:  # type: ignore[no-untyped-def]
    """Find."""
    return query


def any_number(self: object, *queries: str) -> str:
    """Find."""
    return " ".join(queries)


def misdescribed(self: object, query: str) -> str:
    """Find.

    Args:
        querry: words
    """
    return query


def unreadable(self: object, query: "socket_without_schema") -> str:  # type: ignore[name-defined]  # noqa: F821
    """Find."""
    return str(query)


@pytest.mark.parametrize(
    ("function", "name", "error", "words"),
    [
        (no_docstring, None, TypeError, r"tool Broken\.find needs a docstring"),
        (no_annotation, None, TypeError, r"tool Broken\.find: parameter query needs an annotation"),
        (any_number, None, TypeError, r"tool Broken\.find: parameter \*queries: str must be one that can be given by its name"),
        (misdescribed, None, TypeError, r"tool Broken\.find: its docstring describes 'querry', which is no parameter"),
        (unreadable, None, NameError, r"socket_without_schema"),
        (Shelf.search, "find it", TypeError, r"the name 'find it' must be letters"),
    ],
)
def test_a_tool_that_cannot_be_offered_is_refused_when_the_class_is_defined(
    function: Any, name: str | None, error: type[Exception], words: str
) -> None:
    def wrapped(*args: Any) -> Any:
        return function(*args)

    import functools

    copy = functools.wraps(function)(wrapped)
    with pytest.raises(error, match=words):
        tool_methods(type("Broken", (), {"find": tool(name=name)(copy) if name else tool(copy)}))


def test_replacing_a_tool_without_the_mark_and_two_tools_of_one_name_are_refused() -> None:
    class Silent(Shelf):
        def search(self, query: str, k: int = 5, order: Literal["best", "newest"] = "best") -> str:
            return query

    with pytest.raises(TypeError, match=r"Silent\.search replaces a tool without being one; write @tool above it"):
        tool_methods(Silent)

    class Twice(Shelf):
        @tool(name="search")
        def find(self, query: str) -> str:
            """Find."""
            return query

    with pytest.raises(TypeError, match=r"Twice has two tools of one name"):
        tool_methods(Twice)
