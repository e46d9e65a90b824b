"""Answers with speech: from a checkpoint, as a stream, in dialogues; voices; bad input."""

import dataclasses

import jax
import numpy as np
import pytest
import soundfile

import mooer_jax
from mooer_jax import speech_llm
from mooer_jax.generation import GenerationConfig
from mooer_jax.inputs import extract_features
from mooer_jax.transcribe import session as sessions
from mooer_jax.transcribe.session import SpeakingModel
from tests.transcribe.speaking import OPTIONS, TOKENIZER, VOICE_N, make_config


@pytest.fixture(scope="module")
def responder(speaking_folder):
  return mooer_jax.SpeechResponder.from_checkpoint(speaking_folder, voice=VOICE_N)


def test_a_clip_is_answered_with_text_and_speech(responder, clips):
  found = responder(clips[0].path, task="s2s_chat")
  assert found.no_speech is None and found.sample_rate_hz == responder.sample_rate_hz == 16000
  start = found.tokens.index(responder.model.start_id)
  assert found.text == TOKENIZER.decode(found.tokens[:start]).replace("\\n", "\n") != ""
  assert found.waveform_N.shape == ((len(found.tokens) - start - 2) * 16,)
  assert found.warnings() == ["the answer was truncated at max_new_tokens=24"]
  # The text is that of the transcriber.
  [text] = mooer_jax.Transcriber(
    responder.model.params, responder.model.config, TOKENIZER, GenerationConfig(**OPTIONS)
  ).transcribe([clips[0].path], task="s2s_chat")
  assert text.tokens == found.tokens


def test_a_stream_is_the_answer(responder, clips):
  whole = responder(clips[0].path, task="s2s_chat")
  chunks = [*responder.stream(clips[0].path, task="s2s_chat", chunk_frames=4)]
  assert "".join(chunk.text for chunk in chunks) == whole.text
  joined_N = np.concatenate([chunk.waveform_N for chunk in chunks])
  np.testing.assert_allclose(joined_N, whole.waveform_N, rtol=0, atol=1e-4)
  assert np.isfinite(joined_N).all() and joined_N.std() > 1e-3
  times = [chunk.elapsed_s for chunk in chunks]
  assert times == sorted(times) and [chunk.response for chunk in chunks[:-1]].count(None) > 3
  response = chunks[-1].response
  assert response.tokens == whole.tokens and response.text == whole.text
  first = next(chunk for chunk in chunks if len(chunk.waveform_N))
  assert response.first_audio_s == first.elapsed_s < times[-1]
  with pytest.raises(ValueError, match="num_beams=2: a stream needs num_beams=1"):
    responder.stream(clips[0].path, task="s2s_chat", num_beams=2)


def test_a_turn_during_a_stream_is_refused_at_its_end(responder, clips):
  """The history that the stream was answered with is not that of the session any more."""
  session = responder.session(task="s2s_chat")
  stream = session.stream(clips[0].path, max_new_tokens=4)
  answered = session(clips[1].path, max_new_tokens=4)
  with pytest.raises(ValueError, match="read a stream to its end before the next turn"):
    list(stream)
  assert session.responses == [answered]


def test_beams_of_the_checkpoint_do_not_hinder_a_stream(responder, clips):
  model = dataclasses.replace(
    responder.model,
    options=dataclasses.replace(responder.model.options, num_beams=4, do_sample=True, top_p=0.85),
  )
  session = sessions.Session(model, task="s2s_chat", speaker_BE=responder.speaker_vector())
  *_, last = session.stream(clips[0].path, seed=3)
  assert last.response.tokens == responder(clips[0].path, task="s2s_chat", do_sample=True,
    top_p=0.85, seed=3).tokens  # fmt: skip


@pytest.mark.parametrize(
  "pieces, sent",
  [
    (["a", "\\", "n", "b"], ["a", "\n", "b"]),
    (["\\", "a"], ["\\a"]),
    (["a", "\\"], ["a", "\\"]),
    (["a", "\\", "<|im_start|>", "b"], ["a", "\\"]),  # the start token
  ],
)
def test_a_line_break_is_streamed_whole(responder, pieces, sent):
  config = make_config(start_token="<|im_start|>")
  model = dataclasses.replace(responder.model, config=config)
  session = sessions.Session(model, task="s2s_chat", speaker_BE=responder.speaker_vector())
  tokens = (sessions.SpeechPiece([TOKENIZER.token_id(piece)]) for piece in pieces)
  turn_SD = np.zeros((1, 32), np.float32)
  chunks = session._chunks(tokens, turn_SD, GenerationConfig(), 0.0, turns=0)
  assert [chunk.text for chunk in chunks if chunk.text] == sent


def test_a_dialogue_is_one_prompt(responder, clips, monkeypatch):
  """The second turn is answered after speech, prompt and answer of the first, without padding."""
  model, config = responder.model, responder.model.config
  session = responder.session(task="s2s_chat")
  first = session(clips[0].path)
  given = []
  real = sessions.generate_speech_from
  monkeypatch.setattr(
    sessions,
    "generate_speech_from",
    lambda *args, **more: given.append(args) or real(*args, **more),
  )
  second = session(clips[1].path)
  [(_, inputs_BSD, valid_BS, *_)] = given
  prompt = "<|im_start|>user\nAnswer my question with speech. <|im_end|>\n<|im_start|>assistant\n"
  system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
  answer = first.tokens[: first.tokens.index(model.start_id)]

  def embed(tokens):
    return speech_llm.embed(model.params, np.array([tokens]), config)[0]

  def speech(clip):
    features = extract_features(mooer_jax.load_audio(clip.path), config)
    batch = speech_llm.Batch(
      (features[0][None],), (np.array([len(features[0])], np.int32),),
      np.zeros((1, 0), np.int32), np.zeros((1, 1), np.int32), np.zeros((1, 1), np.int32),
    )  # fmt: skip
    return sessions._embed_prompt(model.params, batch, config)[0][0, :-1]

  expected_SD = np.concatenate(
    [
      speech(clips[0]),
      embed(TOKENIZER.encode(system + prompt)),
      embed([*answer, TOKENIZER.eos_id, *TOKENIZER.encode("\n")]),
      speech(clips[1]),
      embed(TOKENIZER.encode(prompt)),
    ]
  )
  ours_SD = np.asarray(inputs_BSD)[np.asarray(valid_BS)]
  np.testing.assert_allclose(ours_SD, expected_SD, rtol=1e-3, atol=1e-3 * np.abs(expected_SD).max())
  assert session.responses == [first, second]
  assert second.tokens != responder(clips[1].path, task="s2s_chat").tokens
  *_, third = session.stream(clips[2].path)
  assert session.responses[2] is third.response


def test_a_dialogue_in_low_precision(speaking_folder, clips):
  responder = mooer_jax.SpeechResponder.from_checkpoint(
    speaking_folder, voice=VOICE_N, dtype="bfloat16", quantization="int8"
  )
  assert responder.model.params["vocoder"]["last"]["kernel"].dtype == np.float32
  bias = ((responder.model.start_id, 3e4),)  # every token is the start token
  session = responder.session(task="s2s_trans")
  for clip in clips[:2]:
    whole = session(clip.path, sequence_bias=bias, max_new_tokens=8)
    assert whole.waveform_N.shape == ((8 - 2) * 16,) and whole.text == ""
  *_, last = session.stream(clips[2].path, sequence_bias=bias, max_new_tokens=8)
  assert last.response.waveform_N.shape == ((8 - 2) * 16,)


def test_a_failed_turn_is_not_part_of_a_dialogue(responder, clips):
  session, other = (responder.session(task="s2s_chat") for _ in range(2))
  session(clips[0].path), other(clips[0].path)
  with pytest.raises(FileNotFoundError):
    session("missing.wav")
  next(session.stream(clips[2].path))
  assert session(clips[1].path).tokens == other(clips[1].path).tokens


def test_voices_are_cached_by_content(responder, clips, tmp_path, monkeypatch):
  soundfile.write(tmp_path / "a.wav", VOICE_N[:12000], 16000, subtype="FLOAT")
  one = responder(clips[0].path, task="s2s_chat", voice=tmp_path / "a.wav")
  default = responder(clips[0].path, task="s2s_chat")
  assert one.tokens == default.tokens
  assert np.abs(one.waveform_N - default.waveform_N).max() > 1e-3
  monkeypatch.setattr("mooer_jax.transcribe.voice.speaker_mel", None)
  (tmp_path / "a.wav").rename(tmp_path / "b.wav")
  again = responder.speaker_vector(tmp_path / "b.wav")
  np.testing.assert_array_equal(again, responder.speaker_vector((tmp_path / "b.wav").read_bytes()))


def test_a_voice_of_another_rate_is_resampled(responder, clips):
  import soxr

  voice_N = mooer_jax.load_audio(clips[0].path)
  expected = responder.speaker_vector(voice_N)
  high_N = soxr.resample(voice_N, 16000, 44100, quality="VHQ")
  found = responder.speaker_vector(wav_bytes(high_N, 44100))
  assert float((expected * found).sum()) > 0.99
  assert float((expected * responder.speaker_vector(wav_bytes(high_N, 16000))).sum()) < 0.99


def wav_bytes(waveform_N, rate_hz):
  import io

  file = io.BytesIO()
  soundfile.write(file, waveform_N, rate_hz, format="WAV", subtype="FLOAT")
  return file.getvalue()


@pytest.mark.parametrize(
  "voice, message",
  [
    (wav_bytes(VOICE_N[:1600], 16000), "voice: 0.10 s is too short for a voice; give at least 0.5"),
    (np.zeros(16000, np.float32), "voice: silent"),
    (np.zeros(16000, int), r"voice: int64 array of shape \(16000,\); give floats"),
    (np.full(16000, np.nan), "NaN"),
    (b"no audio", "voice: cannot be decoded|voice: neither"),
    (5, "voice: int; give a path"),
  ],
)
def test_a_bad_voice_is_an_error(responder, clips, voice, message):
  with pytest.raises(ValueError, match=message):
    responder(clips[0].path, task="s2s_chat", voice=voice)


def test_the_voice_of_a_checkpoint_is_the_default(save_speaking, speaking_folder, responder, clips):
  with pytest.raises(
    ValueError, match="no voice: the checkpoint has no prompt.wav; give .*--voice"
  ):
    mooer_jax.SpeechResponder.from_checkpoint(speaking_folder)(clips[0].path, task="s2s_chat")

  def source(path):
    soundfile.write(path / "prompt.wav", VOICE_N, 16000, subtype="FLOAT")

  with_voice = save_speaking(responder.model.config, source=source)
  ours = mooer_jax.SpeechResponder.from_checkpoint(with_voice)
  expected_BE = responder.speaker_vector()
  np.testing.assert_allclose(ours.speaker_vector(), expected_BE, rtol=0, atol=1e-5)


def test_the_task_must_be_one_of_the_checkpoint(responder, clips):
  with pytest.raises(ValueError, match=r"task='s2s': the model has \['asr', .*, 's2s_trans'\]"):
    responder(clips[0].path, task="s2s")
  with pytest.raises(ValueError, match="name a task; the model has"):
    responder(clips[0].path)

  def with_tasks(**prompts):
    config = responder.model.config.replace(prompts=tuple(prompts.items()))
    return mooer_jax.SpeechResponder(responder.model.params, config, TOKENIZER, voice=VOICE_N)

  assert with_tasks(asr="a", s2s_chat="b").default_task() == "s2s_chat"
  text = with_tasks(talk="a", say="say <TextHere>", ask="{}")
  with pytest.raises(ValueError, match="'say <TextHere>' takes text instead of audio"):
    text.session(task="say")
  with pytest.raises(ValueError, match="task='ask': its prompt '{}' takes a question"):
    text.session(task="ask")
  assert with_tasks(talk="a", say="say <TextHere>").default_task() == "talk"


def test_a_checkpoint_that_cannot_speak_is_an_error(
  save_speaking, speaking_params, responder, clips
):
  config = make_config()
  silent = {
    name: part for name, part in speaking_params.items() if name not in ("vocoder", "speaker")
  }
  folder = save_speaking(config.replace(speech_output=None), params=silent)
  with pytest.raises(ValueError, match=f"{folder}: the model has no speech output"):
    mooer_jax.SpeechResponder.from_checkpoint(folder)
  folder = save_speaking(config, params=silent)
  with pytest.raises(ValueError, match="describe different models: speaker/.* is missing"):
    mooer_jax.SpeechResponder.from_checkpoint(folder)
  folder = save_speaking(make_config(start_token="<|start|>"))
  with pytest.raises(ValueError, match="tokenizer of the LLM has no token '<|start|>'"):
    mooer_jax.SpeechResponder.from_checkpoint(folder)
  for options, message in (
    (dict(num_return_sequences=2, do_sample=True), "one result per clip"),
    (dict(batch_size=2), "unknown config key 'generation.batch_size'"),
    (dict(seed=1), "seed has no effect without sampling"),
  ):
    with pytest.raises(ValueError, match=message):
      responder(clips[0].path, task="s2s_chat", **options)


def test_a_long_clip_is_an_error(responder):
  with pytest.raises(ValueError, match="audio: 7.0 s, but this model takes at most 6 s; give a"):
    responder(np.resize(VOICE_N, 7 * 16000), task="s2s_chat")


@pytest.mark.parametrize("part, message", [("vocoder", "samples"), ("speaker", "vector")])
def test_damaged_weights_are_an_error(responder, clips, part, message):
  model = responder.model
  params = {**model.params, part: jax.tree.map(lambda x: x * np.nan, model.params[part])}
  with pytest.raises(ValueError, match=f"{message}.* not finite; the weights of the {part}"):
    damaged = mooer_jax.SpeechResponder(
      params, model.config, TOKENIZER, model.options, voice=VOICE_N
    )
    damaged(clips[0].path, task="s2s_chat")


def test_scores_that_are_not_finite_are_an_error(responder, clips):
  params = {**responder.model.params}
  params["decoder"] = jax.tree.map(lambda x: x * np.nan, params["decoder"])
  model: SpeakingModel = dataclasses.replace(responder.model, params=params)
  session = sessions.Session(model, task="s2s_chat", speaker_BE=responder.speaker_vector())
  with pytest.raises(ValueError, match="not finite"):
    session(clips[0].path)
  with pytest.raises(ValueError, match="not finite"):
    [*session.stream(clips[0].path)]
