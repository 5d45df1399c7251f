"""Blocks of a page, run as a reader would: `python -m tests.pages PAGE...` writes what they print and draw.

A Python block runs after those before it; one with a title is written to a file of that name. A shell block
runs where `<!-- run -->` stands over it. A `text` block that follows is what was printed. Pictures that a
page shows from its own folder are files that its blocks write. `<!-- skip: reason -->` leaves a block out.
"""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(
    r"(?:<!-- (?P<mark>run|skip: [^\n]+) -->\n)?"
    r'^```(?P<kind>python|sh)(?: title="(?P<title>[^"]+)")?\n(?P<code>.*?)^```$'
    r"(?:\n\n```text\n(?P<said>.*?)^```$)?",
    re.M | re.S,
)
_NUMBER = re.compile(r"\d[\d,.]*(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Block:
    """What to run, the file to write it to instead, and what the page says that it prints, if it does."""

    line: int
    kind: str
    title: str | None
    code: str
    said: str | None
    said_at: tuple[int, int]


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that are to be run or written."""
    text = page.read_text()
    found = list(_BLOCK.finditer(text))
    n_python = len(re.findall(r"^```python\b", text, re.M))
    assert n_python == sum(m["kind"] == "python" for m in found), f"a block of {page.name} is not closed"
    kept = [m for m in found if m["mark"] == "run" or (m["kind"] == "python" and not m["mark"])]
    return [
        Block(
            text.count("\n", 0, m.start("code")), m["kind"], m["title"], m["code"], m["said"], m.span("said")
        )
        for m in kept
    ]


def pictures(page: Path) -> list[str]:
    """Names of the pictures that the blocks of a page have to draw."""
    code = "".join(block.code for block in blocks(page))
    return [name for name in re.findall(r"!\[[^\]]*\]\(([\w-]+\.svg)\)", page.read_text()) if name in code]


def run(page: Path) -> list[tuple[Block, str]]:
    """Run the blocks in the working directory; each with what it printed."""
    # As the main module would be: dataclasses look their module up by name.
    namespace = {"__name__": "__main__"}
    done = []
    for block in blocks(page):
        printed = io.StringIO()
        if block.title:
            Path(block.title).write_text(block.code)
        elif block.kind == "sh":
            printed.write(_shell(block.code))
        else:
            with contextlib.redirect_stdout(printed):
                code = compile("\n" * block.line + block.code, str(page), "exec", dont_inherit=True)
                exec(code, namespace)
        done.append((block, printed.getvalue()))
    return done


def _shell(code: str) -> str:
    """What the shell prints, where the scripts of this Python come first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", "-euo", "pipefail", "-c", code]
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def form(text: str) -> str:
    """A text without its numbers and spacing, which may differ a little from machine to machine."""
    return re.sub(r"\s+", " ", _NUMBER.sub("#", text)).strip()


def main(names: list[str]) -> None:
    """Write what the blocks print into the pages, and what they draw beside them."""
    for page in (Path(name).resolve() for name in names):
        text = page.read_text()
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            done = run(page)
            for name in pictures(page):
                shutil.copy(name, page.parent / name)
        for block, printed in reversed(done):
            if block.said is not None:
                start, stop = block.said_at
                text = text[:start] + printed + text[stop:]
        page.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
