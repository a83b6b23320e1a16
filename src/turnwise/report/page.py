"""Pages made of paragraphs, tables and pictures, as Markdown and as one HTML file."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NONE = "–"  # in a cell: there is no value
STYLE = """body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; display: block; overflow-x: auto; }
th, td { border: 1px solid #ccc; padding: 3px 8px; text-align: left; } th { background: #f3f3f3; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
img { max-width: 100%; }"""


@dataclass(frozen=True)
class Table:
    """Heads and cells; columns of `numbers` are set to the right."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[int] = frozenset()

    def without_empty_columns(self) -> "Table":
        """The columns in which a row says something; those of an empty table all stay."""
        kept = [at for at in range(len(self.heads)) if not self.rows or any(row[at] not in ("", NONE) for row in self.rows)]
        cells = tuple(tuple(row[at] for at in kept) for row in self.rows)
        return Table(tuple(self.heads[at] for at in kept), cells, frozenset(kept.index(at) for at in self.numbers if at in kept))

    def markdown(self) -> str:
        ruler = ["---:" if at in self.numbers else "---" for at in range(len(self.heads))]
        lines = [self.heads, tuple(ruler), *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


@dataclass(frozen=True)
class Picture:
    """An image under the page's folder."""

    caption: str
    path: Path


Block = str | Table | Picture | list[str]  # a paragraph, "## a heading", a table, a picture, a list


def markdown_page(root: Path, blocks: Sequence[Block]) -> str:
    parts: list[str] = []
    for block in blocks:
        if isinstance(block, Table):
            parts.append(block.markdown())
        elif isinstance(block, Picture):
            parts.append(f"![{block.caption}]({block.path.relative_to(root).as_posix()})")
        elif isinstance(block, list):
            parts.append("\n".join(f"- `{line}`" for line in block))
        else:
            parts.append(block)
    return "\n\n".join(parts) + "\n"


def html_page(title: str, blocks: Sequence[Block]) -> str:
    body = "\n".join(map(_html_block, blocks))
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _html_block(block: Block) -> str:
    if isinstance(block, Table):
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in block.heads)
        lines = ["".join(_html_cell(cell, at in block.numbers) for at, cell in enumerate(row)) for row in block.rows]
        return f"<table><tr>{head}</tr>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
    if isinstance(block, Picture):
        data = base64.b64encode(block.path.read_bytes()).decode()
        return f'<p><img alt="{html.escape(block.caption)}" src="data:image/png;base64,{data}"></p>'
    if isinstance(block, list):
        return "<ul>" + "".join(f"<li><code>{html.escape(line)}</code></li>" for line in block) + "</ul>"
    level = len(block) - len(block.lstrip("#"))
    text = _inline(html.escape(block.lstrip("# ")))
    return f"<h{level}>{text}</h{level}>" if level else f"<p>{text}</p>"


def _html_cell(cell: str, number: bool) -> str:
    return f'<td class="number">{html.escape(cell)}</td>' if number else f"<td>{html.escape(cell)}</td>"


def _inline(text: str) -> str:
    """`code` and *emphasis*."""
    for mark, tag in (("`", "code"), ("*", "em")):
        pieces = text.split(mark)
        text = "".join(f"<{tag}>{piece}</{tag}>" if at % 2 else piece for at, piece in enumerate(pieces))
    return text
