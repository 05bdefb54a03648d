"""The pages of docs/, without building the site: every page is in a toctree, every link and anchor
exists, every quotation of the source is in the source, every setting exists, and every command is
accepted.
"""

import ast
import functools
import pathlib
import re
import shlex
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from r2m_jax.config import check_config
from r2m_jax.knobs import KNOBS, TASKS, walk
from r2m_jax.run.command_line import with_config_paths

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob("*/README.md")])
FENCE = re.compile(r"^ *```.*?^ *```$", re.M | re.S)
LINK = re.compile(r"(?<!!)\[(?:[^][]|\[[^]]*\])*\]\(([^)\s]+)\)")
INCLUDE = re.compile(r"^```\{include\} (\S+)$", re.M)
# from another library, so not in our source
JAX_OWN = {"RESOURCE_EXHAUSTED: Out of memory"}


@functools.cache
def text_of(path: pathlib.Path) -> str:
  """The text of a page and of the files that it includes."""
  text = path.read_text(encoding="utf-8")
  included = [text_of((path.parent / name).resolve()) for name in INCLUDE.findall(text)]
  return "\n".join([text, *included])


def slug(heading: str) -> str:
  """The anchor of a heading, on GitHub and on the site."""
  plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
  return re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")


@functools.cache
def anchors(path: pathlib.Path) -> set[str]:
  found: dict[str, int] = {}
  names = set()
  for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(path)), re.M):
    name = slug(heading)
    count = found[name] = found.get(name, -1) + 1
    names.add(f"{name}-{count}" if count else name)
  return names


def links_of(path: pathlib.Path):
  """(file, anchor) of every link of a page to a file of the repository."""
  for target in LINK.findall(FENCE.sub("", path.read_text(encoding="utf-8"))):
    if not re.match(r"[a-z]+:", target):
      name, _, anchor = target.partition("#")
      yield (path.parent / name).resolve() if name else path, anchor


def toctree() -> list[str]:
  """The pages that docs/index.md lists, in order."""
  found = re.findall(r"```\{toctree\}\n(.*?)```", (DOCS / "index.md").read_text(), re.S)
  lines = [line for part in found for line in part.splitlines()]
  return [line for line in lines if line and not line.startswith(":")]


def test_every_page_is_in_the_toctree_once():
  pages = {path.stem for path in DOCS.glob("*.md")} - {"index"}
  assert sorted(toctree()) == sorted(pages)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_anchors_resolve(page):
  broken = []
  for path, anchor in links_of(page):
    if not path.exists():
      broken.append(f"{path} does not exist")
    elif anchor and path.suffix == ".md" and anchor not in anchors(path):
      broken.append(f"{path.relative_to(ROOT)} has no heading for #{anchor}")
  assert not broken, "\n".join(broken)


def test_slugs_are_those_of_github():
  assert slug("Estimators: `config.algorithm`") == "estimators-configalgorithm"
  assert slug("A model family (at most 3 files)") == "a-model-family-at-most-3-files"
  assert slug("What R2M adds, [here](x.md)") == "what-r2m-adds-here"


def test_functions_that_a_page_links_exist():
  linked = re.findall(r"\[`(\w+)`\]\((\.\./[\w/]+\.py)\)", (DOCS / "concepts.md").read_text())
  assert len(linked) > 15
  for name, path in linked:
    source = (DOCS / path).read_text(encoding="utf-8")
    assert re.search(rf"^\s*(def|class) {name}\b", source, re.M), f"{path} has no {name}"


def test_every_equation_is_listed():
  text = (DOCS / "concepts.md").read_text()
  assert all(f"| ({number})" in text for number in range(1, 8))


def commands_of(page: pathlib.Path) -> list[list[str]]:
  """The arguments of every r2m command in the code of a page. Variables of the same block are
  filled in. Commands with other variables or with parts left out (...) are not listed.
  """
  text, found = page.read_text(encoding="utf-8"), []
  for block in [*FENCE.findall(text), *re.findall(r"`(r2m --[^`]*)`", FENCE.sub("", text))]:
    block = re.sub(r"\\\n *", "", block)
    values = dict(re.findall(r'(\w+)="([^"]*)"', block))
    block = re.sub(r"\$(\w+)", lambda name: values.get(name[1], name[0]), block)
    for line in re.findall(r"^(?:\w+=\S+ +)*(?:r2m|python -m r2m_jax\.main) (--.*)", block, re.M):
      if not re.search(r"\.\.\.|\$|=CONFIG|=NAME\.py|--help", line):
        found.append(shlex.split(line, comments=True))
  return found


@pytest.mark.filterwarnings("ignore:the load_module")  # ml_collections reads a file in this way
@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_accepted(page, monkeypatch):
  monkeypatch.chdir(ROOT)
  for given in commands_of(page):
    if any("wandb" in word for word in given):  # refused unless it is installed
      continue
    argv = with_config_paths(["r2m", *given])
    monkeypatch.setattr(sys, "argv", argv)  # from which ml_collections reads the settings
    names = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, lock_config=True, flag_values=names)
    flags.DEFINE_string("workdir", None, "", flag_values=names)
    assert names(argv) == ["r2m"], given
    assert names.workdir, given
    if not names.config.task.startswith("lab"):  # its arms take seconds, and have their own tests
      check_config(names.config)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_settings_exist(page):
  if page.name == "CHANGELOG.md":  # it names what earlier versions had
    return
  fields = {field for field, _ in walk(KNOBS)}
  text = page.read_text(encoding="utf-8")
  named = {name.rstrip(".") for name in re.findall(r"(?<![\w/-])-*config\.([a-z][\w.]*)", text)}
  named -= {"json", "md", "py"}  # files
  assert named <= fields, f"{page.name} names settings that do not exist: {sorted(named - fields)}"


def test_commands_are_found():
  """The pages for newcomers have many, and those with shell variables are filled in."""
  count = {page.stem: len(commands_of(page)) for page in DOCS.glob("*.md")}
  assert count["quickstart"] >= 5 and count["tutorial"] >= 4 and count["models"] >= 7, count
  assert commands_of(DOCS / "reproduce.md")[0][2] == "--config.policy.path=runs/qwen/export/policy"


def template(node) -> str:
  """The text of a string with … for every value; of a sum, one part after another."""
  match node:
    case ast.Constant(value=str(value)):
      return value
    case ast.JoinedStr(values=parts):
      return "".join(map(template, parts))
    case ast.BinOp(left=left, op=ast.Add(), right=right):
      return template(left) + template(right)
  return "…"


@functools.cache
def strings() -> str:
  """Every string of the library's source, one per line."""
  nodes = [
    node
    for path in sorted((ROOT / "r2m_jax").rglob("*.py"))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
  ]
  return "\n".join(" ".join(template(node).split()) for node in nodes if template(node) != "…")


def quoted() -> list[str]:
  text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
  return re.findall(r"^\*\*`(.+)`\*\*$", text, re.M)


def test_troubleshooting_has_messages_with_a_fix_below_each():
  text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
  assert len(quoted()) >= 20
  assert len(re.findall(r"^\*\*`.+`\*\*\n\n\S", text, re.M)) == len(quoted())


@pytest.mark.parametrize("message", quoted())
def test_quoted_messages_are_in_the_source(message):
  if message in JAX_OWN:
    return
  parts = [part.strip(" ;:,.") for part in message.split("…")]
  parts = [part for part in parts if len(part) > 6]
  assert parts
  lines = [line for line in strings().splitlines() if parts[0] in line]
  assert any(all(part in line for part in parts) for line in lines), parts


def test_the_configuration_of_the_site_rewrites_links():
  names = {"__file__": str(DOCS / "conf.py"), "__name__": "conf"}
  exec(compile((DOCS / "conf.py").read_text(), "conf.py", "exec"), names)
  rewrite = names["rewrite"]
  github = "https://github.com/r2m-jax/r2m_jax"
  assert rewrite("[a](data.md#x) [b](#y)") == "[a](data.md#x) [b](#y)"
  assert rewrite("[launch/](../launch/README.md#spot)") == "[launch/](launch.md#spot)"
  assert rewrite("[r](../README.md)") == f"[r]({github}/blob/main/README.md)"
  assert rewrite("[d](../benchmarks)") == f"[d]({github}/tree/main/benchmarks)"
  line = next(
    number
    for number, text in enumerate((ROOT / "r2m_jax/models/reward.py").open(), 1)
    if "def fuse(" in text
  )
  linked = rewrite("[`fuse`](../r2m_jax/models/reward.py)")
  assert linked == f"[`fuse`]({github}/blob/main/r2m_jax/models/reward.py#L{line})"
  code = "```bash\n[x](../README.md)\n```"
  assert rewrite(code) == code
  assert rewrite("[h](../docs/hosts.md)", "launch") == "[h](hosts.md)"
  assert all(name in names["help_tables"]() for name in TASKS)
