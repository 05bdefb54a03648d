"""The rules of the repository that a program can check: the order of imports, the length of lines
and functions, the commands in README.
"""

import ast
import functools
import os
import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LIBRARY = ROOT / "r2m_jax"
MAX_WIDTH = 120
MAX_LINES = 60  # maximum for a function of the library
# "file:function" -> reason for its length; at most five
LONG_FUNCTIONS: dict[str, str] = {}
MAX_UNFORMATTED = 10

# From the bottom up: a folder, or a file at the root, and the folders from which it may import.
# Files of one folder may import each other, but not in a circle.
MAY_IMPORT = {
  "types": "",
  "ops": "",
  "parallel": "",
  "models": "types ops parallel",
  "algorithm": "types ops parallel models",
  "knobs": "ops models algorithm",
  "config": "parallel models algorithm knobs",
  "step": "types ops parallel models algorithm",
  "run": "types ops parallel models algorithm knobs config step",
  "data": "types parallel algorithm config run",
  "hf": "parallel models algorithm config run data",
  "goldtask": "types ops parallel models algorithm step run",
  "report": "knobs config run",
  "judge": "parallel config run data report",
  "tasks": "types ops parallel models algorithm config step run data hf goldtask report judge",
  "plan": "types parallel models algorithm config step run data goldtask",
  "lab": "types ops parallel models algorithm config step run data hf goldtask report tasks",
  "analysis": "types ops parallel models algorithm config step run hf goldtask report tasks plan lab",
  "main": "parallel config run data hf tasks plan lab analysis",
}
ROOT_FILES = {"__init__", "step", "types", "ops", "knobs", "config", "main"}


@functools.cache
def library():
  """Module name -> path, for every file of the library; a package has the name of its folder."""
  found = {}
  for path in sorted(LIBRARY.rglob("*.py")):
    parts = path.relative_to(ROOT).with_suffix("").parts
    found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
  return found


@functools.cache
def tree_of(path):
  return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports_of(path):
  """(line, dotted name) of everything a file imports, at any depth; `from a import b` gives a.b."""
  package = path.relative_to(ROOT).parent.parts
  for node in ast.walk(tree_of(path)):
    if isinstance(node, ast.Import):
      yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      base = package[: len(package) - node.level + 1] if node.level else ()
      base = ".".join([*base, *([node.module] if node.module else [])])
      yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def house_module(name):
  """The longest leading part of a dotted name that is a file of the library: r2m_jax.ops.check
  -> r2m_jax.ops.
  """
  parts = name.split(".")
  return next(
    (module for n in range(len(parts), 0, -1) if (module := ".".join(parts[:n])) in library()), None
  )


def folder_of(module):
  """The row of a module: r2m_jax.run.loop -> run, r2m_jax.step -> step; "" for r2m_jax itself."""
  return module.split(".")[1] if "." in module else ""


@functools.cache
def arrows():
  """(file, line, file that it imports) for every import of the library from itself."""
  return [
    (name, line, target)
    for name, path in library().items()
    for line, imported in imports_of(path)
    if (target := house_module(imported)) and target != name
  ]


def points_down(importer, imported):
  """Whether a module may import another, by the folders alone."""
  above, below = folder_of(importer), folder_of(imported)
  return above != "" and (below in ("", above) or below in MAY_IMPORT[above].split())


def python_files():
  """Every Python file of the repository that is ours, tests included."""
  folders = ["r2m_jax", "configs", "benchmarks", "tests"]
  return [ROOT / "setup.py"] + [
    path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))
  ]


def test_the_root_holds_six_files():
  assert {path.stem for path in LIBRARY.glob("*.py")} == ROOT_FILES
  assert set(map(folder_of, library())) - {""} == set(MAY_IMPORT), (
    "give each folder a row of MAY_IMPORT"
  )
  assert all(
    (path / "__init__.py").exists()
    for path in LIBRARY.iterdir()
    if path.is_dir() and any(path.glob("*.py"))
  )


def test_a_folder_may_import_only_from_below_it():
  seen = set()
  for folder, below in MAY_IMPORT.items():
    assert set(below.split()) <= seen, (
      f"{folder} may import from {set(below.split()) - seen}, which stand above it"
    )
    seen.add(folder)


def test_imports_point_down():
  broken = [
    f"{library()[name].relative_to(ROOT)}:{line} imports {target}"
    for name, line, target in arrows()
    if not points_down(name, target)
  ]
  for name, path in library().items():
    broken += [
      f"{path.relative_to(ROOT)}:{line} imports {imported}, outside the library"
      for line, imported in imports_of(path)
      if imported.split(".")[0] in ("configs", "tests", "benchmarks")
    ]
  assert not broken, "\n".join(broken)


def circles(pairs):
  """The modules that import themselves through others. Modules without remaining imports are
  removed until none is left.
  """
  left = {}
  for name, target in pairs:
    left.setdefault(name, set()).add(target)
    left.setdefault(target, set())
  while done := {name for name, targets in left.items() if not targets}:
    left = {name: targets - done for name, targets in left.items() if name not in done}
  return left


def test_no_circle_of_imports():
  assert not circles({(name, target) for name, _, target in arrows()})


def test_the_checks_see_a_broken_rule():
  assert points_down("r2m_jax.step", "r2m_jax.algorithm.losses")
  assert not points_down("r2m_jax.algorithm.losses", "r2m_jax.step")
  assert points_down("r2m_jax.algorithm.objective", "r2m_jax.algorithm.losses")
  assert points_down("r2m_jax.main", "r2m_jax.tasks.gold")
  assert not points_down("r2m_jax.tasks.gold", "r2m_jax.main")
  assert not points_down("r2m_jax", "r2m_jax.ops")
  assert set(circles([("a", "b"), ("b", "c"), ("c", "b"), ("c", "d")])) == {"a", "b", "c"}
  assert not circles([("a", "b"), ("b", "c"), ("a", "c")])
  assert house_module("r2m_jax.ops.check") == "r2m_jax.ops" and house_module("jax.numpy") is None


def test_lines_are_short():
  wide = [
    f"{path.relative_to(ROOT)}:{number}"
    for path in python_files()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    if len(line) > MAX_WIDTH
  ]
  assert not wide, f"over {MAX_WIDTH} columns: {wide}"


def test_functions_are_short():
  long = {}
  for path in library().values():
    for node in ast.walk(tree_of(path)):
      if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        lines = node.end_lineno - node.lineno + 1
        if lines > MAX_LINES:
          long[f"{path.relative_to(ROOT)}:{node.name}"] = lines
  too_long = {name: lines for name, lines in long.items() if name not in LONG_FUNCTIONS}
  assert not too_long, f"over {MAX_LINES} lines, split them: {too_long}"
  assert len(LONG_FUNCTIONS) <= 5 and all(LONG_FUNCTIONS.values())
  assert LONG_FUNCTIONS.keys() <= long.keys(), "short again: take it out of LONG_FUNCTIONS"


def test_little_is_kept_from_the_formatter():
  mark = re.compile(r"#\s*fmt:\s*(skip|off)")
  kept = [
    f"{path.relative_to(ROOT)}:{number}"
    for path in python_files()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    if mark.search(line)
  ]
  assert len(kept) <= MAX_UNFORMATTED, kept


def test_transformers_is_imported_in_at_most_two_files():
  users = [
    name
    for name, path in library().items()
    if any(imported.split(".")[0] == "transformers" for _, imported in imports_of(path))
  ]
  assert len(users) <= 2, users


def test_no_torch_in_the_library():
  users = [
    name
    for name, path in library().items()
    if any(imported.split(".")[0] in ("torch", "tensorflow") for _, imported in imports_of(path))
  ]
  # one is the module in an exported reward model, the other measures an export if torch is
  # installed
  users = [name for name in users if name not in ("r2m_jax.hf.r2m_head", "r2m_jax.hf.parity")]
  assert not users, f"torch and tensorflow are for tests and benchmarks: {users}"


def test_torch_is_never_needed():
  """At import, no file imports torch, or another file that does."""
  torch_files = ("r2m_jax.hf.r2m_head",)
  broken = []
  for name, path in library().items():
    for node in tree_of(path).body if name not in torch_files else ():
      imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
      imported += (
        [f"{node.module}.{alias.name}" for alias in node.names]
        if isinstance(node, ast.ImportFrom)
        else []
      )
      broken += [
        f"{name} imports {i}" for i in imported if i.split(".")[0] == "torch" or i in torch_files
      ]
  assert not broken, broken


def test_nothing_is_unpickled_or_run_from_a_download():
  broken = []
  for path in python_files():
    name = path.relative_to(ROOT)
    broken += [
      f"{name}:{line} imports {imported}"
      for line, imported in imports_of(path)
      if imported.split(".")[0] in ("pickle", "cloudpickle", "dill")
    ]
    for node in ast.walk(tree_of(path)):
      if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
        if not (isinstance(node.value, ast.Constant) and node.value.value is False):
          broken.append(f"{name}:{node.value.lineno} {node.arg} is not a plain False")
  assert not broken, "\n".join(broken)


def test_no_named_todo():
  mark = "TODO" + "("
  owing = [
    str(path.relative_to(ROOT))
    for path in python_files()
    if mark in path.read_text(encoding="utf-8")
  ]
  assert not owing, f"finish it, or write down what is missing and why: {owing}"


def test_readme_commands_exist():
  named = set(re.findall(r"\./(launch/[\w.-]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
  assert {"launch/quickstart.sh", "launch/test.sh"} <= named, (
    f"README has two commands to start with; found {named}"
  )
  missing = [name for name in sorted(named) if not os.access(ROOT / name, os.X_OK)]
  assert not missing, f"README names what is not there or not executable: {missing}"


def paths_named(text):
  """The paths in a page: the targets of its links, and code with a slash or a file extension.
  Addresses and names in capitals, such as WORKDIR/export, do not count.
  """
  code = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
  blocks = re.findall(r"```[a-z]*\n(.*?)```", text, re.S)
  words = [word for part in [*code, *blocks] for word in part.split()]
  path = re.compile(r"(\./)?(\.?[\w-]+/)+[\w.-]*|\.?[\w-]+\.(py|sh|md|toml|ini|cff|ya?ml|json)")
  found = {word for word in words if path.fullmatch(word)}
  found |= set(re.findall(r"\]\((?!https?:)([^)#]+)", text))
  return {name.removeprefix("./") for name in found}


def test_contributing_names_what_exists():
  named = paths_named((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
  assert {"launch/test.sh", "launch/lint.sh", "r2m_jax/step.py"} <= named
  made_here = {".venv/bin/ruff", ".venv/bin/python"}  # by launch/test.sh
  missing = sorted(name for name in named - made_here if not (ROOT / name).exists())
  assert not missing, f"CONTRIBUTING.md names what is not there: {missing}"


def test_links_between_pages_resolve():
  pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]
  broken = [
    f"{page.relative_to(ROOT)}: {link}"
    for page in pages
    for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    if not (page.parent / link).exists()
  ]
  assert len(pages) > 10 and not broken, "\n".join(broken)


def test_the_paths_in_a_page_are_found():
  text = "See [it](docs/a.md#part), `r2m_jax/x.py`, `y.py`, `f(a/b)` and `Q`.\n```bash\n./launch/z.sh -k q\n```\n"
  assert paths_named(text) == {"docs/a.md", "r2m_jax/x.py", "y.py", "launch/z.sh"}


def test_ci_runs_the_command_of_the_readme():
  assert os.access(ROOT / ".ci/run", os.X_OK)
  run = (ROOT / ".ci/run").read_text(encoding="utf-8")
  assert re.search(r"^(exec )?\./launch/test\.sh\b", run, re.M)
  assert run.index("launch/lint.sh") < run.index("./launch/test.sh")
  workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
  assert re.search(r"^ +- run: \.ci/run$", workflow, re.M)
  assert re.search(r"^ +path: ~/\.cache/r2m_jax/jax$", workflow, re.M)


SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch"), ROOT / ".ci/run"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script):
  result = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
  assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
  "script", [path for path in SCRIPTS if path.name != "env.sh"], ids=lambda path: path.name
)
def test_scripts_stop_at_the_first_error(script):
  assert "set -euo pipefail" in script.read_text(encoding="utf-8")
  assert os.access(script, os.X_OK)


@pytest.mark.parametrize(
  "arguments, given",
  [
    ([], False),
    (["--config.workdir=x"], False),
    (["--workdir"], True),
    (["--workdir=x"], True),
    (["-workdir=x"], True),
    (["--workdirs=x"], False),
    (["--config=c", "--workdir=has space"], True),
  ],
)
def test_has_flag(arguments, given):
  check = 'source "$0"; has_flag workdir "$@"'
  result = subprocess.run(
    ["bash", "-euc", check, str(ROOT / "launch/env.sh"), *arguments], capture_output=True
  )
  assert (result.returncode == 0) == given
