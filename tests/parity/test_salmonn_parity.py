"""SALMONN from its files to text: frames, speech, logits and answers of the PyTorch parts."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest

from convert.core.options import Options
from convert.exporting import export_checkpoint
from convert.importing import import_checkpoint
from mooer_jax import Transcriber, speech_llm
from mooer_jax.audio.decode import load_audio
from mooer_jax.prompts import encode_prompt, fill_template
from tests.numerics import exceeds_the_bound
from tests.parity import torch_models, torch_salmonn
from tests.text.spm_training import train

LAYERS = 3 + 2 + 2  # of BEATs, the Q-Former and the LLM, each of which rounds
MAX_NEW_TOKENS = 12


class Sides:
  """The files, our checkpoint of them, and the PyTorch parts."""

  def __init__(self, folder, clips, *, with_beats):
    llm = torch_salmonn.write_llm(
      folder / "vicuna", train(folder / "tokenizer", "bpe"), hidden_size=40
    )
    self.theirs = torch_salmonn.Salmonn(llm, with_beats=with_beats)
    paths = torch_salmonn.write(folder / "files", self.theirs)
    prompts = folder / "prompts.json"
    prompts.write_text(json.dumps({"asr": torch_salmonn.PROMPT}))
    options = Options(llm=llm, prompts=prompts, **paths)
    self.ours = folder / "ours"
    import_checkpoint("salmonn", folder / "files" / "salmonn_v1.pth", self.ours, options=options)
    self.answers = functools.cache(self._answers)
    self.folder, self.paths = folder, [clip.path for clip in clips]
    self.waveforms = [load_audio(path) for path in self.paths]

  @functools.cached_property
  def transcriber(self):
    return Transcriber.from_checkpoint(self.ours, dtype="float32")

  @functools.cached_property
  def inputs(self):
    """What their LLM reads of each clip by itself."""
    heard = [self.theirs.frames(waveform_N) for waveform_N in self.waveforms]
    return [self.theirs.inputs(self.theirs.speech(frames)) for frames in heard]

  def _answers(self, beams):
    return [self.theirs.answer(x, beams=beams, max_new_tokens=MAX_NEW_TOKENS) for x in self.inputs]

  def tokens(self, transcriber, *, beams, batch_size):
    results = transcriber.transcribe(
      self.paths, batch_size=batch_size, num_beams=beams, max_new_tokens=MAX_NEW_TOKENS
    )
    return [result.tokens for result in results]


@pytest.fixture(
  scope="module",
  params=[True, pytest.param(False, marks=pytest.mark.nightly)],
  ids=["beats", "speech-only"],
)
def sides(request, clips, tmp_path_factory):
  folder = tmp_path_factory.mktemp("salmonn")
  yield Sides(folder, clips, with_beats=request.param)
  shutil.rmtree(folder)


def batch_of(waveforms, answers, config, tokenizer):
  made, frames = [], []
  for frontend in config.frontends:
    rows = [frontend.features(config.pad_to_min_duration(waveform_N)) for waveform_N in waveforms]
    frames.append(np.array([len(row) for row in rows], np.int32))
    made.append(np.zeros((len(rows), frames[-1].max(), rows[0].shape[1]), np.float32))
    for line, row in zip(made[-1], rows):
      line[: len(row)] = row
  text = fill_template(config.chat_template, dict(config.prompts)["asr"])
  before_S, after_S = encode_prompt(tokenizer, text)
  labels_BS = np.full((len(answers), max(map(len, answers))), -1, np.int32)
  for line, answer in zip(labels_BS, answers):
    line[: len(answer)] = answer
  return speech_llm.Batch(
    features=tuple(made),
    frames=tuple(frames),
    prefix_BS=np.tile(np.asarray(before_S, np.int32), (len(waveforms), 1)),
    suffix_BS=np.tile(np.asarray(after_S, np.int32), (len(waveforms), 1)),
    labels_BS=labels_BS,
  )


def test_every_stage_in_a_batch_is_what_pytorch_has_of_the_clip_alone(sides):
  transcriber, theirs = sides.transcriber, sides.theirs
  config, answers = transcriber.config, sides.answers(1)
  batch = batch_of(sides.waveforms, answers, config, transcriber.tokenizer)

  @jax.jit
  def stages(params, batch):
    frames_BTD, valid_BT = speech_llm.encode(params, batch, config)
    speech_BSD, _ = speech_llm.connect(params, frames_BTD, valid_BT, config)
    return frames_BTD, speech_BSD, speech_llm.answer_logits(params, batch, config)

  frames_BTD, speech_BSD, logits_BAV = map(np.asarray, stages(transcriber.params, batch))

  def run(module, dtype, waveform_N, answer):
    frames = module.frames(waveform_N)
    speech = module.speech(frames)
    return frames, speech, module.logits(module.inputs(speech), answer)

  for i, clip in enumerate(zip(sides.waveforms, answers)):
    ours = frames_BTD[i : i + 1], speech_BSD[i : i + 1], logits_BAV[i : i + 1, : len(clip[1])]
    torch_models.assert_parity(ours, run, theirs, *clip, layers=LAYERS)
  with exceeds_the_bound():  # of another answer
    torch_models.assert_parity(ours, run, theirs, clip[0], clip[1][::-1], layers=LAYERS)


@pytest.mark.parametrize("beams", [pytest.param(1, marks=pytest.mark.nightly), 4])
def test_the_tokens_are_those_of_pytorch_alone_and_in_batches(sides, beams):
  expected = sides.answers(beams)
  assert len({tuple(answer) for answer in expected}) > 0.5 * len(expected)  # they heard something
  for batch_size in (1, 6):
    assert sides.tokens(sides.transcriber, beams=beams, batch_size=batch_size) == expected


def test_there_and_back_the_tokens_are_the_same(sides, tmp_path):
  back = tmp_path / "back"
  export_checkpoint("salmonn", sides.ours, back)
  options = Options(
    whisper=back / "whisper",
    beats=back / "beats.pt" if (back / "beats.pt").exists() else None,
    llm=back / "llm",
    prompts=back / "test_prompt.json",
  )
  assert (options.beats is not None) == hasattr(sides.theirs, "beats")
  import_checkpoint("salmonn", back / "salmonn_v1.pth", tmp_path / "again", options=options)
  transcriber = Transcriber.from_checkpoint(tmp_path / "again", dtype="float32")
  assert transcriber.config == sides.transcriber.config
  assert sides.tokens(transcriber, beams=4, batch_size=6) == sides.answers(4)
