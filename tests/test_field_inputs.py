"""Faults of files, folders and machines of users: one test for each kind of fault in public
reports.

Each test states the right value or the refusal, against transformers or a plain reader.
"""

import dataclasses
import gzip
import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.numpy
import safetensors.torch
import tiny_text
import tokenizers
import torch
from flax import nnx

from configs import default
from r2m_jax.config import ConfigError, check_config
from r2m_jax.data.checked import split_names
from r2m_jax.data.files import find_files
from r2m_jax.data.forms import BadRow, as_row
from r2m_jax.data.jsonl import DataError, check_kept, check_output, read_rows, write_rows
from r2m_jax.data.rows import load
from r2m_jax.data.text import Renderer, TextError, dated, load_tokenizer
from r2m_jax.hf.folders import FolderError, load_policy
from r2m_jax.hf.weights import PretrainedError, load_pretrained
from r2m_jax.tasks.serve import require_finite, run_generate, run_score

ROOT = pathlib.Path(__file__).parents[1]
USER, REPLY = (
  {"role": "user", "content": "What is rain?"},
  {"role": "assistant", "content": "Water."},
)


def lines(path, *rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
  return path


def edit(file, **changes):
  found = json.loads(file.read_text()) | changes
  file.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))


@pytest.fixture
def llama(tmp_path):
  tiny_text.model("llama2", "plain", tmp_path / "model")
  return tmp_path / "model"


# ---- token ids ----


def test_end_ids_beyond_the_vocabulary_are_refused_and_a_pad_id_beyond_it_is_replaced(llama):
  (llama / "generation_config.json").write_text('{"eos_token_id": [1, 151645]}')
  with pytest.raises(TextError, match=r"\[151645\] lie beyond the model's 293 ids"):
    load_tokenizer(llama, 293)
  (llama / "generation_config.json").unlink()
  hf = tiny_text.tokenizer("plain")
  hf.add_special_tokens({"pad_token": "<pad>"})
  assert hf.pad_token_id == 293
  hf.save_pretrained(llama)
  assert load_tokenizer(llama, 293).pad_id == hf.eos_token_id
  assert load_tokenizer(llama, 300).pad_id == 293  # an embedding with spare rows has it


def test_a_tokenizer_that_appends_its_eos_ends_no_prompt_and_no_truncated_response(tmp_path):
  hf = tiny_text.tokenizer("plain")
  eos = hf.eos_token_id
  hf.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", eos)]
  )
  hf.save_pretrained(tmp_path)
  tokenizer = load_tokenizer(tmp_path)
  whole = hf("The cat")["input_ids"]
  assert whole[-1] == eos and tokenizer.suffix == (eos,)
  assert tokenizer.render("The cat") == whole[:-1]
  renderer, text = Renderer(tokenizer), hf("The cat sat")["input_ids"]
  assert renderer.ids("The cat", "sat") == text
  assert renderer.ids("The cat", "sat", truncated=True) == text[:-1]
  assert renderer.contract["ends_with"] == [eos]


# ---- two spellings, or two files, for one thing ----


def logits(folder):
  made = load_pretrained(folder)
  model = nnx.merge(made.graphdef, made.state)
  ids = jnp.arange(3, 20)[None]
  return np.asarray(model.logits(model(ids, jnp.ones(ids.shape, bool)).hidden))[0]


def their_logits(folder):
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  with torch.no_grad():
    return model(torch.arange(3, 20)[None]).logits[0].numpy()


def test_a_single_file_is_preferred_to_a_stale_index_as_by_transformers(llama):
  weights = safetensors.numpy.load_file(llama / "model.safetensors")
  other = {name: x + 1 for name, x in weights.items()}
  safetensors.numpy.save_file(
    other, llama / "model-00001-of-00001.safetensors", metadata={"format": "pt"}
  )
  where = dict.fromkeys(weights, "model-00001-of-00001.safetensors")
  (llama / "model.safetensors.index.json").write_text(
    json.dumps({"metadata": {}, "weight_map": where})
  )
  np.testing.assert_allclose(logits(llama), their_logits(llama), atol=1e-4)


def test_a_head_that_is_not_the_tied_embedding_is_refused_and_a_copy_of_it_is_not(llama):
  edit(llama / "config.json", tie_word_embeddings=True)
  with pytest.raises(PretrainedError, match="tie_word_embeddings=false"):
    load_pretrained(llama)
  weights = safetensors.numpy.load_file(llama / "model.safetensors")
  weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
  safetensors.numpy.save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
  np.testing.assert_allclose(logits(llama), their_logits(llama), atol=1e-4)


@pytest.mark.parametrize(
  "changes",
  [
    dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
    dict(rope_scaling={"type": "linear", "factor": 2.0}),
    dict(rope_theta=500000.0),
  ],
  ids=["yarn", "linear", "theta"],
)
def test_rotary_settings_that_disagree_are_refused(llama, changes):
  edit(
    llama / "config.json",
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    **changes,
  )
  with pytest.raises(ValueError, match="disagree; keep one of them"):
    load_pretrained(llama)


def test_partial_rotation_of_a_family_that_ignores_it_is_refused(llama):
  rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
  edit(llama / "config.json", rope_parameters=rope)
  with pytest.raises(ValueError, match="partial_rotary_factor"):
    load_pretrained(llama)


def test_float8_tensors_are_refused_by_name(llama):
  weights = {
    name: torch.from_numpy(x)
    for name, x in safetensors.numpy.load_file(llama / "model.safetensors").items()
  }
  weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.float8_e4m3fn)
  safetensors.torch.save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
  with pytest.raises(PretrainedError, match="F8_E4M3, the first model.norm.weight: quantised"):
    load_pretrained(llama)


def test_an_adapter_folder_as_policy_is_called_one(tmp_path):
  (tmp_path / "adapter_config.json").write_text("{}")
  with pytest.raises(
    FolderError, match="adapter folder .*base_model_name_or_path.*merge_and_unload"
  ):
    load_policy(str(tmp_path), default.get_config())
  base = json.dumps({"base_model_name_or_path": str(tmp_path / "absent")})
  (tmp_path / "adapter_config.json").write_text(base)
  with pytest.raises(FolderError, match="base cannot be read: .*absent.*merge_and_unload"):
    load_policy(str(tmp_path), default.get_config())
  (tmp_path / "absent").mkdir()
  with pytest.raises(FolderError, match="base .*absent holds no config.json; .*merge_and_unload"):
    load_policy(str(tmp_path), default.get_config())


# ---- numbers that are not finite ----


def test_results_that_are_not_finite_are_never_written(tmp_path):
  config, out = default.get_config(), tmp_path / "out.jsonl"
  with pytest.raises(
    FolderError, match="the scores of 2 of 3 rows are not finite, the first of row 2; nothing was"
  ):
    require_finite(config, np.isfinite([0.0, np.nan, np.inf]), "scores", "config.reward.path = m")
  with pytest.raises(ValueError):
    write_rows(str(out), [{"score": float("nan")}])
  assert not out.exists()


# ---- a folder of data ----


def prompts(folder, **settings):
  config = default.get_config()
  config.data.name = str(folder)
  config.data.update(settings)
  return [row["prompt"] for row in load(config.data, "prompt")]


def test_of_a_folder_only_data_is_read_and_the_rest_is_named(tmp_path, capsys):
  lines(tmp_path / "B.JSONL", {"prompt": "b"})
  with gzip.open(tmp_path / "a.jsonl.GZ", "wt") as file:
    file.write('{"prompt": "a"}\n')
  lines(tmp_path / ".ipynb_checkpoints/b.jsonl", {"prompt": "old"})
  lines(tmp_path / "dataset_info.json", {"prompt": "metadata"})
  (tmp_path / "._a.jsonl").write_bytes(b"\x00\x05\x16\x07")
  (tmp_path / "README.md").write_text("hi")
  assert sorted(prompts(tmp_path)) == ["a", "b"]
  said = capsys.readouterr().out
  assert "2 files read, 4 skipped" in said and "._a.jsonl" in said and "README.md" in said


def test_a_folder_of_several_splits_gives_one(tmp_path):
  for split in ("train", "test", "validation"):
    lines(tmp_path / f"data/{split}-00000-of-00001.jsonl", {"prompt": split})
  assert prompts(tmp_path) == ["train"] and prompts(tmp_path, split="test") == ["test"]
  with pytest.raises(DataError, match="none of config.data.split = 'dev'"):
    prompts(tmp_path, split="dev")
  assert (
    len(find_files(str(tmp_path / "data/*.jsonl"), split="train")) == 3
  )  # a pattern selects files explicitly


def test_longer_names_of_splits_are_splits_if_there_are_several(tmp_path):
  names = ("train_prefs", "train_sft", "test_prefs")  # as in HuggingFaceH4/ultrafeedback_binarized
  for split in names:
    lines(tmp_path / f"uf/data/{split}-00000-of-00001.jsonl", {"prompt": split})
  for split in names:
    assert prompts(tmp_path / "uf", split=split) == [split]
  with pytest.raises(
    DataError, match="splits test_prefs, train_prefs, train_sft and none of .* = 'train'; name one"
  ):
    prompts(tmp_path / "uf")
  assert prompts(tmp_path / "uf", split="test") == ["test_prefs"]  # the only one of that beginning
  for name in ("train", "test_hard", "notes"):
    lines(tmp_path / f"mixed/{name}.jsonl", {"prompt": name})
  assert prompts(tmp_path / "mixed") == ["train"]
  for name in ("train_a", "train_b", "notes"):
    lines(tmp_path / f"parts/{name}.jsonl", {"prompt": name})
  assert prompts(tmp_path / "parts") == ["notes", "train_a", "train_b"]


def test_a_file_that_a_glob_names_twice_is_read_once(tmp_path):
  for name in ("a", "sub/b", "sub/sub/c"):
    lines(tmp_path / f"{name}.jsonl", {"prompt": name})
  assert sorted(prompts(tmp_path / "**")) == ["a", "sub/b", "sub/sub/c"]


def test_times_in_parquet_are_text(tmp_path):
  columns = {
    "prompt": ["a"],
    "at": pyarrow.array([1234567890123456789], pyarrow.timestamp("ns")),
    "far": pyarrow.array([2**62], pyarrow.timestamp("us")),
    "day": pyarrow.array([1], pyarrow.date32()),
  }
  file = tmp_path / "rows.parquet"
  pyarrow.parquet.write_table(pyarrow.table(columns), file)
  (row,) = read_rows(str(file), ("prompt",))
  assert row["at"] == "2009-02-13 23:31:30.123456789" and row["day"] == "1970-01-02"
  nested = pyarrow.array([[1]], pyarrow.list_(pyarrow.timestamp("ns")))
  pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "at": nested}), file)
  with pytest.raises(DataError, match="rows.parquet has a column that cannot be read"):
    read_rows(str(file), ("prompt",))


def test_arrow_files_are_refused_with_what_converts_them(tmp_path):
  (tmp_path / "data-00000-of-00001.arrow").write_bytes(b"ARROW1")
  lines(tmp_path / "state.json", {"_data_files": []})
  with pytest.raises(DataError, match="load_from_disk.*to_parquet"):
    prompts(tmp_path)


def test_a_name_with_a_comma_is_one_name(tmp_path):
  assert prompts(lines(tmp_path / "a,b.jsonl", {"prompt": "one"})) == ["one"]
  assert split_names("x.jsonl, y.jsonl") == ["x.jsonl", "y.jsonl"]


# ---- one reader for all rows ----


@pytest.mark.parametrize(
  "raw, message",
  [
    (b'{"prompt": "Hi \\ud83d there"}', "half of a surrogate pair"),
    (b'{"prompt": "caf\xe9"}', "invalid UTF-8"),
    (b'{"prompt": "a"', "cut off"),
    (b'{"prompt": 3}', "needs 'prompt'"),
    (b'{"prompt": "a", "truncated": "false"}', "give true or false, without quotes"),
  ],
)
def test_generate_and_score_name_the_row_that_cannot_be_read(tmp_path, raw, message):
  file = tmp_path / "in.jsonl"
  file.write_bytes(b'\xef\xbb\xbf{"prompt": "fine \\ud83d\\ude00"}\n\n' + raw)
  with pytest.raises(DataError, match=rf"in.jsonl:3.*{message}"):
    read_rows(str(file), ("prompt",))


# ---- dates in templates ----


def test_a_template_writes_the_day_that_it_is_given(tmp_path):
  days = "{{ strftime_now('%d %b %Y') }} {{ strftime_now(\"%Y\") }}"
  template = days + "{% for m in messages %}{{ m['content'] }}{% endfor %}"
  tiny_text.tokenizer("chatml", tmp_path)
  (tmp_path / "chat_template.jinja").write_text(template)
  tokenizer = load_tokenizer(tmp_path, date="2024-02-29")
  assert tokenizer.decode(tokenizer.render([USER])) == "29 Feb 2024 2024What is rain?"
  today = dataclasses.replace(tokenizer, date="")
  assert Renderer(tokenizer).contract == Renderer(today).contract  # valid on every day
  assert dated("no date", "2024-02-29") == "no date"


# ---- forms of rows ----


def test_a_dialogue_that_goes_on_after_the_rows_prompt_is_read():
  more = [
    USER,
    REPLY,
    {"role": "user", "content": "And the sea?"},
    {"role": "assistant", "content": "More."},
  ]
  row = as_row({"prompt": "What is rain?", "messages": more}, "response")
  assert row == {"prompt": more[:-1], "response": "More."}
  system = {"role": "system", "content": "Be brief."}
  assert as_row({"prompt": "What is rain?", "messages": [system, USER, REPLY]}, "response")[
    "prompt"
  ] == [system, USER]
  with pytest.raises(BadRow, match="does not begin"):
    as_row({"prompt": "What is snow?", "messages": more}, "response")


def test_an_empty_system_message_is_no_system_message():
  empty = {"role": "system", "content": " "}
  worse = {"role": "assistant", "content": "Fire."}
  row = as_row({"chosen": [empty, USER, REPLY], "rejected": [empty, USER, worse]}, "pair")
  assert row == {"prompt": [USER], "chosen": "Water.", "rejected": "Fire."}
  with pytest.raises(BadRow):
    as_row({"messages": [empty]}, "prompt")


def test_columns_that_change_a_rows_meaning_are_said_once_and_replies_to_avoid_are_not_learned(
  tmp_path, capsys
):
  file = lines(
    tmp_path / "kto.jsonl",
    {"prompt": "a", "completion": "good", "label": True, "system": "Be brief."},
    {"prompt": "a", "completion": "bad", "label": False, "input": ""},
  )
  config = default.get_config()
  config.data.name = str(file)
  config.data.max_bad_share = 0.5
  assert [row["response"] for row in load(config.data, "response")] == ["good"]
  said = capsys.readouterr().out
  assert said.count("columns that are not read: system;") == 1 and "1 undesirable" in said


# ---- the machine around a run ----


@pytest.mark.parametrize(
  "field, value",
  [
    ("seed", 2**32),
    ("seed", 99999999999999999999),
    ("data.date", "30 Nov 2026"),
    ("data.date", "2026-02-30"),
  ],
)
def test_seeds_and_days_that_cannot_be_are_refused(field, value):
  config = default.get_config()
  config.update_from_flattened_dict({field: value})
  with pytest.raises(ConfigError, match=f"config.{field}"):
    check_config(config)


def test_an_output_that_cannot_be_written_is_found_before_the_work(tmp_path):
  with pytest.raises(
    DataError, match="config.score.output is .*: a folder; give the name of a file"
  ):
    check_output(str(tmp_path), "config.score.output")
  (tmp_path / "file").write_text("")
  with pytest.raises(DataError, match="its folder cannot be made"):
    check_output(str(tmp_path / "file/out.jsonl"), "config.score.output")
  check_output(str(tmp_path / "new/out.jsonl"), "config.score.output")
  os.mkfifo(tmp_path / "pipe")  # as /dev/null, which a rename would replace
  with pytest.raises(DataError, match="config.score.output is .*: a device or a pipe"):
    check_output(str(tmp_path / "pipe"), "config.score.output")


def test_an_output_that_would_not_be_what_its_name_says_is_refused(tmp_path):
  for name in ("out.jsonl.gz", "out.parquet"):
    with pytest.raises(DataError, match="JSON lines are written, not compressed; give a name"):
      check_output(str(tmp_path / name), "config.score.output")
  config = default.get_config()
  file = lines(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "b"})
  (tmp_path / "link.jsonl").symlink_to(file)
  config.generate.input, config.generate.output = str(file), str(tmp_path / "link.jsonl")
  for changes in ({"rows": 1}, {"format": "alpaca_eval"}):
    settings = config.copy_and_resolve_references()
    settings.generate.update(changes)
    with pytest.raises(DataError, match="the input, which would lose what the output lacks"):
      run_generate(settings)
  with pytest.raises(FolderError, match="config.policy.path is empty"):
    run_generate(config)  # every row and field is kept


def test_two_processes_may_write_the_same_rows(tmp_path, monkeypatch):
  path, rows, replace, pid = tmp_path / "rows.jsonl", [{"a": 1}], os.replace, os.getpid()

  def meanwhile(old, new):  # another process writes and renames before this one renames
    if os.getpid() == pid:
      monkeypatch.setattr(os, "getpid", lambda: pid + 1)
      write_rows(str(path), rows)
    replace(old, new)

  monkeypatch.setattr(os, "replace", meanwhile)
  write_rows(str(path), rows)
  assert read_rows(str(path), ()) == rows and os.listdir(tmp_path) == ["rows.jsonl"]


def test_a_value_that_cannot_be_written_again_is_found_before_the_work(tmp_path):
  config = default.get_config()
  file = tmp_path / "in.jsonl"
  file.write_text('{"prompt": "a", "response": "b", "loss": 1, "score": NaN}\n' * 2)
  rows = read_rows(str(file), ("prompt", "response"))
  check_kept(rows, str(file), ("score",))  # the result replaces it
  for section, run in ((config.generate, run_generate), (config.score, run_score)):
    section.input, section.output = str(file), str(tmp_path / "out.jsonl")
    file.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": "b", "x": NaN}')
    with pytest.raises(DataError, match="in.jsonl, row 2 has 'x' = nan, which JSON cannot hold"):
      run(config)


@pytest.mark.parametrize(
  "environment, status, said",
  [
    ({"JAX_PLATFORMS": "cuda"}, 2, "error: JAX finds no device with JAX_PLATFORMS=cuda"),
    ({"PYTHONIOENCODING": "ascii"}, 2, "error: there is no file"),
  ],
)
def test_the_environment_is_refused_or_lived_with_in_one_line(tmp_path, environment, status, said):
  command = [
    sys.executable,
    "-m",
    "r2m_jax.main",
    "--config=configs/default.py",
    f"--workdir={tmp_path}",
    "--config.task=generate",
    "--config.policy.path=\u732b",
    "--config.generate.input=\u732b.jsonl",
    f"--config.generate.output={tmp_path}/out.jsonl",
  ]
  result = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment
  )
  assert result.returncode == status and said in result.stderr and "Traceback" not in result.stderr
