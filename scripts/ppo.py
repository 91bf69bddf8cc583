"""accelerate launch scripts/ppo.py RECIPE [a.b=value ...]: the ppo stage of a recipe, with any accelerate config."""

from align.entry import main

if __name__ == "__main__":
    main("ppo")
