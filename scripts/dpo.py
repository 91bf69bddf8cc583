"""accelerate launch scripts/dpo.py RECIPE [a.b=value ...]: the dpo stage, with any accelerate config."""

from align.entry import main

if __name__ == "__main__":
    main("dpo")
