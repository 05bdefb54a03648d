"""The site: `./launch/docs.sh` builds these pages with Sphinx.

The pages are Markdown that also reads well on GitHub. Here links to files outside of docs/ become
links to GitHub, and a link whose text is a function gets the line of the function.
"""

import pathlib
import re

import r2m_jax
from r2m_jax.knobs import TASKS
from r2m_jax.run.command_line import named_configs, table

ROOT = pathlib.Path(__file__).resolve().parents[1]
GITHUB = "https://github.com/r2m-jax/r2m_jax"
PAGES = {"launch/README.md": "launch.md", "CONTRIBUTING.md": "extend.md"}  # which include them

project = "r2m_jax"
author = "the r2m_jax authors"
copyright = "the r2m_jax authors, Apache-2.0"
version = release = r2m_jax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_heading_anchors = 4
suppress_warnings = ["config.cache"]

html_theme = "sphinx_book_theme"
html_context = {"default_mode": "auto"}  # light or dark as the browser prefers
html_title = f"r2m_jax {version}"
html_theme_options = {
  "repository_url": GITHUB,
  "use_repository_button": True,
  "path_to_docs": "docs",
  "show_toc_level": 2,
  "navbar_persistent": [],  # the search is in the sidebar
}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
linkcheck_timeout = 20
linkcheck_retries = 2
linkcheck_anchors = False

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "none"
default_role = "code"  # of `name` in a docstring
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # of a NamedTuple autodoc lists the fields itself


def line_of(path: pathlib.Path, name: str) -> int | None:
  """The line that defines a function or class, or None."""
  if path.suffix != ".py" or not re.fullmatch(r"\w+", name):
    return None
  for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
    if re.match(rf"\s*(def|class) {name}\b", line):
      return number
  return None


def link(text: str, target: str) -> str:
  """A link of a page as the site needs it; `target` is relative to docs/."""
  path, _, anchor = target.partition("#")
  found = (ROOT / "docs" / path).resolve()
  if not path or found.parent == ROOT / "docs":
    return f"[{text}]({target})"
  name = found.relative_to(ROOT).as_posix()
  if name.startswith("docs/"):
    return f"[{text}]({target})"
  if name in PAGES:
    return f"[{text}]({PAGES[name]}{'#' + anchor if anchor else ''})"
  line = line_of(found, text.strip("`")) if found.is_file() else None
  end = f"#L{line}" if line else f"#{anchor}" if anchor else ""
  return f"[{text}]({GITHUB}/{'tree' if found.is_dir() else 'blob'}/main/{name}{end})"


LINK = re.compile(r"(?<!!)\[((?:[^][]|\[[^]]*\])*)\]\((?!https?:)([^)\s]+)\)")


def rewrite(text: str, folder: str = "docs") -> str:
  """A page with its links as the site needs them; `folder` is that of the page."""

  def replaced(match) -> str:
    target = match[2]
    if folder != "docs" and not target.startswith("#"):
      path = (ROOT / folder / target.partition("#")[0]).resolve().relative_to(ROOT)
      target = f"../{path.as_posix()}" + target[len(target.partition("#")[0]) :]
      target = target.removeprefix("../docs/")
    return link(match[1], target)

  parts = re.split(r"(^ *```.*?^ *```$)", text, flags=re.M | re.S)  # code stays as it is
  parts[::2] = [LINK.sub(replaced, part) for part in parts[::2]]
  return "".join(parts)


def help_tables() -> str:
  """What `r2m --help` prints of configs and tasks."""
  parts = (("Configs", named_configs()), ("Tasks", TASKS))
  return "".join(f"## {title}\n\n```text\n{table(rows)}\n```\n\n" for title, rows in parts)


def on_page(app, name, source) -> None:
  """Before a page is read."""
  source[0] = rewrite(source[0]).replace("<!-- r2m --help -->", help_tables())


def on_include(app, path, parent, content) -> None:
  """Before a file that a page includes is read."""
  folder = (ROOT / "docs" / path).resolve().parent.relative_to(ROOT).as_posix()
  content[0] = rewrite(content[0], folder)


SECTION = re.compile(r"\s*(Args|Attributes|Returns|Raises|Yields):$")


def apart(lines: list[str]) -> list[str]:
  """Puts an empty line wherever the indentation changes, up to the first section of arguments."""
  kept: list[str] = []
  for number, line in enumerate(lines):
    if SECTION.match(line):
      return kept + lines[number:]
    last = kept[-1] if kept else ""
    if line.strip() and last.strip() and indent(line) != indent(last):
      kept.append("")
    kept.append(line)
  return kept


def indent(line: str) -> int:
  return len(line) - len(line.lstrip())


def escaped(line: str) -> str:
  """A line in which nothing outside of backticks is markup."""
  parts = line.split("`")
  for at in range(0, len(parts), 2):
    parts[at] = re.sub(r"([*|])", r"\\\1", parts[at])
    parts[at] = re.sub(r"(\w)_(?=\W|$)", r"\1\\_", parts[at])
  return "`".join(parts)


def on_docstring(app, what, name, obj, options, lines) -> None:
  """Docstrings are plain text with code in backticks."""
  lines[:] = apart([escaped(line) for line in lines])


def setup(app) -> None:
  app.connect("source-read", on_page)
  app.connect("include-read", on_include)
  app.connect("autodoc-process-docstring", on_docstring, priority=100)
