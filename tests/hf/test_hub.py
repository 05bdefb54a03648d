"""The Hugging Face hub, with its own client and a server on loopback, and model cards as the hub
parses them.
"""

import json
import math
import os
import pathlib
import subprocess
import sys

import fake_hub
import pytest
from huggingface_hub import ModelCard

from configs import default
from r2m_jax.config import ConfigError, check_config
from r2m_jax.hf.card import write_card

ROOT = pathlib.Path(__file__).parents[2]
TOKEN = "hf_" + "AbCdEf0123456789AbCdEf"
# in a process of its own: huggingface_hub reads its environment when it is imported
CHILD = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi
from configs import default
from r2m_jax.hf import export, folders

root = Path(sys.argv[1])
config = default.get_config()
config.export.check = False


def told(f):
  try:
    f()
  except Exception as error:
    print(f"{type(error).__name__}: {error}")


def pin(name, revision, workdir):
  config.policy.path, config.policy.revision = name, revision
  folder = folders.pinned(name, "policy.path", config, root / workdir)
  print("read", json.loads((folder / "config.json").read_text())["n"], (folder / "x.bin").exists())


config.export.push_to, config.export.revision = "me/mine", "step-40"
export.finish(config, root / "out", "policy", None)
config.export.push_to, config.export.revision = "me/open", ""
config.export.private = False
export.finish(config, root / "out", "reward", None)
config.export.push_to, config.export.pull_request = "them/model", True
told(lambda: export.finish(config, root / "out", "absent", None))
export.finish(config, root / "out", "policy", None)
config.export.push_to, config.export.pull_request = "them/refused", False
told(lambda: export.finish(config, root / "out", "policy", None))

pin("them/model-policy", "", "one")
pin("them/model-policy", "v1", "two")
HfApi().upload_file(
  path_or_fileobj=b'{"n": 3}', path_in_repo="config.json", repo_id="them/model-policy"
)
pin("them/model-policy", "", "one")
pin("them/model-policy", "", "three")
pin("them/model-policy", "v1", "one")
told(lambda: folders.load_policy("them/model-policy", config, workdir=root / "four"))
config.policy.revision = "absent"
told(lambda: folders.load_policy("them/model-policy", config, workdir=root / "four"))
"""


@pytest.fixture(scope="module")
def hub_run(tmp_path_factory):
  """(hub, output of the child process, its folder)."""
  root = tmp_path_factory.mktemp("hub")
  (root / "out").mkdir()
  (root / "out/config.json").write_text('{"n": 9}')
  (root / "out/README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
  env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
  with fake_hub.serving(TOKEN) as hub:
    hub.refused.add("them/refused-policy")
    hub.make("them/model-policy")
    first = {"config.json": b'{"n": 1}', "x.bin": b"pickle"}
    hub.models["them/model-policy"]["branches"]["v1"] = hub.commit(
      "them/model-policy", "main", first
    )
    hub.commit("them/model-policy", "main", {"config.json": b'{"n": 2}'})
    env |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(root / "home")}
    env |= {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    env |= {"HF_HUB_DISABLE_XET": "1"}  # its store is not part of the HTTP API
    args = [sys.executable, "-c", CHILD, str(root)]
    done = subprocess.run(args, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-3000:]
  return hub, done, root


def test_models_are_pushed_private_or_public_to_a_branch_or_as_a_pull_request(hub_run):
  hub, done, root = hub_run
  mine, opened = hub.models["me/mine-policy"], hub.models["me/open-reward"]
  assert mine["private"] and not opened["private"]
  files = {path.name: path.read_bytes() for path in (root / "out").iterdir()}
  pushed = hub.commits[mine["branches"]["step-40"]]
  assert {name: pushed[name] for name in files} == files and "main" not in mine["branches"]
  assert hub.commits[opened["branches"]["main"]].keys() >= files.keys()
  ((name, sha),) = hub.pulls
  assert name == "them/model-policy" and hub.commits[sha]["config.json"] == b'{"n": 9}'
  assert f"{root / 'out'} is now {hub.url}/them/model-policy/discussions/1" in done.stdout


def test_a_model_that_the_hub_refuses_is_told_in_one_line_and_stays(hub_run):
  hub, done, root = hub_run
  lines = [line for line in done.stdout.splitlines() if line.startswith("PushError")]
  assert len(lines) == 2 and "them/model-absent was not uploaded" in lines[0]
  assert "them/refused-policy was not uploaded" in lines[1] and "403" in lines[1]
  assert f"{root / 'out'} is complete" in lines[1] and "them/model-absent" not in hub.models


def test_a_run_keeps_the_commit_that_it_began_with(hub_run):
  """`main` moves from 2 to 3. A workdir that began with 2 keeps it. A new workdir gets 3, and
  another revision is unaffected.
  """
  hub, done, root = hub_run
  read = [line for line in done.stdout.splitlines() if line.startswith("read")]
  assert read == [f"read {n} False" for n in (2, 1, 2, 3, 1)]
  kept = json.loads((root / "three/hub.json").read_text())["policy.path"]
  main = hub.models["them/model-policy"]["branches"]["main"]
  assert kept == {"name": "them/model-policy", "revision": "", "commit": main}
  refused = [line for line in done.stdout.splitlines() if line.startswith("FolderError")]
  assert "at revision absent is neither a folder nor a model on the hub" in refused[-1]


def test_the_token_is_in_no_output_and_in_no_file(hub_run):
  _, done, root = hub_run
  assert TOKEN not in done.stdout + done.stderr
  files = [path for path in root.rglob("*") if path.is_file()]
  assert len(files) > 5 and not any(TOKEN.encode() in path.read_bytes() for path in files)


def test_a_revision_without_a_hub_name_is_refused(tmp_path):
  config = default.get_config()
  for path in ("", str(tmp_path)):
    config.policy.path, config.policy.revision = path, "v1"
    with pytest.raises(
      ConfigError, match="config.policy.revision is 'v1': it belongs to a hub name"
    ):
      check_config(config)


def test_a_pull_request_to_a_branch_is_refused():
  config = default.get_config()
  config.export.pull_request, config.export.revision = True, "v2"
  with pytest.raises(ConfigError, match="config.export.revision is 'v2': a pull request is"):
    check_config(config)


# ---- the model card ----


def carded(tmp_path, rows=(), *, kind="policy", base=None, **changes):
  config = default.get_config()
  config.update_from_flattened_dict(changes)
  workdir = tmp_path / "work"
  workdir.mkdir()
  lines = [json.dumps({"stage": "rl", "arm": "r2m", "seconds": 1.0} | row) for row in rows]
  (workdir / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
  pins = {"policy.path": {"name": "someone/model", "revision": "v1", "commit": "c" * 40}}
  (workdir / "hub.json").write_text(json.dumps(pins))
  write_card(tmp_path, config, workdir, kind=kind, bases=["someone/model"], base_folder=base)
  return ModelCard.load(tmp_path / "README.md")


def test_the_hub_reads_what_the_card_says(tmp_path):
  rows = [
    {"step": 0, "reward/used": 0.0, "kl": 0.0},
    {"step": 9, "reward/used": 1.25, "kl": "nan", "eval/gold": 0.5, "lr/policy": 1e-4},
  ]
  base = tmp_path / "base"
  base.mkdir()
  (base / "README.md").write_text("---\nlicense: other\nlicense_name: mine\n---\n# Base\n")
  names = {"data.name": "hf:owner/prompts,/home/me/rows.jsonl"}
  card = carded(tmp_path, rows, base=base, **names)
  data = card.data
  assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
  assert (data.license, data.license_name) == ("other", "mine")
  assert data.base_model == ["someone/model"] and data.datasets == ["owner/prompts"]
  found = {result.metric_type: result.metric_value for result in data.eval_results}
  assert found == {"reward/used": 1.25, "eval/gold": 0.5} and math.isfinite(sum(found.values()))
  assert {result.metric_name for result in data.eval_results} == {
    "reward/used, training prompts",
    "eval/gold",
  }
  text = card.text
  assert "someone/model (commit " + "c" * 40 in text and "/home/me" not in str(card)
  for words in ("@article{huang2026r2m", "arXiv:2601.22664", "- r2m_jax ", "- jax ", "- kl.beta"):
    assert words in text


def test_a_card_without_license_figures_or_hub_data_is_still_one(tmp_path):
  card = carded(tmp_path, kind="r2m_reward")
  assert card.data.pipeline_tag == "text-classification" and card.data.license is None
  assert card.data.eval_results is None and card.data.datasets is None
  assert "names no license" in card.text


@pytest.mark.parametrize(
  "text", ["", "no front matter", "---\n- a\n---\n", "---\nlicense: [\n---\n"]
)
def test_a_license_is_given_or_read_from_a_card_that_may_be_broken(tmp_path, text):
  base = tmp_path / "base"
  base.mkdir()
  (base / "README.md").write_text(text)
  given = {"export.license": "apache-2.0"} if text == "" else {}
  assert carded(tmp_path, base=base, **given).data.license == (given and "apache-2.0" or None)
