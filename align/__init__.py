"""align: SFT, reward model and PPO over one base model, from recipes, under accelerate."""

from align.registering import import_after

__version__ = "0.1.0"

import_after("peft", "align.models.bottleneck")  # so that PEFT opens a folder of our adapters after `import align`
