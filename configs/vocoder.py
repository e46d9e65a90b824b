"""Vocoder of a model that answers with speech: HiFi-GAN, trained from the LLM's hidden states.

Command:   python train.py --config=configs/vocoder.py --config.data.target_audio=answers/wav.scp
           The model is that of the last stage of configs/mooer_omni.py, from its last checkpoint
           and on its questions and answers in speech. For another model that answers with text,
           <|audio_start|> and audio tokens, name its config, such as configs/vocoder.py:tiny, and
           set --config.init_from, --config.data.shards and --config.data.labels
Hardware:  as for training of the LLM, whose forward pass is most of a step; vocoder and
           discriminators have 106 M parameters, 1.3 GB with Adam's moments
Time:      not measured yet
Expected:  not measured yet
"""

import importlib

from mooer_jax.decoders.llm import LLMConfig


def get_config(base: str = "mooer_omni"):
  """The vocoder of the model of configs/BASE.py, from the last checkpoint of its run."""
  config = importlib.import_module(f"configs.{base}").get_config()
  config.init_from = f"{config.workdir}/step_{config.train.steps:08d}"
  config.workdir = f"out/vocoder_{base}"
  config.train.objective = "vocoder"
  config.trainable = ("vocoder/.*", "speaker/.*")
  config.train.cmvn = ""  # that of init_from

  if "speech_output" not in config.model:  # else it is that of the base; all sizes are MooER-omni's
    hidden_size = LLMConfig.SIZES[config.model.decoder].hidden_size
    config.model.speech_output = dict(
      # 4 x 8 x 8 x 2 x 2 = 1024 samples at 22,050 Hz for each audio token
      vocoder=dict(input_width=config.model.get("llm", {}).get("hidden_size", hidden_size)),
      drop_last=2,  # the states at the last audio token and at the end predict no audio
    )

  if base == "mooer_omni":  # only these answers have recordings
    source = config.data.mixture.audio_audio
    config.data.shards, config.data.labels = source.shards, source.labels
    config.data.task = source.task
    del config.data.mixture
  config.data.target_audio = ""
  config.data.target_s = 0.37  # HiFi-GAN: 8192 samples
  config.data.voice_s = 3.0
  config.data.batch_size = 16  # HiFi-GAN
  config.data.shuffle_buffer_size = 2048

  config.vocoder_training.mel_weight = 45.0
  config.vocoder_training.feature_weight = 2.0

  # HiFi-GAN's, where 2e-4 falls by 0.1 % an epoch: here by 1000 such epochs over the run. Without
  # its weight decay, since the norms of the weights are parameters of their own.
  config.optimizer.peak_lr = 2e-4
  config.optimizer.end_lr = 7.4e-5
  config.optimizer.betas = (0.8, 0.99)
  config.optimizer.warmup_steps = 0
  config.optimizer.decay = "exponential"
  config.optimizer.total_steps = 400_000
  config.optimizer.max_grad_norm = 0.0  # one norm of both sides would let one slow the other
  config.train.steps = 400_000
  config.train.gradient_accumulation_steps = 1
  config.train.save_every = 5000
  return config
