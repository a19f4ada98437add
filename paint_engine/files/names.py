"""File names in a run directory, a checkpoint, an adapter and an evaluation."""

# In a run directory.
CONFIG_FILE = "config.toml"
VERSIONS_FILE = "versions.json"
DATA_FILE = "data.json"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
SUMMARY_FILE = "summary.json"
REPORT_FILE = "report.html"
LOCK_FILE = ".lock"
"""begins the name of the file that a directory holds while a run or an evaluation writes there"""
LAUNCH_FILE = ".launch"
"""names the launch by torchrun that has made the directory, for its restarts to find it by"""
WANDB_ID_FILE = "wandb_id.txt"
"""the run's id in W&B, with which a resumed run continues its curves"""
CHECKPOINTS_DIRECTORY = "checkpoints"
EVALUATIONS_DIRECTORY = "evaluations"
BASE_CACHE_DIRECTORY = "base-evaluations"
"""beside run directories: evaluations of models before training, which the runs share"""
TENSORBOARD_DIRECTORY = "tensorboard"
WANDB_DIRECTORY = "wandb"

# In `checkpoints`: step-N, and a link to the one with the best evaluation.
BEST_LINK = "best"
# In a checkpoint.
MANIFEST_FILE = "manifest.json"
STATE_FILE = "trainer_state.json"
# In peft's and transformers' formats.
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
MODEL_FILE = "model.safetensors"
MODEL_CONFIG_FILE = "config.json"

# In the directory of an evaluation by `paint_engine.evaluate`.
RESULTS_FILE = "results.json"
