"""A run's files: their names, writes that are whole or absent, JSON Lines, the record of versions.

Nothing here imports PyTorch when it is imported: the command line needs these modules before it.
"""

from paint_engine.files.atomic import (
    flush,
    make_unfinished,
    new_directory,
    publish_directory,
    unfinished_path,
    write_atomic,
    write_json,
    write_link,
)
from paint_engine.files.failures import (
    WriteFailed,
    write_failure,
    writing,
)
from paint_engine.files.jsonl import (
    append_lines,
    json_line,
    open_jsonl,
    read_jsonl,
    truncate_jsonl,
)
from paint_engine.files.lock import (
    DirectoryLock,
    LockLost,
    is_lock_file,
)
from paint_engine.files.names import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    BEST_LINK,
    CHECKPOINTS_DIRECTORY,
    CONFIG_FILE,
    DATA_FILE,
    EVALUATIONS_DIRECTORY,
    LAUNCH_FILE,
    MANIFEST_FILE,
    METRICS_FILE,
    MODEL_CONFIG_FILE,
    MODEL_FILE,
    REPORT_FILE,
    RESULTS_FILE,
    SAMPLES_FILE,
    STATE_FILE,
    SUMMARY_FILE,
    VERSIONS_FILE,
    WANDB_ID_FILE,
)
from paint_engine.files.output import (
    command_output,
    printable_output,
)
from paint_engine.files.printable import (
    is_hidden,
    one_line,
    printable,
)
from paint_engine.files.versions import (
    present_versions,
    recorded_commit,
    recorded_name,
    write_versions,
)

__all__ = [
    "ADAPTER_CONFIG_FILE",
    "ADAPTER_FILE",
    "BEST_LINK",
    "CHECKPOINTS_DIRECTORY",
    "CONFIG_FILE",
    "DATA_FILE",
    "EVALUATIONS_DIRECTORY",
    "LAUNCH_FILE",
    "MANIFEST_FILE",
    "METRICS_FILE",
    "MODEL_CONFIG_FILE",
    "MODEL_FILE",
    "REPORT_FILE",
    "RESULTS_FILE",
    "SAMPLES_FILE",
    "STATE_FILE",
    "SUMMARY_FILE",
    "VERSIONS_FILE",
    "WANDB_ID_FILE",
    "DirectoryLock",
    "LockLost",
    "WriteFailed",
    "append_lines",
    "command_output",
    "flush",
    "is_hidden",
    "is_lock_file",
    "json_line",
    "make_unfinished",
    "new_directory",
    "one_line",
    "open_jsonl",
    "present_versions",
    "printable",
    "printable_output",
    "publish_directory",
    "read_jsonl",
    "recorded_commit",
    "recorded_name",
    "truncate_jsonl",
    "unfinished_path",
    "write_atomic",
    "write_failure",
    "write_json",
    "write_link",
    "write_versions",
    "writing",
]
