"""What tracers and converters say to their own developers, kept from people who can do nothing about it.

Each notice is known by its logger and its words, and only while lorafx itself traces or converts; everything else that
these loggers say is said as before. What was kept back goes to lorafx's own log at debug level. None of it can tell a
fault: whatever is captured and converted is compared with the eager model.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

_log = logging.getLogger(__name__)

_OF_SETTINGS = "Passing `generation_config` together with generation-related arguments"

#: Loggers, and how what they say begins or goes on.
NOTICES = {
    "torch.onnx._internal.exporter._registration": (
        # Operators of a package that is not there: a model that had them could not have been captured.
        "torchvision is not installed. Skipping %s",
        # torch's own table names types that it does not define: those operators are dispatched without their types.
        "Failed to infer the signature for function",
    ),
    # Said whenever a version is not the very one that transformers was tried with.
    "transformers.exporters.utils": (" is experimental and patches many backend internals; ",),
    # Of the two tokens that are generated to see what a model is called with.
    "transformers.generation.utils": ("Both `max_new_tokens`", "Both `min_new_tokens`", _OF_SETTINGS),
}
#: torch copies the specs of its own trees, by a check that it calls deprecated.
_OF_TREES = r"`isinstance\(treespec, LeafSpec\)` is deprecated"


@contextmanager
def without_notices() -> Iterator[None]:
    """Keep :data:`NOTICES` back while the block runs."""
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_OF_TREES, category=FutureWarning)
        for name, words in NOTICES.items():
            logger, kept_back = logging.getLogger(name), _KeptBack(words)
            logger.addFilter(kept_back)
            stack.callback(logger.removeFilter, kept_back)
        yield


class _KeptBack(logging.Filter):
    """Lets through whatever has none of ``words`` in what it says, before anything is filled in."""

    def __init__(self, words: tuple[str, ...]):
        super().__init__()
        self.words = words

    def filter(self, record: logging.LogRecord) -> bool:
        if not any(word in str(record.msg) for word in self.words):
            return True
        _log.debug("%s: %s", record.name, record.getMessage())
        return False
