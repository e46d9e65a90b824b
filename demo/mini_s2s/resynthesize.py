"""Pass real speech through the vocoder of a model: the best that it could say.

    python -m demo.mini_s2s.resynthesize --checkpoint CKPT --task s2s_trans \
        --wav-scp test/wav.scp --labels LABELS --voice voice.flac --out FOLDER

The LLM reads each input and its right answer, text and audio tokens, from a label file of
`mooer-jax units encode`; the vocoder takes the states at these tokens. Writes KEY.wav. Scored by
`eval.py --mode=speech`, it separates the errors of the vocoder from those of the answers.
"""

import argparse
import functools
import json
from pathlib import Path

import jax
import numpy as np
import soundfile
from rich.progress import track

from configs import mini_s2s
from mooer_jax import speech_llm
from mooer_jax.config import build
from mooer_jax.data.config import DataConfig
from mooer_jax.data.dataset import eval_batches
from mooer_jax.evaluation.text_files import read_text
from mooer_jax.files import replace_file
from mooer_jax.run.process import prepare_process
from mooer_jax.transcribe.responder import SpeechResponder
from mooer_jax.vocoders import segment


def resynthesize(
  checkpoint: Path, task: str, wav_scp: Path, labels: Path, voice: Path, out: Path
) -> None:
  """Write the waveforms of the right answers.

  Args:
    checkpoint: of a model with a vocoder, or a run.
    task: of all inputs.
    wav_scp: the inputs, `KEY path` lines.
    labels: their answers, `KEY text<|audio_start|><A_3>…` lines.
    voice: recording of the voice to speak in.
    out: output folder.

  Raises:
    ValueError: if an input cannot be read, or an answer is too long.
  """
  prepare_process()
  responder = SpeechResponder.from_checkpoint(checkpoint, voice=voice)
  model, tokenizer = responder.model.config, responder.model.tokenizer
  assert model.speech_output is not None
  start_id = tokenizer.token_id(model.speech_output.start_token)
  inputs = out / "inputs.jsonl"
  with replace_file(inputs) as beside:
    rows = ({"key": key, "wav": wav, "txt": ""} for key, wav in read_text(wav_scp).items())
    beside.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
  settings = mini_s2s.get_config("speech").data
  lengths = {name: settings[name] for name in ("buckets", "answer_buckets", "min_s", "max_s")}
  config = build(
    DataConfig,
    dict(shards=str(inputs), labels=str(labels), task=task, batch_size=16,
         shuffle_buffer_size=1024, **lengths),
    "data",
  )  # fmt: skip
  voice_E = responder.speaker_vector()[0]
  for host in track(eval_batches(config, tokenizer, model), "speaking the right answers"):
    if host.skipped:
      raise ValueError(f"{host.skipped[0].key}: {host.skipped[0].cause} {host.skipped[0].detail}")
    labels_BS = np.asarray(host.batch.labels_BS)
    # Between the start token and eos; the state at the start token predicts the first.
    start_B = (labels_BS == start_id).argmax(axis=1)
    frames_B = np.maximum((labels_BS >= 0).sum(axis=1) - start_B - 2, 0)
    waves_BN = _speak(
      responder.model.params, host.batch, start_B + 1, frames_B,
      np.tile(voice_E, (len(labels_BS), 1)), model, frames=labels_BS.shape[1],
    )  # fmt: skip
    vocoder = model.speech_output.vocoder
    for key, wave_N, frames in zip(host.keys, np.asarray(waves_BN), frames_B):
      wave_N = wave_N[: frames * vocoder.samples_per_frame]
      soundfile.write(out / f"{key}.wav", wave_N, vocoder.sample_rate_hz, subtype="PCM_16")


@functools.partial(jax.jit, static_argnames=("model", "frames"))
def _speak(params, batch, first_B, frames_B, speaker_BE, model, *, frames: int):
  states_BSD = segment(speech_llm.answer_hidden(params, batch, model), first_B, frames)
  return speech_llm.speak(params, states_BSD, frames_B, speaker_BE, model)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  for name, about in (
    ("checkpoint", "model with a vocoder, or a run"),
    ("wav-scp", "the inputs, `KEY path` lines"),
    ("labels", "their answers with audio tokens"),
    ("voice", "recording of the voice to speak in"),
    ("out", "output folder"),
  ):
    parser.add_argument(f"--{name}", type=Path, required=True, help=about)
  parser.add_argument("--task", required=True, help="task of the inputs")
  args = parser.parse_args()
  try:
    resynthesize(**vars(args))
  except (OSError, ValueError) as error:
    parser.error(str(error))


if __name__ == "__main__":
  main()
