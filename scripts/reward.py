"""accelerate launch scripts/reward.py RECIPE [a.b=value ...]: the reward stage, with any accelerate config."""

from align.entry import main

if __name__ == "__main__":
    main("reward")
