"""Sphinx's settings: ``make docs`` builds the site into build/docs, offline, every warning an error."""

from __future__ import annotations

import inspect
import logging
from typing import Any

from sphinx.ext.napoleon.docstring import GoogleDocstring

import selbp
import selbp.ops
import selbp.sampling

project = "selbp"
author = "the authors of selbp"
copyright = author
release = version = selbp.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
nitpicky = True
# Nothing is downloaded, so names of Python and torch are shown without a link. Our own must all resolve.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|collections|typing|types|numbers|enum|nn)\..*"),
    ("py:.*", r"[a-z]+|Any|Callable|Counter|Literal|Mapping|Sequence|Iterable|Iterator|Tensor|Self|[A-Z]\w*Error"),
    ("py:.*", r'[{"].*|.*[}"]'),  # {"a", "b"}: the values that an argument may have
]

html_theme = "furo"
html_title = f"selbp {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_copy_source = False

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give types, shapes and dtypes
autodoc_class_signature = "mixed"
autodoc_default_options = {"exclude-members": "select, state_dict, load_state_dict"}
python_maximum_signature_line_length = 100
napoleon_use_ivar = True
napoleon_use_param = False
napoleon_use_rtype = False

_PUBLIC = {
    f"{thing.__module__}.{thing.__qualname__}": f"{room.__name__}.{name}"
    for room in (selbp.ops, selbp, selbp.sampling)  # the last one names it
    for name in room.__all__
    if inspect.isclass(thing := getattr(room, name)) or inspect.isfunction(thing)
}
_PUBLIC |= {f"selbp.{name}": f"selbp.sampling.{name}" for name in selbp.sampling.__all__}


def _where_it_is_public(app: Any, env: Any, node: Any, text: Any) -> Any:
    """Link a name of the file that defines it (``selbp.types.Selection``) as the name that users import."""
    target = node.get("reftarget", "")
    for inside, public in _PUBLIC.items():
        if target == inside or target.startswith(f"{inside}."):
            wanted = public + target.removeprefix(inside)
            domain = env.domains["py"]
            return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], wanted, node, text)
    return None


def setup(app: Any) -> None:
    """Called by Sphinx."""
    # A property's docstring is text: what stands before its first colon is no type.
    GoogleDocstring._parse_attribute_docstring = GoogleDocstring._consume_to_end
    # A toctree ends in `*`, for pages that no line before names. Where there are none, Sphinx warns, without a name
    # for the warning that `suppress_warnings` could hold.
    toctrees = logging.getLogger("sphinx.sphinx.directives.other")
    toctrees.addFilter(lambda record: "didn't match any documents" not in str(record.msg))
    app.connect("missing-reference", _where_it_is_public)
