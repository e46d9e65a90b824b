"""A small speech-to-speech model of spoken numbers, trained from scratch on real recordings.

Command:   make mini-s2s
           (or, with the data that it makes: python train.py --config=configs/mini_s2s.py:asr,
           then :speech and :vocoder)
Stages:    asr        recognition in five languages
           speech     translation and sums, answered with text and audio tokens; starts from asr
           vocoder    states of the LLM to a waveform; starts from speech
Hardware:  2 CPU cores
Time:      not measured yet
Expected:  not measured yet
"""

from mooer_jax.run.config import default_config

# Of the transcripts and answers of demo/mini_s2s/corpus.py.
CHARACTERS = " ',-acdefghilmnopqrstuvwxyzéùавдеиклмнопрстуцчшыьюя"
UNITS = 160
AUDIO = ("<|audio_start|>", *(f"<A_{number}>" for number in range(UNITS)))
PROMPTS = {
  "asr": "<|transcribe|>",
  "s2s_trans": "<|translate|>",
  "s2s_chat": "<|answer|>",
  "say": "<TextHere><|say|>",
}
STEPS = dict(asr=2000, speech=2000, vocoder=4000)
INIT_FROM = dict(speech="asr", vocoder="speech")


def get_config(stage: str = "speech"):
  if stage not in STEPS:
    raise ValueError(f"configs/mini_s2s.py:{stage}: must be one of {', '.join(STEPS)}")
  config = default_config()
  config.workdir = f"out/mini-s2s/{stage}"
  if before := INIT_FROM.get(stage):
    config.init_from = f"out/mini-s2s/{before}/step_{STEPS[before]:08d}"
  config.characters = CHARACTERS
  config.specials = (
    "<|end|>", "<|transcribe|>", "<|translate|>", "<|answer|>", "<|say|>", *AUDIO,
  )  # fmt: skip
  config.eos = "<|end|>"
  # The audio tokens are made of the encoder of asr, so the later stages keep it.
  config.trainable = ("connector/.*", "decoder/.*")

  config.model.encoders = ("sanm_large",)
  config.model.connector = "linear"
  config.model.decoder = "qwen2_0.5b"
  config.model.chat_template = "bare"
  # Only one stage has text instead of speech, and is the first to know its task.
  config.model.prompts = {task: p for task, p in PROMPTS.items() if stage != "asr" or task == "asr"}
  config.model.max_audio_s = 7.5
  config.model.sanm = dict(hidden_size=192, layers=5, heads=4, intermediate_size=768)
  config.model.linear = dict(hidden_size=384)
  config.model.llm = dict(vocab_size=256, hidden_size=192, intermediate_size=576)
  config.model.llm.update(layers=4, heads=6, kv_heads=2, head_dim=32)

  config.compute.features = "device"  # many times as fast as on the host
  config.data.batch_size = 32
  config.data.buckets = (60, 125)  # LFR steps of 60 ms; each length is compiled once
  config.data.min_s = 0.3
  config.data.max_s = 7.4
  config.data.shuffle_buffer_size = 1024
  config.data.answer_buckets = (32, 48)
  shards, labels = "out/mini-s2s/shards", "out/mini-s2s/labels"
  if stage == "asr":
    config.trainable = ("encoders/.*", *config.trainable)
    config.data.mixture = {
      name: dict(shards=f"{shards}/{name}-train/data.list", weight=weight)
      for name, weight in (("trans", 0.5), ("sums", 0.3), ("english", 0.2))
    }
  else:
    config.data.task = ""  # that of each data set
    config.data.prompt_tokens = 36  # an answer in English, as the text to say
    config.data.answer_buckets = (80, 128)  # with audio tokens of 40 ms
    config.data.mixture = {
      name: dict(
        shards=f"{shards}/{name}-train/data.list",
        weight=weight,
        task=task,
        labels=f"{labels}/{name}",
      )
      for name, task, weight in (("trans", "s2s_trans", 0.45), ("sums", "s2s_chat", 0.35))
    }
    config.data.mixture.say = dict(
      shards="out/mini-s2s/data/english/train/say.jsonl", weight=0.2, task="say",
      labels=f"{labels}/english",
    )  # fmt: skip

  config.optimizer.peak_lr = 2e-3 if stage == "asr" else 1e-3
  config.optimizer.warmup = "linear"
  config.optimizer.warmup_steps = 100
  config.optimizer.decay = "cosine"
  config.optimizer.betas = (0.9, 0.98)
  config.optimizer.max_grad_norm = 1.0
  if stage == "vocoder":
    _train_vocoder(config, labels)
  config.optimizer.total_steps = config.train.steps = STEPS[stage]

  config.train.log_every = 20
  config.train.save_every = 500
  config.train.max_to_keep = 2
  if stage == "asr":
    config.train.cmvn = "estimate"

  config.generation.max_new_tokens = 128
  config.eval.metric = "word"
  config.eval.batch_size = 32
  config.speech.recogniser_prompt = "forty two, seven"  # numbers in words, without hyphens
  return config


def _train_vocoder(config, labels: str) -> None:
  """Train a vocoder of 1.4 M parameters on the answers of both tasks."""
  config.train.objective = "vocoder"
  config.trainable = ("vocoder/.*", "speaker/.*")
  config.model.speech_output = dict(
    # 4 x 8 x 5 x 4 = 640 samples at 16 kHz for each audio token, as in demo/mini_s2s/corpus.py
    vocoder=dict(
      input_width=192, speaker_width=64, hidden_size=192, stretch=4, rates=(8, 5, 4),
      taps=(16, 15, 8), block_taps=(3, 7), dilations=(1, 3, 5), sample_rate_hz=16000,
    ),
    speaker=dict(blocks=(1, 1, 1, 1), channels=(16, 16, 32, 32), output_width=64),
    drop_last=2,
  )  # fmt: skip
  del config.data.mixture.say  # the answers of the two tasks are enough
  config.data.target_audio = f"{labels}/targets"
  config.data.target_s = 0.4
  config.data.voice_s = 2.0
  config.data.batch_size = 8
  config.vocoder_training.discriminators = dict(width=8, periods=(2, 3, 5, 7), scales=2)
  config.vocoder_training.mel_window = 512
  config.vocoder_training.mel_hop = 128
  config.optimizer.peak_lr = 5e-4
  config.optimizer.betas = (0.8, 0.99)
  config.optimizer.warmup_steps = 0
  config.optimizer.decay = "cosine"
  config.optimizer.max_grad_norm = 0.0
