"""Prompts of the tasks, chat templates, and parsing of answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mooer_jax.files import read_json_object
from mooer_jax.text.tokenizer import Tokenizer

TEXT_TASKS = {
  "asr": "Transcribe speech to text. ",
  "ast": "Translate speech to english text. ",
  "asr_ast_mtl": "Translate speech to english text. ",  # the answer has two lines
}
SPEECH_TASKS = {  # of models with speech output
  "s2s_trans": "Translate speech to english speech. ",
  "s2s_chat": "Answer my question with speech. ",
}
TASKS = TEXT_TASKS | SPEECH_TASKS

# Prompts of SALMONN's tasks, several each; evaluation uses the first.
SALMONN_PROMPTS = Path(__file__).with_name("salmonn_prompts.json")
SPEECH = "<SpeechHere>"
TEXT = "<TextHere>"  # in a prompt in place of SPEECH: text instead of audio, in training only
QUESTION = "{}"  # placeholder in a prompt for the question of an utterance
_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
_CHATML = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
# {prompt} is the user's prompt. "mooer" and "bare" put the speech before all text; with the others,
# the prompt contains SPEECH.
TEMPLATES = {
  "mooer": SPEECH + _SYSTEM + _CHATML,
  "vicuna": "USER: {prompt}\nASSISTANT:",
  "qwen2": _SYSTEM + _CHATML,
  "chatml": _CHATML,
  "bare": SPEECH + "{prompt}",
  "none": "{prompt}",
}


def fill_template(template: str, prompt: str, question: str = "") -> tuple[str, str]:
  """Fill a chat template; returns the text before and the text after the speech.

  Args:
    template: name in TEMPLATES.
    prompt: replaces {prompt}; has one place for the speech, unless the template has it.
    question: replaces `{}` in the prompt; required if there is one.

  Raises:
    ValueError: for an unknown template, a missing question, SPEECH not exactly once, or a prompt
      that takes text instead of speech.
  """
  if template not in TEMPLATES:
    raise ValueError(f"chat template {template!r}: choose one of {sorted(TEMPLATES)}")
  if TEXT in prompt:
    raise ValueError(
      f"the prompt {prompt!r} takes text instead of audio, which only training supports; choose"
      " another task"
    )
  if QUESTION in prompt and not question:
    raise ValueError(f"the prompt {prompt!r} needs a question; give one")
  if SPEECH in question:
    raise ValueError(f"the question {question!r} contains {SPEECH}; put it into the prompt")
  around = TEMPLATES[template]
  if around.count(SPEECH) + prompt.count(SPEECH) != 1:
    if SPEECH in around:
      where, remedy = f", and chat template {template!r} adds it too", f"; leave {SPEECH} out"
    else:
      where, remedy = "", ""
    raise ValueError(
      f"the prompt {prompt!r} contains {SPEECH} {prompt.count(SPEECH)} times{where}; it must occur"
      f" exactly once{remedy}"
    )
  before, after = around.replace("{prompt}", prompt).split(SPEECH)
  return before.replace(QUESTION, question), after.replace(QUESTION, question)


def fill_next_turn(template: str, prompt: str) -> tuple[str, str]:
  """`fill_template` for a turn of a dialogue after the first; it follows the eos of an answer.

  The system message is not repeated. In ChatML, a line break ends the answer.
  """
  before, after = (side.replace(_SYSTEM, "") for side in fill_template(template, prompt))
  return ("\n" if _CHATML in TEMPLATES[template] else "") + before, after


def fill_text_template(template: str, prompt: str, text: str) -> str:
  """Fill a chat template for a prompt that takes text instead of speech.

  Args:
    template: name in TEMPLATES; its place for the speech is left out.
    prompt: replaces {prompt}; contains TEXT exactly once.
    text: replaces TEXT.

  Raises:
    ValueError: if the prompt also has a place for speech or for a question, or several for text.
  """
  if prompt.count(TEXT) != 1 or SPEECH in prompt or QUESTION in prompt:
    raise ValueError(
      f"the prompt {prompt!r} must contain {TEXT} exactly once, and neither {SPEECH} nor {QUESTION}"
    )
  return TEMPLATES[template].replace(SPEECH, "").replace("{prompt}", prompt).replace(TEXT, text)


def check_question(prompt: str, question: str | None, task: str):
  """Check that a task's prompt and a question fit together. Without one, `question` is None.

  Raises:
    ValueError: for a question that is missing or empty, or a prompt without a place for it.
  """
  what = f"task {task!r} with the prompt {prompt!r}"
  if question is None:
    if QUESTION in prompt:
      raise ValueError(f"{what} needs a question: give one with --question (question=...)")
  elif QUESTION not in prompt:
    raise ValueError(f"{what} has no {QUESTION} for the question {question!r}; leave it out")
  elif not question.strip():
    raise ValueError(f"{what} needs a question, but question={question!r} is empty")


def encode_prompt(tokenizer: Tokenizer, prompt: tuple[str, str]) -> tuple[list[int], list[int]]:
  """Tokens before and after the speech; BOS is prepended if the tokenizer has one."""
  return [*tokenizer.bos_ids, *tokenizer.encode(prompt[0])], tokenizer.encode(prompt[1])


def check_prompt_suffix(tokens_after: int, prompt: str, template: str) -> None:
  """Raise ValueError if no token follows the speech: the last one predicts the answer."""
  if not tokens_after:
    raise ValueError(
      f"the prompt {prompt!r} ends with the speech in template {template!r}; at least one token"
      " must follow it, which predicts the answer"
    )


def task_prompt(task: str, prompts: Mapping[str, str] | None = None) -> str:
  """The prompt of a task, from those of a checkpoint (default: MooER's).

  Raises ValueError for an unknown task.
  """
  prompts = TASKS if prompts is None else prompts
  if task not in prompts:
    raise ValueError(f"task={task!r}: the model has {sorted(prompts)}")
  return prompts[task]


def read_prompts(path: str | Path) -> dict[str, tuple[str, ...]]:
  """Read a JSON file of prompts: {task: prompt} or {task: [prompts]}, as SALMONN's.

  Raises FileNotFoundError, or ValueError for another structure or a task without a prompt.
  """
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"{path}: no such file of prompts")
  table = read_json_object(path)
  if not table:
    raise ValueError(f"{path}: no tasks; write {{task: prompt}} or {{task: [prompts]}}")
  prompts = {}
  for task, entry in table.items():
    listed: Sequence = [entry] if isinstance(entry, str) else entry
    if not isinstance(listed, list) or not listed or not all(isinstance(p, str) for p in listed):
      raise ValueError(f"{path}: task {task!r} has {entry!r}; give a prompt or a list of prompts")
    prompts[task] = tuple(listed)
  return prompts


class Answer(NamedTuple):
  """Parts of an answer; None for a part that the task or the answer does not have."""

  transcript: str | None
  translation: str | None


def split_answer(task: str, text: str) -> Answer:
  """Parse an answer: a transcript, a translation, or both, separated by the first line break.

  A multitask answer without a line break is a transcript.
  """
  if task == "asr":
    return Answer(text, None)
  if task in ("ast", "s2s_trans"):
    return Answer(None, text)
  if task == "asr_ast_mtl":
    transcript, line_break, translation = text.partition("\n")
    return Answer(transcript.strip(), translation.strip() if line_break else None)
  return Answer(None, None)
