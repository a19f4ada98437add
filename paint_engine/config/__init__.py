"""A run's configuration: its sections and their checks, presets, TOML and the command line.

Nothing here imports PyTorch, so that a mistake on the command line is answered at once.
"""

from paint_engine.config.command_line import CommandLine, load_config, user_errors
from paint_engine.config.schema import Config
from paint_engine.config.toml import to_toml

__all__ = ["CommandLine", "Config", "load_config", "to_toml", "user_errors"]
