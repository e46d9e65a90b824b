import pytest

from mooer_jax.prompts import (
  SPEECH,
  TASKS,
  TEMPLATES,
  check_question,
  encode_prompt,
  fill_template,
  fill_text_template,
  read_prompts,
  split_answer,
  task_prompt,
)


def test_mooer_puts_the_speech_first():
  before, after = fill_template("mooer", TASKS["asr"])
  assert before == ""
  assert after == (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nTranscribe speech to text. <|im_end|>\n<|im_start|>assistant\n"
  )


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("prompt", ["", "braces { } and {prompt}", "two\nlines "])
def test_a_prompt_comes_through_unchanged(template, prompt):
  if SPEECH not in TEMPLATES[template]:
    prompt = f"<Speech>{SPEECH}</Speech>{prompt}"
  before, after = fill_template(template, prompt)
  assert prompt.replace(SPEECH, "|") in f"{before}|{after}" and SPEECH not in before + after


def test_salmonns_prompt_says_where_the_speech_stands():
  prompt = "<Speech><SpeechHere></Speech> Describe the speaker."
  before, after = fill_template("vicuna", prompt)
  assert before == "USER: <Speech>"
  assert after == "</Speech> Describe the speaker.\nASSISTANT:"
  before, after = fill_template("none", "Listen:\n<SpeechHere>\nWhat was said?")
  assert (before, after) == ("Listen:\n", "\nWhat was said?")


@pytest.mark.parametrize(
  ("template", "prompt", "times"),
  [("vicuna", "Listen.", 0), ("none", SPEECH * 2, 2), ("mooer", f"Hear {SPEECH}.", 1)],
)
def test_the_speech_stands_in_exactly_one_place(template, prompt, times):
  with pytest.raises(ValueError, match=f"contains {SPEECH} {times} times.*exactly once"):
    fill_template(template, prompt)


def test_a_second_place_for_the_speech_comes_with_a_remedy():
  with pytest.raises(ValueError, match=f"'bare' adds it too;.*; leave {SPEECH} out$"):
    fill_template("bare", f"Hear {SPEECH}.")


def test_a_question_goes_into_the_prompt():
  prompt = f"{SPEECH} {{}}"
  assert fill_template("none", prompt, "Who {speaks}?") == ("", " Who {speaks}?")
  with pytest.raises(ValueError, match="needs a question"):
    fill_template("none", prompt)
  with pytest.raises(ValueError, match="put it into the prompt"):
    fill_template("none", prompt, f"Where is {SPEECH}?")


def test_a_question_is_given_where_the_prompt_has_a_place_for_it_and_only_there():
  check_question("Say {}.", "who", "QA")
  check_question("Listen.", None, "asr")
  for prompt, question, match in (
    ("Say {}.", None, "task 'QA'.*'Say {}.'.*needs a question: .*--question"),
    ("Say {}.", " ", "question=' ' is empty"),
    ("Listen.", "who", "task 'QA'.*'Listen.'.*no {} for the question 'who'"),
    ("Listen.", "", "no {} for the question ''"),
  ):
    with pytest.raises(ValueError, match=match):
      check_question(prompt, question, "QA")


class _Words:
  """A tokenizer of blanks."""

  bos_ids = (7,)

  def encode(self, text):
    return [len(word) for word in text.split()]


def test_bos_leads_and_both_sides_are_cut_apart():
  assert encode_prompt(_Words(), ("a bb", "ccc")) == ([7, 1, 2], [3])


def test_prompt_files_hold_one_or_several(tmp_path):
  file = tmp_path / "prompts.json"
  file.write_text('{"asr": ["Write it.", "What is said?"], "ast": "Translate it."}')
  assert read_prompts(file) == {"asr": ("Write it.", "What is said?"), "ast": ("Translate it.",)}
  refused = {"{": "not JSON", "[]": "a JSON object", "{}": "no tasks", '{"asr": []}': "'asr'"}
  for text, match in refused.items():
    file.write_text(text)
    with pytest.raises(ValueError, match=match):
      read_prompts(file)
  with pytest.raises(FileNotFoundError, match="no such file of prompts"):
    read_prompts(tmp_path / "none.json")


def test_tasks_are_mooers():
  assert task_prompt("ast") == "Translate speech to english text. "
  assert all(prompt.endswith(" ") for prompt in TASKS.values())
  assert task_prompt("asr", {"asr": "Listen. "}) == "Listen. "


def test_unknown_names_are_refused_with_the_choices():
  with pytest.raises(ValueError, match="'chat'.*'mooer'"):
    fill_template("chat", "")
  with pytest.raises(ValueError, match="'sing'.*'asr'"):
    task_prompt("sing")
  with pytest.raises(ValueError, match="'ast'.*'asr'"):
    task_prompt("ast", {"asr": "Listen. "})


def test_a_multitask_answer_has_two_lines():
  assert split_answer("asr", "hello\nyou") == ("hello\nyou", None)
  assert split_answer("ast", "hello") == (None, "hello")
  assert split_answer("asr_ast_mtl", "你好 \n hello\nyou") == ("你好", "hello\nyou")
  assert split_answer("asr_ast_mtl", "你好") == ("你好", None)  # cut off before the translation
  assert split_answer("s2s_chat", "hello") == (None, None)


def test_a_prompt_takes_text_in_place_of_the_speech():
  prompt = "Say: <TextHere>"
  filled = fill_text_template("mooer", prompt, "Who {speaks}?")
  before, after = fill_template("mooer", "Say: Who {speaks}?")
  assert filled == before + after
  with pytest.raises(ValueError, match="takes text instead of audio, which only training supports"):
    fill_template("mooer", prompt)
