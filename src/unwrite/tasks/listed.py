"""What is each task, in a line? The table that a command and a page of the documentation show."""

from __future__ import annotations

from unwrite.tasks import arguments, choice, colors, entities, lists, sentences, transfer, years
from unwrite.tasks.task import Task

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        transfer.TASK, lists.TASK, entities.TASK, colors.TASK, choice.MCQA, choice.COPY_COLOUR, arguments.TASK,
        years.TASK, sentences.AGREEMENT, sentences.PRONOUNS, sentences.CAPITALS,
    )
}  # fmt: skip
