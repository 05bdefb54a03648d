"""What could hold a reward, at a held KL: a proxy that was also fitted to contrast pairs, or
advantages that the proxy's own pairs certify.

A contrast pair is a response to this prompt against a response to another prompt, under this
prompt. Its label needs no labeller. In the offline table of docs/holds.md such pairs order the
samples of a moved policy better. Here policies are trained against such a proxy. With certified
advantages a sample counts only as far as the proxy is sure of its sign (`algorithm/certify.py`).
docs/lab.md ("A proxy with contrast pairs", "Certified advantages", "A second gold reward") has the
protocols.

  python -m r2m_jax.main --config=configs/holds.py --workdir=runs/holds
  python -m benchmarks.holds runs/holds                                    # what came out
  python -m r2m_jax.main --config=configs/holds.py:certified --workdir=runs/holds
  python -m benchmarks.holds runs/holds --tried=certified
  python -m r2m_jax.main --config=configs/holds.py:placebos --workdir=runs/holds_second \\
    --config.gold.formula=benchmarks/gold_second.py                        # a second gold reward
  python -m r2m_jax.main --config=configs/holds.py:test --workdir=/tmp/holds
"""

from r2m_jax.configs import fair

SEEDS = tuple(range(10, 24))  # 0 to 9 are in the offline table
PROXIES = {
  "contrast": "reward.contrast=1",  # one for each pair, as in the offline table
  "repeat": "reward.epochs=2",  # the placebo: as many updates, on the pairs themselves
}
SHARE = "certify.share=0.4"  # the larger of the two that the registered literature names
CERTIFIED = {
  "certified": SHARE,
  # its controls: another scale, the uncertainty of another sample, the same for every sample
  "rescaled": f"{SHARE} certify.rescale=True",
  "permuted": f"{SHARE} certify.width=permuted",
  "constant": f"{SHARE} certify.width=constant",
}
PLACEBOS = {name: CERTIFIED[name] for name in ("certified", "permuted", "constant")}
# what is tried, and the rivals that it has to beat, besides the usual `vanilla`
TRIED = {
  "": ("contrast", PROXIES),
  "certified": ("certified", CERTIFIED),
  "placebos": ("certified", PLACEBOS),
}


def arms(targets, size: str = ""):
  """`vanilla` as usual, and with each of the settings of `TRIED`, at every held KL."""
  yield from fair.held(("vanilla",), targets=targets)
  for name, settings in TRIED[size][1].items():
    yield from fair.held(("vanilla",), name, settings, targets)


def contrasts(targets, size: str = ""):
  tried, settings = TRIED[size]
  rivals = ["vanilla", *(f"vanilla.{name}" for name in settings if name != tried)]
  for target in targets:
    for rival in rivals:
      yield f"vanilla.{tried}.kl{target} - {rival}.kl{target}"


def get_config(size: str = ""):
  if size not in (*TRIED, "test"):
    known = ", ".join(f":{name}" for name in (*filter(None, TRIED), "test"))
    raise ValueError(f"size {size!r} is unknown; use holds or holds{known}")
  test = size == "test"
  config = fair.get_config(size if test else "")
  targets, tried = ((0.02,), "certified") if test else (fair.TARGETS, size)
  config.lab.arms = tuple(arms(targets, tried))
  config.lab.contrasts = tuple(contrasts(targets, tried))
  if test:
    config.lab.arms += tuple(fair.held(("vanilla",), "contrast", PROXIES["contrast"], targets))
  else:
    config.lab.seeds = SEEDS
  return config
