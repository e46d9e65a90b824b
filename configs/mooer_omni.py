"""Training stages of a MooER that speaks, as MooER-omni; the config argument is the stage.

Command:   python train.py --config=configs/mooer_omni.py:1, then :2 and :3
           The data sets are out/omni/audio_text.jsonl, text_audio.jsonl and audio_audio.jsonl, or
           those of --config.data.mixture.audio_text.shards=...; docs/speech_training.md makes
           out/omni/base and the labels with audio tokens, text_audio.units and audio_audio.units.
Stages:    the tasks accumulate
           1   audio -> text: transcription (audio_text)
           2   + text -> audio: a question in text, an answer with audio tokens (text_audio)
           3   + audio -> audio: a spoken question, an answer with audio tokens (audio_audio);
               shares 0.3, 0.3 and 0.4
           The encoder is frozen in all stages, so the audio tokens stay valid.
Hardware:  16 TPU v5e (4x4) or more; it has not run yet. To compute the memory that a mesh needs:
           python -m benchmarks.aot --config=configs/mooer_omni.py:3 --topology=v5e:4x4
Time:      not measured
Expected:  not measured; MooER-omni's training data and code are not published
"""

from mooer_jax.prompts import TASKS
from mooer_jax.run.config import default_config

SOURCES = {  # of a stage, those of the stages before it too
  "1": dict(audio_text=dict(weight=0.3, task="asr")),
  "2": dict(text_audio=dict(weight=0.3, task="t2s_chat")),
  "3": dict(audio_audio=dict(weight=0.4, task="s2s_chat")),
}
STEPS = 100_000
PROMPTS = {**TASKS, "t2s_chat": "Answer my question with speech. <TextHere>"}


def get_config(stage: str = "3"):
  if stage not in SOURCES:
    raise ValueError(f"configs/mooer_omni.py:{stage}: must be one of {', '.join(SOURCES)}")
  sources = {name: of for n in SOURCES if n <= stage for name, of in SOURCES[n].items()}
  config = default_config()
  config.workdir = f"out/omni/{stage}"
  config.init_from = (
    "out/omni/base" if stage == "1" else f"out/omni/{int(stage) - 1}/step_{STEPS:08d}"
  )
  config.trainable = ("connector/.*", "decoder/.*/lora_[ab]")
  if stage != "1":  # audio tokens are new to the LLM
    config.trainable += ("decoder/embed/embedding", "decoder/head/kernel")

  config.model.encoders = ("sanm_large",)
  config.model.connector = "linear"
  config.model.decoder = "qwen2_7b"
  config.model.chat_template = "mooer"
  config.model.prompts = {of["task"]: PROMPTS[of["task"]] for of in sources.values()}
  config.model.max_audio_s = 30.0
  config.model.llm = dict(lora_rank=64, lora_alpha=16.0, lora_dropout=0.05)
  # 151,646 tokens of Qwen2, <|audio_start|> and 1,000 audio tokens, in a multiple of 128 rows.
  config.model.llm.vocab_size = 152_704

  config.compute.dtype = "bfloat16"
  config.compute.remat = "full"

  config.data.shards = ""
  config.data.task = ""  # that of each data set
  config.data.mixture = {
    name: dict(shards=f"out/omni/{name}.jsonl", labels=f"out/omni/{name}.units", filter="", **of)
    for name, of in sources.items()
  }
  config.data.mixture.audio_text.labels = ""  # its transcripts
  if stage != "1":
    config.data.prompt_tokens = 160  # longest prompt with its question in text
  config.data.batch_size = 128
  config.data.buckets = (50, 100, 167, 250, 334)  # LFR steps of 60 ms, up to 20 s
  # About 21.5 audio tokens a second, after the text.
  config.data.answer_buckets = (32, 96, 256) if stage == "1" else (96, 320, 640)
  config.data.workers = 8

  config.optimizer.peak_lr = 1e-4
  config.optimizer.warmup = "log"
  config.optimizer.warmup_steps = 1000
  config.optimizer.decay = "linear"
  config.optimizer.total_steps = 1_000_000

  config.train.steps = STEPS
  config.train.gradient_accumulation_steps = 2
  config.train.save_every = 10_000

  config.mesh.data, config.mesh.fsdp = 1, -1
  config.generation.max_new_tokens = 256 if stage == "1" else 1000
  return config
