"""What the model is asked, where the speech stands in it, and what its answer holds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mooer_jax.files import read_json_object
from mooer_jax.text.tokenizer import Tokenizer

TASKS = {
  "asr": "Transcribe speech to text. ",
  "ast": "Translate speech to english text. ",
  "asr_ast_mtl": "Translate speech to english text. ",  # a multitask model's answer has two lines
  "s2s_trans": "Translate speech to english speech. ",
  "s2s_chat": "Answer my question with speech. ",
}

# What SALMONN's tasks are asked, several prompts each; the first is for evaluation.
SALMONN_PROMPTS = Path(__file__).with_name("salmonn_prompts.json")
SPEECH = "<SpeechHere>"
QUESTION = "{}"  # stands in a prompt for the question of an utterance
_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
_CHATML = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
# {prompt} is what the user asks. MooER's has the speech before all text; elsewhere the prompt
# itself says where.
TEMPLATES = {
  "mooer": SPEECH + _SYSTEM + _CHATML,
  "vicuna": "USER: {prompt}\nASSISTANT:",
  "qwen2": _SYSTEM + _CHATML,
  "chatml": _CHATML,
  "bare": SPEECH + "{prompt}",
  "none": "{prompt}",
}


def fill_template(template: str, prompt: str, question: str = "") -> tuple[str, str]:
  """Returns the text before and the text after the speech.

  Args:
    template: a name in TEMPLATES.
    prompt: what stands for {prompt}; MooER's own end with a blank.
    question: what stands for `{}` in the prompt.

  Raises:
    ValueError: for an unknown template; if the speech stands nowhere or twice; if the prompt has
      a place for a question and there is none.
  """
  if template not in TEMPLATES:
    raise ValueError(f"template={template!r}: choose one of {sorted(TEMPLATES)}")
  if QUESTION in prompt and not question:
    raise ValueError(f"the prompt {prompt!r} takes a question, and there is none")
  if SPEECH in question:
    raise ValueError(f"the question {question!r} holds {SPEECH}, which belongs in the prompt")
  around = TEMPLATES[template]
  times = around.count(SPEECH) + prompt.count(SPEECH)
  if times != 1:
    where = "" if SPEECH not in around else f", which template {template!r} puts there itself"
    raise ValueError(
      f"the prompt {prompt!r} holds {SPEECH} {prompt.count(SPEECH)} times{where}; the speech"
      " stands in exactly one place"
    )
  filled = around.replace("{prompt}", prompt)
  before, after = filled.split(SPEECH)
  return before.replace(QUESTION, question), after.replace(QUESTION, question)


def check_question(prompt: str, question: str | None, task: str):
  """Refuses a question that is missing, empty or has no place in the prompt.

  Args:
    prompt: with or without `{}`.
    question: what is to stand there, None where none was given.
    task: that the prompt is for, for messages.

  Raises:
    ValueError: if prompt and question do not fit together.
  """
  what = f"task {task!r}, whose prompt is {prompt!r},"
  if question is None:
    if QUESTION in prompt:
      raise ValueError(f"{what} takes a question: give one with --question (question=...)")
  elif QUESTION not in prompt:
    raise ValueError(f"{what} has no {QUESTION} for the question {question!r}; leave it out")
  elif not question.strip():
    raise ValueError(f"{what} takes a question, and question={question!r} is empty")


def encode_prompt(tokenizer: Tokenizer, prompt: tuple[str, str]) -> tuple[list[int], list[int]]:
  """Tokens before and after the speech, cut apart; BOS leads where the tokenizer has one."""
  before, after = prompt
  return [*tokenizer.bos_ids, *tokenizer.encode(before)], tokenizer.encode(after)


def check_goes_on(tokens_after: int, prompt: str, template: str) -> None:
  """Raises ValueError where no token follows the speech: the answer is read off the last one."""
  if not tokens_after:
    raise ValueError(
      f"the prompt {prompt!r} ends with the speech in template {template!r}; at least one token"
      " must follow, off which the answer is read"
    )


def task_prompt(task: str, prompts: Mapping[str, str] | None = None) -> str:
  """The prompt of a task, from a checkpoint's own table or MooER's.

  Raises:
    ValueError: for a task that the table does not have.
  """
  prompts = TASKS if prompts is None else prompts
  if task not in prompts:
    raise ValueError(f"task={task!r}: this model knows {sorted(prompts)}")
  return prompts[task]


def read_prompts(path: str | Path) -> dict[str, tuple[str, ...]]:
  """Reads a file of prompts: {task: prompt} or {task: [prompts]}, as SALMONN's.

  Raises:
    FileNotFoundError: if there is none.
    ValueError: if it is no such JSON, or a task has no prompt.
  """
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"{path}: no such file of prompts")
  table = read_json_object(path)
  if not table:
    raise ValueError(f"{path}: holds no tasks; needed is {{task: prompt}} or {{task: [prompts]}}")
  prompts = {}
  for task, entry in table.items():
    listed: Sequence = [entry] if isinstance(entry, str) else entry
    if not isinstance(listed, list) or not listed or not all(isinstance(p, str) for p in listed):
      raise ValueError(f"{path}: task {task!r} has {entry!r}; needed is a prompt or a list of them")
    prompts[task] = tuple(listed)
  return prompts


class Answer(NamedTuple):
  """What an answer holds; None for what the task does not ask for or the model did not give."""

  transcript: str | None
  translation: str | None


def split_answer(task: str, text: str) -> Answer:
  """Reads an answer: a transcript, a translation, or both with a line break between them.

  A multitask answer without a line break is a transcript alone; after the first one everything
  belongs to the translation.
  """
  if task == "asr":
    return Answer(text, None)
  if task == "ast":
    return Answer(None, text)
  if task == "asr_ast_mtl":
    transcript, line_break, translation = text.partition("\n")
    return Answer(transcript.strip(), translation.strip() if line_break else None)
  return Answer(None, None)
