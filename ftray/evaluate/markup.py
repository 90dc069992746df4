"""HTML built as values: text is escaped where it enters, so what a data row says can never become markup."""

from __future__ import annotations

from html import escape


class Html(str):
    """Finished markup. Every other string is text, and is escaped by `tag`."""

    __slots__ = ()


def tag(name: str, *children: object, **attributes: object) -> Html:
    """`tag("td", "a < b", class_="n")` is `<td class="n">a &lt; b</td>`.

    Children: Html as it is, other values as escaped text, None left out. Attributes: a trailing _ is dropped and
    other _ become -, None and False are left out, True has no value.
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: object) -> Html:
    """The children one after the other, escaped as `tag` does."""
    return Html(
        "".join(child if isinstance(child, Html) else escape(str(child)) for child in children if child is not None)
    )


def _attribute(key: str, value: object) -> str:
    name = key.rstrip("_").replace("_", "-")
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'
