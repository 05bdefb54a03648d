"""Chat templates with arguments, system prompts and reasoning. Oracle: transformers' own templates,
token for token.
"""

import json

import pytest
import tiny_text

from configs import default
from r2m_jax.config import ConfigError, check_config
from r2m_jax.data import thinking
from r2m_jax.data.datasets import packed_lines, sft_rows
from r2m_jax.data.text import Chat, Renderer, TextError, load_tokenizer
from r2m_jax.hf.folders import chat_of

ASK = [{"role": "user", "content": "What is the sea?"}]
SYSTEM = [{"role": "system", "content": "Be brief."}]
OFF = {"enable_thinking": False}
REASON, ANSWER = "It is big.", "It is blue."
WHOLE = f"<think>\n{REASON}\n</think>\n\n{ANSWER}"
TEMPLATES = {"qwen3": tiny_text.QWEN3, "r1": tiny_text.R1, "chatml": tiny_text.CHATML}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """kind -> (folder, transformers' tokenizer)."""
  made = {}
  for kind, template in TEMPLATES.items():
    folder = tmp_path_factory.mktemp(kind)
    made[kind] = folder, tiny_text.thinking_tokenizer(template, folder)
  return made


def ours(folders, kind, **chat):
  return load_tokenizer(folders[kind][0], chat=Chat(**chat))


def theirs(folders, kind, messages, **kwargs):
  """Token ids from transformers' chat template."""
  return folders[kind][1].apply_chat_template(messages, **kwargs)["input_ids"]


def text_of(folders, kind, ids):
  return folders[kind][1].decode(ids)


# ---- arguments, system prompt, template file ----


@pytest.mark.parametrize("args", [{}, OFF, {"enable_thinking": True}])
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_prompts_and_dialogues_are_those_of_apply_chat_template(folders, args, system):
  tokenizer = ours(folders, "qwen3", args=args, system=system)
  messages = [*(SYSTEM if system else []), *ASK]
  prompt = theirs(folders, "qwen3", messages, add_generation_prompt=True, **args)
  assert tokenizer.render(ASK) == prompt
  closed = text_of(folders, "qwen3", prompt).endswith("<think>\n\n</think>\n\n")
  assert closed == (args == OFF)
  for answer in (ANSWER, WHOLE):
    dialogue = theirs(
      folders, "qwen3", [*messages, {"role": "assistant", "content": answer}], **args
    )
    assert Renderer(tokenizer).ids(ASK, answer) == dialogue
    assert Renderer(tokenizer).ids(ASK[0]["content"], answer) == dialogue


def test_a_system_message_of_the_row_stays(folders):
  tokenizer = ours(folders, "chatml", system="Be long.")
  want = theirs(folders, "chatml", SYSTEM + ASK, add_generation_prompt=True)
  assert tokenizer.render(SYSTEM + ASK) == want
  with pytest.raises(
    TextError, match="config.policy.system_prompt needs prompts of messages, and 'The sea'"
  ):
    tokenizer.render("The sea")


def test_a_template_file_of_the_users_own(folders, tmp_path):
  file = tmp_path / "mine.jinja"
  file.write_text(tiny_text.R1, encoding="utf-8")
  tokenizer = ours(folders, "chatml", file=str(file))
  assert tokenizer.render(ASK) == theirs(folders, "r1", ASK, add_generation_prompt=True)
  assert tokenizer.opening == "<think>\n"
  file.write_text("{% for m in %}", encoding="utf-8")
  with pytest.raises(TextError, match="chat template of .*mine.jinja cannot render a question"):
    ours(folders, "chatml", file=str(file))
  with pytest.raises(
    TextError, match="config.policy.chat_template is '/none.jinja'.*give the path"
  ):
    ours(folders, "chatml", file="/none.jinja")


def test_arguments_that_the_template_never_reads_get_a_warning(folders, capsys):
  ours(folders, "qwen3", args=OFF)
  assert "warning" not in capsys.readouterr().err
  ours(folders, "qwen3", args={"enable_thinkin": False}, section="reward")
  shown = capsys.readouterr().err
  assert "warning: config.reward.chat_template_args has enable_thinkin, which" in shown


def test_changes_need_a_template(tmp_path):
  tiny_text.tokenizer("plain", tmp_path)
  with pytest.raises(
    TextError, match="config.policy.system_prompt change a chat template, and the"
  ):
    load_tokenizer(tmp_path, chat=Chat(system="Be brief."))


REFUSED = [
  ({"messages": []}, "messages is for the renderer to give"),
  ({"a b": 1}, "give names of the template's variables"),
  ({"a": float("nan")}, "values that JSON can hold"),
  ({"a": {1, 2}}, "values that JSON can hold"),
]


@pytest.mark.parametrize("args, fix", REFUSED)
def test_arguments_that_are_refused(args, fix):
  config = default.get_config()
  config.policy.chat_template_args = args
  with pytest.raises(ConfigError, match=rf"^config.policy.chat_template_args is \{{.*{fix}"):
    check_config(config)


def test_a_template_file_must_be_there():
  config = default.get_config()
  config.reward.chat_template = "/none.jinja"
  with pytest.raises(
    ConfigError, match="config.reward.chat_template is '/none.jinja': there is no"
  ):
    check_config(config)


def test_the_contract_holds_what_changes_the_template(folders):
  """A reward model is used with the same rendering everywhere: its training settings are used, and
  other settings are refused.
  """
  plain = Renderer(ours(folders, "qwen3"))
  config = default.get_config()
  config.reward.system_prompt, config.reward.chat_template_args = "Be brief.", OFF
  chat = chat_of(config, "reward")
  made = Renderer(load_tokenizer(folders["qwen3"][0], chat=chat), 0, True)
  saved = json.loads(json.dumps(made.contract))
  assert saved["system_prompt"] == "Be brief." and saved["chat_template_args"] == OFF
  assert saved["strip_thinking"] is True and saved["probe_sha256"] != plain.contract["probe_sha256"]
  assert not {"system_prompt", "chat_template_args", "strip_thinking"} & plain.contract.keys()
  with pytest.raises(TextError, match="strip_thinking: True then, None now(.|\n)*system_prompt"):
    plain.require(saved, "R")
  again = chat_of(default.get_config(), "reward", saved)
  assert again == chat
  Renderer(load_tokenizer(folders["qwen3"][0], chat=again), 0, True).require(saved, "R")
  config.reward.system_prompt = "Be long."
  other = load_tokenizer(folders["qwen3"][0], chat=chat_of(config, "reward", saved))
  with pytest.raises(TextError, match="system_prompt: 'Be brief.' then, 'Be long.' now"):
    Renderer(other, 0, True).require(saved, "R")


# ---- reasoning in the input of the reward model ----

STRIPPED = [
  (ANSWER, ANSWER),
  (WHOLE, ANSWER),
  (f"{REASON}\n</think>\n\n{ANSWER}", ANSWER),  # the opening tag is in the prompt
  (f"<think>\n{REASON}", ""),  # cut off during the reasoning
  (f"{WHOLE} And <think>more", f"{ANSWER} And "),
  ("a <think>b</think> c <think>d</think> e", "a  c  e"),
  ("<think>a<think>b</think>c</think>d", "d"),
  ("<think>\n\n</think>\n\n" + ANSWER, ANSWER),
  ("a</think>b</think>c", "c"),
  ("  spaces stay", "  spaces stay"),
]


@pytest.mark.parametrize("text, left", STRIPPED)
def test_without_reasoning(text, left):
  assert thinking.without_reasoning(text) == left
  assert thinking.without_reasoning(left) == left


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_reward_reads_the_answer_alone_if_asked_to(folders, kind):
  tokenizer = ours(folders, kind)
  stripped = Renderer(tokenizer, strip_thinking=True)
  want = theirs(folders, kind, [*ASK, {"role": "assistant", "content": ANSWER}])
  assert stripped.ids(ASK, WHOLE) == want == stripped.ids(ASK, ANSWER)
  prompt = theirs(folders, kind, ASK, add_generation_prompt=True)
  assert stripped.ids(ASK, f"<think>\n{REASON}", truncated=True) == prompt
  assert "without reasoning" in stripped.describe(ASK, WHOLE)


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("args", [{}, OFF])
@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_reward_model_sees_no_tag_twice_and_no_end_without_a_beginning(
  folders, kind, args, truncated
):
  renderer = Renderer(ours(folders, kind, args=args if kind == "qwen3" else {}))
  halves = [f"<think>\n{REASON}"] if truncated else []
  for response in (ANSWER, WHOLE, f"{REASON}\n</think>\n\n{ANSWER}", *halves):
    text = text_of(folders, kind, renderer.ids(ASK, response, truncated=truncated))
    opens, closes = text.count("<think>"), text.count("</think>")
    assert opens <= 1 and opens == closes + (response in halves), text
    assert (ANSWER in text) == (response not in halves)
    if "think" in response and (kind != "r1" or truncated):
      assert REASON in text and text.index("<think>") < text.index(REASON)


# ---- the boundary between a generation prompt and an answer ----

SEAMS = [  # kind, args, the answer of a row, the text after the generation prompt
  ("r1", {}, WHOLE, f"{REASON}\n</think>\n\n{ANSWER}"),
  ("r1", {}, f"<think>{REASON}</think>{ANSWER}", f"{REASON}</think>{ANSWER}"),
  ("r1", {}, f"{REASON}\n</think>\n\n{ANSWER}", f"{REASON}\n</think>\n\n{ANSWER}"),
  ("r1", {}, ANSWER, f"\n</think>\n\n{ANSWER}"),
  ("qwen3", {}, WHOLE, WHOLE),
  ("qwen3", {}, f"{REASON}\n</think>\n\n{ANSWER}", WHOLE),
  ("qwen3", {}, ANSWER, ANSWER),
  ("qwen3", OFF, ANSWER, ANSWER),
  ("qwen3", OFF, WHOLE, ANSWER),
  ("qwen3", OFF, f"<think>\n\n</think>\n\n{ANSWER}", ANSWER),
  ("chatml", {}, WHOLE, WHOLE),
  ("chatml", {}, ANSWER, ANSWER),
]


@pytest.mark.parametrize("kind, args, answer, follows", SEAMS)
def test_rows_of_sft_have_each_tag_once(folders, tmp_path, capsys, kind, args, answer, follows):
  (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": ASK, "response": answer}) + "\n")
  config = default.get_config()
  config.data.name, config.sft.batch_size = str(tmp_path / "rows.jsonl"), 1
  tokenizer = ours(folders, kind, args=args)
  dataset, collate = sft_rows(config, tokenizer, tmp_path, "sft")
  batch = collate(dataset[0])
  line = batch["tokens"][0][batch["token_mask"][0]].tolist()
  prompt = theirs(folders, kind, ASK, add_generation_prompt=True, **args)
  encode = folders[kind][1].encode
  assert line == [*prompt, *encode(follows, add_special_tokens=False), tokenizer.end_id]
  assert batch["response_mask"].sum() == len(line) - len(prompt)
  text = text_of(folders, kind, line)
  assert text.count("<think>") == text.count("</think>") <= 1
  assert ("1 of 1 answers are adapted" in capsys.readouterr().out) == (answer != follows)


def test_an_answer_of_reasoning_alone_is_left_out_where_there_is_none(folders, tmp_path, capsys):
  rows = [{"prompt": ASK, "response": text} for text in (f"<think>\n{REASON}", ANSWER, WHOLE)]
  file = tmp_path / "rows.jsonl"
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  config = default.get_config()
  config.data.name, config.sft.batch_size = str(file), 1
  dataset, _ = sft_rows(config, ours(folders, "qwen3", args=OFF), tmp_path, "sft")
  assert "no answer after its reasoning" in capsys.readouterr().out
  assert {int(dataset[i][0]) for i in range(2)} == {0, 1}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_packed_dialogues_keep_their_reasoning(folders, tmp_path, kind):
  file = tmp_path / "rows.jsonl"
  file.write_text(4 * (json.dumps({"prompt": ASK, "response": WHOLE}) + "\n"))
  config = default.get_config()
  config.data.name, config.sft.batch_size, config.data.pack = str(file), 1, True
  config.data.max_prompt_length = config.data.max_response_length = 64
  dataset, collate = packed_lines(config, ours(folders, kind), tmp_path, "sft")
  text = text_of(folders, kind, collate(dataset[0])["tokens"][0])
  assert text.count(f"<think>\n{REASON}\n</think>\n\n{ANSWER}<|im_end|>") >= 1
  assert "<think>\n<think>" not in text


@pytest.mark.parametrize("sampled", [f"{REASON}\n</think>\n\n{ANSWER}", REASON, f"\n{REASON}"])
def test_a_sampled_text_gets_the_tag_of_its_prompt_and_finds_back_to_its_tokens(folders, sampled):
  """Tests the text in the reward model's input, in samples.jsonl and from `generate`, and the
  tokens from which a policy's states are read again.
  """
  tokenizer = ours(folders, "r1")
  whole = tokenizer.whole(ASK, sampled)
  assert whole == f"<think>\n{sampled}"
  assert tokenizer.sampled(ASK, whole) == tokenizer.encode(sampled, special=False)
  assert tokenizer.whole("The sea", sampled) == sampled
  for kind, args in (("qwen3", {}), ("qwen3", OFF), ("chatml", {})):
    assert ours(folders, kind, args=args).whole(ASK, sampled) == sampled
