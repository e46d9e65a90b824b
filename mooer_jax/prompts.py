"""What the model is asked, where the speech stands in it, and what its answer holds."""

from typing import NamedTuple

TASKS = {
  "asr": "Transcribe speech to text. ",
  "ast": "Translate speech to english text. ",
  "asr_ast_mtl": "Translate speech to english text. ",  # a multitask model's answer has two lines
  "s2s_trans": "Translate speech to english speech. ",
  "s2s_chat": "Answer my question with speech. ",
}

_CHATML = (
  "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
  "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
)
SPEECH = "<|speech|>"
TEMPLATES = {"mooer": SPEECH + _CHATML, "bare": SPEECH + "{prompt}"}


def fill_template(template: str, prompt: str) -> tuple[str, str]:
  """Returns the text before and the text after the speech.

  Args:
    template: a name in TEMPLATES.
    prompt: what stands for {prompt}; MooER's own end with a blank.

  Raises:
    ValueError: for an unknown template.
  """
  if template not in TEMPLATES:
    raise ValueError(f"template={template!r}: choose one of {sorted(TEMPLATES)}")
  before, after = TEMPLATES[template].split(SPEECH)
  return before.replace("{prompt}", prompt), after.replace("{prompt}", prompt)


def task_prompt(task: str, prompts: dict[str, str] | None = None) -> str:
  """The prompt of a task, from a checkpoint's own table or MooER's.

  Raises:
    ValueError: for a task that the table does not have.
  """
  prompts = TASKS if prompts is None else prompts
  if task not in prompts:
    raise ValueError(f"task={task!r}: this model knows {sorted(prompts)}")
  return prompts[task]


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
