"""The cost of a setting: the time of a whole step of plain RLOO with and without it, in turn.

  python -m benchmarks.setting_cost --size=small --tried=certify.share=0.4 \\
    --setting=kl.placement=loss,kl.estimator=k2 [--steps=5]

Both steps take turns in one process, so that a slow period of the machine affects both; each round
gives a ratio.
"""

import statistics

from absl import app, flags

from benchmarks import machine, workload

TRIED = flags.DEFINE_list("tried", None, "config.FIELD=VALUE, as in --setting", required=True)
STEPS = flags.DEFINE_integer("steps", 5, "Timed steps of each, not disturbed by other processes")


def main(_):
  machine.set_up()
  settings = list(workload.SETTING.value)
  works = {
    "plain": workload.of_size(workload.SIZE.value, "vanilla", settings),
    "tried": workload.of_size(workload.SIZE.value, "vanilla", settings + TRIED.value),
  }
  for work in works.values():
    work.step()
    work.step()
  times = machine.take_turns({name: work.step for name, work in works.items()}, STEPS.value)
  print(machine.show_limits(machine.limits()))
  print(f"{'':8}  {machine.HEADER}")
  for name, found in times.items():
    print(f"{name:8}  {found}")
  plain, tried = times.values()
  ratios = [b / a for a, b in zip(plain.seconds, tried.seconds, strict=True)]
  print(
    f"{','.join(TRIED.value)}: {statistics.median(ratios) - 1:+.1%} "
    f"({min(ratios) - 1:+.1%} to {max(ratios) - 1:+.1%}); {'' if plain.quiet else 'NOT '}quiet"
  )


if __name__ == "__main__":
  app.run(main)
