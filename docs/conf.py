"""The site of ``docs/``: ``make docs``.  Sphinx reads Markdown as it lies in the repository, links included.

Its source folder is the repository's root, so that a page may point to the results of the benchmarks as it does on a
forge.  A link or heading that is not there fails the build (``-W``).
"""

from __future__ import annotations

from onetrans import __version__

project = "Daily ranking pipeline"
author = "the authors"
release = version = __version__

extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = ["docs/*.md", "benchmarks/results/*.md"]
exclude_patterns = [".venv", ".git", "var", "build", "dist", "tests", "node_modules"]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
# Blocks of commands and file trees are no program text.
highlight_language = "none"
suppress_warnings = ["misc.highlighting_failure"]

html_theme = "furo"
html_title = project
html_copy_source = False
html_show_sourcelink = False
# Nothing is fetched from elsewhere when a page is read.
html_theme_options = {"navigation_with_keys": True}
