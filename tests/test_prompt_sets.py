"""The prompts of SALMONN's tasks."""

import pytest

from mooer_jax.prompts import SALMONN_PROMPTS, fill_template, read_prompts

SPEECH = "<Speech><SpeechHere></Speech>"
# Tasks whose prompt takes the question, or the name of the slot, of an utterance.
WITH_QUESTION = {"QA", "inference_QA", "gender_QA", "slot_filling"}
# SALMONN's training tasks, by their names in its annotation files.
TRAINED = {
  "asr",
  "translation_ec",
  "audiocaption",
  "phone_recognition",
  "emotion_recognition",
  "music_description",
  "speech_separation",
  "speaker_verification",
  "gender_recognition",
  "QA",
}


@pytest.fixture(scope="module")
def prompts():
  return read_prompts(SALMONN_PROMPTS)


def test_all_training_tasks_are_there(prompts):
  assert prompts.keys() >= TRAINED


def test_every_task_has_several_prompts_with_the_speech_once(prompts):
  for task, listed in prompts.items():
    assert 4 <= len(listed) <= 8, task
    assert len(set(listed)) == len(listed), task
    for prompt in listed:
      assert prompt.count(SPEECH) == prompt.count("<Speech") - 1 == 1, prompt
      assert prompt == prompt.strip() and prompt != SPEECH, prompt


def test_a_question_stands_where_one_is_given_and_only_there(prompts):
  for task, listed in prompts.items():
    for prompt in listed:
      assert prompt.count("{}") == (task in WITH_QUESTION), prompt
      assert "{" not in prompt.replace("{}", ""), prompt


@pytest.mark.parametrize("question", ["name of the artist", ""])
def test_the_templates_take_every_prompt(prompts, question):
  for task, listed in prompts.items():
    for prompt in listed:
      if question or task not in WITH_QUESTION:
        before, after = fill_template("vicuna", prompt, question)
        assert before.endswith("<Speech>") and after.startswith("</Speech>")
