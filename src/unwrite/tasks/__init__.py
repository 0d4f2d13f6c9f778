"""Which tasks are there? Each makes pairs with roles, of a seed and a tokenizer."""

from __future__ import annotations

from unwrite.tasks.arguments import docstring as docstring
from unwrite.tasks.choice import copy_colour as copy_colour
from unwrite.tasks.choice import mcqa as mcqa
from unwrite.tasks.colors import colored_objects as colored_objects
from unwrite.tasks.entities import boxes as boxes
from unwrite.tasks.lists import laundry as laundry
from unwrite.tasks.sentences import agreement as agreement
from unwrite.tasks.sentences import capitals as capitals
from unwrite.tasks.sentences import pronoun as pronoun
from unwrite.tasks.transfer import ioi as ioi
from unwrite.tasks.years import greater_than as greater_than

NAMES = (
    "ioi", "laundry", "boxes", "colored_objects", "mcqa", "copy_colour", "docstring", "greater_than", "agreement",
    "pronoun", "capitals",
)  # fmt: skip
