"""Tasks by name: one file per task, one entry in TASKS."""

from mhpo_core.training.tasks.base import Example, Prompt, Task, TaskConfig
from mhpo_core.training.tasks.digit_sum import DigitSum
from mhpo_core.training.tasks.jsonl import Jsonl

TASKS: dict[str, type[TaskConfig]] = {cls.name: cls for cls in (DigitSum, Jsonl)}

__all__ = ["TASKS", "DigitSum", "Example", "Jsonl", "Prompt", "Task", "TaskConfig"]
