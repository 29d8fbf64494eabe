"""How Sphinx builds the site; its sources are put together by make_site.py."""

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

from igd_lib.tools.version import VERSION

project = "igd_lib"
default_role = "code"
author = "the authors of igd_lib"
copyright = "Apache-2.0"
version = release = VERSION
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_copybutton"]
smartquotes = False  # "--" of a command in a sentence stays two dashes, and can be copied
html_theme = "furo"
html_title = f"igd_lib {VERSION}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "dollarmath", "amsmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type", "misc.highlighting_failure"]
autodoc_typehints = "none"  # they are in the signatures
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
html_math_renderer = "mathml"  # browsers draw it themselves: no script from elsewhere, so offline too


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", inline_renderers=(inline, None), block_renderers=(block, None))


def inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def block(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(convert(node.astext(), display="block"))
    raise nodes.SkipNode
