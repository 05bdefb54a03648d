"""Every error names its fix: the messages of all errors that a user can fix, read from the source.

A message counts as naming a fix if a clause of it begins with an imperative of `VERBS`, as in "...;
give a folder" or "set config.dtype, or use ...". Whether the fix helps must be judged by a reader.
"""

import ast
import functools
import pathlib
import re

import pytest

from r2m_jax.knobs import KNOBS, Knob, walk

ROOT = pathlib.Path(__file__).parents[1] / "r2m_jax"
VERBS = (
  "add allow bring change check choose convert copy correct drop fetch fix fork free give keep leave let "
  "look lower make mend merge move name pass pip point put raise remove repair replay reset restore run save "
  "say select "
  "set shorten split start stop take train try use wait write"
).split()
FIX = re.compile(r"(?:^|[;:,.(]\s+|\b(?:or|and|then)\s+)(?:" + "|".join(VERBS) + r")\b", re.I)

# A requirement on the value also counts as a fix.
MUST = re.compile(r"\bmust (be|lie|divide|exceed|cover|not exceed)\b")

# Modules whose ValueError and OSError reach a user inside a FolderError or ConfigError.
ALSO_PLAIN = (
  "hf/adapters.py",
  "hf/weights.py",
  "models/arch.py",
  "models/rope.py",
  "parallel/sharding.py",
  "plan/chips.py",
)
PLAIN = {"ValueError", "FileNotFoundError", "FileExistsError"}
# Messages that only add the position to another message, which is tested separately.
PASSED_ON = {
  "{error}",
  "{reason}",
  "{section}",
  "ArchConfig.{}={}: {}",
  "config.lab.arms: {}: {}",
  "config.plan.topology is {}: {}",
  "config.policy.arch: {}",
  "config.policy.path is {}: {}",
  "config.{} is {}: {}",
  "config.{}.path is {}: {}",
  "{}, row {} {}: {}",
  "{};  {}",
}
# Messages whose fix is not in the template, and where it is.
EXCEPTIONS = {
  "config.lab.arms: {} {}": "the calls of `refuse` in config.arms_of",
  "{}{} is neither a folder nor a model on the hub: {}": "the hub's own words, with its advice",
  "config.{} does not exist; {}": "names the nearest field, or all of them",
  "process {} and process 0 differ in {}": "the callers of hosts.require_same, in the second place",
  "{}: {}; {}": "the callers of checkpoint.told, in the last place",
}


LEAST = "R2M compares K >= 2 responses per prompt"  # of group_size: has the lowest value


def names_a_fix(text: str) -> bool:
  return bool(FIX.search(text) or MUST.search(text))


def trees():
  return {path: ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}


def name_of(node) -> str:
  return node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")


def user_errors(trees) -> set[str]:
  """The names of UserError and all classes derived from it."""
  found, classes = {"UserError"}, []
  for tree in trees.values():
    classes += [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
  while more := {c.name for c in classes if found & set(map(name_of, c.bases))} - found:
    found |= more
  return found


def template(node, helpers: dict) -> str:
  """The text of a message with {} for every value. The parts of a sum are joined.

  Args:
    helpers: functions of the module that return parts of messages, by name.
  """

  def text(*parts):
    return "".join(template(part, helpers) for part in parts)

  match node:
    case ast.Constant(value=value):
      return str(value)
    case ast.JoinedStr(values=parts):
      return text(*parts)
    case ast.BinOp(left=left, op=ast.Add(), right=right):
      return text(left, right)
    case ast.IfExp(body=body, orelse=orelse):
      return f"{text(body)} {text(orelse)}"
    case ast.Name(id=name):
      return f"{{{name}}}"
    case ast.Call(func=func) if name_of(func) in helpers:
      returned = [n.value for n in ast.walk(helpers[name_of(func)]) if isinstance(n, ast.Return)]
      return "".join(template(value, {}) for value in returned)
    case ast.FormattedValue(value=ast.IfExp() | ast.BinOp() | ast.Call() as value):
      return text(value)
  return "{}"


@functools.cache
def messages() -> dict[str, str]:
  """ "file:line" -> template of the first argument of every such error, and of `stop`."""
  sources = trees()
  kinds, found = user_errors(sources) | {"stop"}, {}
  for path, tree in sources.items():
    where = str(path.relative_to(ROOT))
    mine = kinds | (PLAIN if where in ALSO_PLAIN else set())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    helpers = {f.name: f for f in functions if f.returns and name_of(f.returns) == "str"}
    for node in ast.walk(tree):
      if isinstance(node, ast.Call) and name_of(node.func) in mine and node.args:
        found[f"{where}:{node.lineno}"] = template(node.args[0], helpers)
  return found


def test_every_refusal_names_a_fix():
  found = messages()
  assert len(found) > 150
  known = PASSED_ON | set(EXCEPTIONS)
  silent = {
    where: text for where, text in found.items() if not names_a_fix(text) and text not in known
  }
  assert not silent, "no fix is named; say what to do, beginning with a verb of VERBS:\n" + (
    "\n".join(f"{where}: {text}" for where, text in silent.items())
  )


def test_no_exception_is_left_over():
  assert PASSED_ON | set(EXCEPTIONS) <= set(messages().values())


@pytest.mark.parametrize(
  "text, names_one",
  [
    ("{} is no folder; give one", True),
    ("Set JAX_PLATFORMS=cpu", True),
    ("{} is damaged, or not parquet", False),
    ("{} cannot be set", False),
    ("it was given {}", False),
  ],
)
def test_the_rule_tells_a_fix_from_a_fact(text, names_one):
  assert names_a_fix(text) == names_one


def test_the_rules_of_the_knobs_say_what_a_value_must_be():
  rules = [rule for _, part in walk(KNOBS) if isinstance(part, Knob) for rule in part.rules]
  fixes = [rule.fix if isinstance(rule.fix, str) else rule.fix("x") for rule in rules]
  assert len(fixes) > 150
  fixes = [fix for fix in fixes if fix != LEAST]
  assert not [fix for fix in fixes if not names_a_fix(fix)]


def test_the_rules_over_several_fields_name_a_fix():
  """The last argument of `config.need`, which follows the field and its value."""
  tree = ast.parse((ROOT / "config.py").read_text())
  fixes = [
    template(node.args[3], {})
    for node in ast.walk(tree)
    if isinstance(node, ast.Call) and name_of(node.func) == "need"
  ]
  fixes = [fix for fix in fixes if fix not in ("{fix}", "{} {}")]  # of a rule, or a variable
  assert len(fixes) > 12 and not [fix for fix in fixes if not names_a_fix(fix)]
