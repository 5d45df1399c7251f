"""How mkdocstrings finds and reads our docstrings. It imports nothing, so a build needs no torch."""

import re
import tempfile
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority

_FOLDER = tempfile.TemporaryDirectory()  # until the build ends
_NAME = re.compile(r"(?<!`)`([A-Za-z_][\w.]*)`(?!`)")


@event_priority(100)  # before mkdocstrings reads its configuration
def on_config(config: MkDocsConfig) -> None:
    """Let `atlasvi_kernels` be found, whose folder has another name."""
    root = Path(config.config_file_path).parent
    kernels = Path(_FOLDER.name) / "atlasvi_kernels"
    if not kernels.exists():  # `mkdocs serve` comes here after every change
        kernels.symlink_to(root / "kernels")
    config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [str(root), _FOLDER.name]


class Docstrings(griffe.Extension):
    """Makes ``Example:`` a section, ``::`` Markdown, and a `name` that is documented a link."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is None:
            return
        text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
        text = re.sub(r"^::$", "", text, flags=re.M)
        text = re.sub(r"::$", ":", text, flags=re.M)
        text = re.sub(r"at the head of\s+this file", "[below][equations-of-the-models]", text)
        parts = re.split(r"(^Examples:$)", text, maxsplit=1, flags=re.M)
        parts[0] = _NAME.sub(lambda found: _link(obj, found[1]), parts[0])
        obj.docstring.value = "".join(parts)


def _link(obj: griffe.Object, name: str) -> str:
    """A reference that becomes a link if some page documents what ``name`` means where ``obj`` stands."""
    first, _, rest = name.partition(".")
    try:
        path = ".".join(filter(None, (obj.resolve(first), rest)))
    except griffe.NameResolutionError:
        return f"`{name}`"
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'
