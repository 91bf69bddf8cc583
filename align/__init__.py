"""align: SFT, reward model and PPO over one base model, from recipes, under accelerate."""

__version__ = "0.1.0"
