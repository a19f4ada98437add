"""Encoded prompts of large data sets, kept between starts.

Tens of thousands of prompts take a minute to render and encode, and are the same at each start of
a run, on each rank, and for each seed. They are kept by a digest of everything that decides them:
the texts, the settings, the tokenizer with its chat template, and the code.

A file is <digest of its origin>.prompts: the SHA-256 of that digest and the rest, then the number
of prompts, their lengths, and all token ids (little-endian; 8, 8 and 4 bytes each). What was cut
short, changed or renamed does not have its own SHA-256, and is made again.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from paint_engine import prompts as prompts_package
from paint_engine.config import templates
from paint_engine.config.sections import PromptsSection
from paint_engine.files import BadFile, ReadFailed, WriteFailed, read_bytes, write_atomic, writing
from paint_engine.prompts.template import shows_date
from paint_engine.types import Problem

CACHE_VARIABLE = "PAINT_CACHE_DIR"
"""the environment variable with the directory of caches; "none" for none"""
MIN_PROBLEMS = 5000
"""fewer are encoded in seconds"""
# A file has a few tens of megabytes.
_MAX_FILES = 32
_SUFFIX, _DIGEST_BYTES = ".prompts", hashlib.sha256().digest_size
# What else decides what a tokenizer and a template make of a text.
_LIBRARIES = ("transformers", "tokenizers", "jinja2")

Prompts = list[tuple[int, ...]]


def cache_directory() -> Path | None:
    """Returns the directory of encoded prompts; None if none are kept: PAINT_CACHE_DIR is "none",
    or the user has no home."""
    own = os.environ.get(CACHE_VARIABLE, "")
    if own.lower() == "none":
        return None
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    root = Path(own or os.path.join(caches, "paint-engine"))
    # What XDG asks for, and what is left of "~" without a home.
    return root / "prompts" if own or root.is_absolute() else None


class PromptCache:
    """The cache of one tokenizer's prompts. `say` gets a line where prompts were encoded."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], object]) -> None:
        self._tokenizer, self._say = tokenizer, say

    def get(
        self,
        encode: Callable[[], Prompts],
        problems: Sequence[Problem],
        prompts: PromptsSection,
        **settings: str | bool,
    ) -> Prompts:
        """Returns what `encode` returns, from the disk if it was kept.

        problems: of which the prompts have `problem` alone.
        settings: what decides the prompts beside problems, `prompts` and the tokenizer, with the
            kind of prompt.
        """
        directory = cache_directory() if self._is_known(prompts) else None
        if directory is None or len(problems) < MIN_PROBLEMS:
            return encode()
        origin = self._origin(problems, prompts, settings)
        path = directory / f"{origin}{_SUFFIX}"
        if (kept := _read(path, origin, len(problems))) is not None:
            return kept
        started = time.monotonic()
        encoded = encode()
        seconds, outcome = time.monotonic() - started, f"kept in {directory} for the next start"
        try:
            _write(path, origin, encoded)
        except WriteFailed as failure:
            outcome = f"not kept for the next start: {failure}"
        self._say(f"encoded {len(problems):,} prompts in {seconds:.0f} s, {outcome}")
        return encoded

    def _is_known(self, prompts: PromptsSection) -> bool:
        """Whether all that decides the prompts can be read: no code of the model's own, and no date
        that is the day's."""
        tokenizer = self._tokenizer
        ours = type(tokenizer).__module__.split(".")[0] == "transformers"
        backend = getattr(tokenizer, "backend_tokenizer", None)
        dated = shows_date(tokenizer) and prompts.date is None
        return ours and isinstance(backend, Tokenizer) and not dated

    @property
    def _tokenizer_state(self) -> list[str]:
        tokenizer = self._tokenizer
        special = json.dumps(tokenizer.special_tokens_map, default=str, sort_keys=True)
        split = str(tokenizer.split_special_tokens)
        backend = tokenizer.backend_tokenizer
        assert isinstance(backend, Tokenizer), "a tokenizer that is not known has no cache"
        whole = backend.to_str()
        return [type(tokenizer).__name__, whole, str(tokenizer.get_chat_template()), special, split]

    def _origin(
        self,
        problems: Sequence[Problem],
        prompts: PromptsSection,
        settings: Mapping[str, str | bool],
    ) -> str:
        """The digest of everything that decides the prompts."""
        texts = [problem.problem for problem in problems]
        parts = [_code(), self._tokenizer_state, prompts.model_dump(mode="json"), settings, texts]
        # JSON, for a lone surrogate has no UTF-8 form.
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@cache
def _code() -> list[str]:
    """The modules that make prompts, and the versions of the libraries below them."""
    folder = Path(prompts_package.__path__[0])
    files = [*sorted(folder.glob("*.py")), Path(templates.__file__), Path(__file__)]
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return digests + [version(name) for name in _LIBRARIES]


def _sealed(origin: str, content: bytes) -> bytes:
    return hashlib.sha256(origin.encode() + content).digest()


def _read(path: Path, origin: str, num_prompts: int) -> Prompts | None:
    """Returns the prompts of a file; None if there is none, or another's content."""
    try:
        whole = read_bytes(path)
    except (ReadFailed, BadFile):
        # It is made again. A directory that cannot be written either is said then.
        return None
    seal, content = whole[:_DIGEST_BYTES], whole[_DIGEST_BYTES:]
    if seal != _sealed(origin, content):
        return None
    (count,) = np.frombuffer(content, "<i8", 1)
    assert count == num_prompts, (count, num_prompts)
    lengths = np.frombuffer(content, "<i8", count, offset=8)
    ids = np.frombuffer(content, "<i4", offset=8 + 8 * count).tolist()
    bounds = [0, *np.cumsum(lengths).tolist()]
    assert bounds[-1] == len(ids), (bounds[-1], len(ids))
    return [tuple(ids[start:end]) for start, end in pairwise(bounds)]


def _write(path: Path, origin: str, prompts: Prompts) -> None:
    """Writes a file, and deletes the oldest of those beyond the limit. Raises WriteFailed."""
    lengths = np.array([len(prompts), *map(len, prompts)], "<i8")
    ids = np.fromiter((one for prompt in prompts for one in prompt), "<i4")
    content = lengths.tobytes() + ids.tobytes()
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomic(path, _sealed(origin, content) + content)
    with writing(path.parent):
        files = [entry for entry in os.scandir(path.parent) if entry.name.endswith(_SUFFIX)]
        times = {}
        for entry in files:
            # Another process may delete it too.
            with suppress(FileNotFoundError):
                times[entry.name] = os.stat(entry.path).st_mtime
        for name in sorted(times, key=times.__getitem__)[:-_MAX_FILES]:
            (path.parent / name).unlink(missing_ok=True)
