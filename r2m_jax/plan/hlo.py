"""The bytes that a compiled program sends over the links: the collectives in its HLO, times the
iterations of their loops.

A compiler's own cost analysis counts the body of a loop once. Here the trip count of every `while`
is read from its condition (a comparison of the counter with a constant). So a scan over layers
counts all layers, and the decoding loop counts its full length. A run whose rows all end earlier
sends less.
"""

import collections
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {
  "pred": 1,
  "s4": 0.5,
  "u4": 0.5,
  "s8": 1,
  "u8": 1,
  "f8e4m3fn": 1,
  "f8e5m2": 1,
  "bf16": 2,
  "f16": 2,
  "s16": 2,
  "u16": 2,
  "f32": 4,
  "s32": 4,
  "u32": 4,
  "f64": 8,
  "s64": 8,
  "u64": 8,
  "c64": 8,
}
HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
OPERATION = re.compile(r"(?:^|[ }\])])([a-z][a-z\-]*)\(")
SHAPE = re.compile(r"\b(" + "|".join(BYTES) + r")\[([\d,]*)\]")
CALLS = re.compile(
  r"(?:calls|to_apply|body|condition|(?:true|false)_computation|(?:called|branch)_computations)="
  r"(?:\{([^}]*)\}|(%?[\w.\-]+))"
)


def collective_bytes(text: str) -> dict[str, float]:
  """Bytes that one chip sends in one run of the program, by kind of collective.

  By the ring algorithms, over n chips of a group: all-gather sends (n - 1) / n of the gathered
  array, reduce-scatter the same share of its input, all-reduce twice that, all-to-all (n - 1) / n
  of its array, and collective-permute its array.

  The parts of one asynchronous collective in several fusions have one channel and are counted once,
  as often as the rarest part runs, because there may be a loop between its start and its end.
  Raises ValueError if a loop's length cannot be read.
  """
  computations, entry = parse(text)
  times = executions(computations, entry)
  found = {}  # of each collective (kind, how often it runs, bytes it sends)
  for name, lines in computations.items():
    for instruction, rest in lines:
      operation = OPERATION.search(rest)
      kind = operation and operation[1].removesuffix("-start")
      if kind not in KINDS or not times[name]:
        continue
      channel = re.search(r"channel_id=(\d+)", rest)
      sent = sent_bytes(kind, rest, operation.start(), scattered="all-reduce-scatter" in name)
      key = (kind, channel[1] if channel else f"{name}/{instruction}")
      _, often, most = found.get(key, ("", times[name], 0.0))
      found[key] = sent[1], min(often, times[name]), max(most, sent[0])
  total = collections.Counter(dict.fromkeys(KINDS, 0.0))
  for kind, often, amount in found.values():
    total[kind] += often * amount
  return dict(total)


def parse(text: str) -> tuple[dict[str, list[tuple[str, str]]], str]:
  """({computation: [(instruction, its definition)]}, the entry's name) of HLO text."""
  computations = {}
  entry = ""
  current = None
  for line in text.splitlines():
    if head := HEAD.match(line):
      current = computations.setdefault(head[2], [])
      entry = head[2] if head[1] else entry
    elif current is not None and (found := INSTRUCTION.match(line)):
      current.append((found[1], found[2]))
  if not entry:
    raise ValueError("the text has no ENTRY computation: it is not HLO")
  return computations, entry


def executions(computations, entry: str) -> dict[str, int]:
  """How often each computation runs."""
  callers = collections.defaultdict(list)  # computation -> [(caller, calls per run of the caller)]
  for name, lines in computations.items():
    for _, rest in lines:
      loop = re.search(r"(?:^|[ }\])])while\(", rest)
      for called in CALLS.finditer(rest):
        for target in (called[1] or called[2]).replace("%", "").split(", "):
          if target in computations:
            inside = loop and called[0].startswith(("body=", "condition="))
            callers[target].append((name, trip_count(computations, rest) if inside else 1))
  times = {entry: 1}

  def count(name):
    if name not in times:
      times[name] = sum(count(caller) * trips for caller, trips in callers[name])
    return times[name]

  return {name: count(name) for name in computations}


def trip_count(computations, loop: str) -> int:
  """The maximum number of iterations of a `while`."""
  if known := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop):
    return int(known[1])
  condition = re.search(r"condition=%?([\w.\-]+)", loop)[1]
  lines = dict(computations[condition])
  constants = {
    name: int(value[1])
    for name, rest in lines.items()
    if (value := re.search(r"constant\((\d+)\)", rest))
  }
  for rest in lines.values():
    compared = re.search(r"\bcompare\((.*?)\), direction=(LT|GT|LE|GE)", rest)
    if compared is None and (fused := re.search(r"fusion\((.*?)\).*calls=%?([\w.\-]+)", rest)):
      inner = dict(computations[fused[2]])
      if any("direction=L" in r or "direction=G" in r for r in inner.values()):
        compared = re.match(
          r"()", ""
        )  # the comparison is inside; its constant is an operand of the fusion, or inside
        constants |= {
          n: int(v[1])
          for n, r in inner.items()
          if (v := re.search(r"\bs32\[\].*constant\((\d+)\)", r))
        }
        operands = re.findall(r"%([\w.\-]+)", fused[1]) + list(inner)
        if limits := [constants[name] for name in operands if name in constants]:
          return max(limits)
    if compared and compared.lastindex == 2:
      operands = re.findall(r"%?([\w.\-]+)(?:,|$)", compared[1])
      if limits := [constants[name] for name in operands if name in constants]:
        length = limits[0] + (compared[2] in ("LE", "GE"))
        return -(
          -length
          // counter_step(computations, loop, next((lines[x] for x in operands if x in lines), ""))
        )
  raise ValueError(f"the length of a loop cannot be read from its condition {condition}")


def counter_step(computations, loop: str, counter: str) -> int:
  """The increment of a loop's counter, which the condition reads as `counter`: 1, unless the body
  clearly has a larger one, as in an unrolled loop.
  """
  index = re.search(r"get-tuple-element\(.*index=(\d+)", counter)
  body = re.search(r"body=%?([\w.\-]+)", loop)
  lines = computations.get(body[1], []) if body else []
  # the last line is the root
  results = re.search(r"\btuple\((.*)\)", lines[-1][1]) if lines else None
  if not (index and results):
    return 1
  lines = dict(lines)
  added = re.search(
    r"\badd\((.*?)\)", lines.get(re.findall(r"%([\w.\-]+)", results[1])[int(index[1])], "")
  )
  values = [lines.get(name, "") for name in re.findall(r"%([\w.\-]+)", added[1])] if added else []
  steps = [int(value[1]) for text in values if (value := re.search(r"\bconstant\((\d+)\)", text))]
  return steps[0] if steps and steps[0] > 0 else 1


def sent_bytes(kind: str, rest: str, at: int, scattered: bool = False) -> tuple[float, str]:
  """(bytes that a chip sends for one collective, its kind). at: position of the operation's name in
  `rest`.
  """
  size = sum(
    BYTES[t] * math.prod(int(n) for n in dims.split(",") if n)
    for t, dims in SHAPE.findall(rest[:at])
  )
  if f"{kind}-start(" in rest and kind in ("all-gather", "collective-permute"):
    # the result of a start holds the operand and the result; the larger is the gathered array
    size = max(
      BYTES[t] * math.prod(int(n) for n in dims.split(",") if n)
      for t, dims in SHAPE.findall(rest[:at])
    )
  n = group_size(rest)
  share = (n - 1) / n
  if kind == "collective-permute":
    return size, kind
  if kind == "all-reduce" and scattered:
    return share * size, "reduce-scatter"
  if kind == "reduce-scatter":
    return share * size * n, kind  # the result is one part
  return (2 if kind == "all-reduce" else 1) * share * size, kind


def group_size(rest: str) -> int:
  """The number of chips in a group of a collective, from any of HLO's three forms of
  `replica_groups`.
  """
  if mesh := re.search(r"replica_groups=(?:@?\w*\s*)?mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
    return math.prod(sizes[name] for name in re.findall(r"'([^']+)'", mesh[2]))
  if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
    return int(iota[2])
  if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
    return len(listed[1].split(","))
  return 1
