"""Whether a run fits a machine and how long its step takes, without the machine: task = plan.

sizes.py     the run in numbers: rows, lengths, architectures
work.py      FLOPs and bytes moved, phase by phase
memory.py    bytes per chip, by kind, before anything is compiled
hlo.py       bytes that a compiled program sends over the links
programs.py  rollout and learn, compiled from abstract arguments by the platform's own compiler
report.py    the plan as text
plan.py      one topology, or the smallest slice of each generation
"""
