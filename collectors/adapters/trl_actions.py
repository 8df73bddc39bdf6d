"""What a critical alarm has a transformers trainer do: end, save, or halve its learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from collectors.adapters.harmless import harmless
from mhpo_core.alarms import Alarm
from mhpo_core.errors import ConfigError

STOP, SAVE, LOWER_LR = "stop", "save", "lower-lr"
ACTIONS = (STOP, SAVE, LOWER_LR)
LR_FACTOR = 0.5


def require_action(action: str, *, n_ranks: int, watched: bool) -> None:
    """Refuse what could never happen.

    Raises:
        ConfigError: there is no such action, or nobody watches the run for alarms.
    """
    if action not in ACTIONS:
        raise ConfigError(
            f"trl.attach: on_critical is {action!r}, allowed are {', '.join(ACTIONS)}. Give one or leave it out."
        )
    if n_ranks > 1 or not watched:
        why = "alarms=None" if not watched else f"{n_ranks} processes"
        raise ConfigError(
            f"trl.attach: on_critical is {action!r} with {why}, allowed are runs of one process that are watched for "
            "alarms. Leave it out, and use `mhpo check` beside the run."
        )


def acting(
    action: str, take: Callable[[], Alarm | None], event: Callable[[str, str], None], stopped: Callable[[str], None]
) -> Any:
    """A TrainerCallback that asks for an alarm after every step and acts on it.

    Args:
        take: gives each alarm once.
        event: notes what was done.
        stopped: called with the reason before the trainer ends.
    """
    from transformers import TrainerCallback

    def stop(control: Any, **_: Any) -> str:
        control.should_training_stop = True
        return "training ends"

    def save(control: Any, **_: Any) -> str:
        control.should_save = True
        return "a checkpoint is saved"

    def lower_lr(control: Any, optimizer: Any = None, lr_scheduler: Any = None, **_: Any) -> str:
        scale_learning_rate(optimizer, lr_scheduler, LR_FACTOR)
        return f"the learning rate is multiplied by {LR_FACTOR:g} from now on"

    act = {STOP: stop, SAVE: save, LOWER_LR: lower_lr}[action]

    class Acting(TrainerCallback):
        """After a step, since transformers forgets before one what was asked of it."""

        @harmless
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            alarm = take()
            if alarm is None:
                return
            done = act(control, **given)
            if action == STOP:
                stopped(f"critical alarm {alarm.id}")
            event("alarm_action", f"{action} after step {state.global_step}, critical alarm {alarm.id}: {done}")

    return Acting()


def scale_learning_rate(optimizer: Any, scheduler: Any, factor: float) -> None:
    """Multiply the learning rate of all later steps: the optimizer's now, and what the scheduler makes it from.

    Both are in the checkpoints of transformers, so a resumed run keeps the factor.
    """
    for group in optimizer.param_groups:
        for name in ("lr", "initial_lr"):
            if name in group:
                group[name] *= factor
    for one in _schedulers(scheduler):
        for name in ("base_lrs", "_last_lr"):
            if hasattr(one, name):
                setattr(one, name, [rate * factor for rate in getattr(one, name)])


def _schedulers(scheduler: Any) -> Iterator[Any]:
    """The schedulers within an accelerated or a sequential one."""
    inner = getattr(scheduler, "scheduler", scheduler)
    if inner is not None:
        yield inner
        for one in getattr(inner, "_schedulers", ()):
            yield from _schedulers(one)
