"""Training that is interrupted saves once: the step ends, a checkpoint is written, and training can be resumed."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

_log = logging.getLogger(__name__)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SaveOnInterrupt(TrainerCallback):
    """Has the Trainer save after the step in which :meth:`ask` was called, and raises KeyboardInterrupt then."""

    def __init__(self) -> None:
        self.asked = False

    def ask(self, *_: Any) -> None:
        """Handle a signal: save soon. At the second signal, stop at once."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        _log.warning("interrupted: the step is finished and saved; interrupt again to stop at once")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_save or self.asked

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_save or self.asked

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            where = f"step {state.global_step} is saved in {args.output_dir}"
            raise KeyboardInterrupt(f"interrupted; {where}, and training can go on from there (resume)")


@contextmanager
def saving_at_interrupt(trainer: Any) -> Iterator[None]:
    """Let interrupts (Ctrl-C, a scheduler's SIGTERM) save a checkpoint of ``trainer`` first.

    Python delivers signals to the main thread alone, and several processes would not stop at the same step: elsewhere
    an interrupt keeps its usual effect.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if not alone or threading.current_thread() is not threading.main_thread():
        yield
        return
    callback = SaveOnInterrupt()
    trainer.add_callback(callback)
    before = {number: signal.signal(number, callback.ask) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
