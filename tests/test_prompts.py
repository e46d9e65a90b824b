import pytest

from mooer_jax.prompts import TASKS, TEMPLATES, fill_template, split_answer, task_prompt


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
  before, after = fill_template(template, prompt)
  assert prompt in before + after and "<|speech|>" not in before + after


def test_a_prompt_may_even_name_the_speech():
  _, after = fill_template("mooer", "What is <|speech|>? ")
  assert "What is <|speech|>? " in after


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
