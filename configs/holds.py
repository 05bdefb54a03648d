"""Does a proxy that was also fitted to contrast pairs hold, at a held KL?

A contrast pair is a response to this prompt against a response to another prompt, under this
prompt. Its label needs no labeller. In the offline table of docs/holds.md such pairs order the
samples of a moved policy better. Here policies are trained against such a proxy. docs/lab.md
("A proxy with contrast pairs") has the protocol.

  python -m r2m_jax.main --config=configs/holds.py --workdir=runs/holds
  python -m benchmarks.holds runs/holds                                    # what came out
  python -m r2m_jax.main --config=configs/holds.py:test --workdir=/tmp/holds
"""

from r2m_jax.configs import fair

SEEDS = tuple(range(10, 24))  # 0 to 9 are in the offline table
PROXIES = {
  "contrast": "reward.contrast=1",  # one for each pair, as in the offline table
  "repeat": "reward.epochs=2",  # the placebo: as many updates, on the pairs themselves
}


def arms(targets):
  """`vanilla` with the usual proxy, and with each of `PROXIES`, at every held KL."""
  yield from fair.held(("vanilla",), targets=targets)
  for name, settings in PROXIES.items():
    yield from fair.held(("vanilla",), name, settings, targets)


def contrasts(targets):
  for target in targets:
    for rival in (f"vanilla.kl{target}", f"vanilla.repeat.kl{target}"):
      yield f"vanilla.contrast.kl{target} - {rival}"


def get_config(size: str = ""):
  if size not in ("", "test"):
    raise ValueError(f"size {size!r} is unknown; use configs/holds.py or configs/holds.py:test")
  config = fair.get_config(size)
  targets = (0.02,) if size == "test" else fair.TARGETS
  config.lab.arms = tuple(arms(targets))
  config.lab.contrasts = tuple(contrasts(targets))
  if not size:
    config.lab.seeds = SEEDS
  return config
