"""What is done with the layers that write text in images, beside finding them: `uw.localise` does that.

The only folder that imports diffusers. It asks for `pip install 'unwrite[diffusion]'`.
"""

from __future__ import annotations

from unwrite.diffusion.edit import edit as edit
from unwrite.diffusion.edit import harmless as harmless
from unwrite.diffusion.edit import layers as layers
from unwrite.diffusion.edit import lora_targets as lora_targets
from unwrite.diffusion.scores import clip as clip
from unwrite.diffusion.scores import tesseract as tesseract
