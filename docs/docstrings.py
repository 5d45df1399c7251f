"""How mkdocstrings reads our docstrings: sections, and links where backticks name what is documented."""

import re

import griffe

_NAME = re.compile(r"(?<!`)`([A-Za-z_][\w.]*)`(?!`)")


class Docstrings(griffe.Extension):
    """Lets ``Example:`` be a section, ``::`` before a block be Markdown, and `Names` be links."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is None:
            return
        text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
        text = re.sub(r"^::$", "", text, flags=re.M)
        text = re.sub(r"::$", ":", text, flags=re.M)
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
