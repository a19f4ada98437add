"""The keys of servers. They come from the environment alone, and stand in no file, command line or
URL."""

import os

SERVER_KEY = "VLLM_API_KEY"
"""the environment variable with the key of vLLM servers; vLLM reads the same one"""
# Keys of this program that no child process needs. A user's function may need the hub's token.
_OWN = (SERVER_KEY, "WANDB_API_KEY")


def read_key() -> str | None:
    """Returns the server's key, without surrounding whitespace; None if there is none. Raises
    ValueError, which does not show it, for a key that HTTP cannot send."""
    key = os.environ.get(SERVER_KEY, "").strip()
    if not all("!" <= char <= "~" for char in key):
        raise ValueError(
            f"{SERVER_KEY} (its value is not shown) has a space, a line break or a character "
            "outside ASCII within it; needs visible ASCII characters alone; set it again"
        )
    return key or None


def without_keys() -> dict[str, str]:
    """Returns the environment for a child process that calls no server."""
    return {name: value for name, value in os.environ.items() if name not in _OWN}


def with_key(command: str) -> str:
    """Returns a shell command for a user, which gets the key from the shell's environment or stops
    where that has none. The key stays out of the list of processes."""
    return f'{SERVER_KEY}="${{{SERVER_KEY}:?}}" {command}'
