"""What a docstring says: its first paragraph, and its parameters from the section "Args:"."""

import re

PARAMETER = re.compile(r"\*{0,2}(?P<name>\w+)(?: \([^)]*\))?: +(?P<text>.*)")


def read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """The first paragraph, and the descriptions under "Args:" by parameter; each in one line.

    Args:
        text: a docstring without its indentation, as `inspect.getdoc` gives it.
    """
    before, _, section = text.partition("\nArgs:\n")
    description = " ".join(before.partition("\n\n")[0].split())
    texts: dict[str, str] = {}
    lines = [line for line in section.split("\n") if line.strip()]
    indent = _depth(lines[0]) if lines else 0
    current = ""
    for line in lines:
        if _depth(line) < indent:
            break  # the next section
        match = PARAMETER.fullmatch(line.strip()) if _depth(line) == indent else None
        if match:
            current = match["name"]
            texts[current] = match["text"]
        elif current:
            texts[current] += f" {line.strip()}"
    return description, texts


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())
