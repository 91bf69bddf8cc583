"""accelerate launch scripts/sft.py RECIPE [a.b=value ...]: the sft stage of a recipe, with any accelerate config."""

from align.entry import main

if __name__ == "__main__":
    main("sft")
