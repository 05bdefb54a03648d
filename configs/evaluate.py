"""The paper's evaluations (arXiv 2601.22664) of a finished run, one command each.

  judge="--config.judge.url=http://localhost:8000/v1 --config.judge.model=NAME"
  qwen="--config.policy.path=runs/qwen/export/policy"
  tldr="--config.policy.path=runs/tldr/export/policy"
  r2m --config=evaluate:alpaca_eval --workdir=runs/qwen_alpaca $qwen $judge \\
    --config.generate.input=alpaca_eval.jsonl
  r2m --config=evaluate:mt_bench --workdir=runs/qwen_mt $qwen $judge \\
    --config.generate.input=question.jsonl
  r2m --config=evaluate:tldr --workdir=runs/tldr_wins $tldr $judge \\
    --config.generate.input=tldr_test.parquet

docs/reproduce.md describes the source of the files, the cost, and the paper's results.
"""

from r2m_jax.configs import default

# The paper gives no sampling settings for its evaluations. Lengths, and MT-bench's temperatures by
# category, are those of the benchmarks' own tools; other temperatures are ours.
MT_BENCH_TEMPERATURES = {
  "writing": 0.7,
  "roleplay": 0.7,
  "extraction": 0.0,
  "math": 0.0,
  "coding": 0.0,
  "reasoning": 0.0,
  "stem": 0.1,
  "humanities": 0.1,
}
EVALUATIONS = {
  "alpaca_eval": {
    "judge.template": "alpaca_eval",
    "judge.baseline_field": "reference",
    "generate.max_new_tokens": 2048,
    "generate.temperature": 0.7,
  },
  "mt_bench": {
    "judge.template": "mt_bench_single",
    "generate.max_new_tokens": 1024,
    "generate.temperature": 0.7,
  },
  "tldr": {
    "judge.template": "tldr",
    "judge.baseline_field": "completion",
    "generate.max_new_tokens": 50,
    "generate.temperature": 0.0,
    "generate.rows": 1000,
  },
}


def get_config(name: str = "alpaca_eval"):
  """The config of `task=judge` for the evaluation with this name."""
  if name not in EVALUATIONS:
    raise ValueError(f"{name!r} is unknown; use one of {', '.join(EVALUATIONS)}")
  config = default.get_config()
  config.task = "judge"
  config.dtype = "bfloat16"
  config.param_dtype = "bfloat16"
  config.mesh = (1, -1, 1)
  config.update_from_flattened_dict(EVALUATIONS[name])
  if name == "mt_bench":
    config.generate.temperature_by = MT_BENCH_TEMPERATURES
  return config
